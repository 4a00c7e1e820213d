"""`cdt-lens adapt`: adapt a model to a language with a few hundred labelled rows, in one command.

1. The rows of each language are divided into train, valid and test, unless files for these are
   given. Rows of one split that a later split has as well are left out.
2. The model is fine-tuned on the source language, at a rate that a short search finds (unless it
   does the task already), and the circuit is found there.
3. While there is time, a search trains each of `_SCOPES` and `_VARIANTS` once, and the best of them
   at other rates; a run that forgets too much is trained at a lower rate at once. Validation rows
   decide: the best target accuracy among epochs that keep enough of the source accuracy. Where none
   does, nothing is learnt.
4. The chosen run is judged once on the test rows, exported, and explained on a page.
"""

from __future__ import annotations

import csv
import math
import random
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from cdt_lens.core.artifacts import atomic_write, remove_artifact
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.errors import CdtLensWarning, InputError
from cdt_lens.core.folders import check_run_folder
from cdt_lens.core.kept import Say, as_json
from cdt_lens.core.processes import any_process, is_main, wait_for_all
from cdt_lens.core.run_lock import locked
from cdt_lens.experiments.adapt_settings import AdaptSettings
from cdt_lens.experiments.discovery import discover
from cdt_lens.experiments.runs import ROWS, keep_settings, kept_at, kept_settings
from cdt_lens.experiments.transfer import RUN_FORMAT, Transfer
from cdt_lens.experiments.transfer_cells import (
    CHECKPOINT,
    Cells,
    Trial,
    drop_checkpoints,
    training_of,
)
from cdt_lens.experiments.transfer_config import TransferConfig, config_of
from cdt_lens.finetuning.adapt_result import (
    CHANGE_COLUMNS,
    LANGUAGE_COLUMNS,
    TEXT_COLUMNS,
    TRIAL_COLUMNS,
    AdaptResult,
)
from cdt_lens.finetuning.checkpoints import remove_checkpoint
from cdt_lens.finetuning.export import export
from cdt_lens.finetuning.finetune import drop_stale_checkpoint, finetune
from cdt_lens.finetuning.result import FineTuneResult
from cdt_lens.finetuning.score import Score
from cdt_lens.finetuning.tracking import check_trackers, tracked
from cdt_lens.finetuning.trainer import best_without_floor, rank_of
from cdt_lens.models.hugging_face import load_tokenizer, third_party_noise_off
from cdt_lens.models.provenance import provenance_of
from cdt_lens.models.view import view_of
from cdt_lens.tasks.evaluate import Evaluation, evaluate
from cdt_lens.tasks.intervals import (
    mean_interval,
    paired_share_interval,
    ratio_effects,
    share_interval,
)
from cdt_lens.tasks.prompts import PromptFormat, template_columns
from cdt_lens.tasks.rows import SPLITS, Table, check_paths, column_of, composed, read_table
from cdt_lens.tasks.task import Task, drawn
from cdt_lens.tasks.text_loss import text_losses
from cdt_lens.viz.report.report import render_report

SOURCE, TARGET = "source", "target"
TextLosses = tuple[Tensor, Tensor]  # of each prompt: its loss in nats, and its number of tokens
# What the search trains, by name: sizes of the circuit as shares of the heads, and other scopes.
_SCOPES = ("norms", "near-zero", "lora", "full")
_VARIANTS = {
    "few-heads": {"scope": "decision", "fraction": 0.03},
    "heads": {"scope": "decision", "fraction": 0.1},
    "many-heads": {"scope": "decision", "fraction": 0.3},
}
# Where the time ends the search, the runs that come last are not tried.
_ORDER = ("heads", "lora", "norms", "full", "many-heads", "few-heads", "near-zero")
_PURPOSE = {"train": "rows to train on", "valid": "validation rows", "test": "test rows"}
_LOWER = 0.3  # the rate of a run that forgets too much, relative to the usual one of its scope
_FACTORS = (3.0, _LOWER)  # other rates for the best runs
_BEST = 2  # runs that are tried at other rates
_LEAST = 10  # rows of each label
_TEXTS = 48  # test prompts of each language whose text is read
_SMALL = 100  # test rows below which the page warns
# Folders in the run directory that the run writes or removes.
_WRITTEN = (ROWS, "model", "proxy", "adapter", "discovery", "search", "logs")
_FREE = ("keep", "minutes")  # settings that may change in a finished run


