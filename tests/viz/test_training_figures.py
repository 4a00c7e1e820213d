from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from helpers import sample_results as sample
from matplotlib._pylab_helpers import Gcf
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cdt_lens.finetuning.transfer_result import TransferResult
from cdt_lens.models.heads import Head
from cdt_lens.viz import training_figures as figures
from cdt_lens.viz.svg import figure_html

BOTH = (figures.trade_off, figures.accuracies)
LONG = "a-language-with-an-unbroken-name-" * 4


def draw(figure: Figure) -> Figure:
    figure.draw_without_rendering()
    return figure


def panels(figure: Figure) -> list[Axes]:
    """The visible panels; the first axes of all only carry the title of the page's drawing."""
    return [axes for axes in figure.axes[1:] if axes.get_visible()]


def points(figure: Figure) -> dict[str, np.ndarray]:
    """Where the points of each gid stand: [point, (across, up)]."""
    named = [c for axes in figure.axes for c in axes.collections if c.get_gid()]
    return {c.get_gid(): np.asarray(c.get_offsets()) for c in named}


def legend_words(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def lines_at(axes: Axes, *, upright: bool) -> set[float]:
    """Where straight reference lines stand."""
    ends = [line.get_xdata() if upright else line.get_ydata() for line in axes.lines]
    return {float(pair[0]) for pair in ends if len(pair) == 2 and pair[0] == pair[1]}


def runs(result: TransferResult, target: str, scope: str) -> pd.DataFrame:
    cells = result.cells
    return cells[(cells["target"] == target) & (cells["scope"] == scope)]


def without(result: TransferResult, target: str, scope: str) -> TransferResult:
    return replace(result, cells=result.cells.drop(runs(result, target, scope).index))


def test_learning_curve_draws_the_history_and_stars_what_is_kept():
    result = sample.fine_tuning()
    figure = draw(figures.learning_curve(result))
    top, bottom = figure.axes
    lines = {line.get_label(): line for axes in (top, bottom) for line in axes.lines}
    for label, column in (
        ("target accuracy", "target_accuracy"),
        ("target macro-F1", "target_macro_f1"),
        ("source accuracy", "source_accuracy"),
        ("target loss", "target_loss"),
    ):
        np.testing.assert_array_equal(lines[label].get_xdata(), result.history["step"])
        np.testing.assert_array_equal(lines[label].get_ydata(), result.history[column])
    # Nothing was trained before the first row.
    np.testing.assert_array_equal(lines["training loss"].get_xdata(), result.history["step"][1:])
    stars = [np.asarray(c.get_offsets()) for c in (*top.collections, *bottom.collections)]
    np.testing.assert_allclose(stars[0], [[100, 0.72]])
    np.testing.assert_allclose(stars[1], [[100, result.history["target_loss"][4]]])
    assert legend_words(figure).count("kept: epoch 4") == 1
    assert "from 0.490 to 0.720 at epoch 4" in figure.get_label()


def test_learning_curve_lines_differ_in_style_or_marker_not_only_in_colour():
    for axes in figures.learning_curve(sample.fine_tuning()).axes:
        looks = {(line.get_linestyle(), line.get_marker()) for line in axes.lines}
        assert len(looks) == len(axes.lines) >= 2


def test_learning_curve_leaves_out_what_was_never_measured():
    figure = draw(figures.learning_curve(sample.fine_tuning(source=False)))
    assert "source accuracy" not in legend_words(figure)
    result = sample.fine_tuning()
    blind = result.history.assign(
        target_accuracy=np.nan, target_macro_f1=np.nan, target_loss=np.nan, source_accuracy=np.nan
    )
    figure = draw(figures.learning_curve(replace(result, history=blind)))
    assert legend_words(figure) == ["kept: epoch 4", "training loss"]


def test_learning_curve_of_no_epochs_at_all_is_drawn():
    result = sample.fine_tuning()
    draw(figures.learning_curve(replace(result, history=result.history[:1], best_epoch=0)))


def test_trained_heads_are_told_from_their_siblings_and_the_rest_also_in_grey():
    result = replace(sample.fine_tuning(), heads=(Head(2, 1),), siblings=(Head(2, 0), Head(2, 2)))
    figure = draw(figures.trained_heads(result))
    axes = figure.axes[0]
    cells = next(c for c in axes.collections if c.get_gid() == "cells")
    states = np.asarray(cells.get_array()).reshape(30, 9)
    assert states[2].tolist() == [1, 2, 1, 0, 0, 0, 0, 0, 0]
    assert states.sum() == 4
    crosses = next(c for c in axes.collections if c.get_gid() != "cells")
    assert np.asarray(crosses.get_offsets()).tolist() == [[0, 2], [2, 2]]
    assert legend_words(figure) == ["trained (1 heads)", "shares a K/V slice (2)", "not trained"]


def test_trade_off_has_every_seed_the_mean_and_the_untouched_checkpoint():
    result = sample.transfer()
    figure = draw(figures.trade_off(result))
    placed = points(figure)
    for index, target in enumerate(result.targets):
        for place, scope in enumerate(result.scopes):
            expected = runs(result, target, scope)[["retention", "accuracy"]].to_numpy()
            np.testing.assert_allclose(placed[f"seeds-{index}-{place}"], expected)
            np.testing.assert_allclose(placed[f"mean-{index}-{place}"], [expected.mean(0)])
        before = result.before["accuracy"][1 + index]
        axes = panels(figure)[index]
        star = next(c for c in axes.collections if not c.get_gid())
        np.testing.assert_allclose(star.get_offsets(), [[1, before]])
        assert lines_at(axes, upright=True) >= {1.0}
        assert lines_at(axes, upright=False) >= {before}


def test_accuracies_stand_on_the_row_of_their_scope_beside_chance():
    result = sample.transfer()
    figure = draw(figures.accuracies(result))
    placed = points(figure)
    for index, target in enumerate(result.targets):
        axes = panels(figure)[index]
        assert lines_at(axes, upright=True) >= {
            result.chance[target],
            result.before["accuracy"][1 + index],
        }
        for place, scope in enumerate(result.scopes):
            expected = runs(result, target, scope)["accuracy"]
            seeds = placed[f"seeds-{index}-{place}"]
            np.testing.assert_allclose(seeds[:, 0], expected)
            assert (np.abs(seeds[:, 1] - place) < 0.5).all()
            np.testing.assert_allclose(placed[f"mean-{index}-{place}"], [[expected.mean(), place]])
    names = [label.get_text() for label in panels(figure)[0].get_yticklabels()]
    assert names == list(result.scopes)
    top, bottom = panels(figure)[0].get_ylim()[::-1]
    assert top < 0 < bottom  # the first scope on top


def test_the_line_through_a_mean_is_one_deviation_each_way():
    result = sample.transfer(("t",), ("decision",))
    axes = panels(figures.accuracies(result))[0]
    low, high = next(line.get_xdata() for line in axes.lines if list(line.get_ydata()) == [0, 0])
    accuracy = result.cells["accuracy"]
    assert (low + high) / 2 == pytest.approx(accuracy.mean())
    assert (high - low) / 2 == pytest.approx(accuracy.std(ddof=1))


@pytest.mark.parametrize("figure_of", BOTH)
def test_one_seed_is_one_point(figure_of):
    figure = draw(figure_of(sample.transfer(seeds=(4,))))
    assert {gid.split("-")[0] for gid in points(figure)} == {"mean"}
    assert not {"one seed", "mean over seeds"} & set(legend_words(figure))


@pytest.mark.parametrize("figure_of", BOTH)
def test_runs_that_are_missing_or_not_finite_are_not_drawn(figure_of):
    result = without(sample.transfer(), "javanese", "full")
    place = result.scopes.index("full")
    cells = result.cells.copy()
    cells.loc[cells.index[:2], "accuracy"] = [np.nan, np.inf]  # two of the first scope's seeds
    placed = points(draw(figure_of(replace(result, cells=cells))))
    assert f"mean-0-{place}" not in placed and f"mean-1-{place}" in placed
    assert "seeds-0-0" not in placed and len(placed["mean-0-0"]) == 1


@pytest.mark.parametrize("figure_of", BOTH)
@pytest.mark.parametrize("cells", [pd.DataFrame(), sample.transfer().cells.iloc[:0]])
def test_before_the_first_run_the_panels_say_so(figure_of, cells):
    figure = draw(figure_of(replace(sample.transfer(), cells=cells)))
    said = [text.get_text() for axes in panels(figure) for text in axes.texts]
    assert said == ["no finished run"] * 3


@pytest.mark.parametrize("figure_of", BOTH)
def test_unknown_references_are_left_out(figure_of):
    result = sample.transfer()
    draw(figure_of(replace(result, before=result.before.iloc[:0], chance={})))


@pytest.mark.parametrize("figure_of", BOTH)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 12])
def test_panels_wrap_share_their_scales_and_name_both_axes(figure_of, count):
    targets = tuple(f"language {index}" for index in range(count))
    figure = draw(figure_of(sample.transfer(targets, ("decision", "full"))))
    shown = panels(figure)
    assert [axes.get_title(loc="left") for axes in shown] == list(targets)
    boxes = [axes.get_position() for axes in shown]
    across = len({round(box.x0, 3) for box in boxes})
    assert across == {1: 1, 2: 2, 4: 2}.get(count, 3)
    assert len({(axes.get_xlim(), axes.get_ylim()) for axes in shown}) == 1
    # The lowest panel of each column has the numbers and the name of the axis.
    for x0 in {round(box.x0, 3) for box in boxes}:
        column = [axes for axes, box in zip(shown, boxes, strict=True) if round(box.x0, 3) == x0]
        lowest = min(column, key=lambda axes: axes.get_position().y0)
        assert lowest.get_xlabel()
        assert any(label.get_visible() for label in lowest.get_xticklabels())


