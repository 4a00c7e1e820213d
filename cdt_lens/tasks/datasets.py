"""Load tasks: known data sets, the user's own files, the hub, and generators.

1. Read a source into one `Table` for each split, with the place of each row for error messages.
2. Convert labels to words. Integers are refused unless their names are known. Compare the number of
   rows with the published one, so that merged or truncated data are refused.
3. Divide train into train and valid (`split`). Draw few-shot examples from train and remove them
   there. Then draw `limit` rows of each split.
4. Build the prompts with `PromptFormat`, and the `Task` from them.

NusaX-Senti is described in arXiv 2205.15960 and XNLI in arXiv 1809.05053. The dev split of XNLI is
divided into train and valid, and rows that share a premise stay together.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from cdt_lens.core.checked import Fix, checked_arguments
from cdt_lens.core.choices import Count, FromZeroCount, Level, Seed
from cdt_lens.core.errors import CdtLensWarning, InputError, did_you_mean
from cdt_lens.tasks import pseudo_languages as pseudo
from cdt_lens.tasks.generated import DEFAULT_SIZES, GENERATORS
from cdt_lens.tasks.mib import MIB_TASKS, load_mib_task
from cdt_lens.tasks.prompts import Pair, PromptFormat, Tokenizer, Verbalizer
from cdt_lens.tasks.rows import (
    SPLITS,
    Table,
    check_paths,
    hub_tables,
    read_table,
)
from cdt_lens.tasks.task import Examples, Task


@dataclass(frozen=True)
class KnownDataset:
    """A published data set.

    Attributes:
        template: the prompt's template.
        verbalizer: the answer word of each label.
        repo: name on the Hugging Face hub.
        languages: the hub's configuration of each folder name.
        files: path of each split in a folder, with `{language}` in braces.
        counts: published number of rows of each split.
        label_names: names of the integer labels, in order.
        divided: a column, or None. With a column, valid is divided into train and valid, and
            consecutive rows with equal cells in this column stay together.
    """

    template: str
    verbalizer: Mapping[str, str]
    repo: str
    languages: Mapping[str, str]
    files: Mapping[str, str]
    counts: Mapping[str, int]
    label_names: tuple[str, ...]
    divided: str | None = None


_NUSAX_NAMES = (
    "acehnese balinese banjarese buginese english indonesian javanese madurese minangkabau ngaju "
    "sundanese toba_batak"
)
_NUSAX_CODES = "ace ban bjn bug eng ind jav mad min nij sun bbc"
_XNLI_LANGUAGES = "ar bg de el en es fr hi ru sw th tr ur vi zh"
KNOWN: Mapping[str, KnownDataset] = MappingProxyType(
    {
        "nusax-senti": KnownDataset(
            template="{text}\nSentiment:",
            verbalizer={"negative": " negative", "neutral": " neutral", "positive": " positive"},
            repo="mteb/NusaX-senti",
            languages=dict(zip(_NUSAX_NAMES.split(), _NUSAX_CODES.split(), strict=True)),
            files={split: "{language}/" + split + ".csv" for split in SPLITS},
            counts={"train": 500, "valid": 100, "test": 400},
            label_names=("negative", "neutral", "positive"),
        ),
        "xnli": KnownDataset(
            template="{premise}\nQuestion: {hypothesis} True, False, or Neither?\nAnswer:",
            verbalizer={"entailment": " True", "neutral": " Neither", "contradiction": " False"},
            repo="facebook/xnli",
            languages={code: code for code in _XNLI_LANGUAGES.split()},
            files={"valid": "dev-{language}.tsv.gz", "test": "test-{language}.tsv.gz"},
            counts={"valid": 2490, "test": 5010},
            label_names=("entailment", "neutral", "contradiction"),
            divided="premise",
        ),
    }
)
TASK_NAMES = (*KNOWN, *GENERATORS, pseudo.PSEUDO_TASK, *MIB_TASKS)


@checked_arguments
def load_task(
    name: Annotated[str, Fix("task_from_files makes a task of texts of your own")],
    config: str | None = None,
    *,
    tokenizer: Tokenizer,
    folder: str | Path | None = None,
    template: str | None = None,
    verbalizer: Verbalizer | None = None,
    shots: FromZeroCount = 0,
    seed: Seed = 0,
    prepend_bos: bool | None = None,
    max_length: Count | None = None,
    truncate: bool = False,
    limit: Count | None = None,
    n: Annotated[
        Sequence[FromZeroCount] | None,
        Fix("give the sizes of train, valid and test, such as (48, 24, 24)"),
    ] = None,
    check_counts: bool = True,
    revision: str | None = None,
    pair: str | None = None,
) -> Task:
    """Load a task by name.

    Without `folder`, the data of "nusax-senti", "xnli" and MIB's tasks come from the Hugging Face
    hub.

    Args:
        name: "nusax-senti", "xnli", a task of MIB ("mib-ioi", "mib-arithmetic", "mib-mcqa",
            "mib-arc"), or a generated task: "ioi", "greater-than", "gendered-pronoun",
            "pseudo-sentiment".
        config: the language. For "pseudo-sentiment", "source" or the distance of the language from
            it, such as "0.6". For "mib-arithmetic", "addition" or "subtraction"; for "mib-arc",
            "easy" or "challenge"; for "mib-mcqa" None or a number such as "2_answer_choices".
        tokenizer: the model's tokenizer.
        folder: folder with the files of the data set.
        template: the prompt's template. None uses the data set's own.
        verbalizer: the answer word of each label. None uses the data set's own.
        shots: number of label-balanced train examples before every prompt. They leave train.
        seed: seed of every draw. XNLI is divided into train and valid alike for every seed.
        prepend_bos: whether to prepend BOS. None prepends it if the tokenizer has one.
        max_length: maximum number of tokens of a prompt. None uses the tokenizer's limit.
        truncate: whether to shorten the text of a prompt that is too long.
        limit: number of rows to draw from each split. None takes all.
        n: sizes of train, valid and test, for generated tasks.
        check_counts: whether to compare the numbers of rows with the published ones, for
            "nusax-senti" and "xnli".
        revision: revision of the data set on the hub.
        pair: name of the counterfactual of MIB's tasks, such as "abc_counterfactual". None takes
            the one that MIB evaluates on.

    Returns:
        The task.

    Raises:
        InputError: a name or language is unknown, the data cannot be read or are incomplete, or an
            option does not apply.
    """
    if name not in TASK_NAMES:
        raise InputError(
            f"task {name!r}: unknown{did_you_mean(name, TASK_NAMES)}; expected one of "
            f"{', '.join(TASK_NAMES)} (or use task_from_files, task_from_hub)"
        )
    if n is not None and len(n) != 3:
        raise InputError(f"task {name!r}: n={n!r}: expected the sizes of train, valid and test")
    if name in MIB_TASKS:
        given: dict[str, Any] = {"template": template, "verbalizer": verbalizer, "n": n}
        _refuse(name, "has prompts of its own", given | {"shots": shots or None})
        _refuse(name, "has prompts of its own", {"truncate": truncate or None})
        return load_mib_task(
            name, config, tokenizer=tokenizer, folder=folder, pair=pair, prepend_bos=prepend_bos,
            max_length=max_length, limit=limit, seed=seed, revision=revision,
        )  # fmt: skip
    _refuse(name, "has no counterfactuals", {"pair": pair})
    if name in GENERATORS:
        given = {"config": config, "folder": folder, "template": template}
        given |= {"shots": shots or None, "verbalizer": verbalizer, "revision": revision}
        _refuse(name, "is generated", given)
        sizes = [_at_most(limit, size) for size in n or DEFAULT_SIZES]
        return GENERATORS[name](tokenizer, n=sizes, seed=seed, prepend_bos=prepend_bos)
    known = KNOWN.get(name)
    format = PromptFormat(
        tokenizer,
        (known.template if known else pseudo.TEMPLATE) if template is None else template,
        (known.verbalizer if known else pseudo.VERBALIZER) if verbalizer is None else verbalizer,
        prepend_bos=prepend_bos,
        max_length=max_length,
        truncate=truncate,
    )
    if known is None:
        _refuse(name, "is generated", {"folder": folder, "revision": revision})
        splits = pseudo.pseudo_splits(config, n or pseudo.SIZES, seed)
        tables = {
            s: Table(rows, [f"{name}, {r['text']!r}" for r in rows]) for s, rows in splits.items()
        }
        return _build(f"{name}/{config}", tables, format, shots=shots, seed=seed, limit=limit)
    _refuse(name, "has the sizes of its data (use limit)", {"n": n})
    language = _language(name, config)
    tables = _known_tables(name, language, folder, format=format, revision=revision)
    if check_counts:
        _check_counts(f"{name}/{language}", tables, known.counts)
    if known.divided is not None:
        tables |= _divide(tables["valid"], known.divided)
    return _build(f"{name}/{language}", tables, format, shots=shots, seed=seed, limit=limit)


@checked_arguments
def task_from_files(
    paths: Annotated[
        Mapping[str, str | Path], Fix("such as {'train': 'train.csv', 'test': 'test.csv'}")
    ],
    *,
    tokenizer: Tokenizer,
    template: str,
    verbalizer: Verbalizer,
    label_column: str = "label",
    name: str = "files",
    quoting: bool | None = None,
    split: Level | None = None,
    shots: FromZeroCount = 0,
    seed: Seed = 0,
    prepend_bos: bool | None = None,
    max_length: Count | None = None,
    truncate: bool = False,
    limit: Count | None = None,
    pair: Pair | None = None,
    pair_label: str | None = None,
) -> Task:
    """Load a task from one CSV, TSV or JSONL file for each split, plain or gzipped.

    Args:
        paths: path of each split, such as `{"train": path, "test": path}`.
        tokenizer: the model's tokenizer.
        template: text with column names in braces. It ends where the answer begins.
        verbalizer: the answer word of each label, of one or several tokens.
        label_column: name of the column with the label.
        name: name of the task.
        quoting: whether quotation marks enclose cells. None means yes in CSV and no in TSV.
        split: share of the train rows of each label to set aside as valid, for data without valid.
            The draw is the same whatever `seed` is, so that every call has the same rows.
        shots: number of label-balanced train examples before every prompt. They leave train.
        seed: seed of every draw.
        prepend_bos: whether to prepend BOS. None prepends it if the tokenizer has one.
        max_length: maximum number of tokens of a prompt. None uses the tokenizer's limit.
        truncate: whether to shorten the text of a prompt that is too long.
        limit: number of rows to draw from each split. None takes all.
        pair: column with the text of each row's counterfactual prompt, in place of the template's
            column; with several columns a mapping, such as `{"premise": "other_premise"}`. See
            `counterfactual_baseline`.
        pair_label: column with the label of the counterfactual prompt. None gives it the row's.

    Returns:
        The task.

    Raises:
        InputError: there is a mistake in a file. The message names its line (the header is line 1)
            and column.
    """
    check_paths(paths)
    format = PromptFormat(
        tokenizer, template, verbalizer, label_column, prepend_bos=prepend_bos,
        max_length=max_length, truncate=truncate, pair=pair, pair_label=pair_label,
    )  # fmt: skip
    tables = {split: read_table(path, quoting=quoting) for split, path in paths.items()}
    return _build(name, tables, format, split=split, shots=shots, seed=seed, limit=limit)


@checked_arguments
def task_from_hub(
    repo: str,
    config: str | None = None,
    *,
    tokenizer: Tokenizer,
    template: str,
    verbalizer: Verbalizer,
    label_column: str = "label",
    label_names: Sequence[str] | None = None,
    splits: Annotated[
        Mapping[str, str] | None, Fix("such as {'train': 'train', 'test': 'validation'}")
    ] = None,
    revision: str | None = None,
    data_dir: str | None = None,
    split: Level | None = None,
    shots: FromZeroCount = 0,
    seed: Seed = 0,
    prepend_bos: bool | None = None,
    max_length: Count | None = None,
    truncate: bool = False,
    limit: Count | None = None,
    pair: Pair | None = None,
    pair_label: str | None = None,
) -> Task:
    """Load a task from a data set of the Hugging Face hub, or from a local folder.

    Args:
        repo: name on the hub, or a folder that the `datasets` library reads.
        config: the data set's configuration, such as a language.
        tokenizer: the model's tokenizer.
        template: text with column names in braces. It ends where the answer begins.
        verbalizer: the answer word of each label, of one or several tokens.
        label_column: name of the column with the label.
        label_names: names of integer labels, in order. None uses the names in the data set's
            ClassLabel.
        splits: the data set's name for train, valid and test. None uses the splits with the usual
            names.
        revision: revision of the data set on the hub.
        data_dir: folder in the data set, see `datasets.load_dataset`.
        split: share of the train rows of each label to set aside as valid, for data without valid.
            The draw is the same whatever `seed` is, so that every call has the same rows.
        shots: number of label-balanced train examples before every prompt. They leave train.
        seed: seed of every draw.
        prepend_bos: whether to prepend BOS. None prepends it if the tokenizer has one.
        max_length: maximum number of tokens of a prompt. None uses the tokenizer's limit.
        truncate: whether to shorten the text of a prompt that is too long.
        limit: number of rows to draw from each split. None takes all.
        pair: column with the text of each row's counterfactual prompt, in place of the template's
            column; with several columns a mapping, such as `{"premise": "other_premise"}`. See
            `counterfactual_baseline`.
        pair_label: column with the label of the counterfactual prompt. None gives it the row's.

    Returns:
        The task.

    Raises:
        InputError: the data cannot be loaded, lack a column or split, or have labels without names.
    """
    format = PromptFormat(
        tokenizer, template, verbalizer, label_column, prepend_bos=prepend_bos,
        max_length=max_length, truncate=truncate, pair=pair, pair_label=pair_label,
    )  # fmt: skip
    tables = hub_tables(
        repo,
        config,
        columns=format.row_columns,
        label_columns=format.label_columns,
        label_names=label_names,
        splits=splits,
        revision=revision,
        data_dir=data_dir,
    )
    name = repo if config is None else f"{repo}/{config}"
    return _build(name, tables, format, split=split, shots=shots, seed=seed, limit=limit)


def _refuse(name: str, reason: str, options: Mapping[str, object]) -> None:
    for option, value in options.items():
        if value is not None:
            raise InputError(f"task {name!r} {reason}: {option}={value!r} does not apply")


def _language(name: str, config: str | None) -> str:
    """Return the folder name of a language that is given by name or hub code."""
    languages = KNOWN[name].languages
    for language, code in languages.items():
        if config in (language, code):
            return language
    options = dict.fromkeys((*languages, *languages.values()))
    hint = did_you_mean(config or "", options)
    raise InputError(
        f"task {name!r}: config={config!r}: expected a language{hint}; one of {', '.join(options)}"
    )


def _known_tables(
    name: str,
    language: str,
    folder: str | Path | None,
    *,
    format: PromptFormat,
    revision: str | None,
) -> dict[str, Table]:
    known = KNOWN[name]
    if folder is None:
        return hub_tables(
            known.repo,
            known.languages[language],
            columns=(*format.columns, *([known.divided] if known.divided else [])),
            label_columns=format.label_columns,
            label_names=known.label_names,
            splits={"valid": "validation", "test": "test"} if known.divided else None,
            revision=revision,
            data_dir=None,
        )
    _refuse(name, "is read from a folder", {"revision": revision})
    files = {split: file.format(language=language) for split, file in known.files.items()}
    bases = (Path(folder), Path(folder, name))
    base = next((b for b in bases if any((b / file).exists() for file in files.values())), None)
    if base is None:
        raise InputError(
            f"folder {folder}: expected {', '.join(files.values())} in it or in its folder {name}"
        )
    return {split: read_table(base / file) for split, file in files.items()}


def _check_counts(where: str, tables: Mapping[str, Table], counts: Mapping[str, int]) -> None:
    for split, expected in counts.items():
        got = len(tables[split].rows) if split in tables else 0
        if got != expected:
            raise InputError(
                f"{where}: split {split} has {got} rows, expected {expected}. The data are "
                "incomplete, or several languages are merged. Download them again, or pass "
                "check_counts=False if this is intended."
            )


def _divide(table: Table, column: str) -> dict[str, Table]:
    """Draw 80 % train and 20 % valid among runs of rows that share `column`.

    The same rows whatever the seed: a model that was trained with one seed is judged with another.
    """
    positions = range(len(table.rows))
    groups = [list(run) for _, run in groupby(positions, lambda i: table.rows[i].get(column))]
    chosen = set(random.Random(0).sample(range(len(groups)), round(0.8 * len(groups))))
    train = [i for number, run in enumerate(groups) if number in chosen for i in run]
    valid = [i for number, run in enumerate(groups) if number not in chosen for i in run]
    return {"train": table.pick(train), "valid": table.pick(valid)}


def _build(
    name: str,
    tables: Mapping[str, Table],
    format: PromptFormat,
    *,
    split: float | None = None,
    shots: int,
    seed: int,
    limit: int | None,
) -> Task:
    tables = dict(tables)
    for table in tables.values():
        table.check_columns((*format.row_columns, *format.label_columns), format.labels)
    if split is not None:
        tables |= _set_aside(name, tables, format, split)
    solved: list[tuple[str, str]] = []
    if shots:
        format, tables["train"], solved = _few_shot(
            name, tables.get("train"), format, shots, seed=seed
        )
    splits = {part: Examples((), format.labels, f"{name}/{part}") for part in SPLITS}
    for part, table in tables.items():
        size = len(table.rows)
        index = random.Random(seed).sample(range(size), _at_most(limit, size))
        table = table.pick(sorted(index))
        splits[part] = format.examples(table.rows, name=f"{name}/{part}", places=table.places)
    _warn_of_known(splits, solved)
    return Task(
        name=name,
        labels=format.labels,
        verbalizer=dict(format.verbalizer),
        verbalizer_ids=format.verbalizer_ids,
        template=format.template,
        content_free=format.content_free(f"{name}/content-free"),
        prefix=format.prefix,
        max_length=format.max_length,
        truncate=format.truncate,
        train=splits["train"],
        valid=splits["valid"],
        test=splits["test"],
    )


def _warn_of_known(splits: Mapping[str, Examples], solved: Sequence[tuple[str, str]]) -> None:
    """Warn of held-out examples that are also in train or among the shots, or in both splits."""
    learnt = {(item.prompt, item.label) for item in splits["train"]} | set(solved)
    chosen_by = {(item.prompt, item.label) for item in splits["valid"]}
    others = f"{splits['train'].name}{' or among the shots' if solved else ''}"
    for part, known, where, what in (
        ("valid", learnt, others, "learnt"),
        ("test", learnt, others, "learnt"),
        ("test", chosen_by, splits["valid"].name, "chosen by"),
    ):
        held_out = splits[part]
        twice = sum((item.prompt, item.label) in known for item in held_out)
        # `Task.require_held_out` says it of a valid split that is wholly in train.
        if twice and (part == "test" or twice < len(held_out)):
            warnings.warn(
                f"{held_out.name}: {twice} of {len(held_out)} examples are also in {where}, so "
                f"what is measured on this split is partly what was {what}. Remove them from one "
                "of the two.",
                CdtLensWarning,
                stacklevel=1,
            )


def _alike(checked: Sequence[tuple[dict[str, str], str]], label: str) -> list[list[int]]:
    """Return the positions of the rows of a label, those of the same text together."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, (texts, own) in enumerate(checked):
        if own == label:
            groups.setdefault(tuple(texts.values()), []).append(i)
    return list(groups.values())