@checked_arguments
def run_adapt(
    settings: AdaptSettings, folder: str | Path, say: Say, *, progress: bool = True,
    log_with: Any = None,
) -> AdaptResult:  # fmt: skip
    """Adapt a model to a language, and export and explain it.

    The folder then holds the adapted model in `model`, the `adapter`, `adapt.json` and
    `report.html`. An interrupted call resumes.

    Args:
        settings: The settings.
        folder: The run directory.
        say: Receives one line of progress.
        progress: Whether to show progress bars.
        log_with: Trackers of every training, as in `finetune`. Their files are in the folder
            `logs`.

    Returns:
        What was chosen, learnt and lost.

    Raises:
        InputError: The rows cannot be learnt from, the folder holds another experiment, the model
            or rows that would be overwritten, another process writes in it, or the package of a
            tracker is missing.
    """
    folder = check_run_folder(folder, "transfer.json", ROWS)
    _check_not_overwritten(settings, folder)
    check_trackers(**tracked(log_with, folder, "proxy"))
    format = _format(settings, folder)
    given = {
        SOURCE: _read_rows(settings.source, SOURCE, format),
        TARGET: _read_rows(settings.target, TARGET, format),
    }
    tables = {language: _tables(settings, own, language) for language, own in given.items()}
    _check_labels(settings, tables)
    if not _holds_only(folder, _row_files(tables, folder)):
        check_run_folder(folder, "transfer.json")
    with locked(folder):
        kept = _finished(settings, folder, tables)
        if kept is not None:
            say(f"{folder}: using the kept result; the test rows are not read again")
            if is_main():  # A kill may have left some.
                _remove_checkpoints(folder)
            return kept
        return _Adapting(settings, folder, tables, say, progress, log_with).run()


def _check_not_overwritten(settings: AdaptSettings, folder: Path) -> None:
    """Refuse a model or rows that lie where the run writes and removes files."""
    given = {"the model": settings.model}
    for language, paths in ((SOURCE, settings.source), (TARGET, settings.target)):
        given |= {f"the {language} {split} rows": path for split, path in paths.items()}
    written = [(folder / name).resolve() for name in _WRITTEN]
    for name, path in given.items():
        # A name on the hub is no path.
        if Path(path).exists() and any(map(Path(path).resolve().is_relative_to, written)):
            raise InputError(
                f"{folder}: a run in this folder would replace {name}, {path}, with files of its "
                "own; name another folder"
            )


def _holds_only(folder: Path, files: Mapping[Path, str]) -> bool:
    """Return whether a folder holds nothing but some of these rows.

    A call that was refused or killed before its settings were written leaves such a folder. The
    rows of a person may have the same names.
    """
    rows = folder / ROWS
    beside = [path for path in folder.glob("[!.]*") if path != rows]
    inside = [path for path in (rows, *rows.rglob("[!.]*")) if path.is_file()]
    return not beside and all(path in files and _holds(path, files[path]) for path in inside)


def _remove_checkpoints(folder: Path) -> None:
    for path in (folder / "search").glob(f"*{CHECKPOINT}"):
        remove_checkpoint(path)


