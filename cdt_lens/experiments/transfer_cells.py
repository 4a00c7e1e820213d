"""Cells of a transfer experiment: one run, target and seed, trained and evaluated once.

A run is a scope, or a variant of one with other heads or options. Each cell is a file with its row
of the table, its history, what it made of every test example, and the key of what it was made from
(model, data, heads, options, version). An interrupted cell resumes from its last checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.circuits.measures import heads_at
from cdt_lens.core.artifacts import remove_artifact
from cdt_lens.core.choices import HEAD_SCOPES, KeyValue
from cdt_lens.core.errors import NonFiniteError
from cdt_lens.core.kept import Cell, Kept, file_name
from cdt_lens.core.processes import is_main
from cdt_lens.decomposition.decompose import is_out_of_memory
from cdt_lens.experiments.inputs import with_train
from cdt_lens.experiments.transfer_config import TransferConfig, Variant
from cdt_lens.finetuning.adapter import ADAPTER_FILE
from cdt_lens.finetuning.answer_pass import AnswerPass
from cdt_lens.finetuning.checkpoints import remove_checkpoint
from cdt_lens.finetuning.finetune import count_trained, drop_stale_checkpoint, finetune
from cdt_lens.finetuning.lora import parameters_of_rank
from cdt_lens.finetuning.options import DEFAULT_RATES, TrainingOptions
from cdt_lens.finetuning.result import FineTuneResult
from cdt_lens.finetuning.scopes import scope_heads
from cdt_lens.finetuning.tracking import tracked
from cdt_lens.finetuning.trainer import rank_of
from cdt_lens.finetuning.training_signal import choose_heads, training_signal
from cdt_lens.finetuning.transfer_result import CELL_COLUMNS, PER_EXAMPLE
from cdt_lens.models.heads import Head
from cdt_lens.models.provenance import model_key
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.tasks.evaluate import Evaluation, evaluate
from cdt_lens.tasks.task import Batch, Examples, Task, drawn
from cdt_lens.tasks.text_loss import text_loss

Say = Callable[[str], None]
_CELL, _BEFORE, _TRIED = (
    "cdt_lens.transfer_cell", "cdt_lens.transfer_before", "cdt_lens.transfer_tried",
)  # fmt: skip
CHECKPOINT = ".checkpoint.json"


class _Finished(TypedDict):
    row: dict[str, Cell]
    history: list[dict[str, Cell]]


class _Tried(TypedDict):
    history: list[dict[str, Cell]]


class _Before(TypedDict):
    row: dict[str, Cell]


@dataclass(frozen=True)
class _Plan:
    """One cell: what is trained, on what, and where it is kept."""

    target: str
    name: str
    seed: int
    scope: str
    heads: tuple[Head, ...]
    options: TrainingOptions
    task: Task
    kept: Kept
    checkpoint: Path
    adapter: Path | None


@dataclass(frozen=True)
class Trial:
    """One training of the search for a learning rate."""

    scope: str
    heads: tuple[Head, ...]
    options: TrainingOptions
    task: Task
    kept: Kept

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the training, which a cell of the same training finishes from."""
        return self.kept.path.with_name(f"{self.kept.path.stem}{CHECKPOINT}")

    def history(self, say: Say) -> list[dict[str, Any]] | None:
        finished = self.kept.reuse(say)
        return None if finished is None else finished["history"]