def _share_of(groups: list[list[int]], share: float, generator: random.Random) -> list[int]:
    """Draw groups of rows that hold a share of all rows; at least one group, and never all."""
    rows = sum(map(len, groups))
    most = min(max(1, round(share * rows)), rows - 1)
    if len(groups) == rows:  # no two rows are alike: the usual draw
        return [row for (row,) in generator.sample(groups, most)]
    chosen: list[int] = []
    for group in generator.sample(groups, len(groups)):
        if len(chosen) + len(group) <= most:
            chosen += group
    return chosen or min(groups, key=len)


def _set_aside(
    name: str, tables: Mapping[str, Table], format: PromptFormat, share: float
) -> dict[str, Table]:
    """Divide train into train and valid, with the share of the rows of each label in valid.

    Rows of the same text and label stay together.
    """
    if "valid" in tables or "train" not in tables:
        raise InputError(
            f"{name}: split={share}: it divides train where there is no valid split; the data have "
            f"{', '.join(tables)}"
        )
    table = tables["train"]
    pairs = zip(table.rows, table.places, strict=True)
    checked = [format.check_row(row, place) for row, place in pairs]
    generator = random.Random(0)
    valid: set[int] = set()
    for label in format.labels:
        groups = _alike(checked, label)
        if len(groups) < 2:
            raise InputError(
                f"{name}: split={share}: train has only {len(groups)} rows with label "
                f"{label!r} that differ. Each label needs one in train and one in valid."
            )
        valid |= set(_share_of(groups, share, generator))
    train = [i for i in range(len(checked)) if i not in valid]
    return {"train": table.pick(train), "valid": table.pick(sorted(valid))}


