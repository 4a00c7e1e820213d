"""The drawing of a circuit graph: what is on it, where, and that it can be read."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import matplotlib
import numpy as np
import pytest
from helpers import sample_graph as sample
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch

from cdt_lens.circuits.graph import Edge, Graph, GraphNode
from cdt_lens.circuits.nodes import node_names
from cdt_lens.core.errors import InputError
from cdt_lens.viz.graph_figure import drawn_edges, edge_line, graph_figure, layered

GRAPHS = [
    sample.small(),
    sample.large(),
    sample.large(12, 12, heads=20, edges=60),
    sample.large(8, 8, heads=10, edges=30, parallel=True),
]


def patches(figure: Figure, kind: type, start: str) -> dict[str, object]:
    gids = {str(patch.get_gid()): patch for patch in figure.axes[0].patches}
    return {gid: p for gid, p in gids.items() if gid.startswith(start) and isinstance(p, kind)}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_kept_head_and_drawn_edge_is_there_once(graph: Graph):
    figure = graph_figure(graph, 40)
    edges = drawn_edges(graph, 40)
    assert set(patches(figure, PathPatch, "edge-")) == {f"edge-{i}" for i in range(len(edges))}
    nodes = {gid.removeprefix("node-") for gid in patches(figure, FancyBboxPatch, "node-")}
    ends = {end for edge in edges for end in (edge.source, edge.target)}
    assert ends | {str(head) for head in graph.heads} <= nodes <= set(graph.kept_nodes)
    assert nodes <= set(texts(figure))
    assert len(figure.axes[0].patches) == len(edges) + len(nodes)


@pytest.mark.parametrize("graph", GRAPHS)
def test_lines_run_upwards_and_boxes_do_not_touch(graph: Graph):
    figure = graph_figure(graph, 60)
    figure.draw_without_rendering()
    for patch in patches(figure, PathPatch, "edge-").values():
        ends = patch.get_path().vertices[::3, 1]
        assert all(low < high for low, high in pairwise(ends))
    boxes = [p.get_window_extent() for p in patches(figure, FancyBboxPatch, "node-").values()]
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other)
    width, height = figure.bbox.width, figure.bbox.height
    assert all(0 <= b.x0 < b.x1 <= width and 0 <= b.y0 < b.y1 <= height for b in boxes)


def test_names_fit_their_boxes():
    figure = graph_figure(sample.large(24, 16, heads=20), 40)
    figure.draw_without_rendering()
    names = {t.get_text(): t.get_window_extent() for t in figure.axes[0].texts}
    for gid, patch in patches(figure, FancyBboxPatch, "node-").items():
        box, name = patch.get_window_extent(), names[gid.removeprefix("node-")]
        assert box.x0 <= name.x0 and name.x1 <= box.x1


def test_a_line_starts_and_ends_at_its_nodes_and_enters_at_its_letter():
    graph = sample.small()
    figure = graph_figure(graph)
    boxes = patches(figure, FancyBboxPatch, "node-")

    def middle(name: str) -> float:
        box = boxes[f"node-{name}"]
        return box.get_x() + box.get_width() / 2

    offsets = {}
    for index, edge in enumerate(drawn_edges(graph, 40)):
        spots = patches(figure, PathPatch, "edge-")[f"edge-{index}"].get_path().vertices
        assert spots[0, 0] == pytest.approx(middle(edge.source))
        offsets[edge.name] = spots[-1, 0] - middle(edge.target)
    assert offsets["L0H1->L1H0<q>"] < 0 < offsets["M0->L1H0<v>"]
    assert offsets["L1H0->logits"] == pytest.approx(0)
    assert {"q", "v"} <= set(texts(figure)) and "k" not in texts(figure)


def test_sign_is_told_by_colour_and_line_and_size_by_width():
    graph = sample.small()
    lines = patches(graph_figure(graph), PathPatch, "edge-")
    looks = {edge.name: lines[f"edge-{index}"] for index, edge in enumerate(drawn_edges(graph, 40))}
    positive, negative = looks["input->L0H1<v>"], looks["L0H1->L1H0<q>"]
    assert positive.get_linestyle() in ("-", "solid")
    assert negative.get_linestyle() not in ("-", "solid")
    blue, red = positive.get_edgecolor(), negative.get_edgecolor()
    assert blue[2] > blue[0] and red[0] > red[2]
    widths = [line.get_linewidth() for line in lines.values()]
    strongest = looks["input->L0H1<v>"].get_linewidth()
    assert strongest == max(widths) > looks["M0->L1H0<v>"].get_linewidth()
    unscored = looks["input->M0"]
    assert unscored.get_linestyle() in (":", "dotted")


def test_the_strongest_edges_are_drawn_and_the_title_counts_the_rest():
    graph = sample.large(edges=50)
    figure = graph_figure(graph, 10)
    assert drawn_edges(graph, 10) == graph.top_edges(10)
    assert figure.axes[0].get_title() == "Circuit graph: 12 heads of 270, 10 of 50 edges"
    assert edge_line(graph, graph.top_edges(1)[0]) in figure.get_label()
    assert "50 edges" in graph_figure(graph, 50).axes[0].get_title()
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
    graph = sample.small()
    axes = graph_figure(graph).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["input", "0", "1", "logits"]
    heights = axes.get_yticks()
    assert list(heights) == sorted(heights)


def test_the_unit_is_the_graphs_own():
    note = graph_figure(sample.small()).axes[0].get_xlabel().replace("\n", " ")
    assert "Scores in logits (+ = towards the gold label)" in note
    foreign = replace(sample.small(), unit="nats of a $loss$ and $")
    figure = graph_figure(foreign)
    figure.draw_without_rendering()
    assert "nats of a $loss$" in figure.axes[0].get_xlabel().replace("\n", " ")
    assert "logits." not in figure.get_label()


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
    figure.draw_without_rendering()
    assert figure.get_label()


def test_drawing_is_the_same_each_time_and_leaves_matplotlib_alone():
    before = dict(matplotlib.rcParams)
    paths = [
        [p.get_path().vertices.tolist() for p in graph_figure(sample.large()).axes[0].patches]
        for _ in range(2)
    ]
    assert paths[0] == paths[1]
    assert dict(matplotlib.rcParams) == before


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
