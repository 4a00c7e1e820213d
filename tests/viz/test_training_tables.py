from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import sample_results as sample
from scipy.stats import binomtest

from cdt_lens.core.table import BEST, Table
from cdt_lens.finetuning.transfer_result import NONE_KEEPS_ENOUGH
from cdt_lens.viz import training_tables as tables, words

HOSTILE = '<script>window.__pwned=1</script> & "x"'


def rows(table: Table) -> list[list[str]]:
    """The body's rows as a reader sees them; a target's name is only in its first row."""
    bodies = ElementTree.fromstring(table.__html__()).iter("tbody")
    return [["".join(cell.itertext()) for cell in row] for body in bodies for row in body]


def transfer(accuracies: dict[str, list[float]], *, before: float = 0.5, **columns: list[float]):
    """One target, "t"; `accuracies` by scope, a value a seed; more columns by name, a value a run."""
    runs = [(scope, seed, a) for scope, each in accuracies.items() for seed, a in enumerate(each)]
    cells = pd.DataFrame(
        {
            "target": "t",
            "scope": [scope for scope, _, _ in runs],
            "seed": [seed for _, seed, _ in runs],
            "accuracy": [accuracy for _, _, accuracy in runs],
            **dict.fromkeys(("macro_f1", "source_accuracy", "retention", "seconds"), 0.5),
            "trained_parameters": 1000,
            "share": 0.01,
            **columns,
        }
    )
    languages = [("p", 0.8, 0.7, 0.8, 100), ("t", before, 0.5, 0.5, 100)]
    names = ["language", "accuracy", "macro_f1", "valid_accuracy", "examples"]
    whole = sample.transfer(("t",), tuple(accuracies))
    return replace(whole, proxy="p", cells=cells, before=pd.DataFrame(languages, columns=names))


def test_numbers_read_well_at_every_size():
    assert [words.duration(s) for s in (3, 119.96, 150, 9000, np.nan)] == [
        "3.0 s", "120.0 s", "2.5 min", "2.5 h", "n/a",
    ]  # fmt: skip
    assert [words.percent(s) for s in (1.0, 0.00812, 0.000012345, np.inf)] == [
        "100 %", "0.812 %", "0.00123 %", "n/a",
    ]  # fmt: skip
    assert [words.short_count(n) for n in (7, 40355, 1_345_150, 2.5e9, np.nan)] == [
        "7", "40.4 k", "1.35 M", "2.5 G", "n/a",
    ]  # fmt: skip
    assert tables.trained_in_words(sample.fine_tuning()) == "1,343,808 of 134,515,008 (0.999 %)"


def test_a_spread_is_the_sample_deviation_and_needs_two_finite_values():
    mean, spread = words.mean_and_spread(pd.Series([0.6, 0.7, 0.8, np.nan, np.inf]))
    assert (mean, spread) == pytest.approx((0.7, 0.1))
    assert words.mean_in_words(pd.Series([0.6, 0.7, 0.8])) == "0.700 \u00b1 0.100"
    assert words.mean_in_words(pd.Series([0.6, np.nan])) == "0.600"
    assert words.mean_in_words(pd.Series([], dtype=float)) == "n/a"


def test_comparison_starts_with_the_untouched_checkpoint_and_has_a_row_a_scope():
    result = transfer({"decision": [0.6, 0.7, 0.8], "full": [0.55, 0.55, 0.55]}, before=0.52)
    untouched, decision, full = rows(tables.comparison_table(result))
    assert untouched == [
        "t", "untouched", "\u2013", "0.520", "0.500", "1.000", "0.800", "0 (0 %)", "\u2013",
    ]  # fmt: skip
    assert decision[:3] == ["decision", "3", "\u2605 0.700 \u00b1 0.100"]
    assert full[:3] == ["full", "3", "0.550 \u00b1 0.000"]
    assert full[-2:] == ["1 k (1 %)", "0.5 s"]


def test_the_best_is_starred_in_words_too_the_cheapest_of_the_costs():
    result = transfer(
        {"decision": [0.7], "norms": [0.6]},
        retention=[0.9, 0.95],
        trained_parameters=[2000, 1000],
        seconds=[10.0, 20.0],
    )
    table = tables.comparison_table(result)
    _, decision, norms = rows(table)
    assert [cell.startswith(BEST) for cell in decision[2:]] == [1, 0, 0, 0, 0, 1]
    assert [cell.startswith(BEST) for cell in norms[2:]] == [0, 0, 1, 0, 1, 0]
    stars = [s for s in ElementTree.fromstring(table.__html__()).iter("span") if s.text == BEST]
    assert {star.get("aria-label") for star in stars} == {"best"}


