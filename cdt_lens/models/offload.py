"""Keep the projections of the blocks on the CPU or on disk, and load each one while it runs.

A model whose weights do not fit a GPU can then be scored and ablated. accelerate's hooks load a
projection before its forward pass and drop it afterwards. Embeddings, norms and the unembedding
stay on the device, because their values are read as well. Training needs the whole model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.errors import InputError
from cdt_lens.models.resident import devices_of, is_offloaded
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.models.weights import block_weights, fused_parameters, place


@checked_arguments
def offload(
    model: nn.Module, *, folder: str | Path | None = None, device: str | torch.device = "cpu"
) -> None:
    """Move the projections of every block away and compute on a device.

    Args:
        model: a `TransformerBridge`, loaded on the CPU. It is changed in place.
        folder: a folder for the weights. None keeps them in the memory of the CPU.
        device: the device that computes, on which the other weights are put.

    Raises:
        InputError: the model is a `HookedTransformer`, whose weights are in no projections, is
            offloaded already, or is spread over several devices.
    """
    import accelerate  # slow to import

    view = view_of(model)
    why = _why_not(view)
    if why is not None:
        raise InputError(
            f"{view.name}: {why}. Pass a model of load_model(..., backend='bridge', device='cpu')."
        )
    for number, projection in enumerate(_projections(view)):
        if folder is None:
            accelerate.cpu_offload(projection, execution_device=torch.device(device))
        else:
            place = str(Path(folder) / str(number))
            accelerate.disk_offload(projection, place, execution_device=torch.device(device))
    kept = [*view.tl.named_parameters(), *view.tl.original_model.named_buffers()]
    for _, value in kept:
        if not value.is_meta:
            value.data = value.data.to(device)


def _why_not(view: ModelView) -> str | None:
    """Return why a model cannot be offloaded, or None."""
    if not view.is_bridge:
        return "is a HookedTransformer"
    if is_offloaded(view):
        return "is offloaded already"
    return "is on several devices" if len(devices_of(view)) > 1 else None


def _projections(view: ModelView) -> list[nn.Linear]:
    """Return the projections that TransformerLens has names for, and those that it runs split."""
    named = [v for layer in range(view.n_layers) for v in block_weights(view, layer).values()]
    known = {place(value)[0] for value in (*named, *fused_parameters(view))}
    linear = (m for block in view.blocks for m in block.modules() if isinstance(m, nn.Linear))
    return [module for module in linear if place(module.weight)[0] in known]
