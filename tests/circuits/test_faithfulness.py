"""Proof (g): faithfulness of all heads, of none, and of a two-head toy by hand; controls; areas."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import by_hand
from helpers.checks import assert_close, assert_same_bits
from helpers.shared import models, shared
from helpers.tiny_models import D_VOCAB, Float64Throughout, _randomise as randomise
from helpers.tiny_tasks import LABELS, examples, many, one_by_one
from helpers.tiny_training import split
from helpers.wrapped import tokenizer

from cdt_lens.circuits import faithfulness as module
from cdt_lens.circuits.ablation import circuit_metric
from cdt_lens.circuits.circuit import Circuit, random_heads, random_heads_like
from cdt_lens.circuits.faithfulness import (
    CONTROLS,
    FaithfulnessCurve,
    circuit_faithfulness,
    faithfulness_curve,
    measured_for,
)
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.circuits.measures import MIB_FRACTIONS, log_area
from cdt_lens.core.artifacts import load_artifact, save_artifact
from cdt_lens.core.errors import ArtifactError, CdtLensWarning, InputError
from cdt_lens.decomposition.baseline import Baseline, mean_activations
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.loading import _bridge
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.sweep import score_heads
from cdt_lens.tasks.intervals import mean_interval, paired_share_interval, ratio_effects
from cdt_lens.tasks.metrics import balanced_mean
from cdt_lens.tasks.task import Examples, Task

FILES_0_3 = Path(__file__).parents[1] / "files_0_3"
FRACTIONS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)


def fitted(view: ModelView, data: Examples) -> tuple[Examples, Baseline, HeadScores]:
    baseline = mean_activations(view, data, progress=False)
    return data, baseline, score_heads(view, data, baseline, progress=False)


def curve_of(view: ModelView, data: Examples | None = None, **options: Any) -> FaithfulnessCurve:
    data, baseline, scores = fitted(view, data or examples())
    options = {"fractions": FRACTIONS, "draws": 3, "progress": False, **options}
    return faithfulness_curve(view, scores, data, baseline, **options)


# A toy by hand -------------------------------------------------------------------------------------


def two_heads(folder: str) -> ModelView:
    """One layer of two heads."""
    config = transformers.GPT2Config(
        vocab_size=D_VOCAB, n_positions=16, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=1, eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.GPT2LMHeadModel(config).double().requires_grad_(False)
        randomise(model, torch.Generator().manual_seed(3))
        return ModelView(_bridge(model, tokenizer(folder), "cpu", torch.float64).eval())


def test_a_toy_of_two_heads_by_hand(tokenizer_folder):
    with Float64Throughout():
        view = two_heads(tokenizer_folder)
        data = examples()
        baseline = mean_activations(view, data, progress=False)

        def metric(*ablated: Head) -> float:
            values = [
                by_hand.direction(by_hand.ablated_logits(view, item, [ablated], baseline)[0], item)
                for item in data
            ]
            return by_hand.balanced(values, data)

        first, second = Head(0, 0), Head(0, 1)
        full, empty = metric(), metric(first, second)
        for kept, ablated in ((first, second), (second, first)):
            circuit = Circuit((kept,), 1, 2)
            found = circuit_faithfulness(view, circuit, data, baseline, draws=4, progress=False)
            assert found.full == pytest.approx(full, abs=1e-6)
            assert found.empty == pytest.approx(empty, abs=1e-6)
            f = (metric(ablated) - empty) / (full - empty)
            completeness = (metric(kept) - empty) / (full - empty)
            assert found.faithfulness == pytest.approx(f, abs=1e-5)
            assert found.completeness == pytest.approx(completeness, abs=1e-5)
            # The controls are one head each: this one or the other.
            for values in found.random.values():
                for value in values.tolist():
                    assert min(abs(value - f), abs(value - completeness)) < 1e-5
        scores = score_heads(view, data, baseline, progress=False)
        curve = faithfulness_curve(
            view, scores, data, baseline, fractions=(0.0, 0.5, 1.0), draws=2, progress=False
        )
        best = scores.top(1)[0]
        other = second if best == first else first
        half = (metric(other) - empty) / (full - empty)
        assert curve.sizes == (0, 1, 2)
        assert curve.faithfulness.tolist() == pytest.approx([0.0, half, 1.0], abs=1e-5)
        rest = (metric(best) - empty) / (full - empty)
        assert curve.completeness.tolist() == pytest.approx([1.0, rest, 0.0], abs=1e-5)
        assert curve.cpr == pytest.approx((0 + half) / 4 + (half + 1) / 4, abs=1e-5)
        gap = abs(1 - half)
        assert curve.cmd == pytest.approx((1 + gap) / 4 + (gap + 0) / 4, abs=1e-5)


# All heads and none --------------------------------------------------------------------------------


@models(("gpt2", "llama", "gemma2"))
@pytest.mark.parametrize("metric", ["direction", "accuracy", "balanced_accuracy"])
def test_it_is_1_for_all_heads_and_0_for_none(family, backend, metric, tokenizer_folder):
    view = shared(family, backend, tokenizer_folder, torch.float32)
    curve = curve_of(view, many(), metric=metric)
    assert curve.sizes == (0, 1, 2, 4, 6, 8)
    assert (float(curve.faithfulness[0]), float(curve.faithfulness[-1])) == (0.0, 1.0)
    assert (float(curve.completeness[0]), float(curve.completeness[-1])) == (1.0, 0.0)
    for values in curve.random.values():
        assert values[:, 0].tolist() == [0.0] * 3
        assert values[:, -1].tolist() == [1.0] * 3
    data, baseline, _ = fitted(view, many())
    for heads, f in ((all_heads(2, 4), 1.0), ((), 0.0)):
        found = circuit_faithfulness(
            view, Circuit(heads, 2, 4), data, baseline, metric=metric, draws=1, progress=False
        )
        assert (found.faithfulness, found.completeness) == (f, 1.0 - f)
        assert (found.full, found.empty) == pytest.approx((curve.full, curve.empty), abs=1e-5)


def test_the_curve_keeps_the_top_of_the_ranking(tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder, torch.float32)
    data, baseline, scores = fitted(view, examples())
    for by in ("magnitude", "signed"):
        curve = curve_of(view, by=by)
        assert measured_for(curve, scores)
        assert not measured_for(curve, replace(scores, values=scores.values.flip(1)))
        for number, size in enumerate(curve.sizes):
            circuit = scores.select(k=size, by=by)
            found = circuit_faithfulness(view, circuit, data, baseline, draws=1, progress=False)
            assert float(curve.faithfulness[number]) == pytest.approx(found.faithfulness, abs=1e-6)
            assert float(curve.completeness[number]) == pytest.approx(found.completeness, abs=1e-6)


def test_the_areas_are_trapezoids_of_the_points(tokenizer_folder):
    curve = curve_of(shared("gpt2", "bridge", tokenizer_folder, torch.float32))

    def trapezoid(values: list[float]) -> float:
        return sum(
            (b - a) * (x + y) / 2
            for a, b, x, y in zip(FRACTIONS, FRACTIONS[1:], values, values[1:], strict=False)
        )

    f = curve.faithfulness.tolist()
    assert curve.cpr == pytest.approx(trapezoid(f), abs=1e-6)
    assert curve.cmd == pytest.approx(trapezoid([abs(1 - x) for x in f]), abs=1e-6)
    for name in CONTROLS:
        for draw, values in enumerate(curve.random[name].tolist()):
            assert float(curve.random_cpr[name][draw]) == pytest.approx(trapezoid(values), abs=1e-6)
            by_distance = trapezoid([abs(1 - x) for x in values])
            assert float(curve.random_cmd[name][draw]) == pytest.approx(by_distance, abs=1e-6)


# Controls ------------------------------------------------------------------------------------------


def test_the_controls_are_the_recorded_draws_of_the_right_size(tokenizer_folder, monkeypatch):
    """Each f of a control is that of the circuit which its seed draws."""
    view = shared("gpt2", "bridge", tokenizer_folder, torch.float32)
    data, baseline, scores = fitted(view, examples())
    circuit = scores.select(k=3)
    found = circuit_faithfulness(view, circuit, data, baseline, draws=4, seed=11, progress=False)
    drawn = {
        "random": [random_heads(3, 2, 4, seed=11 + i) for i in range(4)],
        "random-per-layer": [random_heads_like(circuit.heads, 2, 4, seed=11 + i) for i in range(4)],
    }
    assert tuple(found.random) == CONTROLS
    per_layer = Counter(head.layer for head in circuit.heads)
    for name, circuits in drawn.items():
        for number, heads in enumerate(circuits):
            assert len(heads) == 3
            if name == "random-per-layer":
                assert Counter(head.layer for head in heads) == per_layer
            alone = circuit_faithfulness(
                view, Circuit(heads, 2, 4), data, baseline, draws=1, progress=False
            )
            expected = pytest.approx(alone.faithfulness, abs=1e-6)
            assert float(found.random[name][number]) == expected
    assert found.provenance.seed == 11


def test_the_largest_seed_has_draws_after_it(tokenizer_folder):
    """Draw i takes seed + i, counted from 0 again after the largest."""
    view = shared("gpt2", "bridge", tokenizer_folder, torch.float32)
    found = curve_of(view, seed=2**63 - 1, draws=2)
    assert found.provenance.seed == 2**63 - 1


def test_controls_are_reproducible_from_the_seed(tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder, torch.float32)
    first, again, other = (curve_of(view, seed=seed) for seed in (5, 5, 6))
    for name in CONTROLS:
        assert_same_bits(first.random[name], again.random[name])
    assert not torch.equal(first.random["random"], other.random["random"])
    assert torch.equal(first.faithfulness, other.faithfulness)


def test_beaten_is_the_share_of_random_circuits_below(tokenizer_folder):
    curve = curve_of(shared("gpt2", "bridge", tokenizer_folder, torch.float32))
    for name in CONTROLS:
        for number, own in enumerate(curve.faithfulness.tolist()):
            values = curve.random[name][:, number].tolist()
            below = sum(1.0 if v < own else 0.5 if v == own else 0.0 for v in values) / len(values)
            assert float(curve.beaten[name][number]) == pytest.approx(below)
    assert float(curve.beaten["random"][-1]) == 0.5  # all heads against all heads


def test_batches_and_rows_change_nothing(tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder, torch.float32)
    expected = curve_of(view)
    for options in ({"batch_size": 1}, {"batch_size": 4, "rows": 5}):
        found = curve_of(view, **options)
        assert_close(found.faithfulness, expected.faithfulness, atol=1e-5)
        assert_close(found.random["random"], expected.random["random"], atol=1e-5)


def test_the_default_fractions_are_mibs(tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder, torch.float32)
    data, baseline, scores = fitted(view, examples())
    curve = faithfulness_curve(view, scores, data, baseline, draws=1, progress=False)
    assert curve.fractions == MIB_FRACTIONS
    assert curve.sizes == (0, 0, 0, 0, 0, 0, 0, 1, 4, 8)  # of 8 heads, rounded down
    assert curve.to_dataframe()["heads"].tolist() == [1, 4, 8]  # sizes without heads left out


@pytest.mark.parametrize("metric", ["direction", "accuracy", "balanced_accuracy"])
def test_intervals_are_those_of_the_ratio_of_two_means(metric, tokenizer_folder):
    """Against each prompt measured alone."""
    view = shared("gpt2", "bridge", tokenizer_folder, torch.float32)
    data, baseline, scores = fitted(view, many())
    options = {"metric": metric, "draws": 1, "progress": False}
    curve = faithfulness_curve(view, scores, data, baseline, fractions=(0.3, 0.6, 1.0), **options)
    ranking = scores.ranking()
    sets = [ranking, (), *(ranking[:s] for s in curve.sizes), *(ranking[s:] for s in curve.sizes)]
    alone = torch.stack(
        [
            circuit_metric(view, sets, one, baseline, metric=metric, progress=False)
            for one in one_by_one(data)
        ],
        dim=1,
    )
    full, empty, own = alone[0], alone[1], alone[2:]
    index = torch.tensor([data.labels.index(item.label) for item in data])
    strata = torch.zeros_like(index) if metric == "accuracy" else index
    low, high = mean_interval(ratio_effects(own - empty, (full - empty)[None], strata), strata)
    for found, rows in (
        (curve.interval(), slice(0, 3)), (curve.completeness_interval(), slice(3, 6)),
    ):  # fmt: skip
        torch.testing.assert_close(found[0], low[rows], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1], high[rows], rtol=1e-4, atol=1e-4)
    one = circuit_faithfulness(view, scores.select(k=curve.sizes[1]), data, baseline, **options)
    assert one.interval == pytest.approx([float(t[1]) for t in curve.interval()])
    means = balanced_mean(curve.effects, curve.strata)
    torch.testing.assert_close(means, curve.faithfulness.double(), rtol=1e-5, atol=1e-5)


def test_areas_have_the_intervals_of_their_sums(tokenizer_folder):
    """The area under f is a weighted sum of f at each size, example by example."""
    view = shared("gpt2", "bridge", tokenizer_folder, torch.float32)
    data, baseline, scores = fitted(view, many())
    curve = faithfulness_curve(
        view, scores, data, baseline, fractions=(0.3, 0.6, 1.0), draws=1, progress=False
    )
    weights = torch.tensor([0.15, 0.35, 0.2], dtype=torch.float64)
    found = curve.area_intervals(0.9)
    low, high = mean_interval((weights[:, None] * curve.effects).sum(0), curve.strata, 0.9)
    assert found["cpr"] == pytest.approx((float(low), float(high)))
    sign = torch.where(curve.faithfulness > 1, 1.0, -1.0).double()
    rows = (weights * sign)[:, None] * (curve.effects - 1)
    low, high = mean_interval(rows.sum(0), curve.strata, 0.9)
    assert found["cmd"] == pytest.approx((float(low), float(high)))
    middle = (found["cmd"][0] + found["cmd"][1]) / 2
    assert middle == pytest.approx(curve.cmd, abs=1e-6)


def test_the_area_over_log_sizes_weighs_every_doubling_alike():
    f = torch.tensor([0.0, 0.5, 1.0])
    assert float(log_area((0.25, 0.5, 1.0), f)) == pytest.approx(0.5)
    assert float(log_area((0.0, 0.25, 1.0), torch.tensor([9.0, 0.2, 0.4]))) == pytest.approx(0.3)


def test_the_point_at_a_fraction_is_the_circuit_selected_by_it(tokenizer_folder):
    """Of 8 heads 0.2 is 1 and 0.45 is 3: rounding would make both one larger."""
    view = shared("gpt2", "bridge", tokenizer_folder, torch.float32)
    data, baseline, scores = fitted(view, examples())
    fractions = (0.2, 0.45, 0.6)
    curve = curve_of(view, fractions=fractions)
    for number, fraction in enumerate(fractions):
        circuit = scores.select(fraction=fraction)
        assert curve.sizes[number] == len(circuit)
        alone = circuit_faithfulness(view, circuit, data, baseline, draws=1, progress=False)
        assert float(curve.faithfulness[number]) == pytest.approx(alone.faithfulness, abs=1e-6)


# On disk and refused -------------------------------------------------------------------------------


def test_round_trip_is_bit_equal(tmp_path: Path, tokenizer_folder):
    curve = curve_of(shared("gpt2", "bridge", tokenizer_folder, torch.float32))
    loaded = FaithfulnessCurve.load(curve.save(tmp_path / "f.json"))
    for name in ("sizes", "fractions", "full", "empty", "metric", "cpr", "cmd", "provenance"):
        assert getattr(loaded, name) == getattr(curve, name)
    for name in ("faithfulness", "completeness"):
        assert_same_bits(getattr(loaded, name), getattr(curve, name))
    for name in ("random", "random_cpr", "random_cmd", "beaten"):
        assert set(getattr(loaded, name)) == set(CONTROLS)
        for control in CONTROLS:
            assert_same_bits(getattr(loaded, name)[control], getattr(curve, name)[control])
    path = tmp_path / "f.json"
    path.write_text(path.read_text().replace('"metric": "direction"', '"metric": "accuracy"'))
    with pytest.raises(ArtifactError) as caught:
        FaithfulnessCurve.load(path)
    assert str(path) in str(caught.value)


def test_accuracy_in_files_of_version_1_was_label_balanced(tmp_path: Path):
    """Version 1 wrote the label-balanced share under the name that is now the plain one."""
    body, tensors = load_artifact(
        FILES_0_3 / "run" / "faithfulness.json", format="cdt_lens.faithfulness", version=1
    )
    assert FaithfulnessCurve.load(FILES_0_3 / "run" / "faithfulness.json").metric == "direction"
    del body["version"]
    body["metric"] = body["provenance"]["options"]["metric"] = "accuracy"
    saved = {
        version: save_artifact(
            tmp_path / f"{version}.json", body, format="cdt_lens.faithfulness", version=version,
            tensors=tensors,
        )
        for version in (1, 2)
    }  # fmt: skip
    old, new = (FaithfulnessCurve.load(path) for path in saved.values())
    assert (old.metric, new.metric) == ("balanced_accuracy", "accuracy")
    assert old.provenance.options["metric"] == "balanced_accuracy"
    again = FaithfulnessCurve.load(old.save(tmp_path / "again.json"))
    assert again.metric == "balanced_accuracy"


@pytest.mark.parametrize(
    "fractions", [(), (0.5,), (0.5, 0.5), (0.5, 0.2), (-0.1, 1.0), (0.5, 1.1), (0.1, float("nan"))]
)
def test_fractions_that_are_no_curve_are_refused(fractions, tokenizer_folder):
    with pytest.raises(InputError, match="fractions"):
        curve_of(shared("gpt2", "bridge", tokenizer_folder, torch.float32), fractions=fractions)


@pytest.mark.parametrize("draws", [0, -1])
def test_without_draws_there_are_no_controls_or_a_clear_error(draws, tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder, torch.float32)
    data, baseline, scores = fitted(view, examples())
    for use in (
        lambda: curve_of(view, draws=draws).to_dataframe(),
        lambda: circuit_faithfulness(
            view, scores.select(k=1), data, baseline, draws=draws, progress=False
        ),
    ):
        try:
            use()
        except InputError as error:
            assert "draws" in str(error)
        else:
            assert draws == 0


def test_scores_of_some_heads_give_no_curve(tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder, torch.float32)
    data, baseline, _ = fitted(view, examples())
    some = score_heads(view, data, baseline, heads=[Head(0, 1)], progress=False)
    with pytest.raises(InputError, match="1 of 8 heads"):
        faithfulness_curve(view, some, data, baseline, progress=False)


def test_a_metric_that_no_head_changes_is_refused(tokenizer_folder, monkeypatch):
    view = shared("gpt2", "bridge", tokenizer_folder, torch.float32)
    data, baseline, scores = fitted(view, examples())
    monkeypatch.setattr(module, "measure_circuits", by_hand.flat_measurement(1.5))
    with pytest.raises(InputError, match="nothing to explain"):
        faithfulness_curve(view, scores, data, baseline, progress=False)
    with pytest.raises(InputError, match="nothing to explain"):
        circuit_faithfulness(view, scores.select(k=1), data, baseline, progress=False)


def test_wrong_input_is_refused(tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder, torch.float32)
    data, baseline, scores = fitted(view, examples())
    with pytest.raises(InputError, match="no examples"):
        faithfulness_curve(view, scores, data[:0], baseline, progress=False)
    for wrong, told in (
        (Circuit((Head(2, 0),), 3, 4), "n_layers=3, the model has 2"),
        (Circuit((Head(0, 0), Head(1, 2)), 2, 12), "n_heads=12, the model has 4"),
    ):
        with pytest.raises(InputError, match=told):
            circuit_faithfulness(view, wrong, data, baseline, progress=False)
    small = replace(
        scores, values=scores.values[:1], stderr=scores.stderr[:1],
        per_example=scores.per_example[:, :1],
    )  # fmt: skip
    with pytest.raises(InputError, match="4 of 8 heads"):
        faithfulness_curve(view, small, data, baseline, progress=False)


def test_a_task_whose_validation_examples_are_its_training_examples_is_warned_of(tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder, torch.float32)
    data, baseline, scores = fitted(view, examples())
    rest = split(3, 8, "tiny/rest")
    same = Task(
        name="tiny", labels=LABELS, verbalizer={}, verbalizer_ids={}, template="", train=data,
        valid=replace(data, name="tiny/valid"), test=rest, content_free=rest[:0],
    )  # fmt: skip
    for measure, what in (
        (faithfulness_curve, scores), (circuit_faithfulness, scores.select(k=2)),
    ):  # fmt: skip
        told = "tiny/valid: all 6 examples are also in tiny/train"
        with pytest.warns(CdtLensWarning, match=told):
            measure(view, what, same.valid, baseline, task=same, progress=False)


@pytest.mark.parametrize("n", [12, 24])
def test_intervals_of_f_by_accuracy_are_covered_where_no_answer_changes(n: int):
    """f is 0.9. With a width of 0 where the sample shows no change, 0.54 and 0.77 were covered."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(n, dtype=torch.long)

    def answers(share: float) -> torch.Tensor:
        return (torch.rand(n, generator=generator) < share).double()

    inside = []
    for _ in range(1000):
        full, empty = answers(0.9), answers(1 / 3)
        own = torch.where(answers(0.9) > 0, full, empty)
        effects = ratio_effects((own - empty)[None], (full - empty)[None], labels)
        gap = float((full - empty).mean())
        if gap == 0:
            continue  # refused: ablating every head changes nothing
        low, high = module.f_interval(effects, labels, "accuracy", gap, [False])
        inside.append(bool(low <= 0.9 <= high))
    assert sum(inside) / len(inside) >= 0.93
    same = torch.ones(2, n, dtype=torch.float64)
    low, high = module.f_interval(same, labels, "accuracy", 0.5, [True, False])
    assert float(low[0]) == float(high[0]) == 1 and float(low[1]) < 1 < float(high[1])
    low, high = module.f_interval(same, labels, "direction", 0.5, [True, False])
    assert low.tolist() == high.tolist() == [1, 1]


