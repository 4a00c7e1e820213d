"""A model whose projections are loaded while they run gives the numbers of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checks import assert_same_bits
from helpers.tiny_models import prompts
from helpers.tiny_tasks import examples
from helpers.tiny_training import HEADS, QUICK, task
from helpers.wrapped import needs_hooked, wrap
from torch import nn

from cdt_lens.circuits.faithfulness import faithfulness_curve
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core.errors import InputError, UnsupportedModelError
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.finetuning.finetune import finetune
from cdt_lens.models.offload import offload
from cdt_lens.models.provenance import weight_hash
from cdt_lens.models.resident import resident
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.one_pass import one_pass
from cdt_lens.scoring.sweep import score_heads

FAMILIES = ("llama", "gpt2", "pythia", "gemma3", "granite")


def away(model: Any) -> int:
    """How many numbers of the blocks are on the meta device."""
    return sum(p.numel() for p in model.blocks.parameters() if p.is_meta)


def scores_of(model: Any) -> list[HeadScores]:
    data = examples()
    baseline = mean_activations(model, data, progress=False)
    swept = [
        score_heads(model, data, baseline, rules=rules, progress=False)
        for rules in ("stable", "ablation", "official")
    ]
    return [*swept, one_pass(model, data, baseline, slopes="linear", progress=False)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("on_disk", [False, True])
def test_scores_and_hash_are_those_of_the_whole_model(family, on_disk, tokenizer_folder, tmp_path):
    whole = wrap(family, "bridge", tokenizer_folder, torch.float32)
    model = wrap(family, "bridge", tokenizer_folder, torch.float32)
    offload(model, folder=tmp_path if on_disk else None)
    hidden = away(model)
    assert hidden > 0 or family == "gpt2"  # whose projections are no nn.Linear
    assert bool(list(tmp_path.rglob("*.dat"))) == (on_disk and hidden > 0)
    assert weight_hash(ModelView(model)) == weight_hash(ModelView(whole))
    assert_same_bits(ModelView(model).logits(prompts()), ModelView(whole).logits(prompts()))
    for found, expected in zip(scores_of(model), scores_of(whole), strict=True):
        assert_same_bits(found.per_example, expected.per_example)
    assert away(model) == hidden


def test_circuits_are_ablated_alike(tokenizer_folder):
    whole = wrap("llama", "bridge", tokenizer_folder, torch.float32)
    model = wrap("llama", "bridge", tokenizer_folder, torch.float32)
    offload(model)
    data, curves = examples(), []
    baseline = mean_activations(whole, data, progress=False)
    scores = score_heads(whole, data, baseline, progress=False)
    for one in (model, whole):
        curves.append(faithfulness_curve(one, scores, data, baseline, progress=False))
    assert curves[0].to_dataframe().equals(curves[1].to_dataframe())


def test_a_block_is_whole_within_resident_and_away_afterwards(tokenizer_folder):
    model = wrap("llama", "bridge", tokenizer_folder, torch.float32)
    expected = model.blocks[1].attn.W_Q.detach().clone()
    offload(model)
    hidden = away(model)
    with pytest.raises(KeyError), resident(model.blocks[1]):
        assert torch.equal(model.blocks[1].attn.W_Q, expected)
        raise KeyError
    assert away(model) == hidden


def test_training_and_adapters_need_the_whole_model(tokenizer_folder):
    whole = wrap("llama", "bridge", tokenizer_folder, torch.float32)
    model = wrap("llama", "bridge", tokenizer_folder, torch.float32)
    adapter = finetune(whole, task(), heads=HEADS, **QUICK).adapter
    offload(model)
    for use in (
        lambda: finetune(model, task(), heads=HEADS, **QUICK),
        lambda: finetune(model, task(), scope="full", **QUICK),
        lambda: adapter.apply(model),
    ):
        with pytest.raises(UnsupportedModelError, match="offloaded"):
            use()


def test_a_weight_that_is_not_finite_is_found_where_it_is(tokenizer_folder):
    model = wrap("llama", "bridge", tokenizer_folder, torch.float32)
    linear = next(m for m in model.blocks[1].modules() if isinstance(m, nn.Linear))
    linear.weight.detach()[0, 0] = torch.nan
    offload(model)
    with pytest.raises(InputError, match="NaN"):
        mean_activations(model, examples(), progress=False)


@needs_hooked
def test_a_hooked_transformer_is_refused(tokenizer_folder):
    with pytest.raises(InputError, match="HookedTransformer.*backend='bridge'"):
        offload(wrap("llama", "hooked", tokenizer_folder, torch.float32))


def test_twice_is_refused(tokenizer_folder, tmp_path: Path):
    model = wrap("llama", "bridge", tokenizer_folder, torch.float32)
    offload(model)
    with pytest.raises(InputError, match="offloaded already"):
        offload(model, folder=tmp_path)
