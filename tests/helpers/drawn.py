"""What a figure's specification draws: its layers, and the rows of their data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from xml.etree import ElementTree

from cdt_lens.core.display import Figure

Row = dict[str, Any]


def layers(part: Mapping[str, Any], data: Any = None) -> Iterator[Row]:
    """Every layer of a specification, with the data that it inherits."""
    data = part.get("data", data)
    for key in ("layer", "hconcat", "vconcat"):
        for inner in part.get(key, ()):
            yield from layers(inner, data)
    if "spec" in part:
        yield from layers(part["spec"], data)
    if "mark" in part:
        yield {**part, "data": data}


def rows(figure: Figure, mark: str, number: int = 0) -> list[Row]:
    """The rows of the layer with this mark, the first one by default."""
    found = [each for each in layers(figure.spec) if each["mark"]["type"] == mark]
    return found[number]["data"]["values"]


def look(figure: Figure, field: str, channel: str) -> dict[str, Any]:
    """The look of each value of a field, by one channel."""
    for each in layers(figure.spec):
        on = each["encoding"].get(channel, {})
        if on.get("field") == field:
            return dict(zip(on["scale"]["domain"], map(str, on["scale"]["range"]), strict=True))
    raise AssertionError(f"no {channel} of {field}")


def words(figure: Figure) -> list[str]:
    """Draw the figure, and return its texts."""
    root = ElementTree.fromstring(figure.svg())
    return [each.text for each in root.iter("{http://www.w3.org/2000/svg}text") if each.text]
