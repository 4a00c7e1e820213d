"""A figure: one specification, drawn without a browser and the same each time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import sample_results as sample
from helpers.drawn import words

from cdt_lens.core.display import Figure
from cdt_lens.core.errors import InputError
from cdt_lens.viz import figures, spec

HOSTILE = '</title><script>window.__pwned=1</script> <b onclick="x"> & "quotes"'


def one(title: str, text: str = "x") -> Figure:
    body = {"width": 300, "layer": [spec.layer("text", [{"a": text}], text=spec.name("a"))]}
    return spec.figure(title, title, body)


def test_an_svg_is_the_same_each_time_and_two_share_no_id():
    first, again = (figures.heatmap(sample.scores()).svg() for _ in range(2))
    second = figures.heatmap(sample.scores(seed=1)).svg()
    assert first == again
    ids = [re.findall(r'\bid="([^"]*)"', svg) for svg in (first, second)]
    assert ids[0] and len(ids[0]) == len(set(ids[0])) and not set(ids[0]) & set(ids[1])
    used = set(re.findall(r'url\(#([^")]+)\)', first))
    assert used and used <= set(ids[0])


def test_an_svg_describes_itself_and_can_shrink():
    root = ElementTree.fromstring(figures.heatmap(sample.scores()).svg())
    assert root.get("role") == "img" and "max-width:100%" in root.get("style")
    assert root.get("aria-label").startswith("Score of every head: cdt. Heat map of 30 layers by 9")


@pytest.mark.parametrize(
    "text", [HOSTILE, r"$\frac x$ and $y", "\u7f8e\u5473 \u0627\u0644\u0637\u0639\u0627\u0645 \u0b95"]
)  # fmt: skip
def test_text_stays_text_in_any_script(text: str):
    drawn = one("t", text)
    assert text in words(drawn)
    root = ElementTree.fromstring(one(text).svg())
    assert {element.tag.rpartition("}")[2] for element in root.iter()} <= {
        "svg", "rect", "g", "path", "text", "defs", "clipPath", "tspan",
    }  # fmt: skip


def test_text_is_never_an_expression():
    """A signal in a specification is an object, which no text of a result becomes."""
    assert 'expr: "1 + 1"' in words(one("t", 'expr: "1 + 1"'))
    assert "{'expr': '1 + 1'}" in words(one("t", {"expr": "1 + 1"}["expr"] and "{'expr': '1 + 1'}"))


def test_half_characters_and_numbers_that_are_not_finite_are_replaced():
    assert spec.plain("\ud83d \x00 \x1b ok") == "\ufffd \ufffd \ufffd ok"
    assert spec.plain([np.float32("nan"), np.inf, np.int64(3), np.bool_(True), 0.5]) == [
        None, None, 3, True, 0.5,
    ]  # fmt: skip
    assert one("\ud83d \x00").svg()


@pytest.mark.parametrize(
    ("ending", "start"), [("svg", b"<svg "), ("png", b"\x89PNG"), ("pdf", b"%PDF"), ("json", b"{")]
)
def test_a_figure_is_saved_for_paper(tmp_path: Path, ending: str, start: bytes):
    figure = figures.bars(sample.scores(), 3)
    path = figure.save(tmp_path / f"f.{ending}")
    assert path.read_bytes().startswith(start)
    if ending == "json":
        assert json.loads(path.read_text("utf-8")) == figure.spec


def test_another_ending_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"f\.gif: expected a file that ends in \.svg, \.png"):
        one("t").save(tmp_path / "f.gif")
    assert not list(tmp_path.iterdir())
