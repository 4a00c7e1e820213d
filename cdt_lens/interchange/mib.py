"""Circuit graphs in the two layouts of MIB and EAP-IG (arXiv 2504.13151, 2403.17806).

1. JSON: `cfg` (n_layers, n_heads, parallel_attn_mlp, d_model), `nodes` by name (in_graph and, where
   scored, score), `edges` by name (score, in_graph). Numbers are kept to the last bit.
2. .pt: tensors [source, target] in the order of `src_nodes` and `dst_nodes`: `edges_scores`
   (float32), `edges_in_graph`, and `nodes_in_graph`, `nodes_scores` (NaN: not scored) by source.
   Cells that are no edge of any model are ignored, as EAP-IG keeps memberships there as well.
   The logits always belong to the graph.
3. A file holds every edge of the model, as EAP-IG counts and looks up all of them; one without a
   score has 0.
4. Three keys are this package's own, and other tools ignore them: `edges_scored` names the edges
   that have a score (without it all have one), `unit` is the unit of the scores, and `edges_direct`
   tells whether an edge is the direct path alone. Without it that is so where no `unit` is given.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from cdt_lens.circuits.graph import Edge, Graph, GraphNode
from cdt_lens.circuits.nodes import (
    LOGITS,
    OTHER_UNIT,
    edge_name,
    node_names,
    possible_edges,
    readers,
    why_no_edge,
)
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.core.process_wide import ignored
from cdt_lens.interchange.mib_schema import (
    MibModel,
    field_of,
    flag,
    mapping,
    names,
    number,
    repeated,
    tensor,
    their_name,
)

_OUTSIDE = GraphNode(None, False)


def read_json(path: Path) -> Graph:
    """Read the graph in a JSON file.

    Args:
        path: The file.

    Raises:
        InputError: No such file, or a field that is missing, malformed or of another model's
            shape.
        ArtifactError: The file is not whole JSON.
    """
    document = mapping(_json(path), str(path))
    if "format" in document and "cfg" not in document:
        raise InputError(
            f"{path}: expected a graph as MIB writes it, got a {document['format']} file; "
            "cdt_lens.Circuit.load reads circuits of this package"
        )
    model = MibModel.read(document, path)
    nodes = {}
    for text, values in mapping(field_of(document, "nodes", str(path)), f"{path}: nodes").items():
        at = f"{path}: nodes[{text!r}]"
        name, _ = model.node(text, at)
        nodes[name] = _json_node(mapping(values, at), at)
    entries = mapping(field_of(document, "edges", str(path)), f"{path}: edges")
    scored = set(names(document.get("edges_scored", list(entries)), f"{path}: edges_scored"))
    if not scored <= set(entries):
        missing = min(scored - set(entries))
        raise InputError(f"{path}: edges_scored: {missing!r} is not among the edges")
    edges = []
    for text, values in entries.items():
        at = f"{path}: edges[{text!r}]"
        ends = model.edge(text, at)
        score = number(field_of(mapping(values, at), "score", at), f"{at}.score")
        kept = flag(field_of(values, "in_graph", at), f"{at}.in_graph")
        if text in scored or kept:
            edges.append(Edge(*ends, score if text in scored else None, kept))
    return _graph(model, nodes, edges)


def json_text(graph: Graph, d_model: int) -> str:
    """Return a graph as JSON, for a residual stream of width `d_model`."""
    nodes: dict[str, dict[str, Any]] = {}
    for name in node_names(graph.n_layers, graph.n_heads):
        node = graph.nodes.get(name, GraphNode(None, name == LOGITS))
        own = {} if node.score is None else {"score": node.score}
        nodes[their_name(name)] = {"in_graph": node.in_graph, **own}
    held = {(edge.source, edge.target, edge.site): edge for edge in graph.edges}
    edges: dict[str, dict[str, Any]] = {}
    scored = []
    for ends in possible_edges(graph.n_layers, graph.n_heads, parallel=graph.parallel):
        source, target, site = ends
        edge = held.get(ends, Edge(source, target, site, None, False))
        name = edge_name(their_name(source), their_name(target), site)
        score = 0.0 if edge.score is None else edge.score
        edges[name] = {"score": score, "in_graph": edge.in_graph}
        scored += [] if edge.score is None else [name]
    document: dict[str, Any] = {"cfg": _cfg(graph, d_model), "nodes": nodes, "edges": edges}
    document |= _own_keys(graph)
    if len(scored) < len(edges):
        document["edges_scored"] = scored
    return json.dumps(document, allow_nan=False)


def read_pt(path: Path) -> Graph:
    """Read the graph in a .pt file, loaded as tensors and plain values alone.

    Args:
        path: The file.

    Raises:
        InputError: No such file, or a field that is missing, malformed or of another model's
            shape.
        ArtifactError: The file is damaged, or holds more than tensors and plain values.
    """
    where = str(path)
    document = mapping(_loaded(path), where)
    model = MibModel.read(document, path)
    _refuse_neurons(document, where)
    sources, targets = (
        names(field_of(document, key, where), f"{path}: {key}")
        for key in ("src_nodes", "dst_nodes")
    )
    rows = [model.node(text, f"{path}: src_nodes") for text in sources]
    columns = [model.reader(text, f"{path}: dst_nodes") for text in targets]
    by_source, by_edge = (len(rows),), (len(rows), len(columns))

    def table(key: str, shape: tuple[int, ...], *, flags: bool = False) -> list[Any]:
        return tensor(field_of(document, key, where), shape, f"{path}: {key}", flags=flags).tolist()

    inside = table("nodes_in_graph", by_source, flags=True)
    own = [math.nan] * len(rows)
    if document.get("nodes_scores") is not None:
        own = table("nodes_scores", by_source)
    nodes = {}
    for (name, _), text, value, kept in zip(rows, sources, own, inside, strict=True):
        at = f"{path}: nodes_scores[{text!r}]"
        nodes[name] = GraphNode(None if math.isnan(value) else number(value, at), kept)
    scores, members = table("edges_scores", by_edge), table("edges_in_graph", by_edge, flags=True)
    known = table("edges_scored", by_edge, flags=True) if "edges_scored" in document else None
    edges = []
    for i, (source, start) in enumerate(rows):
        for j, (target, end, site) in enumerate(columns):
            scored, kept = known is None or known[i][j], members[i][j]
            real = why_no_edge(start, end, site, parallel=model.parallel) is None
            if real and (scored or kept):
                at = f"{path}: edges_scores[{sources[i]!r}, {targets[j]!r}]"
                score = number(scores[i][j], at) if scored else None
                edges.append(Edge(source, target, site, score, kept))
    return _graph(model, nodes, edges)


def pt_bytes(graph: Graph, d_model: int) -> bytes:
    """Return a graph as a .pt file, for a residual stream of width `d_model`.

    Raises:
        InputError: A score that float32 cannot hold.
    """
    sources = node_names(graph.n_layers, graph.n_heads)[:-1]
    targets = readers(graph.n_layers, graph.n_heads)
    row = {name: index for index, name in enumerate(sources)}
    column = {target: index for index, target in enumerate(targets)}
    scores = torch.zeros(len(row), len(column))
    kept, scored = torch.zeros_like(scores).bool(), torch.zeros_like(scores).bool()
    cells = (
        torch.tensor([row[edge.source] for edge in graph.edges], dtype=torch.long),
        torch.tensor([column[edge.target, edge.site] for edge in graph.edges], dtype=torch.long),
    )
    kept[cells] = torch.tensor([edge.in_graph for edge in graph.edges], dtype=torch.bool)
    scored[cells] = torch.tensor([e.score is not None for e in graph.edges], dtype=torch.bool)
    scores[cells] = torch.tensor([edge.score or 0.0 for edge in graph.edges])
    nodes = [graph.nodes.get(name, _OUTSIDE) for name in sources]
    own = torch.tensor([math.nan if node.score is None else node.score for node in nodes])
    if scores.isinf().any() or own.isinf().any():
        raise InputError("write_graph: a score is too large for the float32 of .pt; write .json")
    document: dict[str, Any] = {
        "cfg": _cfg(graph, d_model),
        "src_nodes": [their_name(name) for name in sources],
        "dst_nodes": [their_name(name) + (f"<{site}>" if site else "") for name, site in targets],
        "edges_scores": scores,
        "edges_in_graph": kept,
        "nodes_in_graph": torch.tensor([node.in_graph for node in nodes]),
        **_own_keys(graph),
    }
    if not own.isnan().all():
        document["nodes_scores"] = own
    possible = possible_edges(graph.n_layers, graph.n_heads, parallel=graph.parallel)
    if int(scored.sum()) < sum(1 for _ in possible):
        document["edges_scored"] = scored
    buffer = io.BytesIO()
    torch.save(document, buffer)
    return buffer.getvalue()


def _graph(model: MibModel, nodes: Mapping[str, GraphNode], edges: Iterable[Edge]) -> Graph:
    """Make the graph; nodes that only edges name are outside it, the logits always inside."""
    edges = tuple(edges)
    everything = {**nodes}
    everything.setdefault(LOGITS, GraphNode(None, True))
    for end in (end for edge in edges for end in (edge.source, edge.target)):
        everything.setdefault(end, _OUTSIDE)
    return Graph(
        model.n_layers, model.n_heads, everything, edges, d_model=model.d_model,
        parallel=model.parallel, unit=model.unit, direct=model.direct,
    )  # fmt: skip


def _json_node(values: Mapping[str, Any], at: str) -> GraphNode:
    _refuse_neurons(values, at)
    score = number(values["score"], f"{at}.score") if "score" in values else None
    return GraphNode(score, flag(field_of(values, "in_graph", at), f"{at}.in_graph"))


def _refuse_neurons(values: Mapping[str, Any], at: str) -> None:
    """Refuse a part of a node: reading it as the whole node would change the circuit."""
    for name in ("neurons", "neurons_in_graph"):
        if values.get(name) is not None:
            raise InputError(
                f"{at}: {name}: a circuit of single neurons; expected one of whole heads and MLPs"
            )


def _json(path: Path) -> Any:
    try:
        return json.loads(_bytes(path), object_pairs_hook=lambda pairs: _once(pairs, path))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: damaged: not whole JSON ({error})") from error


def _once(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = repeated(text for text, _ in pairs)
        raise InputError(f"{path}: {twice!r} is there twice; keep one of the two")
    return values


def _loaded(path: Path) -> Any:
    payload = _bytes(path)
    try:
        with ignored():  # torch's advice on how to load what is damaged
            return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # damage shows in as many ways as a pickle has instructions
        why = (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise ArtifactError(
            f"{path}: damaged, or it holds more than tensors and plain values, which are all that "
            f"is loaded from a .pt ({why})"
        ) from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def _own_keys(graph: Graph) -> dict[str, Any]:
    foreign = graph.unit == OTHER_UNIT
    own: dict[str, Any] = {} if foreign else {"unit": graph.unit}
    return own if graph.direct == foreign else own | {"edges_direct": graph.direct}


def _cfg(graph: Graph, d_model: int) -> dict[str, Any]:
    return {
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads,
        "parallel_attn_mlp": graph.parallel,
        "d_model": d_model,
    }
