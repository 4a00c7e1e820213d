"""Scores against the clock: what is counted, what is kept, and what a kill leaves."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import split_words
from helpers.checks import assert_same_bits
from helpers.shared import shared
from helpers.tiny_tasks import examples, many

from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.comparing import timed_scores as module
from cdt_lens.comparing.timed_scores import TimedScorer
from cdt_lens.core.errors import InputError, NonFiniteError, UnsupportedModelError
from cdt_lens.decomposition.baseline import Baseline, mean_activations, zero_baseline
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.methods import score_by
from cdt_lens.scoring.sweep import _Sweep

Scoring = Callable[..., HeadScores]


def setting(folder: str) -> tuple[ModelView, Baseline]:
    view = shared("gpt2", "bridge", folder, torch.float32)
    return view, mean_activations(view, examples(), progress=False)


def scorer(setting: tuple[ModelView, Baseline], folder: Path | None = None, **more: Any) -> Any:
    view, baseline = setting
    options = {"data": examples(), "said": [], "batch_size": 2, "progress": False, **more}
    data, said = options.pop("data"), options.pop("said")
    baseline = options.pop("baseline", baseline)
    return TimedScorer(view, data, baseline, folder, said.append, **options)


def counting(monkeypatch: pytest.MonkeyPatch, then: Scoring = score_by) -> list[str]:
    """The methods that are really run, and `then` in place of running them."""
    seen: list[str] = []

    def score(method: str, *args: Any, **kwargs: Any) -> HeadScores:
        seen.append(method)
        return then(method, *args, **kwargs)

    monkeypatch.setattr(module, "score_by", score)
    return seen


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass before a method and one after it, where time does not matter."""
    monkeypatch.setattr(module, "_PASSES", 1)
    monkeypatch.setattr(module, "_REPEATS", 1)


