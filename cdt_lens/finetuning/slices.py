"""Find the slices of the parameters that heads and MLP channels own (CT-SFT, arXiv 2601.08146).

1. Head h of layer l owns W_Q[h], W_O[h] and b_Q[h], and the slices of W_K, W_V, b_K and b_V of its
   key/value group. b_O belongs to no head.
2. A grouped key/value slice serves several query heads. It is trained when any of them is selected,
   and the unselected ones are reported as siblings.
3. Channel c of an MLP owns column c of W_in and W_gate, b_in[c] and row c of W_out. b_out belongs
   to no channel. Training a few channels of every layer beside heads is the idea of S2FT (arXiv
   2412.06289).
4. Slices are views into the parameters that the forward pass reads, and never into stacked or
   expanded copies. `check_slices` verifies this on a run: x W + b must be its activations.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from cdt_lens.core.choices import ChannelChoice, KeyValue, Norms
from cdt_lens.core.errors import InputError, UnsupportedModelError
from cdt_lens.models.heads import Head, check_heads
from cdt_lens.models.support import output_site
from cdt_lens.models.view import ModelView
from cdt_lens.models.weights import holders, is_norm, own_weights, place

# Each role with the site whose activation its slice makes.
KEY_VALUE_ROLES = ("W_K", "b_K", "W_V", "b_V")
ROLES = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")
CHANNEL_ROLES = ("W_in", "W_gate", "b_in", "W_out")


@dataclass(frozen=True, eq=False)
class WeightSlice:
    """The slices of one weight that the selected heads, or MLP channels, own.

    Attributes:
        layer: layer of the weight.
        role: one of `ROLES` or `CHANNEL_ROLES`.
        index: the query heads, the key/value heads for keys and values, or the channels, in order.
        whole: the weight `[head, ...]` or `[channel, ...]`, a view into the model.
    """

    layer: int
    role: str
    index: tuple[int, ...]
    whole: Float[Tensor, "slice ..."] = field(repr=False)

    @property
    def name(self) -> str:
        """The weight's name in TransformerLens layout, such as "blocks.3.attn.W_Q"."""
        part = "mlp" if self.role in CHANNEL_ROLES else "attn"
        return f"blocks.{self.layer}.{part}.{self.role}"

    def read(self) -> Float[Tensor, "slice ..."]:
        """Return a copy of the slices."""
        return self.whole[list(self.index)].clone()

    def write(self, values: Float[Tensor, "slice ..."]) -> None:
        """Write values into the model.

        Args:
            values: the slices. They are converted to the model's type.
        """
        with torch.no_grad():
            self.whole[list(self.index)] = values.to(self.whole.dtype)


def head_slices(
    view: ModelView, heads: Iterable[Head | str], *, kv: KeyValue = "shared"
) -> tuple[WeightSlice, ...]:
    """Return the slices that a set of heads owns.

    Args:
        view: the model.
        heads: heads or their names.
        kv: "shared" takes a key/value slice when any query head of its group is selected. "skip"
            takes none. "groups" selects every query head of such a group as well.

    Returns:
        The slices, layer by layer, in the order of `ROLES`.

    Raises:
        InputError: a head is outside the model, or `kv` is unknown.
        UnsupportedModelError: a weight is missing, tied to another weight, or a copy.
    """
    selected = selected_heads(view, heads, kv=kv)
    weights = own_weights(view)
    slices: list[WeightSlice] = []
    for layer in sorted({head.layer for head in selected}):
        queries = tuple(head.head for head in selected if head.layer == layer)
        groups = tuple(sorted({_group(view, head) for head in queries}))
        for role in ROLES:
            if kv == "skip" and role in KEY_VALUE_ROLES:
                continue
            whole = weights.get(f"blocks.{layer}.attn.{role}")
            if whole is None and role.startswith("W"):
                raise UnsupportedModelError(
                    f"{view.name}: layer {layer} has no {role}, so its heads cannot be trained"
                )
            if whole is not None:
                index = groups if role in KEY_VALUE_ROLES else queries
                slices.append(WeightSlice(layer, role, index, whole))
    _check_untied(view, slices, weights)
    return tuple(slices)


