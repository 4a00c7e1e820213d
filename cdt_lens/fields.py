"""One field of a file that others wrote: what it must be, or an error that names file and field.

`at` is the place in words, such as "file.json: nodes['a0.h0'].score".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cdt_lens.errors import InputError


def field_of(values: Mapping[str, Any], name: str, at: str) -> Any:
    """The value of a field that must be there.

    Raises:
        InputError: it is missing.
    """
    if name not in values:
        found = ", ".join(map(str, list(values)[:8])) or "nothing"
        raise InputError(f"{at}: {name} is missing; found {found}")
    return values[name]


def mapping(value: Any, at: str) -> Mapping[str, Any]:
    """`value`, which must hold fields by name.

    Raises:
        InputError: it is anything else.
    """
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{at}: expected fields by name, got {type(value).__name__}")
    return value


def names(value: Any, at: str) -> list[str]:
    """`value`, which must be a list of different names.

    Raises:
        InputError: it is anything else.
    """
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{at}: expected a list of names, got {type(value).__name__}")
    if len(set(value)) < len(value):
        raise InputError(f"{at}: {repeated(value)!r} is there twice; keep one of the two")
    return list(value)


def repeated(values: Iterable[str]) -> str:
    """The most frequent of several values."""
    return Counter(values).most_common(1)[0][0]


def flag(value: Any, at: str) -> bool:
    """`value`, which must be true or false.

    Raises:
        InputError: it is anything else.
    """
    if not isinstance(value, bool):
        raise InputError(f"{at}: expected true or false, got {value!r}")
    return value


def number(value: Any, at: str) -> float:
    """`value` as a float, which must be a finite number.

    Raises:
        InputError: it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{at}: expected a number, got {value!r}")
    try:
        found = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        found = math.inf
    if not math.isfinite(found):
        raise InputError(f"{at}: expected a finite number, got {found}")
    return found


def count(value: Any, at: str) -> int:
    """`value`, which must be a whole number of at least 1.

    Raises:
        InputError: it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{at}: expected a whole number of at least 1, got {value!r}")
    return value


def text_of(value: Any, at: str) -> str:
    """`value`, which must be text.

    Raises:
        InputError: it is anything else.
    """
    if not isinstance(value, str):
        raise InputError(f"{at}: expected text, got {value!r}")
    return value


def tensor(value: Any, shape: tuple[int, ...], at: str, *, flags: bool = False) -> Tensor:
    """`value`, which must be a tensor of `shape`, of numbers or of true and false.

    Raises:
        InputError: it is anything else.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        raise InputError(f"{at}: expected a dense tensor, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise InputError(f"{at}: expected the shape {shape}, got {tuple(value.shape)}")
    if flags and value.dtype != torch.bool:
        raise InputError(f"{at}: expected true and false (torch.bool), got {value.dtype}")
    if not flags and not value.is_floating_point():
        raise InputError(f"{at}: expected floating point numbers, got {value.dtype}")
    return value
