"""Agreement of two sets of head scores, and of scores with a known truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Shaped
from torch import Tensor

from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core import display
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.equality import EqualByContent
from cdt_lens.core.errors import InputError

# Any two points lie on a line.
_FEWEST = 3


@checked_arguments
def spearman(a: Tensor, b: Tensor) -> float:
    """Compute Spearman's rank correlation over all entries; equal entries share their mean rank.

    Args:
        a: Values of any shape.
        b: Values of the same shape.

    Returns:
        The correlation from -1 to 1, NaN if one side is constant or an entry is NaN.

    Raises:
        InputError: The shapes differ.
    """
    return _correlation("spearman", scipy.stats.spearmanr, a, b)


@checked_arguments
def pearson(a: Tensor, b: Tensor) -> float:
    """Compute Pearson's linear correlation over all entries.

    Args:
        a: Values of any shape.
        b: Values of the same shape.

    Returns:
        The correlation from -1 to 1, NaN if one side is constant or an entry is NaN.

    Raises:
        InputError: The shapes differ.
    """
    return _correlation("pearson", scipy.stats.pearsonr, a, b)


@checked_arguments
def auroc(scores: Tensor, truth: Shaped[Tensor, "*dims"]) -> float:
    """Compute the area under the ROC curve: P(a true entry scores above a false one).

    Args:
        scores: Scores of any shape. Equal scores count half.
        truth: True (or 1) at the true entries, of the same shape.

    Returns:
        The area from 0 to 1, 0.5 for scores that say nothing.

    Raises:
        InputError: All entries are true or all are false, a score is NaN, or the shapes differ.
    """
    flat, true = _scored(scores, truth, "auroc")
    if true.all() or not true.any():
        raise InputError("auroc: needs entries of both kinds")
    # The U statistic counts the pairs in order; the p-value, which is not used, is the cheap one.
    test = scipy.stats.mannwhitneyu(flat[true], flat[~true], method="asymptotic")
    return float(test.statistic / (true.sum() * (~true).sum()))


@checked_arguments
def average_precision(scores: Tensor, truth: Shaped[Tensor, "*dims"]) -> float:
    """Compute the area under precision over recall: sum of precision * gain in recall.

    Args:
        scores: Scores of any shape. Entries are taken from the largest score down, equal ones
            together, so that their order does not count.
        truth: True (or 1) at the true entries, of the same shape.

    Returns:
        The area from 0 to 1: 1 if every true entry comes first, the share of true entries if all
        scores are equal.

    Raises:
        InputError: No entry is true, a score is NaN, or the shapes differ.
    """
    flat, true = _scored(scores, truth, "average_precision")
    if not true.any():
        raise InputError("average_precision: needs a true entry")
    thresholds = np.unique(flat)[::-1]
    taken = np.array([(flat >= t).sum() for t in thresholds])
    hits = np.array([true[flat >= t].sum() for t in thresholds])
    new = np.diff(hits, prepend=0)
    return float((new * (hits / taken)).sum() / true.sum())


def _correlation(where: str, measure: Callable[..., Any], a: Tensor, b: Tensor) -> float:
    _check_shapes(where, a, b)
    x, y = _flat(a), _flat(b)
    if any(side.size < 2 or (side == side[0]).all() for side in (x, y)):
        return float("nan")
    return float(measure(x, y).statistic)


def _check_shapes(where: str, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise InputError(
            f"{where}: expected two tensors of one shape, got {list(a.shape)} and {list(b.shape)}"
        )


def _scored(scores: Tensor, truth: Tensor, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores and the truth as flat arrays.

    Raises:
        InputError: A score is NaN, which has no rank, or the shapes differ.
    """
    _check_shapes(where, scores, truth)
    flat = _flat(scores)
    if np.isnan(flat).any():
        raise InputError(f"{where}: a score is NaN; leave out the entries that were not scored")
    return flat, truth.flatten().bool().cpu().numpy()


def _flat(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().flatten().numpy()


@dataclass(frozen=True, eq=False)
class MethodAgreement(EqualByContent):
    """How well scores predict a reference over the heads that both score.

    Args:
        scores: The scores.
        reference: The reference, such as exact ablation.
        spearman: Rank correlation, from -1 to 1.
        pearson: Linear correlation, from -1 to 1.
    """

    scores: HeadScores
    reference: HeadScores
    spearman: float
    pearson: float

    def __repr__(self) -> str:
        names = f"{self.scores.method} with {self.reference.method}"
        return display.line(
            self, names, f"Spearman {self.spearman:.3f}", f"Pearson {self.pearson:.3f}"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per head: its score and the reference's, both in logits."""
        columns = ["head", "layer", "index", "score"]
        table = self.scores.to_dataframe()[columns]
        reference = self.reference.to_dataframe().set_index("head")["score"]
        return table.assign(reference=table["head"].map(reference))

    def plot(self) -> display.Figure:
        """Draw the scores against the reference, one point per head, in logits."""
        return display.figure(self)

    def _repr_html_(self) -> str:
        return display.page(self)


@checked_arguments
def compare_scores(scores: HeadScores, reference: HeadScores) -> MethodAgreement:
    """Compute the rank and linear correlation of two sets of scores over the heads in both.

    Args:
        scores: The scores.
        reference: Scores of the same model and examples, such as exact ablation.

    Returns:
        Both sets of scores and their correlations.

    Raises:
        InputError: The two belong to different models, examples or directions, or have fewer than
            three heads in common.
    """
    if scores.values.shape != reference.values.shape:
        raise InputError(
            f"compare_scores: {tuple(scores.values.shape)} against "
            f"{tuple(reference.values.shape)} heads; both must score the same model"
        )
    if scores.provenance.task_hash != reference.provenance.task_hash:
        raise InputError(
            "compare_scores: the two were computed on different examples; score the same ones"
        )
    other = reference.provenance
    different = scores.provenance.difference(other.model_hash, other.configuration)
    if different is not None:
        raise InputError(f"compare_scores: scores of two models ({different}); score the same one")
    one, other = (s.provenance.options.get("direction", "mean") for s in (scores, reference))
    if one != other:
        raise InputError(f"compare_scores: directions {one!r} and {other!r}; use one of them")
    a, b = scores.values.flatten(), reference.values.flatten()
    both = ~(a.isnan() | b.isnan())
    if int(both.sum()) < _FEWEST:
        raise InputError(
            f"compare_scores: {int(both.sum())} heads are scored by both; expected at least "
            f"{_FEWEST}"
        )
    return MethodAgreement(scores, reference, spearman(a[both], b[both]), pearson(a[both], b[both]))
