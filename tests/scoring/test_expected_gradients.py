"""Expected gradients against TransformerLens' own hooks, and what is drawn."""

from __future__ import annotations

import dataclasses
import tracemalloc
from typing import Any

import pytest
import torch
from helpers.checks import assert_close, assert_same_bits
from helpers.shared import models, shared
from helpers.tiny_models import Float64Throughout
from helpers.tiny_tasks import examples
from jaxtyping import Float
from torch import Tensor

from cdt_lens.decomposition.baseline import Baseline, mean_activations, zero_baseline
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.expected_gradients import drawn, expected_gradients
from cdt_lens.scoring.methods import attribution_patching
from cdt_lens.tasks.task import Example


def by_hand(
    view: ModelView, item: Example, partner: Example | None, baseline: Baseline, gate: float
) -> Float[Tensor, "layer head"]:
    """<d(direction)/dz, z - reference> a share `gate` of the way from the reference to z."""
    more = {"use_cache": False} if view.is_bridge else {}
    cache: Any = {}
    if partner is not None:
        with torch.no_grad():
            _, cache = view.tl.run_with_cache(torch.tensor([partner.tokens]), **more)
    leaves: list[Tensor] = []
    away: list[Tensor] = []

    def partly(z: Tensor, hook: Any) -> Tensor:
        if partner is None:
            layer = int(hook.name.split(".")[1])
            reference = baseline.means[layer, 0].to(z.dtype).expand(z.shape).clone()
            reference[:, -1] = baseline.means[layer, 1]
        else:
            reference = cache[hook.name]
        away.append((z - reference).detach())
        leaves.append(torch.zeros_like(z, requires_grad=True))
        return reference + gate * (z - reference) + leaves[-1]

    hooks = [(f"blocks.{layer}.attn.hook_z", partly) for layer in range(view.n_layers)]
    logits = view.tl.run_with_hooks(torch.tensor([item.tokens]), fwd_hooks=hooks, **more)[0, -1]
    d = logits[list(item.answers)].mean() - logits[list(item.others)].mean()
    slopes = torch.autograd.grad(d, leaves)
    return torch.stack([(s * a).sum((0, 1, 3)) for s, a in zip(slopes, away, strict=True)])


@models(("gpt2", "llama"))
def test_each_draw_by_hand(family, backend, tokenizer_folder):
    """Two of the prompts have as many tokens; the others take the baseline."""
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline = mean_activations(view, data, progress=False)
        found = expected_gradients(
            view, data, baseline, steps=2, seed=3, batch_size=4, progress=False
        )
        draws = drawn(data, 2, 3)
        for number, item in enumerate(data):
            rows = []
            for draw in draws:
                partner = draw.partners[number]
                other = None if partner is None else data[partner]
                rows.append(by_hand(view, item, other, baseline, float(draw.points[number])))
            assert_close(found.per_example[number], torch.stack(rows).mean(0), atol=2e-6)
        patched = attribution_patching(view, data, baseline, progress=False)
    assert [p for draw in draws for p in draw.partners] == 2 * [4, None, None, None, 0, None]
    assert found.direction == pytest.approx(patched.direction)
    assert found.provenance.seed == 3


def test_references_are_other_prompts_of_the_same_length_whatever_their_label():
    data = examples((5, 5, 5, 6), ("positive", "negative", "positive", "neutral"))
    draws = drawn(data, 200, 0)
    partners = [{draw.partners[i] for draw in draws} for i in range(4)]
    assert partners == [{1, 2}, {0, 2}, {0, 1}, {None}]
    points = torch.stack([draw.points for draw in draws])
    assert float(points.min()) >= 0
    assert float(points.max()) <= 1
    assert_close(points.mean(0), torch.full((4,), 0.5), atol=0.1)
    assert len(points.unique()) == points.numel()


def test_a_copy_of_a_prompt_is_no_reference():
    """Between a prompt and itself is no path: half of the scores of six prompts would be 0."""
    once = examples((5, 5, 6), ("positive", "negative", "positive"))
    data = dataclasses.replace(once, items=once.items * 2)
    draws = drawn(data, 200, 0)
    partners = [{draw.partners[i] for draw in draws} for i in range(6)]
    assert partners == [{1, 4}, {0, 3}, {None}] * 2


def test_memory_does_not_grow_with_the_square_of_the_prompts():
    data = examples((5,) * 2000, ("positive", "negative") * 1000)
    tracemalloc.start()
    drawn(data, 1, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1000 * len(data)  # a number of 8 bytes for each pair is 32 MB


def test_they_come_from_the_seed(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder, torch.float32), examples()
    baseline = zero_baseline(view, data)
    first, again, other = (
        expected_gradients(view, data, baseline, seed=seed, progress=False) for seed in (0, 0, 1)
    )
    assert_same_bits(first.values, again.values)
    assert not torch.allclose(first.values, other.values, atol=1e-4)
