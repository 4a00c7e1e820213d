"""Comparing methods: every number is what the functions behind it give, a kill loses no method."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import by_hand
from helpers.shared import shared
from helpers.tiny_tasks import examples, many
from scipy import stats

from cdt_lens.circuits.faithfulness import faithfulness_curve
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.circuits.measures import MIB_FRACTIONS
from cdt_lens.comparing import (
    measured_circuits as circuits_module,
    timed_scores as scores_module,
)
from cdt_lens.comparing.compare import checked_methods, compare_methods
from cdt_lens.comparing.comparison import Comparison, PlantedComparison
from cdt_lens.core.errors import InputError, NonFiniteError
from cdt_lens.decomposition.baseline import Baseline, mean_activations
from cdt_lens.experiments import compare as experiments
from cdt_lens.experiments.compare import checked_circuits, compare_planted
from cdt_lens.models.view import ModelView
from cdt_lens.planted.catalogue import PLANTED
from cdt_lens.scoring.agreement import auroc, average_precision, compare_scores
from cdt_lens.scoring.methods import METHODS, score_by

FRACTIONS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
METHOD_NAMES = ("cdt:stable", "direct", "random")
TRUTH = torch.zeros(2, 4, dtype=torch.bool)
TRUTH[0, 1] = TRUTH[1, 2] = True


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass before a method and one after it: time is the matter of test_timed_scores."""
    monkeypatch.setattr(scores_module, "_PASSES", 1)
    monkeypatch.setattr(scores_module, "_REPEATS", 1)


def setting(folder: str) -> tuple[ModelView, Baseline]:
    view = shared("gpt2", "bridge", folder, torch.float32)
    return view, mean_activations(view, examples(), progress=False)


def compared(tokenizer: str, methods: Any = METHOD_NAMES, **more: Any) -> Comparison:
    view, baseline = setting(tokenizer)
    options = {"fractions": FRACTIONS, "draws": 3, "progress": False, **more}
    train, valid = options.pop("train", examples()), options.pop("valid", many())
    return compare_methods(view, train, valid, baseline, methods, **options)


def test_every_number_is_that_of_the_function_behind_it(tokenizer_folder):
    view, baseline = setting(tokenizer_folder)
    result = compared(tokenizer_folder, truth=TRUTH, seed=4)
    assert result.names == ("exact", *METHOD_NAMES)  # the yardstick always runs
    assert (result.scored, result.held_out) == (6, 24)
    exact = score_by("exact", view, examples(), baseline, progress=False)
    assert result.direction == pytest.approx(exact.direction, abs=1e-6)
    for each in result.methods:
        assert each.description == METHODS[each.method].description
        scores = score_by(each.method, view, examples(), baseline, seed=4, progress=False)
        found = compare_scores(scores, exact)
        assert each.spearman == pytest.approx(found.spearman, abs=1e-6)
        assert each.pearson == pytest.approx(found.pearson, abs=1e-5)
        assert each.auroc == pytest.approx(auroc(scores.values.abs(), TRUTH))
        precision = average_precision(scores.values.abs(), TRUTH)
        assert each.average_precision == pytest.approx(precision)
        assert each.seconds > 0 and each.forward_passes > 0
        for by in ("signed", "magnitude"):
            expected = faithfulness_curve(
                view, scores, many(), baseline, by=by, fractions=FRACTIONS, draws=3, seed=4,
                progress=False,
            )  # fmt: skip
            curve = each.curve(by)
            assert curve.f == pytest.approx(expected.faithfulness.tolist(), abs=1e-4)
            assert curve.cpr == pytest.approx(expected.cpr, abs=1e-4)
            assert curve.cmd == pytest.approx(expected.cmd, abs=1e-4)
    assert result["exact"].spearman == pytest.approx(1)
    assert result.sizes == expected.sizes
    assert (result.full, result.empty) == pytest.approx((expected.full, expected.empty), abs=1e-5)
    areas = [curve.cpr for curve in result.random]
    assert areas == pytest.approx(expected.random_cpr["random"].tolist(), abs=1e-4)


