"""The errors that `cdt_lens` raises on purpose.

A message says where, what was expected, what was found and what to do about it; the command line
prints it as one line without a traceback.
"""

from __future__ import annotations

from typing import Any


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
