"""Tables of text: built once, shown on a page, in a notebook or in a terminal.

A cell is anything with a text. `Marked` cells carry a sign that is a word as well, never a colour
alone. On a page everything is escaped, except what is `Markup` already.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import pandas as pd
from markupsafe import Markup

BEST, BELOW = "\u2605", "\u25bd"
_MEANINGS = {BEST: "best", BELOW: "below the untouched checkpoint"}
# A number with its unit, spread, range or share: "0.7 \u00b1 0.1", "40.4 k (3 %)", "2 of 3".
_NUMBER = re.compile(
    r"n/a|\u2013|[+-]?\d[\d.,e+-]*( ?(%|k|M|G|ms|s|min|h))?( \u00b1 .*| \[.*\]| \(.*\)| of \d+)?"
)
_MOST_ROWS = 40  # of a data frame; a longer one is cut in its middle
_MOST_CHARACTERS = 160  # of a cell of a data frame


@dataclass(frozen=True)
class Marked:
    """A cell with a sign: `BEST` (bold on a page, "*" as text) or `BELOW`."""

    cell: object
    sign: str

    def __str__(self) -> str:
        return f"{self.cell} {'*' if self.sign == BEST else self.sign}"

    def __html__(self) -> str:
        template = Markup('<span role="img" aria-label="{}">{}</span> {}')
        signed = template.format(_MEANINGS[self.sign], self.sign, self.cell)
        return Markup("<strong>{}</strong>").format(signed) if self.sign == BEST else signed


@dataclass(frozen=True)
class Table:
    """Headings, and rows with one cell for each heading.

    Args:
        headings: The names of the columns.
        rows: The cells, row by row. The first cell names its row.
        caption: The title of the table; empty for none.
        grouped: Whether consecutive rows with the same first cell form a group. A page shows that
            cell once, and the second cell names the row.
        sentences: Whether the cells are sentences, which a page aligns to the left and wraps.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    grouped: bool = False
    sentences: bool = False

    @classmethod
    def of_frame(cls, frame: pd.DataFrame) -> Table:
        """Return a table of `frame`: four digits, missing values empty, at most 40 rows."""
        rows = [[_short(value) for value in row] for row in frame.itertuples(index=False)]
        if len(rows) > _MOST_ROWS:
            half = _MOST_ROWS // 2
            rows = [*rows[:half], ["..."] * len(frame.columns), *rows[-half:]]
        return cls([str(name) for name in frame.columns], rows)

    @property
    def texts(self) -> list[list[str]]:
        """The rows as plain text, for a terminal."""
        return [[str(cell) for cell in row] for row in self.rows]

    def to_dataframe(self) -> pd.DataFrame:
        """Return the table as a data frame of plain text."""
        return pd.DataFrame(self.texts, columns=list(self.headings))

    def __html__(self) -> str:
        caption = Markup("<caption>{}</caption>").format(self.caption) if self.caption else ""
        table = Markup("<table>{}<thead><tr>{}</tr></thead>{}</table>").format(
            caption, self._head(), Markup("").join(self._bodies())
        )
        return Markup('<div class="settings">{}</div>').format(table) if self.sentences else table

    def _head(self) -> Markup:
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.headings)
        names = 2 if self.grouped else 1
        head = Markup("")
        for index, (heading, cells) in enumerate(zip(self.headings, columns, strict=True)):
            numbers = index >= names and all(map(_is_number, cells))
            head += Markup('<th scope="col"{}>{}</th>').format(_kind(numbers), heading)
        return head

    def _bodies(self) -> Iterable[Markup]:
        if not self.grouped:
            return [_body(Markup("<tr>{}</tr>").format(_cells(row)) for row in self.rows)]
        groups = groupby(self.rows, key=lambda row: str(row[0]))
        return [_group(list(rows)) for _, rows in groups]


def star_best(
    cells: Sequence[object],
    values: Sequence[float],
    read: Callable[[Any], str],
    best: Callable[[Sequence[float]], float] | None,
) -> list[object]:
    """Return the cells of a column with the best ones marked.

    Args:
        cells: The cells of the column.
        values: The number behind each cell; NaN for a cell that does not compete.
        read: Turns a number into text. Numbers with the same text are marked alike.
        best: `max` or `min`; None for a column without a best value.

    Returns:
        The cells, those with the best number as `Marked`; none if all numbers read the same.
    """
    known = [value for value in values if math.isfinite(value)]
    if best is None or len({read(value) for value in known}) < 2:
        return list(cells)
    top = read(best(known))
    return [
        Marked(cell, BEST) if math.isfinite(value) and read(value) == top else cell
        for cell, value in zip(cells, values, strict=True)
    ]


def _group(rows: Sequence[Sequence[object]]) -> Markup:
    template = Markup('<th scope="rowgroup" rowspan="{}">{}</th>')
    first = template.format(len(rows), rows[0][0])
    lines = (_cells(row[1:]) for row in rows)
    return _body(
        Markup("<tr>{}{}</tr>").format("" if index else first, line)
        for index, line in enumerate(lines)
    )


def _body(lines: Iterable[Markup]) -> Markup:
    return Markup("<tbody>{}</tbody>").format(Markup("").join(lines))


def _cells(row: Sequence[object]) -> Markup:
    name, *cells = row
    line = Markup('<th scope="row">{}</th>').format(name)
    for cell in cells:
        line += Markup("<td{}>{}</td>").format(_kind(_is_number(cell)), cell)
    return line


def _is_number(cell: object) -> bool:
    return _NUMBER.fullmatch(str(cell).rstrip(f" *{BELOW}")) is not None


def _kind(number: bool) -> Markup:
    return Markup(' class="number"') if number else Markup("")


def _short(value: Any) -> str:
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 3]}..."
