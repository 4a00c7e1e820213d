"""Low-rank adapters by the peft library, as one more `Trainable` (LoRA, arXiv 2106.09685).

1. peft puts its layers on the q, k, v and output projections of every layer of a bridge.
2. The loop trains their A and B in float32, as it trains slices.
3. What was learnt is reported merged, as whole W_Q, W_K, W_V, W_O, so that it is saved, applied
   and exported like any other scope; peft's layers are taken out again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cdt_lens.core.errors import InputError, UnsupportedModelError
from cdt_lens.finetuning.trainable import Learnt, Master
from cdt_lens.models.view import ModelView, at_least_float32
from cdt_lens.models.weights import own_weights

_PROJECTIONS = ("q", "k", "v", "o")


class LowRank:
    """peft's LoRA on a bridge, from the moment it is `attached`.

    Raises:
        UnsupportedModelError: a `HookedTransformer`, whose projections are no modules.
        InputError: peft is not installed.
    """

    def __init__(self, view: ModelView, *, rank: int = 8, alpha: int = 16, seed: int = 0) -> None:
        if not view.is_bridge:
            raise UnsupportedModelError(
                f"{view.name}: scope 'lora' needs a TransformerBridge; load the model with "
                "cdt_lens.load_model(..., backend='bridge')"
            )
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise InputError("scope 'lora' needs the peft library: pip install peft") from error
        self.view = view
        self.names = tuple(
            f"blocks.{layer}.attn.W_{role}" for layer in range(view.n_layers) for role in "QKVO"
        )
        names = _module_names(view)
        self._config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names, bias="none"
        )
        self._seed = seed
        self._layers: dict[str, Any] = {}
        self.masters: Sequence[Master] = ()
        self._inject(names)

    @property
    def _root(self) -> nn.Module:
        return self.view.tl.original_model

    def _inject(self, names: list[str]) -> None:
        from peft import inject_adapter_in_model

        flags = {p: p.requires_grad for p in self._root.parameters()}
        with torch.random.fork_rng(), warnings.catch_warnings():
            # GPT-2's projections are kept both ways round; peft sets its flag right by itself.
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            torch.manual_seed(self._seed)
            inject_adapter_in_model(self._config, self._root)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        self._layers = {name: self._root.get_submodule(name) for name in names}
        masters = []
        for name, layer in self._layers.items():
            for part in ("lora_A", "lora_B"):
                weight = getattr(layer, part)["default"].weight
                # peft takes the type of the layer below; steps would be lost in half precision.
                weight.data = at_least_float32(weight.data)
                masters.append(Master(f"{name}.{part}", weight, decay=True))
        self.masters = tuple(masters)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Only A and B have gradients inside; flags are as before afterwards."""
        flags = {p: p.requires_grad for p in self.view.tl.parameters()}
        try:
            for parameter in flags:
                parameter.requires_grad_(False)
            for master in self.masters:
                master.value.requires_grad_(True)
            yield
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)

    def write(self) -> None:
        """Nothing: the model runs with peft's layers."""

    def restore(self) -> None:
        """Take peft's layers out; the projections below were never changed."""
        for name, layer in self._layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self._root.get_submodule(parent), child, layer.base_layer)
        if self._layers:  # peft also leaves its configuration there
            del self._root.peft_config
        self._layers = {}

    def learnt(self) -> Learnt:
        """The merged projections, on the CPU; peft's layers are out afterwards."""
        with torch.no_grad():
            merged = {
                name: (layer.base_layer.weight, layer.get_delta_weight("default"))
                for name, layer in self._layers.items()
            }
            kept = [weight.clone() for weight, _ in merged.values()]
            # Out first: the bridge reads its weights through the modules in place.
            self.restore()
            try:
                for weight, delta in merged.values():
                    weight.copy_(at_least_float32(weight) + delta)
                own = own_weights(self.view)
                return Learnt({}, {name: own[name].clone().cpu() for name in self.names})
            finally:
                for (weight, _), before in zip(merged.values(), kept, strict=True):
                    weight.copy_(before)


def _module_names(view: ModelView) -> list[str]:
    """Names, in the Hugging Face model, of the modules that the projections really run."""
    wanted = {
        id(getattr(block.attn, name).original_component)
        for block in view.blocks
        for name in _PROJECTIONS
    }
    named = view.tl.original_model.named_modules()
    found = [name for name, module in named if id(module) in wanted]
    if len(found) != len(wanted):
        raise UnsupportedModelError(
            f"{view.name}: {len(found)} of {len(wanted)} attention projections were found for "
            "scope 'lora'"
        )
    return found
