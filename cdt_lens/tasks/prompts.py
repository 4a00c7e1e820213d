"""Turn rows of text into prompts whose next token is the answer (docs/method/task.md).

1. Put the row's text into a template that ends in an answer cue, after the few-shot prefix, which
   is the same for every prompt.
2. Tokenise the prompt without special tokens and prepend BOS explicitly, so that every model class
   sees the same ids.
3. Look up the verbalizer token of each label, such as " positive". The gold label's token is the
   answer, and the tokens of the other labels compete with it (single-token labels as in CT-SFT,
   arXiv 2601.08146).
4. Refuse rows that would give a silently wrong number: a label word of several tokens, a tokenizer
   that merges across the cue, an unknown label, an empty cell, a prompt longer than the context.
"""

from __future__ import annotations

import bisect
import math
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Annotated

from transformers import PreTrainedTokenizerBase

from cdt_lens.core.checked import Checked, Fix, checked_arguments
from cdt_lens.core.choices import Count
from cdt_lens.core.errors import InputError, did_you_mean
from cdt_lens.tasks.task import Example, Examples

# Inputs without content. Their label logits show the model's bias (arXiv 2102.09690, section 5).
CONTENT_FREE_TEXTS = ("N/A", "", "[MASK]")


Tokenizer = Annotated[
    PreTrainedTokenizerBase,
    Fix("transformers.AutoTokenizer.from_pretrained(name) loads one; a loaded model's may be None"),
]
Verbalizer = Annotated[
    Mapping[str, str], Fix("a label and its word are text, such as {'positive': ' positive'}")
]


