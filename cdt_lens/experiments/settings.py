"""One task in several languages, as a transfer experiment needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from cdt_lens.circuits.head_scores import Ranking
from cdt_lens.core.errors import InputError
from cdt_lens.core.kept import Say
from cdt_lens.decomposition.baseline import Slots
from cdt_lens.decomposition.rules import DEFAULT_RULES
from cdt_lens.experiments.transfer_config import TaskSettings
from cdt_lens.models.loading import Backend, load_model
from cdt_lens.tasks.datasets import load_task, task_from_files
from cdt_lens.tasks.metrics import Direction
from cdt_lens.tasks.task import Task, drawn


def make_language(settings: TaskSettings, language: str, tokenizer: Any) -> Task:
    """The task in one language.

    Raises:
        InputError: data that cannot be read, or files that are not named.
    """
    if settings.name == "files":
        if language not in settings.files or settings.template is None or not settings.verbalizer:
            raise InputError(
                f"task files: expected [task.files.{language}] with train, valid and test, and in "
                "[task] a template and a verbalizer word for each label"
            )
        return task_from_files(
            settings.files[language], tokenizer=tokenizer, template=settings.template,
            verbalizer=settings.verbalizer, label_column=settings.label_column,
            name=f"files/{language}", seed=settings.seed,
        )  # fmt: skip
    return load_task(
        settings.name, language, tokenizer=tokenizer, folder=settings.data,
        template=settings.template, verbalizer=settings.verbalizer or None, n=settings.sizes,
        seed=settings.seed,
    )  # fmt: skip


def with_train(task: Task, n: int | None, seed: int) -> Task:
    """The task with `n` of its training examples, drawn by the seed, in the order of the data."""
    if n is None or n >= len(task.train):
        return task
    return replace(task, train=drawn(task.train, n, seed))


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
