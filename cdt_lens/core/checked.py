"""Check options, settings and arguments against their annotated types.

Types, limits and choices stand in the annotations of a dataclass or a function, for pydantic to
read: `Annotated[int, Field(ge=1)]`. Numbers of numpy and torch count as Python's. Errors say what
was expected, what was given and what may be meant.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields
from functools import cache, cached_property, partial, wraps
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError, WithJsonSchema

from cdt_lens.core.errors import InputError, did_you_mean

Kind = TypeVar("Kind")
P = ParamSpec("P")
R = TypeVar("R")

_KINDS = {
    "integer": "a whole number", "number": "a number", "boolean": "true or false",
    "string": "text", "null": "None", "array": "a list", "object": "a table of names and values",
}  # fmt: skip
_LIMITS = {
    "minimum": "of at least {}", "exclusiveMinimum": "above {}", "maximum": "of at most {}",
    "exclusiveMaximum": "below {}",
}  # fmt: skip
_READ_BY_PYDANTIC = (bool, int, float, str, Path, NoneType, object, Any)
_SHORT = 80


@dataclass(frozen=True)
class Fix:
    """Advice that ends the refusal of a value, as metadata of its annotation.

    A class whose instances are arguments gives its advice as the class attribute `_advice`.

    Args:
        text: What to give instead, or how to make it.
    """

    text: str


class Checked:
    """Base of dataclasses whose fields are checked when an instance is made.

    Raises:
        InputError: A field has a value that its type does not allow.
    """

    def __post_init__(self) -> None:
        for name, annotation in _field_annotations(type(self)).items():  # type: ignore[arg-type]
            value = annotation.checked(name, getattr(self, name))
            object.__setattr__(self, name, value)  # a list may have become a tuple


def checked_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Check the arguments of a function against its annotations at each call.

    Words, numbers, limits and classes are checked, and numbers of numpy and torch become Python's.
    An `Iterable` may be anything but text; its items are for the function to check. An annotation
    that cannot be resolved at run time is not checked.

    Args:
        function: The function or method.

    Returns:
        The function, which raises `InputError` for an argument that its annotation does not allow.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    positions = [parameter.name for parameter in parameters if parameter.kind in kinds]
    annotations = cache(partial(_argument_annotations, function))

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        known = annotations()

        def check(name: str, value: object) -> Any:
            if name not in known:
                return value
            return known[name].checked(name, value, f"{function.__qualname__}: ")

        given = [check(name, value) for name, value in zip(positions, args, strict=False)]
        named = {name: check(name, value) for name, value in kwargs.items()}
        return function(*given, *args[len(given) :], **named)  # type: ignore[arg-type]

    return checked


def whole_number(value: object) -> int | None:
    """Return a whole number of any library as Python's, or None for any other value.

    Args:
        value: The value. Floats and truth values are no whole numbers.
    """
    value = plain(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def plain(value: Any) -> Any:
    """Return a number or array of numpy, torch or pandas as Python's numbers, in lists too.

    Args:
        value: Any value. Others are returned unchanged.
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    return value


class _Annotation:
    """The check of one annotation.

    Args:
        hint: The resolved annotation.
    """

    def __init__(self, hint: Any) -> None:
        self.hint = hint
        # Arrays stay what they are where an array is expected.
        self._takes_arrays = any(hasattr(kind, "tolist") for kind in _classes(hint))

    @cached_property
    def _adapter(self) -> TypeAdapter:
        config = ConfigDict(strict=True, allow_inf_nan=False)
        return TypeAdapter(_readable(self.hint), config=config)

    def checked(self, name: str, value: object, where: str = "") -> Any:
        """Return the value as its type has it.

        Args:
            name: Name of the value.
            value: The value.
            where: Start of the error message.

        Raises:
            InputError: The annotation does not allow the value.
        """
        try:
            return self._adapter.validate_python(value if self._takes_arrays else plain(value))
        except ValidationError as error:
            raise InputError(where + self._refusal(name, value, error)) from error

    def _refusal(self, name: str, value: object, error: ValidationError) -> str:
        """Return what was expected, what was given and the fix, in one line."""
        schema = self._adapter.json_schema()
        short = _short(plain(value))
        given, got = (f"={short}", "") if short else ("", f", got {type(value).__name__}")
        refusal = f"{name}{given}: expected {_words(schema)}{got}"
        if isinstance(value, str):
            refusal += did_you_mean(value, _choices(schema))
        first = error.errors()[0]
        if first["loc"] and isinstance(value, (list, tuple, dict)):
            refusal += f"; {'.'.join(map(str, first['loc']))}: {first['msg']}"
        if "a list" in _words(schema) and not isinstance(value, (list, tuple, Mapping, NoneType)):
            refusal += f"; put it in a list: [{short}]" if short else "; put it in a list"
        return "; ".join([refusal, *dict.fromkeys(_fixes(self.hint))])


