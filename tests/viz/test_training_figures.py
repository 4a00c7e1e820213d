from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import sample_results as sample
from helpers.drawn import layers, look, rows, words

from cdt_lens.core.errors import InputError
from cdt_lens.finetuning.transfer_result import TransferResult
from cdt_lens.models.heads import Head
from cdt_lens.tasks.evaluate import Evaluation
from cdt_lens.viz import training_figures as figures

BOTH = (figures.trade_off, figures.measures)


def cells(result: TransferResult, target: str, scope: str) -> pd.DataFrame:
    found = result.cells
    return found[(found["target"] == target) & (found["scope"] == scope)]


def panels(figure) -> list[dict]:
    return figure.spec["data"]["values"]


def test_learning_curve_draws_the_history_and_stars_what_is_kept():
    result = sample.fine_tuning()
    figure = figures.learning_curve(result)
    drawn = rows(figure, "line", 0) + rows(figure, "line", 1)
    for line, column in (
        ("target accuracy", "target_accuracy"), ("target macro-F1", "target_macro_f1"),
        ("source accuracy", "source_accuracy"), ("target loss", "target_loss"),
        ("training loss", "train_loss"),
    ):  # fmt: skip
        known = result.history[result.history[column].notna()]
        points = [(row["step"], row["value"]) for row in drawn if row["line"] == line]
        assert points == list(zip(known["step"], known[column], strict=True))
    stars = [rows(figure, "point", number)[0] for number in (1, 3)]
    assert [(star["step"], star["value"]) for star in stars] == [
        (100, 0.72), (100, result.history["target_loss"][4]),
    ]  # fmt: skip
    assert "The star marks epoch 4, whose weights are kept." in words(figure)
    assert "from 0.490 to 0.720 at epoch 4" in figure.description


def test_learning_curve_lines_differ_in_dash_and_marker_not_only_in_colour():
    figure = figures.learning_curve(sample.fine_tuning())
    for channel in ("strokeDash", "shape"):
        shown = look(figure, "line", channel)
        assert len(set(shown.values())) == len(shown) == 3


def test_learning_curve_leaves_out_what_was_never_measured():
    result = sample.fine_tuning(source=False)
    drawn = rows(figures.learning_curve(result), "line")
    assert {row["line"] for row in drawn} == {"target accuracy", "target macro-F1"}
    blind = result.history.assign(target_accuracy=np.nan, target_macro_f1=np.nan)
    assert figures.learning_curve(replace(result, history=blind)).svg()
    begun = replace(result, history=result.history[:1], best_epoch=0)
    assert figures.learning_curve(begun).svg()


def test_accuracies_before_and_after_are_drawn_with_their_intervals_and_in_numbers():
    result = sample.adaptation()
    figure = result.plot()
    drawn = panels(figure)
    assert [row["place"] for row in drawn] == ["target language"] * 2 + ["source language"] * 2
    for (_, row), before, after in zip(
        result.languages.iterrows(), drawn[::2], drawn[1::2], strict=True
    ):
        for when, point in (("before", before), ("after", after)):
            assert point["when"] == when
            ends = [point[key] for key in ("accuracy", "low", "high")]
            assert ends == [row[f"{when}{end}"] for end in ("", "_low", "_high")]
    shown = words(figure)
    assert {"0.550 [0.420, 0.670]", "0.900 [0.860, 0.930]", "before", "after"} <= set(shown)
    assert len(set(look(figure, "when", "shape").values())) == 2


def test_evaluations_before_and_after_are_drawn_by_name():
    def found(accuracy: float) -> Evaluation:
        limits = {"accuracy": (accuracy - 0.1, accuracy + 0.1)}
        return Evaluation("test", accuracy, None, 1.0, 0.5, 60, accuracy, intervals=limits)

    before, after = {"en": found(0.8), "jv": found(0.25)}, {"jv": found(0.5), "en": found(0.75)}
    drawn = panels(figures.before_and_after(before, after))
    assert [(r["place"], r["when"], r["accuracy"]) for r in drawn] == [
        ("en", "before", 0.8), ("en", "after", 0.75), ("jv", "before", 0.25), ("jv", "after", 0.5),
    ]  # fmt: skip
    for wrong in ({}, {"en": found(0.8)}):
        with pytest.raises(InputError, match="the same names"):
            figures.before_and_after(wrong, after)


def test_trained_heads_are_told_from_their_siblings_and_the_rest_also_in_grey():
    result = replace(sample.fine_tuning(), heads=(Head(2, 1),), siblings=(Head(2, 0), Head(2, 2)))
    figure = figures.trained_heads(result)
    states = {row["cell"]: row["state"] for row in rows(figure, "rect")}
    assert len(states) == 270 and list(states.values()).count("not trained") == 267
    assert states["L2H1"] == "trained (1)" and states["L2H0"] == "shares a K/V slice (2)"
    assert [row["cell"] for row in rows(figure, "point")] == ["L2H0", "L2H2"]
    assert {"trained (1)", "shares a K/V slice (2)", "not trained"} <= set(words(figure))


