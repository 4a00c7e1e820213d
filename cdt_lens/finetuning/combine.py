"""Add several adapters of one base model: a language and a task, or two tasks.

Each adapter is a change of the base's weights. The sum of changes, each with a weight of its own,
is an adapter again. Where two of them change the same slices they may disturb each other, so
`overlap` says which. Composing sparse changes is the idea of LT-SFT (arXiv 2110.07560).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pandas as pd
from torch import Tensor, nn

from cdt_lens.core.artifacts import content_hash
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.errors import InputError
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.slices import by_channel
from cdt_lens.models.provenance import command_line, now, versions
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView, at_least_float32, view_of
from cdt_lens.models.weights import named_weights
from cdt_lens.tasks.card import TaskCard

_T = TypeVar("_T")


@checked_arguments
@uses_model
def combine(
    model: nn.Module | ModelView, adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
) -> Adapter:  # fmt: skip
    """Return the adapter whose change is the weighted sum of the changes of others.

    Args:
        model: The base model of all adapters.
        adapters: The adapters, at least two.
        weights: The weight of each; None weighs each by 1.

    Returns:
        The adapter, with the scope "combined". Its provenance names the parts and their weights,
        and counts the examples of all. It keeps the task card if the parts make their prompts in
        the same way.

    Raises:
        InputError: Fewer than two adapters, or not one weight for each.
        ArtifactError: An adapter is of another base model.
    """
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(adapters) < 2 or len(weights) != len(adapters):
        raise InputError(
            f"combine: expected two or more adapters and a weight for each, got {len(adapters)} "
            f"and {len(weights)}"
        )
    view = view_of(model)
    for adapter in adapters:
        adapter.provenance.check_model(view, "this adapter")
    base = named_weights(view)
    names = dict.fromkeys(name for a in adapters for name in (*a.slices, *a.whole))
    slices, whole = {}, {}
    for name in names:
        value = _first(name, base[name]).detach().cpu()
        total = at_least_float32(value).clone()
        for adapter, weight in zip(adapters, weights, strict=True):
            _add(total, at_least_float32(value), adapter, name, weight)
        total = total.to(value.dtype)
        if any(name in adapter.whole for adapter in adapters):
            whole[name] = _first(name, total).contiguous()
        else:
            index = sorted({i for a in adapters for i in a.slices.get(name, ((), None))[0]})
            slices[name] = (tuple(index), total[index])
    origins = [adapter.provenance for adapter in adapters]
    tasks = [origin.task for origin in origins]
    options: dict[str, Any] = {
        "scope": "combined", "weights": weights, "parts": tasks,
        "overlap": int(overlap(adapters)["elements"].sum()),
    }  # fmt: skip
    labels = dict.fromkeys(label for origin in origins for label in origin.examples)
    provenance = replace(
        origins[0], task=" + ".join(tasks), options=options, command=command_line(), created=now(),
        task_hash=content_hash([origin.task_hash for origin in origins]),
        examples={label: sum(o.examples.get(label, 0) for o in origins) for label in labels},
        seed=_shared([origin.seed for origin in origins]), versions=versions(),
    )  # fmt: skip
    heads = tuple(sorted({head for adapter in adapters for head in adapter.heads}))
    return Adapter(
        "combined", heads, slices, whole, provenance, _card([a.task for a in adapters]),
        total_parameters=_shared([a.total_parameters for a in adapters]),
    )  # fmt: skip


def _shared(values: Sequence[_T]) -> _T | None:
    """Return the value that all parts have, or None."""
    return values[0] if all(value == values[0] for value in values) else None


def _card(cards: Sequence[TaskCard | None]) -> TaskCard | None:
    """Return how prompts are made, if all parts make them in the same way; else None."""
    known = [card for card in cards if card is not None]
    ways = [replace(card, name="", prior=None, longest=0) for card in known]
    if len(known) < len(cards) or _shared([way.to_dict() for way in ways]) is None:
        return None
    names = dict.fromkeys(card.name for card in known)
    return replace(
        known[0], name=" + ".join(names), prior=_shared([card.prior for card in known]),
        longest=max(card.longest for card in known),
    )  # fmt: skip


def overlap(adapters: Sequence[Adapter]) -> pd.DataFrame:
    """Return the weights that more than one adapter changes.

    Args:
        adapters: The adapters.

    Returns:
        One row for each weight: its name, the heads (or channels) that several adapters hold, None
        for a whole weight, and the number of elements of the overlap.
    """
    rows: list[tuple[str, list[int] | None, int]] = []
    for name in dict.fromkeys(name for a in adapters for name in (*a.slices, *a.whole)):
        whole = [a.whole[name] for a in adapters if name in a.whole]
        held = [i for a in adapters for i in a.slices.get(name, ((), None))[0]]
        own = next((v[0].numel() for a in adapters for _, v in [a.slices.get(name, ((), None))]
                    if v is not None), 0)  # fmt: skip
        if len(whole) > 1:
            rows.append((name, None, whole[0].numel()))
        elif whole and held:
            rows.append((name, sorted(set(held)), own * len(set(held))))
        else:
            twice = sorted({i for i in held if held.count(i) > 1})
            rows += [(name, twice, own * len(twice))] if twice else []
    return pd.DataFrame(rows, columns=["weight", "heads", "elements"])


def _first(name: str, weight: Tensor) -> Tensor:
    """Return a weight with its heads or channels first; a second call undoes it."""
    return by_channel(name.rpartition(".")[2], weight) if ".mlp." in name else weight


def _add(total: Tensor, base: Tensor, adapter: Adapter, name: str, weight: float) -> None:
    if name in adapter.whole:
        value = at_least_float32(_first(name, adapter.whole[name]))
        total += weight * (value - base)
    elif name in adapter.slices:
        index, value = adapter.slices[name]
        total[list(index)] += weight * (at_least_float32(value) - base[list(index)])
