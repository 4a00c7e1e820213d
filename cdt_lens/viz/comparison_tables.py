"""Tables of compared methods: one row for each method, one column for each measure.

1. The best of a column carries a star. Numbers that read the same are marked alike; nothing is
   marked if all numbers read the same.
2. The yardstick does not compete for the best agreement, which it has with itself by definition.
   Costs have no best, because random scores are the cheapest.
3. A refused method keeps its row, and a table below gives the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from cdt_lens.comparing.comparison import YARDSTICK, Comparison, PlantedComparison
from cdt_lens.core.errors import InputError
from cdt_lens.core.table import BEST, Table, star_best
from cdt_lens.viz.words import passes, score, short_time

_NONE = "\u2013"


@dataclass(frozen=True)
class Column:
    """A measure of a method.

    Args:
        name: The name of the measure in the data frame.
        heading: The heading of the column.
        meaning: A sentence about the measure.
        best: `max` or `min`; None if no value is best.
        read: The function that formats a value.
    """

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
        "Linear correlation of the same scores: 1 is the same values up to a factor. A few large "
        "heads may decide it.",
    ),
    Column(
        "cpr_signed", "CPR, signed",
        "Area under the faithfulness f of the top heads by signed score, on held-out examples: "
        "1 is as good as the full model at every size, more is better.",
    ),
    Column(
        "cpr_magnitude", "CPR, magnitude",
        "The same area with the heads ranked by the magnitude of their score, so that heads "
        "against the gold label come early.",
    ),
    Column(
        "cmd_signed", "CMD, signed",
        "Area between f and 1 for the ranking by signed score: 0 is the behaviour of the full "
        "model at every size, less is better.",
        best=min,
    ),
    Column(
        "cmd_magnitude", "CMD, magnitude",
        "The same area for the ranking by magnitude.",
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
        "Time to score all heads on this machine; n/a if the work was interrupted and resumed.",
        best=None,
        read=short_time,
    ),
    Column(
        "auroc", "AUROC",
        "Probability that a head of the planted circuit has a larger magnitude than one outside "
        "it: 1 is a perfect order, 0.5 is chance. Scores below 1e-4 of the task direction count as "
        "equal.",
    ),
    Column(
        "average_precision", "average precision",
        "Mean precision of the ranking by magnitude at each planted head: 1 is a perfect order, "
        "chance is the share of planted heads.",
    ),
)  # fmt: skip
_TRUTH = ("auroc", "average_precision")


def columns_of(comparison: Comparison) -> list[Column]:
    """Return the columns of a comparison: those about the truth only if it is known."""
    frame = comparison.to_dataframe()
    return [c for c in COLUMNS if c.name not in _TRUTH or frame[c.name].notna().any()]


def methods(comparison: Comparison) -> Table:
    """Return the numbers of every method, and last those of random rankings."""
    columns = columns_of(comparison)
    frame = comparison.to_dataframe()
    refused = frame["refused"].notna().tolist()
    names = [_name(*row) for row in zip(frame["method"], refused, strict=True)]
    cells = [_column(frame, column, refused) for column in columns]
    rows = [list(row) for row in zip(names, *cells, strict=True)]
    rows += [_random_row(comparison, columns)] if comparison.random else []
    caption = (
        f"Methods on {comparison.scored} scored and {comparison.held_out} held-out examples; "
        f"{BEST} best of the column"
    )
    return Table(["method", *(column.heading for column in columns)], rows, caption)


def meanings(comparison: Comparison) -> Table:
    """Return the meaning of every column of `methods`."""
    rows = [(column.heading, column.meaning) for column in columns_of(comparison)]
    return Table(("column", "what it means"), rows, "What the columns mean", sentences=True)


def descriptions(comparison: Comparison) -> Table:
    """Return the description of every method, and the reason if it was refused."""
    rows = [
        (result.method, result.description or _NONE, result.refused or "scored all heads")
        for result in comparison.methods
    ]
    return Table(("method", "what it does", "outcome"), rows, "The methods", sentences=True)


def planted(result: PlantedComparison, measure: str = "average_precision") -> Table:
    """Return one measure on planted circuits: a row for each method, a column for each circuit.

    The last column is the mean over the circuits; it is missing for a method that was refused on
    one of them, as a mean over other circuits would not be comparable.

    Args:
        result: The methods on every circuit.
        measure: The name of the measure.

    Raises:
        InputError: There is no such measure.
    """
    column = next((column for column in COLUMNS if column.name == measure), None)
    if column is None:
        names = ", ".join(column.name for column in COLUMNS)
        raise InputError(f"measure {measure!r}: expected one of {names}")
    frame = result.matrix(measure)
    frame = frame.assign(mean=frame.mean(axis=1, skipna=False))
    cells = [_starred(frame[name].tolist(), column) for name in frame]
    rows = list(zip(frame.index.astype(str), *cells, strict=True))
    caption = f"{column.heading} of each method on each planted circuit; {BEST} best"
    return Table(["method", *map(str, frame)], rows, caption)


def planted_meanings(result: PlantedComparison) -> Table:
    """Return the description of every planted circuit."""
    rows = list(result.why.items())
    return Table(("circuit", "what is planted"), rows, "The planted circuits", sentences=True)


def _name(method: str, refused: bool) -> str:
    if method == YARDSTICK:
        return f"{method} (yardstick)"
    return f"{method} (refused)" if refused else method


def _column(frame: pd.DataFrame, column: Column, refused: Sequence[bool]) -> list[object]:
    agreement = column.name in ("spearman", "pearson")
    values = frame[column.name].astype(float).tolist()
    out = [
        no or (agreement and name == YARDSTICK)
        for name, no in zip(frame["method"], refused, strict=True)
    ]
    cells = _starred(values, column, out)
    return [_NONE if no else cell for no, cell in zip(refused, cells, strict=True)]


def _starred(
    values: Sequence[float], column: Column, out: Sequence[bool] | None = None
) -> list[object]:
    """Return the cells of a column, the best one starred; `out` says which do not compete."""
    cells = [column.read(value) for value in values]
    out = out or [False] * len(values)
    known = [math.nan if no else value for no, value in zip(out, values, strict=True)]
    return star_best(cells, known, column.read, column.best)


def _random_row(comparison: Comparison, columns: Sequence[Column]) -> list[object]:
    areas = comparison.random_areas()
    cells = [score(areas[c.name[:3]]) if c.name[:3] in areas else _NONE for c in columns]
    return [f"random rankings (median of {len(comparison.random)})", *cells]
