"""Numbers and provenance in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

BEST, BELOW = "\u2605", "\u25bd"
# What a cell of a data frame may hold.
Number = float | int | np.number
# How a value of a column reads.
Read = Callable[[Any], str]

# What a provenance says: the path to each entry, and the entry in words.
Leaves = dict[tuple[str, ...], str]
# Rows of (name, value) by group.
Groups = dict[str, list[tuple[str, str]]]


def number(value: float, form: str) -> str:
    """`value` in the given form; "n/a" for NaN."""
    return format(value, form) if value == value else "n/a"


def spread(draws: Float[Tensor, " draw"]) -> str:
    """Median [5th, 95th percentile] over random draws."""
    if not len(draws):
        return "n/a"
    at = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    low, middle, high = draws.double().cpu().quantile(at).tolist()
    return f"{number(middle, 'z.3f')} [{number(low, 'z.3f')}, {number(high, 'z.3f')}]"


def medians(draws: Mapping[str, Float[Tensor, " draw"]]) -> str:
    """The median of each random control."""
    return (
        ", ".join(f"{float(v.quantile(0.5)):.2f}" for v in draws.values() if len(v)) or "not drawn"
    )


def provenance_rows(told: Iterable[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, Groups]]:
    """(whose, what) from (whose, entries), with what all of them share told once, first."""
    parts: list[tuple[str, Leaves]] = []
    for whose, entries in told:
        part = (whose, _leaves(entries))
        parts += [] if part in parts else [part]
    if len(parts) > 1:
        first, *others = (leaves for _, leaves in parts)
        shared = {path: v for path, v in first.items() if all(o.get(path) == v for o in others)}
        rest = [
            (whose, {path: v for path, v in leaves.items() if path not in shared})
            for whose, leaves in parts
        ]
        parts = [("Common to all results", shared), *rest]
    return [(whose, _grouped(leaves)) for whose, leaves in parts if leaves]


def in_words(value: object) -> str:
    """A plain value, or a nested one on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {in_words(entry)}" for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(in_words(entry) for entry in value)
    return "none" if value is None else str(value)


def _leaves(entries: Mapping[str, Any], path: tuple[str, ...] = ()) -> Leaves:
    found: Leaves = {}
    for name, value in entries.items():
        here = (*path, str(name))
        nested = isinstance(value, Mapping) and value
        found |= _leaves(value, here) if nested else {here: in_words(value)}
    return found


def _grouped(leaves: Leaves) -> Groups:
    """By the outermost name of each path; entries without one come first, under ""."""
    groups: Groups = {"": []}
    for (outer, *inner), value in leaves.items():
        group, name = (outer, " \u203a ".join(inner)) if inner else ("", outer)
        groups.setdefault(group, []).append((name, value))
    return {group: rows for group, rows in groups.items() if rows}


def score(value: Number) -> str:
    """An accuracy, a macro-F1, a retention or a loss: "0.712"; "n/a" where not finite."""
    return f"{value:.3f}" if np.isfinite(value) else "n/a"


def count(value: Number) -> str:
    """A number of things: "1,234,567"."""
    return f"{round(float(value)):,}" if np.isfinite(value) else "n/a"


def short_count(value: Number) -> str:
    """A large number of things in three digits: "40.4 k", "1.35 M"."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if np.isfinite(value) and value >= unit:
            return f"{value / unit:.3g} {name}"
    return count(value)


def percent(share: Number) -> str:
    """A share in three digits, which a thousandth of the parameters needs: "0.0812 %"."""
    return f"{100 * share:.3g} %" if np.isfinite(share) else "n/a"


def duration(seconds: Number) -> str:
    """Seconds in the unit that reads best: "42.0 s", "3.5 min", "2.2 h"."""
    if not np.isfinite(seconds):
        return "n/a"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _rate(value: Number) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "n/a"


def _answer(value: Any) -> str:
    return "n/a" if pd.isna(value) else "yes" if value else "no"


def mean_and_spread(values: pd.Series) -> tuple[float, float]:
    """Mean and sample standard deviation of the finite values; NaN where there are too few."""
    numbers = values.to_numpy(dtype=float)
    known = numbers[np.isfinite(numbers)]
    mean = float(known.mean()) if len(known) else float("nan")
    return mean, float(known.std(ddof=1)) if len(known) > 1 else float("nan")


def mean_in_words(values: pd.Series, read: Read = score) -> str:
    """ "0.712 \u00b1 0.014" over seeds; "0.712" of a single one; "n/a" of none."""
    mean, spread = mean_and_spread(values)
    return f"{read(mean)} \u00b1 {read(spread)}" if np.isfinite(spread) else read(mean)


def passes(value: float) -> str:
    """A multiple of one forward pass: "0.02", "3.1", "81", "1,240"."""
    if not math.isfinite(value):
        return "n/a"
    form = ",.0f" if value >= 20 else ".1f" if value >= 1 else ".2g"
    return format(value, form)


def seconds(value: float) -> str:
    """A time in the unit that reads best: "12 ms", "42.0 s", "3.5 min"."""
    return f"{1000 * value:.2g} ms" if value < 0.1 else duration(value)
