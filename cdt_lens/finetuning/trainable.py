"""Train float32 copies of slices and whole weights, with exactly the gradients that they need.

1. The optimiser receives copies ("masters") of the selected slices and nothing else. An element
   that is not selected has no gradient, no momentum and no decay. It is frozen by construction.
2. Hooks compute the gradient of a head's slice. The forward pass is the model's own. In the
   backward pass the gradient g at q, k, v or at the output of attention gives dW_Q[h] = x^T g[h],
   dW_O[h] = z[h]^T g and db_Q[h] = sum g[h], for the selected heads only. MLP channels get theirs
   in the same way, from the MLP's input and its activations. The gradient of a whole weight matrix
   is never computed.
3. Autograd computes the gradients of whole weights (norms, or all weights in full fine-tuning). In
   float32 the parameter is its own master. In half precision the master is a float32 copy.
4. After a step the masters are written into the model. `restore` restores the original values.

See docs/method/training.md, "Frozen by construction" (CT-SFT, arXiv 2601.08146, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor, nn

from cdt_lens.core.errors import UnsupportedModelError
from cdt_lens.core.set_aside import set_aside
from cdt_lens.core.undo import unbroken, undoing
from cdt_lens.finetuning.slices import CHANNEL_ROLES, ROLES, WeightSlice, channel_site
from cdt_lens.models.sites import Hook, Site
from cdt_lens.models.support import output_site
from cdt_lens.models.view import ModelView, at_least_float32
from cdt_lens.models.weights import family_of, is_bias, is_norm, own_weights, place, sync_fused

# Relative difference that half precision allows between a matrix and its scaled copy.
_ROUNDING = 1e-2

# Selected slices by weight name: the heads, and the values `[head, ...]`.
Slices = Mapping[str, tuple[tuple[int, ...], Tensor]]


@dataclass(frozen=True, eq=False)
class Master:
    """One tensor for the optimiser.

    Attributes:
        name: name of the weight.
        value: the values to train.
        decay: whether weight decay applies. It applies to matrices only.
    """

    name: str
    value: nn.Parameter = field(repr=False)
    decay: bool


@dataclass(frozen=True, eq=False)
class Learnt:
    """The trained values, by TransformerLens name.

    Attributes:
        slices: slices of weights.
        whole: whole weights.
    """

    slices: Slices
    whole: Mapping[str, Tensor]


@runtime_checkable
class Trainable(Protocol):
    """Something whose masters an optimiser may train.

    Attributes:
        masters: the tensors for the optimiser.
    """

    masters: Sequence[Master]

    def attached(self) -> Any:
        """Return a context in which backward passes reach the masters."""

    def write(self) -> None:
        """Write the masters into the model."""

    def restore(self) -> None:
        """Restore the model as it was before training."""

    def learnt(self) -> Learnt:
        """Return the values that the model holds now."""


class _SliceGradient(torch.autograd.Function):
    """The identity on `out`, whose backward pass also gives the gradient of the slices."""

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
        gradient = slice_gradient(ctx.role, ctx.index, inputs, grads[0])
        return grads[0], None, gradient.to(ctx.dtype), None, None


def slice_gradient(
    role: str, index: tuple[int, ...], inputs: Tensor, grad: Tensor
) -> Float[Tensor, "slice ..."]:
    """Compute the gradient of a weight's slices.

    Args:
        role: role of the weight, see `slices.ROLES` and `slices.CHANNEL_ROLES`.
        index: heads or channels of the slices.
        inputs: input of the linear map, `[batch, pos, d_model]`; z `[batch, pos, head, d_head]`
            for W_O, and `[batch, pos, channel]` for W_out.
        grad: gradient at the output of the map, `[batch, pos, head, d_head]` at q, k or v,
            `[batch, pos, channel]` within the MLP, or `[batch, pos, d_model]` at the output of
            attention or MLP.

    Returns:
        The gradient of each slice.
    """
    if role in CHANNEL_ROLES:
        return _channel_gradient(role, index, inputs, grad)
    if role == "W_O":
        return einsum(inputs[:, :, list(index)], grad, "b p h d, b p m -> h d m")
    chosen = grad[:, :, list(index)]
    if role.startswith("b"):
        return reduce(chosen, "b p h d -> h d", "sum")
    return einsum(inputs, chosen, "b p m, b p h d -> h m d")


def _channel_gradient(
    role: str, index: tuple[int, ...], inputs: Tensor, grad: Tensor
) -> Float[Tensor, "channel ..."]:
    if role == "W_out":
        return einsum(inputs[:, :, list(index)], grad, "b p c, b p m -> c m")
    chosen = grad[:, :, list(index)]
    if role == "b_in":
        return reduce(chosen, "b p c -> c", "sum")
    return einsum(inputs, chosen, "b p m, b p c -> c m")


class SlicesAndWholes:
    """The slices of heads and the whole weights of a model, as one `Trainable`.

    Args:
        view: the model.
        slices: the slices, see `slices.head_slices`.
        wholes: names of whole weights, such as those of the norms.

    Attributes:
        masters: the tensors for the optimiser.

    Raises:
        UnsupportedModelError: a whole weight is not a parameter of the model, or is a tied
            embedding that would be trained apart from its copy.
    """

    def __init__(
        self, view: ModelView, slices: Sequence[WeightSlice], wholes: Sequence[str] = ()
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
        self._before_whole = set_aside(self._leaves)
        masters = [
            Master(n, v, n.rsplit(".", 1)[-1].startswith("W")) for n, v in self._parts.items()
        ]
        masters += [
            Master(name, value, value.ndim > 1 and not is_norm(name) and not is_bias(name))
            for name, value in self._own_masters.items()
        ]
        self.masters: Sequence[Master] = tuple(masters)

    # ------------------------------------------------------------------ gradients

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach hooks and set gradient flags within the `with` block; restore both afterwards."""
        grads = {p: p.grad for p in self.view.tl.parameters() if p.grad is not None}
        handles: list[Any] = []

        def put_back() -> None:
            for handle in handles:
                handle.remove()
            for parameter in self.view.tl.parameters():
                parameter.grad = grads.get(parameter)

        with flags_kept(self.view.tl.parameters()), undoing(put_back):
            self._prepare(handles)
            with self.view.hooked(self._hooks()):
                yield

    @unbroken
    def _prepare(self, handles: list[Any]) -> None:
        """Let gradients reach the leaves only, and the masters from there."""
        for parameter in self.view.tl.parameters():
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
            hook = _hand_over(self._own_masters[source], transpose=True)
            handles.append(copy.register_post_accumulate_grad_hook(hook))

    def _hooks(self) -> dict[Site, Hook]:
        hooks: dict[Site, Hook] = {}
        for layer in {part.layer for part in self.slices}:
            parts = {part.role: part for part in self.slices if part.layer == layer}
            hooks |= self._layer_hooks(layer, parts)
        return hooks

    def _layer_hooks(self, layer: int, parts: Mapping[str, WeightSlice]) -> dict[Site, Hook]:
        inputs: dict[str, Tensor] = {}
        last = {"W_O": ("input", "z"), "W_out": ("mlp", "post")}

        def keep(name: str) -> Hook:
            def hook(value: Tensor) -> None:
                if torch.is_grad_enabled():
                    inputs[name] = value.detach()

            return hook

        def route(roles: Sequence[str], source: str) -> Hook:
            def hook(value: Tensor) -> Tensor:
                if not torch.is_grad_enabled():
                    return value
                kept = inputs[source]
                # The last use of an input; the graph holds the tensors. Gradient checkpointing may
                # end the second forward pass within `apply`.
                for name in last.get(roles[-1], ()):
                    inputs.pop(name, None)
                for role in roles:
                    part = parts[role]
                    value = _SliceGradient.apply(
                        value, kept, self._parts[part.name], role, part.index
                    )
                return value

            return hook

        hooks: dict[Site, Hook] = {}
        if {*ROLES} & {*parts}:
            hooks["attn.in", layer] = keep("input")
        for site in ("q", "k", "v"):
            roles = [r for r in (f"W_{site.upper()}", f"b_{site.upper()}") if r in parts]
            if roles:
                hooks[site, layer] = route(roles, "input")
        if "W_O" in parts:
            hooks["z", layer] = keep("z")
            hooks[output_site(self.view, "attn_out", layer)] = route(["W_O"], "z")
        if "W_out" in parts:
            hooks["mlp.in", layer] = keep("mlp")
            inner: dict[str, list[str]] = {}
            for role in ("W_in", "b_in", "W_gate"):
                if role in parts:
                    inner.setdefault(channel_site(self.view, role, layer), []).append(role)
            for site, roles in inner.items():
                hooks[site, layer] = route(roles, "mlp")
            hooks["post", layer] = keep("post")
            hooks[output_site(self.view, "mlp_out", layer)] = route(["W_out"], "post")
        return hooks

    # ------------------------------------------------------------------ values

    def write(self) -> None:
        """Write the masters into the model, rounded to its type."""
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
        """Restore the model's weights bit for bit."""
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
        """Return the values that the model holds now, on the CPU."""
        own = own_weights(self.view)
        names = [*self.wholes, *(["unembed.W_U"] if self._tied is not None else [])]
        return Learnt(
            {part.name: (part.index, part.read().cpu()) for part in self.slices},
            {name: own[name].clone().cpu() for name in dict.fromkeys(names)},
        )


