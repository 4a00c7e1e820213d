"""Turn rows of text into prompts whose next token is the answer (docs/method/task.md).

1. Put the row's text into a template that ends in an answer cue, after the few-shot prefix, which
   is the same for every prompt.
2. Tokenise the prompt as one string and prepend BOS explicitly (`with_bos`), so that every model
   class sees the same ids. BOS stands there once, also if the template begins with its text, as a
   chat template does. Special tokens that the template or the prefix spells are meant. Text of the
   data that spells one is refused, because the tokenizer would turn it into that token.
3. Look up the tokens of each label's word, such as " positive", as it continues a prompt. The
   gold label's word is the answer, and the words of the other labels compete with it
   (single-token labels as in CT-SFT, arXiv 2601.08146; a word may have several tokens). Labels and
   names of columns are compared in Unicode's composed form (NFC).
4. Refuse rows that would give a silently wrong number: a tokenizer that merges across the cue, an
   unknown label, an empty cell, a prompt that is longer than the context with a word behind it.
"""

from __future__ import annotations

import bisect
import math
import string
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Annotated

from transformers import PreTrainedTokenizerBase

from cdt_lens.core import display
from cdt_lens.core.checked import Checked, Fix, checked_arguments
from cdt_lens.core.choices import Count
from cdt_lens.core.errors import CdtLensWarning, InputError, did_you_mean
from cdt_lens.tasks.rows import column_of, composed, no_column
from cdt_lens.tasks.task import Example, Examples, WordIds, beginning

# Inputs without content. Their label logits show the model's bias (arXiv 2102.09690, section 5).
CONTENT_FREE_TEXTS = ("N/A", "", "[MASK]")


Tokenizer = Annotated[
    PreTrainedTokenizerBase,
    Fix("transformers.AutoTokenizer.from_pretrained(name) loads one; a loaded model's may be None"),
]
Verbalizer = Annotated[
    Mapping[str, str], Fix("a label and its word are text, such as {'positive': ' positive'}")
]


Pair = Annotated[
    str | Mapping[str, str],
    Fix("name the column of the counterfactual text, such as 'counterfactual'"),
]


