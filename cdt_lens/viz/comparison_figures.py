"""Figures of compared methods as Vega-Lite specifications.

1. A method has the same colour, marker and dash in every panel. No two of a dozen methods share a
   marker, and neighbours differ in dash, so that a grey print can be read.
2. Random rankings are drawn wherever a ranking is, because a method must beat them.
3. The yardstick is black. It is left out where it would be compared with itself.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cdt_lens.comparing.comparison import (
    RANKINGS,
    YARDSTICK,
    Comparison,
    MethodResult,
    PlantedComparison,
)
from cdt_lens.core.choices import Ranking
from cdt_lens.core.display import INK, MUTED, POSITIVE, Figure
from cdt_lens.viz import spec
from cdt_lens.viz.spec import DASHES, PAPER, Spec, field, layer, looks, name, rule, tips
from cdt_lens.viz.words import empty_run, number

Look = tuple[str, str, list[int]]  # colour, marker, dash
_COLOURS = (
    POSITIVE, "#d9822b", "#3f7a52", "#b2182b", "#7a4988", "#12808f", "#a03b6d", "#6b8e23",
    "#5b7083", "#8a5a00", "#3d5a98", "#c2571a", "#444444",
)  # fmt: skip
_MARKERS = (
    "circle", "square", "triangle-up", "triangle-down", "diamond", "cross", spec.CROSS,
    "triangle-left", "triangle-right", spec.PENTAGON, spec.HOURGLASS,
    "M-.9,-.2L.9,-.2L.9,.2L-.9,.2Z", "M-.2,-.9L.2,-.9L.2,.9L-.2,.9Z",
)  # fmt: skip
# f outside this range is cut off with a note, as one failing method would flatten all others.
_F_RANGE = (-1.0, 2.0)
_RANKED_BY: dict[Ranking, str] = {"signed": "signed score", "magnitude": "magnitude of the score"}
_RANDOM = {"color": MUTED, "strokeDash": DASHES[3], "strokeWidth": 2}


def comparison(result: Comparison) -> Figure:
    """Draw faithfulness, areas, and agreement against cost of every method.

    Top: f of the ranking of each method, by signed score and by magnitude, over the heads kept.
    Below: CPR and CMD by method (filled: signed, hollow: magnitude) beside random rankings, whose
    5th to 95th percentile is shaded, and Spearman with exact ablation against time in forward
    passes.

    Args:
        result: The compared methods.
    """
    refused = [method.method for method in result.methods if method.refused]
    curves = {"hconcat": [_curves(result, by) for by in RANKINGS]}
    areas = {"hconcat": [_areas(result, "cpr"), _areas(result, "cmd"), _agreement(result)]}
    left_out = f" Refused, and not drawn: {', '.join(refused)}." if refused else ""
    notes = "Filled marks: ranked by the signed score; hollow marks: by its magnitude."
    if result.random:
        notes += f" Grey: {len(result.random)} random rankings, their median and 5-95 %."
    return spec.figure(
        f"Methods compared: {result.task} with {result.model}; {empty_run(result.empty_run)}",
        f"{len(result.methods)} methods compared: line charts of faithfulness over the share of "
        "heads kept, dot plots of CPR and CMD beside random rankings, and a scatter plot of "
        f"Spearman with exact ablation against time in forward passes; the table holds the "
        f"numbers; {empty_run(result.empty_run)}.{left_out}",
        {"vconcat": [curves, areas]},
        notes=[notes],
        width=820,
    )


def planted(result: PlantedComparison) -> Figure:
    """Draw AUROC and average precision of each method on each planted circuit, as shaded cells.

    Darker is better. The number stands in the cell; it is "n/a" if the method was refused.

    Args:
        result: The methods on every circuit.
    """
    titles = {"auroc": "AUROC (0.5 is chance)", "average_precision": "Average precision"}
    rows, columns = result.matrix("auroc").shape
    return spec.figure(
        "Methods on planted circuits",
        f"Two tables of shades, AUROC and average precision, of {rows} methods on {columns} "
        "planted circuits and their mean; the tables hold the numbers.",
        {"vconcat": [_shades(result, measure, title) for measure, title in titles.items()]},
        width=520,
    )


def method_looks(result: Comparison) -> dict[str, Look]:
    """Return colour, marker and dash of each method, the same in every panel."""
    others = [method for method in result.names if method != YARDSTICK]
    styles = {
        method: (_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)], DASHES[i % len(DASHES)])
        for i, method in enumerate(others)
    }
    return {YARDSTICK: (INK, spec.STAR, DASHES[0]), **styles}


def _on(result: Comparison, *channels: str) -> Spec:
    """Return the encodings of a method by colour, shape and dash."""
    styles, order = method_looks(result), ("color", "shape", "strokeDash")
    drawn = [method.method for method in result.methods if not method.refused]
    legend = {"title": None, "columns": 4}
    return {
        channel: name(
            "method",
            legend=legend,
            **looks(drawn, (styles[m][order.index(channel)] for m in drawn)),
        )
        for channel in channels
    }


def _curves(result: Comparison, ranking: Ranking) -> Spec:
    """Draw f over the share of heads, one line for each method, above the random rankings."""
    sizes = [place for place, heads in enumerate(result.sizes) if heads > 0]
    at = [{"fraction": result.fractions[p], "heads": result.sizes[p]} for p in sizes]
    rows = [
        {"method": method.method, "f": curve.f[p], **here}
        for method in result.methods
        if (curve := method.curve(ranking)) is not None
        for p, here in zip(sizes, at, strict=True)
    ]
    band: list[Spec] = []
    if result.random:
        levels = np.quantile([curve.f for curve in result.random], (0.05, 0.5, 0.95), axis=0)
        ends = (dict(zip(("low", "f", "high"), levels[:, p], strict=True)) for p in sizes)
        band = [here | row for here, row in zip(at, ends, strict=True)]
    every = [value for row in (*rows, *band) for key, value in row.items() if key in "low f high"]
    low, high = min(every, default=0.0), max(every, default=1.0)
    domain = [min(max(low, _F_RANGE[0]), 0.0) - 0.05, max(min(high, _F_RANGE[1]), 1.0) + 0.05]
    f, clip = field("f", "faithfulness f", scale={"domain": domain}), {"clip": True}
    grey = {"color": MUTED, "opacity": 0.18, **clip}
    told = tips(method="method", heads="heads", f="f")
    layers = [
        rule("y", 0),
        rule("y", 1),
        layer("area", band, "", grey, y=f | {"field": "low"}, y2={"field": "high"}),
        layer("line", band, "", {**_RANDOM, **clip}, y=f),
        layer("line", rows, "", {"strokeWidth": 1.5, **clip}, y=f,
              **_on(result, "color", "strokeDash")),
        layer("point", rows, "", {"size": 40, "filled": True, **clip}, y=f, tooltip=told,
              **_on(result, "color", "shape")),
    ]  # fmt: skip
    for part in layers[2:]:
        part["encoding"]["x"] = spec.share()
    if low < domain[0] or high > domain[1]:
        cut, look = f"cut off: f from {low:.1f} to {high:.1f}", {"align": "right", "color": MUTED}
        corner = {"x": {"value": "width"}, "y": {"value": 8}}
        layers.append(layer("text", [{"words": cut}], "", look, **corner, text=name("words")))
    title = f"Heads ranked by {_RANKED_BY[ranking]}"
    return {"title": title, "width": 380, "height": 260, "layer": layers}


def _areas(result: Comparison, measure: Any) -> Spec:
    """Draw one area by method, a filled mark for the signed and a hollow one for the other."""
    names = {m.method: f"{m.method} (refused)" if m.refused else m.method for m in result.methods}
    x = field("value", measure.upper(), scale={"zero": False})
    axis = {"ticks": False, "grid": True, "labels": measure == "cpr"}
    on = {
        "x": x, "y": name("row", scale={"domain": list(names.values())}, axis=axis),
        "tooltip": tips(method="method", ranked="ranked by", value=measure.upper()),
    }  # fmt: skip
    layers = []
    if result.random:
        values = [getattr(curve, measure) for curve in result.random]
        band = [
            dict(zip(("low", "value", "high"), np.quantile(values, (0.05, 0.5, 0.95)), strict=True))
        ]
        grey, ends = {"color": MUTED, "opacity": 0.18}, {"x": x | {"field": "low"}}
        layers = [layer("rect", band, "", grey, **ends, x2={"field": "high"}),
                  layer("rule", band, "", _RANDOM, x=x)]  # fmt: skip
    for by in RANKINGS:
        rows = [
            {
                "method": m.method,
                "row": names[m.method],
                "ranked": by,
                "value": m.value(measure, by),
            }
            for m in result.methods
            if m.curve(by) is not None
        ]
        # Hollow marks stand a little lower, so that equal areas show both.
        look = {"size": 55, "filled": by == "signed", "yOffset": 0 if by == "signed" else 6}
        layers.append(layer("point", rows, "", look, **on, **_on(result, "color")))
    better = "more is better" if measure == "cpr" else "less is better"
    title = f"{measure.upper()}: {better}"
    return {"title": title, "width": 180, "height": {"step": 20}, "layer": layers}


def _agreement(result: Comparison) -> Spec:
    """Draw Spearman with the yardstick against cost; a line marks the cost of the yardstick."""
    rows = [
        {"method": m.method, "cost": max(m.forward_passes, 1e-3), "spearman": m.spearman}
        for m in _agreeing(result)
    ]
    axis = {"format": "~g", "values": [10**n for n in range(-3, 7)]}
    x = field("cost", "time in forward passes", scale={"type": "log"}, axis=axis)
    y = field("spearman", "Spearman with exact ablation")
    told = tips(method="method", spearman="Spearman", cost="forward passes")
    layers = [
        rule("y", 0),
        layer("point", rows, "", {"size": 80, "filled": True}, x=x, y=y, tooltip=told,
              **_on(result, "color", "shape")),
    ]  # fmt: skip
    cost = next((m.forward_passes for m in result.methods if m.method == YARDSTICK), math.nan)
    if math.isfinite(cost):
        mark, look = [{"cost": cost, "words": "exact ablation"}], {"color": INK}
        text = {"angle": 270, "align": "left", "dx": 4, "dy": -5, "fontSize": 10}
        foot = {"x": x, "y": {"value": "height"}, "text": name("words")}
        layers.append(layer("rule", mark, "", {**look, "strokeDash": DASHES[1]}, x=x))
        layers.append(layer("text", mark, "", text, **foot))
    title = "Agreement: up and left is better"
    return {"title": title, "width": 240, "height": 240, "layer": layers}


def _agreeing(result: Comparison) -> list[MethodResult]:
    """Return the methods with a correlation and a cost, without the yardstick."""
    return [
        method
        for method in result.methods
        if method.method != YARDSTICK
        and math.isfinite(method.spearman)
        and math.isfinite(method.forward_passes)
    ]


def _shades(result: PlantedComparison, measure: str, title: str) -> Spec:
    """Draw cells shaded from white (0) to blue (1), with their number."""
    frame = result.matrix(measure)
    frame = frame.assign(mean=frame.mean(axis=1, skipna=False))
    rows = [
        {"method": method, "circuit": circuit, "value": value, "words": number(value, ".2f")}
        for method, values in zip(frame.index, frame.to_numpy(dtype=float), strict=True)
        for circuit, value in zip(frame.columns, values, strict=True)
    ]
    shade = {"domain": [0, 1.25], "range": [PAPER, POSITIVE], "interpolate": "rgb"}
    missing = {"test": "datum.value === null", "value": spec.EMPTY}
    colour = field("value", scale=shade, legend=None, condition=missing)
    ink = {"condition": {"test": "datum.value > 0.85", "value": "white"}, "value": INK}
    sides = {"x": ("circuit", list(frame.columns), -35), "y": ("method", list(frame.index), 0)}
    on = {
        side: name(of, scale={"domain": names}, axis={"domain": False, "labelAngle": angle})
        for side, (of, names, angle) in sides.items()
    }
    return {
        "title": title, "width": {"step": 62}, "height": {"step": 24}, "data": {"values": rows},
        "encoding": on,
        "layer": [
            layer("rect", look={"stroke": PAPER, "invalid": None}, color=colour),
            layer("text", text=name("words"), color=ink),
        ],
    }  # fmt: skip
