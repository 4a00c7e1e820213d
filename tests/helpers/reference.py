"""Contextual decomposition (CD-T, arXiv 2407.00886), slow and literal, to test the engine against.

Every activation is a pair (rel, irrel) and each step below has a formula for each part. Nothing is
cached, hooked or shared with the package: a model is read into plain weight matrices and run here.

1. `read_model` / `read_hooked`: weights of a Hugging Face model or of a TransformerLens state dict
   -> `Network`.
2. The rules: `linear`, `norm`, `activation`, `product`, `attention`, `sign`: pairs in, pairs out.
3. `decompose`: embed (all irrelevant), then block after block; at z of a source head
   irrel := baseline, rel := z - baseline, and likewise where the output of a source MLP enters the
   residual stream; then final norm, unembedding, soft-cap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

Source = tuple[int, int, int | None]  # layer, head, position (None: every position)
Site = tuple[str, int]  # "q", "k", "v" or "z", and the layer
# Layers whose MLP is a source, with its baseline.
SourceMLPs = Mapping[int, Float[Tensor, "batch pos d_model"]]
NO_MLPS: SourceMLPs = {}

_CHOICES = {
    "norm": ("frozen", "through"),
    "attention": ("decomposed", "frozen", "half", "through"),
    "activation": ("through", "averaged", "frozen"),
    "product": ("through", "half", "gate"),
    "bias": ("proportional", "irrelevant"),
}


@dataclass(frozen=True)
class ReferenceRules:
    """One choice for each nonlinear step; ValueError for a choice that does not exist."""

    norm: str = "frozen"
    attention: str = "decomposed"
    activation: str = "through"
    product: str = "through"
    bias: str = "proportional"
    sign: bool = False
    eps: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")


OFFICIAL = ReferenceRules(sign=True, eps=1e-8)


def rules_like(options: Mapping[str, Any]) -> ReferenceRules:
    """From the package's rules as plain values: those that say how one stream goes on."""
    names = {field.name for field in fields(ReferenceRules)}
    return ReferenceRules(**{name: value for name, value in options.items() if name in names})


@dataclass(frozen=True)
class Pair:
    """The two parts of one activation."""

    rel: Tensor
    irrel: Tensor

    @property
    def full(self) -> Tensor:
        return self.rel + self.irrel

    def each(self, function: Callable[[Tensor], Tensor]) -> Pair:
        """A map that is linear and has no bias: the same on both parts."""
        return Pair(function(self.rel), function(self.irrel))

    def __add__(self, other: Pair) -> Pair:
        return Pair(self.rel + other.rel, self.irrel + other.irrel)


@dataclass(frozen=True)
class Decomposition:
    """The two parts of the logits, and of q, k, v (as projected, bias included) and z (after the
    source reset) of every layer."""

    rel_logits: Float[Tensor, "batch pos d_vocab"]
    irrel_logits: Float[Tensor, "batch pos d_vocab"]
    rel: Mapping[Site, Float[Tensor, "batch pos head d_head"]]
    irrel: Mapping[Site, Float[Tensor, "batch pos head d_head"]]


# The model as plain weights -----------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None = None


@dataclass(frozen=True)
class Norm:
    weight: Tensor | float
    bias: Tensor | None
    eps: float
    centred: bool  # LayerNorm subtracts the mean, RMSNorm does not


@dataclass(frozen=True)
class Attention:
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    d_head: int
    scale: float
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    rotary: tuple[float, int] | None = None  # base, and how many of d_head are rotated
    adjacent: bool = False  # component 2i turns with 2i + 1
    softcap: float | None = None
    window: int | None = None  # how many keys a query sees, its own included


@dataclass(frozen=True)
class MLP:
    w_in: Linear
    w_out: Linear
    function: Callable[[Tensor], Tensor]
    w_gate: Linear | None = None