@dataclass(frozen=True)
class PromptFormat(Checked):
    """How rows of text become examples.

    Attributes:
        tokenizer: the model's tokenizer.
        template: text with column names in braces. It ends where the answer begins.
        verbalizer: the answer word of each label, in Unicode's composed form. The tokenizer may
            split a word; all words are then compared by their log-probabilities.
        label_column: name of the column with the label.
        prefix: text before every prompt, such as few-shot examples. BOS text with which the
            template begins is moved before it.
        prepend_bos: whether to prepend BOS to a prompt whose template does not begin with its text.
            None prepends it if the tokenizer has one.
        max_length: maximum number of tokens of a prompt with a word behind it, whose last token
            does not count. None uses the tokenizer's limit.
        truncate: whether to shorten a prompt that is too long. The longest text column is cut at
            its end, and the prefix and the answer cue stay whole.
        pair: the column whose text replaces the template's column in the counterfactual prompt of
            a row, or such a column for each column of the template that it replaces. None makes no
            counterfactual prompts.
        pair_label: name of the column with the label of the counterfactual prompt. None gives it
            the label of the row.

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
    pair: Pair | None = None
    pair_label: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "verbalizer", _composed_labels(self.verbalizer))
        if self.prefix and self._bos_text:
            self._put_bos_before_the_prefix()

    def _put_bos_before_the_prefix(self) -> None:
        bos = self._bos_text
        prefix = self.prefix if self.prefix.startswith(bos) else bos + self.prefix
        object.__setattr__(self, "prefix", prefix)
        object.__setattr__(self, "template", self.template.removeprefix(bos))

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
    def pair_columns(self) -> dict[str, str]:
        """The column that the counterfactual prompt has in place of one of the template."""
        if self.pair is None:
            return {}
        if isinstance(self.pair, Mapping):
            given = dict(self.pair)
        else:
            given = dict.fromkeys(self.columns, self.pair)
        twice = len(set(given.values())) < len(given)
        if twice or not given or not set(given) <= set(self.columns):
            raise InputError(
                f"pair={self.pair!r}: expected a column for each column of the template that it "
                f"replaces, among {', '.join(self.columns)}, such as "
                f"pair={{{self.columns[0]!r}: 'counterfactual'}}"
            )
        return given

    @cached_property
    def row_columns(self) -> tuple[str, ...]:
        """The columns that a row must have, besides those of labels."""
        return (*self.columns, *self.pair_columns.values())

    @cached_property
    def label_columns(self) -> tuple[str, ...]:
        """The columns of a row that hold labels."""
        both = (self.label_column, self.pair_label)
        return tuple(dict.fromkeys(name for name in both if name is not None))

    @cached_property
    def verbalizer_ids(self) -> dict[str, WordIds]:
        """The token id of each label's word, or its ids, with the labels in alphabetical order.

        A `CdtLensWarning` names words whose leading space does not fit the end of the template.
        """
        context = self.render(dict.fromkeys(self.columns, CONTENT_FREE_TEXTS[0]))
        ids = verbalizer_token_ids(self.tokenizer, self.verbalizer, context)
        warn_of_spaces(self.tokenizer, self.verbalizer, context)
        return ids

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in alphabetical order, whatever their order in the verbalizer."""
        return tuple(self.verbalizer_ids)

    @property
    def _bos_text(self) -> str:
        """The BOS text with which the template begins, or "".

        Where it occurs again, as in ChatML, it marks the turns and belongs to every example.
        """
        bos = self.tokenizer.bos_token or ""
        return bos if self.template.startswith(bos) and self.template.count(bos) == 1 else ""

    def render(self, cells: Mapping[str, str]) -> str:
        """Fill in the template.

        Args:
            cells: text of each column.

        Returns:
            The prefix and the filled-in template.
        """
        return self.prefix + self.template.format_map(cells)

    def solved(self, cells: Mapping[str, str], label: str) -> str:
        """Fill in the template and add the answer word, as in a few-shot prefix.

        Args:
            cells: text of each column.
            label: the label.

        Returns:
            The text, without the BOS text with which the template begins.
        """
        text = self.render(cells) + self.verbalizer[label]
        return text.removeprefix(self._bos_text)

    def check_row(self, row: Mapping[str, object], place: str) -> tuple[dict[str, str], str]:
        """Check a row and return what the prompt needs of it.

        Args:
            row: cells by column.
            place: name of the row in error messages.

        Returns:
            The text of the template's columns, and the label.

        Raises:
            InputError: a column is missing, a cell is empty, is not text or spells a special token
                of the tokenizer, or the label is unknown.
        """
        return self._texts(row, place, {}), self._label(row, self.label_column, place)

    def check_pair(self, row: Mapping[str, object], place: str) -> tuple[dict[str, str], str]:
        """Check the counterfactual of a row and return what its prompt needs.

        Args:
            row: cells by column.
            place: name of the row in error messages.

        Returns:
            The text of the template's columns, and the label.

        Raises:
            InputError: as for `check_row`.
        """
        label = self._label(row, self.pair_label or self.label_column, place)
        return self._texts(row, place, self.pair_columns), label

    def _texts(
        self, row: Mapping[str, object], place: str, instead: Mapping[str, str]
    ) -> dict[str, str]:
        """Return the text of the template's columns, some of them from other columns."""
        cells = {column: _cell(row, instead.get(column, column), place) for column in self.columns}
        for column, text in cells.items():
            spelled = [token for token in self._special if token in text]
            if spelled:
                raise InputError(
                    f"{place}, column {instead.get(column, column)!r}: the text holds "
                    f"{spelled[0]!r}, which the tokenizer reads as its special token. Write it in "
                    "another way, or remove the row."
                )
        return cells

    def _label(self, row: Mapping[str, object], column: str, place: str) -> str:
        label = composed(_cell(row, column, place))
        if label not in self.verbalizer_ids:
            raise InputError(
                f"{place}, column {column!r}: unknown label {display.short(label)}"
                f"{did_you_mean(label, self.labels)}; expected one of {', '.join(self.labels)}"
                f"{_number_hint(label)}"
            )
        return label

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
        if len(where) != len(rows):
            raise InputError(f"places: {len(where)} for {len(rows)} rows; give one for each row")
        checked = [self.check_row(row, place) for row, place in zip(rows, where, strict=True)]
        present = {label for _, label in checked}
        for label in self.labels:
            if label not in present:
                raise InputError(
                    f"{name}: no row has label {label!r} (found: {', '.join(sorted(present))}). "
                    "Add some, raise the limit, or remove the label from the verbalizer."
                )
        columns = [{k: str(v) for k, v in row.items() if v is not None} for row in rows]
        items = self._encode(checked, columns, where)
        if self.pair is not None:
            pairs = [self.check_pair(row, place) for row, place in zip(rows, where, strict=True)]
            partners = self._encode(pairs, columns, [f"{place}, counterfactual" for place in where])
            items = tuple(replace(a, pair=b) for a, b in zip(items, partners, strict=True))
        return Examples(items, self.labels, name)

    def content_free(self, name: str) -> Examples:
        """Build the prompts of `Task.content_free`.

        Their text columns hold "N/A", nothing and "[MASK]". A text that leaves the prompt without
        tokens, or that is a special token of the tokenizer, is left out.

        Args:
            name: name of the split.

        Returns:
            One example for each text. The labels have no meaning.

        Raises:
            InputError: a prompt is longer than the limit, or the tokenizer merges its end with the
                answer.
        """
        filled = {text: dict.fromkeys(self.columns, text) for text in CONTENT_FREE_TEXTS}
        texts = [
            text
            for text, cells in filled.items()
            if text not in self._special and self._ids([self.render(cells)])[0]
        ]
        checked = [(filled[text], self.labels[0]) for text in texts]
        where = [f"{name}, text {text!r}" for text in texts]
        columns = [cells for cells, _ in checked]
        return Examples(self._encode(checked, columns, where), self.labels, name)

    def unlabelled(
        self, rows: Sequence[Mapping[str, object]], places: Sequence[str]
    ) -> list[tuple[int, ...]]:
        """Return the tokens of the prompts of rows whose label is not known.

        Args:
            rows: cells by column.
            places: name of each row in error messages.

        Returns:
            The token ids of each prompt, BOS included.

        Raises:
            InputError: a column is missing, a cell is empty, is not text or spells a special token
                of the tokenizer, or a prompt is too long.
        """
        cells = [self._texts(row, place, {}) for row, place in zip(rows, places, strict=True)]
        ids = self._tokenised(cells, places)[1]
        for own, place in zip(ids, places, strict=True):
            self._check_special(own, place)
        return ids

    def _tokenised(
        self, cells: Sequence[Mapping[str, str]], places: Sequence[str]
    ) -> tuple[list[str], list[tuple[int, ...]]]:
        """Return the prompts, shortened where that is allowed and needed, and their tokens."""
        limit = context_limit(self.tokenizer, self.max_length) - self._behind
        prompts = [self.render(texts) for texts in cells]
        ids = self._ids(prompts)
        for i, place in enumerate(places):
            if len(ids[i]) > limit:
                prompts[i] = self._shorten(cells[i], place, length=len(ids[i]), limit=limit)
                ids[i] = self._ids([prompts[i]])[0]
        return prompts, ids

    @cached_property
    def _behind(self) -> int:
        """The largest number of tokens of a word that the model reads behind a prompt."""
        words = self.verbalizer_ids.values()
        return max(len(word) - 1 if isinstance(word, tuple) else 0 for word in words)

    def _encode(
        self,
        checked: Sequence[tuple[dict[str, str], str]],
        columns: Sequence[Mapping[str, str]],
        places: Sequence[str],
    ) -> tuple[Example, ...]:
        prompts, ids = self._tokenised([cells for cells, _ in checked], places)
        items = []
        for i, (_, label) in enumerate(checked):
            self._check_special(ids[i], places[i])
            answer = self.verbalizer_ids[label]
            others = tuple(other for other in self.verbalizer_ids.values() if other != answer)
            items.append(
                Example(prompts[i], ids[i], label, (answer,), others, columns[i], place=places[i])
            )
        # The other words are read behind the prompt too, if the tokenizer splits some.
        for asked in self.labels if self._behind else (None,):
            labels = [item.label if asked is None else asked for item in items]
            check_boundary(
                self.tokenizer, items, [self.verbalizer[label] for label in labels],
                [self.verbalizer_ids[label] for label in labels], places,
                prepend_bos=self.prepend_bos,
            )  # fmt: skip
        return tuple(items)

    def _ids(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        pieces = encode(self.tokenizer, prompts)
        return [with_bos(self.tokenizer, ids, self.prepend_bos) for ids in pieces]

    @cached_property
    def _special(self) -> dict[str, int]:
        """The special tokens of the tokenizer with their ids."""
        added = self.tokenizer.added_tokens_decoder.items()
        named = zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True)
        return {token.content: id for id, token in added if token.special} | dict(named)

    @cached_property
    def _own_special(self) -> int:
        """The number of special tokens in the prefix and the template, and BOS."""
        literals = (literal for literal, *_ in string.Formatter().parse(self.template))
        texts = [self.prefix, *literals]
        pieces = encode(self.tokenizer, texts)
        ids = with_bos(self.tokenizer, [id for piece in pieces for id in piece], self.prepend_bos)
        return self._n_special(ids)

    def _n_special(self, ids: Sequence[int]) -> int:
        # Unknown words of the data become the unknown token without being spelled like it.
        special = set(self._special.values()) - {self.tokenizer.unk_token_id}
        return sum(id in special for id in ids)

    def _check_special(self, ids: Sequence[int], place: str) -> None:
        """Refuse text that becomes a special token together with the template around it."""
        if self._n_special(ids) != self._own_special:
            raise InputError(
                f"{place}: the text and the template together spell a special token of the "
                f"tokenizer: {self.tokenizer.convert_ids_to_tokens(list(ids))[:60]}. Change the "
                "template or the text."
            )

    def _shorten(self, cells: Mapping[str, str], place: str, *, length: int, limit: int) -> str:
        """Cut the longest column at the last character with which the prompt keeps the limit."""
        behind = f" with {self._behind} more for the label words" if self._behind else ""
        too_long = f"{place}: the prompt has {length} tokens, the limit is {limit}{behind}"
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
        verbalizer: the answer word of each label, of one or several tokens.
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


