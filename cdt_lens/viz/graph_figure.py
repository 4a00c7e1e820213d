"""Drawing of a circuit graph: layers upwards, the input at the bottom, the logits on top.

A line leaves the top of the node that writes and ends at the bottom of the node that reads; at a
head it ends under the letter of the input: queries (q), keys (k) or values (v). As in the other
figures, blue is positive and red is negative, and red lines are dashed.

The layout is that of Sugiyama: rows by layer, an order within the rows that avoids crossings, and
bends where a line passes a row. networkx has no such layout; its `multipartite_layout` draws lines
through the nodes of the rows between.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path
from scipy.optimize import isotonic_regression

from cdt_lens.circuits.graph import NODE_FILL, Edge, Graph
from cdt_lens.circuits.nodes import NodePlace, Site, parse_node
from cdt_lens.core.display import INK, MUTED, NEGATIVE, POSITIVE
from cdt_lens.core.errors import InputError
from cdt_lens.viz import style

# In inches: the distance between two rows, and the room of a node and of a bend in a row.
_ROW, _NODE_ROOM, _BEND_ROOM = 0.74, 0.7, 0.13
_ORDER_SWEEPS, _POSITION_SWEEPS = 24, 40
Spot = tuple[float, float]
# The name of a node, or (line, row) for a bend.
_Point = str | tuple[int, int]
_Near = Mapping[_Point, Sequence[_Point]]

# In inches, the unit of the axes: the size of a node, and the inputs of a head from its middle.
_WIDE, _HIGH = 0.58, 0.36
_PORTS: dict[Site, float] = {"q": -0.18, "k": 0.0, "v": 0.18, "": 0.0}
_DASHES = (0, (4, 1.6))
_UNSCORED: dict[str, Any] = {"linestyle": ":", "linewidth": 1.0}
_THIN, _THICK = 0.6, 4.0


def graph_figure(graph: Graph, max_edges: int = 40) -> Figure:
    """Draw the kept nodes of a graph and the strongest of its kept edges.

    Blue solid lines are positive (towards the gold label), red dashed lines are negative. Their
    width grows with the magnitude, and the number in a node is its own score. Edges without a score
    are thin and dotted. MLPs without a line are left out. Line i of `drawn_edges` is the patch with
    gid "edge-i", and a node is a patch with a gid such as "node-L9H6".

    Args:
        graph: The graph.
        max_edges: The maximum number of edges.

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
    """Return the strongest kept edges, then those without a score if all of these fit.

    Args:
        graph: The graph.
        max_edges: The maximum number of edges.
    """
    scored = graph.top_edges(max_edges)
    unscored = tuple(edge for edge in graph.kept_edges if edge.score is None)
    return scored + unscored if len(scored) + len(unscored) <= max_edges else scored


def edge_line(graph: Graph, edge: Edge) -> str:
    """Return the name and the score of an edge as text.

    Args:
        graph: The graph, which knows the unit of the scores.
        edge: The edge.
    """
    if edge.score is None:
        return f"{edge.name}: not scored"
    return f"{edge.name}: {edge.score:+.4g} {graph.short_unit}".rstrip()


def _shown(graph: Graph, edges: Sequence[Edge]) -> dict[str, NodePlace]:
    touched = {end for edge in edges for end in (edge.source, edge.target)}
    places = {name: parse_node(name, graph.n_layers, graph.n_heads) for name in graph.kept_nodes}
    shown = {n: place for n, place in places.items() if place.kind != "mlp" or n in touched}
    return dict(sorted(shown.items(), key=lambda item: (item[1].step(False), item[1].head)))


def _paper(layout: Layout) -> tuple[Figure, Axes]:
    """Return a figure in which one unit of the axes is about one inch."""
    spots = [*layout.nodes.values(), *chain.from_iterable(layout.bends)] or [(0.0, 0.0)]
    across, up = zip(*spots, strict=True)
    left, low = min(across) - 0.5, min(up) - 0.4
    wide, high = max(max(across) + 0.5 - left, 4.6), max(up) + 0.4 - low
    middle = (min(across) + max(across)) / 2
    figure = style.paper(wide + 0.9, high + 1.6)
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
    # The line is upright at every bend.
    for (ax, ay), (bx, by) in pairwise([*spots, *bends, end]):
        pull = 0.45 * (by - ay)
        spots += [(ax, ay + pull), (bx, by - pull), (bx, by)]
        codes += [Path.CURVE4] * 3
    pen = _pen(edge.score, largest)
    axes.add_patch(PathPatch(Path(spots, codes), fill=False, alpha=0.85, zorder=2, gid=gid, **pen))


def _pen(score: float | None, largest: float) -> dict[str, Any]:
    """Return colour, style and width of a line with this score."""
    if score is None:
        return {"edgecolor": MUTED, **_UNSCORED}
    return {
        "edgecolor": NEGATIVE if score < 0 else POSITIVE,
        "linestyle": _DASHES if score < 0 else "-",
        "linewidth": _THIN + (_THICK - _THIN) * abs(score) / (largest or 1.0),
    }


def _node(
    axes: Axes, name: str, score: float | None, spot: Spot, place: NodePlace, sites: set[Site]
) -> None:
    x, y = spot
    corner = (x - _WIDE / 2 + 0.05, y - _HIGH / 2 + 0.05)
    paint: dict[str, Any] = {"facecolor": NODE_FILL[place.kind], "edgecolor": INK, "linewidth": 0.9}
    shape: dict[str, Any] = {"boxstyle": "round,pad=0.05", "gid": f"node-{name}", "zorder": 4}
    axes.add_patch(FancyBboxPatch(corner, _WIDE - 0.1, _HIGH - 0.1, **shape, **paint))
    words: dict[str, Any] = {"ha": "center", "va": "center", "color": INK, "zorder": 5}
    axes.text(x, y if score is None else y + 0.065, name, fontsize=8.5, **words)
    if score is not None:
        axes.text(x, y - 0.085, f"{score:+z.2g}", fontsize=7, **words)
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
    for site in sorted(sites - {""}):
        axes.text(x + _PORTS[site], y - _HIGH / 2 - 0.065, site, fontsize=7.5, bbox=behind, **words)


