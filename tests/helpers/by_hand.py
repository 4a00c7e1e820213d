"""Mean-ablation with TransformerLens' own hooks, one unpadded prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cdt_lens.circuits.ablation import Measurement
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.models.heads import Head
from cdt_lens.models.view import ModelView
from cdt_lens.tasks.task import Example, Examples


def ablated_logits(
    view: ModelView, item: Example, sets: Sequence[Iterable[Head]], baseline: Baseline
) -> Float[Tensor, "set d_vocab"]:
    """Return the logits at the answer, in each row with the z of one set's heads at its mean.

    The mean at the answer position is its own, that at the other positions another.
    """

    def reset(z: Tensor, hook: Any) -> Tensor:
        layer = int(hook.name.split(".")[1])
        z = z.clone()
        for row, heads in enumerate(sets):
            for head in heads:
                if head.layer == layer:
                    z[row, :-1, head.head] = baseline.means[layer, 0, head.head].to(z.dtype)
                    z[row, -1, head.head] = baseline.means[layer, 1, head.head].to(z.dtype)
        return z

    hooks = [(f"blocks.{layer}.attn.hook_z", reset) for layer in range(view.n_layers)]
    more = {"use_cache": False} if view.is_bridge else {}
    tokens = torch.tensor([item.tokens] * len(sets))
    with torch.no_grad():
        return view.tl.run_with_hooks(tokens, fwd_hooks=hooks, **more)[:, -1]


def direction(logits: Float[Tensor, " d_vocab"], item: Example) -> float:
    return float(logits[list(item.answers)].mean() - logits[list(item.others)].mean())


def is_right(logits: Float[Tensor, " d_vocab"], item: Example) -> float:
    return float(logits[list(item.answers)].max() > logits[list(item.others)].max())


def plain(values: list[float], data: Examples) -> float:
    """Mean over the examples."""
    return sum(values) / len(data)


def balanced(values: list[float], data: Examples) -> float:
    """Mean over labels of the per-label means."""
    by_label: dict[str, list[float]] = {}
    for item, value in zip(data, values, strict=True):
        by_label.setdefault(item.label, []).append(value)
    return sum(sum(group) / len(group) for group in by_label.values()) / len(by_label)


def flat_measurement(value: float) -> Callable[..., Measurement]:
    """Stands in for `measure_circuits`: the same metric whatever heads are left."""

    def measure(view: ModelView, circuits: Any, data: Examples, *_: Any, **__: Any) -> Measurement:
        unique = tuple(dict.fromkeys(circuits))
        table = torch.full((len(unique), len(data)), value, dtype=torch.float64)
        return Measurement(unique, table, torch.zeros(len(data), dtype=torch.long), "direction")

    return measure