@pytest.mark.parametrize("empty", ["heads", "all"])
def test_only_f_that_is_defined_has_no_width(empty, tokenizer_folder):
    """No answer of the sample changes, which says little of other prompts."""
    view, data = shared("gpt2", "bridge", tokenizer_folder, torch.float32), many(12)
    baseline = mean_activations(view, data, mlps=True, progress=False)
    scores = score_heads(view, data, baseline, progress=False)
    made = faithfulness_curve(
        view, scores, data, baseline, fractions=(0.0, 0.1, 0.5, 1.0), empty=empty,
        draws=1, progress=False,
    )  # fmt: skip
    assert made.sizes == (0, 0, 4, 8)
    same = torch.tensor([[0.0], [0.0], [0.5], [1.0]], dtype=torch.float64).expand(4, 12)
    flat = replace(
        made, metric="accuracy", faithfulness=same[:, 0].float(), effects=same,
        without_effects=same.flip(0), full=0.9, empty=0.4,
    )  # fmt: skip
    none = empty == "heads"  # f of no heads is 0 by its definition
    low, high = flat.interval()
    assert [value == 0 for value in (high - low).tolist()] == [none, none, False, True]
    low, high = flat.completeness_interval()
    assert [value == 0 for value in (high - low).tolist()] == [True, True, False, none]
    margin = paired_share_interval(0, 0, 12, 0.95)[1] / 0.5
    share = {"cpr": 0.45, "log_area": 0.5} if none else {"cpr": 0.75, "log_area": 0.5}
    for name, weight in share.items():
        low, high = flat.area_intervals()[name]
        assert (high - low) / 2 == pytest.approx(weight * margin)


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy"])
def test_answers_that_are_alike_within_each_label_have_a_width(metric):
    """The circuit always answers the first label, the empty run always the second."""
    labels = torch.tensor([0, 1] * 10)
    strata = torch.zeros_like(labels) if metric == "accuracy" else labels
    full, own, empty = torch.ones(20).double(), (labels == 0).double(), (labels == 1).double()
    effects = ratio_effects((own - empty)[None], (full - empty)[None], strata)
    low, high = module.f_interval(effects, strata, metric, 0.5, [False])
    assert float(high - low) > 0.5