def _finished(
    settings: AdaptSettings, folder: Path, tables: Mapping[str, Mapping[str, Table]]
) -> AdaptResult | None:
    """Return the result of an earlier call with the same settings and rows, or None.

    Raises:
        InputError: The folder holds the result for other rows, or with settings that may not
            change.
    """
    kept = kept_at(folder / "adapt.json", AdaptResult.load)
    if kept is None:
        return None
    files = _row_files(tables, folder)
    other = [path for path, text in files.items() if path.exists() and not _holds(path, text)]
    if other:
        names = ", ".join(f"{path.parent.name} {path.stem}" for path in other)
        raise InputError(
            f"{folder}: holds a model adapted with other rows ({names}); name another folder, or "
            "remove it"
        )
    changed = _changed(kept.settings, settings)
    refused = [words for name, words in changed.items() if name not in _FREE]
    if refused:
        raise InputError(
            f"{folder}: holds a model adapted with other settings ({', '.join(refused)}); name "
            "another folder, or remove it"
        )
    whole = all(map(Path.exists, files)) and (folder / kept.exported).exists()
    return kept if whole and not changed else None


def _changed(kept: Mapping[str, Any], settings: AdaptSettings) -> dict[str, str]:
    """Return how the settings differ from kept ones, in words by name.

    Files are compared by their rows, and the device decides nothing. Settings that an older
    version did not know had their defaults.
    """
    now = as_json(asdict(settings))
    changed = {}
    for item in fields(settings):
        name, new = item.name, now[item.name]
        old = kept.get(name, new if item.default is MISSING else item.default)
        if old != new and name not in (SOURCE, TARGET, "device"):
            changed[name] = f"{name}: {old!r}, now {new!r}"
    return changed


# ---------------------------------------------------------------------- rows


def _format(settings: AdaptSettings, folder: Path) -> PromptFormat:
    """Return how rows become prompts."""
    with third_party_noise_off():
        try:
            tokenizer = load_tokenizer(settings.model)
        except InputError:
            # A finished run can be reported without its base model.
            kept = [folder / name for name in ("proxy", "model") if (folder / name).exists()]
            if not kept:
                raise
            tokenizer = load_tokenizer(kept[0])
    return PromptFormat(tokenizer, settings.template, settings.verbalizer, settings.label_column)


def _read_rows(paths: Mapping[str, str], language: str, format: PromptFormat) -> dict[str, Table]:
    """Read the files of a language and check every row, while its place is that in the file."""
    check_paths(paths, language)
    if "train" not in paths:
        raise InputError(f"{language}: expected a file of rows to train on")
    tables = {split: read_table(path) for split, path in paths.items()}
    for table in tables.values():
        table.check_columns((*format.row_columns, *format.label_columns), format.labels)
        for row, place in zip(table.rows, table.places, strict=True):
            format.check_row(row, place)
        format.unlabelled(table.rows, table.places)  # checks the length of the prompts
    return tables


def _tables(settings: AdaptSettings, given: Mapping[str, Table], language: str) -> dict[str, Table]:
    """Return the rows of each split of a language, divided where there is no file."""
    tables = dict(given)
    columns = [settings.label_column, *template_columns(settings.template)]
    if not {"test", "valid"} <= set(tables):
        _check_enough(settings, tables["train"], language)
    share = settings.set_aside
    for split in ("test", "valid"):
        if split not in tables:
            tables |= _divided(settings, tables["train"], split, share, language)
            share /= 1 - share  # As many rows again, of those that are left.
    tables["valid"] = _apart(tables, "valid", ("test",), columns, language)
    tables["train"] = _apart(tables, "train", ("valid", "test"), columns, language)
    return tables


def _label(settings: AdaptSettings, row: Mapping[str, object]) -> str:
    column = column_of(row, settings.label_column)
    return composed(str(row[column])) if column is not None else ""


def _check_enough(settings: AdaptSettings, table: Table, language: str) -> None:
    """Refuse rows that cannot be divided."""
    counts = pd.Series([_label(settings, row) for row in table.rows], dtype=str).value_counts()
    for label, n in counts[counts < _LEAST].items():
        raise InputError(
            f"{language}: {n} rows have the label {label!r}; expected at least {_LEAST} of each "
            "label, to learn from, to choose by and to judge by"
        )


