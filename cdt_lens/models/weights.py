"""Give access to every weight by its TransformerLens name, as a view into its parameter.

1. "blocks.3.attn.W_Q" is `[head, d_model, d_head]` in both model classes. Grouped keys and values
   have `n_kv_heads` heads. Writing into a view writes into the model.
2. `own_weights` leaves out the weights that a class adds to a family: the zero biases of a Llama as
   `HookedTransformer`, and the output bias of the bridge. No checkpoint can store them, so they
   must not be trained.
3. Weights that TransformerLens has no name for, such as StableLM's norms of each head, come last
   under their name in Hugging Face. Those of peft's adapters are apart, see `adapter_layers`.
4. A weight that a class shows differently has the layout of the other class: the norm that GPT-J
   uses twice stands once, and OPT's position table is without the two rows for padding.
5. The bridge runs some fused projections (GPT-NeoX) from split copies. `sync_fused` writes the
   copies back into the fused parameter, which would otherwise keep the old weights. `check_fused`
   refuses a model before training if that would give wrong weights.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from cdt_lens.core.errors import InputError, UnsupportedModelError
from cdt_lens.models.hugging_face import is_multimodal
from cdt_lens.models.resident import check_on_one_device, check_whole, resident
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
_OPT_PADDING_ROWS = 2
# "ln" is the norm behind the activation of a SoLU MLP.
_NORMS = ("q_norm", "k_norm", "ln1", "ln2", "ln1_post", "ln2_post", "ln_final", "ln")
_QKV_BIASES = frozenset({"attn.b_Q", "attn.b_K", "attn.b_V"})
# HookedTransformer adds zero biases everywhere. These families have only the biases named here.
_BIASES_IN_HOOKED = {
    "GPTJForCausalLM": frozenset({"mlp.b_in", "mlp.b_out"}),
    "GPTNeoForCausalLM": frozenset({"attn.b_O", "mlp.b_in", "mlp.b_out"}),
    "LlamaForCausalLM": frozenset(),
    "MistralForCausalLM": frozenset(),
    "Qwen2ForCausalLM": _QKV_BIASES,
    "Qwen3ForCausalLM": frozenset(),
}
# These families have every bias, even where it is zero, as in a fresh model.
_EVERY_BIAS_IN_HOOKED = frozenset({"GPT2LMHeadModel", "GPTNeoXForCausalLM", "OPTForCausalLM"})


def canonical(names: str) -> str:
    """Return the name that both model classes share.

    Args:
        names: alternatives in the form `a.b|c.d`.

    Returns:
        The last alternative.
    """
    return names.rsplit("|", 1)[-1]


def is_bias(name: str) -> bool:
    """Return whether a weight is a bias.

    Args:
        name: name of the weight.

    Returns:
        True for a bias.
    """
    return name.rsplit(".", 1)[-1].startswith(("b", "_b"))


def is_norm(name: str) -> bool:
    """Return whether a weight belongs to a norm.

    Args:
        name: name of the weight.

    Returns:
        True for a weight or bias of a norm.
    """
    # Some have names of Hugging Face, such as q_layernorm.norms.0.weight of StableLM.
    return any(part in _NORMS or "norm" in part for part in name.split(".")[:-1])


def named_weights(view: ModelView) -> dict[str, Tensor]:
    """Return every weight in TransformerLens layout.

    Args:
        view: the model.

    Returns:
        Views into the parameters by canonical name, from the embedding to the unembedding, and
        then `other_parameters`, detached.

    Raises:
        UnsupportedModelError: some weights are offloaded.
    """
    check_whole(view)
    others = {name: value.detach() for name, value in other_parameters(view).items()}
    return canonical_weights(view) | others


def canonical_weights(view: ModelView) -> dict[str, Tensor]:
    """Return the weights that TransformerLens has names for.

    Args:
        view: the model.

    Returns:
        Views into the parameters by canonical name, detached.
    """
    weights = end_weights(view)
    blocks = {n: v for layer in range(view.n_layers) for n, v in block_weights(view, layer).items()}
    first = {name: value for name, value in weights.items() if name in END_WEIGHTS[:2]}
    return first | blocks | {name: v for name, v in weights.items() if name not in first}


def end_weights(view: ModelView) -> dict[str, Tensor]:
    """Return the weights outside the blocks.

    Args:
        view: the model.

    Returns:
        Views into the parameters by canonical name, detached.
    """
    weights = {name: first_tensor(view.tl, name) for name in END_WEIGHTS}
    found = {name: value.detach() for name, value in weights.items() if value is not None}
    if view.is_bridge and getattr(view.hf_config, "model_type", None) == "opt":
        found["pos_embed.W_pos"] = found["pos_embed.W_pos"][_OPT_PADDING_ROWS:]
    return found


def block_weights(view: ModelView, layer: int) -> dict[str, Tensor]:
    """Return the weights of a block.

    Args:
        view: the model.
        layer: the layer.

    Returns:
        Views into the parameters by canonical name, detached.
    """
    found = {
        f"blocks.{layer}.{canonical(names)}": value.detach()
        for names in BLOCK_WEIGHTS
        if (value := first_tensor(view.blocks[layer], names)) is not None
    }
    return {name: value for name, value in found.items() if not _is_shared(name, found)}


def _is_shared(name: str, weights: Mapping[str, Tensor]) -> bool:
    """Return whether a weight of ln2 is that of ln1 under a second name."""
    first = weights.get(name.replace(".ln2.", ".ln1."))
    return ".ln2." in name and first is not None and place(first) == place(weights[name])


def other_parameters(view: ModelView) -> dict[str, nn.Parameter]:
    """Return the language model's parameters without a name in TransformerLens.

    Those of adapters, and those of images or sound in a multimodal checkpoint, are left out.

    Args:
        view: the model.

    Returns:
        The parameters by name, such as "blocks.0.self_attn.q_layernorm.norms.0.weight".
    """
    known = {place(value)[0] for value in end_weights(view).values()}
    for layer, block in enumerate(view.blocks):
        with resident(block):
            known |= {place(value)[0] for value in block_weights(view, layer).values()}
    known |= {place(parameter)[0] for parameter in fused_parameters(view)}
    known |= {place(p)[0] for layer in _peft_layers(view) for p in layer.parameters()}
    known |= _of_other_media(view)
    return {
        _name_in_block(name): parameter
        for name, parameter in view.tl.named_parameters()
        if not parameter.is_meta and place(parameter)[0] not in known
    }


def _of_other_media(view: ModelView) -> set[int]:
    """Return the storages of what a multimodal checkpoint has beside its language model."""
    config = view.hf_config
    if not view.is_bridge or config is None or not is_multimodal(config):
        return set()
    root = view.tl.original_model
    language = (root.get_decoder(), root.get_output_embeddings())
    own = {place(p)[0] for part in language if part is not None for p in part.parameters()}
    return {place(p)[0] for p in root.parameters() if not p.is_meta} - own


def _name_in_block(name: str) -> str:
    """Return "blocks.<layer>.<rest>" for a parameter of a layer in a Hugging Face model."""
    name = name.replace("_original_component.", "")
    found = re.match(r".*?\.(\d+)\.(.*)", name)
    return name if found is None else f"blocks.{found[1]}.{found[2]}"


def fused_parameters(view: ModelView) -> Iterator[nn.Parameter]:
    """Yield the fused projections that a bridge runs as split q, k and v.

    Args:
        view: the model.
    """
    for block in view.blocks if view.is_bridge else ():
        fused = getattr(getattr(block, "attn", None), "qkv", None)
        yield from getattr(fused, "original_component", nn.Module()).parameters()


def _peft_layers(view: ModelView) -> list[Any]:
    """Return peft's layers in the model. There are none unless somebody has imported peft."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    root = view.tl.original_model if view.is_bridge else view.tl
    return [] if peft is None else [m for m in root.modules() if isinstance(m, peft.BaseTunerLayer)]


