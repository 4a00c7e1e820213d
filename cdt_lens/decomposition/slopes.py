"""Replace nonlinearities by linear stand-ins in the backward pass, without changing any value.

"frozen" treats norm scales, attention patterns, activation secants f(x)/x and half of each
product's factors as constants. A backward pass then gives exactly the numbers of a sweep with the
"linear" rules. "tangent" is the plain derivative. With every step "tangent" the result is
attribution patching. See docs/method/decomposition.md, "Every choice of Slopes".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cdt_lens.core.checked import Checked, checked_arguments
from cdt_lens.core.errors import InputError, UnsupportedModelError, did_you_mean
from cdt_lens.decomposition import rules as rule
from cdt_lens.models.sites import Hook, Site
from cdt_lens.models.view import ModelView, at_least_float32

Slope = Literal["frozen", "tangent"]
Attention = Literal["frozen", "half", "tempered", "tangent"]
Share = Literal["half", "gate", "tangent"]
Paths = Literal["all", "direct"]


@dataclass(frozen=True)
class Slopes(Checked):
    """The linear stand-in of each nonlinearity.

    Attributes:
        norm: "frozen" treats the scale as a constant. "tangent" is the derivative.
        attention: "frozen" treats the pattern as a constant. "half" gives the pattern and the
            values half of the product each. "tempered" shares by halves both products of
            attention, query with key and pattern with value, and differentiates the softmax as if
            its temperature were 2 (GIM, arXiv 2505.17630). "tangent" is the derivative.
        activation: "frozen" treats the secant f(x)/x as a constant. "tangent" is the derivative
            f'(x).
        product: the stand-in for the product f(g) * u of a gated MLP. "half" gives each factor half
            of the product. "gate" treats the gate as a constant. "tangent" is the derivative.
        paths: "all" counts every path to the logits. "direct" counts only what a head writes
            straight to the logits, past every later block.

    Raises:
        InputError: a slope is unknown.
    """

    norm: Slope = "frozen"
    attention: Attention = "frozen"
    activation: Slope = "frozen"
    product: Share = "half"
    paths: Paths = "all"

    @property
    def touches_mlp(self) -> bool:
        """Whether the MLP's slopes differ from its derivative."""
        return self.paths == "all" and (self.activation == "frozen" or self.product != "tangent")


SLOPES: dict[str, Slopes] = {
    # The transpose of the "linear" preset of `rules`.
    "linear": Slopes(),
    # The first-order form of the "stable" rules: only the pattern is a constant.
    "stable": Slopes("tangent", "frozen", "tangent", "tangent"),
    # The first-order form of the "shared" rules.
    "shared": Slopes("tangent", "half", "tangent", "tangent"),
    # Attribution patching.
    "gradient": Slopes("tangent", "tangent", "tangent", "tangent"),
    # Direct logit attribution.
    "direct": Slopes(paths="direct"),
    # Gradient interaction modifications, arXiv 2505.17630.
    "gim": Slopes("frozen", "tempered", "tangent", "half"),
}


@checked_arguments
def resolve_slopes(slopes: str | Slopes) -> Slopes:
    """Return the slopes of a preset.

    Args:
        slopes: the name of a preset in `SLOPES`, or a `Slopes`, which is returned unchanged.

    Returns:
        The slopes.

    Raises:
        InputError: no preset has that name.
    """
    if isinstance(slopes, Slopes):
        return slopes
    if slopes not in SLOPES:
        raise InputError(
            f"slopes={slopes!r}: expected one of {', '.join(SLOPES)}, or a Slopes"
            f"{did_you_mean(slopes, SLOPES)}"
        )
    return SLOPES[slopes]


def slope_hooks(view: ModelView, slopes: Slopes) -> dict[Site, Hook]:
    """Build hooks that keep every value and give its gradient the slopes.

    Args:
        view: the model.
        slopes: the stand-in of each nonlinearity.

    Returns:
        The hooks by site.
    """
    hooks: dict[Site, Hook] = {}
    for layer in range(view.n_layers + 1):
        if slopes.norm == "frozen":
            for norm in _norms_of(view, layer, slopes.paths):
                bias, eps = view.norm_bias(norm, layer), float(view.tl.cfg.eps)
                hooks |= _frozen_norm(norm, layer, bias, eps)
        if layer == view.n_layers:
            continue
        constants = ["pattern"] if slopes.attention == "frozen" else []
        if slopes.paths == "direct":
            constants = ["pattern", "v", "mlp_out"]
        for name in constants:
            if (name, layer) in view.sites:
                hooks[name, layer] = Tensor.detach
        if slopes.paths == "all":
            hooks |= {(name, layer): hook for name, hook in _SHARED.get(slopes.attention, ())}
        if slopes.touches_mlp and ("mlp_out", layer) in view.sites:
            hooks |= _mlp_slopes(view, slopes, layer)
    return hooks


def _norms_of(view: ModelView, layer: int, paths: Paths) -> list[str]:
    """Return the norms of a layer that the gradient passes."""
    # The norm behind an MLP may output what the site "mlp_out" has detached, so it is left out.
    direct = ("ln1_post", "ln_final")
    return [norm for norm in view.norms(layer) if paths == "all" or norm in direct]


