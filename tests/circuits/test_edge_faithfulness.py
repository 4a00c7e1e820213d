"""Faithfulness of direct edges against the EAP-IG code, and against sums by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from helpers.checks import assert_close
from helpers.edges_by_hand import ByHand
from helpers.places import TESTS
from helpers.shared import models, shared
from helpers.tiny_models import Float64Throughout, build
from helpers.tiny_tasks import examples, many

from cdt_lens.circuits.edge_faithfulness import (
    EdgeFaithfulness,
    edge_faithfulness,
    edge_faithfulness_curve,
)
from cdt_lens.circuits.graph import Edge, Graph, GraphNode
from cdt_lens.circuits.measures import MIB_FRACTIONS, cmd, cpr
from cdt_lens.circuits.nodes import node_names, possible_edges
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.decomposition.baseline import Baseline, counterfactual_baseline, mean_activations
from cdt_lens.interchange.mib_schema import MibModel
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.direct_edges import edge_attribution_patching
from cdt_lens.scoring.iterative import trace_circuit
from cdt_lens.tasks.metrics import balanced_mean, label_numbers

PAIRS = examples(seed=9, name="tiny/pairs")
QUIET: dict[str, Any] = {"progress": False}
FAMILIES = ("gpt2", "llama", "pythia")


def graph(edges: Any, parallel: bool) -> Graph:
    nodes = {name: GraphNode(None, True) for name in node_names(2, 4)}
    made = tuple(Edge(*ends, None) for ends in edges)
    return Graph(2, 4, nodes, made, parallel=parallel, direct=True)


@cache
def of_eap_ig(family: str) -> dict[str, Any]:
    text = (TESTS / "scoring" / "eap_ig.json").read_text("utf-8")
    return json.loads(text)["models"][family]


def their_edges(family: str) -> list[Any]:
    """Source, target and site of each edge in the order of the stored numbers."""
    model = MibModel(2, 4, 64, family == "pythia", "", True)
    return [model.edge(text, "stored") for text in of_eap_ig(family)["edges"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_that_change_nothing_are_refused_as_for_heads(dtype, tokenizer_folder):
    """The rounding that is left must not become a denominator."""
    view, data = shared("llama", "bridge", tokenizer_folder, dtype), many(12)
    base = mean_activations(view, data, mlps=True, progress=False)
    edges = edge_attribution_patching(view, data, base, **QUIET)
    same = counterfactual_baseline(view, data, data)
    with pytest.raises(InputError, match="there is nothing to explain"):
        edge_faithfulness_curve(view, edges, data, same, draws=1, **QUIET)


def balanced(values: list[float]) -> float:
    data = examples()
    labels = label_numbers([e.label for e in data], data.labels)
    return float(balanced_mean(torch.tensor(values, dtype=torch.float64), labels))


@models(FAMILIES)
def test_circuits_are_as_faithful_as_in_the_eap_ig_code(family, backend, tokenizer_folder):
    stored, edges = of_eap_ig(family)["circuits"], their_edges(family)
    graphs = [
        graph([edges[i] for i in own["edges"]], family == "pythia") for own in stored.values()
    ]
    m = [balanced(own["values"]) for own in stored.values()]
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        base = counterfactual_baseline(view, data, PAIRS)
        for options in ({"batch_size": 4}, {"batch_size": 6, "rows": 7}):
            found = edge_faithfulness(view, graphs, data, base, draws=0, **options, **QUIET)
            assert found.edges == tuple(len(own["edges"]) for own in stored.values())
            assert found.empty == pytest.approx(m[0], abs=1e-10)
            assert found.full == pytest.approx(m[-1], abs=1e-10)
            expected = torch.tensor([(x - m[0]) / (m[-1] - m[0]) for x in m], dtype=torch.float64)
            assert_close(found.faithfulness, expected, atol=1e-9)
    assert len({round(x, 6) for x in m}) > 4


@pytest.mark.parametrize("family", FAMILIES)
def test_selecting_and_pruning_are_those_of_the_eap_ig_code(family, tokenizer_folder):
    stored, edges = of_eap_ig(family), their_edges(family)
    view, data = shared(family, "bridge", tokenizer_folder), examples()
    scores = edge_attribution_patching(
        view, data, counterfactual_baseline(view, data, PAIRS), **QUIET
    )
    values = dict(zip(edges, stored["EAP"], strict=True))
    theirs = torch.tensor([values[ends] for ends in scores.edges], dtype=torch.float64)
    scores = replace(scores, values=theirs)
    for size, own in stored["circuits"].items():
        found = scores.graph(k=int(size), by="magnitude")
        kept = {(e.source, e.target, e.site) for e in found.kept_edges}
        assert kept == {edges[i] for i in own["edges"]}
        names = {n.lower().replace("l", "a", 1).replace("h", ".h") if n[0] == "L" else n.lower()
                 for n in found.kept_nodes}  # fmt: skip
        assert names == set(own["nodes"]), size
        assert found.direct and len(found.edges) == len(edges)


@models(FAMILIES)
def test_every_edge_gives_1_and_none_reads_baselines_alone(family, backend, tokenizer_folder):
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        base = mean_activations(view, data, mlps=True, progress=False)
        everything = graph(possible_edges(2, 4, parallel=view.parallel), view.parallel)
        dead_end = graph([("input", "M0", ""), ("M0", "L1H0", "q")], view.parallel)
        found = edge_faithfulness(view, [everything, dead_end], data, base, draws=2, **QUIET)
        assert found.faithfulness.tolist() == [1.0, 0.0] and found.edges[1] == 0
        assert found.random.shape == (2, 2) and bool((found.random[:, 0] == 1).all())
        assert found.empty == pytest.approx(balanced(empty_by_hand(family, base)), abs=1e-10)
        low, high = found.interval()
        assert bool(low.isnan().all() and high.isnan().all())  # one label has a single example


def empty_by_hand(family: str, base: Baseline) -> list[float]:
    """The direction where the logits read the means of all nodes, and the positions."""
    hand, found = ByHand(build(family)), []
    for item in examples():
        slots = [0] * (len(item.tokens) - 1) + [1]
        total = 0.0
        for name, own in hand.outputs(item.tokens).items():
            if name == "input":
                mean = base.embed_means.double()[slots]
            elif name[0] == "mlp":
                mean = base.mlp_means.double()[name[1], slots]
            else:
                mean = hand.of_head(*name[1:], base.means.double()[name[1], slots, name[2]])
            total = total + mean - own
        logits = hand.cut(item.tokens, "logits", total)
        found.append(float(logits[list(item.answers)].mean() - logits[list(item.others)].mean()))
    return found


def measured(folder: str) -> tuple[ModelView, Any, Baseline]:
    view, data = shared("gpt2", "bridge", folder, torch.float32), many(12)
    return view, data, mean_activations(view, data, mlps=True, progress=False)


def test_a_curve_has_mibs_areas_and_controls(tokenizer_folder):
    view, data, base = measured(tokenizer_folder)
    scores = edge_attribution_patching(view, data, base, **QUIET)
    found = edge_faithfulness_curve(view, scores, data, base, draws=2, by="magnitude", **QUIET)
    assert found.fractions == MIB_FRACTIONS
    assert found.cpr == pytest.approx(float(cpr(MIB_FRACTIONS, found.faithfulness)))
    assert found.cmd == pytest.approx(float(cmd(MIB_FRACTIONS, found.faithfulness)))
    assert float(found.faithfulness[-1]) == 1.0 and found.edges[-1] == 110
    low, high = found.interval()
    inside = (low <= found.faithfulness + 1e-9) & (found.faithfulness <= high + 1e-9)
    assert bool(inside.all())
    one = edge_faithfulness(
        view, scores.graph(fraction=0.5, by="magnitude"), data, base, draws=0, **QUIET
    )
    assert_close(one.faithfulness[0], found.faithfulness[-2], atol=1e-6)
    assert one.cpr != one.cpr and one.random.shape == (0, 1)
    table = found.to_dataframe()
    assert list(table)[:3] == ["fraction", "edges", "faithfulness"] and len(table) == 10
    assert isinstance(found, EdgeFaithfulness) and "<table" in found._repr_html_()
    assert "10 graphs" in repr(found) and "\n" not in repr(found)
    share = edge_faithfulness(
        view, scores.graph(k=110), data, base, metric="accuracy", draws=0, **QUIET
    )
    assert 0 <= share.full <= 1 and share.faithfulness.tolist() == [1.0]
    assert [limit.tolist() for limit in share.interval()] == [[1.0], [1.0]]
    with pytest.raises(InputError, match="graphs: got none"):
        edge_faithfulness(view, [], data, base, **QUIET)


def test_edges_of_another_kind_or_model_are_refused(tokenizer_folder):
    view, data, base = measured(tokenizer_folder)
    traced = trace_circuit(view, data, base, **QUIET).graph
    assert not traced.direct
    with pytest.raises(InputError, match="stand for all paths.*expected direct edges"):
        edge_faithfulness(view, traced, data, base, **QUIET)
    other = replace(graph([], False), n_heads=5)
    with pytest.raises(InputError, match="n_heads: 5, the model has 4"):
        edge_faithfulness(view, other, data, base, **QUIET)
    scores = edge_attribution_patching(view, data, base, **QUIET)
    llama = shared("llama", "bridge", tokenizer_folder, torch.float32)
    with pytest.raises(ArtifactError, match="this set of scores"):
        edge_faithfulness_curve(llama, scores, data, base, **QUIET)
