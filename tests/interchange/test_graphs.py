"""Graphs of MIB and EAP-IG, GraphML: read and written without loss, or refused by field and file."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import sample_graph as sample, sample_results
from helpers.checks import unchecked_types
from helpers.places import DATA
from helpers.shared import models, shared
from helpers.tiny_tasks import examples

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.graph import Edge, Graph, GraphNode
from cdt_lens.circuits.nodes import OTHER_UNIT, OWN_UNIT, node_names, possible_edges
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.interchange.graphs import (
    circuit_from_graph,
    graph_from_circuit,
    read_graph,
    write_graph,
)
from cdt_lens.models.heads import Head
from cdt_lens.scoring.direct_edges import edge_attribution_patching
from cdt_lens.scoring.iterative import trace_circuit
from cdt_lens.scoring.one_pass import one_pass

ENDINGS = [".json", ".pt", ".graphml"]


def complete(*, parallel: bool = False, seed: int = 0) -> Graph:
    """A graph as another tool leaves it: every edge of 2 layers of 3 heads has a score."""
    draw = torch.Generator().manual_seed(seed)
    names = node_names(2, 3)
    listed = list(possible_edges(2, 3, parallel=parallel))
    scores = torch.randn(len(listed) + len(names), generator=draw).tolist()
    kept = (torch.rand(len(listed) + len(names), generator=draw) < 0.4).tolist()
    # Some nodes without a score, and none for the logits, which a .pt has no place for.
    nodes = {
        name: GraphNode(None if n % 4 == 0 or name == "logits" else scores.pop(), kept.pop())
        for n, name in enumerate(names)
    }
    nodes["logits"] = GraphNode(None, True)
    edges = tuple(
        Edge(*ends, score, member)
        for ends, score, member in zip(listed, scores, kept, strict=False)
    )
    return Graph(2, 3, nodes, edges, d_model=12, parallel=parallel, unit=OTHER_UNIT, direct=True)


def known(graph: Graph) -> dict[str, tuple[float | None, bool]]:
    """Score and membership of every edge that has either."""
    return {
        edge.name: (edge.score, edge.in_graph)
        for edge in graph.edges
        if edge.score is not None or edge.in_graph
    }


def assert_same(one: Graph, other: Graph) -> None:
    assert known(one) == known(other)
    outside = GraphNode(None, False)
    for name in node_names(one.n_layers, one.n_heads):
        if name != "logits":
            assert one.nodes.get(name, outside) == other.nodes.get(name, outside), name
    for field in ("n_layers", "n_heads", "d_model", "parallel", "unit", "direct"):
        assert getattr(one, field) == getattr(other, field), field


def as_float32(graph: Graph) -> Graph:
    def rounded(score: float | None) -> float | None:
        return None if score is None else float(torch.tensor(score, dtype=torch.float32))

    return replace(
        graph,
        nodes={
            name: replace(node, score=rounded(node.score)) for name, node in graph.nodes.items()
        },
        edges=tuple(replace(edge, score=rounded(edge.score)) for edge in graph.edges),
    )


# There and back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    "graph",
    [
        complete(),
        complete(parallel=True, seed=1),
        sample.small(),
        replace(sample.small(), direct=True),
        sample.large(6, 3, heads=8, edges=20, parallel=True),
        replace(sample.small(), unit=OTHER_UNIT, edges=()),
    ],
)
def test_every_score_and_membership_comes_back(ending: str, graph: Graph, tmp_path: Path):
    path = write_graph(graph, tmp_path / f"g{ending}")
    assert_same(read_graph(path), as_float32(graph) if ending == ".pt" else graph)


@pytest.mark.parametrize("ending", ENDINGS)
def test_zeros_and_tiny_numbers_are_scores_like_others(ending: str, tmp_path: Path):
    nodes = {name: GraphNode(None, True) for name in node_names(1, 2)}
    values = (0.0, 1e-30, -1e-30, 2.0**-126)
    edges = tuple(
        Edge(*ends, score, False) for ends, score in zip(possible_edges(1, 2), values, strict=False)
    )
    graph = Graph(1, 2, nodes, edges, d_model=4)
    found = read_graph(write_graph(graph, tmp_path / f"g{ending}"))
    assert_same(found, as_float32(graph) if ending == ".pt" else graph)


def test_json_and_pt_of_one_graph_agree(tmp_path: Path):
    graph = as_float32(complete())
    one, other = (read_graph(write_graph(graph, tmp_path / f"g{e}")) for e in (".json", ".pt"))
    assert_same(one, other)


# The layouts ---------------------------------------------------------------------------------------


def test_the_json_names_every_part_as_mib_does(tmp_path: Path):
    document = json.loads(write_graph(sample.small(), tmp_path / "g.json").read_text())
    assert document["cfg"] == {
        "n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8,
    }  # fmt: skip
    assert list(document["nodes"]) == [
        "input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1", "logits",
    ]  # fmt: skip
    assert document["nodes"]["a0.h1"] == {"in_graph": True, "score": 0.2}
    assert document["nodes"]["m0"] == {"in_graph": True}
    assert document["edges"]["a0.h1->a1.h0<q>"] == {"score": -0.25, "in_graph": True}
    assert document["edges"]["a0.h1->a1.h0<k>"] == {"score": 0.0, "in_graph": False}
    assert document["edges"]["input->m0"] == {"score": 0.0, "in_graph": True}
    assert len(document["edges"]) == sum(1 for _ in possible_edges(2, 2))
    assert "input->m0" not in document["edges_scored"] and len(document["edges_scored"]) == 7
    assert document["unit"] == OWN_UNIT


def test_a_file_of_another_tool_gets_no_key_that_it_does_not_know(tmp_path: Path):
    for ending in (".json", ".pt"):
        path = write_graph(complete(), tmp_path / f"g{ending}")
        found = json.loads(path.read_text()) if ending == ".json" else torch.load(path)
        known_keys = {"cfg", "nodes", "edges"} if ending == ".json" else {
            "cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph", "nodes_in_graph",
            "nodes_scores",
        }  # fmt: skip
        assert set(found) == known_keys


def test_the_pt_stands_in_the_order_of_eap_ig(tmp_path: Path):
    """Rows: input, then heads and MLP of each layer; columns: q, k, v and MLP of each layer."""
    graph = sample.small()
    found = torch.load(write_graph(graph, tmp_path / "g.pt"), weights_only=True)
    assert found["edges_scores"].shape == found["edges_in_graph"].shape == (1 + 2 * 3, 2 * 7 + 1)
    assert found["edges_scores"].dtype == found["nodes_scores"].dtype == torch.float32
    assert found["edges_in_graph"].dtype == found["nodes_in_graph"].dtype == torch.bool

    def row(layer: int, head: int) -> int:
        return 1 + layer * 3 + head

    def column(layer: int, site: str, head: int) -> int:
        return layer * 7 + ("qkv".index(site) * 2 + head if site else 6)

    # L0H1 -> L1H0 by its queries, M0 (the row behind the heads) -> L1H0 by its values, -> logits.
    assert found["edges_scores"][row(0, 1), column(1, "q", 0)] == -0.25
    assert found["edges_scores"][row(0, 2), column(1, "v", 0)] == pytest.approx(0.1)
    assert found["edges_scores"][row(1, 0), -1] == pytest.approx(1 / 3)
    assert found["edges_in_graph"][0, column(0, "", 0)]
    assert found["src_nodes"][row(1, 1)] == "a1.h1" and found["src_nodes"][row(0, 2)] == "m0"
    assert found["dst_nodes"][column(1, "k", 1)] == "a1.h1<k>"
    assert found["dst_nodes"][column(0, "", 0)] == "m0" and found["dst_nodes"][-1] == "logits"
    assert found["nodes_in_graph"].tolist() == [True, False, True, True, True, False, True]
    assert math.isnan(found["nodes_scores"][0]) and found["nodes_scores"][row(1, 0)] == 0.75


def test_a_pt_goes_by_names_and_passes_over_cells_that_are_no_edges(tmp_path: Path):
    graph = complete()
    path = write_graph(graph, tmp_path / "g.pt")
    found = torch.load(path)
    order = torch.randperm(len(found["src_nodes"]), generator=torch.Generator().manual_seed(3))
    # EAP-IG marks whole rows, and leaves what it likes where no edge can be.
    last = found["src_nodes"].index("m1")
    found["edges_in_graph"][last] = True
    found["edges_scores"][last, 0] = torch.nan
    for key in ("edges_scores", "edges_in_graph", "nodes_in_graph", "nodes_scores"):
        found[key] = found[key][order]
    found["src_nodes"] = [found["src_nodes"][i] for i in order.tolist()]
    torch.save(found, path)
    expected = {**known(as_float32(graph))}
    expected["M1->logits"] = (expected["M1->logits"][0], True)
    assert known(read_graph(path)) == expected


def test_a_json_may_hold_fewer_nodes_and_edges(tmp_path: Path):
    path = tmp_path / "g.json"
    path.write_text(json.dumps({
        "cfg": {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False},
        "nodes": {"a0.h1": {"in_graph": True, "score": 1}},
        "edges": {"a0.h1->m1": {"score": 2, "in_graph": True}},
    }))  # fmt: skip
    graph = read_graph(path)
    assert graph.d_model is None and graph.unit == OTHER_UNIT
    assert graph.nodes == {
        "L0H1": GraphNode(1.0, True), "logits": GraphNode(None, True), "M1": GraphNode(None, False),
    }  # fmt: skip
    assert graph.edges == (Edge("L0H1", "M1", "", 2.0, True),)
    assert graph.kept_edges == ()


def shared_file() -> Path:
    """A circuit file of MIB's own, where there is one (see the real data sets)."""
    data = DATA
    return data / "mib" / "ioi-eap-ig.json"