@dataclass
class Cells:
    """The cells of one run directory.

    Attributes:
        config: The settings of the experiment.
        folder: The run directory.
        model: The proxy checkpoint.
        tasks: The task by language.
        related: Another task, whose accuracy shows what else a transfer forgets, or None.
        circuit: The circuit of the proxy checkpoint.
        scores: The scores that the circuit was selected by.
        baseline_hash: Hash of the source's baseline.
        faithfulness: Returns f of the circuit on a task's validation prompts.
        say: Receives one line of progress.
        progress: Whether to show progress bars.
        log_with: Trackers of every training, as in `finetune`.
    """

    config: TransferConfig
    folder: Path
    model: Any
    tasks: Mapping[str, Task]
    related: Task | None
    circuit: Circuit
    scores: HeadScores
    baseline_hash: str
    faithfulness: Callable[[Task], float]
    say: Say
    progress: bool = True
    log_with: Any = None

    @cached_property
    def _hash(self) -> str:
        return model_key(self._view)

    @property
    def _view(self) -> ModelView:
        return view_of(self.model)

    @property
    def _source(self) -> Task:
        return self.tasks[self.config.task.source]

    # ------------------------------------------------------------------ the untouched model

    def before(self, language: str) -> dict[str, Any]:
        """Evaluate the untouched proxy model on a language."""
        task = self.tasks[language]
        made_from = {
            "model": self._hash, "task": task.hash, "baseline": self.baseline_hash,
            "circuit": [str(head) for head in self.circuit.heads],
            "text": self.config.transfer.text_examples,
        }  # fmt: skip
        path = self.folder / "before" / f"{file_name(language)}.json"
        kept = Kept(path, _BEFORE, made_from, holds=_Before)
        finished = kept.reuse(self.say)
        if finished is not None:
            return dict(finished["row"])
        self.say(f"the proxy model as it is on {task.name}")
        test = self._on_test(task)
        row = {
            "language": language, "accuracy": test.accuracy, "macro_f1": test.macro_f1,
            "valid_accuracy": evaluate(self.model, task.valid, task).accuracy,
            "examples": test.examples, "loss": test.loss, "text_loss": self._text_loss(task),
            "faithfulness": self.faithfulness(task),
        }  # fmt: skip
        kept.keep({"row": row})
        return row

    def before_related(self) -> float:
        """Return the untouched model's accuracy on the related task; NaN without one."""
        if self.related is None:
            return float("nan")
        path = self.folder / "before" / "related task.json"
        made_from = {"model": self._hash, "task": self._related_key}
        kept = Kept(path, _BEFORE, made_from, holds=_Before)
        finished = kept.reuse(self.say)
        if finished is None:
            self.say(f"the proxy model as it is on {self.related.name}")
            finished = {"row": {"accuracy": self._on_related()}}
            kept.keep(finished)
        return float(finished["row"]["accuracy"])

    @property
    def _related_key(self) -> list[Any] | None:
        """What the accuracy on the related task is made from: its data, and the draw of them."""
        related, settings = self.related, self.config.related
        if related is None or settings is None:
            return None
        return [related.hash, settings.examples, settings.seed]

    # ------------------------------------------------------------------ one cell

    def finished(self, target: str, name: str, seed: int) -> bool:
        """Return whether the cell is kept and need not be trained."""
        return self._plan(target, name, seed).kept.reuse(lambda _: None) is not None

    def cell(self, target: str, name: str, seed: int) -> dict[str, Any] | None:
        """Train one target, scope or variant, and seed, then evaluate on the test splits.

        Returns:
            The row of the table, the history, and the tensors of `per_example` by measure; None if
            the memory is too small. Then nothing is kept, because the next sitting may have more.
        """
        plan = self._plan(target, name, seed)
        finished = plan.kept.reuse_with_tensors(self.say)
        if finished is not None:
            if is_main():  # A kill may have left it.
                remove_checkpoint(plan.checkpoint)
            return {**finished[0], "per_example": finished[1]}
        self.say(f"{target}, {name}, seed {seed}")
        common = {
            "target": target, "scope": name, "seed": seed, "heads": len(plan.heads),
            "learning_rate": plan.options.learning_rate, "trains": plan.scope,
        }  # fmt: skip
        try:
            result = self._train(plan)
        except NonFiniteError as error:
            self.say(str(error))
            nothing = dict.fromkeys(CELL_COLUMNS, float("nan"))
            row = nothing | common | {"stopped": f"diverged: {error}"}
            cell: dict[str, Any] = {"row": row, "history": [], "per_example": {}}
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.say(
                f"  left out, because the memory is too small for it; micro_batch = "
                f"{max(1, (plan.options.micro_batch or plan.options.batch_size) // 2)} in "
                "[transfer] needs less"
            )
            return None
        else:
            cell = {
                "row": common | self._judged(result, target),
                "history": result.history.to_dict("records"),
                "per_example": _per_example(result),
            }
            if plan.adapter is not None and is_main():
                replace(result.adapter, scope=plan.scope).save(plan.adapter)
        plan.kept.keep({"row": cell["row"], "history": cell["history"]}, cell["per_example"])
        if is_main():
            remove_checkpoint(plan.checkpoint)
        return cell

    def _plan(self, target: str, name: str, seed: int) -> _Plan:
        variant = self.config.transfer.runs[name]
        place = self.folder / "cells" / file_name(target) / f"{file_name(name)}-{seed}"
        task = with_train(self.tasks[target], self.config.transfer.examples, seed)
        heads = self._heads(variant, target, task, seed)
        options = self._options(variant, target, seed, heads)
        rate = (options.learning_rate or 0.0) * self._factors.get(name, 1.0)
        options = replace(options, learning_rate=rate)
        made_from = {
            "model": self._hash, "task": task.hash, "source": self._source.hash,
            "heads": [str(head) for head in heads], "options": options.as_key(),
            "scope": variant.scope, "text": self.config.transfer.text_examples,
            "related": self._related_key,
        }  # fmt: skip
        keeps = self.config.transfer.save_adapters and variant.scope not in ("full", "lora")
        adapter = self.folder / "adapters" / file_name(target) / place.name if keeps else None
        kept = Kept(
            place.with_name(f"{place.name}.json"), _CELL, made_from, holds=_Finished,
            beside=adapter,
        )  # fmt: skip
        checkpoint = place.with_name(f"{place.name}{CHECKPOINT}")
        if self._is_searched(target, seed):
            checkpoint = self.trial(name, self._factors.get(name, 1.0)).checkpoint
        return _Plan(
            target, name, seed, variant.scope, heads, options, task, kept, checkpoint, adapter
        )

    def _train(self, plan: _Plan) -> FineTuneResult:
        """Train a cell and judge it on the test splits, with the trained values in the model."""
        if plan.adapter is not None and is_main():
            remove_artifact(plan.adapter / ADAPTER_FILE)  # that of another call
        training = training_of(plan.scope, plan.heads, plan.options) | {"source": self._source}
        drop_stale_checkpoint(plan.checkpoint, self.model, plan.task, self.say, **training)
        return finetune(
            self.model, plan.task, **training, checkpoint=plan.checkpoint, keep_checkpoint=True,
            judge=lambda: self._judge(plan.target), progress=self.progress,
            **self.logged(plan.checkpoint),
        )  # fmt: skip

    def logged(self, checkpoint: Path) -> dict[str, Any]:
        """Return the arguments of `finetune` for the log and the trackers of a training."""
        name = checkpoint.name.removesuffix(CHECKPOINT)
        part = checkpoint.relative_to(self.folder).with_name(name)
        log = checkpoint.with_name(f"{name}.log.jsonl")
        return {"log": log, **tracked(self.log_with, self.folder, str(part))}

    # ------------------------------------------------------------------ heads and options

    def _heads(self, variant: Variant, target: str, task: Task, seed: int) -> tuple[Head, ...]:
        """Return the heads that a cell trains."""
        if variant.scope not in HEAD_SCOPES:
            return ()
        circuit = self.circuit
        k = self._size(variant)
        if k is not None or variant.heads != "circuit":
            k = len(circuit) if k is None else k
            kv = self.config.transfer.training.changed(**variant.training).kv
            signal = None if variant.heads == "circuit" else self._signal(target, task, kv)
            by = self.config.discovery.by
            circuit = choose_heads(self.scores, k, by, variant.heads, signal)
        draw = seed if variant.draw is None else variant.draw
        return scope_heads(variant.scope, circuit, seed=draw)

    def _size(self, variant: Variant) -> int | None:
        """Return the number of heads that a variant asks for, or None."""
        if variant.fraction is None:
            return variant.k
        everyone = self.scores.n_layers * self.scores.n_heads
        return max(1, heads_at(variant.fraction, everyone))

    def _signal(self, target: str, task: Task, kv: KeyValue) -> Tensor:
        """Return the gradient of the target's training loss by head, computed once per data."""
        key = f"{target}/{task.train.hash}/{kv}"
        if key not in self._signals:
            self.say(f"gradients by head on {task.train.name}")
            self._signals[key] = training_signal(self.model, task.train, kv=kv)
        return self._signals[key]

    @cached_property
    def _signals(self) -> dict[str, Tensor]:
        return {}

    def _options(
        self, variant: Variant, target: str, seed: int, heads: tuple[Head, ...]
    ) -> TrainingOptions:
        transfer = self.config.transfer
        rate = transfer.learning_rates.get(variant.scope, transfer.training.learning_rate)
        options = replace(
            transfer.training, seed=seed,
            learning_rate=DEFAULT_RATES[variant.scope] if rate is None else rate,
        ).changed(**variant.training)  # fmt: skip
        if variant.match is None:
            return options
        rank = self._matched_rank(variant.match, options, target, seed)
        return replace(options, lora_rank=rank, lora_alpha=2 * rank)

    def _matched_rank(self, match: str, options: TrainingOptions, target: str, seed: int) -> int:
        """Return the rank of LoRA that trains about as many parameters as another run."""
        other = self.config.transfer.runs[match]
        task = with_train(self.tasks[target], self.config.transfer.examples, seed)
        heads = self._heads(other, target, task, seed)
        theirs = self._options(other, target, seed, heads)
        if other.scope == "lora":
            wanted = theirs.lora_rank * parameters_of_rank(self._view, theirs.lora_modules)
        else:
            wanted = count_trained(self._view, other.scope, heads, theirs)
        return max(1, round(wanted / parameters_of_rank(self._view, options.lora_modules)))

    # ------------------------------------------------------------------ the search for rates

    def _is_searched(self, target: str, seed: int) -> bool:
        """Return whether the search trained the cells of this target and seed."""
        first = self.config.task.targets[0], self.config.transfer.seeds[0]
        return bool(self.config.transfer.search) and (target, seed) == first

    def search(self, over: Callable[[], bool]) -> set[str]:
        """Choose the learning rate of every run on validation data; test data are not read.

        Every run is given the same trials: one training for each factor, on the first target with
        the first seed. The cell there is the best trial, so it is not trained again.

        Args:
            over: Says whether the time is over; asked before each trial until it is.

        Returns:
            The runs whose learning rate is chosen: all of them unless the time was over.
        """
        runs, ended = self.config.transfer.runs, False
        if not self.config.transfer.search:
            return set(runs)
        for name in runs:
            found: list[tuple[tuple[float, ...], float, Trial]] = []
            for factor in self.config.transfer.search:
                trial = self.trial(name, factor)
                if trial.history(self.say) is None:
                    ended = ended or over()
                    if ended:
                        break
                best = self.tried(trial)
                rank = rank_of(best[-1], best[0], trial.options) if best else (-math.inf,)
                found.append((rank, factor, trial))
                drop_checkpoints([entry[2] for entry in found], max(found, key=_rank)[2])
            else:
                self._factors[name] = max(found, key=_rank)[1]
                self.say(f"search: {name}: {self._factors[name]:g} times its learning rate is best")
        return set(self._factors)

    @cached_property
    def _factors(self) -> dict[str, float]:
        return {}

    def trial(self, name: str, factor: float) -> Trial:
        """Return the training of a run at a factor of its learning rate, on the first target."""
        variant, target = self.config.transfer.runs[name], self.config.task.targets[0]
        seed = self.config.transfer.seeds[0]
        task = with_train(self.tasks[target], self.config.transfer.examples, seed)
        heads = self._heads(variant, target, task, seed)
        options = self._options(variant, target, seed, heads)
        options = replace(options, learning_rate=(options.learning_rate or 0.0) * factor)
        made_from = {
            "model": self._hash, "task": task.hash, "source": self._source.hash,
            "heads": [str(head) for head in heads], "options": options.as_key(),
            "scope": variant.scope,
        }  # fmt: skip
        path = self.folder / "search" / f"{file_name(name)}-{factor:g}.json"
        kept = Kept(path, _TRIED, made_from, holds=_Tried)
        return Trial(variant.scope, heads, options, task, kept)

    def tried(self, trial: Trial) -> list[dict[str, Any]]:
        """Train a trial unless it is kept.

        Returns:
            The first and the best row of its history; nothing where it diverged.
        """
        history = trial.history(self.say)
        if history is None:
            history = self._try(trial)
        if not history:
            return []
        return [history[0], max(history, key=lambda row: rank_of(row, history[0], trial.options))]

    def _try(self, trial: Trial) -> list[dict[str, Any]]:
        name, checkpoint = trial.kept.path.stem, trial.checkpoint
        self.say(f"search: {name}, learning rate {trial.options.learning_rate:g}")
        training = training_of(trial.scope, trial.heads, trial.options) | {"source": self._source}
        drop_stale_checkpoint(checkpoint, self.model, trial.task, self.say, **training)
        history: list[dict[str, Any]] = []
        try:
            result = finetune(
                self.model, trial.task, **training, checkpoint=checkpoint, keep_checkpoint=True,
                progress=self.progress, **self.logged(checkpoint),
            )  # fmt: skip
            history += result.history.to_dict("records")  # type: ignore[arg-type]
        except NonFiniteError as error:
            self.say(str(error))
            if is_main():
                remove_checkpoint(checkpoint)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Not kept, because the next sitting may have more memory.
            self.say(f"search: {name}: left out, because the memory is too small for it")
            return []
        trial.kept.keep({"history": history})
        return history

    # ------------------------------------------------------------------ test data

    def _judge(self, target: str) -> dict[str, Any]:
        """Measure the trained model: both languages, their text, and the related task."""
        return {
            "target": self._on_test(self.tasks[target]), "source": self._on_test(self._source),
            "target_text_loss": self._text_loss(self.tasks[target]),
            "source_text_loss": self._text_loss(self._source),
            "related_accuracy": self._on_related(),
        }  # fmt: skip

    def _judged(self, result: FineTuneResult, target: str) -> dict[str, Any]:
        """Return the row of a finished cell."""
        on_target, on_source = result.judged["target"], result.judged["source"]
        before = self.before(self.config.task.source)["accuracy"]
        related, related_before = result.judged["related_accuracy"], self.before_related()
        self.say(
            f"  test accuracy {on_target.accuracy:.3f}, source {on_source.accuracy:.3f} "
            f"(was {before:.3f}), {result.seconds:.0f} s"
        )
        if result.nothing_learnt:
            self.say(f"  {result.nothing_learnt}")
        return {
            "accuracy": on_target.accuracy, "macro_f1": on_target.macro_f1,
            "source_accuracy": on_source.accuracy, "source_macro_f1": on_source.macro_f1,
            "retention": on_source.accuracy / before if before else float("nan"),
            "valid_accuracy": float(result.after["target_accuracy"]),
            "valid_loss": float(result.after["target_loss"]), "best_epoch": result.best_epoch,
            "heads": len(result.heads),
            "trained_parameters": result.trained_parameters, "share": result.share,
            "seconds": result.seconds, "stopped": result.stopped,
            "loss": on_target.loss, "source_loss": on_source.loss, "related_accuracy": related,
            "related_retention": related / related_before if related_before else float("nan"),
            "target_text_loss": result.judged["target_text_loss"],
            "source_text_loss": result.judged["source_text_loss"],
        }  # fmt: skip

    def judged(self, task: Task) -> Examples:
        """Return the test examples of a task: all, or a fixed draw of as many as are set."""
        n = self.config.task.test_examples
        return task.test if n is None else drawn(task.test, n, self.config.task.seed)

    def _on_test(self, task: Task) -> Evaluation:
        """Evaluate on the test split, once per cell and once for the untouched model."""
        return self._evaluated(self.judged(task), task)

    def _on_related(self) -> float:
        related, settings = self.related, self.config.related
        if related is None or settings is None:
            return float("nan")
        test = drawn(related.test, settings.examples, settings.seed)
        return self._evaluated(test, related).accuracy

    def _text_loss(self, task: Task) -> float:
        n = self.config.transfer.text_examples
        if n is None:
            return float("nan")
        return text_loss(self.model, drawn(task.test, n, self.config.task.seed))

    def _evaluated(self, examples: Examples, task: Task) -> Evaluation:
        view = self._view

        def logits(batch: Batch) -> Tensor:
            with view.quiet():
                return AnswerPass(view).candidates(batch).float().cpu()

        return evaluate(view, examples, task, logits_of=logits)


def drop_checkpoints(trials: Sequence[Trial], best: Trial) -> None:
    """Remove the checkpoints of all trials but the best, which needs no second training.

    Args:
        trials: The trials that are finished.
        best: The one whose checkpoint stays.
    """
    for trial in trials:
        if trial.kept.path != best.kept.path and is_main():
            remove_checkpoint(trial.checkpoint)


def _rank(entry: tuple[tuple[float, ...], float, Trial]) -> tuple[float, ...]:
    return entry[0]


def training_of(scope: str, heads: tuple[Head, ...], options: TrainingOptions) -> dict[str, Any]:
    """Return the arguments of `finetune`; chosen heads are `decision`, whatever chose them."""
    return {
        "heads": heads or None, "scope": "decision" if heads else scope, "options": options,
    }  # fmt: skip


def _per_example(result: FineTuneResult) -> dict[str, Tensor]:
    """Return what a run made of every test example, by measure."""
    target, source = (result.judged[name].answers for name in ("target", "source"))
    values = (target["right"], target["loss"], source["right"], source["loss"])
    tensors = [torch.tensor(value.to_numpy(), dtype=torch.float32) for value in values]
    return dict(zip(PER_EXAMPLE, tensors, strict=True))
