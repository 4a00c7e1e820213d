"""Intervals against scipy's for one and two samples, and their coverage of the true value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from cdt_lens.tasks.intervals import (
    balanced_share_interval,
    crossed_interval,
    mean_interval,
    paired_share_interval,
    ratio_effects,
    share_interval,
)

DRAWS = 4000
# Labels of 50, 30 and 20 % of 12 and of 24 prompts.
COUNTS = [(6, 4, 2), (12, 7, 5)]


def labels_of(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor([label for label, n in enumerate(counts) for _ in range(n)])


def covered(low: Tensor, high: Tensor, truth: float) -> float:
    return float(((low <= truth) & (truth <= high)).double().mean())


def test_one_label_is_students_interval():
    values = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = mean_interval(values, torch.zeros(9, dtype=torch.long), 0.9)
    expected = stats.ttest_1samp(values.numpy(), 0).confidence_interval(0.9)
    assert float(low) == pytest.approx(expected.low, rel=1e-12)
    assert float(high) == pytest.approx(expected.high, rel=1e-12)


def test_two_labels_are_welchs_interval():
    """The mean of two labels is half of the difference of one and the negative of the other."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(5, generator=generator, dtype=torch.float64)
    b = 3 * torch.randn(11, generator=generator, dtype=torch.float64) + 1
    low, high = mean_interval(torch.cat([a, b]), labels_of((5, 11)))
    welch = stats.ttest_ind(a.numpy(), -b.numpy(), equal_var=False).confidence_interval(0.95)
    assert (float(low), float(high)) == pytest.approx((welch.low / 2, welch.high / 2), rel=1e-12)


@pytest.mark.parametrize("n", [20, 60])
@pytest.mark.parametrize("shares", [(0.05, 0.05), (0.2, 0.05), (0.4, 0.1), (0.02, 0.0)])
def test_a_paired_change_is_covered(n, shares):
    """The exact probability that the interval holds the true change, over all outcomes."""
    gain, loss = shares
    coverage = 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            low, high = paired_share_interval(gained, lost, n)
            assert -1 <= low <= (gained - lost) / n <= high <= 1
            if low <= gain - loss <= high:
                counts = (gained, lost, n - gained - lost)
                coverage += float(stats.multinomial.pmf(counts, n, (gain, loss, 1 - gain - loss)))
    assert coverage >= 0.94
    low, high = paired_share_interval(0, 0, n)
    assert low == -high and high > 1 / n


def test_rows_are_intervals_of_their_own():
    values = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(2))
    labels = labels_of(COUNTS[0])
    low, high = mean_interval(values, labels)
    assert low.shape == high.shape == (2, 3)
    alone = mean_interval(values[1, 2], labels)
    assert (float(low[1, 2]), float(high[1, 2])) == pytest.approx(tuple(map(float, alone)))


def test_constant_values_and_single_examples():
    low, high = mean_interval(torch.full((4,), 0.5), labels_of((2, 2)))
    assert float(low) == float(high) == 0.5
    low, high = mean_interval(torch.arange(3.0), labels_of((2, 1)))
    assert math.isnan(float(low))
    assert math.isnan(float(high))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("tails", ["normal", "t with 5 degrees of freedom"])
def test_means_are_covered(counts, tails):
    """1.96 standard errors cover 0.87 of the draws at 12 prompts, a percentile bootstrap 0.80."""
    generator = np.random.default_rng(0)
    size = (DRAWS, sum(counts))
    noise = generator.normal(size=size) if tails == "normal" else generator.standard_t(5, size)
    labels = labels_of(counts)
    spread, centre = np.array([1.0, 2.0, 0.5])[labels], np.array([0.3, -1.0, 2.0])[labels]
    low, high = mean_interval(torch.from_numpy(centre + spread * noise), labels)
    assert 0.93 <= covered(low, high, (0.3 - 1.0 + 2.0) / 3) <= 0.97


@pytest.mark.parametrize("counts", COUNTS)
def test_ratios_are_covered(counts):
    """The two values of one example are correlated, as m(circuit) and m(full) are."""
    generator = np.random.default_rng(1)
    size, labels = (DRAWS, sum(counts)), labels_of(counts)
    gap = np.array([4.0, 3.0, 5.0])[labels] + generator.normal(size=size)
    own = 0.8 * gap + 0.5 * generator.normal(size=size)
    low, high = mean_interval(
        ratio_effects(torch.from_numpy(own), torch.from_numpy(gap), labels), labels
    )
    assert 0.93 <= covered(low, high, 0.8) <= 0.97


@pytest.mark.parametrize("shares", [(0.8, 0.6, 0.9), (0.97, 0.95, 0.99), (0.5, 0.5, 0.5)])
def test_balanced_shares_are_covered(shares):
    generator = np.random.default_rng(2)
    labels = labels_of((20, 12, 8))
    right = torch.from_numpy(generator.random((DRAWS, 40)) < np.array(shares)[labels]).double()
    limits = torch.tensor([balanced_share_interval(row, labels) for row in right])
    assert 0.93 <= covered(limits[:, 0], limits[:, 1], sum(shares) / 3) <= 0.98


def test_a_share_is_wilsons():
    low, high = share_interval(8, 10)
    z, n, p = stats.norm.ppf(0.975), 10, 0.8
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (low, high) == pytest.approx((centre - half, centre + half))
    assert share_interval(10, 10)[0] < 1.0 == share_interval(10, 10)[1]
    assert all(map(math.isnan, share_interval(0, 0)))


@pytest.mark.parametrize(
    ("seeds", "examples", "spread"),
    [
        (1, 400, 0.0), (2, 400, 0.02), (3, 400, 0.0), (3, 400, 0.05), (5, 100, 0.03),
        (2, 400, 0.1), (2, 100, 0.3), (3, 400, 0.1), (5, 400, 0.3),
    ],
)  # fmt: skip
def test_a_mean_over_seeds_and_examples_is_covered(seeds: int, examples: int, spread: float):
    """Effects of examples (0.4), seeds (`spread`) and rest (0.4), as differences of answers have."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hits = []
    for _ in range(1000):
        values = 0.4 * normal(1, examples) + 0.4 * normal(seeds, examples)
        low, high = crossed_interval(values + spread * normal(seeds, 1))
        hits.append(bool(low <= 0 <= high))
    # Monte Carlo error 0.007; it may be too wide where the seeds do not differ.
    assert 0.93 <= sum(hits) / len(hits) <= 0.99


def test_with_one_seed_the_interval_is_students():
    values = torch.randn(1, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    low, high = crossed_interval(values, 0.9)
    expected = stats.ttest_1samp(values[0].numpy(), 0).confidence_interval(0.9)
    assert (float(low), float(high)) == pytest.approx((expected.low, expected.high), rel=1e-12)