def _at_most(limit: int | None, size: int) -> int:
    return size if limit is None else min(size, limit)


def _few_shot(
    name: str, table: Table | None, format: PromptFormat, shots: int, *, seed: int
) -> tuple[PromptFormat, Table, list[tuple[str, str]]]:
    """Draw `shots` label-balanced rows of different texts and solve them in a prefix.

    Returns:
        The format with the prefix, the other rows, without those of the same text and label, and
        the prompt and the label of each row that was drawn.
    """
    n_labels = len(format.labels)
    if shots % n_labels:
        raise InputError(
            f"{name}: shots={shots}: expected a multiple of {n_labels}, the number of labels"
        )
    if table is None:
        raise InputError(f"{name}: shots={shots}: there is no train split to draw the shots from")
    pairs = zip(table.rows, table.places, strict=True)
    checked = [format.check_row(row, place) for row, place in pairs]
    generator = random.Random(seed)
    chosen: list[int] = []
    for label in format.labels:
        groups = _alike(checked, label)
        if len(groups) <= shots // n_labels:
            raise InputError(
                f"{name}: shots={shots}: train has only {len(groups)} rows with label "
                f"{label!r} that differ, and one must remain. Use fewer shots."
            )
        chosen += [group[0] for group in generator.sample(groups, shots // n_labels)]
    generator.shuffle(chosen)
    shown = [format.solved(*checked[i]) for i in chosen]
    format = replace(format, prefix="".join(f"{example}\n\n" for example in shown))
    drawn = [checked[i] for i in chosen]
    rest = [i for i, own in enumerate(checked) if own not in drawn]
    solved = [(format.render(texts), label) for texts, label in drawn]
    return format, table.pick(rest), solved
