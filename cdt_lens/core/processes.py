"""The processes of `accelerate launch`, which share the examples; alone, every call is a no-op."""

from __future__ import annotations

import atexit
import os
from typing import Any

import torch
from torch import Tensor

from cdt_lens.core.errors import InputError


def _state() -> Any | None:
    # Asking accelerate for its state starts a process group, so ask only under a launcher.
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched < 2:
        return None
    ours = not torch.distributed.is_initialized()
    state = _partial_state()
    if ours and torch.distributed.is_initialized():
        atexit.register(_leave_group)
    if state.num_processes != launched:
        raise InputError(
            f"{launched} processes were launched but {state.num_processes} found each other; "
            "launch them with accelerate launch or torchrun"
        )
    return state


def accelerate_state() -> Any:
    """Return accelerate's state of this process, which its loggers and trackers need."""
    return _state() or _partial_state()


def _partial_state() -> Any:
    from accelerate import PartialState

    # Without a GPU and without `cpu=True`, accelerate treats each process as the only one.
    return PartialState(cpu=not torch.cuda.is_available())


def _leave_group() -> None:
    # Threads of a process group that live until the interpreter ends sometimes abort the process.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def shard() -> tuple[int, int]:
    """Return the rank of this process and the number of processes.

    Raises:
        InputError: The launched processes did not all find each other.
    """
    state = _state()
    return (0, 1) if state is None else (int(state.process_index), int(state.num_processes))


def is_main() -> bool:
    """Return whether this process writes files and shows progress."""
    return shard()[0] == 0


def wait_for_all() -> None:
    """Wait until every process has called this, so that all can read the files that one wrote."""
    state = _state()
    if state is not None:
        state.wait_for_everyone()


def sum_over_processes(value: Tensor) -> Tensor:
    """Add up a tensor over all processes.

    Args:
        value: A tensor of the same shape on every process.

    Returns:
        The sum, on every process and on the device of `value`.
    """
    state = _state()
    if state is None:
        return value
    from accelerate.utils import reduce

    return reduce(value.to(state.device), reduction="sum").to(value.device)


def gather_items(items: list[Any]) -> list[Any]:
    """Collect the items of all processes.

    Args:
        items: The items of this process. They must be picklable.

    Returns:
        The items of all processes in the order of their ranks, on every process.
    """
    if _state() is None:
        return items
    from accelerate.utils import gather_object

    return list(gather_object(items))
