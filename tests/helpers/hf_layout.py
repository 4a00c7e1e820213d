"""Where a head's slices lie in Hugging Face's own parameters: indexed by hand, family by family.

Written from transformers' modelling code and independent of TransformerLens, so that the package's
views, gradients and exports can be compared with it element by element.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from cdt_lens.tasks.task import Examples

ROLES = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")
_NORMS = {
    "input_layernorm": "ln1", "ln_1": "ln1", "post_attention_layernorm": "ln2", "ln_2": "ln2",
    "q_norm": "attn.q_norm", "k_norm": "attn.k_norm",
    "self_attn_layer_norm": "ln1", "final_layer_norm": "ln2",
}  # fmt: skip
_SANDWICH = {
    "input_layernorm": "ln1", "post_attention_layernorm": "ln1_post",
    "pre_feedforward_layernorm": "ln2", "post_feedforward_layernorm": "ln2_post",
}  # fmt: skip
_FINAL = (
    "model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm",
    "model.decoder.final_layer_norm",
)  # fmt: skip
# Where attention is in the families whose output projection is out_proj.
_OUT_PROJ = {
    "gptj": "transformer.h.{}.attn", "gpt_neo": "transformer.h.{}.attn.attention",
    "opt": "model.decoder.layers.{}.self_attn",
}  # fmt: skip


@dataclass(frozen=True)
class Home:
    """Elements `[rows, columns]` (or `[rows]`) of the parameter `name`.

    transposed: TransformerLens shows them the other way round.
    """

    name: str
    index: tuple[slice, ...]
    transposed: bool = False

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The slice, in TransformerLens layout."""
        found = tensors[self.name][self.index]
        return found.T if self.transposed else found


def home(model: PreTrainedModel, role: str, layer: int, head: int) -> Home | None:
    """Where slice `role` of `head` lies; a key/value head for W_K, W_V, b_K, b_V; None: nowhere."""
    family = model.config.model_type
    if family == "gpt2":
        return _gpt2(model, role, layer, head)
    if family == "gpt_neox":
        return _gpt_neox(model, role, layer, head)
    place = f"model.layers.{layer}.self_attn.{role[-1].lower()}_proj"
    if family in _OUT_PROJ:
        projection = "out" if role[-1] == "O" else role[-1].lower()
        place = f"{_OUT_PROJ[family].format(layer)}.{projection}_proj"
    name = f"{place}.{'bias' if role.startswith('b') else 'weight'}"
    if name not in model.state_dict():
        return None
    own = _span(head, _d_head(model))
    if role.startswith("b"):
        return Home(name, (own,))
    return Home(name, (slice(None), own) if role == "W_O" else (own, slice(None)), True)


def channel_home(model: PreTrainedModel, role: str, layer: int, channel: int) -> Home | None:
    """Where slice `role` of an MLP channel lies: W_in, W_gate, b_in or W_out; None: nowhere."""
    family, own = model.config.model_type, slice(channel, channel + 1)
    place, names = (
        f"model.layers.{layer}.mlp",
        {"in": "up_proj", "gate": "gate_proj", "out": "down_proj"},
    )
    if family == "gpt2":
        place, names = f"transformer.h.{layer}.mlp", {"in": "c_fc", "out": "c_proj"}
    if family == "gpt_neox":
        place = f"gpt_neox.layers.{layer}.mlp"
        names = {"in": "dense_h_to_4h", "out": "dense_4h_to_h"}
    name = f"{place}.{names.get(role[2:])}.{'bias' if role[0] == 'b' else 'weight'}"
    if name not in model.state_dict():
        return None
    if role[0] == "b":
        return Home(name, (own,))
    # Linear keeps [out, in], Conv1D [in, out].
    columns = (role == "W_out") != (family == "gpt2")
    return Home(name, (slice(None), own) if columns else (own, slice(None)))


def _gpt2(model: PreTrainedModel, role: str, layer: int, head: int) -> Home:
    """Conv1D keeps `[in, out]`; c_attn's columns are all queries, then all keys, then all values."""
    place, d_head = f"transformer.h.{layer}.attn", _d_head(model)
    if role == "W_O":
        return Home(f"{place}.c_proj.weight", (_span(head, d_head), slice(None)))
    start = "QKV".index(role[-1]) * model.config.n_head + head
    if role.startswith("b"):
        return Home(f"{place}.c_attn.bias", (_span(start, d_head),))
    return Home(f"{place}.c_attn.weight", (slice(None), _span(start, d_head)))


def _gpt_neox(model: PreTrainedModel, role: str, layer: int, head: int) -> Home:
    """Rows of query_key_value: for each head its queries, then its keys, then its values."""
    place, d_head = f"gpt_neox.layers.{layer}.attention", _d_head(model)
    if role == "W_O":
        return Home(f"{place}.dense.weight", (slice(None), _span(head, d_head)), True)
    rows = _span(3 * head + "QKV".index(role[-1]), d_head)
    if role.startswith("b"):
        return Home(f"{place}.query_key_value.bias", (rows,))
    return Home(f"{place}.query_key_value.weight", (rows, slice(None)), True)


def _span(number: int, width: int) -> slice:
    return slice(number * width, (number + 1) * width)


def _d_head(model: PreTrainedModel) -> int:
    config = model.config
    given = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def kv_heads(model: PreTrainedModel) -> int:
    return getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads


def kv_head_of(model: PreTrainedModel, head: int) -> int:
    """The key/value head that a query head reads: the first group the first ones, and so on."""
    return head * kv_heads(model) // model.config.num_attention_heads


def norms(model: PreTrainedModel) -> dict[str, str]:
    """Names of the norms' parameters: TransformerLens' by Hugging Face's."""
    found = {}
    table = {**_NORMS, **_SANDWICH} if "gemma" in model.config.model_type else _NORMS
    for name, _ in model.named_parameters():
        place, kind = name.rsplit(".", 1)
        end = "w" if kind == "weight" else "b"
        if place in _FINAL:
            found[name] = f"ln_final.{end}"
        elif place.rsplit(".", 1)[-1] in table:
            layer = re.search(r"\.(\d+)\.", name)
            assert layer is not None
            found[name] = f"blocks.{layer[1]}.{table[place.rsplit('.', 1)[-1]]}.{end}"
    return found


def selected(
    model: PreTrainedModel,
    heads: Iterable[tuple[int, int]],
    *,
    norms_of: str = "all",
) -> dict[str, Tensor]:
    """For each parameter by Hugging Face name, True at the elements that CT-SFT trains.

    norms_of: "all" or "none".
    """
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for layer, head in heads:
        for role in ROLES:
            is_kv = role[-1] in "KV"
            found = home(model, role, layer, kv_head_of(model, head) if is_kv else head)
            if found is not None:
                masks[found.name][found.index] = True
    if norms_of == "all":
        for name in norms(model):
            masks[name][:] = True
    return masks


def dense_gradients(model: Any, data: Examples) -> dict[str, Tensor]:
    """Hugging Face's model, its own parameters, plain autograd: each prompt alone, unpadded."""
    model.requires_grad_(True)
    model.zero_grad()
    for item in data:
        logits = model(torch.tensor([item.tokens])).logits[0, -1]
        cross_entropy(logits[[*item.answers, *item.others]], torch.tensor(0)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
