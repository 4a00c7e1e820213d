"""The smallest circuit that reaches a faithfulness, against every prefix and every removal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.shared import shared
from helpers.tiny_tasks import many

from cdt_lens.circuits.faithfulness import circuit_faithfulness
from cdt_lens.circuits.smallest import smallest_circuit
from cdt_lens.core.errors import InputError
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.planted.catalogue import planted_circuit
from cdt_lens.scoring.sweep import score_heads


def setting(folder: str):
    view = shared("gpt2", "bridge", folder, torch.float32)
    data = many(40)
    baseline = mean_activations(view, data, progress=False)
    return view, data, baseline, score_heads(view, data, baseline, progress=False)


@pytest.mark.parametrize("target", [0.3, 0.8])
def test_it_reaches_the_target_and_no_single_head_can_go(target, tokenizer_folder):
    view, data, baseline, scores = setting(tokenizer_folder)
    options = {"draws": 1, "progress": False}

    def limit(heads: tuple[Head, ...]) -> float:
        circuit = scores.circuit(heads, {})
        return circuit_faithfulness(view, circuit, data, baseline, **options).interval[0]

    found = smallest_circuit(view, scores, data, baseline, target=target, progress=False)
    assert limit(found.heads) >= target - 1e-6
    ranking = scores.ranking()
    prefix = found.selection["prefix"]
    for size in range(1, prefix):
        assert limit(ranking[:size]) < target
    assert limit(ranking[:prefix]) >= target - 1e-6
    assert len(found) <= prefix
    if len(found) > 1:
        for head in found.heads:
            assert limit(tuple(h for h in found.heads if h != head)) < target


def test_a_planted_circuit_is_found_from_a_ranking_with_strangers():
    """The ranking puts a head that does nothing between the two that do all."""
    planted = planted_circuit("hand-composition")
    true = [head for head, inside in zip(all_heads(*planted.truth.shape),
            planted.truth.flatten().tolist(), strict=True) if inside]  # fmt: skip
    others = [head for head in all_heads(*planted.truth.shape) if head not in true]
    order = [true[0], *others[:2], *true[1:], *others[2:]]
    baseline = mean_activations(planted.model, planted.train, progress=False)
    real = score_heads(planted.model, planted.train, baseline, progress=False)
    values = torch.zeros_like(real.values)
    for place, head in enumerate(order):
        values[head.layer, head.head] = float(len(order) - place)
    found = smallest_circuit(
        planted.model, replace(real, values=values), planted.valid, baseline, progress=False
    )
    assert found.selection["prefix"] == len(true) + 2
    assert set(found.heads) == set(true)


def test_wrong_targets_are_refused(tokenizer_folder):
    view, data, baseline, scores = setting(tokenizer_folder)
    for options, message in (
        ({"target": 0.0}, "target=0.0"),
        ({"target": 1.5}, "target=1.5"),
        ({"level": 1.0}, "level=1.0"),
    ):
        with pytest.raises(InputError, match=message):
            smallest_circuit(view, scores, data, baseline, progress=False, **options)
    some = score_heads(view, data, baseline, heads=[Head(0, 0)], progress=False)
    with pytest.raises(InputError, match="only 1 heads"):
        smallest_circuit(view, some, data, baseline, progress=False)
