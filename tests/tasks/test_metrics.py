"""The measures against their definitions, written out as loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from helpers.checks import assert_close
from helpers.tiny_tasks import examples
from torch import Tensor

from cdt_lens.core.choices import Metric
from cdt_lens.core.errors import InputError
from cdt_lens.tasks import metrics
from cdt_lens.tasks.metrics import chance_caution
from cdt_lens.tasks.task import Batch, Example, Examples


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def batch_of_unequal_candidates() -> Batch:
    """Two, three and four candidates; one or two answers."""
    items = (
        Example("a", (3, 4), "x", (10,), (11,)),
        Example("b", (3, 4, 5), "y", (12, 13), (14, 15)),
        Example("c", (3,), "x", (16,), (17, 18)),
    )
    (batch,) = Examples(items, ("x", "y"), "mixed").batches(3, sort_by_length=False)
    return batch


def test_the_direction_is_the_answers_mean_minus_the_others_mean():
    batch = batch_of_unequal_candidates()
    vocabulary = randn(5, 3, 20)
    logits = vocabulary.gather(-1, batch.candidates.expand(5, -1, -1))
    actual = metrics.task_direction(logits, batch.direction)
    for row in range(5):
        own = vocabulary[row]
        assert_close(actual[row, 0], own[0, 10] - own[0, 11], atol=1e-12)
        by_hand = (own[1, 12] + own[1, 13]) / 2 - (own[1, 14] + own[1, 15]) / 2
        assert_close(actual[row, 1], by_hand, atol=1e-12)
        assert_close(actual[row, 2], own[2, 16] - (own[2, 17] + own[2, 18]) / 2, atol=1e-7)


def test_padding_candidates_never_count():
    batch = batch_of_unequal_candidates()
    logits = randn(3, 4)
    spoiled = torch.where(batch.is_candidate, logits, torch.inf)
    same = metrics.task_direction(logits, batch.direction)
    assert torch.equal(metrics.task_direction(spoiled, batch.direction), same)
    right = metrics.correct(logits, batch.is_answer, batch.is_candidate)
    assert torch.equal(metrics.correct(spoiled, batch.is_answer, batch.is_candidate), right)
    weights = metrics.strongest_competitor(spoiled, batch.is_answer, batch.is_candidate)
    expected = metrics.strongest_competitor(logits, batch.is_answer, batch.is_candidate)
    assert torch.equal(weights, expected)


def test_the_strongest_competitor_is_the_others_largest():
    batch = batch_of_unequal_candidates()
    logits = torch.tensor([[1.0, 5, 0, 0], [1, 3, -2, 7], [0, -4, -3, 9]])
    weights = metrics.strongest_competitor(logits, batch.is_answer, batch.is_candidate)
    assert weights.tolist() == [[1, -1, 0, 0], [0.5, 0.5, 0, -1], [1, 0, -1, 0]]


def test_correct_compares_candidates_only_and_can_take_a_prior_away():
    is_answer = torch.tensor([[True, False, False], [True, True, False]])
    is_candidate = torch.tensor([[True, True, False], [True, True, True]])
    logits = torch.tensor([[1.0, 0.5, 9.0], [0.0, 3.0, 2.0]])
    assert metrics.correct(logits, is_answer, is_candidate).tolist() == [True, True]
    prior = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    assert metrics.correct(logits, is_answer, is_candidate, prior).tolist() == [False, False]
    rows = metrics.correct(logits.expand(4, 2, 3), is_answer, is_candidate)
    assert rows.tolist() == [[True, True]] * 4


@pytest.mark.parametrize("counts", [(4, 1, 2), (3, 3), (5,)])
def test_the_balanced_mean_is_the_mean_of_means(counts: tuple[int, ...]):
    labels = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)])
    order = torch.randperm(len(labels), generator=seeded(1))
    values = randn(2, 3, len(labels))
    groups = [values[..., labels == i] for i in range(len(counts))]
    expected = sum(group.mean(-1) for group in groups) / len(groups)
    assert_close(metrics.balanced_mean(values, labels), expected, atol=1e-12)
    shuffled = metrics.balanced_mean(values[..., order], labels[order])
    assert_close(shuffled, expected, atol=1e-12)


def test_a_label_with_more_examples_does_not_pull_the_mean():
    labels = torch.tensor([0] * 99 + [1])
    values = torch.tensor([1.0] * 99 + [3.0])
    assert metrics.balanced_mean(values, labels) == 2.0


def test_the_standard_error_is_that_of_a_stratified_mean():
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 1])
    values = randn(7)
    terms = []
    for label in (0, 1):
        group = values[labels == label].tolist()
        terms.append(statistics.variance(group) / len(group))
    expected = math.sqrt(sum(terms)) / 2
    assert metrics.balanced_stderr(values, labels).item() == pytest.approx(expected, abs=1e-12)


def test_one_example_of_a_label_has_no_standard_error():
    assert metrics.balanced_stderr(randn(2, 3), torch.tensor([0, 0, 1])).isnan().all()


def test_the_standard_error_is_the_spread_of_the_mean():
    labels = torch.tensor([0] * 8 + [1] * 24)
    draws = randn(4000, 32) * torch.where(labels == 0, 1.0, 3.0)
    spread = metrics.balanced_mean(draws, labels).std()
    expected = metrics.balanced_stderr(draws, labels).square().mean().sqrt()
    assert float(expected / spread) == pytest.approx(1, abs=0.05)


def test_macro_f1_by_hand():
    gold = ["a", "a", "a", "b", "b", "c"]
    predicted = ["a", "a", "b", "b", "c", "a"]
    # a: TP 2, FP 1, FN 1; b: TP 1, FP 1, FN 1; c: TP 0; d: neither present nor predicted
    expected = (2 * 2 / 6 + 2 * 1 / 4 + 0 + 0) / 4
    assert metrics.macro_f1(predicted, gold, ["a", "b", "c", "d"]) == pytest.approx(expected)
    assert metrics.macro_f1(gold, gold, ["a", "b", "c"]) == 1.0


def test_the_direction_of_a_whole_split_is_what_its_examples_say():
    data = examples()
    logits = randn(len(data), 128)
    (batch,) = data.batches(len(data), sort_by_length=False)
    actual = metrics.task_direction(logits.gather(-1, batch.candidates), batch.direction)
    for row, item in enumerate(data):
        others = [float(logits[row, token]) for token in item.others]
        expected = float(logits[row, item.answers[0]]) - sum(others) / len(others)
        assert float(actual[row]) == pytest.approx(expected, abs=1e-6)


def test_a_mean_over_no_examples_is_refused():
    nothing, none = torch.zeros(3, 0), torch.zeros(0, dtype=torch.long)
    for mean in (metrics.balanced_mean, metrics.balanced_stderr):
        with pytest.raises(InputError, match="no examples"):
            mean(nothing, none)
    for metric in ("direction", "accuracy", "balanced_accuracy"):
        with pytest.raises(InputError, match="no examples"):
            metrics.average(metric, nothing, none)
    with pytest.raises(InputError, match="no examples"):
        _ = Examples((), ("a", "b"), "empty").chance


def test_macro_f1_needs_labels_and_a_prediction_for_each_example():
    with pytest.raises(InputError, match="0 labels"):
        metrics.macro_f1(["a"], ["a"], [])
    with pytest.raises(InputError, match="1 predicted and 2 gold"):
        metrics.macro_f1(["a"], ["a", "a"], ["a"])


@pytest.mark.parametrize(
    ("metric", "value", "labels", "said"),
    [
        ("direction", -0.44, 4, "mean direction -0.440 logits, chance 0"),
        ("direction", 0.0, 4, "mean direction +0.000 logits"),
        ("direction", 0.01, 4, ""),
        ("accuracy", 0.25, 4, "accuracy 0.250, chance 0.25"),
        ("accuracy", 0.26, 4, ""),
        ("balanced_accuracy", 0.5, 2, "balanced accuracy 0.500, chance 0.5"),
        ("balanced_accuracy", 0.5, 3, ""),
    ],
)
def test_a_metric_at_or_below_chance_is_said(
    metric: Metric, value: float, labels: int, said: str
) -> None:
    sentence = chance_caution(metric, value, 1 / labels)
    assert bool(sentence) == bool(said) and said in sentence
