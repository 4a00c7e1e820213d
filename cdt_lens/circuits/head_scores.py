"""`HeadScores`: one signed score per head with its standard error; selection of circuits from it.

A circuit is selected by number, by fraction, by a threshold, or as the heads whose score is stable
under resampling of the examples. Near-zero heads are a control of the same size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cdt_lens.circuits.circuit import Circuit, near_zero_heads
from cdt_lens.circuits.measures import heads_at
from cdt_lens.circuits.sampled import degrees_of_freedom, effects, filled, fitted, shrunk
from cdt_lens.core import display
from cdt_lens.core.artifacts import content_hash
from cdt_lens.core.axes import along
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count, Fraction, FromZeroCount, Level, Ranking
from cdt_lens.core.errors import InputError
from cdt_lens.core.per_example import by_layer, table
from cdt_lens.core.saved import Saved
from cdt_lens.models.heads import Head, all_heads, check_heads
from cdt_lens.models.provenance import Provenance
from cdt_lens.tasks.intervals import t_interval
from cdt_lens.tasks.metrics import balanced_mean, balanced_stderr, label_numbers

NO_INTERVALS = (
    "these scores have no intervals. They need a method with standard errors, and two examples of "
    "each label, two of them with an exact sweep; score more examples (or sweep more: exact=)"
)


@dataclass(frozen=True, eq=False)
class HeadScores(Saved):
    """Signed relevance of every head, in logits: positive pushes towards the gold label.

    Heads are ranked by the signed score everywhere, the largest first, unless a method is called
    with `by="magnitude"`; equal scores stand in order of layer and head.

    Args:
        values: Label-balanced mean over the examples, NaN for heads that were not scored.
        stderr: Standard error of `values`.
        per_example: d(rel) of each example. Where the exact value is not known it is the cheap
            score plus the mean correction of the example's label (`circuits.sampled`).
        example_labels: Label of each example.
        direction: Label-balanced mean task direction of the full model, in logits.
        method: Name of the method.
        provenance: Model, task and options that the scores were computed with.
        cheap: First-order score of each example, or None if every example had an exact sweep.
        corrections: For each part of the score the exact score minus the cheap one, NaN for the
            examples without an exact sweep.
        looks: How often the sweep looked at the intervals to choose the heads that it went on with.
            `interval` allows for it.
    """

    values: Float[Tensor, "layer head"]
    stderr: Float[Tensor, "layer head"] = field(repr=False)
    per_example: Float[Tensor, "example layer head"] = field(repr=False)
    example_labels: Annotated[tuple[str, ...], along("example")] = field(repr=False)
    direction: float
    method: str
    provenance: Provenance = field(repr=False)
    cheap: Float[Tensor, "example layer head"] | None = field(default=None, repr=False)
    corrections: tuple[Float[Tensor, "example layer head"], ...] = field(default=(), repr=False)
    looks: int = field(default=1, repr=False)
    _format, _kind = "cdt_lens.scores", "scores file"
    _name = "scores.json"
    _advice = "score_heads(model, examples, baseline) makes them"

    def __repr__(self) -> str:
        best = [f"{h} {float(self.values[h.layer, h.head]):+.3g}" for h in self.ranking()]
        sizes = f"{len(best)} heads on {len(self.example_labels)} examples"
        return display.line(
            self,
            self.method,
            sizes,
            display.few(best, 4),
            f"direction {self.direction:+.3g} logits",
        )

    @property
    def n_layers(self) -> int:
        return self.values.shape[0]

    @property
    def n_heads(self) -> int:
        return self.values.shape[1]

    @property
    def hash(self) -> str:
        """The sha256 of the method and the scores, by which a curve names them."""
        return content_hash([self.method, self.values.tolist()])

    @property
    def effects(self) -> Float[Tensor, "example layer head"]:
        """One value per example, whose label-balanced mean and standard error are the score's."""
        if self.cheap is None:
            return self.per_example.double()
        return effects(self.cheap, self.corrections, label_index(self.example_labels))

    @checked_arguments
    def interval(
        self, level: Level = 0.95
    ) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
        """Return the confidence interval of each head's mean over the population of examples.

        If the sweep chose its heads by looking at `looks` intervals, each has the level
        1 - (1 - level) / looks, so that all of them hold together (Bonferroni), whichever the
        sweep ended with.

        Args:
            level: Confidence level, above 0 and below 1.

        Returns:
            The lower and the upper limit in logits; NaN if a label has a single example.
        """
        labels = label_index(self.example_labels)
        first = self.per_example if self.cheap is None else self.cheap
        freedom = by_layer(degrees_of_freedom, first, self.corrections, labels)
        level = 1 - (1 - level) / self.looks
        return t_interval(self.values.double(), self.stderr.double(), freedom, level)

    @property
    def has_intervals(self) -> bool:
        """Whether each scored head has an interval: two examples of each label, two swept ones."""
        low, _ = self.interval()
        return not bool(torch.isnan(low[~torch.isnan(self.values)]).any())

    @checked_arguments
    def undecided(
        self,
        *,
        k: Count | None = None,
        fraction: Fraction | None = None,
        threshold: float | None = None,
        by: Ranking = "signed",
        level: Level = 0.95,
    ) -> tuple[Head, ...]:
        """Return the scored heads whose place in or out of a circuit is open.

        A head is in the circuit if its interval lies above those of all but k - 1 others, and out
        of it if k intervals lie above its own. With a threshold it is open if its interval holds
        the threshold.

        Args:
            k, fraction, threshold, by: The circuit, as in `select`.
            level: Level of `interval`.

        Returns:
            The heads, in the order of the ranking. All of them where intervals are not known.

        Raises:
            InputError: As `select`.
        """
        size = len(self.select(k=k, fraction=fraction, threshold=threshold, by=by))
        low, high = self._limits(level, by)
        if threshold is None:
            inside = low > _largest_of(high, size + 1)
            outside = high < _largest_of(low, size)
        else:
            inside, outside = low > threshold, high < threshold
        decided = inside | outside
        return tuple(h for h in self.ranking(by) if not bool(decided[h.layer, h.head]))

    def _limits(self, level: float, by: Ranking) -> tuple[Tensor, Tensor]:
        """Return the limits of the score or of its magnitude; unknown ones decide nothing."""
        low, high = self.interval(level)
        if by == "magnitude":
            zero = (low <= 0) & (high >= 0)
            low, high = low.abs(), high.abs()
            low, high = torch.where(zero, 0.0, torch.minimum(low, high)), torch.maximum(low, high)
        unknown = torch.isnan(self.values)
        low = low.nan_to_num(nan=-torch.inf)
        high = torch.where(unknown, -torch.inf, high.nan_to_num(nan=torch.inf))
        return low, high

    def shrunk(self) -> HeadScores:
        """Return these scores with smaller corrections, which rank better from few exact prompts.

        A correction c becomes c max(0, c^2 - se^2) / c^2, where se is its standard error. The
        values are biased, so use them for the ranking alone: they have no standard errors, and so
        no intervals. Scores without a sample stay as they are.

        Raises:
            InputError: A label has a single example with an exact sweep.
        """
        if self.cheap is None:
            return self
        if not self.has_intervals:
            raise InputError(f"shrunk: {self.method}: {NO_INTERVALS}")
        labels = label_index(self.example_labels)
        values = by_layer(shrunk, self.cheap, self.corrections, labels).float()
        return replace(
            self, values=values, stderr=torch.full_like(values, torch.nan), cheap=None,
            corrections=(), per_example=(self.effects + (values - self.values)).float(),
            method=f"{self.method}, shrunk",
        )  # fmt: skip

    def fitted(self) -> HeadScores:
        """Return these scores with a fitted weight b of the cheap scores in place of b = 1.

        b is fitted for each head over one half of the sample and used for the other half. The
        standard error is smaller where the cheap scores are too large or too small, and larger
        where the sample is too small to tell. Scores without a sample stay as they are.
        """
        if self.cheap is None:
            return self
        labels = label_index(self.example_labels)
        cheap, corrections = fitted(self.cheap, self.corrections, labels)
        return combined(
            cheap, corrections, self.example_labels, direction=self.direction,
            method=f"{self.method}, fitted", provenance=self.provenance, looks=self.looks,
        )  # fmt: skip

    @checked_arguments
    def ranking(self, by: Ranking = "signed") -> tuple[Head, ...]:
        """Return all scored heads, the largest first.

        Args:
            by: "signed" for the score itself, "magnitude" for its absolute value.

        Raises:
            InputError: `by` is neither of the two.
        """
        keys = (self.values.abs() if by == "magnitude" else self.values).flatten()
        order = torch.argsort(keys.nan_to_num(nan=-torch.inf), descending=True, stable=True)
        everyone = all_heads(self.n_layers, self.n_heads)
        return tuple(everyone[i] for i in order.tolist() if not torch.isnan(keys[i]))

    @checked_arguments
    def top(self, k: FromZeroCount, by: Ranking = "signed") -> tuple[Head, ...]:
        """Return the first `k` heads of the ranking, the largest first.

        Args:
            k: Number of heads.
            by: "signed" for the score itself, "magnitude" for its absolute value.

        Raises:
            InputError: `k` is negative or larger than the number of scored heads.
        """
        ranking = self.ranking(by)
        if k > len(ranking):
            raise InputError(f"k={k}: expected 0 to {len(ranking)}, the number of scored heads")
        return ranking[:k]

    @checked_arguments
    def near_zero(self, k: FromZeroCount, by: Ranking = "signed") -> Circuit:
        """Return the control of `select(k=k, by=by)`: the heads of smallest magnitude outside it.

        Args:
            k: Number of heads.
            by: The ranking that the circuit is selected by.

        Raises:
            InputError: `k` is negative, or fewer than 2k heads are scored.
        """
        heads = near_zero_heads(self.values, self.top(k, by))
        return self.circuit(heads, {"rule": "near-zero", "k": k, "by": by})

    @checked_arguments
    def select(
        self,
        *,
        k: FromZeroCount | None = None,
        fraction: Fraction | None = None,
        threshold: float | None = None,
        confidence: Level | None = None,
        by: Ranking = "signed",
    ) -> Circuit:
        """Select a circuit by exactly one of `k`, `fraction`, `threshold` and `confidence`.

        Args:
            k: Number of heads.
            fraction: Share of all heads of the model, scored or not, rounded down as in MIB, but
                at least one head.
            threshold: Smallest score (or magnitude) in logits.
            confidence: Level of `interval`. Selects the heads whose interval lies above 0, or
                excludes 0 by magnitude.
            by: "signed" for the score itself, "magnitude" for its absolute value.

        Returns:
            The circuit, with these scores and their provenance.

        Raises:
            InputError: None or several of the four are given, a value is out of range, or fewer
                heads have scores than the fraction asks for.
        """
        given = {"k": k, "fraction": fraction, "threshold": threshold, "confidence": confidence}
        chosen = {name: value for name, value in given.items() if value is not None}
        if len(chosen) != 1:
            raise InputError(
                f"select: expected exactly one of {', '.join(given)}, got "
                f"{', '.join(chosen) or 'none'}"
            )
        ranking = self.ranking(by)
        if k is not None:
            heads = self.top(k, by)
        elif fraction is not None:
            heads = self._largest(fraction, by)
        elif threshold is not None:
            heads = tuple(h for h in ranking if self._key(h, by) >= threshold)
        else:
            heads = self._confident(confidence or 0.0, by)
        return self.circuit(heads, {"by": by, **chosen})

    @checked_arguments
    def circuit(self, heads: Iterable[Head | str], selection: Mapping[str, Any]) -> Circuit:
        """Return a circuit of these heads that carries the scores and their provenance.

        Args:
            heads: The heads of the circuit.
            selection: How they were chosen.
        """
        return Circuit(
            heads=check_heads(heads, self.n_layers, self.n_heads),
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            scores=self.values,
            stderr=self.stderr,
            selection={"method": self.method, **selection},
            provenance=self.provenance,
        )

    def _largest(self, fraction: float, by: Ranking) -> tuple[Head, ...]:
        everyone, ranking = self.values.numel(), self.ranking(by)
        size = max(1, heads_at(fraction, everyone))
        if size > len(ranking):
            raise InputError(
                f"select: fraction={fraction} of all {everyone} heads is {size}, but only "
                f"{len(ranking)} have scores; score more heads, or select by k"
            )
        return ranking[:size]

    def _key(self, head: Head, by: str) -> float:
        value = float(self.values[head.layer, head.head])
        return abs(value) if by == "magnitude" else value

    def _confident(self, level: float, by: str) -> tuple[Head, ...]:
        if not self.has_intervals:
            raise InputError(
                f"select: confidence: {self.method}: {NO_INTERVALS}, or select by k or fraction"
            )
        low, high = self.interval(level)
        keep = low > 0 if by == "signed" else (low > 0) | (high < 0)
        return tuple(h for h in self.ranking() if bool(keep[h.layer, h.head]))

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per head, the largest score first.

        Returns:
            Name, layer, index, score and standard error in logits. Heads without a score stand at
            the end.
        """
        frame = pd.DataFrame(
            [
                {
                    "head": str(h),
                    "layer": h.layer,
                    "index": h.head,
                    "score": float(self.values[h.layer, h.head]),
                    "stderr": float(self.stderr[h.layer, h.head]),
                }
                for h in all_heads(self.n_layers, self.n_heads)
            ]
        )
        return frame.sort_values("score", ascending=False, kind="stable", ignore_index=True)

    @checked_arguments
    def heatmap(self, circuit: Circuit | None = None) -> display.Figure:
        """Map of the scores, layer x head, with the heads of `circuit` outlined.

        Args:
            circuit: A circuit of the same model.

        Raises:
            InputError: The circuit is of a model of another shape.
        """
        if circuit is not None and circuit.mask.shape != self.values.shape:
            raise InputError(
                f"heatmap: the circuit is of {circuit.n_layers} layers of {circuit.n_heads} heads, "
                f"the scores of {self.n_layers} of {self.n_heads}; give a circuit of the same model"
            )
        return display.figure(self, circuit=circuit)

    def plot(self) -> display.Figure:
        """Draw the map of the scores, as `heatmap`."""
        return self.heatmap()

    @checked_arguments
    def bars(self, k: Count = 20) -> display.Figure:
        """Draw the `k` heads with the largest scores, with their standard errors."""
        return display.figure(self, kind="bars", k=k)

    def _repr_html_(self) -> str:
        return display.page(self)

    def _to_file(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        body: dict[str, Any] = {
            "example_labels": list(self.example_labels),
            "direction": self.direction,
            "method": self.method,
            "provenance": self.provenance.to_dict(),
        }
        if self.looks > 1:
            body["looks"] = self.looks
        tensors = {"values": self.values, "stderr": self.stderr, "per_example": self.per_example}
        if self.cheap is not None:
            tensors["cheap"] = self.cheap
        more = {f"correction.{n}": tensor for n, tensor in enumerate(self.corrections)}
        return body, tensors | more

    @classmethod
    def _from_file(cls, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> HeadScores:
        return cls(
            values=tensors["values"],
            stderr=tensors["stderr"],
            per_example=tensors["per_example"],
            example_labels=tuple(body["example_labels"]),
            direction=body["direction"],
            method=body["method"],
            provenance=Provenance.from_dict(body["provenance"]),
            cheap=tensors.get("cheap"),
            corrections=tuple(tensors[name] for name in sorted(tensors) if "correction" in name),
            looks=body.get("looks", 1),
        )


def combined(
    cheap: Float[Tensor, "example layer head"],
    corrections: Sequence[Float[Tensor, "example layer head"]],
    labels: Sequence[str],
    *,
    direction: float,
    method: str,
    provenance: Provenance,
    looks: int = 1,
) -> HeadScores:
    """Combine cheap scores of all examples with corrections of a sample (`circuits.sampled`).

    Args:
        cheap: Cheap score of each example, NaN for heads that were not scored.
        corrections: For each part of the score the exact score minus the cheap one, NaN outside
            the part's sample.
        labels: Label of each example.
        direction: Mean task direction of the full model, in logits.
        method: Name of the method.
        provenance: Origin of the scores.
        looks: As in `HeadScores`.

    Returns:
        The scores with their standard errors.
    """
    index = label_index(labels)
    per_example = table(*cheap.shape, dtype=torch.float32)
    stderr = by_layer(_stderr, cheap, corrections, index)
    for layer in range(cheap.shape[1]):
        own = [part[:, layer : layer + 1] for part in corrections]
        per_example[:, layer : layer + 1] = filled(cheap[:, layer : layer + 1], own, index).float()
    values = by_layer(_mean, cheap, corrections, index)
    return HeadScores(
        values=values.float(),
        stderr=stderr.float(),
        per_example=per_example,
        example_labels=tuple(labels),
        direction=direction,
        method=method,
        provenance=provenance,
        cheap=cheap,
        corrections=tuple(corrections),
        looks=looks,
    )


def _mean(cheap: Tensor, corrections: Sequence[Tensor], labels: Tensor) -> Tensor:
    return balanced_mean(filled(cheap, corrections, labels).permute(1, 2, 0), labels)


def _stderr(cheap: Tensor, corrections: Sequence[Tensor], labels: Tensor) -> Tensor:
    return balanced_stderr(effects(cheap, corrections, labels).permute(1, 2, 0), labels)


def _largest_of(values: Float[Tensor, "layer head"], place: int) -> Float[Tensor, ""]:
    """Return the value at a place of the descending order, counted from 1; -inf behind its end."""
    order = values.flatten().sort(descending=True).values
    return order[place - 1] if 0 < place <= len(order) else torch.tensor(-torch.inf)


def label_index(labels: Sequence[str]) -> Int[Tensor, " example"]:
    """Return labels as numbers, in alphabetical order."""
    return label_numbers(labels, sorted(set(labels)))
