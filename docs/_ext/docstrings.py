"""The package's docstrings, which are plain text, as the reStructuredText that autodoc expects.

1. `name: what it is; other: what that is` becomes a list, where the names are parameters or fields;
   so does a run of errors in a section of raised ones.
2. References to the method's sections and to arXiv become links.
3. Characters that mean something in reStructuredText and nothing in plain text are escaped.
4. A signature shows its annotations as the source has them: jaxtyping's axes and all.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

_SECTION = re.compile(r"^(Args|Raises|Returns|Yields):$")
_NEXT_ERROR = re.compile(r"(?:^|(?<=[.;)]) )(?=\w+Error(?:, \w+Error)*: )")
_CODE = re.compile(r"`[^`]+`")
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")
_METHOD = re.compile(r"method\.md §(\d)")
_PAGES = dict(
    enumerate(
        ["task", "baseline", "decomposition", "scores", "circuits", "faithfulness", "training"], 1
    )
)
_NAME = re.compile(r"`[A-Za-z_][\w.]*(\(\))?`")


def setup(app: Any) -> dict[str, bool]:
    """Connect the hooks; the first comes before napoleon's, which has priority 500."""
    app.connect("autodoc-process-docstring", _process_docstring, priority=400)
    app.connect("autodoc-process-docstring", _keep_property, priority=600)
    app.connect("autodoc-process-signature", _process_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _process_docstring(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    if what == "data":  # a constant's docstring is that of `dict`
        lines.clear()
    lines[:] = to_rst(lines, _names(obj))


def _keep_property(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    # napoleon takes what stands before a property's first colon for its type.
    if what == "property":
        lines[:] = to_rst((inspect.getdoc(obj) or "").splitlines(), [])


def to_rst(lines: Sequence[str], names: Sequence[str]) -> list[str]:
    """Lines of a docstring as reStructuredText; `names` are its parameters and fields."""
    out = []
    for paragraph in _paragraphs(lines):
        section = _SECTION.match(paragraph[0])
        if section and section[1] == "Args" and _starts_item(paragraph[1].strip(), names):
            pairs = _items(paragraph[1:], names)
            out += ["Args:", *(f"    {heads}: {text}" for heads, text in pairs)]
        elif section and section[1] == "Raises":
            text = " ".join(line.strip() for line in paragraph[1:])
            out += [paragraph[0], *(f"    {_escaped(e)}" for e in _errors(text))]
        elif _starts_item(paragraph[0], names):
            for heads, text in _items(paragraph, names):
                bold = ", ".join(f"**{head}**" for head in heads.split(", "))
                out.append(f"* {bold} -- {text}")
        else:
            out += [_escaped(line) for line in paragraph]
        out.append("")
    return out


def _errors(text: str) -> list[str]:
    """One line an error: a new one begins at a name that ends in Error and has a colon."""
    return [part for part in _NEXT_ERROR.split(text) if part]


def _paragraphs(lines: Sequence[str]) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [paragraph for paragraph in found if paragraph]


def _starts_item(text: str, names: Sequence[str]) -> bool:
    head, colon, _ = text.partition(": ")
    return bool(colon) and all(part in names for part in head.split(", "))


def _items(paragraph: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(names, text) of each item; one begins on a line, or after a semicolon or a full stop."""
    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    start = re.compile(rf"(?:^|(?<=[;.)]) )((?:{known})(?:, (?:{known}))*): ")
    _, *parts = start.split(" ".join(line.strip() for line in paragraph))
    for heads, text in zip(parts[::2], parts[1::2], strict=True):
        yield heads, _escaped(text.rstrip("; "))


def _escaped(text: str) -> str:
    """Code spans as literals or, if they are names, as references; links; the rest as it stands."""
    out, at = [], 0
    for code in _CODE.finditer(text):
        out.append(_linked(text[at : code.start()]))
        out.append(code[0] if _NAME.fullmatch(code[0]) else f"`{code[0]}`")
        at = code.end()
        # Inline markup ends at a blank or a punctuation mark only.
        if text[at : at + 1].isalnum():
            out.append("\\ ")
    return "".join([*out, _linked(text[at:])])


def _linked(text: str) -> str:
    text = re.sub(r"([|*\\])", r"\\\1", text)
    text = re.sub(r"\\\*(\w+)\\\*", r"*\1*", text)  # a word that is stressed
    text = _ARXIV.sub(r"`arXiv \1 <https://arxiv.org/abs/\1>`__", text)
    return _METHOD.sub(lambda found: f":doc:`/method/{_PAGES[int(found[1])]}`", text)


def _names(obj: Any) -> list[str]:
    try:
        names = list(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        return []
    return [name for name in names if name != "self"]


def _process_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str | None] | None:
    if not callable(obj):
        return None
    try:
        found = inspect.signature(obj)
    except (TypeError, ValueError):
        return None
    if inspect.isclass(obj) and issubclass(obj, Exception):
        return "", None
    known = vars(sys.modules[obj.__module__])
    parameters = [
        _plain(p, known) for p in found.parameters.values() if p.name not in ("self", "cls")
    ]
    shown = str(found.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    gives = found.return_annotation
    if what == "class" or gives in (inspect.Signature.empty, None):
        return shown, None
    return shown, str(_AsWritten(gives, known))


def _plain(parameter: inspect.Parameter, known: Mapping[str, Any]) -> inspect.Parameter:
    annotation, default = parameter.annotation, parameter.default
    if annotation is not inspect.Parameter.empty:
        parameter = parameter.replace(annotation=_AsWritten(annotation, known))
    if default is not inspect.Parameter.empty:
        parameter = parameter.replace(default=_AsWritten(_short(default)))
    return parameter


def _short(default: Any) -> str:
    """A default as a reader would write it."""
    text = repr(default)
    if "<" in text or len(text) > 70:
        return "..."
    return text


class _AsWritten:
    """Text that a signature shows without quotes; names of choices become the choices."""

    def __init__(self, text: Any, known: Mapping[str, Any] = MappingProxyType({})) -> None:
        written = text if isinstance(text, str) else inspect.formatannotation(text)

        def spelt(word: re.Match[str]) -> str:
            choices = known.get(word[0])
            if get_origin(choices) is not Literal:
                return word[0]
            return f"Literal[{', '.join(map(repr, get_args(choices)))}]"

        self.text = re.sub(r"\b[A-Z]\w+\b", spelt, written)

    def __repr__(self) -> str:
        return self.text

    __str__ = __repr__