def flags_kept(parameters: Iterable[nn.Parameter]) -> undoing:
    """Put gradient flags back at the end of a `with` block.

    Args:
        parameters: the parameters.

    Returns:
        The context.
    """
    flags = {p: p.requires_grad for p in parameters}

    def put_back() -> None:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)

    return undoing(put_back)


def _copy(value: Tensor) -> nn.Parameter:
    value = at_least_float32(value.detach())
    return nn.Parameter(value.clone(memory_format=torch.contiguous_format))


def _hand_over(master: nn.Parameter, *, transpose: bool = False) -> Callable[[Tensor], None]:
    """Return a hook that moves a parameter's gradient to its master, in the master's type."""

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
    """Return the parameters that hold whole weights, each once, under the first weight's name."""
    own = own_weights(view)
    missing = [name for name in names if name not in own]
    if missing:
        raise UnsupportedModelError(f"{view.name}: it has no weight {missing[0]} to train")
    places = _by_place(view)
    leaves: dict[str, nn.Parameter] = {}
    taken: set[int] = set()
    for name in names:
        value = own[name]
        leaf = places.get(place(value))
        if leaf is None or leaf.numel() != value.numel():
            raise UnsupportedModelError(
                f"{view.name}: {name} is not a parameter of its own, so it cannot be trained "
                "whole. Load the model with cdt_lens.load_model."
            )
        if id(leaf) not in taken:
            taken.add(id(leaf))
            leaves[name] = leaf
    return leaves