@dataclass(frozen=True)
class Experts:
    """A mixture of experts as one function, its routing included."""

    function: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    attention: Attention
    attention_norm: Norm | None
    mlp: MLP | Experts | None = None
    mlp_norm: Norm | None = None
    attention_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None
    parallel: bool = False  # the MLP reads the block's input
    multiplier: float = 1.0  # of what attention and MLP add to the residual stream


@dataclass(frozen=True)
class Network:
    embed: Callable[[Int[Tensor, "batch pos"]], Float[Tensor, "batch pos d_model"]]
    blocks: tuple[Block, ...]
    final_norm: Norm | None
    unembed: Linear
    softcap: float | None = None


# The rules ----------------------------------------------------------------------------------------


def relevant_share(parts: Pair, rules: ReferenceRules) -> Tensor:
    """s = |rel| / (|rel| + |irrel| + eps), elementwise; 0 where both vanish."""
    total = parts.rel.abs() + parts.irrel.abs() + rules.eps
    return torch.where(total == 0, torch.zeros_like(total), parts.rel.abs() / total)


def add_bias(parts: Pair, bias: Tensor | None, measured_on: Pair, rules: ReferenceRules) -> Pair:
    """Shares a bias out in proportion to the magnitudes of `measured_on`."""
    if bias is None:
        return parts
    if rules.bias == "irrelevant":
        return Pair(parts.rel, parts.irrel + bias)
    share = relevant_share(measured_on, rules)
    return Pair(parts.rel + share * bias, parts.irrel + (1 - share) * bias)


def linear(x: Pair, spec: Linear, rules: ReferenceRules) -> Pair:
    """W rel and W irrel; the bias is shared by the outputs."""
    out = x.each(lambda part: part @ spec.weight.T)
    return add_bias(out, spec.bias, out, rules)


def norm(x: Pair, spec: Norm | None, rules: ReferenceRules) -> Pair:
    """LayerNorm or RMSNorm over the last axis; a bias is shared by the un-normalised inputs."""
    if spec is None:
        return x
    if rules.norm == "through":
        irrel = plain_norm(x.irrel, spec)
        return Pair(plain_norm(x.full, spec) - irrel, irrel)
    scale = norm_scale(x.full, spec)
    out = x.each(lambda part: centre(part, spec) / scale * spec.weight)
    return add_bias(out, spec.bias, x, rules)


def head_norm(x: Pair, spec: Norm | None, rules: ReferenceRules) -> Pair:
    """A norm of each head, or one over all heads."""
    if spec is None or len(spec.weight) == x.full.shape[-1]:
        return norm(x, spec, rules)
    shape = x.full.shape[-2:]
    return norm(x.each(lambda part: part.flatten(-2)), spec, rules).each(
        lambda part: part.unflatten(-1, shape)
    )


def plain_norm(x: Tensor, spec: Norm) -> Tensor:
    out = centre(x, spec) / norm_scale(x, spec) * spec.weight
    return out if spec.bias is None else out + spec.bias


def centre(x: Tensor, spec: Norm) -> Tensor:
    return x - x.mean(-1, keepdim=True) if spec.centred else x


def norm_scale(x: Tensor, spec: Norm) -> Tensor:
    return (centre(x, spec).pow(2).mean(-1, keepdim=True) + spec.eps).sqrt()


def activation(x: Pair, function: Callable[[Tensor], Tensor], rules: ReferenceRules) -> Pair:
    """through: f(irrel), the rest is relevant; averaged: rel is the mean of what f makes of it
    first and of what it adds last; frozen: both parts times f(x) / x."""
    if rules.activation == "through":
        irrel = function(x.irrel)
        return Pair(function(x.full) - irrel, irrel)
    if rules.activation == "averaged":
        first, last = function(x.rel), function(x.full) - function(x.irrel)
        return Pair((first + last) / 2, function(x.full) - (first + last) / 2)
    nonzero = torch.where(x.full == 0, torch.full_like(x.full, 1e-6), x.full)
    slope = function(nonzero) / nonzero
    return x.each(lambda part: part * slope)


