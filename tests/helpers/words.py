"""A tokenizer of whole words, and rows to make prompts of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cdt_lens.tasks import generated as generators
from cdt_lens.tasks.pseudo_languages import LEXICON

WORDS = (
    *generators.IOI_TEMPLATES,
    *generators.PRONOUN_TEMPLATES,
    generators.GREATER_THAN_TEMPLATE,
    "".join(
        f" {word}" for name in ("MEN", "WOMEN", "PLACES") for word in getattr(generators, name)
    ),
    "".join(
        f" {word}" for name in ("THINGS", "ROLES", "EVENTS") for word in getattr(generators, name)
    ),
    " he she",
)
YEARS = tuple(f" {century}{rest:02}" for century in range(11, 18) for rest in range(100))

TEMPLATE = "{text}\nSentiment:"
VERBALIZER = {"negative": " negative", "neutral": " neutral", "positive": " positive"}
ROWS = [
    {"text": "the food was good", "label": "positive"},
    {"text": "the room was bad and the food was bad", "label": "negative"},
    {"text": "we ate", "label": "neutral"},
    {"text": "good good good", "label": "positive"},
    {"text": "bad", "label": "negative"},
    {"text": "good food", "label": "positive"},
    {"text": "a room", "label": "neutral"},
]
TEXTS = (
    "the food was good room bad and we ate a N/A [MASK] terrible\nSentiment:",
    " negative neutral positive food good room the was bad and",
)


def word_tokenizer(
    folder: Path,
    texts: Sequence[str] = TEXTS,
    *,
    number: str = r"\d",
    bos: str | None = "<s>",
    max_length: int | None = None,
) -> PreTrainedTokenizerBase:
    """A word-level tokenizer with leading spaces, as GPT-2 has them, saved and loaded again."""
    split = Split(Regex(rf" ?{number}| ?[^\W\d]+| ?[^\w\s]|\s"), behavior="isolated")
    pieces = [piece for text in texts for piece, _ in split.pre_tokenize_str(text)]
    vocabulary = {"<unk>": 0, "<s>": 1}
    for piece in pieces:
        vocabulary.setdefault(piece, len(vocabulary))
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = split
    return _reloaded(core, folder, unk_token="<unk>", bos_token=bos, model_max_length=max_length)


def label_of(text: str) -> str:
    """The label of an English sentence, read off its words by a parser of its own."""
    clauses = re.split(r" (and|but|although) ", text)
    signs = []
    for clause in clauses[::2]:
        words = clause.split()
        good = any(word in LEXICON["good"] + LEXICON["like"] for word in words)
        bad = any(word in LEXICON["bad"] + LEXICON["hate"] for word in words)
        signs.append((good - bad) * (-1) ** sum(word in LEXICON["not"] for word in words))
    if "but" in clauses:
        total = signs[1]
    elif "although" in clauses:
        total = signs[0]
    else:
        total = sum(signs)
    return "positive" if total > 0 else "negative" if total < 0 else "neutral"


def _reloaded(core: Tokenizer, folder: Path, **options: object) -> PreTrainedTokenizerBase:
    given = {key: value for key, value in options.items() if value is not None}
    PreTrainedTokenizerFast(tokenizer_object=core, **given).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
