"""Which slices of the real parameters a set of heads owns (CT-SFT, arXiv 2601.08146, §3).

1. Head h of layer l owns W_Q[h], W_O[h], b_Q[h], and the slice of W_K, W_V, b_K, b_V of its
   key/value group. b_O belongs to no head.
2. A grouped key/value slice serves several query heads: it is trained when any of them is selected,
   and the unselected ones that it reaches are reported as siblings.
3. Slices are views into the parameters that the forward pass reads, never into stacked or expanded
   copies, and are checked by numbers: x W + b must be the q, k, v of a run.
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
    """The slices of one weight that selected heads own.

    name: "blocks.3.attn.W_Q"; index: query heads, or key/value heads for keys and values, in
    order; whole: the weight, `[head, ...]`, a view into the model.
    """

    layer: int
    role: str
    index: tuple[int, ...]
    whole: Float[Tensor, "head ..."] = field(repr=False)

    @property
    def name(self) -> str:
        """The weight's name in TransformerLens layout."""
        return f"blocks.{self.layer}.attn.{self.role}"

    def read(self) -> Float[Tensor, "head ..."]:
        """A copy of the slices."""
        return self.whole[list(self.index)].clone()

    def write(self, values: Float[Tensor, "head ..."]) -> None:
        """Put `values` into the model."""
        with torch.no_grad():
            self.whole[list(self.index)] = values.to(self.whole.dtype)


def head_slices(
    view: ModelView, heads: Iterable[Head | str], *, kv: KeyValue = "shared"
) -> tuple[HeadSlice, ...]:
    """The slices of `heads`, layer by layer, in the order of `ROLES`.

    kv: "shared" takes a key/value slice when any query head of its group is selected; "skip"
    takes none; "groups" selects every query head of such a group as well.

    Raises:
        InputError: a head outside the model, or another `kv`.
        UnsupportedModelError: a weight is missing, tied to another, or not read by the model.
    """
    selected = selected_heads(view, heads, kv=kv)
    weights = own_weights(view)
    found: list[HeadSlice] = []
    for layer in sorted({head.layer for head in selected}):
        queries = tuple(head.head for head in selected if head.layer == layer)
        groups = tuple(sorted({_group(view, head) for head in queries}))
        for role in ROLES:
            if kv == "skip" and role in KEY_VALUE_ROLES:
                continue
            whole = weights.get(f"blocks.{layer}.attn.{role}")
            if whole is None and role.startswith("W"):
                raise UnsupportedModelError(
                    f"{view.name}: layer {layer} has no {role}; its heads cannot be trained"
                )
            if whole is not None:
                index = groups if role in KEY_VALUE_ROLES else queries
                found.append(HeadSlice(layer, role, index, whole))
    _check_untied(view, found, weights)
    return tuple(found)


def selected_heads(
    view: ModelView, heads: Iterable[Head | str], *, kv: KeyValue = "shared"
) -> tuple[Head, ...]:
    """`heads` in order; with `kv="groups"` also the other query heads of their groups."""
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
    """Unselected query heads whose keys and values change with those of `heads`."""
    chosen = selected_heads(view, heads, kv=kv)
    if kv == "skip":
        return ()
    return tuple(h for h in selected_heads(view, chosen, kv="groups") if h not in chosen)


def norm_weights(
    view: ModelView, which: Norms = "all", heads: Iterable[Head] = ()
) -> Mapping[str, Tensor]:
    """The norms' weights and biases by name: of all layers, of the circuit's layers, or none.

    Raises:
        InputError: another `which`.
        UnsupportedModelError: norms are asked for and the model has none to train.
    """
    if which not in ("all", "circuit", "none"):
        raise InputError(f"norms={which!r}: expected all, circuit or none")
    if which == "none":
        return {}
    found = {name: value for name, value in own_weights(view).items() if is_norm(name)}
    if not found:
        raise UnsupportedModelError(
            f"{view.name}: it has no norm parameters to train; pass norms='none'"
        )
    if which == "all":
        return found
    layers = {f"blocks.{head.layer}" for head in heads}
    return {n: value for n, value in found.items() if ".".join(n.split(".")[:2]) in layers}


def _group(view: ModelView, head: int) -> int:
    return head // (view.n_heads // view.n_kv_heads)


def _check_untied(
    view: ModelView, slices: Iterable[HeadSlice], weights: Mapping[str, Tensor]
) -> None:
    """Each weight must lie in a parameter of the model, and be no other weight as well."""
    addresses = holders(view)
    names: dict[tuple[int, int], list[str]] = {}
    for name, value in weights.items():
        names.setdefault(place(value), []).append(name)
    for part in slices:
        where = place(part.whole)
        if where[0] not in addresses:
            raise UnsupportedModelError(
                f"{view.name}: {part.name} is a copy and no view of a parameter, so writing to it "
                "would train nothing; load the model with cdt_lens.load_model"
            )
        # Of the whole model: a tied weight of a layer without selected heads would move too.
        others = [name for name in names[where] if name != part.name]
        if others:
            raise UnsupportedModelError(
                f"{view.name}: {part.name} and {others[0]} are one tied parameter; training one "
                "head would change another layer's"
            )


def check_slices(view: ModelView, slices: Iterable[HeadSlice]) -> None:
    """Whether the weights make the activations of a run: q, k, v from the input, the output from z.

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
            seen = trace[outputs[layer]]
            bias = weights.get(f"blocks.{layer}.attn.b_O")
        elif role.startswith("W"):
            made = torch.einsum("bpm,hmd->bphd", trace["attn.in", layer], part.whole)
            seen = trace[role[-1].lower(), layer]
            bias = weights.get(f"blocks.{layer}.attn.b_{role[-1]}")
        else:
            continue
        made = made if bias is None else made + bias
        tolerance = 1e-3 if made.dtype.itemsize >= 4 else 5e-2
        if bool((made - seen).norm() > tolerance * (seen.norm() + 1e-6)):
            raise UnsupportedModelError(
                f"{view.name}: {part.name} does not make the model's own activations, so its "
                "slices cannot be trained"
            )
