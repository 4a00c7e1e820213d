"""The gradient of the training loss by head, against Hugging Face's own gradients; choosing by it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.hf_layout import dense_gradients, home
from helpers.sample_results import scores
from helpers.shared import models
from helpers.tiny_models import Float64Throughout, build
from helpers.tiny_tasks import examples
from helpers.wrapped import view

from cdt_lens.finetuning.slices import KEY_VALUE_ROLES, ROLES
from cdt_lens.finetuning.training_signal import choose_heads, training_signal


@models(("gpt2", "qwen3"))
@pytest.mark.parametrize("kv", ["shared", "skip"])
def test_the_signal_sums_the_dense_gradient_over_a_heads_slices(
    family, backend, kv, tokenizer_folder
):
    data = examples()
    with Float64Throughout():
        own = build(family)
        dense = dense_gradients(own, data)
        seen = view(family, backend, tokenizer_folder)
        found = training_signal(seen, data, kv=kv, batch_size=2)
    roles = [role for role in ROLES if kv == "shared" or role not in KEY_VALUE_ROLES]
    group = seen.n_heads // seen.n_kv_heads
    for layer in range(seen.n_layers):
        for head in range(seen.n_heads):
            total = 0.0
            for role in roles:
                place = home(own, role, layer, head // group if role in KEY_VALUE_ROLES else head)
                total += 0.0 if place is None else float(place.of(dense).abs().sum())
            # The signal is of the mean loss, and is kept in float32.
            assert float(found[layer, head]) == pytest.approx(total / len(data), rel=1e-6)


def test_heads_without_a_score_are_not_chosen_by_both():
    known = scores()
    values = known.values.clone()
    values[0] = torch.nan
    signal = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) + 0.1
    n = int((~values.isnan()).sum())
    found = choose_heads(dataclasses.replace(known, values=values), n, "signed", "both", signal)
    assert min(head.layer for head in found.heads) == 1


@pytest.mark.parametrize("of", ["score", "signal"])
def test_a_head_that_does_nothing_moves_no_other_in_both(of):
    """As if it had no number at all: nothing is known of it then either."""
    known = scores()
    values = known.values.clone()
    signal = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) + 0.1
    chosen = []
    for nothing in (0.0, torch.nan):
        (values if of == "score" else signal)[3, 4] = nothing
        changed = dataclasses.replace(known, values=values)
        chosen.append(choose_heads(changed, 9, "signed", "both", signal).heads)
    assert chosen[0] == chosen[1]


def test_heads_are_chosen_by_score_by_signal_or_by_both():
    known = scores()
    signal = torch.rand(known.values.shape, generator=torch.Generator().manual_seed(1)) + 0.1
    chosen = {
        choice: choose_heads(known, 9, "magnitude", choice, signal)
        for choice in ("circuit", "gradient", "both")
    }
    assert chosen["circuit"].heads == known.select(k=9, by="magnitude").heads
    largest = signal.flatten().topk(9).indices.tolist()
    assert {(h.layer, h.head) for h in chosen["gradient"].heads} == {divmod(i, 9) for i in largest}
    logs = [torch.log(value) for value in (known.values.abs().double(), signal.double())]
    both = sum((value - value.mean()) / value.std() for value in logs).flatten().topk(9).indices
    assert {(h.layer, h.head) for h in chosen["both"].heads} == {divmod(int(i), 9) for i in both}
    assert chosen["both"].selection["heads"] == "both" and chosen["both"].scores is not None
