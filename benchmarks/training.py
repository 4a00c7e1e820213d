"""Cost of a training step by scope and with the plain tools: time, peak memory, optimiser state.

python benchmarks/training.py MODEL [--repeats 3] [--batch 16] [--length 64 ...] [--fraction 0.1]

The plain tools are full fine-tuning with transformers and LoRA with peft (`plain_training.py`).
Scopes and tools take turns, each in a new process that makes three steps. All processes import the
same libraries.

- Time: the median over the repeats of the second and third step, and the least. The ratio is to
  plain full fine-tuning. `--cpu-time` counts the processor's seconds instead, for a machine with
  other work.
- Memory: the highest resident set after the model is loaded, with the model and with the copies
  that training makes. The ratio is to plain full fine-tuning for `full`, and to plain LoRA for the
  other scopes.

A scope followed by `@hooked` runs in HookedTransformer, by `@checkpointed` with gradient
checkpointing: `--scopes plain-full full full@hooked full@checkpointed`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from plain_training import PLAIN, PlainStepper, load

import cdt_lens as cdt
from cdt_lens.circuits.circuit import random_heads
from cdt_lens.circuits.measures import heads_at
from cdt_lens.core.set_aside import set_aside
from cdt_lens.finetuning.answer_pass import AnswerPass
from cdt_lens.finetuning.checkpoints import State
from cdt_lens.finetuning.finetune import make_trainable
from cdt_lens.finetuning.options import TrainingOptions
from cdt_lens.finetuning.trainer import Trainer, _optimizer
from cdt_lens.models.view import view_of
from cdt_lens.tasks.task import Example, Examples, Task

SCOPES = ("full", "lora", "decision", "decision-circuit-norms", "norms")
STEPS = 3  # of a process; the first makes the optimiser's state and is not timed


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
        best = set_aside({m.name: m.value for m in self.trainable.masters})
        self.state = State(masters={}, best=best)

    @contextmanager
    def ready(self, *, checkpointed: bool = False) -> Iterator[None]:
        """The context of the steps."""
        recomputed = self.view.recomputed() if checkpointed else nullcontext()
        with self.view.quiet(gradients=True), recomputed, self.trainable.attached():
            yield

    def step(self) -> None:
        """Make one step."""
        index = range(len(self.trainer.task.train))
        self.trainer._step(tuple(index), self.optimizer, self.state)

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


def child(scope: str, args: argparse.Namespace) -> None:
    """The new process: print the seconds of its steps, its peak and its elements as JSON."""
    scope, *how = scope.split("@")
    backend = "hooked" if "hooked" in how else args.backend
    task = random_task(args.batch, args.length[0], 1000)
    plain = scope in PLAIN
    model = load(args.model) if plain else view_of(cdt.load_model(args.model, backend=backend))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak of loading
    made: Any = PlainStepper if plain else lambda *of: Stepper(*of, args.fraction)
    stepper = made(model, scope, task)
    clock = time.process_time if args.cpu_time else time.perf_counter
    seconds = []
    with stepper.ready(checkpointed="checkpointed" in how):
        for _ in range(STEPS):
            started = clock()
            stepper.step()
            seconds.append(clock() - started)
    trained, kept = stepper.elements()
    row = {"seconds": seconds[1:], "mib": peak(), "trained": trained, "optimiser": kept}
    print(json.dumps(row))


def peak() -> float:
    """MiB of resident memory at the highest point of this process."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def measure(scope: str, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """What a new process measures."""
    command = [
        sys.executable, "-W", "ignore", __file__, args.model, "--child", scope, "--batch",
        str(args.batch), "--length", str(length), "--fraction", str(args.fraction),
        "--backend", args.backend, *(["--cpu-time"] * args.cpu_time),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def report(length: int, args: argparse.Namespace) -> None:
    """Print the table of one length of prompts."""
    found: dict[str, list[dict[str, Any]]] = {scope: [] for scope in args.scopes}
    for _ in range(args.repeats):
        for scope in args.scopes:
            found[scope].append(measure(scope, length, args))
    seconds = {s: [x for row in rows for x in row["seconds"]] for s, rows in found.items()}
    time_of = {scope: statistics.median(values) for scope, values in seconds.items()}
    mib = {scope: statistics.median(row["mib"] for row in rows) for scope, rows in found.items()}
    print(f"\n{args.model}, batch {args.batch} x {length}, {torch.get_num_threads()} threads")
    print("| scope | s/step (least) | of plain-full | peak MiB | of plain | trained | optimiser |")
    print("|---|---|---|---|---|---|---|")
    for scope, rows in found.items():
        full = scope.split("@")[0] in ("full", "plain-full")
        plain = mib.get("plain-full" if full else "plain-lora", float("nan"))
        step = time_of[scope] / time_of.get("plain-full", float("nan"))
        print(
            f"| {scope} | {time_of[scope]:.2f} ({min(seconds[scope]):.2f}) | {step:.2f} "
            f"| {mib[scope]:.0f} | {mib[scope] / plain:.2f} | {rows[0]['trained']:,} "
            f"| {rows[0]['optimiser'] / rows[0]['trained']:.2f} of trained |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, nargs="+", default=[64])
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--backend", default="bridge")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--scopes", nargs="+", default=[*PLAIN, *SCOPES])
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.child:
        child(args.child, args)
        return
    for length in args.length:
        report(length, args)


if __name__ == "__main__":
    main()
