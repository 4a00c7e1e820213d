"""Define the propagation rules as pure tensor functions (CD-T, arXiv 2407.00886, section 3).

Every activation x of an ordinary run is split as x = rel + irrel. Because x is known, only the
irrelevant part is carried through the network, and rel = x - irrel wherever it is needed. A rule
says how the irrelevant part passes one step. Each nonlinearity has two families of rules:

- *through* applies the step to the irrelevant part itself;
- *frozen* replaces the step by a linear map that is fixed by the full run.

With every step *through*, the result is mean ablation. With every step *frozen*, it is one linear
map. The published rules lie in between; docs/method/decomposition.md lists every choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cdt_lens.core.checked import Checked, checked_arguments
from cdt_lens.core.choices import FromZero, Preset

Norm = Literal["frozen", "through"]
Attention = Literal["decomposed", "frozen", "half", "through"]
Activation = Literal["through", "averaged", "frozen"]
Product = Literal["through", "half", "gate"]
Bias = Literal["proportional", "irrelevant"]
Context = Literal["full", "empty", "both"]


@dataclass(frozen=True)
class Rules(Checked):
    """The choice of a propagation rule for each kind of step.

    Attributes:
        norm: "frozen" divides by the scale of the full activation. "through" applies the norm, its
            bias included, to the irrelevant part with the scale of that part.
        attention: "decomposed" gives rel_z = softmax(rel_q rel_k^T) rel_v (the published rule).
            "frozen" applies the attention pattern of the full run to both parts. "half" shares the
            cross terms of pattern and values equally, (A_irrel v + A v_irrel) / 2. "through"
            recomputes the pattern from the irrelevant queries and keys.
        activation: "through" gives f(irrel). "averaged" is the mean over both orders of the two
            parts, (f(irrel) + f(x) - f(rel)) / 2. "frozen" scales both parts by f(x)/x.
        product: the rule for the product f(g)*u of a gated MLP. "through" multiplies the irrelevant
            factors. "half" shares the cross terms equally, (irrel_f u + f irrel_u) / 2. "gate"
            treats the gate as a constant, f irrel_u.
        bias: "proportional" gives the relevant part b |W rel| / (|W rel| + |W irrel| + eps).
            "irrelevant" assigns the whole bias to the irrelevant part.
        sign: whether the sign rule applies after the MLP's input and output projections and after
            its residual add. Where the two parts have opposite signs, the larger one becomes the
            total and the other becomes 0.
        context: "full" measures the effect of removing the sources from the full model. "empty"
            measures the effect of adding them to a model in which every head is ablated (see
            `empty_model`); the other rules do not matter there. "both" is the mean of the two.
            "empty" and "both" apply to the logits and not to target heads.
        eps: added to the denominator of the proportional bias share.

    Raises:
        InputError: a rule is unknown, `sign` is no truth value, or `eps` is negative or not finite.
    """

    norm: Norm = "through"
    attention: Attention = "frozen"
    activation: Activation = "through"
    product: Product = "through"
    bias: Bias = "irrelevant"
    sign: bool = False
    context: Context = "full"
    eps: FromZero = 0.0

    @property
    def mlp_by_formula(self) -> bool:
        """Whether the MLP needs an explicit formula besides the model's own forward pass."""
        return self.activation != "through" or self.product != "through"

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values.

        Returns:
            The fields by name, and under "preset" the name of the preset with these values, or
            "custom".
        """
        name = next((k for k, v in PRESETS.items() if v == self), "custom")
        return {"preset": name, **asdict(self)}


PRESETS: dict[str, Rules] = {
    # The authors' code, except that each norm keeps the model's own eps, so that the parts add up.
    "official": Rules(
        norm="frozen", attention="decomposed", bias="proportional", sign=True, eps=1e-8
    ),
    "stable": Rules(),
    "shared": Rules(attention="half"),
    # The mean of the effect of removing a head and of adding it to a model without heads.
    "two-ended": Rules(attention="through", context="both"),
    "linear": Rules(norm="frozen", activation="frozen", product="half"),
    "ablation": Rules(attention="through"),
}


@checked_arguments
def resolve_rules(rules: Preset | Rules) -> Rules:
    """Return the rules of a preset.

    Args:
        rules: the name of a preset in `PRESETS`, or a `Rules`, which is returned unchanged.

    Returns:
        The rules.

    Raises:
        InputError: no preset has that name.
    """
    return rules if isinstance(rules, Rules) else PRESETS[rules]


def take_back_bias(
    irrel: Float[Tensor, source * dims],
    full: Float[Tensor, "*dims"],
    bias: Float[Tensor, "*bias"],
    eps: float,
) -> Float[Tensor, source * dims]:
    """Compute the irrelevant part of W x + b under the proportional bias rule.

    Args:
        irrel: W irrel + b, with the whole bias.
        full: W x + b.
        bias: b.
        eps: added to the denominator of the share s.

    Returns:
        W irrel + (1 - s) b with s = |W rel| / (|W rel| + |W irrel| + eps), elementwise. s is 0
        where both parts vanish.
    """
    share = full - irrel
    share.abs_()
    denominator = irrel - bias
    denominator.abs_().add_(share)
    # Both parts may vanish, and eps may round to 0 in half precision.
    denominator.add_(eps).clamp_(min=torch.finfo(irrel.dtype).tiny)
    share.div_(denominator)
    return torch.addcmul(irrel, share, bias.expand_as(share), value=-1.0)


def norm_bias_share(
    irrel: Float[Tensor, source * dims],
    full: Float[Tensor, "*dims"],
    bias: Float[Tensor, "*bias"],
    eps: float,
) -> Float[Tensor, source * dims]:
    """Compute the relevant part s*b of a norm's bias.

    The share s comes from the two parts of the norm's input.

    Args:
        irrel: the irrelevant part of the norm's input.
        full: the whole input of the norm.
        bias: the norm's bias b.
        eps: added to the denominator of the share s.

    Returns:
        s*b with s = |rel| / (|rel| + |irrel| + eps), elementwise. s is 0 where both parts vanish.
    """
    share = full - irrel
    share.abs_()
    denominator = irrel.abs().add_(share)
    denominator.add_(eps).clamp_(min=torch.finfo(irrel.dtype).tiny)
    return share.div_(denominator).mul_(bias)


def larger_takes_all(
    irrel: Float[Tensor, source * dims], full: Float[Tensor, "*dims"]
) -> Float[Tensor, source * dims]:
    """Apply the sign rule: where the two parts differ in sign, the larger one becomes the total.

    With opposite signs, |irrel| > |rel| exactly where irrel has the sign of the total. So an
    irrelevant part of the wrong sign becomes 0, and one that exceeds the total becomes the total:
    irrel is clamped to the interval between 0 and `full`.

    Args:
        irrel: the irrelevant part.
        full: the whole activation, rel + irrel.

    Returns:
        The irrelevant part after the rule.
    """
    low = full.clamp(max=0.0)
    high = full.clamp(min=0.0)
    return torch.clamp(irrel, low, high)


def secant(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "*dims"]
) -> Float[Tensor, "*dims"]:
    """Compute the slope f(x)/x of an activation with f(0) = 0.

    Args:
        function: the activation f.
        x: where the slope is taken.

    Returns:
        f(x)/x, elementwise. Where |x| < 1e-6, the slope at 1e-6.
    """
    tiny = torch.full_like(x, 1e-6)
    safe = torch.where(x.abs() < 1e-6, tiny, x)
    return function(safe) / safe


def activated(
    function: Callable[[Tensor], Tensor],
    irrel: Float[Tensor, source * dims],
    full: Float[Tensor, "*dims"],
    activation: Activation,
) -> Float[Tensor, source * dims]:
    """Compute the irrelevant part of f(x) from the irrelevant part of x.

    Args:
        function: the activation f.
        irrel: the irrelevant part of x.
        full: x.
        activation: the rule, see `Rules`.

    Returns:
        The irrelevant part of f(x).
    """
    if activation == "frozen":
        return irrel * secant(function, full)
    if activation == "averaged":
        return (function(irrel) + function(full) - function(full - irrel)) / 2
    return function(irrel)


def gated_product(
    irrel_activated: Float[Tensor, source * dims],
    irrel_linear: Float[Tensor, source * dims],
    activated: Float[Tensor, "*dims"],
    linear: Float[Tensor, "*dims"],
    product: Product,
) -> Float[Tensor, source * dims]:
    """Compute the irrelevant part of the product f(g) * u in a gated MLP.

    Args:
        irrel_activated: the irrelevant part of f(g).
        irrel_linear: the irrelevant part of u.
        activated: f(g) in the full run.
        linear: u in the full run.
        product: the rule, see `Rules`.

    Returns:
        The irrelevant part of f(g) * u.
    """
    if product == "through":
        return irrel_activated * irrel_linear
    if product == "gate":
        return activated * irrel_linear
    return (irrel_activated * linear + activated * irrel_linear) / 2
