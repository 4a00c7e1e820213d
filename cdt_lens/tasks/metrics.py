"""Measures of a task as pure functions: direction, accuracy, loss, macro-F1, and their means.

Every name has one meaning in the whole package:

- direction: the task direction in logits, averaged within each label, then over the labels.
- accuracy: the share of right answers among all examples, from 0 to 1.
- balanced_accuracy: the share of right answers within each label, averaged over the labels.

Functions of logits take the logits of the candidates, `[..., batch, k]`, and the masks of
`tasks.task.Batch`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Metric
from cdt_lens.core.errors import CdtLensWarning, InputError


def task_direction(
    logits: Float[Tensor, "*rows batch k"], direction: Float[Tensor, "batch k"]
) -> Float[Tensor, "*rows batch"]:
    """Compute d = mean logit of the answers - mean logit of the others.

    Args:
        logits: Logits of the candidates.
        direction: Weights of the candidates, `Batch.direction` or those of the strongest
            competitor.

    Returns:
        d of each example in logits; positive favours the gold label.
    """
    # 0 * inf would turn a padding candidate's overflow into NaN, so weights of 0 are left out.
    return torch.where(direction == 0, 0.0, logits * direction).sum(-1)


def strongest_competitor(
    logits: Float[Tensor, "batch k"],
    is_answer: Bool[Tensor, "batch k"],
    is_candidate: Bool[Tensor, "batch k"],
) -> Float[Tensor, "batch k"]:
    """Compute the weights of the direction l[y] - max over y' != y of l[y'].

    Args:
        logits: The full model's logits of the candidates. They fix the competitor, so that the
            direction stays linear.
        is_answer: True at the answers.
        is_candidate: True at the answers and the others, False at padding.

    Returns:
        +1 / n at the n answers, -1 at the strongest competitor and 0 elsewhere.
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
    """Compute -log of the probability of the answers among the candidates.

    Args:
        logits: Logits of the candidates.
        is_answer: True at the answers.
        is_candidate: True at the answers and the others, False at padding.

    Returns:
        The loss of each example in nats.
    """
    answers = logits.masked_fill(~is_answer, -torch.inf).logsumexp(-1)
    return logits.masked_fill(~is_candidate, -torch.inf).logsumexp(-1) - answers


def correct(
    logits: Float[Tensor, "*rows batch k"],
    is_answer: Bool[Tensor, "batch k"],
    is_candidate: Bool[Tensor, "batch k"],
    prior: Float[Tensor, "batch k"] | None = None,
) -> Bool[Tensor, "*rows batch"]:
    """Decide whether an answer has the largest logit; a tie with another candidate is wrong.

    Args:
        logits: Logits of the candidates.
        is_answer: True at the answers.
        is_candidate: True at the answers and the others, False at padding.
        prior: Logits to subtract before the comparison, if any.

    Returns:
        True for each example that is answered right.
    """
    if prior is not None:
        logits = logits - prior
    answer = logits.masked_fill(~is_answer, -torch.inf).amax(-1)
    other = logits.masked_fill(is_answer | ~is_candidate, -torch.inf).amax(-1)
    return answer > other


@checked_arguments
def average(
    metric: Metric, values: Float[Tensor, "*rows example"], labels: Int[Tensor, " example"]
) -> Float[Tensor, "*rows"]:
    """Average a metric over examples: "accuracy" over all alike, the others label-balanced.

    Args:
        metric: Name of the metric.
        values: The task direction of each example in logits, or 1 where it is answered right and
            0 where not.
        labels: Number of each example's label.

    Returns:
        The metric, in logits for "direction" and a share from 0 to 1 for the two accuracies.

    Raises:
        InputError: There are no examples, or the metric is unknown.
    """
    _require_some(labels)
    return values.mean(-1) if metric == "accuracy" else balanced_mean(values, labels)


def is_kept(after: float, before: float, share: float) -> bool:
    """Return whether an accuracy keeps a share of an earlier one, with room for rounding.

    Args:
        after: The accuracy.
        before: The earlier one.
        share: The share that has to be kept, from 0 to 1.
    """
    # 0.9 * 0.8 is a little more than 0.72.
    return after >= share * before - 1e-9


