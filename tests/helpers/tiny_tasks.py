"""Examples built by hand for the tiny models: random tokens, answers by label, no tokenizer.

The default has three labels with unequal counts and prompts of different lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cdt_lens.tasks.task import Example, Examples
from helpers.tiny_models import D_VOCAB

LABELS = ("positive", "neutral", "negative")
ANSWERS = {"positive": 20, "neutral": 30, "negative": 40}
LENGTHS = (9, 5, 7, 4, 9, 6)
GOLD = ("positive", "negative", "positive", "neutral", "positive", "negative")


def examples(
    lengths: Sequence[int] = LENGTHS,
    gold: Sequence[str] = GOLD,
    *,
    seed: int = 0,
    lowest: int = 3,
    name: str = "tiny/train",
) -> Examples:
    """One example for each length; `lowest=0` lets the special tokens 0 to 2 occur in prompts."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for number, (length, label) in enumerate(zip(lengths, gold, strict=True)):
        tokens = torch.randint(lowest, D_VOCAB, (length,), generator=generator).tolist()
        items.append(example(f"prompt {number}", tokens, label))
    return Examples(tuple(items), LABELS, name)


def many(n: int = 24) -> Examples:
    """Enough examples for an accuracy with some variety; counts of the labels 2 : 2 : 1."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 10, (n,), generator=generator).tolist()
    return examples(lengths, [LABELS[i % 5 % 3] for i in range(n)], seed=2)


def example(prompt: str, tokens: Sequence[int], label: str) -> Example:
    others = tuple(token for name, token in ANSWERS.items() if name != label)
    return Example(prompt, tuple(tokens), label, (ANSWERS[label],), others)


def one_by_one(data: Examples) -> list[Examples]:
    """Each example as a split of its own: batches of one, without padding."""
    return [data[i : i + 1] for i in range(len(data))]
