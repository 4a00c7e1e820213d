"""Comparisons on planted circuits, side by side and on disk."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import sample_comparison as sample

from cdt_lens.comparing.comparison import PlantedComparison
from cdt_lens.core.errors import ArtifactError, InputError


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