@cache
def _field_annotations(kind: type) -> dict[str, _Annotation]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: _Annotation(hints[field.name]) for field in fields(kind)}


def _argument_annotations(function: Callable[..., Any]) -> dict[str, _Annotation]:
    """Return the annotations of a function's parameters, without those that cannot be resolved."""
    inner: Any = inspect.unwrap(function)
    resolved = {}
    for parameter in inspect.signature(inner).parameters.values():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if variadic or parameter.annotation is parameter.empty or parameter.name == "cls":
            continue
        one = SimpleNamespace(__annotations__={"hint": parameter.annotation})
        with suppress(NameError):  # imported for type checkers only
            hints = get_type_hints(one, inner.__globals__, include_extras=True)
            resolved[parameter.name] = _Annotation(hints["hint"])
    return resolved


def _readable(hint: Any) -> Any:
    """Return an annotation as pydantic can read it: classes become checks by `isinstance`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return Annotated[(_readable(args[0]), *hint.__metadata__)]
    if origin in (Union, UnionType):
        return Union[tuple(map(_readable, args))]  # noqa: UP007
    if origin is Iterable:
        return _leaf(_is_several, "a list")
    if origin is Callable:
        return _leaf(callable, "a function")
    if origin in (Sequence, Mapping, tuple, list, dict):
        return origin[tuple(arg if arg is ... else _readable(arg) for arg in args)]
    if origin is Literal or hint in _READ_BY_PYDANTIC:
        return hint
    kind = getattr(hint, "array_type", hint)  # of jaxtyping, whose axes are checked under test
    if not isinstance(kind, type):
        return Any
    return _leaf(partial(_is_instance, kind), kind.__name__)


def _leaf(allowed: Callable[[Any], bool], words: str) -> Any:
    def check(value: Any) -> Any:
        if not allowed(value):
            raise ValueError(f"expected {words}, got {type(value).__name__}")
        return value

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"words": words})]


def _is_instance(kind: type, value: object) -> bool:
    return isinstance(value, kind)


def _is_several(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))


def _parts(hint: Any) -> Iterator[Any]:
    """Iterate over an annotation and everything that it is made of."""
    yield hint
    yield from getattr(hint, "__metadata__", ())
    for arg in get_args(hint) if get_origin(hint) is not Literal else ():
        yield from _parts(arg)


def _classes(hint: Any) -> Iterator[type]:
    kinds = (getattr(part, "array_type", part) for part in _parts(hint))
    return (kind for kind in kinds if isinstance(kind, type))


def _fixes(hint: Any) -> Iterator[str]:
    """Iterate over the advice that an annotation and its classes give."""
    yield from (part.text for part in _parts(hint) if isinstance(part, Fix))
    yield from (kind._advice for kind in _classes(hint) if hasattr(kind, "_advice"))


def _short(value: object) -> str:
    """Return a plain value as it is written in Python, or nothing where that takes long."""
    parts = value if isinstance(value, (list, tuple)) else [value]
    if any(type(part).__module__ != "builtins" for part in (value, *parts)):
        return ""
    text = repr(value)
    return text if len(text) <= _SHORT and text.isprintable() else ""


def _choices(schema: Mapping[str, Any]) -> list[str]:
    """Return the words among which a JSON schema chooses."""
    own = [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else [])]
    return own + [word for option in schema.get("anyOf", ()) for word in _choices(option)]


def _words(schema: Mapping[str, Any]) -> str:
    """Return a JSON schema in words."""
    if "anyOf" in schema:
        words = list(dict.fromkeys(_words(part) for part in schema["anyOf"]))
        return " or ".join(words)
    if "words" in schema:
        return schema["words"]
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if "const" in schema:
        return repr(schema["const"])
    if schema.get("format") == "path":
        return "a path"
    limits = [words.format(schema[name]) for name, words in _LIMITS.items() if name in schema]
    return " ".join([_KINDS.get(schema.get("type", ""), "a value"), " and ".join(limits)]).strip()


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
    annotations = _field_annotations(kind)  # type: ignore[arg-type]
    try:
        checked = {
            name: annotations[name].checked(name, value)
            for name, value in values.items()
            if name in annotations
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
