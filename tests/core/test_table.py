"""Tables of text: escaped on a page, plain in a terminal, the best of a column marked."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pandas as pd
import pytest
from markupsafe import Markup

from cdt_lens.core.table import BELOW, BEST, Marked, Table, star_best

HOSTILE = '</title><script>window.__pwned=1</script> <b onclick="x"> & "quotes"'


def tree(table: Table) -> ElementTree.Element:
    return ElementTree.fromstring(table.__html__())


def test_a_table_has_header_cells_and_numbers_to_the_right():
    root = tree(Table(("head", "score", "note"), [("L0H1", "+0.5", "fine"), ("L0H2", "n/a", 3)]))
    assert [th.text for th in root.find("thead").iter("th")] == ["head", "score", "note"]
    assert all(th.get("scope") == "col" for th in root.find("thead").iter("th"))
    assert [th.get("scope") for th in root.find("tbody").iter("th")] == ["row", "row"]
    kinds = {td.text: td.get("class") for td in root.iter("td")}
    assert kinds == {"+0.5": "number", "fine": None, "n/a": "number", "3": "number"}
    # The heading of a column stands with its cells.
    heads = {th.text: th.get("class") for th in root.find("thead").iter("th")}
    assert heads == {"head": None, "score": "number", "note": None}


@pytest.mark.parametrize(
    "text",
    ["12.0 %", "+3.1%", "0.61 [0.59, 0.63]", "-1e-05", "0", "0.712 \u00b1 0.014", "2 of 3",
     "40.4 k (3 %)", "3.5 min", "1,240", "\u2013", Marked(Marked("0.5", BELOW), BEST)],
)  # fmt: skip
def test_numbers_of_every_form_are_recognised(text: object):
    assert 'class="number"' in Table(("a", "b"), [("x", text)]).__html__()


@pytest.mark.parametrize("text", ["L0H1", "2nd", "27 heads", "", "3 to 5"])
def test_words_are_no_numbers(text: str):
    assert "number" not in Table(("a", "b"), [("x", text)]).__html__()


def test_a_table_escapes_what_it_is_given_except_markup():
    rows = [(HOSTILE, HOSTILE), ("x", Markup("<b>y</b>")), ("z", Marked(HOSTILE, BEST))]
    root = tree(Table((HOSTILE, "b"), rows, HOSTILE))
    assert not list(root.iter("script"))
    assert [root.find("caption").text, root.find(".//td").text] == [HOSTILE, HOSTILE]
    assert len(list(root.iter("b"))) == 1
    grouped = Table((HOSTILE, "a", "b"), [(HOSTILE, "c", "d")], grouped=True)
    assert "<script" not in grouped.__html__()


def test_a_group_is_named_once_on_a_page_and_in_every_row_of_text():
    rows = [("a", "x", "1"), ("a", "y", "2"), ("b", "x", "3")]
    table = Table(("group", "name", "value"), rows, grouped=True)
    root = tree(table)
    assert [th.get("rowspan") for th in root.iter("th") if th.get("rowspan")] == ["2", "1"]
    assert len(list(root.iter("tbody"))) == 2
    assert table.texts == [list(row) for row in rows]
    assert table.to_dataframe()["group"].tolist() == ["a", "a", "b"]


@pytest.mark.parametrize("grouped", [False, True])
def test_a_table_without_rows_has_its_headings(grouped: bool):
    empty = Table(("a", "b", "c"), [], grouped=grouped)
    assert [th.text for th in tree(empty).iter("th")] == ["a", "b", "c"]
    assert list(empty.to_dataframe()) == ["a", "b", "c"]


def test_a_mark_is_a_word_on_a_page_and_a_sign_in_text():
    best, below = Marked("0.5", BEST), Marked("0.4", BELOW)
    assert (str(best), str(below)) == ("0.5 *", f"0.4 {BELOW}")
    assert best.__html__() == (
        f'<strong><span role="img" aria-label="best">{BEST}</span> 0.5</strong>'
    )
    assert 'aria-label="below the untouched checkpoint"' in below.__html__()


def test_the_best_cells_are_marked_alike_unless_all_read_the_same():
    values = [0.9001, 0.9004, 0.3, math.nan]
    cells = [f"{value:.3f}" for value in values]
    starred = [Marked("0.900", BEST), Marked("0.900", BEST), "0.300", "nan"]
    assert star_best(cells, values, "{:.3f}".format, max) == starred
    assert star_best(cells, values, "{:.3f}".format, min)[2] == Marked("0.300", BEST)
    assert star_best(cells, values, "{:.3f}".format, None) == cells
    assert star_best(cells[:2], values[:2], "{:.3f}".format, max) == cells[:2]


def test_a_data_frame_is_cut_in_its_middle_and_missing_values_are_empty():
    frame = pd.DataFrame({"a": [float("nan"), *map(float, range(999))], "b": "x" * 500})
    table = Table.of_frame(frame)
    assert len(table.rows) == 41 and table.rows[20] == ["...", "..."]
    assert table.rows[0][0] == "" and table.rows[-1][0] == "998"
    assert len(table.rows[0][1]) == 160
    assert Table.of_frame(pd.DataFrame({"x": [0.123456, None]})).texts == [["0.1235"], [""]]
    html = table.__html__()
    assert "NaN" not in html and "color" not in html
