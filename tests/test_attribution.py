"""Exact ablation is what TransformerLens' own hooks give, prompt by prompt."""

from __future__ import annotations

from pathlib import Path

import by_hand
import pytest
from checks import assert_same_bits
from shared import models, shared
from tiny_models import Float64Throughout
from tiny_tasks import GOLD, examples
from wrapped import wrap

from cdt_lens.attribution import exact_ablation
from cdt_lens.baselines import mean_activations, zero_baseline
from cdt_lens.heads import Head, all_heads
from cdt_lens.model import ModelView
from cdt_lens.scores import score_heads


@models()
def test_it_equals_an_ablation_by_hand(family, backend, tokenizer_folder):
    """Prompts of five lengths, batched and padded here, alone there."""
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline = mean_activations(view, data, progress=False)
        found = exact_ablation(view, data, baseline, batch_size=4, progress=False)
        for number, item in enumerate(data):
            full = by_hand.direction(by_hand.ablated_logits(view, item, (), baseline), item)
            for head in all_heads(view.n_layers, view.n_heads):
                logits = by_hand.ablated_logits(view, item, [head], baseline)
                expected = full - by_hand.direction(logits, item)
                actual = float(found.per_example[number, head.layer, head.head])
                assert actual == pytest.approx(expected, abs=2e-6)  # kept as float32
    by_example = found.per_example[:, 1, 2].tolist()
    assert float(found.values[1, 2]) == pytest.approx(by_hand.balanced(by_example, data), abs=1e-6)


def test_it_is_the_ablation_preset_under_its_own_name(tmp_path: Path, tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    baseline = zero_baseline(view, data)
    options = {"heads": [Head(0, 1), Head(1, 3)], "batch_size": 2, "rows": 4, "progress": False}
    found = exact_ablation(view, data, baseline, checkpoint=tmp_path / "c.json", **options)
    swept = score_heads(view, data, baseline, rules="ablation", **options)
    assert_same_bits(found.values, swept.values)
    assert found.method == "mean-ablation"
    assert swept.method == "cdt"
    assert found.provenance.options["rules"]["preset"] == "ablation"
    assert (tmp_path / "c.json").exists()
    assert found.example_labels == GOLD


@models(("gpt2", "llama"))
def test_a_head_that_writes_nothing_scores_0(family, backend, tokenizer_folder):
    model = wrap(family, backend, tokenizer_folder)
    model.blocks[1].attn.W_O.detach()[2] = 0.0
    view, data = ModelView(model), examples()
    found = exact_ablation(view, data, zero_baseline(view, data), progress=False)
    silent = found.values.abs() < 1e-12
    assert silent.nonzero().tolist() == [[1, 2]]
