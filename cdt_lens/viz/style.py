"""Parts that the figures share: papers, axes, outlines, marks, bands and names of points.

Every part draws on the axes that it is given, and distinguishes by shape or line, not by colour
alone.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from torch import Tensor

from cdt_lens.core.display import INK
from cdt_lens.models.heads import Head

GRID: dict[str, Any] = {"color": "#dddddd", "linewidth": 0.6}
LEGEND: dict[str, Any] = {"loc": "outside lower left", "frameon": False, "fontsize": 9}


def as_array(values: Float[Tensor, "*axes"]) -> Float[np.ndarray, "*axes"]:
    """Return `values` for matplotlib: float64, on the CPU, without a gradient."""
    return values.detach().double().cpu().numpy()


def paper(width: float, height: float) -> Figure:
    """Return an empty white figure, `width` by `height` inches."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def plain_axes(axes: Axes, grid: Literal["x", "y", "both"] | None = None) -> None:
    """Hide the frame at the top and on the right, and draw a grid below the data.

    Args:
        axes: The axes to change.
        grid: The direction of the grid; None for no grid.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, **GRID)


def title(figure: Figure, text: str) -> None:
    """Set a title that wraps inside `figure` and shows a dollar sign as it is."""
    lines = textwrap.fill(text, int(figure.get_figwidth() * 10.5))
    figure.axes[0].set_title(lines, fontsize=11, parse_math=False)


def name_page(figure: Figure, text: str, size: int = 11) -> None:
    """Set a title above several panels; a page takes it from invisible first axes."""
    lines = textwrap.fill(text, int(figure.get_figwidth() * 134 / size))
    figure.suptitle(lines, fontsize=size, parse_math=False)
    figure.add_axes((0, 0, 1, 1), visible=False).set_title(text, parse_math=False)


def legend(figure: Figure, handles: Mapping[str, Artist], **options: Any) -> None:
    """Draw a legend below `figure`; labels show a dollar sign as it is.

    Args:
        figure: The figure.
        handles: The entries by label.
        **options: Further arguments of `Figure.legend`.
    """
    drawn = figure.legend(list(handles.values()), list(handles), **LEGEND, **options)
    for text in drawn.get_texts():
        text.set_parse_math(False)


def dot(**style: Any) -> Line2D:
    """Return a marker without a line, for a legend."""
    return Line2D([], [], linestyle="none", **style)


def head_map(
    values: Float[np.ndarray, "layer head"], colours: Colormap, ends: tuple[float, float]
) -> tuple[Figure, Axes, QuadMesh]:
    """Draw one cell for each head, layers down and heads across.

    Args:
        values: The value of each cell.
        colours: The colour map.
        ends: The values at which the colours end.

    Returns:
        The figure, its axes, and the cells, row by row, as the collection with gid "cells".
    """
    layers, heads = values.shape
    width = min(max(4.2 / heads, 0.24), 0.55) * heads + 1.7
    height = min(max(5.6 / layers, 0.18), 0.42) * layers + 1.2
    figure = paper(max(width, 4.6), max(height, 3.4))
    axes = figure.add_subplot()
    edges = np.arange(heads + 1) - 0.5, np.arange(layers + 1) - 0.5
    style: dict[str, Any] = {"cmap": colours, "vmin": ends[0], "vmax": ends[1]}
    cells = axes.pcolormesh(*edges, values, edgecolors="white", linewidth=0.4, **style)
    cells.set_gid("cells")
    axes.set(xlabel="head", ylabel="layer", xlim=(-0.5, heads - 0.5), ylim=(layers - 0.5, -0.5))
    for axis, most in ((axes.xaxis, 16), (axes.yaxis, 30)):
        axis.set_major_locator(MaxNLocator(nbins=most, integer=True, steps=[1, 2, 5, 10]))
    axes.tick_params(length=2)
    axes.spines[:].set_visible(False)
    return figure, axes, cells


def outline(axes: Axes, heads: Sequence[Head]) -> list[Patch]:
    """Frame the cells of `heads`, each with a gid such as "circuit-L9H6".

    Args:
        axes: The axes of a `head_map`.
        heads: The heads of the circuit.

    Returns:
        The entry of the legend; nothing without heads.
    """
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
    dark: Bool[np.ndarray, "layer head"] | None = None,
) -> list[Line2D]:
    """Put a marker on some cells of a `head_map`.

    Args:
        axes: The axes of the map.
        name: The label in the legend, and the gid of the markers.
        marker: The marker.
        where: The cells to mark.
        dark: The cells on which the marker is white; none by default.

    Returns:
        The entry of the legend; nothing if no cell is marked.
    """
    layers, heads = np.nonzero(where)
    if not layers.size:
        return []
    white = np.zeros_like(where) if dark is None else dark
    colours = np.where(white[layers, heads], "white", INK)
    size = 28 if marker == "_" else 12
    axes.scatter(heads, layers, marker=marker, s=size, linewidths=1, c=colours, gid=name)
    return [dot(marker=marker, color=INK, markersize=6, label=name)]


def band(
    axes: Axes,
    fractions: Float[np.ndarray, " size"],
    draws: Float[np.ndarray, "draw size"],
    style: tuple[str, Any],
    label: str,
) -> None:
    """Draw the median and the 5th to 95th percentile of random draws.

    Args:
        axes: The axes.
        fractions: The shares of heads kept.
        draws: The values of each draw.
        style: The colour and the line style.
        label: The label of the median.
    """
    low, middle, high = np.quantile(draws, (0.05, 0.5, 0.95), axis=0)
    colour, line = style
    axes.fill_between(fractions, low, high, color=colour, alpha=0.14, linewidth=0)
    # Bands that overlap in a grey print are told apart by their borders.
    for border in (low, high):
        axes.plot(fractions, border, color=colour, linestyle=line, linewidth=0.6)
    axes.plot(fractions, middle, color=colour, linestyle=line, linewidth=1.6, label=label)


def share_axis(axes: Axes, fractions: Float[np.ndarray, " size"]) -> None:
    """Scale the horizontal axis by the logarithm of the share of heads, linear next to 0."""
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
    """Name the points farthest from 0, without names that would cover another name.

    Args:
        axes: The axes of the scatter plot.
        heads: The head of each point.
        across: The horizontal position of each point.
        up: The vertical position of each point.
        count: The maximum number of names.
    """
    span = np.array([np.ptp(values) if values.size else 1.0 for values in (across, up)])
    points = np.stack([across, up], axis=1) / np.where(span > 0, span, 1.0)
    named: list[int] = []
    for index in np.argsort(-np.linalg.norm(points, axis=1))[:count].tolist():
        gaps = np.abs(points[named] - points[index])
        if (gaps < (0.11, 0.045)).all(axis=1).any():
            continue
        named.append(index)
        # The name stands on the side away from the line of equal scores.
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
