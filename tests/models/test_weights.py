"""Weights by name: the elements of Hugging Face's own parameters, seen through both classes."""

from __future__ import annotations

import subprocess

import pytest
import torch
import transformers
from helpers.checks import assert_same_bits
from helpers.hf_layout import ROLES, home, kv_heads, norms
from helpers.shared import BOTH_CLASSES, EVERY_FAMILY, models, shared
from helpers.tiny_models import _GROUPED, D_MODEL, EXPERTS, build, prompts
from helpers.wrapped import needs_hooked, tokenizer, view, wrap

from cdt_lens.core.errors import UnsupportedModelError
from cdt_lens.finetuning.finetune import count_parameters
from cdt_lens.finetuning.slices import norm_weights
from cdt_lens.models.loading import bridge_of
from cdt_lens.models.view import ModelView
from cdt_lens.models.weights import (
    canonical,
    check_trainable,
    first_tensor,
    holders,
    is_bias,
    is_norm,
    named_weights,
    own_weights,
    place,
    sync_fused,
)


def test_norms_that_keep_hugging_faces_names_are_norms(tokenizer_folder):
    """A norm for each head, which no rule of TransformerLens maps."""
    config = transformers.StableLmConfig(**_GROUPED, qk_layernorm=True)
    model = transformers.StableLmForCausalLM(config)
    wanted = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    seen = ModelView(bridge_of(model, tokenizer(tokenizer_folder)))
    found = {name: value.numel() for name, value in own_weights(seen).items() if is_norm(name)}
    assert sum(found.values()) == wanted and len(found) > 2 * 4


def test_a_multimodal_checkpoint_has_the_weights_of_its_language_model(
    tokenizer_folder, monkeypatch
):
    """Its vision tower has layers and norms too, which no text reaches.

    TransformerLens would install torchvision, and another torch, to read its processor of images.
    """
    monkeypatch.setattr(subprocess, "check_call", lambda *_: pytest.fail("pip was run"))
    reads = transformers.AutoProcessor.from_pretrained
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    text = build("gemma3").config.to_dict()
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=125,
        boi_token_index=126, eoi_token_index=127,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config)
    own = dict(model.model.language_model.named_parameters())
    wanted = {"all": own.values(), "norms": [p for name, p in own.items() if "norm" in name]}
    sizes = {which: sum(p.numel() for p in parts) for which, parts in wanted.items()}
    seen = ModelView(bridge_of(model, tokenizer(tokenizer_folder)))
    assert transformers.AutoProcessor.from_pretrained == reads
    found = named_weights(seen)
    assert found.keys() == named_weights(shared("gemma3", "bridge", tokenizer_folder)).keys()
    assert count_parameters(seen) == sizes["all"]
    assert sum(p.numel() for p in norm_weights(seen).values()) == sizes["norms"]


@models(EVERY_FAMILY)
def test_attention_norms_and_embeddings_are_hugging_faces(family, backend, tokenizer_folder):
    model = build(family)
    state = model.state_dict()
    found = named_weights(shared(family, backend, tokenizer_folder))
    for layer in range(model.config.num_hidden_layers):
        for role in ROLES:
            heads = kv_heads(model) if role[-1] in "KV" else model.config.num_attention_heads
            whole = found.get(f"blocks.{layer}.attn.{role}")
            for head in range(heads):
                expected = home(model, role, layer, head)
                if expected is not None:
                    assert torch.equal(whole[head], expected.of(state)), (role, layer, head)
                elif whole is not None:
                    assert not whole[head].any()  # a bias that the class adds
    for theirs, ours in norms(model).items():
        assert torch.equal(found[ours], state[theirs]), ours
    assert torch.equal(found["embed.W_E"], model.get_input_embeddings().weight)
    assert torch.equal(found["unembed.W_U"], model.get_output_embeddings().weight.T)


@models(EVERY_FAMILY + EXPERTS)
def test_own_weights_are_all_of_the_checkpoint_and_no_more(family, backend, tokenizer_folder):
    model = build(family)
    own = own_weights(shared(family, backend, tokenizer_folder))
    count = sum(value.numel() for value in own.values())
    if model.config.tie_word_embeddings:
        count -= own["unembed.W_U"].numel()
    if family == "opt":  # two rows of its position table are for padding
        count += 2 * D_MODEL
    assert count == sum(p.numel() for p in model.parameters())


@needs_hooked
@pytest.mark.parametrize("family", BOTH_CLASSES)
def test_both_classes_give_the_same_names_and_values(family, tokenizer_folder):
    hooked, bridge = (
        own_weights(shared(family, backend, tokenizer_folder)) for backend in ("hooked", "bridge")
    )
    assert list(hooked) == list(bridge)
    for name, value in hooked.items():
        assert torch.equal(value, bridge[name]), name


