"""What two processes compute, and one by itself."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from cdt_lens.circuits.ablation import circuit_metric
from cdt_lens.core import processes as distributed
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.models.heads import Head
from cdt_lens.scoring.sweep import score_heads
from cdt_lens.tasks.task import Examples
from helpers.tiny_tasks import examples
from helpers.wrapped import wrap

CIRCUITS = ((), (Head(0, 1),), (Head(0, 0), Head(1, 3)))


def work(out: Path, data: Examples, *, checkpoint: Path | None = None) -> None:
    """What both the single process and the launched ones do; each writes its own results."""
    rank, world = distributed.shard()
    folder = out / f"{rank}of{world}"
    words = out / f"words-{rank}of{world}"
    model = wrap("llama", "bridge", str(words), torch.float32)
    baseline = mean_activations(model, data, batch_size=2, progress=False)
    baseline.save(folder / "baseline.json")
    scores = score_heads(model, data, baseline, batch_size=2, checkpoint=checkpoint, progress=False)
    scores.save(folder / "scores.json")
    metric = circuit_metric(model, CIRCUITS, data, baseline, batch_size=2, progress=False)
    (folder / "metric.json").write_text(json.dumps(metric.tolist()))


def one_example() -> Examples:
    return examples((6,), ("positive",))
