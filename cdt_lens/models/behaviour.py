"""Describe what a model computes, so that a checkpoint is not continued with another model.

The hash of the weights does not cover everything that changes a number: configuration values of a
module and hooks do as well. A checkpoint therefore holds logits of the model on a few prompts. This
cannot identify hooks of the caller's, because a hook may act on other prompts only.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from cdt_lens.core.errors import InputError
from cdt_lens.core.kept import Behaviour
from cdt_lens.models.caller_hooks import caller_hooks
from cdt_lens.models.view import ModelView, at_answer

PROMPTS = 4  # always as many, whatever the batch size of the call
_CANDIDATES = 32


def behaviour_of(
    view: ModelView, tokens: Int[Tensor, "batch pos"], lengths: Int[Tensor, " batch"]
) -> Behaviour:
    """Compute logits by which a checkpoint knows the model.

    Args:
        view: the model.
        tokens: a few prompts, padded on the right.
        lengths: number of real tokens of each prompt.

    Returns:
        The logits of the first tokens of the vocabulary at the answer positions.

    Raises:
        InputError: the model has hooks of the caller's.
    """
    hooks = caller_hooks(view.tl)
    if hooks:
        raise InputError(
            f"checkpoint: the model has hooks of your own ({hooks[0]}), and numbers with them "
            "could not be told from numbers with others; leave checkpoint out, or remove the hooks"
        )
    trace = view.run(tokens)
    first = torch.arange(min(_CANDIDATES, view.tl.unembed.W_U.shape[-1])).expand(len(tokens), -1)
    with view.quiet():
        logits = view.candidate_logits(at_answer(trace.resid[-1], lengths), first)
    values = tuple(logits.double().flatten().tolist())
    return Behaviour(values, 1e-4 if view.dtype.itemsize >= 4 else 3e-2)
