"""The official CD-T code's numbers and its small random model, in both of TransformerLens' classes.

The files are cdt-official-tiny.{json,npz,safetensors}, in the folder CDT_FIXTURES or in
shared/fixtures beside the repository; tests without them are skipped.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
import transformers
from einops import rearrange
from torch import Tensor

from cdt_lens.decomposition.baseline import Baseline, BaselineAt, zero_baseline
from cdt_lens.decomposition.decompose import Node, SourceSet
from cdt_lens.models.heads import Head
from cdt_lens.models.loading import _bridge
from cdt_lens.models.provenance import provenance_of
from cdt_lens.models.view import ModelView
from cdt_lens.tasks.task import Batch, Example, Examples
from helpers.places import FIXTURES
from helpers.wrapped import tokenizer

STEM = FIXTURES / "cdt-official-tiny"
needs_fixtures = pytest.mark.skipif(
    not STEM.with_suffix(".json").exists(),
    reason=f"the official code's numbers are not at {STEM.parent}; set CDT_FIXTURES",
)


class _Given(Baseline):
    """Reference values given for each example and position."""

    def for_batch(self, view: ModelView, batch: Batch) -> BaselineAt:
        values = arrays()["cf_acts"].unflatten(-1, (view.n_heads, view.d_head)).to(view.dtype)
        return lambda layer: values[layer][list(batch.index)]


@functools.cache
def about() -> dict[str, Any]:
    return json.loads(STEM.with_suffix(".json").read_text("utf-8"))


@functools.cache
def arrays() -> dict[str, Tensor]:
    with numpy.load(STEM.with_suffix(".npz")) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@functools.cache
def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    with torch._C.DisableTorchFunction():  # safetensors reads float32 as what it is
        loaded = safetensors.torch.load_file(STEM.with_suffix(".safetensors"))
    return {name: w.to(dtype) if w.is_floating_point() else w for name, w in loaded.items()}


def examples() -> Examples:
    """The prompts; the candidates are the whole vocabulary, in order."""
    vocabulary = tuple(range(about()["config"]["d_vocab"]))
    rows = arrays()["tokens"].tolist()
    items = [Example(str(i), tuple(r), "x", (0,), vocabulary[1:]) for i, r in enumerate(rows)]
    return Examples(tuple(items), ("x",), "official")


def source_sets(kind: str) -> list[SourceSet]:
    config = about()["config"]
    layers, heads = range(config["n_layers"]), range(config["n_heads"])
    if kind == "heads":
        return [[Head(layer, head)] for layer in layers for head in heads]
    if kind == "singles":
        positions = range(arrays()["tokens"].shape[1])
        return [[Node(layer, head, p)] for layer in layers for p in positions for head in heads]
    listed = about()["source_sets"]["multi"]
    return [[Node(layer, head, p) for layer, p, head in nodes] for nodes in listed]


def baseline(view: ModelView, kind: str) -> Baseline:
    provenance = provenance_of(view, examples(), options={})
    if kind == "zero":
        return zero_baseline(view, examples())
    if kind == "cf":
        return _Given("given", torch.zeros(0, 0, 0, 0), provenance)
    means = arrays()["mean_acts"].unflatten(-1, (view.n_heads, view.d_head))
    return Baseline("left", means, provenance)


def model(backend: str, dtype: torch.dtype, folder: str) -> ModelView:
    build: dict[str, Callable[[], Any]] = {
        "hooked": lambda: _hooked_transformer(dtype),
        "bridge": lambda: _bridge(_hugging_face(dtype), tokenizer(folder), "cpu", dtype),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformer-lens says while it builds
        return ModelView(build[backend]().eval())


def _hooked_transformer(dtype: torch.dtype) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(**about()["config"], device="cpu", dtype=dtype)
    transformer = HookedTransformer(config)
    transformer.load_state_dict(weights(dtype), strict=False)
    return transformer


def _hugging_face(dtype: torch.dtype) -> Any:
    """A GPT-2 with an unembedding, and an unembedding bias, of its own."""
    about_it = about()["config"]
    config = transformers.GPT2Config(
        vocab_size=about_it["d_vocab"],
        n_positions=about_it["n_ctx"],
        n_embd=about_it["d_model"],
        n_layer=about_it["n_layers"],
        n_head=about_it["n_heads"],
        n_inner=about_it["d_mlp"],
        layer_norm_epsilon=about_it["eps"],
        activation_function=about_it["act_fn"],
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        network = transformers.GPT2LMHeadModel(config)
    network.lm_head = torch.nn.Linear(about_it["d_model"], about_it["d_vocab"])
    network = network.to(dtype).requires_grad_(False)
    state = weights(dtype)
    body = network.transformer
    copied = {
        body.wte.weight: state["embed.W_E"],
        body.wpe.weight: state["pos_embed.W_pos"],
        network.lm_head.weight: state["unembed.W_U"].T,
        network.lm_head.bias: state["unembed.b_U"],
        body.ln_f.weight: state["ln_final.w"],
        body.ln_f.bias: state["ln_final.b"],
    }
    for number, block in enumerate(body.h):
        here = {
            k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"blocks.{number}.")
        }
        qkv = [rearrange(here[f"attn.W_{letter}"], "h m d -> m (h d)") for letter in "QKV"]
        copied |= {
            block.attn.c_attn.weight: torch.cat(qkv, dim=1),
            block.attn.c_attn.bias: torch.cat([here[f"attn.b_{x}"].flatten() for x in "QKV"]),
            block.attn.c_proj.weight: rearrange(here["attn.W_O"], "h d m -> (h d) m"),
            block.attn.c_proj.bias: here["attn.b_O"],
            block.mlp.c_fc.weight: here["mlp.W_in"],
            block.mlp.c_fc.bias: here["mlp.b_in"],
            block.mlp.c_proj.weight: here["mlp.W_out"],
            block.mlp.c_proj.bias: here["mlp.b_out"],
            block.ln_1.weight: here["ln1.w"],
            block.ln_1.bias: here["ln1.b"],
            block.ln_2.weight: here["ln2.w"],
            block.ln_2.bias: here["ln2.b"],
        }
    for parameter, value in copied.items():
        parameter.copy_(value)
    return network
