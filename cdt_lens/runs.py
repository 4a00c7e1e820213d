"""Run directories: settings, the model and task they name, and stages that are done once.

A run directory holds `run.json` (the settings), `baseline`, `scores`, `circuit`, `ablation`,
`faithfulness` (JSON, with tensors beside them) and `report.html`. Every file is written whole; a
stage whose file is there for the same settings is not run again, and a sweep that was cut off
goes on after its last finished batch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cdt_lens.artifacts import load_artifact, remove_artifact, save_artifact
from cdt_lens.baselines import Slots
from cdt_lens.datasets import load_task, task_from_files
from cdt_lens.distributed import is_main, wait_for_all
from cdt_lens.errors import ArtifactError, InputError
from cdt_lens.evaluate import calibrate
from cdt_lens.faithfulness import Ranking
from cdt_lens.loading import Backend, load_model
from cdt_lens.model import view_of
from cdt_lens.rules import DEFAULT_RULES
from cdt_lens.scores import Direction
from cdt_lens.tasks import Examples, Task

Say = Callable[[str], None]
# Settings that may change when a run goes on: they change no score.
_FREE_SETTINGS = ("batch_size", "rows", "device", "k", "fraction", "by")


@dataclass(frozen=True)
class Settings:
    """What a discovery run does; all of it is kept in `run.json`.

    model: hub name, folder or GGUF file; task and language: see `datasets.load_task`, or "files"
    with `files` by split, `template` and `verbalizer`; examples: scored, balanced over labels;
    baseline_examples: averaged (None: as many as can be balanced); k or fraction: circuit size.
    """

    model: str
    task: str
    language: str | None = None
    data: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None
    verbalizer: Mapping[str, str] = field(default_factory=dict)
    label_column: str = "label"
    shots: int = 0
    calibrate: bool = False
    backend: Backend = "auto"
    device: str | None = None
    dtype: str = "float32"
    rules: str = DEFAULT_RULES
    positions: Slots = "answer"
    direction: Direction = "mean"
    examples: int = 48
    baseline_examples: int | None = None
    k: int | None = None
    fraction: float | None = None
    by: Ranking = "signed"
    batch_size: int = 16
    rows: int | None = None
    seed: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """The inverse of `dataclasses.asdict`.

        Raises:
            InputError: a name that is no setting.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"settings: unknown {', '.join(unknown)}; this cdt_lens may be older")
        return cls(**values)


@dataclass(frozen=True)
class Run:
    """An opened run directory: its settings, and the model and task they name."""

    folder: Path
    settings: Settings
    model: nn.Module
    task: Task

    def path(self, name: str) -> Path:
        return self.folder / name

    def scored(self) -> Examples:
        """The training examples that the scores are computed on."""
        train = self.task.train
        return train.balanced(
            min(self.settings.examples, most_balanced(train)), seed=self.settings.seed
        )

    def averaged(self) -> Examples:
        """The training examples that the baseline is averaged over: all, or as many as set."""
        n = self.settings.baseline_examples
        if n is None:
            return self.task.train
        return self.task.train.balanced(
            min(n, most_balanced(self.task.train)), seed=self.settings.seed
        )


def most_balanced(examples: Examples) -> int:
    """How many examples can be drawn with the same number of each label."""
    return min(examples.counts.values()) * len(examples.labels)


def start_run(settings: Settings, folder: str | Path, say: Say) -> Run:
    """Open a run directory for `settings`, new or as an earlier call left it.

    Raises:
        InputError: the folder holds a run with other settings.
    """
    folder = Path(folder)
    path = folder / "run.json"
    wanted = json.loads(json.dumps(asdict(settings)))
    if path.exists():
        body, _ = load_artifact(path, format="cdt_lens.run", version=1)
        different = [
            name
            for name, value in wanted.items()
            if name not in _FREE_SETTINGS and body["settings"].get(name) != value
        ]
        if different:
            raise InputError(
                f"{folder}: holds a run with other settings ({', '.join(different)}); "
                "name another folder, or remove it"
            )
    run = _open(folder, settings, say)
    _check_size(run)
    if is_main():
        save_artifact(path, {"settings": wanted}, format="cdt_lens.run", version=1)
    wait_for_all()
    return run


def open_run(folder: str | Path, say: Say) -> Run:
    """Open a run directory that `discover` has made.

    Raises:
        InputError: the folder holds no run.
    """
    path = Path(folder) / "run.json"
    if not path.exists():
        raise InputError(f"{folder}: holds no run (no run.json); make one with cdt-lens discover")
    body, _ = load_artifact(path, format="cdt_lens.run", version=1)
    return _open(Path(folder), Settings.from_dict(body["settings"]), say)


