"""Every head at once from one backward pass: linear rules, gradients, and gradients along a path.

Where each nonlinearity has a linear stand-in, relevance is one linear map, and its transpose is a
backward pass: score(head) = sum over positions of <gradient at z, z - baseline> (method.md §3).

1. One ordinary forward pass with a gate on every head's z: z = baseline + gate * (z - baseline).
   All gates are 1, so that nothing changes; d(direction) / d(gate) is the head's score.
2. Hooks leave every value as it is and give its gradient the slope that `Slopes` names.
3. Along a path the gates of all heads move together from 0 (every head ablated) to 1 (the plain
   model), and the scores are the average over the path. With plain derivatives they add up to
   m(full) - m(empty): the Aumann-Shapley values of the game that faithfulness measures. Its two
   ends alone are the first-order form of the "two-ended" rules.

Departures from the full rules (`scores.score_heads`): no step works on the irrelevant part
itself, so what a head does by saturating an activation, by moving a norm's scale far, or by moving
attention is seen to first order at most.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn

from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core.choices import Direction
from cdt_lens.core.errors import InputError
from cdt_lens.core.passes import Passes
from cdt_lens.core.processes import gather_items
from cdt_lens.decomposition.baseline import Baseline, check_baseline
from cdt_lens.decomposition.gated_pass import GatedPass, Steps
from cdt_lens.decomposition.slopes import Slopes, resolve_slopes
from cdt_lens.models.provenance import hashed_once, provenance_of
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.scoring.sweep import collect_scores, recorded_options
from cdt_lens.tasks.task import Examples, require_examples


# Tensors made in the caller's inference mode may take no part in a backward pass.
@torch.inference_mode(False)
@hashed_once()
def one_pass(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    slopes: str | Slopes = "stable",
    steps: Steps = None,
    direction: Direction = "mean",
    batch_size: int = 16,
    method: str = "one-pass",
    progress: bool = True,
) -> HeadScores:
    """Scores of all heads from one forward and one backward pass a batch; signed, in logits.

    Args:
        slopes: a preset's name or `Slopes`. steps: None for one pass at the plain model; "ends" for
            the mean of one there and one at the model whose heads are all ablated; a number for
            the average over that many midpoints of the path between the two.

    Raises:
        InputError: no examples, prompts longer than the model's context, a baseline of another
            shape, or weights made in inference mode.
        UnsupportedModelError: an MLP without the hook points that its slopes need.
        NonFiniteError: a score left the finite range, as half precision may.
    """
    require_examples(examples)
    passes = Passes(batch_size, progress=progress)
    view = view_of(model)
    slopes = resolve_slopes(slopes)
    if not (steps in (None, "ends") or (isinstance(steps, int) and steps >= 1)):
        raise InputError(f"one_pass: steps={steps!r}: expected at least 1, 'ends' or None")
    check_baseline(baseline, view)
    options = {
        "method": method,
        "slopes": asdict(slopes),
        "steps": steps,
        **recorded_options(baseline, direction),
        "heads": "all",
    }
    gated = GatedPass(view, slopes)
    items: list[tuple[int, Tensor]] = []
    for batch in passes.bar(passes.batches(examples), name=method):
        batch = batch.to(view.device)
        at = baseline.for_batch(view, batch)
        by_position, full = gated.scores(batch, at, steps, direction)
        relevant = reduce(by_position, "example layer head pos -> example layer head", "sum")
        rows = torch.cat([relevant.flatten(1), full[:, None]], 1).float().cpu()
        items += list(zip(batch.index, rows, strict=True))
    done = dict(gather_items(items))
    provenance = provenance_of(view, examples, options=options)
    return collect_scores(view, examples, done, None, method, provenance)


@torch.inference_mode(False)
def position_relevance(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    slopes: str | Slopes = "stable",
    batch_size: int = 16,
) -> Float[Tensor, "example layer head pos"]:
    """The part of each head's score that its z at each position gives; signed, in logits.

    The sum over positions is the head's score on that example. NaN behind shorter prompts.
    Raises what `one_pass` raises.
    """
    require_examples(examples)
    view = view_of(model)
    check_baseline(baseline, view)
    gated = GatedPass(view, resolve_slopes(slopes))
    longest = max(len(example.tokens) for example in examples)
    out = torch.full((len(examples), view.n_layers, view.n_heads, longest), torch.nan)
    for batch in examples.batches(Passes(batch_size).batch_size):
        batch = batch.to(view.device)
        values, _ = gated.scores(batch, baseline.for_batch(view, batch), None, "mean")
        for row, index in enumerate(batch.index):
            length = int(batch.lengths[row])
            out[index, ..., :length] = values[row, ..., :length].float().cpu()
    return out