def with_bos(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], prepend_bos: bool | None
) -> tuple[int, ...]:
    """Prepend BOS to the token ids of a prompt, unless they begin with it.

    Args:
        tokenizer: the tokenizer.
        ids: the token ids of the whole prompt.
        prepend_bos: whether to prepend BOS, as for `bos_ids`.

    Returns:
        The token ids with BOS at most once at their start.

    Raises:
        InputError: BOS is requested and the tokenizer has none.
    """
    bos = bos_ids(tokenizer, prepend_bos)
    return tuple(ids) if tuple(ids[: len(bos)]) == bos else (*bos, *ids)


def word_ids(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str], context: str
) -> list[list[int]]:
    """Tokenise words as they continue a text.

    Some tokenizers write a space before every text (Llama 2's), so that a word alone has other
    tokens than behind a prompt.

    Args:
        tokenizer: the tokenizer.
        words: the words, with their leading spaces.
        context: the text before them.

    Returns:
        The tokens of each word: those that follow the tokens of `context`, or those of the word
        alone if the tokenizer merges the two.
    """
    before, *texts = encode(tokenizer, [context, *(context + word for word in words)])
    alone = encode(tokenizer, words)
    return [
        whole[len(before) :] if whole[: len(before)] == before else own
        for whole, own in zip(texts, alone, strict=True)
    ]


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
    tokenizer: PreTrainedTokenizerBase, verbalizer: Mapping[str, str], context: str
) -> dict[str, WordIds]:
    """Look up the tokens of each label's word.

    Args:
        tokenizer: the tokenizer.
        verbalizer: the answer word of each label.
        context: a prompt, whose end decides how the words are read.

    Returns:
        The token id of each word, or its ids if the tokenizer splits it, with the labels in
        alphabetical order.

    Raises:
        InputError: there are fewer than two labels, a word has no or unknown tokens, or one word
            has the tokens of another one or begins with them.
    """
    if len(verbalizer) < 2:
        raise InputError(f"verbalizer {dict(verbalizer)}: expected at least two labels")
    ids: dict[str, WordIds] = {}
    labels = sorted(verbalizer)
    read = word_ids(tokenizer, [verbalizer[label] for label in labels], context)
    for label, pieces in zip(labels, read, strict=True):
        word = verbalizer[label]
        shown = tokenizer.convert_ids_to_tokens(pieces)
        _check_pieces(tokenizer, label, word, pieces)
        own = pieces[0] if len(pieces) == 1 else tuple(pieces)
        same = f"token {shown[0]!r}" if len(pieces) == 1 else f"tokens {shown}"
        for other, taken in ids.items():
            if taken == own:
                raise InputError(
                    f"verbalizer: {word!r} ({label}) and {verbalizer[other]!r} ({other}) are the "
                    f"same {same}; choose different words"
                )
        ids[label] = own
    _refuse_beginnings(verbalizer, ids)
    return ids