def adapter_layers(view: ModelView) -> dict[str, dict[str, nn.Parameter]]:
    """Return what peft's active adapters add to the model.

    Args:
        view: the model.

    Returns:
        The parameters of each layer, by their names. The key has the number of the layer, the names
        of its active adapters and their scalings.
    """
    found = {}
    for number, layer in enumerate(_peft_layers(view)):
        if layer.disable_adapters or not layer.active_adapters:
            continue
        base = {id(parameter) for parameter in layer.get_base_layer().parameters()}
        added = {n: p for n, p in layer.named_parameters() if id(p) not in base}
        scalings = dict(getattr(layer, "scaling", {}))
        found[f"{number}: {list(layer.active_adapters)} {scalings}"] = added
    return found


def own_weights(view: ModelView) -> dict[str, Tensor]:
    """Return `named_weights` without the biases that the model class adds to the family.

    Args:
        view: the model.

    Returns:
        Views into the parameters by canonical name, detached.
    """
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
    # Any other family: the class fills in zero for a bias that a checkpoint lacks.
    return not bool(value.any())


def family_of(view: ModelView) -> str | None:
    """Return the Hugging Face class of the weights, such as "LlamaForCausalLM".

    Args:
        view: the model.

    Returns:
        The name of the class, or None if the model does not record it.
    """
    return getattr(view.tl.cfg, "original_architecture", None) or None


def holders(view: ModelView) -> dict[int, nn.Parameter]:
    """Return the model's parameters by the address of their storage.

    Args:
        view: the model.

    Returns:
        One parameter for each storage.
    """
    parameters: dict[int, nn.Parameter] = {}
    for parameter in view.tl.parameters():
        parameters.setdefault(place(parameter)[0], parameter)
    return parameters


