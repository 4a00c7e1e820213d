"""Accuracy, macro-F1, direction and label priors against the model's own whole forward pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.saved import TEMPLATE, VERBALIZER, save_model, write_task
from scipy.stats import binomtest

from cdt_lens.core.errors import InputError, NonFiniteError
from cdt_lens.models.loading import load_model
from cdt_lens.models.view import view_of
from cdt_lens.tasks.datasets import task_from_files
from cdt_lens.tasks.evaluate import calibrate, evaluate, label_prior
from cdt_lens.tasks.metrics import macro_f1


@pytest.fixture(scope="module")
def model_and_task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    model = load_model(save_model(folder / "tiny"), backend="bridge")
    task = task_from_files(
        write_task(folder / "data"), tokenizer=model.tokenizer, template=TEMPLATE,
        verbalizer=VERBALIZER,
    )  # fmt: skip
    return model, task


def own_logits(model, example):
    """The label logits at the answer, by the model's own forward pass on one prompt."""
    return view_of(model).logits(torch.tensor([example.tokens]))[0, -1]


def test_equals_the_models_own_answers(model_and_task):
    model, task = model_and_task
    ids = task.verbalizer_ids
    predicted, directions = [], {label: [] for label in task.labels}
    for example in task.valid:
        logits = own_logits(model, example)
        values = {label: float(logits[ids[label]]) for label in task.labels}
        predicted.append(max(values, key=values.get))
        rest = [v for label, v in values.items() if label != example.label]
        directions[example.label].append(values[example.label] - sum(rest) / len(rest))
    gold = [e.label for e in task.valid]
    found = evaluate(model, task.valid, task, batch_size=5)
    assert found.accuracy == sum(p == g for p, g in zip(predicted, gold, strict=True)) / len(gold)
    assert found.macro_f1 == pytest.approx(macro_f1(predicted, gold, task.labels))
    shares = [
        sum(p == g for p, g in zip(predicted, gold, strict=True) if g == label) / gold.count(label)
        for label in task.labels
    ]
    assert found.balanced_accuracy == pytest.approx(sum(shares) / 3)
    by_label = [sum(d) / len(d) for d in directions.values()]
    assert found.direction == pytest.approx(sum(by_label) / 3, abs=1e-5)
    right = round(found.accuracy * len(gold))
    wilson = binomtest(right, len(gold)).proportion_ci(method="wilson")
    assert found.intervals["accuracy"] == pytest.approx((wilson.low, wilson.high))
    low, high = found.intervals["balanced_accuracy"]
    assert 0 <= low < found.balanced_accuracy < high <= 1
    low, high = found.intervals["direction"]
    assert (low + high) / 2 == pytest.approx(found.direction, abs=1e-5) and low < high
    assert found.to_dataframe()["accuracy low"].item() == pytest.approx(wilson.low)
    assert found.confusion is not None and int(found.confusion.to_numpy().sum()) == len(gold)


def test_prior_is_the_mean_content_free_logit(model_and_task):
    model, task = model_and_task
    prior = label_prior(model, task)
    ids = task.verbalizer_ids
    logits = torch.stack([own_logits(model, example) for example in task.content_free])
    means = {label: float(logits[:, ids[label]].mean()) for label in task.labels}
    centre = sum(means.values()) / 3
    assert prior == pytest.approx({k: v - centre for k, v in means.items()}, abs=1e-5)


def test_calibration_changes_answers_not_directions(model_and_task):
    model, task = model_and_task
    # A prior far beyond any logit decides alone: every answer is the label it does not burden.
    burdened = task.with_prior({"bad": 100.0, "fine": 100.0, "good": 0.0})
    plain, found = evaluate(model, task.valid, task), evaluate(model, task.valid, burdened)
    assert found.accuracy == task.valid.counts["good"] / len(task.valid)
    assert found.balanced_accuracy == pytest.approx(1 / 3)
    assert found.direction == plain.direction
    assert calibrate(model, task).prior == pytest.approx(label_prior(model, task))


def test_a_task_without_verbalizer_has_no_prior(model_and_task):
    model, task = model_and_task
    from dataclasses import replace

    bare = replace(task, verbalizer={}, verbalizer_ids={}, content_free=task.content_free[:0])
    with pytest.raises(InputError, match="content-free"):
        label_prior(model, bare)
    assert evaluate(model, task.valid).macro_f1 is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_wrong_answers(model_and_task, bad):
    model, task = model_and_task

    def logits(batch):
        own = torch.zeros(batch.candidates.shape)
        own[-1, 0] = bad
        return own

    with pytest.raises(NonFiniteError, match="test: the logits of .* are not finite"):
        evaluate(model, task.test, task, logits_of=logits)


def test_a_label_may_be_named_like_a_column_of_the_table(model_and_task):
    model, task = model_and_task
    found = evaluate(model, task.test, task)
    named = found.confusion.rename(index={"good": "gold"}, columns={"good": "gold"})
    assert "gold \\ predicted" in replace(found, confusion=named)._repr_html_()