def _mlp_slopes(view: ModelView, slopes: Slopes, layer: int) -> dict[Site, Hook]:
    """Build hooks that make the MLP's gradient follow the slopes."""
    function = view.activation(layer)
    if function is None:
        raise UnsupportedModelError(f"{view.name}: layer {layer} has no activation")
    gated = ("pre_linear", layer) in view.sites
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        def hook(value: Tensor) -> None:
            inputs[name] = value

        return hook

    def post(value: Tensor) -> Tensor:
        pre = inputs["pre"]
        plain = pre.detach()
        slope = _slope(function, plain, slopes.activation)
        if not gated:
            return value.detach() + slope * (pre - plain)
        linear = inputs["pre_linear"]
        to_gate, to_linear = {"half": (0.5, 0.5), "gate": (0, 1), "tangent": (1, 1)}[slopes.product]
        through_gate = to_gate * slope * linear.detach() * (pre - plain)
        through_linear = to_linear * function(plain) * (linear - linear.detach())
        return value.detach() + through_gate + through_linear

    sites: dict[Site, Hook] = {("pre", layer): keep("pre"), ("post", layer): post}
    if gated:
        sites["pre_linear", layer] = keep("pre_linear")
    return sites


def _part_of_gradient(share: float) -> Hook:
    def hook(value: Tensor) -> Tensor:
        return value.detach() + (value - value.detach()) * share

    return hook


def _tempered_softmax(pattern: Tensor) -> Tensor:
    """Give the softmax before `pattern` the slope of one at twice its temperature.

    The softmax turns a gradient g into p (g - <p, g>). With r in proportion to sqrt(p), the pattern
    at temperature 2, the gradient r/p (g - <r, g>) comes out as r (g - <r, g>).
    """
    if not pattern.requires_grad:
        return pattern
    plain = at_least_float32(pattern.detach())
    soft = plain.sqrt() / plain.sqrt().sum(-1, keepdim=True)
    ratio = torch.where(plain > 0, soft / plain, 0.0)

    def tempered(gradient: Tensor) -> Tensor:
        g = at_least_float32(gradient)
        return (ratio * (g - (soft * g).sum(-1, keepdim=True))).to(gradient.dtype)

    # A tensor of its own, because the bridge hands over a view that the model does not read.
    own = pattern.view_as(pattern)
    own.register_hook(tempered)
    return own


# How the gradient of attention is shared, at the sites of a layer.
_SHARED: dict[str, tuple[tuple[str, Hook], ...]] = {
    "half": (("pattern", _part_of_gradient(1 / 2)), ("v", _part_of_gradient(1 / 2))),
    # A score is divided at pattern times value, and once more at query times key.
    "tempered": (
        ("q", _part_of_gradient(1 / 4)),
        ("k", _part_of_gradient(1 / 4)),
        ("v", _part_of_gradient(1 / 2)),
        ("pattern", _tempered_softmax),
    ),
}


def _slope(function: Any, plain: Tensor, kind: Slope) -> Tensor:
    """Compute f(x)/x or f'(x) as a constant."""
    with torch.enable_grad():
        if kind == "frozen":
            return rule.secant(function, plain).detach()
        x = plain.detach().requires_grad_(True)
        (derivative,) = torch.autograd.grad(function(x).sum(), x)
    return derivative


def _frozen_norm(norm: str, layer: int, bias: Tensor | None, eps: float) -> dict[Site, Hook]:
    """Build hooks that treat a norm's scale as a constant in the backward pass.

    out = w c / s + b. Multiplying w c / s by s(x) / s, where the denominator s is a constant,
    cancels the gradient of the scale itself, ds = <c, dx> / (d s). Editing the scale would not
    work, because `TransformerBridge` computes with it without gradients.
    """
    recorded: dict[str, Tensor] = {}

    def keep_input(value: Tensor) -> None:
        recorded["x"] = value

    def keep_scale(value: Tensor) -> None:
        recorded["scale"] = value.detach()

    def cancel(out: Tensor) -> Tensor:
        # The squares of a residual stream overflow half precision.
        x, scale = at_least_float32(recorded["x"]), at_least_float32(recorded["scale"])
        scale = scale.reshape(*x.shape[:-1], 1)
        c = _numerator(x.detach(), scale, eps)
        moved = (c * x).mean(-1, keepdim=True)
        relative = (moved - moved.detach()) / scale**2
        weighted = out if bias is None else out - bias
        return out + weighted.detach() * relative.to(out.dtype)

    return {
        (f"{norm}.in", layer): keep_input,
        (f"{norm}.scale", layer): keep_scale,
        (f"{norm}.out", layer): cancel,
    }


def _numerator(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return what the norm divides by the scale: x, or x minus its mean."""
    centred = x - x.mean(-1, keepdim=True)
    of_x, of_centred = (v.square().mean(-1, keepdim=True) for v in (x, centred))
    squared = scale.square() - eps
    rms = (of_x - squared).abs().mean() <= (of_centred - squared).abs().mean()
    return x if bool(rms) else centred
