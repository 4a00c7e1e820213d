"""Tables of compared methods: what is starred, what is left out of it, what reads alike."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from helpers import sample_comparison as sample

from cdt_lens.comparing.comparison import Comparison, MethodResult
from cdt_lens.core.errors import InputError
from cdt_lens.viz import comparison_tables as tables

HOSTILE = "<script>window.__pwned=1</script>"


def with_numbers(**numbers: tuple[float, ...]) -> Comparison:
    """Methods exact, a, b, c with these numbers."""
    names = ("exact", "a", "b", "c")
    methods = [
        MethodResult(name, **{key: values[place] for key, values in numbers.items()})
        for place, name in enumerate(names)
    ]
    return replace(sample.comparison(), methods=tuple(methods))


def column(result: Comparison, heading: str) -> list[str]:
    return tables.methods(result).to_dataframe()[heading].tolist()[: len(result.methods)]


def test_the_best_agreement_is_marked_and_the_yardstick_does_not_count():
    found = column(with_numbers(spearman=(1.0, 0.2, 0.9, -0.5)), "Spearman")
    assert found == ["1.000", "0.200", "0.900 *", "-0.500"]


def test_numbers_that_read_the_same_are_marked_alike():
    found = column(with_numbers(auroc=(0.9, 0.9004, 0.9001, 0.3)), "AUROC")
    assert found == ["0.900 *", "0.900 *", "0.900 *", "0.300"]
    assert column(with_numbers(auroc=(1.0, 1.0, 1.0, 1.0)), "AUROC") == ["1.000"] * 4


def test_costs_have_no_best():
    result = with_numbers(
        forward_passes=(81.3, 3.12, 1234.6, 0.0061), seconds=(300.0, 8.0, 0.004, 1.0)
    )
    assert column(result, "forward passes") == ["81", "3.1", "1,235", "0.0061"]
    assert column(result, "time") == ["5.0 min", "8.0 s", "4 ms", "1.0 s"]


def test_less_is_better_in_cmd():
    result = sample.comparison()
    table = tables.methods(result).to_dataframe().set_index("method")
    starred = {heading: table.index[table[heading].str.endswith("*")].tolist() for heading in table}
    assert starred["CMD, signed"] == [result.best("cmd", "signed").method]
    assert starred["CPR, magnitude"] == [result.best("cpr", "magnitude").method]
    assert starred["CMD, magnitude"] == [result.best("cmd", "magnitude").method]


def test_a_refused_method_keeps_its_row_and_its_reason():
    result = sample.comparison(refused=["cdt:official"])
    table = tables.methods(result).to_dataframe().set_index("method")
    assert set(table.loc["cdt:official (refused)"]) == {"\u2013"}
    assert "10 of 270 source sets left the finite range" in tables.descriptions(result).__html__()
    assert len(table) == len(result.methods) + 1


def test_the_last_row_is_random_rankings():
    result = sample.comparison()
    last = tables.methods(result).to_dataframe().iloc[-1]
    assert last["method"] == "random rankings (median of 5)"
    assert last["CPR, signed"] == last["CPR, magnitude"] == f"{result.random_areas()['cpr']:.3f}"
    assert last["CMD, signed"] == f"{result.random_areas()['cmd']:.3f}"
    assert last["Spearman"] == last["time"] == "\u2013"
    assert len(tables.methods(replace(result, random=())).rows) == len(result.methods)


def test_prompts_are_told_where_a_budget_makes_them_differ():
    result = with_numbers(scored=(31, 16, 1493, 48), exact=(None, None, None, 29))
    assert not {"prompts", "swept"} & set(tables.methods(result).headings)
    result = replace(result, budget=4480.0)
    assert column(result, "prompts") == ["31", "16", "1,493", "48"]
    assert column(result, "swept") == ["n/a", "n/a", "n/a", "29"]
    assert (
        "up to 16 scored (4480 forward passes each) and 16 held" in tables.methods(result).caption
    )
    split = (*tables.agreement(result).headings[1:], *tables.use(result).headings[1:])
    assert sorted(split) == sorted(tables.methods(result).headings[1:])
    assert all("," in heading for heading in tables.use(result).headings[1:])


def test_f_stands_at_the_sizes_that_keep_a_head_with_its_interval():
    result = sample.comparison(["exact", "direct"], refused=["direct"])
    table = tables.sizes(result).to_dataframe()
    assert list(table) == [
        "method", "ranked by", "f at 1 % (2)", "f at 2 % (5)", "f at 5 % (13)", "f at 10 % (27)",
        "f at 20 % (54)",
    ]  # fmt: skip
    assert table[["method", "ranked by"]].to_numpy().tolist() == [
        ["exact", "signed"], ["exact", "magnitude"],
    ]  # fmt: skip
    row = result.faithfulness().iloc[1]
    assert table.iloc[0, 2] == f"{row['f']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    small = replace(result, sizes=(0,) * 4 + result.sizes[4:])  # a model with fewer heads
    assert list(tables.sizes(small).headings)[2:] == list(table)[3:]
    areas = tables.areas(result).to_dataframe()
    assert list(areas)[2:] == ["CPR", "CMD", "area, log sizes"] and len(areas) == 2
    low, high = result.areas().loc[0, ["low", "high"]]
    assert areas.iloc[0, 2] == f"{result['exact'].signed.cpr:.3f} [{low:.3f}, {high:.3f}]"


def test_real_differences_are_told_from_others():
    result = sample.comparison(["exact", "cdt:stable"])
    twin = replace(result.methods[1], method="twin")
    table = tables.differences(replace(result, methods=(*result.methods, twin)))
    assert "minus that of cdt:stable" in table.caption and "signed score" in table.caption
    ((name, difference, real), other) = table.texts
    assert (name, real) == ("exact", "yes") and difference.startswith("-0.")
    assert other == ["twin", "+0.000 [+0.000, +0.000]", "no"]
    unknown = tables.differences(replace(result, strata=None))
    assert unknown.texts[0][2] == "n/a" and "[" not in unknown.texts[0][1]
    assert "magnitude" in tables.differences(result, "magnitude").caption


def test_columns_about_the_truth_stand_only_where_it_is_known():
    assert {"AUROC", "average precision"} <= set(
        tables.methods(sample.comparison(truth=True)).headings
    )
    unknown = sample.comparison()
    assert not {"AUROC", "average precision"} & set(tables.methods(unknown).headings)
    assert "AUROC" not in tables.meanings(unknown).__html__()
    assert "AUROC" in tables.meanings(sample.comparison(truth=True)).__html__()


def test_every_column_has_its_meaning():
    result = sample.comparison(truth=True)
    meanings = tables.meanings(result).__html__()
    for heading in list(tables.methods(result).to_dataframe())[1:]:
        assert f'<th scope="row">{heading}</th>' in meanings


def test_the_page_says_best_in_words_and_not_by_colour():
    html = tables.methods(sample.comparison()).__html__()
    # Spearman, Pearson and six areas.
    assert len(re.findall('<strong><span role="img" aria-label="best">', html)) == 8
    assert html.count("<tr>") == 1 + 12 + 1


def test_text_from_outside_is_escaped():
    hostile = MethodResult(HOSTILE, HOSTILE, refused=HOSTILE)
    result = replace(sample.comparison(), methods=(hostile,))
    for html in (tables.methods(result).__html__(), tables.descriptions(result).__html__()):
        assert HOSTILE not in html and "&lt;script&gt;" in html
    planted = replace(sample.planted(), circuits={HOSTILE: result}, why={HOSTILE: HOSTILE})
    for table in (tables.planted(planted, "auroc"), tables.planted_meanings(planted)):
        assert HOSTILE not in table.__html__()


def test_planted_circuits_stand_side_by_side_with_their_mean():
    planted = sample.planted()
    table = tables.planted(planted).to_dataframe().set_index("method")
    assert list(table) == [*sample.CIRCUITS, "mean"]
    assert table.loc["exact", "hand-or"] == table.loc["exact", "mean"] == "1.000 *"
    # Refused on one circuit: no mean, as it would be over easier or harder ones than the others'.
    assert table.loc["cdt:official", "trained-attention-only"] == "n/a"
    assert table.loc["cdt:official", "mean"] == "n/a"
    assert table.loc["cdt:stable", "mean"] == "0.350"
    with pytest.raises(InputError, match="measure 'f1'"):
        tables.planted(planted, "f1")
