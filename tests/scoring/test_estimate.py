"""Scores by a sweep of a sample: equal to the sweep where they must be, refused where they cannot.

That the estimator is unbiased and its intervals cover is in circuits/test_sampled.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.checks import assert_close, assert_same_bits, unchecked_types
from helpers.sample_results import provenance
from helpers.shared import models, shared
from helpers.terminal import Terminal
from helpers.tiny_tasks import LABELS, examples

from cdt_lens.circuits.head_scores import HeadScores, combined, label_index
from cdt_lens.circuits.reliability import membership, reliability
from cdt_lens.core.errors import InputError
from cdt_lens.core.passes import Passes
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.decomposition.gated_pass import GatedPass
from cdt_lens.models.heads import all_heads
from cdt_lens.models.view import ModelView
from cdt_lens.scoring import estimate, sweep
from cdt_lens.scoring.estimate import good_enough
from cdt_lens.scoring.one_pass import one_pass
from cdt_lens.scoring.sweep import score_heads
from cdt_lens.tasks.metrics import balanced_mean
from cdt_lens.tasks.task import Example, Examples

COUNTS = (14, 9, 7)


def data() -> Examples:
    gold = [label for label, n in zip(LABELS, COUNTS, strict=True) for _ in range(n)]
    lengths = torch.randint(4, 9, (len(gold),), generator=torch.Generator().manual_seed(5))
    return examples(lengths.tolist(), gold, seed=3)


def of_labels(n: int) -> Examples:
    """Two prompts of each of n labels."""
    generator = torch.Generator().manual_seed(0)
    names, words = tuple(f"l{i}" for i in range(n)), range(40, 40 + n)
    items = tuple(
        Example(
            f"p{i}", tuple(torch.randint(3, 128, (5,), generator=generator).tolist()), names[i % n],
            (words[i % n],), tuple(word for word in words if word != words[i % n]),
        )
        for i in range(2 * n)
    )  # fmt: skip
    return Examples(items, names, "many labels")


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        (20, {}),
        (33, {"decide": {"k": 2}}),
        (20, {"minutes": 1e-9}),
        (3, {"minutes": 1e-9, "batch_size": 1}),
        (3, {"precision": 100.0, "batch_size": 2}),
    ],
)
def test_each_round_holds_every_label_twice(labels, options, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(estimate, "_SMALL", 0.0)  # as for a larger model
    view, data = shared("llama", "bridge", tokenizer_folder, torch.float32), of_labels(labels)
    baseline = mean_activations(view, data, progress=False)
    found = score_heads(view, data, baseline, progress=False, **options)
    assert len(found.ranking()) == 8 and found.has_intervals
    swept = (~found.corrections[0].isnan()).flatten(1).any(1) if found.corrections else None
    own = [label for i, label in enumerate(found.example_labels) if swept is None or swept[i]]
    assert {own.count(label) for label in set(found.example_labels)} == {2}


def score(view: ModelView, **options: Any) -> HeadScores:
    baseline = mean_activations(view, data(), progress=False)
    return score_heads(view, data(), baseline, progress=False, **options)


@models(("gpt2", "llama", "gemma2"))
@pytest.mark.parametrize(
    ("rules", "slopes", "steps"),
    [
        ("two-ended", "gradient", "ends"),
        ("ablation", "gradient", None),
        ("stable", "stable", None),
        ("shared", "shared", None),
        ("linear", "linear", None),
    ],
)
def test_it_is_the_first_order_mean_plus_the_mean_correction_of_the_sample(
    family, backend, rules, slopes, steps, tokenizer_folder
):
    """By hand, from the whole sweep of each end and the first-order scores of all prompts."""
    view = shared(family, backend, tokenizer_folder, torch.float32)
    baseline = mean_activations(view, data(), progress=False)
    found = score(view, rules=rules, exact=12)
    first = one_pass(view, data(), baseline, slopes=slopes, steps=steps, progress=False)
    assert_close(found.cheap, first.per_example, atol=1e-5)
    index, parts = label_index(found.example_labels), [balanced_mean(*by_label(first.per_example))]
    for part in found.corrections:
        swept = ~torch.isnan(part).flatten(1).any(1)
        parts.append(balanced_mean(part[swept].permute(1, 2, 0), index[swept]))
    assert_close(found.values, sum(parts), atol=1e-5)
    whole = score(view, rules=rules, exact="all")
    both = torch.stack([~torch.isnan(part).flatten(1).any(1) for part in found.corrections]).all(0)
    assert int(both.sum()) >= 6
    assert_close(found.per_example[both], whole.per_example[both], atol=1e-5)
    assert found.direction == pytest.approx(whole.direction, abs=1e-5)


def by_label(per_example: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    labels = label_index([example.label for example in data()])
    return per_example.permute(1, 2, 0), labels


def test_first_order_scores_at_both_ends_take_no_further_pass(tokenizer_folder, monkeypatch):
    """The pass at the plain model gives its direction, as `Method.cost` counts."""
    view = shared("llama", "bridge", tokenizer_folder, torch.float32)

    def further(*_: object) -> None:
        raise AssertionError("a pass that the cost does not count")

    monkeypatch.setattr(GatedPass, "_plain_logits", further)
    assert score(view, rules="two-ended", exact=12).cheap is not None


def test_a_sample_of_all_prompts_is_the_sweep(tokenizer_folder):
    view = shared("llama", "bridge", tokenizer_folder, torch.float32)
    whole = score(view, exact="all")
    for exact in (len(data()), 1000):
        found = score(view, exact=exact)
        assert found.cheap is None
        for name in ("values", "stderr", "per_example"):
            assert_same_bits(getattr(found, name), getattr(whole, name))


def test_the_sample_holds_the_labels_alike_and_depends_on_the_seed(tokenizer_folder):
    view = shared("llama", "bridge", tokenizer_folder, torch.float32)

    def swept(seed: int) -> list[bool]:
        return (~torch.isnan(score(view, exact=9, seed=seed).corrections[0][:, 0, 0])).tolist()

    drawn = swept(0)
    labels = [example.label for example, inside in zip(data(), drawn, strict=True) if inside]
    assert sorted(labels) == sorted(LABELS * 3)
    assert drawn == swept(0) != swept(1)


@pytest.mark.parametrize("exact", [1, 2])
def test_a_sample_without_each_label_is_refused_with_the_least_that_works(exact, tokenizer_folder):
    view = shared("llama", "bridge", tokenizer_folder, torch.float32)
    with pytest.raises(InputError, match=f"exact={exact}: expected at least 3"):
        score(view, exact=exact)


@pytest.mark.parametrize("option", [{"exact": 4}, {"precision": 0.1}, {"decide": {"k": 2}}])
def test_rules_without_a_first_order_form_take_no_sample(option, tokenizer_folder):
    view = shared("llama", "bridge", tokenizer_folder, torch.float32)
    with pytest.raises(InputError, match="no first-order form"):
        score(view, rules="official", **option)


def test_a_precision_ends_the_sweep_when_it_is_reached(tokenizer_folder):
    view = shared("llama", "bridge", tokenizer_folder, torch.float32)
    found = [score(view, precision=share, batch_size=6) for share in (100.0, 1e-9)]
    swept = [int((~torch.isnan(each.corrections[0][:, 0, 0])).sum()) for each in found]
    assert swept == [6, len(data())]


@pytest.mark.parametrize(("minutes", "rounds"), [(1e-9, 1), (2.5, 2), (3.0, 3)])
def test_a_time_ends_the_sweep_before_a_round_that_would_pass_it(
    minutes, rounds, tokenizer_folder, monkeypatch
):
    """A round of a whole batch, 16 prompts, took longer than all of the time on a real model."""
    view, clock = shared("llama", "bridge", tokenizer_folder, torch.float32), [0.0]
    made = estimate.Estimator._round

    def a_minute(*args: Any) -> None:
        made(*args)
        clock[0] += 60

    monkeypatch.setattr(estimate.Estimator, "_round", a_minute)
    monkeypatch.setattr(estimate, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    found = score(view, minutes=minutes)
    swept = int((~torch.isnan(found.corrections[0][:, 0, 0])).sum())
    assert swept == 6 * rounds < len(data())


def test_one_prompt_of_a_label_gives_scores_without_intervals(tokenizer_folder):
    view = shared("llama", "bridge", tokenizer_folder, torch.float32)
    found = score(view, exact=3)
    assert bool(torch.isfinite(found.values).all())
    assert bool(torch.isnan(found.stderr).all())
    assert len(found.undecided(k=2)) == len(found.ranking())
    assert not found.has_intervals and math.isnan(reliability(found, splits=2).resolved)
    with pytest.raises(InputError, match="two of them with an exact sweep"):
        found.select(confidence=0.95)
    with pytest.raises(InputError, match="two of them with an exact sweep"):
        membership(found, found.select(k=2))


# Exact passes where they decide --------------------------------------------------------------------


def test_only_heads_whose_place_is_open_are_swept_further(tokenizer_folder):
    view = shared("llama", "bridge", tokenizer_folder, torch.float32)
    found = score(view, exact=28, decide={"threshold": 0.3})
    assert found.looks == 3
    known = (~torch.isnan(found.corrections[0])).sum(0)
    assert set(known.flatten().tolist()) <= {7, 14, 28}
    first = replace(score(view, exact=7), looks=3)
    open_then = set(first.undecided(threshold=0.3))
    for head in all_heads(view.n_layers, view.n_heads):
        assert (int(known[head.layer, head.head]) > 7) == (head in open_then)
    assert 0 < len(open_then) < view.n_layers * view.n_heads


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"k": 0}, "k=0"), ({"k": "3"}, "k='3'"), ({"k": 3.5}, "k=3.5"), ({"fraction": 1.5}, "1.5"),
        ({"fraction": 0.0}, "0.0"), ({"k": 3, "by": "bogus"}, "bogus"), ({"k": 3, "level": 2}, "2"),
        ({"threshold": float("nan")}, "threshold"),
    ],
)  # fmt: skip
def test_a_circuit_that_cannot_be_decided_is_refused_before_a_pass(
    wrong, said, tokenizer_folder, monkeypatch
):
    view = shared("llama", "bridge", tokenizer_folder, torch.float32)
    monkeypatch.setattr(estimate.Estimator, "cheap", lambda self: pytest.fail("swept"))
    for exact in (6, 24):
        with unchecked_types(), pytest.raises(InputError, match=said):
            score(view, exact=exact, decide=wrong)


def test_the_rows_of_a_decided_head_are_those_of_the_sweep(tokenizer_folder):
    view = shared("llama", "bridge", tokenizer_folder, torch.float32)
    chosen, plain = score(view, exact=24, decide={"k": 2}), score(view, exact=24)
    for own, whole in zip(chosen.corrections, plain.corrections, strict=True):
        known = ~torch.isnan(own)
        assert_close(own[known], whole[known], atol=1e-5)


def test_a_kill_between_rounds_loses_nothing(tmp_path: Path, tokenizer_folder, monkeypatch):
    view = shared("llama", "bridge", tokenizer_folder, torch.float32)
    whole = score(view, exact=24, decide={"k": 2}, batch_size=4)
    left, run = [5], sweep._Sweep._batch

    def stop(self, *args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return run(self, *args)

    kept = tmp_path / "kept.json"
    with monkeypatch.context() as patched:
        patched.setattr(sweep._Sweep, "_batch", stop)
        with pytest.raises(KeyboardInterrupt):
            score(view, exact=24, decide={"k": 2}, batch_size=4, checkpoint=kept)
    again = score(view, exact=24, decide={"k": 2}, batch_size=4, checkpoint=kept)
    third = score(view, exact=24, decide={"k": 2}, batch_size=4, checkpoint=kept)
    for found in (again, third):
        for name in ("values", "stderr", "per_example"):
            assert_same_bits(getattr(found, name), getattr(whole, name))


def test_a_checkpoint_serves_other_sizes_of_the_sample(tmp_path: Path, tokenizer_folder):
    view, kept = shared("llama", "bridge", tokenizer_folder, torch.float32), tmp_path / "kept.json"
    score(view, exact=9, checkpoint=kept)
    assert_same_bits(score(view, exact=15, checkpoint=kept).values, score(view, exact=15).values)


def test_rows_of_later_rounds_do_not_end_an_earlier_one(tmp_path: Path, tokenizer_folder):
    """They are in the checkpoint, and not in the scores that are returned."""
    view, kept = shared("llama", "bridge", tokenizer_folder, torch.float32), tmp_path / "kept.json"
    score(view, exact=27, checkpoint=kept)
    options: dict[str, Any] = {"precision": 5.0, "batch_size": 6}
    fresh, found = score(view, **options), score(view, checkpoint=kept, **options)
    swept = int((~torch.isnan(fresh.corrections[0][:, 0, 0])).sum())
    assert 6 < swept < 27
    assert_same_bits(found.corrections[0].isnan(), fresh.corrections[0].isnan())
    assert_close(found.values, fresh.values, atol=1e-5)


def test_a_decided_sweep_goes_on_with_more_time(tmp_path: Path, tokenizer_folder):
    view, kept = shared("llama", "bridge", tokenizer_folder, torch.float32), tmp_path / "kept.json"
    some = score(view, exact=24, decide={"k": 2}, minutes=1e-9, checkpoint=kept)
    assert swept(some) == 6
    whole, found = (
        score(view, exact=24, decide={"k": 2}),
        score(view, exact=24, decide={"k": 2}, checkpoint=kept),
    )
    assert_same_bits(found.values, whole.values)


def test_the_checkpoint_of_another_run_is_refused_before_a_pass(
    tmp_path: Path, tokenizer_folder, monkeypatch
):
    view, kept = shared("llama", "bridge", tokenizer_folder, torch.float32), tmp_path / "kept.json"
    score(view, exact=9, checkpoint=kept)
    monkeypatch.setattr(estimate.Estimator, "cheap", lambda self: pytest.fail("a pass"))
    with pytest.raises(InputError, match="another run"):
        score(view, exact=9, seed=1, checkpoint=kept)


# The default -----------------------------------------------------------------------------------------


def test_the_sample_grows_only_while_first_order_scores_are_poor(tokenizer_folder, monkeypatch):
    """The linear rules are their own first order. With noise added it says little about them."""
    monkeypatch.setattr(estimate, "_SMALL", 0.0)
    view = shared("llama", "bridge", tokenizer_folder, torch.float32)
    exact = score(view, rules="linear")
    assert swept(exact) == 15
    first_order = estimate.Estimator.cheap

    def with_noise(self: Any) -> torch.Tensor:
        out = first_order(self)
        noise = torch.randn(out[:-1].shape, generator=torch.Generator().manual_seed(0))
        out[:-1] += 10 * exact.per_example.std() * noise
        return out

    monkeypatch.setattr(estimate.Estimator, "cheap", with_noise)
    assert swept(score(view, rules="linear")) > 15


def test_the_sample_does_not_grow_where_no_error_can_be_known(tokenizer_folder, monkeypatch):
    """One prompt of a label has no standard error, however many others are swept."""
    monkeypatch.setattr(estimate, "_SMALL", 0.0)
    view = shared("llama", "bridge", tokenizer_folder, torch.float32)
    items = data().items
    lone = replace(data(), items=(*items[:23], items[-1]))
    baseline = mean_activations(view, lone, progress=False)
    found = score_heads(view, lone, baseline, progress=False)
    assert (len(lone), swept(found), found.has_intervals) == (24, 15, False)


def test_prompts_that_are_all_alike_are_good_enough():
    g = torch.ones(240, 1, 1)
    part = torch.zeros(240, 1, 1).masked_fill(torch.arange(240)[:, None, None] >= 15, torch.nan)
    scores = combined(g, (part,), ["a"] * 240, direction=1.0, method="m", provenance=provenance())
    assert good_enough(scores)


def swept(scores: HeadScores) -> int:
    return int((~torch.isnan(scores.corrections[0][:, 0, 0])).sum())


def test_a_small_model_is_swept_whole(tokenizer_folder, monkeypatch):
    """2 layers of 4 heads: 1 + 2 * 4 * 3 / 2 = 13 forward passes a prompt."""
    view = shared("llama", "bridge", tokenizer_folder, torch.float32)
    whole = score(view, exact="all")
    assert_same_bits(score(view).values, whole.values)
    monkeypatch.setattr(estimate, "_SMALL", 13.0)
    assert score(view).cheap is not None
    monkeypatch.setattr(estimate, "_SMALL", 13.1)
    assert score(view).cheap is None


def test_scores_are_good_enough_up_to_twice_the_error_of_the_whole_sweep():
    """One label, one head, y = g + noise of known size: the ratio of errors by hand."""
    n, N = 15, 240
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(N, 1, 1, generator=generator)
    noise = torch.randn(N, 1, 1, generator=generator)
    for size in (0.2, 0.6):
        part = (size * noise).masked_fill(torch.arange(N)[:, None, None] >= n, torch.nan)
        scores = combined(g, (part,), ["a"] * N, direction=1.0, method="m", provenance=provenance())
        whole = (g + size * noise)[:n].std() / N**0.5
        ratio = float(scores.stderr / whole)
        assert good_enough(scores) == (ratio <= 2)
        assert (size == 0.2) == (ratio <= 2)


def test_the_bar_ends_at_its_total(tokenizer_folder, monkeypatch):
    view, bars, make = shared("llama", "bridge", tokenizer_folder, torch.float32), [], Passes.bar

    def bar(*args: Any, **kwargs: Any) -> Any:
        bars.append(make(*args, **kwargs))
        return bars[-1]

    monkeypatch.setattr(Passes, "bar", bar)
    monkeypatch.setattr("sys.stderr", Terminal())
    baseline = mean_activations(view, data(), progress=False)
    bars.clear()
    for options in ({"exact": 20}, {"exact": 28, "decide": {"threshold": 0.3}}):
        score_heads(view, data(), baseline, batch_size=4, **options)
    heads = [each for each in bars if each.desc == "heads"]
    assert len(heads) == 2 and all(0 < each.n == each.total for each in heads)


@pytest.mark.parametrize(
    ("decide", "told"),
    [
        ({"size": 2}, "decide: unknown 'size'; expected k, fraction or threshold"),
        ({"k": 2, "fraction": 0.5}, "expected one of k, fraction and threshold, got k, fraction"),
        ({"by": "signed"}, "expected one of k, fraction and threshold, got none"),
        ({"k": 200}, "a circuit of 200 heads, but only 8 get a score"),
    ],
)
@pytest.mark.parametrize("exact", [6, 24])
def test_a_circuit_that_cannot_be_decided_is_refused_first(
    decide, told, exact, tokenizer_folder, monkeypatch
):
    view = shared("llama", "bridge", tokenizer_folder, torch.float32)
    monkeypatch.setattr(estimate.Estimator, "cheap", lambda self: pytest.fail("swept"))
    with pytest.raises(InputError, match=told):
        score(view, exact=exact, decide=decide)
