"""Keep one copy of what `HookedTransformer` saves several times for the backward pass.

1. Its MLPs, attention and unembedding multiply by contiguous transposed copies of their weights.
   Autograd saves the copies. Here the parameter is kept instead, and the copy is made again when
   the backward pass needs it.
2. It norms the input of attention three times, for q, k and v, and copies the attention pattern
   where it replaces NaN. Of saved tensors with the same bits one is kept.

Every replacement is compared with the original, bit for bit, so that gradients stay the same.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from itertools import permutations

import torch
from torch import Tensor, nn

_SMALL = 2**18  # bytes; smaller tensors are saved as they are
_RECENT = 6  # saved tensors of one size that a new one is compared with
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Unpack = Callable[[], Tensor]


class SavedOnce(torch.autograd.graph.saved_tensors_hooks):
    """A context in which autograd saves tensors with the same bits once.

    Args:
        parameters: The parameters of the model. They must not change between a forward pass and its
            backward pass.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = _Parameters(parameters)
        self._recent: dict[tuple[int, torch.dtype], deque[weakref.ref[_Kept]]] = {}
        super().__init__(self._pack, lambda unpack: unpack())

    def _pack(self, value: Tensor) -> Unpack:
        # Detached, because a saved result that kept its graph would keep itself alive.
        value = value.detach()
        flat = _flat(value)
        if flat is None or self._parameters.include(value):
            return _Kept(value)
        source = self._parameters.copied(flat) or self._equal(flat)
        shape, strides = value.shape, value.stride()
        return lambda: source().as_strided(shape, strides)

    def _equal(self, flat: Tensor) -> Unpack:
        """Keep a tensor, unless one with the same bits is kept already."""
        recent = self._recent.setdefault((flat.numel(), flat.dtype), deque(maxlen=_RECENT))
        for reference in reversed(recent):
            kept = reference()
            if kept is not None and kept.unchanged() and _same_bits(kept.value, flat):
                return kept
        kept = _Kept(flat)
        recent.append(weakref.ref(kept))  # the graph holds it as long as it needs it
        return kept


class _Kept:
    """A saved tensor, which must not be edited before the backward pass uses it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._version = value._version

    def unchanged(self) -> bool:
        return self.value._version == self._version

    def __call__(self) -> Tensor:
        if not self.unchanged():
            raise RuntimeError(
                "A tensor that the backward pass needs was modified by an in-place operation, such "
                "as that of a hook. Let the hook return a new tensor."
            )
        return self.value


class _Parameters:
    """The parameters of a model, in every order of their dimensions."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        held = [parameter.detach() for parameter in parameters]
        self._storages = {value.untyped_storage().data_ptr() for value in held}
        self._by_size: dict[tuple[int, torch.dtype], deque[Tensor]] = {}
        for value in held:
            orders = permutations(range(value.ndim)) if _is_large(value) else ()
            same = self._by_size.setdefault((value.numel(), value.dtype), deque())
            same.extend(value.permute(order) for order in orders)

    def include(self, value: Tensor) -> bool:
        """Return whether a tensor is a parameter or a view of one."""
        return value.untyped_storage().data_ptr() in self._storages

    def copied(self, flat: Tensor) -> Unpack | None:
        """Return how to make a copy of a parameter again, or None if `flat` is no such copy."""
        candidates = self._by_size.get((flat.numel(), flat.dtype), deque())
        for turn, moved in enumerate(candidates):
            shaped = flat.view(moved.shape)
            # A few elements first, because most of the candidates are other weights.
            if _same_bits(shaped[:1], moved[:1]) and _same_bits(shaped, moved):
                candidates.rotate(-turn)  # the weight of the next layer follows
                return lambda: moved.contiguous().view(-1)
        return None


def _flat(value: Tensor) -> Tensor | None:
    """Return the elements of a large tensor in the order of memory, as a view, or None."""
    if not _is_large(value) or value.dtype.itemsize not in _INTEGERS or value.is_complex():
        return None
    strides = value.stride()
    order = sorted(range(value.ndim), key=lambda dim: -strides[dim])
    ordered = value.permute(order)
    return ordered.reshape(-1) if ordered.is_contiguous() else None


def _is_large(value: Tensor) -> bool:
    return value.numel() * value.element_size() >= _SMALL


def _same_bits(one: Tensor, other: Tensor) -> bool:
    kind = _INTEGERS[one.dtype.itemsize]
    return torch.equal(one.view(kind), other.view(kind))
