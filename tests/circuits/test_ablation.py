"""The metric of a circuit is what TransformerLens' own hooks give with the rest ablated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import by_hand
from helpers.checks import assert_close, unchecked_types
from helpers.shared import models, shared
from helpers.tiny_models import Float64Throughout
from helpers.tiny_tasks import ANSWERS, LABELS, examples, many

from cdt_lens.circuits.ablation import circuit_metric, measure_circuits
from cdt_lens.circuits.faithfulness import circuit_faithfulness, faithfulness_curve
from cdt_lens.circuits.greedy import greedy_circuit
from cdt_lens.core.errors import InputError
from cdt_lens.core.passes import Passes
from cdt_lens.decomposition.baseline import Baseline, counterfactual_baseline, mean_activations
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.one_pass import one_pass
from cdt_lens.tasks.evaluate import evaluate
from cdt_lens.tasks.metrics import balanced_mean
from cdt_lens.tasks.task import Examples, Task

CIRCUITS = ((), (Head(0, 1),), (Head(0, 0), Head(1, 3)), tuple(all_heads(2, 4)))


def means(view: ModelView, data: Examples) -> Baseline:
    return mean_activations(view, data, progress=False)


MEASURES = {
    "direction": (by_hand.direction, by_hand.balanced),
    "accuracy": (by_hand.is_right, by_hand.plain),
    "balanced_accuracy": (by_hand.is_right, by_hand.balanced),
}


@models(("gpt2", "llama", "gemma2"))
def test_it_equals_an_ablation_by_hand(family, backend, tokenizer_folder):
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), many()
        baseline = means(view, data)
        rest = [[head for head in all_heads(2, 4) if head not in c] for c in CIRCUITS]
        logits = [by_hand.ablated_logits(view, item, rest, baseline) for item in data]
        for metric, (measure, mean) in MEASURES.items():
            found = circuit_metric(
                view, CIRCUITS, data, baseline, metric=metric, batch_size=9, progress=False
            )
            for number in range(len(CIRCUITS)):
                values = [
                    measure(rows[number], item) for rows, item in zip(logits, data, strict=True)
                ]
                assert float(found[number]) == pytest.approx(mean(values, data), abs=1e-6)
            assert len(set(found.tolist())) > 2


@pytest.mark.parametrize("metric", ["direction", "accuracy", "balanced_accuracy"])
def test_batches_rows_and_repeats_change_nothing(metric, tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), many()
    baseline = means(view, data)
    expected = circuit_metric(view, CIRCUITS, data, baseline, metric=metric, progress=False)
    for options in ({"batch_size": 1}, {"batch_size": 7, "rows": 2}):
        found = circuit_metric(
            view, CIRCUITS, data, baseline, metric=metric, progress=False, **options
        )
        assert_close(found, expected, atol=1e-6)
    repeated = tuple(circuit[::-1] + circuit for circuit in CIRCUITS)
    found = circuit_metric(view, repeated, data, baseline, metric=metric, progress=False)
    assert_close(found, expected, atol=1e-12)


def test_a_prior_is_taken_from_the_candidates(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), many()
    baseline = means(view, data)
    none = data[:0]
    task = Task("tiny", LABELS, {name: name for name in LABELS}, ANSWERS, "{text}",
                data, none, none, none)  # fmt: skip
    options = {"metric": "accuracy", "progress": False}
    plain = circuit_metric(view, [()], data, baseline, task=task, **options)
    flat = task.with_prior(dict.fromkeys(LABELS, 3.0))
    assert_close(circuit_metric(view, [()], data, baseline, task=flat, **options), plain)
    # A prior that rules two labels out leaves the third as the answer to everything.
    for label in LABELS:
        prior = {name: 0.0 if name == label else 1000.0 for name in LABELS}
        expected = {"accuracy": data.counts[label] / len(data), "balanced_accuracy": 1 / 3}
        for metric, share in expected.items():
            found = circuit_metric(
                view, [()], data, baseline, task=task.with_prior(prior), metric=metric,
                progress=False,
            )  # fmt: skip
            assert float(found) == pytest.approx(share)
    assert len(set(data.counts.values())) > 1  # so that the two accuracies differ


def test_each_accuracy_is_that_of_the_evaluation(tokenizer_folder):
    """One name, one meaning: the whole model as a circuit, and as `evaluate` judges it."""
    view, data = shared("gpt2", "bridge", tokenizer_folder), many()
    evaluation = evaluate(view, data)
    assert evaluation.accuracy != evaluation.balanced_accuracy
    everyone = all_heads(view.n_layers, view.n_heads)
    for metric in ("accuracy", "balanced_accuracy", "direction"):
        (value,) = circuit_metric(
            view, [everyone], data, means(view, data), metric=metric, progress=False
        )
        assert float(value) == pytest.approx(getattr(evaluation, metric), abs=1e-6)


def test_the_direction_takes_no_prior(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), many()
    baseline, none = means(view, data), data[:0]
    task = Task("tiny", LABELS, {name: name for name in LABELS}, ANSWERS, "{text}",
                data, none, none, none)  # fmt: skip
    prior = task.with_prior({"positive": 5.0, "neutral": 0.0, "negative": -5.0})
    found = [
        circuit_metric(view, CIRCUITS, data, baseline, task=t, progress=False)
        for t in (task, prior)
    ]
    assert torch.equal(*found)


def test_the_mean_is_balanced_whatever_the_order_of_labels(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), many()
    baseline = means(view, data)
    expected = circuit_metric(view, CIRCUITS, data, baseline, progress=False)
    renamed = replace(data, labels=LABELS[::-1])
    found = circuit_metric(view, CIRCUITS, renamed, baseline, progress=False)
    assert_close(found, expected, atol=1e-12)
    one_label = replace(data, items=tuple(x for x in data if x.label == "neutral"))
    each = circuit_metric(view, CIRCUITS, one_label, baseline, progress=False)
    assert each.shape == expected.shape
    assert balanced_mean(torch.ones(3), torch.tensor([0, 0, 2])) == 1


def test_each_circuit_is_measured_once(tokenizer_folder, monkeypatch):
    from cdt_lens.circuits import ablation as module

    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    true, seen = module._by_example, []
    monkeypatch.setattr(
        module, "_by_example", lambda v, c, *a, **k: (seen.extend(c), true(v, c, *a, **k))[1]
    )
    found = measure_circuits(
        view, [*CIRCUITS, *CIRCUITS], data, means(view, data), passes=Passes(8, progress=False)
    )
    assert seen == list(CIRCUITS)
    assert set(found.means()) == set(CIRCUITS)


def test_wrong_input_is_refused(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    baseline = means(view, data)
    with pytest.raises(InputError, match="L5H0"):
        circuit_metric(view, [(Head(5, 0),)], data, baseline, progress=False)
    with pytest.raises(InputError, match="no examples"):
        circuit_metric(view, [()], data[:0], baseline, progress=False)
    with (
        unchecked_types(),
        pytest.raises(InputError, match="metric='f1'.*direction, accuracy, balanced_accuracy"),
    ):
        circuit_metric(view, [()], data, baseline, metric="f1", progress=False)


@pytest.mark.parametrize("family", ["gpt2", "llama", "pythia"])
def test_what_rounding_leaves_is_nothing_to_explain(family, tokenizer_folder):
    """Prompts that are their own counterfactuals: ablation puts back what was there."""
    view, data = shared(family, "bridge", tokenizer_folder, torch.float32), many()
    itself = counterfactual_baseline(view, data, data)
    everyone = all_heads(view.n_layers, view.n_heads)
    with pytest.raises(InputError, match="nothing to explain"):
        measure_circuits(view, [everyone, ()], data, itself, passes=Passes(4, progress=False))
    scores = one_pass(view, data, means(view, data), progress=False)
    for call in (
        lambda: circuit_faithfulness(view, scores.select(k=3), data, itself, progress=False),
        lambda: faithfulness_curve(view, scores, data, itself, progress=False),
        lambda: greedy_circuit(view, scores, data, itself, k=1, pool=2, progress=False),
    ):
        with pytest.raises(InputError, match="nothing to explain"):
            call()
