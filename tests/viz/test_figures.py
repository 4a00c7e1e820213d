from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import torch
from helpers import sample_results as sample
from matplotlib._pylab_helpers import Gcf
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.core.errors import InputError
from cdt_lens.models.heads import Head
from cdt_lens.viz import figures
from cdt_lens.viz.tables import Scored

SHAPES = [(6, 4), (30, 9), (48, 32)]


def collection(figure: Figure, gid: str):
    return next(c for c in figure.axes[0].collections if c.get_gid() == gid)


def outlines(figure: Figure) -> set[str]:
    gids = [patch.get_gid() or "" for patch in figure.axes[0].patches]
    return {gid.removeprefix("circuit-") for gid in gids if gid.startswith("circuit-")}


def legend_words(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def words(figure: Figure) -> list:
    axes = figure.axes[0]
    labels = [axes.title, axes.xaxis.label, axes.yaxis.label]
    return [label for label in labels if label.get_text()]


def draw(figure: Figure) -> Figure:
    figure.draw_without_rendering()
    return figure


@pytest.mark.parametrize(("layers", "heads"), SHAPES)
def test_heatmap_shows_every_score_and_outlines_the_circuit(layers, heads):
    scores = sample.scores(layers, heads)
    circuit = scores.select(fraction=0.1)
    figure = draw(figures.heatmap(scores, circuit=circuit))
    shown = np.asarray(collection(figure, "cells").get_array()).reshape(layers, heads)
    np.testing.assert_array_equal(shown, scores.values.double().numpy())
    assert outlines(figure) == {str(head) for head in circuit.heads}
    assert f"in the circuit ({len(circuit)} heads)" in legend_words(figure)


def test_heatmap_puts_layer_0_on_top_and_an_outline_around_its_own_cell():
    scores = sample.scores(6, 4)
    circuit = Circuit((Head(5, 1),), 6, 4)
    axes = figures.heatmap(scores, circuit=circuit).axes[0]
    assert axes.get_ylim() == (5.5, -0.5)
    box = next(patch for patch in axes.patches if patch.get_gid() == "circuit-L5H1")
    assert box.get_x() < 1 < box.get_x() + box.get_width()
    assert box.get_y() < 5 < box.get_y() + box.get_height()


def test_heatmap_colours_are_centred_on_zero_with_blue_for_positive():
    values = torch.tensor([[0.5, -0.2], [0.0, 0.1]])
    figure = figures.heatmap(replace(sample.scores(2, 2), values=values))
    cells = collection(figure, "cells")
    assert cells.get_clim() == (-0.5, 0.5)
    red, _, blue = (cells.to_rgba(value)[:3] for value in (-0.5, 0.0, 0.5))
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    assert figure.axes[1].get_ylabel() == "logits (+ = towards the gold label)"


def test_heatmap_marks_negative_and_unscored_cells_without_relying_on_colour():
    values = torch.tensor([[0.5, -0.2], [-0.01, torch.nan]])
    low, high = values - 0.1, values + 0.1
    scored = replace(Scored.of(sample.scores(2, 2)), values=values, low=low, high=high)
    figure = figures.heatmap(scored)
    assert collection(figure, "negative").get_offsets().tolist() == [[1, 0]]
    assert collection(figure, "not scored").get_offsets().tolist() == [[1, 1]]
    assert collection(figure, "0 not excluded").get_offsets().tolist() == [[0, 1]]
    assert legend_words(figure) == ["negative", "not scored", "0 not excluded"]


@pytest.mark.parametrize("fill", [0.0, torch.nan])
def test_heatmap_of_nothing_but_zeros_or_unscored_heads_is_drawn(fill):
    draw(figures.heatmap(replace(sample.scores(3, 3), values=torch.full((3, 3), fill))))


def test_heatmap_limit_sets_the_ends_of_the_colours():
    figure = figures.heatmap(sample.scores(), limit=0.25)
    assert collection(figure, "cells").get_clim() == (-0.25, 0.25)


def test_heatmap_refuses_a_circuit_of_another_model_and_a_limit_of_zero():
    with pytest.raises(InputError, match=r"6 layers of 4 heads, the circuit 30 of 9"):
        figures.heatmap(sample.scores(6, 4), circuit=sample.circuit())
    with pytest.raises(InputError, match="limit"):
        figures.heatmap(sample.scores(), limit=0.0)


def test_curve_shows_the_data_the_bands_and_the_areas():
    curve = sample.curve()
    axes = draw(figures.curve(curve)).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    circuit = lines["circuit (CPR 0.93, CMD 0.09)"]
    np.testing.assert_allclose(circuit.get_xdata(), curve.fractions[1:])  # the first has no head
    np.testing.assert_allclose(circuit.get_ydata(), curve.faithfulness[1:])
    without = lines["circuit knocked out, the rest kept"]
    np.testing.assert_allclose(without.get_ydata(), curve.completeness[1:])
    label = next(label for label in lines if label.startswith("random heads, median"))
    middle = np.median(curve.random["random"], axis=0)[1:]
    np.testing.assert_allclose(lines[label].get_ydata(), middle)
    assert f"CPR {float(curve.random_cpr['random'].median()):.2f}" in label
    low, high = np.quantile(curve.random["random"][:, 1:], (0.05, 0.95), axis=0)
    bars = np.array([segment[:, 1] for segment in axes.collections[-1].get_segments()])
    np.testing.assert_allclose(bars, np.stack([x[1:] for x in curve.interval()], 1), rtol=1e-6)
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(low.min())
    assert band.max() == pytest.approx(high.max())
    assert {0.0, 1.0} <= {
        line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1
    }


def test_curve_lines_differ_in_style_or_marker_not_only_in_colour():
    figure = figures.curve(sample.curve())
    lines = [line for line in figure.axes[0].lines if line.get_label() in legend_words(figure)]
    looks = {(line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(looks) == len(lines) == 4


def test_curve_is_logarithmic_and_leaves_out_an_empty_circuit():
    curve = sample.curve()
    with_empty = replace(curve, fractions=(0.0, *curve.fractions[1:]))
    for shown in (curve, with_empty):
        assert draw(figures.curve(shown)).axes[0].get_xscale() == "log"


def test_curve_without_random_draws_is_drawn():
    curve = sample.curve()
    nothing = {
        part: {name: values[:0] for name, values in getattr(curve, part).items()}
        for part in ("random", "random_cpr", "random_cmd")
    }
    draw(figures.curve(replace(curve, **nothing)))
    draw(figures.curve(replace(curve, random={}, random_cpr={}, random_cmd={}, beaten={})))


def test_agreement_puts_the_reference_across_and_the_correlations_in_the_title():
    result = sample.agreement()
    figure = draw(figures.agreement(result))
    points = np.asarray(collection(figure, "points").get_offsets())
    np.testing.assert_allclose(points[:, 0], result.reference.values.flatten())
    np.testing.assert_allclose(points[:, 1], result.scores.values.flatten())
    title = figure.axes[0].get_title()
    assert f"Spearman {result.spearman:.2f}" in title
    assert f"Pearson {result.pearson:.2f}" in title


def test_agreement_names_the_strongest_head_and_leaves_out_unscored_ones():
    result = sample.agreement()
    top = result.scores.top(1)[0]
    assert str(top) in [text.get_text() for text in figures.agreement(result).axes[0].texts]
    values = result.scores.values.clone()
    values[top.layer, top.head] = torch.nan
    figure = draw(figures.agreement(replace(result, scores=replace(result.scores, values=values))))
    assert len(collection(figure, "points").get_offsets()) == values.numel() - 1
    assert str(top) not in [text.get_text() for text in figure.axes[0].texts]


def test_agreement_refuses_scores_of_two_models():
    result = sample.agreement()
    with pytest.raises(InputError, match="same model"):
        figures.agreement(replace(result, reference=sample.scores(6, 4)))


def test_bars_are_the_top_heads_with_their_standard_errors():
    scores = sample.scores()
    axes = draw(figures.bars(scores, 12)).axes[0]
    heads = scores.top(12)
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(h) for h in heads]
    expected = [float(scores.values[h.layer, h.head]) for h in heads]
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], expected, rtol=1e-6)
    segments = axes.collections[0].get_segments()
    errors = [(end[0] - start[0]) / 2 for start, end in segments]
    stderr = [float(scores.stderr[h.layer, h.head]) for h in heads]
    np.testing.assert_allclose(errors, stderr, rtol=1e-5)
    for bar, value in zip(axes.patches, expected, strict=True):
        assert bool(bar.get_hatch()) == (value < 0)
        colour = figures.POSITIVE if value >= 0 else figures.NEGATIVE
        assert to_hex(bar.get_facecolor()) == colour