def product(a: Pair, u: Pair, rules: ReferenceRules) -> Pair:
    """a * u of a gated MLP. half: each factor in turn carries the parts, the other is full."""
    if rules.product == "through":
        irrel = a.irrel * u.irrel
        return Pair(a.full * u.full - irrel, irrel)
    if rules.product == "gate":
        return Pair(a.full * u.rel, a.full * u.irrel)
    return Pair((a.rel * u.full + a.full * u.rel) / 2, (a.irrel * u.full + a.full * u.irrel) / 2)


def sign(x: Pair, rules: ReferenceRules) -> Pair:
    """Where the parts have opposite signs, the larger becomes the total and the other 0."""
    if not rules.sign:
        return x
    opposite = x.rel * x.irrel < 0
    rel_is_larger = x.rel.abs() > x.irrel.abs()
    zero = torch.zeros_like(x.rel)
    return Pair(
        torch.where(opposite, torch.where(rel_is_larger, x.full, zero), x.rel),
        torch.where(opposite, torch.where(rel_is_larger, zero, x.full), x.irrel),
    )


def attention(q: Pair, k: Pair, v: Pair, spec: Attention, rules: ReferenceRules) -> Pair:
    """z from the projected q, k, v: QK-norm and rotary first, then the chosen rule."""
    q = head_norm(q, spec.q_norm, rules).each(lambda part: rotate(part, spec.rotary, spec.adjacent))
    k = head_norm(k, spec.k_norm, rules).each(lambda part: rotate(part, spec.rotary, spec.adjacent))
    full_pattern = pattern(q.full, k.full, spec)
    z = weigh(full_pattern, v.full)
    if rules.attention == "decomposed":
        rel = weigh(pattern(q.rel, k.rel, spec), v.rel)
        return Pair(rel, z - rel)
    if rules.attention == "through":
        irrel = weigh(pattern(q.irrel, k.irrel, spec), v.irrel)
        return Pair(z - irrel, irrel)
    if rules.attention == "half":
        moved = full_pattern - pattern(q.irrel, k.irrel, spec)
        rel = (weigh(moved, v.full) + weigh(full_pattern, v.rel)) / 2
        return Pair(rel, z - rel)
    return v.each(lambda part: weigh(full_pattern, part))


def pattern(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "batch key kv_head d_head"],
    spec: Attention,
) -> Float[Tensor, "batch head query key"]:
    k = for_each_query_head(k, q.shape[2])
    scores = einsum(q, k, "b query head d, b key head d -> b head query key") * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    positions = torch.arange(q.shape[1], device=q.device)
    distance = positions[:, None] - positions[None, :]
    seen = distance >= 0
    if spec.window is not None:
        seen = seen & (distance < spec.window)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def weigh(
    pattern: Float[Tensor, "batch head query key"], v: Float[Tensor, "batch key kv_head d_head"]
) -> Float[Tensor, "batch query head d_head"]:
    v = for_each_query_head(v, pattern.shape[1])
    return einsum(pattern, v, "b head query key, b key head d -> b query head d")


