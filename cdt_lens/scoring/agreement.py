"""How well two sets of head scores agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.stats
import torch
from jaxtyping import Shaped
from torch import Tensor

from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core import display
from cdt_lens.core.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Any two points lie on a line.
_FEWEST = 3


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation over all entries, ties by mean rank; NaN where one side is constant."""
    if _constant(a) or _constant(b):
        return float("nan")
    return float(scipy.stats.spearmanr(_flat(a), _flat(b)).statistic)


def pearson(a: Tensor, b: Tensor) -> float:
    """Linear correlation over all entries; NaN where one side is constant."""
    if _constant(a) or _constant(b):
        return float("nan")
    return float(scipy.stats.pearsonr(_flat(a), _flat(b)).statistic)


def auroc(scores: Tensor, truth: Shaped[Tensor, "*dims"]) -> float:
    """Probability that a true entry scores above a false one, ties counted half.

    Raises:
        InputError: all entries are true, or all false.
    """
    truth = truth.flatten().bool()  # of integers ~ and indexing would mean something else
    n_true, n_false = int(truth.sum()), int((~truth).sum())
    if n_true == 0 or n_false == 0:
        raise InputError("auroc: needs entries of both kinds")
    ranks = torch.from_numpy(scipy.stats.rankdata(_flat(scores)))
    return float((ranks[truth].sum() - n_true * (n_true + 1) / 2) / (n_true * n_false))


def average_precision(scores: Tensor, truth: Shaped[Tensor, "*dims"]) -> float:
    """Area under precision over recall: sum over thresholds of precision * gain in recall.

    Entries are taken from the largest score down, equal ones together, so that their order does
    not count; 1 where every true entry comes first, the share of true ones where all are equal.

    Raises:
        InputError: no entry is true, or a score is NaN.
    """
    flat, right = _flat(scores), truth.flatten().bool().cpu().numpy()
    if not right.any() or np.isnan(flat).any():
        raise InputError("average_precision: needs a true entry, and scores that are no NaN")
    thresholds = np.unique(flat)[::-1]
    taken = np.array([(flat >= t).sum() for t in thresholds])
    hits = np.array([right[flat >= t].sum() for t in thresholds])
    new = np.diff(hits, prepend=0)
    return float((new * (hits / taken)).sum() / right.sum())


def _constant(values: Tensor) -> bool:
    return values.numel() < 2 or bool((values == values.flatten()[0]).all())


def _flat(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().flatten().numpy()


@dataclass(frozen=True)
class MethodAgreement:
    """How well scores predict a reference, over all heads; correlations without unit."""

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
        """One row a head: its score and the reference's, both in logits."""
        columns = ["head", "layer", "index", "score"]
        found = self.scores.to_dataframe()[columns]
        return found.assign(reference=self.reference.to_dataframe()["score"])

    def plot(self) -> Figure:
        """Scores against the reference, one point a head, in logits."""
        return display.figure(self)

    def _repr_html_(self) -> str:
        return display.page(self)


def compare_scores(scores: HeadScores, reference: HeadScores) -> MethodAgreement:
    """Rank and linear correlation between two sets of scores, over the heads that both have.

    Raises:
        InputError: they are of different models, examples or directions, or have fewer than three
            heads in common.
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
    if scores.provenance.model_hash != reference.provenance.model_hash:
        raise InputError(
            f"compare_scores: of two models ({scores.provenance.model_hash[:12]} and "
            f"{reference.provenance.model_hash[:12]}); score the same one"
        )
    ways = [each.provenance.options.get("direction", "mean") for each in (scores, reference)]
    if ways[0] != ways[1]:
        raise InputError(f"compare_scores: directions {ways[0]!r} and {ways[1]!r}; use one of them")
    a, b = scores.values.flatten(), reference.values.flatten()
    both = ~(a.isnan() | b.isnan())
    if int(both.sum()) < _FEWEST:
        raise InputError(
            f"compare_scores: {int(both.sum())} heads are scored by both; expected at least "
            f"{_FEWEST}"
        )
    return MethodAgreement(scores, reference, spearman(a[both], b[both]), pearson(a[both], b[both]))
