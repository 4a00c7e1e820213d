"""The training pass: the model's own logits at the answer position, from any layer on."""

from __future__ import annotations

import pytest
import torch
from helpers.checks import assert_close
from helpers.shared import EVERY_FAMILY, models, shared
from helpers.tiny_models import build
from helpers.tiny_tasks import examples
from helpers.wrapped import view
from torch import Tensor

from cdt_lens.finetuning.answer_pass import AnswerPass
from cdt_lens.finetuning.slices import head_slices
from cdt_lens.finetuning.trainable import SlicesAndWholes
from cdt_lens.models.view import ModelView
from cdt_lens.tasks.task import Examples


def logits(passes: AnswerPass, data: Examples, batch_size: int) -> Tensor:
    """In the order of the data."""
    rows = torch.empty(len(data), 128, dtype=torch.float64)
    with passes.view.quiet():
        for batch in data.batches(batch_size):
            rows[list(batch.index)] = passes(batch).double()
    return rows


def alone(model: ModelView, data: Examples) -> Tensor:
    """By the model's own whole forward pass on each prompt without padding."""
    return torch.stack([model.logits(torch.tensor([e.tokens]))[0, -1] for e in data])


@models(EVERY_FAMILY)
@pytest.mark.parametrize("first_layer", [0, 1])
def test_equals_the_models_own_logits(family, backend, first_layer, tokenizer_folder):
    """Padded batches with special tokens in them, soft-caps, windows; also from layer 1 on."""
    seen = shared(family, backend, tokenizer_folder)
    data = examples(lowest=0)
    passes = AnswerPass(seen, first_layer=first_layer)
    # 1e-6: Hugging Face computes norms and rotary angles in float32 even in a float64 model.
    assert_close(logits(passes, data, 6), alone(seen, data), atol=1e-6)
    assert_close(logits(passes, data, 2), alone(seen, data), atol=1e-6)


@models(("gemma2",))
def test_the_logits_are_hugging_faces_soft_caps_included(family, backend, tokenizer_folder):
    data = examples()
    expected = torch.stack([build(family)(torch.tensor([e.tokens])).logits[0, -1] for e in data])
    found = logits(AnswerPass(shared(family, backend, tokenizer_folder)), data, 3)
    assert_close(found, expected, atol=1e-6)
    assert float(found.abs().max()) < 3.0


@models(("llama",))
def test_candidates_are_the_logits_of_their_tokens(family, backend, tokenizer_folder):
    passes = AnswerPass(shared(family, backend, tokenizer_folder))
    batch = next(examples().batches(4))
    with passes.view.quiet():
        whole, found = passes(batch), passes.candidates(batch)
    for row, tokens in enumerate(batch.candidates.tolist()):
        expected = [float(whole[row, token]) for token in tokens]
        assert found[row].tolist() == pytest.approx(expected, abs=1e-12)


@models(("llama",))
def test_half_precision_logits_are_read_out_in_float32(family, backend, tokenizer_folder):
    passes = AnswerPass(shared(family, backend, tokenizer_folder, torch.bfloat16))
    with passes.view.quiet():
        assert passes(next(examples().batches(4))).dtype == torch.float32


@models(("gpt2", "llama", "gemma3"))
def test_kept_layers_run_once_for_each_example(family, backend, tokenizer_folder):
    seen = shared(family, backend, tokenizer_folder)
    first = seen.n_layers - 1
    data, passes = examples(), AnswerPass(seen, first_layer=first)
    rows: dict[int, list[int]] = {layer: [] for layer in range(seen.n_layers)}
    handles = [
        block.register_forward_hook(
            lambda _m, _a, out, layer=layer: rows[layer].append(
                (out[0] if isinstance(out, tuple) else out).shape[0]
            )
        )
        for layer, block in enumerate(seen.blocks)
    ]
    try:
        with seen.quiet():
            passes.prepare(data, 4)
        assert [rows[layer] for layer in range(first)] == [[4, 2]] * first and rows[first] == []
        logits(passes, data, 3)
        # One more row for each width of a batch, to see how the model calls its blocks.
        assert [rows[layer] for layer in range(first)] == [[4, 2, 1, 1]] * first
        assert rows[first] == [1, 3, 1, 3]
        for _ in range(3):
            logits(passes, data, 3)
        assert [rows[layer] for layer in range(first)] == [[4, 2, 1, 1]] * first
        assert rows[first] == [1, 3, 1, 3] + 3 * [3, 3]
    finally:
        for handle in handles:
            handle.remove()


@models(("qwen2",))
def test_what_is_kept_does_not_depend_on_the_order_of_training(family, backend, tokenizer_folder):
    """Rounding depends on a batch's width, so that the order of filling would show in float32."""
    seen = shared(family, backend, tokenizer_folder, torch.float32)
    data, found = examples(), []
    for order in (list(range(6)), [3, 0, 5, 2, 1, 4]):
        passes = AnswerPass(seen, first_layer=1)
        with seen.quiet():
            passes.prepare(data, 6)
        for i in order:
            logits(passes, data[i : i + 1], 1)
        found.append(logits(passes, data, 2))
    assert torch.equal(*found)


@models(("gpt2", "qwen3", "gemma3"))
def test_gradients_from_a_kept_layer_on_are_the_same(family, backend, tokenizer_folder):
    seen = view(family, backend, tokenizer_folder)
    found = []
    for first in (0, 1):
        passes = AnswerPass(seen, first_layer=first)
        trainable = SlicesAndWholes(seen, head_slices(seen, ["L1H0", "L1H3"]))
        with trainable.attached(), seen.quiet(gradients=True):
            for batch in examples().batches(4):
                passes(batch).square().sum().backward()
        found.append({m.name: m.value.grad for m in trainable.masters})
    scale = max(float(g.abs().max()) for g in found[0].values())
    for name, value in found[0].items():
        assert_close(found[1][name] / scale, value / scale, atol=1e-7)
