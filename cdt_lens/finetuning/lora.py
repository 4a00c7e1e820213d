"""Train low-rank adapters with the peft library, as a `Trainable` (LoRA, arXiv 2106.09685).

1. Let peft insert its layers at the q, k, v and output projections of every layer of a bridge, and
   with `modules="all"` at the linear maps of the MLPs as well.
2. Train their matrices A and B in float32, as the loop trains slices.
3. Return the result merged, as whole weights such as W_Q, so that it is saved, applied and
   exported like any other scope. Remove peft's layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cdt_lens.core.choices import LoraModules
from cdt_lens.core.errors import InputError, UnsupportedModelError
from cdt_lens.core.process_wide import ignored, seeded
from cdt_lens.core.undo import take_back_at_end, undoing
from cdt_lens.finetuning.trainable import Learnt, Master, flags_kept
from cdt_lens.models.view import ModelView, at_least_float32
from cdt_lens.models.weights import own_weights

# The linear maps of a bridge's attention and MLP, with the weights that they hold.
_ATTENTION = {"q": "W_Q", "k": "W_K", "v": "W_V", "o": "W_O"}
_MLP = {"in": "W_in", "gate": "W_gate", "out": "W_out"}


class LowRank:
    """The LoRA layers of peft on a bridge.

    Args:
        view: the model.
        rank: rank of A and B.
        alpha: scale of the adapter; the update is multiplied by `alpha / rank`.
        seed: seed of the initial A.
        modules: "attention" adapts the four projections of attention, "all" the MLPs as well.

    Attributes:
        masters: the matrices A and B, for the optimiser.

    Raises:
        UnsupportedModelError: the model is a `HookedTransformer`, whose projections are not
            modules.
        InputError: peft is not installed.
    """

    def __init__(
        self, view: ModelView, *, rank: int = 8, alpha: int = 16, seed: int = 0,
        modules: LoraModules = "attention",
    ) -> None:  # fmt: skip
        if not view.is_bridge:
            raise UnsupportedModelError(
                f"{view.name}: scope 'lora' needs a TransformerBridge. Load the model with "
                "cdt_lens.load_model(..., backend='bridge')."
            )
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise InputError("scope 'lora' needs the peft library: pip install peft") from error
        _refuse_peft(view)
        self.view = view
        maps = linear_maps(view, modules)
        self.names = tuple(maps)
        names = _module_names(view, maps.values())
        self._config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names, bias="none"
        )
        self._seed = seed
        self._layers: dict[str, Any] = {}
        self.masters: Sequence[Master] = ()
        self._projections = [_place(self._root, name) for name in names]
        before = vars(self._root)
        self._config_before = {n: before[n] for n in ("peft_config",) if n in before}
        take_back_at_end(self.restore)
        self._inject(names)

    @property
    def _root(self) -> nn.Module:
        return self.view.tl.original_model

    def _inject(self, names: list[str]) -> None:
        from peft import inject_adapter_in_model

        # GPT-2's projections are stored transposed. peft corrects its flag and warns.
        with flags_kept(self._root.parameters()), seeded(self._seed), ignored("fan_in_fan_out"):
            inject_adapter_in_model(self._config, self._root)
        self._layers = {name: self._root.get_submodule(name) for name in names}
        masters = []
        for name, layer in self._layers.items():
            for part in ("lora_A", "lora_B"):
                weight = getattr(layer, part)["default"].weight
                # peft uses the type of the layer below. Half precision would lose small steps.
                weight.data = at_least_float32(weight.data)
                masters.append(Master(f"{name}.{part}", weight, decay=True))
        self.masters = tuple(masters)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Give gradients to A and B only, within the `with` block."""
        with flags_kept(self.view.tl.parameters()):
            for parameter in self.view.tl.parameters():
                parameter.requires_grad_(False)
            for master in self.masters:
                master.value.requires_grad_(True)
            yield

    def write(self) -> None:
        """Do nothing, because the model runs with peft's layers."""

    def restore(self) -> None:
        """Remove peft's layers. The projections below them were never changed."""
        for parent, child, projection in self._projections:
            setattr(parent, child, projection)
        # peft also leaves its configuration in the model.
        vars(self._root).pop("peft_config", None)
        vars(self._root).update(self._config_before)
        self._layers = {}

    def learnt(self) -> Learnt:
        """Return the merged projections on the CPU, and remove peft's layers."""
        with torch.no_grad():
            merged = {
                name: (layer.base_layer.weight, layer.get_delta_weight("default"))
                for name, layer in self._layers.items()
            }
            kept = [(weight, weight.clone()) for weight, _ in merged.values()]
            # Restore first, because the bridge reads its weights through the present modules.
            self.restore()
            with undoing(partial(_write_back, kept)):
                for weight, delta in merged.values():
                    weight.copy_(at_least_float32(weight) + delta)
                own = own_weights(self.view)
                return Learnt({}, {name: own[name].clone().cpu() for name in self.names})


