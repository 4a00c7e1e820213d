"""Transfer results: means and spreads over seeds, and a round trip through the file."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers import sample_results
from helpers.places import ROOT

from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.finetuning.transfer_result import (
    AUTO_COLUMNS,
    BEFORE_COLUMNS,
    CELL_COLUMNS,
    TransferResult,
    table,
)
from cdt_lens.tasks.intervals import paired_share_interval, share_interval


def cell(target: str, scope: str, seed: int, accuracy: float) -> dict[str, object]:
    zeros: dict[str, object] = dict.fromkeys(CELL_COLUMNS, 0.5)
    return zeros | {
        "target": target, "scope": scope, "seed": seed, "accuracy": accuracy,
        "trained_parameters": 7, "stopped": "all epochs", "heads": 2, "best_epoch": 1,
    }  # fmt: skip


def sample(cells: list[dict[str, object]]) -> TransferResult:
    return TransferResult(
        task="t", proxy="en", targets=("0.3", "b"), scopes=("full", "decision"),
        cells=table(cells, CELL_COLUMNS),
        before=table([{"language": "en", "accuracy": 1 / 3, "macro_f1": math.nan,
                       "valid_accuracy": 0.1, "examples": 12}], BEFORE_COLUMNS),
        chance={"0.3": 0.4, "b": 0.25}, auto=table([], AUTO_COLUMNS), discovery={"heads in the circuit": 3},
        settings={"a": {"b": [1, 2]}},
    )  # fmt: skip


def test_summary_is_mean_and_sample_deviation_over_seeds():
    cells = [
        cell("0.3", "full", 0, 0.5),
        cell("0.3", "full", 1, 0.8),
        cell("b", "decision", 0, 0.7),
    ]
    found = sample(cells).summary()
    assert found[["target", "scope", "seeds"]].to_numpy().tolist() == [
        ["0.3", "full", 2],
        ["b", "decision", 1],
    ]
    assert found["accuracy"].tolist() == pytest.approx([0.65, 0.7])
    assert found["accuracy_std"].iloc[0] == pytest.approx(math.sqrt(0.045))
    assert math.isnan(found["accuracy_std"].iloc[1])


def test_an_interval_of_an_accuracy_is_one_of_shares():
    """Seeds that agree say as much as one, and no limit lies outside of 0 and 1."""
    cells = [cell("b", "decision", seed, 1.0) for seed in range(3)]
    right = torch.ones(20)
    other = torch.ones(40)
    other[:2] = 0
    for rows, expected in (
        ([right] * 3, share_interval(20, 20)),
        ([torch.ones(40), torch.ones(40), other], None),
    ):
        tensors = {f"right|b|decision|{seed}": row for seed, row in enumerate(rows)}
        found = dataclasses.replace(sample(cells), per_example=tensors).summary().iloc[0]
        limits = found["accuracy_low"], found["accuracy_high"]
        if expected is None:
            assert 0 <= limits[0] < limits[1] == 1.0
        else:
            assert limits == expected


def test_summary_counts_the_seeds_behind_a_mean_and_those_that_diverged():
    cells = [
        cell("0.3", "full", 0, 0.5),
        cell("0.3", "full", 1, math.nan),
        cell("b", "full", 1, 0.7),
    ]
    found = sample(cells).summary()
    assert found[["seeds", "asked", "diverged"]].to_numpy().tolist() == [[1, 2, 1], [1, 2, 0]]
    assert found["accuracy"].tolist() == [0.5, 0.7]


def test_round_trip(tmp_path: Path):
    result = sample([cell("0.3", "full", 0, 0.123456789012345)])
    again = TransferResult.load(result.save(tmp_path / "result.json"))
    for name in ("cells", "before", "auto"):
        pd.testing.assert_frame_equal(
            getattr(again, name), getattr(result, name), check_dtype=False, check_index_type=False
        )
    assert again.chance == {"0.3": 0.4, "b": 0.25}
    assert again.targets == result.targets and again.settings == result.settings
    # A target may be called "0.3", and stays text.
    assert again.cells["target"].tolist() == ["0.3"]


def test_a_file_of_0_3_holds_the_chance_level_of_its_first_target():
    path = ROOT / "tests" / "files_0_3" / "transfer" / "result.json"
    told = json.loads(path.read_text("utf-8"))["chance"]
    assert TransferResult.load(path).chance == {"near": told}


def test_an_unfinished_run_has_an_empty_summary():
    assert len(sample([]).summary()) == 0


def test_damage_is_named(tmp_path: Path):
    path = sample([]).save(tmp_path / "result.json")
    path.write_text(path.read_text().replace('"b": 0.25', '"b": 0.5'))
    with pytest.raises(ArtifactError, match="result.json: damaged"):
        TransferResult.load(path)


def test_every_run_is_placed_among_the_random_sets():
    """Random sets on a line: accuracy 1 - source / 2. The run lies 0.1 above it."""
    scopes = ("decision", *(f"drawn-{i}" for i in range(1, 5)))
    rows = [
        {**cell("b", f"drawn-{i}", seed, 1 - 0.1 * i / 2), "source_accuracy": 0.1 * i, "loss": i}
        for i in range(1, 5)
        for seed in (0, 1)
    ]
    rows += [{**cell("b", "decision", 0, 0.85), "source_accuracy": 0.5, "loss": 2.0}]
    result = dataclasses.replace(
        sample(rows), targets=("b",), scopes=scopes,
        cells=table(rows, (*CELL_COLUMNS, "loss")),
    )  # fmt: skip
    lost = result.cells.assign(
        accuracy=result.cells["accuracy"].where(result.cells["scope"] != "decision")
    )
    (diverged,) = dataclasses.replace(result, cells=lost).among("drawn").to_dict("records")
    assert math.isnan(diverged["as_accurate"]) and math.isnan(diverged["above_line"])
    (row,) = result.among("drawn").to_dict("records")
    assert (row["target"], row["scope"], row["sets"]) == ("b", "decision", 4)
    assert row["as_accurate"] == 0.75  # 0.95, 0.90, 0.85 and 0.80
    assert row["as_low_loss"] == 0.5
    assert row["above_line"] == pytest.approx(0.85 - (1 - 0.25))
    with pytest.raises(InputError, match="expected the name of a variant with random sets"):
        result.among("random")


def test_the_test_examples_are_kept_and_must_fit_their_numbers(tmp_path: Path):
    result = sample_results.transfer(per_example=True)
    path = result.save(tmp_path / "r.json")
    loaded = TransferResult.load(path)
    assert loaded == result and loaded.test_rows["javanese"][1] == (
        "Prompt 1 in javanese:",
        "neutral",
    )
    short = dataclasses.replace(result, test_rows={"javanese": result.test_rows["javanese"][:19]})
    path = short.save(tmp_path / "short.json")
    with pytest.raises(ArtifactError, match="javanese.* has 20 examples, others 19"):
        TransferResult.load(path)


def test_two_runs_with_the_same_answers_may_differ_elsewhere():
    cells = [cell("0.3", scope, seed, 0.5) for scope in ("full", "decision") for seed in (0, 1)]
    right = torch.tensor([1.0, 0.0] * 20)
    held = {f"right|0.3|{scope}|{seed}": right for scope in ("full", "decision") for seed in (0, 1)}
    found = dataclasses.replace(sample(cells), per_example=held).differences("decision").iloc[0]
    low, high = paired_share_interval(0, 0, 40)
    assert (found["difference"], found["low"], found["high"]) == (0, low, high) and low < 0 < high


def test_few_answers_that_differ_say_little():
    """With one seed the interval is Bonett and Price's; an answer more never makes it narrower."""
    cells = [cell("0.3", scope, seed, 0.5) for scope in ("full", "decision") for seed in range(3)]
    zeros, one = torch.zeros(100), torch.zeros(100)
    one[0] = 1

    def limits(*runs: torch.Tensor) -> tuple[float, float]:
        held = {f"right|0.3|decision|{seed}": run for seed, run in enumerate(runs)}
        held |= {f"right|0.3|full|{seed}": zeros for seed in range(len(runs))}
        row = dataclasses.replace(sample(cells), per_example=held).differences("decision").iloc[0]
        return row["low"], row["high"]

    least = paired_share_interval(0, 0, 100)
    assert limits(zeros) == least
    assert limits(one) == limits(one, one) == paired_share_interval(1, 0, 100)
    wide = limits(zeros, zeros, one)
    assert wide == pytest.approx((least[0] + 1 / 300, least[1] + 1 / 300), abs=1e-12)


