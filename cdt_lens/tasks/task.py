"""`Task`: prompts whose next token is the answer, with their labels and candidate tokens.

The answer is the gold label's token and those of the other labels compete with it:
d = logit[answer] - mean logit[others], in logits (single-token labels as in CT-SFT,
arXiv 2601.08146). `prompts.py` makes the examples, this file holds, balances and batches them.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, overload

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cdt_lens.core import display
from cdt_lens.core.artifacts import content_hash
from cdt_lens.core.errors import InputError, expect


@dataclass(frozen=True)
class Example:
    """One prompt with the token ids that are right (`answers`) and those that compete (`others`).

    The task direction is the mean logit of `answers` minus the mean logit of `others`, in logits;
    positive = towards the gold label. `fields` holds the row's columns.

    Raises:
        InputError: no token, no answer, no competitor, or an id that occurs twice among them.
    """

    prompt: str
    tokens: tuple[int, ...]
    label: str
    answers: tuple[int, ...]
    others: tuple[int, ...]
    fields: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        candidates = self.answers + self.others
        if not self.tokens:
            raise InputError(f"prompt {self.prompt!r}: it has no tokens; give it some text")
        if not self.answers or not self.others or len(set(candidates)) < len(candidates):
            raise InputError(
                f"prompt {self.prompt!r}: expected at least one answer and one other token, all "
                f"different; got answers {self.answers} and others {self.others}"
            )

    def __repr__(self) -> str:
        told = f"{self.label}; {len(self.tokens)} tokens"
        return display.line(self, display.short(self.prompt), told)

    def _repr_html_(self) -> str:
        return Examples((self,), (self.label,), "example")._repr_html_()


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples as tensors, right-padded: causal attention never lets padding reach a real position.

    `lengths` counts the real tokens, so the answer is read at position `lengths - 1`. `candidates`
    are the answers, then the others, then the first candidate again as padding. `direction` is
    +1/n on answers, -1/n on others and 0 on padding: `(direction * logits at candidates).sum()` is
    the task direction in logits.
    """

    tokens: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, " batch"]
    candidates: Int[Tensor, "batch k"]
    direction: Float[Tensor, "batch k"]
    is_answer: Bool[Tensor, "batch k"]
    is_candidate: Bool[Tensor, "batch k"]
    label_index: Int[Tensor, " batch"]
    index: tuple[int, ...]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        moved: dict[str, Any] = {
            k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()
        }
        return Batch(**moved)


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """One split of a task; the order of `labels` is the order of `Batch.label_index`."""

    items: tuple[Example, ...]
    labels: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        unknown = {item.label for item in self.items} - set(self.labels)
        if unknown:
            raise InputError(f"{self.name}: labels {sorted(unknown)} are not among {self.labels}")

    def __repr__(self) -> str:
        return display.line(self, self.name, f"{len(self)} examples", self.counts)

    def to_dataframe(self) -> pd.DataFrame:
        """One row an example: prompt, label, numbers of tokens, answers and competitors."""
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
        found = Counter(item.label for item in self.items)
        return {label: found[label] for label in self.labels}

    @property
    def chance(self) -> float:
        """Accuracy of always giving the commonest label, a share from 0 to 1."""
        return max(self.counts.values()) / len(self)

    @cached_property
    def hash(self) -> str:
        """sha256 over tokens, label, answers and others of every example, in order."""
        rows = [(item.tokens, item.label, item.answers, item.others) for item in self.items]
        return content_hash(rows)

    def take(self, n: int) -> Examples:
        """The first `n` examples, or all where there are fewer.

        Raises:
            InputError: `n` is below 1, or there are no examples.
        """
        self.require_some()
        if n < 1:
            raise InputError(f"{self.name}: take({n}): expected at least 1")
        return self[:n]

    def balanced(self, n: int | None = None, *, seed: int = 0) -> Examples:
        """The same number of each label, drawn at random, in the order of the data.

        `n` counts all labels together and is rounded down to a multiple of their number; None
        takes as many as the rarest label allows.

        Raises:
            InputError: there are no examples, or too few of a label.
        """
        self.require_some()
        rarest, most = min(self.counts.items(), key=lambda pair: pair[1])
        each = most if n is None else n // len(self.labels)
        if not 1 <= each <= most:
            raise InputError(
                f"{self.name}: cannot draw {n} examples balanced over {len(self.labels)} labels: "
                f"label {rarest!r} has {most}; n may be {len(self.labels)} to "
                f"{most * len(self.labels)}"
            )
        generator = random.Random(seed)
        chosen: list[int] = []
        for label in self.labels:
            positions = [i for i, item in enumerate(self.items) if item.label == label]
            chosen += generator.sample(positions, each)
        return replace(self, items=tuple(self.items[i] for i in sorted(chosen)))

    def batches(
        self,
        batch_size: int,
        *,
        sort_by_length: bool = True,
        pad_id: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> Iterator[Batch]:
        """Every example once, in batches; longest first, so that memory runs out at the start.

        `shard=(rank, world)` gives every world-th example from rank on: the shards partition the
        split.

        Raises:
            InputError: there are no examples, or an argument is out of range.
        """
        self.require_some()
        rank, world = shard
        if batch_size < 1 or not 0 <= rank < world:
            raise InputError(
                f"{self.name}: batch_size {batch_size}, shard {shard}: expected a batch_size of at "
                "least 1 and a shard (rank, world) with 0 <= rank < world"
            )
        order = list(range(len(self)))
        if sort_by_length:
            order.sort(key=lambda i: len(self.items[i].tokens), reverse=True)
        order = order[rank::world]
        starts = range(0, len(order), batch_size)
        return (self._collate(tuple(order[i : i + batch_size]), pad_id) for i in starts)

    def require_some(self) -> None:
        if not self.items:
            raise InputError(f"{self.name}: no examples; load this split or use another one")

    def _collate(self, index: tuple[int, ...], pad_id: int) -> Batch:
        items = [self.items[i] for i in index]
        width = max(len(item.answers) + len(item.others) for item in items)

        def padded(rows: Iterable[Sequence[float | int]], value: int = 0) -> Tensor:
            return pad_sequence([torch.tensor(row) for row in rows], True, value)

        candidates = [item.answers + item.others for item in items]
        sides = [(len(item.answers), len(item.others)) for item in items]
        return Batch(
            tokens=padded([item.tokens for item in items], pad_id),
            lengths=torch.tensor([len(item.tokens) for item in items]),
            candidates=torch.tensor([c + c[:1] * (width - len(c)) for c in candidates]),
            direction=padded([1 / a] * a + [-1 / o] * o for a, o in sides),
            is_answer=padded([True] * a + [False] * o for a, o in sides),
            is_candidate=padded([True] * (a + o) for a, o in sides),
            label_index=torch.tensor([self.labels.index(item.label) for item in items]),
            index=index,
        )


@dataclass(frozen=True)
class Task:
    """Splits of one classification task; a split that the data lack is empty.

    `verbalizer` may be empty (generated tasks whose answers differ from prompt to prompt).
    `prefix` holds the few-shot examples that stand before every prompt. `content_free` are the
    prompts for label-prior calibration: their candidates stand in the order of `labels`, their
    own label means nothing.
    """

    name: str
    labels: tuple[str, ...]
    verbalizer: Mapping[str, str]
    verbalizer_ids: Mapping[str, int]
    template: str
    train: Examples
    valid: Examples
    test: Examples
    content_free: Examples
    prior: Mapping[str, float] | None = None
    prefix: str = ""

    def __post_init__(self) -> None:
        for split in (self.train, self.valid, self.test, self.content_free):
            if split.labels != self.labels:
                raise InputError(
                    f"task {self.name}: {split.name} has labels {split.labels}, expected "
                    f"{self.labels}; build every split with the same verbalizer"
                )

    def __repr__(self) -> str:
        splits = (("train", self.train), ("valid", self.valid), ("test", self.test))
        sizes = ", ".join(f"{len(split)} {name}" for name, split in splits)
        return display.line(self, self.name, display.few(self.labels), sizes)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a split: the number of examples, and of each label."""
        return counts_frame((self.train, self.valid, self.test))

    def _repr_html_(self) -> str:
        words = [f"{label} = {word!r}" for label, word in self.verbalizer.items()]
        title = f"Task {self.name}: {self.template!r} {display.few(words)}"
        shown = [split._repr_html_() for split in (self.train[:3],) if len(split)]
        return display.html(title, self.to_dataframe(), *shown)

    @cached_property
    def hash(self) -> str:
        """sha256 over everything that changes a number: all but the name, in canonical order."""
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

    def with_prior(self, prior: Mapping[str, float]) -> Task:
        """This task with the calibrated logit of each label on content-free prompts.

        Accuracy then compares candidate logits minus `candidate_prior` (arXiv 2102.09690). The
        task direction is left as it is: there the prior is a constant of each gold label, which
        cancels in every difference between two runs.

        Raises:
            InputError: the task has no verbalizer, a label is missing, or a value is not finite.
        """
        if not self.verbalizer_ids:
            raise InputError(f"task {self.name}: it has no verbalizer, so labels have no prior")
        if set(prior) != set(self.labels) or not all(map(math.isfinite, prior.values())):
            raise InputError(
                f"task {self.name}: expected a finite prior for each of {', '.join(self.labels)}; "
                f"got {dict(prior)}"
            )
        return replace(self, prior={label: float(prior[label]) for label in self.labels})

    def candidate_prior(self, batch: Batch) -> Float[Tensor, "batch k"]:
        """What to subtract from the candidates' logits before comparing them; 0 without a prior."""
        offsets = torch.zeros_like(batch.direction)
        for label, value in (self.prior or {}).items():
            offsets[batch.candidates == self.verbalizer_ids[label]] = value
        return offsets


def require_examples(examples: object) -> None:
    """Refuse what is no split of a task, or an empty one.

    Raises:
        InputError: names what was handed over instead.
    """
    fix = "give a split, such as task.train"
    if isinstance(examples, (list, tuple)):
        fix = "Examples(tuple(items), labels, name) makes one"
    expect(examples, Examples, "examples", fix).require_some()


def examples_frame(examples: Examples) -> pd.DataFrame:
    """One row an example: prompt, label, and the numbers of tokens, answers and competitors."""
    rows = [
        (e.prompt, e.label, len(e.tokens), len(e.answers), len(e.others)) for e in examples.items
    ]
    return pd.DataFrame(rows, columns=["prompt", "label", "tokens", "answers", "others"])


def counts_frame(splits: Sequence[Examples]) -> pd.DataFrame:
    """One row a split: its name, the number of examples, and of each label."""
    return pd.DataFrame([{"split": s.name, "examples": len(s), **s.counts} for s in splits])


def most_balanced(examples: Examples) -> int:
    """How many examples can be drawn with the same number of each label."""
    return min(examples.counts.values()) * len(examples.labels)


def drawn(examples: Examples, n: int, seed: int) -> Examples:
    """`n` examples drawn by the seed, in the order of the data; all where there are no more."""
    if n >= len(examples):
        return examples
    index = sorted(random.Random(seed).sample(range(len(examples)), n))
    return replace(examples, items=tuple(examples[i] for i in index))
