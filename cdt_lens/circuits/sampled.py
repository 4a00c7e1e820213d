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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cdt_lens.tasks.metrics import balanced_mean, balanced_stderr

Corrections = Sequence[Float[Tensor, "example layer head"]]


def sample_order(labels: Sequence[str], seed: int, key: Sequence[float] | None = None) -> list[int]:
    """Return the examples in the order in which they enter the sample.

    Args:
        labels: Label of each example.
        seed: Seed of the draw within each label.
        key: A number for each example. Any first examples of a label are then spread evenly over
            its range, from a random start (systematic sampling), which leaves less to chance. None
            draws them at random.

    Returns:
        Positions of all examples. Any first n of them hold equal numbers of each label, up to one,
        as far as the examples reach.
    """
    generator = random.Random(seed)
    groups = {label: [i for i, own in enumerate(labels) if own == label] for label in labels}
    for label, group in groups.items():
        if key is None:
            generator.shuffle(group)
        else:
            group.sort(key=key.__getitem__)
            start = generator.randrange(len(group))
            groups[label] = [group[(place + start) % len(group)] for place in _spread_out(group)]
    rank = {i: place for group in groups.values() for place, i in enumerate(group)}
    order = {label: place for place, label in enumerate(groups)}
    return sorted(range(len(labels)), key=lambda i: (rank[i], order[labels[i]]))


def _spread_out(group: Sequence[int]) -> list[int]:
    """Return the places 0 to len - 1 with their binary digits reversed in rising order.

    Any first ones lie evenly between 0 and the last (van der Corput's sequence).
    """
    digits = max(1, (len(group) - 1).bit_length())
    reverse = (int(f"{place:0{digits}b}"[::-1], 2) for place in range(2**digits))
    return [place for place in reverse if place < len(group)]


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
        part[labels == label].double()
        for label in labels.unique()
        for part in (cheap, *corrections)
    ]
    terms = torch.stack([torch.stack(_variance_of_mean(group)) for group in groups])
    variance, n = terms[:, 0], terms[:, 1]
    below = (variance**2 / (n - 1)).sum(0)
    freedom = torch.where(below > 0, variance.sum(0) ** 2 / below, torch.inf)
    return torch.where((n < 2).any(0), torch.nan, freedom)


def _variance_of_mean(
    values: Float[Tensor, "example layer head"],
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
    """Return s^2 / n and n of the known values."""
    known = ~torch.isnan(values)
    n = known.sum(0).double()
    squares = torch.where(known, values - values.nanmean(0), 0.0).square().sum(0)
    return squares / (n - 1) / n, n


def shrunk(
    cheap: Float[Tensor, "example layer head"],
    corrections: Corrections,
    labels: Int[Tensor, " example"],
) -> Float[Tensor, "layer head"]:
    """Return theta with its correction c made smaller: c max(0, c^2 - se^2) / c^2.

    Most corrections of a small sample are noise, so the heads are ranked better by these values.
    They are biased.

    Args:
        cheap: g of each example.
        corrections: y - g of each part, NaN outside the part's sample.
        labels: Number of each example's label.

    Returns:
        The values in logits, double precision.
    """
    nothing = torch.zeros_like(cheap)
    spread = effects(nothing, corrections, labels).permute(1, 2, 0)
    c, se = balanced_mean(spread, labels), balanced_stderr(spread, labels)
    kept = torch.where(c == 0, 0.0, (1 - (se / c).square()).clamp(min=0.0))
    return balanced_mean(cheap.double().permute(1, 2, 0), labels) + kept * c


def fitted(
    cheap: Float[Tensor, "example layer head"],
    corrections: Corrections,
    labels: Int[Tensor, " example"],
) -> tuple[Float[Tensor, "example layer head"], tuple[Float[Tensor, "example layer head"], ...]]:
    """Fit the weight b of the cheap score: theta = b mean over N of g + mean over S of (y - b g).

    The sample of the first part is divided into two folds within each label. An example's b is the
    slope of y by g over the other fold, one for each head, so it does not depend on the example.

    Args:
        cheap: g of each example.
        corrections: y - g of each part, NaN outside the part's sample.
        labels: Number of each example's label.

    Returns:
        b g of each example, and the corrections that go with it, for the functions above.
    """
    g, first = cheap.double(), corrections[0].double()
    folds = _folds((~torch.isnan(first)).flatten(1).any(1), labels)
    weight = torch.full_like(g, torch.nan)
    for fold in (0, 1):
        weight[folds == fold] = _slope(g, first, labels, folds == 1 - fold)
    weight[torch.isnan(first)] = torch.nan
    out = g.clone()
    for label in labels.unique():
        inside = labels == label
        out[inside] *= weight[inside].nanmean(0)
    moved = first + (1 - weight) * g
    return out.float(), (moved.float(), *corrections[1:])


def _folds(sampled: Bool[Tensor, " example"], labels: Int[Tensor, " example"]) -> Tensor:
    """Return the fold, 0 or 1, of each example of the sample, and -1 of the others."""
    folds = torch.full_like(labels, -1)
    for label in labels.unique():
        rows = ((labels == label) & sampled).nonzero().flatten()
        folds[rows] = torch.arange(len(rows)) % 2
    return folds


def _slope(
    cheap: Tensor,
    correction: Tensor,
    labels: Int[Tensor, " example"],
    rows: Bool[Tensor, " example"],
) -> Float[Tensor, "layer head"]:
    """Return the slope of y = correction + g by g within labels; 1 where g does not vary."""
    above, below = torch.zeros_like(cheap[0]), torch.zeros_like(cheap[0])
    for label in labels.unique():
        inside = rows & (labels == label)
        g, c = cheap[inside], correction[inside]
        g = torch.where(torch.isnan(c), torch.nan, g)
        away = (g - g.nanmean(0)).nan_to_num(0.0)
        above += (away * c.nan_to_num(0.0)).sum(0)
        below += away.square().sum(0)
    return torch.where(below > 0, 1 + above / below, 1.0)
