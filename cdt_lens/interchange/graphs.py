"""Circuits and their graphs in the files of other tools: MIB and EAP-IG, GraphML, Graphviz.

This module reads and writes files by their ending, and converts between graphs and circuits;
`interchange.mib` holds the layouts of MIB. Scores of other tools keep their unit and their sign;
`Graph.unit` names the unit. Their scores may be negative where a head helps.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import torch
from torch import nn

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.graph import Edge, Graph, GraphNode, check_shape
from cdt_lens.circuits.nodes import OTHER_UNIT, Site, node_names, possible_edges
from cdt_lens.core.artifacts import atomic_write
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.interchange.mib import json_text, pt_bytes, read_json, read_pt
from cdt_lens.interchange.mib_schema import count, field_of, flag, number, text_of
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView, view_of


@checked_arguments
def read_graph(path: str | Path) -> Graph:
    """Read a circuit graph: MIB's or EAP-IG's .json or .pt, or .graphml as `write_graph` makes it.

    Every score and membership is read without a change; those of a .pt are float32.

    Args:
        path: The file.

    Returns:
        The graph.

    Raises:
        InputError: No such file, another ending, or a field that is missing or malformed; the
            message names file and field.
        ArtifactError: The file is damaged.
    """
    path = Path(path)
    read = {".json": read_json, ".pt": read_pt, ".graphml": _read_graphml}.get(path.suffix)
    if read is None:
        raise InputError(f"{path}: expected a graph to read from .json, .pt or .graphml")
    return read(path)


@checked_arguments
def write_graph(
    graph: Graph | Circuit,
    path: str | Path,
    *,
    d_model: Count | None = None,
    parallel: bool | None = None,
) -> Path:
    """Write a graph, or the graph of a circuit, as .json, .pt, .graphml or .dot.

    .json and .pt are the formats of MIB and EAP-IG. They hold every edge of the model: at 32 layers
    of 32 heads, 100 MB of JSON or 20 MB of .pt, whose scores are float32. .dot holds only the part
    that belongs to the graph, for Graphviz. A circuit without a graph is written as
    `graph_from_circuit` makes it.

    Args:
        graph: A graph or a circuit.
        path: The file to write; its ending sets the format.
        d_model: Width of the residual stream, which .json and .pt need; None takes that of the
            graph or of the provenance of the circuit.
        parallel: Whether attention and MLP of a layer read the same residual stream; None takes
            that of the graph or of the provenance of the circuit.

    Returns:
        The path.

    Raises:
        InputError: Neither a graph nor a circuit, another ending, a d_model that is not known or
            differs from the graph's, another parallel, or a path that cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".json", ".pt", ".graphml", ".dot"):
        raise InputError(f"{path}: expected a graph to go to .json, .pt, .graphml or .dot")
    if isinstance(graph, Circuit):
        graph = graph_from_circuit(graph, parallel=parallel)
    _same_blocks(graph.parallel, parallel)
    if d_model is not None:
        graph = _with_width(graph, d_model)
    if path.suffix == ".dot":
        return atomic_write(path, graph.to_dot())
    if path.suffix == ".graphml":
        return atomic_write(path, _graphml(graph))
    if graph.d_model is None:
        raise InputError(
            f"{path}: the width of the residual stream is not known, and MIB's files hold it; "
            "give it as d_model"
        )
    write = json_text if path.suffix == ".json" else pt_bytes
    return atomic_write(path, write(graph, graph.d_model))


@checked_arguments
def graph_from_circuit(circuit: Circuit, *, parallel: bool | None = None) -> Graph:
    """Return the graph of a circuit; a circuit of heads alone is given every edge between them.

    The heads of the circuit belong to that graph, with their scores. The input, the MLPs and the
    logits belong to it without a score, and so does every direct edge between nodes that belong to
    it.
    MIB evaluates a circuit of nodes in this way: it ranks the nodes that have a score
    (`--level node`), keeps those that have none, and keeps every edge between kept nodes.

    Args:
        circuit: The circuit.
        parallel: Whether attention and MLP of a layer read the same residual stream (as in
            Pythia); None takes it from the graph or the provenance of the circuit.

    Returns:
        The graph.

    Raises:
        InputError: Not a circuit, or a `parallel` that is not known or differs from the recorded.
    """
    recorded = {} if circuit.provenance is None else circuit.provenance.model_shape
    d_model = recorded.get("d_model")
    if circuit.graph is not None:
        _same_blocks(circuit.graph.parallel, parallel)
        return replace(circuit.graph, d_model=circuit.graph.d_model or d_model)
    known = recorded.get("parallel")
    if known is not None:
        _same_blocks(bool(known), parallel)
        parallel = bool(known)
    if parallel is None:
        raise InputError(
            "graph_from_circuit: the circuit does not tell whether attention and MLP of a layer "
            "read the same stream; give parallel=True (as in Pythia) or parallel=False"
        )
    shape = (circuit.n_layers, circuit.n_heads)
    inside = {str(head) for head in circuit.heads}
    nodes = {
        name: GraphNode(_score(circuit, name), name in inside or not name.startswith("L"))
        for name in node_names(*shape)
    }
    edges = tuple(
        Edge(source, target, site, None)
        for source, target, site in possible_edges(*shape, parallel=parallel)
        if nodes[source].in_graph and nodes[target].in_graph
    )
    return Graph(*shape, nodes, edges, d_model=d_model, parallel=parallel, direct=True)