def _divided(
    settings: AdaptSettings, table: Table, split: str, share: float, language: str
) -> dict[str, Table]:
    """Set aside a share of the rows of each label."""
    labels = [_label(settings, row) for row in table.rows]
    generator = random.Random(f"{settings.seed}/{split}")
    chosen: set[int] = set()
    for label in sorted(set(labels)):
        own = [i for i, found in enumerate(labels) if found == label]
        n = max(2, round(share * len(own)))
        if n >= len(own):
            raise InputError(
                f"{language}: set_aside={settings.set_aside:g} leaves no row with the label "
                f"{label!r} to train on; set aside a smaller share, or give more rows"
            )
        chosen |= set(generator.sample(own, n))
    rest = [i for i in range(len(labels)) if i not in chosen]
    return {"train": table.pick(rest), split: table.pick(sorted(chosen))}


def _apart(
    tables: Mapping[str, Table], split: str, others: Sequence[str], columns: Sequence[str],
    language: str,
) -> Table:  # fmt: skip
    """Return the rows of a split whose prompt and label no later split has."""
    table = tables[split]
    judged = {_key(row, columns) for other in others for row in tables[other].rows}
    rest = [i for i, row in enumerate(table.rows) if _key(row, columns) not in judged]
    twice = len(table.rows) - len(rest)
    if twice:
        warnings.warn(
            f"{language}: {twice} of {len(table.rows)} {_PURPOSE[split]} are also in the "
            f"{' or '.join(_PURPOSE[other] for other in others)}, where they would be judged on "
            "what was learnt; they are left out",
            CdtLensWarning, stacklevel=1,
        )  # fmt: skip
    if not rest:
        raise InputError(f"{language}: all {_PURPOSE[split]} are also in the other files")
    return table.pick(rest)


def _key(row: Mapping[str, object], columns: Sequence[str]) -> tuple[str, ...]:
    """Return the cells of a row that its prompt and its label are made of."""
    own = (column_of(row, name) for name in columns)
    return tuple(composed(str(row[name])).strip() for name in own if name is not None)


def _check_labels(settings: AdaptSettings, tables: Mapping[str, Mapping[str, Table]]) -> None:
    """Refuse labels that cannot be learnt, and warn of a small test split."""
    counts = {
        language: {
            split: pd.Series([_label(settings, row) for row in table.rows]).value_counts()
            for split, table in splits.items()
        }
        for language, splits in tables.items()
    }
    known = set(counts[SOURCE]["train"].index)
    for label, n in counts[TARGET]["train"].items():
        if label not in known:
            raise InputError(
                f"target: {n} rows have the label {label!r}, which no row of the source has "
                f"({', '.join(map(repr, sorted(known)))}); the model never learnt it"
            )
    for split in SPLITS:
        if len(counts[TARGET][split]) < 2:
            only = ", ".join(map(repr, counts[TARGET][split].index)) or "none"
            raise InputError(
                f"target: the {split} rows have one label ({only}); expected two or more"
            )
    n = len(tables[TARGET]["test"].rows)
    if n < _SMALL:
        low, high = share_interval(round(0.7 * n), n)
        warnings.warn(
            f"target: {n} test rows: the 95 % interval of an accuracy of 0.7 is [{low:.2f}, "
            f"{high:.2f}]; more rows tell more",
            CdtLensWarning, stacklevel=1,
        )  # fmt: skip


def _row_files(tables: Mapping[str, Mapping[str, Table]], folder: Path) -> dict[Path, str]:
    """Return the rows of each split as text by file, from which the run reads and resumes.

    Cells are written as they are: numbers keep their form, and line breaks are quoted. Half a
    character, which only a column that no prompt reads may hold, becomes a question mark.
    """
    return {
        folder / ROWS / language / f"{split}.csv": pd.DataFrame(
            [dict(row) for row in table.rows], dtype=object
        )
        .to_csv(index=False, quoting=csv.QUOTE_ALL)
        .encode(errors="replace")
        .decode()
        for language, splits in tables.items()
        for split, table in splits.items()
    }


def _write_rows(tables: Mapping[str, Mapping[str, Table]], folder: Path) -> None:
    for path, text in _row_files(tables, folder).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not _holds(path, text):
            atomic_write(path, text)


def _holds(path: Path, text: str) -> bool:
    return path.exists() and path.read_bytes() == text.encode()