@dataclass(frozen=True)
class PromptFormat(Checked):
    """How rows of text become examples.

    Attributes:
        tokenizer: the model's tokenizer.
        template: text with column names in braces. It ends where the answer begins.
        verbalizer: the answer word of each label. Each word must be one token.
        label_column: name of the column with the label.
        prefix: text before every prompt, such as few-shot examples.
        prepend_bos: whether to prepend BOS. None prepends it if the tokenizer has one.
        max_length: maximum number of tokens of a prompt. None uses the tokenizer's limit.
        truncate: whether to shorten a prompt that is too long. The longest text column is cut at
            its end, and the prefix and the answer cue stay whole.

    Raises:
        InputError: an option is of another type or out of range. A mistake in the template or the
            verbalizer raises the same error at its first use.
    """

    tokenizer: Tokenizer
    template: str
    verbalizer: Verbalizer
    label_column: str = "label"
    prefix: str = ""
    prepend_bos: bool | None = None
    max_length: Count | None = None
    truncate: bool = False

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template names, in order of appearance."""
        columns = template_columns(self.template)
        if self.label_column in columns:
            raise InputError(
                f"template {self.template!r}: it holds {{{self.label_column}}}, the answer itself. "
                "End the prompt where the answer begins, and give the words as the verbalizer."
            )
        return columns

    @cached_property
    def verbalizer_ids(self) -> dict[str, int]:
        """The token id of each label's word, with the labels in alphabetical order."""
        return verbalizer_token_ids(self.tokenizer, self.verbalizer)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in alphabetical order, whatever their order in the verbalizer."""
        return tuple(self.verbalizer_ids)

    def render(self, cells: Mapping[str, str]) -> str:
        """Fill in the template.

        Args:
            cells: text of each column.

        Returns:
            The prefix and the filled-in template.
        """
        return self.prefix + self.template.format_map(cells)

    def check_row(self, row: Mapping[str, object], place: str) -> tuple[dict[str, str], str]:
        """Check a row and return what the prompt needs of it.

        Args:
            row: cells by column.
            place: name of the row in error messages.

        Returns:
            The text of the template's columns, and the label.

        Raises:
            InputError: a column is missing, a cell is empty or not text, or the label is unknown.
        """
        cells = {column: _cell(row, column, place) for column in self.columns}
        label = _cell(row, self.label_column, place)
        if label not in self.verbalizer_ids:
            raise InputError(
                f"{place}, column {self.label_column!r}: unknown label {label!r}"
                f"{did_you_mean(label, self.labels)}; expected one of {', '.join(self.labels)}"
                f"{_number_hint(label)}"
            )
        return cells, label

    def examples(
        self,
        rows: Sequence[Mapping[str, object]],
        *,
        name: str = "examples",
        places: Sequence[str] | None = None,
    ) -> Examples:
        """Build one split from rows.

        Args:
            rows: cells by column. Columns outside the template are kept in `Example.fields`.
            name: name of the split.
            places: name of each row in error messages. None counts the rows from 1.

        Returns:
            The examples, in the order of the rows.

        Raises:
            InputError: there are no rows, a label has no row, or a row cannot be used.
        """
        if not rows:
            raise InputError(f"{name}: no rows; expected at least one of each label")
        where = places or [f"{name}, row {number}" for number in range(1, len(rows) + 1)]
        checked = [self.check_row(row, place) for row, place in zip(rows, where, strict=True)]
        present = {label for _, label in checked}
        for label in self.labels:
            if label not in present:
                raise InputError(
                    f"{name}: no row has label {label!r} (found: {', '.join(sorted(present))}). "
                    "Add some, raise the limit, or remove the label from the verbalizer."
                )
        columns = [{k: str(v) for k, v in row.items() if v is not None} for row in rows]
        return Examples(self._encode(checked, columns, where), self.labels, name)

    def content_free(self, name: str) -> Examples:
        """Build the prompts of `Task.content_free`.

        Their text columns hold "N/A", nothing and "[MASK]".

        Args:
            name: name of the split.

        Returns:
            One example for each text. The labels have no meaning.

        Raises:
            InputError: a prompt is longer than the limit, or the tokenizer merges its end with the
                answer.
        """
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
        """Cut the longest column at the last character with which the prompt keeps the limit."""
        too_long = f"{place}: the prompt has {length} tokens, the limit is {limit}"
        if not self.truncate:
            raise InputError(
                f"{too_long}. Remove the row, use fewer shots, pass truncate=True to cut its text, "
                "or raise max_length if the model's context allows it."
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
                f"{too_long}, and cutting column {column!r} is not enough. Remove the row, use "
                "fewer shots or raise max_length."
            )
        return prompt(size)


@checked_arguments
def build_examples(
    rows: Iterable[Mapping[str, object]],
    *,
    tokenizer: Tokenizer,
    template: str,
    verbalizer: Verbalizer,
    label_column: str = "label",
    name: str = "examples",
    places: Sequence[str] | None = None,
    prefix: str = "",
    prepend_bos: bool | None = None,
    max_length: Count | None = None,
    truncate: bool = False,
) -> Examples:
    """Build one split from rows with a template and a verbalizer.

    Args:
        rows: cells by column.
        tokenizer: the model's tokenizer.
        template: text with column names in braces. It ends where the answer begins.
        verbalizer: the answer word of each label. Each word must be one token.
        label_column: name of the column with the label.
        name: name of the split.
        places: name of each row in error messages. None counts the rows from 1.
        prefix: text before every prompt.
        prepend_bos: whether to prepend BOS. None prepends it if the tokenizer has one.
        max_length: maximum number of tokens of a prompt. None uses the tokenizer's limit.
        truncate: whether to shorten the text of a prompt that is too long.

    Returns:
        The examples, in the order of the rows.

    Raises:
        InputError: there is a mistake in the template, the verbalizer or a row. The message names
            the place and the column.
    """
    format = PromptFormat(
        tokenizer, template, verbalizer, label_column, prefix, prepend_bos, max_length, truncate
    )
    return format.examples(list(rows), name=name, places=places)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts without special tokens.

    Args:
        tokenizer: the tokenizer.
        texts: the texts.

    Returns:
        The token ids of each text.
    """
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def bos_ids(tokenizer: PreTrainedTokenizerBase, prepend_bos: bool | None) -> tuple[int, ...]:
    """Return the BOS id to prepend.

    TransformerLens uses EOS as BOS for a tokenizer without BOS (Qwen's), although no prompt of that
    model ever began with it. So None looks at the options that the tokenizer was loaded with.

    Args:
        tokenizer: the tokenizer.
        prepend_bos: whether to prepend BOS. None prepends it if the tokenizer was loaded with one.

    Returns:
        The BOS id, or an empty tuple.

    Raises:
        InputError: BOS is requested and the tokenizer has none.
    """
    loaded = getattr(tokenizer, "init_kwargs", None) or {}
    if prepend_bos is None and "bos_token" in loaded and loaded["bos_token"] is None:
        return ()
    if prepend_bos and tokenizer.bos_token_id is None:
        raise InputError("prepend_bos=True: the tokenizer has no BOS token. Omit prepend_bos.")
    if prepend_bos is False or tokenizer.bos_token_id is None:
        return ()
    return (tokenizer.bos_token_id,)


