"""Drawing of a circuit graph: layers upwards, the input at the bottom, the logits on top.

A line leaves the top of the node that writes and reaches the bottom of the one that reads; at a
head it ends under the letter of what reads it: queries (q), keys (k) or values (v). As in the
other figures, blue is positive and red negative, and red lines are dashed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path
from scipy.optimize import isotonic_regression

from cdt_lens.circuits.nodes import NodePlace, Site, parse_node
from cdt_lens.core.display import INK, MUTED, NEGATIVE, POSITIVE
from cdt_lens.core.errors import InputError

if TYPE_CHECKING:
    from cdt_lens.circuits.graph import Edge, Graph

# Inches: the distance of two rows, the room of a node in its row, and that of a bend.
_ROW, _NODE_ROOM, _BEND_ROOM = 0.74, 0.7, 0.13
_ORDER_SWEEPS, _PLACE_SWEEPS = 24, 40
Spot = tuple[float, float]
# A node by its name, or (line, row): the bend of a line.
_Point = str | tuple[int, int]
_Near = Mapping[_Point, Sequence[_Point]]

# Inches, which are the units of the axes: a node, and where a head is read into.
_WIDE, _HIGH = 0.58, 0.36
_PORTS: dict[Site, float] = {"q": -0.18, "k": 0.0, "v": 0.18, "": 0.0}
_FILL = {"input": "#d9d9d9", "head": "white", "mlp": "#efefef", "logits": "#d9d9d9"}
_DASHES = (0, (4, 1.6))
_UNSCORED: dict[str, Any] = {"linestyle": ":", "linewidth": 1.0}
_THIN, _THICK = 0.6, 4.0


def graph_figure(graph: Graph, max_edges: int = 40) -> Figure:
    """The kept nodes of `graph` and the `max_edges` strongest of its kept edges.

    Blue solid lines are positive (towards the gold label, in logits), red dashed ones negative;
    their width grows with the magnitude, and the number in a node is its own score. Edges without
    a score are thin and dotted, and drawn if there is room for all of them; MLPs that no
    line touches are left out. Line i of `drawn_edges` is the patch with gid "edge-i", and a node
    the patch with gid "node-L9H6".

    Raises:
        InputError: `max_edges` is negative.
    """
    if max_edges < 0:
        raise InputError(f"graph_figure: max_edges={max_edges}, expected at least 0")
    edges = drawn_edges(graph, max_edges)
    places = _shown(graph, edges)
    steps = {name: place.step(graph.parallel) for name, place in places.items()}
    layout = layered(steps, [(edge.source, edge.target) for edge in edges])
    figure, axes = _paper(layout)
    largest = max((abs(edge.score or 0.0) for edge in edges), default=0.0)
    # The strongest comes last, over the weaker ones.
    for index, edge in reversed(list(enumerate(edges))):
        _line(axes, edge, layout.bends[index], layout.nodes, largest, f"edge-{index}")
    for name, spot in layout.nodes.items():
        sites = {edge.site for edge in edges if edge.target == name}
        _node(axes, name, graph.nodes[name].score, spot, places[name], sites)
    _name_layers(axes, places, layout.nodes)
    _explain(figure, graph, edges, largest)
    return figure


def drawn_edges(graph: Graph, max_edges: int) -> tuple[Edge, ...]:
    """The strongest kept edges; behind them those without a score, if all of these fit."""
    scored = graph.top_edges(max_edges)
    unscored = tuple(edge for edge in graph.kept_edges if edge.score is None)
    return scored + unscored if len(scored) + len(unscored) <= max_edges else scored


def edge_line(graph: Graph, edge: Edge) -> str:
    """An edge and its score in words."""
    if edge.score is None:
        return f"{edge.name}: not scored"
    return f"{edge.name}: {edge.score:+.4g} {graph.short_unit}".rstrip()


def _shown(graph: Graph, edges: Sequence[Edge]) -> dict[str, NodePlace]:
    touched = {end for edge in edges for end in (edge.source, edge.target)}
    places = {name: parse_node(name, graph.n_layers, graph.n_heads) for name in graph.kept_nodes}
    shown = {n: place for n, place in places.items() if place.kind != "mlp" or n in touched}
    return dict(sorted(shown.items(), key=lambda item: (item[1].step(False), item[1].head)))


def _paper(layout: Layout) -> tuple[Figure, Axes]:
    """A figure in which a unit of the axes is about an inch."""
    bends = [spot for each in layout.bends for spot in each]
    spots = [*layout.nodes.values(), *bends] or [(0.0, 0.0)]
    across, up = zip(*spots, strict=True)
    left, low = min(across) - 0.5, min(up) - 0.4
    wide, high = max(max(across) + 0.5 - left, 4.6), max(up) + 0.4 - low
    middle = (min(across) + max(across)) / 2
    figure = Figure(figsize=(wide + 0.9, high + 1.6), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set(xlim=(middle - wide / 2, middle + wide / 2), ylim=(low, low + high), xticks=[])
    axes.spines[:].set_visible(False)
    return figure, axes


def _line(
    axes: Axes,
    edge: Edge,
    bends: Sequence[Spot],
    nodes: Mapping[str, Spot],
    largest: float,
    gid: str,
) -> None:
    (x0, y0), (x1, y1) = nodes[edge.source], nodes[edge.target]
    letter = 0.12 if edge.site else 0.0
    end = (x1 + _PORTS[edge.site], y1 - _HIGH / 2 - letter)
    spots, codes = [(x0, y0 + _HIGH / 2)], [Path.MOVETO]
    # Upright at every bend.
    for (ax, ay), (bx, by) in pairwise([*spots, *bends, end]):
        pull = 0.45 * (by - ay)
        spots += [(ax, ay + pull), (bx, by - pull), (bx, by)]
        codes += [Path.CURVE4] * 3
    style: dict[str, Any] = {"edgecolor": MUTED, **_UNSCORED}
    if edge.score is not None:
        negative = edge.score < 0
        style = {
            "edgecolor": NEGATIVE if negative else POSITIVE,
            "linestyle": _DASHES if negative else "-",
            "linewidth": _THIN + (_THICK - _THIN) * abs(edge.score) / (largest or 1.0),
        }
    path = Path(spots, codes)
    axes.add_patch(PathPatch(path, fill=False, alpha=0.85, zorder=2, gid=gid, **style))


def _node(
    axes: Axes, name: str, score: float | None, spot: Spot, place: NodePlace, sites: set[Site]
) -> None:
    x, y = spot
    corner = (x - _WIDE / 2 + 0.05, y - _HIGH / 2 + 0.05)
    look: dict[str, Any] = {"facecolor": _FILL[place.kind], "edgecolor": INK, "linewidth": 0.9}
    box = FancyBboxPatch(
        corner, _WIDE - 0.1, _HIGH - 0.1, boxstyle="round,pad=0.05", gid=f"node-{name}",
        zorder=4, **look,
    )  # fmt: skip
    axes.add_patch(box)
    words: dict[str, Any] = {"ha": "center", "va": "center", "color": INK, "zorder": 5}
    axes.text(x, y if score is None else y + 0.065, name, fontsize=8.5, **words)
    if score is not None:
        axes.text(x, y - 0.085, f"{score:+z.2g}", fontsize=7, **words)
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
    for site in sorted(sites - {""}):
        at = (x + _PORTS[site], y - _HIGH / 2 - 0.065)
        axes.text(*at, site, fontsize=7.5, bbox=behind, **words)


def _name_layers(axes: Axes, places: Mapping[str, NodePlace], nodes: Mapping[str, Spot]) -> None:
    ticks: dict[float, str] = {}
    named: set[int] = set()
    for name, place in places.items():
        # An MLP above the heads of its layer needs no second name.
        if place.layer not in named:
            ticks[nodes[name][1]] = name if place.kind in ("input", "logits") else str(place.layer)
        named.add(place.layer)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(length=0)
    axes.set_ylabel("layer")


def _explain(figure: Figure, graph: Graph, edges: Sequence[Edge], largest: float) -> None:
    """Title, unit, legend, and the drawing in words."""
    total, heads = len(graph.kept_edges), len(graph.heads)
    count = f"{len(edges)} of {total} edges" if len(edges) < total else f"{total} edges"
    title = f"Circuit graph: {heads} heads of {graph.n_layers * graph.n_heads}, {count}"
    axes = figure.axes[0]
    characters = int(figure.get_figwidth() * 10)
    axes.set_title(textwrap.fill(title, characters), fontsize=11)
    note = f"Scores in {graph.unit}. q, k, v: read by the queries, keys, values of a head."
    axes.set_xlabel(
        textwrap.fill(note, int(figure.get_figwidth() * 12)), fontsize=9, parse_math=False
    )
    handles = [
        Line2D([], [], color=POSITIVE, linewidth=2, label="positive"),
        Line2D([], [], color=NEGATIVE, linewidth=2, linestyle=_DASHES, label="negative"),
    ]
    if largest:
        label = f"magnitude {largest:.2g}"
        handles.append(Line2D([], [], color=INK, linewidth=_THICK, label=label))
        small = _THIN + 0.1 * (_THICK - _THIN)
        handles.append(Line2D([], [], color=INK, linewidth=small, label=f"{largest / 10:.2g}"))
    if any(edge.score is None for edge in edges):
        handles.append(Line2D([], [], color=MUTED, label="not scored", **_UNSCORED))
    place: dict[str, Any] = {"loc": "outside lower left", "frameon": False, "fontsize": 9}
    figure.legend(handles=handles, ncols=len(handles), handlelength=2.6, **place)
    strongest = f" The strongest edge is {edge_line(graph, edges[0])}." if edges else ""
    figure.set_label(
        f"Layered drawing of a circuit graph, the input at the bottom and the logits on top: "
        f"{heads} heads of {graph.n_layers} layers of {graph.n_heads}, {count} drawn.{strongest}"
    )


@dataclass(frozen=True)
class Layout:
    """The middle of each node, and of each line the bends from its source up, in inches."""

    nodes: Mapping[str, Spot]
    bends: Sequence[Sequence[Spot]]


def layered(steps: Mapping[str, int], lines: Sequence[tuple[str, str]]) -> Layout:
    """Place nodes by their steps (a larger one is higher), and lines (source, target) upwards."""
    levels = {step: row for row, step in enumerate(sorted(set(steps.values())))}
    row_of = {name: levels[step] for name, step in steps.items()}
    bends = [
        [(line, row) for row in range(row_of[source] + 1, row_of[target])]
        for line, (source, target) in enumerate(lines)
    ]
    rows: list[list[_Point]] = [[] for _ in levels]
    for name, row in row_of.items():
        rows[row].append(name)
    for bend in (bend for each in bends for bend in each):
        rows[bend[1]].append(bend)
    x = _places(rows, [[s, *each, t] for (s, t), each in zip(lines, bends, strict=True)])
    return Layout(
        nodes={name: (x[name], _ROW * row) for name, row in row_of.items()},
        bends=[[(x[bend], _ROW * bend[1]) for bend in each] for each in bends],
    )


def _places(rows: list[list[_Point]], chains: Sequence[Sequence[_Point]]) -> dict[_Point, float]:
    """How far to the right each point stands; the rows are put in order on the way."""
    below: dict[_Point, list[_Point]] = {point: [] for row in rows for point in row}
    above: dict[_Point, list[_Point]] = {point: [] for row in rows for point in row}
    for low, high in (pair for chain in chains for pair in pairwise(chain)):
        above[low].append(high)
        below[high].append(low)
    x: dict[_Point, float] = {}
    for row in rows:
        x |= _spread(row, [0.0] * len(row))
    for sweep in range(_ORDER_SWEEPS):
        near = above if sweep % 2 else below
        for row in reversed(rows) if sweep % 2 else rows:
            wishes = dict(zip(row, _wishes(row, near, x), strict=True))
            row.sort(key=wishes.__getitem__)
            x |= _spread(row, [wishes[point] for point in row])
    around = {point: below[point] + above[point] for point in below}
    for sweep in range(_PLACE_SWEEPS):
        for row in reversed(rows) if sweep % 2 else rows:
            x |= _spread(row, _wishes(row, around, x))
    return x


def _wishes(row: Sequence[_Point], near: _Near, x: Mapping[_Point, float]) -> list[float]:
    """The mean place of each point's neighbours; without any, the point's own."""
    around = ([x[other] for other in near[point]] or [x[point]] for point in row)
    return [sum(places) / len(places) for places in around]


def _spread(row: Sequence[_Point], wishes: Sequence[float]) -> dict[_Point, float]:
    """The places nearest to `wishes` that keep the order of the row and the room of each point."""
    room = np.array([_NODE_ROOM if isinstance(point, str) else _BEND_ROOM for point in row])
    least = np.concatenate([[0.0], np.cumsum((room[1:] + room[:-1]) / 2)])
    placed = isotonic_regression(np.array(wishes) - least).x + least
    return dict(zip(row, placed.tolist(), strict=True))
