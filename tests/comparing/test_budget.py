"""Equal cost: the numbers of examples that a budget pays for, counted by hand.

A model of 2 layers with 4 heads each. An exact sweep of one example costs 1 + 4 * 3 / 2 = 7 forward
passes, one with both ends 13, a gradient 2. The estimate costs 2 gradients for every example, and
7 passes more for each that it sweeps, twice for the first two and every fifth of a label.
"""

from __future__ import annotations

import math

import pytest
from helpers.tiny_tasks import examples, many

from cdt_lens.comparing.budget import check_budget, shares, sweep_price
from cdt_lens.core.errors import InputError
from cdt_lens.tasks.task import Example, Examples

SHAPE = {"layers": 2, "heads": 4}
ESTIMATE = "estimate:two-ended"
METHODS = ("exact", "cdt:two-ended", ESTIMATE, "one-pass", "random")


def counts(budget: float | None, data: Examples | None = None) -> dict[str, tuple[int, int | None]]:
    found = shares(METHODS, data or many(), budget, seed=0, **SHAPE)
    return {name: (len(share.examples), share.exact) for name, share in found.items()}


def test_without_a_budget_every_method_scores_all_examples():
    found = shares(METHODS, many(), None, seed=0, **SHAPE)
    assert {len(share.examples) for share in found.values()} == {24}
    assert all(share.examples.hash == many().hash for share in found.values())
    assert [found[name].exact for name in METHODS] == [None, None, 15, None, None]
    assert counts(None, examples())[ESTIMATE] == (6, 6)
    # More labels than are usually swept: one example of each.
    words = range(40, 60)
    items = tuple(
        Example(f"p{i}", (5, 6), f"l{i % 20}", (words[i % 20],), tuple({*words} - {words[i % 20]}))
        for i in range(40)
    )
    labels = tuple(dict.fromkeys(item.label for item in items))
    assert counts(None, Examples(items, labels, "many labels"))[ESTIMATE] == (40, 20)


@pytest.mark.parametrize(
    ("budget", "exact", "two_ended", "estimate", "one_pass", "random"),
    [
        # 3 sweeps of 14 are set aside, (91 - 42) / 4 scored; (91 - 12 * 4) / 14 swept.
        (91, 13, 7, (12, 3), 24, 24),
        # All 24 scored for 96; of 104, 6 * 14 for two of each label, and 2 * 7.
        (200, 24, 15, (24, 8), 24, 24),
        # 6 * 14 for two of each label, 6 * 7 for two more, 14 for the fifth.
        (96 + 6 * 14 + 6 * 7 + 13.9, 24, 18, (24, 12), 24, 24),
        (96 + 6 * 14 + 6 * 7 + 14, 24, 18, (24, 13), 24, 24),
        (54, 7, 4, (3, 3), 24, 24),
        (58, 8, 4, (4, 3), 24, 24),
        (10_000, 24, 24, (24, 24), 24, 24),
        (math.inf, 24, 24, (24, 24), 24, 24),
    ],
)
def test_a_budget_pays_for_as_many_examples(budget, exact, two_ended, estimate, one_pass, random):
    assert counts(budget) == {
        "exact": (exact, None), "cdt:two-ended": (two_ended, None), ESTIMATE: estimate,
        "one-pass": (one_pass, None), "random": (random, None),
    }  # fmt: skip


def test_a_price_of_whole_examples_pays_for_all_of_them():
    """0.1 * 3 / 0.1 lies below 3 in floating point."""
    for n in range(3, 24):
        found = shares(["exact"], many(), n * 7.0, seed=0, **SHAPE)["exact"]
        assert len(found.examples) == n
    assert sweep_price(2, 4) == 16 * 13
    assert counts(sweep_price(2, 4))["cdt:two-ended"] == (16, None)


@pytest.mark.parametrize("seed", [0, 5])
def test_smaller_draws_are_among_the_larger_and_balanced(seed):
    found = shares(METHODS, many(), 91, seed=seed, **SHAPE)
    few, more = found["cdt:two-ended"].examples, found["exact"].examples
    assert set(few.items) < set(more.items) < set(many().items)
    assert sorted(few.counts.values()) == [2, 2, 3] and sorted(more.counts.values()) == [4, 4, 5]
    order = [many().items.index(item) for item in more]
    assert order == sorted(order) and few.labels == many().labels
    other = shares(METHODS, many(), 91, seed=seed + 1, **SHAPE)["cdt:two-ended"].examples
    assert other.hash != few.hash


def test_a_budget_below_one_example_of_each_label_is_refused():
    told = r"budget=38: too small for cdt:two-ended, which needs 39 .* each of 3 labels"
    with pytest.raises(InputError, match=told):
        shares(["exact", "cdt:two-ended", "random"], many(), 38, seed=0, **SHAPE)
    with pytest.raises(InputError, match=f"too small for {ESTIMATE}, which needs 54 "):
        check_budget(["exact", ESTIMATE], many(), 53.5, **SHAPE)
    check_budget(METHODS, many(), 54, **SHAPE)
    check_budget(["exact"], many()[:1], 7, **SHAPE)  # Labels without examples cost nothing.
