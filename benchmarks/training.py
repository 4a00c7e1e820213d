"""Cost of a training step by scope, side by side: time, peak memory, optimiser state.

python benchmarks/training.py MODEL [--repeats 5] [--batch 16] [--length 64] [--fraction 0.1]

The scopes take turns, step by step, in one process each for memory (peak of the resident set over
what the loaded model holds) and in one process together for time (median of the repeats after two
warm-up steps; ratios to the full step and to the LoRA step of the same run).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

import torch

import cdt_lens as cdt
from cdt_lens.circuits.circuit import random_heads
from cdt_lens.circuits.measures import heads_at
from cdt_lens.finetuning.answer_pass import AnswerPass
from cdt_lens.finetuning.checkpoints import State
from cdt_lens.finetuning.finetune import make_trainable
from cdt_lens.finetuning.options import TrainingOptions
from cdt_lens.finetuning.trainer import Trainer, _optimizer
from cdt_lens.models.view import view_of
from cdt_lens.tasks.task import Example, Examples, Task

SCOPES = ("full", "lora", "decision", "decision-circuit-norms", "norms")


def random_task(batch: int, length: int, vocabulary: int) -> Task:
    """Random tokens: only the cost matters here."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(10, vocabulary, (batch, length), generator=generator).tolist()
    items = tuple(
        Example(f"row {i}", tuple(row), "ab"[i % 2], (1 + i % 2,), (2 - i % 2,))
        for i, row in enumerate(rows)
    )
    train = Examples(items, ("a", "b"), "random/train")
    empty = Examples((), ("a", "b"), "random/none")
    return Task("random", ("a", "b"), {}, {}, "", train, empty, empty, empty)


class Stepper:
    """One scope of one model, ready to make steps."""

    def __init__(self, view: Any, scope: str, task: Task, fraction: float) -> None:
        norms = "circuit" if scope.endswith("circuit-norms") else "all"
        options = TrainingOptions(learning_rate=1e-5, batch_size=len(task.train), norms=norms)
        heads = random_heads(
            heads_at(fraction, view.n_layers * view.n_heads), view.n_layers, view.n_heads, seed=0
        )
        self.view = view
        self.trainable = make_trainable(view, scope.split("-")[0], heads, options)
        self.trainer = Trainer(AnswerPass(view), self.trainable, task, options, progress=False)
        self.optimizer = _optimizer(self.trainable, options)
        self.state = State(masters={}, best={})

    def step(self) -> float:
        """Seconds of one step."""
        index = range(len(self.trainer.task.train))
        started = time.perf_counter()
        self.trainer._step(tuple(index), self.optimizer, self.state)
        return time.perf_counter() - started

    def elements(self) -> tuple[int, int]:
        """Trained elements, and elements of the optimiser's state."""
        trained = sum(m.value.numel() for m in self.trainable.masters)
        kept = sum(
            value.numel()
            for moments in self.optimizer.state.values()
            for value in moments.values()
            if value.numel() > 1
        )
        return trained, kept


def times(model: str, scopes: list[str], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds a step: the scopes take turns, each with a model of its own."""
    found: dict[str, list[float]] = {scope: [] for scope in scopes}
    elements = {}
    view = view_of(cdt.load_model(model, backend=args.backend))
    task = random_task(args.batch, args.length, 1000)
    for turn in range(args.repeats + 1):
        for scope in scopes:
            stepper = Stepper(view, scope, task, args.fraction)
            try:
                with view.quiet(gradients=True), stepper.trainable.attached():
                    stepper.step()  # the first makes the optimiser's state
                    seconds = [stepper.step() for _ in range(2)]
                    elements[scope] = stepper.elements()
            finally:
                stepper.trainable.restore()
            if turn:  # the first turn warms up
                found[scope] += seconds
    return {
        scope: {
            "seconds": statistics.median(found[scope]), "least": min(found[scope]),
            "trained": elements[scope][0], "optimiser": elements[scope][1],
        }
        for scope in scopes
    }  # fmt: skip


def peak(model: str, scope: str, args: argparse.Namespace) -> float:
    """MiB of resident memory at the peak of two steps, over the loaded model; in a new process."""
    command = [
        sys.executable, "-W", "ignore", __file__, model, "--memory-of", scope, "--batch",
        str(args.batch), "--length", str(args.length), "--fraction", str(args.fraction),
        "--backend", args.backend,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["mib"])


def memory_of(model: str, scope: str, args: argparse.Namespace) -> None:
    """The child process: print the peak as JSON."""
    view = view_of(cdt.load_model(model, backend=args.backend))
    task = random_task(args.batch, args.length, 1000)
    stepper = Stepper(view, scope, task, args.fraction)
    before = _resident()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak of loading
    with view.quiet(gradients=True), stepper.trainable.attached():
        stepper.step()
        stepper.step()
    print(json.dumps({"mib": _peak() - before}))


def _resident() -> float:
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def _status(name: str) -> float:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--backend", default="bridge")
    parser.add_argument("--scopes", nargs="+", default=list(SCOPES))
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.memory_of:
        memory_of(args.model, args.memory_of, args)
        return
    found = times(args.model, args.scopes, args)
    print(f"{args.model}, batch {args.batch} x {args.length}, {torch.get_num_threads()} threads")
    full, lora = found.get("full"), found.get("lora")
    print("| scope | s/step (min) | of full | of lora | trained | optimiser/trained | peak MiB |")
    for scope, row in found.items():
        ratio = [row["seconds"] / r["seconds"] if r else float("nan") for r in (full, lora)]
        print(
            f"| {scope} | {row['seconds']:.2f} ({row['least']:.2f}) | {ratio[0]:.2f} "
            f"| {ratio[1]:.2f} | {row['trained']:,} | {row['optimiser'] / row['trained']:.2f} "
            f"| {peak(args.model, scope, args):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
