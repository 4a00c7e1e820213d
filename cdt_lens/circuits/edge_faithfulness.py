"""Faithfulness of graphs of direct edges, as EAP-IG and MIB evaluate them.

1. m(G) is the metric with every direct edge outside G cut (`edge_pass`): the edges of G carry what
   their sources write in this run, all others the baseline. G is pruned first, so that its edges
   lie on paths from the input to the logits.
2. f(G) = (m(G) - m(empty)) / (m(full) - m(empty)). With no edge every node reads baselines alone;
   under a counterfactual baseline this is the run of the counterfactual prompt.
3. Controls: as many edges drawn at random, pruned alike.
4. CPR is the area under f, CMD the area under |1 - f|, over MIB's fractions of all edges.

Scores should be fitted on one split and faithfulness measured on another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cdt_lens.circuits.ablation import metric_values
from cdt_lens.circuits.direct_edge_scores import DirectEdgeScores
from cdt_lens.circuits.edge_pass import EdgePass, Ends, edges_of, places_of
from cdt_lens.circuits.faithfulness import checked_fractions, f_interval
from cdt_lens.circuits.graph import Edge, Graph, GraphNode, check_shape
from cdt_lens.circuits.measures import (
    MIB_FRACTIONS,
    check_directions,
    cmd,
    cpr,
    faithfulness,
    heads_at,
)
from cdt_lens.circuits.nodes import node_names, readers
from cdt_lens.core import display
from cdt_lens.core.axes import along
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import SEEDS, Count, FromZeroCount, Level, Metric, Ranking, Seed
from cdt_lens.core.equality import EqualByContent
from cdt_lens.core.errors import InputError
from cdt_lens.core.passes import Passes
from cdt_lens.core.processes import gather_items
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.models.provenance import Provenance, hashed_once, provenance_of
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.tasks.intervals import Interval, ratio_effects
from cdt_lens.tasks.metrics import average, label_numbers, warn_at_chance
from cdt_lens.tasks.task import Examples, Task, check_examples

# True at the edges that a circuit keeps, [node, reader].
_Kept = Bool[Tensor, "node reader"]


@dataclass(frozen=True, eq=False)
class EdgeFaithfulness(EqualByContent):
    """Faithfulness of graphs of direct edges, beside random edges.

    Args:
        edges: Number of edges of each graph after pruning.
        faithfulness: f of each graph, without unit: 1 as the full model, 0 as no edges.
        random: f of random edges, pruned as well, by draw: as many as a graph has after pruning,
            or as many as the curve selects before it.
        full: The metric with all edges, in logits or as a share from 0 to 1.
        empty: The metric with no edges.
        metric: Name of the metric (`tasks.metrics`).
        provenance: Model, examples and options of the measurement.
        effects: For each example a value whose mean over `strata` is f of each graph.
        strata: Number of each example's label, or zeros where the metric is no mean over labels.
        fractions: Shares of all edges that were selected, or None for graphs of a caller's.
        every_edge: Number of edges of the whole model.
    """

    edges: Annotated[tuple[int, ...], along("graph")]
    faithfulness: Float[Tensor, " graph"]
    random: Float[Tensor, "draw graph"] = field(repr=False)
    full: float
    empty: float
    metric: Metric
    provenance: Provenance = field(repr=False)
    effects: Float[Tensor, "graph example"] = field(repr=False)
    strata: Int[Tensor, " example"] = field(repr=False)
    fractions: Annotated[tuple[float, ...], along("graph")] | None = None
    every_edge: int | None = None

    def __repr__(self) -> str:
        values = ", ".join(f"{value:.3f}" for value in self.faithfulness.tolist()[:4])
        more = ", ..." if len(self.edges) > 4 else ""
        return display.line(self, f"{len(self.edges)} graphs", self.metric, f"f {values}{more}")

    @property
    def cpr(self) -> float:
        """The area under f over the fractions; NaN for graphs of a caller's."""
        return math.nan if self.fractions is None else float(cpr(self.fractions, self.faithfulness))

    @property
    def cmd(self) -> float:
        """The area under |1 - f| over the fractions; NaN for graphs of a caller's."""
        return math.nan if self.fractions is None else float(cmd(self.fractions, self.faithfulness))

    @checked_arguments
    def interval(self, level: Level = 0.95) -> Interval:
        """Return the confidence interval of f of each graph, over the population of prompts.

        Args:
            level: Confidence level, above 0 and below 1.

        Returns:
            The lower and the upper limit without unit; NaN if a label has a single example.
        """
        exact = [n in (0, self.every_edge) for n in self.edges]
        gap = self.full - self.empty
        return f_interval(self.effects, self.strata, self.metric, gap, exact, level)

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per graph: edges, f with the 95 % interval, the median of the draws."""
        low, high = self.interval()
        table: dict[str, Any] = {} if self.fractions is None else {"fraction": self.fractions}
        table |= {
            "edges": self.edges,
            "faithfulness": self.faithfulness.tolist(),
            "faithfulness low": low.tolist(),
            "faithfulness high": high.tolist(),
        }
        if len(self.random):
            table["random (median)"] = self.random.quantile(0.5, dim=0).tolist()
        return pd.DataFrame(table)

    def _repr_html_(self) -> str:
        return display.html(f"Faithfulness of direct edges ({self.metric})", self.to_dataframe())


@checked_arguments
@uses_model
@hashed_once()
def edge_faithfulness(
    model: nn.Module | ModelView,
    graphs: Graph | Sequence[Graph],
    examples: Examples,
    baseline: Baseline,
    *,
    metric: Metric = "direction",
    draws: FromZeroCount = 3,
    seed: Seed = 0,
    task: Task | None = None,
    batch_size: Count = 16,
    rows: Count | None = None,
    progress: bool = True,
) -> EdgeFaithfulness:
    """Measure f of graphs of direct edges, such as circuits of EAP-IG and MIB.

    Args:
        model: A TransformerLens model or its `ModelView`.
        graphs: A graph of this model, or several. An edge counts if it and both of its nodes are in
            the graph. Each graph is pruned first.
        examples: The examples to measure on, other ones than those scored.
        baseline: The values that edges outside the graph carry; `mean_activations(..., mlps=True)`
            or `counterfactual_baseline`.
        metric: "direction", "accuracy" or "balanced_accuracy"; see `circuit_metric`.
        draws: Number of random graphs beside each graph.
        seed: Seed of the draws; draw i uses seed + i.
        task: Supplies the prior for the accuracies, if it has one.
        batch_size: Number of examples per batch.
        rows: Maximum number of (graph x example) rows per forward pass; None chooses it by the
            memory that they need.
        progress: Whether to show a progress bar.

    Returns:
        f of each graph, without unit.

    Raises:
        InputError: There are no examples, edges of a graph stand for all paths, a graph has another
            shape, the baseline has no values for MLPs or embeddings, or cutting every edge does not
            change the metric.
        ArtifactError: The baseline belongs to another model.
        UnsupportedModelError: Inputs of the model's nodes are no sums of what nodes wrote.
        NonFiniteError: Logits left the finite range.
    """
    view = view_of(model)
    given = (graphs,) if isinstance(graphs, Graph) else tuple(graphs)
    if not given:
        raise InputError("edge_faithfulness: graphs: got none; give at least one graph")
    kept = [_kept(graph, view) for graph in given]
    drawn = [_random_graphs(int(own.sum()), view, draws, seed) for own in kept]
    passes = Passes(batch_size, rows, progress)
    return _measured(
        view, kept, drawn, examples, baseline, metric=metric, task=task, passes=passes,
        options={"graphs": len(given), "draws": draws}, seed=seed,
    )  # fmt: skip


@checked_arguments
@uses_model
@hashed_once()
def edge_faithfulness_curve(
    model: nn.Module | ModelView,
    scores: DirectEdgeScores,
    examples: Examples,
    baseline: Baseline,
    *,
    fractions: Sequence[float] = MIB_FRACTIONS,
    by: Ranking = "signed",
    metric: Metric = "direction",
    draws: FromZeroCount = 3,
    seed: Seed = 0,
    task: Task | None = None,
    batch_size: Count = 16,
    rows: Count | None = None,
    progress: bool = True,
) -> EdgeFaithfulness:
    """Measure f of the direct edges of largest score at growing sizes.

    Args:
        model: A TransformerLens model or its `ModelView`.
        scores: Scores of all direct edges of this model.
        examples: The examples to measure on, other ones than those scored.
        baseline: The values that edges outside the graph carry.
        fractions: Sizes as rising shares of all edges, each rounded down to whole edges.
        by: Rank edges by their "signed" score or by its "magnitude".
        metric: "direction", "accuracy" or "balanced_accuracy"; see `circuit_metric`.
        draws: Number of random graphs of each size.
        seed: Seed of the draws; draw i uses seed + i.
        task: Supplies the prior for the accuracies, if it has one.
        batch_size: Number of examples per batch.
        rows: Maximum number of (graph x example) rows per forward pass; None chooses it by the
            memory that they need.
        progress: Whether to show a progress bar.

    Returns:
        f at each size, with CPR and CMD.

    Raises:
        InputError: The fractions are out of order or range, or as `edge_faithfulness`.
        ArtifactError: The scores or the baseline belong to another model.
        UnsupportedModelError, NonFiniteError: As `edge_faithfulness`.
    """
    view = view_of(model)
    scores.provenance.check_model(view, "this set of scores")
    fractions = checked_fractions(fractions)
    sizes = [heads_at(fraction, len(scores.edges)) for fraction in fractions]
    kept = [_kept(scores.graph(k=size, by=by), view) for size in sizes]
    drawn = [_random_graphs(size, view, draws, seed) for size in sizes]
    origin = {"scores": scores.provenance.options, "by": by, "draws": draws}
    return _measured(
        view, kept, drawn, examples, baseline, metric=metric, task=task, options=origin, seed=seed,
        passes=Passes(batch_size, rows, progress), fractions=fractions,
    )  # fmt: skip


def _kept(graph: Graph, view: ModelView) -> _Kept:
    """Return where the edges of the pruned circuit are."""
    check_shape(graph, view)
    if not graph.direct:
        raise InputError(
            "edge_faithfulness: the edges of this graph stand for all paths between their ends, as "
            "those of trace_circuit; expected direct edges, such as those of "
            "edge_attribution_patching(...).graph(k=...) or of a file of EAP-IG or MIB"
        )
    edges = [(edge.source, edge.target, edge.site) for edge in graph.pruned().kept_edges]
    return _mask(edges, view)


def _mask(edges: Sequence[Ends], view: ModelView) -> _Kept:
    shape = (view.n_layers, view.n_heads)
    mask = torch.zeros(len(node_names(*shape)) - 1, len(readers(*shape)), dtype=torch.bool)
    if edges:
        mask[places_of(edges, *shape)] = True
    return mask


def _random_graphs(size: int, view: ModelView, draws: int, seed: int) -> list[_Kept]:
    """Draw graphs of `size` edges each and prune them."""
    edges = edges_of(view)
    found = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed((seed + draw) % SEEDS)
        order = torch.randperm(len(edges), generator=generator)
        chosen = tuple(edges[i] for i in order[:size].tolist())
        found.append(_kept(_graph_of(chosen, view), view))
    return found


def _graph_of(edges: Sequence[Ends], view: ModelView) -> Graph:
    nodes = {name: GraphNode(None, True) for name in node_names(view.n_layers, view.n_heads)}
    made = tuple(Edge(*ends, None) for ends in edges)
    shape = (view.n_layers, view.n_heads)
    return Graph(*shape, nodes, made, view.d_model, view.parallel, direct=True)


def _measured(
    view: ModelView,
    kept: list[_Kept],
    drawn: list[list[_Kept]],
    examples: Examples,
    baseline: Baseline,
    *,
    metric: Metric,
    task: Task | None,
    options: dict[str, Any],
    seed: int,
    passes: Passes,
    fractions: tuple[float, ...] | None = None,
) -> EdgeFaithfulness:
    """Measure graphs and their controls in the same passes."""
    real = _mask(edges_of(view), view)
    everyone = [real, torch.zeros_like(real), *kept, *(own for draws in drawn for own in draws)]
    cut = real & ~torch.stack(everyone)
    table, labels = _by_example(view, cut, examples, baseline, metric, task, passes)
    means = average(metric, table, labels)
    full, empty = float(means[0]), float(means[1])
    if metric == "direction":
        check_directions(table[0], table[1], full, empty, view.dtype)
    warn_at_chance(examples.name, metric, full, examples.guess)
    f = faithfulness(means[2:], full, empty)
    strata = torch.zeros_like(labels) if metric == "accuracy" else labels
    own = table[2 : 2 + len(kept)] - table[1]
    recorded = {**options, "metric": metric, "baseline": baseline.kind}
    recorded["baseline_hash"] = baseline.hash
    return EdgeFaithfulness(
        edges=tuple(int(mask.sum()) for mask in kept),
        faithfulness=f[: len(kept)],
        random=f[len(kept) :].reshape(len(kept), -1).T,
        full=full,
        empty=empty,
        metric=metric,
        provenance=provenance_of(view, examples, options=recorded, seed=seed),
        effects=ratio_effects(own, (table[0] - table[1])[None], strata),
        strata=strata,
        fractions=fractions,
        every_edge=int(real.sum()),
    )


def _by_example(
    view: ModelView,
    cut: Bool[Tensor, "graph node reader"],
    examples: Examples,
    baseline: Baseline,
    metric: Metric,
    task: Task | None,
    passes: Passes,
) -> tuple[Float[Tensor, "graph example"], Int[Tensor, " example"]]:
    """Compute the metric of each graph on each example, and the number of each label."""
    check_examples(view, examples)
    examples.require_one_token("faithfulness of direct edges", "circuit_faithfulness")
    baseline.check_model(view)
    cut, places = cut.unique(dim=0, return_inverse=True)
    items: list[tuple[int, Tensor]] = []
    for batch in passes.bar(passes.batches(examples, view.longrope_limit), name="edges"):
        run = EdgePass(view, batch.to(view.device), baseline)
        parts = cut.to(view.device).split(run.rows_per_pass(passes.rows))
        logits = torch.cat([run.logits(part) for part in parts])
        values = metric_values(logits, run.batch, metric, task).double().cpu()
        items += [(index, values[:, row].clone()) for row, index in enumerate(batch.index)]
    ordered = dict(gather_items(items))
    table = torch.stack([ordered[i] for i in range(len(examples))], dim=-1)[places]
    return table, label_numbers([e.label for e in examples], examples.labels)