def test_at_equal_cost_a_method_scores_what_it_pays_for(tmp_path, tokenizer_folder):
    """The counts are those of `test_budget`; the scores are those of the drawn examples."""
    names = ("cdt:two-ended", "estimate:two-ended", "direct")
    place = {"folder": tmp_path, "train": many(), "valid": examples()}
    result = compared(tokenizer_folder, names, budget=91, seed=3, **place)
    assert result.budget == 91 and result.scored == 24
    assert result.provenance.options["budget"] == 91
    found = {each.method: (each.scored, each.exact) for each in result.methods}
    assert found == {
        "exact": (13, None), "cdt:two-ended": (7, None), "estimate:two-ended": (12, 3),
        "direct": (24, None),
    }  # fmt: skip
    scores = {
        name: HeadScores.load(tmp_path / f"scores-{name.replace(':', '_')}.json") for name in found
    }
    assert {name: len(own.example_labels) for name, own in scores.items()} == {
        "exact": 13, "cdt:two-ended": 7, "estimate:two-ended": 12, "direct": 24,
    }  # fmt: skip
    assert scores["estimate:two-ended"].provenance.options["exact"] == 3
    assert result.direction == scores["exact"].direction
    # Another budget makes only those scores again that it changes.
    said: list[str] = []
    more = compared(tokenizer_folder, names, budget=98, seed=3, say=said.append, **place)
    assert (more["exact"].scored, more["estimate:two-ended"].exact) == (14, 3)
    assert [line for line in said if line.startswith("scores: ")] == [
        "scores: exact", "scores: estimate:two-ended",
    ]  # fmt: skip
    compared(tokenizer_folder, names, budget=400, seed=3, say=said.append, **place)
    said.clear()
    whole = compared(tokenizer_folder, names, seed=3, say=said.append, **place)
    assert whole["estimate:two-ended"].exact == 15  # a sample, whatever the size of the model
    assert [line for line in said if line.startswith("scores: ")] == ["scores: estimate:two-ended"]


def by_hand_effects(view: ModelView, baseline: Baseline, ranking: Any) -> np.ndarray:
    """f of each size of FRACTIONS and what each example adds to it, from hooks and numpy alone."""
    heads = [*ranking]
    complements = [heads[int(share * 8) :] for share in FRACTIONS]
    rows = []
    for item in many():
        logits = by_hand.ablated_logits(view, item, [*complements, heads], baseline)
        rows.append([by_hand.direction(row, item) for row in logits])
    values = np.array(rows).T
    own, gap = values[:-1] - values[-1], values[-2] - values[-1]

    def mean(x: np.ndarray) -> np.ndarray:
        labels = np.array([item.label for item in many()])
        return np.mean([x[..., labels == label].mean(-1) for label in set(labels)], axis=0)

    f = mean(own) / mean(gap)
    return f[:, None] + (own - f[:, None] * gap) / mean(gap)


def test_differences_are_paired_over_the_held_out_prompts(tokenizer_folder):
    view, baseline = setting(tokenizer_folder)
    result = compared(tokenizer_folder, ["direct"])
    effects = [
        by_hand_effects(
            view, baseline, score_by(name, view, examples(), baseline, progress=False).ranking()
        )
        for name in ("direct", "exact")
    ]
    steps = np.log([0.25 / 0.125, 2, 1.5, 1 / 0.75])  # from the first head on
    areas = [((e[1:-1] + e[2:]) / 2 * steps[:, None]).sum(0) / steps.sum() for e in effects]
    labels = np.array([item.label for item in many()])
    groups = [(areas[0] - areas[1])[labels == label] for label in many().labels]
    middle = np.mean([group.mean() for group in groups])
    parts = [group.var(ddof=1) / len(group) / 9 for group in groups]
    freedom = sum(parts) ** 2 / sum(p**2 / (len(g) - 1) for p, g in zip(parts, groups, strict=True))
    margin = stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts))

    (row,) = result.differences(reference="exact").to_dict("records")
    assert (row["method"], row["reference"]) == ("direct", "exact")
    limits = row["difference"], row["low"], row["high"]
    assert limits == pytest.approx((middle, middle - margin, middle + margin), abs=1e-4)
    assert row["real"] == (abs(middle) > margin)
    (other,) = result.differences("cpr", reference="direct").to_dict("records")
    assert other["difference"] == pytest.approx(
        result["exact"].signed.cpr - result["direct"].signed.cpr
    )
    # The interval of one ranking is of the same values.
    first = result.faithfulness().set_index(["method", "by", "heads"]).loc["direct", "signed", 1]
    values = [effects[0][1][labels == label] for label in many().labels]
    assert first["f"] == pytest.approx(np.mean([group.mean() for group in values]), abs=1e-4)
    width = 2 * math.sqrt(sum(group.var(ddof=1) / len(group) / 9 for group in values))
    assert (first["high"] - first["low"]) / width == pytest.approx(2.1, abs=0.15)  # a t quantile


