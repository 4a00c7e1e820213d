"""Expected gradients: gradients at random points of paths that start at other prompts.

1. Each example draws another example of the same number of tokens, whatever its label, so that
   positions are aligned. An example without such a partner takes the baseline.
2. Its path leads from the z of that partner, for all heads together, to its own z. A random point
   of the path is drawn.
3. The score is <gradient at z, z - reference>, summed over positions and averaged over a few draws
   (arXiv 1906.10670, for gates of heads).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count, Direction, Seed
from cdt_lens.core.passes import Passes
from cdt_lens.decomposition.baseline import Baseline, BaselineAt
from cdt_lens.decomposition.gated_pass import GatedPass
from cdt_lens.decomposition.slopes import SLOPES
from cdt_lens.models.provenance import hashed_once
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.one_pass import IG_STEPS, BatchScores, checked_view, score_batches
from cdt_lens.tasks.task import Batch, Examples


@dataclass(frozen=True, eq=False)
class Draw:
    """The random part of one step.

    Args:
        points: Where the gates of each example stand, from 0 (its reference) to 1 (the plain
            model).
        partners: Position of the example whose z is the reference, None for the baseline.
    """

    points: Float[Tensor, " example"]
    partners: tuple[int | None, ...]


def drawn(examples: Examples, steps: int, seed: int) -> list[Draw]:
    """Draw the points and the references of every step.

    Args:
        examples: The examples to score.
        steps: Number of draws for each example.
        seed: Seed of the draws.
    """
    generator = random.Random(seed)
    groups: dict[int, list[int]] = {}
    copies: dict[tuple[int, ...], list[int]] = {}  # by their place in the group
    for position, example in enumerate(examples):
        group = groups.setdefault(len(example.tokens), [])
        copies.setdefault(example.tokens, []).append(len(group))
        group.append(position)

    def partner(tokens: tuple[int, ...]) -> int | None:
        """Draw from the group; from itself or a copy, a prompt has no path."""
        group, left_out = groups[len(tokens)], copies[tokens]
        if len(group) == len(left_out):
            return None
        place = generator.randrange(len(group) - len(left_out))
        for copy in left_out:
            place += copy <= place
        return group[place]

    return [
        Draw(
            torch.tensor([generator.random() for _ in examples]),
            tuple(partner(example.tokens) for example in examples),
        )
        for _ in range(steps)
    ]


@checked_arguments
@uses_model
@hashed_once()
def expected_gradients(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    steps: Count = IG_STEPS,
    seed: Seed = 0,
    direction: Direction = "mean",
    batch_size: Count = 16,
    progress: bool = True,
) -> HeadScores:
    """Average the gradients by each head's gate over random points of paths from other prompts.

    The reference is another of the examples with as many tokens, drawn without regard to its label,
    or the baseline for an example that is alone with its length.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score, which are also the pool of references.
        baseline: The values that ablated heads take.
        steps: Number of draws for each example.
        seed: Seed of the draws.
        direction: "mean" of the competing answers, or "strongest" for the one that the full model
            rates highest.
        batch_size: Number of examples per batch.
        progress: Whether to show a progress bar.

    Returns:
        Signed scores in logits (positive = pushes towards the gold label) with standard errors.

    Raises:
        InputError, UnsupportedModelError, NonFiniteError: As `one_pass`.
    """
    passes = Passes(batch_size, progress=progress)
    view = checked_view(model, examples, baseline)
    gated = GatedPass(view, SLOPES["gradient"])
    draws = drawn(examples, steps, seed)

    def scores(batch: Batch, at: BaselineAt) -> BatchScores:
        rows = list(batch.index)
        stations = [
            (_reference(view, examples, batch, draw, at), draw.points[rows]) for draw in draws
        ]
        return gated.along(batch, stations, direction)

    options = {"method": "expected-gradients", "steps": steps}
    return score_batches(view, examples, baseline, scores, options, direction, passes, seed)


def _reference(
    view: ModelView, examples: Examples, batch: Batch, draw: Draw, at: BaselineAt
) -> BaselineAt:
    """Return the z of each example's partner, or the baseline where it has none."""
    tokens = batch.tokens.clone()
    partners = [draw.partners[i] for i in batch.index]
    partners = [partners[i] for i in batch.for_rows(torch.arange(len(partners))).tolist()]
    for row, partner in enumerate(partners):
        if partner is not None:
            own = examples[partner].tokens
            tokens[row, : len(own)] = torch.tensor(own)
    paired = torch.tensor([p is not None for p in partners], device=view.device)
    trace = view.run(tokens, [("z", layer) for layer in range(view.n_layers)])
    return lambda layer: torch.where(
        paired[:, None, None, None], trace["z", layer], at(layer).to(trace["z", layer])
    )