class Clock:
    """Time that passes only in a forward pass, and in a method."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, one_pass: float) -> None:
        self.now = 0.0
        true = ModelView.run

        def run(view: ModelView, *args: Any, **kwargs: Any) -> Any:
            self.now += one_pass / 3  # six examples in batches of two
            return true(view, *args, **kwargs)

        monkeypatch.setattr(ModelView, "run", run)
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)


@pytest.mark.usefixtures("hurried")
def test_the_scores_are_the_methods(tokenizer_folder):
    place = setting(tokenizer_folder)
    found = scorer(place).score("cdt:stable")
    expected = score_by("cdt:stable", place[0], examples(), place[1], batch_size=2, progress=False)
    assert_same_bits(found.scores.values, expected.values)
    assert found.seconds > 0 and found.passes > 0 and found.refused is None


@pytest.mark.parametrize(
    ("one_pass", "cost", "runs"), [(0.5, 12.0, 1), (0.5, 3.0, 5), (5.0, 12.0, 1)]
)
def test_time_is_told_in_plain_passes(one_pass, cost, runs, monkeypatch, tokenizer_folder):
    """A method of less than twenty passes and ten seconds is timed five times."""
    place = setting(tokenizer_folder)
    scores = score_by("direct", place[0], examples(), place[1], progress=False)
    clock = Clock(monkeypatch, one_pass)

    def work(*_: Any, **__: Any) -> HeadScores:
        clock.now += cost
        return scores

    seen = counting(monkeypatch, work)
    found = scorer(place).score("direct")
    assert found.seconds == pytest.approx(cost)
    assert found.passes == pytest.approx(cost / one_pass)
    assert len(seen) == runs


def test_a_slow_first_run_of_a_short_method_is_not_its_time(monkeypatch, tokenizer_folder):
    place = setting(tokenizer_folder)
    scores = score_by("direct", place[0], examples(), place[1], progress=False)
    clock, costs = Clock(monkeypatch, one_pass=0.5), iter([9.0, 2.0, 1.0, 2.0, 2.0])

    def work(*_: Any, **__: Any) -> HeadScores:
        clock.now += next(costs)
        return scores

    counting(monkeypatch, work)
    assert scorer(place).score("direct").passes == pytest.approx(4.0)


@pytest.mark.usefixtures("hurried")
def test_a_finished_method_is_not_made_again(monkeypatch, tmp_path, tokenizer_folder):
    place = setting(tokenizer_folder)
    first = scorer(place, tmp_path).score("cdt:stable")
    assert HeadScores.load(tmp_path / "scores-cdt_stable.json").method == "cdt:stable"
    assert not list(tmp_path.glob("*partial*"))
    seen = counting(monkeypatch)
    again = scorer(place, tmp_path).score("cdt:stable")
    assert seen == []
    assert_same_bits(again.scores.values, first.scores.values)
    assert (again.seconds, again.passes) == (first.seconds, first.passes)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("changed", ["seed", "data", "baseline", "file", "nothing left"])
def test_what_was_made_from_something_else_is_made_again(
    changed, monkeypatch, tmp_path, tokenizer_folder
):
    place = setting(tokenizer_folder)
    scorer(place, tmp_path).score("direct")
    path = tmp_path / "scores-direct.json"
    more: dict[str, Any] = {"said": []}
    if changed == "seed":
        more["seed"] = 1
    elif changed == "data":
        more["data"] = many()
    elif changed == "baseline":
        more["baseline"] = zero_baseline(place[0], examples())
    elif changed == "file":
        path.write_text(path.read_text("utf-8")[:100], "utf-8")
    else:
        path.unlink()
    said, seen = more["said"], counting(monkeypatch)
    found = scorer(place, tmp_path, **more).score("direct")
    assert seen == ["direct"]
    assert any("again" in line for line in said)
    assert HeadScores.load(path).values.equal(found.scores.values)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("method", ["expected-gradients", "random"])
def test_scores_of_another_seed_without_their_time_are_made_again(
    method, monkeypatch, tmp_path, tokenizer_folder
):
    """A kill between the two files of seed 1 in the folder of seed 0."""
    place = setting(tokenizer_folder)
    first = scorer(place, tmp_path / "0", seed=0).score(method)
    scorer(place, tmp_path / "1", seed=1).score(method)
    for path in (tmp_path / "1").glob("scores-*"):
        shutil.copy(path, tmp_path / "0" / path.name)
    seen = counting(monkeypatch)
    again = scorer(place, tmp_path / "0", seed=0).score(method)
    assert seen == [method]
    assert_same_bits(again.scores.values, first.scores.values)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("error", [NonFiniteError, UnsupportedModelError])
def test_a_refusal_is_kept_with_its_words(error, monkeypatch, tmp_path, tokenizer_folder):
    place = setting(tokenizer_folder)

    def refuse(*_: Any, **__: Any) -> HeadScores:
        raise error("3 of 8 heads: use other rules")

    seen = counting(monkeypatch, refuse)
    said: list[str] = []
    for _ in range(2):
        found = scorer(place, tmp_path, said=said).score("cdt:linear")
        assert found.scores is None and found.refused == "3 of 8 heads: use other rules"
        assert math.isnan(found.seconds) and math.isnan(found.passes)
    assert seen == ["cdt:linear"]
    assert "was refused before" in said[-1] and "3 of 8 heads" in said[-1]


@pytest.mark.usefixtures("hurried")
def test_heads_without_a_score_are_a_refusal(monkeypatch, tokenizer_folder):
    place = setting(tokenizer_folder)
    scores = score_by("direct", place[0], examples(), place[1], progress=False)
    holed = scores.values.clone()
    holed[1, 2] = math.nan
    counting(monkeypatch, lambda *_, **__: replace(scores, values=holed))
    assert "only 7 of 8 heads" in scorer(place).score("direct").refused


@pytest.mark.usefixtures("hurried")
def test_a_sweep_that_was_cut_off_goes_on_and_its_time_is_not_known(
    monkeypatch, tmp_path, tokenizer_folder
):
    place = setting(tokenizer_folder)
    whole = scorer(place).score("cdt:stable").scores
    true, batches = _Sweep._batch, []

    def interrupted(self: Any, batch: Any, bar: Any) -> Any:
        batches.append(batch.index)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return true(self, batch, bar)

    monkeypatch.setattr(_Sweep, "_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scorer(place, tmp_path).score("cdt:stable")
    assert list(tmp_path.glob("scores-cdt_stable.partial*"))
    said: list[str] = []
    found = scorer(place, tmp_path, said=said).score("cdt:stable")
    # The first batch was kept; the second is run again, and the third.
    assert batches[2:] == [batches[1], *batches[3:]] and len(batches) == 4
    assert_same_bits(found.scores.values, whole.values)
    assert math.isnan(found.seconds) and math.isnan(found.passes)
    assert any("its time will not be known" in line for line in said)
    assert not list(tmp_path.glob("*partial*"))
    again = scorer(place, tmp_path).score("cdt:stable")
    assert math.isnan(again.seconds)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("method", ["direct", "random"])
def test_scores_that_a_kill_left_beside_an_older_time_are_not_taken(
    method, monkeypatch, tmp_path, tokenizer_folder
):
    """The two files of a method are two renames: a kill may fall between them."""
    place = setting(tokenizer_folder)
    first = scorer(place, tmp_path).score(method)
    other: dict[str, Any] = {"seed": 5}
    if method == "direct":
        other = {"baseline": zero_baseline(place[0], examples())}
    strange = scorer(place, **other).score(method).scores
    assert not strange.values.equal(first.scores.values)
    strange.save(tmp_path / f"scores-{method}.json")
    seen = counting(monkeypatch)
    again = scorer(place, tmp_path).score(method)
    assert seen == [method]
    assert_same_bits(again.scores.values, first.scores.values)


@pytest.mark.usefixtures("hurried")
def test_a_time_taken_under_other_settings_is_not_told(monkeypatch, tmp_path, tokenizer_folder):
    place = setting(tokenizer_folder)
    first, said = scorer(place, tmp_path).score("direct"), []
    seen = counting(monkeypatch)
    again = scorer(place, tmp_path, batch_size=3, said=said).score("direct")
    assert seen == [] and "timed under other settings" in said[-1]
    assert_same_bits(again.scores.values, first.scores.values)
    assert math.isnan(again.seconds) and math.isnan(again.passes)
    assert scorer(place, tmp_path).score("direct").passes == first.passes


def test_a_method_without_a_meaning_for_split_words_is_refused(
    tokenizer_folder, hurried, monkeypatch
):
    """And any other mistake in the input stays an error."""

    def a_mistake(*_: Any, **__: Any) -> HeadScores:
        raise InputError("scores.partial.json: a checkpoint of another run")

    data, said = split_words.examples(), []
    own = scorer(setting(tokenizer_folder), data=data, said=said)
    refused = own.score("direct")
    assert refused.scores is None and "needs answers of one token each" in refused.refused
    assert said[-1].startswith("direct is refused: tiny/train:")
    assert own.score("attribution-patching").scores is not None
    seen = counting(monkeypatch, a_mistake)
    with pytest.raises(InputError, match="a checkpoint of another run"):
        own.score("cdt:linear")
    assert seen == ["cdt:linear"]
    empty = scorer(setting(tokenizer_folder), data=examples()[:0])
    with pytest.raises(InputError, match="no examples"):
        empty.score("direct")
