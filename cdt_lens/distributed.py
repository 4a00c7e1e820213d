"""Examples shared out over the processes of `accelerate launch`; alone, everything is a no-op."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor


def _state() -> Any | None:
    # Asking accelerate for its state starts a process group, so ask only under a launcher.
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import PartialState

    return PartialState()


def shard() -> tuple[int, int]:
    """(rank of this process, number of processes)."""
    state = _state()
    return (0, 1) if state is None else (int(state.process_index), int(state.num_processes))


def is_main() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return shard()[0] == 0


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
