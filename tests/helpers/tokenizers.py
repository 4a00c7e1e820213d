"""Tiny tokenizers of the classes that differ in what they add to a text, and when they add it."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import TemplateProcessing

TEMPLATE = "{text} so:"
# Each word is one token of every tokenizer below.
VERBALIZER = {"bad": " b", "good": " g"}
ROWS = [
    {"text": "a good day", "label": "good"},
    {"text": "b a d", "label": "bad"},
    {"text": "good", "label": "good"},
    {"text": "dad", "label": "bad"},
]


def _numbered(*words: str) -> dict[str, int]:
    return {word: i for i, word in enumerate(dict.fromkeys(words))}


def _bytes(kind: Any, **options: Any) -> Any:
    """GPT-2's kind: bytes, with merges of a space and a letter."""
    vocabulary = _numbered("<|endoftext|>", *sorted(ByteLevel.alphabet()), "Ġb", "Ġg")
    return kind(vocab=vocabulary, merges=[("Ġ", "b"), ("Ġ", "g")], **options)


def _pieces(kind: Any, *special: str, **options: Any) -> Any:
    """Llama's kind: letters, with a space as a character of its own."""
    letters = [*string.ascii_letters, *string.digits, ":", "/", "\n"]
    vocabulary = _numbered(*special, "▁", *letters, "▁b", "▁g")
    return kind(vocab=vocabulary, merges=[("▁", "b"), ("▁", "g")], **options)


def _words(**added: str) -> Any:
    """Whole words; `added` is the template of a post-processor that its tokenizer.json holds."""
    core = Tokenizer(WordLevel(_numbered("<unk>", "<s>", "</s>", "b", "g", "so:"), "<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    if added:
        special = [("<s>", 1), ("</s>", 2)]
        core.post_processor = TemplateProcessing(special_tokens=special, **added)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "words": _words,
    "words with BOS": lambda: _words(single="<s> $A"),
    "words with EOS": lambda: _words(single="<s> $A </s>"),
    "gpt2": lambda: _bytes(transformers.GPT2Tokenizer),
    "gpt2 with BOS": lambda: _bytes(transformers.GPT2Tokenizer, add_bos_token=True),
    "neox": lambda: _bytes(transformers.GPTNeoXTokenizer),
    "qwen2": lambda: _bytes(transformers.Qwen2Tokenizer),
    "llama": lambda: _pieces(transformers.LlamaTokenizer, "<unk>", "<s>", "</s>"),
    "gemma": lambda: _pieces(
        transformers.GemmaTokenizer, "<pad>", "<eos>", "<bos>", "<unk>", "<mask>"
    ),
}


def save_tokenizer(name: str, folder: Path) -> Any:
    """Save a tokenizer and load it again, as a model's folder gives it."""
    TOKENIZERS[name]().save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)
