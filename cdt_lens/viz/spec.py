"""Parts that the figures share: Vega-Lite encodings, layers, scales and settings.

1. A specification is plain JSON: data, marks, and encodings of fields by marks.
2. Text of a result stands in data, in titles and in domains of scales, never in an expression, so
   that it stays text.
3. No figure relies on colour alone: marks differ in shape, fill or line as well.
4. Colours come from the palette below, which the page replaces by a dark one.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from cdt_lens.core.display import INK, MUTED, NEGATIVE, POSITIVE, Figure

Spec = dict[str, Any]

PAPER, LINE, EMPTY, POINTED = "#ffffff", "#dddddd", "#d4d4d4", "#c25100"
_MIDDLE = "#f7f7f7"  # of the scale from negative to positive
STAR = "M0,-1L.23,-.32L.95,-.31L.37,.12L.59,.81L0,.4L-.59,.81L-.37,.12L-.95,-.31L-.23,-.32Z"
CROSS = "M-.9,-.5L-.5,-.9L0,-.4L.5,-.9L.9,-.5L.4,0L.9,.5L.5,.9L0,.4L-.5,.9L-.9,.5L-.4,0Z"
PENTAGON = "M0,-1L.95,-.31L.59,.81L-.59,.81L-.95,-.31Z"
HOURGLASS = "M-.8,-.8L.8,-.8L-.8,.8L.8,.8Z"
DOT = "M-.2,0A.2,.2,0,1,1,.2,0A.2,.2,0,1,1,-.2,0"
DASHES = ([1, 0], [6, 3], [8, 3, 2, 3], [2, 2], [10, 3, 2, 3, 2, 3])
# The lines of a legend's label, of at most as many letters as the parameter `letters` says.
WRAPPED = (
    "split(trim(replace(datum.label, "
    r"regexp('(.{1,' + letters + '})( |$)', 'g'), '$1\n')), '\n')"
)
_PERCENT = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TEXT = {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal"}
_CONFIG: Spec = {
    "background": PAPER,
    "font": 'system-ui, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif',
    "view": {"stroke": None},
    "axis": {
        **_TEXT, "gridColor": LINE, "domainColor": MUTED, "tickColor": MUTED, "labelFontSize": 11,
        "titleFontSize": 12, "labelLimit": 260,
    },
    "axisQuantitative": {"labelOverlap": "greedy", "labelSeparation": 4},
    "legend": {
        **_TEXT, "orient": "bottom", "direction": "vertical", "labelFontSize": 11, "columns": 2,
        "titleFontSize": 11, "labelLimit": 460, "titleLimit": 400, "symbolLimit": 0,
    },
    "header": {**_TEXT, "labelFontSize": 12, "titleFontSize": 12, "labelAnchor": "start"},
    "title": {
        "anchor": "start", "fontSize": 13, "color": INK, "subtitlePadding": 4,
        "subtitleColor": MUTED, "subtitleFontSize": 11,
    },
    "text": {"color": INK, "fontSize": 11},
}  # fmt: skip


def figure(
    title: str, description: str, body: Spec, *, notes: Sequence[str] = (), width: int = 480
) -> Figure:
    """Return a figure with a title that wraps.

    Args:
        title: The title.
        description: What the figure shows, for readers who cannot see it.
        body: Data, marks and encodings.
        notes: Sentences below the title.
        width: The width to which the title wraps, in pixels.
    """
    lines = [line for note in notes for line in textwrap.wrap(note, width // 6)]
    heading = {"text": textwrap.wrap(title, width // 7) or "", "subtitle": lines}
    spec: Spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "description": description, "title": heading, "config": _CONFIG, "padding": 8,
    }  # fmt: skip
    return Figure(title, plain(spec | body))


def panel(drawn: Figure, title: str, width: int, height: int) -> Spec:
    """Return a figure as a panel of another one, without its parameters.

    Args:
        drawn: The figure, of one panel.
        title: The title of the panel.
        width: The width of the panel in pixels.
        height: The height of the panel in pixels.
    """
    own = {"$schema", "description", "config", "padding", "params"}
    body = {key: part for key, part in drawn.spec.items() if key not in own}
    return body | {"title": title, "width": width, "height": height}


def plain(value: Any) -> Any:
    """Return `value` as JSON values; numbers that are not finite are None, odd text is replaced."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, (bool, np.bool_)):
        return None if value is None else bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return _NOT_XML.sub("\ufffd", str(value))


