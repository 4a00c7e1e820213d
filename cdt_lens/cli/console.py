"""Output of the command line: progress on standard error, results on standard output."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

# Paths are printed as they are: `:key:` in one is no picture.
err = Console(stderr=True, highlight=False, emoji=False)
out = Console(highlight=False, emoji=False)


def say(text: str) -> None:
    """Print one line of progress on standard error, from one process."""
    if _first():
        err.print(text, markup=False, soft_wrap=True)


def tell(text: str) -> None:
    """Print one line of the result on standard output, from one process."""
    if _first():
        out.print(text, markup=False, soft_wrap=True)


def lead_on(*commands: Sequence[object]) -> None:
    """Print the commands to type next, after the result.

    Args:
        commands: The words of each command, without `cdt-lens`.
    """
    for number, words in enumerate(commands):
        line = shlex.join(["cdt-lens", *map(str, words)])
        tell(f"{'then' if number else 'next'}: {line}")


def tell_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, repeat: int = 1
) -> None:
    """Print a table of the result, in as many parts as fit the width of the terminal.

    Args:
        columns: The headings. A heading of several words may be broken between them.
        rows: The cells of each row.
        repeat: How many of the first columns stand in every part.
    """
    if not _first():
        return
    cells = [[str(cell) for cell in row] for row in rows]
    for part in _parts(columns, cells, repeat):
        table = Table(
            *(columns[index].replace(" ", "\n") for index in part),
            box=box.SIMPLE_HEAD, pad_edge=False,
        )  # fmt: skip
        for row in cells:
            table.add_row(*(row[index] for index in part))
        out.print(table, markup=False)


def _parts(columns: Sequence[str], rows: list[list[str]], repeat: int) -> list[list[int]]:
    """Return the columns of each part by index."""

    def width(index: int) -> int:
        words = [*columns[index].split(), *(row[index] for row in rows)]
        return 3 + max(map(len, words))  # three blanks stand around a column

    repeated = list(range(repeat))
    room = out.width - sum(map(width, repeated))
    parts: list[list[int]] = [[]]
    for index in range(repeat, len(columns)):
        if parts[-1] and sum(map(width, parts[-1])) + width(index) > room:
            parts.append([])
        parts[-1].append(index)
    return [repeated + part for part in parts]


def _first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
