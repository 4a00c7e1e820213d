"""The one builder of HTML tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from cdt_lens.viz.words import BEST, Read

_NUMBER = re.compile(r"([+-]?\d[\d.e+-]*|n/a)( ?%| \[.*\])?")

# For each column: its heading, and how its values read.
Columns = Mapping[str, tuple[str, Read]]


def _starred(cell: str) -> Markup:
    return Markup("<strong>{}</strong>").format(_marked(BEST, "best", cell))


def _marked(mark: str, meaning: str, cell: str) -> Markup:
    template = Markup('<span role="img" aria-label="{}">{}</span> {}')
    return template.format(meaning, mark, cell)


def _headings(columns: Columns) -> list[str]:
    return [heading for heading, _ in columns.values()]


def _cells(records: Iterable[Mapping[Any, Any]], columns: Columns) -> list[list[str]]:
    return [[read(record[name]) for name, (_, read) in columns.items()] for record in records]


def _grouped_table(
    columns: Sequence[str], groups: Mapping[str, Sequence[Sequence[str]]], *, caption: str
) -> Markup:
    """A table with one header cell for all rows of a group and one for each row."""
    names = [Markup('<th scope="col">{}</th>').format(name) for name in columns[:2]]
    names += [Markup('<th scope="col" class="number">{}</th>').format(n) for n in columns[2:]]
    body = Markup("").join(_group(name, rows) for name, rows in groups.items())
    return Markup("<table><caption>{}</caption><thead><tr>{}</tr></thead>{}</table>").format(
        caption, Markup("").join(names), body
    )


def _group(name: str, rows: Sequence[Sequence[str]]) -> Markup:
    cell = Markup('<th scope="rowgroup" rowspan="{}" dir="auto">{}</th>').format(len(rows), name)
    lines: list[Markup] = []
    for row_name, *values in rows:
        header = Markup('<th scope="row">{}</th>').format(row_name)
        data = Markup("").join(Markup('<td class="number">{}</td>').format(v) for v in values)
        lines.append(Markup("<tr>{}{}{}</tr>").format("" if lines else cell, header, data))
    return Markup("<tbody>{}</tbody>").format(Markup("").join(lines))


def _words(columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Markup:
    """A table of sentences, which wrap."""
    table = table_html(columns, rows, caption=caption)
    return Markup('<div class="settings">{}</div>').format(table)


def _line(row: Sequence[Any]) -> Markup:
    name, *values = row
    cells = Markup("").join(Markup('<td class="number">{}</td>').format(v) for v in values)
    return Markup('<tr><th scope="row">{}</th>{}</tr>').format(name, cells)


def table_html(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, caption: str | None = None
) -> Markup:
    """A table with a header row, a header cell to each row, and numbers to the right."""
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in columns)
    body = Markup("").join(_row(row) for row in rows)
    title = Markup("<caption>{}</caption>").format(caption) if caption else ""
    return Markup("<table>{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(
        title, head, body
    )


def _row(cells: Sequence[object]) -> Markup:
    first, *rest = (cell if isinstance(cell, Markup) else str(cell) for cell in cells)
    line = Markup('<tr><th scope="row">{}</th>').format(first)
    for cell in rest:
        kind = Markup(' class="number"') if _NUMBER.fullmatch(cell) else ""
        line += Markup("<td{}>{}</td>").format(kind, cell)
    return line + Markup("</tr>")