def test_means_that_read_the_same_are_starred_alike_and_not_at_all_if_all_do():
    two = transfer({"decision": [0.70001], "near-zero": [0.70002], "full": [0.6]})
    starred = [row[2].startswith(BEST) for row in rows(tables.comparison_table(two))[1:]]
    assert starred == [True, True, False]
    same = transfer({"decision": [0.7], "near-zero": [0.7]})
    alone = transfer({"decision": [0.7]})
    for result in (same, alone):
        assert BEST not in "".join(map("".join, rows(tables.comparison_table(result))))


def test_training_that_did_harm_is_marked():
    result = transfer({"decision": [0.6], "full": [0.48], "lora": [0.4999]}, before=0.5)
    cells = [row[2] for row in rows(tables.comparison_table(result))[1:]]
    assert cells == ["\u2605 0.600", "\u25bd 0.480", "0.500"]
    worse = transfer({"decision": [0.45], "full": [0.4]}, before=0.5)
    assert rows(tables.comparison_table(worse))[1][2] == "\u2605 \u25bd 0.450"


def test_one_seed_has_no_spread():
    table = tables.comparison_table(sample.transfer(seeds=(3,)))
    assert "\u00b1" not in "".join(map("".join, rows(table))) + table.caption
    assert "\u00b1" in tables.comparison_table(sample.transfer()).caption


def test_runs_that_are_missing_or_not_finite_are_told_and_left_out_of_the_mean():
    result = transfer({"decision": [0.6, 0.8, np.nan], "full": [0.7], "lora": []})
    _, decision, full, lora = rows(tables.comparison_table(result))
    assert decision[1:3] == ["2 of 3", "0.700 \u00b1 0.141"]
    assert full[1:3] == ["1 of 3", "0.700"]
    assert lora == ["lora", "0 of 3", *["n/a"] * 6]


@pytest.mark.parametrize("cells", [pd.DataFrame(), sample.transfer().cells.iloc[:0]])
def test_before_the_first_run_there_are_the_untouched_rows(cells: pd.DataFrame):
    result = replace(sample.transfer(), cells=cells)
    shown = rows(tables.comparison_table(result))
    assert len(shown) == 3 * 7
    assert shown[1][:3] == ["decision", "0", "n/a"]
    assert result.seeds == []
    assert rows(tables.runs_table(result)) == []


def test_a_language_that_was_not_measured_before_reads_as_such():
    result = sample.transfer()
    result = replace(result, before=result.before.iloc[:1])
    assert rows(tables.comparison_table(result))[0][3] == "n/a"


def test_every_run_is_listed_by_target_scope_and_seed():
    result = sample.transfer()
    shuffled = replace(result, cells=result.cells.sample(frac=1, random_state=0))
    shown = rows(tables.runs_table(shuffled))
    assert len(shown) == len(result.cells) == 54
    assert [row[0] for row in shown if len(row) == 12] == list(result.targets)
    assert [row[-11:-9] for row in shown[:4]] == [
        ["decision", "0"], ["decision", "1"], ["decision", "2"], ["near-zero", "0"],
    ]  # fmt: skip
    run = result.cells.iloc[0]
    assert shown[0][3] == f"{run['accuracy']:.3f}"
    right, n = round(run["accuracy"] * 400), 400
    wilson = binomtest(right, n).proportion_ci(method="wilson")
    assert shown[0][4] == f"[{wilson.low:.3f}, {wilson.high:.3f}]"
    assert shown[0][-1] == "all epochs"


def choices(*entries: tuple[str, int, str, str, object]) -> pd.DataFrame:
    """(target, seed, rule, better, right)."""
    columns = ["target", "seed", "rule", "better", "right"]
    return pd.DataFrame(entries, columns=columns).assign(chosen="decision", inputs="gap 0.3")


