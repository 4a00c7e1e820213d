"""Figures of fine-tuning and transfer: matplotlib's object interface, no pyplot, no global style.

1. A scope has the same colour and the same marker in every figure and panel; no two share a marker.
2. Every seed is a small dot and the mean over seeds a large one: a difference smaller than the
   scatter of the dots is none. With one seed there is only the large one.
3. The untouched checkpoint is drawn wherever a scope is: training must beat doing nothing.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from cdt_lens.core.display import INK, MUTED, POSITIVE
from cdt_lens.viz import style as artists
from cdt_lens.viz.training_tables import runs_of, untouched
from cdt_lens.viz.words import mean_and_spread, mean_in_words, score

if TYPE_CHECKING:
    from cdt_lens.finetuning.result import FineTuneResult
    from cdt_lens.finetuning.transfer_result import TransferResult

# Colour and marker of each scope; the controls' colours are those of the faithfulness curve.
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
_GRID: dict[str, Any] = {"color": "#dddddd", "linewidth": 0.6}
_BEFORE: dict[str, Any] = {"color": MUTED, "linewidth": 1.0, "linestyle": (0, (5, 3))}
_CHANCE: dict[str, Any] = {"color": MUTED, "linewidth": 1.2, "linestyle": (0, (1, 1.5))}
_BELOW: dict[str, Any] = {"loc": "outside lower left", "frameon": False, "fontsize": 9}
# The lines of a learning curve, and the star on the evaluation whose weights are kept.
_TARGET: dict[str, Any] = {"color": POSITIVE, "marker": "o", "markersize": 5, "linewidth": 2.2}
_MACRO_F1: dict[str, Any] = {"color": "#12808f", "marker": "D", "markersize": 4, "linestyle": ":"}
_SOURCE: dict[str, Any] = {"color": "#8a5a00", "marker": "s", "markersize": 4, "linestyle": "--"}
_TRAINING: dict[str, Any] = {"color": INK, "marker": "^", "markersize": 4, "linestyle": "-."}
_KEPT: dict[str, Any] = {"marker": "*", "s": 170, "color": "white", "edgecolors": INK, "zorder": 5}
_TRADE_OFF = ("accuracy", "retention")


def learning_curve(result: FineTuneResult) -> Figure:
    """Accuracy (top) and loss (bottom, nats) on validation data over the steps of a fine-tuning.

    Step 0 is the model before training. The star marks the evaluation whose weights are kept.
    Source accuracy is left out where there was no source task.
    """
    history = result.history
    figure = Figure(figsize=(5.2, 5.4), layout="constrained", facecolor="white")
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axes, column, label, style in (
        (top, "target_accuracy", "target accuracy", _TARGET),
        (top, "target_macro_f1", "target macro-F1", _MACRO_F1),
        (top, "source_accuracy", "source accuracy", _SOURCE),
        (bottom, "target_loss", "target loss", _TARGET),
        (bottom, "train_loss", "training loss", _TRAINING),
    ):
        _line(axes, history, column, label, style)
    kept = history[history["epoch"] == result.best_epoch]
    label = f"kept: epoch {result.best_epoch}"
    for axes, column in ((top, "target_accuracy"), (bottom, "target_loss")):
        axes.scatter(kept["step"], kept[column], label=label, **_KEPT)
        axes.grid(axis="y", **_GRID)
        axes.spines[["top", "right"]].set_visible(False)
        label = ""
    top.set_ylabel("accuracy, macro-F1")
    bottom.set(ylabel="loss (nats)", xlabel="optimiser step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(ncols=2, **_BELOW)
    top.set_title(f"Learning curve: {result.scope}", fontsize=11, parse_math=False)
    before, after = (score(float(row["target_accuracy"])) for row in (result.before, result.after))
    figure.set_label(
        f"Two line charts over {len(history)} evaluations: target accuracy goes from {before} to "
        f"{after} at epoch {result.best_epoch}, whose weights are kept."
    )
    return figure


def trained_heads(result: FineTuneResult) -> Figure:
    """Map of the heads whose slices were trained, layers down and heads across.

    Trained heads are dark; heads with a cross were not selected but share a trained K/V slice.
    The cells are the collection with gid "cells", row by row.
    """
    layers, heads = result.n_layers, result.n_heads
    states = np.zeros((layers, heads))
    for state, members in ((1, result.siblings), (2, result.heads)):
        for head in members:
            states[head.layer, head.head] = state
    width = min(max(3.8 / heads, 0.24), 0.5) * heads + 1.0
    height = min(max(5.6 / layers, 0.18), 0.42) * layers + 1.2
    size = (max(width, 4.4), max(height, 2.8))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    colours = ("#ececec", "#a9c6e3", POSITIVE)
    cells = axes.pcolormesh(
        np.arange(heads + 1) - 0.5, np.arange(layers + 1) - 0.5, states,
        cmap=ListedColormap(colours), vmin=-0.5, vmax=2.5, edgecolors="white", linewidth=0.4,
    )  # fmt: skip
    cells.set_gid("cells")
    crossed = states == 1
    names = f"trained ({len(result.heads)} heads)", f"shares a K/V slice ({len(result.siblings)})"
    handles = [
        Patch(color=POSITIVE, label=names[0]),
        *artists.mark(axes, names[1], "x", crossed, np.zeros_like(crossed)),
        Patch(color=colours[0], label="not trained"),
    ]
    axes.set(xlabel="head", ylabel="layer", xlim=(-0.5, heads - 0.5), ylim=(layers - 0.5, -0.5))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=30, integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(length=2)
    axes.spines[:].set_visible(False)
    figure.legend(handles=handles, ncols=2, **_BELOW)
    axes.set_title(f"Trained heads: {result.scope}", fontsize=11, parse_math=False)
    figure.set_label(
        f"Map of {layers} layers by {heads} heads: {len(result.heads)} trained, "
        f"{len(result.siblings)} that share a trained key or value slice."
    )
    return figure


def trade_off(result: TransferResult) -> Figure:
    """Target accuracy (up) against retention (across), both on test data, one panel a target.

    Up and to the right is better. The star is the untouched proxy checkpoint, whose retention is 1
    by definition. In panel i the seeds and the mean of scope j are the collections with gid
    "seeds-i-j" and "mean-i-j"; `point_lines` says each of them in words.
    """
    title = "Target accuracy against retention: up and to the right is better"
    figure, panels = _panels(title, result.targets, height=3.1)
    for index, (target, axes) in enumerate(zip(result.targets, panels, strict=True)):
        before = untouched(result, target, "accuracy")
        axes.axvline(1.0, zorder=1, **_BEFORE)
        if np.isfinite(before):
            axes.axhline(before, zorder=1, **_BEFORE)
            axes.scatter([1.0], [before], marker="*", s=150, color="white", edgecolors=INK)
        drawn = _drawn(result, target, *_TRADE_OFF)
        _say_if_none(axes, drawn)
        for place, runs in enumerate(drawn):
            name = f"{index}-{place}"
            across, up = runs["retention"], runs["accuracy"]
            _points(axes, name, across, up, (across.mean(), up.mean()), _look(result, place))
    _label(panels, "retention (after / before)", "target accuracy")
    star = Line2D([], [], marker="*", markersize=11, mfc="white", mec=INK, **_BEFORE)
    _legend(figure, result, {"untouched checkpoint": star}, "mean over seeds", scopes=True)
    figure.set_label(
        f"Scatter plots, one for each of {len(result.targets)} target languages, of target "
        f"accuracy against retention for {', '.join(result.scopes)}; the tables hold the numbers."
    )
    return figure


def accuracies(result: TransferResult) -> Figure:
    """Target accuracy on test data by scope, one panel a target, with every seed and their mean.

    The line through a mean is one standard deviation over seeds each way. Dotted: chance, always
    the commonest label; dashed: the untouched proxy checkpoint. Gids as in `trade_off`.
    """
    title = "Target accuracy of each scope"
    figure, panels = _panels(title, result.targets, height=0.75 + 0.3 * len(result.scopes))
    for index, (target, axes) in enumerate(zip(result.targets, panels, strict=True)):
        chance = result.chance.get(target, np.nan)
        lines = ((untouched(result, target, "accuracy"), _BEFORE), (chance, _CHANCE))
        for value, style in lines:
            if np.isfinite(value):
                axes.axvline(value, zorder=1, **style)
        drawn = _drawn(result, target, "accuracy")
        _say_if_none(axes, drawn)
        for place, runs in enumerate(drawn):
            look = _look(result, place)
            mean, spread = mean_and_spread(runs["accuracy"])
            if np.isfinite(spread):
                axes.plot([mean - spread, mean + spread], [place] * 2, color=look[0], linewidth=1.4)
            # The seeds below their mean and apart, so that none of them is hidden.
            heights = pd.Series(place + np.linspace(0.16, 0.36, len(runs)))
            _points(axes, f"{index}-{place}", runs["accuracy"], heights, (mean, float(place)), look)
        axes.set_yticks(range(len(result.scopes)), result.scopes, parse_math=False)
        axes.set_ylim(len(result.scopes) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
    _label(panels, "target accuracy", "")
    handles = {
        "chance (the commonest label)": Line2D([], [], **_CHANCE),
        "untouched checkpoint": Line2D([], [], **_BEFORE),
    }
    _legend(figure, result, handles, "mean over seeds \u00b1 1 s.d.", scopes=False)
    figure.set_label(
        f"Dot plots, one for each of {len(result.targets)} target languages, of the target "
        f"accuracy of {', '.join(result.scopes)}, beside chance."
    )
    return figure


def point_lines(result: TransferResult, *columns: str) -> dict[str, list[str]]:
    """What a reader sees when pointing at the points of a figure: lines by the points' gid.

    `columns` are those that the figure draws: accuracy, and retention in the trade-off.
    """
    lines = {}
    for index, target in enumerate(result.targets):
        for place, runs in enumerate(_drawn(result, target, *columns)):
            who = f"{target}, {result.scopes[place]}"
            said = [
                f"{who}, seed {run['seed']}: {', '.join(f'{c} {score(run[c])}' for c in columns)}"
                for run in runs.to_dict("records")
            ]
            if len(said) > 1:
                lines[f"seeds-{index}-{place}"] = said
                means = ", ".join(f"{c} {mean_in_words(runs[c])}" for c in columns)
                said = [f"{who}, mean of {len(runs)} seeds: {means}"]
            if said:
                lines[f"mean-{index}-{place}"] = said
    return lines


def _drawn(result: TransferResult, target: str, *columns: str) -> list[pd.DataFrame]:
    """For each scope the runs whose `columns` are finite: the ones that a figure can draw."""
    runs = (runs_of(result, target, scope) for scope in result.scopes)
    return [
        each[np.isfinite(each[list(columns)].to_numpy(dtype=float)).all(axis=1)] for each in runs
    ]


def _points(
    axes: Axes,
    name: str,
    across: pd.Series,
    up: pd.Series,
    mean: tuple[float, float],
    look: tuple[str, str],
) -> None:
    """Small dots for the seeds, where there are several, and a large one for their mean."""
    if across.empty:
        return
    colour, marker = look
    # Crosses have less ink than the other markers of one size.
    size = 1.5 if marker in "PX" else 1.0
    style: dict[str, Any] = {"color": colour, "marker": marker}
    if len(across) > 1:
        small: dict[str, Any] = {"s": 16 * size, "alpha": 0.6, "linewidths": 0, "zorder": 3}
        axes.scatter(across, up, **small, **style).set_gid(f"seeds-{name}")
    large: dict[str, Any] = {"s": 62 * size, "edgecolors": "white", "linewidths": 0.6, "zorder": 4}
    axes.scatter(mean[0], mean[1], **large, **style).set_gid(f"mean-{name}")


def _say_if_none(axes: Axes, drawn: Sequence[pd.DataFrame]) -> None:
    if all(runs.empty for runs in drawn):
        place: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "no finished run", color=MUTED, fontsize=9, **place)


def _look(result: TransferResult, place: int) -> tuple[str, str]:
    """Colour and marker of a scope; one of another name takes the next that is left."""
    scope = result.scopes[place]
    unknown = [name for name in result.scopes if name not in _LOOKS]
    if scope in _LOOKS:
        return _LOOKS[scope]
    return _OTHER_LOOKS[unknown.index(scope) % len(_OTHER_LOOKS)]


def _panels(title: str, targets: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    """A panel for each target, at most three in a row, on the same scales, under one title."""
    count = max(len(targets), 1)
    across = 2 if count == 4 else min(count, 3)
    down = math.ceil(count / across)
    size = (max(3.2 * across, 5.4), height * down + 1.5)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=11)
    # A page names a drawing by the title of its first axes: these are there for that alone.
    figure.add_axes((0, 0, 1, 1), visible=False).set_title(title)
    grid = list(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat)
    for index, axes in enumerate(grid):
        axes.set_visible(index < count)
        # Nothing stands under the last panel of its column, though the grid may have a place there.
        axes.tick_params(labelbottom=index + across >= count)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(0.1)
        axes.set_axisbelow(True)
        axes.grid(**_GRID)
    for axes, target in zip(grid, targets, strict=False):
        name = textwrap.fill(target, 30, max_lines=3, placeholder="\u2026")
        axes.set_title(name, loc="left", fontsize=10, parse_math=False)
    return figure, grid[: len(targets)]


def _label(panels: Sequence[Axes], across: str, up: str) -> None:
    """Names of the axes, where no other panel stands between them and the edge."""
    for axes in panels:
        place = axes.get_subplotspec()
        if place is not None and place.is_first_col():
            axes.set_ylabel(up)
        if axes.xaxis.get_tick_params().get("labelbottom"):
            axes.set_xlabel(across)


def _legend(
    figure: Figure, result: TransferResult, more: dict[str, Line2D], mean: str, *, scopes: bool
) -> None:
    handles: dict[str, Line2D] = {}
    for place, scope in enumerate(result.scopes if scopes else ()):
        colour, marker = _look(result, place)
        handles[scope] = Line2D([], [], color=colour, marker=marker, markersize=8, linestyle="none")
    handles |= more
    if len(result.seeds) > 1:
        handles[mean] = _dot(8)
        handles["one seed"] = _dot(4)
    columns = max(2, int(figure.get_figwidth() / 2.4))
    legend = figure.legend(handles.values(), handles.keys(), ncols=columns, **_BELOW)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _dot(size: int) -> Line2D:
    return Line2D([], [], color=MUTED, marker="o", markersize=size, linestyle="none")


def _line(
    axes: Axes, history: pd.DataFrame, column: str, label: str, style: dict[str, Any]
) -> None:
    """One column of the history over the steps; nothing where it was never measured."""
    known = history[np.isfinite(history[column].to_numpy(dtype=float))]
    if len(known):
        axes.plot(known["step"], known[column], label=label, **style)