def channel_slices(
    view: ModelView, count: int, *, choice: ChannelChoice = "random", seed: int = 0
) -> tuple[WeightSlice, ...]:
    """Return the slices of MLP channels, the same number in each layer.

    Args:
        view: the model.
        count: number of channels of each layer.
        choice: "weight" takes the channels whose rows of W_out have the largest norms, "random"
            draws them.
        seed: seed of the draw.

    Returns:
        The slices, layer by layer, in the order of `CHANNEL_ROLES`.

    Raises:
        InputError: a layer has fewer channels.
        UnsupportedModelError: a weight is missing, tied to another weight, or a copy.
    """
    weights = own_weights(view)
    slices: list[WeightSlice] = []
    for layer in range(view.n_layers):
        out = weights.get(f"blocks.{layer}.mlp.W_out")
        if out is None or f"blocks.{layer}.mlp.W_in" not in weights:
            raise UnsupportedModelError(
                f"{view.name}: layer {layer} has no MLP of channels to train; pass channels=0"
            )
        if count > len(out):
            raise InputError(f"channels={count}: the MLP of layer {layer} has {len(out)}")
        index = _channels(out, count, choice, f"{seed}/{layer}")
        for role in CHANNEL_ROLES:
            whole = weights.get(f"blocks.{layer}.mlp.{role}")
            if whole is not None and not (role == "b_in" and _adds_bias_late(view, layer)):
                slices.append(WeightSlice(layer, role, index, by_channel(role, whole)))
    _check_untied(view, slices, weights)
    return tuple(slices)


def _adds_bias_late(view: ModelView, layer: int) -> bool:
    """Return whether b_in is added behind the gate, as in a gated MLP of HookedTransformer.

    It is no bias of W_in there, so it is not trained with the channels.
    """
    return not view.is_bridge and hasattr(view.blocks[layer].mlp, "W_gate")


def _channels(out: Tensor, count: int, choice: str, seed: str) -> tuple[int, ...]:
    if choice == "random":
        return tuple(sorted(random.Random(seed).sample(range(len(out)), count)))
    return tuple(sorted(out.float().norm(dim=1).topk(count).indices.tolist()))


def by_channel(role: str, weight: Tensor) -> Float[Tensor, "channel ..."]:
    """Return a weight of an MLP with its channels first, as a view.

    Args:
        role: one of `CHANNEL_ROLES`.
        weight: the weight in TransformerLens layout.
    """
    return weight.T if role in ("W_in", "W_gate") else weight


def selected_heads(
    view: ModelView, heads: Iterable[Head | str], *, kv: KeyValue = "shared"
) -> tuple[Head, ...]:
    """Return the query heads that are trained.

    Args:
        view: the model.
        heads: heads or their names.
        kv: see `head_slices`.

    Returns:
        The heads in order. With `kv="groups"` also the other query heads of their groups.

    Raises:
        InputError: a head is outside the model, or `kv` is unknown.
    """
    if kv not in ("shared", "skip", "groups"):
        raise InputError(f"kv={kv!r}: expected shared, skip or groups")
    chosen = check_heads(heads, view.n_layers, view.n_heads)
    if kv != "groups":
        return chosen
    groups = {(head.layer, _group(view, head.head)) for head in chosen}
    return tuple(
        Head(layer, query)
        for layer, group in sorted(groups)
        for query in range(view.n_heads)
        if _group(view, query) == group
    )


def siblings(
    view: ModelView, heads: Iterable[Head | str], *, kv: KeyValue = "shared"
) -> tuple[Head, ...]:
    """Return the unselected query heads whose keys and values change with those of `heads`.

    Args:
        view: the model.
        heads: heads or their names.
        kv: see `head_slices`.

    Returns:
        The heads in order. The tuple is empty with `kv="skip"` or `kv="groups"`.

    Raises:
        InputError: a head is outside the model, or `kv` is unknown.
    """
    chosen = selected_heads(view, heads, kv=kv)
    if kv == "skip":
        return ()
    return tuple(h for h in selected_heads(view, chosen, kv="groups") if h not in chosen)


def norm_weights(
    view: ModelView, which: Norms = "all", heads: Iterable[Head] = ()
) -> Mapping[str, Tensor]:
    """Return the weights and biases of the norms that are trained.

    Args:
        view: the model.
        which: "all", "circuit" for the norms of the heads' layers, or "none".
        heads: the heads of the circuit.

    Returns:
        Views into the parameters by name.

    Raises:
        InputError: `which` is unknown.
        UnsupportedModelError: norms are requested and the model has none to train.
    """
    if which not in ("all", "circuit", "none"):
        raise InputError(f"norms={which!r}: expected all, circuit or none")
    if which == "none":
        return {}
    norms = {name: value for name, value in own_weights(view).items() if is_norm(name)}
    if not norms:
        raise UnsupportedModelError(
            f"{view.name}: it has no norm parameters to train. Pass norms='none'."
        )
    if which == "all":
        return norms
    layers = {f"blocks.{head.layer}" for head in heads}
    return {n: value for n, value in norms.items() if ".".join(n.split(".")[:2]) in layers}


