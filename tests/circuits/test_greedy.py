"""The greedy circuit against the same search written out with measured circuits."""

from __future__ import annotations

import pytest
import torch
from helpers.shared import shared
from helpers.tiny_tasks import examples

from cdt_lens.circuits.ablation import circuit_metric
from cdt_lens.circuits.greedy import greedy_circuit
from cdt_lens.core.errors import InputError
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.models.heads import all_heads
from cdt_lens.scoring.sweep import score_heads


@pytest.fixture(scope="module")
def case(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder, torch.float32), examples()
    baseline = mean_activations(view, data, progress=False)
    return view, score_heads(view, data, baseline, progress=False), data, baseline


@pytest.mark.parametrize("pool", [3, 8, 32])
def test_each_step_adds_the_head_that_brings_f_nearest_to_1(case, pool):
    view, scores, data, baseline = case
    everyone = all_heads(2, 4)

    def metric(heads) -> float:
        return float(circuit_metric(view, [heads], data, baseline, progress=False)[0])

    full, empty = metric(everyone), metric(())
    chosen, candidates = [], list(scores.ranking()[:pool])
    for _ in range(3):
        f = {head: (metric([*chosen, head]) - empty) / (full - empty) for head in candidates}
        best = min(candidates, key=lambda head: abs(1 - f[head]))
        chosen.append(best)
        candidates.remove(best)
    found = greedy_circuit(view, scores, data, baseline, k=3, pool=pool, progress=False)
    assert set(found.heads) == set(chosen)
    assert found.selection["rule"] == "greedy"
    assert (found.selection["k"], found.selection["pool"]) == (3, pool)
    assert found.provenance == scores.provenance


def test_the_pool_is_the_top_of_the_signed_ranking(case):
    view, scores, data, baseline = case
    assert set(scores.top(3)) != set(scores.top(3, by="magnitude"))
    found = greedy_circuit(view, scores, data, baseline, k=3, pool=3, progress=False)
    assert found.heads == scores.select(k=3).heads


@pytest.mark.parametrize(("k", "pool"), [(0, 8), (-1, 8), (4, 3), (9, 32)])
def test_more_heads_than_there_are_candidates_are_refused(case, k, pool):
    view, scores, data, baseline = case
    with pytest.raises(InputError, match=f"k={k}"):
        greedy_circuit(view, scores, data, baseline, k=k, pool=pool, progress=False)


def test_all_heads_are_the_whole_model(case):
    view, scores, data, baseline = case
    found = greedy_circuit(view, scores, data, baseline, k=8, progress=False)
    assert found.heads == all_heads(2, 4)
