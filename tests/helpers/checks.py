"""What many tests assert: closeness with one tight default, and a model left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jaxtyping
import torch
from torch import Tensor, nn

_REGISTRIES = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def assert_close(actual: Tensor, expected: Tensor, *, atol: float = 1e-9) -> None:
    """Equal shapes, and values within `atol` of values of about size 1."""
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=atol, check_dtype=False, equal_nan=True
    )


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """The same type, shape and bytes, NaN included."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    a, b = (x.detach().contiguous().flatten().view(torch.uint8) for x in (actual, expected))
    assert torch.equal(a, b)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@contextmanager
def unchecked_types() -> Iterator[None]:
    """Run time type checks off, as a user has them: a wrong value then reaches the package."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@contextmanager
def left_untouched(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's hooks, modes, gradients, weights and padding are as before."""
    before = _state(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        yield
    finally:
        after = _state(model)
        for kind, value in before.items():
            assert after[kind] == value, kind
        for name, parameter in model.named_parameters():
            assert_same_bits(parameter, weights[name])


def _state(model: nn.Module) -> dict[str, Any]:
    # A bridge keeps the Hugging Face model, its embedding dropout too, outside its modules.
    everything = nn.ModuleDict({"own": model})
    if hasattr(model, "original_model"):
        everything["original"] = model.original_model
    modules = dict(everything.named_modules(remove_duplicate=False))
    return {
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {name: _hooks(module) for name, module in modules.items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grad": {name: p.grad is None for name, p in model.named_parameters()},
        "grad mode": torch.is_grad_enabled(),
        "padding side": getattr(getattr(model, "tokenizer", None), "padding_side", None),
        "configuration": repr(model.cfg),
    }


def _hooks(module: nn.Module) -> list[list[Any]]:
    own = vars(module)  # a bridge's getattr is slow
    torch_hooks = [list(own[name].values()) for name in _REGISTRIES]
    return [*torch_hooks, list(own.get("fwd_hooks", []))]
