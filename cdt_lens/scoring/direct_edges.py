"""Scores of direct edges: exact ablation, attribution patching and integrated gradients.

1. `ablate_edges`: d(full) - d(the edge carries its baseline), one pass for each edge. The edge and
   its baseline are those of `circuits.edge_pass`, which are EAP-IG's.
2. `edge_attribution_patching`: <gradient of d at the target's input, output - baseline of the
   source>, all edges from one backward pass (Syed et al., arXiv 2310.10348).
3. `edge_integrated_gradients`: the same with the gradients averaged along the line on which the
   token embeddings go from their baseline to the prompt (EAP-IG, Hanna et al., arXiv 2403.17806).
   The scores of the edges from the input add up to d(prompt) - d(baseline embeddings), up to the
   step size.

Scores are signed, in logits; positive pushes towards the gold label. EAP-IG's own scores have the
other sign for a metric that is better when larger: it multiplies by baseline - output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cdt_lens.circuits.direct_edge_scores import DirectEdgeScores, collect_edge_scores
from cdt_lens.circuits.edge_pass import EdgePass, Ends, edges_of, places_of
from cdt_lens.circuits.nodes import edge_name, node_names, readers
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count
from cdt_lens.core.errors import InputError
from cdt_lens.core.passes import Passes
from cdt_lens.core.per_example import share_rows, table
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.decomposition.gated_pass import points_of
from cdt_lens.models.provenance import hashed_once, provenance_of
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.one_pass import IG_STEPS, checked_view
from cdt_lens.scoring.sweep import recorded_options
from cdt_lens.tasks.metrics import task_direction
from cdt_lens.tasks.task import Examples

# The scores of a batch by edge, and the full model's direction of each example, in logits.
_BatchScores = tuple[Float[Tensor, "example edge"], Float[Tensor, " example"]]


@checked_arguments
@uses_model
@hashed_once()
def ablate_edges(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    edges: Iterable[str] | None = None,
    batch_size: Count = 16,
    rows: Count | None = None,
    progress: bool = True,
) -> DirectEdgeScores:
    """Measure the exact effect of ablating each direct edge on the task direction.

    score = d(full) - d(the target reads the source's baseline in place of its output). This is path
    patching of one edge with the mean or the counterfactual. It costs a pass for each edge: for
    small models, or for a few edges.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score.
        baseline: The values that ablated edges carry; `mean_activations(..., mlps=True)` or
            `counterfactual_baseline`.
        edges: Names of the edges to score, such as "L0H1->L1H0<q>"; None scores all.
        batch_size: Number of examples per batch.
        rows: Maximum number of (edge x example) rows per forward pass, at least the batch size.
            None chooses it by the memory that they need.
        progress: Whether to show a progress bar.

    Returns:
        Signed scores in logits with standard errors.

    Raises:
        InputError: There are no examples, the model has no such edge, or the baseline has no values
            for MLPs or embeddings.
        ArtifactError: The baseline belongs to another model.
        UnsupportedModelError: Inputs of the model's nodes are no sums of what nodes wrote.
        NonFiniteError: A score left the finite range.
    """
    view = checked_view(model, examples, baseline)
    wanted = None if edges is None else tuple(edges)
    if wanted == ():
        raise InputError("edges: expected at least one edge, or None for all")
    chosen = _numbers_of(edges_of(view), wanted)
    sources, targets = places_of(edges_of(view), view.n_layers, view.n_heads)

    def scores(run: EdgePass) -> _BatchScores:
        return _exact(run, chosen, sources, targets, rows)

    options = {"method": "edge-ablation", "edges": "all" if wanted is None else list(wanted)}
    return _score(view, examples, baseline, scores, options, Passes(batch_size, rows, progress))


@checked_arguments
@uses_model
@hashed_once()
def edge_attribution_patching(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    batch_size: Count = 16,
    progress: bool = True,
) -> DirectEdgeScores:
    """Estimate `ablate_edges` to first order for all edges, from one backward pass.

    score = sum over positions of <d(direction) / d(input of the target), output - baseline of the
    source>.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score.
        baseline: The values that ablated edges carry.
        batch_size: Number of examples per batch.
        progress: Whether to show a progress bar.

    Returns:
        Signed scores in logits with standard errors.

    Raises:
        InputError, ArtifactError, UnsupportedModelError, NonFiniteError: As `ablate_edges`.
    """
    options = {"method": "edge-attribution-patching"}
    return _gradients(model, examples, baseline, [1.0], options, Passes(batch_size, None, progress))


@checked_arguments
@uses_model
@hashed_once()
def edge_integrated_gradients(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    steps: Count = IG_STEPS,
    batch_size: Count = 16,
    progress: bool = True,
) -> DirectEdgeScores:
    """Score all edges by gradients averaged between the baseline's embeddings and the prompt's.

    This is EAP-IG with midpoints. The scores of the edges from the input add up to d(prompt) -
    d(baseline embeddings), up to the step size.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score.
        baseline: The values that ablated edges carry.
        steps: Number of midpoints of the path.
        batch_size: Number of examples per batch.
        progress: Whether to show a progress bar.

    Returns:
        Signed scores in logits with standard errors.

    Raises:
        InputError, ArtifactError, UnsupportedModelError, NonFiniteError: As `ablate_edges`.
    """
    options = {"method": "edge-integrated-gradients", "steps": steps}
    passes = Passes(batch_size, None, progress)
    return _gradients(model, examples, baseline, points_of(steps), options, passes)


def _gradients(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    points: list[float],
    options: Mapping[str, Any],
    passes: Passes,
) -> DirectEdgeScores:
    view = checked_view(model, examples, baseline)
    sources, targets = places_of(edges_of(view), view.n_layers, view.n_heads)

    def scores(run: EdgePass) -> _BatchScores:
        found, full = run.attributions(points)
        return found[:, sources, targets], full

    return _score(view, examples, baseline, scores, options, passes)


def _score(
    view: ModelView,
    examples: Examples,
    baseline: Baseline,
    scores: Callable[[EdgePass], _BatchScores],
    options: Mapping[str, Any],
    passes: Passes,
) -> DirectEdgeScores:
    """Score the edges batch by batch, and collect the scores."""
    examples.require_one_token("a score of direct edges", "score_heads")
    edges = edges_of(view)
    dtype = torch.promote_types(view.dtype, torch.float32)
    rows = table(len(examples), len(edges) + 1, dtype=dtype)
    finished: list[int] = []
    name = str(options["method"])
    for batch in passes.bar(passes.batches(examples, view.longrope_limit), name=name):
        found, full = scores(EdgePass(view, batch.to(view.device), baseline))
        rows[list(batch.index)] = torch.cat([found, full[:, None]], 1).to(rows)
        finished += batch.index
    share_rows(rows, finished)
    recorded = {**options, **recorded_options(baseline, "mean")}
    labels = tuple(example.label for example in examples)
    provenance = provenance_of(view, examples, options=recorded)
    return collect_edge_scores(view, edges, rows, labels, name, provenance)


def _exact(
    run: EdgePass,
    chosen: list[int],
    sources: Int[Tensor, " edge"],
    targets: Int[Tensor, " edge"],
    rows: int | None,
) -> _BatchScores:
    """Compute d(full) - d(edge cut) of each chosen edge, NaN for the others."""
    view, weights = run.view, run.batch.direction
    full = task_direction(run.full_logits(), weights)
    out = full.new_full((len(full), len(sources)), torch.nan)
    per_layer = 3 * view.n_heads + 1
    shape = (
        len(node_names(view.n_layers, view.n_heads)) - 1,
        len(readers(view.n_layers, view.n_heads)),
    )
    size = run.rows_per_pass(rows)
    # Passes of one layer start there.
    for _, group in groupby(chosen, key=lambda i: int(targets[i]) // per_layer):
        members = list(group)
        for at in range(0, len(members), size):
            chunk = members[at : at + size]
            cut = torch.zeros(len(chunk), *shape, dtype=torch.bool, device=full.device)
            cut[range(len(chunk)), sources[chunk], targets[chunk]] = True
            out[:, chunk] = (full - task_direction(run.logits(cut), weights)).T
    return out, full


def _numbers_of(edges: tuple[Ends, ...], wanted: tuple[str, ...] | None) -> list[int]:
    """Return the numbers of the wanted edges, in order."""
    if wanted is None:
        return list(range(len(edges)))
    numbers = {edge_name(*ends): number for number, ends in enumerate(edges)}
    unknown = [name for name in wanted if name not in numbers]
    if unknown:
        raise InputError(
            f"ablate_edges: the model has no edge {unknown[0]!r}; expected names such as "
            f"{edge_name(*edges[0])} or {edge_name(*edges[-1])}"
        )
    return sorted({numbers[name] for name in wanted})