def as_array(values: Float[Tensor, "*axes"]) -> Float[np.ndarray, "*axes"]:
    """Return `values` as float64, on the CPU, without a gradient."""
    return values.detach().double().cpu().numpy()


def field(name: str, title: str | None = None, **more: Any) -> Spec:
    """Return the encoding of a number by a position or a size.

    Args:
        name: The field of the data.
        title: The title of its axis.
        **more: Further entries of the encoding.
    """
    return {"field": name, "type": "quantitative", "title": title, **more}


def name(field: str, title: str | None = None, **more: Any) -> Spec:
    """Return the encoding of a name; arguments as those of `field`."""
    return {"field": field, "type": "nominal", "title": title, **more}


def looks(values: Iterable[str], range: Iterable[Any]) -> Spec:
    """Return a scale that gives each value its own look, in order."""
    domain = list(values)
    return {"scale": {"domain": domain, "range": list(range)[: len(domain)]}}


def tips(**titles: str) -> list[Spec]:
    """Return what pointing at a mark shows: fields of the data, by their titles."""
    return [{"field": field, "title": title} for field, title in titles.items()]


def layer(
    mark: str, data: Any = None, where: str = "", look: Spec | None = None, **on: Any
) -> Spec:
    """Return one layer of a figure.

    Args:
        mark: The type of the mark.
        data: The rows; by default those of the whole figure.
        where: An expression over the fields that keeps some of the rows.
        look: The properties of the mark.
        **on: The encodings.
    """
    made: Spec = {"mark": {"type": mark, **(look or {})}, "encoding": on}
    made |= {"data": {"values": list(data)}} if data is not None else {}
    return made | ({"transform": [{"filter": where}]} if where else {})


def rule(axis: str, at: float | int, **look: Any) -> Spec:
    """Return a line across the panel at a value of one axis."""
    return layer("rule", [{}], "", {"color": MUTED, **look}, **{axis: {"datum": at}})


def share() -> Spec:
    """Return the encoding of the share of heads on a logarithmic axis."""
    axis = {"values": _PERCENT, "format": "~%", "labelOverlap": "greedy"}
    return field("fraction", "share of heads kept", scale={"type": "log", "nice": False}, axis=axis)


def diverging(end: float) -> Spec:
    """Return a scale from red over white to blue that ends at plus and minus `end`."""
    colours = [NEGATIVE, _MIDDLE, POSITIVE]
    return {"domain": [-end, 0, end], "range": colours, "clamp": True, "interpolate": "rgb"}


def head_map(
    rows: Sequence[Spec], shape: tuple[int, ...], colour: Spec, told: list[Spec], *layers: Spec
) -> Spec:
    """Return one cell for each head, layers down and heads across.

    Args:
        rows: A row for each head with its `layer`, its index `head` and its name `cell`.
        shape: The numbers of layers and of heads in a layer.
        colour: The encoding of the colour.
        told: What pointing at a cell shows.
        *layers: What is drawn above the cells.
    """
    axis = {"labelAngle": 0, "labelOverlap": "greedy", "domain": False}
    where = {
        side: {"field": of, "type": "ordinal", "axis": axis, "scale": {"domain": list(range(n))}}
        for side, of, n in (("y", "layer", shape[0]), ("x", "head", shape[1]))
    }
    edge = {"stroke": PAPER, "strokeWidth": 0.5, "invalid": None}
    return {
        "width": shape[1] * min(max(400 / shape[1], 20), 52),
        "height": shape[0] * min(max(540 / shape[0], 17), 40),
        "data": {"values": list(rows)},
        "encoding": where,
        "layer": [layer("rect", None, "", edge, color=colour, tooltip=told), *layers],
    }