@pytest.mark.skipif(not shared_file().exists(), reason="no mib/ioi-eap-ig.json in $CDT_DATA")
def test_a_real_file_of_mib_is_read_and_written_to_the_last_byte(tmp_path: Path):
    with unchecked_types():  # which would look at each of 32,491 edges four times
        graph = read_graph(shared_file())
        text = write_graph(graph, tmp_path / "again.json").read_text()
        tensors = read_graph(write_graph(graph, tmp_path / "again.pt"))
        circuit = circuit_from_graph(graph)
    assert (graph.n_layers, graph.n_heads, graph.d_model) == (12, 12, 768)
    assert len(graph.edges) == 32491 and len(graph.kept_edges) == 756
    assert {Head(9, 9), Head(9, 6), Head(10, 0), Head(8, 6)} <= set(graph.heads)
    assert text == shared_file().read_text()
    assert_same(tensors, graph)  # its numbers were float32 before they were text
    assert len(circuit) == 67 and circuit.scores is None


# Direct edges ------------------------------------------------------------------------------------


def pruned_as_by_eap_ig(document: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Edges and nodes that are left when nodes without edges in or out go, again and again.

    By the field names of EAP-IG's `Graph.from_json`; the memberships of nodes follow from the edges.
    """
    edges = {name for name, own in document["edges"].items() if own["in_graph"]}
    while True:
        ends = {name: re.fullmatch(r"(.+)->([^<]+)(?:<.>)?", name).groups() for name in edges}
        written, read = {a for a, _ in ends.values()}, {b for _, b in ends.values()}
        nodes = {
            name
            for name in document["nodes"]
            if name in written and (name in read or name == "input")
        }
        kept = {n for n, (a, b) in ends.items() if a in nodes and b in nodes | {"logits"}}
        if kept == edges:
            return edges, nodes | {"logits"}
        edges = kept


@models(("gpt2", "pythia"))
def test_a_circuit_of_direct_edges_loses_nothing_in_eap_ig(
    family, backend, tokenizer_folder, tmp_path: Path
):
    """Edges from the input are among them, so that no node is without one."""
    view, data = shared(family, backend, tokenizer_folder, torch.float32), examples()
    baseline = mean_activations(view, data, mlps=True, progress=False)
    scores = edge_attribution_patching(view, data, baseline, progress=False)
    graph = scores.graph(k=60, by="magnitude")
    kept = {edge.name for edge in graph.kept_edges}
    assert 20 < len(kept) <= 60 and any(name.startswith("input->L1") for name in kept)
    for ending in ENDINGS:
        again = read_graph(write_graph(graph, tmp_path / f"g{ending}"))
        assert again.direct and {edge.name for edge in again.kept_edges} == kept
        assert again.pruned().kept_edges == again.kept_edges
    document = json.loads((tmp_path / "g.json").read_text())
    edges, nodes = pruned_as_by_eap_ig(document)
    assert edges == {name for name, own in document["edges"].items() if own["in_graph"]}
    assert len(edges) == len(kept)
    assert nodes == {name for name, own in document["nodes"].items() if own["in_graph"]}
    assert document["edges_direct"] is True
    traced = trace_circuit(view, data, baseline, progress=False).graph
    document = json.loads(write_graph(traced, tmp_path / "traced.json").read_text())
    assert "edges_direct" not in document and not read_graph(tmp_path / "traced.json").direct
    assert pruned_as_by_eap_ig(document)[0] == set()  # no edge leaves the input


@pytest.mark.parametrize("seed", range(4))
def test_pruning_of_direct_edges_is_that_of_eap_ig(seed: int, tmp_path: Path):
    graph = complete(parallel=bool(seed % 2), seed=seed)
    everyone = {name: replace(node, in_graph=True) for name, node in graph.nodes.items()}
    graph = replace(graph, nodes=everyone)
    document = json.loads(write_graph(graph, tmp_path / "g.json").read_text())
    pruned = json.loads(write_graph(graph.pruned(), tmp_path / "p.json").read_text())
    edges, nodes = pruned_as_by_eap_ig(document)
    assert edges == {name for name, own in pruned["edges"].items() if own["in_graph"]}
    assert nodes == {name for name, own in pruned["nodes"].items() if own["in_graph"]}
    assert 0 < len(edges) < sum(own["in_graph"] for own in document["edges"].values())


# What is refused -----------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]


def at(*path: str, value: object) -> Change:
    """A change of one entry of a document."""

    def change(document: dict[str, Any]) -> None:
        for name in path[:-1]:
            document = document[name]
        document[path[-1]] = value

    return change


def without(*path: str) -> Change:
    def change(document: dict[str, Any]) -> None:
        for name in path[:-1]:
            document = document[name]
        del document[path[-1]]

    return change


NAN, EDGE = float("nan"), "a0.h1->a1.h0<q>"
JSON_MISTAKES: list[tuple[Change, str]] = [
    (without("cfg"), "cfg is missing"),
    (without("nodes"), "nodes is missing"),
    (without("edges"), "edges is missing"),
    (without("cfg", "n_layers"), "cfg: n_layers is missing"),
    (without("cfg", "parallel_attn_mlp"), "cfg: parallel_attn_mlp is missing"),
    (at("cfg", "n_heads", value="2"), "cfg.n_heads: expected a whole number of at least 1, got '2'"),
    (at("cfg", "n_layers", value=True), "cfg.n_layers: expected a whole number"),
    (at("cfg", "n_layers", value=0), "cfg.n_layers: .*got 0"),
    (at("cfg", "d_model", value=7.5), "cfg.d_model: .*7.5"),
    (at("cfg", "parallel_attn_mlp", value=0), "cfg.parallel_attn_mlp: expected true or false, got 0"),
    (at("cfg", "n_layers", value=1), "nodes['a1.h0']: .*layers 0-0"),
    (at("cfg", value=[2, 2]), "cfg: expected fields by name, got list"),
    (at("nodes", value=["input"]), "nodes: expected fields by name, got list"),
    (at("nodes", "a0.h9", value={"in_graph": True}), "nodes['a0.h9']: .*heads 0-1"),
    (at("nodes", "L0H1", value={"in_graph": True}), "nodes['L0H1']: node 'L0H1': expected such as"),
    (at("nodes", "a00.h1", value={"in_graph": True}), "nodes['a00.h1']"),
    (at("nodes", "a0.h1", value=True), "nodes['a0.h1']: expected fields by name, got bool"),
    (without("nodes", "m0", "in_graph"), "nodes['m0']: in_graph is missing"),
    (at("nodes", "m0", "in_graph", value=1), "nodes['m0'].in_graph: expected true or false, got 1"),
    (at("nodes", "m0", "in_graph", value="true"), "nodes['m0'].in_graph: .*'true'"),
    (at("nodes", "m0", "score", value=NAN), "nodes['m0'].score: expected a finite number, got nan"),
    (at("nodes", "m0", "score", value=None), "nodes['m0'].score: expected a number, got None"),
    (at("nodes", "m0", "score", value=True), "nodes['m0'].score: expected a number, got True"),
    (at("nodes", "m0", "neurons", value=[True] * 8), "nodes['m0']: neurons: a circuit of single"),
    (without("edges", EDGE, "score"), f"edges['{EDGE}']: score is missing"),
    (without("edges", EDGE, "in_graph"), f"edges['{EDGE}']: in_graph is missing"),
    (at("edges", EDGE, "score", value=NAN), f"edges['{EDGE}'].score: .*finite number, got nan"),
    (at("edges", EDGE, "score", value=float("-inf")), f"edges['{EDGE}'].score: .*got -inf"),
    (at("edges", EDGE, "score", value=10**400), f"edges['{EDGE}'].score: .*finite"),
    (at("edges", EDGE, "score", value="0.5"), f"edges['{EDGE}'].score: expected a number, got '0.5'"),
    (at("edges", EDGE, "in_graph", value=0.0), f"edges['{EDGE}'].in_graph: expected true or false"),
    (at("edges", "a0.h1-a1.h0<q>", value={}), "edges['a0.h1-a1.h0<q>']: expected an edge such as"),
    (at("edges", "a0.h1->a1.h7<q>", value={}), "edges['a0.h1->a1.h7<q>']: .*heads 0-1"),
    (at("edges", "a0.h1->a1.h0", value={}), "edges['a0.h1->a1.h0']: site ''.*q, k or v"),
    (at("edges", "a0.h1->a1.h0<z>", value={}), "edges['a0.h1->a1.h0<z>']: site 'z'"),
    (at("edges", "a0.h1->m1<q>", value={}), "edges['a0.h1->m1<q>']: site 'q'.*no head"),
    (at("edges", "m1->a1.h0<q>", value={}), "edges['m1->a1.h0<q>']: runs against the residual"),
    (at("edges_scored", value=["m0->m9"]), "edges_scored: 'm0->m9' is not among the edges"),
    (at("edges_scored", value=[EDGE, EDGE]), f"edges_scored: '{EDGE}' is there twice"),
    (at("unit", value=3), "unit: expected text, got 3"),
]  # fmt: skip


def refused(path: Path, told: str, error: type[Exception] = InputError) -> None:
    """The file is refused, in words that hold the file's name and then `told`."""
    with pytest.raises(error) as caught:
        read_graph(path)
    pattern = re.sub(r"\\\.\\\*", ".*", re.escape(told))
    assert re.search(f"{re.escape(str(path))}.*{pattern}", str(caught.value)), str(caught.value)


@pytest.mark.parametrize(("change", "told"), JSON_MISTAKES, ids=[told for _, told in JSON_MISTAKES])
def test_a_mistake_in_a_json_is_told_by_file_and_field(change: Change, told: str, tmp_path: Path):
    path = write_graph(sample.small(), tmp_path / "g.json")
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    refused(path, told)


def cells(key: str, value: float) -> Change:
    return lambda found: found[key].__setitem__((2, 7), value)


PT_MISTAKES: list[tuple[Change, str]] = [
    *((without(key), f"{key} is missing") for key in
      ("cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph", "nodes_in_graph")),
    (at("src_nodes", value=["input"]), "nodes_in_graph: expected the shape (1,), got (7,)"),
    (lambda d: d["src_nodes"].__setitem__(1, "input"), "src_nodes: 'input' is there twice"),
    (lambda d: d["src_nodes"].__setitem__(1, "a5.h0"), "src_nodes: node 'L5H0': .*layers 0-1"),
    (lambda d: d["src_nodes"].__setitem__(1, "x"), "src_nodes: node 'x': expected such as"),
    (lambda d: d["dst_nodes"].__setitem__(0, "a0.h0"), "dst_nodes: 'a0.h0': a head has <q>"),
    (lambda d: d["dst_nodes"].__setitem__(0, "a0.h0<z>"), "dst_nodes: 'a0.h0<z>': expected such"),
    (at("src_nodes", value=3), "src_nodes: expected a list of names, got int"),
    (at("edges_scores", value=torch.zeros(7, 14)), "edges_scores: expected the shape (7, 15), got"),
    (at("edges_scores", value=[[0.0]]), "edges_scores: expected a dense tensor, got list"),
    (at("edges_scores", value=torch.zeros(7, 15).long()), "edges_scores: expected floating point"),
    (at("edges_scores", value=torch.zeros(7, 15).to_sparse()), "edges_scores: expected a dense"),
    (at("edges_in_graph", value=torch.zeros(7, 15)), "edges_in_graph: expected true and false"),
    (at("nodes_in_graph", value=torch.ones(7)), "nodes_in_graph: expected true and false"),
    (at("nodes_scores", value=torch.ones(8)), "nodes_scores: expected the shape (7,), got (8,)"),
    (lambda d: d["nodes_scores"].__setitem__(3, math.inf), "nodes_scores['m0']: .*finite"),
    (cells("edges_scores", NAN), "edges_scores['a0.h1', 'a1.h0<q>']: .*finite number, got nan"),
    (cells("edges_scores", math.inf), "edges_scores['a0.h1', 'a1.h0<q>']: .*got inf"),
    (at("neurons_in_graph", value=torch.ones(7, 8).bool()), "neurons_in_graph: a circuit of single"),
    (at("cfg", "n_heads", value=3.0), "cfg.n_heads: expected a whole number"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "told"), PT_MISTAKES, ids=[told for _, told in PT_MISTAKES])
def test_a_mistake_in_a_pt_is_told_by_file_and_field(change: Change, told: str, tmp_path: Path):
    path = write_graph(sample.small(), tmp_path / "g.pt")
    found = torch.load(path)
    change(found)
    torch.save(found, path)
    refused(path, told)


class Opens:
    """What a pickle can do: name any function, to be called while it is read."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.mkdir, ("ran",)


def test_a_pt_that_would_run_code_is_refused_and_does_not_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    path = write_graph(sample.small(), tmp_path / "g.pt")
    found = torch.load(path)
    torch.save({**found, "more": Opens()}, path)
    refused(path, "more than tensors and plain values", ArtifactError)
    path.write_bytes(pickle.dumps(Opens()))
    refused(path, "more than tensors and plain values", ArtifactError)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_damaged_file_is_refused_with_its_path(ending: str, tmp_path: Path):
    path = write_graph(sample.small(), tmp_path / f"g{ending}")
    payload = path.read_bytes()
    for damaged in (b"", payload[: len(payload) // 2], b"\x00\xff" + payload, b"{" * 100_000):
        path.write_bytes(damaged)
        refused(path, "damaged", ArtifactError)
    for value in (b"[]", b"3", b'"text"') if ending == ".json" else ():
        path.write_bytes(value)
        refused(path, "expected fields by name")


def test_other_files_are_refused_by_what_they_are(tmp_path: Path):
    with pytest.raises(InputError, match="none.json: no such file"):
        read_graph(tmp_path / "none.json")
    with pytest.raises(InputError, match="none.graphml: no such file"):
        read_graph(tmp_path / "none.graphml")
    with pytest.raises(InputError, match="g.yaml: expected a graph to read from .json, .pt"):
        read_graph(tmp_path / "g.yaml")
    with pytest.raises(InputError, match="g.yaml: expected a graph to go to .json, .pt"):
        write_graph(sample.small(), tmp_path / "g.yaml")
    path = sample_results.circuit().save(tmp_path / "c.json")
    with pytest.raises(InputError, match="got a cdt_lens.circuit file; cdt_lens.Circuit.load"):
        read_graph(path)


def test_a_name_twice_in_a_json_is_refused(tmp_path: Path):
    path = tmp_path / "g.json"
    path.write_text('{"cfg": {}, "nodes": {"m0": {}, "m1": {}, "m0": {}}, "edges": {}}')
    refused(path, "'m0' is there twice")


GRAPHML_MISTAKES = [
    ('attr.name="n_layers"', 'attr.name="layers"', "n_layers is missing"),
    (">True<", ">7<", "in_graph: expected true or false|damaged"),
    ('source="L0H1"', 'source="L9H1"', "node 'L9H1'|in_graph is missing"),
    (">q<", ">z<", "L0H1->L1H0: site: expected q, k, v or nothing, got 'z'"),
    (">-0.25<", ">nan<", "score: expected a finite number, got nan"),
]


@pytest.mark.parametrize(("old", "new", "told"), GRAPHML_MISTAKES)
def test_a_mistake_in_a_graphml_is_told(old: str, new: str, told: str, tmp_path: Path):
    path = write_graph(sample.small(), tmp_path / "g.graphml")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises((InputError, ArtifactError), match=f"{re.escape(str(path))}.*({told})"):
        read_graph(path)


def test_the_width_is_needed_for_mibs_files_and_cannot_be_two(tmp_path: Path):
    bare = replace(sample.small(), d_model=None)
    for ending in (".json", ".pt"):
        with pytest.raises(InputError, match="give it as d_model"):
            write_graph(bare, tmp_path / f"g{ending}")
        assert read_graph(write_graph(bare, tmp_path / f"g{ending}", d_model=8)).d_model == 8
        with pytest.raises(InputError, match="d_model=9, the graph's is 8"):
            write_graph(sample.small(), tmp_path / f"g{ending}", d_model=9)
        with pytest.raises(InputError, match="d_model=0"):
            write_graph(bare, tmp_path / f"g{ending}", d_model=0)
    write_graph(bare, tmp_path / "g.dot")
    assert read_graph(write_graph(bare, tmp_path / "g.graphml")).d_model is None


def test_a_score_too_large_for_float32_is_refused(tmp_path: Path):
    edges = (Edge("input", "M0", "", 1e200),)
    with pytest.raises(InputError, match="float32.*write .json"):
        write_graph(replace(sample.small(), edges=edges), tmp_path / "g.pt")
    assert not list(tmp_path.iterdir())


# Circuits ------------------------------------------------------------------------------------------


def test_a_circuit_of_heads_is_written_as_mib_evaluates_nodes(tmp_path: Path):
    scores = sample_results.scores(3, 2)
    circuit = replace(scores.select(k=2), provenance=sample_results.provenance())
    graph = graph_from_circuit(circuit, parallel=False)
    assert graph.heads == circuit.heads and graph.d_model == 576
    assert graph.nodes["L2H1"].score == float(scores.values[2, 1])
    for name in ("input", "M0", "M1", "M2", "logits"):
        assert graph.nodes[name] == GraphNode(None, True)
    inside = {str(head) for head in circuit.heads} | {"input", "M0", "M1", "M2", "logits"}
    expected = {e for e in possible_edges(3, 2) if e[0] in inside and e[1] in inside}
    assert {(e.source, e.target, e.site) for e in graph.edges} == expected
    assert all(edge.score is None and edge.in_graph for edge in graph.edges)

    document = json.loads(write_graph(circuit, tmp_path / "c.json", parallel=False).read_text())
    scored = {name for name, node in document["nodes"].items() if "score" in node}
    assert scored == {f"a{layer}.h{head}" for layer in range(3) for head in range(2)}
    found = torch.load(write_graph(circuit, tmp_path / "c.pt", parallel=False))
    assert found["nodes_scores"].isnan().sum() == 4, "input and MLPs: never taken out"

    again = circuit_from_graph(read_graph(tmp_path / "c.json"))
    assert again.heads == circuit.heads
    assert again.scores is not None and again.scores.float().equal(scores.values)


def test_heads_without_a_score_and_parallel_blocks():
    scores = sample_results.scores(2, 2).values.clone()
    scores[0, 0] = torch.nan
    circuit = Circuit((Head(0, 0), Head(1, 1)), 2, 2, scores=scores)
    graph = graph_from_circuit(circuit, parallel=True)
    assert graph.nodes["L0H0"] == GraphNode(None, True)
    assert graph.parallel and "L0H0->M0" not in {edge.name for edge in graph.edges}
    beside = graph_from_circuit(circuit, parallel=False)
    assert "L0H0->M0" in {edge.name for edge in beside.edges}
    bare = circuit_from_graph(graph_from_circuit(Circuit((Head(0, 1),), 2, 2), parallel=False))
    assert bare.heads == (Head(0, 1),) and bare.scores is None


def test_whether_blocks_are_parallel_is_never_guessed(tmp_path: Path):
    """A file says which edges the model has; one that was found in Pythia must not say GPT-2's."""
    circuit = Circuit((Head(0, 0),), 2, 2)
    with pytest.raises(InputError, match="does not tell whether attention and MLP"):
        graph_from_circuit(circuit)
    told = sample_results.provenance()
    shape = {**told.model_shape, "parallel": True}
    known = replace(circuit, provenance=replace(told, model_shape=shape))
    document = json.loads(write_graph(known, tmp_path / "p.json").read_text())
    assert document["cfg"]["parallel_attn_mlp"] is True
    assert "a0.h0->m0" not in document["edges"]
    again = read_graph(tmp_path / "p.json")
    for graph in (known, again, replace(known, graph=again)):
        with pytest.raises(InputError, match="parallel=False, the graph's is True"):
            write_graph(graph, tmp_path / "q.json", parallel=False)
    assert not (tmp_path / "q.json").exists()


@pytest.mark.parametrize("family", ["gpt2", "pythia"])
def test_a_circuit_from_here_goes_out_and_back_to_its_model(family, tokenizer_folder, tmp_path):
    view = shared(family, "bridge", tokenizer_folder, torch.float32)
    data = examples()
    scores = one_pass(view, data, mean_activations(view, data, progress=False), progress=False)
    circuit = scores.select(k=3)
    back = circuit_from_graph(read_graph(write_graph(circuit, tmp_path / "c.json")), view)
    assert back.heads == circuit.heads and back.graph is not None
    assert back.graph.parallel == (family == "pythia")
    back.check_model(view)


def test_a_circuits_own_graph_is_what_is_written(tmp_path: Path):
    graph = sample.small()
    circuit = Circuit(graph.heads, 2, 2, graph=graph)
    assert_same(read_graph(write_graph(circuit, tmp_path / "c.json")), graph)
    narrow = replace(graph, d_model=None)
    recorded = Circuit(graph.heads, 2, 2, graph=narrow, provenance=sample_results.provenance())
    assert graph_from_circuit(recorded).d_model == 576


def test_a_graph_becomes_a_circuit_with_its_heads_and_scores():
    circuit = circuit_from_graph(sample.small())
    assert circuit.heads == (Head(0, 1), Head(1, 0))
    assert circuit.graph is not None and circuit.graph.kept_edges == sample.small().kept_edges
    assert circuit.scores is not None
    expected = torch.tensor([[-0.01, 0.2], [0.75, torch.nan]], dtype=torch.float64)
    torch.testing.assert_close(circuit.scores, expected, rtol=0, atol=0, equal_nan=True)
    assert circuit.selection["unit"] == OWN_UNIT


@models(("gpt2", "pythia"))
def test_a_graph_of_another_models_shape_is_refused_by_field(family, backend, tokenizer_folder):
    view = shared(family, backend, tokenizer_folder, torch.float32)
    nodes = {name: GraphNode(None, True) for name in node_names(2, 4)}
    fits = Graph(2, 4, nodes, (), d_model=view.d_model, parallel=family == "pythia")
    assert len(circuit_from_graph(fits, view)) == 8
    assert circuit_from_graph(replace(fits, d_model=None), view.tl).heads
    wrong: Mapping[str, Graph] = {
        "cfg.n_layers: 3, the model has 2": replace(fits, n_layers=3),
        "cfg.n_heads: 5, the model has 4": replace(fits, n_heads=5),
        f"cfg.d_model: 7, the model has {view.d_model}": replace(fits, d_model=7),
        f"cfg.parallel_attn_mlp: {not fits.parallel}": replace(fits, parallel=not fits.parallel),
    }
    for told, graph in wrong.items():
        with pytest.raises(InputError, match=told):
            circuit_from_graph(graph, view)
