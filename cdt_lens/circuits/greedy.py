"""A circuit built head by head, by what each head adds to faithfulness (method.md §5)."""

from __future__ import annotations

from torch import nn

from cdt_lens.circuits.ablation import circuit_metric, measure_circuits
from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.circuits.measures import faithfulness
from cdt_lens.core.errors import InputError
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.tasks.task import Examples


def greedy_circuit(
    model: nn.Module | ModelView,
    scores: HeadScores,
    examples: Examples,
    baseline: Baseline,
    *,
    k: int,
    pool: int = 32,
    rows: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Circuit:
    """Build a circuit head by head, adding each time the one that brings f nearest to 1.

    Candidates are the `pool` heads with the largest scores; k steps of at most `pool` ablation
    runs each. Choose on one split and report faithfulness on another.

    Raises:
        InputError: k is larger than the pool.
    """
    if not 1 <= k <= pool:
        raise InputError(f"greedy_circuit: k={k}, expected 1 to pool={pool}")
    view = view_of(model)
    scores.provenance.check_model(view, "these scores")
    candidates = list(scores.ranking()[:pool])
    if k > len(candidates):
        raise InputError(f"greedy_circuit: k={k}, but only {len(candidates)} heads have scores")
    everyone = all_heads(view.n_layers, view.n_heads)
    measured = measure_circuits(
        view, [everyone, ()], examples, baseline, metric="direction", task=None,
        batch_size=batch_size, rows=rows, progress=progress,
    )  # fmt: skip
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
