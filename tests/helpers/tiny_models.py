"""Tiny random Hugging Face models, offline, one for each architecture feature the tests need.

Every parameter is drawn afresh, biases and norm weights included, so that no term of the
arithmetic is hidden behind a 0 or a 1. The sliding windows are shorter than the prompts, the
soft-caps low enough to bite, and where the family allows it n_heads * d_head differs from d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import transformers
from jaxtyping import Int
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

D_VOCAB = 128
D_MODEL = 64  # a square: Gemma's embedding scale sqrt(d_model) is then the same number in any dtype
D_MLP = 96
N_HEADS = 4
WINDOW = 5
PROMPT_LENGTH = 9

_COMMON = {
    "vocab_size": D_VOCAB,
    "hidden_size": D_MODEL,
    "num_hidden_layers": 2,
    "num_attention_heads": N_HEADS,
    "intermediate_size": D_MLP,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",  # the only one that knows the attention soft-cap
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "pad_token_id": 0}
_NARROW_HEADS = {**_GROUPED, "head_dim": 12}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_GEMMA = {**_NARROW_HEADS, "query_pre_attn_scalar": 20, "sliding_window": WINDOW}


class Float64Throughout(TorchFunctionMode):
    """Within this context every request for float32 is answered with float64.

    Hugging Face models compute norms, softmax and rotary angles in float32 whatever their dtype,
    which puts their float64 logits off by 1e-6; in this context they are float64 all the way.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        # Most calls name no type: loops, since every operation of most tests comes through here.
        for value in args:
            if value is torch.float32:
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
                break
        if kwargs:
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
            return func(*args, **kwargs)
        return func(*args)


def _gpt2() -> PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=D_VOCAB,
        n_positions=64,
        n_ctx=64,  # unused by the model; TransformerLens 3 reads it, as the published files have it
        n_embd=D_MODEL,
        n_layer=2,
        n_head=N_HEADS,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    return transformers.GPT2LMHeadModel(config)


def _gpt_neox(parallel: bool) -> PreTrainedModel:
    config = transformers.GPTNeoXConfig(**_COMMON, rotary_pct=0.25, use_parallel_residual=parallel)
    return transformers.GPTNeoXForCausalLM(config)


def _llama() -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_GROUPED))


def _mistral() -> PreTrainedModel:
    config = transformers.MistralConfig(**_GROUPED, sliding_window=WINDOW)
    return transformers.MistralForCausalLM(config)


def _qwen2() -> PreTrainedModel:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_GROUPED))


def _qwen3() -> PreTrainedModel:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_NARROW_HEADS))


def _gemma2() -> PreTrainedModel:
    config = transformers.Gemma2Config(
        **_GEMMA,
        layer_types=["sliding_attention", "full_attention"],
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    )
    return transformers.Gemma2ForCausalLM(config)


def _gemma3() -> PreTrainedModel:
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(
        **{**_GEMMA, "num_hidden_layers": len(layer_types)}, layer_types=layer_types
    )
    return transformers.Gemma3ForCausalLM(config)


def _gpt_neo() -> PreTrainedModel:
    config = transformers.GPTNeoConfig(
        vocab_size=D_VOCAB, max_position_embeddings=64, hidden_size=D_MODEL, num_layers=2,
        num_heads=N_HEADS, attention_types=[[["global", "local"], 1]], window_size=WINDOW,
        bos_token_id=1, eos_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    return transformers.GPTNeoForCausalLM(config)


def _gptj() -> PreTrainedModel:
    # Its rotary angles are quotients of whole numbers, which torch gives its default type.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return transformers.GPTJForCausalLM(_gpt2_like(transformers.GPTJConfig, rotary_dim=8))
    finally:
        torch.set_default_dtype(before)


def _opt() -> PreTrainedModel:
    config = transformers.OPTConfig(
        **_COMMON, ffn_dim=D_MLP, word_embed_proj_dim=D_MODEL, pad_token_id=0
    )
    return transformers.OPTForCausalLM(config)


def _granite() -> PreTrainedModel:
    config = transformers.GraniteConfig(
        **_GROUPED, embedding_multiplier=3.0, residual_multiplier=0.6, attention_multiplier=0.3,
        logits_scaling=2.5,
    )  # fmt: skip
    return transformers.GraniteForCausalLM(config)


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": _gpt2,  # LayerNorm, learned positions, fused QKV in Conv1D
    "pythia": lambda: _gpt_neox(parallel=True),  # parallel block, partial rotary, fused QKV
    "neox_seq": lambda: _gpt_neox(parallel=False),
    "llama": _llama,  # RMSNorm, rotary, grouped K/V, gated MLP
    "mistral": _mistral,  # a sliding window in every layer
    "qwen2": _qwen2,  # QKV biases
    "qwen3": _qwen3,  # QK-norm
    "gemma2": _gemma2,  # post-norms, soft-caps, windows in every other layer
    "gemma3": _gemma3,  # post-norms, QK-norm, local and global rotary bases
    "gptj": _gptj,  # parallel, one norm, rotary of adjacent pairs
    "gpt_neo": _gpt_neo,  # no scale in attention, windows in every other layer
    "opt": _opt,  # ReLU, two rows for padding in the position table
    "granite": _granite,  # embeddings, residual writes, attention and logits multiplied
    "smollm3": lambda: transformers.SmolLM3ForCausalLM(  # no rotary embedding in the second layer
        transformers.SmolLM3Config(**_GROUPED, no_rope_layer_interval=2)
    ),
    "cohere": lambda: transformers.CohereForCausalLM(  # parallel, one norm, logits multiplied
        transformers.CohereConfig(**_GROUPED, logit_scale=0.4)
    ),
}
FAMILIES = tuple(BUILDERS)