def _place(root: nn.Module, name: str) -> tuple[nn.Module, str, nn.Module]:
    """Return a module with its parent and its name there."""
    parent, _, child = name.rpartition(".")
    return root.get_submodule(parent), child, root.get_submodule(name)


@torch.no_grad()
def _write_back(kept: list[tuple[Tensor, Tensor]]) -> None:
    for weight, before in kept:
        weight.copy_(before)


def _refuse_peft(view: ModelView) -> None:
    """Refuse a model with peft layers, which those of the training would nest with."""
    names = [
        name
        for name, module in view.tl.original_model.named_modules()
        if hasattr(module, "base_layer")
    ]
    if names:
        raise InputError(
            f"{view.name}: scope 'lora': the model has peft layers of your own ({names[0]}). Merge "
            "them into the weights (merge_and_unload of peft) and load the model again, or use "
            "another scope"
        )


def linear_maps(view: ModelView, modules: LoraModules) -> dict[str, nn.Module]:
    """Return the linear maps that are adapted, by the TransformerLens name of their weight.

    Args:
        view: the model, a bridge.
        modules: see `LowRank`.

    Raises:
        UnsupportedModelError: the MLP is not made of linear maps of its own.
    """
    own = own_weights(view)
    found: dict[str, nn.Module] = {}
    for layer, block in enumerate(view.blocks):
        parts = [("attn", block.attn, _ATTENTION)]
        parts += [("mlp", block.mlp, _MLP)] if modules == "all" else []
        for part, module, roles in parts:
            for name, role in roles.items():
                weight = f"blocks.{layer}.{part}.{role}"
                if weight in own and hasattr(module, name):
                    found[weight] = getattr(module, name).original_component
        if modules == "all" and f"blocks.{layer}.mlp.W_out" not in found:
            raise UnsupportedModelError(
                f"{view.name}: the MLP of layer {layer} is not made of linear maps of its own; use "
                'lora_modules="attention"'
            )
    return found


def parameters_of_rank(view: ModelView, modules: LoraModules) -> int:
    """Return the number of parameters that a low-rank update of rank 1 trains.

    Args:
        view: the model, a bridge.
        modules: see `LowRank`.
    """
    own = own_weights(view)
    return sum(_ends(own[name].shape, name) for name in linear_maps(view, modules))


def _ends(shape: Sequence[int], name: str) -> int:
    """Return the sum of a map's input and output widths; a head's axis is part of one of them."""
    if len(shape) == 2:
        return shape[0] + shape[1]
    heads, first, last = shape
    return heads * first + last if name.endswith("W_O") else first + heads * last


def _module_names(view: ModelView, modules: Iterable[nn.Module]) -> list[str]:
    """Return the names of modules in the Hugging Face model."""
    wanted = {id(module) for module in modules}
    named = view.tl.original_model.named_modules()
    names = [name for name, module in named if id(module) in wanted]
    if len(names) != len(wanted):
        raise UnsupportedModelError(
            f"{view.name}: {len(names)} of {len(wanted)} linear maps were found for scope 'lora'. "
            "Use another scope."
        )
    return names
