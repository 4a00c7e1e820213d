"""Read the weights of a model that accelerate has placed: away (`offload`), or on several devices.

Projections that are away are loaded while they run. A model on several devices has a `device_map`
(see `loading.load_model`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from cdt_lens.core.errors import UnsupportedModelError
from cdt_lens.core.undo import undoing
from cdt_lens.models.view import ModelView


def is_offloaded(view: ModelView) -> bool:
    """Return whether a model has projections that are loaded only while they run.

    Args:
        view: the model.
    """
    return any(parameter.is_meta for parameter in view.tl.parameters())


def devices_of(view: ModelView) -> list[str]:
    """Return the devices that hold weights, in alphabetical order.

    Args:
        view: the model.
    """
    return sorted({str(p.device) for p in view.tl.parameters() if not p.is_meta})


@contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """Load the offloaded weights of a module within the `with` block, to read them.

    Args:
        module: the module, such as one block.
    """
    hooks: list[tuple[nn.Module, Any]]
    hooks = [(m, m._hf_hook) for m in module.modules() if _is_away(m)]
    with undoing(partial(_drop, hooks)):
        for part, hook in hooks:
            hook.pre_forward(part)
        yield


def unreadable(view: ModelView) -> str | None:
    """Return the first weight whose value is away, and that is not a projection of a block.

    Args:
        view: the model.

    Returns:
        Its name, or None.
    """
    if not is_offloaded(view):
        return None
    parts = (m for block in view.blocks for m in block.modules() if isinstance(m, nn.Linear))
    known = {id(p) for m in parts if _is_away(m) for p in m.parameters()}
    away = (n for n, p in view.tl.named_parameters() if p.is_meta and id(p) not in known)
    return next(away, None)


def check_whole(view: ModelView) -> None:
    """Check that a model has all of its weights, to train it or to write new values.

    Args:
        view: the model.

    Raises:
        UnsupportedModelError: some are offloaded.
    """
    if is_offloaded(view):
        raise UnsupportedModelError(
            f"{view.name}: its weights are offloaded, so they can be neither trained nor "
            "replaced. Load the whole model, with dtype='bfloat16' if memory is short."
        )


def check_on_one_device(view: ModelView) -> None:
    """Check that a model is on one device, to train it.

    Args:
        view: the model.

    Raises:
        UnsupportedModelError: it is spread over several devices.
    """
    devices = devices_of(view)
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"{view.name}: a model on several devices ({', '.join(devices)}) can be scored and "
            "ablated, and take an adapter, and not be trained. Load it on one device, with "
            "dtype='bfloat16' if memory is short."
        )


def _is_away(module: nn.Module) -> bool:
    return getattr(module, "_hf_hook", None) is not None and any(
        parameter.is_meta for parameter in module.parameters(recurse=False)
    )


def _drop(hooks: list[tuple[nn.Module, Any]]) -> None:
    for part, hook in hooks:
        hook.post_forward(part, None)
