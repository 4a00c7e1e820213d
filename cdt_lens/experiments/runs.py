"""Run directories: settings, the model and task they name, and stages that are done once.

A run directory holds `run.json` (the settings), `baseline`, `scores`, `circuit`, `ablation`,
`faithfulness` (JSON, with tensors beside them) and `report.html`. Every file is written whole. A
stage is not run again if its file was made from the same model and data by the same version of
`cdt_lens`. An interrupted sweep resumes after its last finished batch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

from cdt_lens.core.artifacts import load_artifact, remove_artifact, save_artifact
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.core.folders import check_run_folder
from cdt_lens.core.kept import Say, drop_other_versions, reuse
from cdt_lens.core.processes import is_main, wait_for_all
from cdt_lens.core.run_lock import locked
from cdt_lens.decomposition.rules import resolve_rules
from cdt_lens.experiments.inputs import check_inputs, load_for, make_task
from cdt_lens.experiments.settings import Settings
from cdt_lens.models.provenance import model_key
from cdt_lens.models.view import view_of
from cdt_lens.scoring.sweep import SWEEP_FORMAT, check_sample
from cdt_lens.tasks.evaluate import calibrate, evaluate
from cdt_lens.tasks.task import Examples, Task, drawn, most_balanced

Result = TypeVar("Result")
# Called with the folder, the settings and the task of a run before its model is loaded.
Check = Callable[[Path, Settings, Task], None]
_RUN = "cdt_lens.run"
# The folder in which `adapt` keeps the divided rows, which stand there before its settings do.
ROWS = "rows"
# Settings that may change when a run resumes: they change no score. With `decide` the scores are
# those of a circuit.
FREE_SETTINGS = ("batch_size", "rows", "device")
OF_THE_CIRCUIT = ("k", "fraction", "by")


P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Run:
    """An opened run directory with its settings, model and task."""

    folder: Path
    settings: Settings
    model: nn.Module
    task: Task

    def path(self, name: str) -> Path:
        return self.folder / name

    def scored(self) -> Examples:
        """Return the training examples to score."""
        return scored(self.settings, self.task)

    def averaged(self) -> Examples:
        """Return the training examples that the baseline averages."""
        n = self.settings.baseline_examples
        if n is None:
            return self.task.train
        return self.task.train.balanced(
            min(n, most_balanced(self.task.train)), seed=self.settings.seed
        )


def scored(settings: Settings, task: Task) -> Examples:
    """Return the training examples of `task` to score."""
    n = min(settings.examples, most_balanced(task.train))
    return task.train.balanced(n, seed=settings.seed)


def writes(function: Callable[Concatenate[Run, P], R]) -> Callable[Concatenate[Run, P], R]:
    """Decorate a stage of a run: its directory is locked until it ends."""

    @functools.wraps(function)
    def alone(run: Run, *args: P.args, **kwargs: P.kwargs) -> R:
        with locked(run.folder):
            return function(run, *args, **kwargs)

    return alone


def start_run(
    settings: Settings, folder: str | Path, say: Say, check: Check | None = None,
    *, keep: Sequence[str] = (),
) -> Run:  # fmt: skip
    """Open a run directory for `settings`, a new one or that of an earlier call.

    Args:
        settings: The settings of the run.
        folder: The run directory.
        say: Takes one line of progress.
        check: Called with the folder, the settings and the task before the model is loaded.
        keep: Names of settings that stay those of the earlier call.

    Raises:
        InputError: The folder holds a run with other settings, or other files, the data cannot be
            read, or another process writes in it.
    """
    folder = check_run_folder(folder, "run.json")
    with locked(folder):
        return _start(settings, folder, say, check, keep)


def _start(
    settings: Settings, folder: Path, say: Say, check: Check | None, keep: Sequence[str]
) -> Run:
    path = folder / "run.json"
    if path.exists():
        kept = kept_settings(path, _RUN)
        if kept.get("files"):
            kept["task"] = "files"  # Earlier versions kept the name of another task beside them.
        settings = replace(settings, **{name: kept[name] for name in keep if name in kept})
        wanted = json.loads(json.dumps(asdict(settings)))
        free = FREE_SETTINGS if settings.decide else (*FREE_SETTINGS, *OF_THE_CIRCUIT)
        different = [
            name
            for name, value in wanted.items()
            # Earlier versions did not know every setting.
            if name not in free and (kept.get(name) or None) != (value or None)
        ]
        if different:
            raise InputError(
                f"{folder}: holds a run with other settings ({', '.join(different)}); "
                "name another folder, or remove it"
            )
    run = _open(folder, settings, say, check)
    _check_size(run)
    run.task.require_held_out("valid")
    run.task.require_held_out("test")
    keep_settings(run)
    return run


def keep_settings(run: Run) -> None:
    """Write `run.json`, from which a run directory is opened, in one process."""
    if is_main():
        settings = {"settings": asdict(run.settings)}
        save_artifact(run.path("run.json"), settings, format=_RUN, version=1)
    wait_for_all()


def kept_settings(path: Path, format: str) -> dict[str, Any]:
    """Return the settings in the file that a run directory is opened from.

    Args:
        path: The file.
        format: Its kind.

    Raises:
        ArtifactError: The file is damaged or of another kind. Nothing else in the directory can
            replace it, so that nothing is made again.
    """
    try:
        settings = load_artifact(path, format=format, version=1)[0].get("settings")
    except ArtifactError as error:
        raise ArtifactError(f"{error}: name another folder, or remove {path}") from error
    if not isinstance(settings, dict):
        raise ArtifactError(f"{path}: damaged: it holds no settings; name another folder")
    return settings


def open_run(folder: str | Path, say: Say, check: Check | None = None) -> Run:
    """Open a run directory that `discover`, `compare` or the discovery of a transfer has made.

    Args:
        folder: The run directory. Of a transfer or a demo also the directory of the whole.
        say: Takes one line of progress.
        check: Called with the folder, the settings and the task before the model is loaded.

    Raises:
        InputError: The folder holds no run, or its data cannot be read.
        ArtifactError: Its settings are damaged.
    """
    folder = Path(folder)
    if (folder / "discovery" / "run.json").exists():  # of a transfer or a demo
        folder /= "discovery"
    path = folder / "run.json"
    if not path.exists():
        raise InputError(f"{folder}: holds no run (no run.json); {_how_to_make(folder)}")
    try:
        settings = Settings.from_dict(kept_settings(path, _RUN))
    except InputError as error:
        raise ArtifactError(f"{path}: damaged: {error}") from error
    return _open(folder, settings, say, check)


def _how_to_make(folder: Path) -> str:
    if (folder.parent / "transfer.json").exists():
        return (
            "it is the discovery of a transfer by an earlier version; give the command that made "
            "it (cdt-lens transfer or demo) again, which keeps what is finished and writes the file"
        )
    return "make one with cdt-lens discover"


def _open(folder: Path, settings: Settings, say: Say, check: Check | None) -> Run:
    (task,) = check_inputs(settings)
    check_sample(
        resolve_rules(settings.rules), scored(settings, apart(settings, task)), settings.exact,
        settings.decide or settings.precision is not None or settings.minutes is not None,
    )  # fmt: skip
    if check is not None:
        check(folder, settings, task)
    model = load_for(settings, say)
    task = make_task(settings, model.tokenizer)
    if settings.calibrate:
        task = calibrate(model, task)
    return Run(folder, settings, model, discovered_on(settings, model, task))


def apart(settings: Settings, task: Task) -> Task:
    """Return the task with the training examples that are set aside for the discovery.

    Raises:
        InputError: None would be left for the proxy stage of the transfer.
    """
    n = settings.apart
    if n is None:
        return task
    if n >= len(task.train):
        raise InputError(
            f"[discovery]: apart={n}: {task.train.name} has {len(task.train)} examples, so none "
            "would be left for the proxy stage; set fewer apart"
        )
    return replace(task, train=drawn(task.train, n, settings.seed))


def discovered_on(settings: Settings, model: nn.Module, task: Task) -> Task:
    """Return the task of a run, with the training examples that `apart` and `correct_only` leave.

    Raises:
        InputError: The model answers no example of a label right.
    """
    task = apart(settings, task)
    if not settings.correct_only:
        return task
    answers = evaluate(model, task.train, task).answers
    right = [] if answers is None else answers["right"].tolist()
    kept = tuple(item for item, is_right in zip(task.train, right, strict=True) if is_right)
    train = replace(task.train, items=kept)
    none = [label for label, count in train.counts.items() if not count]
    if none:
        raise InputError(
            f"correct_only: of the {len(right)} examples of {train.name} the model answers none "
            f"of label {none[0]!r} right; omit correct_only, or take a model that does the task"
        )
    return replace(task, train=train)


def _check_size(run: Run) -> None:
    """Refuse a circuit larger than the model before the sweep starts."""
    k, view = run.settings.k, view_of(run.model)
    heads = view.n_layers * view.n_heads
    if k is not None and k > heads:
        raise InputError(f"k={k}: the model has {heads} heads; choose at most as many")


def kept_at(path: Path, load: Callable[[Path], Result]) -> Result | None:
    """Load a kept result; None if there is none, or if it is damaged and will be made again."""
    try:
        return load(path) if path.exists() else None
    except ArtifactError:
        return None


def refuse_other_settings(path: Path, kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to write a result over one that was computed with other settings.

    Args:
        path: The file of the kept result.
        kept: The settings of the kept result by name.
        wanted: The settings of this call by name.

    Raises:
        InputError: A setting differs.
    """
    different = [f"{name} {kept[name]}" for name in wanted if kept[name] != wanted[name]]
    if different:
        raise InputError(
            f"{path}: holds a result with other settings ({', '.join(different)}). Give these "
            "again, move the file away, or use another run directory."
        )


