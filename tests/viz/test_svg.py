from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from helpers import sample_results as sample
from matplotlib.figure import Figure

from cdt_lens.viz import figures
from cdt_lens.viz.svg import figure_html

HOSTILE = '</title><script>window.__pwned=1</script> <b onclick="x"> & "quotes"'


def tree(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(html)


def titled(title: str, label: str = "") -> Figure:
    figure = Figure(figsize=(3, 2))
    figure.add_subplot().set_title(title, parse_math=False)
    figure.set_label(label)
    return figure


def test_a_figure_is_an_svg_element_with_its_own_ids_and_references():
    svg = figure_html(figures.heatmap(sample.scores()), prefix="one")
    assert svg.startswith("<svg ")
    assert "<?xml" not in svg and "<!DOCTYPE" not in svg and "<metadata" not in svg
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert len(ids) == len(set(ids))
    assert all(id == "one" or id.startswith("one-") for id in ids)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    assert used and used <= set(ids)
    # A style element would reach every other figure on the page.
    assert not tree(svg).findall(".//style")


def test_two_figures_share_no_id_and_one_figure_is_the_same_each_time():
    first = figure_html(figures.heatmap(sample.scores()))
    second = figure_html(figures.heatmap(sample.scores(seed=1)))
    ids = [set(re.findall(r'\bid="([^"]*)"', svg)) for svg in (first, second)]
    assert not ids[0] & ids[1]
    assert first == figure_html(figures.heatmap(sample.scores()))


def test_a_figure_has_a_title_a_description_and_a_size_that_can_shrink():
    root = tree(figure_html(titled("What it is", "What it shows"), prefix="f"))
    assert root.get("role") == "img"
    named = [root.find(f"*[@id='{id}']").text for id in root.get("aria-labelledby").split()]
    assert named == ["What it is", "What it shows"]
    assert "max-width:100%" in root.get("style")
    assert (root.get("width"), root.get("height")) == ("288", "192")


def test_text_stays_text_in_a_figure():
    root = tree(figure_html(titled(HOSTILE, HOSTILE)))
    assert HOSTILE in [element.text for element in root.iter("text")]
    assert not list(root.iter("script")) and not list(root.iter("b"))
    odd = 'a $ sign, id="x" url(#y), \x00 and \x1b'
    shown = [element.text for element in tree(figure_html(titled(odd))).iter("text")]
    assert 'a $ sign, id="x" url(#y), \ufffd and \ufffd' in shown


def test_scripts_that_matplotlibs_font_lacks_raise_no_warning():
    title = "\u7f8e\u5473 \u0627\u0644\u0637\u0639\u0627\u0645 \u0b95"
    svg = figure_html(titled(title))
    assert title in [element.text for element in tree(svg).iter("text")]


def test_tooltips_name_each_cell_in_order():
    scores = sample.scores(6, 4)
    lines = [f"cell {index}" for index in range(24)]
    svg = figure_html(figures.heatmap(scores), prefix="m", tooltips={"cells": lines})
    cells = tree(svg).find(".//g[@id='m-cells']").findall("path")
    assert [cell.find("title").text for cell in cells] == lines


@pytest.mark.parametrize("tooltips", [{"cells": ["too few"]}, {"no such": ["x"]}])
def test_tooltips_that_do_not_fit_are_left_out(tooltips):
    svg = figure_html(figures.heatmap(sample.scores(6, 4)), tooltips=tooltips)
    assert not tree(svg).findall(".//path/title")


def test_tooltips_name_each_point_of_a_scatter():
    result = sample.agreement()
    lines = [f"point {index}" for index in range(270)]
    svg = figure_html(figures.agreement(result), prefix="a", tooltips={"points": lines})
    titles = [title.text for title in tree(svg).find(".//g[@id='a-points']").iter("title")]
    assert titles == lines
