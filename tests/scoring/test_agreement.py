"""Agreement of two sets of scores against values worked out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tasks.test_metrics import randn
from torch import Tensor

from cdt_lens.core.errors import InputError
from cdt_lens.scoring import agreement


def test_correlations_by_hand():
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert agreement.spearman(a, a.exp()) == pytest.approx(1.0)
    assert agreement.spearman(a, -(a**3)) == pytest.approx(-1.0)
    assert agreement.pearson(a, 2 - 3 * a) == pytest.approx(-1.0)
    b = torch.tensor([[2.0, 1.0], [4.0, 3.0]])
    # ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15)
    assert agreement.spearman(a, b) == pytest.approx(1 - 6 * 4 / 60)
    assert agreement.pearson(a, b) == pytest.approx(0.6)
    ties = torch.tensor([1.0, 1.0, 2.0, 3.0])
    assert agreement.spearman(ties, torch.tensor([1.5, 1.5, 3.0, 4.0])) == pytest.approx(1.0)


@pytest.mark.parametrize("measure", [agreement.spearman, agreement.pearson])
def test_a_constant_has_no_correlation(measure):
    assert math.isnan(measure(torch.ones(4), torch.arange(4.0)))


def test_auroc_counts_the_pairs_in_order():
    scores = torch.tensor([[0.1, 0.4, 0.4], [0.35, 0.8, 0.4]])
    truth = torch.tensor([[False, False, True], [True, True, False]])
    pairs = itertools.product(scores[truth].tolist(), scores[~truth].tolist())
    counted = [1.0 if t > f else 0.5 if t == f else 0.0 for t, f in pairs]
    assert agreement.auroc(scores, truth) == pytest.approx(sum(counted) / len(counted))
    assert agreement.auroc(truth.float(), truth) == 1.0
    assert agreement.auroc(-truth.float(), truth) == 0.0
    assert agreement.auroc(torch.zeros(2, 3), truth) == 0.5


@pytest.mark.parametrize("truth", [torch.ones(3).bool(), torch.zeros(3).bool()])
def test_auroc_of_one_kind_is_refused(truth: Tensor):
    with pytest.raises(InputError, match="both kinds"):
        agreement.auroc(torch.arange(3.0), truth)


def test_a_truth_of_integers_is_a_truth():
    scores, truth = randn(12), torch.tensor([1, 0, 0, 1] * 3)
    assert agreement.auroc(scores, truth) == agreement.auroc(scores, truth.bool())
    found = agreement.average_precision(scores, truth)
    assert found == agreement.average_precision(scores, truth.bool())


def test_average_precision_is_the_mean_precision_at_each_true_entry():
    scores = torch.tensor([[0.9, 0.8], [0.7, 0.6], [0.5, -2.0]])
    truth = torch.tensor([[True, False], [True, False], [False, True]])
    # true entries come first, third and last: 1/1, 2/3, 3/6
    assert agreement.average_precision(scores, truth) == pytest.approx((1 + 2 / 3 + 3 / 6) / 3)
    assert agreement.average_precision(truth.float(), truth) == 1.0
    # nothing until the three true ones come at the end, all at once
    assert agreement.average_precision(-truth.float(), truth) == 0.5
    assert agreement.average_precision(scores, torch.ones(3, 2).bool()) == 1.0


def test_equal_scores_count_together_whatever_their_order():
    scores = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    truths = [torch.tensor([True, *rest, False]) for rest in set(itertools.permutations([1, 0, 0]))]
    # one of one, then two of four at once
    values = {agreement.average_precision(scores, truth.bool()) for truth in truths}
    assert values == {(1 + 2 / 4) / 2}
    assert agreement.average_precision(torch.zeros(8), torch.arange(8) < 3) == 3 / 8


def test_average_precision_without_truth_is_refused():
    scores = torch.arange(3.0)
    with pytest.raises(InputError, match="needs a true entry"):
        agreement.average_precision(scores, torch.zeros(3).bool())


@pytest.mark.parametrize("measure", [agreement.auroc, agreement.average_precision])
def test_a_score_that_is_nan_is_refused(measure):
    """Ranks put NaN above every score, so that it passed for the best head."""
    scores = torch.tensor([0.0, torch.nan, 2.0])
    with pytest.raises(InputError, match=f"{measure.__name__}: a score is NaN"):
        measure(scores, torch.tensor([True, False, True]))


@pytest.mark.parametrize(
    "measure",
    [agreement.spearman, agreement.pearson, agreement.auroc, agreement.average_precision],
)
def test_two_shapes_are_refused(measure):
    with pytest.raises(InputError, match=rf"{measure.__name__}: .*got \[5\] and \[4\]"):
        measure(randn(5), torch.tensor([1.0, 0.0, 1.0, 0.0]))