def test_an_experiment_that_is_cut_off_counts_every_seed_of_its_settings():
    cells = [cell("b", scope, 0, 0.7) for scope in ("full", "decision")]
    result = dataclasses.replace(sample(cells), settings={"transfer": {"seeds": [0, 1, 2]}})
    assert result.seeds == [0] and result.asked_seeds == [0, 1, 2]
    assert result.summary()["asked"].tolist() == [3, 3]


def test_runs_that_all_diverged_have_no_differences():
    cells = [cell("0.3", scope, 0, math.nan) for scope in ("full", "decision")]
    assert sample(cells).differences("decision").empty
    with pytest.raises(InputError, match=r"0\.3 holds no test examples"):
        sample([cell("0.3", "full", 0, 0.5)]).differences("full")


def test_a_variant_beside_its_random_sets_is_none_of_them():
    names = ("drawn-1", "drawn-2", "drawn-all", "full")
    accuracies = (0.5, 0.6, 0.9, 0.8)
    cells = [cell("0.3", name, 0, value) for name, value in zip(names, accuracies, strict=True)]
    result = sample(cells)
    result = dataclasses.replace(result, scopes=names, cells=result.cells.assign(loss=1.0))
    found = result.among("drawn").set_index("scope")
    assert set(found.index) == {"drawn-all", "full"} and set(found["sets"]) == {2}
    assert found.loc["full", "as_accurate"] == 0
