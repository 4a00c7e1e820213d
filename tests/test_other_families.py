"""Fine-tuning of families that keep q, k, v or biases in a way of their own: right, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers.checks import assert_same_bits, left_untouched
from helpers.shared import EVERY_FAMILY, models, shared
from helpers.tiny_models import D_MLP, D_MODEL, D_VOCAB, N_HEADS, build, prompts
from helpers.tiny_training import HEADS as NAMES, QUICK, task
from helpers.wrapped import needs_hooked, tokenizer, view, wrap
from torch import Tensor

from cdt_lens.core.errors import UnsupportedModelError
from cdt_lens.finetuning.finetune import finetune
from cdt_lens.finetuning.options import SCOPES
from cdt_lens.finetuning.slices import head_slices
from cdt_lens.finetuning.trainable import SlicesAndWholes
from cdt_lens.models.heads import Head
from cdt_lens.models.loading import _hooked
from cdt_lens.models.view import ModelView
from cdt_lens.models.weights import check_trainable, is_bias, named_weights, own_weights, sync_fused

HEADS = tuple(map(Head.parse, NAMES))
UNSCORED = [scope for scope in SCOPES if scope != "near-zero"]  # that needs a circuit's scores

# Fused projections ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", UNSCORED)
@pytest.mark.parametrize("family", ["falcon_mq", "codegen"])
def test_a_fused_order_that_cannot_be_written_back_is_refused_before_training(
    family, scope, tokenizer_folder, tmp_path
):
    """CodeGen's shapes fit GPT-NeoX' order: its weights came back permuted. Falcon's do not."""
    model = wrap(family, "bridge", tokenizer_folder, torch.float32)
    kept = {name: value.clone() for name, value in model.original_model.state_dict().items()}
    log = tmp_path / "log.jsonl"
    with (
        left_untouched(model),
        pytest.raises(UnsupportedModelError, match=rf"tiny-{family}: blocks\.0\.attn\.qkv does no"),
    ):
        finetune(model, task(), heads=HEADS, scope=scope, log=log, **QUICK)
    assert not log.exists()
    for name, value in model.original_model.state_dict().items():
        assert_same_bits(value, kept[name])


@models(EVERY_FAMILY)
def test_families_that_are_written_back_right_are_taken(family, backend, tokenizer_folder):
    check_trainable(shared(family, backend, tokenizer_folder))


@pytest.mark.parametrize("family", ["falcon", "bigcode", "phi3"])
def test_other_fused_families_are_taken_and_come_back(family, tokenizer_folder):
    model = wrap(family, "bridge", tokenizer_folder, torch.float32)
    kept = {name: value.clone() for name, value in model.original_model.state_dict().items()}
    finetune(model, task(), heads=HEADS, **QUICK)
    for name, value in model.original_model.state_dict().items():
        assert_same_bits(value, kept[name])


def test_split_weights_edited_behind_the_fused_ones_are_refused(tokenizer_folder):
    """Putting the model back would write the edit into Hugging Face's weights."""
    seen = view("pythia", "bridge", tokenizer_folder)
    edited = named_weights(seen)["blocks.1.attn.b_K"]
    edited[2, 0] += 1
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.attn\.qkv.*edited its weights"):
        check_trainable(seen)
    sync_fused(seen)
    check_trainable(seen)


def test_a_weight_that_is_not_a_number_is_left_to_the_check_that_names_it(tokenizer_folder):
    seen = view("pythia", "bridge", tokenizer_folder)
    named_weights(seen)["blocks.0.attn.W_V"][0, 0] = torch.nan
    sync_fused(seen)
    check_trainable(seen)


@pytest.mark.parametrize("scope", ["decision", "full", "lora"])
def test_gpt2_cast_after_wrapping_is_trained_and_written_back(scope, tokenizer_folder):
    """A cast makes copies of what were views of the fused weights."""
    model = wrap("gpt2", "bridge", tokenizer_folder, torch.float32).to(torch.float64)
    kept = {name: value.clone() for name, value in model.original_model.state_dict().items()}
    result = finetune(model, task(valid=0), heads=HEADS, scope=scope, **QUICK)
    for name, value in model.original_model.state_dict().items():
        assert_same_bits(value, kept[name])
    with result.adapter.applied(model):
        attn = model.blocks[1].attn
        fused = attn.qkv.original_component
        split = torch.cat([getattr(attn, part).weight for part in "qkv"]).T
        assert torch.equal(fused.weight, split)
        assert torch.equal(
            fused.bias, torch.cat([getattr(attn, part).bias for part in "qkv"]).flatten()
        )
        old = kept["transformer.h.1.attn._original_component.c_attn._original_component.weight"]
        assert not torch.equal(fused.weight, old)


# HookedTransformers of one's own -------------------------------------------------------------------


