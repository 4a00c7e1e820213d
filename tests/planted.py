"""Circuits that are known because they were planted (proof h of the architecture).

1. A tiny model with two layers learns to recall, while only L0H1 and L1H2 may write: a prompt lists
   pairs "a b c d e f" and asks for the partner of one of them. That takes a head that looks one
   position back and, in a later layer, a head that looks for what the first one left.
2. The six other heads are then given random output weights, of a size relative to the planted
   heads' own at which the model does not heed them: it still solves the task.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from jaxtyping import Int
from torch import Tensor, nn

from cdt_lens.heads import Head
from cdt_lens.tasks import Example, Examples

PLANTED = (Head(0, 1), Head(1, 2))
N_LAYERS, N_HEADS, D_HEAD, PAIRS = 2, 4, 8, 3
ASKED = 2 * PAIRS  # position of the first question; the answers stand after each question
FIRST_TOKEN, D_VOCAB = 3, 12


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=D_VOCAB, n_positions=4 * PAIRS, n_ctx=4 * PAIRS, n_embd=N_HEADS * D_HEAD,
        n_layer=N_LAYERS, n_head=N_HEADS, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _attention_only() -> nn.Module:
    """GPT-2 without its MLPs: their output stays 0."""
    model = _gpt2()
    for block in model.transformer.h:
        block.mlp.requires_grad_(False)
        block.mlp.c_proj.weight.zero_()
    return model


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=D_VOCAB, hidden_size=N_HEADS * D_HEAD, num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS, num_key_value_heads=2, intermediate_size=48,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": _gpt2,  # LayerNorm, MLP
    "attention-only": _attention_only,
    "llama": _llama,  # RMSNorm, rotary, grouped K/V, gated MLP
}


def prompts(batch: int, generator: torch.Generator) -> Int[Tensor, "batch pos"]:
    """Pairs of different tokens, then the same pairs in another order."""
    order = torch.rand(batch, D_VOCAB - FIRST_TOKEN, generator=generator).argsort(-1)
    pairs = (order[:, :ASKED] + FIRST_TOKEN).reshape(batch, PAIRS, 2)
    again = torch.rand(batch, PAIRS, generator=generator).argsort(-1)
    asked = pairs.gather(1, again[:, :, None].expand(-1, -1, 2))
    return torch.cat([pairs.flatten(1), asked.flatten(1)], 1)


def examples(n: int, *, seed: int) -> Examples:
    """Prompts that end with a question, of three lengths; the other answers compete."""
    items = []
    for number, row in enumerate(prompts(n, torch.Generator().manual_seed(seed)).tolist()):
        end = ASKED + 1 + 2 * (number % PAIRS)
        others = tuple(token for token in row[1:ASKED:2] if token != row[end])
        items.append(Example(str(number), tuple(row[:end]), "ab"[number % 2], (row[end],), others))
    return Examples(tuple(items), ("a", "b"), "planted")


def accuracy(model: nn.Module) -> float:
    tokens = prompts(300, torch.Generator().manual_seed(9))
    with torch.no_grad():
        guesses = model(tokens).logits[:, ASKED::2].argmax(-1)
    return float((guesses == tokens[:, ASKED + 1 :: 2]).float().mean())


@contextmanager
def _one_thread() -> Iterator[None]:
    """The same sums on every machine; and tiny models are faster so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _trained(family: str) -> dict[str, Tensor]:
    """The weights of stage 1; about two seconds."""
    with _one_thread(), torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        with torch.no_grad():
            model = BUILDERS[family]()
        for layer, weight in enumerate(_output_weights(model)):
            allowed = torch.zeros(N_HEADS, 1, 1)
            allowed[[head.head for head in PLANTED if head.layer == layer]] = 1.0
            with torch.no_grad():
                _by_head(model, weight).mul_(allowed)
            weight.register_hook(functools.partial(_masked, model, allowed))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        generator = torch.Generator().manual_seed(0)
        for step in range(2000):
            tokens = prompts(64, generator)
            logits = model(tokens).logits[:, ASKED::2]
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), tokens[:, ASKED + 1 :: 2].flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 50 == 49 and accuracy(model) > 0.995:
                break
    return model.state_dict()


def build(family: str, noise: float) -> Any:
    """A fresh Hugging Face model with the planted circuit; the other heads write noise.

    noise: Frobenius norm of their output weights, relative to the planted head's of their layer.
    """
    with torch.random.fork_rng():
        model = BUILDERS[family]()
    model.load_state_dict(_trained(family))
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for layer, weight in enumerate(_output_weights(model)):
        heads = _by_head(model, weight)
        (planted,) = (head.head for head in PLANTED if head.layer == layer)
        for head in set(range(N_HEADS)) - {planted}:
            random = torch.randn(heads[head].shape, generator=generator)
            heads[head].copy_(random / random.norm() * heads[planted].norm() * noise)
    return model


def _output_weights(model: nn.Module) -> Iterator[Tensor]:
    if hasattr(model, "transformer"):
        return (block.attn.c_proj.weight for block in model.transformer.h)
    return (layer.self_attn.o_proj.weight for layer in model.model.layers)


def _by_head(model: nn.Module, weight: Tensor) -> Tensor:
    """[head, d_head, d_model] of an output weight, as a view."""
    rows = weight if hasattr(model, "transformer") else weight.T  # Conv1D is stored as [in, out]
    return rows.unflatten(0, (N_HEADS, D_HEAD))


def _masked(model: nn.Module, allowed: Tensor, gradient: Tensor) -> Tensor:
    masked = _by_head(model, gradient) * allowed
    rows = masked.flatten(0, 1)
    return rows if hasattr(model, "transformer") else rows.T