@pytest.mark.parametrize("figure_of", BOTH)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_long_names_and_legends_lie_inside_the_figure(figure_of, count):
    scopes = ("decision", "near-zero", "random", "random-per-layer", "norms", "full", "lora")
    targets = (LONG, "a language of several words and then some more", "c")[:count]
    result = sample.transfer(targets, scopes)
    figure = draw(figure_of(result))
    edge = figure.bbox.padded(1)
    texts = [axes._left_title for axes in panels(figure)]
    texts += [figure._suptitle, *(t for each in figure.legends for t in each.get_texts())]
    texts += [label for axes in panels(figure)[:1] for label in axes.get_yticklabels()]
    for text in texts:
        box = text.get_window_extent()
        assert edge.x0 <= box.x0 <= box.x1 <= edge.x1, text
        assert edge.y0 <= box.y0 <= box.y1 <= edge.y1, text
    titles = [axes._left_title.get_window_extent() for axes in panels(figure)]
    assert all(one.x1 <= two.x0 for one, two in pairwise(titles))


def test_a_scope_looks_the_same_everywhere_and_no_two_share_a_marker():
    scopes = ("decision", "near-zero", "random", "random-per-layer", "norms", "full", "lora",
              "mine", "yours")  # fmt: skip
    whole = sample.transfer(("t",), scopes)
    looks = [figures._look(whole, place) for place in range(len(scopes))]
    assert len({marker for _, marker in looks}) == len({colour for colour, _ in looks}) == 9
    fewer = replace(whole, scopes=("full", "yours", "decision"))
    assert [figures._look(fewer, place) for place in (0, 2)] == [looks[5], looks[0]]


