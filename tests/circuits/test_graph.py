"""Circuit graphs: which edges a model has, what is kept, and the forms a graph takes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product

import networkx
import numpy as np
import pytest
import torch
from helpers import sample_graph as sample
from helpers.checks import unchecked_types

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.graph import Edge, Graph, GraphNode
from cdt_lens.circuits.nodes import edge_name, node_names, parse_node, possible_edges
from cdt_lens.core.errors import InputError
from cdt_lens.models.heads import Head


def whole(edges: tuple[Edge, ...] = (), *, parallel: bool = False) -> Graph:
    """A graph of 2 layers of 2 heads with all nodes and these edges."""
    nodes = {name: GraphNode(None, True) for name in node_names(2, 2)}
    return Graph(2, 2, nodes, edges, parallel=parallel)


# Names ---------------------------------------------------------------------------------------------


def test_nodes_stand_in_the_order_of_the_residual_stream():
    names = node_names(2, 3)
    assert names == (
        "input", "L0H0", "L0H1", "L0H2", "M0", "L1H0", "L1H1", "L1H2", "M1", "logits",
    )  # fmt: skip
    places = [parse_node(name, 2, 3) for name in names]
    assert [place.step(False) for place in places] == [-2, 0, 0, 0, 1, 2, 2, 2, 3, 4]
    assert [place.step(True) for place in places] == [-2, 0, 0, 0, 0, 2, 2, 2, 2, 4]
    assert (places[7].layer, places[7].head, places[8].layer) == (1, 2, 1)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "L2H0",
        "L0H3",
        "M2",
        "m0",
        "a0.h1",
        "0.1",
        "L01H0",
        "L0H0 ",
        "Logits",
        "L-1H0",
        "L\u0660H0",
    ],
)
def test_another_name_is_refused(name: str):
    with pytest.raises(InputError, match=re.escape(f"node {name!r}")):
        parse_node(name, 2, 3)


@pytest.mark.parametrize("parallel", [False, True])
def test_the_graph_takes_exactly_the_edges_that_a_model_has(parallel: bool):
    """Against an oracle that walks through the blocks and remembers what was written."""
    expected = set()
    written = ["input"]
    for layer in range(2):
        heads, mlp = [f"L{layer}H0", f"L{layer}H1"], f"M{layer}"
        expected |= {(s, head, site) for s in written for head in heads for site in "qkv"}
        expected |= {(s, mlp, "") for s in (written if parallel else written + heads)}
        written += [*heads, mlp]
    expected |= {(s, "logits", "") for s in written}
    listed = list(possible_edges(2, 2, parallel=parallel))
    assert set(listed) == expected
    assert len(listed) == len(expected)
    for source, target, site in product(node_names(2, 2), node_names(2, 2), ("q", "k", "v", "")):
        edge = Edge(source, target, site, 0.5)
        if (source, target, site) in expected:
            assert whole((edge,), parallel=parallel).kept_edges == (edge,)
        else:
            with pytest.raises(InputError, match=re.escape(edge.name)):
                whole((edge,), parallel=parallel)


def test_gpt2_small_has_as_many_edges_as_mib_says():
    assert sum(1 for _ in possible_edges(12, 12)) == 32491


# What is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"nodes": {"L7H0": GraphNode(None, True)}, "edges": ()}, "node 'L7H0'.*layers 0-1"),
        ({"nodes": {}}, "edge input->L0H1<v>.*'input' is not among the nodes"),
        ({"edges": (Edge("input", "logits", "", float("nan")),)}, "edge input->logits.score.*nan"),
        ({"edges": (Edge("input", "logits", "", float("inf")),)}, "edge input->logits.score.*inf"),
        ({"edges": (Edge("input", "M0", "", 1.0),) * 2}, "edge input->M0: given twice"),
        ({"edges": (Edge("M0", "L0H1", "q", 1.0),)}, "M0->L0H1<q>: runs against the residual"),
        ({"edges": (Edge("input", "L0H1", "", 1.0),)}, "input->L0H1: site ''.*q, k or v"),
        ({"edges": (Edge("input", "M0", "q", 1.0),)}, "input->M0<q>: site 'q'.*no head"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"d_model": 0}, "d_model=0"),
    ],
)
def test_what_is_no_graph_is_refused_by_name(change: dict, told: str):
    with pytest.raises(InputError, match=told):
        replace(sample.small(), **change)


def test_a_score_that_is_not_finite_is_refused_at_a_node_too():
    nodes = {**sample.small().nodes, "M1": GraphNode(float("-inf"), True)}
    with pytest.raises(InputError, match="node M1.score.*-inf"):
        replace(sample.small(), nodes=nodes)


# What is kept --------------------------------------------------------------------------------------


def test_kept_nodes_heads_and_edges():
    graph = sample.small()
    assert graph.heads == (Head(0, 1), Head(1, 0))
    assert graph.kept_nodes == ("input", "L0H1", "M0", "L1H0", "M1", "logits")
    assert "L0H0->L1H0<k>" not in {edge.name for edge in graph.kept_edges}
    assert len(graph.kept_edges) == 6


def test_top_edges_are_the_largest_in_magnitude():
    graph = sample.small()
    assert [edge.score for edge in graph.top_edges(3)] == [0.5, 1 / 3, -0.25]
    assert [edge.score for edge in graph.top_edges(4, kept_only=False)] == [0.5, 1 / 3, 0.3, -0.25]
    assert len(graph.top_edges(99)) == 5, "an edge without a score is not among them"
    assert graph.top_edges(0) == ()
    with pytest.raises(InputError, match="k=-1"):
        graph.top_edges(-1)


def test_pruning_leaves_what_leads_to_the_logits():
    graph = sample.small()
    pruned = graph.pruned()
    assert pruned.kept_nodes == ("input", "L0H1", "M0", "L1H0", "logits")
    assert "M0->M1" not in {edge.name for edge in pruned.kept_edges}
    assert [edge.score for edge in pruned.edges] == [edge.score for edge in graph.edges]
    assert sum(edge.in_graph for edge in pruned.edges) == len(pruned.kept_edges) == 5
    outside = {**graph.nodes, "logits": GraphNode(None, False)}
    assert replace(graph, nodes=outside).pruned().kept_nodes == ()


@pytest.mark.parametrize("seed", range(4))
def test_pruning_agrees_with_networkx(seed: int):
    graph = sample.large(6, 3, heads=8, edges=22, seed=seed, parallel=seed % 2 == 1)
    pruned = graph.pruned()
    kept = networkx.MultiDiGraph([(e.source, e.target) for e in graph.kept_edges])
    kept.add_node("logits")
    expected = networkx.ancestors(kept, "logits") | {"logits"}
    assert set(pruned.kept_nodes) == expected
    assert {e.name for e in pruned.kept_edges} == {
        e.name for e in graph.kept_edges if e.target in expected
    }


# Forms ---------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_edge():
    table = sample.small().to_dataframe()
    assert table["source"].tolist()[4] == "L0H1"
    assert table["site"].tolist() == ["v", "v", "", "k", "q", "v", "", ""]
    assert table["score"].isna().tolist() == [False, False, True, *[False] * 5]
    assert table["in_graph"].tolist() == [True, False, *[True] * 6]
    assert list(replace(sample.small(), edges=()).to_dataframe().columns) == list(table.columns)


def test_networkx_has_every_attribute_and_parallel_edges_by_site():
    graph = sample.small()
    both = (*graph.edges, Edge("L0H1", "L1H0", "k", 0.4))
    made = replace(graph, edges=both).to_networkx()
    assert networkx.is_directed_acyclic_graph(made)
    assert made.graph["n_layers"] == 2 and made.graph["d_model"] == 8
    assert made.nodes["L0H1"] == {"score": 0.2, "in_graph": True}
    assert made.nodes["M0"] == {"in_graph": True}
    assert set(made["L0H1"]["L1H0"]) == {"q", "k"}
    assert made["L0H1"]["L1H0"]["q"] == {"site": "q", "score": -0.25, "in_graph": True}
    assert "score" not in made["input"]["M0"][""]


@pytest.mark.parametrize("graph", [sample.small(), sample.large(parallel=True)])
def test_plain_values_and_back(graph: Graph):
    again = Graph.from_dict(json.loads(json.dumps(graph.to_dict())))
    assert again.nodes == graph.nodes
    assert again.edges == graph.edges
    assert again.to_dict() == graph.to_dict()


def test_dot_draws_signs_by_colour_and_line_and_leaves_out_what_is_outside():
    text = sample.small().to_dot()
    lines = {m[0]: m[1] for m in re.findall(r'("\w+" -> "\w+") \[(.*)\];', text)}
    assert len(lines) == 6
    negative, positive = lines['"L0H1" -> "L1H0"'], lines['"input" -> "L0H1"']
    assert 'style="dashed"' in negative and 'label="q"' in negative
    assert 'style="solid"' in positive and 'color="#2166ac"' in positive
    assert 'style="dotted"' in lines['"input" -> "M0"']
    width = {name: float(re.search(r'penwidth="(.*?)"', look)[1]) for name, look in lines.items()}  # type: ignore[index]
    assert width['"input" -> "L0H1"'] > width['"L1H0" -> "logits"'] > width['"L0H1" -> "L1H0"']
    assert "L0H0" not in text
    assert "rank=same" in text
    everything = sample.small().to_dot(kept_only=False)
    assert everything.count(" -> ") == 8 and '"L0H0"' in everything
    # Every quote closes on its line, and braces balance.
    assert all(line.count('"') % 2 == 0 for line in everything.splitlines())
    assert everything.count("{") == everything.count("}")


def test_another_tools_scores_are_not_called_logits():
    foreign = replace(sample.small(), unit="nats of a loss")
    assert "logits" in sample.small().to_dot().replace('"logits"', "")
    assert "0.5 logits" not in foreign.to_dot()
    assert Graph.from_dict(foreign.to_dict()).unit == "nats of a loss"


def test_a_notebook_shows_the_drawing():
    page = sample.small()._repr_html_()
    assert page.startswith("<svg") and "L1H0" in page and "L0H0" not in page


def test_edge_names():
    assert edge_name("L0H1", "L9H6", "q") == "L0H1->L9H6<q>"
    assert Edge("M3", "logits", "", None).name == "M3->logits"


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5)])
def test_scores_of_numpy_and_torch_are_numbers(number, tmp_path):
    with unchecked_types():
        nodes = {"input": GraphNode(None, np.True_), "logits": GraphNode(number, True)}
        made = Graph(1, 1, nodes, (Edge("input", "logits", "", number),), d_model=4)
    path = Circuit((), 1, 1, graph=made).save(tmp_path / "circuit.json")
    assert Circuit.load(path).graph == made
    assert type(made.edges[0].score) is float and type(made.nodes["input"].in_graph) is bool
