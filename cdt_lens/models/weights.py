"""Every weight of a model by its TransformerLens name, as a view into the parameter that holds it.

1. "blocks.3.attn.W_Q" is `[head, d_model, d_head]` in both model classes; grouped keys and values
   have `n_kv_heads` heads. Writing into a view writes into the model.
2. `own_weights` leaves out what a class adds to a family: the zero biases of `HookedTransformer`'s
   Llama, the output bias of the bridge. They must not be trained: no checkpoint has a place for
   them.
3. The bridge runs some fused projections (GPT-NeoX) from split copies; `sync_fused` writes the
   copies back into the fused parameter, which would otherwise keep the old weights. A model for
   which that would not be right is refused before anything is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from cdt_lens.core.errors import UnsupportedModelError
from cdt_lens.models.view import ModelView

# HookedTransformer keeps grouped keys and values under _W_K; W_K is then an expanded copy.
BLOCK_WEIGHTS = (
    "attn.W_Q", "attn._W_K|attn.W_K", "attn._W_V|attn.W_V", "attn.W_O",
    "attn.b_Q", "attn._b_K|attn.b_K", "attn._b_V|attn.b_V", "attn.b_O",
    "attn.q_norm.w", "attn.k_norm.w",
    "mlp.W_in", "mlp.W_gate", "mlp.W_out", "mlp.b_in", "mlp.b_out",
    "ln1.w", "ln1.b", "ln2.w", "ln2.b", "ln1_post.w", "ln1_post.b", "ln2_post.w", "ln2_post.b",
    "mlp.b_gate",
)  # fmt: skip
END_WEIGHTS = (
    "embed.W_E",
    "pos_embed.W_pos",
    "ln_final.w",
    "ln_final.b",
    "unembed.W_U",
    "unembed.b_U",
)
_NORMS = ("q_norm", "k_norm", "ln1", "ln2", "ln1_post", "ln2_post", "ln_final")
_QKV_BIASES = frozenset({"attn.b_Q", "attn.b_K", "attn.b_V"})
# HookedTransformer has a zero bias everywhere; these families have only those named here,
_BIASES_IN_HOOKED = {
    "LlamaForCausalLM": frozenset(),
    "MistralForCausalLM": frozenset(),
    "Qwen2ForCausalLM": _QKV_BIASES,
    "Qwen3ForCausalLM": frozenset(),
}
# and these have every one, be it zero as in a fresh model.
_EVERY_BIAS_IN_HOOKED = frozenset({"GPT2LMHeadModel", "GPTNeoXForCausalLM"})


def canonical(names: str) -> str:
    """The name that both model classes share, of `a.b|c.d`."""
    return names.rsplit("|", 1)[-1]


def is_bias(name: str) -> bool:
    """Whether a weight of this name is a bias."""
    return name.rsplit(".", 1)[-1].startswith(("b", "_b"))


def is_norm(name: str) -> bool:
    """Whether a weight of this name belongs to a norm."""
    return name.rsplit(".", 2)[-2] in _NORMS


def named_weights(view: ModelView) -> dict[str, Tensor]:
    """Every weight in TransformerLens layout by canonical name, from the embedding to the end."""
    found = {name: first_tensor(view.tl, name) for name in END_WEIGHTS[:2]}
    for layer, block in enumerate(view.blocks):
        for names in BLOCK_WEIGHTS:
            found[f"blocks.{layer}.{canonical(names)}"] = first_tensor(block, names)
    found |= {name: first_tensor(view.tl, name) for name in END_WEIGHTS[2:]}
    return {name: value.detach() for name, value in found.items() if value is not None}


def own_weights(view: ModelView) -> dict[str, Tensor]:
    """`named_weights` without the biases that the model class adds to the family."""
    return {n: value for n, value in named_weights(view).items() if not _added(view, n, value)}


def _added(view: ModelView, name: str, value: Tensor) -> bool:
    if not is_bias(name) or is_norm(name):
        return False
    family = family_of(view)
    if name == "unembed.b_U":
        return (view.is_bridge or family is not None) and not bool(value.any())
    if view.is_bridge or family is None or family in _EVERY_BIAS_IN_HOOKED:
        return False
    if family in _BIASES_IN_HOOKED:
        return name.split(".", 2)[-1] not in _BIASES_IN_HOOKED[family]
    # Any other family: what the class fills in for a bias that a checkpoint lacks is zero.
    return not bool(value.any())


def family_of(view: ModelView) -> str | None:
    """The Hugging Face class that the weights are of, such as "LlamaForCausalLM", if any."""
    return getattr(view.tl.cfg, "original_architecture", None) or None


def holders(view: ModelView) -> dict[int, nn.Parameter]:
    """The model's parameters by the address of their memory, each piece of memory once."""
    found: dict[int, nn.Parameter] = {}
    for parameter in view.tl.parameters():
        found.setdefault(place(parameter)[0], parameter)
    return found


