"""What is trained: float32 copies of slices and whole weights, and how gradients reach them.

1. The optimiser is given copies ("masters") of the selected slices and nothing else: what is not
   selected has no gradient, no momentum, no decay. Frozen is frozen by construction.
2. A head's slice gets its gradient from hooks: the forward pass is the model's own, and in the
   backward pass the gradient g at q, k, v or at the output of attention gives
   dW_Q[h] = x^T g[h], dW_O[h] = z[h]^T g, db_Q[h] = sum g[h], for the selected heads only. No
   gradient of a whole weight matrix is ever computed.
3. Whole weights (norms; everything, in full fine-tuning) get theirs from autograd. In float32 the
   parameter is its own master; in half precision the master is a float32 copy.
4. After a step the masters are written into the model; `restore` puts everything back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor, nn

from cdt_lens.core.errors import UnsupportedModelError
from cdt_lens.finetuning.slices import HeadSlice
from cdt_lens.models.sites import Hook, Site
from cdt_lens.models.support import output_site
from cdt_lens.models.view import ModelView, at_least_float32
from cdt_lens.models.weights import family_of, is_bias, is_norm, own_weights, place, sync_fused

# Relative size of a difference that half precision makes between a matrix and its scaled copy.
_ROUNDING = 1e-2

# Selected slices by weight name: the heads, and the values `[head, ...]`.
Slices = Mapping[str, tuple[tuple[int, ...], Tensor]]


@dataclass(frozen=True, eq=False)
class Master:
    """One tensor for the optimiser. decay: whether weight decay applies (matrices only)."""

    name: str
    value: nn.Parameter = field(repr=False)
    decay: bool


@dataclass(frozen=True, eq=False)
class Learnt:
    """What training changed: slices of weights, and whole weights, by TransformerLens name."""

    slices: Slices
    whole: Mapping[str, Tensor]


@runtime_checkable
class Trainable(Protocol):
    """Something whose masters an optimiser may train."""

    masters: Sequence[Master]

    def attached(self) -> Any:
        """A context in which backward passes reach the masters."""

    def write(self) -> None:
        """Put the masters into the model."""

    def restore(self) -> None:
        """Put the model back as it was before training."""

    def learnt(self) -> Learnt:
        """The values that the model holds now."""


class _SliceGradient(torch.autograd.Function):
    """The identity on `out`; its backward pass also gives the gradient of the slices."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, inputs: Tensor, master: Tensor, role: str, index: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.role, ctx.index, ctx.dtype = role, index, master.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,) = ctx.saved_tensors
        found = slice_gradient(ctx.role, ctx.index, inputs, grads[0])
        return grads[0], None, found.to(ctx.dtype), None, None


def slice_gradient(
    role: str, index: tuple[int, ...], inputs: Tensor, grad: Tensor
) -> Float[Tensor, "head ..."]:
    """The gradient of a weight's slices from the input of the map and the gradient at its output.

    inputs: `[batch, pos, d_model]`, or z `[batch, pos, head, d_head]` for W_O; grad: at q, k or v
    `[batch, pos, head, d_head]`, or at the output of attention `[batch, pos, d_model]`.
    """
    if role == "W_O":
        return einsum(inputs[:, :, list(index)], grad, "b p h d, b p m -> h d m")
    chosen = grad[:, :, list(index)]
    if role.startswith("b"):
        return reduce(chosen, "b p h d -> h d", "sum")
    return einsum(inputs, chosen, "b p m, b p h d -> h m d")


