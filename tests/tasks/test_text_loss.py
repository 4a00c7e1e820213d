"""The loss on the prompts' own text, against Hugging Face's logits token by token."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.shared import models
from helpers.tiny_models import Float64Throughout, build
from helpers.wrapped import view
from torch.nn.functional import cross_entropy

from cdt_lens.tasks.task import Example, Examples
from cdt_lens.tasks.text_loss import text_loss


def prompts(rows: list[list[int]]) -> Examples:
    items = tuple(Example(f"prompt {i}", tuple(row), "a", (5,), (6,)) for i, row in enumerate(rows))
    return Examples(items, ("a", "b"), "own/text")


@models(("gpt2", "gemma3"))
def test_the_template_is_left_out_and_every_other_token_counts_once(
    family, backend, tokenizer_folder
):
    """All prompts begin with 1, 2 and end with 3; of equal ends between them nothing is left out."""
    rows = [[1, 2, 9, 10, 11, 3], [1, 2, 12, 3], [1, 2, 9, 13, 14, 15, 16, 3]]
    with Float64Throughout():
        model = build(family)
        losses = []
        for row in rows:
            logits = model(torch.tensor([row])).logits[0]
            for place in range(2, len(row) - 1):
                losses.append(float(cross_entropy(logits[place - 1], torch.tensor(row[place]))))
        found = text_loss(view(family, backend, tokenizer_folder), prompts(rows), batch_size=2)
    assert found == pytest.approx(math.fsum(losses) / len(losses), rel=1e-12)


def test_prompts_that_are_the_same_have_no_text_of_their_own(tokenizer_folder):
    seen = view("gpt2", "bridge", tokenizer_folder)
    assert math.isnan(text_loss(seen, prompts([[1, 2, 3], [1, 2, 3]])))


def test_without_a_template_the_first_token_is_not_predicted(tokenizer_folder):
    seen = view("gpt2", "bridge", tokenizer_folder)
    logits = seen.logits(torch.tensor([[4, 5, 6]]))[0]
    other = seen.logits(torch.tensor([[7, 8]]))[0]
    losses = [cross_entropy(logits[i], torch.tensor([5, 6][i])) for i in range(2)]
    losses.append(cross_entropy(other[0], torch.tensor(8)))
    found = text_loss(seen, prompts([[4, 5, 6], [7, 8]]))
    assert found == pytest.approx(float(sum(losses)) / 3, rel=1e-6)
    # A prompt that ends all others has no text of its own.
    longer = seen.logits(torch.tensor([[10, 11, 12, 4, 5]]))[0]
    losses = [cross_entropy(longer[i], torch.tensor([11, 12][i])) for i in range(2)]
    found = text_loss(seen, prompts([[4, 5], [10, 11, 12, 4, 5]]))
    assert found == pytest.approx(float(sum(losses)) / 2, rel=1e-6)
