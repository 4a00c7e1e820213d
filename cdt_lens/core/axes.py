"""Check what a file holds against the annotated types and axes of the result that it makes.

Types stand in the annotations of a dataclass, for pydantic to read, and the axes of tensors in
jaxtyping's: `Float[Tensor, "layer head"]`. An axis has one size in all fields of a result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any, get_type_hints

import torch
from jaxtyping import Shaped, jaxtyped
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError, WrapValidator
from torch import Tensor


def size_of(axis: str) -> AfterValidator:
    """Annotate a number that is the size of an axis, such as `n_layers` of "layer"."""

    def check(size: int) -> int:
        _check_axis(size, axis)
        return size

    return AfterValidator(check)


def along(axis: str) -> AfterValidator:
    """Annotate a tuple with one value at each place of an axis, such as labels of "example"."""

    def check(values: tuple[Any, ...]) -> tuple[Any, ...]:
        _check_axis(len(values), axis)
        return values

    return AfterValidator(check)


def _check_axis(size: int, axis: str) -> None:
    named: Any = Shaped[Tensor, axis]
    if not isinstance(torch.empty(size, device="meta"), named):
        raise ValueError(f"{size} is not the size of the axis {axis!r} in the other fields")


def _with_own_axes(value: object, check: Callable[[object], object]) -> object:
    with jaxtyped("context"):
        return check(value)


# Annotates results within another result, whose axes have sizes of their own.
own_axes = WrapValidator(_with_own_axes)


def check_result(result: object) -> None:
    """Check every field of a result that a file holds, and of the dataclasses in its fields.

    Args:
        result: An instance of a dataclass. An axis of the same name has the same size in all of its
            fields, as in `Float[Tensor, "layer head"]`.

    Raises:
        ValueError: A field has a value or a shape that its type does not allow; the message is one
            line and names the field.
    """
    with jaxtyped("context"):
        for name, adapter in _result_adapters(type(result)).items():  # type: ignore[arg-type]
            check_value(name, getattr(result, name), adapter)


@cache
def _result_adapters(kind: type) -> dict[str, TypeAdapter]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: adapter_of(hints[field.name]) for field in fields(kind)}


def adapter_of(kind: Any) -> TypeAdapter:
    """Return the validator of a type in what a file holds, in which nothing is converted.

    Args:
        kind: A type annotation, which may hold dataclasses and the axes of tensors.
    """
    strict = ConfigDict(strict=True, arbitrary_types_allowed=True, revalidate_instances="always")
    # Pydantic takes no settings for a dataclass by itself.
    return TypeAdapter(tuple[kind], config=strict)


def check_value(name: str, value: object, adapter: TypeAdapter) -> None:
    """Check one value that a file holds.

    Args:
        name: The name of the value, for the message; "" for the values of a whole file.
        value: The value.
        adapter: What `adapter_of` returned for its type.

    Raises:
        ValueError: The value is not of the type; the message is one line.
    """
    try:
        adapter.validate_python((value,))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, (name, *first["loc"][1:]))).strip(".")
        got = "" if first["type"] == "missing" else f", got {_shown(first['input'])}"
        raise ValueError(f"{where}: {first['msg']}{got}") from error


def _shown(value: object) -> str:
    """Return a value as a few words of one line."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return " ".join(f"{value!r:.80}".split())
