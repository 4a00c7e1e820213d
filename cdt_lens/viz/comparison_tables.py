"""Compared methods in numbers: one row a method, one column a measure, in words as well.

1. The best of a column carries a mark, never a colour alone; numbers that read the same are marked
   alike, and none is where all read the same.
2. The yardstick is left out of the best agreement, which it has with itself by definition; costs
   have no best, as the cheapest way is to draw lots.
3. A refused method keeps its row, and its reason stands below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
from markupsafe import Markup

from cdt_lens.core.errors import InputError
from cdt_lens.viz.table import _line, _words
from cdt_lens.viz.words import BEST, passes, score, seconds

if TYPE_CHECKING:
    from cdt_lens.comparing.comparison import Comparison, PlantedComparison

_NONE = "\u2013"
_YARDSTICK = "exact"


@dataclass(frozen=True)
class Column:
    """A measure: its name in the data frame, its heading, what it means, which value is best."""

    name: str
    heading: str
    meaning: str
    best: Callable[[Sequence[float]], float] | None = max
    read: Callable[[float], str] = score


COLUMNS = (
    Column(
        "spearman", "Spearman",
        "Rank correlation of the scores with exact mean-ablation of single heads, over all heads "
        "and on the scored examples: 1 is the same order, 0 no relation.",
    ),
    Column(
        "pearson", "Pearson",
        "Linear correlation of the same two: 1 is the same values up to a factor; a few large "
        "heads may decide it.",
    ),
    Column(
        "cpr_signed", "CPR, signed",
        "Area under the faithfulness f of the top heads by signed score, on held-out examples: "
        "1 is as good as the full model at every size, more is better.",
    ),
    Column(
        "cpr_magnitude", "CPR, magnitude",
        "The same with the heads ranked by the magnitude of their score, so that heads against "
        "the gold label come in early.",
    ),
    Column(
        "cmd_signed", "CMD, signed",
        "Area between f and 1 for the ranking by signed score: 0 is the full model's behaviour at "
        "every size, less is better.",
        best=min,
    ),
    Column(
        "cmd_magnitude", "CMD, magnitude",
        "The same for the ranking by magnitude.",
        best=min,
    ),
    Column(
        "forward_passes", "forward passes",
        "Time to score all heads, as a multiple of one plain forward pass (without the "
        "unembedding) of the same examples, timed beside it.",
        best=None,
        read=passes,
    ),
    Column(
        "seconds", "time",
        "The same on this machine's clock; n/a where the work was interrupted and went on later.",
        best=None,
        read=seconds,
    ),
    Column(
        "auroc", "AUROC",
        "Probability that a head of the planted circuit has a larger magnitude than one outside "
        "it: 1 is a perfect order, 0.5 is chance. Scores below 1e-4 of the task direction count as "
        "equal.",
    ),
    Column(
        "average_precision", "average precision",
        "Mean share of planted heads among the heads down to each planted one, by magnitude: 1 is "
        "a perfect order, chance is the share of planted heads.",
    ),
)  # fmt: skip
_TRUTH = ("auroc", "average_precision")


def columns_of(comparison: Comparison) -> list[Column]:
    """The columns that hold a number: those about the truth only where it is known."""
    frame = comparison.to_dataframe()
    return [c for c in COLUMNS if c.name not in _TRUTH or frame[c.name].notna().any()]


def plain(comparison: Comparison) -> pd.DataFrame:
    """The table as text, for a terminal: `*` at the best of a column."""
    columns = columns_of(comparison)
    rows = _rows(comparison, columns, lambda cell: f"{cell} *")
    return pd.DataFrame(rows, columns=["method", *(column.heading for column in columns)])


def html(comparison: Comparison) -> Markup:
    """The table for a page: a star at the best of a column."""
    columns = columns_of(comparison)
    headings = [Markup('<th scope="col" class="number">{}</th>').format(c.heading) for c in columns]
    body = Markup("").join(_line(row) for row in _rows(comparison, columns, _starred))
    caption = (
        f"Methods on {comparison.scored} scored and {comparison.held_out} held-out examples; "
        f"{BEST} best of the column"
    )
    return Markup(
        '<table><caption>{}</caption><thead><tr><th scope="col">method</th>{}</tr></thead>'
        "<tbody>{}</tbody></table>"
    ).format(caption, Markup("").join(headings), body)


def meanings(comparison: Comparison) -> Markup:
    """What each column means, in a sentence."""
    rows = [(column.heading, column.meaning) for column in columns_of(comparison)]
    return _words(("column", "what it means"), rows, "What the columns mean")


def methods_table(comparison: Comparison) -> Markup:
    """What each method does, and why it was refused if it was."""
    rows = [
        (each.method, each.description or _NONE, each.refused or "scored all heads")
        for each in comparison.methods
    ]
    return _words(("method", "what it does", "outcome"), rows, "The methods")


def planted_plain(planted: PlantedComparison, measure: str) -> pd.DataFrame:
    """One row a method, one column a circuit, then their mean; `*` at the best of a column."""
    names, rows = _planted_rows(planted, measure, lambda cell: f"{cell} *")
    return pd.DataFrame(rows, columns=["method", *names, "mean"])


def planted_html(planted: PlantedComparison, measure: str) -> Markup:
    """The same for a page."""
    names, rows = _planted_rows(planted, measure, _starred)
    heads = [
        Markup('<th scope="col" class="number">{}</th>').format(each) for each in (*names, "mean")
    ]
    body = Markup("").join(_line(row) for row in rows)
    caption = f"{heading_of(measure)} of each method on each planted circuit; {BEST} best"
    return Markup(
        '<table><caption>{}</caption><thead><tr><th scope="col">method</th>{}</tr></thead>'
        "<tbody>{}</tbody></table>"
    ).format(caption, Markup("").join(heads), body)


def planted_words(planted: PlantedComparison) -> Markup:
    """What is planted in each circuit."""
    rows = list(planted.why.items())
    return _words(("circuit", "what is planted"), rows, "The planted circuits")


def heading_of(measure: str) -> str:
    """A measure's heading.

    Raises:
        InputError: no such measure.
    """
    found = next((column for column in COLUMNS if column.name == measure), None)
    if found is None:
        names = ", ".join(column.name for column in COLUMNS)
        raise InputError(f"measure {measure!r}: expected one of {names}")
    return found.heading


def _rows(
    comparison: Comparison, columns: Sequence[Column], mark: Callable[[str], str]
) -> list[list[str]]:
    """Cells by method, and last those of random rankings."""
    frame = comparison.to_dataframe()
    refused = frame["refused"].notna().tolist()
    cells = [_column(frame, column, refused, mark) for column in columns]
    names = [
        f"{name} (yardstick)" if name == _YARDSTICK else f"{name} (refused)" if no else name
        for name, no in zip(frame["method"], refused, strict=True)
    ]
    rows = [list(row) for row in zip(names, *cells, strict=True)]
    if not comparison.random:
        return rows
    areas = comparison.random_areas()
    reference = [
        score(areas[column.name[:3]]) if column.name[:3] in areas else _NONE for column in columns
    ]
    return [*rows, [f"random rankings (median of {len(comparison.random)})", *reference]]


def _column(
    frame: pd.DataFrame, column: Column, refused: Sequence[bool], mark: Callable[[str], str]
) -> list[str]:
    agreement = column.name in ("spearman", "pearson")
    counted = [
        not (no or (agreement and name == _YARDSTICK))
        for name, no in zip(frame["method"], refused, strict=True)
    ]
    values = frame[column.name].astype(float).tolist()
    cells = _marked(values, counted, column, mark)
    return [_NONE if no else cell for no, cell in zip(refused, cells, strict=True)]


def _planted_rows(
    planted: PlantedComparison, measure: str, mark: Callable[[str], str]
) -> tuple[list[str], list[list[str]]]:
    heading_of(measure)
    column = next(column for column in COLUMNS if column.name == measure)
    frame = planted.matrix(measure)
    named = {str(name): frame[name].tolist() for name in frame}
    # A mean over fewer circuits than the others' stands beside no other.
    named["mean"] = frame.mean(axis=1, skipna=False).tolist()
    cells = [_marked(v, [True] * len(frame), column, mark) for v in named.values()]
    rows = [list(row) for row in zip(frame.index.astype(str), *cells, strict=True)]
    return list(named)[:-1], rows


def _marked(
    values: Sequence[float], counted: Sequence[bool], column: Column, mark: Callable[[str], str]
) -> list[str]:
    """The values as they read, the best of the counted ones marked unless all read the same."""
    cells = [column.read(value) for value in values]
    known = [v for v, yes in zip(values, counted, strict=True) if yes and math.isfinite(v)]
    if column.best is None or len({column.read(value) for value in known}) < 2:
        return cells
    best = column.read(column.best(known))
    return [
        mark(cell) if yes and cell == best else cell
        for cell, yes in zip(cells, counted, strict=True)
    ]


def _starred(cell: str) -> Markup:
    star = Markup('<span role="img" aria-label="best">{}</span>').format(BEST)
    return Markup("<strong>{} {}</strong>").format(star, cell)
