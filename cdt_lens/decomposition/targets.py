"""Collect both parts of target heads' q, k, v and z, one chunk of source sets at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cdt_lens.core.equality import EqualByContent
from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.models.heads import Head
from cdt_lens.models.sites import Site


@dataclass(frozen=True, eq=False)
class TargetParts(EqualByContent):
    """Both parts of a target head's activation.

    `relevant + irrelevant` is the activation. Both are 0 at the padding of shorter prompts.

    Attributes:
        relevant: the part that the source set contributes, in the units of the activation.
        irrelevant: the rest.
    """

    relevant: Float[Tensor, "source example pos d_head"]
    irrelevant: Float[Tensor, "source example pos d_head"]

    def __repr__(self) -> str:
        return f"TargetParts({tuple(self.relevant.shape)}: source, example, position, d_head)"


class Targets:
    """Collects the irrelevant part of target heads' q, k, v and z.

    Args:
        propagator: the batch, with its recorded run.
        heads: the target heads.
        n_sources: number of source sets.
    """

    def __init__(self, propagator: Propagator, heads: Iterable[Head], n_sources: int) -> None:
        view, trace = propagator.view, propagator.trace
        group = view.n_heads // view.n_kv_heads
        self._where = {
            (site, head): head.head // group if site in ("k", "v") else head.head
            for head in heads
            for site in ("q", "k", "v", "z")
        }
        self._full = {
            (site, head): trace[site, head.layer][:, :, index]
            for (site, head), index in self._where.items()
        }
        positions = torch.arange(trace.resid[-1].shape[1], device=propagator.lengths.device)
        self._real = (positions < propagator.lengths[:, None])[..., None]
        # Upstream of the sources nothing is recorded, and everything is irrelevant.
        self._irrel = {
            key: full.expand(n_sources, *full.shape).clone() for key, full in self._full.items()
        }

    def hooks(self, chunk: list[int]) -> dict[Site, Callable[[Tensor], None]]:
        """Return the taps that record the irrelevant part during the pass of one chunk.

        Args:
            chunk: positions of the chunk's source sets among all source sets.

        Returns:
            A tap for each site of a target head.
        """
        hooks: dict[Site, Callable[[Tensor], None]] = {}
        for site in {(site, head.layer) for site, head in self._where}:
            hooks[site] = self._tap(site, chunk)
        return hooks

    def _tap(self, site: Site, chunk: list[int]) -> Callable[[Tensor], None]:
        def tap(value: Tensor) -> None:
            for (name, head), index in self._where.items():
                if (name, head.layer) == site:
                    self._irrel[name, head][chunk] = value[:, :, :, index]

        return tap

    def parts(self) -> dict[tuple[str, Head], TargetParts]:
        """Return both parts at each (site, head), for all source sets."""
        real = self._real
        return {
            key: TargetParts((self._full[key] - irrel) * real, irrel * real)
            for key, irrel in self._irrel.items()
        }
