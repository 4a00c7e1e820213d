"""Define `Task`, `Examples` and `Batch`: prompts with their labels and candidate tokens.

The answer is the gold label's token, and the tokens of the other labels compete with it. The task
direction of an example is d = logit[answer] - mean logit[others], in logits (docs/method/task.md;
single-token labels as in CT-SFT, arXiv 2601.08146). Where some candidates have several tokens, the
log-probabilities of the whole words take the place of the logits (`models/words.py`). `prompts.py`
creates the examples. This file stores, balances and batches them.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import groupby
from typing import Annotated, Any, overload

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cdt_lens.core import display
from cdt_lens.core.artifacts import content_hash
from cdt_lens.core.checked import Checked, checked_arguments, whole_number
from cdt_lens.core.choices import Count, Seed
from cdt_lens.core.errors import CdtLensWarning, InputError, SplitWordError
from cdt_lens.models.view import ModelView
from cdt_lens.models.words import Candidates, Words, ask

# The token id of a candidate, or the ids of a word of several tokens.
WordIds = int | tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """One prompt with its answer tokens and the tokens that compete with them.

    The task direction is the mean logit of `answers` minus the mean logit of `others`, in logits.
    Positive values are towards the gold label.

    A candidate of several tokens is a tuple of their ids: `answers=((5, 6),)` is one word, and
    `answers=(5, 6)` are two answers of one token. If a candidate has several tokens, all candidates
    are compared by their log-probability instead of their logit.

    Attributes:
        prompt: the text.
        tokens: token ids of the prompt, BOS included.
        label: the gold label.
        answers: the candidates that are correct.
        others: the candidates that compete with the answers.
        fields: the columns of the row.
        place: name of the row in error messages, or "".
        pair: the counterfactual prompt, or None. Its label is the example's where its own is not
            known.

    Lists of ids become tuples, whole numbers of numpy and torch become Python's, and a word of one
    token becomes its id.

    Raises:
        InputError: there is no token, no answer or no competitor, a candidate occurs twice or
            begins with another one, ids are not a sequence of whole numbers, or the pair is no
            `Example`.
    """

    prompt: str
    tokens: tuple[int, ...]
    label: str
    answers: tuple[WordIds, ...]
    others: tuple[WordIds, ...]
    fields: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    place: str = field(default="", compare=False, repr=False)
    pair: Example | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", _ids("tokens", self.tokens, self.prompt))
        for name in ("answers", "others"):
            object.__setattr__(self, name, _words(name, getattr(self, name), self.prompt))
        candidates = self.candidates
        if not self.tokens:
            raise InputError(f"prompt {self.prompt!r}: it has no tokens. Give it some text.")
        if self.pair is not None and not isinstance(self.pair, Example):
            raise InputError(
                f"prompt {self.prompt!r}: pair: expected an Example or None, got "
                f"{type(self.pair).__name__}"
            )
        if not self.answers or not self.others or len(set(candidates)) < len(candidates):
            raise InputError(
                f"prompt {self.prompt!r}: expected at least one answer and one other token, all "
                f"different; got answers {self.answers} and others {self.others}"
            )
        covered = beginning(candidates)
        if covered is not None:
            raise InputError(
                f"prompt {self.prompt!r}: the candidate {covered[1]} begins with the candidate "
                f"{covered[0]}, so that its score is never higher. Choose other candidates"
            )

    @property
    def candidates(self) -> tuple[WordIds, ...]:
        """The answers, then the others."""
        return self.answers + self.others

    @property
    def length(self) -> int:
        """Number of tokens that the model reads: the prompt and a candidate without its last."""
        return len(self.tokens) + max(map(_size, self.candidates)) - 1

    def __repr__(self) -> str:
        summary = f"{self.label}; {len(self.tokens)} tokens"
        return display.line(self, display.short(self.prompt), summary)

    def _repr_html_(self) -> str:
        return Examples((self,), (self.label,), "example")._repr_html_()


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples as tensors, padded on the right, where causal attention never reaches.

    There is one row for each example. Where candidates have several tokens, an example has a row
    for its prompt with the first tokens of each word (`models/words.py`).

    Attributes:
        tokens: token ids of each row.
        lengths: number of real tokens of each row. The answer is read at position `lengths - 1`,
            and where `Words` say.
        candidates: token ids of the answers, then of the others, then the first candidate again as
            padding. `Words` where candidates have several tokens.
        direction: +1/n on answers, -1/n on others and 0 on padding.
            `(direction * logits at candidates).sum()` is the task direction in logits.
        is_answer: True at the answers.
        is_candidate: True at the answers and the others, False at padding.
        label_index: position of each gold label in `Examples.labels`.
        index: position of each example in the split.
    """

    tokens: Int[Tensor, "row pos"]
    lengths: Int[Tensor, " row"]
    candidates: Candidates
    direction: Float[Tensor, "batch k"]
    is_answer: Bool[Tensor, "batch k"]
    is_candidate: Bool[Tensor, "batch k"]
    label_index: Int[Tensor, " batch"]
    index: tuple[int, ...]

    def to(self, device: torch.device | str) -> Batch:
        """Move the batch to a device.

        Args:
            device: the device.

        Returns:
            The same batch with its tensors on `device`.
        """
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        moved: dict[str, Any] = {
            k: v.to(device) if isinstance(v, Tensor | Words) else v for k, v in values.items()
        }
        return Batch(**moved)

    @property
    def prompt_lengths(self) -> Int[Tensor, " row"]:
        """Number of tokens of each row's prompt, without those of a word behind it."""
        words = self.candidates
        return self.lengths - words.added if isinstance(words, Words) else self.lengths

    @property
    def counted(self) -> Bool[Tensor, "row pos"]:
        """True at the real positions, in one row only where several rows begin alike."""
        positions = torch.arange(self.tokens.shape[1], device=self.lengths.device)
        real = positions < self.lengths[:, None]
        if not isinstance(self.candidates, Words):
            return real
        return real & (positions >= self.candidates.seen[:, None])

    @property
    def firsts(self) -> Bool[Tensor, " row"]:
        """True at the first row of each example."""
        words = self.candidates
        if isinstance(words, Words):
            return words.seen == 0
        return torch.ones_like(self.lengths, dtype=torch.bool)

    def is_word(self, word: WordIds) -> Bool[Tensor, "batch k"]:
        """Return which candidates are a word.

        Args:
            word: the token id of the word, or its ids.
        """
        found = self.candidates
        if isinstance(found, Words):
            return found.are(word)
        return found == (word if isinstance(word, int) else -1)

    def for_rows(self, values: Tensor) -> Tensor:
        """Repeat values of examples for each of their rows.

        Args:
            values: `[example, ...]`.

        Returns:
            `[row, ...]`.
        """
        words = self.candidates
        return values[words.example.to(values.device)] if isinstance(words, Words) else values

    def by_example(self, values: Tensor) -> Tensor:
        """Add up the values of each example's rows.

        Args:
            values: `[row, ...]`.

        Returns:
            `[example, ...]`.
        """
        words = self.candidates
        if not isinstance(words, Words):
            return values
        total = values.new_zeros(len(self.index), *values.shape[1:])
        return total.index_add(0, words.example.to(values.device), values)


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """One split of a task, as a sequence of `Example`.

    Attributes:
        items: the examples.
        labels: the labels. `Batch.label_index` counts in this order.
        name: name of the split, such as "toy/train".

    Lists of items and labels become tuples.

    Raises:
        InputError: an item is no `Example`, has another label, or has candidates of one token
            where those of others have several.
    """

    items: tuple[Example, ...]
    labels: tuple[str, ...]
    name: str
    _advice = "give a split, such as task.train; Examples(items, labels, name) makes one"

    def __post_init__(self) -> None:
        for name in ("items", "labels"):
            object.__setattr__(self, name, _as_tuple(f"{self.name}: {name}", getattr(self, name)))
        for number, item in enumerate(self.items):
            if not isinstance(item, Example):
                raise InputError(
                    f"{self.name}: item {number} is {type(item).__name__}, expected Example"
                )
        unknown = {item.label for item in self.items} - set(self.labels)
        if unknown:
            raise InputError(f"{self.name}: labels {sorted(unknown)} are not among {self.labels}")
        if self.has_words and not all(map(_has_words, self.items)):
            number = [_has_words(item) for item in self.items].index(False)
            raise InputError(
                f"{self.name}: all candidates of example {number} have one token, and those of "
                "others several, so their directions cannot be compared. Make two splits of them."
            )

    def __repr__(self) -> str:
        return display.line(self, self.name, f"{len(self)} examples", self.counts)

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row for each example: prompt, label, and numbers of tokens and candidates."""
        return examples_frame(self)

    def _repr_html_(self) -> str:
        counts = ", ".join(f"{n} {label}" for label, n in self.counts.items())
        return display.html(f"{self.name}: {len(self)} examples ({counts})", self.to_dataframe())

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return replace(self, items=self.items[index])
        return self.items[index]

    @property
    def counts(self) -> dict[str, int]:
        """Number of examples of each label."""
        counter = Counter(item.label for item in self.items)
        return {label: counter[label] for label in self.labels}

    @property
    def pairs(self) -> Examples:
        """The counterfactual prompts of the examples, in the same order.

        Raises:
            InputError: an example has none.
        """
        found = tuple(item.pair for item in self.items if item.pair is not None)
        if len(found) < len(self):
            raise InputError(
                f"{self.name}: {len(self) - len(found)} of {len(self)} examples have no "
                "counterfactual prompt. Name the column that holds it with pair= (on the command "
                "line --pair)."
            )
        return replace(self, items=found, name=f"{self.name} (pairs)")

    @property
    def chance(self) -> float:
        """Accuracy of always choosing the most frequent label, from 0 to 1."""
        self.require_some()
        return max(self.counts.values()) / len(self)

    @property
    def guess(self) -> float:
        """Accuracy of an answer that is drawn at random from the candidates, from 0 to 1."""
        self.require_some()
        shares = [len(i.answers) / (len(i.answers) + len(i.others)) for i in self.items]
        return sum(shares) / len(shares)

    @cached_property
    def has_words(self) -> bool:
        """Whether some candidates have several tokens."""
        return any(map(_has_words, self.items))

    @checked_arguments
    def require_one_token(self, what: str, instead: str = "") -> None:
        """Refuse candidates of several tokens.

        Args:
            what: what has no meaning for them.
            instead: what can be used in its place.

        Raises:
            SplitWordError: some candidates have several tokens.
        """
        if not self.has_words:
            return
        word = next(c for item in self.items for c in item.candidates if _size(c) > 1)
        raise SplitWordError(
            f"{self.name}: {what} needs answers of one token each, and here the tokenizer splits "
            f"one into {list(word) if isinstance(word, tuple) else word}. Choose label words of "
            f"one token{instead and f', or use {instead}'}."
        )

    @cached_property
    def hash(self) -> str:
        """The sha256 over tokens, label, answers and others of every example, in order."""
        rows = [(item.tokens, item.label, item.answers, item.others) for item in self.items]
        return content_hash(rows)

    @checked_arguments
    def take(self, n: Count) -> Examples:
        """Return the first examples.

        Args:
            n: number of examples. Where there are fewer, all are returned.

        Returns:
            The examples.

        Raises:
            InputError: `n` is below 1, or there are no examples.
        """
        self.require_some()
        return self[:n]

    @checked_arguments
    def balanced(self, n: int | None = None, *, seed: Seed = 0) -> Examples:
        """Draw the same number of examples of each label, in the order of the data.

        Args:
            n: number of examples of all labels together, rounded down to a multiple of the number
                of labels. None draws as many as the rarest label allows.
            seed: seed of the draw.

        Returns:
            The examples.

        Raises:
            InputError: there are no examples, or too few of a label.
        """
        self.require_some()
        rarest, most = min(self.counts.items(), key=lambda pair: pair[1])
        if not most:
            raise InputError(
                f"{self.name}: no example has the label {rarest!r}, so none can be balanced over "
                f"{len(self.labels)} labels"
            )
        per_label = most if n is None else n // len(self.labels)
        if not 1 <= per_label <= most:
            raise InputError(
                f"{self.name}: cannot draw {n} examples balanced over {len(self.labels)} labels: "
                f"label {rarest!r} has {most}; n may be {len(self.labels)} to "
                f"{most * len(self.labels)}."
            )
        generator = random.Random(seed)
        chosen: list[int] = []
        for label in self.labels:
            positions = [i for i, item in enumerate(self.items) if item.label == label]
            chosen += generator.sample(positions, per_label)
        return replace(self, items=tuple(self.items[i] for i in sorted(chosen)))

    @checked_arguments
    def batches(
        self,
        batch_size: Count,
        *,
        sort_by_length: bool = True,
        pad_id: int = 0,
        shard: tuple[int, int] = (0, 1),
        apart: int | None = None,
    ) -> Iterator[Batch]:
        """Iterate over the examples in batches, each example once.

        Args:
            batch_size: maximum number of examples in a batch.
            sort_by_length: whether to begin with the longest prompts, so that a lack of memory
                shows at the start.
            pad_id: token id of the padding.
            shard: `(rank, world)` selects every world-th example from `rank` on. The shards
                partition the split.
            apart: prompts of more tokens than this share no batch with others. A model with
                longrope, whose `ModelView.longrope_limit` this is, reads the two differently.

        Returns:
            An iterator over the batches.

        Raises:
            InputError: there are no examples, or an argument is out of range.
        """
        self.require_some()
        rank, world = shard
        if not 0 <= rank < world:
            raise InputError(
                f"{self.name}: shard {shard}: expected (rank, world) with 0 <= rank < world"
            )
        order = list(range(len(self)))
        if sort_by_length:
            order.sort(key=lambda i: self.items[i].length, reverse=True)
        order = order[rank::world]
        alike = groupby(order, lambda i: apart is not None and self.items[i].length > apart)
        groups = [tuple(group) for _, group in alike]
        return (
            self._collate(group[i : i + batch_size], pad_id)
            for group in groups
            for i in range(0, len(group), batch_size)
        )

    @checked_arguments
    def one_batch(self, apart: int | None = None) -> Batch:
        """Return all examples as one batch, in their order.

        Args:
            apart: see `batches`.

        Returns:
            The batch.

        Raises:
            InputError: there are no examples, or some have more than `apart` tokens and some not.
        """
        batch, *others = self.batches(len(self), sort_by_length=False, apart=apart)
        if others:
            raise InputError(
                f"{self.name}: some prompts have more than {apart} tokens, which this model reads "
                "with other rotary factors (longrope) than shorter ones. Pass them in two calls."
            )
        return batch

    def require_some(self) -> None:
        """Check that the split is not empty.

        Raises:
            InputError: there are no examples.
        """
        if not self.items:
            raise InputError(f"{self.name}: no examples; load this split or use another one.")

    def _collate(self, index: tuple[int, ...], pad_id: int) -> Batch:
        items = [self.items[i] for i in index]
        width = max(len(item.answers) + len(item.others) for item in items)

        def padded(rows: Iterable[Sequence[float | int]], value: int = 0) -> Tensor:
            return pad_sequence([torch.tensor(row) for row in rows], True, value)

        candidates = [c + c[:1] * (width - len(c)) for c in (item.candidates for item in items)]
        sides = [(len(item.answers), len(item.others)) for item in items]
        rows = [item.tokens for item in items]
        rows, read = ask(rows, candidates) if self.has_words else (rows, torch.tensor(candidates))
        return Batch(
            tokens=padded(rows, pad_id),
            lengths=torch.tensor([len(row) for row in rows]),
            candidates=read,
            direction=padded([1 / a] * a + [-1 / o] * o for a, o in sides),
            is_answer=padded([True] * a + [False] * o for a, o in sides),
            is_candidate=padded([True] * (a + o) for a, o in sides),
            label_index=torch.tensor([self.labels.index(item.label) for item in items]),
            index=index,
        )


def _ids(name: str, ids: Any, prompt: object) -> tuple[int, ...]:
    """Return token ids as a tuple of Python's whole numbers."""
    if not isinstance(ids, list | tuple):
        raise InputError(
            f"prompt {prompt!r}: {name}: expected token ids such as (5, 6), got "
            f"{type(ids).__name__}; ids.tolist() gives those of one prompt in a tensor"
        )
    if all(type(id) is int for id in ids):
        return tuple(ids)
    numbers = tuple(map(whole_number, ids))
    if None in numbers:
        wrong = ids[numbers.index(None)]
        raise InputError(f"prompt {prompt!r}: {name}: {wrong!r} is no token id")
    return numbers  # type: ignore[return-value]


