"""Tasks whose label words have several tokens, and their scores by hand, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.models.heads import Head
from cdt_lens.models.view import ModelView
from cdt_lens.tasks.task import Example, Examples, Task, WordIds
from helpers import tiny_tasks, tiny_training

# One word of one token and two longer ones, which need two rows.
SPLIT: dict[str, WordIds] = {"positive": (20, 21), "neutral": 30, "negative": (50, 40, 41)}
Read = Callable[[Tensor], Float[Tensor, "pos d_vocab"]]


def split(data: Examples) -> Examples:
    """The same prompts with the words above."""
    items = []
    for item in data:
        others = tuple(word for label, word in SPLIT.items() if label != item.label)
        items.append(replace(item, answers=(SPLIT[item.label],), others=others))
    return replace(data, items=tuple(items))


def examples(**options: Any) -> Examples:
    return split(tiny_tasks.examples(**options))


def task(**options: Any) -> Task:
    own = tiny_training.task(**options)
    splits = {name: split(getattr(own, name)) for name in ("train", "valid", "test")}
    return replace(own, verbalizer_ids=SPLIT, **splits)


def ids(word: WordIds) -> tuple[int, ...]:
    return word if isinstance(word, tuple) else (word,)


def score(read: Read, item: Example, word: WordIds) -> Tensor:
    """The sum of the tokens' log-probabilities in one pass over the prompt and the word."""
    own = ids(word)
    logs = read(torch.tensor([[*item.tokens, *own[:-1]]])).log_softmax(-1)
    first = len(item.tokens) - 1
    return torch.stack([logs[first + i, token] for i, token in enumerate(own)]).sum()


def scores(read: Read, item: Example) -> Float[Tensor, " k"]:
    return torch.stack([score(read, item, word) for word in item.candidates])


def direction(found: Float[Tensor, " k"]) -> Tensor:
    return found[0] - found[1:].mean()


def plain(model: Any) -> Read:
    return lambda tokens: model(tokens).logits[0]


def ablated(
    view: ModelView, heads: Sequence[Head], baseline: Baseline, item: Example, gate: Any = 0.0
) -> Read:
    """TransformerLens' own hooks: z of some heads between its mean (gate 0) and itself (gate 1).

    The prompt's last token and each position behind it have means of their own.
    """

    def reset(z: Tensor, hook: Any) -> Tensor:
        layer, z = int(hook.name.split(".")[1]), z.clone()
        slots = [0] * (len(item.tokens) - 1) + list(range(1, z.shape[1] - len(item.tokens) + 2))
        for head in heads:
            if head.layer == layer:
                mean = baseline.means[layer, slots, head.head].to(z.dtype)
                z[0, :, head.head] = mean + gate * (z[0, :, head.head] - mean)
        return z

    hooks = [(f"blocks.{layer}.attn.hook_z", reset) for layer in range(view.n_layers)]
    more = {"use_cache": False} if view.is_bridge else {}
    return lambda tokens: view.tl.run_with_hooks(tokens, fwd_hooks=hooks, **more)[0]
