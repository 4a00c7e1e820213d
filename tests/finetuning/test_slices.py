"""Slices: the right elements of the real parameters, as views, or a refusal."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import left_untouched, unchecked_types
from helpers.hf_layout import ROLES, home, kv_head_of, norms
from helpers.shared import EVERY_FAMILY, models, shared
from helpers.tiny_models import N_HEADS, build, prompts
from helpers.tiny_training import HEADS
from helpers.wrapped import needs_hooked, view, wrap

from cdt_lens.core.errors import InputError, UnsupportedModelError
from cdt_lens.finetuning.slices import (
    WeightSlice,
    check_slices,
    head_slices,
    norm_weights,
    selected_heads,
    siblings,
)
from cdt_lens.models.heads import Head
from cdt_lens.models.view import ModelView
from cdt_lens.models.weights import named_weights

CHOSEN = ("L0H1", "L1H3", "L1H2")
GROUPED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")


def heads_of(*names: str) -> tuple[Head, ...]:
    return tuple(Head.parse(name) for name in names)


@models(EVERY_FAMILY)
def test_slices_are_the_elements_of_hugging_faces_parameters(family, backend, tokenizer_folder):
    own = build(family)
    state = own.state_dict()
    found = head_slices(shared(family, backend, tokenizer_folder), CHOSEN)
    expected = {}
    for layer, queries in ((0, [1]), (1, [2, 3])):
        for role in ROLES:
            heads = queries
            if role[-1] in "KV":
                heads = sorted({kv_head_of(own, head) for head in queries})
            places = [home(own, role, layer, head) for head in heads]
            if None not in places:
                expected[layer, role] = (heads, torch.stack([p.of(state) for p in places]))
    assert [(part.layer, part.role) for part in found] == list(expected)
    for part in found:
        heads, values = expected[part.layer, part.role]
        assert list(part.index) == heads
        assert torch.equal(part.read(), values), part.name
        assert part.name == f"blocks.{part.layer}.attn.{part.role}"


@models(EVERY_FAMILY)
def test_writing_a_slice_changes_its_elements_alone_and_the_forward_pass(
    family, backend, tokenizer_folder
):
    seen = view(family, backend, tokenizer_folder)
    for part in head_slices(seen, CHOSEN):
        before = {name: value.clone() for name, value in named_weights(seen).items()}
        logits = seen.logits(prompts())
        kept = part.read()
        part.write(torch.randn(kept.shape, generator=torch.Generator().manual_seed(3)).double())
        for name, value in named_weights(seen).items():
            changed = value != before[name]
            if name == part.name:
                inside = torch.zeros_like(changed)
                inside[list(part.index)] = True
                assert torch.equal(changed, inside)
            else:
                assert not changed.any(), (part.name, name)
        # A shift of all keys moves every score of a query alike, which softmax takes off.
        if not (part.role == "b_K" and family in ("gpt2", "opt")):
            assert not torch.allclose(seen.logits(prompts()), logits, rtol=0, atol=1e-6), part.name
        part.write(kept)
        assert torch.equal(seen.logits(prompts()), logits)


@models(("llama", "gpt2"))
def test_a_read_is_a_copy(family, backend, tokenizer_folder):
    part = head_slices(shared(family, backend, tokenizer_folder), HEADS)[0]
    read = part.read()
    read += 1
    assert not torch.equal(part.read(), read)


# Grouped keys and values ---------------------------------------------------------------------------


@models(("llama", "gpt2"))
def test_a_shared_slice_is_trained_when_any_of_its_heads_is(family, backend, tokenizer_folder):
    seen = shared(family, backend, tokenizer_folder)
    found = {p.name: p.index for p in head_slices(seen, ("L0H1", "L0H2", "L0H3"))}
    grouped = family == "llama"
    assert found["blocks.0.attn.W_Q"] == found["blocks.0.attn.W_O"] == (1, 2, 3)
    assert found["blocks.0.attn.W_K"] == ((0, 1) if grouped else (1, 2, 3))
    assert siblings(seen, ("L0H1", "L0H2", "L0H3")) == (heads_of("L0H0") if grouped else ())
    assert siblings(seen, ("L0H1", "L1H0", "L1H1")) == (heads_of("L0H0") if grouped else ())


@pytest.mark.parametrize("family", GROUPED)
def test_skip_takes_no_keys_or_values_and_reaches_no_siblings(family, tokenizer_folder):
    seen = shared(family, "bridge", tokenizer_folder)
    roles = {part.role for part in head_slices(seen, HEADS, kv="skip")}
    assert roles == ({"W_Q", "W_O", "b_Q"} if family == "qwen2" else {"W_Q", "W_O"})
    assert siblings(seen, HEADS, kv="skip") == ()
    assert selected_heads(seen, HEADS, kv="skip") == heads_of(*HEADS)


@models(("qwen2", "pythia"))
def test_groups_takes_every_head_of_a_group(family, backend, tokenizer_folder):
    seen = shared(family, backend, tokenizer_folder)
    whole = heads_of("L0H0", "L0H1", "L1H2", "L1H3") if family == "qwen2" else heads_of(*HEADS)
    assert selected_heads(seen, HEADS, kv="groups") == whole
    assert siblings(seen, HEADS, kv="groups") == ()
    found = {part.name: part.index for part in head_slices(seen, HEADS, kv="groups")}
    assert found["blocks.1.attn.b_Q"] == tuple(h.head for h in whole if h.layer == 1)
    assert found["blocks.1.attn.b_K"] == ((1,) if family == "qwen2" else (2,))


def test_all_heads_take_each_slice_once(tokenizer_folder):
    seen = shared("llama", "bridge", tokenizer_folder)
    everyone = [Head(layer, head) for layer in range(2) for head in range(N_HEADS)]
    for part in head_slices(seen, [*everyone, *everyone]):
        assert part.index == tuple(range(part.whole.shape[0]))
    assert siblings(seen, everyone) == ()


def test_no_heads_no_slices(tokenizer_folder):
    assert head_slices(shared("llama", "bridge", tokenizer_folder), ()) == ()


# Norms ---------------------------------------------------------------------------------------------


@models(EVERY_FAMILY)
def test_norms_are_all_of_hugging_faces(family, backend, tokenizer_folder):
    own = build(family)
    state = own.state_dict()
    found = norm_weights(shared(family, backend, tokenizer_folder))
    expected = {ours: state[theirs] for theirs, ours in norms(own).items()}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_norms_of_the_circuits_layers_or_none(tokenizer_folder):
    seen = shared("gemma3", "bridge", tokenizer_folder)
    found = norm_weights(seen, "circuit", heads_of("L1H0", "L1H2"))
    assert found.keys() == {n for n in norm_weights(seen) if n.startswith("blocks.1.")}
    assert norm_weights(seen, "none", heads_of("L1H0")) == {}


# Refusals ------------------------------------------------------------------------------------------


@models(("llama",))
def test_a_head_outside_the_model_is_refused(family, backend, tokenizer_folder):
    seen = shared(family, backend, tokenizer_folder)
    with pytest.raises(InputError, match="head L2H0: the model has layers 0-1 of heads 0-3"):
        head_slices(seen, ["L2H0"])
    with pytest.raises(InputError, match="head L0H4"):
        siblings(seen, ["L0H4"])


def test_unknown_choices_are_refused(tokenizer_folder):
    seen = shared("llama", "bridge", tokenizer_folder)
    with (
        unchecked_types(),
        pytest.raises(InputError, match="kv='none': expected shared, skip or groups"),
    ):
        head_slices(seen, HEADS, kv="none")
    with (
        unchecked_types(),
        pytest.raises(InputError, match="norms='some': expected all, circuit or none"),
    ):
        norm_weights(seen, "some")


@needs_hooked
def test_a_model_without_norm_parameters_is_told_so(tokenizer_folder):
    model = wrap("llama", "hooked", tokenizer_folder)
    for name, module in list(model.named_modules()):
        if name.rsplit(".", 1)[-1] in ("ln1", "ln2", "ln_final"):
            del module.w
    with pytest.raises(UnsupportedModelError, match="no norm parameters.*norms='none'"):
        norm_weights(ModelView(model))


@models(("llama",))
def test_a_weight_that_two_layers_share_is_refused_whichever_is_selected(
    family, backend, tokenizer_folder
):
    model = wrap(family, backend, tokenizer_folder)
    first, second = model.blocks[0].attn, model.blocks[1].attn
    if backend == "hooked":
        second.W_Q = first.W_Q
    else:
        second.q.original_component.weight = first.q.original_component.weight
    for heads in (["L0H1", "L1H1"], ["L0H1"], ["L1H2"]):
        with pytest.raises(UnsupportedModelError, match=r"blocks\.\d\.attn\.W_Q.*tied"):
            head_slices(ModelView(model), heads)


@needs_hooked
def test_a_missing_weight_is_refused(tokenizer_folder):
    model = wrap("gpt2", "hooked", tokenizer_folder)
    del model.blocks[1].attn.W_O
    seen = ModelView(model)
    head_slices(seen, ["L0H1"])
    with pytest.raises(UnsupportedModelError, match="layer 1 has no W_O"):
        head_slices(seen, ["L1H1"])


@needs_hooked
def test_a_copy_is_refused_because_writing_to_it_would_train_nothing(tokenizer_folder):
    model = wrap("gpt2", "hooked", tokenizer_folder)
    attn = model.blocks[0].attn
    values = attn.W_V.detach().clone()
    del attn.W_V
    attn.register_buffer("W_V", values)
    with pytest.raises(UnsupportedModelError, match=r"blocks.0.attn.W_V is a copy.*load_model"):
        head_slices(ModelView(model), HEADS)


@models(EVERY_FAMILY)
def test_slices_that_make_the_models_activations_pass_the_check(family, backend, tokenizer_folder):
    seen = view(family, backend, tokenizer_folder)
    seen.logits(prompts())  # at its first run a bridge attaches hooks of its own, for good
    with left_untouched(seen.tl):
        check_slices(seen, head_slices(seen, CHOSEN))


@models(("gpt2", "qwen2", "pythia"))
@pytest.mark.parametrize("role", ["W_Q", "W_K", "W_V", "W_O"])
def test_slices_of_weights_that_are_not_run_fail_the_check(family, backend, role, tokenizer_folder):
    """The right numbers in the wrong order, as a misread fused layout would give them."""
    seen = shared(family, backend, tokenizer_folder)
    wrong = [
        WeightSlice(p.layer, p.role, p.index, p.whole.flip(0)) if p.role == role else p
        for p in head_slices(seen, HEADS)
    ]
    with pytest.raises(UnsupportedModelError, match=rf"attn.{role} does not produce"):
        check_slices(seen, wrong)