@pytest.mark.parametrize("figure_of", BOTH)
def test_every_run_stands_in_the_panel_of_its_target_beside_the_untouched_checkpoint(figure_of):
    result = sample.transfer()
    drawn = panels(figure_of(result))
    for index, target in enumerate(result.targets):
        own = [row for row in drawn if row["target"] == target]
        for scope in result.scopes:
            runs = [row for row in own if row["scope"] == scope]
            expected = cells(result, target, scope)
            for column in ("seed", "accuracy", "retention", "macro_f1", "source_accuracy"):
                assert [row[column] for row in runs] == expected[column].tolist()
        before, chance = (
            next(row for row in own if row["part"] == part) for part in ("untouched", "chance")
        )
        assert before["accuracy"] == result.before["accuracy"][1 + index]
        assert before["retention"] == 1.0
        assert chance["accuracy"] == result.chance[target]


def test_the_mean_and_the_deviation_are_those_of_the_seeds():
    """As Vega-Lite computes them: a mean, and the sample standard deviation."""
    result = sample.transfer(("t",), ("decision",))
    figure = figures.measures(result)
    accuracy = result.cells["accuracy"]
    svg = figure.svg()
    assert f"{accuracy.mean():.6f}"[:6] in svg
    ends = [accuracy.mean() + sign * accuracy.std(ddof=1) for sign in (-1, 1)]
    assert all(f"{end:.6f}"[:6] in svg for end in ends)


@pytest.mark.parametrize("figure_of", BOTH)
def test_runs_that_are_not_finite_are_not_drawn(figure_of):
    result = sample.transfer(("javanese",), ("decision", "full"))
    broken = result.cells.copy()
    broken.loc[broken.index[:2], "accuracy"] = [np.nan, np.inf]
    drawn = panels(figure_of(replace(result, cells=broken)))
    assert [row["accuracy"] for row in drawn if row["scope"] == "decision"][:2] == [None, None]
    for each in layers(figure_of(result).spec):
        filters = " ".join(part["filter"] for part in each.get("transform", ()))
        assert "'run'" not in filters or "isValid(datum." in filters


@pytest.mark.parametrize("figure_of", BOTH)
@pytest.mark.parametrize("found", [pd.DataFrame(), sample.transfer().cells.iloc[:0]])
def test_before_the_first_run_the_panels_say_so(figure_of, found):
    drawn = words(figure_of(replace(sample.transfer(), cells=found)))
    assert drawn.count("no finished run") == 3
    assert "no finished run" not in words(figure_of(sample.transfer(("javanese",))))


@pytest.mark.parametrize("figure_of", BOTH)
def test_unknown_references_are_left_out(figure_of):
    result = sample.transfer()
    assert figure_of(replace(result, before=result.before.iloc[:0], chance={})).svg()


@pytest.mark.parametrize("figure_of", BOTH)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_panels_wrap_and_stand_in_the_order_of_the_targets(figure_of, count):
    targets = tuple(f"language {count - index}" for index in range(count))
    figure = figure_of(sample.transfer(targets, ("decision", "full")))
    assert figure.spec["columns"] == {1: 1, 2: 2, 4: 2}.get(count, 3)
    assert [text for text in words(figure) if text.startswith("language")] == list(targets)


def test_the_name_of_a_pseudo_language_does_not_read_as_a_tick():
    assert "target 0.3" in words(figures.trade_off(sample.transfer(("0.3",), ("decision",))))


def test_a_scope_looks_the_same_everywhere_and_no_two_share_a_marker():
    scopes = ("decision", "near-zero", "random", "random-per-layer", "norms", "full", "lora",
              "mine", "yours")  # fmt: skip
    whole = sample.transfer(("t",), scopes)
    looks = [figures._look(whole, place) for place in range(len(scopes))]
    assert len({marker for _, marker in looks}) == len({colour for colour, _ in looks}) == 9
    fewer = replace(whole, scopes=("full", "yours", "decision"))
    assert [figures._look(fewer, place) for place in (0, 2)] == [looks[5], looks[0]]


def test_many_variants_look_different():
    """In a plan of eleven scopes three pairs had the same colour and marker."""
    scopes = ("full", *(f"circuit-{k}" for k in range(16)))
    whole = sample.transfer(("t",), scopes)
    assert len({figures._look(whole, place) for place in range(len(scopes))}) == len(scopes)


def test_the_measures_that_a_page_can_choose_are_those_with_values():
    result = sample.transfer()
    chosen = figures.measures_of(result)
    assert {"accuracy", "macro_f1", "retention", "source_accuracy"} <= set(chosen)
    assert "related_retention" not in chosen
    assert figures.measures_of(replace(result, cells=result.cells.iloc[:0])) == {}
    start = {each["name"]: each["value"] for each in figures.measures(result).spec["params"]}
    assert (start["measure"], start["hidden"], start["seeds"]) == ("accuracy", [], True)
    assert start["headings"]["retention"] == "Retention of each scope"
    assert "Target accuracy of each scope" in words(figures.measures(result))