def context_limit(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int:
    """Return the maximum number of tokens of a prompt, BOS included.

    Args:
        tokenizer: the tokenizer. A tokenizer without a limit states a huge number.
        max_length: the caller's limit. None uses the tokenizer's.

    Returns:
        The limit, in tokens.
    """
    return tokenizer.model_max_length if max_length is None else max_length


def template_columns(template: str) -> tuple[str, ...]:
    """Return the columns that a template names in braces.

    Args:
        template: the template.

    Returns:
        The names, in order of appearance.

    Raises:
        InputError: the braces are unbalanced, there is no column, or the braces hold anything but a
            plain name.
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
    """Look up the token of each label's word.

    Args:
        tokenizer: the tokenizer.
        verbalizer: the answer word of each label.

    Returns:
        The token ids, with the labels in alphabetical order.

    Raises:
        InputError: there are fewer than two labels, a word has several or unknown tokens, or two
            words share a token.
    """
    if len(verbalizer) < 2:
        raise InputError(f"verbalizer {dict(verbalizer)}: expected at least two labels")
    ids: dict[str, int] = {}
    for label, word in sorted(verbalizer.items()):
        pieces = encode(tokenizer, [word])[0]
        shown = tokenizer.convert_ids_to_tokens(pieces)
        if len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id:
            got = "the unknown token" if pieces == [tokenizer.unk_token_id] else str(len(pieces))
            raise InputError(
                f"verbalizer of label {label!r}: {word!r} must be one token of the tokenizer, got "
                f"{got}: {shown}; choose another word (most need a leading space)"
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

    Args:
        tokenizer: the tokenizer.
        examples: the examples.
        words: answer word of each example.
        places: name of each example in error messages.
        n_bos: number of BOS tokens at the start of the examples.

    Raises:
        InputError: the tokenizer merges the end of a prompt with its answer.
    """
    whole = encode(tokenizer, [e.prompt + word for e, word in zip(examples, words, strict=True)])
    for example, word, ids, place in zip(examples, words, whole, places, strict=True):
        if ids != [*example.tokens[n_bos:], example.answers[0]]:
            raise InputError(
                f"{place}: the tokenizer merges the end of the prompt with the answer {word!r}: "
                f"together they end in {tokenizer.convert_ids_to_tokens(ids[-3:])}. End the "
                "template in another character, without a space, or change the word."
            )


def _number_hint(label: str) -> str:
    """Return advice for labels that are numbers, whose meaning the data do not define."""
    if not label.strip().lstrip("-").replace(".", "", 1).isdigit():
        return ""
    return f"; give the verbalizer a word for each number (such as {label!r}), or write words"


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
    # pandas marks a missing cell by NaN.
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    text = "" if missing else str(value)
    if not text.strip():
        raise InputError(f"{place}, column {column!r}: empty. Fill it in or remove the row.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place}, column {column!r}, character {error.start + 1}: half of a character "
            f"({text[error.start]!r}). The text was cut inside a character, such as an emoji. "
            "Repair the text or remove the row."
        ) from error
    return text