def _check_pieces(
    tokenizer: PreTrainedTokenizerBase, label: str, word: str, pieces: list[int]
) -> None:
    """Refuse a word that has no tokens, unknown ones, or some for white space at its end."""
    shown = tokenizer.convert_ids_to_tokens(pieces)
    if not pieces or tokenizer.unk_token_id in pieces:
        got = "the unknown token" if pieces else "none"
        raise InputError(
            f"verbalizer of label {label!r}: {word!r} must have tokens of the tokenizer, got "
            f"{got}: {shown}; choose another word (most need a leading space)"
        )
    if len(pieces) > 1 and word[-1].isspace():
        raise InputError(
            f"verbalizer of label {label!r}: {word!r} ends in white space, which would be a part "
            f"of the answer: {shown}. Remove it."
        )


def _refuse_beginnings(verbalizer: Mapping[str, str], ids: Mapping[str, WordIds]) -> None:
    covered = beginning(list(ids.values()))
    if covered is None:
        return
    short, long = (next(label for label, own in ids.items() if own == each) for each in covered)
    raise InputError(
        f"verbalizer: the tokens of {verbalizer[long]!r} ({long}) begin with those of "
        f"{verbalizer[short]!r} ({short}), so that {long!r} could never be answered: its "
        "log-probability is never higher. Choose another word for one of them."
    )