# ---------------------------------------------------------------------- the run


@dataclass
class _Adapting:
    settings: AdaptSettings
    folder: Path
    tables: Mapping[str, Mapping[str, Table]]
    say: Say
    progress: bool
    log_with: Any = None

    def run(self) -> AdaptResult:
        experiment = Transfer(
            self._config(), self.folder, self.say, self.progress, log_with=self.log_with
        )
        end = time.monotonic() + 60 * self.settings.minutes
        if (self.folder / "transfer.json").exists():
            experiment.settle()  # A call that is refused must not write its rows.
        if is_main():
            _write_rows(self.tables, self.folder)
        wait_for_all()
        experiment.prepare()
        keep_settings(experiment.discovery)
        discover(experiment.discovery, self.say)
        trials = self._search(experiment.cells, end)
        best = max(trials, key=_place)
        row = best[1]
        if math.isnan(row["target_loss"]):
            raise InputError(
                f"{self.folder}: no run could be trained: {', '.join(r['run'] for _, r in trials)} "
                "diverged or did not fit into the memory. Take a smaller model, a GPU with more "
                "memory, or shorter rows"
            )
        self.say(f"chosen: {row['run']}, learning rate {row['learning_rate']:g}")
        before, texts = self._judge(experiment), self._read(experiment)
        result = self._train(experiment, best[0])
        # The values that are exported: those of a LoRA are merged, and rounded in half precision.
        with result.adapter.applied(experiment.model):
            after, texts_after = self._judge(experiment), self._read(experiment)
        texts_table = _texts(texts, texts_after)
        return self._finish(experiment, trials, best, result, before, after, texts_table)

    @property
    def _minutes_of_circuit(self) -> float:
        """A third of the minutes of the first call, so that a later one with more keeps it."""
        path = self.folder / "transfer.json"
        if path.exists():
            kept = kept_settings(path, RUN_FORMAT)["discovery"]["minutes"]
            if kept is not None:  # None is that of a transfer, which is refused later.
                return float(kept)
        return max(self.settings.minutes / 3, 0.1)

    def _config(self) -> TransferConfig:
        """Return the settings as those of a transfer with files of its own."""
        s = self.settings
        files = {
            language: {split: str(self.folder / ROWS / language / f"{split}.csv")
                       for split in SPLITS}
            for language in (SOURCE, TARGET)
        }  # fmt: skip
        return config_of(
            {
                "model": s.model, "device": s.device, "dtype": s.dtype,
                "task": {
                    "name": "files", "source": SOURCE, "targets": [TARGET], "files": files,
                    "template": s.template, "verbalizer": s.verbalizer,
                    "label_column": s.label_column, "seed": s.seed,
                },
                "proxy": (
                    {"checkpoint": s.model} if s.ready
                    else {"epochs": s.epochs, "search": [1.0, 5.0, 20.0]}
                ),
                "discovery": {"minutes": self._minutes_of_circuit},
                "transfer": {
                    "seeds": [s.seed], "epochs": s.epochs, "least_retention": s.keep,
                    "scopes": _SCOPES, "variants": _VARIANTS,
                },
            },
            where="adapt",
        )  # fmt: skip

    def _search(self, cells: Cells, end: float) -> list[tuple[Trial, dict[str, Any]]]:
        """Train every run once, and the best at other rates; return the trials with their rows.

        A run that forgets too much is trained at a lower rate at once, since that is likely to
        help. The first training is made in any case. No other begins when the time is over, but one
        that an earlier call made still counts.
        """
        trials: list[tuple[Trial, dict[str, Any]]] = []
        begun: set[tuple[str, float]] = set()
        left: list[str] = []

        def tried(name: str, factor: float) -> Trial | None:
            if (name, factor) in begun:
                return None
            begun.add((name, factor))
            made = cells.trial(name, factor).history(self.say) is not None
            if trials and not made and any_process(time.monotonic() >= end):
                left.append(name if factor == 1 else f"{name} at {factor:g} times its rate")
                return None
            trials.append(self._trial(cells, name, factor))
            drop_checkpoints([trial for trial, _ in trials], max(trials, key=_place)[0])
            return trials[-1][0]

        for name in _ORDER:
            trial = tried(name, 1.0)
            if trial is not None and self._forgets(trial):
                tried(name, _LOWER)
        ranked = sorted(trials, key=_place, reverse=True)
        for name in list(dict.fromkeys(row["run"] for _, row in ranked))[:_BEST]:
            for factor in _FACTORS:
                tried(name, factor)
        if left:
            self.say(
                f"the time is over; not tried: {', '.join(left)}. The same call with more minutes "
                "goes on with these"
            )
        return trials

    def _forgets(self, trial: Trial) -> bool:
        """Return whether the untouched model was kept because better epochs forget too much."""
        history = trial.history(self.say) or []
        if not history:
            return False
        kept = max(history, key=lambda row: rank_of(row, history[0], trial.options))
        return bool(kept["epoch"] == 0 < best_without_floor(history, trial.options)["epoch"])

    def _trial(self, cells: Cells, name: str, factor: float) -> tuple[Trial, dict[str, Any]]:
        trial = cells.trial(name, factor)
        rows = cells.tried(trial)
        found: dict[str, Any] = dict.fromkeys(TRIAL_COLUMNS, float("nan"))
        found |= {
            "run": name, "scope": trial.scope, "heads": len(trial.heads),
            "learning_rate": trial.options.learning_rate,
        }  # fmt: skip
        if rows:
            names = ("epoch", "target_accuracy", "target_loss", "source_accuracy")
            found |= {column: rows[-1][column] for column in names}
            found["seconds"] = (trial.history(self.say) or rows)[-1]["seconds"]
        return trial, found

    def _train(self, experiment: Transfer, trial: Trial) -> FineTuneResult:
        """Return the chosen trial's result. It is trained again if it left no checkpoint."""
        cells = experiment.cells
        training = training_of(trial.scope, trial.heads, trial.options)
        training["source"] = experiment.source
        drop_stale_checkpoint(trial.checkpoint, cells.model, trial.task, self.say, **training)
        return finetune(
            cells.model, trial.task, **training, checkpoint=trial.checkpoint, keep_checkpoint=True,
            progress=self.progress, **cells.logged(trial.checkpoint),
        )  # fmt: skip

    def _judge(self, experiment: Transfer) -> dict[str, Evaluation]:
        tasks = experiment.tasks
        return {name: evaluate(experiment.model, tasks[name].test, tasks[name]) for name in tasks}

    def _read(self, experiment: Transfer) -> dict[str, TextLosses]:
        """Return the losses of the language model on the text of test prompts."""
        return {
            name: text_losses(experiment.model, drawn(task.test, _TEXTS, self.settings.seed))
            for name, task in experiment.tasks.items()
        }

    def _finish(
        self, experiment: Transfer, trials: Sequence[tuple[Trial, dict[str, Any]]],
        best: tuple[Trial, dict[str, Any]], result: FineTuneResult,
        before: Mapping[str, Evaluation], after: Mapping[str, Evaluation], texts: pd.DataFrame,
    ) -> AdaptResult:  # fmt: skip
        """Save the adapter, export the model, and write the result and its page."""
        exported = "" if result.nothing_learnt else "model"
        tasks = experiment.tasks
        if is_main():
            adapter = replace(
                result.adapter, scope=best[0].scope, scores=_scores(tasks, before, after)
            )
            # A kill from here on must not leave another model under an old result.
            remove_artifact(self.folder / "adapt.json")
            adapter.save(self.folder / "adapter")
            shutil.rmtree(self.folder / "model", ignore_errors=True)
            if exported:
                # The accuracies are those of these values, so they are not rounded to the base's.
                export(adapter, experiment.proxy, self.folder / exported, dtype=adapter.dtype)
        found = AdaptResult(
            model=self.settings.model, chosen=best[1]["run"], scope=best[0].scope,
            heads=len(result.heads), learning_rate=best[0].options.learning_rate or 0.0,
            trained_parameters=result.trained_parameters,
            total_parameters=result.total_parameters, keep=self.settings.keep,
            languages=_languages(before, after),
            trials=pd.DataFrame([row for _, row in trials], columns=list(TRIAL_COLUMNS)),
            changes=_changes(tasks, before, after),
            nothing_learnt=result.nothing_learnt, exported=exported,
            settings=as_json(asdict(self.settings)), texts=texts,
            provenance=provenance_of(
                view_of(experiment.model), tasks[TARGET].train, options={"run": best[1]["run"]}
            ),
        )  # fmt: skip
        if is_main():
            title = f"{self.settings.model} adapted to a new language"
            render_report(found, path=self.folder / "report.html", title=title)
            found.save(self.folder / "adapt.json")
            _remove_checkpoints(self.folder)
        wait_for_all()
        return found


