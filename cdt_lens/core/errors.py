"""The errors that `cdt_lens` raises on purpose.

A message names the place, the expected value, the actual value and the fix. The command line prints
it as one line without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

_LONGEST = 2000  # characters of a message


class CdtLensError(Exception):
    """Base of every error that this package raises on purpose."""

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) <= _LONGEST:
            return text
        # A message may show a value of any length, from a file or a call.
        return f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


class InputError(CdtLensError, ValueError):
    """A value, file or option that the caller gave cannot be used."""


class ArtifactError(CdtLensError):
    """A saved file is damaged, of a newer format, of another kind, or of another model."""


class UnsupportedModelError(CdtLensError):
    """The model has a component without a propagation rule."""


class NonFiniteError(CdtLensError):
    """A number is not finite; the message names the place and the rule to change."""


def expect(value: Any, kind: type, where: str, fix: str) -> Any:
    """Return `value` if it is of the expected type.

    Args:
        value: The argument of a public function.
        kind: The expected type.
        where: The function or parameter, for the message.
        fix: The advice that ends the message.

    Returns:
        `value`, unchanged.

    Raises:
        InputError: `value` is of another type.
    """
    if not isinstance(value, kind):
        raise InputError(f"{where}: expected {kind.__name__}, got {type(value).__name__}; {fix}")
    return value


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Suggest the option that is closest to a misspelt word.

    Args:
        word: The unknown word.
        options: The known words.

    Returns:
        "; did you mean 'x'?", or "" where no option is close.
    """
    names = {option.strip().lower(): option for option in options}
    close = difflib.get_close_matches(word.strip().lower(), list(names), n=1)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def check_choices(what: str, options: object, kinds: Mapping[str, Any]) -> None:
    """Check the fields of an object that have a fixed set of values.

    Args:
        what: The name of the object, for the message.
        options: The object.
        kinds: The `Literal` type of each field, by its name.

    Raises:
        InputError: A field has a value that its `Literal` does not list.
    """
    for name, kind in kinds.items():
        value = getattr(options, name)
        if value not in get_args(kind):
            raise InputError(
                f"{what}: {name}={value!r}: expected one of {', '.join(get_args(kind))}"
            )