def _gpt2_like(config: type[PretrainedConfig], **more: int) -> PretrainedConfig:
    """Of the families whose configuration has GPT-2's names."""
    return config(
        vocab_size=D_VOCAB, n_positions=64, n_embd=D_MODEL, n_layer=2, n_head=N_HEADS,
        bos_token_id=1, eos_token_id=2, attn_implementation="eager", **more,
    )  # fmt: skip


def _falcon(multi_query: bool) -> PreTrainedModel:
    config = transformers.FalconConfig(
        vocab_size=D_VOCAB, hidden_size=D_MODEL, num_hidden_layers=2, num_attention_heads=N_HEADS,
        alibi=False, multi_query=multi_query, new_decoder_architecture=False, parallel_attn=True,
        bias=False, attn_implementation="eager",
    )  # fmt: skip
    return transformers.FalconForCausalLM(config)


# Families that few tests read: each has its own way to keep q, k and v, or no biases.
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "falcon": lambda: _falcon(multi_query=False),  # fused, in GPT-NeoX' order
    "falcon_mq": lambda: _falcon(multi_query=True),  # fused, one head of keys and values
    "codegen": lambda: transformers.CodeGenForCausalLM(  # fused, in an order of its own
        _gpt2_like(transformers.CodeGenConfig, rotary_dim=8)
    ),
    "bigcode": lambda: transformers.GPTBigCodeForCausalLM(  # fused, one head of keys and values
        _gpt2_like(transformers.GPTBigCodeConfig)
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**_GROUPED)),  # fused
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**_NARROW_HEADS)),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeForCausalLM(  # QKV biases, a shared expert
        transformers.Qwen2MoeConfig(
            **_GROUPED, **_EXPERTS, moe_intermediate_size=40, shared_expert_intermediate_size=24
        )
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeForCausalLM(  # QK-norm, a dense layer
        transformers.Qwen3MoeConfig(
            **_NARROW_HEADS, **_EXPERTS, moe_intermediate_size=40, mlp_only_layers=[0]
        )
    ),
    "olmoe": lambda: transformers.OlmoeForCausalLM(  # QK-norm over all heads
        transformers.OlmoeConfig(**_GROUPED, **_EXPERTS)
    ),
}
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")  # of OTHERS, mixtures of experts


def build(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The tiny random model of a family, in eval mode, the same weights on every call.

    Raises KeyError for a name outside FAMILIES and OTHERS.
    """
    with torch.random.fork_rng(), Float64Throughout() if dtype is torch.float64 else nullcontext():
        model = (BUILDERS | OTHERS)[name]()
    model = model.to(dtype).eval().requires_grad_(False)
    if name in EXPERTS and dtype is torch.float64:
        model.set_experts_implementation("eager")
    _randomise(model, torch.Generator().manual_seed(1))
    model.config.architectures = [type(model).__name__]
    model.config._name_or_path = f"tiny-{name}"
    return model


def prompts(batch: int = 2, pos: int = PROMPT_LENGTH, *, seed: int = 0) -> Int[Tensor, "batch pos"]:
    """Random prompts without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, D_VOCAB, (batch, pos), generator=generator)


def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Matrices that keep a unit-sized vector unit-sized; vectors moved off their 0 or 1."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim == 1:
            parameter.add_(0.3 * noise)
        else:
            parameter.copy_(noise * min(parameter.shape[-2:]) ** -0.5)