def _by_place(view: ModelView) -> dict[tuple[int, int], nn.Parameter]:
    """Return parameters by their place in memory; of two at one place the smaller, which is run."""
    parameters: dict[tuple[int, int], nn.Parameter] = {}
    for parameter in sorted(view.tl.parameters(), key=lambda p: p.numel()):
        parameters.setdefault(place(parameter), parameter)
    return parameters


def _tied_end(view: ModelView, names: Sequence[str]) -> tuple[str, nn.Parameter] | None:
    """Return HookedTransformer's own copy of a tied embedding, which has to stay equal to it."""
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
            "HookedTransformer keeps twice. Scope 'full' would train the two copies apart. Use the "
            "bridge, cdt_lens.load_model(..., backend='bridge'), or another scope."
        )
    return None


def _scale(one: Tensor, other: Tensor) -> float | None:
    """Return c with one = c * other, up to rounding in half precision, or None."""
    product = square = other_square = 0.0
    for a, b in zip(one.split(4096), other.split(4096), strict=True):  # vocabularies are large
        a, b = at_least_float32(a), at_least_float32(b)
        product += float((a * b).sum())
        square += float(a.square().sum())
        other_square += float(b.square().sum())
    parallel = product**2 > (1 - _ROUNDING**2) * square * other_square
    return product / other_square if parallel else None
