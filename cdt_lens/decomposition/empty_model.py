"""The effect of adding heads to the empty model, in which every head is ablated.

Removing a head from the full model understates it if another head stands in for it (OR, backup
heads). Adding it to the empty model understates it if it needs other heads (AND). The two are the
last and the first marginal contribution of the head in the game m(C) that faithfulness measures;
its Shapley value is an average over all of them.

1. Run the empty model: every head's z at its baseline, MLPs intact. This gives m(empty).
2. For each source set, repeat the run from the set's first layer on with the set's heads at work
   and every other head at its baseline. This gives m(set).
3. The effect is the logits of step 2 minus those of step 1. The empty model has its MLPs, so an MLP
   in the set adds what is lost there when its output takes its baseline.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from cdt_lens.decomposition.hooks import MlpResets, Resets
from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.models.sites import Hook, Site
from cdt_lens.models.view import at_answer
from cdt_lens.models.words import Candidates


class EmptyModel:
    """One batch in the model whose heads are all ablated.

    Args:
        propagator: The same batch in the full model, with the baseline.
    """

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
        self, resets: Resets, mlp_resets: MlpResets, candidates: Candidates
    ) -> Float[Tensor, "source batch k"]:
        """Compute what each source set adds to the logits of the candidates.

        Args:
            resets: Heads of each source set.
            mlp_resets: MLPs of each source set.
            candidates: The candidates of each example.

        Returns:
            The effect in logits; positive raises the token's logit.
        """
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
        candidates: Candidates,
    ) -> Float[Tensor, "source batch k"]:
        run, view = self.run, self.run.view
        hooks: dict[Site, Hook] = {}
        for layer in range(start, view.n_layers):
            hooks["z", layer] = self._pin(layer, resets)
            if layer in mlp_resets:
                hooks["mlp_out", layer] = self._reset_mlp(layer, mlp_resets)
        rows = self.resid[start].repeat(n_sources, 1, 1)
        out = view.replay(run.trace, rows, start, hooks)
        last = at_answer(out.reshape(n_sources, *self.resid[-1].shape), run.lengths, candidates)
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
        baseline = run.mlp_baseline(layer)

        def hook(value: Tensor) -> Tensor:
            rows = value.reshape(-1, *self.resid[layer].shape)
            kept = torch.where(resets[layer][:, None, None, None], baseline.to(value.dtype), rows)
            return kept.reshape(value.shape)

        return hook