def test_rounding_does_not_find_a_planted_head(monkeypatch, tokenizer_folder):
    """Heads that do nothing have scores of 1e-6, not 0: their order must not count."""
    true = scores_module.score_by

    def score(*args: Any, **kwargs: Any) -> HeadScores:
        scores = true(*args, **kwargs)
        values = torch.full((2, 4), 1e-6)
        values[0, 1], values[1, 0] = 2e-6, 3.0
        return replace(scores, values=values)

    monkeypatch.setattr(scores_module, "score_by", score)
    found = compared(tokenizer_folder, ["exact"], truth=TRUTH)["exact"]
    # One head in front, wrongly; the planted two are tied with the five others.
    assert found.auroc == pytest.approx((5 * 0.5 + 0) / 6)
    assert found.average_precision == pytest.approx(2 / 8)


def test_without_a_truth_none_is_told(tokenizer_folder):
    result = compared(tokenizer_folder, ["exact"], fractions=MIB_FRACTIONS)
    assert math.isnan(result["exact"].auroc) and math.isnan(result["exact"].average_precision)
    assert result.sizes == (0, 0, 0, 0, 0, 0, 0, 1, 4, 8)
    options = result.provenance.options
    assert options["held_out_hash"] == many().hash and options["methods"] == ["exact"]
    assert result.provenance.task_hash == examples().hash


def test_a_killed_comparison_goes_on_without_making_anything_twice(
    monkeypatch, tmp_path, tokenizer_folder
):
    whole = compared(tokenizer_folder)
    scored: list[str] = []
    measured: list[Any] = []
    kills = ["direct", "a circuit"]
    true_score, true_measure = scores_module.score_by, circuits_module.measure_circuits

    def score(method: str, *args: Any, **kwargs: Any) -> HeadScores:
        if method in kills:
            kills.remove(method)
            raise KeyboardInterrupt
        scored.append(method)
        return true_score(method, *args, **kwargs)

    def measure(view: Any, circuits: Any, *args: Any, **kwargs: Any) -> Any:
        # All heads and none come first, then the circuits of the first method.
        if len(measured) > 2 and "a circuit" in kills:
            kills.remove("a circuit")
            raise KeyboardInterrupt
        measured.extend(circuits)
        return true_measure(view, circuits, *args, **kwargs)

    monkeypatch.setattr(scores_module, "score_by", score)
    monkeypatch.setattr(circuits_module, "measure_circuits", measure)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compared(tokenizer_folder, folder=tmp_path)
    assert not kills
    found = compared(tokenizer_folder, folder=tmp_path)
    assert scored == ["exact", *METHOD_NAMES]
    assert len(measured) == len(set(measured))
    for one, other in zip(whole.methods, found.methods, strict=True):
        assert one.method == other.method and one.spearman == other.spearman
        assert one.signed.f == pytest.approx(other.signed.f, abs=1e-5)
        assert one.magnitude.f == pytest.approx(other.magnitude.f, abs=1e-5)
        assert other.seconds > 0 and other.forward_passes > 0
    scored.clear(), measured.clear()
    again = compared(tokenizer_folder, folder=tmp_path)
    assert scored == [] and measured == []
    assert again.to_dataframe().equals(found.to_dataframe())
    more = compared(tokenizer_folder, [*METHOD_NAMES, "attribution-patching"], folder=tmp_path)
    assert scored == ["attribution-patching"] and len(more.methods) == 5


