"""Work that two launched processes and a single one both do, each writing its own results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import cdt_lens as cdt
from cdt_lens.circuits.ablation import circuit_metric
from cdt_lens.core import processes
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.models.heads import Head
from cdt_lens.scoring.sweep import score_heads
from cdt_lens.tasks.task import Examples
from helpers.saved import TEMPLATE, VERBALIZER
from helpers.tiny_tasks import examples
from helpers.wrapped import wrap

CIRCUITS = ((), (Head(0, 1),), (Head(0, 0), Head(1, 3)))


def commands(folder: Path, out: Path) -> list[list[str]]:
    """Return two command lines: discover a circuit in `out`, then measure its faithfulness."""
    files = [x for s in ("train", "valid") for x in (f"--{s}", str(folder / "data" / f"{s}.csv"))]
    words = [x for label, word in VERBALIZER.items() for x in ("--verbalizer", f"{label}={word}")]
    discover = [
        "discover", "--model", str(folder / "tiny"), "--out", str(out), "--task", "files", *files,
        "--template", TEMPLATE, *words, "--examples", "9", "--k", "2", "--ablation",
        "--batch-size", "2", "--backend", "bridge",
    ]  # fmt: skip
    return [discover, ["faithfulness", str(out), "--examples", "6"]]


def measure(out: Path, data: Examples, *, checkpoint: Path | None = None) -> None:
    """Save means, head scores and a circuit metric in a folder named after this process."""
    rank, world = processes.shard()
    folder = out / f"{rank}of{world}"
    words = out / f"words-{rank}of{world}"
    model = wrap("llama", "bridge", str(words), torch.float32)
    baseline = mean_activations(model, data, batch_size=2, progress=False)
    baseline.save(folder / "baseline.json")
    scores = score_heads(model, data, baseline, batch_size=2, checkpoint=checkpoint, progress=False)
    scores.save(folder / "scores.json")
    if len(data) > 4:
        kept = None if checkpoint is None else checkpoint.with_stem("estimate")
        estimate = score_heads(
            model, data, baseline, exact=4, batch_size=1, checkpoint=kept, progress=False
        )
        estimate.save(folder / "estimate.json")
    metric = circuit_metric(model, CIRCUITS, data, baseline, batch_size=2, progress=False)
    (folder / "metric.json").write_text(json.dumps(metric.tolist()))


def one_example() -> Examples:
    """Return fewer examples than processes."""
    return examples((6,), ("positive",))


def train(folder: Path, **changes: Any) -> cdt.FineTuneResult:
    """Fine-tune the saved model of `folder` on its data; `changes` are options of `finetune`."""
    model = cdt.load_model(folder / "tiny", backend="bridge")
    data = {name: folder / "data" / f"{name}.csv" for name in ("train", "valid", "test")}
    task = cdt.task_from_files(
        data, tokenizer=model.tokenizer, template=TEMPLATE, verbalizer=VERBALIZER
    )
    given = {"epochs": 3, "batch_size": 5, "learning_rate": 1e-2, "metric": "loss", **changes}
    return cdt.finetune(
        model, task, heads=["L0H1", "L1H2"], source=task, progress=False, **given
    )  # fmt: skip
