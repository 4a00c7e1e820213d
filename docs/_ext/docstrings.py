"""Three repairs that Sphinx's own extensions leave; napoleon reads the docstrings themselves.

1. Docstrings write code in single backticks, as Markdown does. A name in backticks becomes a
   reference, and any other code becomes a literal.
2. Annotations carry limits and advice for `core/checked.py`. Sphinx prints these in a form that is
   not Python, and then shows the whole signature as one word. They are left out here.
3. Sphinx parses a signature as Python, and some default values print as `<factory>`.
"""

from __future__ import annotations

import inspect
import re
from contextlib import suppress
from typing import Any, get_type_hints

_CODE = re.compile(r"`[^`]+`")
_NAME = re.compile(r"`[A-Za-z_][\w.]*(\(\))?`")
_ANNOTATED = re.compile(r"Annotated\[(\w+), .*\]", re.DOTALL)
_UNPRINTABLE = re.compile(r"<\w+(?: <\w+>)?>")


def setup(app: Any) -> dict[str, bool]:
    """Connect the hooks; the first runs before napoleon's, which has priority 500."""
    app.connect("autodoc-process-docstring", _process_docstring, priority=400)
    app.connect("autodoc-before-process-signature", _before_process_signature)
    app.connect("autodoc-process-signature", _process_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _process_docstring(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    if what == "data":  # The docstring of a constant is that of its class, such as `dict`.
        lines.clear()
    lines[:] = to_rst("\n".join(lines)).split("\n")
    if what == "property":  # napoleon reads a property's first line as "type: description".
        lines.insert(0, "\\ ")  # renders as nothing


def to_rst(text: str) -> str:
    """Return Markdown-style `text` as reStructuredText: code spans, and escaped characters."""
    parts, end = [], 0
    for code in _CODE.finditer(text):
        parts.append(_escaped(text[end : code.start()]))
        parts.append(code[0] if _NAME.fullmatch(code[0]) else f"`{code[0]}`")
        end = code.end()
        if text[end : end + 1].isalnum():  # reStructuredText ends markup at a word's end only.
            parts.append("\\ ")
    return "".join([*parts, _escaped(text[end:])])


def _escaped(text: str) -> str:
    text = re.sub(r"([|*\\])", r"\\\1", text)
    return re.sub(r"\\\*(\w+)\\\*", r"*\1*", text)  # an emphasised word


def _before_process_signature(app: Any, obj: Any, bound_method: bool) -> None:
    with suppress(AttributeError):  # a method of a built-in type, which has no annotations
        _leave_out_metadata(obj)


def _leave_out_metadata(function: Any) -> None:
    """Replace the annotations of a function by their types, without the metadata of `Annotated`."""
    function = getattr(function, "__func__", function)
    inner = inspect.unwrap(function)
    given = dict(inner.__annotations__)
    for name, written in given.items():
        inner.__annotations__ = {name: written}
        try:
            given[name] = get_type_hints(inner)[name]
        except NameError:  # a name of another module, or one imported for type checkers only
            given[name] = _ANNOTATED.sub(r"\1", written)
    inner.__annotations__ = function.__annotations__ = given


def _process_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str
) -> tuple[str, str] | None:
    return (_UNPRINTABLE.sub("...", signature), returns) if signature else None
