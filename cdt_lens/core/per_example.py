"""Tables with one row per example, which lie on the disk once they are large.

A score keeps one number per example and head, so that intervals can be made of it. Past a stated
size such a table is a file that the system maps into memory: it writes pages to the disk and drops
them from memory when others need the room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cdt_lens.core.processes import gather_items, shard
from cdt_lens.core.set_aside import reserved_file

# Tables of more bytes than this lie on the disk.
IN_MEMORY = 2**28
_BLOCK = 1024  # rows that processes exchange at a time

Slices = Sequence[Float[Tensor, "example layer head"]]


def table(*shape: int, dtype: torch.dtype | None = None) -> Float[Tensor, ...]:
    """Return a table of NaN.

    Args:
        shape: Its shape.
        dtype: Its type; None takes that of torch.

    Returns:
        The table. Past `IN_MEMORY` bytes it is a mapped file without a name, which the system
        removes with the last reference to it.

    Raises:
        InputError: The disk is full, or there is no temporary folder.
    """
    count = math.prod(shape)
    size = count * (dtype or torch.get_default_dtype()).itemsize
    if size <= IN_MEMORY:
        return torch.full(shape, torch.nan, dtype=dtype)
    with reserved_file(size, "cdt-lens-table.values", "scores") as path:
        rows = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
    return rows.reshape(shape).fill_(torch.nan)


def share_rows(rows: Float[Tensor, "example ..."], own: Iterable[int]) -> None:
    """Give every process the rows that the others have computed.

    Args:
        rows: The table, changed in place.
        own: The rows of this process.
    """
    if shard()[1] == 1:
        return
    mine = set(own)
    for start in range(0, len(rows), _BLOCK):
        block = range(start, min(start + _BLOCK, len(rows)))
        for i, row in gather_items([(i, rows[i].clone()) for i in block if i in mine]):
            rows[i] = row


def by_layer(
    function: Callable[..., Tensor], first: Tensor, more: Slices, *rest: object
) -> Float[Tensor, "layer head *rest"]:
    """Apply a function that reduces examples to one layer at a time, so that little is copied.

    Args:
        function: Takes tables of one layer, and the rest.
        first: A table [example, layer, head].
        more: Further ones.
        rest: Further arguments of the function.

    Returns:
        The results [1, head, ...] of all layers.
    """
    layers = range(first.shape[1])
    parts = (
        function(first[:, n : n + 1], [each[:, n : n + 1] for each in more], *rest) for n in layers
    )
    return torch.cat(list(parts))
