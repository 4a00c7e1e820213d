"""Parts that the figures are made of: outlines, marks, bands, an axis of shares, names of points.

Each draws on the axes that it is given, and tells by shape or line, not by colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator
from torch import Tensor

from cdt_lens.core.display import INK
from cdt_lens.models.heads import Head


def as_array(values: Float[Tensor, "*axes"]) -> Float[np.ndarray, "*axes"]:
    """`values` for matplotlib: float64, on the CPU, without a gradient."""
    return values.detach().double().cpu().numpy()


def outline(axes: Axes, heads: Sequence[Head]) -> list[Patch]:
    """Frame the cells of `heads`, each with the gid "circuit-L9H6"; returns the legend entry."""
    style: dict[str, Any] = {"fill": False, "edgecolor": "black", "linewidth": 1.5}
    for head in heads:
        corner = (head.head - 0.46, head.layer - 0.46)
        axes.add_patch(Rectangle(corner, 0.92, 0.92, gid=f"circuit-{head}", **style))
    return [Patch(label=f"in the circuit ({len(heads)} heads)", **style)] if heads else []


def mark(
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


def band(
    axes: Axes,
    fractions: Float[np.ndarray, " size"],
    draws: Float[np.ndarray, "draw size"],
    style: tuple[str, Any],
    label: str,
) -> None:
    """Median and 5-95 % of random draws; `style` is a colour and a line style."""
    low, middle, high = np.quantile(draws, (0.05, 0.5, 0.95), axis=0)
    colour, line = style
    axes.fill_between(fractions, low, high, color=colour, alpha=0.14, linewidth=0)
    # Thin borders in the control's own line style, for bands that overlap in a grey print.
    for border in (low, high):
        axes.plot(fractions, border, color=colour, linestyle=line, linewidth=0.6)
    axes.plot(fractions, middle, color=colour, linestyle=line, linewidth=1.6, label=label)


def share_axis(axes: Axes, fractions: Float[np.ndarray, " size"]) -> None:
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


def name_extremes(
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


def control_name(name: str) -> str:
    """A random control's key in words: "random-per-layer" is the same number in each layer."""
    known = {"random": "random heads", "random-per-layer": "random heads, same per layer"}
    return known.get(name, name)


def metric_name(name: str) -> str:
    """A metric's key in words: "direction" is the task direction, in logits."""
    return "task direction" if name == "direction" else name
