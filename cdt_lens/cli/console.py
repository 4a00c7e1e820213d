"""What the command line says: progress on standard error, results on standard output."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

err = Console(stderr=True, highlight=False)
out = Console(highlight=False)


def say(text: str) -> None:
    """One line of progress, on standard error, from one process."""
    if _first():
        err.print(text, markup=False, soft_wrap=True)


def tell(text: str) -> None:
    """One line of the result, on standard output, from one process."""
    if _first():
        out.print(text, markup=False, soft_wrap=True)


def tell_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table of the result."""
    if not _first():
        return
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    out.print(table)


def _first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
