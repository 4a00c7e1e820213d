"""Every head at once from one backward pass: linear rules, gradients, and gradients along a path.

Where each nonlinearity has a linear stand-in, relevance is one linear map, and its transpose is a
backward pass: score(head) = sum over positions of <gradient at z, z - baseline> (method.md §3).

1. One ordinary forward pass with a gate on every head's z: z = baseline + gate * (z - baseline).
   All gates are 1, so that nothing changes; d(direction) / d(gate) is the head's score.
2. Hooks leave every value as it is and give its gradient the slope that `Slopes` names.
3. Along a path the gates of all heads move together from 0 (every head ablated) to 1 (the plain
   model), and the scores are the average over the path. With plain derivatives they add up to
   m(full) - m(empty): the Aumann-Shapley values of the game that faithfulness measures. Its two
   ends alone are the first-order form of the "two-ended" rules.

Departures from the full rules (`scores.score_heads`): no step works on the irrelevant part
itself, so what a head does by saturating an activation, by moving a norm's scale far, or by moving
attention is seen to first order at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Literal

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from cdt_lens import display
from cdt_lens import rules as rule
from cdt_lens.baselines import Baseline, BaselineAt, check_baseline
from cdt_lens.caller_hooks import caller_hooks
from cdt_lens.distributed import gather_items, is_main, shard
from cdt_lens.errors import InputError, NonFiniteError, UnsupportedModelError
from cdt_lens.head_scores import HeadScores
from cdt_lens.heads import Head
from cdt_lens.metrics import strongest_competitor, task_direction
from cdt_lens.model import ModelView, at_least_float32, view_of
from cdt_lens.provenance import provenance_of
from cdt_lens.scores import Direction, collect_scores, recorded_options
from cdt_lens.sites import Hook, Site
from cdt_lens.slopes import Slopes, resolve_slopes, slope_hooks
from cdt_lens.support import Support, check_caller_hooks, check_supported
from cdt_lens.tasks import Batch, Examples, require_examples

# Where the gates of all heads stand, from 0 (ablated) to 1 (as they are).
Steps = int | Literal["ends"] | None


def _points(steps: Steps) -> list[float]:
    if steps is None:
        return [1.0]
    if steps == "ends":
        return [0.0, 1.0]
    return [(i + 0.5) / steps for i in range(steps)]


# Tensors made in the caller's inference mode may take no part in a backward pass.
@torch.inference_mode(False)
def one_pass(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    slopes: str | Slopes = "stable",
    steps: Steps = None,
    direction: Direction = "mean",
    batch_size: int = 16,
    method: str = "one-pass",
    progress: bool = True,
) -> HeadScores:
    """Scores of all heads from one forward and one backward pass a batch; signed, in logits.

    Args:
        slopes: a preset's name or `Slopes`. steps: None for one pass at the plain model; "ends" for
            the mean of one there and one at the model whose heads are all ablated; a number for
            the average over that many midpoints of the path between the two.

    Raises:
        InputError: no examples, prompts longer than the model's context, a baseline of another
            shape, or weights made in inference mode.
        UnsupportedModelError: an MLP without the hook points that its slopes need.
        NonFiniteError: a score left the finite range, as half precision may.
    """
    require_examples(examples)
    view = view_of(model)
    slopes = resolve_slopes(slopes)
    if not (steps in (None, "ends") or (isinstance(steps, int) and steps >= 1)):
        raise InputError(f"one_pass: steps={steps!r}: expected at least 1, 'ends' or None")
    check_baseline(baseline, view)
    options = {
        "method": method,
        "slopes": asdict(slopes),
        "steps": steps,
        **recorded_options(baseline, direction),
        "heads": "all",
    }
    passes = GatedPass(view, slopes)
    items: list[tuple[int, Tensor]] = []
    batches = list(examples.batches(batch_size, shard=shard()))
    for batch in tqdm(batches, desc=method, disable=not (progress and is_main())):
        batch = batch.to(view.device)
        at = baseline.for_batch(view, batch)
        by_position, full = passes.scores(batch, at, steps, direction)
        relevant = reduce(by_position, "example layer head pos -> example layer head", "sum")
        rows = torch.cat([relevant.flatten(1), full[:, None]], 1).float().cpu()
        items += list(zip(batch.index, rows, strict=True))
    done = dict(gather_items(items))
    provenance = provenance_of(view, examples, options=options)
    return collect_scores(view, examples, done, None, method, provenance)


@torch.inference_mode(False)
def position_relevance(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    slopes: str | Slopes = "stable",
    batch_size: int = 16,
) -> Float[Tensor, "example layer head pos"]:
    """The part of each head's score that its z at each position gives; signed, in logits.

    The sum over positions is the head's score on that example. NaN behind shorter prompts.
    Raises what `one_pass` raises.
    """
    require_examples(examples)
    view = view_of(model)
    check_baseline(baseline, view)
    passes = GatedPass(view, resolve_slopes(slopes))
    longest = max(len(example.tokens) for example in examples)
    out = torch.full((len(examples), view.n_layers, view.n_heads, longest), torch.nan)
    for batch in examples.batches(batch_size):
        batch = batch.to(view.device)
        values, _ = passes.scores(batch, baseline.for_batch(view, batch), None, "mean")
        for row, index in enumerate(batch.index):
            length = int(batch.lengths[row])
            out[index, ..., :length] = values[row, ..., :length].float().cpu()
    return out


class GatedPass:
    """The model's own forward pass, with a gate on every head and the slopes of `slopes`."""

    def __init__(self, view: ModelView, slopes: Slopes) -> None:
        self.view, self.slopes = view, slopes
        if any(parameter.is_inference() for parameter in view.tl.parameters()):
            raise InputError(
                f"{view.name}: its weights were made under torch.inference_mode, which allows no "
                "backward pass; load the model outside of it"
            )
        self.support: Support = check_supported(view)
        has_mlp = {layer for site, layer in view.sites if site == "mlp_out"}
        if slopes.touches_mlp and has_mlp - self.support.plain_mlp:
            raise UnsupportedModelError(
                f"{view.name}: the MLP is not act(x W_in) or act(x W_gate) * x W_in, so only "
                "activation='tangent' with product='tangent' has a meaning; use slopes='stable'"
            )

    def scores(
        self, batch: Batch, baseline: BaselineAt, steps: Steps, direction: Direction
    ) -> tuple[Float[Tensor, "example layer head pos"], Float[Tensor, " example"]]:
        """d(direction) / d(gate) by position, averaged over the path; and the plain direction."""
        view = self.view
        self._check_caller_hooks(batch)
        weights = batch.direction
        if direction == "strongest":
            # The competitor is fixed by the plain model.
            plain = self._plain_logits(batch)
            weights = strongest_competitor(plain, batch.is_answer, batch.is_candidate)
        points = _points(steps)
        total: Tensor | None = None
        full = torch.zeros(len(batch.index))
        for point in points:
            gates: dict[int, Tensor] = {}
            # Whatever mode the caller is in.
            with torch.inference_mode(False), torch.enable_grad():
                d = task_direction(
                    self._logits(batch, self._gate_hooks(baseline, point, gates)), weights
                )
                found = self._gradient(d, [gates[layer] for layer in range(view.n_layers)])
            stacked = torch.stack([at_least_float32(g) for g in found])
            total = stacked if total is None else total + stacked
            full = d.detach()
        assert total is not None
        if points[-1] != 1.0:
            full = task_direction(self._plain_logits(batch), weights)
        mean = total / len(points)
        by_position = rearrange(mean, "layer example pos head 1 -> example layer head pos")
        self._check_finite(by_position, full)
        return by_position, full

    def _check_finite(
        self, by_position: Float[Tensor, "example layer head pos"], full: Float[Tensor, " example"]
    ) -> None:
        # A NaN would pass for a head that was not asked for.
        if not bool(torch.isfinite(full).all()):
            raise NonFiniteError(
                f"{self.view.name}: its own logits are not finite on these prompts; load it in "
                "float32"
            )
        bad = (~torch.isfinite(by_position)).any(-1).any(0).nonzero().tolist()
        if bad:
            raise NonFiniteError(
                f"{self.view.name}: the scores of {len(bad)} heads are not finite under these "
                f"slopes; first: {Head(*bad[0])}; load the model in float32"
            )

    def _check_caller_hooks(self, batch: Batch) -> None:
        """Refuse hooks of the caller's through which these slopes are not the model's."""
        by_formula = self.slopes.touches_mlp or self.slopes.norm == "frozen"
        edits = "slopes by formula (norm='frozen', or other than 'tangent' in the MLP)"
        check_caller_hooks(
            self.view, batch.tokens, batch.lengths, edits=edits if by_formula else None
        )

    def gradients(self, batch: Batch, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Gradient of the direction by the activation at each site, as the slopes have it."""
        probes: dict[Site, Tensor] = {}

        def probe_at(site: Site) -> Hook:
            def hook(value: Tensor) -> Tensor:
                probes[site] = torch.zeros_like(value, requires_grad=True)
                return value + probes[site]

            return hook

        with torch.inference_mode(False), torch.enable_grad():
            logits = self._logits(batch, {site: probe_at(site) for site in sites})
            d = task_direction(logits, batch.direction)
            found = self._gradient(d, [probes[site] for site in sites])
        return dict(zip(sites, found, strict=True))

    def _gradient(self, d: Float[Tensor, " example"], by: Sequence[Tensor]) -> list[Tensor]:
        """Gradient of the sum of `d`; 0 where a hook of the caller's cut the way to the logits.

        Raises:
            InputError: a hook of the caller's edits in place what the gradient needs.
        """
        if not d.requires_grad:
            return [torch.zeros_like(each) for each in by]
        try:
            found = torch.autograd.grad(d.sum(), by, allow_unused=True)
        except RuntimeError as error:
            hooks = caller_hooks(self.view.tl)
            if not hooks or isinstance(error, torch.OutOfMemoryError):
                raise
            raise InputError(
                f"{self.view.name}: no gradient through your own hooks ({display.few(hooks)}); "
                "return a new tensor from them instead of editing in place "
                f"({str(error).splitlines()[0]})"
            ) from error
        return [torch.zeros_like(w) if g is None else g for g, w in zip(found, by, strict=True)]

    def _plain_logits(self, batch: Batch) -> Float[Tensor, "batch k"]:
        with torch.no_grad():
            return self._logits(batch, {})

    def _logits(self, batch: Batch, hooks: Mapping[Site, Hook]) -> Float[Tensor, "batch k"]:
        """Candidate logits with `hooks` in place, and the slopes if gradients are on."""
        view = self.view
        gradients = torch.is_grad_enabled()
        hooks = {**hooks, **(slope_hooks(view, self.slopes) if gradients else {})}
        with view.quiet(gradients=gradients), view.hooked(hooks):
            resid = view.stream(batch.tokens)[0][-1]
            rows = torch.arange(len(batch.index), device=resid.device)
            answer = resid[rows, batch.lengths.to(resid.device) - 1]
            normed = at_least_float32(view.normed(answer))
        columns, offsets = view.unembedding(batch.candidates)
        logits = einsum(normed, columns, "b d, b k d -> b k") + offsets
        cap = view.logit_softcap
        if cap is None:
            return logits
        if self.slopes.activation == "tangent":
            return cap * torch.tanh(logits / cap)
        plain = logits.detach()
        slope = rule.secant(lambda x: cap * torch.tanh(x / cap), plain)
        return cap * torch.tanh(plain / cap) + slope * (logits - plain)

    # ------------------------------------------------------------------ hooks

    def _gate_hooks(
        self, baseline: BaselineAt, point: float, gates: dict[int, Tensor]
    ) -> dict[Site, Hook]:
        def gate_at(layer: int) -> Hook:
            def hook(z: Tensor) -> Tensor:
                gate = torch.full(
                    (*z.shape[:-1], 1), point, dtype=z.dtype, device=z.device, requires_grad=True
                )
                gates[layer] = gate
                away = z - baseline(layer).to(z.dtype)
                # At the plain model the value of z must not lose a bit.
                here = z if point == 1.0 else z + (point - 1.0) * away
                return here + (gate - point) * away

            return hook

        return {("z", layer): gate_at(layer) for layer in range(self.view.n_layers)}
