"""Figures of the results: matplotlib's object interface, no pyplot and no global style.

1. Blue is positive (pushes towards the gold label) and red negative, in every figure.
2. Nothing is said by colour alone, so that a grey print still reads: negative cells carry a dash,
   negative bars are striped, lines differ in style and marker, circuit heads are outlined.
3. A figure's label (`figure.get_label()`) describes it in words, for readers who cannot see it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from torch import Tensor

from cdt_lens.errors import InputError
from cdt_lens.heads import Head, all_heads

if TYPE_CHECKING:
    from cdt_lens.circuit import Circuit
    from cdt_lens.faithfulness import FaithfulnessCurve
    from cdt_lens.scores import HeadScores, MethodAgreement
    from cdt_lens.tables import Scored

UNIT = "logits (+ = towards the gold label)"
POSITIVE, NEGATIVE, INK, MUTED = "#2166ac", "#b2182b", "#1a1a1a", "#666666"
_GRID = {"color": "#dddddd", "linewidth": 0.6}
# Colour and line style of each random control.
_CONTROLS = (("#8a5a00", "--"), ("#3f7a52", "-."), ("#7a4988", (0, (1, 1))))
# Cells below this share of the colour range look white, so a dash there would only be noise.
_DASH_FROM = 0.1


def heatmap(
    scores: HeadScores | Scored,
    *,
    circuit: Circuit | None = None,
    title: str | None = None,
    limit: float | None = None,
) -> Figure:
    """Map of the scores, layers down and heads across, with the heads of `circuit` outlined.

    Blue pushes towards the gold label, red (with a dash) away from it, in logits; heads without a
    score are grey with a cross. Colours end at plus and minus `limit`, by default the largest
    magnitude. The cells are the collection with gid "cells", row by row; the outline of a head
    has the gid "circuit-L9H6".

    Raises:
        InputError: `circuit` is of a model of another shape, or `limit` is not positive.
    """
    values = _array(scores.values)
    n_layers, n_heads = values.shape
    _check_map(circuit, limit, n_layers, n_heads)
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    end = limit or largest or 1.0
    width = min(max(4.2 / n_heads, 0.24), 0.55) * n_heads + 1.7
    height = min(max(5.6 / n_layers, 0.18), 0.42) * n_layers + 1.2
    figure, axes = _figure(max(width, 4.6), max(height, 3.4))
    cells = axes.pcolormesh(
        np.arange(n_heads + 1) - 0.5,
        np.arange(n_layers + 1) - 0.5,
        values,
        cmap=colormaps["RdBu"].with_extremes(bad="#d4d4d4"),
        vmin=-end,
        vmax=end,
        edgecolors="white",
        linewidth=0.4,
    )
    cells.set_gid("cells")
    outlined = circuit.heads if circuit is not None else ()
    handles = [
        *_outline(axes, outlined),
        *_mark(axes, "negative", "_", values < -_DASH_FROM * end, values < -0.55 * end),
        *_mark(axes, "not scored", "x", ~np.isfinite(values), np.zeros_like(values, dtype=bool)),
    ]
    axes.set(xlabel="head", ylabel="layer", xlim=(-0.5, n_heads - 0.5), ylim=(n_layers - 0.5, -0.5))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=30, integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(length=2)
    axes.spines[:].set_visible(False)
    extend = "both" if largest > end else "neither"
    figure.colorbar(cells, ax=axes, label=UNIT, extend=extend, aspect=30).outline.set_visible(False)
    if handles:
        place = {"loc": "outside lower left", "ncols": 3, "frameon": False, "fontsize": 9}
        figure.legend(handles=handles, **place)
    _title(axes, title or f"Score of every head: {scores.method}")
    figure.set_label(
        f"Heat map of {n_layers} layers by {n_heads} heads; the largest magnitude is "
        f"{largest:.3g} logits; {len(outlined)} heads are outlined."
    )
    return figure


def curve(faithfulness_curve: FaithfulnessCurve) -> Figure:
    """Faithfulness f against the share of heads kept, beside its random controls (method.md §6).

    f = 1 is the full model, f = 0 every head ablated. A control's band spans its 5th to 95th
    percentile around the median. The line of the knocked-out circuit should fall as f rises.
    """
    result = faithfulness_curve
    fractions = np.asarray(result.fractions, dtype=float)
    figure, axes = _figure(9.2, 4.9)
    for level, words in ((1.0, "full model"), (0.0, "all heads\nablated")):
        axes.axhline(level, color=MUTED, linewidth=0.8, zorder=1)
        place = {"transform": axes.get_yaxis_transform(), "va": "center"}
        axes.text(1.01, level, words, fontsize=9, color=MUTED, **place)
    drawn = {name: _array(draws) for name, draws in result.random.items() if len(draws)}
    for (name, draws), style in zip(drawn.items(), cycle(_CONTROLS), strict=False):
        areas = f"CPR {_median(result.random_cpr, name)}, CMD {_median(result.random_cmd, name)}"
        label = f"{control_name(name)}, median and 5-95 % ({areas})"
        _band(axes, fractions, draws, style, label)
    without = {"color": INK, "linestyle": ":", "marker": "s", "markerfacecolor": "white"}
    label = "circuit knocked out, the rest kept"
    axes.plot(fractions, _array(result.completeness), label=label, markersize=4, **without)
    alone = {"color": POSITIVE, "marker": "o", "markersize": 5, "linewidth": 2.2}
    label = f"circuit (CPR {result.cpr:.2f}, CMD {result.cmd:.2f})"
    axes.plot(fractions, _array(result.faithfulness), label=label, **alone)
    _share_axis(axes, fractions)
    axes.set(xlabel="share of heads kept", ylabel="faithfulness f")
    axes.grid(axis="x", **_GRID)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", frameon=False, fontsize=9, reverse=True)
    _title(axes, f"Faithfulness of growing circuits ({metric_name(result.metric)})")
    figure.set_label(
        f"Line chart of faithfulness for circuits of {min(result.sizes)} to {max(result.sizes)} "
        f"heads against {len(drawn)} random controls; CPR {result.cpr:.2f}, "
        f"CMD {result.cmd:.2f}."
    )
    return figure


def agreement(method_agreement: MethodAgreement) -> Figure:
    """Scatter of a method's scores (up) against exact ablation (across), one point a head.

    Both axes in logits, + = towards the gold label. On the dashed line they agree in value; the
    title says how well they agree in order (Spearman) and in value (Pearson). The points are the
    collection with gid "points", layer by layer, without heads that either side did not score.

    Raises:
        InputError: the two sets of scores are of models of different shapes.
    """
    scores, reference = method_agreement.scores, method_agreement.reference
    across, up = _array(reference.values), _array(scores.values)
    if across.shape != up.shape:
        raise InputError(
            f"agreement: expected scores of one shape, got {scores.method} {up.shape} and "
            f"{reference.method} {across.shape}; score both on the same model"
        )
    both = np.isfinite(across) & np.isfinite(up)
    heads = [head for head in all_heads(*up.shape) if both[head.layer, head.head]]
    across, up = across[both], up[both]
    figure, axes = _figure(5.6, 5.2)
    axes.axhline(0, color="#cccccc", linewidth=0.8, zorder=0)
    axes.axvline(0, color="#cccccc", linewidth=0.8, zorder=0)
    axes.axline((0, 0), slope=1, color=MUTED, linewidth=1, linestyle="--", label="equal scores")
    style = {"s": 22, "color": POSITIVE, "alpha": 0.65, "edgecolors": "white", "linewidths": 0.5}
    axes.scatter(across, up, zorder=2, **style).set_gid("points")
    _name_extremes(axes, heads, across, up)
    axes.set_xlabel(f"{reference.method}, {UNIT}", parse_math=False)
    axes.set_ylabel(f"{scores.method}, {UNIT}", parse_math=False)
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    numbers = f"Spearman {method_agreement.spearman:.2f}, Pearson {method_agreement.pearson:.2f}"
    _title(axes, f"{scores.method} against {reference.method}: {numbers}")
    figure.set_label(f"Scatter plot of {len(heads)} heads: {numbers}.")
    return figure


def bars(scores: HeadScores, k: int = 20) -> Figure:
    """The `k` top heads (or all, if fewer have a score) as bars, with one standard error each way.

    In logits, + = towards the gold label; negative bars are red and striped.

    Raises:
        InputError: `k` is not positive, or no head has a score.
    """
    scored = int(scores.values.isfinite().sum())
    if k < 1 or not scored:
        raise InputError(f"bars: expected k of at least 1 and scores, got k={k}, {scored} scores")
    heads = scores.top(min(k, scored))
    values = np.array([float(scores.values[head.layer, head.head]) for head in heads])
    errors = np.array([float(scores.stderr[head.layer, head.head]) for head in heads])
    figure, axes = _figure(4.4, 1.2 + 0.26 * len(heads))
    drawn = axes.barh(
        range(len(heads)),
        values,
        xerr=errors,
        height=0.72,
        color=[POSITIVE if value >= 0 else NEGATIVE for value in values],
        error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2.5},
    )
    for bar, value in zip(drawn, values, strict=True):
        bar.set(hatch="" if value >= 0 else "////", edgecolor="white", linewidth=0)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(heads)), [str(head) for head in heads])
    axes.set(xlabel=UNIT, ylim=(len(heads) - 0.5, -0.5), axisbelow=True)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", **_GRID)
    axes.spines[["top", "right"]].set_visible(False)
    _title(axes, f"Top {len(heads)} heads: {scores.method} (\u00b1 1 standard error)")
    figure.set_label(
        f"Bar chart of {len(heads)} heads from {heads[0]} at {values[0]:+.3g} to "
        f"{heads[-1]} at {values[-1]:+.3g} logits."
    )
    return figure


def control_name(name: str) -> str:
    """A random control's key in words: "random-per-layer" is the same number in each layer."""
    known = {"random": "random heads", "random-per-layer": "random heads, same per layer"}
    return known.get(name, name)