def test_bars_shows_all_heads_where_there_are_fewer_than_k():
    scores = sample.scores(2, 3)
    values = scores.values.clone()
    values[0, 0] = torch.nan
    figure = draw(figures.bars(replace(scores, values=values), 20))
    assert len(figure.axes[0].patches) == 5


def test_bars_refuses_no_heads():
    with pytest.raises(InputError, match="k=0"):
        figures.bars(sample.scores(), 0)
    nothing = replace(sample.scores(2, 2), values=torch.full((2, 2), torch.nan))
    with pytest.raises(InputError, match="0 scores"):
        figures.bars(nothing)


@pytest.mark.parametrize(("layers", "heads"), SHAPES)
def test_words_lie_inside_the_figure_and_ticks_do_not_touch(layers, heads):
    scores = sample.scores(layers, heads, method="cdt with a rather long name of its own")
    for figure in (figures.heatmap(scores, circuit=scores.select(k=3)), figures.bars(scores)):
        draw(figure)
        edge = figure.bbox.padded(1)
        for text in words(figure):
            box = text.get_window_extent()
            assert edge.x0 <= box.x0 <= box.x1 <= edge.x1
            assert edge.y0 <= box.y0 <= box.y1 <= edge.y1
        axes = figure.axes[0]
        for labels, side in ((axes.get_xticklabels(), "x"), (axes.get_yticklabels(), "y")):
            shown = [label.get_window_extent() for label in labels if label.get_text()]
            spans = sorted((getattr(b, f"{side}0"), getattr(b, f"{side}1")) for b in shown)
            assert all(a[1] <= b[0] + 1 for a, b in pairwise(spans))


def test_a_name_with_dollar_signs_is_not_read_as_a_formula():
    scores = sample.scores(6, 4, method=r"$\frac cdt$ and $x")
    draw(figures.heatmap(scores))
    draw(figures.bars(scores))
    draw(figures.agreement(replace(sample.agreement(), scores=sample.scores(method="$\\bad$"))))


def test_drawing_leaves_matplotlibs_state_alone_and_describes_itself():
    before = dict(matplotlib.rcParams)
    managed = dict(Gcf.figs)
    scores = sample.scores()
    drawn = [
        figures.heatmap(scores),
        figures.bars(scores),
        figures.curve(sample.curve()),
        figures.agreement(sample.agreement()),
    ]
    assert dict(matplotlib.rcParams) == before
    assert dict(Gcf.figs) == managed
    assert all(figure.get_label() for figure in drawn)
