"""Find the slices of the parameters that a set of heads owns (CT-SFT, arXiv 2601.08146, section 3).

1. Head h of layer l owns W_Q[h], W_O[h] and b_Q[h], and the slices of W_K, W_V, b_K and b_V of its
   key/value group. b_O belongs to no head.
2. A grouped key/value slice serves several query heads. It is trained when any of them is selected,
   and the unselected ones are reported as siblings.
3. Slices are views into the parameters that the forward pass reads, and never into stacked or
   expanded copies. `check_slices` verifies this on a run: x W + b must be its q, k and v.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from cdt_lens.core.choices import KeyValue, Norms
from cdt_lens.core.errors import InputError, UnsupportedModelError
from cdt_lens.models.heads import Head, check_heads
from cdt_lens.models.support import output_site
from cdt_lens.models.view import ModelView
from cdt_lens.models.weights import holders, is_norm, own_weights, place

# Each role with the site whose activation its slice makes.
QUERY_ROLES = ("W_Q", "b_Q", "W_O")
KEY_VALUE_ROLES = ("W_K", "b_K", "W_V", "b_V")
ROLES = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")


@dataclass(frozen=True, eq=False)
class HeadSlice:
    """The slices of one weight that the selected heads own.

    Attributes:
        layer: layer of the weight.
        role: "W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K" or "b_V".
        index: the query heads, or the key/value heads for keys and values, in order.
        whole: the weight `[head, ...]`, a view into the model.
    """

    layer: int
    role: str
    index: tuple[int, ...]
    whole: Float[Tensor, "head ..."] = field(repr=False)

    @property
    def name(self) -> str:
        """The weight's name in TransformerLens layout, such as "blocks.3.attn.W_Q"."""
        return f"blocks.{self.layer}.attn.{self.role}"

    def read(self) -> Float[Tensor, "head ..."]:
        """Return a copy of the slices."""
        return self.whole[list(self.index)].clone()

    def write(self, values: Float[Tensor, "head ..."]) -> None:
        """Write values into the model.

        Args:
            values: the slices. They are converted to the model's type.
        """
        with torch.no_grad():
            self.whole[list(self.index)] = values.to(self.whole.dtype)


def head_slices(
    view: ModelView, heads: Iterable[Head | str], *, kv: KeyValue = "shared"
) -> tuple[HeadSlice, ...]:
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
    slices: list[HeadSlice] = []
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
                slices.append(HeadSlice(layer, role, index, whole))
    _check_untied(view, slices, weights)
    return tuple(slices)


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
    view: ModelView, slices: Iterable[HeadSlice], weights: Mapping[str, Tensor]
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


def check_slices(view: ModelView, slices: Iterable[HeadSlice]) -> None:
    """Check that the weights produce the activations of a run: q, k, v and the output of attention.

    Args:
        view: the model.
        slices: the slices to check.

    Raises:
        UnsupportedModelError: a weight is not the one that the forward pass uses.
    """
    parts = {(part.layer, part.role): part for part in slices}
    layers = {layer for layer, _ in parts}
    outputs = {layer: output_site(view, "attn_out", layer) for layer in layers}
    sites = [(site, layer) for layer in layers for site in ("attn.in", "q", "k", "v", "z")]
    tokens = torch.arange(min(5, view.n_ctx)).unsqueeze(0) % view.tl.unembed.W_U.shape[-1]
    trace = view.run(tokens, [*sites, *outputs.values()])
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
        made = made if bias is None else made + bias
        tolerance = 1e-3 if made.dtype.itemsize >= 4 else 5e-2
        if bool((made - expected).norm() > tolerance * (expected.norm() + 1e-6)):
            raise UnsupportedModelError(
                f"{view.name}: {part.name} does not produce the model's own activations, so its "
                "slices cannot be trained"
            )
