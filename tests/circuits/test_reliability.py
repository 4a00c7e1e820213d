"""Reliability of rankings, and the probability that a head belongs to a circuit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from circuits.test_head_scores import scores
from torch import Tensor

from cdt_lens.circuits.head_scores import HeadScores, label_index
from cdt_lens.circuits.reliability import membership, reliability
from cdt_lens.circuits.sampled import effects, filled
from cdt_lens.core.errors import InputError
from cdt_lens.models.heads import Head
from cdt_lens.tasks.metrics import balanced_mean, balanced_stderr

LABELS = ("a", "b") * 40


@pytest.mark.parametrize("rule", ["near-zero", "greedy"])
def test_a_circuit_of_another_rule_has_no_membership(rule):
    """Both store a k, which says nothing about how heads were chosen."""
    found = noisy(1.0)
    circuit = found.circuit(found.top(3), {"rule": rule, "k": 3, "by": "signed"})
    with pytest.raises(InputError, match="was not selected by k, fraction or threshold"):
        membership(found, circuit)


def test_one_number_for_each_head_says_nothing_about_another_draw():
    """Equal rows would correlate perfectly, with intervals of no width."""
    rows = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    constant = replace(
        scores(rows, rows.expand(80, 10, 10).clone(), LABELS), method="gates",
        stderr=torch.full((10, 10), torch.nan),
    )  # fmt: skip
    found = reliability(constant)
    assert math.isnan(found.split_half) and math.isnan(found.full) and math.isnan(found.resolved)
    for call in (
        lambda: membership(constant, constant.select(k=3)),
        lambda: constant.select(confidence=0.95),
    ):
        with pytest.raises(InputError, match="gates: these scores have no intervals"):
            call()


def test_shrunk_scores_are_a_ranking_without_intervals():
    generator = torch.Generator().manual_seed(0)
    cheap = torch.randn(80, 10, 10, generator=generator)
    correction = torch.randn(80, 10, 10, generator=generator)
    correction[16:] = torch.nan
    found = estimate(cheap, correction).shrunk()
    labels = label_index(LABELS)
    means = balanced_mean(found.effects.permute(1, 2, 0), labels)
    assert float((means - found.values).abs().max()) < 1e-6
    assert bool(found.stderr.isnan().all()) and math.isnan(reliability(found).full)
    with pytest.raises(InputError, match="shrunk: these scores have no intervals"):
        membership(found, found.select(k=3))


def noisy(spread: float, seed: int = 0) -> HeadScores:
    """100 heads whose true scores have variance 1, on 80 examples with noise of that spread."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(10, 10, generator=generator)
    table = truth + spread * torch.randn(80, 10, 10, generator=generator)
    return scores(table.mean(0), table, LABELS)


@pytest.mark.parametrize("spread", [1.0, 4.0, 12.0])
def test_split_halves_correlate_as_theory_says(spread):
    """Pearson's r of two halves is 1 / (1 + s^2 / 40), of two whole sets 1 / (1 + s^2 / 80)."""
    found = [reliability(noisy(spread, seed), splits=20) for seed in range(6)]
    half = sum(f.split_half for f in found) / 6
    full = sum(f.full for f in found) / 6
    # Spearman's correlation of two normal variables is (6 / pi) asin(r / 2).
    for value, examples in ((half, 40), (full, 80)):
        pearson = 1 / (1 + spread**2 / examples)
        assert value == pytest.approx(6 / math.pi * math.asin(pearson / 2), abs=0.06)


def test_heads_are_resolved_by_their_intervals():
    table = torch.randn(80, 1, 3, generator=torch.Generator().manual_seed(0))
    table += torch.tensor([2.0, 0.0, -2.0]) - table.mean(0)
    assert reliability(scores(table.mean(0), table, LABELS)).resolved == pytest.approx(2 / 3)


def estimate(cheap: Tensor, correction: Tensor) -> HeadScores:
    index = label_index(LABELS)
    spread = effects(cheap, (correction,), index).permute(1, 2, 0)
    best = filled(cheap, (correction,), index)
    return replace(
        scores(cheap.mean(0), best.float(), LABELS),
        values=balanced_mean(spread, index).float(),
        stderr=balanced_stderr(spread, index).float(),
        cheap=cheap,
        corrections=(correction,),
    )


