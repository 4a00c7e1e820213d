"""The way down from the logits: which edges are kept, on scores by hand and on planted circuits."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import left_untouched
from helpers.tiny_tasks import examples
from helpers.wrapped import wrap

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.core.errors import InputError
from cdt_lens.decomposition.baseline import Baseline, mean_activations
from cdt_lens.models.heads import Head, Mlp
from cdt_lens.models.view import ModelView
from cdt_lens.planted.catalogue import planted_circuit
from cdt_lens.scoring.edge_scores import EdgeScores, score_edges
from cdt_lens.scoring.iterative import select_edges, trace_circuit
from cdt_lens.tasks.task import Examples


def means(view: ModelView, data: Examples) -> Baseline:
    return mean_activations(view, data, mlps=True, progress=False)


def edge_scores() -> EdgeScores:
    """L1H1 and M1 matter; L0H0 feeds L1H1's keys; M0 and L1H0 feed M1."""
    units = (Head(0, 0), Head(0, 1), Mlp(0), Head(1, 0), Head(1, 1), Mlp(1))
    to_logits = torch.tensor([0.0, 0.1, 0.0, 0.0, -2.0, 1.0])
    to_heads, to_mlps = torch.zeros(6, 3, 2, 2), torch.zeros(6, 2)
    to_heads[0, 1, 1, 1] = -1.5
    to_heads[1, 0, 1, 1] = 0.4
    to_heads[2, 2, 1, 1] = 0.2
    to_mlps[2, 1], to_mlps[3, 1], to_mlps[0, 0] = 0.7, 0.6, 0.3
    to_heads[2, 0, 1, 0] = 0.05
    return EdgeScores(units, to_logits, to_heads, to_mlps)


def test_the_way_down_takes_the_strongest_into_each_unit_taken():
    chosen = [edge.name for edge in select_edges(edge_scores(), width=2, fan_in=2)]
    assert chosen == [
        "L1H1->logits", "M1->logits",
        "M0->M1", "L1H0->M1",
        "M0->L1H0<q>",
        "L0H0->L1H1<k>", "L0H1->L1H1<q>",
        "L0H0->M0",
    ]  # fmt: skip
    assert len(select_edges(edge_scores(), width=1, fan_in=1)) == 2


def test_the_planted_composition_is_traced(tmp_path):
    """A head that moves another's attention has its edge to that head's queries or keys."""
    planted = planted_circuit("hand-composition")
    baseline = mean_activations(planted.model, planted.train, mlps=True, progress=False)
    circuit = trace_circuit(
        planted.model, planted.train, baseline, width=1, fan_in=1, progress=False
    )
    truth = {str(head) for head in circuit.heads}
    assert truth == {str(Head(*at)) for at in planted.truth.nonzero().tolist()}
    (inner,) = [e for e in circuit.graph.kept_edges if e.target != "logits"]
    assert inner.site in ("q", "k")
    again = Circuit.load(circuit.save(tmp_path / "circuit.json"))
    assert [e.name for e in again.graph.edges] == [e.name for e in circuit.graph.edges]
    assert again.provenance.options["method"] == "iterative-cdt"


def test_the_model_is_left_as_it_was_and_mistakes_are_told(tokenizer_folder):
    model = wrap("gpt2", "bridge", tokenizer_folder, torch.float32)
    view, data = ModelView(model), examples()
    baseline = means(view, data)
    with left_untouched(model):
        trace_circuit(model, data, baseline, width=2, fan_in=1, progress=False)
    with pytest.raises(InputError, match="width=0: expected a whole number of at least 1"):
        trace_circuit(model, data, baseline, width=0)
    with pytest.raises(InputError, match="context='both' is defined for logits only"):
        score_edges(view, data, baseline, rules="two-ended")
    plain = mean_activations(view, data, progress=False)
    with pytest.raises(InputError, match="holds no values for MLPs.*mlps=True"):
        score_edges(view, data, plain, progress=False)


@pytest.mark.parametrize("widths", [{"width": 0}, {"width": -1}, {"fan_in": 0}, {"fan_in": -1}])
def test_edges_are_not_selected_by_a_count_below_one(widths):
    with pytest.raises(InputError, match="expected a whole number of at least 1"):
        select_edges(edge_scores(), **{"width": 1, "fan_in": 1, **widths})


def test_edges_into_a_unit_by_name():
    scores = edge_scores()
    assert list(scores.into("L1H1")) == list(scores.into(Head(1, 1)))
    assert list(scores.into("M1")) == list(scores.into(Mlp(1)))
    for strange in (Head(9, 0), "L0H7", "M2", "logits"):
        with pytest.raises(InputError, match=f"edges into {strange}: the units are L0H0"):
            scores.into(strange)