def chance_caution(metric: Metric, value: float, guess: float) -> str:
    """Say that a model solves a task no better than chance, so that its circuit means little.

    Args:
        metric: "direction", "accuracy" or "balanced_accuracy".
        value: the metric of the full model.
        guess: the accuracy of a candidate drawn at random (`Examples.guess`), from 0 to 1.

    Returns:
        One sentence, or "" if the metric is above chance: 0 logits for the direction, `guess` for
        an accuracy.
    """
    chance = 0.0 if metric == "direction" else guess
    if not value <= chance:
        return ""
    name = "mean direction" if metric == "direction" else metric.replace("_", " ")
    unit = f"{value:+.3f} logits" if metric == "direction" else f"{value:.3f}"
    return (
        f"the full model solves the task no better than chance ({name} {unit}, chance "
        f"{chance:.3g}), so neither a circuit nor its faithfulness says how it solves it"
    )


def warn_at_chance(name: str, metric: Metric, value: float, guess: float) -> None:
    """Warn with `CdtLensWarning` where `chance_caution` has something to say.

    Args:
        name: name of the split.
        metric: "direction", "accuracy" or "balanced_accuracy".
        value: the metric of the full model.
        guess: the accuracy of a candidate drawn at random (`Examples.guess`), from 0 to 1.
    """
    caution = chance_caution(metric, value, guess)
    if caution:
        # Without a stack level the same words are shown once, whichever function says them.
        warnings.warn(f"{name}: {caution}", CdtLensWarning, stacklevel=1)


def label_numbers(labels: Sequence[str], order: Sequence[str]) -> Int[Tensor, " example"]:
    """Return the position of each label in `order`."""
    return torch.tensor([order.index(label) for label in labels])


def balanced_mean(
    values: Float[Tensor, "*rows example"], labels: Int[Tensor, " example"]
) -> Float[Tensor, "*rows"]:
    """Compute the mean within each label, then the mean of these over the labels present.

    Args:
        values: One value for each example.
        labels: Number of each example's label.

    Returns:
        The label-balanced mean, in the unit of `values`.

    Raises:
        InputError: There are no examples.
    """
    _require_some(labels)
    present = labels.unique()
    return torch.stack([values[..., labels == label].mean(-1) for label in present]).mean(0)


def balanced_stderr(
    values: Float[Tensor, "*rows example"], labels: Int[Tensor, " example"]
) -> Float[Tensor, "*rows"]:
    """Compute the standard error of `balanced_mean`: sqrt(sum of s^2 / n over labels) / K.

    Args:
        values: One value for each example.
        labels: Number of each example's label.

    Returns:
        The standard error in the unit of `values`, NaN if a label has a single example.

    Raises:
        InputError: There are no examples.
    """
    _require_some(labels)
    present = labels.unique()
    terms = []
    for label in present:
        group = values[..., labels == label]
        if group.shape[-1] < 2:
            return torch.full_like(values[..., 0], torch.nan)
        terms.append(group.var(-1) / group.shape[-1])
    return torch.stack(terms).sum(0).sqrt() / len(present)


def _require_some(labels: Int[Tensor, " example"]) -> None:
    if not labels.numel():
        raise InputError("no examples to average over")


@checked_arguments
def macro_f1(predicted: Sequence[str], gold: Sequence[str], labels: Sequence[str]) -> float:
    """Compute the mean over labels of F1 = 2TP / (2TP + FP + FN).

    Args:
        predicted: Predicted label of each example.
        gold: Gold label of each example.
        labels: All labels. One that is neither present nor predicted counts as 0.

    Returns:
        Macro-F1 from 0 to 1.

    Raises:
        InputError: There are no labels, or the numbers of predicted and gold labels differ.
    """
    if not labels or len(predicted) != len(gold):
        raise InputError(
            f"macro_f1: {len(labels)} labels, {len(predicted)} predicted and {len(gold)} gold; "
            "expected at least one label, and a prediction for each example"
        )
    scores = []
    for label in labels:
        hits = sum(p == g == label for p, g in zip(predicted, gold, strict=True))
        total = sum(p == label for p in predicted) + sum(g == label for g in gold)
        scores.append(2 * hits / total if total else 0.0)
    return sum(scores) / len(scores)
