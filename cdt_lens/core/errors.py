"""The errors that `cdt_lens` raises on purpose.

A message says where, what was expected, what was found and what to do about it; the command line
prints it as one line without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_args


class CdtLensError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(CdtLensError, ValueError):
    """A value, file or option given by a person cannot be used as it is."""


class ArtifactError(CdtLensError):
    """A saved file is damaged, of an unknown format version, or belongs to something else."""


class UnsupportedModelError(CdtLensError):
    """The model has a component for which no propagation rule exists."""


class NonFiniteError(CdtLensError):
    """A number left the finite range; the message names where and which rule to change."""


def expect(value: Any, kind: type, where: str, fix: str) -> Any:
    """`value`, unless it is of another type, as calls in a notebook easily hand over.

    Raises:
        InputError: names the place, both types and the fix.
    """
    if not isinstance(value, kind):
        raise InputError(f"{where}: expected {kind.__name__}, got {type(value).__name__}; {fix}")
    return value


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """The closest option as `; did you mean 'x'?`, or nothing where none is close."""
    names = {option.strip().lower(): option for option in options}
    close = difflib.get_close_matches(word.strip().lower(), list(names), n=1)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def check_choices(what: str, options: object, kinds: Mapping[str, Any]) -> None:
    """Refuse a field of `options` whose value is not one of its Literal's.

    Raises:
        InputError: names the field, its value and what it may be.
    """
    for name, kind in kinds.items():
        value = getattr(options, name)
        if value not in get_args(kind):
            raise InputError(
                f"{what}: {name}={value!r}: expected one of {', '.join(get_args(kind))}"
            )