def check_trainable(view: ModelView) -> None:
    """Refuse models whose weights are not the ones that were trained and can be exported.

    Raises:
        UnsupportedModelError: folded norms, a switch that splits attention's input by head, or a
            fused projection that trained heads could not be written back into.
    """
    for flag in ("use_split_qkv_input", "use_attn_in"):
        if getattr(view.tl.cfg, flag, False):
            raise UnsupportedModelError(
                f"{view.name}: cfg.{flag} is on, which splits the input of attention by head, "
                f"where slices are trained; turn it off (model.set_{flag}(False))"
            )
    kind = str(getattr(view.tl.cfg, "normalization_type", None))
    folded = kind.endswith("Pre") or bool(getattr(view.tl, "_weights_processed", False))
    compatible = bool(getattr(view.tl, "compatibility_mode", False)) and _norms_are_ones(view)
    if folded or compatible:
        raise UnsupportedModelError(
            f"{view.name}: its norms are folded into the next weights, so that there are no norm "
            "parameters to train and nothing to export; load it unprocessed, with "
            "cdt_lens.load_model(name) or HookedTransformer.from_pretrained_no_processing(name)"
        )
    check_fused(view)


def _norms_are_ones(view: ModelView) -> bool:
    norms = [v for n, v in named_weights(view).items() if is_norm(n) and n.endswith(".w")]
    return bool(norms) and all(bool((value == 1).all()) for value in norms)


def check_fused(view: ModelView) -> None:
    """Refuse a bridge whose q, k, v, put together as `sync_fused` does, are not its fused ones.

    Shapes fit where the order does not (CodeGen), so only the values tell.

    Raises:
        UnsupportedModelError: names the fused module.
    """
    for where, target, mixed in _fused_copies(view):
        # NaN is let by: `check_supported` names the weight that holds it.
        if mixed is None or not torch.allclose(
            mixed.to(target), target, rtol=0, atol=0, equal_nan=True
        ):
            raise UnsupportedModelError(
                f"{view.name}: {where} does not hold the q, k and v that the bridge runs, in an "
                "order that trained weights can be written back in (GPT-2's or GPT-NeoX's), so "
                "nothing of it can be trained; load the model again if you edited its weights, "
                "else use another family"
            )


def sync_fused(view: ModelView) -> None:
    """Write split q, k, v of the bridge back into the fused projection that Hugging Face saves.

    Raises:
        UnsupportedModelError: the shapes do not fit; `check_fused` would have said so before.
    """
    for where, target, mixed in _fused_copies(view):
        if mixed is None:
            raise UnsupportedModelError(
                f"{view.name}: {where} has shape {tuple(target.shape)}, which its q, k and v do "
                "not fill; they cannot be written back"
            )
        target.copy_(mixed)


def _fused_copies(view: ModelView) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Fused weights and biases that the bridge does not run from: name, tensor, new value."""
    for layer, block in enumerate(view.blocks if view.is_bridge else ()):
        attn: Any = getattr(block, "attn", None)
        fused = getattr(getattr(attn, "qkv", None), "original_component", None)
        # GPT-2's split weights are views of the fused one, until the model is cast or moved.
        if fused is None or place(attn.q.weight)[0] == place(fused.weight)[0]:
            continue
        by_columns = fused.weight.shape[-1] != attn.q.weight.shape[-1]
        for name in ("weight", "bias"):
            target = getattr(fused, name, None)
            parts: list[Any] = [getattr(getattr(attn, part), name, None) for part in "qkv"]
            if target is not None and all(part is not None for part in parts):
                mixed = _together(view, [part.detach() for part in parts], by_columns)
                fits = mixed is not None and mixed.shape == target.shape
                yield f"blocks.{layer}.attn.qkv", target.detach(), mixed if fits else None


def _together(view: ModelView, parts: list[Tensor], by_columns: bool) -> Tensor | None:
    """q, k, v as one: columns (q k v, head, d_head) for GPT-2, rows (head, q k v, d_head) for NeoX.

    None where their shapes are not equal (multi-query attention).
    """
    if len({part.shape for part in parts}) > 1:
        return None
    order = "t (h d) ... -> ... (t h d)" if by_columns else "t (h d) ... -> (h t d) ..."
    return rearrange(torch.stack(parts), order, h=view.n_heads)


def place(tensor: Tensor) -> tuple[int, int]:
    """Where in memory a tensor begins: its storage, and the offset in it."""
    return int(tensor.untyped_storage().data_ptr()), int(tensor.storage_offset())


def first_tensor(module: Any, names: str) -> Tensor | None:
    """The tensor at the first of `a.b|c.d` that exists."""
    for path in names.split("|"):
        value: Any = module
        for name in path.split("."):
            # A bridge raises for a bias that its family does not have.
            value = getattr(value, name, None)
        if isinstance(value, Tensor):
            return value
    return None
