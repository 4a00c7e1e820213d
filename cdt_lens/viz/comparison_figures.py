"""Figures of compared methods: matplotlib's object interface, no pyplot, no global style.

1. A method has the same colour, marker and line style in every panel; no two of a dozen share a
   marker, and neighbours differ in line style, so that a grey print still reads.
2. Random rankings are drawn wherever a ranking is: a method must beat drawing lots.
3. The yardstick is black; it is left out where it would be compared with itself.
"""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from cdt_lens.core.display import INK, MUTED
from cdt_lens.viz import style as artists
from cdt_lens.viz.words import score

if TYPE_CHECKING:
    from cdt_lens.comparing.comparison import Comparison, PlantedComparison

Look = tuple[str, str, Any]  # colour, marker, line style
_YARDSTICK = "exact"
_YARDSTICK_LOOK: Look = (INK, "*", "-")
_DASHES = (0, (7, 2, 1, 2, 1, 2))
_LOOKS: tuple[Look, ...] = (
    ("#2166ac", "o", "-"), ("#d9822b", "s", "--"), ("#3f7a52", "^", "-."), ("#b2182b", "v", ":"),
    ("#7a4988", "D", _DASHES), ("#12808f", "P", "-"), ("#a03b6d", "X", "--"),
    ("#6b8e23", "<", "-."), ("#5b7083", ">", ":"), ("#8a5a00", "h", _DASHES),
    ("#3d5a98", "p", "-"), ("#c2571a", "d", "--"), ("#444444", "8", "-."),
)  # fmt: skip
_GRID: dict[str, Any] = {"color": "#dddddd", "linewidth": 0.6}
_LOTS: dict[str, Any] = {"color": MUTED, "linestyle": (0, (1, 1)), "linewidth": 2.2}
_LEVEL: dict[str, Any] = {"color": MUTED, "linewidth": 0.8, "zorder": 1}
# Larger f and smaller ones are cut off with a note: one method that fails should not flatten all.
_F_RANGE = (-1.0, 2.0)
_RANKINGS: tuple[Literal["signed", "magnitude"], ...] = ("signed", "magnitude")


def comparison(result: Comparison) -> Figure:
    """Top: f of each method's ranking, by signed score and by magnitude, over the heads kept.

    Below: CPR and CMD by method (filled: signed, hollow: magnitude) beside random rankings, whose
    5th to 95th percentile is shaded, and Spearman with exact ablation against time in forward
    passes. The points have the gids "cpr-signed", "cmd-magnitude" and so on, and "agreement-3" for
    the fourth method; `point_lines` says each in words.
    """
    height = 7.1 + 0.24 * len(result.methods)
    figure = Figure(figsize=(11.0, height), layout="constrained", facecolor="white")
    title = f"Methods compared: {result.task} with {result.model}"
    figure.suptitle(textwrap.fill(title, 120), fontsize=12, parse_math=False)
    # A page names a drawing by the title of its first axes: these are there for that alone.
    figure.add_axes((0, 0, 1, 1), visible=False).set_title(title, parse_math=False)
    heights = (4.0, 2.2 + 0.24 * len(result.methods))
    parts = figure.subplot_mosaic("AAABBB;CCDDEE", height_ratios=heights)
    for axes, by in ((parts["A"], "signed"), (parts["B"], "magnitude")):
        _curves(axes, result, by)
    for axes, measure in ((parts["C"], "cpr"), (parts["D"], "cmd")):
        _areas(axes, result, measure)
    parts["D"].sharey(parts["C"])
    parts["D"].tick_params(labelleft=False)
    _agreement(parts["E"], result)
    _legend(figure, result)
    refused = [each.method for each in result.methods if each.refused]
    figure.set_label(
        f"{len(result.methods)} methods compared: line charts of faithfulness over the share of "
        "heads kept, dot plots of CPR and CMD beside random rankings, and a scatter plot of "
        "Spearman with exact ablation against time in forward passes; the table holds the numbers."
        + (f" Refused, and not drawn: {', '.join(refused)}." if refused else "")
    )
    return figure


def planted(result: PlantedComparison) -> Figure:
    """AUROC and average precision of each method on each planted circuit, as a table of shades.

    The darker the better; the number stands in the cell, "n/a" where a method was refused.
    """
    frames = {
        "AUROC (0.5 is chance)": result.matrix("auroc"),
        "Average precision": result.matrix("average_precision"),
    }
    rows, columns = next(iter(frames.values())).shape
    size = (max(6.0, 2.6 + 0.72 * (columns + 1)), 2 * (1.5 + 0.26 * rows) + 0.6)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    panels = figure.subplots(2, 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, frame) in zip(panels, frames.items(), strict=True):
        _shades(axes, frame.assign(mean=frame.mean(axis=1, skipna=False)))
        axes.set_title(name, loc="left", fontsize=11)
    panels[0].tick_params(labelbottom=False)
    figure.set_label(
        f"Two tables of shades, AUROC and average precision, of {rows} methods on {columns} "
        "planted circuits and their mean; the tables hold the numbers."
    )
    return figure


