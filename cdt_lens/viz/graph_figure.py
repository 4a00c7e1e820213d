"""Drawing of a circuit graph: layers upwards, the input at the bottom, the logits on top.

A line leaves the top of the node that writes and ends at the bottom of the node that reads; at a
head it ends under the letter of the input: queries (q), keys (k) or values (v). As in the other
figures, blue is positive and red is negative, and red lines are dashed.

The layout is that of Sugiyama: rows by layer, an order within the rows that avoids crossings, and
bends where a line passes a row. networkx has no such layout; its `multipartite_layout` draws lines
through the nodes of the rows between. Vega-Lite draws what is placed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from scipy.optimize import isotonic_regression

from cdt_lens.circuits.graph import NODE_FILL, Edge, Graph
from cdt_lens.circuits.nodes import NodePlace, Site, parse_node
from cdt_lens.core.display import INK, MUTED, NEGATIVE, POSITIVE, Figure
from cdt_lens.core.errors import InputError
from cdt_lens.viz import spec
from cdt_lens.viz.spec import DASHES, PAPER, Spec, field, layer, looks, tips

# In units of the drawing: the distance of two rows, and the room of a node and of a bend in a row.
_ROW, _NODE_ROOM, _BEND_ROOM = 0.74, 0.7, 0.13
_ORDER_SWEEPS, _POSITION_SWEEPS = 24, 40
Spot = tuple[float, float]
# The name of a node, or (line, row) for a bend.
_Point = str | tuple[int, int]
_Near = Mapping[_Point, Sequence[_Point]]

# The size of a node, the inputs of a head from its middle, and the pixels of one unit.
_WIDE, _HIGH = 0.58, 0.36
_PORTS: dict[Site, float] = {"q": -0.18, "k": 0.0, "v": 0.18, "": 0.0}
_UNIT = 92
_SIGNS = {
    "positive": (POSITIVE, DASHES[0]), "negative": (NEGATIVE, DASHES[1]),
    "not scored": (MUTED, DASHES[3]),
}  # fmt: skip
_FILLS = [PAPER if colour == "white" else colour for colour in NODE_FILL.values()]


def graph_figure(graph: Graph, max_edges: int = 40) -> Figure:
    """Draw the kept nodes of a graph and the strongest of its kept edges.

    Blue solid lines are positive (towards the gold label), red dashed lines are negative. Their
    width grows with the magnitude, and the number in a node is its own score. Edges without a score
    are thin and dotted. MLPs without a line are left out.

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
    # The strongest comes last, over the weaker ones.
    drawn = reversed(list(enumerate(edges)))
    lines = [row for index, edge in drawn for row in _line(graph, edge, layout, index)]
    nodes = [_node(graph, name, place, layout.nodes[name]) for name, place in places.items()]
    total, heads = len(graph.kept_edges), len(graph.heads)
    count = f"{len(edges)} of {total} edges" if len(edges) < total else f"{total} edges"
    strongest = f" The strongest edge is {edge_line(graph, edges[0])}." if edges else ""
    widest = f"The widest line is {abs(edges[0].score or 0):.2g}." if edges else ""
    body = _body(layout, lines, nodes, _letters(layout, edges), _layers(places, layout))
    return spec.figure(
        f"Circuit graph: {heads} heads of {graph.n_layers * graph.n_heads}, {count}",
        f"Layered drawing of a circuit graph, the input at the bottom and the logits on top: "
        f"{heads} heads of {graph.n_layers} layers of {graph.n_heads}, {count} drawn.{strongest}",
        body,
        notes=[
            f"Scores in {graph.unit}. {widest}",
            "q, k, v: read by the queries, keys, values of a head.",
        ],
        width=body["width"],
    )


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


def _line(graph: Graph, edge: Edge, layout: Layout, index: int) -> list[Spec]:
    """Return the points of a line, from the top of its source to the bottom of its target."""
    (x0, y0), (x1, y1) = layout.nodes[edge.source], layout.nodes[edge.target]
    letter = 0.12 if edge.site else 0.0
    end = (x1 + _PORTS[edge.site], y1 - _HIGH / 2 - letter)
    sign = "not scored" if edge.score is None else "negative" if edge.score < 0 else "positive"
    row = {"edge": edge_line(graph, edge), "line": index, "sign": sign}
    row["size"] = abs(edge.score or 0.0)
    spots = [(x0, y0 + _HIGH / 2), *layout.bends[index], end]
    return [{**row, "order": order, "x": x, "y": y} for order, (x, y) in enumerate(spots)]


