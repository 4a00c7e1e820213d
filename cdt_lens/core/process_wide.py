"""Change settings of the whole process for a while, and put them back.

Generators, logging levels and numbers of threads belong to the process. Two threads that remember
and restore them in overlapping blocks would leave the settings of one of them behind, so such
blocks take turns. Warning filters need no turns: a filter is added while any block asks for it.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from cdt_lens.core.undo import Scope, unbroken, undoing

_TURNS = threading.RLock()
_FILTERS_LOCK = threading.RLock()
_FILTERS: dict[str, _Filter] = {}


# A function that reads a setting, and one that sets it to what was read.
Setting = tuple[Callable[[], Any], Callable[[Any], object]]


class process_wide:
    """Change settings of the process within a `with` block; such blocks take turns.

    Args:
        *settings: the settings that are put back.
        change: changes them.
    """

    def __init__(self, *settings: Setting, change: Callable[[], object]) -> None:
        self._settings, self._change = settings, change
        self._scope = Scope()

    def __enter__(self) -> None:
        try:
            self._scope.open()
            self._scope.take(_TURNS)
            for read, put in self._settings:
                self._scope.at_end(partial(put, read()))
            self._change()
        except BaseException:
            self._scope.close(failed=True)
            raise

    @unbroken
    def __exit__(self, *error: object) -> None:
        self._scope.close(failed=error[0] is not None)


# The generators of the GPUs are not drawn from: the package creates every model on the CPU.
GENERATOR: Setting = (torch.get_rng_state, torch.set_rng_state)


def seeded(seed: int) -> process_wide:
    """Seed torch's global CPU generator within a `with` block, and restore its state afterwards.

    Args:
        seed: the seed.

    Returns:
        The context.
    """
    # torch.manual_seed would also seed the generators of the GPUs, which are not restored.
    return process_wide(GENERATOR, change=lambda: torch.default_generator.manual_seed(seed))


def one_thread() -> process_wide:
    """Use one thread of torch within a `with` block.

    Returns:
        The context.
    """
    threads: Setting = (torch.get_num_threads, torch.set_num_threads)
    return process_wide(threads, change=lambda: torch.set_num_threads(1))


class ignored(undoing):
    """Ignore a warning within a `with` block, in all threads.

    Args:
        message: a regular expression for the start of the message. The empty one ignores all.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(partial(_withdraw, message, id(self)))
        self._message = message

    @unbroken
    def __enter__(self) -> None:
        super().__enter__()
        with _FILTERS_LOCK:
            kept = _FILTERS.get(self._message)
            if kept is None:
                kept = _FILTERS[self._message] = _Filter(self._message)
            kept.asking.add(id(self))


def _withdraw(message: str, block: int) -> None:
    with _FILTERS_LOCK:
        kept = _FILTERS.get(message)
        if kept is None:
            return
        kept.asking.discard(block)
        if not kept.asking:
            del _FILTERS[message]
            kept.remove()


class _Filter:
    """An entry of `warnings.filters`, and the blocks that ask for it."""

    def __init__(self, message: str) -> None:
        pattern = re.compile(message, re.IGNORECASE) if message else None
        self._entry: Any = ("ignore", pattern, Warning, None, 0)
        self._filters = _filters()
        self._filters.insert(0, self._entry)
        self.asking: set[int] = set()

    def remove(self) -> None:
        # Within the caller's catch_warnings the list is a copy of the former one.
        for filters in (self._filters, _filters()):
            here = [i for i, entry in enumerate(filters) if entry is self._entry]
            for i in here:
                del filters[i]


def _filters() -> list[Any]:
    return warnings.filters  # type: ignore[return-value]