def test_a_refused_method_keeps_its_row(monkeypatch, tokenizer_folder):
    true = scores_module.score_by

    def score(method: str, *args: Any, **kwargs: Any) -> HeadScores:
        if method == "direct":
            raise NonFiniteError("direct: two heads left the finite range")
        return true(method, *args, **kwargs)

    monkeypatch.setattr(scores_module, "score_by", score)
    result = compared(tokenizer_folder)
    assert result["direct"].refused == "direct: two heads left the finite range"
    assert result["direct"].signed is None and math.isnan(result["direct"].spearman)
    assert result["random"].signed is not None
    assert "direct (refused)" in result.table()["method"].tolist()


def test_without_the_yardstick_there_is_no_comparison(monkeypatch, tokenizer_folder):
    asked = []

    def score(method: str, *_: Any, **__: Any) -> HeadScores:
        asked.append(method)
        raise NonFiniteError("L3H1 left the finite range")

    monkeypatch.setattr(scores_module, "score_by", score)
    with pytest.raises(NonFiniteError, match="yardstick.*L3H1"):
        compared(tokenizer_folder)
    assert set(asked) == {"exact"}  # No other method runs in vain.


def mistakes() -> dict[str, tuple[dict[str, Any], str]]:
    return {
        "unknown": (
            {"methods": ["cdt:stabel"]},
            "'cdt:stabel': unknown; did you mean 'cdt:stable'",
        ),
        "no methods": ({"methods": []}, "expected any of exact, "),
        "no held-out": ({"valid": many()[:0]}, "no held-out examples.*validation split"),
        "nothing to score": ({"train": examples()[:0]}, "no examples"),
        "the same twice": ({"valid": examples()}, "all among the scored ones"),
        "the same in another order": ({"valid": examples()[::-1]}, "all among the scored ones"),
        "a part of them": ({"valid": examples()[:3]}, "all among the scored ones"),
        "no draws": ({"draws": 0}, "draws=0"),
        "no budget": ({"budget": 0}, "budget=0"),
        "budget": ({"budget": 20}, "budget=20: too small for exact, which needs 21 "),
        "fractions": ({"fractions": (0.5, 0.2)}, "fractions"),
        "truth of another shape": ({"truth": TRUTH[:1]}, r"of \(1, 4\); expected some, not all"),
        "all true": ({"truth": TRUTH | True}, "8 heads of"),
        "none true": ({"truth": TRUTH & False}, "0 heads of"),
        "no mask": ({"truth": TRUTH * 0.5}, "True and False, or 1 and 0"),
        "no numbers": ({"truth": "L0H1"}, "truth: expected an array"),
    }


