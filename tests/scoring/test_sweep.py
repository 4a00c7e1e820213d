"""Scores of heads: against `decompose`, on planted circuits (proof h), and across interruptions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checks import assert_close, assert_same_bits, unchecked_types
from helpers.shared import models, other_weights, shared
from helpers.tiny_models import Float64Throughout
from helpers.tiny_tasks import GOLD, LABELS, examples
from helpers.wrapped import needs_hooked
from torch import Tensor

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import circuit_faithfulness, faithfulness_curve
from cdt_lens.core.errors import ArtifactError, InputError, NonFiniteError
from cdt_lens.decomposition.baseline import Baseline, mean_activations, zero_baseline
from cdt_lens.decomposition.decompose import decompose
from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.decomposition.rules import PRESETS, Rules
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.planted.catalogue import PlantedCircuit, planted_circuit
from cdt_lens.scoring import sweep as scores_module
from cdt_lens.scoring.agreement import auroc
from cdt_lens.scoring.methods import exact_ablation
from cdt_lens.scoring.sweep import score_heads
from cdt_lens.tasks.metrics import balanced_mean, balanced_stderr
from cdt_lens.tasks.task import Example, Examples

LABEL_INDEX = torch.tensor([LABELS.index(label) for label in GOLD])


def means(view: ModelView, data: Examples) -> Baseline:
    return mean_activations(view, data, progress=False)


def score(view: ModelView, data: Examples, baseline: Baseline | None = None, **options: Any):
    baseline = means(view, data) if baseline is None else baseline
    return score_heads(view, data, baseline, progress=False, **options)


# What a score is -----------------------------------------------------------------------------------


@models(("gpt2", "llama", "gemma2"))
@pytest.mark.parametrize("rules", PRESETS)
def test_a_score_is_the_balanced_mean_of_the_relevant_direction(
    family, backend, rules, tokenizer_folder
):
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline = means(view, data)
        found = score(view, data, baseline, rules=rules, batch_size=4)
        sets = [(head,) for head in all_heads(view.n_layers, view.n_heads)]
        result = decompose(view, data, sets, baseline, rules=rules)
    shape = (len(data), view.n_layers, view.n_heads)
    expected = result.relevant_direction.T.reshape(shape)
    assert_close(found.per_example, expected, atol=2e-6)  # kept as float32
    by_head = expected.permute(1, 2, 0)
    assert_close(found.values, balanced_mean(by_head, LABEL_INDEX), atol=2e-6)
    assert found.stderr.isnan().all()  # "neutral" has one example
    assert found.example_labels == GOLD
    gold = torch.einsum("ek,ek->e", result.logits, result.direction.to(result.logits))
    assert found.direction == pytest.approx(float(balanced_mean(gold, LABEL_INDEX)), abs=1e-5)


def test_the_standard_error_is_over_examples(tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder)
    data = examples((5, 6, 7, 5, 6), ("positive", "negative", "positive", "negative", "negative"))
    found = score(view, data)
    index = torch.tensor([0, 1, 0, 1, 1])
    expected = balanced_stderr(found.per_example.permute(1, 2, 0), index)
    assert_close(found.stderr, expected, atol=1e-6)
    assert bool((found.stderr > 0).all())


def test_one_example_of_a_label_has_a_score_without_standard_error_and_no_warning(
    tokenizer_folder,
):
    view = shared("gpt2", "bridge", tokenizer_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*no better than chance")
        found = score(view, examples((5, 6), ("positive", "negative")))
    assert bool(found.stderr.isnan().all())
    assert not bool(found.values.isnan().any())


@pytest.mark.parametrize("exact", ["all", 3])
def test_a_task_that_the_model_does_not_solve_is_said(exact, tokenizer_folder):
    """With answers and competitors exchanged every direction has the other sign."""
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    turned = tuple(replace(item, answers=item.others, others=item.answers) for item in data)
    solved = 0
    for given in (data, replace(data, items=turned)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = score(view, given, exact=exact)
            curve = faithfulness_curve(
                view, found, given, means(view, given), draws=1, progress=False
            )
            circuit_faithfulness(
                view, found.select(k=2), given, means(view, given), draws=1, progress=False
            )
        words = "tiny/train: the full model solves the task no better than chance (mean direction"
        told = [str(one.message).startswith(words) for one in said]
        assert told == ([] if found.direction > 0 else [True] * 3)
        assert (curve.full > 0) == (found.direction > 0)
        solved += found.direction > 0
    assert solved == 1


@pytest.mark.parametrize("exact", ["all", 3])
def test_the_strongest_of_others_says_nothing_about_chance(exact, tokenizer_folder):
    """Gold minus the largest of many others is below 0 on average for models that do a task."""
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    turned = tuple(replace(item, answers=item.others, others=item.answers) for item in data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [
            score_heads(
                view, given, means(view, given), direction="strongest", exact=exact, progress=False
            )
            for given in (data, replace(data, items=turned))
        ]
    assert min(scores.direction for scores in found) < 0


@models(("gpt2", "llama"))
def test_batches_rows_and_order_change_nothing(family, backend, tokenizer_folder):
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples(lowest=0)
        baseline = means(view, data)
        expected = score(view, data, baseline, rules="official")
        order = [3, 0, 5, 1, 4, 2]
        shuffled = replace(data, items=tuple(data.items[i] for i in order))
        for options in ({"batch_size": 1}, {"batch_size": 4, "rows": 1}, {"rows": 7}):
            found = score(view, shuffled, baseline, rules="official", **options)
            assert_close(found.per_example, expected.per_example[order], atol=1e-6)
            assert_close(found.values, expected.values, atol=1e-6)


@needs_hooked
def test_both_classes_give_the_same_scores_and_hash(tokenizer_folder):
    with Float64Throughout():
        data = examples()
        hooked, bridge = (
            score(shared("llama", backend, tokenizer_folder), data)
            for backend in ("hooked", "bridge")
        )
    assert_close(hooked.values, bridge.values, atol=1e-7)
    assert hooked.provenance.model_hash == bridge.provenance.model_hash


def test_chosen_heads_are_scored_and_the_rest_is_unknown(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    baseline = means(view, data)
    whole = score(view, data, baseline)
    some = score(view, data, baseline, heads=[Head(1, 2), Head(0, 0), Head(1, 2)])
    assert [str(head) for head in sorted(some.ranking())] == ["L0H0", "L1H2"]
    for layer, head in ((0, 0), (1, 2)):
        assert_close(some.values[layer, head], whole.values[layer, head], atol=1e-6)
    assert int(some.values.isnan().sum()) == 6
    assert some.provenance.options["heads"] == ["L0H0", "L1H2"]


def test_no_heads_are_not_all_heads(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    with pytest.raises(InputError, match="heads"):
        score(view, data, heads=[])


@models(("gpt2",))
def test_the_strongest_competitor_is_fixed_by_the_full_model(family, backend, tokenizer_folder):
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline = means(view, data)
        found = score(view, data, baseline, direction="strongest")
        sets = [(head,) for head in all_heads(2, 4)]
        result = decompose(view, data, sets, baseline)
    for number in range(len(data)):
        gold, *others = range(3)  # candidates: the answer, then the others
        rival = max(others, key=lambda k: float(result.logits[number, k]))
        expected = result.relevant[:, number, gold] - result.relevant[:, number, rival]
        assert_close(found.per_example[number].flatten(), expected, atol=1e-6)


def test_several_right_answers_count_by_their_mean(tokenizer_folder):
    items = (
        Example("a", (5, 6, 7), "x", (20, 21), (30,)),
        Example("b", (8, 9), "y", (40,), (20, 30, 50)),
    )
    data = Examples(items, ("x", "y"), "several")
    with Float64Throughout():
        view = shared("gpt2", "bridge", tokenizer_folder)
        found = exact_ablation(view, data, zero_baseline(view, data), progress=False)
        for number, item in enumerate(items):
            tokens = torch.tensor([item.tokens])

            def direction(logits: Tensor, item: Example = item) -> float:
                last = logits[0, -1]
                return float(last[list(item.answers)].mean() - last[list(item.others)].mean())

            full = direction(view.logits(tokens))
            with view.hooked({("z", 1): lambda z: without_head(z, 3)}):
                ablated = direction(view.logits(tokens))
            assert float(found.per_example[number, 1, 3]) == pytest.approx(full - ablated, abs=1e-6)


def without_head(z: Tensor, head: int) -> Tensor:
    z = z.clone()
    z[:, :, head] = 0
    return z


def test_wrong_input_is_refused(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    baseline = means(view, data)
    with pytest.raises(InputError, match="L0H7"):
        score(view, data, baseline, heads=[Head(0, 7)])
    with pytest.raises(InputError, match="rules='stabel'.*stable"):
        score(view, data, baseline, rules="stabel")
    with pytest.raises(InputError, match="no examples"):
        score(view, data[:0], baseline)
    with pytest.raises(InputError, match="batch_size"):
        score(view, data, baseline, batch_size=0)
    with pytest.raises(InputError, match="rows=0"):
        score(view, data, baseline, rows=0)
    with unchecked_types(), pytest.raises(InputError, match="direction='hardest'"):
        score(view, data, baseline, direction="hardest")


def test_a_score_that_is_not_finite_is_named_never_returned(tokenizer_folder):
    view, data = shared("llama", "bridge", tokenizer_folder, torch.float32), examples()
    baseline = means(view, data)
    huge = replace(baseline, means=torch.full_like(baseline.means, 1e30))
    with pytest.raises(NonFiniteError, match=r"8 of 8.*L0H0.*layer 0.*norm='through'"):
        score(view, data, huge, rules=Rules(norm="frozen"))
    assert bool(torch.isfinite(score(view, data, huge).values).all())


def test_out_of_memory_changes_no_score(tokenizer_folder, monkeypatch):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    baseline = means(view, data)
    expected = score(view, data, baseline)
    true = Propagator.propagate

    def small_memory(self, resets, *rest):
        if next(iter(resets.values())).shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true(self, resets, *rest)

    monkeypatch.setattr(Propagator, "propagate", small_memory)
    assert_close(score(view, data, baseline).values, expected.values, atol=1e-6)


# (h) planted circuits ------------------------------------------------------------------------------


BOTH = [pytest.param("hooked", marks=needs_hooked), "bridge"]
PAIR = (Head(0, 1), Head(1, 2))
trained = pytest.mark.parametrize(
    "name", ["trained-gpt2", "trained-attention-only", "trained-llama"]
)


def planted_scores(circuit: PlantedCircuit, rules: str | Rules, **options: Any):
    view = view_of(circuit.model)
    return score(view, circuit.valid, means(view, circuit.train), rules=rules, **options)


@pytest.mark.parametrize("backend", BOTH)
@trained
def test_a_planted_circuit_is_recovered(name, backend):
    circuit = planted_circuit(name, backend=backend)
    for rules in ("official", "ablation", Rules(attention="decomposed")):
        found = planted_scores(circuit, rules)
        assert set(found.top(2, by="magnitude")) == set(PAIR), rules
        assert auroc(found.values.abs(), circuit.truth) == 1.0


@pytest.mark.parametrize("backend", BOTH)
@trained
def test_a_planted_circuit_is_recovered_by_default(name, backend):
    """With less noise: L0H1 acts through L1H2's pattern alone, and the default freezes patterns."""
    circuit = planted_circuit(name, backend=backend, noise=0.1)
    found = planted_scores(circuit, "stable")
    assert set(found.top(2, by="magnitude")) == set(PAIR)
    assert auroc(found.values.abs(), circuit.truth) == 1.0


