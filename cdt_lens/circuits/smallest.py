"""The smallest circuit that reaches a faithfulness, with its confidence limit.

1. Take the smallest prefix of the ranking whose lower confidence limit of f reaches the target.
2. Remove heads as long as the limit stays there: those first whose removal leaves f highest.
3. Exchange a weak head for one of the next heads of the ranking where that raises f, and go back
   to step 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from cdt_lens.circuits.ablation import measure_circuits
from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import f_interval, f_of
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count, Fraction, Level, Metric, Ranking
from cdt_lens.core.errors import InputError
from cdt_lens.core.passes import Passes
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.provenance import hashed_once
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.tasks.task import Examples, Task

Heads = tuple[Head, ...]
_BLOCK = 16  # prefixes that are measured together
_WEAK, _NEXT = 4, 16  # heads inside and outside of the circuit that are exchanged for each other
_EXCHANGES = 3


@checked_arguments
@uses_model
@hashed_once()
def smallest_circuit(
    model: nn.Module | ModelView,
    scores: HeadScores,
    examples: Examples,
    baseline: Baseline,
    *,
    target: Fraction = 0.8,
    level: Level = 0.95,
    by: Ranking = "signed",
    metric: Metric = "direction",
    task: Task | None = None,
    batch_size: Count = 16,
    rows: Count | None = None,
    progress: bool = True,
) -> Circuit:
    """Find a small circuit whose faithfulness reaches a target, with confidence.

    The circuit is fitted to `examples`. Report its faithfulness on other ones.

    Args:
        model: A TransformerLens model or its `ModelView`.
        scores: Scores of all heads of the model, measured on other examples.
        examples: The examples to measure f on.
        baseline: The values that ablated heads take.
        target: f that the lower confidence limit must reach.
        level: Confidence level of the two-sided interval.
        by: Rank heads by their "signed" score or by its "magnitude".
        metric: "direction", "accuracy" or "balanced_accuracy"; see `circuit_metric`.
        task: Supplies the prior for the accuracies, if it has one.
        batch_size: Number of examples per batch.
        rows: Maximum number of (circuit x example) rows per forward pass; None chooses it by the
            length of the prompts.
        progress: Whether to show progress bars.

    Returns:
        The circuit. Its `selection` names the size of the prefix of step 1.

    Raises:
        InputError: `target` or `level` is out of range, a head has no score, or no number of heads
            reaches the target.
        ArtifactError: The scores belong to another model.
    """
    view = view_of(model)
    scores.provenance.check_model(view, "these scores")
    ranking = scores.ranking(by)
    if len(ranking) < view.n_layers * view.n_heads:
        raise InputError(
            f"smallest_circuit: only {len(ranking)} heads have scores; score all heads"
        )
    passes = Passes(batch_size, rows, progress)
    search = _Search(view, examples, baseline, metric, task, passes, target, level)
    prefix = search.prefix(ranking)
    chosen = search.refine(prefix, ranking)
    selection = {"rule": "smallest", "target": target, "level": level, "by": by, "metric": metric}
    fitted_on = {"task_hash": examples.hash, "baseline_hash": baseline.hash}
    return scores.circuit(chosen, selection | fitted_on | {"prefix": len(prefix)})


@dataclass
class _Search:
    """Circuits measured on the same examples, once each."""

    view: ModelView
    examples: Examples
    baseline: Baseline
    metric: Metric
    task: Task | None
    passes: Passes
    target: float
    level: float
    known: dict[Heads, tuple[float, float]] = field(default_factory=dict)

    def measure(self, circuits: Iterable[Heads]) -> None:
        """Measure f and its lower limit of the circuits that are not known yet."""
        wanted = [c for c in dict.fromkeys(circuits) if c not in self.known]
        if not wanted:
            return
        everyone = all_heads(self.view.n_layers, self.view.n_heads)
        measured = measure_circuits(
            self.view, [everyone, (), *wanted], self.examples, self.baseline, metric=self.metric,
            task=self.task, passes=self.passes,
        )  # fmt: skip
        means = measured.means()
        exact = [len(heads) == len(everyone) for heads in wanted]
        low, _ = f_interval(
            measured.effects(wanted, everyone), measured.strata, self.metric,
            means[everyone] - means[()], exact, self.level,
        )  # fmt: skip
        for heads, limit in zip(wanted, low.tolist(), strict=True):
            self.known[heads] = (f_of(means[heads], means[everyone], means[()]), limit)

    def reaches(self, circuit: Heads) -> bool:
        """Return whether the lower limit of a measured circuit reaches the target."""
        # The full model has f = 1 and no spread, up to rounding.
        return self.known[circuit][1] >= self.target - 1e-6

    def prefix(self, ranking: Heads) -> Heads:
        """Return the smallest prefix of the ranking that reaches the target."""
        for start in range(1, len(ranking) + 1, _BLOCK):
            block = range(start, min(start + _BLOCK, len(ranking) + 1))
            self.measure(_sorted(ranking[:size]) for size in block)
            for size in block:
                if self.reaches(_sorted(ranking[:size])):
                    return _sorted(ranking[:size])
        raise InputError(
            f"smallest_circuit: no number of heads reaches f = {self.target} with its lower limit "
            f"on {len(self.examples)} examples of {self.examples.name}; measure on more examples"
        )

    def refine(self, circuit: Heads, ranking: Heads) -> Heads:
        """Remove heads, exchange some, and remove again."""
        circuit = self.trimmed(circuit)
        for _ in range(_EXCHANGES):
            better = self.exchanged(circuit, ranking)
            if better is None:
                break
            trimmed = self.trimmed(better)
            if len(trimmed) == len(circuit):
                break
            circuit = trimmed
        return circuit

    def trimmed(self, circuit: Heads) -> Heads:
        """Remove as many heads as possible while the circuit reaches the target."""
        while len(circuit) > 1:
            order = self.weakest(circuit)
            shorter = [_without(circuit, order[:n]) for n in range(1, len(circuit))]
            self.measure(shorter)
            enough = [heads for heads in shorter if self.reaches(heads)]
            if not enough:
                break
            circuit = enough[-1]
        return circuit

    def weakest(self, circuit: Heads) -> list[Head]:
        """Return the heads in the order in which their removal leaves f highest."""
        self.measure(_without(circuit, [head]) for head in circuit)
        return sorted(circuit, key=lambda h: -self.known[_without(circuit, [h])][0])

    def exchanged(self, circuit: Heads, ranking: Heads) -> Heads | None:
        """Return the best circuit with one head exchanged, or None if none has a higher f."""
        trials = list(self._exchanges(circuit, ranking))
        self.measure(trials)
        best = max(trials, key=lambda heads: self.known[heads][0], default=None)
        if best is None or self.known[best][0] <= self.known[circuit][0]:
            return None
        return best if self.reaches(best) else None

    def _exchanges(self, circuit: Heads, ranking: Heads) -> Iterator[Heads]:
        outside = [head for head in ranking if head not in circuit][:_NEXT]
        if len(circuit) < 2:
            return
        for weak in self.weakest(circuit)[:_WEAK]:
            for head in outside:
                yield _sorted((*_without(circuit, [weak]), head))


def _sorted(heads: Iterable[Head]) -> Heads:
    return tuple(sorted(heads))


def _without(circuit: Heads, heads: Iterable[Head]) -> Heads:
    left = set(heads)
    return tuple(head for head in circuit if head not in left)