def _name_layers(axes: Axes, places: Mapping[str, NodePlace], nodes: Mapping[str, Spot]) -> None:
    ticks: dict[float, str] = {}
    named: set[int] = set()
    for name, place in places.items():
        # The heads of a layer and the MLP above them share one name.
        if place.layer not in named:
            ticks[nodes[name][1]] = name if place.kind in ("input", "logits") else str(place.layer)
        named.add(place.layer)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(length=0)
    axes.set_ylabel("layer")


def _explain(figure: Figure, graph: Graph, edges: Sequence[Edge], largest: float) -> None:
    """Add the title, the unit, the legend and the description."""
    total, heads = len(graph.kept_edges), len(graph.heads)
    count = f"{len(edges)} of {total} edges" if len(edges) < total else f"{total} edges"
    style.title(
        figure, f"Circuit graph: {heads} heads of {graph.n_layers * graph.n_heads}, {count}"
    )
    note = f"Scores in {graph.unit}. q, k, v: read by the queries, keys, values of a head."
    lines = textwrap.fill(note, int(figure.get_figwidth() * 12))
    figure.axes[0].set_xlabel(lines, fontsize=9, parse_math=False)
    handles = _handles(largest, any(edge.score is None for edge in edges))
    style.legend(figure, handles, ncols=len(handles), handlelength=2.6)
    strongest = f" The strongest edge is {edge_line(graph, edges[0])}." if edges else ""
    figure.set_label(
        f"Layered drawing of a circuit graph, the input at the bottom and the logits on top: "
        f"{heads} heads of {graph.n_layers} layers of {graph.n_heads}, {count} drawn.{strongest}"
    )


def _handles(largest: float, unscored: bool) -> dict[str, Artist]:
    """Return the entries of the legend; `unscored` is whether a line has no score."""
    handles: dict[str, Artist] = {
        "positive": Line2D([], [], color=POSITIVE, linewidth=2),
        "negative": Line2D([], [], color=NEGATIVE, linewidth=2, linestyle=_DASHES),
    }
    if largest:
        thick, thin = (_THIN + share * (_THICK - _THIN) for share in (1.0, 0.1))
        handles[f"magnitude {largest:.2g}"] = Line2D([], [], color=INK, linewidth=thick)
        handles[f"{largest / 10:.2g}"] = Line2D([], [], color=INK, linewidth=thin)
    if unscored:
        handles["not scored"] = Line2D([], [], color=MUTED, **_UNSCORED)
    return handles


@dataclass(frozen=True)
class Layout:
    """The positions of a drawing, in inches.

    Args:
        nodes: The middle of each node.
        bends: The bends of each line, from its source upwards.
    """

    nodes: Mapping[str, Spot]
    bends: Sequence[Sequence[Spot]]


def layered(steps: Mapping[str, int], lines: Sequence[tuple[str, str]]) -> Layout:
    """Place nodes in rows, and lines that go upwards between them.

    Args:
        steps: The step of each node; a larger one is higher.
        lines: The lines as (source, target).
    """
    levels = {step: row for row, step in enumerate(sorted(set(steps.values())))}
    row_of = {name: levels[step] for name, step in steps.items()}
    bends = [
        [(line, row) for row in range(row_of[source] + 1, row_of[target])]
        for line, (source, target) in enumerate(lines)
    ]
    rows: list[list[_Point]] = [[] for _ in levels]
    for name, row in row_of.items():
        rows[row].append(name)
    for bend in chain.from_iterable(bends):
        rows[bend[1]].append(bend)
    ways: list[list[_Point]] = [
        [s, *middle, t] for (s, t), middle in zip(lines, bends, strict=True)
    ]
    x = _positions(rows, ways)
    return Layout(
        nodes={name: (x[name], _ROW * row) for name, row in row_of.items()},
        bends=[[(x[bend], _ROW * bend[1]) for bend in line] for line in bends],
    )


def _positions(rows: list[list[_Point]], ways: Sequence[Sequence[_Point]]) -> dict[_Point, float]:
    """Return how far to the right each point stands; this sorts the rows."""
    below: dict[_Point, list[_Point]] = {point: [] for row in rows for point in row}
    above: dict[_Point, list[_Point]] = {point: [] for row in rows for point in row}
    for low, high in chain.from_iterable(map(pairwise, ways)):
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
    for sweep in range(_POSITION_SWEEPS):
        for row in reversed(rows) if sweep % 2 else rows:
            x |= _spread(row, _wishes(row, around, x))
    return x


def _wishes(row: Sequence[_Point], near: _Near, x: Mapping[_Point, float]) -> list[float]:
    """Return the mean position of the neighbours of each point; its own without neighbours."""
    around = ([x[other] for other in near[point]] or [x[point]] for point in row)
    return [sum(positions) / len(positions) for positions in around]


def _spread(row: Sequence[_Point], wishes: Sequence[float]) -> dict[_Point, float]:
    """Return the positions nearest to `wishes` that keep the order and the room of each point."""
    room = np.array([_NODE_ROOM if isinstance(point, str) else _BEND_ROOM for point in row])
    least = np.concatenate([[0.0], np.cumsum((room[1:] + room[:-1]) / 2)])
    placed = isotonic_regression(np.array(wishes) - least).x + least
    return dict(zip(row, placed.tolist(), strict=True))
