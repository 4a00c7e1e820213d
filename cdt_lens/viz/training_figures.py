"""Figures of fine-tuning and transfer, by matplotlib's object interface without pyplot.

1. A scope has the same colour and marker in every figure and panel; no two scopes share a marker.
2. Every seed is a small dot, and the mean over seeds is a large one. A difference smaller than the
   scatter of the dots means nothing. With one seed there is only the large dot.
3. The untouched checkpoint is drawn wherever a scope is, because training must beat it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from cdt_lens.core.display import INK, MUTED, POSITIVE
from cdt_lens.finetuning.result import FineTuneResult
from cdt_lens.finetuning.transfer_result import TransferResult
from cdt_lens.viz import style
from cdt_lens.viz.training_tables import runs_of, untouched
from cdt_lens.viz.words import mean_and_spread, mean_in_words, score

# Colour and marker of each scope; the controls have the colours of the faithfulness curve.
_LOOKS = {
    "decision": (POSITIVE, "o"),
    "near-zero": ("#d9822b", "s"),
    "random": ("#8a5a00", "^"),
    "random-per-layer": ("#3f7a52", "v"),
    "norms": ("#7a4988", "D"),
    "full": (INK, "P"),
    "lora": ("#12808f", "X"),
}
_OTHER_LOOKS = (("#a03b6d", "<"), ("#5b7083", ">"), ("#6b8e23", "h"), ("#444444", "d"))
_BEFORE: dict[str, Any] = {"color": MUTED, "linewidth": 1.0, "linestyle": (0, (5, 3))}
_CHANCE: dict[str, Any] = {"color": MUTED, "linewidth": 1.2, "linestyle": (0, (1, 1.5))}
# The lines of a learning curve, and the star at the evaluation whose weights are kept.
_TARGET: dict[str, Any] = {"color": POSITIVE, "marker": "o", "markersize": 5, "linewidth": 2.2}
_MACRO_F1: dict[str, Any] = {"color": "#12808f", "marker": "D", "markersize": 4, "linestyle": ":"}
_SOURCE: dict[str, Any] = {"color": "#8a5a00", "marker": "s", "markersize": 4, "linestyle": "--"}
_TRAINING: dict[str, Any] = {"color": INK, "marker": "^", "markersize": 4, "linestyle": "-."}
_KEPT: dict[str, Any] = {"marker": "*", "s": 170, "color": "white", "edgecolors": INK, "zorder": 5}
_TRADE_OFF = ("accuracy", "retention")


def learning_curve(result: FineTuneResult) -> Figure:
    """Draw accuracy (top) and loss (bottom, in nats) on validation data over the training steps.

    Step 0 is the model before training. The star marks the evaluation whose weights are kept.
    Source accuracy is left out if there was no source task.

    Args:
        result: The fine-tuning run.
    """
    history = result.history
    figure = style.paper(5.2, 5.4)
    top, bottom = figure.subplots(2, 1, sharex=True)
    _draw_line(top, history, "target_accuracy", "target accuracy", _TARGET)
    _draw_line(top, history, "target_macro_f1", "target macro-F1", _MACRO_F1)
    _draw_line(top, history, "source_accuracy", "source accuracy", _SOURCE)
    _draw_line(bottom, history, "target_loss", "target loss", _TARGET)
    _draw_line(bottom, history, "train_loss", "training loss", _TRAINING)
    kept = history[history["epoch"] == result.best_epoch]
    label = f"kept: epoch {result.best_epoch}"
    top.scatter(kept["step"], kept["target_accuracy"], label=label, **_KEPT)
    bottom.scatter(kept["step"], kept["target_loss"], **_KEPT)
    for axes in (top, bottom):
        style.plain_axes(axes, "y")
    top.set_ylabel("accuracy, macro-F1")
    bottom.set(ylabel="loss (nats)", xlabel="optimiser step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(ncols=2, **style.LEGEND)
    style.title(figure, f"Learning curve: {result.scope}")
    before, after = (score(float(row["target_accuracy"])) for row in (result.before, result.after))
    figure.set_label(
        f"Two line charts over {len(history)} evaluations: target accuracy goes from {before} to "
        f"{after} at epoch {result.best_epoch}, whose weights are kept."
    )
    return figure


def trained_heads(result: FineTuneResult) -> Figure:
    """Draw the heads whose slices were trained, layers down and heads across.

    Trained heads are dark. Heads with a cross were not selected but share a trained K/V slice. The
    cells are the collection with gid "cells", row by row.

    Args:
        result: The fine-tuning run.
    """
    states = np.zeros((result.n_layers, result.n_heads))
    for state, members in ((1, result.siblings), (2, result.heads)):
        for head in members:
            states[head.layer, head.head] = state
    colours = ("#ececec", "#a9c6e3", POSITIVE)
    figure, axes, _ = style.head_map(states, ListedColormap(colours), (-0.5, 2.5))
    shared = f"shares a K/V slice ({len(result.siblings)})"
    crosses = style.mark(axes, shared, "x", states == 1)
    handles: dict[str, Artist] = {f"trained ({len(result.heads)} heads)": Patch(color=POSITIVE)}
    handles |= dict(zip([shared], crosses, strict=False))
    handles["not trained"] = Patch(color=colours[0])
    style.legend(figure, handles, ncols=2)
    style.title(figure, f"Trained heads: {result.scope}")
    figure.set_label(
        f"Map of {result.n_layers} layers by {result.n_heads} heads: {len(result.heads)} trained, "
        f"{len(result.siblings)} that share a trained key or value slice."
    )
    return figure


def trade_off(result: TransferResult) -> Figure:
    """Draw target accuracy (up) against retention (across) on test data, one panel per target.

    Up and to the right is better. The star is the untouched proxy checkpoint, whose retention is 1
    by definition. In panel i, the seeds and the mean of scope j are the collections with gid
    "seeds-i-j" and "mean-i-j"; `point_lines` names them.

    Args:
        result: The transfer.
    """
    title = "Target accuracy against retention: up and to the right is better"
    figure, panels = _panels(title, result.targets, height=3.1)
    for index, (target, axes) in enumerate(zip(result.targets, panels, strict=True)):
        before = untouched(result, target, "accuracy")
        axes.axvline(1.0, zorder=1, **_BEFORE)
        if np.isfinite(before):
            axes.axhline(before, zorder=1, **_BEFORE)
            axes.scatter([1.0], [before], marker="*", s=150, color="white", edgecolors=INK)
        for row, runs in enumerate(_drawn(result, target, *_TRADE_OFF)):
            across, up = runs["retention"], runs["accuracy"]
            mean = across.mean(), up.mean()
            _draw_points(axes, f"{index}-{row}", across, up, mean, _look(result, row))
        _note_if_empty(axes)
    _label(panels, "retention (after / before)", "target accuracy")
    star = Line2D([], [], marker="*", markersize=11, mfc="white", mec=INK, **_BEFORE)
    handles = {**_scope_handles(result), "untouched checkpoint": star}
    _draw_legend(figure, result, handles, "mean over seeds")
    figure.set_label(
        f"Scatter plots, one for each of {len(result.targets)} target languages, of target "
        f"accuracy against retention for {', '.join(result.scopes)}; the tables hold the numbers."
    )
    return figure


def accuracies(result: TransferResult) -> Figure:
    """Draw target accuracy on test data by scope, one panel per target, with seeds and mean.

    The line through a mean is one standard deviation over seeds each way. Dotted: chance, always
    the commonest label. Dashed: the untouched proxy checkpoint. The gids are those of `trade_off`.

    Args:
        result: The transfer.
    """
    title = "Target accuracy of each scope"
    figure, panels = _panels(title, result.targets, height=0.75 + 0.3 * len(result.scopes))
    for index, (target, axes) in enumerate(zip(result.targets, panels, strict=True)):
        before, chance = untouched(result, target, "accuracy"), result.chance.get(target, np.nan)
        for value, line in ((before, _BEFORE), (chance, _CHANCE)):
            if np.isfinite(value):
                axes.axvline(value, zorder=1, **line)
        for row, runs in enumerate(_drawn(result, target, "accuracy")):
            _draw_accuracies(axes, f"{index}-{row}", row, runs["accuracy"], _look(result, row))
        _note_if_empty(axes)
        axes.set_yticks(range(len(result.scopes)), result.scopes, parse_math=False)
        axes.set_ylim(len(result.scopes) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
    _label(panels, "target accuracy", "")
    handles = {
        "chance (the commonest label)": Line2D([], [], **_CHANCE),
        "untouched checkpoint": Line2D([], [], **_BEFORE),
    }
    _draw_legend(figure, result, handles, "mean over seeds \u00b1 1 s.d.")
    figure.set_label(
        f"Dot plots, one for each of {len(result.targets)} target languages, of the target "
        f"accuracy of {', '.join(result.scopes)}, beside chance."
    )
    return figure


def point_lines(result: TransferResult, *columns: str) -> dict[str, list[str]]:
    """Return the tooltips of the points of a figure, by the gid of the points.

    Args:
        result: The transfer.
        *columns: The columns that the figure draws: accuracy, and retention in the trade-off.
    """
    lines = {}
    for index, target in enumerate(result.targets):
        for row, runs in enumerate(_drawn(result, target, *columns)):
            name = f"{target}, {result.scopes[row]}"
            words = [
                f"{name}, seed {run['seed']}: {', '.join(f'{c} {score(run[c])}' for c in columns)}"
                for run in runs.to_dict("records")
            ]
            if len(words) > 1:
                lines[f"seeds-{index}-{row}"] = words
                means = ", ".join(f"{c} {mean_in_words(runs[c])}" for c in columns)
                words = [f"{name}, mean of {len(runs)} seeds: {means}"]
            if words:
                lines[f"mean-{index}-{row}"] = words
    return lines


def _drawn(result: TransferResult, target: str, *columns: str) -> list[pd.DataFrame]:
    """Return, for each scope, the runs whose `columns` are finite."""
    scopes = (runs_of(result, target, scope) for scope in result.scopes)
    return [
        runs[np.isfinite(runs[list(columns)].to_numpy(dtype=float)).all(axis=1)] for runs in scopes
    ]


def _draw_accuracies(
    axes: Axes, name: str, row: int, values: pd.Series, look: tuple[str, str]
) -> None:
    """Draw the accuracies of one scope, with one standard deviation around their mean."""
    mean, spread = mean_and_spread(values)
    if np.isfinite(spread):
        axes.plot([mean - spread, mean + spread], [row, row], color=look[0], linewidth=1.4)
    # The seeds stand below their mean and apart, so that none of them is hidden.
    heights = pd.Series(row + np.linspace(0.16, 0.36, len(values)))
    _draw_points(axes, name, values, heights, (mean, float(row)), look)


def _draw_points(
    axes: Axes,
    name: str,
    across: pd.Series,
    up: pd.Series,
    mean: tuple[float, float],
    look: tuple[str, str],
) -> None:
    """Draw a small dot for each of several seeds, and a large one for their mean."""
    if across.empty:
        return
    # Crosses have less ink than other markers of their size.
    size = 1.5 if look[1] in "PX" else 1.0
    shape: dict[str, Any] = {"color": look[0], "marker": look[1]}
    if len(across) > 1:
        small: dict[str, Any] = {"s": 16 * size, "alpha": 0.6, "linewidths": 0, "zorder": 3}
        axes.scatter(across, up, **small, **shape).set_gid(f"seeds-{name}")
    large: dict[str, Any] = {"s": 62 * size, "edgecolors": "white", "linewidths": 0.6, "zorder": 4}
    axes.scatter([mean[0]], [mean[1]], **large, **shape).set_gid(f"mean-{name}")


def _note_if_empty(axes: Axes) -> None:
    if not any(points.get_gid() for points in axes.collections):
        centre: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "no finished run", color=MUTED, fontsize=9, **centre)


def _look(result: TransferResult, index: int) -> tuple[str, str]:
    """Return colour and marker of a scope; an unknown scope takes the next unused ones."""
    scope = result.scopes[index]
    unknown = [name for name in result.scopes if name not in _LOOKS]
    if scope in _LOOKS:
        return _LOOKS[scope]
    return _OTHER_LOOKS[unknown.index(scope) % len(_OTHER_LOOKS)]


def _panels(title: str, targets: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    """Return a panel for each target, at most three in a row, on the same scales."""
    count = max(len(targets), 1)
    across = 2 if count == 4 else min(count, 3)
    down = math.ceil(count / across)
    figure = style.paper(max(3.2 * across, 5.4), height * down + 1.5)
    style.name_page(figure, title)
    grid = list(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat)
    for index, axes in enumerate(grid):
        axes.set_visible(index < count)
        # The last panel of a column has the numbers, although the grid may be longer there.
        axes.tick_params(labelbottom=index + across >= count)
        axes.margins(0.1)
        style.plain_axes(axes, "both")
    for axes, target in zip(grid, targets, strict=False):
        name = textwrap.fill(target, 30, max_lines=3, placeholder="\u2026")
        axes.set_title(name, loc="left", fontsize=10, parse_math=False)
    return figure, grid[: len(targets)]


def _label(panels: Sequence[Axes], across: str, up: str) -> None:
    """Name the axes of the panels at the edge."""
    for axes in panels:
        cell = axes.get_subplotspec()
        if cell is not None and cell.is_first_col():
            axes.set_ylabel(up)
        if axes.xaxis.get_tick_params().get("labelbottom"):
            axes.set_xlabel(across)


def _scope_handles(result: TransferResult) -> dict[str, Line2D]:
    looks = {scope: _look(result, index) for index, scope in enumerate(result.scopes)}
    return {
        scope: style.dot(color=colour, marker=marker, markersize=8)
        for scope, (colour, marker) in looks.items()
    }


def _draw_legend(
    figure: Figure, result: TransferResult, handles: dict[str, Line2D], mean: str
) -> None:
    """Draw the legend, with the meaning of the large and the small dots if there are several."""
    dots = {mean: 8, "one seed": 4} if len(result.seeds) > 1 else {}
    for name, size in dots.items():
        handles[name] = style.dot(color=MUTED, marker="o", markersize=size)
    style.legend(figure, handles, ncols=max(2, int(figure.get_figwidth() / 2.4)))


def _draw_line(
    axes: Axes, history: pd.DataFrame, column: str, label: str, line: dict[str, Any]
) -> None:
    """Draw one column of the history over the steps; nothing if it was never measured."""
    known = history[np.isfinite(history[column].to_numpy(dtype=float))]
    if len(known):
        axes.plot(known["step"], known[column], label=label, **line)
