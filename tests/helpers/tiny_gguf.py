"""A tiny Llama as a GGUF file, whole or with something missing or added."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

WIDTH, HEADS, LAYERS, MLP, WORDS = 32, 4, 2, 48, 64
Tensors = dict[str, np.ndarray]


def tensors() -> Tensors:
    """Return the weights of a Llama by their GGUF names."""
    draw = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return (draw.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)

    found = {"token_embd.weight": matrix(WORDS, WIDTH), "output.weight": matrix(WORDS, WIDTH)}
    found["output_norm.weight"] = np.ones(WIDTH, np.float32)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            found[f"blk.{layer}.{name}.weight"] = matrix(WIDTH, WIDTH)
        for name in ("ffn_gate", "ffn_up"):
            found[f"blk.{layer}.{name}.weight"] = matrix(MLP, WIDTH)
        found[f"blk.{layer}.ffn_down.weight"] = matrix(WIDTH, MLP)
        for name in ("attn_norm", "ffn_norm"):
            found[f"blk.{layer}.{name}.weight"] = np.ones(WIDTH, np.float32)
    return found


def write_gguf(
    path: Path,
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    layers: int = LAYERS,
    more: Callable[[GGUFWriter], object] = lambda writer: None,
) -> Path:
    """Write the file; `layers` is what it says of itself, `more` adds entries."""
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("llama")
    words = ["<unk>", "<s>", "</s>", *(f"▁w{i}" for i in range(3, WORDS))]
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * WORDS)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (WORDS - 3))
    more(writer)
    for name, value in (tensors() if weights is None else weights).items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
