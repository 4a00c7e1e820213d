"""Learned gates: the soft circuits, the gradient of a step, and circuits that they find."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import by_hand
from helpers.checks import assert_close, assert_same_bits
from helpers.shared import models, shared
from helpers.tiny_models import Float64Throughout
from helpers.tiny_tasks import examples
from helpers.wrapped import BACKENDS
from jaxtyping import Float
from torch import Tensor

from cdt_lens.circuits.circuit import mask_to_heads
from cdt_lens.core.errors import NonFiniteError
from cdt_lens.core.passes import Passes
from cdt_lens.decomposition.baseline import Baseline, mean_activations, zero_baseline
from cdt_lens.decomposition.gated_pass import GatedPass, soft_circuit
from cdt_lens.decomposition.slopes import SLOPES
from cdt_lens.models.view import ModelView
from cdt_lens.planted.catalogue import planted_circuit
from cdt_lens.scoring import gates
from cdt_lens.scoring.gates import learned_gates
from cdt_lens.scoring.one_pass import one_pass
from cdt_lens.tasks.task import Example


def gated_direction(
    view: ModelView, item: Example, baseline: Baseline, gate: Float[Tensor, "layer head"]
) -> float:
    """d of one unpadded prompt with TransformerLens' hooks."""

    def partly(z: Tensor, hook: Any) -> Tensor:
        layer = int(hook.name.split(".")[1])
        mean = baseline.means[layer, 0].to(z.dtype).expand(z.shape).clone()
        mean[:, -1] = baseline.means[layer, 1]
        return mean + gate[layer][:, None] * (z - mean)

    hooks = [(f"blocks.{layer}.attn.hook_z", partly) for layer in range(view.n_layers)]
    more = {"use_cache": False} if view.is_bridge else {}
    with torch.no_grad():
        logits = view.tl.run_with_hooks(torch.tensor([item.tokens]), fwd_hooks=hooks, **more)
    return by_hand.direction(logits[0, -1], item)


@pytest.mark.parametrize("size", [1.0, 1.7, 4.0, 7.9])
def test_soft_circuits_have_their_size_and_its_derivative(size: float):
    logits = torch.tensor([[3.0, -1.0, 0.5, 0.4], [0.0, 2.0, -2.0, 1.0]], dtype=torch.float64)
    found = soft_circuit(logits.requires_grad_(), size).detach()
    assert float(found.sum()) == pytest.approx(size, abs=1e-9)
    assert found.flatten().argsort().tolist() == logits.flatten().argsort().tolist()
    assert torch.autograd.gradcheck(lambda x: soft_circuit(x, size), (logits,), atol=1e-6)


@models(("gpt2", "llama", "gemma2", "granite"))
def test_the_slope_of_a_step_is_that_of_the_loss_by_hand(family, backend, tokenizer_folder):
    """A gate for each head; central differences of prompts run one by one."""
    generator = torch.Generator().manual_seed(0)
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline = mean_activations(view, data, progress=False)
        run = GatedPass(view, SLOPES["gradient"])
        game = gates._Game(run, data, baseline, Passes(3, progress=False))
        mask = torch.rand(view.n_layers, view.n_heads, generator=generator, dtype=torch.float64)
        full = game.d(torch.ones_like(mask))
        expected = [by_hand.direction(by_hand.ablated_logits(view, item, [()], baseline)[0], item)
                    for item in data]  # fmt: skip
        assert_close(full, torch.tensor(expected, dtype=torch.float64), atol=1e-9)
        wanted = [4, 1, 0, 2]
        found = game.slope(mask, wanted, full)

        def loss(gate: Tensor) -> float:
            return sum(
                (gated_direction(view, data[i], baseline, gate) - expected[i]) ** 2
                / data.counts[data[i].label]
                for i in wanted
            )

        for place in ((0, 0), (0, 3), (1, 1)):
            step = torch.zeros_like(mask)
            step[place] = 1e-4
            slope = (loss(mask + step) - loss(mask - step)) / 2e-4
            assert float(found[place]) == pytest.approx(slope, abs=1e-7, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_they_find_a_circuit_that_their_start_does_not(backend):
    """Two heads that act only together. No gradient at either end sees both."""
    planted = planted_circuit("hand-composition", backend=backend)
    baseline = mean_activations(planted.model, planted.train, progress=False)
    inputs = (planted.model, planted.train, baseline)
    start = one_pass(*inputs, slopes="gradient", steps="ends", progress=False)
    found = learned_gates(*inputs, progress=False)
    truth = set(mask_to_heads(planted.truth))
    assert set(start.top(len(truth))) != truth
    assert set(found.top(len(truth))) == truth
    assert float(found.values.min()) == 0
    assert float(found.values.std()) == pytest.approx(float(start.values.std()), rel=1e-4)


def test_a_gradient_that_is_not_finite_is_refused(tokenizer_folder, monkeypatch):
    view, data = shared("gpt2", "bridge", tokenizer_folder, torch.float32), examples()
    nothing = torch.full((view.n_layers, view.n_heads), torch.nan)
    monkeypatch.setattr(gates._Game, "slope", lambda *_: nothing)
    with pytest.raises(NonFiniteError, match=r"gradient by the gates is not finite. Load"):
        learned_gates(view, data, zero_baseline(view, data), progress=False)


def test_they_come_from_the_seed_and_not_from_the_batches(tokenizer_folder):
    view, data = shared("llama", "bridge", tokenizer_folder), examples()
    baseline = zero_baseline(view, data)
    options = ({"seed": 1}, {"seed": 1, "batch_size": 2}, {"seed": 2})
    first, smaller, other = (
        learned_gates(view, data, baseline, progress=False, **each) for each in options
    )
    again = learned_gates(view, data, baseline, progress=False, seed=1)
    assert_same_bits(first.values, again.values)
    assert_close(first.values, smaller.values, atol=1e-4)
    assert not torch.allclose(first.values, other.values, atol=1e-3)
    assert_same_bits(first.per_example, first.values.expand_as(first.per_example))
    assert bool(first.stderr.isnan().all())
    assert first.provenance.seed == 1
