"""What decides a model's function besides its weights: its configuration and its buffers.

Two models with the same weights give other numbers if an epsilon, a scale, a window or a rotary
base differs. These values are recorded with every result and compared when it is used. Only names
that both sides know are compared: releases of transformers add names, and a `HookedTransformer` has
values of its own beside those of Hugging Face.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from cdt_lens.models.positions import ropes
from cdt_lens.models.view import ModelView

# Names in a Hugging Face configuration that change no logit of a prompt within the context.
_WITHOUT_EFFECT = re.compile(
    r"_.*|architectures|auto_map|dtype|torch_dtype|transformers_version|is_decoder|use_cache|n_ctx|"
    r"is_encoder_decoder|add_cross_attention|chunk_size_feed_forward|id2label|label2id|"
    r"problem_type|pretraining_tp|return_dict|output_.*|vocab_size|tie_word_embeddings|summary_.*|"
    r"task_specific_params|reorder_and_upcast_attn|quantization_config|initializer_.*|"
    r".*token_id|.*dropout|.*pdrop"
)
# Names in the configuration of a HookedTransformer that change its logits.
_HOOKED = re.compile(
    r"eps|act_fn|attn_scale|use_attn_scale|scale_attn_by_inverse_layer_idx|window_size|attn_types|"
    r"use_local_attn|rotary_.*|output_logits_soft_cap|attn_scores_soft_cap|normalization_type|"
    r"final_rms|positional_embedding_type|parallel_attn_mlp|attention_dir|use_NTK.*|NTK_.*|"
    r"use_yarn_rope|yarn_.*"
)


def configuration(view: ModelView) -> dict[str, Any]:
    """Return the values besides the weights that change the logits of a model.

    Args:
        view: the model.

    Returns:
        JSON values: "hugging_face" is the configuration that the model was loaded with, where it is
        known. "hooked" is the configuration of a `HookedTransformer`, and "buffers" has a number
        for each buffer of a `TransformerBridge`.
    """
    found: dict[str, Any] = {}
    if view.hf_config is not None:
        values = view.hf_config.to_dict()
        found["hugging_face"] = {n: v for n, v in values.items() if not _is_without_effect(n)}
    if view.is_bridge:
        found["buffers"] = _buffers(view)
    else:
        values = vars(view.tl.cfg)
        found["hooked"] = {n: v for n, v in values.items() if _HOOKED.fullmatch(n)}
    as_values: dict[str, Any] = json.loads(json.dumps(found, default=_plain))
    return as_values


def first_difference(recorded: object, actual: object, name: str = "") -> str | None:
    """Compare the values of two configurations that both have.

    Args:
        recorded: the values of a result's model.
        actual: the values of a model.
        name: the name of the values, for the message.

    Returns:
        The first name whose values differ, and the two values, in words. None if none differs.
    """
    if isinstance(recorded, Mapping) and isinstance(actual, Mapping):
        both = (n for n in recorded if n in actual)
        found = (first_difference(recorded[n], actual[n], f"{name}.{n}".strip(".")) for n in both)
        return next((text for text in found if text is not None), None)
    if _equal(recorded, actual):
        return None
    return f"{name} {_short(recorded)}, and here {_short(actual)}"


def digest(values: Mapping[str, Any]) -> str:
    """Return a hash of the values of a configuration.

    Args:
        values: the values, as `configuration` returns them.

    Returns:
        12 hexadecimal digits. They ignore the last bits of the buffers, which differ by machine.
    """
    buffers = {n: f"{value:.5g}" for n, value in values.get("buffers", {}).items()}
    text = json.dumps({**values, "buffers": buffers}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _is_without_effect(name: str) -> bool:
    return _WITHOUT_EFFECT.fullmatch(name) is not None


def _buffers(view: ModelView) -> dict[str, float]:
    """Return one number for each buffer of real numbers, which depends on every element."""
    # These rotary embeddings overwrite their frequencies in every pass.
    kinds = {rope.get("rope_type") for rope in ropes(view.hf_config)}
    varying = bool(kinds & {"dynamic", "longrope"})
    numbers = {}
    for name, buffer in view.tl.original_model.named_buffers():
        if buffer.is_floating_point() and buffer.numel() and not (varying and "inv_freq" in name):
            values = torch.nan_to_num(buffer.detach().double().cpu().flatten())
            ramp = torch.linspace(1, 2, len(values), dtype=torch.float64)
            numbers[name.replace("_original_component.", "")] = float((values * ramp).mean())
    return numbers


def _plain(value: Any) -> Any:
    """Return a value that JSON does not know: a number of numpy's, or its text."""
    return value.item() if hasattr(value, "item") else str(value)


def _equal(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-5)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(_equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