def check_boundary(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    words: Sequence[str],
    expected: Sequence[WordIds],
    places: Sequence[str],
    *,
    prepend_bos: bool | None,
) -> None:
    """Check that prompt + word has the prompt's tokens and then the word's, for every example.

    Args:
        tokenizer: the tokenizer.
        examples: the examples.
        words: a candidate's word for each example.
        expected: the token id of each word, or its ids.
        places: name of each example in error messages.
        prepend_bos: whether BOS was prepended to the examples.

    Raises:
        InputError: the tokenizer merges the end of a prompt with its answer.
    """
    whole = encode(tokenizer, [e.prompt + word for e, word in zip(examples, words, strict=True)])
    for example, word, own, ids, place in zip(
        examples, words, expected, whole, places, strict=True
    ):
        behind = own if isinstance(own, tuple) else (own,)
        if with_bos(tokenizer, ids, prepend_bos) != (*example.tokens, *behind):
            raise InputError(
                f"{place}: the tokenizer merges the end of the prompt with the answer {word!r}: "
                f"together they end in {tokenizer.convert_ids_to_tokens(ids[-3:])}. End the "
                "template in another character, without a space, or change the word."
            )


def warn_of_spaces(
    tokenizer: PreTrainedTokenizerBase, verbalizer: Mapping[str, str], context: str
) -> None:
    """Warn of words whose leading space does not fit the end of the prompt.

    A model that has read "Sentiment:" expects " good", and "good" is another token. After a prompt
    that ends in a space or a line break it is the reverse.

    Args:
        tokenizer: the tokenizer.
        verbalizer: the answer word of each label.
        context: a prompt.
    """
    for word in verbalizer.values():
        prompt, usual = _usual_spelling(context, word)
        (read,), (expected,) = (
            word_ids(tokenizer, [word], context), word_ids(tokenizer, [usual], prompt)
        )  # fmt: skip
        before, shorter = encode(tokenizer, [context, prompt])
        same = [*before, *read] == [*shorter, *expected]
        # A word of one token is meant as it is if the tokenizer splits the usual spelling.
        meant = len(read) == 1 < len(expected)
        if same or meant or tokenizer.unk_token_id in expected:
            continue
        warnings.warn(
            f"verbalizer: {context[-20:] + word!r} ends in the tokens {[*before[-1:], *read]}, but "
            f"{prompt[-20:] + usual!r}, as text is usually written, in "
            f"{[*shorter[-1:], *expected]}. Check the space between the template and the words: a "
            "model that expects the other token scores worse.",
            CdtLensWarning,
            stacklevel=2,
        )
        return


