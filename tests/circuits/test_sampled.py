"""The difference estimator on scores of real passes: its bias, its errors, its limits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from helpers.sample_results import provenance
from helpers.shared import shared
from helpers.tiny_tasks import LABELS, examples
from torch import Tensor

from cdt_lens.circuits.head_scores import combined
from cdt_lens.circuits.sampled import (
    degrees_of_freedom,
    effects,
    filled,
    fitted,
    sample_order,
    shrunk,
)
from cdt_lens.core.passes import Passes
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.decomposition.rules import PRESETS
from cdt_lens.scoring.estimate import Estimator, in_sparse_part, parts_of
from cdt_lens.scoring.sweep import score_heads
from cdt_lens.tasks.intervals import t_interval
from cdt_lens.tasks.metrics import balanced_mean, balanced_stderr

COUNTS = (300, 180, 120)  # the population: labels of 50, 30 and 20 %
DRAWN = (30, 18, 12)  # the prompts that a user has
ARCHITECTURES = ("gpt2", "llama")


@functools.cache
def population(family: str, folder: str) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Cheap scores and corrections of both parts of two-ended scores, and the labels' numbers."""
    view = shared(family, "bridge", folder, torch.float32)
    gold = [label for label, n in zip(LABELS, COUNTS, strict=True) for _ in range(n)]
    lengths = torch.randint(4, 9, (len(gold),), generator=torch.Generator().manual_seed(5))
    data = examples(lengths.tolist(), gold, seed=3)
    baseline = mean_activations(view, data, progress=False)
    parts = parts_of(PRESETS["two-ended"])
    passes = Passes(64, progress=False)
    cheap = Estimator(
        view, data, baseline, parts, "mean", passes, 0, dict, len, passes.bar(name="none")
    ).cheap()
    exact = [
        score_heads(
            view, data, baseline, rules=part.rules, exact="all", batch_size=64, progress=False
        ).per_example
        for part in parts
    ]
    labels = torch.tensor([LABELS.index(label) for label in gold])
    corrections = tuple((y - g) / 2 for y, g in zip(exact, cheap, strict=False))
    return cheap[:-1].mean(0), corrections, labels


def sampled(
    corrections: tuple[Tensor, ...],
    labels: Tensor,
    seed: int,
    cheap: Tensor | None = None,
    n: int = 24,
) -> tuple[Tensor, ...]:
    """Corrections of n prompts for the first part, and of some of them for the sparse second."""
    names = [str(int(label)) for label in labels]
    key = None if cheap is None else cheap.flatten(1).sum(1).tolist()
    order = sample_order(names, seed, key)[:n]
    rank = {i: [j for j in order if names[j] == names[i]].index(i) for i in order}
    out = []
    for part, inside in zip(corrections, (order, filter(chosen(rank), order)), strict=True):
        hidden, rows = torch.full_like(part, torch.nan), list(inside)
        hidden[rows] = part[rows]
        out.append(hidden)
    return tuple(out)


def chosen(rank: dict[int, int]) -> Callable[[int], bool]:
    return lambda i: in_sparse_part(rank[i])


def means(values: Tensor, labels: Tensor) -> Tensor:
    return balanced_mean(values.permute(1, 2, 0).double(), labels)


