"""The iterative algorithm of CD-T, which finds the inputs of relevant heads (2407.00886, §3.3).

It goes from the logits to the units (heads and MLPs) most relevant to them, and from each of these
to the units most relevant to its queries, keys and values, or to its input:

1. Score every edge (`edge_scores`).
2. Select the `width` units with the strongest edges to the logits.
3. From the last layer down, keep the `fan_in` strongest edges into each selected unit and select
   the units that they come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.graph import Edge, Graph, GraphNode
from cdt_lens.circuits.nodes import LOGITS
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count, Preset
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.decomposition.rules import Rules, resolve_rules
from cdt_lens.models.heads import Head
from cdt_lens.models.provenance import hashed_once, provenance_of
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.scoring.edge_scores import EdgeScores, Unit, depth, score_edges
from cdt_lens.tasks.task import Examples


@checked_arguments
@uses_model
@hashed_once()
def trace_circuit(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    width: Count = 8,
    fan_in: Count = 3,
    rules: Preset | Rules = "shared",
    batch_size: Count = 16,
    rows: Count | None = None,
    progress: bool = True,
) -> Circuit:
    """Find a circuit and its graph backwards from the logits (arXiv 2407.00886, §3.3).

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score edges on.
        baseline: The values that ablated heads and MLPs take; `mean_activations(..., mlps=True)`.
        width: Number of units selected at the logits.
        fan_in: Number of edges kept into each selected unit.
        rules: Name of a preset, or `Rules`, with context="full".
        batch_size: Number of examples per batch.
        rows: Maximum number of (source x example) rows per forward pass, at least the batch size.
            None chooses it by the length of the prompts.
        progress: Whether to show a progress bar.

    Returns:
        A circuit of the graph's heads. Its scores are those of the edges to the logits, in logits.

    Raises:
        InputError: `width` or `fan_in` is below 1, or as `score_edges`.
        UnsupportedModelError, NonFiniteError: As `score_edges`.
    """
    view = view_of(model)
    rules = resolve_rules(rules)
    scores = score_edges(
        view, examples, baseline, rules=rules, batch_size=batch_size, rows=rows, progress=progress
    )
    edges = select_edges(scores, width=width, fan_in=fan_in)
    options = {
        "method": "iterative-cdt",
        "rules": rules.to_dict(),
        "baseline_hash": baseline.hash,
        "width": width,
        "fan_in": fan_in,
    }
    return _circuit(view, scores, edges, provenance_of(view, examples, options=options))


@checked_arguments
def select_edges(scores: EdgeScores, *, width: Count, fan_in: Count) -> tuple[Edge, ...]:
    """Select the edges into the logits, then into each selected unit, from the last layer down.

    Args:
        scores: Scores of all edges.
        width: Number of units selected at the logits.
        fan_in: Number of edges kept into each selected unit.

    Returns:
        The selected edges, with their scores in logits.

    Raises:
        InputError: `width` or `fan_in` is below 1.
    """
    order = scores.to_logits.abs().argsort(descending=True, stable=True)[:width].tolist()
    edges = [Edge(str(scores.sources[i]), LOGITS, "", float(scores.to_logits[i])) for i in order]
    taken: set[Unit] = {scores.sources[i] for i in order}
    # An MLP reads the heads of its own layer, so it comes before them on the way down.
    for target in sorted(scores.sources, key=depth, reverse=True):
        if target not in taken:
            continue
        for source, site, value in list(scores.into(target))[:fan_in]:
            edges.append(Edge(str(source), str(target), site, value))
            taken.add(source)
    return tuple(edges)


def _circuit(
    view: ModelView, scores: EdgeScores, edges: Sequence[Edge], provenance: object
) -> Circuit:
    named = {str(unit): number for number, unit in enumerate(scores.sources)}
    kept = {edge.source for edge in edges} | {edge.target for edge in edges} - {LOGITS}
    nodes = {
        name: GraphNode(float(scores.to_logits[number]), name in kept)
        for name, number in named.items()
    }
    nodes[LOGITS] = GraphNode(None, True)
    graph = Graph(view.n_layers, view.n_heads, nodes, tuple(edges), view.d_model, view.parallel)
    by_head = torch.zeros(view.n_layers, view.n_heads)
    for unit, value in zip(scores.sources, scores.to_logits.tolist(), strict=True):
        if isinstance(unit, Head):
            by_head[unit.layer, unit.head] = value
    return Circuit(
        graph.heads, view.n_layers, view.n_heads, by_head,
        selection={"rule": "iterative", "edges": len(edges)},
        provenance=provenance, graph=graph,  # type: ignore[arg-type]
    )  # fmt: skip