@trained
def test_the_planted_circuit_is_the_whole_truth(name):
    """What the other tests take for granted: both heads are needed, and together enough."""
    planted = planted_circuit(name, backend="bridge")
    view, data = view_of(planted.model), planted.valid
    baseline = means(view, planted.train)
    exact = exact_ablation(view, data, baseline, progress=False)
    for head in PAIR:
        assert float(exact.values[head.layer, head.head]) > 0.5 * exact.direction
    circuit = exact.select(k=2)
    assert circuit.heads == PAIR
    measured = circuit_faithfulness(view, circuit, data, baseline, draws=2, progress=False)
    assert measured.faithfulness == pytest.approx(1.0, abs=0.15)
    assert measured.completeness < 0.3


@trained
def test_frozen_attention_does_not_see_what_acts_through_a_pattern(name):
    """A limit to know, not to wish for: the direct and value paths are all that it follows."""
    circuit = planted_circuit(name, backend="bridge", noise=0.1)
    first, last = PAIR
    frozen, exact = (
        planted_scores(circuit, rules, exact="all").values for rules in ("stable", "ablation")
    )
    assert float(exact[first.layer, first.head]) > 4.0
    assert abs(float(frozen[first.layer, first.head])) < 0.2 * float(exact[first.layer, first.head])
    assert_close(frozen[last.layer, last.head], exact[last.layer, last.head], atol=1e-4)


