"""Comparisons on planted circuits, side by side and on disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import sample_comparison as sample

from cdt_lens.comparing.comparison import Comparison, PlantedComparison
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.experiments import compare as experiments
from cdt_lens.experiments.compare import compare_planted


def test_a_measure_by_method_and_circuit():
    planted = sample.planted()
    found = planted.matrix("auroc")
    assert list(found) == list(sample.CIRCUITS) and list(found.index) == list(sample.MADE_UP)
    assert found.loc["cdt:stable", "hand-or"] == pytest.approx(0.675)
    assert math.isnan(found.loc["cdt:official", "trained-attention-only"])


def test_a_measure_is_a_column_of_numbers():
    planted = sample.planted()
    for column in ("refused", "empty_run"):
        with pytest.raises(InputError, match=f"measure '{column}': expected a column of numbers"):
            planted.matrix(column)
    with pytest.raises(InputError, match="measure 'aurok': unknown; did you mean 'auroc'"):
        planted.matrix("aurok")


def test_methods_of_any_circuit_have_a_row():
    circuits = {
        "one": sample.comparison(["exact", "direct"], truth=True),
        "two": sample.comparison(["exact", "random"], truth=True),
    }
    planted = PlantedComparison(circuits)
    assert planted.methods == ("exact", "direct", "random")
    assert math.isnan(planted.matrix("auroc").loc["random", "one"])
    frame = planted.to_dataframe()
    assert frame[["circuit", "method"]].to_numpy().tolist() == [
        ["one", "exact"], ["one", "direct"], ["two", "exact"], ["two", "random"],
    ]  # fmt: skip


def test_what_is_saved_reads_back(tmp_path: Path):
    planted = sample.planted()
    loaded = PlantedComparison.load(planted.save(tmp_path / "p.json"))
    assert list(loaded.circuits) == list(planted.circuits)
    assert loaded.why == planted.why
    for name, each in planted.circuits.items():
        assert loaded.circuits[name] == each
        assert loaded.circuits[name].areas().equals(each.areas())
    other = replace(
        planted, circuits={"a": sample.comparison(), "a.b": sample.comparison(["exact"])}
    )
    assert PlantedComparison.load(other.save(tmp_path / "o.json")) == other
    single = sample.comparison().save(tmp_path / "c.json")
    with pytest.raises(ArtifactError, match="expected a cdt_lens.planted_comparison file"):
        PlantedComparison.load(single)


def test_a_notebook_shows_it_also_without_circuits():
    assert "<svg" in sample.planted()._repr_html_()
    empty = replace(sample.planted(), circuits={}, why={})
    assert empty.to_dataframe().empty and empty.methods == ()


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., PlantedComparison]:
    """`compare_planted` in one folder, with made-up numbers."""

    def made_up(*given: Any, seed: int, folder: Path, **_: Any) -> Comparison:
        folder.mkdir(exist_ok=True)
        found = sample.comparison(given[-1], truth=True)
        return replace(found, provenance=replace(found.provenance, seed=seed))

    def written(result: PlantedComparison, folder: Path) -> None:
        result.save(folder / "comparison.json")

    monkeypatch.setattr(experiments, "compare_methods", made_up)
    monkeypatch.setattr(experiments, "write_comparison", written)
    return lambda *given, **more: compare_planted(*given, folder=tmp_path, **more)


def test_circuits_of_earlier_calls_stay_in_the_folder(compared, tmp_path: Path):
    first = compared(["hand-dead", "hand-or"], ["direct"])
    said: list[str] = []
    found = compared(["hand-and", "hand-dead"], ["direct", "random"], say=said.append)
    assert list(found.circuits) == ["hand-dead", "hand-or", "hand-and"]
    assert found.circuits["hand-or"] == first.circuits["hand-or"]
    assert found.circuits["hand-dead"].names == ("exact", "direct", "random")
    assert found.why["hand-or"] == first.why["hand-or"]
    assert [line for line in said if "kept" in line] == [
        "planted circuit hand-or: kept from an earlier call"
    ]
    assert PlantedComparison.load(tmp_path / "comparison.json") == found


def test_another_seed_is_refused_before_anything_is_replaced(
    compared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compared(["hand-dead", "hand-or"], ["direct"])
    before = (tmp_path / "comparison.json").read_bytes()
    monkeypatch.setattr(experiments, "planted_circuit", None)
    with pytest.raises(InputError, match=r"comparison.json: .* other settings \(seed 0\)"):
        compared(["hand-dead"], ["direct"], seed=1)
    assert (tmp_path / "comparison.json").read_bytes() == before


def test_the_comparison_of_a_model_is_not_replaced(compared, tmp_path: Path):
    sample.comparison(["exact"]).save(tmp_path / "comparison.json")
    with pytest.raises(InputError, match="holds other files, such as comparison.json"):
        compared(["hand-dead"], ["direct"])