def _place(trial: tuple[Trial, Mapping[str, Any]]) -> tuple[float, float]:
    """Return a key that is greater for a better trial; one that diverged comes last."""
    row = trial[1]
    loss = row["target_loss"]
    return (-math.inf, -math.inf) if loss != loss else (row["target_accuracy"], -loss)


def _scores(
    tasks: Mapping[str, Task], before: Mapping[str, Evaluation], after: Mapping[str, Evaluation]
) -> tuple[Score, ...]:
    """Return the accuracies on the test rows, for the adapter."""
    pairs = {name: (before[name], after[name]) for name in (TARGET, SOURCE)}
    return tuple(
        Score(name, tasks[name].name, "test", pair[0].examples,
              *((one.accuracy, *one.intervals["accuracy"]) for one in pair))
        for name, pair in pairs.items()
    )  # fmt: skip


def _languages(before: Mapping[str, Evaluation], after: Mapping[str, Evaluation]) -> pd.DataFrame:
    """Return the accuracies on the test rows of both languages, and the paired changes."""
    rows = []
    for language in (TARGET, SOURCE):
        one, other = before[language], after[language]
        assert one.answers is not None and other.answers is not None
        pair = [torch.tensor(e["right"].to_numpy(), dtype=torch.float64)
                for e in (one.answers, other.answers)]  # fmt: skip
        gained, lost = (int((one > other).sum()) for one, other in (pair[::-1], pair))
        low, high = paired_share_interval(gained, lost, len(pair[0]))
        values = [one.accuracy, *one.intervals["accuracy"]]
        values += [other.accuracy, *other.intervals["accuracy"]]
        values += [other.accuracy - one.accuracy, low, high]
        rows.append([language, one.examples, *values])
    return pd.DataFrame(rows, columns=list(LANGUAGE_COLUMNS))