def metric_name(name: str) -> str:
    """A metric's key in words: "direction" is the task direction, in logits."""
    return "task direction" if name == "direction" else name


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.add_subplot()


def _array(values: Float[Tensor, "..."]) -> Float[np.ndarray, "..."]:
    return values.detach().double().cpu().numpy()


def _title(axes: Axes, text: str) -> None:
    """Set a title that wraps inside the figure, and in which a dollar sign is a dollar sign."""
    lines = textwrap.fill(text, int(axes.figure.get_figwidth() * 10.5))
    axes.set_title(lines, fontsize=11, parse_math=False)


def _check_map(circuit: Circuit | None, limit: float | None, n_layers: int, n_heads: int) -> None:
    if limit is not None and not limit > 0:
        raise InputError(f"heatmap: limit must be positive, got {limit}")
    if circuit is None or (circuit.n_layers, circuit.n_heads) == (n_layers, n_heads):
        return
    raise InputError(
        f"heatmap: the scores have {n_layers} layers of {n_heads} heads, the circuit "
        f"{circuit.n_layers} of {circuit.n_heads}; pass a circuit of the same model"
    )


def _outline(axes: Axes, heads: Sequence[Head]) -> list[Patch]:
    style = {"fill": False, "edgecolor": "black", "linewidth": 1.5}
    for head in heads:
        corner = (head.head - 0.46, head.layer - 0.46)
        axes.add_patch(Rectangle(corner, 0.92, 0.92, gid=f"circuit-{head}", **style))
    return [Patch(label=f"in the circuit ({len(heads)} heads)", **style)] if heads else []


