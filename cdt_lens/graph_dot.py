"""A circuit graph as text for Graphviz (the DOT language): input at the bottom, logits on top.

Blue solid lines are positive (towards the gold label), red dashed ones negative, dotted grey ones
have no score; a line is as wide as its score is large beside the largest one.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from cdt_lens.artists import INK, MUTED, NEGATIVE, POSITIVE
from cdt_lens.graph_nodes import NodePlace, parse_node

if TYPE_CHECKING:
    from cdt_lens.graph import Edge, Graph

_HEAD = """digraph circuit {
  rankdir=BT; nodesep=0.25; ranksep=0.45;
  node [shape=box, style="rounded,filled", fillcolor="white", fontname="Helvetica", fontsize=11];
  edge [fontname="Helvetica", fontsize=9, arrowsize=0.6];
"""
_FILL = {"input": "#d9d9d9", "head": "white", "mlp": "#efefef", "logits": "#d9d9d9"}


def dot_text(graph: Graph, *, kept_only: bool = True) -> str:
    """The kept part of `graph`, or all of it with what is not kept in thin grey outlines."""
    kept_nodes, kept_edges = set(graph.kept_nodes), set(graph.kept_edges)
    names = [name for name in graph.nodes if name in kept_nodes or not kept_only]
    edges = [edge for edge in graph.edges if edge in kept_edges or not kept_only]
    places = {name: parse_node(name, graph.n_layers, graph.n_heads) for name in names}
    largest = max((abs(edge.score or 0.0) for edge in edges), default=0.0) or 1.0
    lines = [_node(graph, name, places[name], name in kept_nodes) for name in names]
    lines += _rows(places)
    lines += [_edge(edge, largest, edge in kept_edges, graph.short_unit) for edge in edges]
    return _HEAD + "".join(f"  {line}\n" for line in lines) + "}\n"


def _node(graph: Graph, name: str, place: NodePlace, kept: bool) -> str:
    score = graph.nodes[name].score
    label = name if score is None else f"{name}\\n{score:+.3g}"
    colours = {"color": INK if kept else "#bbbbbb", "fontcolor": INK if kept else MUTED}
    return f"{_quoted(name)} {_attributes(label=label, fillcolor=_FILL[place.kind], **colours)};"


def _rows(places: dict[str, NodePlace]) -> list[str]:
    """The heads of a layer stand side by side."""
    heads = {name: place.layer for name, place in places.items() if place.kind == "head"}
    rows = groupby(sorted(heads, key=heads.__getitem__), key=heads.__getitem__)
    return [f"{{ rank=same; {' '.join(f'{_quoted(name)};' for name in row)} }}" for _, row in rows]


def _edge(edge: Edge, largest: float, kept: bool, unit: str) -> str:
    score = edge.score
    colour, style, words = MUTED, "dotted", "not scored"
    if score is not None:
        colour, style = (NEGATIVE, "dashed") if score < 0 else (POSITIVE, "solid")
        words = f"{score:+.4g} {unit}".rstrip()
    look = {
        "label": edge.site,
        "color": colour if kept else "#cccccc",
        "style": style,
        "penwidth": f"{0.6 + 3.9 * abs(score or 0.0) / largest if kept else 0.4:.2f}",
        "tooltip": f"{edge.name}: {words}",
    }
    return f"{_quoted(edge.source)} -> {_quoted(edge.target)} {_attributes(**look)};"


def _attributes(**values: str) -> str:
    return f"[{', '.join(f'{name}={_quoted(value)}' for name, value in values.items() if value)}]"


def _quoted(text: str) -> str:
    """A quoted DOT string, whose only escape for itself is that of the quotation mark."""
    return '"' + text.replace('"', '\\"') + '"'
