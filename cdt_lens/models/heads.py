"""Define `Head` and `Mlp`, and convert sets of heads to `[layer, head]` masks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from cdt_lens.core.checked import checked_arguments, whole_number
from cdt_lens.core.errors import InputError

_PATTERN = re.compile(r"\s*[Ll](\d+)\s*[Hh](\d+)\s*|\s*(\d+)\.(\d+)\s*")


@dataclass(frozen=True, order=True)
class Head:
    """An attention head. Heads are ordered by layer, then by head.

    Attributes:
        layer: layer, counted from 0.
        head: head in its layer, counted from 0.

    Whole numbers of numpy and torch become Python's, so that equal heads are equal in a set too.

    Raises:
        InputError: a number is negative or no whole number.
    """

    layer: int
    head: int

    def __post_init__(self) -> None:
        count_from_zero(self, "layer", "head")

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    @classmethod
    @checked_arguments
    def parse(cls, text: str) -> Head:
        """Parse a head's name.

        Args:
            text: `"L9H6"` or `"9.6"`.

        Returns:
            The head.

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
    """The MLP of a layer.

    Attributes:
        layer: layer, counted from 0.

    Raises:
        InputError: the layer is negative or no whole number.
    """

    layer: int

    def __post_init__(self) -> None:
        count_from_zero(self, "layer")

    def __str__(self) -> str:
        return f"M{self.layer}"


def count_from_zero(place: object, *names: str) -> None:
    """Make whole numbers of the fields that say where a part of the model is.

    Args:
        place: a frozen dataclass, whose fields are replaced.
        names: names of the fields.

    Raises:
        InputError: a field is negative or no whole number.
    """
    for name in names:
        value = getattr(place, name)
        number = whole_number(value)
        if number is None or number < 0:
            values = ", ".join(str(getattr(place, n)) for n in names)
            raise InputError(
                f"{type(place).__name__}({values}): {' and '.join(names)} are whole numbers, "
                "counted from 0 upwards"
            )
        object.__setattr__(place, name, number)


def count_from_one(place: object, *names: str) -> None:
    """Make whole numbers of the fields that say how many parts there are.

    Args:
        place: a frozen dataclass, whose fields are replaced.
        names: names of the fields.

    Raises:
        InputError: a field is below 1 or no whole number.
    """
    for name in names:
        number = whole_number(getattr(place, name))
        if number is None or number < 1:
            raise InputError(
                f"{type(place).__name__}: {name}={getattr(place, name)!r}: expected a whole number "
                "of at least 1"
            )
        object.__setattr__(place, name, number)


def check_heads(heads: Iterable[Head | str], n_layers: int, n_heads: int) -> tuple[Head, ...]:
    """Check heads against a model's shape, sort them and remove repeats.

    Args:
        heads: heads or their names.
        n_layers: number of layers.
        n_heads: number of heads in a layer.

    Returns:
        The heads, ordered by layer and head.

    Raises:
        InputError: an item is not a head, or a head is outside the model.
    """
    read = [Head.parse(head) if isinstance(head, str) else head for head in heads]
    for head in read:
        if not isinstance(head, Head):
            given = " ".join(repr(head).split())[:60]
            raise InputError(f"head {given}: expected Head(9, 6) or 'L9H6'")
    ordered = tuple(sorted(set(read)))
    for head in ordered:
        if head.layer >= n_layers or head.head >= n_heads:
            raise InputError(
                f"head {head}: the model has layers 0-{n_layers - 1} of heads 0-{n_heads - 1}"
            )
    return ordered


def heads_to_mask(heads: Iterable[Head], n_layers: int, n_heads: int) -> Bool[Tensor, "layer head"]:
    """Convert heads to a mask.

    Args:
        heads: the heads.
        n_layers: number of layers.
        n_heads: number of heads in a layer.

    Returns:
        A mask that is True at each of the heads.

    Raises:
        InputError: a head is outside the model.
    """
    mask = torch.zeros(n_layers, n_heads, dtype=torch.bool)
    for head in check_heads(heads, n_layers, n_heads):
        mask[head.layer, head.head] = True
    return mask


def mask_to_heads(mask: Bool[Tensor, "layer head"]) -> tuple[Head, ...]:
    """Convert a mask to heads.

    Args:
        mask: a boolean mask.

    Returns:
        The heads at which the mask is True, in order.
    """
    return tuple(Head(int(layer), int(head)) for layer, head in mask.nonzero().tolist())


def all_heads(n_layers: int, n_heads: int) -> tuple[Head, ...]:
    """Return every head of a model.

    Args:
        n_layers: number of layers.
        n_heads: number of heads in a layer.

    Returns:
        The heads, layer by layer.
    """
    return tuple(Head(layer, head) for layer in range(n_layers) for head in range(n_heads))
