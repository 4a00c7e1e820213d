"""How much of a ranking is signal: split halves, resolved heads, and a circuit's sure members.

A score is a mean over prompts, so another draw of prompts gives another ranking. Scores on 16
prompts of IOI agree with scores on 16 others at a rank correlation of some 0.6
(docs/results/estimates.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.head_scores import NO_INTERVALS, HeadScores, label_index
from cdt_lens.circuits.sampled import effects, filled
from cdt_lens.core import display
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count, Ranking, Seed
from cdt_lens.core.errors import InputError
from cdt_lens.core.per_example import by_layer
from cdt_lens.models.heads import Head
from cdt_lens.tasks.metrics import balanced_mean

# Below this split-half reliability most of a ranking is the draw of the prompts.
NOISE = 0.7


@dataclass(frozen=True)
class Reliability:
    """Reliability of a ranking of heads.

    Args:
        split_half: Spearman's rank correlation between the scores of two halves of the examples,
            balanced by label: the mean over random splits.
        full: The same for two sets of as many examples as were scored, by Spearman and Brown's
            formula 2 r / (1 + r).
        resolved: Share of the scored heads whose 95 % interval excludes 0.
        examples: Number of scored examples.
    """

    split_half: float
    full: float
    resolved: float
    examples: int

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row with the four numbers."""
        return pd.DataFrame([asdict(self)])

    def _repr_html_(self) -> str:
        return display.html("Reliability of a ranking", self.to_dataframe())


@checked_arguments
def reliability(scores: HeadScores, *, splits: Count = 50, seed: Seed = 0) -> Reliability:
    """Measure how far the ranking of the heads depends on the draw of the prompts.

    Args:
        scores: The scores.
        splits: Number of random splits into halves.
        seed: Seed of the splits.

    Returns:
        `split_half`, the mean Spearman correlation of two halves; `full`, the same for two sets of
        as many examples as were scored, by the formula of Spearman and Brown, which holds above 0
        (no correlation of the halves gives `split_half` itself); `resolved`, the share of the heads
        whose 95 % interval excludes 0; and `examples`, their number. NaN where the heads have no
        intervals: a label has fewer than two examples, or fewer than two with an exact sweep, or
        the method gives one number for each head.
    """
    if not scores.has_intervals:
        return Reliability(math.nan, math.nan, math.nan, len(scores.example_labels))
    generator = torch.Generator().manual_seed(seed)
    found = [_split(scores, generator) for _ in range(splits)]
    # Where a head was swept on few examples, all of them may fall into one half.
    told = [value for value in found if not math.isnan(value)]
    half = float(np.mean(told)) if told else math.nan
    full = 2 * half / (1 + half) if half > 0 else half
    low, high = scores.interval(0.95)
    scored = ~torch.isnan(scores.values)
    resolved = ((low > 0) | (high < 0)) & scored
    share = float(resolved.sum() / scored.sum())
    return Reliability(half, full, share, len(scores.example_labels))