@models(("gpt2", "pythia", "qwen3"))
def test_writing_into_any_weight_reaches_the_forward_pass(family, backend, tokenizer_folder):
    seen = view(family, backend, tokenizer_folder)
    tokens = prompts()
    before = seen.logits(tokens)
    for name, value in own_weights(seen).items():
        if name.endswith("b_K") and family == "gpt2":
            continue  # the same shift of every score: softmax takes it off
        kept = value.clone()
        value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
        assert not torch.allclose(seen.logits(tokens), before, rtol=0, atol=1e-6), name
        value.copy_(kept)
    assert torch.equal(seen.logits(tokens), before)


@pytest.mark.parametrize(
    ("name", "bias", "norm"),
    [
        ("blocks.0.attn.W_Q", False, False),
        ("blocks.0.attn.b_Q", True, False),
        ("blocks.0.attn._b_K|attn.b_K", True, False),
        ("blocks.10.ln1_post.w", False, True),
        ("blocks.0.ln2.b", True, True),
        ("blocks.0.attn.q_norm.w", False, True),
        ("blocks.0.mlp.ln.b", True, True),
        ("ln_final.b", True, True),
        ("mlp.b_gate", True, False),
        ("unembed.b_U", True, False),
        ("embed.W_E", False, False),
    ],
)
def test_kinds_by_name(name, bias, norm):
    assert (is_bias(name), is_norm(name)) == (bias, norm)


def test_names_of_two_spellings():
    assert canonical("attn._W_K|attn.W_K") == "attn.W_K"
    assert canonical("ln1.w") == "ln1.w"
    module = torch.nn.Module()
    module.inner = torch.nn.Linear(2, 3)
    assert first_tensor(module, "absent.weight|inner.weight") is module.inner.weight
    assert first_tensor(module, "inner.weight|inner.bias") is module.inner.weight
    assert first_tensor(module, "inner|inner.none") is None


def test_place_tells_views_of_one_storage_apart():
    whole = torch.zeros(4, 6)
    assert place(whole) == place(whole[:2]) == place(whole.T)
    assert place(whole[1:])[0] == place(whole)[0]
    assert place(whole[1:]) != place(whole)
    assert place(torch.zeros(4, 6))[0] != place(whole)[0]


@models(("gpt2", "gemma2"))
def test_each_piece_of_memory_has_one_holder(family, backend, tokenizer_folder):
    seen = shared(family, backend, tokenizer_folder)
    found = holders(seen)
    for name, value in named_weights(seen).items():
        if is_bias(name) and not value.any():
            continue
        assert place(value)[0] in found, name
    assert len({place(p)[0] for p in found.values()}) == len(found)


# Fused projections ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "pythia", "neox_seq", "llama"])
def test_what_is_written_reaches_the_parameters_that_hugging_face_saves(family, tokenizer_folder):
    """Into each head's slice its own number; the fused projection must hold it where it belongs."""
    model = wrap(family, "bridge", tokenizer_folder)
    own, seen = build(family), ModelView(model)
    weights = named_weights(seen)
    expected = {name: value.clone() for name, value in own.state_dict().items()}
    number = 1000.0
    for role in ROLES:
        for head in range(kv_heads(own) if role[-1] in "KV" else 4):
            place_of = home(own, role, 1, head)
            if place_of is not None:
                number += 1
                weights[f"blocks.1.attn.{role}"][head] = number
                expected[place_of.name][place_of.index] = number
    sync_fused(seen)
    state = {
        name.replace("._original_component", "").replace("_original_component.", ""): value
        for name, value in model.original_model.state_dict().items()
    }
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


@models(("pythia", "gpt2"))
def test_sync_changes_nothing_where_nothing_was_written(family, backend, tokenizer_folder):
    model = wrap(family, backend, tokenizer_folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sync_fused(ModelView(model))
    for name, parameter in model.named_parameters():
        assert_same_bits(parameter.detach(), before[name])


# Models that cannot be trained ---------------------------------------------------------------------


@models(("gpt2", "llama", "gemma2"))
def test_a_model_as_it_was_trained_is_taken(family, backend, tokenizer_folder):
    check_trainable(shared(family, backend, tokenizer_folder))


@needs_hooked
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_folded_norms_are_refused_with_the_fix(family, tokenizer_folder):
    model = wrap(family, "hooked", tokenizer_folder)
    folded = type(model)(model.cfg, model.tokenizer)
    folded.load_and_process_state_dict(
        model.state_dict(), fold_ln=True, center_writing_weights=False, center_unembed=False
    )
    folded.cfg.model_name = "folded"
    with pytest.raises(UnsupportedModelError, match="folded: its norms are folded.*load_model"):
        check_trainable(ModelView(folded))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_bridge_in_compatibility_mode_is_refused_where_that_folds(family, tokenizer_folder):
    kept, folded = (wrap(family, "bridge", tokenizer_folder) for _ in range(2))
    kept.enable_compatibility_mode(no_processing=True)
    check_trainable(ModelView(kept))
    folded.enable_compatibility_mode()
    with pytest.raises(UnsupportedModelError, match="norms are folded"):
        check_trainable(ModelView(folded))
