"""A tiny model without MLPs."""

from __future__ import annotations

from typing import Any

import torch


def attention_only(norm: str | None) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2, d_model=32, d_head=8, n_heads=4, d_vocab=128, n_ctx=16, attn_only=True,
        normalization_type=norm, seed=0, device="cpu", dtype=torch.float64,
    )  # fmt: skip
    model = HookedTransformer(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.detach().add_(0.3 * noise)
    return model
