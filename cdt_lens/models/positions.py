"""What depends on the length of a prompt: sliding windows and rotary embeddings.

Random prompts of a length that any machine can run do not reach a window of 4096 tokens. So the
windows and rotary tables of a `HookedTransformer` are compared with those of Hugging Face for every
position of its context. `TransformerBridge` runs Hugging Face's own masks and rotary embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# The names of the lengths, in tokens, at which a family changes what it computes.
_LENGTHS = (
    "sliding_window", "attention_chunk_size", "window_size", "original_max_position_embeddings",
)  # fmt: skip
_SHORT = 64  # tokens of the random prompts
_LONGEST = 512  # a prompt that a laptop runs through a large model in seconds


def sample_lengths(config: Any) -> tuple[int, ...]:
    """Return the lengths of prompts on which a model is compared with Hugging Face's.

    Args:
        config: the Hugging Face configuration.

    Returns:
        64 tokens first, and enough tokens to pass every window or limit that the configuration
        names, as far as these are at most 512 tokens. Both are bounded by the model's context.
    """
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or _SHORT
    places = [config, *ropes(config)]
    named = [_entry(place, name) for place in places for name in _LENGTHS]
    reached = [n for n in named if isinstance(n, int) and 0 < n <= _LONGEST]
    longest = max([_SHORT, *(n + 16 for n in reached)])
    return tuple(dict.fromkeys((min(_SHORT, limit), min(longest, limit))))


def ropes(config: Any) -> list[Mapping[str, Any]]:
    """Return the rotary settings of a Hugging Face configuration.

    Args:
        config: the configuration, or None.

    Returns:
        One mapping for all layers, or one for each kind of layer.
    """
    found = getattr(config, "rope_parameters", None) or {}
    return [found] if "rope_type" in found else [v for v in found.values() if v]


def longrope_limit(config: Any) -> int | None:
    """Return the number of tokens beyond which longrope takes its long factors, or None.

    The width of a batch decides for all of its prompts, so that a batch must not hold prompts of
    both kinds.

    Args:
        config: the Hugging Face configuration, or None.
    """
    for rope in ropes(config and config.get_text_config()):
        if rope.get("rope_type") == "longrope":
            return int(rope["original_max_position_embeddings"])
    return None


def difference(hf_model: Any, model: Any) -> str | None:
    """Compare epsilon, windows and rotary tables of a `HookedTransformer` with Hugging Face's.

    Args:
        hf_model: the Hugging Face model.
        model: the `HookedTransformer` that was made of it.

    Returns:
        What differs within the context of `model`, in words, or None.
    """
    n_ctx = int(model.cfg.n_ctx)
    for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"):
        epsilon = getattr(hf_model.config, name, None)
        if epsilon is not None and epsilon != model.cfg.eps:
            return f"{name} is {epsilon}, and here {model.cfg.eps}"
    for layer, window in enumerate(_windows(hf_model.config, n_ctx)):
        attention = model.blocks[layer].attn
        own = model.cfg.window_size if attention.attn_type == "local" else None
        if min(own or n_ctx, n_ctx) != window:
            return f"layer {layer} attends to {window} tokens, and here to {own or n_ctx}"
    rotary = [m for m in hf_model.modules() if hasattr(m, "inv_freq")]
    limits = [*(rope.get("original_max_position_embeddings") for rope in ropes(hf_model.config)), 1]
    # A shorter prompt comes last, which sets a dynamic scaling back.
    for length in (n_ctx, *(min(n_ctx, n) for n in limits if n)):
        for module in rotary:
            if not _same_rotation(module, model.blocks[0].attn, length):
                return f"the rotary embedding of a prompt of {length} tokens is another one"
    return None


def _windows(config: Any, n_ctx: int) -> list[int]:
    """Return how many tokens each layer attends to, by the configuration."""
    kinds = getattr(config, "attention_layers", None)  # GPT-Neo
    if kinds is not None:
        return [min(config.window_size, n_ctx) if kind == "local" else n_ctx for kind in kinds]
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return [n_ctx] * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [min(window, n_ctx) if kind == "sliding_attention" else n_ctx for kind in kinds]


def _same_rotation(rotary: Any, attention: Any, length: int) -> bool:
    """Return whether Hugging Face's rotary embedding is the table of a `HookedTransformer`."""
    positions = torch.arange(length, device=rotary.inv_freq.device)[None]
    wanted: tuple[Tensor, Tensor] = rotary(torch.zeros(1, device=positions.device), positions)
    for expected, table in zip(wanted, (attention.rotary_cos, attention.rotary_sin), strict=True):
        actual = table[:length].float().cpu()
        expected = expected[0].float().cpu()
        tolerance = 1e-3 if table.dtype.itemsize >= 4 else 1e-2
        if actual.shape != expected.shape:
            return False
        if not bool((actual - expected).norm() <= tolerance * (expected.norm() + 1e-6)):
            return False
    return True


def _entry(place: Any, name: str) -> Any:
    return place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
