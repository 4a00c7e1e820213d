"""Figures of compared methods: every number stands where it should, and reads in grey."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from helpers import sample_comparison as sample
from helpers.drawn import look, rows, words

from cdt_lens.comparing.comparison import MethodResult, RankingCurve
from cdt_lens.viz import comparison_figures as figures


@pytest.mark.parametrize(("panel", "by"), [(0, "signed"), (1, "magnitude")])
def test_every_method_has_its_curve_by_both_rankings(panel, by):
    """From the third size on: the first two keep no head."""
    result = sample.comparison(refused=["cdt:official"])
    drawn = rows(figures.comparison(result), "point", panel)
    for each in result.methods:
        curve = each.curve(by)
        f = [row["f"] for row in drawn if row["method"] == each.method]
        assert f == ([] if curve is None else list(curve.f[2:]))
    assert {row["method"] for row in drawn} == set(result.names) - {"cdt:official"}


def test_the_areas_stand_at_the_method_s_row():
    result = sample.comparison(refused=["cdt:official"])
    figure = figures.comparison(result)
    scored = [each for each in result.methods if not each.refused]
    panels = [(m, by) for m in ("cpr", "cmd") for by in ("signed", "magnitude")]
    for number, (measure, by) in enumerate(panels, start=2):
        drawn = rows(figure, "point", number)
        assert [row["method"] for row in drawn] == [each.method for each in scored]
        assert [row["value"] for row in drawn] == [each.value(measure, by) for each in scored]
    assert "cdt:official (refused)" in words(figure)


def test_agreement_stands_against_cost_without_the_yardstick():
    result = sample.comparison(refused=["cdt:official"])
    drawn = {row["method"]: row for row in rows(figures.comparison(result), "point", 6)}
    assert set(drawn) == set(result.names) - {"exact", "cdt:official"}
    for name, row in drawn.items():
        assert (row["cost"], row["spearman"]) == (
            result[name].forward_passes,
            result[name].spearman,
        )


def test_unknown_time_or_order_leaves_a_method_out_of_the_scatter_alone():
    result = sample.comparison()
    unknown = replace(result.methods[3], forward_passes=float("nan"))
    flat = replace(result.methods[4], spearman=float("nan"))
    result = replace(result, methods=(*result.methods[:3], unknown, flat, *result.methods[5:]))
    figure = figures.comparison(result)
    left_out = {unknown.method, flat.method}
    assert not left_out & {row["method"] for row in rows(figure, "point", 6)}
    assert left_out <= {row["method"] for row in rows(figure, "point", 2)}


def test_a_dozen_methods_are_told_apart_without_colour():
    result = sample.comparison()
    looks = figures.method_looks(result)
    assert len({marker for _, marker, _ in looks.values()}) == 12
    assert all(looks[a][2] != looks[b][2] for a, b in pairwise(result.names[1:]))
    figure = figures.comparison(result)
    assert list(look(figure, "method", "shape")) == list(result.names)
    assert set(result.names) <= set(words(figure))
    # The same method looks the same, whatever else is refused.
    assert figures.method_looks(sample.comparison(refused=["cdt:official"])) == looks


def test_a_ranking_far_off_is_cut_and_the_cut_is_told():
    result = sample.comparison()
    f = (0.0, 0.0, -40.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    wild = RankingCurve.of(result.fractions, result.sizes, f)
    methods = (replace(result.methods[1], signed=wild), *result.methods[2:])
    figure = figures.comparison(replace(result, methods=methods))
    left, right = figure.spec["vconcat"][0]["hconcat"]
    low, high = left["layer"][2]["encoding"]["y"]["scale"]["domain"]
    assert -1.5 < low < -0.9 and 1.9 < high < 2.5
    assert words(figure).count("cut off: f from -40.0 to 3.0") == 1
    assert len(left["layer"]) == len(right["layer"]) + 1


def test_random_rankings_are_a_band_and_a_line():
    result = sample.comparison(refused=["cdt:official"])
    low, middle, high = np.quantile([c.f for c in result.random], (0.05, 0.5, 0.95), axis=0)
    figure = figures.comparison(result)
    band = rows(figure, "area")
    for key, values in (("low", low), ("f", middle), ("high", high)):
        np.testing.assert_array_equal([row[key] for row in band], values[2:])
    assert any("random rankings" in word for word in words(figure))
    bare = figures.comparison(replace(result, random=()))
    assert not any("random rankings" in word for word in words(bare))


@pytest.mark.parametrize("methods", [("exact",), ("exact", "cdt:stable")])
def test_few_methods_are_drawn(methods):
    assert figures.comparison(sample.comparison(methods)).svg()


def test_only_refusals_are_drawn():
    result = sample.comparison(("exact", "direct"))
    figure = figures.comparison(replace(result, methods=(MethodResult("exact", refused="no"),)))
    assert "Refused, and not drawn: exact." in figure.description and figure.svg()


def test_planted_circuits_have_a_number_in_every_cell():
    planted = sample.planted()
    figure = figures.planted(planted)
    for number, measure in enumerate(("auroc", "average_precision")):
        frame = planted.matrix(measure)
        drawn = {
            (row["method"], row["circuit"]): row["words"] for row in rows(figure, "text", number)
        }
        assert len(drawn) == 12 * 11  # with the mean
        for method, values in frame.iterrows():
            for circuit, value in values.items():
                wanted = "n/a" if np.isnan(value) else f"{value:.2f}"
                assert drawn[method, circuit] == wanted
    assert "12 methods on 10 planted circuits" in figure.description
    assert {*planted.circuits, "mean", *planted.methods} <= set(words(figure))
