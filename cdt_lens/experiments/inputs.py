"""The model and the task that settings name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cdt_lens.core.errors import InputError
from cdt_lens.core.kept import Say
from cdt_lens.decomposition.baseline import paired_tokens
from cdt_lens.experiments.settings import Settings
from cdt_lens.models.hugging_face import load_tokenizer, third_party_noise_off
from cdt_lens.models.loading import load_model
from cdt_lens.tasks.datasets import load_task, task_from_files
from cdt_lens.tasks.task import Examples, Task, drawn


def load_for(settings: Settings, say: Say) -> Any:
    """Load the model that `settings` name.

    Args:
        settings: The settings of a run.
        say: Takes one line of progress.

    Raises:
        InputError: The model cannot be loaded.
    """
    dtype = getattr(torch, settings.dtype)
    say(f"loading {settings.model}")
    spread = settings.device == "auto"
    return load_model(
        settings.model, backend=settings.backend, device=None if spread else settings.device,
        device_map="auto" if spread else None, dtype=dtype,
    )  # fmt: skip


def make_task(settings: Settings, tokenizer: Any) -> Task:
    """Make the task that `settings` name.

    Args:
        settings: The settings of a run.
        tokenizer: The tokenizer of the model.

    Raises:
        InputError: An unknown task, files that are not named or cannot be read, or a verbalizer
            word that cannot be used.
    """
    if settings.task == "files":
        return _task_of_files(settings, tokenizer)
    return load_task(
        settings.task, settings.language, tokenizer=tokenizer, folder=settings.data,
        template=settings.template, verbalizer=settings.verbalizer or None, n=settings.sizes,
        shots=settings.shots, seed=settings.seed, pair=settings.pair,
    )  # fmt: skip


def check_inputs(settings: Settings, *others: Settings) -> list[Task]:
    """Make the tasks of settings with the tokenizer alone, before the model is loaded.

    Args:
        settings: The settings, which name the model.
        others: Settings of other tasks for the same model.

    Returns:
        The task of each of the settings.

    Raises:
        InputError: A file, column, label, template or verbalizer word that cannot be used, or no
            model at that place.
    """
    with third_party_noise_off():
        tokenizer = load_tokenizer(settings.model)
    every = (settings, *others)
    tasks = [make_task(each, tokenizer) for each in every]
    for each, task in zip(every, tasks, strict=True):
        if each.baseline == "counterfactual":
            paired_examples(task)
        elif each.baseline == "counterfactual-mean":
            _ = task.train.pairs  # raises where an example has none
    return tasks


def _task_of_files(settings: Settings, tokenizer: Any) -> Task:
    if not settings.files or settings.template is None or not settings.verbalizer:
        raise InputError(
            "task files: expected a file for train (and valid, test), a template with the "
            'columns in braces, and a verbalizer word for each label, such as positive=" good"'
        )
    name = "files" if settings.language is None else f"files/{settings.language}"
    return task_from_files(
        settings.files, tokenizer=tokenizer, template=settings.template,
        verbalizer=settings.verbalizer, label_column=settings.label_column, name=name,
        split=settings.split, shots=settings.shots, seed=settings.seed,
        pair=_pair_of(settings.pair), pair_label=settings.pair_label,
    )  # fmt: skip


def _pair_of(given: str | None) -> str | dict[str, str] | None:
    """Return the columns of counterfactual prompts as `task_from_files` takes them.

    Args:
        given: One column, or `column=pair` for columns of the template, between commas.

    Raises:
        InputError: One of several columns is not given as `column=pair`.
    """
    if given is None or "=" not in given:
        return given
    parts = [column.strip().partition("=") for column in given.split(",")]
    if not all(own and pair for own, _, pair in parts):
        raise InputError(
            f"pair {given!r}: expected one column, or column=pair for each column of the template "
            "that has a counterfactual, between commas"
        )
    return {own: pair for own, _, pair in parts}


def paired_examples(task: Task) -> Examples:
    """Return the examples of all splits, each with its counterfactual prompt.

    Args:
        task: The task.

    Raises:
        InputError: An example has no counterfactual prompt, or one of another number of tokens.
    """
    splits = [split for split in (task.train, task.valid, task.test) if len(split)]
    for split in splits:
        paired_tokens(split, split.pairs)
    items = tuple(item for split in splits for item in split)
    return Examples(items, task.labels, task.name)


def with_train(task: Task, n: int | None, seed: int) -> Task:
    """Return the task with fewer training examples.

    Args:
        task: The whole task.
        n: The number of training examples to keep; None keeps all.
        seed: Seed of the draw. Those that are drawn keep the order of the data.

    Raises:
        InputError: None of the examples that are drawn has a label of the others.
    """
    if n is None or n >= len(task.train):
        return task
    train = drawn(task.train, n, seed)
    missing = [
        label for label, count in task.train.counts.items() if count > train.counts[label] == 0
    ]
    if missing:
        raise InputError(
            f"{task.train.name}: none of {n} examples drawn with seed {seed} has the label "
            f"{missing[0]!r}; ask for more examples, or take another seed"
        )
    return replace(task, train=train)
