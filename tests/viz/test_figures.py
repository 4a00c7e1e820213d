from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import sample_results as sample
from helpers.drawn import layers, look, rows, words

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.core.errors import InputError
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.viz import figures
from cdt_lens.viz.tables import Scored

SHAPES = [(6, 4), (30, 9), (48, 32)]


@pytest.mark.parametrize(("layers_", "heads"), SHAPES)
def test_heatmap_shows_every_score_and_outlines_the_circuit(layers_, heads):
    scores = sample.scores(layers_, heads)
    circuit = scores.select(fraction=0.1)
    figure = figures.heatmap(scores, circuit=circuit, ranking=scores.ranking())
    cells = rows(figure, "rect")
    assert [row["cell"] for row in cells] == [str(h) for h in all_heads(layers_, heads)]
    assert [row["score"] for row in cells] == scores.values.flatten().tolist()
    assert {row["cell"] for row in cells if row["circuit"]} == {str(head) for head in circuit.heads}
    first = [row["cell"] for row in sorted(cells, key=lambda row: row["rank"])][:9]
    assert first == [str(head) for head in scores.top(9)]
    assert f"Outlined: the {len(circuit)} heads of the circuit." in words(figure)


def test_heatmap_puts_layer_0_on_top_and_an_outline_around_its_own_cell():
    figure = figures.heatmap(sample.scores(6, 4), circuit=Circuit((Head(5, 1),), 6, 4))
    svg = figure.svg()
    corners = {
        (layer, head): tuple(float(part) for part in svg.split(f'aria-label="head: {head}; layer: {layer};')[1]
                             .split(' d="M')[1].split("h")[0].split(","))
        for layer, head in ((0, 0), (5, 1))
    }  # fmt: skip
    (left, top), (right, low) = corners.values()
    assert left < right and top < low
    outlined = [row for row in rows(figure, "rect") if row["circuit"]]
    assert [(row["layer"], row["head"]) for row in outlined] == [(5, 1)]


def test_heatmap_colours_are_centred_on_zero_with_blue_for_positive():
    values = torch.tensor([[0.5, -0.2], [0.0, 0.1]])
    figure = figures.heatmap(replace(sample.scores(2, 2), values=values))
    scale = next(layers(figure.spec))["encoding"]["color"]["scale"]
    assert scale["domain"] == [-0.5, 0, 0.5]
    assert scale["range"][0] == figures.NEGATIVE and scale["range"][2] == figures.POSITIVE
    assert "logits (+ = towards the gold label)" in words(figure)
    limited = figures.heatmap(sample.scores(), limit=0.25)
    assert next(layers(limited.spec))["encoding"]["color"]["scale"]["domain"] == [-0.25, 0, 0.25]


def test_heatmap_marks_negative_and_unscored_cells_without_relying_on_colour():
    values = torch.tensor([[0.5, -0.2], [-0.01, torch.nan]])
    low, high = values - 0.1, values + 0.1
    scored = replace(Scored.of(sample.scores(2, 2)), values=values, low=low, high=high)
    figure = figures.heatmap(scored)
    marks = {(row["note"], row["layer"], row["head"]) for row in rows(figure, "point")}
    assert marks == {("negative", 0, 1), ("not scored", 1, 1), ("0 not excluded", 1, 0)}
    assert len(set(look(figure, "note", "shape").values())) == 3
    assert {"negative", "not scored", "0 not excluded"} <= set(words(figure))


@pytest.mark.parametrize("fill", [0.0, torch.nan])
def test_heatmap_of_nothing_but_zeros_or_unscored_heads_is_drawn(fill):
    assert figures.heatmap(replace(sample.scores(3, 3), values=torch.full((3, 3), fill))).svg()


def test_heatmap_refuses_a_circuit_of_another_model_and_a_limit_of_zero():
    with pytest.raises(InputError, match=r"6 layers of 4 heads, the circuit 30 of 9"):
        figures.heatmap(sample.scores(6, 4), circuit=sample.circuit())
    with pytest.raises(InputError, match="limit"):
        figures.heatmap(sample.scores(), limit=0.0)


def test_curve_shows_the_data_the_bands_and_the_areas():
    curve = sample.curve()
    figure = figures.curve(curve)
    drawn, band = rows(figure, "line", 1), rows(figure, "area")
    names = list(look(figure, "line", "color"))
    assert "(CPR) 0.93" in names[0] and "(CMD) 0.09" in names[0]
    lines = {name: [row for row in (*drawn, *band) if row["line"] == name] for name in names}
    assert [row["fraction"] for row in lines[names[0]]] == list(
        curve.fractions[1:]
    )  # 0 has no head
    assert [row["f"] for row in lines[names[0]]] == curve.faithfulness[1:].tolist()
    assert [row["f"] for row in lines[names[1]]] == curve.completeness[1:].tolist()
    limits = [[row[end] for row in lines[names[0]]] for end in ("low", "high")]
    assert limits == [end[1:].tolist() for end in curve.interval()]
    draws = np.quantile(curve.random["random"].double(), (0.05, 0.5, 0.95), axis=0)[:, 1:]
    random = [[row[end] for row in lines[names[2]]] for end in ("low", "f", "high")]
    np.testing.assert_allclose(random, draws)
    assert f"CPR {float(curve.random_cpr['random'].median()):.2f}" in names[2]
    assert {"full model", "all heads ablated"} <= set(words(figure))