def point_lines(result: Comparison) -> dict[str, list[str]]:
    """What a reader sees when pointing at the points of `comparison`: lines by the points' gid."""
    lines = {
        f"{measure}-{by}": [
            f"{each.method}: {measure.upper()} {score(each.value(measure, by))}, ranked {by}"
            for each in result.methods
            if each.curve(by) is not None
        ]
        for measure in ("cpr", "cmd")
        for by in _RANKINGS
    }
    for each in _agreeing(result):
        words = f"Spearman {score(each.spearman)}, {each.forward_passes:.3g} forward passes"
        lines[f"agreement-{result.names.index(each.method)}"] = [f"{each.method}: {words}"]
    return lines


def looks(result: Comparison) -> dict[str, Look]:
    """Colour, marker and line style of each method, the same in every panel."""
    others = [name for name in result.names if name != _YARDSTICK]
    found = {name: _LOOKS[place % len(_LOOKS)] for place, name in enumerate(others)}
    return {_YARDSTICK: _YARDSTICK_LOOK, **found}


def _curves(axes: Axes, result: Comparison, by: Any) -> None:
    """f over the share of heads, one line a method, above the band of random rankings."""
    fractions = np.asarray(result.fractions, dtype=float)
    for level in (0.0, 1.0):
        axes.axhline(level, **_LEVEL)
    drawn = [np.asarray(curve.f) for curve in result.random]
    if drawn:
        low, middle, high = np.quantile(np.stack(drawn), (0.05, 0.5, 0.95), axis=0)
        axes.fill_between(fractions, low, high, color=MUTED, alpha=0.18, linewidth=0)
        axes.plot(fractions, middle, **_LOTS)
    for place, (name, (colour, marker, line)) in enumerate(_in_order(result)):
        curve = result[name].curve(by)
        if curve is None:
            continue
        drawn.append(np.asarray(curve.f))
        style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line}
        strong: dict[str, Any] = (
            {"linewidth": 2.0, "zorder": 4} if name == _YARDSTICK else {"linewidth": 1.4}
        )
        # Markers in turn, so that lines on top of each other show each other's.
        every = (place % 2, 2) if len(fractions) > 6 else 1
        axes.plot(fractions, curve.f, markersize=6, markevery=every, **style, **strong)
    _limit(axes, drawn)
    artists.share_axis(axes, fractions)
    axes.tick_params(axis="x", labelsize=9)
    axes.set(xlabel="share of heads kept", ylabel="faithfulness f")
    axes.set_title(f"Heads ranked by {_words(by)}", loc="left", fontsize=10)
    axes.grid(axis="x", **_GRID)
    axes.spines[["top", "right"]].set_visible(False)


def _limit(axes: Axes, drawn: list[Any]) -> None:
    """Cut off what lies far outside 0 to 1, and say so."""
    low, high = (float(f([v.min() for v in drawn] + [v.max() for v in drawn])) for f in (min, max))
    bottom, top = max(low, _F_RANGE[0]), min(high, _F_RANGE[1])
    margin = 0.05 * max(top - bottom, 1.0)
    axes.set_ylim(min(bottom, 0.0) - margin, max(top, 1.0) + margin)
    if low < bottom or high > top:
        place: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "va": "top"}
        words = f"cut off: f from {low:.1f} to {high:.1f}"
        axes.text(0.99, 0.99, words, fontsize=8, color=MUTED, **place)


