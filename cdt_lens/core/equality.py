"""When two results are equal: one meaning of `==` for every result of the package.

Results are equal if they are of the same class and hold the same content. Tensors and arrays are
compared by dtype, shape and every element; data frames by their columns and every cell. NaN equals
NaN, and a list equals a tuple of the same elements, as after a round trip through a file. No
tolerance is applied: a saved and loaded result equals itself.

Objects of a computation in progress (batches, traces, slices of a model) have no content to
compare and keep Python's identity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor


class EqualByContent:
    """Base of results, which are dataclasses with `eq=False`: `==` compares their content."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return same_content(_fields(self), _fields(other))

    def __hash__(self) -> int:
        # Equal results have equal words and whole numbers; that is enough to tell most apart.
        values = _fields(self).values()
        return hash((type(self), *(v for v in values if isinstance(v, str | int))))


def same_content(one: Any, other: Any) -> bool:
    """Compare two values, whatever they hold.

    Args:
        one: A value: a result, a tensor, an array, a data frame, a mapping, a sequence, or anything
            that `==` compares.
        other: The value to compare it with.

    Returns:
        Whether the two have the same content.
    """
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and _same_tensors(one, other)
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and _same_arrays(one, other)
    if isinstance(one, pd.DataFrame | pd.Series):
        return type(one) is type(other) and same_content(_cells(one), _cells(other))
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and _same_mappings(one, other)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and _same_sequences(one, other)
    if dataclasses.is_dataclass(one) and not isinstance(one, type):
        return type(one) is type(other) and same_content(_fields(one), _fields(other))
    return bool(one == other) or (one != one and other != other)


def _fields(result: Any) -> dict[str, Any]:
    return {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.compare}


def _same_tensors(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    a, b = one.detach().cpu(), other.detach().cpu()
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _same_arrays(one: np.ndarray, other: np.ndarray) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _cells(frame: pd.DataFrame | pd.Series) -> list[Any]:
    """Return labels and cells as plain lists: an empty column may lose its dtype in a file."""
    if isinstance(frame, pd.Series):
        return [frame.index.tolist(), frame.tolist()]
    columns = [frame.iloc[:, i].tolist() for i in range(frame.shape[1])]
    return [frame.columns.tolist(), frame.index.tolist(), columns]


def _same_mappings(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    return one.keys() == other.keys() and all(same_content(one[k], other[k]) for k in one)


def _same_sequences(one: list[Any] | tuple[Any, ...], other: list[Any] | tuple[Any, ...]) -> bool:
    return len(one) == len(other) and all(
        same_content(a, b) for a, b in zip(one, other, strict=True)
    )