def test_halves_of_an_estimate_share_no_exact_prompt():
    """The cheap scores say nothing: the reliability is that of 12 exact prompts, 6 each half."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(20, 20, generator=generator)
    exact = truth + 2.0 * torch.randn(80, 20, 20, generator=generator)
    exact[12:] = torch.nan
    found = reliability(estimate(torch.zeros(80, 20, 20), exact), splits=20)
    pearson = 1 / (1 + 4.0 / 6)
    assert found.split_half == pytest.approx(6 / math.pi * math.asin(pearson / 2), abs=0.06)


def test_membership_is_the_chance_of_being_selected_again():
    """One head is sure, two share a place, one never gets in."""
    generator = torch.Generator().manual_seed(2)
    table = 0.5 * torch.randn(80, 1, 4, generator=generator)
    table += torch.tensor([2.0, 1.0, 1.0, -1.0]) - table.mean(0)
    made = scores(table.mean(0), table, LABELS)
    circuit = made.select(k=2)
    found = membership(made, circuit)
    assert found[Head(0, 0)] == 1.0
    assert 0.4 < min(found.values()) < 0.6
    every = membership(made, made.select(threshold=0.9))
    assert every[Head(0, 0)] == 1.0
    assert 0.9 < every[Head(0, 1)] < 1.0  # two standard errors above


def test_what_has_no_rule_to_repeat_is_refused():
    made = noisy(1.0)
    with pytest.raises(InputError, match="not selected by k, fraction or threshold"):
        membership(made, made.select(confidence=0.9))
    single = scores(torch.ones(1, 2), None, ("a", "b", "b"))
    with pytest.raises(InputError, match="two examples of each label"):
        membership(single, single.select(k=1))
    assert math.isnan(reliability(single).split_half)


def test_a_circuit_of_another_shape_is_refused_and_an_empty_one_has_no_members():
    made = noisy(1.0)
    assert membership(made, made.select(k=0)) == {}
    table = torch.randn(80, 2, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="10 layers of 10 heads, the scores of 2 of 3"):
        membership(scores(table.mean(0), table, LABELS), made.select(k=2))


@pytest.mark.parametrize("seed", range(4))
def test_heads_that_were_dropped_early_leave_a_reliability(seed):
    """Under `decide` heads have different samples: here 4, 10 or 40 prompts."""
    generator = torch.Generator().manual_seed(seed)
    correction = torch.randn(80, 10, 10, generator=generator)
    last = torch.tensor([4, 10, 40])[torch.randint(3, (10, 10), generator=generator)]
    correction[torch.arange(80)[:, None, None] >= last] = torch.nan
    found = reliability(estimate(torch.randn(80, 10, 10, generator=generator), correction))
    assert math.isfinite(found.split_half) and math.isfinite(found.full)


def test_halves_that_disagree_are_no_correlation_below_minus_1():
    """Two heads: the halves of two examples each rank them alike or in the other order."""
    table = torch.tensor([[3.0, 0.0], [0.0, 2.9], [3.0, 0.2], [0.1, 2.8]])[:, None]
    found = reliability(scores(table.mean(0), table, ("a",) * 4))
    assert -1 <= found.full == found.split_half < 0


def test_a_circuit_selected_from_other_scores_has_no_membership():
    one, other = noisy(1.0), noisy(1.0, seed=1)
    with pytest.raises(InputError, match="selected from other scores"):
        membership(other, one.select(k=3))


def test_a_single_exact_prompt_of_a_label_cannot_be_shrunk():
    correction = torch.randn(80, 10, 10, generator=torch.Generator().manual_seed(0))
    correction[2:] = torch.nan
    known = replace(estimate(torch.zeros(80, 10, 10), correction), values=torch.ones(10, 10))
    with pytest.raises(InputError, match="shrunk: .*two of them with an exact sweep"):
        known.shrunk()
