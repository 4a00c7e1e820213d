"""The loss of the language model on the text of a task's prompts: what fine-tuning forgets of it.

Training for a task moves the model at one position, the answer. Whether it still knows the language
shows in the loss of every other token. Tokens that all prompts share at the start and at the end
belong to the template and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView, at_least_float32, view_of
from cdt_lens.tasks.task import Examples, check_examples


@checked_arguments
def text_loss(model: nn.Module | ModelView, examples: Examples, *, batch_size: Count = 4) -> float:
    """Compute the mean cross-entropy of the prompts' own text.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The prompts. Their labels and answers have no meaning here.
        batch_size: Number of prompts per forward pass, whose logits are held for the whole
            vocabulary.

    Returns:
        The loss in nats a token: the mean over the tokens of all prompts, each predicted from those
        before it. NaN if the prompts have no text of their own.
    """
    losses, tokens = text_losses(model, examples, batch_size=batch_size)
    count = int(tokens.sum())
    return math.fsum(losses.tolist()) / count if count else math.nan


@checked_arguments
@uses_model
def text_losses(
    model: nn.Module | ModelView, examples: Examples, *, batch_size: Count = 4
) -> tuple[Float[Tensor, " example"], Int[Tensor, " example"]]:
    """Compute the cross-entropy of each prompt's own text.

    Args:
        model: As in `text_loss`.
        examples: The prompts.
        batch_size: As in `text_loss`.

    Returns:
        For each prompt the sum of the losses of its tokens, in nats, and the number of these.
    """
    view = view_of(model)
    check_examples(view, examples)
    first, last = _shared([example.tokens for example in examples])
    losses = torch.zeros(len(examples), dtype=torch.float64)
    counts = torch.zeros(len(examples), dtype=torch.long)
    for batch in examples.batches(batch_size, apart=view.longrope_limit):
        firsts = batch.firsts
        lengths = batch.prompt_lengths[firsts].tolist()
        found = _token_losses(view, batch.tokens[firsts])
        for place, row, length in zip(batch.index, found, lengths, strict=True):
            # Row i holds the loss of token i + 1.
            own = row[max(first, 1) - 1 : max(length - last - 1, 0)].double()
            losses[place], counts[place] = own.sum(), own.numel()
    return losses, counts


@torch.no_grad()
def _token_losses(view: ModelView, tokens: Tensor) -> Tensor:
    logits = at_least_float32(view.logits(tokens)[:, :-1])
    targets = tokens[:, 1:].to(logits.device)
    # One row at a time: a second copy of all logits would double the memory.
    losses = [
        nn.functional.cross_entropy(row, target, reduction="none")
        for row, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(losses).cpu()


def _shared(prompts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return how many tokens all prompts share at the start, and how many at the end."""
    start = _alike(prompts)
    return start, min(_alike([prompt[::-1] for prompt in prompts]), min(map(len, prompts)) - start)


def _alike(prompts: Sequence[Sequence[int]]) -> int:
    columns = zip(*prompts, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