def test_curve_lines_differ_in_dash_not_only_in_colour():
    dashes = look(figures.curve(sample.curve()), "line", "strokeDash")
    assert len(set(dashes.values())) == len(dashes) == 4


@pytest.mark.parametrize("width", [500, 210])
def test_curve_has_a_legend_that_wraps_where_the_panel_ends(width: int):
    figure = figures.curve(sample.curve())
    names = list(look(figure, "line", "color"))
    svg = replace(figure, spec={**figure.spec, "width": width}).svg()
    labels = [re.findall("<text [^>]*>(.*?)</text>", e)[0] for e in svg.split("legend-label")[1:]]
    lines = [re.findall("<tspan[^>]*>(.*?)</tspan>", label) or [label] for label in labels]
    assert [" ".join(parts) for parts in lines] == names
    assert max(len(line) for parts in lines for line in parts) <= width / 6
    assert (len(lines) < sum(map(len, lines))) == (width < 300)


def test_overview_is_the_map_beside_the_curve_at_the_width_of_a_page():
    scores, curve = sample.scores(), sample.curve()
    circuit = scores.select(k=9)
    both = figures.overview(scores, circuit, curve)
    parts = figures.heatmap(scores, circuit=circuit), figures.curve(curve)
    drawn = [each["data"]["values"] for each in layers(both.spec)]
    assert drawn == [each["data"]["values"] for part in parts for each in layers(part.spec)]
    assert all(part.description in both.description for part in parts)
    assert {"negative", "0 not excluded", "full model"} <= set(words(both))
    assert "(CPR) 0.93" in both.svg()
    assert 600 < float(re.search(r'width="(\d+)"', both.svg())[1]) < 720


def test_curve_without_random_draws_is_drawn():
    curve = sample.curve()
    nothing = {
        part: {name: values[:0] for name, values in getattr(curve, part).items()}
        for part in ("random", "random_cpr", "random_cmd")
    }
    bare = replace(curve, random={}, random_cpr={}, random_cmd={}, beaten={})
    for each in (replace(curve, **nothing), bare, replace(curve, effects=None)):
        assert figures.curve(each).svg()


def test_agreement_puts_the_reference_across_and_the_correlations_in_the_title():
    result = sample.agreement()
    figure = figures.agreement(result)
    points = rows(figure, "circle")
    assert [row["x"] for row in points] == result.reference.values.flatten().tolist()
    assert [row["y"] for row in points] == result.scores.values.flatten().tolist()
    assert f"Spearman {result.spearman:.2f}" in figure.title
    assert f"Pearson {result.pearson:.2f}" in figure.title


def test_agreement_names_the_strongest_head_and_leaves_out_unscored_ones():
    result = sample.agreement()
    top = result.scores.top(1)[0]
    assert str(top) in words(figures.agreement(result))
    values = result.scores.values.clone()
    values[top.layer, top.head] = torch.nan
    figure = figures.agreement(replace(result, scores=replace(result.scores, values=values)))
    assert len(rows(figure, "circle")) == values.numel() - 1
    assert str(top) not in words(figure)


def test_agreement_refuses_scores_of_two_models():
    result = sample.agreement()
    with pytest.raises(InputError, match="same model"):
        figures.agreement(replace(result, reference=sample.scores(6, 4)))


def test_bars_are_the_top_heads_with_their_standard_errors():
    scores = sample.scores()
    figure = figures.bars(scores, 12)
    drawn = rows(figure, "bar")
    heads = scores.top(12)
    assert [row["cell"] for row in drawn] == [str(head) for head in heads]
    for row, head in zip(drawn, heads, strict=True):
        value, error = (float(of[head.layer, head.head]) for of in (scores.values, scores.stderr))
        assert (row["score"], row["low"], row["high"]) == (value, value - error, value + error)
    names = [text for text in words(figure) if text.startswith("L")]
    assert names == [str(head) for head in heads]


def test_negative_bars_are_told_apart_without_colour():
    drawn = next(each for each in layers(figures.bars(sample.scores()).spec))["encoding"]
    assert drawn["fillOpacity"]["condition"]["value"] < drawn["fillOpacity"]["value"]
    assert drawn["color"]["condition"]["value"] == figures.NEGATIVE


def test_bars_shows_all_heads_where_there_are_fewer_than_k():
    scores = sample.scores(2, 3)
    values = scores.values.clone()
    values[0, 0] = torch.nan
    assert len(rows(figures.bars(replace(scores, values=values), 20), "bar")) == 5


def test_bars_refuses_no_heads():
    with pytest.raises(InputError, match="k=0"):
        figures.bars(sample.scores(), 0)
    nothing = replace(sample.scores(2, 2), values=torch.full((2, 2), torch.nan))
    with pytest.raises(InputError, match="0 scores"):
        figures.bars(nothing)
