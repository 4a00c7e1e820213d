"""Output of the command line: progress on standard error, results on standard output."""

from __future__ import annotations

import errno
import io
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.table import Table

from cdt_lens.core.errors import InputError

# Paths are printed as they are: `:key:` in one is no picture.
err = Console(stderr=True, highlight=False, emoji=False)
out = Console(highlight=False, emoji=False)


def print_utf8() -> None:
    """Print UTF-8 into files and pipes, as this package reads it; a terminal keeps its encoding.

    What the encoding lacks is escaped, so that a result is never lost when it is printed.
    """
    stream = sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        # The handler of the C locale prints paths of any bytes, and stays.
        errors = stream.errors if stream.errors == "surrogateescape" else "backslashreplace"
        stream.reconfigure(encoding=stream.encoding if stream.isatty() else "utf-8", errors=errors)


def say(text: str) -> None:
    """Print one line of progress on standard error, from one process."""
    if _first():
        err.print(text, markup=False, soft_wrap=True)


def tell(text: str) -> None:
    """Print one line of the result on standard output, from one process."""
    if _first():
        with _output():
            out.print(text, markup=False, soft_wrap=True)


def tell_csv(text: str) -> None:
    """Print the text of a file on standard output, not through rich, which would change it."""
    # Half a character, which JSON may hold, has no bytes in UTF-8.
    whole = text.encode("utf-8", "backslashreplace").decode("utf-8")
    with _output():
        print(whole, end="", flush=True)


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
        with _output():
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


@contextmanager
def _output() -> Iterator[None]:
    """Refuse a standard output that takes nothing, such as a file on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader has seen enough, as `head` has
            raise
        raise InputError(
            f"standard output: cannot be written ({error.strerror or error})"
        ) from error


def _first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
