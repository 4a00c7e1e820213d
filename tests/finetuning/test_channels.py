"""MLP channels: their slices, gradients against Hugging Face's own, and nothing else moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.checks import assert_same_bits, left_untouched
from helpers.hf_layout import channel_home, dense_gradients
from helpers.shared import models
from helpers.tiny_models import Float64Throughout, build, prompts
from helpers.tiny_tasks import examples
from helpers.tiny_training import HEADS, QUICK, task, values
from helpers.wrapped import view

from cdt_lens.core.errors import InputError, UnsupportedModelError
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.answer_pass import AnswerPass
from cdt_lens.finetuning.finetune import finetune
from cdt_lens.finetuning.slices import CHANNEL_ROLES, channel_slices, check_slices
from cdt_lens.finetuning.trainable import SlicesAndWholes
from cdt_lens.models.loading import has_hooked_transformer
from cdt_lens.models.view import view_of
from cdt_lens.models.weights import named_weights
from cdt_lens.tasks.metrics import answer_loss

FAMILIES = ("gpt2", "qwen3", "pythia", "gemma3")


@models(FAMILIES)
def test_gradients_of_channels_are_slices_of_the_dense_ones(family, backend, tokenizer_folder):
    data = examples(lowest=0)
    with Float64Throughout():
        own = build(family)
        dense = dense_gradients(own, data)
        seen = view(family, backend, tokenizer_folder)
        parts = channel_slices(seen, 3)
        check_slices(seen, parts)
        trainable = SlicesAndWholes(seen, parts)
        with trainable.attached(), seen.quiet(gradients=True):
            for batch in data.batches(2):
                logits = AnswerPass(seen)(batch).gather(1, batch.candidates)
                answer_loss(logits, batch.is_answer, batch.is_candidate).sum().backward()
        found = {m.name: m.value.grad for m in trainable.masters}
    scale = max(float(gradient.norm()) for gradient in dense.values())
    compared = set()
    for part in parts:
        for row, channel in enumerate(part.index):
            place = channel_home(own, part.role, part.layer, channel)
            if place is None:  # a bias that TransformerLens adds
                assert part.role == "b_in"
                continue
            expected = place.of(dense).flatten()
            assert float((found[part.name][row].flatten() - expected).norm()) <= 1e-10 * scale
            compared.add(part.role)
    assert {"W_in", "W_out"} <= compared


@pytest.mark.skipif(not has_hooked_transformer(), reason="transformer-lens 4 has the bridge only")
def test_a_bias_behind_the_gate_is_no_bias_of_a_channels_input():
    """HookedTransformer computes act(gate) * linear + b_in, so b_in is not at the linear part."""
    import transformer_lens

    torch.manual_seed(0)
    own = transformer_lens.HookedTransformer(
        transformer_lens.HookedTransformerConfig(
            n_layers=2, d_model=16, n_ctx=16, d_head=4, n_heads=4, d_mlp=24, act_fn="silu",
            d_vocab=50, gated_mlp=True, normalization_type="RMS", seed=0,
        )
    )  # fmt: skip
    for block in own.blocks:
        torch.nn.init.normal_(block.mlp.b_in)
    seen = view_of(own)
    parts = channel_slices(seen, 5)
    check_slices(seen, parts)
    assert {part.role for part in parts} == {"W_in", "W_gate", "W_out"}


@pytest.mark.parametrize("choice", ["random", "weight"])
@models(("gpt2", "llama"))
def test_channels_and_heads_move_and_nothing_else(
    family, backend, choice, tokenizer_folder, tmp_path: Path
):
    """Bit for bit, and the adapter takes them on and off again, from its file too."""
    seen = view(family, backend, tokenizer_folder, torch.float32)
    seen.logits(prompts())
    given = {"heads": HEADS, "norms": "none", "channels": 2, "channel_choice": choice}
    with left_untouched(seen.tl):
        result = finetune(seen, task(), **given, **QUICK)
    before = values(seen)
    adapter = Adapter.load(result.adapter.save(tmp_path / "adapter"))
    with adapter.applied(seen):
        after = values(seen)
    for name, value in values(seen).items():
        assert_same_bits(value, before[name])
    for part in channel_slices(seen, 2, choice=choice):
        moved = after[part.name] != before[part.name]
        mask = torch.zeros_like(moved)
        (mask.T if part.role in ("W_in", "W_gate") else mask)[list(part.index)] = True
        assert not moved[~mask].any() and moved[mask].double().mean() > 0.9, part.name
    others = {n for n in before if ".mlp." in n and n.rpartition(".")[2] not in CHANNEL_ROLES}
    others |= {n for n in before if ".attn." not in n and ".mlp." not in n}
    for name in others:
        assert_same_bits(after[name], before[name])
    expected = sum(part.read().numel() for part in channel_slices(seen, 2, choice=choice))
    heads_alone = finetune(seen, task(), heads=HEADS, norms="none", **QUICK)
    assert result.trained_parameters == heads_alone.trained_parameters + expected


def test_the_largest_channels_are_those_of_the_largest_output_rows(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder)
    weights = named_weights(seen)
    for part in channel_slices(seen, 3, choice="weight"):
        norms = weights[f"blocks.{part.layer}.mlp.W_out"].norm(dim=1)
        assert set(part.index) == set(norms.topk(3).indices.tolist())
    one, other = (channel_slices(seen, 3, seed=seed) for seed in (0, 1))
    assert one[0].index != other[0].index


def test_what_has_no_such_channels_is_refused(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder)
    with pytest.raises(InputError, match=r"channels=9999: the MLP of layer 0 has"):
        channel_slices(seen, 9999)
    assert issubclass(UnsupportedModelError, Exception)
