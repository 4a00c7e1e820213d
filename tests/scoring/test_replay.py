"""Removals exact through the own MLP: by hand, and against exact ablation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import by_hand
from helpers.checks import assert_close
from helpers.shared import models, shared
from helpers.tiny_models import Float64Throughout
from helpers.tiny_tasks import examples, many
from helpers.wrapped import needs_hooked
from jaxtyping import Float
from torch import Tensor

from cdt_lens.decomposition.baseline import Baseline, mean_activations
from cdt_lens.decomposition.gated_pass import GatedPass
from cdt_lens.decomposition.slopes import SLOPES
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.agreement import spearman
from cdt_lens.scoring.methods import exact_ablation
from cdt_lens.scoring.one_pass import one_pass
from cdt_lens.scoring.replay import replayed_scores
from cdt_lens.scoring.sweep import score_heads
from cdt_lens.tasks.task import Example, Examples


def returned(view: ModelView, data: Examples, baseline: Baseline) -> Float[Tensor, "e l h"]:
    """The gradients at the empty model, which are the other half of the score."""
    batch = data.one_batch()
    at = baseline.for_batch(view, batch)
    return GatedPass(view, SLOPES["gradient"]).scores(batch, at, [0.0], "mean")[0].sum(-1)


def removed_by_hand(view: ModelView, item: Example, baseline: Baseline) -> Float[Tensor, "l h"]:
    """One unpadded prompt, TransformerLens' hooks and autograd."""
    more = {"use_cache": False} if view.is_bridge else {}
    tokens, scores = torch.tensor([item.tokens]), torch.zeros(view.n_layers, view.n_heads)
    for head in all_heads(view.n_layers, view.n_heads):
        streams: list[Tensor] = []

        def reset(z: Tensor, hook: Any, head: Head = head) -> Tensor:
            z = z.clone()
            z[0, :-1, head.head] = baseline.means[head.layer, 0, head.head].to(z.dtype)
            z[0, -1, head.head] = baseline.means[head.layer, 1, head.head].to(z.dtype)
            return z

        def leaf(resid: Tensor, hook: Any, streams: list[Tensor] = streams) -> Tensor:
            streams.append(resid.detach().requires_grad_())
            return streams[-1]

        point = f"blocks.{head.layer}"
        end = (f"{point}.hook_resid_post", leaf)
        logits = view.tl.run_with_hooks(tokens, fwd_hooks=[end], **more)[0, -1]
        d = logits[list(item.answers)].mean() - logits[list(item.others)].mean()
        (gradient,) = torch.autograd.grad(d, streams[0])
        view.tl.run_with_hooks(tokens, fwd_hooks=[(f"{point}.attn.hook_z", reset), end], **more)
        taken = (streams[0] - streams[1]).detach()
        scores[head.layer, head.head] = float((gradient * taken).sum())
    return scores


@models(("gpt2", "llama", "neox_seq", "gemma2", "granite"))
def test_the_removal_by_hand(family, backend, tokenizer_folder):
    """Prompts of five lengths, batched and padded here, alone there; heads in two chunks."""
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline = mean_activations(view, data, progress=False)
        found = replayed_scores(view, data, baseline, rows=12, progress=False)
        added = returned(view, data, baseline)
        for number, item in enumerate(data):
            expected = (removed_by_hand(view, item, baseline) + added[number]) / 2
            assert_close(found.per_example[number], expected, atol=2e-6)


def one_layer() -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=1, d_model=32, d_head=8, n_heads=4, d_mlp=64, act_fn="gelu", d_vocab=128,
        n_ctx=16, normalization_type=None, seed=0, device="cpu", dtype=torch.float64,
    )  # fmt: skip
    model = HookedTransformer(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.detach().add_(0.3 * noise)
    return model


@needs_hooked
def test_of_one_layer_without_norms_the_removal_is_exact():
    """Nothing but the unembedding lies behind the only block."""
    view, data = ModelView(one_layer()), examples()
    baseline = mean_activations(view, data, progress=False)
    found = replayed_scores(view, data, baseline, progress=False)
    exact = exact_ablation(view, data, baseline, progress=False)
    removed = 2 * found.per_example - returned(view, data, baseline)
    assert_close(removed.double(), exact.per_example.double(), atol=1e-5)
    first = one_pass(view, data, baseline, slopes="gradient", progress=False)
    assert not torch.allclose(first.per_example, exact.per_example, atol=1e-2)


@models(("pythia",))
def test_parallel_blocks_have_nothing_to_carry(family, backend, tokenizer_folder):
    view, data = shared(family, backend, tokenizer_folder, torch.float32), examples()
    baseline = mean_activations(view, data, progress=False)
    found = replayed_scores(view, data, baseline, progress=False)
    first = one_pass(view, data, baseline, slopes="gradient", steps="ends", progress=False)
    assert_close(found.per_example, first.per_example, atol=1e-6)


def test_it_ranks_effects_no_worse_than_first_order(tokenizer_folder):
    """Spearman with the exact sweep over heads and prompts, the mean over sequential blocks."""
    gained = []
    for family in ("gpt2", "llama", "neox_seq", "qwen3", "gemma2", "gemma3"):
        view, data = shared(family, "bridge", tokenizer_folder, torch.float32), many()
        inputs = (view, data, mean_activations(view, data, progress=False))
        exact = score_heads(*inputs, exact="all", progress=False).per_example.flatten()
        found = replayed_scores(*inputs, progress=False).per_example.flatten()
        first = one_pass(*inputs, slopes="gradient", steps="ends", progress=False)
        gained.append(spearman(found, exact) - spearman(first.per_example.flatten(), exact))
    assert sum(gained) / len(gained) >= 0


@models(("gpt2",))
def test_the_strongest_competitor_is_fixed_by_the_plain_model(family, backend, tokenizer_folder):
    view, data = shared(family, backend, tokenizer_folder, torch.float32), examples()
    baseline = mean_activations(view, data, progress=False)
    options = {"direction": "strongest", "progress": False}
    found = replayed_scores(view, data, baseline, **options)
    first = one_pass(view, data, baseline, slopes="gradient", steps="ends", **options)
    mean = replayed_scores(view, data, baseline, progress=False)
    assert found.direction == pytest.approx(first.direction, abs=1e-5)
    assert found.direction != pytest.approx(mean.direction, abs=1e-3)
    by_prompt = by_hand.balanced(found.per_example[:, 0, 0].tolist(), data)
    assert by_prompt == pytest.approx(float(found.values[0, 0]), abs=1e-6)