def draw(labels: Tensor, generator: torch.Generator) -> Tensor:
    rows = [
        (labels == label).nonzero().flatten()[torch.randperm(count, generator=generator)[:n]]
        for label, (count, n) in enumerate(zip(COUNTS, DRAWN, strict=True))
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("n", [15, 24])
@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_it_is_unbiased_and_its_intervals_cover(family, spread, n, tokenizer_folder):
    """400 draws of prompts and of samples among them, against the sweep over all prompts."""
    cheap, corrections, labels = population(family, tokenizer_folder)
    truth = means(cheap + sum(corrections), labels)
    generator = torch.Generator().manual_seed(0)
    found, inside, errors = [], [], []
    for seed in range(400):
        rows = draw(labels, generator)
        own, g = labels[rows], cheap[rows] if spread else None
        known = sampled(tuple(c[rows] for c in corrections), own, seed, g, n)
        theta = means(filled(cheap[rows], known, own), own)
        error = balanced_stderr(effects(cheap[rows], known, own).permute(1, 2, 0), own)
        freedom = degrees_of_freedom(cheap[rows], known, own)
        low, high = t_interval(theta, error, freedom)
        found.append(theta)
        errors.append(error)
        inside.append((low <= truth) & (truth <= high))
    table = torch.stack(found)
    bias = (table.mean(0) - truth) / (table.std(0) / math.sqrt(len(table)))
    assert float(bias.abs().max()) < 4  # heads x 2 draws of a standard normal
    # The prompts of a draw are a tenth of the population, so the true spread is 0.95 of this.
    ratio = torch.stack(errors).mean(0) / table.std(0)
    assert 0.9 < float(ratio.min()) <= float(ratio.max()) < 1.2
    assert 0.93 <= float(torch.stack(inside).double().mean()) <= 0.97


@pytest.mark.parametrize("n", [32, 64])
def test_the_sparse_part_of_a_large_sample_is_spread_over_the_effects(n):
    """Corrections that follow the total effect; with every fourth rank 0.65 were covered at 64."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat_interleave(64)
    nothing = torch.zeros(len(labels), 1, 1)
    inside = []
    for seed in range(300):
        effect = torch.randn(len(labels), 1, 1, generator=generator)
        own = 0.7 * effect + 0.3 * torch.randn(len(labels), 1, 1, generator=generator)
        known = sampled((nothing, own), labels, seed, effect, n)[1:]
        error = balanced_stderr(effects(nothing, known, labels).permute(1, 2, 0), labels)
        theta = means(filled(nothing, known, labels), labels)
        low, high = t_interval(theta, error, degrees_of_freedom(nothing, known, labels))
        inside.append(bool(low <= 0 <= high))
    assert sum(inside) / len(inside) >= 0.93


def test_the_mean_of_the_effects_is_that_of_the_filled_values(tokenizer_folder):
    cheap, corrections, labels = population("llama", tokenizer_folder)
    rows = draw(labels, torch.Generator().manual_seed(1))
    own, known = labels[rows], sampled(tuple(c[rows] for c in corrections), labels[rows], 0)
    by_effects = means(effects(cheap[rows], known, own), own)
    by_values = means(filled(cheap[rows], known, own), own)
    torch.testing.assert_close(by_effects, by_values, rtol=0, atol=1e-6)


def test_without_cheap_scores_it_is_the_sample_alone(tokenizer_folder):
    """With g = 0: the mean, the standard error and the degrees of freedom of the sample."""
    _, corrections, labels = population("llama", tokenizer_folder)
    part = corrections[0]
    (known, _) = sampled(corrections, labels, 3)
    zero = torch.zeros_like(part)
    inside = ~torch.isnan(known[:, 0, 0])
    alone, own = part[inside], labels[inside]
    torch.testing.assert_close(
        means(filled(zero, (known,), labels), labels), means(alone, own), rtol=1e-9, atol=1e-12
    )
    error = balanced_stderr(effects(zero, (known,), labels).permute(1, 2, 0), labels)
    expected = balanced_stderr(alone.permute(1, 2, 0).double(), own)
    torch.testing.assert_close(error, expected, rtol=1e-9, atol=0)
    freedom = degrees_of_freedom(zero, (known,), labels)
    torch.testing.assert_close(freedom, degrees_of_freedom(alone, (), own))


def test_a_sample_is_spread_over_its_key_and_each_example_is_drawn_alike():
    labels, key = ["a"] * 40, [float((7 * i) % 40) for i in range(40)]
    for n in (4, 8, 16):
        taken = sorted(key[i] for i in sample_order(labels, 3, key)[:n])
        gaps = [b - a for a, b in zip(taken, [*taken[1:], taken[0] + 40], strict=True)]
        assert max(gaps) <= 2 * 40 / n
    drawn = [i for seed in range(4000) for i in sample_order(labels, seed, key)[:6]]
    counts = torch.bincount(torch.tensor(drawn), minlength=40) / 4000
    assert float((counts - 6 / 40).abs().max()) < 4 * (0.15 * 0.85 / 4000) ** 0.5


@pytest.mark.parametrize("key", [None, [float(-i) for i in range(36)]])
@pytest.mark.parametrize("n", [3, 5, 24])
def test_the_sample_takes_the_labels_in_turn(n, key):
    labels = ["a"] * 20 + ["b"] * 12 + ["c"] * 4
    order = sample_order(labels, 1, key)
    assert sorted(order) == list(range(36))
    counts = [[labels[i] for i in order[:n]].count(label) for label in "abc"]
    left = [min(c, m) for c, m in zip([(n + 2) // 3] * 3, (20, 12, 4), strict=True)]
    assert sum(counts) == n
    assert max(counts) - min(c for c, m in zip(counts, (20, 12, 4), strict=True) if c < m) <= 1
    assert all(c <= m for c, m in zip(counts, (20, 12, 4), strict=True))
    assert left
    assert sample_order(labels, 1, key) == order != sample_order(labels, 2, key)


def test_a_single_correction_of_a_label_gives_a_value_and_no_error():
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    cheap = torch.randn(6, 1, 2, generator=torch.Generator().manual_seed(0))
    correction = torch.full_like(cheap, torch.nan)
    correction[[0, 3]] = 1.0
    assert bool(torch.isfinite(filled(cheap, (correction,), labels)).all())
    assert bool(torch.isnan(effects(cheap, (correction,), labels)).any(0).all())


def test_a_head_that_is_exactly_zero_has_a_score_of_zero_and_no_error():
    labels = torch.tensor([0] * 4 + [1] * 4)
    zero = torch.zeros(8, 1, 1)
    known = zero.clone()
    known[[2, 3, 6, 7]] = torch.nan
    spread = effects(zero, (known,), labels)
    assert bool((spread == 0).all())
    freedom = degrees_of_freedom(zero, (known,), labels)
    low, high = t_interval(torch.zeros(1, 1), torch.zeros(1, 1), freedom)
    assert float(low) == float(high) == 0.0


def test_a_fitted_weight_mends_cheap_scores_that_are_too_small():
    """y = 3 g + noise: errors as with 3 g, and much smaller than with g, and they cover."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.tensor([0] * 40 + [1] * 24)
    found, inside = [], []
    errors: dict[str, list[Tensor]] = {"fitted": [], "known": [], "plain": []}
    for seed in range(400):
        g = torch.randn(64, 1, 4, generator=generator) + labels[:, None, None]
        y = 3 * g + 0.5 * torch.randn(64, 1, 4, generator=generator)
        hidden = torch.ones(64, dtype=torch.bool)
        hidden[sample_order([str(int(label)) for label in labels], seed)[:24]] = False
        by_weight = {b: (y - b * g).masked_fill(hidden[:, None, None], torch.nan) for b in (1, 3)}
        own, known = fitted(g, (by_weight[1],), labels)
        theta, error = means(filled(own, known, labels), labels), errors_of(own, known, labels)
        low, high = t_interval(theta, error, degrees_of_freedom(own, known, labels))
        found.append(theta)
        inside.append((low <= 1.5) & (high >= 1.5))
        errors["fitted"].append(error)
        errors["known"].append(errors_of(3 * g, (by_weight[3],), labels))
        errors["plain"].append(errors_of(g, (by_weight[1],), labels))
    size = {name: float(torch.stack(each).mean()) for name, each in errors.items()}
    assert size["fitted"] < 1.1 * size["known"]
    assert size["fitted"] < 0.85 * size["plain"]
    table = torch.stack(found)
    assert float(((table.mean(0) - 1.5) / (table.std(0) / 20)).abs().max()) < 4
    assert 0.93 <= float(torch.stack(inside).double().mean()) <= 0.97


def errors_of(cheap: Tensor, corrections: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    return balanced_stderr(effects(cheap, corrections, labels).permute(1, 2, 0), labels)


def test_a_correction_is_shrunk_by_its_own_error():
    """One label, one head: c = 1 of errors 2, 4 and nothing."""
    labels = torch.zeros(4, dtype=torch.long)
    cheap = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None].expand(4, 1, 3)
    spreads = torch.tensor([[1.5, 1.0, -1.0], [0.5, 1.0, 3.0], [1.5, 1.0, -1.0], [0.5, 1.0, 3.0]])
    correction = spreads[:, None]
    c, squared_error = spreads.mean(0), spreads.var(0) / 4
    kept = (1 - squared_error / c**2).clamp(min=0)
    expected = (2.5 + kept * c)[None].double()
    torch.testing.assert_close(shrunk(cheap, (correction,), labels), expected)
    assert float(kept[2]) == 0.0 < float(kept[0]) < float(kept[1]) == 1.0


def test_each_head_has_the_degrees_of_freedom_of_its_own_sample(tokenizer_folder):
    """As when a sweep went on with some of the heads."""
    cheap, corrections, labels = population("llama", tokenizer_folder)
    (many, _), (few, _) = (sampled(corrections, labels, seed) for seed in (1, 1))
    order = sample_order([str(int(label)) for label in labels], 1)
    few = few.clone()
    few[order[12:24], 1:] = torch.nan
    mixed = degrees_of_freedom(cheap, (few,), labels)
    whole = degrees_of_freedom(cheap, (many,), labels)
    torch.testing.assert_close(mixed[0], whole[0])
    inside = order[:12]
    short = torch.full_like(many, torch.nan)
    short[inside] = many[inside]
    torch.testing.assert_close(mixed[1:], degrees_of_freedom(cheap, (short,), labels)[1:])


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_intervals_cover_though_the_sweep_chose_its_heads_by_them(family, tokenizer_folder):
    """Rounds of 6, 12 and 24 prompts; a head is swept on while its place in the top 4 is open."""
    cheap, corrections, labels = population(family, tokenizer_folder)
    total = cheap + sum(corrections)
    part = (total - cheap,)
    truth, names = means(total, labels), [str(int(label)) for label in labels]
    generator = torch.Generator().manual_seed(4)
    inside, wrong, swept = [], 0, 0
    for seed in range(400):
        rows = draw(labels, generator)
        order = sample_order([names[i] for i in rows.tolist()], seed)
        known = torch.full_like(part[0][rows], torch.nan)
        open_heads = torch.ones_like(truth, dtype=torch.bool)
        for start, end in ((0, 6), (6, 12), (12, 24)):
            chunk = torch.tensor(order[start:end])
            known[chunk] = torch.where(open_heads, part[0][rows][chunk], torch.nan)
            scores = combined(
                cheap[rows], (known,), [names[i] for i in rows.tolist()], direction=1.0,
                method="m", provenance=provenance(), looks=3,
            )  # fmt: skip
            open_heads = torch.zeros_like(open_heads)
            for head in scores.undecided(k=4):
                open_heads[head.layer, head.head] = True
        low, high = scores.interval()
        inside.append((low <= truth) & (truth <= high))
        swept += int((~torch.isnan(known)).sum())
        best = set(truth.flatten().topk(4).indices.tolist())
        decided = set(scores.top(4)) - set(scores.undecided(k=4))
        wrong += bool({h.layer * truth.shape[1] + h.head for h in decided} - best)
    assert float(torch.stack(inside).double().mean()) >= 0.95
    assert wrong / 400 <= 0.05
    assert swept < 400 * 24 * truth.numel()
