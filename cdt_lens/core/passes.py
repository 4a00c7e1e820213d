"""`Passes`: how a computation walks through its examples, checked once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from tqdm.auto import tqdm

from cdt_lens.core.checked import Checked
from cdt_lens.core.choices import Count
from cdt_lens.core.processes import is_main, shard

# Steps are layers, batches or circuits, so their number says nothing to a reader.
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"

_Batch = TypeVar("_Batch", covariant=True)


@runtime_checkable
class _Batched(Protocol[_Batch]):
    """Examples that come in batches, such as `tasks.task.Examples`."""

    def batches(
        self, batch_size: int, *, shard: tuple[int, int], apart: int | None
    ) -> Iterator[_Batch]: ...


@dataclass(frozen=True)
class Passes(Checked):
    """Sizes of the forward passes and the progress bar. Numbers depend on them by rounding only.

    Args:
        batch_size: Number of examples per batch.
        rows: Maximum number of (source x example) rows per forward pass, at least the batch size.
            None chooses it by the length of the prompts and the device.
        progress: Whether the main process shows a progress bar.

    Raises:
        InputError: `batch_size` or `rows` is not a whole number of at least 1, or `progress` is
            not a bool.
    """

    batch_size: Count = 16
    rows: Count | None = None
    progress: bool = True

    def batches(self, examples: _Batched[_Batch], apart: int | None = None) -> list[_Batch]:
        """Return the batches of `examples` that belong to this process.

        Args:
            examples: The examples.
            apart: The model's `longrope_limit`, see `tasks.task.Examples.batches`.
        """
        return list(examples.batches(self.batch_size, shard=shard(), apart=apart))

    def bar(
        self,
        items: Iterable[Any] | None = None,
        *,
        name: str,
        total: int | None = None,
        leave: bool = True,
    ) -> tqdm:
        """Return a progress bar with the share that is done and the time left.

        It is shown by the main process alone, in a terminal or a notebook, unless `progress` is
        False. A log would hold one line for every time that the bar is drawn.

        Args:
            items: What the bar iterates over; None for a bar that is updated by hand.
            name: Text in front of the bar.
            total: Number of steps of about equal cost, if `items` is None.
            leave: Whether the bar stays visible at the end.
        """
        # tqdm reads `disable=None` as: only where standard error is no terminal.
        hidden = None if self.progress and is_main() else True
        return tqdm(
            items, desc=name, total=total, leave=leave, disable=hidden, bar_format=BAR,
        )  # fmt: skip
