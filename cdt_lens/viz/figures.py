"""Figures of scores, circuits and faithfulness, by matplotlib's object interface without pyplot.

1. Blue is positive (pushes towards the gold label) and red is negative, in every figure.
2. No figure relies on colour alone, so that a grey print can be read: negative cells carry a dash,
   negative bars are striped, lines differ in style and marker, circuit heads are outlined.
3. The label of a figure (`figure.get_label()`) describes it for readers who cannot see it.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
from jaxtyping import Bool
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import FaithfulnessCurve
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core.display import INK, MUTED, NEGATIVE, POSITIVE
from cdt_lens.core.errors import InputError
from cdt_lens.models.heads import all_heads
from cdt_lens.scoring.agreement import MethodAgreement
from cdt_lens.viz import style
from cdt_lens.viz.style import as_array
from cdt_lens.viz.tables import Scored
from cdt_lens.viz.words import control_name, empty_run, median, metric_name

UNIT = "logits (+ = towards the gold label)"
# Colour and line style of each random control.
CONTROLS = (("#8a5a00", "--"), ("#3f7a52", "-."), ("#7a4988", (0, (1, 1))))
_ALONE: dict[str, Any] = {"color": POSITIVE, "marker": "o", "markersize": 5, "linewidth": 2.2}
_WITHOUT: dict[str, Any] = {
    "color": INK, "linestyle": ":", "marker": "s", "markersize": 4, "markerfacecolor": "white",
}  # fmt: skip
_POINTS: dict[str, Any] = {"alpha": 0.65, "edgecolors": "white", "linewidths": 0.5, "zorder": 2}
# Cells below this share of the colour range look white, so that a dash there would be noise.
_DASH_FROM = 0.1


def heatmap(
    scores: HeadScores | Scored,
    *,
    circuit: Circuit | None = None,
    title: str | None = None,
    limit: float | None = None,
) -> Figure:
    """Draw the score of every head, layers down and heads across.

    Blue pushes towards the gold label, red (with a dash) away from it. Heads without a score are
    grey with a cross. Those whose 95 % interval does not exclude 0 have a dot. The cells are the
    collection with gid "cells", row by row.

    Args:
        scores: The scores, in logits.
        circuit: The circuit whose heads are outlined; an outline has a gid such as "circuit-L9H6".
        title: The title; by default it names the method.
        limit: The magnitude at which the colours end, in logits; by default the largest one.

    Raises:
        InputError: `circuit` belongs to a model of another shape, or `limit` is not positive.
    """
    scores = scores if isinstance(scores, Scored) else Scored.of(scores)
    values = as_array(scores.values)
    _check_map(circuit, limit, *values.shape)
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    end = limit or largest or 1.0
    colours = colormaps["RdBu"].with_extremes(bad="#d4d4d4")
    figure, axes, cells = style.head_map(values, colours, (-end, end))
    outlined = circuit.heads if circuit is not None else ()
    handles = [
        *style.outline(axes, outlined),
        *style.mark(axes, "negative", "_", values < -_DASH_FROM * end, values < -0.55 * end),
        *style.mark(axes, "not scored", "x", ~np.isfinite(values)),
        *style.mark(axes, "0 not excluded", ".", scores.unresolved.cpu().numpy()),
    ]
    extend = "both" if largest > end else "neither"
    figure.colorbar(cells, ax=axes, label=UNIT, extend=extend, aspect=30).outline.set_visible(False)
    if handles:
        style.legend(figure, {str(handle.get_label()): handle for handle in handles}, ncols=3)
    style.title(figure, title or f"Score of every head: {scores.method}")
    figure.set_label(
        f"Heat map of {values.shape[0]} layers by {values.shape[1]} heads; the largest magnitude "
        f"is {largest:.3g} logits; {len(outlined)} heads are outlined."
    )
    return figure


def curve(result: FaithfulnessCurve) -> Figure:
    """Draw faithfulness f against the share of heads kept, beside the random controls.

    f = 1 is the full model, f = 0 the empty run, which the title names. The bars are 95 % intervals
    over prompts. Sizes that keep no head are left out. The band of a control spans its 5th to 95th
    percentile around the median. The line of the knocked-out circuit should fall as f rises.

    Args:
        result: The curve.
    """
    kept = np.asarray(result.sizes) > 0
    fractions = np.asarray(result.fractions, dtype=float)[kept]
    figure = style.paper(9.2, 4.9)
    axes = figure.add_subplot()
    _draw_levels(axes, "all heads" if result.empty_run == "heads" else "everything")
    drawn = _draw_controls(axes, result, kept)
    label = "circuit knocked out, the rest kept"
    axes.plot(fractions, as_array(result.completeness)[kept], label=label, **_WITHOUT)
    areas = f"CPR {result.cpr:.2f}, CMD {result.cmd:.2f}"
    f = as_array(result.faithfulness)[kept]
    axes.plot(fractions, f, label=f"circuit ({areas})", **_ALONE)
    low, high = (as_array(limit)[kept] for limit in result.interval())
    known = np.isfinite(low)
    axes.vlines(fractions[known], low[known], high[known], color=POSITIVE, linewidth=1.2)
    style.share_axis(axes, fractions)
    axes.set(xlabel="share of heads kept", ylabel="faithfulness f")
    style.plain_axes(axes, "x")
    figure.legend(**style.LEGEND, reverse=True)
    named = f"{metric_name(result.metric)}; {empty_run(result.empty_run)}"
    style.title(figure, f"Faithfulness of growing circuits ({named})")
    figure.set_label(
        f"Line chart of faithfulness for circuits of {min(result.sizes)} to {max(result.sizes)} "
        f"heads against {drawn} random controls; {areas}; "
        f"{empty_run(result.empty_run)}."
    )
    return figure


def agreement(result: MethodAgreement) -> Figure:
    """Draw the scores of a method (up) against the reference (across), one point for each head.

    Both axes are in logits, positive towards the gold label. On the dashed line the two agree in
    value. The points are the collection with gid "points", layer by layer, without heads that one
    side did not score.

    Args:
        result: The agreement of a method with its reference.

    Raises:
        InputError: The two sets of scores belong to models of different shapes.
    """
    scores, reference = result.scores, result.reference
    across, up = as_array(reference.values), as_array(scores.values)
    if across.shape != up.shape:
        raise InputError(
            f"agreement: expected scores of one shape, got {scores.method} {up.shape} and "
            f"{reference.method} {across.shape}; score both on the same model"
        )
    both = np.isfinite(across) & np.isfinite(up)
    heads = [head for head in all_heads(*up.shape) if both[head.layer, head.head]]
    figure = style.paper(5.6, 5.2)
    axes = figure.add_subplot()
    for line in (axes.axhline, axes.axvline):
        line(0, color="#cccccc", linewidth=0.8, zorder=0)
    axes.axline((0, 0), slope=1, color=MUTED, linewidth=1, linestyle="--", label="equal scores")
    axes.scatter(across[both], up[both], s=22, color=POSITIVE, **_POINTS).set_gid("points")
    style.name_extremes(axes, heads, across[both], up[both])
    axes.set_xlabel(f"{reference.method}, {UNIT}", parse_math=False)
    axes.set_ylabel(f"{scores.method}, {UNIT}", parse_math=False)
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    style.plain_axes(axes)
    numbers = f"Spearman {result.spearman:.2f}, Pearson {result.pearson:.2f}"
    style.title(figure, f"{scores.method} against {reference.method}: {numbers}")
    figure.set_label(f"Scatter plot of {len(heads)} heads: {numbers}.")
    return figure


def bars(scores: HeadScores, k: int = 20) -> Figure:
    """Draw the top heads as bars with one standard error each way.

    Scores are in logits, positive towards the gold label; negative bars are red and striped.

    Args:
        scores: The scores.
        k: The number of heads; all heads if fewer have a score.

    Raises:
        InputError: `k` is not positive, or no head has a score.
    """
    scored = int(scores.values.isfinite().sum())
    if k < 1 or not scored:
        raise InputError(f"bars: expected k of at least 1 and scores, got k={k}, {scored} scores")
    heads = scores.top(min(k, scored))
    values = [float(scores.values[head.layer, head.head]) for head in heads]
    errors = [float(scores.stderr[head.layer, head.head]) for head in heads]
    figure = style.paper(4.4, 1.2 + 0.26 * len(heads))
    axes = figure.add_subplot()
    _draw_bars(axes, values, errors)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(heads)), [str(head) for head in heads])
    axes.set(xlabel=UNIT, ylim=(len(heads) - 0.5, -0.5))
    axes.tick_params(axis="y", length=0)
    style.plain_axes(axes, "x")
    style.title(figure, f"Top {len(heads)} heads: {scores.method} (\u00b1 1 standard error)")
    figure.set_label(
        f"Bar chart of {len(heads)} heads from {heads[0]} at {values[0]:+.3g} to "
        f"{heads[-1]} at {values[-1]:+.3g} logits."
    )
    return figure


def _draw_levels(axes: Axes, ablated: str) -> None:
    """Draw f of the full model and f of the empty run."""
    for level, words in ((1.0, "full model"), (0.0, f"{ablated}\nablated")):
        axes.axhline(level, color=MUTED, linewidth=0.8, zorder=1)
        where: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
        axes.text(1.01, level, words, fontsize=9, color=MUTED, **where)


def _draw_controls(axes: Axes, result: FaithfulnessCurve, kept: Bool[np.ndarray, " size"]) -> int:
    """Draw the bands of the random controls; return how many there are."""
    fractions = np.asarray(result.fractions, dtype=float)[kept]
    drawn = {name: as_array(draws) for name, draws in result.random.items() if len(draws)}
    for (name, draws), look in zip(drawn.items(), cycle(CONTROLS), strict=False):
        areas = f"CPR {median(result.random_cpr[name])}, CMD {median(result.random_cmd[name])}"
        label = f"{control_name(name)}, median and 5-95 % ({areas})"
        style.band(axes, fractions, draws[:, kept], look, label)
    return len(drawn)


def _draw_bars(axes: Axes, values: list[float], errors: list[float]) -> None:
    colours = [POSITIVE if value >= 0 else NEGATIVE for value in values]
    caps = {"ecolor": INK, "elinewidth": 1, "capsize": 2.5}
    rows = range(len(values))
    drawn = axes.barh(rows, values, xerr=errors, height=0.72, color=colours, error_kw=caps)
    for bar, value in zip(drawn, values, strict=True):
        bar.set(hatch="" if value >= 0 else "////", edgecolor="white", linewidth=0)


def _check_map(circuit: Circuit | None, limit: float | None, n_layers: int, n_heads: int) -> None:
    if limit is not None and not limit > 0:
        raise InputError(f"heatmap: limit must be positive, got {limit}")
    if circuit is None or (circuit.n_layers, circuit.n_heads) == (n_layers, n_heads):
        return
    raise InputError(
        f"heatmap: the scores have {n_layers} layers of {n_heads} heads, the circuit "
        f"{circuit.n_layers} of {circuit.n_heads}; pass a circuit of the same model"
    )
