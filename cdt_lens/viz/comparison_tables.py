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

from cdt_lens.circuits.measures import AREAS
from cdt_lens.comparing.comparison import YARDSTICK, Comparison, PlantedComparison
from cdt_lens.core.choices import Area, Ranking
from cdt_lens.core.errors import InputError
from cdt_lens.core.table import BEST, Table, star_best
from cdt_lens.viz.words import (
    count,
    empty_run,
    limits,
    number,
    passes,
    score,
    short_time,
    with_limits,
    yes_or_no,
)

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
        "and on the scored examples: 1 is the same order, 0 no relation. With a budget exact "
        "mean-ablation is itself measured on few prompts, so that no method can agree with it "
        "fully.",
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
        "log_area_signed", "log area, signed",
        "Mean of f over sizes on a logarithmic axis, from the first head on, for the ranking by "
        "signed score. Every doubling of the size counts alike; half of CPR is the sizes above "
        "half of the heads.",
    ),
    Column(
        "log_area_magnitude", "log area, magnitude",
        "The same mean for the ranking by magnitude.",
    ),
    Column(
        "scored", "prompts",
        "Number of prompts that the method scored: as many as the budget pays for.",
        best=None,
        read=count,
    ),
    Column(
        "exact", "swept",
        "Number of these prompts whose heads were swept one by one, to correct first-order scores; "
        "n/a for methods that correct none.",
        best=None,
        read=count,
    ),
    Column(
        "forward_passes", "forward passes",
        "Time to score all heads, as a multiple of one plain forward pass (without the "
        "unembedding) of the examples that the method scored, timed beside it.",
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
_COUNTS = ("scored", "exact")
# Sizes that people want circuits of, as shares of all heads.
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
_AREAS: dict[Area, str] = {"cpr": "CPR", "cmd": "CMD", "log_area": "area, log sizes"}
_RANKED: dict[Ranking, str] = {"signed": "signed score", "magnitude": "magnitude"}


def columns_of(comparison: Comparison) -> list[Column]:
    """Return the columns of a comparison.

    Those about the truth need one that is known, and the numbers of prompts need a budget.
    """
    frame = comparison.to_dataframe()
    empty = {name for name in (*_TRUTH, *_COUNTS) if not frame[name].notna().any()}
    if comparison.budget is None:
        empty |= {*_COUNTS}
    return [column for column in COLUMNS if column.name not in empty]


def methods(comparison: Comparison) -> Table:
    """Return the numbers of every method, and last those of random rankings."""
    run = empty_run(comparison.empty_run)
    caption = f"Methods on {_scored(comparison)} and {_held_out(comparison)} ({run})"
    return _methods(comparison, columns_of(comparison), caption)


def agreement(comparison: Comparison) -> Table:
    """Return the columns of `methods` without the areas: agreement, cost and truth."""
    columns = [column for column in columns_of(comparison) if _area_of(column) is None]
    return _methods(comparison, columns, f"Agreement and cost on {_scored(comparison)} examples")


def use(comparison: Comparison) -> Table:
    """Return the columns of `methods` about circuits: the areas of both rankings."""
    columns = [column for column in columns_of(comparison) if _area_of(column) is not None]
    run = empty_run(comparison.empty_run)
    return _methods(comparison, columns, f"Use on {_held_out(comparison)} ({run})")


def _methods(comparison: Comparison, columns: Sequence[Column], caption: str) -> Table:
    frame = comparison.to_dataframe()
    refused = frame["refused"].notna().tolist()
    names = [_name(*row) for row in zip(frame["method"], refused, strict=True)]
    cells = [_column(frame, column, refused) for column in columns]
    rows = [list(row) for row in zip(names, *cells, strict=True)]
    rows += [_random_row(comparison, columns)] if comparison.random else []
    headings = ["method", *(column.heading for column in columns)]
    return Table(headings, rows, f"{caption}; {BEST} best of the column")


def _scored(comparison: Comparison) -> str:
    if comparison.budget is None:
        return f"{comparison.scored} scored"
    passes = f"{comparison.budget:g} forward passes each"
    return f"up to {comparison.scored} scored ({passes})"


def _held_out(comparison: Comparison) -> str:
    return f"{comparison.held_out} held-out examples"


def _area_of(column: Column) -> str | None:
    """Return the name of the area in a column, or None."""
    name = column.name.removesuffix("_signed").removesuffix("_magnitude")
    return None if name == column.name else name


def meanings(comparison: Comparison) -> Table:
    """Return the meaning of every column of `methods`."""
    rows = [(column.heading, column.meaning) for column in columns_of(comparison)]
    return Table(("column", "what it means"), rows, "What the columns mean", sentences=True)


def sizes(comparison: Comparison) -> Table:
    """Return f of every ranking at the measured ones of the sizes 1, 2, 5, 10 and 20 %."""
    frame = comparison.faithfulness()
    frame = frame[frame["fraction"].isin(_SHARES)]
    heads = dict(zip(frame["fraction"], frame["heads"], strict=True))
    columns = [f"f at {100 * share:g} % ({n})" for share, n in heads.items()]
    caption = (
        f"f of the top heads ({empty_run(comparison.empty_run)}), by share and number of heads, "
        "with 95 % intervals over prompts"
    )
    return _by_ranking(frame, "f", columns, caption)


def areas(comparison: Comparison) -> Table:
    """Return the areas of every ranking with their intervals."""
    caption = f"Areas ({empty_run(comparison.empty_run)}) with 95 % intervals over prompts"
    return _by_ranking(comparison.areas(), "value", [_AREAS[name] for name in AREAS], caption)


def differences(comparison: Comparison, by: Ranking = "signed") -> Table:
    """Return the difference of every method from the best one, and whether it is real.

    Args:
        comparison: The compared methods.
        by: Rank heads by their "signed" score or by its "magnitude".
    """
    frame = comparison.differences(by=by).drop(columns="empty_run")
    known = frame["low"].notna()
    rows = [
        [name, f"{number(value, '+.3f')} {limits((low, high), '+z.3f')}".rstrip(), yes_or_no(real)]
        for name, _, value, low, high, real in frame.assign(
            real=frame["real"].where(known, None)
        ).itertuples(index=False)
    ]
    reference = frame["reference"].iloc[0] if len(frame) else _NONE
    caption = (
        f"Which differences are real, by {_RANKED[by]}: {_AREAS['log_area']} "
        f"({empty_run(comparison.empty_run)}), minus that of {reference}; 95 % intervals over the "
        "same prompts"
    )
    return Table(["method", "difference", "excludes 0"], rows, caption)


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
    runs = {empty_run(each.empty_run) for each in result.circuits.values()}
    run = "" if _area_of(column) is None else f" ({' or '.join(sorted(runs))})"
    caption = f"{column.heading} of each method on each planted circuit{run}; {BEST} best"
    return Table(["method", *map(str, frame)], rows, caption)


def planted_meanings(result: PlantedComparison) -> Table:
    """Return the description of every planted circuit."""
    rows = list(result.why.items())
    return Table(("circuit", "what is planted"), rows, "The planted circuits", sentences=True)


def _by_ranking(frame: pd.DataFrame, value: str, columns: list[str], caption: str) -> Table:
    """Return a row for each method and ranking with its values and their limits."""
    rows = []
    for (method, by), own in frame.groupby(["method", "by"], sort=False):
        points = zip(own[value], own["low"], own["high"], strict=True)
        rows.append([method, by, *(with_limits(v, (low, high)) for v, low, high in points)])
    return Table(["method", "ranked by", *columns], rows, caption, grouped=True)


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
    medians = comparison.random_areas()
    names = map(_area_of, columns)
    cells = [_NONE if name is None else score(medians[name]) for name in names]
    return [f"random rankings (median of {len(comparison.random)})", *cells]
