"""Run the training loop, which is the same for every scope: AdamW over a `Trainable`'s masters.

1. Draw the batches of an epoch from (seed, epoch) alone. Prompts of similar length share a batch.
2. Make one step for each batch: sum the gradients of its parts, over processes as well, clip the
   norm of the selected gradients, apply AdamW with decay on matrices only, and write the masters
   back.
3. Evaluate on validation data after each epoch, and keep the best epoch's values. `patience` ends a
   run that does not improve. At the end, write the best values into the model.
4. Save a checkpoint of masters, moments, best values and history. On the same machine a resumed run
   ends bit for bit like an uninterrupted one. A loss or gradient that is not finite stops the run
   before it changes the weights.

See docs/method/training.md (CT-SFT, arXiv 2601.08146).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_scheduler

from cdt_lens.core.errors import InputError, NonFiniteError
from cdt_lens.core.processes import is_main, shard, sum_over_processes
from cdt_lens.core.set_aside import set_aside
from cdt_lens.finetuning.answer_pass import AnswerPass
from cdt_lens.finetuning.checkpoints import Checkpoint, Log, State
from cdt_lens.finetuning.options import TrainingOptions
from cdt_lens.finetuning.saved_tensors import SavedOnce
from cdt_lens.finetuning.tracking import Tracking
from cdt_lens.finetuning.trainable import Trainable
from cdt_lens.models.words import Words, among
from cdt_lens.tasks.evaluate import evaluate
from cdt_lens.tasks.metrics import answer_loss, is_kept
from cdt_lens.tasks.task import Batch, Examples, Task

_BUCKET = 8  # batches that are sorted by length together


@dataclass(frozen=True, eq=False)
class Trained:
    """The course of a run.

    Attributes:
        history: one row for each evaluation.
        best_epoch: the epoch with the best values.
        stopped: why the run ended.
        seconds: time of the training steps.
    """

    history: Sequence[dict[str, Any]]
    best_epoch: int
    stopped: str
    seconds: float


@dataclass
class Trainer:
    """One run of the loop over `task.train`, evaluated on `task.valid`.

    Attributes:
        passes: the forward pass.
        trainable: the values to train.
        task: the task.
        options: the training options.
        source: a second task whose validation accuracy shows forgetting. It is never trained on.
        checkpoint: where the state is saved, or None.
        log: where each step is logged, or None.
        tracking: the trackers that each step is sent to, or None.
        progress: whether to show a progress bar.
        name: name of the run in messages and in the progress bar.
    """

    passes: AnswerPass
    trainable: Trainable
    task: Task
    options: TrainingOptions
    source: Task | None = None
    checkpoint: Checkpoint | None = None
    log: Log | None = None
    progress: bool = True
    name: str = "training"
    tracking: Tracking | None = None

    def run(self) -> Trained:
        """Train until the last epoch or until `patience` ends the run.

        The model then holds the best values. Call this within `trainable.attached()`.

        Returns:
            The course of the run.

        Raises:
            InputError: the options have no learning rate.
            NonFiniteError: a loss or gradient is not finite. The last checkpoint is kept.
        """
        if self.options.learning_rate is None:
            raise InputError(
                "learning_rate: expected a number, got None. Set it in the options; only finetune "
                "chooses a default."
            )
        optimizer = _optimizer(self.trainable, self.options)
        state = self._begin(optimizer)
        total = self.options.epochs * self._steps_per_epoch
        with (
            self.passes.view.quiet(gradients=True),
            self._recomputed(),
            tqdm(
                total=total, initial=state.step, desc=self.name, unit="step", leave=False,
                disable=None if self.progress and is_main() else True,
            ) as bar,
        ):  # fmt: skip
            while state.stopped is None and state.epoch < self.options.epochs:
                self._epoch(state, optimizer, bar)
                self._validate(state)
                self._save(state, optimizer)
        self._put(state.best)
        why = state.stopped or "all epochs"
        return Trained(state.history, state.best_epoch, why, state.seconds)

    @property
    def _steps_per_epoch(self) -> int:
        return math.ceil(len(self.task.train) / self.options.batch_size)

    @cached_property
    def _saving(self) -> AbstractContextManager[Any]:
        """How a forward pass saves tensors for the backward pass."""
        view = self.passes.view
        # A graphics processor would wait for each comparison.
        if view.is_bridge or view.device.type != "cpu":
            return nullcontext()
        return SavedOnce(view.tl.parameters())

    def _recomputed(self) -> AbstractContextManager[None]:
        if self.options.gradient_checkpointing:
            return self.passes.view.recomputed()
        return nullcontext()

    def _begin(self, optimizer: torch.optim.Optimizer) -> State:
        # Store all streams before the first step, so that a resumed run keeps the same bits.
        source = () if self.source is None else (self.source.valid,)
        with self.passes.view.quiet():
            for examples in (self.task.train, self.task.valid, *source):
                if len(examples):
                    self.passes.prepare(examples, self.options.eval_batch_size)
        state = None if self.checkpoint is None else self.checkpoint.load()
        if state is not None and self.checkpoint is not None:
            self.checkpoint.check_tensors(state, self._values())
            self._put(state.masters)
            _load_moments(optimizer, self.trainable, state.moments)
            state.best = set_aside(state.best)
            state.masters, state.moments = {}, {}
        if self.log is not None:
            self.log.cut(-1 if state is None else state.step)
        if self.tracking is not None:
            self.tracking.begin(0 if state is None else state.step + len(state.history))
        if state is None:
            state = State(masters={}, best=set_aside(self._values()))
            self._add_row(state, train_loss=math.nan)
        return state

    # ------------------------------------------------------------------ an epoch

    def _epoch(self, state: State, optimizer: torch.optim.Optimizer, bar: Any) -> None:
        rate = _rates(self.options, self.options.epochs * self._steps_per_epoch)
        batches = epoch_batches(self.task.train, self.options, state.epoch)
        done = state.step - state.epoch * self._steps_per_epoch
        for index in batches[done:]:
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = rate(state.step)
            loss, norm = self._step(index, optimizer, state)
            state.seconds += time.perf_counter() - started
            row = {"step": state.step + 1, "epoch": state.epoch + 1, "loss": loss}
            self._tell(row | {"grad_norm": norm, "learning_rate": rate(state.step)})
            state.step += 1
            state.loss_sum += loss
            state.loss_count += 1
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")
            every = self.options.checkpoint_every
            if every and state.step % every == 0 and state.step % self._steps_per_epoch:
                self._save(state, optimizer)
        state.epoch += 1

    def _step(
        self, index: Sequence[int], optimizer: torch.optim.Optimizer, state: State
    ) -> tuple[float, float]:
        """Make one step; return the mean loss in nats and the norm of the gradient."""
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64)
        for batch in self._parts(index):
            with self._saving:
                loss = self._loss(batch) / len(index)
            total += loss.detach().double().cpu()
            loss.backward()
        total = sum_over_processes(total)
        masters = [master.value for master in self.trainable.masters]
        if shard()[1] > 1:
            _sum_gradients(masters)
        where = f"{self.name}: step {state.step + 1} (epoch {state.epoch + 1})"
        norm = nn.utils.clip_grad_norm_(masters, self.options.clip or math.inf)
        for what, value in (("loss", float(total)), ("norm of the gradient", float(norm))):
            if not math.isfinite(value):
                raise NonFiniteError(f"{where}: the {what} is {value}; {self._advice()}")
        optimizer.step()
        self.trainable.write()
        return float(total), float(norm)

    def _advice(self) -> str:
        kept = "the model is as it was before training"
        if self.checkpoint is not None and self.checkpoint.path.exists():
            kept = (
                f"the last good state is kept in {self.checkpoint.path}; to train with other "
                "options, remove it or choose another path"
            )
        return (
            f"{kept}. Lower the learning rate ({self.options.learning_rate:g} now) or the clip "
            "norm."
        )

    def _parts(self, index: Sequence[int]) -> Iterator[Batch]:
        """Return this process's share of a batch, split to fit into memory."""
        rank, world = shard()
        own = index[rank::world]
        if not own:
            return iter(())
        examples = self.task.train
        chosen = Examples(tuple(examples[i] for i in own), examples.labels, examples.name)
        size = self.options.micro_batch or len(own)
        return chosen.batches(size, apart=self.passes.view.longrope_limit)

    def _loss(self, batch: Batch) -> Tensor:
        """Compute the sum of the batch's losses, in nats."""
        logits = self.passes(batch)
        moved = batch.to(logits.device)
        candidates = among(logits, moved.candidates)
        loss = answer_loss(candidates, moved.is_answer, moved.is_candidate)
        if self.options.loss == "vocabulary":
            chosen = candidates.masked_fill(~moved.is_candidate, -torch.inf).logsumexp(-1)
            # The scores of words are log-probabilities already.
            whole = 0.0 if isinstance(moved.candidates, Words) else logits.logsumexp(-1)
            loss = loss + whole - chosen
        return loss.sum()

    # ------------------------------------------------------------------ evaluation and state

    def _validate(self, state: State) -> None:
        """Evaluate on validation data and keep the values if they are the best so far."""
        last = state.epoch == self.options.epochs
        if state.epoch % self.options.evaluate_every and not last:
            return
        mean = state.loss_sum / max(state.loss_count, 1)
        state.loss_sum, state.loss_count = 0.0, 0
        rows = [*state.history]
        row = self._add_row(state, train_loss=mean)
        first = rows[0]
        best = max(rows, key=lambda r: rank_of(r, first, self.options))
        rank = rank_of(row, first, self.options)
        # Without validation data the last epoch is kept that holds `least_retention`.
        last_kept = not len(self.task.valid) and rank[0]
        if last_kept or rank > rank_of(best, first, self.options):
            state.best_epoch, state.best = state.epoch, set_aside(self._values())
        best_row = [r["epoch"] for r in state.history].index(state.best_epoch)
        since = len(state.history) - 1 - best_row
        if self.options.patience is not None and since >= self.options.patience and not last:
            state.stopped = f"early: no better for {since} evaluations"

    def _add_row(self, state: State, *, train_loss: float) -> dict[str, Any]:
        row: dict[str, Any] = {
            "epoch": state.epoch, "step": state.step, "train_loss": train_loss,
            "learning_rate": self.options.learning_rate, "target_loss": math.nan,
            "target_accuracy": math.nan, "target_macro_f1": math.nan, "source_accuracy": math.nan,
            "seconds": state.seconds,
        }  # fmt: skip
        if len(self.task.valid):
            evaluation = self._evaluate(self.task, self.task.valid)
            f1 = math.nan if evaluation.macro_f1 is None else evaluation.macro_f1
            row |= {"target_loss": evaluation.loss, "target_accuracy": evaluation.accuracy}
            row["target_macro_f1"] = f1
        if self.source is not None:
            row["source_accuracy"] = self._evaluate(self.source, self.source.valid).accuracy
        state.history.append(row)
        # JSON has no NaN.
        self._tell({"kind": "validation"} | {k: None if v != v else v for k, v in row.items()})
        return row

    def _tell(self, row: dict[str, Any]) -> None:
        """Write a row to the log and send it to the trackers."""
        if self.log is not None:
            self.log.write(row)
        if self.tracking is not None:
            self.tracking.log(row)

    def _evaluate(self, task: Task, examples: Examples) -> Any:
        view = self.passes.view

        def logits(batch: Batch) -> Tensor:
            with view.quiet():
                return self.passes.candidates(batch).float().cpu()

        return evaluate(
            view, examples, task, batch_size=self.options.eval_batch_size, logits_of=logits
        )

    def _save(self, state: State, optimizer: torch.optim.Optimizer) -> None:
        if self.checkpoint is not None:
            state.masters = self._values()
            state.moments = _moments(optimizer, self.trainable)
            self.checkpoint.save(state)
            state.masters, state.moments = {}, {}

    def _values(self) -> dict[str, Tensor]:
        return {m.name: m.value.detach() for m in self.trainable.masters}

    def _put(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for master in self.trainable.masters:
                master.value.copy_(values[master.name])
        self.trainable.write()


def epoch_batches(
    examples: Examples, options: TrainingOptions, epoch: int
) -> list[tuple[int, ...]]:
    """Draw the batches of an epoch. Prompts of similar length share a batch.

    Args:
        examples: the training split.
        options: the training options. Their seed and batch size are used.
        epoch: the epoch, counted from 0.

    Returns:
        The positions of each batch's examples. Every example occurs once.
    """
    draw = random.Random(f"{options.seed}/{epoch}")
    order = list(range(len(examples)))
    draw.shuffle(order)
    size = options.batch_size
    grouped: list[int] = []
    for start in range(0, len(order), size * _BUCKET):
        bucket = order[start : start + size * _BUCKET]
        grouped += sorted(bucket, key=lambda i: -len(examples[i].tokens))
    batches = [tuple(grouped[i : i + size]) for i in range(0, len(grouped), size)]
    draw.shuffle(batches)
    return batches


def _optimizer(trainable: Trainable, options: TrainingOptions) -> torch.optim.Optimizer:
    groups = [
        {
            "params": [m.value for m in trainable.masters if m.decay == decay],
            "weight_decay": options.weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    # The fused kernel is nine times as fast on one core, without copies. It reads memory in order
    # whatever the strides are, and would change elements outside of a sliced view.
    in_order = all(master.value.is_contiguous() for master in trainable.masters)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, fused=in_order)


def _rates(options: TrainingOptions, steps: int) -> Callable[[int], float]:
    """Return the learning rate before each step, by transformers' own schedule."""
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    # With a warm-up over all steps, transformers would give the last step the rate 0.
    warm = min(math.ceil(options.warmup * steps), max(steps - 1, 0))
    factor = get_scheduler(options.schedule, dummy, warm, max(steps, 1)).lr_lambdas[0]
    # Step 0 of a warm-up would have the rate 0 and no effect, so count from 1 there.
    return lambda step: options.learning_rate * factor(step + 1 if step < warm else step)


def rank_of(
    row: Mapping[str, Any], first: Mapping[str, Any], options: TrainingOptions
) -> tuple[float, float, float]:
    """Return a key that is greater for a better row; the loss decides between equal accuracies.

    Args:
        row: a row of the history.
        first: the row before the first step.
        options: the training options, with the metric and the least retention.

    Returns:
        Whether the row keeps enough of the source accuracy, the metric, and minus the loss in nats.
    """
    least = options.least_retention
    keeps = least is None or is_kept(row["source_accuracy"], first["source_accuracy"], least)
    loss = -row["target_loss"]
    return float(keeps), loss if options.metric == "loss" else row[f"target_{options.metric}"], loss


def best_without_floor(
    rows: Sequence[Mapping[str, Any]], options: TrainingOptions
) -> Mapping[str, Any]:
    """Return the row of a history that would be kept if forgetting did not matter.

    Args:
        rows: the history; the first row is before the first step.
        options: the training options, whose `least_retention` does not count.
    """
    free = replace(options, least_retention=None)
    return max(rows, key=lambda row: rank_of(row, rows[0], free))


def _sum_gradients(masters: Sequence[nn.Parameter]) -> None:
    """Sum the gradients over all processes in one message."""
    for master in masters:
        if master.grad is None:  # this process had no part of the batch
            master.grad = torch.zeros_like(master)
    flat = torch.cat([m.grad.flatten() for m in masters if m.grad is not None])
    total = sum_over_processes(flat)
    pieces = total.split([m.numel() for m in masters])
    for master, piece in zip(masters, pieces, strict=True):
        master.grad = piece.view_as(master).clone()


def _moments(optimizer: torch.optim.Optimizer, trainable: Trainable) -> dict[str, Tensor]:
    return {
        f"{m.name}|{key}": value
        for m in trainable.masters
        for key, value in optimizer.state[m.value].items()
    }


def _load_moments(
    optimizer: torch.optim.Optimizer, trainable: Trainable, moments: dict[str, Tensor]
) -> None:
    values = {m.name: m.value for m in trainable.masters}
    for name, value in moments.items():
        weight, _, key = name.rpartition("|")
        # The step of the fused kernel is on the device too.
        on_device = key != "step" or optimizer.defaults["fused"]
        where = value.to(values[weight].device) if on_device else value
        optimizer.state[values[weight]][key] = where