def _words(name: str, words: Any, prompt: object) -> tuple[WordIds, ...]:
    """Return candidates, each of them one id or a tuple of several."""
    if not isinstance(words, list | tuple) or not any(isinstance(w, list | tuple) for w in words):
        return _ids(name, words, prompt)
    ids = [_ids(name, word if isinstance(word, list | tuple) else [word], prompt) for word in words]
    if not all(ids):
        raise InputError(f"prompt {prompt!r}: {name}: a candidate has no tokens")
    return tuple(word[0] if len(word) == 1 else word for word in ids)


def _size(candidate: WordIds) -> int:
    return len(candidate) if isinstance(candidate, tuple) else 1


def _has_words(item: Example) -> bool:
    return any(isinstance(candidate, tuple) for candidate in item.candidates)


def beginning(candidates: Sequence[WordIds]) -> tuple[WordIds, WordIds] | None:
    """Return a candidate and one that begins with its tokens, or None.

    The second one cannot be the answer: its log-probability is never higher.

    Args:
        candidates: the token ids of different candidates.
    """
    if not any(isinstance(c, tuple) for c in candidates):
        return None
    tuples = [c if isinstance(c, tuple) else (c,) for c in candidates]
    for first, one in zip(candidates, tuples, strict=True):
        for second, other in zip(candidates, tuples, strict=True):
            if len(one) < len(other) and other[: len(one)] == one:
                return first, second
    return None


