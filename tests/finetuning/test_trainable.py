"""What is trained: gradients of slices and norms against Hugging Face's own, masters, put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers.checks import assert_same_bits, left_untouched
from helpers.hf_layout import dense_gradients, home, norms
from helpers.shared import EVERY_FAMILY, models
from helpers.tiny_models import EXPERTS, Float64Throughout, build, prompts
from helpers.tiny_tasks import examples
from helpers.tiny_training import HEADS, assert_moved_only, may_move, values
from helpers.wrapped import needs_hooked, view
from torch import Tensor

from cdt_lens.core.errors import UnsupportedModelError
from cdt_lens.finetuning.answer_pass import AnswerPass
from cdt_lens.finetuning.slices import head_slices, norm_weights
from cdt_lens.finetuning.trainable import SlicesAndWholes, Trainable, slice_gradient
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.view import ModelView
from cdt_lens.models.weights import named_weights, own_weights
from cdt_lens.tasks.metrics import answer_loss
from cdt_lens.tasks.task import Batch


def backward(
    seen: ModelView, trainable: Trainable, batches: list[Batch], *, look: bool = False
) -> dict[str, Tensor]:
    """Gradients of the masters for the sum of the examples' losses, one backward pass a batch.

    look: also run the model without gradients, before and between, as validation does.
    """
    passes = AnswerPass(seen)
    with trainable.attached(), seen.quiet(gradients=True):
        for batch in batches:
            if look:
                seen.logits(prompts())
            logits = passes(batch).gather(1, batch.candidates)
            loss = answer_loss(logits, batch.is_answer, batch.is_candidate).sum()
            if look:
                seen.logits(prompts(3, 4))
            loss.backward()
        return {m.name: m.value.grad.clone() for m in trainable.masters}


def assert_equal_gradients(found: Tensor, expected: Tensor, scale: float, name: str) -> None:
    """To 1e-10 of the gradient's own norm, or of `scale` where it is zero but for rounding."""
    assert found.shape == expected.shape, name
    size = max(float(expected.norm()), 1e-3 * scale)
    assert float((found - expected).norm()) <= 1e-10 * size, name


def assert_slices_equal(
    found: Mapping[str, Tensor], parts: Any, own: Any, dense: Mapping[str, Tensor]
) -> None:
    scale = max(float(g.norm()) for g in dense.values())
    for part in parts:
        for row, head in enumerate(part.index):
            place = home(own, part.role, part.layer, head)
            assert_equal_gradients(
                found[part.name][row], place.of(dense), scale, f"{part.name}[{head}]"
            )


@models(EVERY_FAMILY + EXPERTS)
def test_gradients_are_the_slices_of_the_dense_ones(family, backend, tokenizer_folder):
    """Every role and norm, every head, a padded batch with special tokens in it, in float64."""
    data = examples(lowest=0)
    with Float64Throughout():
        own = build(family)
        dense = dense_gradients(own, data)
        seen = view(family, backend, tokenizer_folder)
        parts = head_slices(seen, all_heads(seen.n_layers, seen.n_heads))
        trainable = SlicesAndWholes(seen, parts, tuple(norm_weights(seen)))
        found = backward(seen, trainable, list(data.batches(len(data))))
    assert_slices_equal(found, parts, own, dense)
    for theirs, ours in norms(own).items():
        assert_equal_gradients(found[ours], dense[theirs], 0.0, ours)
    assert len(found) == len(parts) + len(norms(own))


@models(("gpt2", "qwen3"))
@pytest.mark.parametrize("kv", ["shared", "skip", "groups"])
def test_a_few_heads_get_their_own_gradients_and_no_others_exist(
    family, backend, kv, tokenizer_folder
):
    """Also over several batches of different widths: gradients add up, as those of autograd do."""
    data = examples()
    with Float64Throughout():
        own = build(family)
        dense = dense_gradients(own, data)
        seen = view(family, backend, tokenizer_folder)
        parts = head_slices(seen, HEADS, kv=kv)
        trainable = SlicesAndWholes(seen, parts)
        found = backward(seen, trainable, list(data.batches(2, sort_by_length=False)))
    assert_slices_equal(found, parts, own, dense)
    sizes = {m.name: m.value.shape for m in trainable.masters}
    assert sizes == {part.name: part.read().shape for part in parts}


