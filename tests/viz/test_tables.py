from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import torch
from helpers import sample_results as sample

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.core.table import Table
from cdt_lens.models.heads import Head
from cdt_lens.viz import tables, words
from cdt_lens.viz.tables import Scored


def rows(table: Table) -> list[list[str]]:
    body = ElementTree.fromstring(table.__html__()).find("tbody")
    shown = [[cell.text or "" for cell in row] for row in body]
    assert shown == table.texts
    return shown


def tiny(**changes) -> Scored:
    values = {
        "values": torch.tensor([[0.5, -0.25], [torch.nan, -1e-6]]),
        "stderr": torch.tensor([[0.1, 0.0], [torch.nan, 0.1]]),
        "method": "cdt",
        "direction": 2.0,
    }
    return Scored(**(values | changes))


def test_scored_reads_the_scores_a_circuit_kept():
    circuit = sample.circuit()
    kept = Scored.kept_by(circuit)
    assert kept.method == "cdt"
    head = circuit.heads[0]
    assert kept.at(head) == Scored.of(sample.scores()).at(head)
    assert Scored.kept_by(Circuit((head,), 30, 9)) is None
    assert Scored.kept_by(replace(circuit, stderr=None)).stderr.isnan().all()


def test_heads_table_has_the_share_of_the_direction_and_no_negative_zero():
    heads = [Head(0, 0), Head(0, 1), Head(1, 1)]
    assert rows(tables.heads_table(tiny(), heads, caption="c")) == [
        ["L0H0", "+0.5000", "0.1000", "n/a", "+25.0%"],
        ["L0H1", "-0.2500", "0.0000", "n/a", "-12.5%"],
        ["L1H1", "+0.0000", "0.1000", "n/a", "+0.0%"],
    ]
    known = replace(tiny(), low=tiny().values - 0.25, high=tiny().values + 0.5)
    shown = rows(tables.heads_table(known, heads, caption="c"))
    assert [row[3] for row in shown] == [
        "[+0.2500, +1.0000]", "[-0.5000, +0.2500]", "[-0.2500, +0.5000]",
    ]  # fmt: skip
    assert known.unresolved.tolist() == [[False, True], [False, True]]
    unknown = tables.heads_table(tiny(direction=None), heads, caption="c")
    assert [len(row) for row in rows(unknown)] == [4, 4, 4]
    assert rows(tables.heads_table(tiny(direction=0.0), heads[:1], caption="c"))[0][-1] == "n/a"


def test_layers_table_lists_the_heads_of_each_layer():
    circuit = Circuit((Head(3, 1), Head(0, 2), Head(3, 0)), 4, 4)
    assert rows(tables.layers_table(circuit)) == [["0", "1", "L0H2"], ["3", "2", "L3H0, L3H1"]]


def test_areas_table_compares_with_each_control():
    curve = sample.curve()
    first, second, third = rows(tables.areas_table(curve))
    intervals = curve.area_intervals()
    assert first == [
        "circuit",
        f"0.930 {words.limits(intervals['cpr'], '.3f')}",
        f"0.090 {words.limits(intervals['cmd'], '.3f')}",
        f"{curve.log_area:.3f} {words.limits(intervals['log_area'], '.3f')}",
    ]
    assert second[:3] == [
        "random heads",
        words.spread(curve.random_cpr["random"]),
        words.spread(curve.random_cmd["random"]),
    ]
    old = replace(curve, effects=None, without_effects=None, strata=None)
    assert rows(tables.areas_table(old))[0][:3] == ["circuit", "0.930", "0.090"]
    assert rows(tables.areas_table(old))[0][3] == f"{curve.log_area:.3f}"
    assert third[0] == "random heads, same per layer"


def test_sizes_table_has_a_row_for_each_size_with_a_head():
    curve = sample.curve()
    shown = rows(tables.sizes_table(curve))
    assert [row[0] for row in shown] == [str(size) for size in curve.sizes if size]
    low, high = (float(limit[6]) for limit in curve.interval())
    assert shown[5][:3] == ["27", "10 %", f"0.840 [{low:.3f}, {high:.3f}]"]
    assert shown[5][3].startswith("0.244 [")
    assert shown[5][4] == words.spread(curve.random["random"][:, 6])
    assert shown[5][5] == "100%"


def test_spread_is_the_median_and_the_5th_and_95th_percentile():
    assert words.spread(torch.arange(101.0)) == "50.000 [5.000, 95.000]"
    assert words.spread(torch.empty(0)) == "n/a"


def test_medians_names_no_control_that_was_not_drawn():
    assert words.medians({"a": torch.tensor([1.0, 2.0, 9.0]), "b": torch.empty(0)}) == "2.00"
    assert words.medians({}) == "not drawn"


def test_differences_table_starts_with_the_largest_and_skips_unscored_heads():
    other = tiny(values=torch.tensor([[0.4, 0.75], [0.0, 0.0]]), method="mean-ablation")
    shown = rows(tables.differences_table(tiny(), other))
    assert shown[0] == ["L0H1", "-0.2500", "+0.7500"]
    assert "L1H0" not in [row[0] for row in shown]
    assert len(rows(tables.differences_table(tiny(), other, count=1))) == 1


def test_tokens_table_makes_white_space_visible():
    shown = rows(tables.tokens_table((" a", "\n"), (0.25, -0.5)))
    assert shown == [["0", "\u00b7a", "+0.2500"], ["1", "\u21b5", "-0.5000"]]


def test_provenance_tells_once_what_all_results_share():
    one = {"model": "m", "seed": None, "options": {"k": 1, "rules": {"norm": "through"}}}
    two = {"model": "m", "seed": None, "options": {"k": 2, "rules": {"norm": "through"}}}
    told = words.provenance_rows([("one", one), ("two", two), ("one", one)])
    shared = {
        "": [("model", "m"), ("seed", "none")],
        "options": [("rules \u203a norm", "through")],
    }
    assert told == [
        ("Common to all results", shared),
        ("one", {"options": [("k", "1")]}),
        ("two", {"options": [("k", "2")]}),
    ]


def test_provenance_of_one_result_is_told_whole_and_of_none_not_at_all():
    assert words.provenance_rows([("one", {"a": {}, "b": [1, "x"]})]) == [
        ("one", {"": [("a", ""), ("b", "1, x")]})
    ]
    assert words.provenance_rows([]) == []


def test_provenance_keeps_two_results_of_one_name_apart():
    told = words.provenance_rows([("scores", {"task": "a"}), ("scores", {"task": "b"})])
    assert told == [("scores", {"": [("task", "a")]}), ("scores", {"": [("task", "b")]})]
