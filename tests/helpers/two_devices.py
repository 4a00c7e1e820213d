"""Two devices beside the CPU, in Python, that refuse what two GPUs refuse.

1. A tensor on such a device is a `Placed`: a tensor of the CPU with a device of its own, such as
   "cpu:1". What torch computes from it is on the same device.
2. An operation of tensors on two devices raises `MixedDevices`, in the backward pass too. As on
   GPUs, a tensor of the CPU without dimensions may take part, and one of the CPU may be an index.
3. `to`, `copy_` and the argument `device` move a tensor, within `two_devices()`, which lists every
   move.

The kernels are those of the CPU, so that the numbers of a model on one device have to come out to
the last bit. Memory, speed and streams of real devices are not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import accelerate
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

FIRST, SECOND = torch.device("cpu:1"), torch.device("cpu:2")
_HOST = torch.device("cpu")
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index")
_COPIES = ("aten::copy_", "aten::_to_copy")


class MixedDevices(RuntimeError):
    """An operation was given tensors of two devices."""


class Placed(Tensor):
    """A tensor on one of the devices.

    Args:
        value: The numbers, a plain tensor.
        device: Where they are said to be.
    """

    _value: Tensor
    _device: torch.device

    @staticmethod
    def __new__(cls, value: Tensor, device: torch.device) -> Placed:
        self = Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), storage_offset=value.storage_offset(),
            dtype=value.dtype, layout=value.layout, requires_grad=False,
        )  # fmt: skip
        self._value, self._device = value, device
        return self

    def __init__(self, value: Tensor, device: torch.device) -> None:
        pass

    @property
    def device(self) -> torch.device:
        return self._device

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return _to(self, *args, **kwargs)

    def cpu(self) -> Tensor:
        return moved(self, _HOST)

    def data_ptr(self) -> int:
        return self._value.data_ptr()

    def untyped_storage(self) -> Any:
        return self._value.untyped_storage()

    def tolist(self) -> Any:
        return self._value.tolist()

    def numpy(self, **kwargs: Any) -> Any:
        raise TypeError("a tensor on another device has no numpy array; use .cpu() first")

    def __deepcopy__(self, memo: dict[int, Any]) -> Placed:
        copied = Placed(self._value.clone(), self._device).requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied.detach(), self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self) -> str:
        return f"Placed({self._value!r}, {self._device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = _device_of(func, args, kwargs)
        out = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        placed = tree_map(lambda v: Placed(v, device) if isinstance(v, Tensor) else v, out)
        return return_and_correct_aliasing(func, args, kwargs, placed)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})


def _plain(value: Any) -> Any:
    return value._value if isinstance(value, Placed) else value


def _device_of(func: Any, args: Any, kwargs: Any) -> torch.device:
    """The device of an operation, or `MixedDevices`."""
    name = func._schema.name
    if name in _COPIES:
        return args[0].device
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    device = next((value.device for value in tensors if value.device != _HOST), _HOST)
    indices = tree_leaves(args[1]) if name in _INDEXING else []
    for value in tensors:
        may_differ = value.dim() == 0 or any(value is index for index in indices)
        if value.device != device and not (value.device == _HOST and may_differ):
            raise MixedDevices(f"{name}: {device} and {value.device}")
    return device


@dataclass(frozen=True)
class Moved:
    """A tensor that was moved: its elements, where its memory begins, and its new device."""

    numel: int
    storage: int
    to: torch.device


_MOVES: list[Moved] = []


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, device: torch.device) -> Tensor:
        ctx.before = value.device
        return _copied(value, device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _copied(gradient, ctx.before), None


def _copied(value: Tensor, device: torch.device) -> Tensor:
    _MOVES.append(Moved(value.numel(), value.untyped_storage().data_ptr(), device))
    plain = _plain(value.detach()).clone()
    return plain if device == _HOST else Placed(plain, device)


def moved(value: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, itself if it is there."""
    return value if value.device == device else _Move.apply(value, device)


def _to(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`."""
    other = next((a for a in args if isinstance(a, Tensor)), None)
    if other is not None:
        device, dtype = other.device, other.dtype
    else:
        named = [kwargs.get("device"), kwargs.get("dtype"), *args]
        device = next((torch.device(a) for a in named if isinstance(a, str | torch.device)), None)
        dtype = next((a for a in named if isinstance(a, torch.dtype)), None)
    value = value if dtype is None or dtype == value.dtype else value.type(dtype)
    return value if device is None else moved(value, device)


class _TwoDevices(TorchFunctionMode):
    """Understands the devices where torch would take them for the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.to:
            return _to(*args, **kwargs)
        device = kwargs.get("device")
        device = None if device is None else torch.device(device)
        if device not in (FIRST, SECOND):
            return func(*args, **kwargs)
        out = func(*args, **{**kwargs, "device": _HOST})
        grad = kwargs.get("requires_grad", False)
        return moved(out.detach() if grad else out, device).requires_grad_(grad)


@contextmanager
def two_devices() -> Iterator[list[Moved]]:
    """Let torch know both devices within the `with` block; gives the moves so far."""
    # A module that moves makes new parameters: a `Placed` cannot become a tensor of the CPU.
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        _MOVES.clear()
        with _TwoDevices():
            yield _MOVES
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def spread(hf_model: Any, device_map: dict[str, torch.device]) -> Any:
    """Spread a Hugging Face model over the devices, by accelerate."""
    return accelerate.dispatch_model(hf_model, device_map, skip_keys="past_key_values")


def halves(hf_model: Any, *, ends: torch.device = SECOND) -> dict[str, torch.device]:
    """A device map: the blocks in turn on both devices, the final norm and unembedding on `ends`."""
    root = hf_model.base_model_prefix
    inner = getattr(hf_model, root)
    found: dict[str, torch.device] = {}
    for name, child in inner.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == hf_model.config.num_hidden_layers:
            found |= {f"{root}.{name}.{i}": (FIRST, SECOND)[i % 2] for i in range(len(child))}
        else:
            late = name in ("norm", "ln_f", "final_layer_norm")
            found[f"{root}.{name}"] = ends if late else FIRST
    tied = hf_model.config.tie_word_embeddings
    for name, _ in hf_model.named_children():
        if name != root:
            found[name] = FIRST if tied else ends
    return found