def _node(graph: Graph, name: str, place: NodePlace, spot: Spot) -> Spec:
    score = graph.nodes[name].score
    x, y = spot
    return {
        "node": name, "kind": place.kind, "x": x,
        "words": "" if score is None else f"{score:+z.2g}",
        "left": x - _WIDE / 2, "right": x + _WIDE / 2, "low": y - _HIGH / 2, "high": y + _HIGH / 2,
        "name_y": y if score is None else y + 0.075, "score_y": y - 0.08,
    }  # fmt: skip


def _letters(layout: Layout, edges: Sequence[Edge]) -> list[Spec]:
    read = dict.fromkeys((edge.target, edge.site) for edge in edges if edge.site)
    return [
        {"site": site, "x": x + _PORTS[site], "y": y - _HIGH / 2 - 0.065}
        for (x, y), site in ((layout.nodes[target], site) for target, site in read)
    ]


def _layers(places: Mapping[str, NodePlace], layout: Layout) -> list[Spec]:
    """Return the names of the rows; the heads of a layer and the MLP above them share one."""
    rows: dict[object, Spec] = {}
    for name, place in places.items():
        ends = place.kind in ("input", "logits")
        row = {"words": name if ends else f"layer {place.layer}", "y": layout.nodes[name][1]}
        rows.setdefault(name if ends else place.layer, row)
    return list(rows.values())


def _body(
    layout: Layout, lines: list[Spec], nodes: list[Spec], letters: list[Spec], layers: list[Spec]
) -> Spec:
    spots = [*layout.nodes.values(), *chain.from_iterable(layout.bends)] or [(0.0, 0.0)]
    across, up = zip(*spots, strict=True)
    left, right, low, high = min(across) - 1.1, max(across) + 0.5, min(up) - 0.4, max(up) + 0.4
    x, y = (
        field(axis, scale={"domain": list(ends), "nice": False, "zero": False}, axis=None)
        for axis, ends in (("x", (left, right)), ("y", (low, high)))
    )
    legend = {"title": None, "columns": 3, "symbolType": "stroke", "symbolStrokeWidth": 2}
    colours, dashes = zip(*_SIGNS.values(), strict=True)
    look = {
        "color": spec.name("sign", legend=legend, **looks(_SIGNS, colours)),
        "strokeDash": spec.name("sign", legend=legend, **looks(_SIGNS, dashes)),
        "size": field("size", scale={"range": [0.7, 4.5], "zero": True}, legend=None),
        "detail": {"field": "line"}, "order": {"field": "order"}, "tooltip": tips(edge="edge"),
    }  # fmt: skip
    box = {
        "x": x | {"field": "left"}, "x2": {"field": "right"}, "y": y | {"field": "low"},
        "y2": {"field": "high"}, "tooltip": tips(node="node", words="score"),
        "fill": spec.name("kind", legend=None, **looks(NODE_FILL, _FILLS)),
    }  # fmt: skip
    node, words, site = (spec.name(key) for key in ("node", "words", "site"))
    curved = {"interpolate": "monotone", "orient": "horizontal", "opacity": 0.85}
    return {
        "width": round(_UNIT * (right - left)), "height": round(_UNIT * (high - low)),
        "usermeta": {"fixed": True},
        "layer": [
            layer("line", lines, "", curved, x=x, y=y, **look),
            layer("rect", nodes, "", {"stroke": INK, "cornerRadius": 3}, **box),
            layer("text", nodes, x=x, y=y | {"field": "name_y"}, text=node),
            layer("text", nodes, "", {"fontSize": 9}, x=x, y=y | {"field": "score_y"}, text=words),
            layer("text", letters, "", {"fontSize": 10}, x=x, y=y, text=site),
            layer("text", layers, "", {"align": "left", "color": MUTED}, y=y, x={"value": 0},
                  text=words),
        ],
    }  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """The positions of a drawing, in units of the drawing.

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