@checked_arguments
@uses_model
def circuit_from_graph(graph: Graph, model: nn.Module | ModelView | None = None) -> Circuit:
    """Return the circuit of the heads that belong to a graph, with their scores and the graph.

    Args:
        graph: The graph.
        model: The model that the graph is of, to check the shape against.

    Returns:
        The circuit, with the graph.

    Raises:
        InputError: Not a graph, or a model of another shape; the message names the field.
    """
    if model is not None:
        check_shape(graph, view_of(model))
    scores = torch.full((graph.n_layers, graph.n_heads), torch.nan, dtype=torch.float64)
    for head in all_heads(graph.n_layers, graph.n_heads):
        node = graph.nodes.get(str(head))
        if node is not None and node.score is not None:
            scores[head.layer, head.head] = node.score
    return Circuit(
        heads=graph.heads,
        n_layers=graph.n_layers,
        n_heads=graph.n_heads,
        scores=None if scores.isnan().all() else scores,
        selection={"method": "graph", "rule": "heads in the graph", "unit": graph.unit},
        graph=graph,
    )


def _same_blocks(known: bool, given: bool | None) -> None:
    if given not in (None, known):
        raise InputError(f"parallel={given}, the graph's is {known}; leave it out")


def _with_width(graph: Graph, d_model: int) -> Graph:
    if graph.d_model not in (None, d_model):
        raise InputError(
            f"write_graph: d_model={d_model}, the graph's is {graph.d_model}; leave it out"
        )
    return replace(graph, d_model=d_model)


def _score(circuit: Circuit, name: str) -> float | None:
    if circuit.scores is None or not name.startswith("L"):
        return None
    head = Head.parse(name)
    value = float(circuit.scores[head.layer, head.head])
    return None if value != value else value


def _graphml(graph: Graph) -> str:
    import networkx  # only here: it takes a moment to import

    made = graph.to_networkx()
    names = {(e.source, e.target, e.site): e.name for e in graph.edges}
    networkx.set_edge_attributes(made, names, "name")
    return "\n".join(networkx.generate_graphml(made, edge_id_from_attribute="name")) + "\n"


def _read_graphml(path: Path) -> Graph:
    import networkx  # only here: it takes a moment to import

    try:
        text = path.read_text("utf-8")
        parsed = networkx.parse_graphml(text, edge_key_type=str, force_multigraph=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ParseError, networkx.NetworkXError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path}: damaged: not whole GraphML ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    shape: dict[str, Any] = {
        name: count(field_of(parsed.graph, name, str(path)), f"{path}: {name}")
        for name in ("n_layers", "n_heads")
    }
    d_model = parsed.graph.get("d_model")
    shape["d_model"] = None if d_model is None else count(d_model, f"{path}: d_model")
    shape["parallel"] = flag(field_of(parsed.graph, "parallel", str(path)), f"{path}: parallel")
    shape["unit"] = text_of(parsed.graph.get("unit", OTHER_UNIT), f"{path}: unit")
    direct = parsed.graph.get("direct", shape["unit"] == OTHER_UNIT)
    shape["direct"] = flag(direct, f"{path}: direct")
    nodes = {
        name: GraphNode(*_values(data, f"{path}: {name}")) for name, data in parsed.nodes.items()
    }
    edges = tuple(
        Edge(source, target, _site(data, at), *_values(data, at))
        for source, target, data in parsed.edges(data=True)
        for at in (f"{path}: {source}->{target}",)
    )
    try:
        return Graph(nodes=nodes, edges=edges, **shape)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _site(data: dict[str, Any], at: str) -> Site:
    # GraphML has no empty text: what reads at one place alone has no site.
    site = data.get("site", "")
    if site not in ("q", "k", "v", ""):
        raise InputError(f"{at}: site: expected q, k, v or nothing, got {site!r}")
    return site


def _values(data: dict[str, Any], at: str) -> tuple[float | None, bool]:
    score = data.get("score")
    kept = flag(field_of(data, "in_graph", at), f"{at}: in_graph")
    return None if score is None else number(score, f"{at}: score"), kept
