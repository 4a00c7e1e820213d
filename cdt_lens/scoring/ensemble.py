"""An ensemble of first-order scores, each brought to the same spread over the heads."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cdt_lens.circuits.head_scores import HeadScores, label_index
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count, Direction
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.decomposition.gated_pass import Steps
from cdt_lens.models.provenance import hashed_once
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.one_pass import IG_STEPS, one_pass
from cdt_lens.tasks.metrics import balanced_mean, balanced_stderr
from cdt_lens.tasks.task import Examples

# The members by name, with their steps. The first gives the unit.
MEMBERS: dict[str, Steps] = {
    "one-pass:two-ended": "ends",
    "integrated-gradients": IG_STEPS,
    "attribution-patching": None,
}


def without_unit(
    values: Float[Tensor, "*rows layer head"], by: Float[Tensor, "layer head"]
) -> Float[Tensor, "*rows layer head"]:
    """Divide by the standard deviation of `by` over the heads.

    Nothing is subtracted: a head without effect keeps the score 0, and every score its sign.

    Args:
        values: The values to change, such as scores of examples.
        by: The scores of all heads, in the same unit.

    Returns:
        The values without unit; 0 where all heads have the same score.
    """
    spread = by.std(correction=0)
    return torch.where(spread > 0, values / spread, 0.0)


@checked_arguments
@uses_model
@hashed_once()
def ensemble_scores(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    direction: Direction = "mean",
    batch_size: Count = 16,
    progress: bool = True,
) -> HeadScores:
    """Average three first-order scores: at both ends, along the path, and at the plain model.

    Each member is divided by its standard deviation over the heads, so that all count alike. The
    mean is multiplied by that of the first member, the gradients at both ends
    ("one-pass:two-ended"). Its unit is therefore the logit of that member. The standard errors take
    the scales as given.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score.
        baseline: The values that ablated heads take.
        direction: "mean" of the competing answers, or "strongest" for the one that the full model
            rates highest.
        batch_size: Number of examples per batch.
        progress: Whether to show a progress bar.

    Returns:
        Signed scores in logits (positive = pushes towards the gold label) with standard errors.

    Raises:
        InputError, UnsupportedModelError, NonFiniteError: As `one_pass`.
    """
    members = [
        one_pass(
            model, examples, baseline, slopes="gradient", steps=steps, direction=direction,
            batch_size=batch_size, method=name, progress=progress,
        )
        for name, steps in MEMBERS.items()
    ]  # fmt: skip
    unit = members[0]
    alike = [without_unit(m.per_example.double(), m.values.double()) for m in members]
    per_example = torch.stack(alike).mean(0) * unit.values.double().std(correction=0)
    index = label_index(unit.example_labels)
    options = {**unit.provenance.options, "method": "ensemble", "members": list(MEMBERS)}
    del options["steps"]
    return dataclasses.replace(
        unit,
        values=balanced_mean(per_example.permute(1, 2, 0), index).float(),
        stderr=balanced_stderr(per_example.permute(1, 2, 0), index).float(),
        per_example=per_example.float(),
        method="ensemble",
        provenance=dataclasses.replace(unit.provenance, options=options),
    )