def test_choices_count_how_often_a_rule_was_right_beside_always_taking_one_scope():
    auto = choices(
        ("a", 0, "gap", "decision", True), ("b", 0, "gap", "near-zero", False),
        ("c", 0, "gap", "tie", True), ("a", 0, "race", "decision", True),
        ("b", 0, "race", "near-zero", True), ("c", 0, "race", "tie", True),
    )  # fmt: skip
    result = replace(sample.transfer(), auto=auto)
    assert tables.right_of(result) == {"gap": "1 of 2 (1 tie)", "race": "2 of 2 (1 tie)"}
    table = tables.choices_table(result)
    assert "gap 1 of 2 (1 tie), race 2 of 2 (1 tie)" in table.caption
    assert "always taking one scope: decision (gap) 1 of 2, near-zero (gap) 1 of 2" in table.caption
    assert rows(table)[1] == ["b", "0", "gap", "decision", "near-zero", "no", "gap 0.3"]


def test_none_that_keeps_enough_is_no_scope_to_take_always():
    auto = choices(
        ("a", 0, "race", "full", True), ("b", 0, "race", NONE_KEEPS_ENOUGH, False),
    )  # fmt: skip
    result = replace(sample.transfer(), auto=auto)
    caption = tables.choices_table(result).caption
    assert caption.endswith("race 1 of 2; always taking one scope: full (race) 1 of 1")


def test_a_choice_that_cannot_be_judged_yet_is_neither_right_nor_wrong():
    auto = choices(("a", 0, "gap", "decision", True), ("b", 0, "gap", "", None))
    result = replace(sample.transfer(), auto=auto)
    assert tables.right_of(result) == {"gap": "1 of 1"}
    assert [row[5] for row in rows(tables.choices_table(result))] == ["yes", "n/a"]


@pytest.mark.parametrize("auto", [pd.DataFrame(), sample.transfer().auto.iloc[:0]])
def test_no_choices_are_no_rules(auto: pd.DataFrame):
    assert tables.right_of(replace(sample.transfer(), auto=auto)) == {}


def test_history_stars_the_epoch_that_is_kept():
    shown = rows(tables.history_table(sample.fine_tuning()))
    assert [row[0] for row in shown] == ["0", "1", "2", "3", "\u2605 4", "5", "6"]
    assert shown[0][2] == "n/a"  # no training before the first step
    assert shown[4][4:7] == ["0.720", "0.700", "0.765"]


def test_settings_are_told_by_their_path():
    table = tables.settings_table({"k": 3, "training": {"epochs": 5, "kv": None}}, caption="S")
    assert rows(table) == [
        ["k", "3"], ["training \u203a epochs", "5"], ["training \u203a kv", "none"],
    ]  # fmt: skip


def test_names_of_languages_and_scopes_are_escaped():
    result = replace(sample.transfer((HOSTILE,), (HOSTILE, "full")), proxy=HOSTILE)
    for table in (
        tables.comparison_table(result),
        tables.runs_table(result),
        tables.choices_table(result),
        tables.settings_table({HOSTILE: {HOSTILE: HOSTILE}}, caption=HOSTILE),
    ):
        assert "<script" not in table.__html__()
        assert HOSTILE in "".join(map("".join, rows(table)))


def test_every_header_cell_has_a_scope_and_a_group_spans_its_rows():
    root = ElementTree.fromstring(tables.comparison_table(sample.transfer()).__html__())
    assert all(header.get("scope") for header in root.iter("th"))
    spans = [header.get("rowspan") for header in root.iter("th") if header.get("rowspan")]
    assert spans == ["7", "7", "7"]


def test_answers_are_compared_over_the_seeds_of_both_scopes():
    """Seed 1 of one scope is missing, as in a run that is not finished."""
    known = sample.transfer(("acehnese",), ("decision", "full"), (0, 1), per_example=True)
    right = torch.tensor([1.0, 0.0, 1.0, 0.0])
    answers = {
        "right|acehnese|decision|0": right, "right|acehnese|decision|1": 1 - right,
        "right|acehnese|full|0": right,
    }  # fmt: skip
    cut = replace(known, per_example=answers)
    assert tables.disagreements_table(cut, "decision") is None
    other = answers | {"right|acehnese|full|1": right}
    found = tables.disagreements_table(replace(known, per_example=other), "decision")
    assert found is not None
    assert [row[-3:] for row in found.rows] == [
        ["50%", f"{100 * right[n]:.0f}%", f"{('full', 'decision')[n % 2]} better"] for n in range(4)
    ]
