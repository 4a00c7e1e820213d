"""The result of a comparison: its numbers by name, the best of them, and the round trip to disk."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import sample_comparison as sample
from helpers.checks import unchecked_types

from cdt_lens.comparing.comparison import Comparison, MethodResult, RankingCurve
from cdt_lens.core.errors import ArtifactError, InputError


def test_the_areas_are_trapezoids_over_the_fractions():
    curve = RankingCurve.of((0.0, 0.5, 1.0), (0, 4, 8), (0.0, 1.5, 1.0))
    assert curve.cpr == pytest.approx((0 + 1.5) / 4 + (1.5 + 1) / 4)
    assert curve.cmd == pytest.approx((1 + 0.5) / 4 + (0.5 + 0) / 4)


def test_the_area_on_a_logarithmic_axis_starts_at_the_first_head():
    f = (0.3, 0.0, 0.5, 1.0)
    curve = RankingCurve.of((0.01, 0.125, 0.25, 1.0), (0, 1, 2, 8), f)
    assert curve.log_area == pytest.approx((0.25 * math.log(2) + 0.75 * math.log(4)) / math.log(8))
    assert math.isnan(RankingCurve.of((0.0, 1.0), (0, 8), (0.0, 1.0)).log_area)


def method(name: str, cpr: float, cmd: float, other: float = 0.0, **more: float) -> MethodResult:
    """A method with these areas by signed score, and `other` for CPR by magnitude."""
    one, two = RankingCurve((), cpr, cmd), RankingCurve((), other, 1.0)
    return MethodResult(name, signed=one, magnitude=two, **more)


def compared(*methods: MethodResult) -> Comparison:
    return replace(sample.comparison(), methods=methods)


def test_the_best_of_each_measure():
    result = compared(
        method("exact", 0.7, 0.3, spearman=1.0, pearson=1.0, forward_passes=80.0),
        method("a", 0.8, 0.35, other=0.2, spearman=0.1, pearson=0.6, forward_passes=3.0),
        method("b", 0.5, 0.5, other=0.9, spearman=0.4, pearson=-0.2, forward_passes=90.0),
        MethodResult("refused", refused="not finite"),
    )

    def best(*of: str) -> str:
        found = result.best(*of)
        assert found is not None
        return found.method

    # The yardstick agrees with itself: that is no merit. In the areas it competes.
    assert (best("spearman"), best("pearson")) == ("b", "a")
    assert (best("cpr"), best("cpr", "signed"), best("cpr", "magnitude")) == ("b", "a", "b")
    assert best("cmd") == "exact"
    assert best("forward_passes") == "a"
    assert result.best("auroc") is None
    assert result["b"].value("cpr") == 0.9
    assert result["b"].value("cpr", "signed") == 0.5


def test_the_best_of_equals_is_the_first():
    result = compared(method("a", 0.5, 0.5), method("b", 0.5, 0.5))
    assert result.best("cpr").method == "a"


def test_a_refused_method_has_no_numbers():
    refused = sample.comparison(refused=["cdt:linear"])["cdt:linear"]
    assert refused.curve("signed") is None and refused.curve("magnitude") is None
    assert math.isnan(refused.value("cpr")) and math.isnan(refused.value("cmd", "signed"))
    assert math.isnan(refused.value("spearman"))


def test_names_that_do_not_exist_are_refused():
    result = sample.comparison()
    with pytest.raises(InputError, match="measure='f1': expected one of spearman"):
        result.best("f1")
    with pytest.raises(InputError, match="method 'cdt': expected one of exact"):
        result["cdt"]
    with unchecked_types(), pytest.raises(InputError, match="by='size'"):
        result.best("cpr", "size")


def test_the_data_frame_has_every_number():
    result = sample.comparison(refused=["random"], truth=True)
    frame = result.to_dataframe().set_index("method")
    assert list(frame.index) == list(result.names)
    stable = result["cdt:stable"]
    assert stable.signed is not None and stable.magnitude is not None
    for column, value in {
        "spearman": 0.35, "cpr_signed": stable.signed.cpr, "cmd_magnitude": stable.magnitude.cmd,
        "cpr_magnitude": stable.magnitude.cpr, "seconds": 405.0, "forward_passes": 243.0,
        "auroc": stable.auroc, "average_precision": stable.average_precision,
    }.items():  # fmt: skip
        assert frame.loc["cdt:stable", column] == pytest.approx(value)
    assert frame.loc["random"].drop(["refused", "empty_run"]).isna().all()
    assert set(frame["empty_run"]) == {"heads"}
    assert "finite" in frame.loc["random", "refused"]
    assert frame["refused"].notna().sum() == 1


def test_it_tells_its_task_and_model():
    result = sample.comparison()
    assert result.task == "nusax-senti/english/train"
    assert result.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    areas = result.random_areas()
    assert areas["cpr"] == pytest.approx(np.median([c.cpr for c in result.random]))
    assert areas["cmd"] == pytest.approx(np.median([c.cmd for c in result.random]))


def test_intervals_of_every_ranking():
    result = sample.comparison(refused=["direct"])
    points, areas = result.faithfulness(), result.areas()
    assert list(points["heads"].unique()) == [1, 2, 5, 13, 27, 54, 135, 270]  # none without a head
    assert len(points) == 11 * 2 * 8 and len(areas) == 11 * 2 * 3
    assert "direct" not in set(points["method"]) | set(areas["method"])
    inner = points[points["fraction"] < 1]
    assert ((inner["low"] < inner["f"]) & (inner["f"] < inner["high"])).all()
    assert ((areas["low"] < areas["value"]) & (areas["value"] < areas["high"])).all()
    narrow = result.areas(level=0.5)
    assert (narrow["high"] - narrow["low"] < areas["high"] - areas["low"]).all()


def test_differences_are_from_the_best_or_from_a_named_method():
    result = sample.comparison(refused=["direct"])
    found = result.differences()
    assert set(found["reference"]) == {"cdt:both"} and len(found) == 10
    assert result.best("log_area", "signed").method == "cdt:both"
    stable = found.set_index("method").loc["cdt:stable"]
    both, own = result["cdt:both"].signed, result["cdt:stable"].signed
    assert stable["difference"] == pytest.approx(own.log_area - both.log_area)
    assert stable["low"] < stable["difference"] < stable["high"] < 0 and stable["real"]
    one, other = (
        result.differences("cmd", "magnitude", reference=name).set_index("method")
        for name in ("exact", "random")
    )
    assert one.loc["random", "difference"] == pytest.approx(-other.loc["exact", "difference"])
    assert one.loc["random", "low"] == pytest.approx(-other.loc["exact", "high"])
    # The same circuits differ by nothing.
    twin = replace(result.methods[0], method="twin")
    same = replace(result, methods=(result.methods[0], twin)).differences().iloc[0]
    assert (same["difference"], same["low"], same["high"], same["real"]) == (0, 0, 0, False)
    with pytest.raises(InputError, match="reference 'direct': this method was refused"):
        result.differences(reference="direct")
    with pytest.raises(InputError, match="method 'cdt': expected one of"):
        result.differences(reference="cdt")
    refused = replace(result, methods=(result["direct"],))
    assert refused.differences().empty and refused.areas().empty


def test_what_is_saved_reads_back(tmp_path: Path):
    result = sample.comparison(refused=["cdt:official"])
    path = result.save(tmp_path / "comparison.json")
    loaded = Comparison.load(path)
    assert loaded.to_dict() == result.to_dict()
    assert loaded["cdt:stable"] == result["cdt:stable"] or math.isnan(result["cdt:stable"].auroc)
    assert loaded["cdt:stable"].signed == result["cdt:stable"].signed
    assert math.isnan(loaded["cdt:official"].spearman) and math.isnan(loaded["direct"].auroc)
    assert loaded.provenance == result.provenance and loaded == result
    assert loaded.differences().equals(result.differences())
    with_budget = replace(result, budget=91.5)
    assert Comparison.load(with_budget.save(tmp_path / "b.json")) == with_budget
    assert "NaN" not in path.read_text("utf-8")
    path.write_text(path.read_text("utf-8").replace('"scored": 16', '"scored": 17'), "utf-8")
    with pytest.raises(ArtifactError, match=r"comparison\.json"):
        Comparison.load(path)


def test_a_file_of_another_kind_or_with_holes_is_refused(tmp_path: Path):
    from cdt_lens.core.artifacts import save_artifact

    other = save_artifact(tmp_path / "a.json", {}, format="cdt_lens.circuit", version=1)
    with pytest.raises(ArtifactError, match="expected a cdt_lens.comparison file"):
        Comparison.load(other)
    holed = save_artifact(tmp_path / "b.json", {}, format="cdt_lens.comparison", version=1)
    with pytest.raises(ArtifactError, match="b.json: not a whole comparison"):
        Comparison.load(holed)
    body = sample.comparison().to_dict()
    body["methods"][0]["speed"] = 3
    strange = save_artifact(tmp_path / "c.json", body, format="cdt_lens.comparison", version=1)
    with pytest.raises(ArtifactError, match="c.json: not a whole comparison"):
        Comparison.load(strange)


def test_a_notebook_shows_the_table_and_the_figure():
    html = sample.comparison()._repr_html_()
    assert "<table>" in html and "<svg" in html and "cdt:stable" in html
