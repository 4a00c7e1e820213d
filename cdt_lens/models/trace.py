"""Define `Trace`, the record of one ordinary forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from cdt_lens.core.errors import UnsupportedModelError
from cdt_lens.models.sites import Hook, Site


@dataclass(frozen=True, eq=False)
class BlockCall:
    """The arguments with which the model called one block, without the residual stream.

    Attributes:
        args: positional arguments after the residual stream.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Trace:
    """The record of one ordinary forward pass.

    Attributes:
        resid: residual streams before each block and after the last one.
        calls: the call of every block.
        activations: the recorded activations by site, detached.
    """

    resid: tuple[Float[Tensor, "batch pos d_model"], ...]
    calls: tuple[BlockCall, ...]
    activations: Mapping[Site, Tensor] = field(repr=False)

    def __getitem__(self, site: Site) -> Tensor:
        return self.activations[site]

    def __contains__(self, site: Site) -> bool:
        return site in self.activations


def _recorder(activations: dict[Site, Tensor], site: Site) -> Hook:
    def record(value: Tensor) -> None:
        activations[site] = value.detach()

    return record


def _shared_calls(calls: list[BlockCall], batch: int) -> tuple[BlockCall, ...]:
    """Reduce each per-example argument to one row, which then serves any number of rows.

    Right-padded prompts share masks and positions. A model whose rows differ cannot be replayed,
    and `UnsupportedModelError` is raised.
    """
    rows: dict[int, Tensor] = {}
    return tuple(
        BlockCall(
            _one_row(call.args, batch, rows),
            {name: _one_row(value, batch, rows) for name, value in call.kwargs.items()},
        )
        for call in calls
    )


def _one_row(value: Any, batch: int, rows: dict[int, Tensor]) -> Any:
    """Return the first row of a tensor whose rows are equal; `rows` holds those that were made."""
    if isinstance(value, tuple):
        return tuple(_one_row(item, batch, rows) for item in value)
    if not isinstance(value, Tensor) or batch == 1 or value.shape[:1] != (batch,):
        return value
    if id(value) not in rows:
        if not bool((value == value[:1]).all()):
            raise UnsupportedModelError(
                "the model passes its blocks a mask or positions that differ between prompts "
                "padded on the right; no rule exists for that"
            )
        rows[id(value)] = value[:1]
    return rows[id(value)]
