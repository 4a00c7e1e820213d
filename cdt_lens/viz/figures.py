"""Figures of the results: matplotlib's object interface, no pyplot and no global style.

1. Blue is positive (pushes towards the gold label) and red negative, in every figure.
2. Nothing is said by colour alone, so that a grey print still reads: negative cells carry a dash,
   negative bars are striped, lines differ in style and marker, circuit heads are outlined.
3. A figure's label (`figure.get_label()`) describes it in words, for readers who cannot see it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from cdt_lens.core.display import INK, MUTED, NEGATIVE, POSITIVE
from cdt_lens.core.errors import InputError
from cdt_lens.models.heads import all_heads
from cdt_lens.viz import style as artists
from cdt_lens.viz.style import as_array, control_name, metric_name

if TYPE_CHECKING:
    from cdt_lens.circuits.circuit import Circuit
    from cdt_lens.circuits.faithfulness import FaithfulnessCurve
    from cdt_lens.circuits.head_scores import HeadScores
    from cdt_lens.scoring.agreement import MethodAgreement
    from cdt_lens.viz.tables import Scored

UNIT = "logits (+ = towards the gold label)"
_GRID: dict[str, Any] = {"color": "#dddddd", "linewidth": 0.6}
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
    values = as_array(scores.values)
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
        *artists.outline(axes, outlined),
        *artists.mark(axes, "negative", "_", values < -_DASH_FROM * end, values < -0.55 * end),
        *artists.mark(
            axes, "not scored", "x", ~np.isfinite(values), np.zeros_like(values, dtype=bool)
        ),
    ]
    axes.set(xlabel="head", ylabel="layer", xlim=(-0.5, n_heads - 0.5), ylim=(n_layers - 0.5, -0.5))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=30, integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(length=2)
    axes.spines[:].set_visible(False)
    extend = "both" if largest > end else "neither"
    figure.colorbar(cells, ax=axes, label=UNIT, extend=extend, aspect=30).outline.set_visible(False)
    if handles:
        place: dict[str, Any] = {
            "loc": "outside lower left",
            "ncols": 3,
            "frameon": False,
            "fontsize": 9,
        }
        figure.legend(handles=handles, **place)
    _title(figure, title or f"Score of every head: {scores.method}")
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
        place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
        axes.text(1.01, level, words, fontsize=9, color=MUTED, **place)
    drawn = {name: as_array(draws) for name, draws in result.random.items() if len(draws)}
    for (name, draws), style in zip(drawn.items(), cycle(_CONTROLS), strict=False):
        areas = f"CPR {_median(result.random_cpr, name)}, CMD {_median(result.random_cmd, name)}"
        label = f"{control_name(name)}, median and 5-95 % ({areas})"
        artists.band(axes, fractions, draws, style, label)
    without: dict[str, Any] = {
        "color": INK,
        "linestyle": ":",
        "marker": "s",
        "markerfacecolor": "white",
    }
    label = "circuit knocked out, the rest kept"
    axes.plot(fractions, as_array(result.completeness), label=label, markersize=4, **without)
    alone: dict[str, Any] = {"color": POSITIVE, "marker": "o", "markersize": 5, "linewidth": 2.2}
    label = f"circuit (CPR {result.cpr:.2f}, CMD {result.cmd:.2f})"
    axes.plot(fractions, as_array(result.faithfulness), label=label, **alone)
    artists.share_axis(axes, fractions)
    axes.set(xlabel="share of heads kept", ylabel="faithfulness f")
    axes.grid(axis="x", **_GRID)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", frameon=False, fontsize=9, reverse=True)
    _title(figure, f"Faithfulness of growing circuits ({metric_name(result.metric)})")
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
    across, up = as_array(reference.values), as_array(scores.values)
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
    style: dict[str, Any] = {
        "s": 22,
        "color": POSITIVE,
        "alpha": 0.65,
        "edgecolors": "white",
        "linewidths": 0.5,
    }
    axes.scatter(across, up, zorder=2, **style).set_gid("points")
    artists.name_extremes(axes, heads, across, up)
    axes.set_xlabel(f"{reference.method}, {UNIT}", parse_math=False)
    axes.set_ylabel(f"{scores.method}, {UNIT}", parse_math=False)
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    numbers = f"Spearman {method_agreement.spearman:.2f}, Pearson {method_agreement.pearson:.2f}"
    _title(figure, f"{scores.method} against {reference.method}: {numbers}")
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
    _title(figure, f"Top {len(heads)} heads: {scores.method} (\u00b1 1 standard error)")
    figure.set_label(
        f"Bar chart of {len(heads)} heads from {heads[0]} at {values[0]:+.3g} to "
        f"{heads[-1]} at {values[-1]:+.3g} logits."
    )
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, figure.add_subplot()


def _title(figure: Figure, text: str) -> None:
    """Set a title that wraps inside the figure, and in which a dollar sign is a dollar sign."""
    lines = textwrap.fill(text, int(figure.get_figwidth() * 10.5))
    figure.axes[0].set_title(lines, fontsize=11, parse_math=False)


def _check_map(circuit: Circuit | None, limit: float | None, n_layers: int, n_heads: int) -> None:
    if limit is not None and not limit > 0:
        raise InputError(f"heatmap: limit must be positive, got {limit}")
    if circuit is None or (circuit.n_layers, circuit.n_heads) == (n_layers, n_heads):
        return
    raise InputError(
        f"heatmap: the scores have {n_layers} layers of {n_heads} heads, the circuit "
        f"{circuit.n_layers} of {circuit.n_heads}; pass a circuit of the same model"
    )


def _median(draws: Mapping[str, Float[Tensor, " draw"]], name: str) -> str:
    return f"{float(np.median(as_array(draws[name]))):.2f}" if name in draws else "n/a"
