"""Learned gates: one logit for each head, trained so that its ranking is good at every size.

Each step draws a circuit size k, log-uniform from 1 to the number of heads, and opens each head's
gate to sigmoid(logit - t), with t such that the gates add up to k. It descends on the mean of
(d(gates) - d(full))^2, balanced over labels; to divide it by (d(full) - d(empty))^2 would change
nothing under Adam. The idea is that of Matryoshka Attribution (arXiv 2609.25518).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count, Seed
from cdt_lens.core.errors import NonFiniteError
from cdt_lens.core.passes import Passes
from cdt_lens.core.processes import gather_items, sum_over_processes
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.decomposition.gated_pass import GatedPass, soft_circuit
from cdt_lens.decomposition.slopes import SLOPES
from cdt_lens.models.provenance import hashed_once
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.ensemble import without_unit
from cdt_lens.scoring.one_pass import checked_view, one_pass
from cdt_lens.tasks.task import Examples

# Each example takes part in EPOCHS steps: 320 steps for 128 examples.
EPOCHS, MINIBATCH = 20, 8
# The first logits lie evenly between -SPREAD and SPREAD; Adam's rate falls from RATE to 0.
SPREAD, RATE = 2.0, 0.2


@dataclass(frozen=True)
class _Game:
    """The task direction d as a function of the gates of all heads."""

    gated: GatedPass
    examples: Examples
    baseline: Baseline
    passes: Passes

    def batches(self, gates: Tensor, wanted: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """Yield the positions of examples and their d, for this process' share of `wanted`."""
        gated, view = self.gated, self.gated.view
        chosen = replace(self.examples, items=tuple(self.examples[i] for i in wanted))
        for batch in self.passes.batches(chosen, view.longrope_limit):
            batch = batch.to(gates.device)
            gated.check_caller_hooks(batch)
            at = self.baseline.for_batch(view, batch)
            d = gated.direction(batch, at, list(gates[:, :, None]), batch.direction)
            yield [wanted[i] for i in batch.index], d

    @torch.no_grad()
    def d(self, gates: Tensor) -> Float[Tensor, " example"]:
        """Compute the task direction of every example."""
        found: dict[int, Tensor] = {}
        for index, d in self.batches(gates, range(len(self.examples))):
            found |= dict(zip(index, d.double().cpu(), strict=True))
        found = dict(gather_items(list(found.items())))
        return torch.stack([found[i] for i in sorted(found)])

    def slope(self, gates: Tensor, wanted: list[int], full: Tensor) -> Tensor:
        """Differentiate the weighted sum of (d - full)^2 over `wanted` by the gates."""
        leaf = gates.detach().float().to(self.gated.view.device).requires_grad_()
        total, counts = torch.zeros_like(gates), self.examples.counts
        for index, d in self.batches(leaf, wanted):
            rare = torch.tensor([1 / counts[self.examples[i].label] for i in index])
            loss = rare.to(d) * (d - full[index].to(d)) ** 2
            total += self.gated.differentiate(loss, [leaf])[0].to(total)
        return sum_over_processes(total)

    def learned(self, logits: Tensor, full: Tensor, seed: int) -> Tensor:
        """Train the logits of all heads in place, and return them."""
        draw, n, optimiser = random.Random(seed), len(full), torch.optim.Adam([logits], lr=RATE)
        orders = [draw.sample(range(n), n) for _ in range(EPOCHS)]
        steps = [order[i : i + MINIBATCH] for order in orders for i in range(0, n, MINIBATCH)]
        for number, wanted in enumerate(self.passes.bar(steps, name="gates")):
            with torch.enable_grad():
                gates = soft_circuit(logits.requires_grad_(), logits.numel() ** draw.random())
                slope = self.slope(gates, wanted, full)
                if not bool(torch.isfinite(slope).all()):
                    raise NonFiniteError(
                        f"{self.gated.view.name}: the gradient by the gates is not finite. Load "
                        "the model in float32."
                    )
                (logits.grad,) = torch.autograd.grad(gates, logits, slope)
            optimiser.param_groups[0]["lr"] = RATE * (1 - number / len(steps))
            optimiser.step()
        return logits.detach()


@checked_arguments
@uses_model
@hashed_once()
def learned_gates(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    seed: Seed = 0,
    batch_size: Count = 16,
    progress: bool = True,
) -> HeadScores:
    """Learn gates whose ranking gives faithful circuits of every size.

    Training begins with the ranking of the gradients at both ends ("one-pass:two-ended"). The
    learned logits are scaled to the standard deviation over heads of those scores, so their unit is
    the logit. Only their order has a meaning. The least is 0, so that magnitudes have that order.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to learn from.
        baseline: The values that ablated heads take.
        seed: Seed of the minibatches and of the circuit sizes.
        batch_size: Maximum number of examples in a pass; the minibatches do not depend on it.
        progress: Whether to show a progress bar.

    Returns:
        One score for each head, the same for every example. The standard errors are NaN, because
        they are not known.

    Raises:
        InputError, UnsupportedModelError, NonFiniteError: As `one_pass`.
    """
    view = checked_view(model, examples, baseline)
    start = one_pass(
        view, examples, baseline, slopes="gradient", steps="ends", batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    gated, passes = GatedPass(view, SLOPES["gradient"]), Passes(batch_size, progress=progress)
    game = _Game(gated, examples, baseline, passes)
    full = game.d(torch.ones(start.values.shape, device=view.device))
    place = start.values.flatten().argsort(stable=True).argsort().reshape(start.values.shape)
    logits = game.learned(SPREAD * (2 * place.double() / max(1, place.numel() - 1) - 1), full, seed)
    scores = without_unit(logits - logits.min(), logits) * start.values.double().std(correction=0)
    scores = scores.float()
    options = {**start.provenance.options, "method": "gates"}
    return replace(
        start, values=scores, stderr=torch.full_like(scores, torch.nan), method="gates",
        per_example=scores.expand_as(start.per_example).clone(),
        provenance=replace(start.provenance, options=options, seed=seed),
    )  # fmt: skip
