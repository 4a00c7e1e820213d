"""Every head at once from one backward pass: linear rules, gradients, and gradients along a path.

Where each nonlinearity has a linear stand-in, relevance is one linear map, and its transpose is a
backward pass: score(head) = sum over positions of <gradient at z, z - baseline>.

1. Run an ordinary forward pass with a gate on every head's z: z = baseline + gate * (z - baseline).
   All gates are 1, so that nothing changes; d(direction) / d(gate) is the head's score.
2. Hooks keep every value and give its gradient the slope that `Slopes` names.
3. Along a path the gates of all heads move together from 0 (every head ablated) to 1 (the plain
   model), and the scores are averaged over the path. With plain derivatives they add up to
   m(full) - m(empty): they are the Aumann-Shapley values of the game that faithfulness measures.
   (Not in mixtures of experts, where the choice of the experts jumps on the path.) The two ends
   alone are the first-order form of the "two-ended" rules.

No step works on the irrelevant part itself, unlike the full rules (`sweep.score_heads`). Effects by
saturated activations, a norm's scale or attention are therefore seen to first order at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn

from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count, Direction
from cdt_lens.core.passes import Passes
from cdt_lens.core.per_example import share_rows, table
from cdt_lens.decomposition.baseline import Baseline, BaselineAt
from cdt_lens.decomposition.gated_pass import GatedPass, Steps, points_of
from cdt_lens.decomposition.slopes import SLOPES, Slopes, resolve_slopes
from cdt_lens.models.provenance import hashed_once, provenance_of
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.scoring.sweep import collect_scores, recorded_options
from cdt_lens.tasks.task import Batch, Examples, check_examples

# The number of points of integrated gradients.
IG_STEPS = 5
# The scores of a batch by position, and the plain model's direction of each example, in logits.
BatchScores = tuple[Float[Tensor, "example layer head pos"], Float[Tensor, " example"]]


# Tensors made in the caller's inference mode may take no part in a backward pass.
@checked_arguments
@uses_model
@hashed_once()
def one_pass(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    slopes: str | Slopes = "stable",
    steps: Steps = None,
    direction: Direction = "mean",
    batch_size: Count = 16,
    method: str = "one-pass",
    progress: bool = True,
) -> HeadScores:
    """Score all heads from one forward and one backward pass per batch.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score.
        baseline: The values that ablated heads take.
        slopes: Name of a preset, or `Slopes`.
        steps: None for one pass at the plain model; "ends" for the mean of that pass and one at the
            model whose heads are all ablated; a number for the average over that many midpoints of
            the path between the two.
        direction: "mean" of the competing answers, or "strongest" for the one that the full model
            rates highest.
        batch_size: Number of examples per batch.
        method: Name of the method in the result.
        progress: Whether to show a progress bar.

    Returns:
        Signed scores in logits (positive = pushes towards the gold label) with standard errors.

    Raises:
        InputError: There are no examples, a prompt is longer than the model's context, the baseline
            has another shape, the weights were made in inference mode, or the slopes are linear and
            a label word has several tokens.
        UnsupportedModelError: An MLP lacks the hook points that its slopes need.
        NonFiniteError: A score left the finite range, as half precision may.
    """
    passes = Passes(batch_size, progress=progress)
    view = checked_view(model, examples, baseline)
    slopes = _slopes_for(examples, slopes)
    options = {"method": method, "slopes": asdict(slopes), "steps": steps}
    gated = GatedPass(view, slopes)

    def scores(batch: Batch, at: BaselineAt) -> BatchScores:
        return gated.scores(batch, at, points_of(steps), direction)

    return score_batches(view, examples, baseline, scores, options, direction, passes)


def _slopes_for(examples: Examples, slopes: str | Slopes) -> Slopes:
    """Return slopes that have a meaning for the examples."""
    resolved = resolve_slopes(slopes)
    if resolved == SLOPES["direct"]:
        examples.require_one_token("direct logit attribution", "another method, such as 'one-pass'")
    if resolved.activation == "frozen":
        what = "a backward pass with activation='frozen', such as the slopes 'linear',"
        examples.require_one_token(what, "other slopes, such as 'gradient' or 'stable'")
    return resolved


def checked_view(model: nn.Module | ModelView, examples: Examples, baseline: Baseline) -> ModelView:
    """Return the view of a model that can be scored with these examples and this baseline.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score.
        baseline: The values that ablated heads take.

    Raises:
        InputError: There are no examples, or a prompt is longer than the model's context.
        ArtifactError: The baseline belongs to another model.
    """
    view = view_of(model)
    check_examples(view, examples)
    baseline.check_model(view)
    return view


def score_batches(
    view: ModelView,
    examples: Examples,
    baseline: Baseline,
    scores: Callable[[Batch, BaselineAt], BatchScores],
    options: Mapping[str, Any],
    direction: Direction,
    passes: Passes,
    seed: int | None = None,
) -> HeadScores:
    """Score all heads batch by batch, and collect the scores.

    Args:
        view: The model.
        examples: The examples to score.
        baseline: The values that ablated heads take.
        scores: Scores a batch, given its reference values of z.
        options: Options that the provenance records, "method" among them.
        direction: "mean" or "strongest".
        passes: Sizes of the forward passes.
        seed: Seed that the provenance records.

    Returns:
        Signed scores in logits with standard errors.
    """
    method = str(options["method"])
    rows = table(len(examples), view.n_layers * view.n_heads + 1, dtype=torch.float32)
    finished: list[int] = []
    for batch in passes.bar(passes.batches(examples, view.longrope_limit), name=method):
        batch = batch.to(view.device)
        by_position, full = scores(batch, baseline.for_batch(view, batch))
        relevant = reduce(by_position, "example layer head pos -> example layer head", "sum")
        rows[list(batch.index)] = torch.cat([relevant.flatten(1), full[:, None]], 1).float().cpu()
        finished += batch.index
    share_rows(rows, finished)
    recorded = {**options, **recorded_options(baseline, direction), "heads": "all"}
    provenance = provenance_of(view, examples, options=recorded, seed=seed)
    return collect_scores(view, examples, rows, None, method, provenance)


@checked_arguments
@uses_model
def position_relevance(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    slopes: str | Slopes = "stable",
    batch_size: Count = 16,
) -> Float[Tensor, "example layer head pos"]:
    """Split each head's score of `one_pass` by the position of its z.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score.
        baseline: The values that ablated heads take.
        slopes: Name of a preset, or `Slopes`.
        batch_size: Number of examples per batch.

    Returns:
        Signed scores in logits, NaN behind the end of shorter prompts. Their sum over positions is
        the head's score on that example. Positions behind the prompt are those of label words of
        several tokens, added up over the words.

    Raises:
        InputError, UnsupportedModelError, NonFiniteError: As `one_pass`.
    """
    view = checked_view(model, examples, baseline)
    gated = GatedPass(view, _slopes_for(examples, slopes))
    longest = max(example.length for example in examples)
    out = torch.full((len(examples), view.n_layers, view.n_heads, longest), torch.nan)
    for batch in examples.batches(batch_size, apart=view.longrope_limit):
        batch = batch.to(view.device)
        values, _ = gated.scores(batch, baseline.for_batch(view, batch), [1.0], "mean")
        for row, index in enumerate(batch.index):
            length = examples[index].length
            out[index, ..., :length] = values[row, ..., :length].float().cpu()
    return out
