"""What a construction with a known circuit hands over, before TransformerLens comes in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cdt_lens.models.heads import Head
from cdt_lens.tasks.task import Example, Examples

SPECIAL = ("<pad>", "<s>", "</s>")  # the first words of every vocabulary


@dataclass(frozen=True, eq=False)
class Planting:
    """A Hugging Face model, its words in order of their ids, and the heads planted in it.

    train, valid: examples to score heads on, and others held out; why: what is planted and how.
    """

    hf_model: Any = field(repr=False)
    words: tuple[str, ...] = field(repr=False)
    heads: tuple[Head, ...]
    train: Examples = field(repr=False)
    valid: Examples = field(repr=False)
    why: str


def spelt(
    words: Sequence[str], tokens: Sequence[int], label: str, answer: int, others: Sequence[int]
) -> Example:
    """An example whose prompt is its tokens' words."""
    prompt = " ".join(words[token] for token in tokens)
    return Example(prompt, tuple(tokens), label, (answer,), tuple(others))
