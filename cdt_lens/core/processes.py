"""Examples shared out over the processes of `accelerate launch`; alone, everything is a no-op."""

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
    from accelerate import PartialState

    ours = not torch.distributed.is_initialized()
    # Without a GPU accelerate would take each process for one by itself unless told so.
    state = PartialState(cpu=not torch.cuda.is_available())
    if ours and torch.distributed.is_initialized():
        atexit.register(_leave_group)
    if state.num_processes != launched:
        raise InputError(
            f"{launched} processes were launched but {state.num_processes} found each other; "
            "launch them with accelerate launch or torchrun"
        )
    return state


def _leave_group() -> None:
    # Left to the end of the interpreter, a process group's threads now and then abort the process.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def shard() -> tuple[int, int]:
    """(rank of this process, number of processes)."""
    state = _state()
    return (0, 1) if state is None else (int(state.process_index), int(state.num_processes))


def is_main() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return shard()[0] == 0


def wait_for_all() -> None:
    """Return when every process is here, so that files written by one can be read by all."""
    state = _state()
    if state is not None:
        state.wait_for_everyone()


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of `value` over all processes, on each of them."""
    state = _state()
    if state is None:
        return value
    from accelerate.utils import reduce

    return reduce(value.to(state.device), reduction="sum").to(value.device)


def gather_items(items: list[Any]) -> list[Any]:
    """The items of all processes, in rank order, on each of them."""
    if _state() is None:
        return items
    from accelerate.utils import gather_object

    return list(gather_object(items))
