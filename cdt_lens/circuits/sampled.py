"""The difference estimator: cheap scores of all examples, corrected by exact ones of a sample.

For a head, g_i is the cheap score of example i, known for all N examples, and y_i its exact score,
known for a random sample S of n of them, drawn within labels. Within each label

    theta = mean over N of g + mean over S of (y - g)

and theta is averaged over the labels, as every score is. It is unbiased for the mean of y over the
population that the N examples are drawn from, whatever g is (survey sampling calls it the
difference estimator; see also prediction-powered inference, arXiv 2301.09633). Its variance is
var(g) / N + var(y - g) / n + 2 cov(g, y - g) / N.

y may be a sum of parts with samples of their own. Each part then has its own correction y - g.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Corrections = Sequence[Float[Tensor, "example layer head"]]


def sample_order(labels: Sequence[str], seed: int) -> list[int]:
    """Return the examples in the order in which they enter the sample.

    Args:
        labels: Label of each example.
        seed: Seed of the draw within each label.

    Returns:
        Positions of all examples. Any first n of them hold equal numbers of each label, up to one,
        as far as the examples reach.
    """
    generator = random.Random(seed)
    groups = {label: [i for i, own in enumerate(labels) if own == label] for label in labels}
    for group in groups.values():
        generator.shuffle(group)
    rank = {i: place for group in groups.values() for place, i in enumerate(group)}
    order = {label: place for place, label in enumerate(groups)}
    return sorted(range(len(labels)), key=lambda i: (rank[i], order[labels[i]]))


def effects(
    cheap: Float[Tensor, "example layer head"],
    corrections: Corrections,
    labels: Int[Tensor, " example"],
) -> Float[Tensor, "example layer head"]:
    """Return one value per example whose label-balanced mean and spread are those of theta.

    An example of the sample stands for N / n examples: its value is
    g + mean(y - g) + sqrt(N (N - 1) / (n (n - 1))) ((y - g) - mean(y - g)).

    Args:
        cheap: g of each example.
        corrections: y - g of each part, NaN outside the part's sample.
        labels: Number of each example's label.

    Returns:
        The values in logits, double precision. `metrics.balanced_mean` of them is theta and
        `metrics.balanced_stderr` its standard error. NaN where a label has no corrected example, or
        a single one, for which no spread is known.
    """
    out = cheap.double().clone()
    for label in labels.unique():
        inside = labels == label
        for part in corrections:
            out[inside] += _spread(part[inside].double())
    return out


def _spread(correction: Float[Tensor, example * dims]) -> Float[Tensor, example * dims]:
    """Spread the corrections of a label's sample over all of its examples."""
    known = ~torch.isnan(correction)
    n = known.sum(0).double()
    mean = correction.nanmean(0)
    every = len(correction)
    weight = (every * (every - 1) / (n * (n - 1))).sqrt()
    return mean + torch.where(known, weight * (correction - mean), 0.0)


def filled(
    cheap: Float[Tensor, "example layer head"],
    corrections: Corrections,
    labels: Int[Tensor, " example"],
) -> Float[Tensor, "example layer head"]:
    """Return the best value of each example: exact where it is known, else cheap and corrected.

    Args:
        cheap: g of each example.
        corrections: y - g of each part, NaN outside the part's sample.
        labels: Number of each example's label.

    Returns:
        y in the sample and g + mean(y - g) elsewhere, in logits. The label-balanced mean is theta.
    """
    out = cheap.double().clone()
    for label in labels.unique():
        inside = labels == label
        for part in corrections:
            own = part[inside].double()
            out[inside] += torch.where(torch.isnan(own), own.nanmean(0), own)
    return out


def degrees_of_freedom(
    cheap: Float[Tensor, "example layer head"],
    corrections: Corrections,
    labels: Int[Tensor, " example"],
) -> Float[Tensor, "layer head"]:
    """Return the degrees of freedom of theta's standard error, after Welch and Satterthwaite.

    Args:
        cheap: g of each example.
        corrections: y - g of each part, NaN outside the part's sample.
        labels: Number of each example's label.

    Returns:
        At least the smallest n - 1 of any label; infinite where nothing varies; NaN if a label has
        a single example or a single corrected one.
    """
    groups = [
        _known(part[labels == label].double())
        for label in labels.unique()
        for part in (cheap, *corrections)
    ]
    if min(map(len, groups)) < 2:
        return torch.full_like(cheap[0], torch.nan, dtype=torch.float64)
    terms = [(own.var(0) / len(own), len(own) - 1) for own in groups]
    variance = torch.stack([term for term, _ in terms]).sum(0)
    below = torch.stack([term**2 / n for term, n in terms]).sum(0)
    return torch.where(below > 0, variance**2 / below, torch.inf)


def _known(values: Float[Tensor, example * dims]) -> Float[Tensor, known * dims]:
    """Return the examples that the part's sample holds; heads that are not scored stay NaN."""
    inside = (~torch.isnan(values)).flatten(1).any(1)
    return values[inside]