def for_each_query_head(
    x: Float[Tensor, "batch pos kv_head d_head"], n_heads: int
) -> Float[Tensor, "batch pos head d_head"]:
    return repeat(x, "b pos kv d -> b pos (kv group) d", group=n_heads // x.shape[2])


def rotate(
    x: Float[Tensor, "batch pos head d_head"],
    rotary: tuple[float, int] | None,
    adjacent: bool = False,
) -> Float[Tensor, "batch pos head d_head"]:
    """Rotary embedding: component i of the rotated ones turns with component i + half of them, or
    with its neighbour."""
    if rotary is None:
        return x
    base, n_rotated = rotary
    exponents = torch.arange(0, n_rotated, 2, dtype=x.dtype, device=x.device) / n_rotated
    positions = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
    angles = (positions[:, None] / base**exponents)[:, None, :]  # pos, 1, n_rotated / 2
    turning, rest = x.split([n_rotated, x.shape[-1] - n_rotated], -1)
    pairs = "b p h (i two) -> two b p h i" if adjacent else "b p h (two i) -> two b p h i"
    first, second = rearrange(turning, pairs, two=2)
    turned_first = first * angles.cos() - second * angles.sin()
    turned_second = second * angles.cos() + first * angles.sin()
    back = " -> ".join(reversed(pairs.split(" -> ")))
    return torch.cat([rearrange([turned_first, turned_second], back), rest], -1)


# The decomposition --------------------------------------------------------------------------------


def decompose(
    model: nn.Module,
    tokens: Int[Tensor, "batch pos"],
    sources: Sequence[Source],
    baseline: Float[Tensor, "layer batch pos head d_head"],
    rules: ReferenceRules,
    mlps: SourceMLPs = NO_MLPS,
) -> Decomposition:
    """Decomposes a Hugging Face causal language model's run on unpadded prompts."""
    return decompose_network(read_model(model), tokens, sources, baseline, rules, mlps)


def decompose_hooked(
    state_dict: Mapping[str, Tensor],
    cfg: object,
    tokens: Int[Tensor, "batch pos"],
    sources: Sequence[Source],
    baseline: Float[Tensor, "layer batch pos head d_head"],
    rules: ReferenceRules,
) -> Decomposition:
    """The same for the state dict of a HookedTransformer with learned positions."""
    return decompose_network(read_hooked(state_dict, cfg), tokens, sources, baseline, rules)


@torch.no_grad()
def decompose_network(
    network: Network,
    tokens: Int[Tensor, "batch pos"],
    sources: Sequence[Source],
    baseline: Float[Tensor, "layer batch pos head d_head"],
    rules: ReferenceRules,
    mlps: SourceMLPs = NO_MLPS,
) -> Decomposition:
    outside = [source for source in sources if not 0 <= source[0] < len(network.blocks)]
    if outside:
        raise ValueError(f"sources outside the model's {len(network.blocks)} layers: {outside}")
    embedded = network.embed(tokens)
    x = Pair(torch.zeros_like(embedded), embedded)
    sites: dict[Site, Pair] = {}
    for layer, block in enumerate(network.blocks):
        x = run_block(x, block, layer, sources, baseline, rules, sites, mlps)
    x = norm(x, network.final_norm, rules)
    logits = linear(x, network.unembed, rules)
    if network.softcap is not None:
        cap = network.softcap
        logits = activation(logits, lambda part: cap * torch.tanh(part / cap), rules)
    return Decomposition(
        rel_logits=logits.rel,
        irrel_logits=logits.irrel,
        rel={site: parts.rel for site, parts in sites.items()},
        irrel={site: parts.irrel for site, parts in sites.items()},
    )


def run_block(
    x: Pair,
    block: Block,
    layer: int,
    sources: Sequence[Source],
    baseline: Tensor,
    rules: ReferenceRules,
    sites: dict[Site, Pair],
    mlps: SourceMLPs = NO_MLPS,
) -> Pair:
    """One block; what it passes at q, k, v and z is left in `sites`."""
    spec = block.attention
    normed = norm(x, block.attention_norm, rules)
    for name, projection in (("q", spec.q), ("k", spec.k), ("v", spec.v)):
        sites[name, layer] = linear(normed, projection, rules).each(
            lambda part: rearrange(part, "b pos (head d) -> b pos head d", d=spec.d_head)
        )
    z = attention(sites["q", layer], sites["k", layer], sites["v", layer], spec, rules)
    z = sites["z", layer] = reset_sources(z, layer, sources, baseline)
    written = linear(z.each(lambda part: part.flatten(-2)), spec.o, rules)
    written = norm(written, block.attention_post_norm, rules)
    middle = x + written.each(lambda part: block.multiplier * part)
    if block.mlp is None:
        return middle
    normed = norm(x if block.parallel else middle, block.mlp_norm, rules)
    written = norm(run_mlp(normed, block.mlp, rules), block.mlp_post_norm, rules)
    written = written.each(lambda part: block.multiplier * part)
    if layer in mlps:
        written = Pair(written.full - mlps[layer], mlps[layer])
    return sign(middle + written, rules)


def reset_sources(z: Pair, layer: int, sources: Sequence[Source], baseline: Tensor) -> Pair:
    """At the source heads irrel := baseline, rel := z - baseline."""
    full, rel, irrel = z.full, z.rel.clone(), z.irrel.clone()
    for source_layer, head, position in sources:
        if source_layer != layer:
            continue
        where = slice(None) if position is None else position
        irrel[:, where, head] = baseline[layer][:, where, head]
        rel[:, where, head] = full[:, where, head] - baseline[layer][:, where, head]
    return Pair(rel, irrel)


def run_mlp(x: Pair, mlp: MLP | Experts, rules: ReferenceRules) -> Pair:
    if isinstance(mlp, Experts):
        irrel = mlp.function(x.irrel)
        return Pair(mlp.function(x.full) - irrel, irrel)
    up = sign(linear(x, mlp.w_in, rules), rules)
    if mlp.w_gate is None:
        hidden = activation(up, mlp.function, rules)
    else:
        gate = sign(linear(x, mlp.w_gate, rules), rules)
        hidden = product(activation(gate, mlp.function, rules), up, rules)
    return sign(linear(hidden, mlp.w_out, rules), rules)


# Reading models -----------------------------------------------------------------------------------

_FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def read_model(model: nn.Module) -> Network:
    """The weights of a Hugging Face model; ValueError for a family not written down here."""
    readers = {
        "gpt2": _read_gpt2,
        "gpt_neox": _read_gpt_neox,
        "gptj": _read_gptj,
        "gpt_neo": _read_gpt_neo,
        "opt": _read_opt,
        "cohere": _read_cohere,
        **dict.fromkeys(
            (
                "llama",
                "mistral",
                "qwen2",
                "qwen3",
                "gemma2",
                "gemma3_text",
                "granite",
                "smollm3",
                "mixtral",
                "qwen2_moe",
                "qwen3_moe",
                "olmoe",
            ),
            _read_llama_like,
        ),
    }
    family = model.config.model_type
    if family not in readers:
        raise ValueError(f"model_type: expected one of {sorted(readers)}, got {family!r}")
    return readers[family](model)


def _linear(module: nn.Linear) -> Linear:
    return Linear(module.weight, module.bias)


def _layer_norm(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight, module.bias, module.eps, centred=True)


def _read_gpt2(model: nn.Module) -> Network:
    config, body = model.config, model.transformer
    d_head = config.n_embd // config.n_head

    def conv1d(module: nn.Module) -> Linear:  # stored as [in, out]
        return Linear(module.weight.T, module.bias)

    def block(layer: nn.Module) -> Block:
        weights = layer.attn.c_attn.weight.chunk(3, dim=1)
        q, k, v = map(Linear, (weight.T for weight in weights), layer.attn.c_attn.bias.chunk(3))
        return Block(
            attention=Attention(q, k, v, conv1d(layer.attn.c_proj), d_head, d_head**-0.5),
            attention_norm=_layer_norm(layer.ln_1),
            mlp=MLP(
                w_in=conv1d(layer.mlp.c_fc),
                w_out=conv1d(layer.mlp.c_proj),
                function=_FUNCTIONS[config.activation_function],
            ),
            mlp_norm=_layer_norm(layer.ln_2),
        )

    return Network(
        embed=lambda tokens: body.wte.weight[tokens] + body.wpe.weight[: tokens.shape[1]],
        blocks=tuple(block(layer) for layer in body.h),
        final_norm=_layer_norm(body.ln_f),
        unembed=_linear(model.lm_head),
    )


def _read_gptj(model: nn.Module) -> Network:
    config, body = model.config, model.transformer
    d_head = config.n_embd // config.n_head

    def block(layer: nn.Module) -> Block:
        first = _layer_norm(layer.ln_1)
        return Block(
            attention=Attention(
                *_projections(layer.attn),
                d_head=d_head,
                scale=d_head**-0.5,
                rotary=(10000.0, config.rotary_dim),
                adjacent=True,
            ),
            attention_norm=first,
            mlp=MLP(
                w_in=_linear(layer.mlp.fc_in),
                w_out=_linear(layer.mlp.fc_out),
                function=_FUNCTIONS[config.activation_function],
            ),
            mlp_norm=first,
            parallel=True,
        )

    return Network(
        embed=lambda tokens: body.wte.weight[tokens],
        blocks=tuple(block(layer) for layer in body.h),
        final_norm=_layer_norm(body.ln_f),
        unembed=_linear(model.lm_head),
    )


def _read_gpt_neo(model: nn.Module) -> Network:
    config, body = model.config, model.transformer

    def block(layer: nn.Module, kind: str) -> Block:
        return Block(
            attention=Attention(
                *_projections(layer.attn.attention),
                d_head=config.hidden_size // config.num_heads,
                scale=1.0,
                window=config.window_size if kind == "local" else None,
            ),
            attention_norm=_layer_norm(layer.ln_1),
            mlp=MLP(
                w_in=_linear(layer.mlp.c_fc),
                w_out=_linear(layer.mlp.c_proj),
                function=_FUNCTIONS[config.activation_function],
            ),
            mlp_norm=_layer_norm(layer.ln_2),
        )

    return Network(
        embed=lambda tokens: body.wte.weight[tokens] + body.wpe.weight[: tokens.shape[1]],
        blocks=tuple(map(block, body.h, config.attention_layers)),
        final_norm=_layer_norm(body.ln_f),
        unembed=_linear(model.lm_head),
    )


def _read_opt(model: nn.Module) -> Network:
    config, body = model.config, model.model.decoder
    d_head = config.hidden_size // config.num_attention_heads

    def block(layer: nn.Module) -> Block:
        return Block(
            attention=Attention(*_projections(layer.self_attn), d_head, d_head**-0.5),
            attention_norm=_layer_norm(layer.self_attn_layer_norm),
            mlp=MLP(
                w_in=_linear(layer.fc1),
                w_out=_linear(layer.fc2),
                function=_FUNCTIONS[config.activation_function],
            ),
            mlp_norm=_layer_norm(layer.final_layer_norm),
        )

    positions = body.embed_positions.weight[2:]  # the first two rows are for padding
    return Network(
        embed=lambda tokens: body.embed_tokens.weight[tokens] + positions[: tokens.shape[1]],
        blocks=tuple(block(layer) for layer in body.layers),
        final_norm=_layer_norm(body.final_layer_norm),
        unembed=_linear(model.lm_head),
    )


def _projections(module: nn.Module) -> list[Linear]:
    return [_linear(getattr(module, f"{name}_proj")) for name in ("q", "k", "v", "out")]


def _read_gpt_neox(model: nn.Module) -> Network:
    config, body = model.config, model.gpt_neox
    n_heads = config.num_attention_heads
    d_head = config.hidden_size // n_heads
    rope = config.rope_parameters

    def block(layer: nn.Module) -> Block:
        fused = layer.attention.query_key_value
        weights = rearrange(fused.weight, "(h qkv d) m -> qkv (h d) m", h=n_heads, qkv=3)
        biases = rearrange(fused.bias, "(h qkv d) -> qkv (h d)", h=n_heads, qkv=3)
        return Block(
            attention=Attention(
                *map(Linear, weights, biases),
                o=_linear(layer.attention.dense),
                d_head=d_head,
                scale=d_head**-0.5,
                rotary=(rope["rope_theta"], int(d_head * rope["partial_rotary_factor"])),
            ),
            attention_norm=_layer_norm(layer.input_layernorm),
            mlp=MLP(
                w_in=_linear(layer.mlp.dense_h_to_4h),
                w_out=_linear(layer.mlp.dense_4h_to_h),
                function=_FUNCTIONS[config.hidden_act],
            ),
            mlp_norm=_layer_norm(layer.post_attention_layernorm),
            parallel=config.use_parallel_residual,
        )

    return Network(
        embed=lambda tokens: body.embed_in.weight[tokens],
        blocks=tuple(block(layer) for layer in body.layers),
        final_norm=_layer_norm(body.final_layer_norm),
        unembed=_linear(model.lm_head),
    )


def _read_llama_like(model: nn.Module) -> Network:
    config, body = model.config, model.model
    gemma = config.model_type.startswith("gemma")
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    function = _FUNCTIONS[config.hidden_activation if gemma else config.hidden_act]

    def rms_norm(module: nn.Module | None) -> Norm | None:
        if module is None:
            return None
        weight = 1 + module.weight if gemma else module.weight
        return Norm(weight, None, config.rms_norm_eps, centred=False)

    def attention(module: nn.Module, layer_type: str) -> Attention:
        rope = config.rope_parameters
        rope = rope.get(layer_type, rope)  # Gemma 3: a base for each layer type
        return Attention(
            q=_linear(module.q_proj),
            k=_linear(module.k_proj),
            v=_linear(module.v_proj),
            o=_linear(module.o_proj),
            d_head=d_head,
            scale=getattr(
                config,
                "attention_multiplier",
                getattr(config, "query_pre_attn_scalar", d_head) ** -0.5,
            ),
            q_norm=rms_norm(getattr(module, "q_norm", None)),
            k_norm=rms_norm(getattr(module, "k_norm", None)),
            rotary=(rope["rope_theta"], d_head) if getattr(module, "use_rope", True) else None,
            softcap=module.attn_logit_softcapping if config.model_type == "gemma2" else None,
            window=config.sliding_window if layer_type == "sliding_attention" else None,
        )

    def mlp(module: nn.Module) -> MLP | Experts:
        if hasattr(module, "experts"):
            return Experts(module)
        return MLP(
            w_in=_linear(module.up_proj),
            w_out=_linear(module.down_proj),
            function=function,
            w_gate=_linear(module.gate_proj),
        )

    def block(layer: nn.Module, layer_type: str) -> Block:
        # Gemma calls the norm after attention what the others call the norm before the MLP.
        after_attention = rms_norm(layer.post_attention_layernorm)
        return Block(
            attention=attention(layer.self_attn, layer_type),
            attention_norm=rms_norm(layer.input_layernorm),
            attention_post_norm=after_attention if gemma else None,
            mlp=mlp(layer.mlp),
            mlp_norm=rms_norm(layer.pre_feedforward_layernorm) if gemma else after_attention,
            mlp_post_norm=rms_norm(layer.post_feedforward_layernorm) if gemma else None,
            multiplier=getattr(config, "residual_multiplier", 1.0),
        )

    default = math.sqrt(config.hidden_size) if gemma else 1.0
    embed_scale = getattr(config, "embedding_multiplier", default)
    end = _linear(model.lm_head)
    return Network(
        embed=lambda tokens: body.embed_tokens.weight[tokens] * embed_scale,
        blocks=tuple(map(block, body.layers, _layer_types(config))),
        final_norm=rms_norm(body.norm),
        unembed=Linear(end.weight / getattr(config, "logits_scaling", 1.0)),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _read_cohere(model: nn.Module) -> Network:
    config, body = model.config, model.model
    d_head = config.hidden_size // config.num_attention_heads

    def layer_norm(module: nn.Module) -> Norm:
        return Norm(module.weight, None, config.layer_norm_eps, centred=True)

    def block(layer: nn.Module) -> Block:
        projections = [_linear(getattr(layer.self_attn, f"{name}_proj")) for name in "qkvo"]
        first = layer_norm(layer.input_layernorm)
        return Block(
            attention=Attention(
                *projections,
                d_head=d_head,
                scale=d_head**-0.5,
                rotary=(config.rope_parameters["rope_theta"], d_head),
                adjacent=True,
            ),
            attention_norm=first,
            mlp=MLP(
                w_in=_linear(layer.mlp.up_proj),
                w_out=_linear(layer.mlp.down_proj),
                function=_FUNCTIONS[config.hidden_act],
                w_gate=_linear(layer.mlp.gate_proj),
            ),
            mlp_norm=first,
            parallel=True,
        )

    return Network(
        embed=lambda tokens: body.embed_tokens.weight[tokens],
        blocks=tuple(block(layer) for layer in body.layers),
        final_norm=layer_norm(body.norm),
        unembed=Linear(model.lm_head.weight * config.logit_scale),
    )


def _layer_types(config: object) -> Sequence[str]:
    windowed = config.model_type == "mistral" and config.sliding_window is not None
    every = "sliding_attention" if windowed else "full_attention"
    return getattr(config, "layer_types", None) or [every] * config.num_hidden_layers


def read_hooked(state_dict: Mapping[str, Tensor], cfg: object) -> Network:
    """The weights of a HookedTransformer: LayerNorm or no norm, learned positions, MLP or none.

    `cfg` needs n_layers, d_head, normalization_type and eps; act_fn where there is an MLP.
    """
    if cfg.normalization_type not in ("LN", None):
        raise ValueError(f"normalization_type: expected 'LN' or None, got {cfg.normalization_type}")

    def norm_at(name: str) -> Norm | None:
        if cfg.normalization_type is None:
            return None
        return Norm(state_dict[f"{name}.w"], state_dict[f"{name}.b"], cfg.eps, centred=True)

    def block(name: str) -> Block:
        def projection(letter: str) -> Linear:
            weight = rearrange(state_dict[f"{name}.attn.W_{letter}"], "h m d -> (h d) m")
            return Linear(weight, state_dict[f"{name}.attn.b_{letter}"].flatten())

        w_o = rearrange(state_dict[f"{name}.attn.W_O"], "h d m -> m (h d)")
        attention = Attention(
            *(projection(letter) for letter in "QKV"),
            o=Linear(w_o, state_dict[f"{name}.attn.b_O"]),
            d_head=cfg.d_head,
            scale=cfg.d_head**-0.5,
        )
        if f"{name}.mlp.W_in" not in state_dict:
            return Block(attention, norm_at(f"{name}.ln1"))
        mlp = MLP(
            w_in=Linear(state_dict[f"{name}.mlp.W_in"].T, state_dict[f"{name}.mlp.b_in"]),
            w_out=Linear(state_dict[f"{name}.mlp.W_out"].T, state_dict[f"{name}.mlp.b_out"]),
            function=_FUNCTIONS[cfg.act_fn],
        )
        return Block(attention, norm_at(f"{name}.ln1"), mlp, norm_at(f"{name}.ln2"))

    w_e, w_pos = state_dict["embed.W_E"], state_dict["pos_embed.W_pos"]
    return Network(
        embed=lambda tokens: w_e[tokens] + w_pos[: tokens.shape[1]],
        blocks=tuple(block(f"blocks.{layer}") for layer in range(cfg.n_layers)),
        final_norm=norm_at("ln_final"),
        unembed=Linear(state_dict["unembed.W_U"].T, state_dict["unembed.b_U"]),
    )