def _as_tuple(where: str, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise InputError(f"{where}: expected a tuple, got {type(values).__name__}")
    return tuple(values)


@dataclass(frozen=True)
class Task(Checked):
    """The splits of one classification task.

    Attributes:
        name: name of the task.
        labels: the labels, shared by all splits.
        verbalizer: the answer word of each label. Empty for generated tasks whose answers differ
            from prompt to prompt.
        verbalizer_ids: token id of each label's word, or the ids of a word of several tokens.
        template: the prompt's template.
        train: the training split. A split that the data lack is empty.
        valid: the validation split.
        test: the test split.
        content_free: prompts for label-prior calibration. Their candidates are in the order of
            `labels`, and their own label has no meaning.
        prior: calibrated logit of each label on content-free prompts, or None.
        prefix: the few-shot examples before every prompt.
        max_length: maximum number of tokens of a prompt. None means the tokenizer's limit.
        truncate: whether prompts that are too long were shortened.

    Raises:
        InputError: a split has other labels.
    """

    name: str
    labels: Annotated[tuple[str, ...], Field(strict=False)]
    verbalizer: Mapping[str, str]
    verbalizer_ids: Mapping[str, WordIds]
    template: str
    train: Examples
    valid: Examples
    test: Examples
    content_free: Examples
    prior: Mapping[str, float] | None = None
    prefix: str = ""
    max_length: int | None = None
    truncate: bool = False
    _advice = "load_task or task_from_files makes one"

    def __post_init__(self) -> None:
        super().__post_init__()
        for split in (self.train, self.valid, self.test, self.content_free):
            if split.labels != self.labels:
                raise InputError(
                    f"task {self.name}: {split.name} has labels {split.labels}, expected "
                    f"{self.labels}. Build every split with the same verbalizer."
                )

    def __repr__(self) -> str:
        splits = (("train", self.train), ("valid", self.valid), ("test", self.test))
        sizes = ", ".join(f"{len(split)} {name}" for name, split in splits)
        return display.line(self, self.name, display.few(self.labels), sizes)

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row for each split, with the number of examples and of each label."""
        return counts_frame((self.train, self.valid, self.test))

    def _repr_html_(self) -> str:
        words = [f"{label} = {word!r}" for label, word in self.verbalizer.items()]
        title = f"Task {self.name}: {self.template!r} {display.few(words)}"
        shown = [split._repr_html_() for split in (self.train[:3],) if len(split)]
        return display.html(title, self.to_dataframe(), *shown)

    @cached_property
    def hash(self) -> str:
        """The sha256 over everything that changes a number, which is all but the name."""
        return content_hash(
            {
                "labels": self.labels,
                "verbalizer": dict(self.verbalizer),
                "verbalizer_ids": dict(self.verbalizer_ids),
                "template": self.template,
                "prefix": self.prefix,
                "prior": None if self.prior is None else dict(self.prior),
                "splits": [s.hash for s in (self.train, self.valid, self.test, self.content_free)],
            }
        )

    @checked_arguments
    def not_held_out(self, name: str = "valid") -> str:
        """Return a sentence that says if every example of a split is also in `train`, or "".

        Args:
            name: the split to judge on, "valid" or "test".
        """
        if name not in ("valid", "test"):
            raise InputError(f"name={name!r}: expected valid or test")
        held_out: Examples = getattr(self, name)
        train = {(item.tokens, item.label) for item in self.train}
        if not len(held_out) or any((item.tokens, item.label) not in train for item in held_out):
            return ""
        return (
            f"{held_out.name}: all {len(held_out)} examples are also in {self.train.name}, so "
            "nothing measured on them holds for other data. Give other examples, or divide one "
            "file into train and valid with split=0.2."
        )

    @checked_arguments
    def warn_unless_held_out(self, name: str = "valid") -> None:
        """Warn with `CdtLensWarning` where `not_held_out` has something to say.

        Args:
            name: the split to judge on, "valid" or "test".
        """
        caution = self.not_held_out(name)
        if caution:
            warnings.warn(caution, CdtLensWarning, stacklevel=1)

    @checked_arguments
    def require_held_out(self, name: str = "valid") -> None:
        """Refuse a split of training examples, as every command does.

        Args:
            name: the split to judge on, "valid" or "test".

        Raises:
            InputError: every example of the split is also in `train`.
        """
        caution = self.not_held_out(name)
        if caution:
            raise InputError(caution)

    @checked_arguments
    def with_prior(self, prior: Mapping[str, float]) -> Task:
        """Return this task with a calibration of its labels.

        Accuracy then compares candidate logits (or scores of words) minus `candidate_prior` (arXiv
        2102.09690). The task direction does not change: there the prior is a constant for each gold
        label, which cancels in every difference between two runs.

        Args:
            prior: logit of each label on content-free prompts.

        Returns:
            The task with this prior.

        Raises:
            InputError: the task has no verbalizer, a label is missing, or a value is not finite.
        """
        if not self.verbalizer_ids:
            raise InputError(f"task {self.name}: it has no verbalizer, so labels have no prior")
        if set(prior) != set(self.labels):
            raise InputError(
                f"task {self.name}: expected a finite prior for each of {', '.join(self.labels)}; "
                f"got {dict(prior)}"
            )
        return replace(self, prior={label: float(prior[label]) for label in self.labels})

    def candidate_prior(self, batch: Batch) -> Float[Tensor, "batch k"]:
        """Return the offsets to subtract from the candidates' logits before comparing them.

        Args:
            batch: the prompts.

        Returns:
            The prior of each candidate, in logits. 0 without a prior.
        """
        offsets = torch.zeros_like(batch.direction)
        for label, value in (self.prior or {}).items():
            offsets[batch.is_word(self.verbalizer_ids[label])] = value
        return offsets


def check_examples(view: ModelView, examples: Examples) -> None:
    """Check that there are examples and that a model has all of their tokens.

    Args:
        view: the model.
        examples: the split to check.

    Raises:
        InputError: the split is empty, or a prompt or a candidate has a token id that the model
            does not have.
    """
    examples.require_some()
    for number, item in enumerate(examples):
        ids = [*item.tokens]
        for candidate in item.candidates:
            ids += candidate if isinstance(candidate, tuple) else (candidate,)
        if min(ids) < 0 or max(ids) >= view.d_vocab:
            wrong = next(id for id in ids if not 0 <= id < view.d_vocab)
            raise InputError(
                f"{examples.name}: example {number} has the token id {wrong}; {view.name} has the "
                f"ids 0 to {view.d_vocab - 1}. Make the examples with the tokenizer of this model."
            )


def examples_frame(examples: Examples) -> pd.DataFrame:
    """Return a split as a table.

    Args:
        examples: the split.

    Returns:
        One row for each example: prompt, label, and numbers of tokens, answers and others.
    """
    rows = [
        (e.prompt, e.label, len(e.tokens), len(e.answers), len(e.others)) for e in examples.items
    ]
    return pd.DataFrame(rows, columns=["prompt", "label", "tokens", "answers", "others"])


def counts_frame(splits: Sequence[Examples]) -> pd.DataFrame:
    """Return the sizes of splits as a table.

    Args:
        splits: the splits.

    Returns:
        One row for each split: its name, the number of examples, and the number of each label.
    """
    return pd.DataFrame([{"split": s.name, "examples": len(s), **s.counts} for s in splits])


def most_balanced(examples: Examples) -> int:
    """Return how many examples can be drawn with the same number of each label.

    Args:
        examples: the split.

    Returns:
        The number of examples of all labels together.
    """
    return min(examples.counts.values()) * len(examples.labels)


def drawn(examples: Examples, n: int, seed: int) -> Examples:
    """Draw examples at random, in the order of the data.

    Args:
        examples: the split.
        n: number of examples. Where there are no more than `n`, all are returned.
        seed: seed of the draw.

    Returns:
        The examples.
    """
    if n >= len(examples):
        return examples
    index = sorted(random.Random(seed).sample(range(len(examples)), n))
    return replace(examples, items=tuple(examples[i] for i in index))
