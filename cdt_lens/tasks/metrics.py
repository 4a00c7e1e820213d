"""Measures as pure functions: task direction, accuracy, macro-F1, faithfulness, CPR, CMD, ranks.

Logits come as the candidates' logits `[..., batch, k]`, with the masks of `tasks.Batch`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