def _split(scores: HeadScores, generator: torch.Generator) -> float:
    """Return the rank correlation between two random halves, each balanced by label."""
    first = torch.zeros(len(scores.example_labels), dtype=torch.bool)
    for stratum in _strata(scores):
        rows = stratum[torch.randperm(len(stratum), generator=generator)]
        # The extra example of an odd number goes to either half.
        odd = int(torch.randint(2, (1,), generator=generator))
        first[rows[: (len(rows) + odd) // 2]] = True
    one, two = (_means(scores, rows) for rows in (first, ~first))
    scored = ~torch.isnan(scores.values)
    a, b = one[scored], two[scored]
    if not bool((torch.isfinite(a) & torch.isfinite(b)).all()):
        return float("nan")
    return float(stats.spearmanr(a.numpy(), b.numpy()).statistic)


def _strata(scores: HeadScores) -> list[Tensor]:
    """Return the examples that are split alike: by label, and by which heads are exact there."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    exact = [(~torch.isnan(part)).flatten(1).numpy() for part in scores.corrections]
    for i, label in enumerate(scores.example_labels):
        kinds.setdefault((label, *(part[i].tobytes() for part in exact)), []).append(i)
    return [torch.tensor(rows) for rows in kinds.values()]


def _means(scores: HeadScores, rows: Bool[Tensor, " example"]) -> Float[Tensor, "layer head"]:
    labels = label_index(scores.example_labels)[rows]
    if len(labels.unique()) < len(set(scores.example_labels)):
        return torch.full_like(scores.values, torch.nan)
    first = scores.per_example if scores.cheap is None else scores.cheap

    def mean(cheap: Tensor, corrections: Sequence[Tensor]) -> Tensor:
        values = filled(cheap[rows], [part[rows] for part in corrections], labels)
        return balanced_mean(values.permute(1, 2, 0), labels)

    return by_layer(mean, first, scores.corrections)


@checked_arguments
def membership(
    scores: HeadScores, circuit: Circuit, *, resamples: Count = 1000, seed: Seed = 0
) -> dict[Head, float]:
    """Return the probability that each head of a circuit belongs to it, by a bootstrap.

    The examples are drawn again within each label, and the same rule selects the heads.

    Args:
        scores: The scores that the circuit was selected from.
        circuit: A circuit of `HeadScores.select` with k, fraction or threshold.
        resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        The share of the samples in which each of the circuit's heads is selected. Of heads with
        equal scores all count as selected.

    Raises:
        InputError: The circuit was selected by another rule or from other scores, or a label has a
            single example or a single one with an exact sweep.
    """
    if circuit.mask.shape != scores.values.shape:
        raise InputError(
            f"membership: the circuit is of {circuit.n_layers} layers of {circuit.n_heads} heads, "
            f"the scores of {scores.n_layers} of {scores.n_heads}; give the scores that it was "
            "selected from"
        )
    if circuit.scores is not None and not torch.equal(
        circuit.scores.float().nan_to_num(), scores.values.float().nan_to_num()
    ):
        raise InputError(
            "membership: the circuit was selected from other scores; give those that it was "
            "selected from"
        )
    if not scores.has_intervals:
        raise InputError(f"membership: {scores.method}: {NO_INTERVALS}")
    if not circuit.heads:
        return {}
    by: Ranking = circuit.selection.get("by", "signed")
    threshold = circuit.selection.get("threshold")
    if threshold is None and not is_top(circuit):
        raise InputError(
            "membership: the circuit was not selected by k, fraction or threshold; got "
            f"{dict(circuit.selection)}"
        )
    means = _resampled(scores, resamples, seed)
    keys = means.abs() if by == "magnitude" else means
    keys = keys.nan_to_num(nan=-torch.inf)
    if threshold is None:
        threshold = keys.topk(len(circuit), dim=1).values[:, -1:]
    inside = (keys >= threshold).double().mean(0).reshape(scores.values.shape)
    return {head: float(inside[head.layer, head.head]) for head in circuit.heads}


def is_top(circuit: Circuit) -> bool:
    """Return whether a circuit is the first heads of a ranking, by k or by fraction.

    Args:
        circuit: The circuit. Other rules, such as that of near-zero heads, store a k as well, and
            their name.
    """
    sizes = {"k", "fraction"} & circuit.selection.keys()
    return bool(sizes) and "rule" not in circuit.selection


def _resampled(scores: HeadScores, resamples: int, seed: int) -> Float[Tensor, "resample head"]:
    """Return the scores of examples drawn again within each label."""
    generator = torch.Generator().manual_seed(seed)
    labels = label_index(scores.example_labels)
    weights = torch.zeros(resamples, len(labels), dtype=torch.float64)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        drawn = rows[torch.randint(len(rows), (resamples, len(rows)), generator=generator)]
        weights.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / len(rows), dtype=torch.float64))
    first = scores.per_example if scores.cheap is None else scores.cheap

    def means(cheap: Tensor, corrections: Sequence[Tensor]) -> Tensor:
        return (weights @ effects(cheap, corrections, labels).flatten(1)).T[None]

    by_head = by_layer(means, first, scores.corrections)
    return by_head.flatten(0, 1).T / len(labels.unique())
