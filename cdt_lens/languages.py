"""One task in several languages, as a transfer experiment needs it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from cdt_lens.datasets import load_task, task_from_files
from cdt_lens.errors import InputError
from cdt_lens.tasks import Examples, Task
from cdt_lens.transfer_config import TaskSettings


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


def drawn(examples: Examples, n: int, seed: int) -> Examples:
    """`n` examples drawn by the seed, in the order of the data; all where there are no more."""
    if n >= len(examples):
        return examples
    index = sorted(random.Random(seed).sample(range(len(examples)), n))
    return replace(examples, items=tuple(examples[i] for i in index))
