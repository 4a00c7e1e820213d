"""Public docstrings are complete Google-style docstrings, and function bodies are short."""

from __future__ import annotations

import ast
import inspect
import re
import statistics
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from helpers.places import ROOT
from helpers.public import NAMES

PACKAGE = ROOT / "cdt_lens"
NAMED = 0.9  # minimum share of parameters and of fields that docstrings name
BODY_MEDIAN, BODY_90_PERCENT, BODY_MAXIMUM = 6, 20, 60  # lines

SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Examples?|Notes?):")
ENTRY = re.compile(r"    (\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?:(?: |$)")

FUNCTIONS = {name: thing for name, thing in NAMES.items() if inspect.isfunction(thing)}
CLASSES = {
    name: thing
    for name, thing in NAMES.items()
    if inspect.isclass(thing) and not issubclass(thing, Exception)
}
DATACLASSES = {name: thing for name, thing in CLASSES.items() if is_dataclass(thing)}
METHODS = {
    f"{owner}.{name}": getattr(thing, name)
    for owner, thing in CLASSES.items()
    for name, value in vars(thing).items()
    if not name.startswith("_")
    and (inspect.isfunction(value) or isinstance(value, classmethod | staticmethod))
}


def sections(thing: Any) -> dict[str, list[str]]:
    """Return the lines of each section of an object's docstring, by the section's name."""
    text = inspect.cleandoc(thing.__doc__ or "")
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if heading := SECTION.fullmatch(line):
            name = heading[1]
            found[name] = []
        elif line.startswith("    ") or not line:
            found.setdefault(name, []).append(line)
        else:
            name = ""
    return found


def named(thing: Any, *headings: str) -> set[str]:
    """Return the names that the entries of the given sections describe, without asterisks."""
    lines = [line for heading in headings for line in sections(thing).get(heading, [])]
    entries = [entry[1] for line in lines if (entry := ENTRY.match(line))]
    return {name.lstrip("*") for entry in entries for name in entry.split(", ")}


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "cls"}


def constructor_fields(thing: Any) -> set[str]:
    return {field.name for field in fields(thing) if field.init and not field.name.startswith("_")}


def returns_something(function: Any) -> bool:
    given = inspect.signature(function).return_annotation
    return given not in (None, "None", "NoReturn", inspect.Signature.empty)


def unnamed(kind: str) -> dict[str, set[str]]:
    """Return the parameters or fields that a docstring leaves out, by the name of their owner."""
    if kind == "fields":
        return {
            name: constructor_fields(thing) - named(thing, "Args", "Attributes")
            for name, thing in DATACLASSES.items()
        }
    return {name: parameters(thing) - named(thing, "Args") for name, thing in FUNCTIONS.items()}


def share_named(kind: str) -> float:
    if kind == "fields":
        total = sum(len(constructor_fields(thing)) for thing in DATACLASSES.values())
    else:
        total = sum(len(parameters(function)) for function in FUNCTIONS.values())
    return 1 - sum(map(len, unnamed(kind).values())) / total


def bodies() -> Iterator[tuple[int, str]]:
    """Yield (lines, place) of every function's body; the lines after the docstring count."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                place = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                yield body_lines(node), place


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    statements = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not statements:
        return 0
    decorators = getattr(statements[0], "decorator_list", [])
    first = min(part.lineno for part in [statements[0], *decorators])
    return int(node.end_lineno or first) - first + 1


@pytest.mark.parametrize("kind", ["parameters", "fields"])
def test_docstrings_name_the_parameters(kind: str):
    missing = {name: sorted(left) for name, left in unnamed(kind).items() if left}
    share = share_named(kind)
    assert share >= NAMED, f"{share:.0%} of the {kind} are named; missing: {missing}"


@pytest.mark.parametrize("name", sorted(FUNCTIONS | METHODS))
def test_docstrings_name_no_parameter_that_does_not_exist(name: str):
    thing = (FUNCTIONS | METHODS)[name]
    assert named(thing, "Args") <= parameters(thing)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_docstrings_of_classes_name_no_field_that_does_not_exist(name: str):
    thing = CLASSES[name]
    known = {field.name for field in fields(thing)} if is_dataclass(thing) else parameters(thing)
    assert named(thing, "Args") <= known
    assert named(thing, "Attributes") <= known | set(dir(thing)) | set(
        inspect.get_annotations(thing)
    )


def test_public_functions_say_what_they_return():
    silent = [
        name
        for name, function in FUNCTIONS.items()
        if returns_something(function) and not {"Returns", "Yields"} & set(sections(function))
    ]
    assert silent == []


def test_no_docstring_cites_a_file_that_users_do_not_have():
    citing = [
        str(path.relative_to(ROOT))
        for path in sorted(PACKAGE.rglob("*.py"))
        if "method.md" in path.read_text("utf-8")
    ]
    assert citing == []


def test_function_bodies_are_short():
    sizes = sorted(lines for lines, _ in bodies())
    long = [place for lines, place in bodies() if lines > BODY_MAXIMUM]
    assert long == []
    assert statistics.median(sizes) <= BODY_MEDIAN
    assert statistics.quantiles(sizes, n=10)[-1] <= BODY_90_PERCENT


def test_the_parser_reads_google_style():
    def example() -> None:
        """Return nothing.

        Args:
            rows: the rows: all of them.
                a continuation: not a name.
            model, *sources (int): two names.

        Note: not a section.

        Returns:
            A tensor.
        """

    assert named(example, "Args") == {"rows", "model", "sources"}
    assert set(sections(example)) >= {"Args", "Returns"}


def test_the_docstring_is_no_part_of_a_body():
    text = 'def f():\n    """One.\n\n    Two.\n    """\n    # why\n    a = 1\n\n    return a\n'
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert body_lines(function) == 3