def load_for(settings: Settings, say: Say) -> Any:
    """The model that `settings` name.

    Raises:
        InputError: an unknown dtype, or a model that cannot be loaded.
    """
    dtype = getattr(torch, settings.dtype, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise InputError(f"dtype={settings.dtype!r}: expected float32, bfloat16 or float64")
    say(f"loading {settings.model}")
    return load_model(settings.model, backend=settings.backend, device=settings.device, dtype=dtype)


def _open(folder: Path, settings: Settings, say: Say) -> Run:
    model = load_for(settings, say)
    task = make_task(settings, model.tokenizer)
    if settings.calibrate:
        task = calibrate(model, task)
    return Run(folder, settings, model, task)


def make_task(settings: Settings, tokenizer: Any) -> Task:
    """The task that `settings` name.

    Raises:
        InputError: an unknown task, files that cannot be read, or words of several tokens.
    """
    if settings.task == "files" or settings.files:
        if not settings.files or settings.template is None or not settings.verbalizer:
            raise InputError(
                "task files: expected a file for train (and valid, test), a template with the "
                'columns in braces, and a verbalizer word for each label, such as positive=" good"'
            )
        return task_from_files(
            settings.files, tokenizer=tokenizer, template=settings.template,
            verbalizer=settings.verbalizer, label_column=settings.label_column,
            shots=settings.shots, seed=settings.seed,
        )  # fmt: skip
    return load_task(
        settings.task, settings.language, tokenizer=tokenizer, folder=settings.data,
        template=settings.template, verbalizer=settings.verbalizer or None,
        shots=settings.shots, seed=settings.seed,
    )  # fmt: skip


def _check_size(run: Run) -> None:
    """Refuse an impossible circuit size before the sweep, not after it."""
    k, fraction = run.settings.k, run.settings.fraction
    view = view_of(run.model)
    heads = view.n_layers * view.n_heads
    if k is not None and fraction is not None:
        raise InputError("circuit size: expected k or fraction, got both")
    if k is not None and not 0 < k <= heads:
        raise InputError(f"k={k}: the model has {heads} heads")
    if fraction is not None and not 0 < fraction <= 1:
        raise InputError(f"fraction={fraction}: expected more than 0 and at most 1")


def check_run_model(run: Run, provenance: Any, name: str) -> None:
    """Refuse a file of the run that another model made."""
    provenance.check_model(view_of(run.model), str(run.path(name)))


def stage(
    run: Run,
    name: str,
    load: Callable[[Path], Any],
    compute: Callable[[], Any],
    say: Say,
    *,
    fits: Callable[[Any], bool],
) -> Any:
    """The stage's file if it is this model's and `fits` the data; else compute it and save it."""
    path = run.path(name)
    found = _found(run, name, load, say, fits) if path.exists() else None
    wait_for_all()  # no process writes before every one has looked
    if found is not None:
        say(f"{path} is there already")
        return found
    result = compute()
    if is_main():
        result.save(path)
        for rest in path.parent.glob(f"{path.stem}.partial*.json"):
            remove_artifact(rest)
    wait_for_all()
    return result


def _found(
    run: Run, name: str, load: Callable[[Path], Any], say: Say, fits: Callable[[Any], bool]
) -> Any | None:
    """What the stage's file holds, or None where it has to be made again."""
    try:
        found = load(run.path(name))
        check_run_model(run, found.provenance, name)
    except ArtifactError as error:
        say(f"{error}; making it again")
        return None
    if not fits(found):
        say(f"{run.path(name)} was made from other data; making it again")
        return None
    return found


def kept(path: Path, format: str, key: Mapping[str, Any], say: Say) -> dict[str, Any] | None:
    """What an earlier call has kept for the same key; None where it has to be made again."""
    if not path.exists():
        return None
    try:
        body, _ = load_artifact(path, format=format, version=1)
    except ArtifactError as error:
        say(f"{error}; making it again")
        return None
    if body["key"] != as_json(dict(key)):
        say(f"{path} was made with other settings or data; making it again")
        return None
    return body


def keep(path: Path, format: str, body: Mapping[str, Any]) -> None:
    """Save `body`, which holds the "key" that it was made from, from one process."""
    if is_main():
        save_artifact(path, body, format=format, version=1)
    wait_for_all()


def as_json(value: Any) -> Any:
    """As it is read back from JSON: tuples become lists."""
    return json.loads(json.dumps(value))


def file_name(text: str) -> str:
    """`text` as part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", text)