@models(("gpt2", "qwen2", "gemma2", "pythia"))
def test_whole_models_get_the_dense_gradients(family, backend, tokenizer_folder):
    """Full fine-tuning: embeddings too, tied ones the sum of both their uses."""
    data = examples()
    with Float64Throughout():
        own = build(family)
        dense = dense_gradients(own, data)
        seen = view(family, backend, tokenizer_folder)
        trainable = SlicesAndWholes(seen, (), tuple(own_weights(seen)))
        found = backward(seen, trainable, list(data.batches(4)))
    embedding = dense[next(n for n, p in own.named_parameters() if "embed" in n or "wte" in n)]
    assert_equal_gradients(found["embed.W_E"], embedding, 0.0, "embed.W_E")
    tied = own.config.tie_word_embeddings
    assert ("unembed.W_U" in found) == (not tied)
    # A parameter is its own master, in whatever layout the class keeps it.
    total = sum(float(g.square().sum()) for g in found.values())
    assert total == pytest.approx(sum(float(g.square().sum()) for g in dense.values()), rel=1e-10)
    assert sum(g.numel() for g in found.values()) == sum(g.numel() for g in dense.values())


@pytest.mark.parametrize("role", ["W_Q", "W_O", "b_V"])
def test_slice_gradient_is_autograds(role):
    """The formula alone, on random tensors."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, z, index = draw(2, 5, 6), draw(2, 5, 4, 3), (1, 3)
    if role == "W_O":
        inputs, weight, grad = z, draw(4, 3, 6).requires_grad_(), draw(2, 5, 6)
        out = torch.einsum("bphd,hdm->bpm", z, weight)
    elif role == "W_Q":
        inputs, weight, grad = x, draw(4, 6, 3).requires_grad_(), draw(2, 5, 4, 3)
        out = torch.einsum("bpm,hmd->bphd", x, weight)
    else:
        inputs, weight, grad = x, draw(4, 3).requires_grad_(), draw(2, 5, 4, 3)
        out = torch.zeros(2, 5, 4, 3, dtype=torch.float64) + weight
    out.backward(grad)
    found = slice_gradient(role, index, inputs, grad)
    torch.testing.assert_close(found, weight.grad[list(index)], rtol=1e-12, atol=1e-12)


# Values --------------------------------------------------------------------------------------------


@models(EVERY_FAMILY)
def test_masters_are_written_to_their_elements_and_put_back(family, backend, tokenizer_folder):
    seen = view(family, backend, tokenizer_folder, torch.float32)
    before = values(seen)
    parts = head_slices(seen, HEADS)
    trainable = SlicesAndWholes(seen, parts, tuple(norm_weights(seen)))
    assert isinstance(trainable, Trainable)
    with torch.no_grad():
        for number, master in enumerate(trainable.masters):
            master.value.add_(1 + number)
    trainable.write()
    masks = may_move(seen, build(family), "decision", map(Head.parse, HEADS))
    assert_moved_only(before, values(seen), masks)
    for part in parts:
        assert torch.equal(part.read(), dict(_masters(trainable))[part.name])
    learnt = trainable.learnt()
    for name, (index, value) in learnt.slices.items():
        assert torch.equal(value, named_weights(seen)[name][list(index)])
    for name, value in learnt.whole.items():
        assert torch.equal(value, named_weights(seen)[name])
    trainable.restore()
    for name, value in values(seen).items():
        assert_same_bits(value, before[name])
    assert not torch.equal(learnt.slices[parts[0].name][1], parts[0].read())  # copies


def _masters(trainable: Trainable) -> list[tuple[str, Tensor]]:
    return [(m.name, m.value.detach()) for m in trainable.masters]


@models(("llama",))
def test_decay_is_for_matrices(family, backend, tokenizer_folder):
    seen = view("qwen2", backend, tokenizer_folder)
    trainable = SlicesAndWholes(seen, head_slices(seen, HEADS), tuple(norm_weights(seen)))
    for master in trainable.masters:
        assert master.decay == (".W_" in master.name), master.name
    whole = SlicesAndWholes(seen, (), tuple(own_weights(seen)))
    for master in whole.masters:
        assert master.decay == (".W_" in master.name), master.name


@models(("gpt2", "qwen3"))
def test_only_what_is_trained_has_a_gradient_and_flags_come_back(family, backend, tokenizer_folder):
    seen = view(family, backend, tokenizer_folder)
    seen.logits(prompts())  # at its first run a bridge attaches hooks of its own, for good
    trainable = SlicesAndWholes(seen, head_slices(seen, HEADS), tuple(norm_weights(seen)))
    parameters = list(seen.tl.parameters())
    for number, parameter in enumerate(parameters):
        parameter.requires_grad_(number % 2 == 0)
    parameters[0].grad = torch.ones_like(parameters[0])
    wholes = {id(m.value) for m in trainable.masters}
    with left_untouched(seen.tl):
        with trainable.attached():
            assert {id(p) for p in parameters if p.requires_grad} == wholes & set(
                map(id, parameters)
            )
            assert all(p.grad is None for p in parameters)
        with pytest.raises(KeyboardInterrupt), trainable.attached():
            backward_inside(seen)
            raise KeyboardInterrupt
    assert torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))


def backward_inside(seen: ModelView) -> None:
    batch = next(examples().batches(3))
    with torch.enable_grad():
        AnswerPass(seen)(batch).sum().backward()


@models(("llama",))
def test_looking_in_between_costs_and_changes_nothing(family, backend, tokenizer_folder):
    """Validation runs inside `attached`; without gradients the hooks only pass values on."""
    batches = list(examples().batches(3))
    seen = view(family, backend, tokenizer_folder, torch.float32)
    plain, looked = (
        backward(seen, SlicesAndWholes(seen, head_slices(seen, HEADS)), batches, look=look)
        for look in (False, True)
    )
    for name, value in plain.items():
        assert torch.equal(looked[name], value), name


def test_a_weight_that_is_no_parameter_of_its_own_is_refused(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder)
    with pytest.raises(UnsupportedModelError, match="no weight blocks.7.ln1.w"):
        SlicesAndWholes(seen, (), ("blocks.7.ln1.w",))


@needs_hooked
def test_a_weight_that_is_a_buffer_is_refused(tokenizer_folder):
    seen = view("llama", "hooked", tokenizer_folder)
    norm = seen.blocks[0].ln1
    kept = norm.w.detach().clone()
    del norm.w
    norm.register_buffer("w", kept)
    with pytest.raises(UnsupportedModelError, match="blocks.0.ln1.w is not a parameter of its own"):
        SlicesAndWholes(seen, (), ("blocks.0.ln1.w",))


# Tied embeddings -----------------------------------------------------------------------------------


@models(("gpt2", "gemma2"))
def test_tied_embeddings_stay_tied(family, backend, tokenizer_folder):
    seen = view(family, backend, tokenizer_folder)
    trainable = SlicesAndWholes(seen, (), tuple(own_weights(seen)))
    assert [m.name for m in trainable.masters].count("embed.W_E") == 1
    assert "unembed.W_U" not in [m.name for m in trainable.masters]
    with torch.no_grad():
        dict(_masters(trainable))["embed.W_E"].mul_(2)
    trainable.write()
    found = named_weights(seen)
    assert torch.equal(found["embed.W_E"], found["unembed.W_U"].T)
    assert torch.equal(found["embed.W_E"], 2 * build(family).get_input_embeddings().weight)
    learnt = trainable.learnt().whole
    assert torch.equal(learnt["embed.W_E"], learnt["unembed.W_U"].T)
    trainable.restore()
    assert torch.equal(named_weights(seen)["embed.W_E"], named_weights(seen)["unembed.W_U"].T)
    assert torch.equal(
        named_weights(seen)["embed.W_E"], build(family).get_input_embeddings().weight
    )


# Half precision ------------------------------------------------------------------------------------


@models(("llama", "gpt2"))
def test_steps_below_half_precision_are_not_lost(family, backend, tokenizer_folder):
    """In bf16 1 + 2^-10 is 1; four such steps on float32 masters are seen in the model."""
    seen = view(family, backend, tokenizer_folder, torch.bfloat16)
    trainable = SlicesAndWholes(seen, head_slices(seen, HEADS), tuple(norm_weights(seen)))
    assert {m.value.dtype for m in trainable.masters} == {torch.float32}
    start = {name: value.clone() for name, value in _masters(trainable)}
    with torch.no_grad():
        for master in trainable.masters:
            master.value.fill_(1.0)
    trainable.write()
    ones = values(seen)
    for step in range(1, 5):
        with torch.no_grad():
            for master in trainable.masters:
                master.value.add_(2.0**-9)
        trainable.write()
        moved = named_weights(seen)["blocks.0.attn.W_Q"] != ones["blocks.0.attn.W_Q"]
        assert bool(moved[1].all()) == (step >= 3) and not moved[[0, 2, 3]].any()
        assert bool((named_weights(seen)["ln_final.w"] != 1).all()) == (step >= 3)
    assert {value.dtype for value in values(seen).values()} == {torch.bfloat16}
    assert {v.dtype for _, v in trainable.learnt().slices.values()} == {torch.bfloat16}
    trainable.restore()
    for name, value in start.items():
        if ".W_" in name:
            part = next(p for p in trainable.slices if p.name == name)
            assert torch.equal(part.read().float(), value)


@models(("llama", "gpt2"))
def test_half_precision_gradients_reach_float32_masters(family, backend, tokenizer_folder):
    """Also of whole weights, whose parameters cannot hold them; over batches they add up."""
    data = examples()
    exact = view(family, backend, tokenizer_folder, torch.float32)
    seen = view(family, backend, tokenizer_folder, torch.bfloat16)
    found, expected = (
        backward(
            v, SlicesAndWholes(v, head_slices(v, HEADS), tuple(norm_weights(v))),
            list(data.batches(2)),
        )
        for v in (seen, exact)
    )  # fmt: skip
    assert all(p.grad is None for p in seen.tl.parameters())
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        if not (name.endswith("b_K") and family == "gpt2"):  # zero but for rounding
            assert float((found[name] - value).norm() / value.norm()) < 0.1, name