def _texts(before: Mapping[str, TextLosses], after: Mapping[str, TextLosses]) -> pd.DataFrame:
    """Return the losses on the text of both languages, and the change in the same prompts."""
    rows = []
    for language in (TARGET, SOURCE):
        (old, tokens), (new, _) = before[language], after[language]
        count = int(tokens.sum())
        together = torch.zeros_like(tokens)  # one group, whatever the labels
        limits = mean_interval(ratio_effects(new - old, tokens.double(), together), together)
        one, other = (float(loss.sum()) / count if count else math.nan for loss in (old, new))
        rows.append([language, len(tokens), count, one, other, other - one, *map(float, limits)])
    return pd.DataFrame(rows, columns=list(TEXT_COLUMNS))


def _changes(
    tasks: Mapping[str, Task], before: Mapping[str, Evaluation], after: Mapping[str, Evaluation]
) -> pd.DataFrame:
    """Return the test rows whose answer changed."""
    rows = []
    for language in (TARGET, SOURCE):
        one, other = before[language].answers, after[language].answers
        assert one is not None and other is not None
        for example, old, new in zip(
            tasks[language].test, one["answer"], other["answer"], strict=True
        ):
            if old != new:
                rows.append([language, example.prompt, example.label, str(old), str(new)])
    return pd.DataFrame(rows, columns=list(CHANGE_COLUMNS))
