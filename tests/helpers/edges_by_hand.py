"""Direct edges cut by hand: Hugging Face models with PyTorch's own hooks, one prompt at a time.

Nothing of the package takes part. A node is "input", ("head", layer, head) or ("mlp", layer); a
reader is ("q", layer, head), ("k", ...), ("v", ...), ("mlp", layer) or "logits".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Layer:
    """The modules of one block, and where the columns of q, k and v of a head are."""

    norm: nn.Module
    out: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module
    place: Callable[[str, int], tuple[nn.Module, slice]]
    w_out: Tensor  # [head * d_head, d_model]


def layers_of(hf: Any) -> list[Layer]:
    config = hf.config
    heads = config.num_attention_heads
    blocks = hf.base_model.h if config.model_type == "gpt2" else hf.base_model.layers
    d = getattr(config, "head_dim", None) or config.hidden_size // heads
    return [_layer(hf, block, heads, d) for block in blocks]


def _layer(hf: Any, block: Any, heads: int, d: int) -> Layer:
    kind = hf.config.model_type
    if kind == "gpt2":
        attn = block.attn

        def place(site: str, head: int) -> tuple[nn.Module, slice]:
            start = "qkv".index(site) * heads * d + head * d
            return attn.c_attn, slice(start, start + d)

        return Layer(block.ln_1, attn.c_proj, block.ln_2, block.mlp, place, attn.c_proj.weight)
    if kind == "gpt_neox":
        attn = block.attention

        def place(site: str, head: int) -> tuple[nn.Module, slice]:
            start = head * 3 * d + "qkv".index(site) * d
            return attn.query_key_value, slice(start, start + d)

        norms = block.input_layernorm, block.post_attention_layernorm
        return Layer(norms[0], attn.dense, norms[1], block.mlp, place, attn.dense.weight.T)
    attn = block.self_attn
    group = heads // hf.config.num_key_value_heads

    def place(site: str, head: int) -> tuple[nn.Module, slice]:
        own = head if site == "q" else head // group
        return getattr(attn, f"{site}_proj"), slice(own * d, (own + 1) * d)

    norms = block.input_layernorm, block.post_attention_layernorm
    return Layer(norms[0], attn.o_proj, norms[1], block.mlp, place, attn.o_proj.weight.T)


class ByHand:
    """One model, whose edges are cut on one prompt."""

    def __init__(self, hf: Any) -> None:
        self.hf, self.layers = hf, layers_of(hf)
        self.n_heads = hf.config.num_attention_heads
        body = hf.base_model
        names = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}
        self.final_norm = getattr(body, names.get(hf.config.model_type, "norm"))

    def logits(self, tokens: tuple[int, ...]) -> Tensor:
        with torch.no_grad():
            return self.hf(torch.tensor([tokens]), use_cache=False).logits[0, -1]

    def outputs(self, tokens: tuple[int, ...]) -> dict[Any, Tensor]:
        """What every node writes, [pos, d_model]."""
        seen: dict[Any, Tensor] = {}
        with ExitStack() as stack:
            embedding = self.hf.get_input_embeddings()
            stack.enter_context(after(embedding, lambda out: seen.update(input=out[0])))
            for number, layer in enumerate(self.layers):
                stack.enter_context(before(layer.out, self._note_heads(seen, number)))
                note = lambda out, n=number: seen.update({("mlp", n): out[0]})  # noqa: E731
                stack.enter_context(after(layer.mlp, note))
            self.logits(tokens)
        return seen

    def _note_heads(self, seen: dict[Any, Tensor], number: int) -> Callable[[Tensor], None]:
        def note(z: Tensor) -> None:
            for head in range(self.n_heads):
                seen["head", number, head] = self.of_head(
                    number, head, z[0, :, self.columns(z, head)]
                )

        return note

    def columns(self, z: Tensor, head: int) -> slice:
        d = z.shape[-1] // self.n_heads
        return slice(head * d, (head + 1) * d)

    def of_head(self, number: int, head: int, z: Tensor) -> Tensor:
        d = z.shape[-1]
        return z @ self.layers[number].w_out[head * d : (head + 1) * d]

    def cut(self, tokens: tuple[int, ...], reader: Any, change: Tensor) -> Tensor:
        """The logits at the answer with `change` [pos, d_model] added to one reader's input."""
        add = lambda value: value + change  # noqa: E731
        if reader == "logits":
            with before(self.final_norm, add):
                return self.logits(tokens)
        if reader[0] == "mlp":
            with before(self.layers[reader[1]].mlp_norm, add):
                return self.logits(tokens)
        site, number, head = reader
        layer = self.layers[number]
        module, columns = layer.place(site, head)
        raw: dict[str, Tensor] = {}

        def swap(out: Tensor) -> Tensor:
            out = out.clone()
            out[..., columns] = module.forward(layer.norm.forward(raw["x"] + change))[..., columns]
            return out

        # Others of a group share these keys and values: only this head's z goes on.
        z: dict[str, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(before(layer.norm, lambda x: raw.update(x=x)))
            stack.enter_context(after(module, swap))
            stack.enter_context(before(layer.out, lambda value: z.update(z=value)))
            self.logits(tokens)

        def put(value: Tensor) -> Tensor:
            value, own = value.clone(), self.columns(value, head)
            value[..., own] = z["z"][..., own]
            return value

        with before(layer.out, put):
            return self.logits(tokens)


@contextmanager
def before(module: nn.Module, hook: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    def pre(_: nn.Module, args: tuple[Any, ...]) -> Any:
        changed = hook(args[0])
        return None if changed is None else (changed, *args[1:])

    handle = module.register_forward_pre_hook(pre)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after(module: nn.Module, hook: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _m, _a, out: hook(out))
    try:
        yield
    finally:
        handle.remove()
