"""A circuit built head by head, by the faithfulness that each head adds."""

from __future__ import annotations

from torch import nn

from cdt_lens.circuits.ablation import circuit_metric, measure_circuits
from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.circuits.measures import faithfulness
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count
from cdt_lens.core.errors import InputError
from cdt_lens.core.passes import Passes
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.provenance import hashed_once
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.tasks.task import Examples


@checked_arguments
@uses_model
@hashed_once()
def greedy_circuit(
    model: nn.Module | ModelView,
    scores: HeadScores,
    examples: Examples,
    baseline: Baseline,
    *,
    k: Count,
    pool: Count = 32,
    rows: Count | None = None,
    batch_size: Count = 16,
    progress: bool = True,
) -> Circuit:
    """Build a circuit head by head, adding each time the head that brings f nearest to 1.

    The search takes k steps of at most `pool` ablation runs each. Choose on one split and report
    faithfulness on another.

    Args:
        model: A TransformerLens model or its `ModelView`.
        scores: Scores of the model's heads.
        examples: The examples that f is measured on.
        baseline: The values that ablated heads take.
        k: Number of heads in the circuit.
        pool: Number of candidates: the heads with the largest signed scores.
        rows: Maximum number of (circuit x example) rows per forward pass; None chooses it by the
            length of the prompts.
        batch_size: Number of examples per batch.
        progress: Whether to show progress bars.

    Returns:
        The circuit, with these scores and their provenance.

    Raises:
        InputError: k is larger than the pool, or fewer than k heads have scores.
    """
    passes = Passes(batch_size, rows, progress)
    if k > pool:
        raise InputError(f"greedy_circuit: k={k}, expected 1 to pool={pool}")
    view = view_of(model)
    scores.provenance.check_model(view, "this set of scores")
    candidates = list(scores.ranking()[:pool])
    if k > len(candidates):
        raise InputError(f"greedy_circuit: k={k}, but only {len(candidates)} heads have scores")
    everyone = all_heads(view.n_layers, view.n_heads)
    measured = measure_circuits(view, [everyone, ()], examples, baseline, passes=passes).means()
    full, empty = measured[everyone], measured[()]
    chosen: list[Head] = []
    while len(chosen) < k:
        trials = [(*chosen, head) for head in candidates]
        values = circuit_metric(
            view, trials, examples, baseline,
            batch_size=batch_size, rows=rows, progress=progress,
        )  # fmt: skip
        distance = (1 - faithfulness(values, full, empty)).abs()
        chosen.append(candidates.pop(int(distance.argmin())))
    selection = {"rule": "greedy", "k": k, "pool": pool, "by": "faithfulness"}
    chosen_on = {"task_hash": examples.hash, "baseline_hash": baseline.hash}
    return scores.circuit(chosen, selection | chosen_on)
