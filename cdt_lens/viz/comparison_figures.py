"""Figures of compared methods, by matplotlib's object interface without pyplot.

1. A method has the same colour, marker and line style in every panel. No two of a dozen methods
   share a marker, and neighbours differ in line style, so that a grey print can be read.
2. Random rankings are drawn wherever a ranking is, because a method must beat them.
3. The yardstick is black. It is left out where it would be compared with itself.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from cdt_lens.comparing.comparison import (
    RANKINGS,
    YARDSTICK,
    Comparison,
    Measure,
    MethodResult,
    PlantedComparison,
)
from cdt_lens.core.display import INK, MUTED
from cdt_lens.viz import style
from cdt_lens.viz.words import empty_run, number, score

Look = tuple[str, str, Any]  # colour, marker, line style
_YARDSTICK_LOOK: Look = (INK, "*", "-")
_DASHES = (0, (7, 2, 1, 2, 1, 2))
_LOOKS: tuple[Look, ...] = (
    ("#2166ac", "o", "-"), ("#d9822b", "s", "--"), ("#3f7a52", "^", "-."), ("#b2182b", "v", ":"),
    ("#7a4988", "D", _DASHES), ("#12808f", "P", "-"), ("#a03b6d", "X", "--"),
    ("#6b8e23", "<", "-."), ("#5b7083", ">", ":"), ("#8a5a00", "h", _DASHES),
    ("#3d5a98", "p", "-"), ("#c2571a", "d", "--"), ("#444444", "8", "-."),
)  # fmt: skip
_RANDOM: dict[str, Any] = {"color": MUTED, "linestyle": (0, (1, 1)), "linewidth": 2.2}
_LEVEL: dict[str, Any] = {"color": MUTED, "linewidth": 0.8, "zorder": 1}
_BAND: dict[str, Any] = {"color": MUTED, "alpha": 0.18, "linewidth": 0}
# f outside this range is cut off with a note, as one failing method would flatten all others.
_F_RANGE = (-1.0, 2.0)
_RANKED_BY = {"signed": "signed score", "magnitude": "magnitude of the score"}


def comparison(result: Comparison) -> Figure:
    """Draw faithfulness, areas, and agreement against cost of every method.

    Top: f of the ranking of each method, by signed score and by magnitude, over the heads kept.
    Below: CPR and CMD by method (filled: signed, hollow: magnitude) beside random rankings, whose
    5th to 95th percentile is shaded, and Spearman with exact ablation against time in forward
    passes. The points have gids such as "cpr-signed" and "cmd-magnitude", and "agreement-3" for the
    fourth method; `point_lines` names them.

    Args:
        result: The compared methods.
    """
    rows = 0.24 * len(result.methods)
    figure = style.paper(11.0, 7.1 + rows)
    title = f"Methods compared: {result.task} with {result.model}; {empty_run(result.empty_run)}"
    style.name_page(figure, title, size=12)
    panels = figure.subplot_mosaic("AAABBB;CCDDEE", height_ratios=(4.0, 2.2 + rows))
    for panel, ranking in zip("AB", RANKINGS, strict=True):
        _draw_curves(panels[panel], result, ranking)
    _draw_areas(panels["C"], result, "cpr")
    _draw_areas(panels["D"], result, "cmd")
    panels["D"].sharey(panels["C"])
    panels["D"].tick_params(labelleft=False)
    _draw_agreement(panels["E"], result)
    style.legend(figure, _handles(result), ncols=4, handlelength=4)
    refused = [method.method for method in result.methods if method.refused]
    figure.set_label(
        f"{len(result.methods)} methods compared: line charts of faithfulness over the share of "
        "heads kept, dot plots of CPR and CMD beside random rankings, and a scatter plot of "
        "Spearman with exact ablation against time in forward passes; the table holds the numbers; "
        f"{empty_run(result.empty_run)}."
        + (f" Refused, and not drawn: {', '.join(refused)}." if refused else "")
    )
    return figure


def planted(result: PlantedComparison) -> Figure:
    """Draw AUROC and average precision of each method on each planted circuit, as shaded cells.

    Darker is better. The number stands in the cell; it is "n/a" if the method was refused.

    Args:
        result: The methods on every circuit.
    """
    frames = {
        "AUROC (0.5 is chance)": result.matrix("auroc"),
        "Average precision": result.matrix("average_precision"),
    }
    rows, columns = next(iter(frames.values())).shape
    figure = style.paper(max(6.0, 2.6 + 0.72 * (columns + 1)), 2 * (1.5 + 0.26 * rows) + 0.6)
    panels = figure.subplots(2, 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, frame) in zip(panels, frames.items(), strict=True):
        _draw_cells(axes, frame.assign(mean=frame.mean(axis=1, skipna=False)))
        axes.set_title(name, loc="left", fontsize=11)
    panels[0].tick_params(labelbottom=False)
    figure.set_label(
        f"Two tables of shades, AUROC and average precision, of {rows} methods on {columns} "
        "planted circuits and their mean; the tables hold the numbers."
    )
    return figure


def point_lines(result: Comparison) -> dict[str, list[str]]:
    """Return the tooltips of the points of `comparison`, by the gid of the points."""
    lines = {
        f"{measure}-{ranking}": [
            f"{m.method}: {measure.upper()} {score(m.value(measure, ranking))}, ranked {ranking}"
            for m in result.methods
            if m.curve(ranking) is not None
        ]
        for measure in ("cpr", "cmd")
        for ranking in RANKINGS
    }
    for method in _agreeing(result):
        words = f"Spearman {score(method.spearman)}, {method.forward_passes:.3g} forward passes"
        lines[f"agreement-{result.names.index(method.method)}"] = [f"{method.method}: {words}"]
    return lines


def looks(result: Comparison) -> dict[str, Look]:
    """Return colour, marker and line style of each method, the same in every panel."""
    others = [name for name in result.names if name != YARDSTICK]
    styles = {name: _LOOKS[index % len(_LOOKS)] for index, name in enumerate(others)}
    return {YARDSTICK: _YARDSTICK_LOOK, **styles}


def _draw_curves(axes: Axes, result: Comparison, ranking: Any) -> None:
    """Draw f over the share of heads, one line for each method, above the random rankings."""
    shown = np.asarray(result.sizes) > 0  # No head is kept at the others.
    fractions = np.asarray(result.fractions, dtype=float)[shown]
    for level in (0.0, 1.0):
        axes.axhline(level, **_LEVEL)
    drawn = [np.asarray(curve.f)[shown] for curve in result.random]
    if drawn:
        low, middle, high = np.quantile(np.stack(drawn), (0.05, 0.5, 0.95), axis=0)
        axes.fill_between(fractions, low, high, **_BAND)
        axes.plot(fractions, middle, **_RANDOM)
    styles = looks(result)
    # The yardstick comes last, on top of the others.
    for index, name in enumerate(sorted(result.names, key=lambda name: name == YARDSTICK)):
        curve = result[name].curve(ranking)
        if curve is not None:
            drawn.append(np.asarray(curve.f)[shown])
            _draw_curve(axes, fractions, drawn[-1], styles[name], index)
    _limit(axes, drawn)
    style.share_axis(axes, fractions)
    axes.tick_params(axis="x", labelsize=9)
    axes.set(xlabel="share of heads kept", ylabel="faithfulness f")
    axes.set_title(f"Heads ranked by {_RANKED_BY[ranking]}", loc="left", fontsize=10)
    style.plain_axes(axes, "x")


def _draw_curve(axes: Axes, fractions: np.ndarray, f: np.ndarray, look: Look, index: int) -> None:
    colour, marker, line = look
    # Lines on top of each other set their markers at alternate points.
    points: dict[str, Any] = {"marker": marker, "markersize": 6}
    points["markevery"] = (index % 2, 2) if len(fractions) > 6 else 1
    yardstick = look == _YARDSTICK_LOOK
    points |= {"linewidth": 2.0 if yardstick else 1.4, "zorder": 4 if yardstick else 2}
    axes.plot(fractions, f, color=colour, linestyle=line, **points)


def _limit(axes: Axes, drawn: list[Any]) -> None:
    """Cut off what lies far outside 0 to 1, with a note."""
    low = min(float(values.min()) for values in drawn) if drawn else 0.0
    high = max(float(values.max()) for values in drawn) if drawn else 1.0
    bottom, top = max(low, _F_RANGE[0]), min(high, _F_RANGE[1])
    margin = 0.05 * max(top - bottom, 1.0)
    axes.set_ylim(min(bottom, 0.0) - margin, max(top, 1.0) + margin)
    if low < bottom or high > top:
        corner: dict[str, Any] = {"transform": axes.transAxes, "ha": "right", "va": "top"}
        words = f"cut off: f from {low:.1f} to {high:.1f}"
        axes.text(0.99, 0.99, words, fontsize=8, color=MUTED, **corner)


def _draw_areas(axes: Axes, result: Comparison, measure: Measure) -> None:
    """Draw one area by method, a filled marker for the signed and a hollow one for the other."""
    values = [getattr(curve, measure) for curve in result.random]
    if values:
        low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
        axes.axvspan(low, high, **_BAND)
        axes.axvline(middle, **_RANDOM)
    for ranking in RANKINGS:
        _draw_markers(axes, result, measure, ranking)
    names = [f"{m.method} (refused)" if m.refused else m.method for m in result.methods]
    axes.set_yticks(range(len(names)), names, fontsize=9, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    better = "more is better" if measure == "cpr" else "less is better"
    axes.set_xlabel(measure.upper())
    axes.set_title(f"{measure.upper()}: {better}", loc="left", fontsize=10)
    style.plain_axes(axes, "both")


def _draw_markers(axes: Axes, result: Comparison, measure: Measure, ranking: Any) -> None:
    styles = looks(result)
    drawn = [
        (method.value(measure, ranking), row, styles[method.method][0])
        for row, method in enumerate(result.methods)
        if method.curve(ranking) is not None
    ]
    if not drawn:
        return
    across, up, colours = zip(*drawn, strict=True)
    hollow = ranking == "magnitude"
    # Hollow markers stand a little lower, so that equal areas show both.
    rows = np.asarray(up) + 0.22 * hollow
    paint: dict[str, Any] = {"c": "white" if hollow else colours, "edgecolors": colours}
    points = axes.scatter(across, rows, s=40, linewidths=1.4, zorder=4, **paint)
    points.set_gid(f"{measure}-{ranking}")


def _draw_agreement(axes: Axes, result: Comparison) -> None:
    """Draw Spearman with the yardstick against cost; a line marks the cost of the yardstick."""
    styles = looks(result)
    axes.axhline(0.0, **_LEVEL)
    for method in _agreeing(result):
        colour, marker, _ = styles[method.method]
        # Crosses have less ink than other markers of their size.
        shape: dict[str, Any] = {"marker": marker, "s": 120 if marker in "PX" else 80, "zorder": 4}
        across = max(method.forward_passes, 1e-3)
        edge: dict[str, Any] = {"edgecolors": "white", "linewidths": 0.5}
        points = axes.scatter(across, method.spearman, color=colour, **shape, **edge)
        points.set_gid(f"agreement-{result.names.index(method.method)}")
    cost = next((m.forward_passes for m in result.methods if m.method == YARDSTICK), math.nan)
    if math.isfinite(cost):
        axes.axvline(cost, color=INK, linewidth=1.2, linestyle="--")
        foot: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "rotation": 90}
        axes.text(cost, 0.02, " exact ablation", fontsize=8, ha="right", va="bottom", **foot)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.12)
    axes.set(xlabel="time in forward passes", ylabel="Spearman with exact ablation")
    axes.set_title("Agreement: up and left is better", loc="left", fontsize=10)
    style.plain_axes(axes, "both")


def _agreeing(result: Comparison) -> list[MethodResult]:
    """Return the methods with a correlation and a cost, without the yardstick."""
    return [
        method
        for method in result.methods
        if method.method != YARDSTICK
        and math.isfinite(method.spearman)
        and math.isfinite(method.forward_passes)
    ]


def _handles(result: Comparison) -> dict[str, Artist]:
    """Return the entries of the legend by label."""
    styles = looks(result)
    handles: dict[str, Artist] = {}
    for method in result.methods:
        if not method.refused:
            colour, marker, line = styles[method.method]
            shape: dict[str, Any] = {"marker": marker, "markersize": 6, "linewidth": 1.4}
            handles[method.method] = Line2D([], [], color=colour, linestyle=line, **shape)
    if result.random:
        name = f"random rankings ({len(result.random)}): median, 5-95 %"
        handles[name] = Line2D([], [], **_RANDOM)
    for ranking, words in _RANKED_BY.items():
        fill = MUTED if ranking == "signed" else "white"
        handles[f"CPR, CMD: ranked by {words}"] = style.dot(marker="o", mfc=fill, mec=MUTED)
    return handles


def _draw_cells(axes: Axes, frame: pd.DataFrame) -> None:
    """Draw cells shaded from white (0) to blue (1), with their number."""
    values = frame.to_numpy(dtype=float)
    rows, columns = values.shape
    shades = colormaps["Blues"].with_extremes(bad="#eeeeee")
    edges = [np.arange(n + 1) - 0.5 for n in (columns, rows)]
    axes.pcolormesh(*edges, values, cmap=shades, vmin=0.0, vmax=1.25, edgecolors="white")
    centred: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8.5}
    for (row, column), value in np.ndenumerate(values):
        ink = "white" if value > 0.85 else INK
        axes.text(column, row, number(float(value), ".2f"), color=ink, **centred)
    axes.axvline(columns - 1.5, color=INK, linewidth=1.0)
    slanted: dict[str, Any] = {"rotation": 35, "ha": "right", "parse_math": False}
    axes.set_xticks(range(columns), [str(name) for name in frame.columns], **slanted)
    axes.set_yticks(range(rows), [str(name) for name in frame.index], parse_math=False)
    axes.tick_params(length=0, labelsize=9)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.spines[:].set_visible(False)