def _group(view: ModelView, head: int) -> int:
    return head // (view.n_heads // view.n_kv_heads)


def _check_untied(
    view: ModelView, slices: Iterable[WeightSlice], weights: Mapping[str, Tensor]
) -> None:
    """Check that each weight lies in a parameter of the model and is not another weight as well."""
    addresses = holders(view)
    names: dict[tuple[int, int], list[str]] = {}
    for name, value in weights.items():
        names.setdefault(place(value), []).append(name)
    for part in slices:
        where = place(part.whole)
        if where[0] not in addresses:
            raise UnsupportedModelError(
                f"{view.name}: {part.name} is a copy and not a view of a parameter, so writing to "
                "it would train nothing. Load the model with cdt_lens.load_model."
            )
        # Compare with the whole model: a tied weight in another layer would change too.
        others = [name for name in names[where] if name != part.name]
        if others:
            raise UnsupportedModelError(
                f"{view.name}: {part.name} and {others[0]} are one tied parameter; training one "
                "head would change another layer's"
            )


def check_slices(view: ModelView, slices: Iterable[WeightSlice]) -> None:
    """Check that the weights produce the activations of a run: q, k, v and the output of attention.

    Args:
        view: the model.
        slices: the slices to check.

    Raises:
        UnsupportedModelError: a weight is not the one that the forward pass uses.
    """
    slices = tuple(slices)
    _check_channels(view, [part for part in slices if part.role in CHANNEL_ROLES])
    parts = {(p.layer, p.role): p for p in slices if p.role in ROLES}
    layers = {layer for layer, _ in parts}
    outputs = {layer: output_site(view, "attn_out", layer) for layer in layers}
    sites = [(site, layer) for layer in layers for site in ("attn.in", "q", "k", "v", "z")]
    trace = view.run(_probe(view), [*sites, *outputs.values()])
    weights = own_weights(view)
    for (layer, role), part in parts.items():
        if role == "W_O":
            made = torch.einsum("bphd,hdm->bpm", trace["z", layer], part.whole)
            expected = trace[outputs[layer]]
            bias = weights.get(f"blocks.{layer}.attn.b_O")
        elif role.startswith("W"):
            made = torch.einsum("bpm,hmd->bphd", trace["attn.in", layer], part.whole)
            expected = trace[role[-1].lower(), layer]
            bias = weights.get(f"blocks.{layer}.attn.b_{role[-1]}")
        else:
            continue
        _check_made(view, part, made if bias is None else made + bias, expected)


def _check_channels(view: ModelView, parts: Sequence[WeightSlice]) -> None:
    """Check that the weights produce the MLP's activations before and after its function."""
    layers = sorted({part.layer for part in parts})
    if not layers:
        return
    weights = own_weights(view)
    sites = {
        part.name: output_site(view, "mlp_out", part.layer) if part.role == "W_out"
        else (channel_site(view, part.role, part.layer), part.layer)
        for part in parts if part.role != "b_in"
    }  # fmt: skip
    needed = [(site, layer) for site in ("mlp.in", "post") for layer in layers]
    trace = view.run(_probe(view), [*needed, *sites.values()])
    for part in parts:
        if part.role == "b_in":
            continue
        out = part.role == "W_out"
        late = part.role == "W_in" and _adds_bias_late(view, part.layer)
        bias = None if late else weights.get(part.name.replace("W_", "b_"))
        made = trace["post" if out else "mlp.in", part.layer] @ (
            part.whole if out else part.whole.T
        )
        _check_made(view, part, made if bias is None else made + bias, trace[sites[part.name]])


def channel_site(view: ModelView, role: str, layer: int) -> str:
    """Return the name of the site at which the channels of a weight are computed.

    Args:
        view: the model.
        role: "W_in", "W_gate" or "b_in".
        layer: the layer.
    """
    gated = ("pre_linear", layer) in view.sites and hasattr(view.blocks[layer].mlp, "W_gate")
    return "pre_linear" if gated and role != "W_gate" else "pre"


def _probe(view: ModelView) -> Tensor:
    return torch.arange(min(5, view.n_ctx)).unsqueeze(0) % view.tl.unembed.W_U.shape[-1]


def _check_made(view: ModelView, part: WeightSlice, made: Tensor, expected: Tensor) -> None:
    tolerance = 1e-3 if made.dtype.itemsize >= 4 else 5e-2
    if bool((made - expected).norm() > tolerance * (expected.norm() + 1e-6)):
        raise UnsupportedModelError(
            f"{view.name}: {part.name} does not produce the model's own activations, so its "
            "slices cannot be trained"
        )
