"""The propagation rules as pure tensor functions (method.md §3; CD-T, arXiv 2407.00886, §3).

Every activation x of an ordinary run is split as x = rel + irrel. Because x is known, only the
irrelevant part is carried through the network, and rel = x - irrel wherever it is wanted. A rule
says what the irrelevant part becomes at one step. Each nonlinearity offers two families of rule:
*through*, the step is applied to the irrelevant part itself, and *frozen*, the step is made linear
with the full run's value. All through is mean-ablation; all frozen is one linear map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cdt_lens.core.errors import InputError, check_choices

Norm = Literal["frozen", "through"]
Attention = Literal["decomposed", "frozen", "half", "through"]
Activation = Literal["through", "averaged", "frozen"]
Product = Literal["through", "half", "gate"]
Bias = Literal["proportional", "irrelevant"]
Context = Literal["full", "both"]


@dataclass(frozen=True)
class Rules:
    """What the irrelevant part becomes at each kind of step.

    norm: "frozen" divides by the full activation's scale; "through" lets the norm work on the
        irrelevant part with its own scale, its bias included.
    attention: "decomposed" gives rel_z = softmax(rel_q rel_k^T) rel_v (the published rule);
        "frozen" applies the full run's pattern to both parts; "half" shares the cross terms of
        pattern and values equally, (A_irrel v + A v_irrel) / 2; "through" recomputes the pattern
        from irrelevant queries and keys.
    activation: "through" gives f(irrel), the irrelevant part going first; "averaged" is the mean
        over both orders, (f(irrel) + f(x) - f(rel)) / 2; "frozen" scales both parts by f(x)/x.
    product: for a gated MLP's f(g)*u, "through" multiplies the irrelevant factors; "half" shares
        the product's cross terms equally, (irrel_f u + f irrel_u) / 2; "gate" takes the gate for
        a constant, f irrel_u.
    bias: "proportional" gives the relevant part b |W rel| / (|W rel| + |W irrel| + eps);
        "irrelevant" leaves the whole bias to the irrelevant part.
    sign: after the MLP's input and output projections and its residual add, where the two parts
        have opposite signs the larger takes all and the other becomes 0.
    context: "full" takes relevance as what is lost where everything else is there; "both" averages
        that with what the sources add where every head is ablated (see `insertion`; in the
        logits, not at target heads).
    eps: added to the denominator of the proportional bias share.
    """

    norm: Norm = "through"
    attention: Attention = "frozen"
    activation: Activation = "through"
    product: Product = "through"
    bias: Bias = "irrelevant"
    sign: bool = False
    context: Context = "full"
    eps: float = 0.0

    def __post_init__(self) -> None:
        kinds = {
            "norm": Norm, "attention": Attention, "activation": Activation, "product": Product,
            "bias": Bias, "context": Context,
        }  # fmt: skip
        check_choices("rules", self, kinds)

    @property
    def mlp_by_formula(self) -> bool:
        """Whether the MLP's activations need more than the model's own forward pass."""
        return self.activation != "through" or self.product != "through"

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, with the preset's name where they are a preset's."""
        name = next((k for k, v in PRESETS.items() if v == self), "custom")
        return {"preset": name, **asdict(self)}


PRESETS: dict[str, Rules] = {
    # The authors' code, except that each norm keeps the model's own eps, so that parts add up.
    "official": Rules(
        norm="frozen", attention="decomposed", bias="proportional", sign=True, eps=1e-8
    ),
    "stable": Rules(),
    "shared": Rules(attention="half"),
    # The mean of what the model loses without a head and what the head adds to one without heads.
    "two-ended": Rules(attention="through", context="both"),
    "linear": Rules(norm="frozen", activation="frozen", product="half"),
    "ablation": Rules(attention="through"),
}


def resolve_rules(rules: str | Rules) -> Rules:
    """A preset by name, or the rules themselves.

    Raises:
        InputError: no preset has that name.
    """
    if isinstance(rules, Rules):
        return rules
    if rules not in PRESETS:
        raise InputError(f"rules={rules!r}: expected one of {', '.join(PRESETS)}, or a Rules")
    return PRESETS[rules]


def take_back_bias(
    irrel: Float[Tensor, source * dims],
    full: Float[Tensor, "*dims"],
    bias: Float[Tensor, "*bias"],
    eps: float,
) -> Float[Tensor, source * dims]:
    """Irrelevant part of W x + b under the proportional rule.

    irrel: W irrel + b, with the whole bias; full: W x + b. The result is
    W irrel + (1 - s) b with s = |W rel| / (|W rel| + |W irrel| + eps), 0 where both vanish.
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
    """The relevant part s*b of a norm's bias, with s from the two parts of the norm's *input*."""
    share = full - irrel
    share.abs_()
    denominator = irrel.abs().add_(share)
    denominator.add_(eps).clamp_(min=torch.finfo(irrel.dtype).tiny)
    return share.div_(denominator).mul_(bias)


def larger_takes_all(
    irrel: Float[Tensor, source * dims], full: Float[Tensor, "*dims"]
) -> Float[Tensor, source * dims]:
    """The sign rule: where rel and irrel = full - rel differ in sign, the larger becomes `full`.

    With opposite signs, |irrel| > |rel| exactly where irrel has the sign of their sum. So: irrel
    of the wrong sign becomes 0, and irrel beyond the total comes back to it: irrel is clamped to
    the interval between 0 and full.
    """
    low = full.clamp(max=0.0)
    high = full.clamp(min=0.0)
    return torch.clamp(irrel, low, high)


def secant(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "*dims"]
) -> Float[Tensor, "*dims"]:
    """Slope f(x)/x of an activation with f(0) = 0, by its limit near 0."""
    tiny = torch.full_like(x, 1e-6)
    safe = torch.where(x.abs() < 1e-6, tiny, x)
    return function(safe) / safe


def activated(
    function: Callable[[Tensor], Tensor],
    irrel: Float[Tensor, source * dims],
    full: Float[Tensor, "*dims"],
    activation: Activation,
) -> Float[Tensor, source * dims]:
    """Irrelevant part of f(x), from the irrelevant part of x."""
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
    """Irrelevant part of f(g) * u; irrel_activated is the irrelevant part of f(g)."""
    if product == "through":
        return irrel_activated * irrel_linear
    if product == "gate":
        return activated * irrel_linear
    return (irrel_activated * linear + activated * irrel_linear) / 2