def _usual_spelling(context: str, word: str) -> tuple[str, str]:
    """Return the prompt and the word with exactly one space or line break between them."""
    spaced = word[0].isspace()
    if spaced and context.endswith(" "):
        return context.rstrip(" "), word
    if spaced and context[-1:].isspace():
        return context, word.lstrip()
    end = context[-1]
    opens = unicodedata.category(end) in ("Ps", "Pi") or end in "\"'<>/_-=#@$*`|"
    opens = opens and not context.endswith(("->", "=>"))
    # Chinese and Japanese are written without spaces.
    wide = unicodedata.east_asian_width(word[0]) in "WF"
    return context, word if spaced or end.isspace() or opens or wide else f" {word}"


def _composed_labels(verbalizer: Mapping[str, str]) -> dict[str, str]:
    # Labels of other types are refused where they are used.
    names = [composed(label) if isinstance(label, str) else label for label in verbalizer]
    labels = dict(zip(names, verbalizer.values(), strict=True))
    if len(labels) < len(verbalizer):
        raise InputError(
            f"verbalizer: {list(verbalizer)}: two labels are the same in Unicode's composed form "
            "(NFC). Remove one of them."
        )
    return labels


def _number_hint(label: str) -> str:
    """Return advice for labels that are numbers, whose meaning the data do not define."""
    if not label.strip().lstrip("-").replace(".", "", 1).isdigit():
        return ""
    return f"; give the verbalizer a word for each number (such as {label!r}), or write words"


def _cell(row: Mapping[str, object], column: str, place: str) -> str:
    own = column_of(row, column)
    if own is None:
        raise InputError(f"{place}: {no_column(column, row)}")
    value = row[own]
    if value is not None and not isinstance(value, (str, Real)):
        raise InputError(
            f"{place}, column {column!r}: expected text, got {type(value).__name__} "
            f"{repr(value)[:60]}"
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
