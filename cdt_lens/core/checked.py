"""Check options, settings and what files hold against their annotated types.

Types, limits and choices stand in the annotations of a dataclass, for pydantic to read:
`Annotated[int, Field(ge=1)]`. Errors say what was expected, what was given and what may be meant.
The axes of tensors stand there as well, for jaxtyping to read: `Float[Tensor, "layer head"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_type_hints

import torch
from jaxtyping import Shaped, jaxtyped
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError, WrapValidator
from torch import Tensor

from cdt_lens.core.errors import InputError, did_you_mean

Kind = TypeVar("Kind")

_LONGEST = 200  # characters of a value that a message shows whole
_KINDS = {
    "integer": "a whole number", "number": "a number", "boolean": "true or false",
    "string": "text", "null": "None", "array": "a list", "object": "a table of names and values",
}  # fmt: skip
_LIMITS = {
    "minimum": "of at least {}", "exclusiveMinimum": "above {}", "maximum": "of at most {}",
    "exclusiveMaximum": "below {}",
}  # fmt: skip


class Checked:
    """Base of dataclasses whose fields are checked when an instance is made.

    Raises:
        InputError: A field has a value that its type does not allow.
    """

    def __post_init__(self) -> None:
        for name, adapter in _adapters(type(self)).items():  # type: ignore[arg-type]
            value = _checked(name, getattr(self, name), adapter)
            object.__setattr__(self, name, value)  # a list may have become a tuple


@cache
def _adapters(kind: type) -> dict[str, TypeAdapter]:
    """Return the validator of each field that is not a checked dataclass itself."""
    hints = get_type_hints(kind, include_extras=True)
    strict = ConfigDict(strict=True)
    return {
        field.name: TypeAdapter(hints[field.name], config=strict)
        for field in fields(kind)
        if not is_dataclass(hints[field.name])
    }


def _checked(name: str, value: object, adapter: TypeAdapter) -> object:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        expected = _expected(adapter, value, error)
        given = repr(value) if len(repr(value)) <= _LONGEST else _shown(value)
        raise InputError(f"{name}={given}: expected {expected}") from error


def _expected(adapter: TypeAdapter, value: object, error: ValidationError) -> str:
    """Return what a field takes, in words."""
    schema = adapter.json_schema()
    words = _words(schema)
    first = error.errors()[0]
    if isinstance(value, str) and "enum" in schema:
        words += did_you_mean(value, schema["enum"])
    if first["loc"] and isinstance(value, (list, tuple, dict)):
        inner = ".".join(map(str, first["loc"]))
        words += f"; {inner}: {first['msg']}"
    return words


def _words(schema: Mapping[str, Any]) -> str:
    """Return a JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(map(_words, schema["anyOf"]))
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    limits = [words.format(schema[name]) for name, words in _LIMITS.items() if name in schema]
    return " ".join([_KINDS[schema["type"]], " and ".join(limits)]).strip()


def from_values(kind: type[Kind], values: Mapping[str, Any], where: str) -> Kind:
    """Make checked settings from values by name, as a file holds them.

    Args:
        kind: A dataclass derived from `Checked`.
        values: The settings by name. Those left out keep their defaults.
        where: The file or section that the values are from, for error messages.

    Raises:
        InputError: A name that is no setting, a setting that is missing, or a value that its type
            does not allow.
    """
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    check_names(values, known, where)
    for name, field in known.items():
        needed = field.default is MISSING and field.default_factory is MISSING
        if needed and name not in values:
            raise InputError(f"{where}: {name} is missing; give it a value")
    adapters = _adapters(kind)  # type: ignore[arg-type]
    try:
        checked = {
            name: _checked(name, value, adapters[name])
            for name, value in values.items()
            if name in adapters
        }
        return kind(**{**values, **checked})
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def check_names(values: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse names that are not known.

    Raises:
        InputError: Names the first unknown one, the nearest known one and all known ones.
    """
    known = set(known)
    for name in values:
        if name not in known:
            raise InputError(
                f"{where}: unknown key {name!r}{did_you_mean(name, known)}; the keys are "
                f"{', '.join(sorted(known))}"
            )


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
