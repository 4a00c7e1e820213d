"""The caller's own hooks on a model: which there are, and a run without them.

A model is taken as it behaves, the caller's hooks included. One that looks sees every pass through
its module, in which the rows may be many copies of a batch, (source x example). One that edits is a
part of the model: it acts in plain runs and in ablated ones. What cannot be done so is refused
(`support.check_caller_hooks`). Hooks that a library attached by itself are none of the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_REGISTRIES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_LIBRARIES = ("accelerate", "peft", "torch", "transformer_lens", "transformers")
# `add_hook` wraps what the caller gives it in a function of this module.
_ADDED_FOR_THE_CALLER = "transformer_lens.hook_points"


def caller_hooks(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules with hooks of the caller's own, in the model's order."""
    return tuple(name for name, module in _modules(model) if any(map(_count, _of(module))))


@contextmanager
def lifted(model: nn.Module) -> Iterator[None]:
    """Within the `with` the caller's hooks are off; afterwards on again, in the same order."""
    taken: list[tuple[Any, dict[int, Any]]] = []
    try:
        for _, module in _modules(model):
            for registry in _of(module):
                if not _count(registry):
                    continue
                taken.append((registry, dict(registry)))
                for key in [k for k, hook in registry.items() if _is_callers(hook)]:
                    del registry[key]
        yield
    finally:
        for registry, before in taken:
            new = dict(registry)  # a bridge attaches hooks of its own at its first run, for good
            registry.clear()
            registry.update(before | new)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once; a bridge keeps parts of the Hugging Face model outside its modules."""
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
    home = getattr(hook, "__module__", None) or ""
    return home == _ADDED_FOR_THE_CALLER or home.partition(".")[0] not in _LIBRARIES
