"""Estimate the scores of a sweep: first-order scores of all prompts, exact ones of a sample.

1. One backward pass for each end that the rules name gives every prompt its first-order score
   (`GatedPass`).
2. A random sample of the prompts, drawn within labels, gets the exact sweep, too. It is spread
   evenly over the prompts' total first-order effect, which leaves less to chance
   (docs/results/estimates.md).
3. The two are combined without bias (`circuits.sampled`).

The effect of adding a head to the empty model is so close to its gradient there that the first two
prompts of a label and a fifth of the others are enough for it (docs/method/scores.md).

If the scores shall decide a circuit, the sample comes in rounds that double. After each round the
sweep goes on only with the heads whose place in or out of the circuit is open. The first round is
of all heads, so it also bounds what the others can be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import TypedDict

from cdt_lens.circuits.head_scores import HeadScores, label_index
from cdt_lens.circuits.measures import heads_at
from cdt_lens.circuits.sampled import sample_order
from cdt_lens.core.choices import Direction
from cdt_lens.core.errors import ArtifactError
from cdt_lens.core.kept import Kept
from cdt_lens.core.passes import Passes
from cdt_lens.core.per_example import share_rows, table
from cdt_lens.core.processes import any_process, gather_items
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.decomposition.gated_pass import GatedPass
from cdt_lens.decomposition.rules import PRESETS, Rules
from cdt_lens.decomposition.slopes import SLOPES
from cdt_lens.models.heads import Head
from cdt_lens.models.view import ModelView
from cdt_lens.tasks.task import Batch, Examples

# The number of prompts with an exact sweep, unless the caller asks for another one. It is doubled
# while the standard error is more than `_WORSE` times that of a sweep over all prompts.
EXACT = 15
_WORSE = 2.0
# In a small model, whose sweep of a prompt costs fewer forward passes, every prompt is swept.
_SMALL = 64.0
# The first-order form of rules that have one (docs/method/decomposition.md).
_SLOPES: Mapping[Rules, str] = {
    PRESETS["ablation"]: "gradient",
    PRESETS["stable"]: "stable",
    PRESETS["shared"]: "shared",
    PRESETS["linear"]: "linear",
}
# Which sampled prompts of a label get the exact pass of a sparse part: the first ones, and of the
# others one in so many. The number is odd: ranks are spread over the effects by their binary
# digits, so that every fourth rank would lie in one quarter of the range.
_FIRST, _EVERY = 2, 5
# Each further round makes the intervals of all rounds wider (`HeadScores.interval`).
_ROUNDS = 3


class Sampled(TypedDict):
    """The JSON of a checkpoint: the examples whose rows are finished, for each part."""

    index: list[list[int]]


@dataclass(frozen=True)
class Part:
    """One term of a score: its exact rules and its first-order form.

    Args:
        rules: The rules of the exact sweep.
        slopes: Name of the slopes of the first-order form.
        point: Where the gates of all heads stand: 1 in the plain model, 0 in the empty one.
        weight: The term's weight in the score.
        sparse: Whether a part of the sample is enough.
    """

    rules: Rules
    slopes: str
    point: float
    weight: float = 1.0
    sparse: bool = False


def parts_of(rules: Rules) -> tuple[Part, ...]:
    """Return the terms of the rules' score, or none if the rules have no first-order form.

    Args:
        rules: The propagation rules.
    """
    removal = replace(rules, context="full")
    if removal not in _SLOPES and rules.context != "empty":
        return ()
    added = Part(replace(rules, context="empty"), "gradient", 0.0, sparse=True)
    if rules.context == "empty":
        return (replace(added, sparse=False),)
    removed = Part(removal, _SLOPES[removal], 1.0)
    if rules.context == "full":
        return (removed,)
    return replace(removed, weight=0.5), replace(added, weight=0.5)


def sweep_cost(rules: Rules, layers: int, heads: int) -> float:
    """Return the cost of an exact sweep of one example: a head costs the layers from its own on.

    Args:
        rules: The propagation rules.
        layers: Number of layers.
        heads: Number of heads in a layer.

    Returns:
        The cost in forward passes.
    """
    ends = 2 if rules.context == "both" else 1
    return 1 + ends * heads * (layers + 1) / 2


def is_small(view: ModelView, rules: Rules) -> bool:
    """Return whether a model is so small that a sample of the prompts saves nothing.

    Args:
        view: The model.
        rules: The propagation rules.
    """
    return sweep_cost(rules, view.n_layers, view.n_heads) < _SMALL


@dataclass(frozen=True)
class Budget:
    """When the exact sweep ends: after a number of prompts, at a precision, or after a time.

    With none of `precision`, `minutes` and `decide`, and `grows`, it ends when the scores are good
    enough for their cost (`good_enough`).

    Args:
        exact: Largest number of prompts with an exact sweep.
        precision: Standard error, as a share of the task direction, that is precise enough: the
            median over the tenth of the heads with the largest scores.
        minutes: Largest time of the exact sweep; its first round is made in any case.
        decide: Arguments of `HeadScores.undecided`: the circuit that the scores shall decide.
        grows: Whether the sample is doubled from `EXACT` on.
    """

    exact: int
    precision: float | None = None
    minutes: float | None = None
    decide: Mapping[str, Any] | None = None
    grows: bool = False


Rows = dict[int, Float[Tensor, " head_and_direction"]]
ExactRows = Callable[[Rules, Batch, tuple[Head, ...] | None], Rows]


@dataclass
class Estimator:
    """The parts of an estimate that all batches share.

    Args:
        view: The model.
        examples: The examples to score.
        baseline: The values that ablated heads take.
        parts: The terms of the score.
        direction: "mean" or "strongest".
        passes: Sizes of the forward passes.
        seed: Seed of the sample.
        exact_rows: Computes the exact rows of a batch under some rules, for some heads or all.
        cost: Gives the cost of some heads for one batch, as steps of the bar; None means all.
        bar: The progress bar of the exact sweep.
    """

    view: ModelView
    examples: Examples
    baseline: Baseline
    parts: tuple[Part, ...]
    direction: Direction
    passes: Passes
    seed: int
    exact_rows: ExactRows
    cost: Callable[[tuple[Head, ...] | None], int]
    bar: tqdm

    def __post_init__(self) -> None:
        self.labels = [example.label for example in self.examples]
        self.order: list[int] = []
        self.rank: dict[int, int] = {}

    def draw(self, first: Float[Tensor, "example layer head"]) -> None:
        """Draw the order of the sample.

        Args:
            first: First-order score of each example.
        """
        total = first.flatten(1).nansum(1).tolist()
        self.order = sample_order(self.labels, self.seed, total)
        drawn: dict[str, list[int]] = {label: [] for label in self.labels}
        for position in self.order:
            drawn[self.labels[position]].append(position)
        self.rank = {i: rank for group in drawn.values() for rank, i in enumerate(group)}

    def cheap(self) -> Float[Tensor, "part_and_direction example layer head"]:
        """Compute the first-order score of every example under each part, then d(full)."""
        shape = self.view.n_layers, self.view.n_heads
        out = table(len(self.parts) + 1, len(self.examples), *shape, dtype=torch.float32)
        finished: list[int] = []
        gated = [GatedPass(self.view, SLOPES[part.slopes]) for part in self.parts]
        batches = self.passes.batches(self.examples, self.view.longrope_limit)
        for batch in self.passes.bar(batches, name="first order"):
            batch = batch.to(self.view.device)
            at = self.baseline.for_batch(self.view, batch)
            rows, full = [], None  # The first of several parts is at the plain model.
            for part, run in zip(self.parts, gated, strict=True):
                by_position, full = run.scores(batch, at, [part.point], self.direction, full)
                rows.append(by_position.sum(-1))
            assert full is not None
            rows.append(full[:, None, None].expand_as(rows[0]))
            out[:, list(batch.index)] = torch.stack(rows).float().cpu()
            finished += batch.index
        share_rows(out.transpose(0, 1), finished)
        return out

    def exact(
        self,
        budget: Budget,
        kept: Kept | None,
        own: list[Rows],
        enough: Callable[[list[Rows]], bool],
        wanted: Callable[[list[Rows]], tuple[Head, ...]],
    ) -> list[Rows]:
        """Sweep the sampled examples, part by part, until the budget is used.

        Args:
            budget: When to stop.
            kept: Where finished rows are kept.
            own: The rows that were kept there (`read`).
            enough: Whether the rows so far are precise enough to end before the budget does.
            wanted: The heads that the rows so far leave open.

        Returns:
            For each part the rows of its examples, by their position. They hold NaN for heads
            that were decided before.
        """
        # All processes divide what none of them has.
        done = [dict(gather_items(list(rows.items()))) for rows in own]
        began, start = time.monotonic(), 0
        heads: tuple[Head, ...] | None = None
        for end in self.ends(budget):
            if start and budget.decide is not None:
                heads = wanted(self._of(done, self.order[:start]))
                if not heads:
                    break
            before = time.monotonic()
            self._round(self.order[start:end], done, kept, heads)
            start, now = end, time.monotonic()
            next_end = now + (now - before)  # another round takes as long as this one
            late = budget.minutes is not None and next_end - began > 60 * budget.minutes
            # A checkpoint may hold rows of later rounds, which this call does not return.
            if any_process(late) or enough(self._of(done, self.order[:start])):
                break
        return self._of(done, self.order[:start])

    def ends(self, budget: Budget) -> list[int]:
        """Return the size of the sample after each round of a budget.

        The first round holds every label twice, since a score and its interval need that. With a
        time alone, all rounds are of this size: a whole batch can take longer than the time.
        """
        least = _FIRST * len(set(self.labels))
        if budget.grows:
            doubled = [max(EXACT, least) * 2**n for n in range(budget.exact.bit_length())]
            return [*(end for end in doubled if end < budget.exact), budget.exact]
        if budget.decide is None:
            size = budget.exact if budget.minutes is None else least
            if budget.precision is not None:
                size = max(self.passes.batch_size, least)
            return [*range(size, budget.exact, size), budget.exact]
        ends = [budget.exact]
        while ends[0] // 2 >= least and len(ends) < _ROUNDS:
            ends.insert(0, ends[0] // 2)
        return ends

    def _of(self, done: Sequence[Rows], positions: Sequence[int]) -> list[Rows]:
        """Return the rows of some examples; an interrupted call may have left further ones."""
        inside = set(positions)
        return [{i: row for i, row in rows.items() if i in inside} for rows in done]

    def _round(
        self,
        chunk: Sequence[int],
        done: list[Rows],
        kept: Kept | None,
        heads: tuple[Head, ...] | None,
    ) -> None:
        batches = [self._batches(chunk, number, done) for number in range(len(self.parts))]
        self.bar.total = self.bar.n + self.cost(heads) * sum(map(len, batches))
        for number, part in enumerate(self.parts):
            own: list[tuple[int, Tensor]] = []
            for positions, batch in batches[number]:
                rows = self.exact_rows(part.rules, batch.to(self.view.device), heads)
                own += [(positions[i], row) for i, row in rows.items()]
                if kept is not None:
                    so_far = [*done[:number], done[number] | dict(own), *done[number + 1 :]]
                    self._write(kept, so_far)
            done[number].update(gather_items(own))

    def _batches(
        self, chunk: Sequence[int], number: int, done: Sequence[Rows]
    ) -> list[tuple[list[int], Batch]]:
        """Return this process's batches of the examples without rows, with their positions."""
        wanted = [i for i in chunk if i not in done[number] and self._has(self.parts[number], i)]
        if not wanted:
            return []
        chosen = replace(self.examples, items=tuple(self.examples[i] for i in wanted))
        batches = self.passes.batches(chosen, self.view.longrope_limit)
        return [(wanted, batch) for batch in batches]

    def _has(self, part: Part, position: int) -> bool:
        """Return whether an example of the sample gets the exact pass of a part."""
        return not part.sparse or in_sparse_part(self.rank[position])

    def _write(self, kept: Kept, done: Sequence[Rows]) -> None:
        index = [list(rows) for rows in done]
        tensors = {f"rows.{n}": torch.stack(list(r.values())) for n, r in enumerate(done) if r}
        kept.write({"index": index}, tensors)

    def read(self, kept: Kept | None) -> list[Rows]:
        """Return the rows of each part that an earlier call has kept.

        Args:
            kept: Where they are kept, if anywhere.

        Raises:
            ArtifactError: The file is damaged, or of another run.
        """
        found = None if kept is None else kept.read(lambda body: False)
        if kept is None or found is None:
            return [{} for _ in self.parts]
        body, tensors = found
        done = [
            dict(zip(index, tensors.get(f"rows.{n}", torch.empty(0)), strict=False))
            for n, index in enumerate(body["index"])
        ]
        whole = [len(rows) for rows in done] == [len(index) for index in body["index"]]
        if len(done) != len(self.parts) or not whole:
            raise ArtifactError(f"{kept.path}: damaged: rows are missing; remove it to begin anew")
        return done