def _areas(axes: Axes, result: Comparison, measure: str) -> None:
    """One area by method, a filled marker for the signed and a hollow one for the other ranking."""
    known = looks(result)
    values = [getattr(curve, measure) for curve in result.random]
    if values:
        low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
        axes.axvspan(low, high, color=MUTED, alpha=0.18, linewidth=0)
        axes.axvline(middle, **_LOTS)
    for by in _RANKINGS:
        drawn = [
            (each.value(measure, by), place, known[each.method][0])
            for place, each in enumerate(result.methods)
            if each.curve(by) is not None
        ]
        if not drawn:
            continue
        across, up, colours = zip(*drawn, strict=True)
        hollow = by == "magnitude"
        style: dict[str, Any] = {"edgecolors": colours, "s": 40, "linewidths": 1.4, "zorder": 4}
        # Hollow ones a little lower, so that equal areas show both.
        axes.scatter(
            across, np.asarray(up) + 0.22 * hollow, c="white" if hollow else colours, **style
        ).set_gid(f"{measure}-{by}")
    names = [f"{each.method} (refused)" if each.refused else each.method for each in result.methods]
    axes.set_yticks(range(len(names)), names, fontsize=9, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    better = "more is better" if measure == "cpr" else "less is better"
    axes.set_xlabel(measure.upper())
    axes.set_title(f"{measure.upper()}: {better}", loc="left", fontsize=10)
    axes.grid(**_GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _agreement(axes: Axes, result: Comparison) -> None:
    """Spearman with the yardstick against cost; the yardstick's own cost is an upright line."""
    known = looks(result)
    axes.axhline(0.0, **_LEVEL)
    for each in _agreeing(result):
        colour, marker, _ = known[each.method]
        across = max(each.forward_passes, 1e-3)
        # Crosses have less ink than the other markers of one size.
        size = 120 if marker in "PX" else 80
        style: dict[str, Any] = {"s": size, "edgecolors": "white", "linewidths": 0.5, "zorder": 4}
        drawn = axes.scatter(across, each.spearman, color=colour, marker=marker, **style)
        drawn.set_gid(f"agreement-{result.names.index(each.method)}")
    cost = next((e.forward_passes for e in result.methods if e.method == _YARDSTICK), math.nan)
    if math.isfinite(cost):
        axes.axvline(cost, color=INK, linewidth=1.2, linestyle="--")
        place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "rotation": 90}
        axes.text(cost, 0.02, " exact ablation", fontsize=8, ha="right", va="bottom", **place)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.12)
    axes.set(xlabel="time in forward passes", ylabel="Spearman with exact ablation")
    axes.set_title("Agreement: up and left is better", loc="left", fontsize=10)
    axes.grid(**_GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _agreeing(result: Comparison) -> list[Any]:
    """The methods that the scatter can draw: with a correlation and a cost, not the yardstick."""
    return [
        each
        for each in result.methods
        if each.method != _YARDSTICK
        and math.isfinite(each.spearman)
        and math.isfinite(each.forward_passes)
    ]


def _in_order(result: Comparison) -> list[tuple[str, Look]]:
    """Looks by method, the yardstick last, on top of the others."""
    known = looks(result)
    return sorted(
        ((name, known[name]) for name in result.names), key=lambda pair: pair[0] == _YARDSTICK
    )


def _legend(figure: Figure, result: Comparison) -> None:
    known = looks(result)
    handles: dict[str, Line2D] = {}
    for each in result.methods:
        if not each.refused:
            colour, marker, line = known[each.method]
            handles[each.method] = Line2D(
                [], [], color=colour, marker=marker, linestyle=line, markersize=6, linewidth=1.4
            )
    if result.random:
        name = f"random rankings ({len(result.random)}): median, 5-95 %"
        handles[name] = Line2D([], [], **_LOTS)
    for by in _RANKINGS:
        fill = MUTED if by == "signed" else "white"
        dot: dict[str, Any] = {"marker": "o", "linestyle": "none", "mfc": fill, "mec": MUTED}
        handles[f"CPR, CMD: ranked by {_words(by)}"] = Line2D([], [], **dot)
    place: dict[str, Any] = {"loc": "outside lower left", "frameon": False, "fontsize": 9}
    legend = figure.legend(handles.values(), handles.keys(), ncols=4, handlelength=4, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _words(by: str) -> str:
    return "signed score" if by == "signed" else "magnitude of the score"


def _shades(axes: Axes, frame: pd.DataFrame) -> None:
    """Cells shaded from white (0) to blue (1), with their number."""
    values = frame.to_numpy(dtype=float)
    rows, columns = values.shape
    shades = colormaps["Blues"].with_extremes(bad="#eeeeee")
    edges = [np.arange(n + 1) - 0.5 for n in (columns, rows)]
    axes.pcolormesh(*edges, values, cmap=shades, vmin=0.0, vmax=1.25, edgecolors="white")
    for row in range(rows):
        for column in range(columns):
            value = values[row, column]
            words = f"{value:.2f}" if math.isfinite(value) else "n/a"
            ink = "white" if value > 0.85 else INK
            centred: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8.5}
            axes.text(column, row, words, color=ink, **centred)
    axes.axvline(columns - 1.5, color=INK, linewidth=1.0)
    slanted: dict[str, Any] = {"rotation": 35, "ha": "right", "parse_math": False}
    axes.set_xticks(range(columns), [str(name) for name in frame.columns], **slanted)
    axes.set_yticks(range(rows), [str(name) for name in frame.index], parse_math=False)
    axes.tick_params(length=0, labelsize=9)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.spines[:].set_visible(False)
