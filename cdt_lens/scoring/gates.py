"""Learned gates: one logit for each head, trained so that its ranking is good at every size.

Each step

1. draws a circuit size k, log-uniform from 1 to the number of heads,
2. makes a soft circuit of that size: gate = sigmoid(logit - t), with t such that the gates add up
   to k,
3. moves each head's z to baseline + gate (z - baseline), and descends on the squared distance of
   the task direction d from that of the full model, (d(gates) - d(full))^2, in relation to the
   squared gap (d(full) - d(empty))^2, both averaged over labels.

The logits begin with the ranking of the gradients at both ends. The idea of one ranking for all
sizes is that of Matryoshka Attribution (arXiv 2609.25518).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cdt_lens.circuits.head_scores import HeadScores, label_index
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count, Seed
from cdt_lens.core.passes import Passes
from cdt_lens.core.processes import gather_items, sum_over_processes
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.decomposition.gated_pass import GatedPass
from cdt_lens.decomposition.slopes import SLOPES
from cdt_lens.models.provenance import hashed_once, provenance_of
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.ensemble import in_unit_of, standardised
from cdt_lens.scoring.one_pass import checked_view, one_pass
from cdt_lens.scoring.sweep import collect_scores, recorded_options
from cdt_lens.tasks.metrics import balanced_mean
from cdt_lens.tasks.task import Examples

# Each example takes part in this many steps: 320 steps for 128 examples.
EPOCHS = 20
MINIBATCH = 8
# The first logits lie evenly between -SPREAD and SPREAD; the rate of Adam falls from RATE to 0.
SPREAD, RATE = 8.0, 0.1


def soft_circuit(logits: Float[Tensor, "layer head"], size: float) -> Float[Tensor, "layer head"]:
    """Return gates from 0 to 1 that add up to `size`, the larger the larger the logit.

    Args:
        logits: The logits of all heads. The gates are differentiable by them.
        size: The sum, above 0 and below the number of heads.
    """
    values = logits.detach()
    low, high = values.min() - 50, values.max() + 50
    for _ in range(60):
        middle = (low + high) / 2
        too_many = torch.sigmoid(values - middle).sum() > size
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    gates = torch.sigmoid(values - low)
    # The threshold moves with the logits so that the sum stays: dt = sum of slope dlogit / slopes.
    slope = gates * (1 - gates)
    moved = (slope * (logits - values)).sum() / slope.sum().clamp(min=1e-12)
    return torch.sigmoid(logits - low - moved)


@dataclass(frozen=True)
class _Game:
    """The task direction as a function of the gates of all heads."""

    gated: GatedPass
    examples: Examples
    baseline: Baseline
    passes: Passes

    def directions(
        self, gates: Float[Tensor, "layer head"], wanted: Sequence[int]
    ) -> Iterator[tuple[list[int], Float[Tensor, " example"]]]:
        """Yield this process' batches of the wanted examples, with d in the gated model."""
        view = self.gated.view
        chosen = replace(self.examples, items=tuple(self.examples[i] for i in wanted))
        for batch in self.passes.batches(chosen, view.longrope_limit):
            batch = batch.to(view.device)
            self.gated.check_caller_hooks(batch)
            at = self.baseline.for_batch(view, batch)
            by_layer = list(gates[:, :, None])
            yield (
                [wanted[i] for i in batch.index],
                self.gated.direction(batch, at, by_layer, batch.direction),
            )

    def end(self, gate: float) -> Float[Tensor, " example"]:
        """Compute d of every example with all gates alike."""
        view, everyone = self.gated.view, range(len(self.examples))
        gates = torch.full((view.n_layers, view.n_heads), gate, device=view.device)
        with torch.no_grad():
            items = [
                pair
                for index, d in self.directions(gates, everyone)
                for pair in zip(index, d.double().cpu(), strict=True)
            ]
        found = dict(gather_items(items))
        return torch.stack([found[i] for i in everyone])

    def slope(
        self, gates: Tensor, wanted: Sequence[int], full: Tensor, weights: Tensor
    ) -> Float[Tensor, "layer head"]:
        """Differentiate the weighted squared distances from `full` by the gates."""
        leaf = gates.detach().float().to(self.gated.view.device).requires_grad_()
        total = torch.zeros_like(gates)
        with torch.enable_grad():
            for index, d in self.directions(leaf, wanted):
                loss = weights[index].to(d) * (d - full[index].to(d)) ** 2
                total += self.gated.differentiate(loss, [leaf])[0].to(total)
        return sum_over_processes(total)


