"""Find the caller's own hooks on a model, and run without them.

A model is used with the hooks that the caller has attached. A hook that only reads sees every pass
through its module; the rows of a pass may be many copies of a batch (source x example). A hook that
edits is part of the model: it acts in plain runs and in ablated ones. Where that is not possible,
`support.check_caller_hooks` raises an error. Hooks that a library attaches, including this package,
are not the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from cdt_lens.core.undo import undoing

_REGISTRIES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_LIBRARIES = ("accelerate", "cdt_lens", "peft", "torch", "transformer_lens", "transformers")
# `add_hook` wraps the caller's function in a function of this module.
_ADDED_FOR_THE_CALLER = "transformer_lens.hook_points"


def caller_hooks(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that have hooks of the caller's.

    Args:
        model: the TransformerLens model.

    Returns:
        The names, in the model's order.
    """
    return tuple(name for name, module in _modules(model) if any(map(_count, _of(module))))


@contextmanager
def lifted(model: nn.Module) -> Iterator[None]:
    """Remove the caller's hooks within the `with` block, and put them back in the same order.

    Args:
        model: the TransformerLens model.
    """
    taken: list[tuple[Any, dict[int, Any]]] = []

    def put_back() -> None:
        for registry, before in taken:
            new = dict(registry)  # a bridge attaches permanent hooks of its own at its first run
            registry.clear()
            registry.update(before | new)

    with undoing(put_back):
        for _, module in _modules(model):
            for registry in _of(module):
                if not _count(registry):
                    continue
                taken.append((registry, dict(registry)))
                for key in [k for k, hook in registry.items() if _is_callers(hook)]:
                    del registry[key]
        yield


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module once; a bridge keeps parts of the Hugging Face model elsewhere."""
    seen: set[int] = set()
    for root in (model, getattr(model, "original_model", None)):
        for name, module in root.named_modules() if isinstance(root, nn.Module) else ():
            if id(module) not in seen:
                seen.add(id(module))
                kind = type(module).__name__
                # A hook point knows its own name, which a bridge's modules hide.
                yield getattr(module, "name", name) if kind == "HookPoint" else name or kind, module


def _of(module: nn.Module) -> list[Any]:
    return [registry for name in _REGISTRIES if (registry := getattr(module, name, None))]


def _count(registry: Any) -> int:
    return sum(map(_is_callers, registry.values()))


def _is_callers(hook: Callable[..., Any]) -> bool:
    while isinstance(hook, partial):  # its own module is functools, whoever made it
        hook = hook.func
    home = getattr(hook, "__module__", None) or ""
    return home == _ADDED_FOR_THE_CALLER or home.partition(".")[0] not in _LIBRARIES