class SlicesAndWholes:
    """Heads' slices and whole weights of a model as one `Trainable`.

    slices: see `slices.head_slices`; wholes: names of whole weights, such as the norms'.

    Raises:
        UnsupportedModelError: a whole weight is no parameter of the model, or a tied embedding
            that would be trained apart from its copy.
    """

    def __init__(
        self, view: ModelView, slices: Sequence[HeadSlice], wholes: Sequence[str] = ()
    ) -> None:
        self.view = view
        self.slices = tuple(slices)
        self._tied = _tied_end(view, wholes)
        self.wholes = tuple(n for n in wholes if self._tied is None or n != "unembed.W_U")
        self._parts = {part.name: _copy(part.read()) for part in self.slices}
        self._leaves = _leaves(view, self.wholes)
        self._own_masters = {
            name: leaf if leaf.dtype.itemsize >= 4 else _copy(leaf)
            for name, leaf in self._leaves.items()
        }
        self._before = {part.name: part.read() for part in self.slices}
        self._before_whole = {name: leaf.detach().clone() for name, leaf in self._leaves.items()}
        masters = [
            Master(n, v, n.rsplit(".", 1)[-1].startswith("W")) for n, v in self._parts.items()
        ]
        masters += [
            Master(name, value, not is_norm(name) and not is_bias(name))
            for name, value in self._own_masters.items()
        ]
        self.masters: Sequence[Master] = tuple(masters)

    # ------------------------------------------------------------------ gradients

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks and gradient flags are set inside, and as before afterwards."""
        flags = {p: p.requires_grad for p in self.view.tl.parameters()}
        grads = {p: p.grad for p in self.view.tl.parameters() if p.grad is not None}
        handles = []
        try:
            for parameter in flags:
                parameter.requires_grad_(False)
                parameter.grad = None
            for name, leaf in self._leaves.items():
                leaf.requires_grad_(True)
                master = self._own_masters[name]
                if master is not leaf:
                    handles.append(leaf.register_post_accumulate_grad_hook(_hand_over(master)))
            if self._tied is not None:
                source, copy = self._tied
                copy.requires_grad_(True)
                handles.append(
                    copy.register_post_accumulate_grad_hook(
                        _hand_over(self._own_masters[source], transpose=True)
                    )
                )
            with self.view.hooked(self._hooks()):
                yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
                parameter.grad = grads.get(parameter)

    def _hooks(self) -> dict[Site, Hook]:
        hooks: dict[Site, Hook] = {}
        for layer in {part.layer for part in self.slices}:
            parts = {part.role: part for part in self.slices if part.layer == layer}
            hooks |= self._layer_hooks(layer, parts)
        return hooks

    def _layer_hooks(self, layer: int, parts: Mapping[str, HeadSlice]) -> dict[Site, Hook]:
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Hook:
            def hook(value: Tensor) -> None:
                if torch.is_grad_enabled():
                    seen[name] = value.detach()

            return hook

        def route(roles: Sequence[str], source: str) -> Hook:
            def hook(value: Tensor) -> Tensor:
                if not torch.is_grad_enabled():
                    return value
                for role in roles:
                    part = parts[role]
                    value = _SliceGradient.apply(
                        value, seen[source], self._parts[part.name], role, part.index
                    )
                if source == "z":  # the last of the layer: what is needed now lives in the graph
                    seen.clear()
                return value

            return hook

        hooks: dict[Site, Hook] = {("attn.in", layer): keep("input")}
        for site in ("q", "k", "v"):
            roles = [r for r in (f"W_{site.upper()}", f"b_{site.upper()}") if r in parts]
            if roles:
                hooks[site, layer] = route(roles, "input")
        if "W_O" in parts:
            hooks["z", layer] = keep("z")
            hooks[output_site(self.view, "attn_out", layer)] = route(["W_O"], "z")
        return hooks

    # ------------------------------------------------------------------ values

    def write(self) -> None:
        """Put the masters into the model, rounded to its type."""
        for part in self.slices:
            part.write(self._parts[part.name].detach())
        with torch.no_grad():
            for name, leaf in self._leaves.items():
                if self._own_masters[name] is not leaf:
                    leaf.copy_(self._own_masters[name])
            if self._tied is not None:
                source, copy = self._tied
                copy.copy_(self._leaves[source].T)

    def restore(self) -> None:
        """Put the model's weights back, bit for bit."""
        for part in self.slices:
            part.write(self._before[part.name])
        with torch.no_grad():
            for name, leaf in self._leaves.items():
                leaf.copy_(self._before_whole[name])
            if self._tied is not None:
                source, copy = self._tied
                copy.copy_(self._leaves[source].T)
        sync_fused(self.view)

    def learnt(self) -> Learnt:
        """The values that the model holds now, on the CPU."""
        own = own_weights(self.view)
        names = [*self.wholes, *(["unembed.W_U"] if self._tied is not None else [])]
        return Learnt(
            {part.name: (part.index, part.read().cpu()) for part in self.slices},
            {name: own[name].clone().cpu() for name in dict.fromkeys(names)},
        )