def check_run_model(run: Run, provenance: Any, name: str) -> None:
    """Refuse a file of the run that belongs to another model."""
    provenance.check_model(view_of(run.model), str(run.path(name)))


def stage(
    run: Run,
    name: str,
    load: Callable[[Path], Any],
    compute: Callable[[], Any],
    say: Say,
    *,
    made_from: Mapping[str, Any],
) -> Any:
    """Load the result of a stage if it was made from the same; else compute and save it.

    Args:
        run: The run directory.
        name: The file of the stage.
        load: Reads the file; the result has a `provenance`.
        compute: Computes the result.
        say: Receives the progress, and the reason why a result is made again.
        made_from: Hashes of what the result is made from, besides the model.

    Returns:
        The result.
    """
    path = run.path(name)
    made_from = {"model": model_key(view_of(run.model)), **made_from}
    kept = reuse(path, load, lambda result: result.provenance.key, made_from, say)
    if kept is not None:
        say(f"{path}: using the kept result")
        return kept
    checkpoints = list(path.parent.glob(f"{path.stem}.partial*.json"))
    drop_other_versions(checkpoints, SWEEP_FORMAT, say)
    result = compute()
    if is_main():
        result.save(path)
        for checkpoint in path.parent.glob(f"{path.stem}.partial*.json"):
            remove_artifact(checkpoint)
    wait_for_all()
    return result
