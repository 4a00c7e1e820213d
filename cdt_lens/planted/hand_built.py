"""Set weights by hand, with heads and neurons that read and write named features of the stream.

1. A feature is one dimension of the residual stream. A reading `{feature: weight}` is the direction
   that a query, key, value or neuron takes from the normed stream. A writing is what it adds to the
   stream.
2. The norms have no effect. Each token adds two large constants, C and -C, so that the scale of
   every norm is C sqrt(2 / d_model) up to one part in 10^5, and the norms' weights cancel it: a
   reading gets what was written. Another dimension holds minus the sum of all writes, so that
   LayerNorm subtracts a mean of 0.
3. Every position has the feature "one" with value 1, so that a bias is a reading of it. In GPT-2,
   "cos" and "sin" hold the position on a circle of N_CTX positions.

A plain blueprint becomes a GPT-2 with ReLU, and one with gates a Llama with SiLU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from cdt_lens.core.process_wide import seeded
from cdt_lens.models.heads import Head

N_LAYERS, N_HEADS, D_HEAD, N_CTX = 2, 8, 8, 16
D_MODEL = N_HEADS * D_HEAD
D_MLP = 4 * D_MODEL  # the only width of GPT-2 that HookedTransformer reads
LARGE = 1000.0
SHARP = 30.0 * math.sqrt(D_HEAD)  # a key that is larger by 1 leaves weights of e^-30 to the others
TURN = 2 * math.pi / N_CTX
BALANCE, ONE, MINUS_ONE, FIRST = 0, 1, 2, 3  # dimensions; features begin at FIRST

Features = Mapping[str, float]


@dataclass(frozen=True)
class HandHead:
    """One attention head.

    Attributes:
        query: what each channel of q reads.
        key: what each channel of k reads.
        value: what each channel of v reads.
        write: what each channel of z writes.
    """

    query: tuple[Features, ...]
    key: tuple[Features, ...]
    value: tuple[Features, ...]
    write: tuple[Features, ...]


@dataclass(frozen=True)
class Neuron:
    """One neuron. It writes relu(reads), or in a gated MLP silu(reads) times what `times` reads.

    Attributes:
        reads: features that it reads.
        writes: features that it writes.
        times: features that the linear branch of a gated MLP reads.
    """

    reads: Features
    writes: Features
    times: Features = field(default_factory=dict)


@dataclass(frozen=True)
class Blueprint:
    """The features, heads and neurons of a model.

    Attributes:
        words: the vocabulary, in the order of the token ids.
        embed: features that each word's embedding writes.
        unembed: features that each word's logit reads.
        heads: the heads by place.
        neurons: the neurons of each layer.
        gated: whether the model is a Llama with a gated MLP instead of a GPT-2.
    """

    words: tuple[str, ...]
    embed: Mapping[str, Features]
    unembed: Mapping[str, Features]
    heads: Mapping[Head, HandHead]
    neurons: Mapping[int, Sequence[Neuron]]
    gated: bool = False


def build(blueprint: Blueprint) -> Any:
    """Build the Hugging Face model of a blueprint.

    Args:
        blueprint: the blueprint.

    Returns:
        The model, in evaluation mode and without gradients.
    """
    with seeded(0):  # the weights are overwritten
        model = _llama(blueprint) if blueprint.gated else _gpt2(blueprint)
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    weights = _Weights(blueprint)
    (_fill_llama if blueprint.gated else _fill_gpt2)(model, weights)
    return model


def _gpt2(blueprint: Blueprint) -> Any:
    config = transformers.GPT2Config(
        vocab_size=len(blueprint.words), n_positions=N_CTX, n_embd=D_MODEL, n_layer=N_LAYERS,
        n_head=N_HEADS, activation_function="relu", bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _llama(blueprint: Blueprint) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=len(blueprint.words), hidden_size=D_MODEL, num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS, num_key_value_heads=N_HEADS, intermediate_size=D_MLP,
        max_position_embeddings=N_CTX, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class _Weights:
    """The matrices of a blueprint, `[in, out]`."""

    def __init__(self, blueprint: Blueprint) -> None:
        self.blueprint = blueprint
        self.dims: dict[str, int] = {"one": ONE}

    def embedding(self) -> Float[Tensor, "d_vocab d_model"]:
        table = self._written([self.blueprint.embed.get(word, {}) for word in self.blueprint.words])
        table[:, ONE], table[:, MINUS_ONE] = LARGE, -LARGE
        return table

    def positions(self) -> Float[Tensor, "n_ctx d_model"]:
        angles = [TURN * position for position in range(N_CTX)]
        return self._written([{"cos": math.cos(a), "sin": math.sin(a)} for a in angles])

    def unembedding(self) -> Float[Tensor, "d_model d_vocab"]:
        return self._read([self.blueprint.unembed.get(word, {}) for word in self.blueprint.words])

    def norm(self) -> Float[Tensor, " d_model"]:
        scale = LARGE * math.sqrt(2 / D_MODEL)
        weight = torch.full((D_MODEL,), scale)
        weight[[BALANCE, ONE, MINUS_ONE]] = torch.tensor([0.0, scale / LARGE, 0.0])
        return weight

    def reads(self, layer: int, part: str) -> Float[Tensor, "d_model head_and_channel"]:
        """Return W_Q, W_K or W_V ("query", "key", "value") of all heads side by side."""
        return self._read(self._channels(layer, part))

    def output(self, layer: int) -> Float[Tensor, "head_and_channel d_model"]:
        return self._written(self._channels(layer, "write"))

    def neurons_in(self, layer: int, part: str = "reads") -> Float[Tensor, "d_model d_mlp"]:
        return self._read([getattr(neuron, part) for neuron in self._neurons(layer)])

    def neurons_out(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        return self._written([neuron.writes for neuron in self._neurons(layer)])

    def _channels(self, layer: int, part: str) -> list[Features]:
        # Start at the last channel, which Llama's rotary embedding turns least (0.001 a position).
        columns: list[Features] = [{} for _ in range(N_HEADS * D_HEAD)]
        for head, what in self.blueprint.heads.items():
            if head.layer == layer:
                for channel, features in enumerate(getattr(what, part)):
                    columns[(head.head + 1) * D_HEAD - 1 - channel] = features
        return columns

    def _neurons(self, layer: int) -> list[Neuron]:
        neurons = list(self.blueprint.neurons.get(layer, ()))
        return neurons + [Neuron({}, {})] * (D_MLP - len(neurons))

    def _read(self, columns: Sequence[Features]) -> Float[Tensor, "d_model column"]:
        return self._table(columns).T

    def _written(self, rows: Sequence[Features]) -> Float[Tensor, "row d_model"]:
        table = self._table(rows)
        table[:, BALANCE] = -table.sum(-1)
        return table

    def _table(self, rows: Sequence[Features]) -> Float[Tensor, "row d_model"]:
        table = torch.zeros(len(rows), D_MODEL)
        for row, features in enumerate(rows):
            for name, weight in features.items():
                table[row, self.dims.setdefault(name, FIRST + len(self.dims) - 1)] = weight
        return table


def _fill_gpt2(model: Any, weights: _Weights) -> None:
    body = model.transformer
    body.wte.weight.copy_(weights.embedding())
    body.wpe.weight.copy_(weights.positions())
    for layer, block in enumerate(body.h):
        parts = [weights.reads(layer, part) for part in ("query", "key", "value")]
        block.attn.c_attn.weight.copy_(torch.cat(parts, dim=1))
        block.attn.c_proj.weight.copy_(weights.output(layer))
        block.mlp.c_fc.weight.copy_(weights.neurons_in(layer))
        block.mlp.c_proj.weight.copy_(weights.neurons_out(layer))
        block.ln_1.weight.copy_(weights.norm())
        block.ln_2.weight.copy_(weights.norm())
    body.ln_f.weight.copy_(weights.norm())
    model.lm_head.weight.copy_(weights.unembedding().T)


def _fill_llama(model: Any, weights: _Weights) -> None:
    model.model.embed_tokens.weight.copy_(weights.embedding())
    for layer, block in enumerate(model.model.layers):
        for part in ("query", "key", "value"):
            projection = getattr(block.self_attn, f"{part[0]}_proj")
            projection.weight.copy_(weights.reads(layer, part).T)
        block.self_attn.o_proj.weight.copy_(weights.output(layer).T)
        block.mlp.gate_proj.weight.copy_(weights.neurons_in(layer).T)
        block.mlp.up_proj.weight.copy_(weights.neurons_in(layer, "times").T)
        block.mlp.down_proj.weight.copy_(weights.neurons_out(layer).T)
        block.input_layernorm.weight.copy_(weights.norm())
        block.post_attention_layernorm.weight.copy_(weights.norm())
    model.model.norm.weight.copy_(weights.norm())
    model.lm_head.weight.copy_(weights.unembedding().T)