def _copy(value: Tensor) -> nn.Parameter:
    return nn.Parameter(at_least_float32(value.detach()).clone())


def _hand_over(master: nn.Parameter, *, transpose: bool = False) -> Callable[[Tensor], None]:
    """Move a parameter's gradient to its master, in the master's type, and free it."""

    def hook(parameter: Tensor) -> None:
        if parameter.grad is None:  # the hook runs only once a gradient has arrived
            return
        grad = parameter.grad.T if transpose else parameter.grad
        if master.grad is None:  # in the master's layout, which autograd may add to
            master.grad = torch.empty_like(master).copy_(grad)
        else:
            master.grad += grad.to(master.dtype)
        parameter.grad = None

    return hook


def _leaves(view: ModelView, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters that hold whole weights, each once, under the first weight's name."""
    own = own_weights(view)
    missing = [name for name in names if name not in own]
    if missing:
        raise UnsupportedModelError(f"{view.name}: it has no weight {missing[0]} to train")
    places = _by_place(view)
    found: dict[str, nn.Parameter] = {}
    taken: set[int] = set()
    for name in names:
        value = own[name]
        leaf = places.get(place(value))
        if leaf is None or leaf.numel() != value.numel():
            raise UnsupportedModelError(
                f"{view.name}: {name} is no parameter of its own, so that it cannot be trained "
                "whole; load the model with cdt_lens.load_model"
            )
        if id(leaf) not in taken:
            taken.add(id(leaf))
            found[name] = leaf
    return found


def _by_place(view: ModelView) -> dict[tuple[int, int], nn.Parameter]:
    """Parameters by where they begin; of two at one place the smaller, which the bridge runs."""
    found: dict[tuple[int, int], nn.Parameter] = {}
    for parameter in sorted(view.tl.parameters(), key=lambda p: p.numel()):
        found.setdefault(place(parameter), parameter)
    return found


def _tied_end(view: ModelView, names: Sequence[str]) -> tuple[str, nn.Parameter] | None:
    """HookedTransformer's own copy of a tied embedding, which has to stay equal to it."""
    if view.is_bridge or "embed.W_E" not in names:
        return None
    embedding, end = view.tl.embed.W_E, view.tl.unembed.W_U
    if embedding.shape != end.T.shape:
        return None
    if torch.equal(embedding, end.T):
        return "embed.W_E", end
    scale = _scale(embedding.detach(), end.detach().T)
    if family_of(view) is not None and scale is not None and abs(scale - 1) > _ROUNDING:
        raise UnsupportedModelError(
            f"{view.name}: embed.W_E is unembed.W_U times {scale:.4g}, one tied embedding that "
            "HookedTransformer keeps twice; trained whole (scope 'full') the two would come apart. "
            "Use the bridge, cdt_lens.load_model(..., backend='bridge'), or another scope"
        )
    return None


def _scale(one: Tensor, other: Tensor) -> float | None:
    """The c of one = c * other, up to rounding in half precision; None where there is none."""
    product = square = other_square = 0.0
    for a, b in zip(one.split(4096), other.split(4096), strict=True):  # vocabularies are large
        a, b = at_least_float32(a), at_least_float32(b)
        product += float((a * b).sum())
        square += float(a.square().sum())
        other_square += float(b.square().sum())
    parallel = product**2 > (1 - _ROUNDING**2) * square * other_square
    return product / other_square if parallel else None
