"""Every option of every public function refuses values that its annotation does not allow.

The cases are generated from the signatures: words that are no option, None, numbers out of range,
NaN, text for numbers, truth values for numbers and numbers for truth values. Arguments are checked
before the body of a function runs, so one wrong argument by itself is enough for a call.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from helpers.checks import unchecked_types
from helpers.public import NAMES

from cdt_lens.core.checked import Checked, _argument_annotations, checked_arguments
from cdt_lens.core.choices import Count, Metric
from cdt_lens.core.errors import InputError
from cdt_lens.core.passes import Passes
from cdt_lens.models.heads import Head

WORD = "no such word"
WRONG: tuple[Any, ...] = (WORD, None, True, 1, -1, 2.7, 1e300, math.nan, math.inf, "1", object())
# What reads files, or takes part of a running computation, which users do not hold in their hands.
INTERNAL = (
    "from_dict", "for_batch", "mlps_for_batch", "embedding_for_batch", "input_for_batch",
    "candidate_prior", "settings", "changed",
)  # fmt: skip
INHERITED = ("count", "index")  # of `Sequence`


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, thing in NAMES.items():
        if inspect.isfunction(thing):
            yield name, thing
        if inspect.isclass(thing) and not issubclass(thing, Exception):
            for own in dir(thing):
                method = getattr(thing, own)
                known = own.startswith("_") or own in INTERNAL + INHERITED
                if not known and (inspect.isfunction(method) or inspect.ismethod(method)):
                    yield f"{name}.{own}", method


def leaves(hint: Any, limits: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Iterate over the options of an annotation, each with its limits."""
    if get_origin(hint) is Annotated:
        inner, *metadata = get_args(hint)
        found = [limit for data in metadata for limit in getattr(data, "metadata", ())]
        yield from leaves(inner, (*limits, *found))
    elif get_origin(hint) in (Union, UnionType):
        for part in get_args(hint):
            yield from leaves(part, limits)
    else:
        yield hint, limits


def within(value: float, limits: tuple[Any, ...]) -> bool:
    return all(
        value >= getattr(limit, "ge", -math.inf)
        and value > getattr(limit, "gt", -math.inf)
        and value <= getattr(limit, "le", math.inf)
        and value < getattr(limit, "lt", math.inf)
        for limit in limits
    )


def allowed(value: Any, hint: Any) -> bool:
    """Whether an annotation allows a value, where it says so by itself."""
    for option, limits in leaves(hint):
        if get_origin(option) is Literal:
            if type(value) is str and value in get_args(option):
                return True
        elif option in (Any, object) or (option is NoneType and value is None):
            return True
        elif option in (int, float):
            kinds = (int,) if option is int else (int, float)
            if type(value) in kinds and math.isfinite(value) and within(value, limits):
                return True
        elif isinstance(option, type) and type(value) is option:
            return True
    return False


def taken(function: Callable[..., Any], parameter: str, value: Any) -> str | None:
    """Return how a function failed to refuse one argument in one line, or None if it did refuse."""
    own = () if "self" not in inspect.signature(function).parameters else (None,)
    try:
        function(*own, **{parameter: value})
    except InputError as error:
        told = str(error)
        named = function.__qualname__ in told and parameter in told and "\n" not in told
        return None if named else f"{parameter}={value!r}: {told}"
    except Exception as error:
        return f"{parameter}={value!r}: {error!r}"
    return f"{parameter}={value!r}: taken"


@pytest.mark.parametrize(("name", "function"), list(public()))
def test_a_value_that_the_annotation_does_not_allow_is_refused(
    name: str, function: Callable[..., Any]
):
    wrong = [
        (parameter, value)
        for parameter, annotation in _argument_annotations(function).items()
        for value in WRONG
        if not allowed(value, annotation.hint)
    ]
    with unchecked_types():
        assert [told for case in wrong if (told := taken(function, *case))] == [], name


@pytest.mark.parametrize(("name", "function"), list(public()))
def test_every_parameter_has_an_annotation_that_is_checked(name: str, function: Callable[..., Any]):
    """A name that only type checkers import would leave its parameter unchecked."""
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    assert named - {"self", "cls"} <= set(_argument_annotations(function)), name


def settings() -> list[type]:
    """The options that are made without an argument."""
    made = [Passes]
    made += [t for t in NAMES.values() if is_dataclass(t) and issubclass(t, Checked)]
    return [
        kind
        for kind in made
        if all((f.default, f.default_factory) != (MISSING, MISSING) for f in fields(kind))
    ]


@pytest.mark.parametrize("kind", settings())
def test_a_field_of_options_refuses_what_its_annotation_does_not_allow(kind: type):
    for name, hint in get_type_hints(kind, include_extras=True).items():
        for value in (v for v in WRONG if not allowed(v, hint)):
            with unchecked_types(), pytest.raises(InputError, match=name):
                kind(**{name: value})


@checked_arguments
def example(k: Count, *, metric: Metric = "direction", share: float = 0.5, on: bool = False) -> Any:
    return k, metric, share, on


@pytest.mark.parametrize("three", [np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)])
def test_whole_numbers_of_other_libraries_become_ours(three: Any):
    with unchecked_types():
        assert example(three) == (3, "direction", 0.5, False)
        assert type(example(three)[0]) is int
        assert Head(three, three) in {Head(3, 3)}
        assert type(Head(three, 0).layer) is int


def test_numbers_and_truth_values_of_numpy_become_ours():
    with unchecked_types():
        given = example(3, share=np.float32(0.25), on=np.bool_(True))
    assert given == (3, "direction", 0.25, True)
    assert [type(value) for value in given[2:]] == [float, bool]
    with pytest.raises(InputError, match="k=2.7: expected a whole number"), unchecked_types():
        example(np.float64(2.7))


def test_a_misspelt_word_comes_with_the_nearest_one():
    with pytest.raises(InputError) as caught, unchecked_types():
        example(3, metric="acuracy")  # type: ignore[arg-type]
    assert str(caught.value) == (
        "example: metric='acuracy': expected one of direction, accuracy, balanced_accuracy; "
        "did you mean 'accuracy'?"
    )


def test_a_checked_function_keeps_its_signature():
    assert list(inspect.signature(example).parameters) == ["k", "metric", "share", "on"]
    assert example.__name__ == "example"
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'k'"):
        example()  # type: ignore[call-arg]


@pytest.mark.parametrize("layer", [0.0, 1.5, math.nan, True, "0", -1, None, torch.tensor(0.0)])
def test_a_head_is_two_whole_numbers(layer: Any):
    with unchecked_types(), pytest.raises(InputError, match=r"^Head\(.*whole numbers"):
        Head(layer, 0)
