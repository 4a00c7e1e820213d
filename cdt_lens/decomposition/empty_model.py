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

`nothing_left` is the run of MIB's evaluation (arXiv 2504.13151), in which MLPs and input take their
baseline as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from cdt_lens.core.errors import NonFiniteError
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.decomposition.hooks import MlpResets, Resets
from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.models.sites import Hook, Site
from cdt_lens.models.support import check_supported
from cdt_lens.models.view import ModelView, at_answer
from cdt_lens.models.words import Candidates
from cdt_lens.tasks.task import Batch


class EmptyModel:
    """One batch in the model whose heads are all ablated.

    Args:
        propagator: The same batch in the full model, with the baseline.

    Raises:
        NonFiniteError: The stream at the answers is not finite.
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
            if not bool(torch.isfinite(at_answer(resid[-1], propagator.lengths)).all()):
                raise NonFiniteError(
                    f"{view.name}: the model without heads left the finite range in layer {layer}. "
                    "Load the model in float32."
                )
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


def nothing_left(view: ModelView, batch: Batch, baseline: Baseline) -> Float[Tensor, "batch k"]:
    """Compute the candidates' logits of a run in which nothing of the prompts is left.

    The input, every head's z and every MLP's output take their baseline. With a counterfactual
    baseline this is the plain run of the counterfactual prompt, whose logits are read at the
    candidates of the example.

    Args:
        view: The model.
        batch: The prompts.
        baseline: The baseline, with values for the MLPs and the input.

    Returns:
        The logits, in at least float32.

    Raises:
        InputError: The baseline has no values for the MLPs or the input, or does not fit the
            model or the prompts.
        UnsupportedModelError: A component of the model has no rule.
    """
    check_supported(view)
    batch = batch.to(view.device)
    trace = view.run(batch.tokens)
    heads = baseline.for_batch(view, batch)
    hooks = {("z", layer): _constant(heads(layer)) for layer in range(view.n_layers)}
    with_mlps = [layer for name, layer in view.sites if name == "mlp_out"]
    if with_mlps:
        mlps = baseline.mlps_for_batch(view, batch)
        hooks |= {("mlp_out", layer): _constant(mlps(layer)) for layer in with_mlps}
    start = baseline.input_for_batch(view, batch).expand(trace.resid[0].shape).clone()
    last = at_answer(view.replay(trace, start, 0, hooks), batch.lengths, batch.candidates)
    with view.quiet():
        return view.candidate_logits(last, batch.candidates)


def _constant(values: Tensor) -> Hook:
    """Return a hook that puts `values` in place of an activation."""

    def hook(activation: Tensor) -> Tensor:
        given = values.to(activation.dtype)
        pinned = given.reshape(activation.shape) if given.dim() else given.expand(activation.shape)
        return pinned.contiguous()

    return hook
