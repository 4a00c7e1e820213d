"""Made-up circuit graphs: a small one that is easy to reason about, and one as real ones look."""

from __future__ import annotations

import random

from cdt_lens.circuits.graph import Edge, Graph, GraphNode
from cdt_lens.circuits.nodes import node_names, possible_edges


def small() -> Graph:
    """2 layers of 2 heads: L0H1 moves L1H0's queries, M1 is a dead end, L0H0 is outside."""
    kept = ("input", "L0H1", "M0", "L1H0", "M1", "logits")
    scores = {"L0H0": -0.01, "L0H1": 0.2, "L1H0": 0.75}
    return Graph(
        n_layers=2,
        n_heads=2,
        nodes={name: GraphNode(scores.get(name), name in kept) for name in node_names(2, 2)},
        edges=(
            Edge("input", "L0H1", "v", 0.5),
            Edge("input", "L0H0", "v", 0.125, in_graph=False),
            Edge("input", "M0", "", None),
            Edge("L0H0", "L1H0", "k", 0.3),  # in the graph, but its source is not
            Edge("L0H1", "L1H0", "q", -0.25),
            Edge("M0", "L1H0", "v", 0.1),
            Edge("M0", "M1", "", 0.05),
            Edge("L1H0", "logits", "", 1 / 3),
        ),
        d_model=8,
    )


def large(
    n_layers: int = 30,
    n_heads: int = 9,
    *,
    heads: int = 12,
    edges: int = 40,
    parallel: bool = False,
    seed: int = 0,
) -> Graph:
    """Some heads, half as many MLPs, and edges between them, two in five negative."""
    draw = random.Random(seed)
    names = node_names(n_layers, n_heads)
    chosen = draw.sample([name for name in names if name.startswith("L")], heads)
    chosen += draw.sample([f"M{layer}" for layer in range(n_layers)], heads // 2)
    kept = {"input", *chosen, "logits"}
    between = [
        ends
        for ends in possible_edges(n_layers, n_heads, parallel=parallel)
        if ends[0] in kept and ends[1] in kept
    ]
    nodes = {
        name: GraphNode(draw.gauss(0, 0.5) if name.startswith("L") else None, name in kept)
        for name in names
    }
    drawn = draw.sample(between, edges)
    return Graph(
        n_layers, n_heads, nodes, tuple(Edge(*ends, draw.gauss(0.1, 0.4) ** 3) for ends in drawn),
        d_model=576, parallel=parallel,
    )  # fmt: skip