@pytest.mark.parametrize(
    ("figure_of", "columns"), [(BOTH[0], ("accuracy", "retention")), (BOTH[1], ("accuracy",))]
)
def test_each_point_says_on_a_page_which_run_it_is(figure_of, columns):
    result = without(sample.transfer(), "sundanese", "lora")
    drawn = figure_of(result)
    lines = figures.point_lines(result, *columns)
    root = ElementTree.fromstring(figure_html(drawn, prefix="f", tooltips=lines))
    assert set(lines) == set(points(drawn))
    for gid, expected in lines.items():
        titles = [title.text for title in root.find(f".//g[@id='f-{gid}']").iter("title")]
        assert titles == expected, gid
    run = runs(result, "javanese", "near-zero").iloc[1]
    said = lines["seeds-0-1"][1]
    assert said.startswith(f"javanese, near-zero, seed 1: accuracy {run['accuracy']:.3f}")
    assert ("retention" in said) == ("retention" in columns)
    assert lines["mean-0-1"][0].startswith("javanese, near-zero, mean of 3 seeds: accuracy 0.")


@pytest.mark.parametrize("figure_of", BOTH)
def test_a_page_names_the_drawing_by_its_title(figure_of):
    figure = figure_of(sample.transfer())
    root = ElementTree.fromstring(figure_html(figure))
    assert root.find("title").text == figure.get_suptitle()
    assert root.find("desc").text == figure.get_label()


def test_a_name_with_dollar_signs_is_not_read_as_a_formula():
    odd = "$\\frac x$ and $y"
    result = sample.transfer((odd,), (odd, "decision"))
    for figure_of in BOTH:
        assert odd in re.sub(r"\s+", " ", "".join(map(_text, panels(draw(figure_of(result))))))
    draw(figures.learning_curve(sample.fine_tuning(odd)))
    draw(figures.trained_heads(sample.fine_tuning(odd)))


def _text(axes: Axes) -> str:
    return axes.get_title(loc="left")


def test_drawing_leaves_matplotlibs_state_alone_and_describes_itself():
    before, managed = dict(matplotlib.rcParams), dict(Gcf.figs)
    drawn = [figure_of(sample.transfer()) for figure_of in BOTH]
    drawn += [f(sample.fine_tuning()) for f in (figures.learning_curve, figures.trained_heads)]
    assert dict(matplotlib.rcParams) == before
    assert dict(Gcf.figs) == managed
    assert all(figure.get_label() for figure in drawn)
