"""What a head adds to a model in which every head is ablated: the other end of ablation.

Removing a head from the whole model understates it where another stands in for it (OR, backup
heads), and adding it to an empty one understates it where it needs others (AND). The two are the
last and the first marginal contribution of the head in the game m(C) that faithfulness measures
(method.md §6), and a Shapley value is an average that begins and ends with them.

1. One run with every head's z at the baseline, MLPs intact: the empty model, m(empty).
2. For each source set, the same run from the set's first layer on, in which the set's heads work
   as they can there, every other head still at the baseline: m(set).
3. The logits of 2 less those of 1 are what the set adds. MLPs in the set, which the empty model
   has, add what is lost when they are set to their baseline there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cdt_lens.decomposition.hooks import MlpResets, Resets
from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.models.sites import Hook, Site
from cdt_lens.models.view import at_answer


class EmptyModel:
    """One batch in the model whose heads are all ablated, ready to be given some of them back."""

    def __init__(self, propagator: Propagator) -> None:
        self.run = propagator
        view = propagator.view
        pins = {("z", layer): self._pin(layer) for layer in range(view.n_layers)}
        # The calls of the blocks are the plain run's: masks and positions do not depend on z.
        trace = propagator.trace
        resid = [trace.resid[0]]
        for layer in range(view.n_layers):
            # A hook of the caller's may edit in place what is kept here.
            rows = resid[-1].clone()
            resid.append(view.replay(trace, rows, layer, pins, stop=layer + 1))
        self.resid = tuple(resid)

    def added_logits(
        self, resets: Resets, mlp_resets: MlpResets, candidates: Int[Tensor, "batch k"]
    ) -> Float[Tensor, "source batch k"]:
        """What each source set adds to the candidates' logits."""
        start = min([*resets, *mlp_resets])
        n_sources = next(iter([*resets.values(), *mlp_resets.values()])).shape[0]
        with_set = self._logits(start, n_sources, resets, {}, candidates)
        without = self._logits(start, n_sources if mlp_resets else 1, {}, mlp_resets, candidates)
        return with_set - without

    def _logits(
        self,
        start: int,
        n_sources: int,
        resets: Resets,
        mlp_resets: MlpResets,
        candidates: Int[Tensor, "batch k"],
    ) -> Float[Tensor, "source batch k"]:
        run, view = self.run, self.run.view
        hooks: dict[Site, Hook] = {}
        for layer in range(start, view.n_layers):
            hooks["z", layer] = self._pin(layer, resets)
            if layer in mlp_resets:
                hooks["mlp_out", layer] = self._reset_mlp(layer, mlp_resets)
        rows = self.resid[start].repeat(n_sources, 1, 1)
        out = view.replay(run.trace, rows, start, hooks)
        last = at_answer(out.reshape(n_sources, *self.resid[-1].shape), run.lengths)
        with view.quiet():
            return view.candidate_logits(last, candidates)

    def _pin(self, layer: int, resets: Resets | None = None) -> Hook:
        run = self.run
        baseline = run.baseline(layer)
        given = None if resets is None else resets.get(layer)

        def hook(z: Tensor) -> Tensor:
            rows = z.reshape(-1, *run.trace["z", layer].shape)
            pinned = baseline.to(z.dtype).expand(rows.shape)
            if given is not None:
                pinned = torch.where(given.unsqueeze(-1), rows, pinned)
            # TransformerBridge takes views of what a hook returns.
            return pinned.reshape(z.shape).contiguous()

        return hook

    def _reset_mlp(self, layer: int, resets: Mapping[int, Tensor]) -> Hook:
        run = self.run
        assert run.mlp_baseline is not None
        baseline = run.mlp_baseline(layer)

        def hook(value: Tensor) -> Tensor:
            rows = value.reshape(-1, *self.resid[layer].shape)
            kept = torch.where(resets[layer][:, None, None, None], baseline.to(value.dtype), rows)
            return kept.reshape(value.shape)

        return hook
