"""Run one forward pass with a gate on every head and differentiate by the gates.

The gate g of a head gives z = baseline + g (z - baseline). One backward pass then gives the
derivative of the task direction by every gate (docs/method/scores.md, "One pass"). Each head may
have a gate of its own (`GatedPass.direction`).

1. Attach the gates and the stand-ins of `slopes` to the model's own forward pass.
2. Compute the task direction d from the candidates' logits at the answer position.
3. Differentiate d by every gate at each position.
4. Average over the points of the path on which all gates move together. The default is the single
   point g = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from cdt_lens.core import display
from cdt_lens.core.choices import Count, Direction
from cdt_lens.core.errors import InputError, NonFiniteError, UnsupportedModelError
from cdt_lens.decomposition import rules as rule
from cdt_lens.decomposition.baseline import BaselineAt
from cdt_lens.decomposition.slopes import Slopes, slope_hooks
from cdt_lens.models.caller_hooks import caller_hooks
from cdt_lens.models.heads import Head
from cdt_lens.models.sites import Hook, Site
from cdt_lens.models.support import Support, check_caller_hooks, check_supported
from cdt_lens.models.view import ModelView, at_answer
from cdt_lens.models.weights import check_gradients
from cdt_lens.models.words import scores_of
from cdt_lens.tasks.metrics import strongest_competitor, task_direction
from cdt_lens.tasks.task import Batch

# How many points of the path, or which: see `points_of`.
Steps = Count | Literal["ends"] | None
# Where the gates of all heads stand: one number, or one for each example.
Point = float | Float[Tensor, " example"]
# The gates of each layer, each tensor broadcastable to [row, pos, head, 1].
Gates = Sequence[Tensor]


def points_of(steps: Steps) -> list[float]:
    """Return the points at which the gates of all heads stand.

    Args:
        steps: None for the plain model (1), "ends" for 0 and 1, or the number of midpoints between
            0 (every head ablated) and 1.
    """
    if steps is None:
        return [1.0]
    if steps == "ends":
        return [0.0, 1.0]
    return [(i + 0.5) / steps for i in range(steps)]


def soft_circuit(logits: Float[Tensor, "layer head"], size: float) -> Float[Tensor, "layer head"]:
    """Return gates sigmoid(logit - t), with t such that they add up to the size of a circuit.

    Args:
        logits: the logits of all heads.
        size: the sum, above 0 and below the number of heads.

    Returns:
        Gates from 0 to 1, differentiable by the logits.
    """
    values = logits.detach()
    ends = float(values.min()) - 50, float(values.max()) + 50
    t = brentq(lambda t: float(torch.sigmoid(values - t).sum()) - size, *ends)
    # The threshold moves with the logits, so that the sum stays.
    slope = torch.sigmoid(values - t) * torch.sigmoid(t - values)
    moved = (slope * (logits - values)).sum() / slope.sum().clamp(min=1e-12)
    return torch.sigmoid(logits - t - moved)


class GatedPass:
    """The model's own forward pass with a gate on every head.

    The backward pass uses the linear stand-ins of `slopes`.

    Args:
        view: the model.
        slopes: the stand-in of each nonlinearity.

    Raises:
        InputError: the weights were created under `torch.inference_mode`.
        UnsupportedModelError: a component of the model has no rule, or the slopes do not apply to
            its MLP.
    """

    def __init__(self, view: ModelView, slopes: Slopes) -> None:
        self.view, self.slopes = view, slopes
        check_gradients(view)
        self.support: Support = check_supported(view)
        if slopes.norm == "frozen" and slopes.paths == "all":
            moves = () if slopes.attention == "frozen" else ("attention",)
            self.support.check_norms(view.name, ("mlp", *moves), "norm='frozen'")
        has_mlp = {layer for site, layer in view.sites if site == "mlp_out"}
        if slopes.touches_mlp and has_mlp - self.support.plain_mlp:
            raise UnsupportedModelError(
                f"{view.name}: the MLP is not act(x W_in) or act(x W_gate) * x W_in, so only "
                "activation='tangent' with product='tangent' applies; use slopes='stable'"
            )

    def scores(
        self, batch: Batch, baseline: BaselineAt, points: Sequence[Point], direction: Direction,
        full: Float[Tensor, " example"] | None = None,
    ) -> tuple[Float[Tensor, "example layer head pos"], Float[Tensor, " example"]]:  # fmt: skip
        """Compute the derivative of the task direction by the gate of every head.

        Args:
            batch: the prompts.
            baseline: the reference values of z, a function of the layer.
            points: where all gates stand, from 0 (every head ablated) to 1 (the plain model); one
                number for all examples, or one for each.
            direction: "mean" or "strongest", see `tasks.metrics`. The plain model fixes the
                strongest competitor.
            full: the plain model's direction, where it is known. A run computes it otherwise, if no
                point is the plain model.

        Returns:
            The derivatives by position, averaged over the points, and the plain model's direction
            of each example. Both are in logits. Positive values push towards the gold label.

        Raises:
            InputError: the caller's hooks cannot be followed, or one of them edits in place.
            NonFiniteError: the logits or a score are not finite.
        """
        return self.along(batch, [(baseline, point) for point in points], direction, full)

    def along(
        self,
        batch: Batch,
        stations: Sequence[tuple[BaselineAt, Point]],
        direction: Direction,
        full: Float[Tensor, " example"] | None = None,
    ) -> tuple[Float[Tensor, "example layer head pos"], Float[Tensor, " example"]]:
        """Compute the same as `scores`, at points that have reference values of their own.

        Args:
            batch: the prompts.
            stations: for each point the reference values of z, and where all gates stand.
            direction: "mean" or "strongest".
            full: as in `scores`.

        Returns:
            The derivatives by position, averaged over the points, and the plain model's direction
            of each example, as `scores`.

        Raises:
            InputError, NonFiniteError: as `scores`.
        """
        self.check_caller_hooks(batch)
        weights = batch.direction
        if direction == "strongest":
            # The plain model fixes the competitor.
            plain = self._plain_logits(batch)
            weights = strongest_competitor(plain, batch.is_answer, batch.is_candidate)
        gradients: list[Tensor] = []
        for baseline, point in stations:
            gates = self._gates(batch, point)
            with torch.enable_grad():
                d = self.direction(batch, baseline, gates, weights)
                gradients.append(torch.stack(self.differentiate(d, gates)))
            if _is_plain(point):
                full = d.detach()
        if full is None:
            full = task_direction(self._plain_logits(batch), weights)
        mean = sum(gradients[1:], gradients[0]) / len(stations)
        by_row = rearrange(mean, "layer row pos head 1 -> row layer head pos")
        by_position = batch.by_example(by_row)
        self.check_finite(by_position, full)
        return by_position, full

    def direction(
        self,
        batch: Batch,
        baseline: BaselineAt,
        gates: Gates,
        weights: Float[Tensor, "example k"],
    ) -> Float[Tensor, " example"]:
        """Compute the task direction of the gated model, in the caller's gradient mode.

        Args:
            batch: the prompts.
            baseline: the reference values of z, a function of the layer.
            gates: the gates of each layer, broadcastable to `[row, pos, head, 1]`.
            weights: weights of the candidates, such as `batch.direction`.

        Returns:
            The direction of each example in logits.
        """
        return task_direction(self._logits(batch, self._gate_hooks(baseline, gates)), weights)

    def _gates(self, batch: Batch, point: Point) -> list[Tensor]:
        """Return a gate for each head, example and position, which is what scores are split by."""
        shape = (*batch.tokens.shape, self.view.n_heads, 1)
        # Scores keep the gates' type, and half precision is too coarse for a path.
        dtype = torch.promote_types(self.view.dtype, torch.float32)
        at = torch.as_tensor(point, dtype=dtype, device=self.view.device).reshape(-1, 1, 1, 1)
        at = batch.for_rows(at) if len(at) > 1 else at
        return [at.expand(shape).clone().requires_grad_() for _ in range(self.view.n_layers)]

    def check_finite(
        self, by_position: Float[Tensor, "example layer head pos"], full: Float[Tensor, " example"]
    ) -> None:
        """Refuse scores that are not finite.

        Args:
            by_position: the scores.
            full: the plain model's direction of each example.

        Raises:
            NonFiniteError: a score or a direction is not finite.
        """
        # In the scores, NaN marks a head that was not scored.
        if not bool(torch.isfinite(full).all()):
            raise NonFiniteError(
                f"{self.view.name}: its own logits are not finite on these prompts. Load the model "
                "in float32."
            )
        bad = (~torch.isfinite(by_position)).any(-1).any(0).nonzero().tolist()
        if bad:
            raise NonFiniteError(
                f"{self.view.name}: the scores of {len(bad)} heads are not finite under these "
                f"slopes; first: {Head(*bad[0])}. Load the model in float32."
            )

    def check_caller_hooks(self, batch: Batch) -> None:
        """Refuse the caller's hooks if these slopes cannot follow them.

        Args:
            batch: the prompts.

        Raises:
            InputError: the caller's hooks cannot be followed.
        """
        by_formula = self.slopes.touches_mlp or self.slopes.norm == "frozen"
        edits = "slopes by formula (norm='frozen', or other than 'tangent' in the MLP)"
        check_caller_hooks(
            self.view, batch.tokens, batch.lengths, edits=edits if by_formula else None
        )

    def gradients(self, batch: Batch, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Compute the gradient of the task direction by the activation at each site.

        Args:
            batch: the prompts.
            sites: the sites.

        Returns:
            The gradient at each site under these slopes, in logits per unit of the activation.

        Raises:
            InputError: a hook of the caller's edits in place a tensor that the gradient needs.
        """
        probes: dict[Site, Tensor] = {}

        def probe_at(site: Site) -> Hook:
            def hook(value: Tensor) -> Tensor:
                probes[site] = torch.zeros_like(value, requires_grad=True)
                return value + probes[site]

            return hook

        with torch.enable_grad():
            logits = self._logits(batch, {site: probe_at(site) for site in sites})
            d = task_direction(logits, batch.direction)
            gradients = self.differentiate(d, [probes[site] for site in sites])
        return dict(zip(sites, gradients, strict=True))

    def differentiate(self, d: Float[Tensor, " example"], by: Sequence[Tensor]) -> list[Tensor]:
        """Differentiate the sum of `d`.

        Args:
            d: values that a gated pass gave.
            by: the tensors to differentiate by.

        Returns:
            The derivatives; 0 where a hook of the caller's has cut the path to the logits.

        Raises:
            InputError: a hook of the caller's edits in place a tensor that the gradient needs.
        """
        if not d.requires_grad:
            return [torch.zeros_like(tensor) for tensor in by]
        try:
            gradients = torch.autograd.grad(d.sum(), by, allow_unused=True)
        except RuntimeError as error:
            hooks = caller_hooks(self.view.tl)
            if not hooks or isinstance(error, torch.OutOfMemoryError):
                raise
            raise InputError(
                f"{self.view.name}: no gradient passes your own hooks ({display.few(hooks)}). "
                "Return a new tensor from them instead of editing in place "
                f"({str(error).splitlines()[0]})"
            ) from error
        return [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, by, strict=True)]

    def _plain_logits(self, batch: Batch) -> Float[Tensor, "batch k"]:
        with torch.no_grad():
            return self._logits(batch, {})

    def _logits(self, batch: Batch, hooks: Mapping[Site, Hook]) -> Float[Tensor, "batch k"]:
        """Compute what candidates are compared by, with the slopes if gradients are on."""
        view = self.view
        gradients = torch.is_grad_enabled()
        hooks = {**hooks, **(slope_hooks(view, self.slopes) if gradients else {})}
        with view.quiet(gradients=gradients), view.hooked(hooks):
            resid = view.stream(batch.tokens)[0][-1]
            normed = view.normed(at_answer(resid, batch.lengths, batch.candidates))
        logits = self._softcapped(view.unembedded(normed, batch.candidates))
        return scores_of(logits, batch.candidates)

    def _softcapped(self, logits: Tensor) -> Tensor:
        view = self.view
        if view.logit_softcap is None or self.slopes.activation == "tangent":
            return view.softcapped(logits)
        plain = logits.detach()
        slope = rule.secant(view.softcapped, plain)
        return view.softcapped(plain) + slope * (logits - plain)

    # ------------------------------------------------------------------ hooks

    def _gate_hooks(self, baseline: BaselineAt, gates: Gates) -> dict[Site, Hook]:
        def gate_at(layer: int) -> Hook:
            def hook(z: Tensor) -> Tensor:
                # In this form z keeps every bit at the plain model.
                return z + (gates[layer] - 1.0).to(z.dtype) * (z - baseline(layer).to(z.dtype))

            return hook

        return {("z", layer): gate_at(layer) for layer in range(self.view.n_layers)}


def _is_plain(point: Point) -> bool:
    return isinstance(point, float) and point == 1.0
