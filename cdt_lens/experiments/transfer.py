"""The transfer experiment (CT-SFT, arXiv 2601.08146): every scope on every target, side by side.

1. Proxy stage: full fine-tuning on the source language, exported as a Hugging Face folder.
2. Discovery: the circuit in that checkpoint on source data, its faithfulness on validation prompts.
3. Cells: for each target, seed and scope the proxy checkpoint is fine-tuned and evaluated. Every
   choice (epoch, scope) uses validation data only. The test split is read once, at the end of a
   cell.
4. Result: tables, figures and one HTML report.

The run directory keeps every finished part with the key of what it was made from. An
interrupted cell resumes from its last checkpoint. Targets, scopes and seeds may be added later.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import TypedDict

from cdt_lens.circuits.ablation import measure_circuits
from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import FaithfulnessCurve, f_of
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.circuits.measures import EMPTY_RUNS
from cdt_lens.core.artifacts import atomic_write, load_artifact, remove_artifact, save_artifact
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Positive
from cdt_lens.core.errors import ArtifactError, InputError, NonFiniteError
from cdt_lens.core.folders import check_run_folder
from cdt_lens.core.kept import Cell, Kept, as_json
from cdt_lens.core.passes import Passes
from cdt_lens.core.processes import any_process, is_main, wait_for_all
from cdt_lens.core.run_lock import locked
from cdt_lens.experiments.discovery import discover, judged_on, load_baseline, make_curve
from cdt_lens.experiments.inputs import check_inputs, make_task, with_train
from cdt_lens.experiments.runs import (
    FREE_SETTINGS,
    Run,
    apart,
    discovered_on,
    keep_settings,
    kept_settings,
    scored,
)
from cdt_lens.experiments.scope_choices import choices, fix_rules
from cdt_lens.experiments.transfer_cells import CHECKPOINT, Cells
from cdt_lens.experiments.transfer_config import TransferConfig
from cdt_lens.finetuning.checkpoints import remove_checkpoint
from cdt_lens.finetuning.export import export
from cdt_lens.finetuning.finetune import drop_stale_checkpoint, finetune
from cdt_lens.finetuning.options import DEFAULT_RATES, FREE_OPTIONS, TrainingOptions
from cdt_lens.finetuning.tracking import check_trackers, tracked
from cdt_lens.finetuning.transfer_result import (
    AUTO_COLUMNS,
    BEFORE_COLUMNS,
    CELL_COLUMNS,
    LATER_BEFORE_COLUMNS,
    LATER_CELL_COLUMNS,
    TransferResult,
    table,
)
from cdt_lens.models.heads import all_heads
from cdt_lens.models.loading import load_model
from cdt_lens.models.provenance import model_key, provenance_of
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.tasks.task import Examples, Task, most_balanced
from cdt_lens.viz.report.report import render_report

Say = Callable[[str], None]
RUN_FORMAT, _PROXY = "cdt_lens.transfer_run", "cdt_lens.transfer_proxy"
_TRIED_PROXY = "cdt_lens.transfer_tried_proxy"
_TRIED_EXAMPLES = 200


class _TriedProxy(TypedDict):
    loss: float | None


class _Proxy(TypedDict):
    history: list[dict[str, Cell]]
    options: dict[str, Any]


@checked_arguments
def run_transfer(
    config: TransferConfig, folder: str | Path, say: Say, *, progress: bool = True,
    hours: Positive | None = None, log_with: Any = None,
) -> TransferResult:  # fmt: skip
    """Run what is left of an experiment and write its result, figures and report.

    The tables are written after every cell. In the end the folder holds `result.json`, `cells.csv`,
    `summary.csv`, two PNG figures and `report.html`.

    Args:
        config: The settings, such as `read_config` returns.
        folder: The run directory. An interrupted experiment resumes there.
        say: Receives one line of progress.
        progress: Whether to show progress bars.
        hours: Begin no cell after this time; None runs all. `say` receives the number of those
            left, and the same call goes on with them.
        log_with: Trackers of every training, as in `finetune`. Their files are in the folder
            `logs`.

    Returns:
        The measurements of every scope, target and seed that has finished.

    Raises:
        InputError: The settings cannot be run, a prompt is longer than the model's context, the
            folder holds another experiment, another process writes in it, or the package of a
            tracker is missing.
    """
    folder = check_run_folder(folder, "transfer.json")
    check_trackers(**tracked(log_with, folder, "proxy"))
    with locked(folder):
        end = math.inf if hours is None else time.monotonic() + 3600 * hours
        experiment = Transfer(
            config, folder, say, progress, lambda: any_process(time.monotonic() > end), log_with
        )
        result = experiment.run()
        if is_main():
            _write(experiment, result)
        wait_for_all()
    return result


def _write(experiment: Transfer, result: TransferResult) -> None:
    from cdt_lens.viz.training_figures import measures, trade_off

    folder = experiment.folder
    _write_tables(folder, result)
    trade_off(result).save(folder / "trade_off.png")
    measures(result).save(folder / "accuracies.png")
    curve = experiment.curve()
    scores = HeadScores.load(experiment.discovery.path("scores.json"))
    parts: list[object] = [result, experiment.circuit, scores]
    parts += [] if curve is None else [curve]
    title = f"{result.task}: {result.proxy} to {', '.join(result.targets)}"
    render_report(*parts, path=folder / "report.html", title=title)


def _write_tables(folder: Path, result: TransferResult) -> None:
    result.save(folder / "result.json")
    atomic_write(folder / "cells.csv", result.cells.to_csv(index=False))
    atomic_write(folder / "summary.csv", result.summary().to_csv(index=False))


def _never() -> bool:
    return False


@dataclass
class Transfer:
    """The run directory of a transfer experiment; `run` computes the parts that are missing."""

    config: TransferConfig
    folder: Path
    say: Say
    progress: bool = True
    over: Callable[[], bool] = _never
    log_with: Any = None

    def run(self) -> TransferResult:
        """Run every stage that is not finished.

        Raises:
            InputError: The folder holds an experiment with another model, task or proxy.
        """
        self.prepare()
        self._discover()
        self._fix_rules()
        before = [self.cells.before(language) for language in self.languages]
        self.cells.before_related()
        return self._result(before, self._cells(before))

    def _fix_rules(self) -> None:
        """Write the rules of `scope="auto"` down, before a test split is read."""
        if is_main():
            files = (self.folder / "cells").glob("*/*.json")
            finished = sum(not file.name.endswith(CHECKPOINT) for file in files)
            fix_rules(self.config, self.folder / "auto-rules.json", finished)

    def _cells(self, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the cells by target and seed, the unfinished ones while there is time."""
        transfer, left = self.config.transfer, 0
        found: dict[tuple[str, int, str], Any] = {}
        ready = self.cells.search(self.over)
        # Seed by seed, so that the first sitting already compares the scopes.
        order = product(transfer.seeds, self.config.task.targets, transfer.runs)
        places = [(target, seed, name) for seed, target, name in order]
        # All finished cells first: a sitting that is cut off must not leave a shorter table.
        begin = [
            (target, seed, name) for target, seed, name in places
            if name not in ready or not self.cells.finished(target, name, seed)
        ]  # fmt: skip
        for place in [place for place in places if place not in begin] + begin:
            target, seed, name = place
            if place in begin and (name not in ready or self.over()):
                left += 1
                continue
            cell = self.cells.cell(target, name, seed)
            if cell is None:
                continue
            found[place] = cell
            if place in begin and is_main():
                _write_tables(self.folder, self._result(before, self._ordered(found)))
        if left:
            self.say(f"the time is over: {left} cells are left; the same command goes on with them")
        return self._ordered(found)

    def _ordered(self, found: dict[tuple[str, int, str], Any]) -> list[dict[str, Any]]:
        """Return cells by target and seed."""
        transfer = self.config.transfer
        places = product(self.config.task.targets, transfer.seeds, transfer.runs)
        return [found[place] for place in places if place in found]

    def prepare(self) -> None:
        """Check the data and the settings, and train the proxy or keep it.

        Raises:
            InputError: The data cannot be read, or the folder holds an experiment with another
                model, task or proxy.
        """
        self._check_inputs()
        self.settle()
        self._train_proxy()

    @property
    def languages(self) -> tuple[str, ...]:
        """The source language and the target languages."""
        return (self.config.task.source, *self.config.task.targets)

    def _check_inputs(self) -> None:
        """Read the data of every language before a model is loaded."""
        ready = self.config.proxy.checkpoint
        try:
            self._read_with(ready or self.config.model)
        except InputError:
            # A finished run can be reported without its base model.
            if ready or not Path(self.proxy).exists():
                raise
            self._read_with(self.proxy)

    def _read_with(self, model: str) -> None:
        related = self.config.related_settings()
        others = [] if related is None else [replace(related, model=model)]
        check_inputs(*(self.config.settings(name, model=model) for name in self.languages), *others)

    def settle(self) -> None:
        """Compare the settings with those that the folder holds.

        Raises:
            InputError: The folder holds an experiment with other settings.
            ArtifactError: The saved settings are damaged.
        """
        path, wanted = self.folder / "transfer.json", self._wanted
        if path.exists():
            kept = kept_settings(path, RUN_FORMAT)
            if isinstance(kept.get("task"), dict):
                kept["task"]["files"] = {}
            if isinstance(kept.get("discovery"), dict):
                free = {*FREE_SETTINGS} & wanted["discovery"].keys()
                kept["discovery"] |= {name: wanted["discovery"][name] for name in free}
            different = [name for name in wanted if _set(kept.get(name)) != _set(wanted[name])]
            if different:
                raise InputError(
                    f"{self.folder}: holds an experiment with other settings "
                    f"({', '.join(different)}); name another folder, or remove it"
                )

    @property
    def _wanted(self) -> dict[str, Any]:
        """The settings that every call in this folder shares."""
        wanted = self.config.to_dict()
        # Cells know their own data, so that targets, and their files, may be added later.
        wanted = {**wanted, "task": {**wanted["task"], "targets": (), "files": {}}}
        for free in ("transfer", "device", "related", "protocol"):
            wanted.pop(free)
        found: dict[str, Any] = as_json(wanted)
        return found

    def save_settings(self) -> None:
        """Save the settings, once they are known to have no mistake: they refuse others."""
        if is_main():
            save_artifact(
                self.folder / "transfer.json", {"settings": self._wanted}, format=RUN_FORMAT,
                version=1,
            )  # fmt: skip
        wait_for_all()

    # ------------------------------------------------------------------ proxy

    @property
    def proxy(self) -> str:
        """The folder or name of the proxy checkpoint."""
        return self.config.proxy.checkpoint or str(self.folder / "proxy")

    def _train_proxy(self) -> None:
        """Check every language, then train the proxy, or reuse one made from the same inputs."""
        proxy = self.config.proxy
        if proxy.checkpoint is not None:
            self._check_data(self.model, self.tasks)
            self.save_settings()
            return
        model, base, missing = self._base()
        tasks = self._tasks(model.tokenizer)
        self._check_data(model, tasks)
        self.save_settings()
        source = self._without_apart(tasks[self.config.task.source])
        task = with_train(source, proxy.examples, proxy.training.seed)
        made_from = {
            "train": task.train.hash, "valid": task.valid.hash, "model": base,
            "options": proxy.training.as_key(), "search": proxy.search,
        }  # fmt: skip
        kept = self._kept_proxy(made_from)
        if kept.reuse(self.say) is not None:
            self.say(f"{self.proxy}: using the kept result")
            return
        if missing is not None:
            raise InputError(f"{self.proxy} has to be trained again, but: {missing}") from missing
        self._make_proxy(model, task, kept)

    def _base(self) -> tuple[Any, str | None, InputError | None]:
        """Return the base model and its hash.

        A finished run can be reported without its base model: then these are the proxy, the hash
        that its file recorded, and the reason why the base model cannot be loaded.
        """
        try:
            model = self._load(self.config.model)
            return model, model_key(view_of(model)), None
        except InputError as error:
            path = self.folder / "proxy.json"
            if not (path.exists() and Path(self.proxy).exists()):
                raise
            try:
                self._kept_proxy({}).check_beside()
            except ArtifactError as damage:
                raise InputError(
                    f"{damage}; {self.proxy} has to be trained again, but: {error}"
                ) from error
            self.say(f"{error}; {self.proxy} is not compared with it")
            key = load_artifact(path, format=_PROXY, version=1)[0].get("key")
            return self.model, key.get("model") if isinstance(key, dict) else None, error

    def _kept_proxy(self, made_from: Mapping[str, Any]) -> Kept:
        path, folder = self.folder / "proxy.json", Path(self.proxy)
        return Kept(path, _PROXY, made_from, holds=_Proxy, beside=folder)

    def _check_data(self, model: nn.Module, tasks: Mapping[str, Task]) -> None:
        """Refuse now what would fail in a later stage, such as prompts past the context."""
        view = view_of(model)
        for task in tasks.values():
            task.valid.require_some()
            task.test.require_some()
            for split in (task.train, task.valid, task.test):
                _check_lengths(view, split)
        related = self.config.related_settings()
        if related is not None:
            task = make_task(related, model.tokenizer)
            task.test.require_some()
            _check_lengths(view, task.test)
        heads, k = view.n_layers * view.n_heads, self.config.discovery.k
        if k is not None and k > heads:
            raise InputError(
                f"[discovery]: k={k}: the model has {heads} heads; choose at most as many"
            )
        source = tasks[self.config.task.source]
        self._without_apart(source)  # refuses to set aside all of them
        # What is drawn later must hold every label.
        settings = self.config.settings(self.config.task.source)
        scored(settings, apart(settings, source))
        judged_on(source, "valid", self.config.discovery.faithfulness_examples, settings.seed)
        for target, seed in product(self.config.task.targets, self.config.transfer.seeds):
            with_train(tasks[target], self.config.transfer.examples, seed)

    def _make_proxy(self, model: nn.Module, task: Task, kept: Kept) -> None:
        config = self.config
        self.say(f"proxy stage: {config.model} on {config.task.source}")
        rate = config.proxy.training.learning_rate or DEFAULT_RATES["full"]
        factors = config.proxy.search or (1.0,)
        if len(factors) > 1:
            losses = {f: self._tried_proxy(model, task, rate * f) for f in factors}
            factors = (min(losses, key=lambda factor: losses[factor]),)
        options = replace(config.proxy.training, learning_rate=rate * factors[0])
        checkpoint = self.folder / "proxy.checkpoint.json"
        drop_stale_checkpoint(checkpoint, model, task, self.say, scope="full", options=options)
        tuned = finetune(
            model, task, scope="full", options=options,
            checkpoint=checkpoint, keep_checkpoint=True, log=self.folder / "proxy.log.jsonl",
            progress=self.progress, **tracked(self.log_with, self.folder, "proxy"),
        )  # fmt: skip
        last = tuned.after
        self.say(
            f"{task.name}: validation accuracy {tuned.before['target_accuracy']:.3f} before, "
            f"{last['target_accuracy']:.3f} after {tuned.best_epoch} epochs"
        )
        if tuned.nothing_learnt:
            self.say(tuned.nothing_learnt)
        if is_main():
            # A kill between the two must not leave a new proxy under an old key.
            remove_artifact(kept.path)
            shutil.rmtree(self.proxy, ignore_errors=True)
            # A base model that the proxy stage cannot improve is a proxy as it is.
            # The later stages continue from it, so its weights are not rounded.
            export(
                tuned.adapter, config.model, self.proxy, dtype=tuned.adapter.dtype,
                allow_unchanged=True,
            )  # fmt: skip
        kept.keep({"history": tuned.history.to_dict("records"), "options": dict(tuned.options)})
        if is_main():
            remove_checkpoint(checkpoint)
        wait_for_all()

    def _tried_proxy(self, model: nn.Module, task: Task, rate: float) -> float:
        """Return the validation loss after one epoch at a learning rate; inf if it diverges."""
        options = replace(self.config.proxy.training, learning_rate=rate, epochs=1)
        task = with_train(task, _TRIED_EXAMPLES, options.seed)
        made_from = {
            "model": model_key(view_of(model)), "task": task.hash, "options": options.as_key(),
        }  # fmt: skip
        path = self.folder / "search" / f"proxy-{rate:g}.json"
        kept = Kept(path, _TRIED_PROXY, made_from, holds=_TriedProxy)
        finished = kept.reuse(self.say)
        if finished is None:
            self.say(f"search: proxy, learning rate {rate:g}")
            loss = None
            with suppress(NonFiniteError):
                result = finetune(
                    model, task, scope="full", options=options, progress=self.progress
                )
                loss = float(result.to_dataframe()["target_loss"].iloc[-1])
            finished = {"loss": loss}
            kept.keep(finished)
        return math.inf if finished["loss"] is None else float(finished["loss"])

    def _load(self, source: str) -> Any:
        config = self.config
        dtype = getattr(torch, config.dtype)
        return load_model(source, backend=config.backend, device=config.device, dtype=dtype)

    @cached_property
    def model(self) -> Any:
        """The proxy model."""
        return self._load(self.proxy)

    @cached_property
    def tasks(self) -> Mapping[str, Task]:
        """The task in every language."""
        return self._tasks(self.model.tokenizer)

    def _tasks(self, tokenizer: Any) -> dict[str, Task]:
        return {name: make_task(self.config.settings(name), tokenizer) for name in self.languages}

    @property
    def source(self) -> Task:
        return self.tasks[self.config.task.source]

    def _without_apart(self, task: Task) -> Task:
        """Return the source task with the training examples of the proxy stage."""
        settings = self.config.settings(self.config.task.source)
        if settings.apart is None:
            return task
        aside = set(map(id, apart(settings, task).train))
        rest = tuple(item for item in task.train if id(item) not in aside)
        return replace(task, train=replace(task.train, items=rest))

    @cached_property
    def _related(self) -> Task | None:
        settings = self.config.related_settings()
        return None if settings is None else make_task(settings, self.model.tokenizer)

    # ------------------------------------------------------------------ discovery

    @cached_property
    def discovery(self) -> Run:
        """The discovery run of the proxy model on the source language."""
        settings = self.config.settings(self.config.task.source, model=self.proxy)
        task = discovered_on(settings, self.model, self.source)
        return Run(self.folder / "discovery", settings, self.model, task)

    @property
    def circuit(self) -> Circuit:
        """The circuit that the discovery saved."""
        return Circuit.load(self.discovery.path("circuit.json"))

    def _discover(self) -> None:
        """Make baseline, scores, circuit and faithfulness, or keep existing ones."""
        keep_settings(self.discovery)
        circuit, scores, _ = discover(self.discovery, self.say)
        d, run = self.config.discovery, self.discovery
        if is_main():  # The first picture, long before the report
            scores.heatmap(circuit).save(run.path("heads.svg"))
            self.say(f"the score of every head: {run.path('heads.svg')}")
        data = judged_on(run.task, "valid", d.faithfulness_examples, run.settings.seed)
        make_curve(run, self.say, data, draws=d.draws)

    def curve(self) -> FaithfulnessCurve | None:
        """Return the faithfulness curve on the source's validation split, if it was measured."""
        path = self.discovery.path("faithfulness.json")
        return FaithfulnessCurve.load(path) if path.exists() else None

    @cached_property
    def cells(self) -> Cells:
        """The cells, which are trained or read from the run directory."""
        return Cells(
            self.config, self.folder, self.model, self.tasks, self._related, self.circuit,
            HeadScores.load(self.discovery.path("scores.json")),
            load_baseline(self.discovery).hash, self._faithfulness, self.say, self.progress,
            self.log_with,
        )  # fmt: skip

    def _faithfulness(self, task: Task) -> float:
        """Return f of the proxy circuit on validation prompts, with the means of the source."""
        d = self.config.discovery
        n = min(d.faithfulness_examples, most_balanced(task.valid))
        data = task.valid.balanced(n, seed=self.config.task.seed)
        view, heads = view_of(self.model), self.circuit.heads
        everyone = all_heads(view.n_layers, view.n_heads)
        try:
            measured = measure_circuits(
                view, [everyone, heads, ()], data, load_baseline(self.discovery),
                passes=Passes(d.batch_size, d.rows, self.progress),
            ).means()  # fmt: skip
            return f_of(measured[heads], measured[everyone], measured[()])
        except InputError:  # the data were checked before: no head changes anything on them
            return float("nan")

    # ------------------------------------------------------------------ result

    def _result(self, before: list[dict[str, Any]], cells: list[dict[str, Any]]) -> TransferResult:
        """Return the finished measurements as tables."""
        config = self.config
        scores = HeadScores.load(self.discovery.path("scores.json"))
        curve = self.curve()
        facts: dict[str, Any] = {
            "heads in the circuit": len(self.circuit),
            "heads of the model": scores.n_layers * scores.n_heads,
            "proxy direction (logits)": round(scores.direction, 3),
            "empty run (f = 0)": EMPTY_RUNS["heads"],
        }
        for row in before:
            facts[f"f(circuit) on {row['language']}"] = round(row["faithfulness"], 3)
        if self._related is not None:
            accuracy = round(self.cells.before_related(), 3)
            facts[f"accuracy of the untouched proxy on {self._related.name}"] = accuracy
        if curve is not None:
            facts |= {"CPR": round(curve.cpr, 3), "CMD": round(curve.cmd, 3)}
        return TransferResult(
            task=config.task.name,
            proxy=config.task.source,
            targets=config.task.targets,
            scopes=tuple(config.transfer.runs),
            cells=table([cell["row"] for cell in cells], (*CELL_COLUMNS, *LATER_CELL_COLUMNS)),
            before=table(before, (*BEFORE_COLUMNS, *LATER_BEFORE_COLUMNS)),
            chance={
                target: self.cells.judged(self.tasks[target]).chance
                for target in config.task.targets
            },
            auto=table(choices(config, self.tasks, before, cells), AUTO_COLUMNS),
            discovery=facts,
            settings=as_json(config.to_dict()),
            provenance=provenance_of(
                view_of(self.model), self.source.train, options={"proxy": self.proxy}
            ),
            per_example={
                "|".join(
                    (name, *(str(cell["row"][key]) for key in ("target", "scope", "seed")))
                ): values
                for cell in cells
                for name, values in cell["per_example"].items()
            },
            test_rows={
                target: tuple((e.prompt, e.label) for e in self.cells.judged(self.tasks[target]))
                for target in config.task.targets
            },
        )


def _check_lengths(view: ModelView, split: Examples) -> None:
    for number, example in enumerate(split, 1):
        view.check_length(example.length, f"{split.name}, example {number}: ")


def _set(settings: Any) -> Any:
    """Return the settings of a section that are set; earlier versions did not know all of them."""
    if not isinstance(settings, dict):
        return settings
    found = {n: value for n, value in settings.items() if value is not None and value is not False}
    if isinstance(found.get("training"), dict):
        plain = as_json(asdict(TrainingOptions()))
        training = found["training"].items()
        found["training"] = {
            n: value for n, value in training if value != plain.get(n) and n not in FREE_OPTIONS
        }
    return found
