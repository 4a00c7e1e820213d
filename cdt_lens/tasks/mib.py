"""Load the tasks of MIB's circuit track (arXiv 2504.13151): IOI, arithmetic, MCQA and ARC.

The data are `mib-bench/...` on the Hugging Face hub, or a folder with the same parquet or JSON
files. Prompts, pairs and candidates are those of MIB's evaluation (`MIB_circuit_track/dataset.py`
of hannamw/MIB-circuit-track), so that the task direction is MIB's logit difference:

1. A row holds a prompt and, in columns of their own, counterfactuals: records with a prompt and its
   answer. Each task has one counterfactual that MIB evaluates on. Its prompt becomes the example's
   pair.
2. The candidates are two tokens: the first token of the row's answer, and that of a wrong answer.
   In IOI the wrong answer is the subject. In the other tasks it is the answer of the
   counterfactual. The words are read as MIB reads them, names with a space before them and symbols
   and numbers without.
3. Rows whose words have other numbers of tokens than MIB allows are left out, and so are rows whose
   two candidates are the same token, where the direction is 0 by definition.
4. All examples have one label, so that a label-balanced mean is the plain mean that MIB takes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from cdt_lens.core import display
from cdt_lens.core.errors import InputError, did_you_mean
from cdt_lens.tasks.prompts import context_limit, encode, with_bos
from cdt_lens.tasks.rows import SPLITS, Table, hub_tables
from cdt_lens.tasks.task import Example, Examples, Task

LABEL = "answer"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Words:
    """The words of one row, as they are tokenised.

    Attributes:
        answer: the answer of the prompt.
        other: the wrong answer that competes with it.
        pair_answer: the answer of the counterfactual prompt.
        alike: further words that must have as many tokens.
    """

    answer: str
    other: str
    pair_answer: str
    alike: tuple[str, ...] = ()


@dataclass(frozen=True)
class MibTask:
    """One task of MIB.

    Attributes:
        sources: the data set on the hub and its configuration, by the name that the user gives.
            The first is the default if it has the name None.
        columns: the columns that are read, besides the counterfactual's.
        pair: the counterfactual that MIB evaluates on.
        words: returns the words of a row, or None for a row that MIB leaves out.
        single: whether the words must be single tokens. Otherwise their numbers must be equal.
    """

    sources: Mapping[str | None, tuple[str, str | None]]
    columns: tuple[str, ...]
    pair: str
    words: Callable[[Row, str, str], _Words | None]
    single: bool = False


def _ioi(row: Row, pair: str, place: str) -> _Words:
    names = [
        f" {_field(row, place, 'metadata', name)}"
        for name in ("indirect_object", "subject", "random_c")
    ]
    number = _field(row, place, pair, "answerKey")
    answer = _item(_field(row, place, pair, "choices"), number, f"{place}, {pair}.choices")
    return _Words(names[0], names[1], f" {answer}", (names[2],))


def _choice(row: Row, pair: str, place: str) -> _Words:
    own, other = (
        str(
            _item(
                _field(row, place, *path, "choices", "label"),
                _field(row, place, *path, "answerKey"),
                f"{place}, {'.'.join((*path, 'choices', 'label'))}",
            )
        )
        for path in ((), (pair,))
    )
    return _Words(own, other, other)


def _sum(row: Row, pair: str, place: str) -> _Words | None:
    given = row[pair]
    if given is not None and not isinstance(given, Mapping):
        raise InputError(
            f"{place}: pair={pair!r}: expected a column that holds a counterfactual with its "
            f"label, got {display.short(str(given))}"
        )
    if given is None or given.get("prompt") is None:
        return None
    other = str(_field(row, place, pair, "label"))
    return _Words(str(_field(row, place, "label")), other, other)


_MCQA = "mib-bench/copycolors_mcqa"
_CHOICES: dict[str | None, tuple[str, str | None]] = {None: (_MCQA, "4_answer_choices")}
_CHOICES |= {f"{n}_answer_choices": (_MCQA, f"{n}_answer_choices") for n in range(2, 11)}
_OPERATORS = {"addition": "+", "subtraction": "-"}
MIB_TASKS: Mapping[str, MibTask] = MappingProxyType(
    {
        "mib-ioi": MibTask(
            {None: ("mib-bench/ioi", None)}, ("prompt", "metadata"), "s2_io_flip_counterfactual",
            _ioi,
        ),
        "mib-arithmetic": MibTask(
            {name: (f"mib-bench/arithmetic_{name}", None) for name in _OPERATORS},
            ("prompt", "label", "operator"), "random_counterfactual", _sum, single=True,
        ),
        "mib-mcqa": MibTask(
            _CHOICES, ("prompt", "choices", "answerKey"),
            "symbol_counterfactual", _choice,
        ),
        "mib-arc": MibTask(
            {name: (f"mib-bench/arc_{name}", None) for name in ("easy", "challenge")},
            ("prompt", "choices", "answerKey"), "symbol_counterfactual", _choice,
        ),
    }
)  # fmt: skip


def load_mib_task(
    name: str,
    config: str | None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path | None = None,
    pair: str | None = None,
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    revision: str | None = None,
) -> Task:
    """Load one of MIB's tasks, see `load_task`.

    Args:
        name: "mib-ioi", "mib-arithmetic", "mib-mcqa" or "mib-arc".
        config: "addition" or "subtraction" of "mib-arithmetic", "easy" or "challenge" of "mib-arc",
            a number of choices such as "4_answer_choices" of "mib-mcqa".
        tokenizer: the model's tokenizer.
        folder: folder with the files of the data set, or with a folder of its name. None reads the
            hub.
        pair: name of the counterfactual. None takes the one that MIB evaluates on.
        prepend_bos: whether to prepend BOS. None prepends it if the tokenizer has one.
        max_length: maximum number of tokens of a prompt. None uses the tokenizer's limit.
        limit: number of rows to draw from each split. None takes all.
        seed: seed of the draw.
        revision: revision of the data set on the hub.

    Returns:
        The task, whose examples have counterfactual prompts.

    Raises:
        InputError: the configuration is unknown, the data cannot be read, a field is missing, a
            prompt is too long, or no row of a split can be used with this tokenizer.
    """
    known = MIB_TASKS[name]
    if config not in known.sources:
        names = [each for each in known.sources if each is not None]
        expected = f"one of {', '.join(names)}" if names else "none"
        raise InputError(
            f"task {name!r}: config={config!r}: expected {expected}"
            f"{did_you_mean(config or '', names)}"
        )
    title = name if config is None else f"{name}/{config}"
    pair = known.pair if pair is None else pair
    tables = _tables(name, known.sources[config], (*known.columns, pair), folder, revision)
    make = _Maker(
        tokenizer, known, pair, _OPERATORS.get(config or ""), prepend_bos,
        context_limit(tokenizer, max_length),
    )  # fmt: skip
    splits = {part: Examples((), (LABEL,), f"{title}/{part}") for part in SPLITS}
    for part, table in tables.items():
        items = make.examples(table, splits[part].name, limit, seed)
        splits[part] = Examples(items, (LABEL,), splits[part].name)
    return Task(
        name=title, labels=(LABEL,), verbalizer={}, verbalizer_ids={}, template="{prompt}",
        train=splits["train"], valid=splits["valid"], test=splits["test"],
        content_free=Examples((), (LABEL,), f"{title}/content-free"), max_length=max_length,
    )  # fmt: skip


@dataclass(frozen=True)
class _Maker:
    """Makes examples of rows.

    Attributes:
        tokenizer: the model's tokenizer.
        task: the task.
        pair: name of the counterfactual.
        operator: the operator of the rows to take, or None.
        prepend_bos: whether to prepend BOS, as for `bos_ids`.
        longest: maximum number of tokens of a prompt.
    """

    tokenizer: PreTrainedTokenizerBase
    task: MibTask
    pair: str
    operator: str | None
    prepend_bos: bool | None
    longest: int

    def examples(
        self, table: Table, name: str, limit: int | None, seed: int
    ) -> tuple[Example, ...]:
        """Return the examples of a split, or of `limit` of its usable rows.

        Raises:
            InputError: no row can be used.
        """
        usable = self._usable(table)
        if not usable:
            raise InputError(
                f"{name}: none of {len(table.rows)} rows can be used: the tokenizer writes the "
                "answers with other numbers of tokens than MIB's evaluation allows"
            )
        size = len(usable) if limit is None else min(limit, len(usable))
        rows = [usable[i] for i in sorted(random.Random(seed).sample(range(len(usable)), size))]
        prompts = [
            [_text(table, i, "prompt") for i, _ in rows],
            [_text(table, i, self.pair, "prompt") for i, _ in rows],
        ]
        own, paired = (self._tokens(texts, [table.places[i] for i, _ in rows]) for texts in prompts)
        return tuple(
            self._example(table.places[i], candidates, texts, ids)
            for (i, candidates), texts, ids in zip(
                rows, zip(*prompts, strict=True), zip(own, paired, strict=True), strict=True
            )
        )

    def _usable(self, table: Table) -> list[tuple[int, tuple[int, int, int]]]:
        """Return the rows that can be used, with the first tokens of their words."""
        words: dict[int, _Words] = {}
        for i, (row, place) in enumerate(zip(table.rows, table.places, strict=True)):
            if self.operator is not None and row["operator"] != self.operator:
                continue
            found = self.task.words(row, self.pair, place)
            if found is not None:
                words[i] = found
        texts = list(dict.fromkeys(text for each in words.values() for text in _all(each)))
        ids = dict(zip(texts, encode(self.tokenizer, texts), strict=True))
        usable = []
        for i, each in words.items():
            lengths = {len(ids[text]) for text in (each.answer, each.other, *each.alike)}
            first = [ids[text][0] for text in _all(each)[:3] if ids[text]]
            fits = lengths == {1} if self.task.single else len(lengths) == 1
            if fits and len(first) == 3 and first[0] != first[1]:
                usable.append((i, (first[0], first[1], first[2])))
        return usable

    def _tokens(self, texts: Sequence[str], places: Sequence[str]) -> list[tuple[int, ...]]:
        pieces = encode(self.tokenizer, texts)
        tokens = [with_bos(self.tokenizer, ids, self.prepend_bos) for ids in pieces]
        for ids, place in zip(tokens, places, strict=True):
            if len(ids) > self.longest:
                raise InputError(
                    f"{place}: the prompt has {len(ids)} tokens, the limit is {self.longest}. "
                    "Remove the row, or raise max_length if the model's context allows it."
                )
        return tokens

    @staticmethod
    def _example(
        place: str,
        candidates: tuple[int, int, int],
        texts: tuple[str, ...],
        ids: tuple[tuple[int, ...], ...],
    ) -> Example:
        answer, other, paired = candidates
        # A counterfactual whose answer is the prompt's has the same competitor.
        others = (other if paired == answer else answer,)
        pair = Example(texts[1], ids[1], LABEL, (paired,), others, place=place)
        return Example(texts[0], ids[0], LABEL, (answer,), (other,), place=place, pair=pair)


def _all(words: _Words) -> tuple[str, ...]:
    return (words.answer, words.other, words.pair_answer, *words.alike)


def _tables(
    name: str,
    source: tuple[str, str | None],
    columns: Sequence[str],
    folder: str | Path | None,
    revision: str | None,
) -> dict[str, Table]:
    repo, config = source
    options: dict[str, Any] = {"label_columns": (), "label_names": None, "splits": None}
    if folder is None:
        return hub_tables(
            repo, config, columns=columns, revision=revision, data_dir=None, **options
        )
    if revision is not None:
        raise InputError(f"task {name!r} is read from a folder: revision does not apply")
    own = repo.rpartition("/")[2]
    bases = [Path(folder, own), Path(folder, name, own), Path(folder, name), Path(folder)]
    base = next((place for place in bases if place.is_dir()), None)
    if base is None:
        raise InputError(
            f"folder {folder}: no such folder; expected the files of {repo}, or a folder {own}"
        )
    # A configuration is a folder of the data set, as on the hub.
    inside = config if config is not None and (base / config).is_dir() else None
    if inside is None:
        _check_alone(base, name, source)
    return hub_tables(str(base), None, columns=columns, revision=None, data_dir=inside, **options)


def _check_alone(base: Path, name: str, source: tuple[str, str | None]) -> None:
    """Check a folder that `datasets` reads whole, with the folders in it.

    Raises:
        InputError: it is or holds the folder of another data set or configuration, or it has no
            files of the configuration.
    """
    repo, config = source
    own = repo.rpartition("/")[2]
    known: set[str | None] = set(MIB_TASKS)
    for task in MIB_TASKS.values():
        for other, part in task.sources.values():
            known |= {other.rpartition("/")[2], part}
    names = {base.resolve().name, *(each.name for each in base.iterdir() if each.is_dir())}
    got = display.few(sorted(names & known - {name, own, config}), 4)
    if not got and config is not None:
        files = [*base.glob("*.parquet"), *base.glob("*.json*")]
        got = "" if files else "no parquet or JSON files"
    if got:
        wanted = config or own
        asked = repo if config is None else f"{repo}/{config}"
        raise InputError(
            f"task {name!r}, folder {base}: expected a folder {wanted}, or only files of {asked}, "
            f"got {got}. Put the files of {asked} into {base / wanted}, or give their own folder."
        )


def _field(row: Row, place: str, *path: str) -> Any:
    """Return a field of a row, or of a record in it.

    Raises:
        InputError: it is missing. The message names the place and the field.
    """
    value: Any = row
    for name in path:
        if not isinstance(value, Mapping) or value.get(name) is None:
            raise InputError(f"{place}: no field {'.'.join(path)!r}, which MIB's data have")
        value = value[name]
    return value


def _text(table: Table, number: int, *path: str) -> str:
    return str(_field(table.rows[number], table.places[number], *path))


def _item(values: Any, number: Any, where: str) -> Any:
    """Return one of the values of a list.

    Raises:
        InputError: there is no such one.
    """
    if (
        not isinstance(values, list)
        or not isinstance(number, int)
        or number not in range(len(values))
    ):
        raise InputError(f"{where}: expected a list with item {number!r}, got {values!r}")
    return values[number]
