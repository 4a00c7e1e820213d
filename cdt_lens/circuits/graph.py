"""`Graph`: the edges between the nodes of a circuit; it needs no model.

The nodes are the embeddings, heads, MLPs and the logits (`nodes`). An edge is the part of its
target's input that its source wrote into the residual stream. A direct edge is only what the source
itself wrote; otherwise an edge stands for all paths between its ends. Scores are signed, in logits:
positive pushes towards the gold label. None means not scored. Scores from a file of another tool
keep that tool's unit and sign, which `unit` states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import pandas as pd

from cdt_lens.circuits.nodes import (
    INPUT,
    LOGITS,
    OWN_UNIT,
    NodePlace,
    Site,
    check_size,
    edge_name,
    parse_node,
    why_no_edge,
)
from cdt_lens.core import display
from cdt_lens.core.checked import checked_arguments, plain
from cdt_lens.core.choices import Count, FromZeroCount
from cdt_lens.core.display import INK, MUTED, NEGATIVE, POSITIVE
from cdt_lens.core.equality import EqualByContent
from cdt_lens.core.errors import InputError
from cdt_lens.models.heads import Head
from cdt_lens.models.view import ModelView

_HEAD = """digraph circuit {
  rankdir=BT; nodesep=0.25; ranksep=0.45;
  node [shape=box, style="rounded,filled", fillcolor="white", fontname="Helvetica", fontsize=11];
  edge [fontname="Helvetica", fontsize=9, arrowsize=0.6];
"""
NODE_FILL = {"input": "#d9d9d9", "head": "white", "mlp": "#efefef", "logits": "#d9d9d9"}

_SHAPE = ("n_layers", "n_heads", "d_model", "parallel", "unit", "direct")


@dataclass(frozen=True)
class GraphNode:
    """A node of a graph.

    Args:
        score: Its score in logits; None if it was not scored.
        in_graph: Whether it belongs to the circuit.
    """

    score: float | None
    in_graph: bool

    def __post_init__(self) -> None:
        _plain_fields(self)


@dataclass(frozen=True)
class Edge:
    """An edge of a graph.

    Args:
        source: Name of the node that writes.
        target: Name of the node that reads.
        site: "q", "k" or "v" if the target is a head, else "".
        score: Its score in logits (positive = towards the gold label), or in the graph's unit; None
            if it was not scored.
        in_graph: Whether it belongs to the circuit.
    """

    source: str
    target: str
    site: Site
    score: float | None
    in_graph: bool = True

    def __post_init__(self) -> None:
        _plain_fields(self)

    @property
    def name(self) -> str:
        """The name of the edge, such as "L0H1->L9H6<q>"."""
        return edge_name(self.source, self.target, self.site)


@dataclass(frozen=True, eq=False)
class Graph(EqualByContent):
    """Nodes and edges of one model, with their scores and the circuit among them.

    Args:
        n_layers: Number of layers of the model.
        n_heads: Number of heads per layer.
        nodes: Nodes by name; at least those that the edges name.
        edges: Edges that were scored or kept; not necessarily all of the model.
        d_model: Width of the residual stream, if known.
        parallel: Whether attention and MLP of a layer read the same residual stream.
        unit: Unit of the scores, in words.
        direct: Whether each edge is the direct path from source to target alone, as in EAP-IG;
            otherwise it stands for all paths between them, as in `trace_circuit`.

    Raises:
        InputError: The model has no such node, an edge names a node that is missing or runs against
            the residual stream, an edge is given twice, or a score is not finite.
    """

    n_layers: int
    n_heads: int
    nodes: Mapping[str, GraphNode] = field(repr=False)
    edges: tuple[Edge, ...] = field(repr=False)
    d_model: int | None = None
    parallel: bool = False
    unit: str = OWN_UNIT
    direct: bool = False
    _advice = "read_graph(path) or trace_circuit(...) makes one"

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", dict(self.nodes))
        object.__setattr__(self, "edges", tuple(self.edges))
        check_size(self.n_layers, self.n_heads, "graph")
        if self.d_model is not None and self.d_model < 1:
            raise InputError(f"graph: d_model={self.d_model}, expected at least 1")
        places = {name: parse_node(name, self.n_layers, self.n_heads) for name in self.nodes}
        for name, node in self.nodes.items():
            _check_score(node.score, f"node {name}")
        seen: set[str] = set()
        for edge in self.edges:
            _check_edge(edge, places, self.parallel)
            if edge.name in seen:
                raise InputError(f"graph: edge {edge.name}: given twice; keep one of the two")
            seen.add(edge.name)

    def __repr__(self) -> str:
        kept = f"{len(self.kept_nodes)} nodes and {len(self.kept_edges)} edges"
        return f"Graph({kept} of {self.n_layers} layers of {self.n_heads} heads)"

    @property
    def short_unit(self) -> str:
        """ "logits", or "" where the scores are another tool's."""
        return "logits" if self.unit == OWN_UNIT else ""

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads that belong to the circuit, in order."""
        places = (parse_node(name, self.n_layers, self.n_heads) for name in self.kept_nodes)
        return tuple(sorted(Head(p.layer, p.head) for p in places if p.kind == "head"))

    @property
    def kept_nodes(self) -> tuple[str, ...]:
        """Names of the nodes that belong to the circuit."""
        return tuple(name for name, node in self.nodes.items() if node.in_graph)

    @property
    def kept_edges(self) -> tuple[Edge, ...]:
        """The edges that belong to the circuit, as do both of their nodes."""
        return tuple(
            edge
            for edge in self.edges
            if edge.in_graph
            and self.nodes[edge.source].in_graph
            and self.nodes[edge.target].in_graph
        )

    @checked_arguments
    def top_edges(self, k: FromZeroCount, *, kept_only: bool = True) -> tuple[Edge, ...]:
        """Return the scored edges of largest magnitude, the largest first.

        Args:
            k: Maximum number of edges.
            kept_only: Whether to leave out edges outside the circuit.

        Raises:
            InputError: `k` is negative.
        """
        edges = self.kept_edges if kept_only else self.edges
        scored = [(abs(edge.score), edge) for edge in edges if edge.score is not None]
        return tuple(edge for _, edge in sorted(scored, key=lambda pair: -pair[0])[:k])

    def pruned(self) -> Graph:
        """Return the graph whose circuit holds only paths of kept edges to the logits.

        In a graph of direct edges these paths start at the input, as EAP-IG prunes. The scores
        stay. Nodes off such a path, and edges that are on none, leave the circuit.
        """
        reached = {LOGITS} & set(self.kept_nodes)
        inside: set[str] = set()
        # The last readers first: whether a target is on a path is known before its sources are.
        for edge in reversed(self._fed_edges()):
            if edge.target in reached:
                reached.add(edge.source)
                inside.add(edge.name)
        return replace(
            self,
            nodes={name: replace(n, in_graph=name in reached) for name, n in self.nodes.items()},
            edges=tuple(replace(edge, in_graph=edge.name in inside) for edge in self.edges),
        )

    def _fed_edges(self) -> list[Edge]:
        """Return the kept edges by rising step of the target.

        Of direct edges, those are left out whose source has no path of kept edges from the input.
        """
        places = {name: parse_node(name, self.n_layers, self.n_heads) for name in self.nodes}
        edges = sorted(self.kept_edges, key=lambda e: places[e.target].step(self.parallel))
        if not self.direct:
            return edges
        fed = {INPUT}
        found = []
        for edge in edges:
            if edge.source in fed:
                fed.add(edge.target)
                found.append(edge)
        return found

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per edge: source, target, site, score, and whether it is kept."""
        columns = ["source", "target", "site", "score", "in_graph"]
        rows = [(e.source, e.target, e.site, e.score, e.in_graph) for e in self.edges]
        return pd.DataFrame(rows, columns=columns).astype({"score": float, "in_graph": bool})

    def to_networkx(self) -> Any:
        """Return a `networkx.MultiDiGraph` in which the key of an edge is its site.

        Nodes and edges have the attributes in_graph and, if scored, score; edges have site as well.
        The graph has n_layers, n_heads, parallel, unit, direct and, if known, d_model.
        """
        import networkx  # only here: it takes a moment to import

        made = networkx.MultiDiGraph(**_known(**_shape(self)))
        for name, node in self.nodes.items():
            made.add_node(name, **_known(score=node.score, in_graph=node.in_graph))
        for edge in self.edges:
            values = _known(site=edge.site, score=edge.score, in_graph=edge.in_graph)
            made.add_edge(edge.source, edge.target, edge.site, **values)
        return made

    @checked_arguments
    def to_dot(self, kept_only: bool = True) -> str:
        """Return the graph in the DOT language of Graphviz, with the input at the bottom.

        Blue edges are positive, red dashed edges negative, dotted edges not scored. The width of a
        line grows with the magnitude of its score.

        Args:
            kept_only: Whether to leave out what does not belong to the circuit.
        """
        return dot_text(self, kept_only=kept_only)

    @checked_arguments
    def plot(self, max_edges: Count = 40) -> display.Figure:
        """Drawing of the kept nodes, layers upwards, with the strongest kept edges."""
        return display.figure(self, max_edges=max_edges)

    def _repr_html_(self) -> str:
        return display.page(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested values for a file; an edge is a row as in `to_dataframe`."""
        nodes = {name: [node.score, node.in_graph] for name, node in self.nodes.items()}
        edges = [[e.source, e.target, e.site, e.score, e.in_graph] for e in self.edges]
        shape = {name: value for name, value in _shape(self).items() if name != "direct"}
        # Without this key an edge stands for all paths, as in the files of earlier versions.
        direct = {"direct": True} if self.direct else {}
        return {**shape, **direct, "nodes": nodes, "edges": edges}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Graph:
        """Return the graph of the values that `to_dict` returned.

        Args:
            values: Plain nested values.

        Raises:
            InputError: The values describe no graph.
            KeyError, TypeError: A part is missing.
        """
        return cls(
            nodes={name: GraphNode(*row) for name, row in values["nodes"].items()},
            edges=tuple(Edge(*row) for row in values["edges"]),
            **{name: values[name] for name in _SHAPE if name != "direct"},
            direct=values.get("direct", False),
        )


def _shape(graph: Graph) -> dict[str, Any]:
    return {name: getattr(graph, name) for name in _SHAPE}


def _known(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _plain_fields(part: GraphNode | Edge) -> None:
    """Make numbers of numpy and torch Python's, as files need them."""
    if part.score is not None and type(part.score) is not float:
        object.__setattr__(part, "score", float(plain(part.score)))
    object.__setattr__(part, "in_graph", bool(part.in_graph))


def _check_score(score: float | None, whose: str) -> None:
    if score is not None and not math.isfinite(score):
        raise InputError(
            f"graph: {whose}.score: expected a finite number of logits, or None where it was not "
            f"scored; got {score}"
        )


def _check_edge(edge: Edge, places: Mapping[str, NodePlace], parallel: bool) -> None:
    where = f"graph: edge {edge.name}"
    for end in (edge.source, edge.target):
        if end not in places:
            raise InputError(f"{where}: node {end!r} is not among the nodes; add it to them")
    source, target = places[edge.source], places[edge.target]
    why = why_no_edge(source, target, edge.site, parallel=parallel)
    if why is not None:
        raise InputError(f"{where}: {why}")
    _check_score(edge.score, f"edge {edge.name}")


def check_shape(graph: Graph, view: ModelView) -> None:
    """Refuse a graph of a model of another shape.

    Args:
        graph: The graph.
        view: The model.

    Raises:
        InputError: The shapes differ; the message names the field.
    """
    shapes = {
        "n_layers": (graph.n_layers, view.n_layers),
        "n_heads": (graph.n_heads, view.n_heads),
        "d_model": (graph.d_model, view.d_model),
        "parallel_attn_mlp": (graph.parallel, view.parallel),
    }
    for name, (ours, theirs) in shapes.items():
        if ours is not None and ours != theirs:
            raise InputError(
                f"cfg.{name}: {ours}, the model has {theirs}; use the model that the graph is of"
            )


def dot_text(graph: Graph, *, kept_only: bool = True) -> str:
    """Write a graph in the DOT language.

    Args:
        graph: The graph.
        kept_only: Whether to leave out what does not belong to the circuit; otherwise it is drawn
            in thin grey lines.
    """
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
    return (
        f"{_quoted(name)} {_attributes(label=label, fillcolor=NODE_FILL[place.kind], **colours)};"
    )


def _rows(places: dict[str, NodePlace]) -> list[str]:
    """Put the heads of a layer side by side."""
    heads = {name: place.layer for name, place in places.items() if place.kind == "head"}
    rows = groupby(sorted(heads, key=heads.__getitem__), key=heads.__getitem__)
    return [f"{{ rank=same; {' '.join(f'{_quoted(name)};' for name in row)} }}" for _, row in rows]


def _edge(edge: Edge, largest: float, kept: bool, unit: str) -> str:
    score = edge.score
    colour, style, words = MUTED, "dotted", "not scored"
    if score is not None:
        colour, style = (NEGATIVE, "dashed") if score < 0 else (POSITIVE, "solid")
        words = f"{score:+.4g} {unit}".rstrip()
    attributes = {
        "label": edge.site,
        "color": colour if kept else "#cccccc",
        "style": style,
        "penwidth": f"{0.6 + 3.9 * abs(score or 0.0) / largest if kept else 0.4:.2f}",
        "tooltip": f"{edge.name}: {words}",
    }
    return f"{_quoted(edge.source)} -> {_quoted(edge.target)} {_attributes(**attributes)};"


def _attributes(**values: str) -> str:
    return f"[{', '.join(f'{name}={_quoted(value)}' for name, value in values.items() if value)}]"


def _quoted(text: str) -> str:
    """Return a quoted DOT string, in which only the quotation mark is escaped."""
    return '"' + text.replace('"', '\\"') + '"'