# Interrupted runs ----------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> list[int]:
    """`score_heads` is stopped at the batch after that many; returns the sizes of the batches."""
    sizes: list[int] = []

    class Counting(Propagator):
        def __init__(self, view: ModelView, tokens: Tensor, *args: Any, **kwargs: Any) -> None:
            if len(sizes) == batches:
                raise Interrupted
            sizes.append(len(tokens))
            super().__init__(view, tokens, *args, **kwargs)

    monkeypatch.setattr(scores_module, "Propagator", Counting)
    return sizes


@pytest.mark.parametrize("done", [1, 2])
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(
    done, tmp_path: Path, tokenizer_folder, monkeypatch
):
    view, data = shared("gpt2", "bridge", tokenizer_folder, torch.float32), examples()
    baseline, checkpoint = means(view, data), tmp_path / "sweep.json"
    expected = score(view, data, baseline, batch_size=2)
    with monkeypatch.context() as patched:
        interrupt_after(patched, done)
        with pytest.raises(Interrupted):
            score(view, data, baseline, batch_size=2, checkpoint=checkpoint)
    assert checkpoint.exists()
    with monkeypatch.context() as patched:
        sizes = interrupt_after(patched, 99)
        resumed = score(view, data, baseline, batch_size=2, checkpoint=checkpoint)
        assert sizes == [2] * (3 - done)
        sizes.clear()
        again = score(view, data, baseline, batch_size=2, checkpoint=checkpoint)
        assert sizes == []
    for found in (resumed, again):
        assert_same_bits(found.values, expected.values)
        assert_same_bits(found.stderr, expected.stderr)
        assert_same_bits(found.per_example, expected.per_example)
        assert found.direction == expected.direction


