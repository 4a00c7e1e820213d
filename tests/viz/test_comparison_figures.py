"""Figures of compared methods: every number stands where it should, and reads in grey."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from helpers import sample_comparison as sample
from matplotlib._pylab_helpers import Gcf
from matplotlib.figure import Figure

from cdt_lens.comparing.comparison import Comparison, MethodResult, RankingCurve
from cdt_lens.viz import comparison_figures as figures
from cdt_lens.viz.svg import figure_html


def draw(figure: Figure) -> Figure:
    figure.draw_without_rendering()
    return figure


@functools.cache
def drawn_sample() -> Figure:
    """The figure of a dozen methods, one of them refused, which many tests look at."""
    return draw(figures.comparison(sample.comparison(refused=["cdt:official"])))


def panels(figure: Figure) -> dict[str, object]:
    """The panels by their label; the first axes of all only carry the title."""
    return {axes.get_label(): axes for axes in figure.axes[1:]}


def points(figure: Figure) -> dict[str, np.ndarray]:
    named = [c for axes in figure.axes for c in axes.collections if c.get_gid()]
    return {c.get_gid(): np.asarray(c.get_offsets()) for c in named}


def legend_words(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize(("panel", "by"), [("A", "signed"), ("B", "magnitude")])
def test_every_method_has_its_curve_by_both_rankings(panel, by):
    """From the third size on: the first two keep no head."""
    result = sample.comparison(refused=["cdt:official"])
    axes = panels(drawn_sample())[panel]
    drawn = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]
    for each in result.methods:
        curve = each.curve(by)
        found = curve is not None and any(
            len(y) == len(curve.f) - 2 and np.allclose(y, curve.f[2:]) for y in drawn
        )
        assert found == (each.method != "cdt:official")
    assert by in axes.get_title(loc="left")


def test_the_areas_stand_at_the_method_s_row():
    result = sample.comparison(refused=["cdt:official"])
    found = points(drawn_sample())
    scored = [place for place, each in enumerate(result.methods) if not each.refused]
    for measure in ("cpr", "cmd"):
        for by in ("signed", "magnitude"):
            across, up = found[f"{measure}-{by}"].T
            values = [result.methods[place].value(measure, by) for place in scored]
            np.testing.assert_allclose(across, values)
            assert np.floor(up).tolist() == scored
    # Equal areas of both rankings do not hide each other.
    assert not np.allclose(found["cpr-signed"][:, 1], found["cpr-magnitude"][:, 1])


def test_agreement_stands_against_cost_without_the_yardstick():
    result = sample.comparison(refused=["cdt:official"])
    found = points(drawn_sample())
    drawn = {gid: xy for gid, xy in found.items() if gid.startswith("agreement-")}
    assert len(drawn) == 10 and not {"agreement-0", "agreement-2"} & set(drawn)
    for place, each in enumerate(result.methods):
        if f"agreement-{place}" not in drawn:
            continue
        expected = [[each.forward_passes, each.spearman]]
        np.testing.assert_allclose(drawn[f"agreement-{place}"], expected)


def test_unknown_time_or_order_leaves_a_method_out_of_the_scatter_alone():
    result = sample.comparison()
    unknown = replace(result.methods[3], forward_passes=float("nan"))
    flat = replace(result.methods[4], spearman=float("nan"))
    result = replace(result, methods=(*result.methods[:3], unknown, flat, *result.methods[5:]))
    found = points(draw(figures.comparison(result)))
    assert not {"agreement-3", "agreement-4"} & set(found)
    assert len(found["cpr-signed"]) == 12
    assert set(figures.point_lines(result)) == set(found)


def test_pointing_at_a_dot_names_its_method():
    result = sample.comparison(refused=["cdt:official"])
    lines = figures.point_lines(result)
    found = points(drawn_sample())
    assert {gid: len(xy) for gid, xy in found.items()} == {g: len(x) for g, x in lines.items()}
    html = figure_html(drawn_sample(), prefix="p", tooltips=lines)
    assert html.count("<title>") == sum(map(len, lines.values()))
    stable = result["cdt:stable"]
    assert f"cdt:stable: CPR {stable.signed.cpr:.3f}, ranked signed" in lines["cpr-signed"]
    assert lines["agreement-1"] == ["cdt:stable: Spearman 0.350, 243 forward passes"]


def test_a_dozen_methods_are_told_apart_without_colour():
    result = sample.comparison()
    looks = figures.looks(result)
    assert len({marker for _, marker, _ in looks.values()}) == 12
    lines = [str(looks[name][2]) for name in result.names[1:]]
    assert all(a != b for a, b in pairwise(lines))
    assert legend_words(figures.comparison(result))[:12] == list(result.names)
    # The same method looks the same, whatever else is refused.
    assert figures.looks(sample.comparison(refused=["cdt:official"])) == looks


def test_a_ranking_far_off_is_cut_and_the_cut_is_told():
    result = sample.comparison()
    f = (0.0, 0.0, -40.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    wild = RankingCurve.of(result.fractions, result.sizes, f)
    methods = (replace(result.methods[1], signed=wild), *result.methods[2:])
    shown = panels(draw(figures.comparison(replace(result, methods=methods))))
    low, high = shown["A"].get_ylim()
    assert -1.5 < low < -0.9 and 1.9 < high < 2.5
    assert [t.get_text() for t in shown["A"].texts] == ["cut off: f from -40.0 to 3.0"]
    assert not shown["B"].texts


def test_random_rankings_are_a_band_and_a_line():
    result = sample.comparison(refused=["cdt:official"])
    shown = panels(drawn_sample())
    middle = np.median([curve.f for curve in result.random], axis=0)[2:]
    assert any(
        len(line.get_ydata()) == len(middle) and np.allclose(line.get_ydata(), middle)
        for line in shown["A"].lines
    )
    words = legend_words(figures.comparison(replace(result, random=())))
    assert not any("random rankings" in word for word in words)


@pytest.mark.parametrize("methods", [("exact",), ("exact", "cdt:stable")])
def test_few_methods_are_drawn(methods):
    draw(figures.comparison(sample.comparison(methods)))


def test_only_refusals_are_drawn():
    result = sample.comparison(("exact", "direct"))
    refused = MethodResult("exact", refused="no")
    figure = draw(figures.comparison(replace(result, methods=(refused,))))
    assert "Refused, and not drawn: exact." in figure.get_label()


def test_names_are_text_and_no_formulas():
    result: Comparison = sample.comparison()
    odd = replace(result.methods[1], method="cdt:$x$_{")
    origin = replace(result.provenance, task="$\\frac{$", model="a_$_b" * 30)
    draw(figures.comparison(replace(result, methods=(odd, *result.methods), provenance=origin)))
    draw(figures.planted(replace(sample.planted(), circuits={"$a_{$": result})))


def test_planted_circuits_have_a_number_in_every_cell():
    planted = sample.planted()
    figure = draw(figures.planted(planted))
    top, bottom = figure.axes
    for axes, measure in ((top, "auroc"), (bottom, "average_precision")):
        frame = planted.matrix(measure)
        words = {(round(t.get_position()[1]), round(t.get_position()[0])): t for t in axes.texts}
        assert len(words) == 12 * 11  # with the mean
        for row in range(12):
            for place in range(10):
                value = frame.iloc[row, place]
                wanted = "n/a" if np.isnan(value) else f"{value:.2f}"
                assert words[row, place].get_text() == wanted
    assert "12 methods on 10 planted circuits" in figure.get_label()


def test_no_figure_is_left_with_pyplot():
    figures.comparison(sample.comparison())
    figures.planted(sample.planted())
    assert not Gcf.get_all_fig_managers()