def _mark(
    axes: Axes,
    name: str,
    marker: str,
    where: Bool[np.ndarray, "layer head"],
    dark: Bool[np.ndarray, "layer head"],
) -> list[Line2D]:
    """Put `marker` on the cells `where`, white on the `dark` ones; returns its legend entry."""
    layers, heads = np.nonzero(where)
    if not layers.size:
        return []
    colours = np.where(dark[layers, heads], "white", INK)
    size = 28 if marker == "_" else 12
    axes.scatter(heads, layers, marker=marker, s=size, linewidths=1, c=colours, gid=name)
    return [Line2D([], [], marker=marker, linestyle="none", color=INK, markersize=6, label=name)]


def _band(
    axes: Axes,
    fractions: Float[np.ndarray, " size"],
    draws: Float[np.ndarray, "draw size"],
    style: tuple[str, Any],
    label: str,
) -> None:
    low, middle, high = np.quantile(draws, (0.05, 0.5, 0.95), axis=0)
    colour, line = style
    axes.fill_between(fractions, low, high, color=colour, alpha=0.14, linewidth=0)
    # Thin borders in the control's own line style, for bands that overlap in a grey print.
    for border in (low, high):
        axes.plot(fractions, border, color=colour, linestyle=line, linewidth=0.6)
    axes.plot(fractions, middle, color=colour, linestyle=line, linewidth=1.6, label=label)


def _median(draws: Mapping[str, Float[Tensor, " draw"]], name: str) -> str:
    return f"{float(np.median(_array(draws[name]))):.2f}" if name in draws else "n/a"


def _share_axis(axes: Axes, fractions: Float[np.ndarray, " size"]) -> None:
    """Log scale over the shares of heads; an empty circuit at 0 makes it linear up to the next."""
    positive = fractions[fractions > 0]
    if positive.size == fractions.size:
        axes.set_xscale("log")
    elif positive.size:
        axes.set_xscale("symlog", linthresh=positive.min(), linscale=0.5)
    series = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
    lowest = positive.min(initial=1.0) * 0.99
    zero = () if positive.size == fractions.size else (0,)
    axes.set_xticks([*zero, *(share for share in series if share >= lowest)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.xaxis.set_minor_locator(NullLocator())


def _name_extremes(
    axes: Axes,
    heads: Sequence[Head],
    across: Float[np.ndarray, " head"],
    up: Float[np.ndarray, " head"],
    count: int = 8,
) -> None:
    """Name the points farthest from 0, leaving out a name that would cover another's."""
    span = np.array([np.ptp(values) if values.size else 1.0 for values in (across, up)])
    places = np.stack([across, up], axis=1) / np.where(span > 0, span, 1.0)
    named: list[int] = []
    for index in np.argsort(-np.linalg.norm(places, axis=1))[:count].tolist():
        gaps = np.abs(places[named] - places[index])
        if (gaps < (0.11, 0.045)).all(axis=1).any():
            continue
        named.append(index)
        # On the side away from the line of equal scores.
        above = up[index] >= across[index]
        axes.annotate(
            str(heads[index]),
            (across[index], up[index]),
            xytext=(-5, 3) if above else (5, -3),
            textcoords="offset points",
            horizontalalignment="right" if above else "left",
            verticalalignment="bottom" if above else "top",
            fontsize=8,
        )
