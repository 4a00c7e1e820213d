"""Define `Planting`, a Hugging Face model with a known circuit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cdt_lens.models.heads import Head
from cdt_lens.tasks.task import Example, Examples

SPECIAL = ("<pad>", "<s>", "</s>")  # the first words of every vocabulary


@dataclass(frozen=True, eq=False)
class Planting:
    """A Hugging Face model with a known circuit, before TransformerLens loads it.

    Attributes:
        hf_model: the model.
        words: the vocabulary, in the order of the token ids.
        heads: the planted heads.
        train: examples to score heads on.
        valid: other examples, held out.
        why: how the circuit works.
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
    """Create an example whose prompt is the words of its tokens.

    Args:
        words: the vocabulary.
        tokens: token ids of the prompt.
        label: the gold label.
        answer: token id of the answer.
        others: token ids that compete with it.

    Returns:
        The example.
    """
    prompt = " ".join(words[token] for token in tokens)
    return Example(prompt, tuple(tokens), label, (answer,), tuple(others))
