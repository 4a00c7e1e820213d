"""What a set adds to a model without heads, and its mean with what its removal takes away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.checks import assert_close
from helpers.shared import models, shared
from helpers.tiny_models import Float64Throughout
from helpers.tiny_tasks import examples

from cdt_lens.circuits.ablation import circuit_metric
from cdt_lens.core.errors import NonFiniteError
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.decomposition.decompose import Node, decompose
from cdt_lens.decomposition.rules import Rules
from cdt_lens.models.heads import Head, Mlp, all_heads
from cdt_lens.scoring.sweep import score_heads

BOTH = Rules(attention="through", context="both")


@models()
def test_with_every_rule_through_it_is_the_mean_of_two_ablation_experiments(
    family, backend, tokenizer_folder
):
    """score = ((m(all) - m(all but h)) + (m(h alone) - m(none))) / 2, by real interventions."""
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline = mean_activations(view, data, progress=False)
        everyone = all_heads(view.n_layers, view.n_heads)
        without = [tuple(h for h in everyone if h != head) for head in everyone]
        circuits = [everyone, (), *without, *((head,) for head in everyone)]
        m = circuit_metric(view, circuits, data, baseline, progress=False)
        removed, added = m[0] - m[2 : 2 + len(everyone)], m[2 + len(everyone) :] - m[1]
        found = score_heads(view, data, baseline, rules=BOTH, batch_size=3, progress=False)
    assert_close(found.values.flatten(), (removed + added) / 2, atol=2e-6)


def test_an_empty_model_that_is_not_finite_is_told_as_such(tokenizer_folder):
    view, data = shared("llama", "bridge", tokenizer_folder, torch.float16), examples()
    baseline = mean_activations(view, data, progress=False)
    means = baseline.means.clone()
    means[1] = 60000 * means[1].sign()
    for rules in ("two-ended", Rules(attention="through", context="empty")):
        with pytest.raises(NonFiniteError, match="without heads left the finite range in layer 1"):
            score_heads(view, data, replace(baseline, means=means), rules=rules, progress=False)


@models(("gpt2", "llama"))
def test_sets_positions_and_mlps(family, backend, tokenizer_folder):
    """Both contexts for a set of two layers, for all positions by name, and for an MLP."""
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()[:1]
        baseline = mean_activations(view, examples(), mlps=True, progress=False)
        pair = (Head(0, 1), Head(1, 2))
        length = len(data[0].tokens)
        by_position = tuple(Node(0, 1, p) for p in range(length))
        sets = [pair, (Head(0, 1),), by_position, (Mlp(0),), ()]
        found = decompose(view, data, sets, baseline, rules=BOTH)
        everyone = all_heads(view.n_layers, view.n_heads)
        rest = tuple(h for h in everyone if h not in pair)
        m = circuit_metric(view, [everyone, rest, pair, ()], data, baseline, progress=False)
        assert float(found.relevant_direction[0, 0]) == pytest.approx(
            float(m[0] - m[1] + m[2] - m[3]) / 2, abs=1e-9
        )
        assert_close(found.relevant[2], found.relevant[1], atol=1e-12)
        assert bool((found.relevant[4] == 0).all())
        # An MLP: removed from the whole model, and from the one without heads, by hand.
        batch = next(data.batches(1))
        at, mlp = baseline.for_batch(view, batch), baseline.mlps_for_batch(view, batch)

        def pin(layer: int) -> Any:
            return lambda z: at(layer).expand(z.shape).contiguous()

        def logits(heads: bool, kept: bool) -> torch.Tensor:
            pins: dict[Any, Any] = {}
            if not heads:
                pins = {("z", layer): pin(layer) for layer in range(view.n_layers)}
            off = (
                {} if kept else {("mlp_out", 0): lambda out: mlp(0).expand(out.shape).contiguous()}
            )
            with view.hooked(pins | off):
                return view.logits(batch.tokens)[:, -1].gather(1, batch.candidates)

        removed = logits(True, True) - logits(True, False)
        lost = logits(False, True) - logits(False, False)
        assert_close(found.relevant[3], (removed + lost) / 2, atol=1e-9)
