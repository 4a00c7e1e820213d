"""The drawing of a circuit graph: what is on it, where, and that it can be read."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from helpers import sample_graph as sample
from helpers.drawn import look, rows, words

from cdt_lens.circuits.graph import Edge, Graph, GraphNode
from cdt_lens.circuits.nodes import node_names
from cdt_lens.core.display import Figure
from cdt_lens.core.errors import InputError
from cdt_lens.viz.graph_figure import drawn_edges, edge_line, graph_figure, layered

GRAPHS = [
    sample.small(),
    sample.large(),
    sample.large(12, 12, heads=20, edges=60),
    sample.large(8, 8, heads=10, edges=30, parallel=True),
]


def lines(figure: Figure) -> dict[str, list[dict]]:
    """The points of each line, from its source upwards, by the words of its edge."""
    found: dict[str, list[dict]] = {}
    for row in rows(figure, "line"):
        found.setdefault(row["edge"], []).append(row)
    return {edge: sorted(points, key=lambda row: row["order"]) for edge, points in found.items()}


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_kept_head_and_drawn_edge_is_there_once(graph: Graph):
    figure = graph_figure(graph, 40)
    edges = drawn_edges(graph, 40)
    assert set(lines(figure)) == {edge_line(graph, edge) for edge in edges}
    nodes = [row["node"] for row in rows(figure, "rect")]
    ends = {end for edge in edges for end in (edge.source, edge.target)}
    assert ends | {str(head) for head in graph.heads} <= set(nodes) <= set(graph.kept_nodes)
    assert len(nodes) == len(set(nodes)) and set(nodes) <= set(words(figure))


@pytest.mark.parametrize("graph", GRAPHS)
def test_lines_run_upwards_and_boxes_do_not_touch(graph: Graph):
    figure = graph_figure(graph, 60)
    for points in lines(figure).values():
        assert all(low["y"] < high["y"] for low, high in pairwise(points))
    boxes = rows(figure, "rect")
    for one, other in combinations(boxes, 2):
        apart = one["right"] < other["left"] or other["right"] < one["left"]
        assert apart or one["high"] < other["low"] or other["high"] < one["low"]


def test_a_line_starts_and_ends_at_its_nodes_and_enters_at_its_letter():
    graph = sample.small()
    figure = graph_figure(graph)
    middle = {row["node"]: row["x"] for row in rows(figure, "rect")}
    offsets = {}
    for edge in drawn_edges(graph, 40):
        points = lines(figure)[edge_line(graph, edge)]
        assert points[0]["x"] == pytest.approx(middle[edge.source])
        offsets[edge.name] = points[-1]["x"] - middle[edge.target]
    assert offsets["L0H1->L1H0<q>"] < 0 < offsets["M0->L1H0<v>"]
    assert offsets["L1H0->logits"] == pytest.approx(0)
    assert {"q", "v"} <= set(words(figure)) and "k" not in words(figure)


def test_sign_is_told_by_colour_and_line_and_size_by_width():
    graph = sample.small()
    figure = graph_figure(graph)
    drawn = {edge.name: lines(figure)[edge_line(graph, edge)][0] for edge in drawn_edges(graph, 40)}
    signs = {name: row["sign"] for name, row in drawn.items()}
    assert signs["input->L0H1<v>"] == "positive" and signs["L0H1->L1H0<q>"] == "negative"
    assert signs["input->M0"] == "not scored"
    assert len(set(look(figure, "sign", "strokeDash").values())) == 3
    strongest = drawn["input->L0H1<v>"]["size"]
    assert strongest == max(row["size"] for row in drawn.values()) == 0.5


def test_the_strongest_edges_are_drawn_and_the_title_counts_the_rest():
    graph = sample.large(edges=50)
    figure = graph_figure(graph, 10)
    assert drawn_edges(graph, 10) == graph.top_edges(10)
    assert figure.title == "Circuit graph: 12 heads of 270, 10 of 50 edges"
    assert edge_line(graph, graph.top_edges(1)[0]) in figure.description
    assert "50 edges" in graph_figure(graph, 50).title
    with pytest.raises(InputError, match="max_edges=-1"):
        graph_figure(graph, -1)


def test_edges_without_a_score_are_drawn_only_if_all_fit():
    nodes = {name: GraphNode(None, True) for name in node_names(2, 2)}
    scored = Edge("L0H0", "logits", "", 0.5)
    others = tuple(Edge("input", f"L{layer}H1", "v", None) for layer in range(2))
    graph = Graph(2, 2, nodes, (*others, scored))
    assert drawn_edges(graph, 3) == (scored, *others)
    assert drawn_edges(graph, 2) == (scored,)
    assert edge_line(graph, others[0]) == "input->L0H1<v>: not scored"


def test_layers_are_named_once_at_their_row():
    names = rows(graph_figure(sample.small()), "text", 3)
    assert [row["words"] for row in names] == ["input", "layer 0", "layer 1", "logits"]
    heights = [row["y"] for row in names]
    assert heights == sorted(set(heights))


def test_the_unit_is_the_graphs_own():
    note = " ".join(graph_figure(sample.small()).spec["title"]["subtitle"])
    assert "Scores in logits (+ = towards the gold label)" in note
    figure = graph_figure(replace(sample.small(), unit="nats of a $loss$ and $"))
    assert "nats of a $loss$" in " ".join(figure.spec["title"]["subtitle"])
    assert "logits." not in figure.description and figure.svg()


@pytest.mark.parametrize(
    "graph",
    [
        Graph(1, 1, {}, ()),
        Graph(1, 1, {"L0H0": GraphNode(0.0, True)}, ()),
        Graph(
            1,
            1,
            {"input": GraphNode(None, True), "logits": GraphNode(None, True)},
            (Edge("input", "logits", "", 0.0),),
        ),
    ],
)
def test_hardly_anything_is_drawn_too(graph: Graph):
    figure = graph_figure(graph)
    assert figure.svg() and figure.description


def test_drawing_is_the_same_each_time():
    assert graph_figure(sample.large()) == graph_figure(sample.large())


# Layout --------------------------------------------------------------------------------------------


def test_a_long_line_bends_around_the_node_in_its_way():
    steps = {"a": 0, "b": 2, "c": 4}
    layout = layered(steps, [("a", "b"), ("b", "c"), ("a", "c")])
    heights = [layout.nodes[name][1] for name in "abc"]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1])
    assert [len(bends) for bends in layout.bends] == [0, 0, 1]
    ((x, y),) = layout.bends[2]
    assert y == heights[1]
    assert abs(x - layout.nodes["b"][0]) > 0.3


def test_rows_are_put_in_the_order_that_crosses_least():
    steps = {name: int(name[1]) for name in ("a0", "b0", "c0", "a1", "b1", "c1")}
    layout = layered(steps, [("a0", "c1"), ("b0", "b1"), ("c0", "a1")])
    x = {name: spot[0] for name, spot in layout.nodes.items()}
    assert (
        np.argsort([x["a0"], x["b0"], x["c0"]]).tolist()
        == np.argsort([x["c1"], x["b1"], x["a1"]]).tolist()
    )
