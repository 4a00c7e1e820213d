"""Methods to set beside the decomposition; for now the yardstick, exact mean-ablation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from cdt_lens.baselines import Baseline
from cdt_lens.head_scores import HeadScores
from cdt_lens.heads import Head
from cdt_lens.model import ModelView
from cdt_lens.scores import Direction, score_heads
from cdt_lens.tasks import Examples


def exact_ablation(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    heads: Sequence[Head | str] | None = None,
    direction: Direction = "mean",
    batch_size: int = 16,
    rows: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> HeadScores:
    """What each head's mean-ablation takes away from the task direction, exactly.

    score = d(full) - d(with the head's z set to the baseline), in logits: positive = the head
    pushes towards the gold label. A real intervention on the model: every rule is *through*, so
    this is `score_heads` with the "ablation" preset. Raises what `score_heads` raises.
    """
    return score_heads(
        model,
        examples,
        baseline,
        rules="ablation",
        heads=heads,
        direction=direction,
        batch_size=batch_size,
        rows=rows,
        checkpoint=checkpoint,
        method="mean-ablation",
        progress=progress,
    )