def in_sparse_part(rank: int) -> bool:
    """Return whether a sampled example gets the exact pass of a sparse part.

    Args:
        rank: Its place in the sample among the examples of its label, from 0 on.
    """
    return rank < _FIRST or rank % _EVERY == _EVERY - 1


def good_enough(scores: HeadScores) -> bool:
    """Return whether a sweep over all examples would not be much better.

    Its standard error follows from the exact values of the sample. The median over the tenth of the
    heads with the largest scores decides.

    Args:
        scores: The estimate.
    """
    swept = (~torch.isnan(scores.corrections[0])).flatten(1).any(1)
    labels = label_index(scores.example_labels)
    if int(labels.unique(return_counts=True)[1].min()) < 2:
        return True  # No sample has a standard error that could be judged.
    variances = [
        scores.per_example[swept & (labels == label)].var(0) / int((labels == label).sum())
        for label in labels.unique()
    ]
    whole = torch.stack(variances).sum(0).sqrt() / len(variances)
    ratios = [scores.stderr[h.layer, h.head] / whole[h.layer, h.head] for h in largest(scores)]
    # Both are 0 where all prompts are alike.
    return float(torch.stack(ratios).nan_to_num(0.0, torch.inf).median()) <= _WORSE


def largest(scores: HeadScores) -> tuple[Head, ...]:
    """Return the tenth of the scored heads with the largest scores."""
    return scores.top(max(1, heads_at(0.1, len(scores.ranking()))), by="magnitude")
