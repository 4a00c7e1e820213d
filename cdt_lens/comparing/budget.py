"""Equal cost: how many examples a method may score for a number of forward passes.

The unit is one plain forward pass of one example, which `Method.cost` counts in. A cheap method
scores more examples for the same budget. The examples of a smaller number are among those of a
larger one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from cdt_lens.circuits.sampled import sample_order
from cdt_lens.core.choices import DEFAULT_RULES
from cdt_lens.core.errors import InputError
from cdt_lens.scoring.estimate import EXACT
from cdt_lens.scoring.methods import Method, method_of
from cdt_lens.tasks.task import Examples

# The number of prompts whose exact sweep is the usual budget.
_SWEPT = 16


@dataclass(frozen=True)
class Share:
    """The examples of one method.

    Args:
        examples: The examples that it scores.
        exact: Number of these that it sweeps, if it corrects first-order scores by a sweep of a
            sample, else None.
    """

    examples: Examples
    exact: int | None


def sweep_price(layers: int, heads: int) -> float:
    """Return the price of an exact sweep of 16 prompts under the default rules.

    Args:
        layers: Number of layers.
        heads: Number of heads in a layer.

    Returns:
        The price in forward passes of one example.
    """
    return _SWEPT * method_of(f"cdt:{DEFAULT_RULES}").cost(layers, heads)


def check_budget(
    methods: Sequence[str], examples: Examples, budget: float, *, layers: int, heads: int
) -> None:
    """Refuse a budget that is too small for one example of each label.

    Args:
        methods: Names of the methods.
        examples: The examples to draw from.
        budget: Forward passes of one example for each method.
        layers: Number of layers.
        heads: Number of heads in a layer.

    Raises:
        InputError: Names the method that needs most, and the smallest budget that is enough for
            all.
    """
    labels = _labels(examples)
    least = {name: _Cost.of(method_of(name), layers, heads).least(labels) for name in methods}
    name = max(least, key=least.__getitem__)
    if budget < least[name]:
        raise InputError(
            f"budget={budget:g}: too small for {name}, which needs {math.ceil(least[name])} "
            f"forward passes for one example of each of {labels} labels; give at least as many"
        )


def shares(
    methods: Sequence[str],
    examples: Examples,
    budget: float | None,
    *,
    layers: int,
    heads: int,
    seed: int,
) -> dict[str, Share]:
    """Return what each method scores.

    Args:
        methods: Names of the methods.
        examples: The examples to draw from.
        budget: Forward passes of one example for each method; None gives all examples to each.
        layers: Number of layers.
        heads: Number of heads in a layer.
        seed: Seed of the draw within each label.

    Returns:
        The share of each method by its name.

    Raises:
        InputError: The budget is too small; see `check_budget`.
    """
    if budget is not None:
        check_budget(methods, examples, budget, layers=layers, heads=heads)
    order = sample_order([example.label for example in examples], seed)
    found = {}
    for name in methods:
        cost = _Cost.of(method_of(name), layers, heads)
        scored, exact = cost.counts(budget, [examples[i].label for i in order])
        chosen = tuple(examples[i] for i in sorted(order[:scored]))
        found[name] = Share(replace(examples, items=chosen), exact)
    return found


@dataclass(frozen=True)
class _Cost:
    """Forward passes that an example costs, and that its exact sweep costs besides, if any.

    The sweep costs less for later examples of a label.
    """

    scored: float
    exact: Callable[[int], float] | None

    @classmethod
    def of(cls, method: Method, layers: int, heads: int) -> _Cost:
        exact = None if method.exact_cost is None else partial(method.exact_cost, layers, heads)
        return cls(method.cost(layers, heads), exact)

    def least(self, labels: int) -> float:
        """Return the price of one example of each label."""
        return labels * (self.scored + (0.0 if self.exact is None else self.exact(0)))

    def counts(self, budget: float | None, labels: Sequence[str]) -> tuple[int, int | None]:
        """Return how many examples are scored, and how many of these are swept.

        Args:
            budget: Forward passes of one example; None scores all.
            labels: Label of each example, in the order in which they are drawn.
        """
        most, different = len(labels), len(set(labels))
        if budget is None:
            return most, None if self.exact is None else min(max(EXACT, different), most)
        # What remains is enough for the sweep of one example of each label.
        above = different * (self.least(1) - self.scored)
        scored = _whole((budget - above) / self.scored, most)
        if self.exact is None:
            return scored, None
        left, swept = budget - scored * self.scored, 0
        for rank in sorted(rank for n in Counter(labels[:scored]).values() for rank in range(n)):
            left -= self.exact(rank)
            if left < -1e-9:
                break
            swept += 1
        return scored, swept


def _whole(number: float, most: int) -> int:
    # A price of n examples divided by that of one may lie just below n.
    return int(min(number + 1e-9, most))


def _labels(examples: Examples) -> int:
    """Return how many labels have examples."""
    return sum(count > 0 for count in examples.counts.values())