@pytest.mark.parametrize("mistake", list(mistakes()))
def test_a_mistake_is_refused_before_anything_runs(
    mistake, monkeypatch, tmp_path, tokenizer_folder
):
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("ran")

    view, baseline = setting(tokenizer_folder)
    monkeypatch.setattr(scores_module, "score_by", never)
    monkeypatch.setattr(circuits_module, "measure_circuits", never)
    more, told = mistakes()[mistake]
    options = {"methods": METHOD_NAMES, "train": examples(), "valid": many(), **more}
    args = options.pop("train"), options.pop("valid"), baseline, options.pop("methods")
    with pytest.raises(InputError, match=told):
        compare_methods(view, *args, folder=tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


def test_heads_that_do_nothing_are_refused_before_the_first_sweep(monkeypatch, tokenizer_folder):
    monkeypatch.setattr(circuits_module, "measure_circuits", by_hand.flat_measurement(0.5))
    monkeypatch.setattr(scores_module, "score_by", None)
    with pytest.raises(InputError, match="nothing to explain"):
        compared(tokenizer_folder)


def test_names_of_methods_and_circuits():
    assert checked_methods(["direct", "exact", "direct"]) == ("exact", "direct")
    assert checked_methods(["cdt:norm=through"]) == ("exact", "cdt:norm=through")
    first, second = list(PLANTED)[:2]
    assert checked_circuits([second, first, second]) == (second, first)
    with pytest.raises(InputError, match=f"did you mean {first!r}"):
        checked_circuits([f"{first}x"])
    with pytest.raises(InputError, match="got none"):
        checked_circuits([])


def test_planted_circuits_are_judged_by_their_truth(tmp_path: Path, monkeypatch):
    built: list[str] = []
    true = experiments.planted_circuit

    def planted(name: str, **options: Any) -> Any:
        built.append(name)
        return true(name, **options)

    monkeypatch.setattr(experiments, "planted_circuit", planted)
    names = [name for name in PLANTED if name.startswith("hand-")][:2]
    options = {"folder": tmp_path, "backend": "bridge", "draws": 2, "progress": False}
    result = compare_planted(names, ["cdt:stable"], **options)
    assert built == names == list(result.circuits)
    for name in names:
        circuit, found = true(name, backend="bridge"), result.circuits[name]
        total = circuit.truth.numel()
        assert found.sizes == tuple(range(total + 1))
        scores = HeadScores.load(tmp_path / name / "scores-cdt_stable.json")
        expected = auroc(scores.values.abs(), circuit.truth)
        assert found["cdt:stable"].auroc == pytest.approx(expected)
        assert result.why[name] == circuit.why
    loaded = PlantedComparison.load(tmp_path / "comparison.json")
    assert loaded.matrix("auroc").equals(result.matrix("auroc"))
    with open(tmp_path / "comparison.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["circuit"], row["method"]) for row in rows] == [
        (name, method) for name in names for method in ("exact", "cdt:stable")
    ]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert all(name in page for name in names)


def test_batches_and_rows_change_nothing(tokenizer_folder):
    one = compared(tokenizer_folder, ["direct"])
    other = compared(tokenizer_folder, ["direct"], batch_size=4, rows=5)
    for a, b in zip(one.methods, other.methods, strict=True):
        assert a.signed.f == pytest.approx(b.signed.f, abs=1e-4)
    assert replace(one, random=()).table().shape == (2, 11)


def test_a_truth_may_be_of_ones_and_zeros(tokenizer_folder):
    expected = compared(tokenizer_folder, truth=TRUTH)["cdt:stable"]
    for truth in (TRUTH.long(), TRUTH.float(), TRUTH.numpy(), TRUTH.tolist()):
        found = compared(tokenizer_folder, truth=truth)["cdt:stable"]
        assert (found.auroc, found.average_precision) == (
            expected.auroc, expected.average_precision,
        )  # fmt: skip


def test_held_out_prompts_that_were_scored_too_are_told(tokenizer_folder):
    said: list[str] = []
    both = replace(many(), items=(*many().items, *examples().items[:2]))
    result = compared(tokenizer_folder, ["direct"], valid=both, say=said.append)
    assert "2 of the 26 held-out prompts are among the scored ones too" in said
    assert result.provenance.options["held_out_scored"] == 2


def test_what_hooks_of_the_callers_do_is_not_kept_in_a_folder(tmp_path, tokenizer_folder):
    """The plain model's numbers would come back for the edited one."""
    view, baseline = setting(tokenizer_folder)

    def silence(value: torch.Tensor, hook: Any = None) -> torch.Tensor:
        return value * 0

    arguments = (view.tl, examples(), many(), baseline, ["random"])
    with view.tl.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", silence)]):
        with pytest.raises(InputError, match="hooks of your own .*leave folder out"):
            compare_methods(*arguments, folder=tmp_path / "out", progress=False)
        edited = compare_methods(*arguments, progress=False)
    assert not (tmp_path / "out").exists()
    assert edited.full != compare_methods(*arguments, progress=False).full