def hooked_gptj(folder: str) -> tuple[Any, Any]:
    """Hugging Face's model, and TransformerLens' reading of it."""
    own = build("gptj", torch.float32)
    return own, _hooked(build("gptj", torch.float32), tokenizer(folder), "cpu", torch.float32, None)


def hooked_gemma() -> tuple[Any, Any]:
    """The same; TransformerLens reads a Gemma by its published names only, so by hand."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gemma_weights

    own = build("gemma", torch.float32)
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=D_MODEL, n_heads=N_HEADS, n_key_value_heads=2, d_head=12, d_mlp=D_MLP,
        d_vocab=D_VOCAB, n_ctx=64, act_fn="gelu_pytorch_tanh", normalization_type="RMS", eps=1e-6,
        positional_embedding_type="rotary", rotary_dim=12, final_rms=True, gated_mlp=True,
        original_architecture="GemmaForCausalLM", device="cpu",
    )  # fmt: skip
    model = HookedTransformer(cfg)
    # The zeros are what loading by name fills in as well.
    state = model.fill_missing_keys(convert_gemma_weights(own, cfg))
    model.load_state_dict(state, strict=False)
    return own, model.eval()


def sizes(weights: Mapping[str, Tensor], own: Any) -> int:
    """Numbers in `weights`, without what HookedTransformer keeps twice: a tied end, GPT-J's norm."""
    tied = own.config.tie_word_embeddings
    twice = [n for n in weights if (tied and n == "unembed.W_U") or (not tied and ".ln2." in n)]
    return sum(v.numel() for v in weights.values()) - sum(weights[n].numel() for n in twice)


@pytest.fixture(params=["gptj", "gemma"])
def read(request, tokenizer_folder) -> tuple[Any, Any]:
    return hooked_gptj(tokenizer_folder) if request.param == "gptj" else hooked_gemma()


@needs_hooked
def test_biases_that_no_checkpoint_has_are_nobodys_own(read):
    own, model = read
    tokens = prompts()
    torch.testing.assert_close(model(tokens), own(tokens).logits, rtol=0, atol=1e-4)
    found = own_weights(ModelView(model))
    assert sizes(found, own) == sum(p.numel() for p in own.parameters())


@needs_hooked
def test_biases_that_no_checkpoint_has_are_not_trained(read):
    own, model = read
    zeros = {n: v for n, v in named_weights(ModelView(model)).items() if not bool(v.any())}
    assert "blocks.0.attn.b_Q" in zeros
    with left_untouched(model):
        result = finetune(model, task(), heads=HEADS, **QUICK)
    trained = [*result.adapter.slices, *result.adapter.whole]
    assert "blocks.0.attn.W_Q" in trained and not zeros.keys() & set(trained)
    if not own.config.tie_word_embeddings:
        whole = finetune(model, task(), scope="full", **QUICK).adapter.whole
        assert not zeros.keys() & whole.keys()
        assert "blocks.1.mlp.b_in" in whole
        assert sizes(whole, own) == sum(p.numel() for p in own.parameters())


@needs_hooked
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_tied_embedding_is_not_trained_whole(dtype):
    """HookedTransformer's Gemma: W_E is sqrt(d_model) W_U^T, and full training would untie them."""
    _, model = hooked_gemma()
    model = model.to(dtype)
    model.embed.W_E.detach().mul_(1.1)  # a scale that half precision rounds
    with (
        left_untouched(model),
        pytest.raises(UnsupportedModelError, match=r"unembed\.W_U times 8\.8.*backend='bridge'"),
    ):
        finetune(model, task(), scope="full", **QUICK)
    finetune(model, task(), heads=HEADS, **QUICK)


@needs_hooked
def test_embeddings_of_their_own_are_trained_whole():
    """Neither unrelated ones nor those of a model of no family are one embedding kept twice."""
    _, model = hooked_gemma()
    view_of_it = ModelView(model)
    names = ("embed.W_E", "unembed.W_U")
    model.cfg.original_architecture = None
    assert SlicesAndWholes(view_of_it, (), names).wholes == names
    model.cfg.original_architecture = "GemmaForCausalLM"
    model.embed.W_E.detach().copy_(torch.randn(model.embed.W_E.shape))
    assert SlicesAndWholes(view_of_it, (), names).wholes == names
    model.embed.W_E.detach().zero_()
    assert SlicesAndWholes(view_of_it, (), names).wholes == names


@needs_hooked
@pytest.mark.parametrize("family", ["gpt2", "pythia"])
def test_zero_biases_that_a_checkpoint_has_are_trained(family, tokenizer_folder):
    """A fresh GPT-2's biases are all zero, and still its own."""
    seen = view(family, "hooked", tokenizer_folder)
    for name, value in named_weights(seen).items():
        if is_bias(name):
            value.zero_()
    own = own_weights(seen)
    assert {"blocks.0.attn.b_O", "blocks.1.mlp.b_in"} <= own.keys()
    roles = {part.role for part in head_slices(seen, HEADS)}
    assert {"b_Q", "b_K", "b_V"} <= roles
