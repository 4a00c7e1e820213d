"""Check that transformers reads everything in a GGUF file that acts on the logits.

transformers ignores tensors and entries of a GGUF file that it does not know, without a warning.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType

from cdt_lens.core.errors import InputError
from cdt_lens.models.positions import ropes

# Entries that act on the logits, by the name that the configuration has for them.
_ACTING = {
    "attention.sliding_window": "sliding_window",
    "attention.scale": "attention_multiplier",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logit_scale",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.clamp_kqv": "clip_qkv",
    "attention.max_alibi_bias": "alibi_bias_max",
}
_LAYER = re.compile(r"blk\.(\d+)\.")


def check_gguf(path: Path, config: Any, n_weights: int) -> None:
    """Check that the configuration that transformers made of a GGUF file describes all of it.

    Args:
        path: the file.
        config: the Hugging Face configuration.
        n_weights: number of the weights that transformers filled from it.

    Raises:
        InputError: the file holds a layer, another tensor, rotary factors or an option that would
            be ignored.
    """
    reader = GGUFReader(path)
    for tensor in reader.tensors:
        layer = _LAYER.match(tensor.name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            _refuse(path, f"{tensor.name}, but says that it has {config.num_hidden_layers} layers")
        if tensor.name.startswith("rope_") and not np.all(np.asarray(tensor.data) == 1):
            _refuse(path, f"rotary factors ({tensor.name}), which transformers does not read")
    held = [tensor.name for tensor in reader.tensors if not tensor.name.startswith("rope_")]
    if len(held) > n_weights:
        _refuse(
            path,
            f"{len(held)} weights, of which transformers reads {n_weights}; biases and norms that "
            "its configuration does not name are left out",
        )
    architecture = str(_entry(reader, "general.architecture"))
    scaling = _entry(reader, f"{architecture}.rope.scaling.type")
    scaled = any(rope.get("rope_type", "default") != "default" for rope in ropes(config))
    if scaling not in (None, "none") and not scaled:
        _refuse(path, f"a rotary scaling ({scaling}), which transformers does not read")
    # llama.cpp takes a factor without a type for a linear one.
    for name in ("rope.scaling.factor", "rope.scale_linear"):
        factor = _entry(reader, f"{architecture}.{name}")
        if scaling is None and factor not in (None, 0, 1) and not scaled:
            _refuse(path, f"a rotary scaling ({name}={factor}), which transformers does not read")
    if _entry(reader, f"{architecture}.attention.causal") is False:
        _refuse(path, "attention that is not causal, which transformers does not read")
    if _entry(reader, f"{architecture}.expert_count"):
        _refuse(path, "a mixture of experts, whose options are not in the file")
    for name, ours in _ACTING.items():
        value = _entry(reader, f"{architecture}.{name}")
        if value and not np.isclose(value, getattr(config, ours, None) or 0.0):
            _refuse(path, f"{name}={value}, which transformers does not read")


def _entry(reader: GGUFReader, name: str) -> Any:
    """Return the value of an entry, or None."""
    field = reader.get_field(name)
    if field is None:
        return None
    value = field.parts[field.data[0]]
    if field.types[0] == GGUFValueType.STRING:
        return bytes(value).decode("utf-8", errors="replace")
    return value[0].item()


def _refuse(path: Path, what: str) -> None:
    raise InputError(f"{path}: the file holds {what}. Use the model's Hugging Face folder instead.")