def test_a_resumed_run_may_use_other_batches(tmp_path: Path, tokenizer_folder, monkeypatch):
    with Float64Throughout():
        view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
        baseline, checkpoint = means(view, data), tmp_path / "sweep.json"
        expected = score(view, data, baseline)
        with monkeypatch.context() as patched:
            interrupt_after(patched, 1)
            with pytest.raises(Interrupted):
                score(view, data, baseline, batch_size=2, checkpoint=checkpoint)
        resumed = score(view, data, baseline, batch_size=3, checkpoint=checkpoint)
    assert_close(resumed.per_example, expected.per_example, atol=1e-6)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    other_view = other_weights("gpt2", tokenizer_folder)
    baseline, checkpoint = means(view, data), tmp_path / "sweep.json"
    score(view, data, baseline, checkpoint=checkpoint)
    before = checkpoint.read_bytes()
    pooled = mean_activations(view, data, positions="pooled", progress=False)
    fitted_elsewhere = means(view, examples(seed=8))
    changed: Sequence[tuple[ModelView, Examples, Baseline, dict[str, Any]]] = (
        (view, data, baseline, {"rules": "linear"}),
        (view, data, baseline, {"rules": Rules(eps=1e-6)}),
        (view, data, baseline, {"heads": [Head(0, 1)]}),
        (view, data, baseline, {"direction": "strongest"}),
        (view, data, baseline, {"method": "other"}),
        (view, data, pooled, {}),
        (view, data, fitted_elsewhere, {}),
        (view, data, zero_baseline(view, data), {}),
        (view, examples(seed=8), baseline, {}),
        (view, data[:5], baseline, {}),
        (other_view, data, means(other_view, data), {}),
    )
    for model, split, values, options in changed:
        with pytest.raises(InputError, match="another run") as caught:
            score(model, split, values, checkpoint=checkpoint, **options)
        assert str(checkpoint) in str(caught.value)
    assert checkpoint.read_bytes() == before


def test_a_checkpoint_never_overwrites_another_file(tmp_path: Path, tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    baseline = means(view, data)
    path = score(view, data, baseline).select(k=2).save(tmp_path / "circuit.json")
    with pytest.raises((InputError, ArtifactError)) as caught:
        score(view, data, baseline, checkpoint=path)
    assert str(path) in str(caught.value)
    assert len(Circuit.load(path)) == 2


def test_a_damaged_checkpoint_is_never_believed(tmp_path: Path, tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    baseline, checkpoint = means(view, data), tmp_path / "sweep.json"
    expected = score(view, data, baseline, checkpoint=checkpoint)
    (tensors,) = tmp_path.glob("*.safetensors")
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    try:
        found = score(view, data, baseline, checkpoint=checkpoint)
    except ArtifactError as error:
        assert str(tensors) in str(error)
    else:
        assert_same_bits(found.values, expected.values)


def test_the_provenance_says_how_the_scores_were_made(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    baseline = means(view, examples(seed=4, name="tiny/other"))
    found = score(view, data, baseline, rules="linear", direction="strongest")
    options = found.provenance.options
    assert options["rules"] == PRESETS["linear"].to_dict()
    assert options["direction"] == "strongest"
    assert options["baseline"] == "answer"
    assert options["baseline_task"] == examples(seed=4).hash != data.hash
    assert options["heads"] == "all"
    assert found.method == options["method"] == "cdt"
    assert found.provenance.task_hash == data.hash
    assert (found.n_layers, found.n_heads) == (2, 4)
