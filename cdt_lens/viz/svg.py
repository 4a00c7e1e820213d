"""A figure as inline SVG for an HTML page.

The text of a figure stays text, so that the browser draws it in any script. Text from the caller is
escaped.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from cdt_lens.core.process_wide import Setting, ignored, process_wide

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def figure_html(
    figure: Figure,
    *,
    prefix: str | None = None,
    tooltips: Mapping[str, Sequence[str]] | None = None,
) -> Markup:
    """Return a figure as an `<svg>` element, with its label as the description.

    Args:
        figure: The figure.
        prefix: The start of every id, so that figures on one page do not use each other's clip
            paths; by default a hash of the drawing.
        tooltips: The tooltips of the cells or points of a collection, by the gid of the collection.
    """
    text = _legal(_svg(figure))
    root = ElementTree.fromstring(text)
    prefix = prefix or f"figure-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    for unwanted in ("metadata", "defs/{*}style"):
        _remove(root, unwanted)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            name.rpartition("}")[2]: _prefixed(name, value, prefix)
            for name, value in element.attrib.items()
        }
    for gid, lines in (tooltips or {}).items():
        _add_tooltips(root, f"{prefix}-{gid}", lines)
    _describe(root, figure, prefix)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # The browser draws the text, as it has glyphs that matplotlib does not have.
    options: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "cdt_lens"}
    settings = matplotlib.rcParams
    kept: Setting = (lambda: {name: settings[name] for name in options}, settings.update)
    with (
        process_wide(kept, change=lambda: settings.update(options)),
        ignored("Glyph .* missing from font"),
    ):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _legal(text: str) -> str:
    """Return `text` without the control characters that XML cannot hold."""
    return _NOT_XML.sub("\ufffd", text)


def _remove(root: ElementTree.Element, path: str) -> None:
    parent_path, _, name = f"./{{*}}{path}".rpartition("/")
    for parent in root.findall(parent_path):
        for child in parent.findall(name):
            parent.remove(child)


def _prefixed(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    if name.endswith("href") and value.startswith("#"):
        return f"#{prefix}-{value[1:]}"
    return value.replace("url(#", f"url(#{prefix}-")


def _add_tooltips(root: ElementTree.Element, id: str, lines: Sequence[str]) -> None:
    group = root.find(f".//g[@id='{id}']")
    if group is None:
        return
    templates = {child for defs in group.iter("defs") for child in defs.iter()}
    drawn = [e for e in group.iter() if e.tag in ("path", "use") and e not in templates]
    # If a point was not drawn, every later line would name the wrong one.
    if len(drawn) != len(lines):
        return
    for element, line in zip(drawn, lines, strict=True):
        ElementTree.SubElement(element, "title").text = _legal(line)


def _describe(root: ElementTree.Element, figure: Figure, prefix: str) -> None:
    title = ElementTree.Element("title", id=f"{prefix}-title")
    title.text = _legal(" ".join(axes.get_title() for axes in figure.axes[:1]) or "Figure")
    description = ElementTree.Element("desc", id=f"{prefix}-desc")
    description.text = _legal(str(figure.get_label()))
    root[:0] = [title, description]
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    root.attrib |= {
        "id": prefix,
        "role": "img",
        "aria-labelledby": f"{prefix}-title {prefix}-desc",
        "width": str(width),
        "height": str(height),
        "style": "max-width:100%;height:auto;stroke-linejoin:round;stroke-linecap:butt",
    }
