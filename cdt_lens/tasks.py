"""`Task`: prompts whose next token is the answer, with their labels and candidate tokens.

1. A row's text is put into a template that ends in an answer cue; the few-shot prefix, the same
   for every prompt, stands before it.
2. The prompt is tokenised without special tokens and BOS is prepended by hand, so that every model
   class sees the same ids.
3. Each label has one verbalizer token (" positive"). The gold label's token is the answer and those
   of the other labels compete with it: d = logit[answer] - mean logit[others] (single-token labels
   as in CT-SFT, arXiv 2601.08146).
4. What would give a silently wrong number is refused: a label word of several tokens, a tokenizer
   that merges across the cue, an unknown label, an empty cell, a prompt longer than the context.
"""

from __future__ import annotations

import bisect
import difflib
import math
import random
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from numbers import Real
from typing import overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from cdt_lens.artifacts import content_hash
from cdt_lens.errors import InputError

# Inputs without content, whose label logits show the model's bias (arXiv 2102.09690, section 5).
CONTENT_FREE_TEXTS = ("N/A", "", "[MASK]")


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
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        tensors = {k: v.to(device) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


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


@dataclass(frozen=True)
class PromptFormat:
    """How rows of text become examples: template, verbalizer, few-shot prefix, BOS and limit.

    `prepend_bos=None` prepends BOS iff the tokenizer has one. `max_length=None` takes the limit
    that the tokenizer states, if any. `truncate` cuts the longest text column of a prompt that is
    too long from its end, never the prefix or the answer cue.

    Raises:
        InputError: a mistake in the template, or a verbalizer word that is not one token.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    verbalizer: Mapping[str, str]
    label_column: str = "label"
    prefix: str = ""
    prepend_bos: bool | None = None
    max_length: int | None = None
    truncate: bool = False

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template names, in order of appearance."""
        return template_columns(self.template)

    @cached_property
    def verbalizer_ids(self) -> dict[str, int]:
        """The token id of each label's word; labels in alphabetical order."""
        return verbalizer_token_ids(self.tokenizer, self.verbalizer)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in alphabetical order, whatever the order in the verbalizer."""
        return tuple(self.verbalizer_ids)

    def render(self, cells: Mapping[str, str]) -> str:
        """Prefix and filled-in template."""
        return self.prefix + self.template.format_map(cells)

    def check_row(self, row: Mapping[str, object], place: str) -> tuple[dict[str, str], str]:
        """The text of the template's columns, and the label; `place` names the row in errors."""
        cells = {column: _cell(row, column, place) for column in self.columns}
        label = _cell(row, self.label_column, place)
        if label not in self.verbalizer_ids:
            raise InputError(
                f"{place}, column {self.label_column!r}: unknown label {label!r}"
                f"{did_you_mean(label, self.labels)}; expected one of {', '.join(self.labels)}"
            )
        return cells, label

    def examples(
        self,
        rows: Sequence[Mapping[str, object]],
        *,
        name: str = "examples",
        places: Sequence[str] | None = None,
    ) -> Examples:
        """The rows as one split; `places` says where each row stands, for error messages.

        Raises:
            InputError: no rows, a label without a row, or a row that cannot be used.
        """
        if not rows:
            raise InputError(f"{name}: no rows; expected at least one of each label")
        where = places or [f"{name}, row {number}" for number in range(1, len(rows) + 1)]
        checked = [self.check_row(row, place) for row, place in zip(rows, where, strict=True)]
        found = {label for _, label in checked}
        for label in self.labels:
            if label not in found:
                raise InputError(
                    f"{name}: no row has label {label!r} (found: {', '.join(sorted(found))}); add "
                    "some, raise the limit, or take the label out of the verbalizer"
                )
        columns = [{k: str(v) for k, v in row.items() if v is not None} for row in rows]
        return Examples(self._encode(checked, columns, where), self.labels, name)

    def content_free(self, name: str) -> Examples:
        """Prompts whose text columns hold "N/A", nothing and "[MASK]", for `Task.content_free`."""
        checked = [(dict.fromkeys(self.columns, t), self.labels[0]) for t in CONTENT_FREE_TEXTS]
        where = [f"{name}, text {text!r}" for text in CONTENT_FREE_TEXTS]
        columns = [cells for cells, _ in checked]
        return Examples(self._encode(checked, columns, where), self.labels, name)

    def _encode(
        self,
        checked: Sequence[tuple[dict[str, str], str]],
        columns: Sequence[Mapping[str, str]],
        places: Sequence[str],
    ) -> tuple[Example, ...]:
        limit = context_limit(self.tokenizer, self.max_length)
        prompts = [self.render(cells) for cells, _ in checked]
        ids = self._ids(prompts)
        for i, place in enumerate(places):
            if len(ids[i]) > limit:
                prompts[i] = self._shorten(checked[i][0], place, length=len(ids[i]), limit=limit)
                ids[i] = self._ids([prompts[i]])[0]
        items = []
        for i, (_, label) in enumerate(checked):
            answer = self.verbalizer_ids[label]
            others = tuple(other for other in self.verbalizer_ids.values() if other != answer)
            items.append(Example(prompts[i], ids[i], label, (answer,), others, columns[i]))
        words = [self.verbalizer[item.label] for item in items]
        n_bos = len(bos_ids(self.tokenizer, self.prepend_bos))
        check_boundary(self.tokenizer, items, words, places, n_bos=n_bos)
        return tuple(items)

    def _ids(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        bos = bos_ids(self.tokenizer, self.prepend_bos)
        return [(*bos, *ids) for ids in encode(self.tokenizer, prompts)]

    def _shorten(self, cells: Mapping[str, str], place: str, *, length: int, limit: int) -> str:
        """The prompt with its longest column cut at the last character that keeps to `limit`."""
        too_long = f"{place}: the prompt has {length} tokens, the limit is {limit}"
        if not self.truncate:
            raise InputError(
                f"{too_long}; leave the row out, use fewer shots, pass truncate=True to cut its "
                "text, or raise max_length if the model's context allows"
            )
        column = max(self.columns, key=lambda name: len(cells[name]))
        text = cells[column]

        def prompt(size: int) -> str:
            return self.render({**cells, column: text[:size]})

        size = bisect.bisect_left(
            range(1, len(text)), True, key=lambda size: len(self._ids([prompt(size)])[0]) > limit
        )
        if not text[:size].strip():
            raise InputError(
                f"{too_long}, and cutting column {column!r} is not enough; leave the row out, use "
                "fewer shots or raise max_length"
            )
        return prompt(size)


def build_examples(
    rows: Iterable[Mapping[str, object]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    verbalizer: Mapping[str, str],
    label_column: str = "label",
    name: str = "examples",
    places: Sequence[str] | None = None,
    prefix: str = "",
    prepend_bos: bool | None = None,
    max_length: int | None = None,
    truncate: bool = False,
) -> Examples:
    """Rows as one split: `template` filled in, `verbalizer[label]` as the answer token.

    The options are those of `PromptFormat`; `places` says where each row stands, for errors.

    Raises:
        InputError: a mistake in template, verbalizer or a row, named with its place and column.
    """
    format = PromptFormat(
        tokenizer, template, verbalizer, label_column, prefix, prepend_bos, max_length, truncate
    )
    return format.examples(list(rows), name=name, places=places)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, without special tokens."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def bos_ids(tokenizer: PreTrainedTokenizerBase, prepend_bos: bool | None) -> tuple[int, ...]:
    """The BOS id to prepend, or nothing; None prepends iff the tokenizer has one."""
    if prepend_bos and tokenizer.bos_token_id is None:
        raise InputError("prepend_bos=True: the tokenizer has no BOS token; leave prepend_bos out")
    if prepend_bos is False or tokenizer.bos_token_id is None:
        return ()
    return (tokenizer.bos_token_id,)


def context_limit(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int:
    """Most tokens of a prompt, BOS included; tokenizers without a limit state a huge number."""
    if max_length is not None and max_length < 1:
        raise InputError(f"max_length {max_length}: expected at least 1")
    return tokenizer.model_max_length if max_length is None else max_length


def template_columns(template: str) -> tuple[str, ...]:
    """The columns named in braces, in order of appearance.

    Raises:
        InputError: unbalanced braces, no column, or anything but a plain name in braces.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"template {template!r}: {error}; write a literal brace twice") from error
    columns = dict.fromkeys(name for _, name, _, _ in parts if name is not None)
    plain = all(name and not name.isdigit() and not set(name) & set(".[") for name in columns)
    if not columns or not plain or any(spec or conversion for _, _, spec, conversion in parts):
        raise InputError(
            f"template {template!r}: expected plain column names in braces, such as "
            "'{text}\\nSentiment:'; write a literal brace twice"
        )
    return tuple(columns)


def verbalizer_token_ids(
    tokenizer: PreTrainedTokenizerBase, verbalizer: Mapping[str, str]
) -> dict[str, int]:
    """The token id of each label's word, labels in alphabetical order.

    Raises:
        InputError: fewer than two labels, a word of several or unknown tokens, or a shared token.
    """
    if len(verbalizer) < 2:
        raise InputError(f"verbalizer {dict(verbalizer)}: expected at least two labels")
    ids: dict[str, int] = {}
    for label, word in sorted(verbalizer.items()):
        pieces = encode(tokenizer, [word])[0]
        shown = tokenizer.convert_ids_to_tokens(pieces)
        if len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id:
            raise InputError(
                f"verbalizer of label {label!r}: {word!r} must be one token of the tokenizer, got "
                f"{len(pieces)}: {shown}; choose another word (most need a leading space)"
            )
        for other, taken in ids.items():
            if taken == pieces[0]:
                raise InputError(
                    f"verbalizer: {word!r} ({label}) and {verbalizer[other]!r} ({other}) are the "
                    f"same token {shown[0]!r}; choose different words"
                )
        ids[label] = pieces[0]
    return ids


def check_boundary(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    words: Sequence[str],
    places: Sequence[str],
    *,
    n_bos: int,
) -> None:
    """Check that prompt + word has the prompt's tokens and then the word's, for every example.

    Raises:
        InputError: the tokenizer merges the end of a prompt with its answer.
    """
    whole = encode(tokenizer, [e.prompt + word for e, word in zip(examples, words, strict=True)])
    for example, word, ids, place in zip(examples, words, whole, places, strict=True):
        if ids != [*example.tokens[n_bos:], example.answers[0]]:
            raise InputError(
                f"{place}: the tokenizer merges the end of the prompt with the answer {word!r}: "
                f"together they end in {tokenizer.convert_ids_to_tokens(ids[-3:])}; end the "
                "template in another character, without a space, or change the word"
            )


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """The closest option as `; did you mean 'x'?`, or nothing where none is close."""
    names = {option.strip().lower(): option for option in options}
    close = difflib.get_close_matches(word.strip().lower(), list(names), n=1)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def _cell(row: Mapping[str, object], column: str, place: str) -> str:
    if column not in row:
        raise InputError(
            f"{place}: no column {column!r}{did_you_mean(column, row)}; "
            f"the columns are {', '.join(map(repr, row))}"
        )
    value = row[column]
    if value is not None and not isinstance(value, (str, Real)):
        raise InputError(
            f"{place}, column {column!r}: expected text, got {type(value).__name__} {value!r}"
        )
    # NaN is how pandas marks a missing cell.
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    text = "" if missing else str(value)
    if not text.strip():
        raise InputError(f"{place}, column {column!r}: empty; fill it in or leave the row out")
    return text
