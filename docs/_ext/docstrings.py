"""Two repairs that Sphinx's own extensions leave; napoleon reads the docstrings themselves.

1. Docstrings write code in single backticks, as Markdown does. A name in backticks becomes a
   reference, and any other code becomes a literal.
2. Sphinx parses a signature as Python, and some default values print as `<factory>`.
"""

from __future__ import annotations

import re
from typing import Any

_CODE = re.compile(r"`[^`]+`")
_NAME = re.compile(r"`[A-Za-z_][\w.]*(\(\))?`")
_UNPRINTABLE = re.compile(r"<\w+(?: <\w+>)?>")


def setup(app: Any) -> dict[str, bool]:
    """Connect the hooks; the first runs before napoleon's, which has priority 500."""
    app.connect("autodoc-process-docstring", _process_docstring, priority=400)
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


def _process_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str
) -> tuple[str, str] | None:
    return (_UNPRINTABLE.sub("...", signature), returns) if signature else None