def check_gradients(view: ModelView) -> None:
    """Check that the weights allow a backward pass and new values.

    Args:
        view: the model.

    Raises:
        InputError: they were created under `torch.inference_mode`.
    """
    # transformers makes ordinary parameters even there, but not its buffers.
    buffers = [buffer.is_inference() for buffer in view.tl.buffers()]
    made_there = bool(buffers) and all(buffers)
    if made_there or any(parameter.is_inference() for parameter in view.tl.parameters()):
        raise InputError(
            f"{view.name}: its weights were created under torch.inference_mode, which allows "
            "neither a backward pass nor new values. Load the model outside of it."
        )


def check_trainable(view: ModelView) -> None:
    """Check that the model's weights can be trained and exported.

    Args:
        view: the model.

    Raises:
        InputError: the weights were created under `torch.inference_mode`.
        UnsupportedModelError: the norms are folded, a switch splits attention's input by head, a
            fused projection cannot take trained heads, or the model is on several devices.
    """
    check_on_one_device(view)
    check_gradients(view)
    for flag in ("use_split_qkv_input", "use_attn_in"):
        if getattr(view.tl.cfg, flag, False):
            raise UnsupportedModelError(
                f"{view.name}: cfg.{flag} is on, which splits the input of attention by head, "
                f"where slices are trained. Turn it off (model.set_{flag}(False))."
            )
    kind = str(getattr(view.tl.cfg, "normalization_type", None))
    folded = kind.endswith("Pre") or bool(getattr(view.tl, "_weights_processed", False))
    compatible = bool(getattr(view.tl, "compatibility_mode", False)) and _norms_are_ones(view)
    if folded or compatible:
        raise UnsupportedModelError(
            f"{view.name}: its norms are folded into the next weights, so it has no norm "
            "parameters to train and nothing to export. Load it unprocessed, with "
            "cdt_lens.load_model(name) or HookedTransformer.from_pretrained_no_processing(name)."
        )
    check_fused(view)


def _norms_are_ones(view: ModelView) -> bool:
    norms = [v for n, v in named_weights(view).items() if is_norm(n) and n.endswith(".w")]
    return bool(norms) and all(bool((value == 1).all()) for value in norms)


def check_fused(view: ModelView) -> None:
    """Check that q, k and v of a bridge, fused as `sync_fused` does, equal the fused parameter.

    The shapes fit even where the order does not (CodeGen), so the values are compared.

    Args:
        view: the model.

    Raises:
        UnsupportedModelError: the values differ. The message names the fused module.
    """
    for where, target, mixed in _fused_copies(view):
        # NaN passes here, because `check_supported` names the weight that holds it.
        if mixed is None or not torch.allclose(
            mixed.to(target), target, rtol=0, atol=0, equal_nan=True
        ):
            raise UnsupportedModelError(
                f"{view.name}: {where} does not hold the q, k and v that the bridge runs, in an "
                "order in which trained weights can be written back (GPT-2's or GPT-NeoX's), so it "
                "cannot be trained. Load the model again if you edited its weights. Otherwise use "
                "another family."
            )


def sync_fused(view: ModelView) -> None:
    """Write split q, k and v of the bridge back into the fused projection that Hugging Face saves.

    Args:
        view: the model.

    Raises:
        UnsupportedModelError: the shapes do not fit. `check_fused` detects this earlier.
    """
    for where, target, mixed in _fused_copies(view):
        if mixed is None:
            raise UnsupportedModelError(
                f"{view.name}: {where} has shape {tuple(target.shape)}, which does not fit its q, "
                "k and v, so they cannot be written back"
            )
        target.copy_(mixed)


def _fused_copies(view: ModelView) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield name, tensor and new value of each fused tensor that the bridge runs split."""
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
    """Fuse q, k and v; return None where their shapes differ (multi-query attention).

    The order is columns (q k v, head, d_head) for GPT-2 and rows (head, q k v, d_head) for NeoX.
    """
    if len({part.shape for part in parts}) > 1:
        return None
    order = "t (h d) ... -> ... (t h d)" if by_columns else "t (h d) ... -> (h t d) ..."
    return rearrange(torch.stack(parts), order, h=view.n_heads)


def place(tensor: Tensor) -> tuple[int, int]:
    """Return where in memory a tensor begins.

    Args:
        tensor: a tensor.

    Returns:
        The address of its storage, and the offset in it.
    """
    return int(tensor.untyped_storage().data_ptr()), int(tensor.storage_offset())


def first_tensor(module: Any, names: str) -> Tensor | None:
    """Return the first tensor that exists among alternative names.

    Args:
        module: the module to search.
        names: alternatives in the form `a.b|c.d`.

    Returns:
        The tensor, or None.
    """
    for path in names.split("|"):
        value: Any = module
        for name in path.split("."):
            # A bridge raises for a bias that its family does not have.
            value = getattr(value, name, None)
        if isinstance(value, Tensor):
            return value
    return None