def _learned(
    game: _Game, ranked: Tensor, full: Tensor, weights: Tensor, seed: int
) -> Float[Tensor, "layer head"]:
    """Train the logits, beginning with the order of the scores `ranked`."""
    place = ranked.flatten().argsort(stable=True).argsort().reshape(ranked.shape)
    heads = ranked.numel()
    logits = SPREAD * (2 * place.double() / max(1, heads - 1) - 1)
    logits.requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=RATE)
    generator = random.Random(seed)
    steps = list(_minibatches(len(full), generator))
    for number, wanted in enumerate(game.passes.bar(steps, name="gates")):
        with torch.enable_grad():
            gates = soft_circuit(logits, heads ** generator.random())
            slope = game.slope(gates, wanted, full, weights / len(wanted))
            (logits.grad,) = torch.autograd.grad(gates, logits, slope)
        optimiser.param_groups[0]["lr"] = RATE * (1 - number / len(steps))
        optimiser.step()
    return logits.detach()


def _minibatches(examples: int, generator: random.Random) -> Iterator[list[int]]:
    for _ in range(EPOCHS):
        order = generator.sample(range(examples), examples)
        yield from (order[i : i + MINIBATCH] for i in range(0, examples, MINIBATCH))


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
    """Learn a gate for each head whose ranking gives faithful circuits of every size.

    The scores are the learned logits, scaled to the mean and the standard deviation over heads of
    the gradients at both ends ("one-pass:two-ended"): logits of the task direction by their size, a
    ranking by their meaning. They are the same for every example, so their standard error is 0.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to learn from.
        baseline: The values that ablated heads take.
        seed: Seed of the minibatches and of the circuit sizes.
        batch_size: Maximum number of examples in a pass. It does not change the minibatches.
        progress: Whether to show a progress bar.

    Returns:
        Signed scores (positive = pushes towards the gold label).

    Raises:
        InputError, UnsupportedModelError, NonFiniteError: As `one_pass`.
    """
    passes = Passes(batch_size, progress=progress)
    view = checked_view(model, examples, baseline)
    start = one_pass(
        view, examples, baseline, slopes="gradient", steps="ends", batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    game = _Game(GatedPass(view, SLOPES["gradient"]), examples, baseline, passes)
    full, empty = game.end(1.0), game.end(0.0)
    logits = _learned(game, start.values, full, _weights(full - empty, examples), seed)
    scores = in_unit_of(standardised(logits, logits), start.values.double())
    done = {i: torch.cat([scores.flatten(), d[None]]).float() for i, d in enumerate(full)}
    options = {"method": "gates", **recorded_options(baseline, "mean"), "heads": "all"}
    provenance = provenance_of(view, examples, options=options, seed=seed)
    return collect_scores(view, examples, done, None, "gates", provenance)


def _weights(gap: Float[Tensor, " example"], examples: Examples) -> Float[Tensor, " example"]:
    """Return weights whose mean gives every label the same part, over the squared gap."""
    labels = label_index([example.label for example in examples])
    counts = labels.bincount().double()
    squared = balanced_mean(gap**2, labels).clamp(min=torch.finfo(gap.dtype).tiny)
    return len(labels) / len(counts) / counts[labels] / squared
