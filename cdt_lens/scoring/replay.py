"""Removals carried exactly through the head's own MLP, and to first order from there on.

The error of a first-order removal is made close to the head. So

1. one ordinary run records the prompts, and one backward pass the gradient at the output of every
   block,
2. each block is run once more for each of its heads, with that head at its baseline,
3. the removal's score is <gradient at the block's output, what the removal takes there>,
4. the return of the head to the empty model stays the gradient there, which is close to exact.

In a block whose MLP reads the same stream as its attention nothing is carried, and the first-order
score is the same.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count, Direction
from cdt_lens.core.passes import Passes
from cdt_lens.decomposition.baseline import Baseline, BaselineAt
from cdt_lens.decomposition.decompose import rows_per_chunk
from cdt_lens.decomposition.gated_pass import GatedPass
from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.decomposition.rules import PRESETS
from cdt_lens.decomposition.slopes import SLOPES
from cdt_lens.models.provenance import hashed_once
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.one_pass import BatchScores, checked_view, score_batches
from cdt_lens.tasks.metrics import strongest_competitor
from cdt_lens.tasks.task import Batch, Examples

_METHOD = "replay:two-ended"


@checked_arguments
@uses_model
@hashed_once()
def replayed_scores(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    direction: Direction = "mean",
    batch_size: Count = 16,
    rows: Count | None = None,
    progress: bool = True,
) -> HeadScores:
    """Estimate the two-ended scores, with each removal exact through the head's own MLP.

    score = half of <gradient at the block's output, what the removal takes there>
    + half of <gradient at z in the empty model, z - baseline>.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score.
        baseline: The values that ablated heads take.
        direction: "mean" of the competing answers, or "strongest" for the one that the full model
            rates highest.
        batch_size: Number of examples per batch.
        rows: Maximum number of (head x example) rows per replay of a block, at least the batch
            size. None chooses it by the length of the prompts.
        progress: Whether to show a progress bar.

    Returns:
        Signed scores in logits (positive = pushes towards the gold label) with standard errors.

    Raises:
        InputError, UnsupportedModelError, NonFiniteError: As `one_pass`.
    """
    passes = Passes(batch_size, rows, progress)
    view = checked_view(model, examples, baseline)
    gated = GatedPass(view, SLOPES["gradient"])

    def scores(batch: Batch, at: BaselineAt) -> BatchScores:
        if view.parallel:
            return gated.scores(batch, at, [0.0, 1.0], direction)
        run = Propagator(
            view, batch.tokens, batch.lengths, at, PRESETS["ablation"], candidates=batch.candidates
        )
        if direction == "strongest":
            full = run.full_logits(batch.candidates)
            weights = strongest_competitor(full, batch.is_answer, batch.is_candidate)
            batch = replace(batch, direction=weights)
        added, full = gated.scores(batch, at, [0.0], "mean")
        both = (_removed(gated, run, batch, rows) + added) / 2
        gated.check_finite(both, full)
        return both, full

    return score_batches(view, examples, baseline, scores, {"method": _METHOD}, direction, passes)


def _removed(
    gated: GatedPass, run: Propagator, batch: Batch, rows: int | None
) -> Float[Tensor, "example layer head pos"]:
    """Compute what each head's removal takes at its block's output, times the gradient there."""
    view = run.view
    sites = [("resid_post", layer) for layer in range(view.n_layers)]
    gradients = gated.gradients(batch, sites)
    size = max(1, rows_per_chunk(run, rows) // len(batch.lengths))
    layers = []
    for layer in range(view.n_layers):
        # Row by row one head of the layer is at its baseline.
        alone = torch.eye(view.n_heads, dtype=torch.bool, device=view.device)[:, None, None]
        chunks = [run.carried({layer: part}, stop=layer + 1) for part in alone.split(size)]
        taken = run.trace.resid[layer + 1] - torch.cat(chunks)
        gradient = gradients["resid_post", layer]
        layers.append(torch.einsum("hbpd,bpd->bhp", taken, gradient.to(taken.dtype)))
    return batch.by_example(torch.stack(layers, 1))
