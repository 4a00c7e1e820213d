"""`Head` and `Mlp`: units of a model, and sets of heads as boolean `[layer, head]` masks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from cdt_lens.core.errors import InputError

_PATTERN = re.compile(r"\s*[Ll](\d+)\s*[Hh](\d+)\s*|\s*(\d+)\.(\d+)\s*")


@dataclass(frozen=True, order=True)
class Head:
    """Attention head `head` of layer `layer`, both counted from 0; ordered by layer, then head."""

    layer: int
    head: int

    def __post_init__(self) -> None:
        if self.layer < 0 or self.head < 0:
            raise InputError(
                f"Head({self.layer}, {self.head}): layer and head are counted from 0 upwards"
            )

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read `"L9H6"` or `"9.6"`.

        Raises:
            InputError: `text` has neither form.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise InputError(f"head {text!r}: expected the form L9H6 (layer 9, head 6) or 9.6")
        layer, head = (group for group in match.groups() if group is not None)
        return cls(int(layer), int(head))


@dataclass(frozen=True, order=True)
class Mlp:
    """The MLP of layer `layer`, counted from 0."""

    layer: int

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise InputError(f"Mlp({self.layer}): layers are counted from 0 upwards")

    def __str__(self) -> str:
        return f"M{self.layer}"


def check_heads(heads: Iterable[Head | str], n_layers: int, n_heads: int) -> tuple[Head, ...]:
    """Return `heads` sorted and without repeats; `"L9H6"` is read as a head.

    Raises:
        InputError: something that is no head, or a head outside a model of `n_layers` layers of
            `n_heads` heads.
    """
    read = [Head.parse(head) if isinstance(head, str) else head for head in heads]
    for head in read:
        if not isinstance(head, Head):
            raise InputError(f"head {head!r}: expected Head(9, 6) or 'L9H6'")
    ordered = tuple(sorted(set(read)))
    for head in ordered:
        if head.layer >= n_layers or head.head >= n_heads:
            raise InputError(
                f"head {head}: the model has layers 0-{n_layers - 1} of heads 0-{n_heads - 1}"
            )
    return ordered


def heads_to_mask(heads: Iterable[Head], n_layers: int, n_heads: int) -> Bool[Tensor, "layer head"]:
    """Boolean mask `[layer, head]`, True where a head is in `heads`."""
    mask = torch.zeros(n_layers, n_heads, dtype=torch.bool)
    for head in check_heads(heads, n_layers, n_heads):
        mask[head.layer, head.head] = True
    return mask


def mask_to_heads(mask: Bool[Tensor, "layer head"]) -> tuple[Head, ...]:
    """The heads at which `mask` is True, in order."""
    return tuple(Head(int(layer), int(head)) for layer, head in mask.nonzero().tolist())


def all_heads(n_layers: int, n_heads: int) -> tuple[Head, ...]:
    """Every head of a model, layer by layer."""
    return tuple(Head(layer, head) for layer in range(n_layers) for head in range(n_heads))
