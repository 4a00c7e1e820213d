"""Measures as pure functions: task direction, accuracy, macro-F1, faithfulness, CPR, CMD, ranks.

Logits come as the candidates' logits `[..., batch, k]`, with the masks of `tasks.Batch`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.stats
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from cdt_lens.errors import InputError

# The circuit sizes at which MIB (arXiv 2504.13151, §3) integrates, as fractions of the whole.
MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def task_direction(
    logits: Float[Tensor, "*rows batch k"], direction: Float[Tensor, "batch k"]
) -> Float[Tensor, "*rows batch"]:
    """d = mean logit of the answers minus mean logit of the others; logits, + = gold label."""
    # 0 * inf would turn a padding candidate's overflow into NaN, so weights of 0 are left out.
    return torch.where(direction == 0, 0.0, logits * direction).sum(-1)


def strongest_competitor(
    logits: Float[Tensor, "batch k"],
    is_answer: Bool[Tensor, "batch k"],
    is_candidate: Bool[Tensor, "batch k"],
) -> Float[Tensor, "batch k"]:
    """Weights of the direction l[y] - max over y' != y of l[y'], the competitor fixed by `logits`.

    `logits` are the full model's own, so that the direction stays linear (method.md §1).
    """
    others = logits.masked_fill(is_answer | ~is_candidate, -torch.inf)
    weights = is_answer / is_answer.sum(-1, keepdim=True)
    return weights.to(logits.dtype).scatter_add(
        -1, others.argmax(-1, keepdim=True), -torch.ones_like(logits[..., :1])
    )


def answer_loss(
    logits: Float[Tensor, "batch k"],
    is_answer: Bool[Tensor, "batch k"],
    is_candidate: Bool[Tensor, "batch k"],
) -> Float[Tensor, " batch"]:
    """-log of the probability of the answers among the candidates, in nats."""
    answers = logits.masked_fill(~is_answer, -torch.inf).logsumexp(-1)
    return logits.masked_fill(~is_candidate, -torch.inf).logsumexp(-1) - answers


def correct(
    logits: Float[Tensor, "*rows batch k"],
    is_answer: Bool[Tensor, "batch k"],
    is_candidate: Bool[Tensor, "batch k"],
    prior: Float[Tensor, "batch k"] | None = None,
) -> Bool[Tensor, "*rows batch"]:
    """Whether an answer's logit (minus its prior) is above every other's; a tie is not."""
    if prior is not None:
        logits = logits - prior
    answer = logits.masked_fill(~is_answer, -torch.inf).amax(-1)
    other = logits.masked_fill(is_answer | ~is_candidate, -torch.inf).amax(-1)
    return answer > other


def balanced_mean(
    values: Float[Tensor, "*rows example"], labels: Int[Tensor, " example"]
) -> Float[Tensor, "*rows"]:
    """Mean over labels of the per-label means."""
    present = labels.unique()
    return torch.stack([values[..., labels == label].mean(-1) for label in present]).mean(0)


def balanced_stderr(
    values: Float[Tensor, "*rows example"], labels: Int[Tensor, " example"]
) -> Float[Tensor, "*rows"]:
    """Standard error of `balanced_mean`: sqrt(sum of s^2/n) / K; NaN if a label has one example."""
    present = labels.unique()
    terms = []
    for label in present:
        group = values[..., labels == label]
        if group.shape[-1] < 2:
            return torch.full_like(values[..., 0], torch.nan)
        terms.append(group.var(-1) / group.shape[-1])
    return torch.stack(terms).sum(0).sqrt() / len(present)


def macro_f1(predicted: Sequence[str], gold: Sequence[str], labels: Sequence[str]) -> float:
    """Mean over labels of 2TP / (2TP + FP + FN); a label neither present nor predicted counts 0."""
    scores = []
    for label in labels:
        hits = sum(p == g == label for p, g in zip(predicted, gold, strict=True))
        total = sum(p == label for p in predicted) + sum(g == label for g in gold)
        scores.append(2 * hits / total if total else 0.0)
    return sum(scores) / len(scores)


def faithfulness(
    circuit: Float[Tensor, "*rows"], full: float, empty: float
) -> Float[Tensor, "*rows"]:
    """f = (m(C) - m(empty)) / (m(full) - m(empty)); 1 for the full model, 0 for no heads.

    Raises:
        InputError: ablating every head leaves the metric as it was, so that f has no meaning.
    """
    check_gap(full, empty)
    return (circuit - empty) / (full - empty)


def check_gap(full: float, empty: float, least: float = 1e-9) -> None:
    """Refuse to divide by what all heads together change, where that is `least` or less.

    Raises:
        InputError: ablating every head leaves the metric as it was.
    """
    if abs(full - empty) <= least:
        raise InputError(
            f"faithfulness: the metric is {full:.4g} with all heads and {empty:.4g} with none, so "
            "there is nothing to explain; choose another metric, baseline or task"
        )


def cpr(fractions: Sequence[float], f: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows"]:
    """Circuit performance ratio: trapezoid area under f over the fractions (MIB §3)."""
    return torch.trapezoid(f.double(), torch.tensor(fractions, dtype=torch.float64), dim=-1)


def cmd(fractions: Sequence[float], f: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows"]:
    """Circuit-model distance: trapezoid area under |1 - f| (MIB §3); 0 is best."""
    return cpr(fractions, (1 - f).abs())


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
