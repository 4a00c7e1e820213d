"""Cells of a transfer experiment: one target, scope and seed, trained and evaluated once.

Each cell is a file with its row of the table, its history and the key of what it was made from
(model, data, heads, options, version). An interrupted cell resumes from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import TypedDict

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.core.artifacts import remove_artifact
from cdt_lens.core.errors import NonFiniteError
from cdt_lens.core.kept import Cell, Kept, file_name
from cdt_lens.core.processes import is_main
from cdt_lens.experiments.inputs import with_train
from cdt_lens.experiments.transfer_config import TransferConfig
from cdt_lens.finetuning.adapter import ADAPTER_FILE
from cdt_lens.finetuning.answer_pass import AnswerPass
from cdt_lens.finetuning.finetune import drop_stale_checkpoint, finetune
from cdt_lens.finetuning.options import DEFAULT_RATES, TrainingOptions
from cdt_lens.finetuning.result import FineTuneResult
from cdt_lens.finetuning.scopes import scope_heads
from cdt_lens.finetuning.transfer_result import CELL_COLUMNS
from cdt_lens.models.provenance import model_key
from cdt_lens.models.view import view_of
from cdt_lens.tasks.evaluate import Evaluation, evaluate
from cdt_lens.tasks.task import Batch, Examples, Task, drawn

Say = Callable[[str], None]
_CELL, _BEFORE = "cdt_lens.transfer_cell", "cdt_lens.transfer_before"


class _Finished(TypedDict):
    row: dict[str, Cell]
    history: list[dict[str, Cell]]


class _Before(TypedDict):
    row: dict[str, Cell]


@dataclass
class Cells:
    """The cells of one run directory.

    Attributes:
        config: The settings of the experiment.
        folder: The run directory.
        model: The proxy checkpoint.
        tasks: The task by language.
        circuit: The circuit of the proxy checkpoint.
        baseline_hash: Hash of the source's baseline.
        faithfulness: Returns f of the circuit on a task's validation prompts.
        say: Receives one line of progress.
        progress: Whether to show progress bars.
    """

    config: TransferConfig
    folder: Path
    model: Any
    tasks: Mapping[str, Task]
    circuit: Circuit
    baseline_hash: str
    faithfulness: Callable[[Task], float]
    say: Say
    progress: bool = True

    @cached_property
    def _hash(self) -> str:
        return model_key(view_of(self.model))

    @property
    def _source(self) -> Task:
        return self.tasks[self.config.task.source]

    def before(self, language: str) -> dict[str, Any]:
        """Evaluate the untouched proxy model on a language."""
        task = self.tasks[language]
        made_from = {
            "model": self._hash, "task": task.hash, "baseline": self.baseline_hash,
            "circuit": [str(head) for head in self.circuit.heads],
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
            "examples": test.examples, "faithfulness": self.faithfulness(task),
        }  # fmt: skip
        kept.keep({"row": row})
        return row

    def cell(self, target: str, scope: str, seed: int) -> dict[str, Any]:
        """Train one target, scope and seed, then evaluate on the test splits."""
        place = self.folder / "cells" / file_name(target) / f"{scope}-{seed}"
        checkpoint = place.with_name(f"{place.name}.checkpoint.json")
        options = self._options(scope, seed)
        task = with_train(self.tasks[target], self.config.transfer.examples, seed)
        heads = scope_heads(scope, self.circuit, seed=seed)
        made_from = {
            "model": self._hash, "task": task.hash, "source": self._source.hash,
            "heads": [str(head) for head in heads], "options": asdict(options),
        }  # fmt: skip
        adapter = self.folder / "adapters" / file_name(target) / place.name
        kept = Kept(
            place.with_name(f"{place.name}.json"), _CELL, made_from, holds=_Finished,
            beside=adapter if self._keeps_adapter(scope) else None,
        )  # fmt: skip
        finished = kept.reuse(self.say)
        if finished is not None:
            return finished
        training: dict[str, Any] = {
            "heads": self.circuit, "scope": scope, "source": self._source, "options": options,
        }  # fmt: skip
        if is_main():
            remove_artifact(adapter / ADAPTER_FILE)  # that of another call
        drop_stale_checkpoint(checkpoint, self.model, task, self.say, **training)
        self.say(f"{target}, {scope}, seed {seed}")
        cell: dict[str, Any] = {"history": []}
        common = {"target": target, "scope": scope, "seed": seed, "heads": len(heads)}
        common |= {"learning_rate": options.learning_rate}
        try:
            result = finetune(
                self.model, task, **training, checkpoint=checkpoint, keep_checkpoint=True,
                judge=lambda: (self._on_test(self.tasks[target]), self._on_test(self._source)),
                log=place.with_name(f"{place.name}.log.jsonl"), progress=self.progress,
            )  # fmt: skip
        except NonFiniteError as error:
            self.say(str(error))
            nothing = dict.fromkeys(CELL_COLUMNS, float("nan"))
            cell["row"] = nothing | common | {"stopped": f"diverged: {error}"}
        else:
            cell["row"] = common | self._judged(result, target)
            cell["history"] = result.history.to_dict("records")
            if self._keeps_adapter(scope) and is_main():
                result.adapter.save(adapter)
        kept.keep(cell)
        if is_main():
            remove_artifact(checkpoint)
        return cell

    def _options(self, scope: str, seed: int) -> TrainingOptions:
        transfer = self.config.transfer
        rate = transfer.learning_rates.get(scope, transfer.training.learning_rate)
        rate = DEFAULT_RATES[scope] if rate is None else rate
        return replace(transfer.training, seed=seed, learning_rate=rate)

    def _judged(self, result: FineTuneResult, target: str) -> dict[str, Any]:
        """Return the row of a finished cell."""
        on_target, on_source = result.judged
        before = self.before(self.config.task.source)["accuracy"]
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
            "trained_parameters": result.trained_parameters, "share": result.share,
            "seconds": result.seconds, "stopped": result.stopped,
        }  # fmt: skip

    def judged(self, task: Task) -> Examples:
        """Return the test examples of a task: all, or a fixed draw of as many as are set."""
        n = self.config.task.test_examples
        return task.test if n is None else drawn(task.test, n, self.config.task.seed)

    def _on_test(self, task: Task) -> Evaluation:
        """Evaluate on the test split, once per cell and once for the untouched model."""
        test = self.judged(task)
        view = view_of(self.model)

        def logits(batch: Batch) -> Tensor:
            with view.quiet():
                return AnswerPass(view).candidates(batch).float().cpu()

        return evaluate(view, test, task, logits_of=logits)

    def _keeps_adapter(self, scope: str) -> bool:
        return self.config.transfer.save_adapters and scope not in ("full", "lora")
