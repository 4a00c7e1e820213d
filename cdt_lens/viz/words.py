"""Numbers, names and provenance as text: the one place that formats numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from cdt_lens.circuits.measures import EMPTY_RUNS
from cdt_lens.core.choices import Empty

# A number in a cell of a data frame.
Number = float | int | np.number
# The function that turns a value of a column into text.
Read = Callable[[Any], str]
# The text of each entry of a provenance, by the path of its names.
Leaves = dict[tuple[str, ...], str]
# Rows of (name, value) by group.
Groups = dict[str, list[tuple[str, str]]]


def number(value: Number, form: str) -> str:
    """Return `value` in the format `form`; "n/a" if it is not finite."""
    return format(value, form) if np.isfinite(value) else "n/a"


def score(value: Number) -> str:
    """Return an accuracy, a macro-F1, a retention or a loss: "0.712"."""
    return number(value, ".3f")


def rate(value: Number) -> str:
    """Return a learning rate in three digits."""
    return number(value, ".3g")


def count(value: Number) -> str:
    """Return a number of things: "1,234,567"."""
    return f"{round(float(value)):,}" if np.isfinite(value) else "n/a"


def short_count(value: Number) -> str:
    """Return a large number of things in three digits: "40.4 k", "1.35 M"."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if np.isfinite(value) and value >= unit:
            return f"{value / unit:.3g} {name}"
    return count(value)


def percent(share: Number) -> str:
    """Return a share of 1 in three digits, as small shares need them: "0.0812 %"."""
    return f"{100 * share:.3g} %" if np.isfinite(share) else "n/a"


def duration(seconds: Number) -> str:
    """Return a time in the unit that reads best: "42.0 s", "3.5 min", "2.2 h"."""
    if not np.isfinite(seconds):
        return "n/a"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def short_time(seconds: Number) -> str:
    """Return a time as `duration` does, and less than 0.1 s in milliseconds: "12 ms"."""
    return f"{1000 * seconds:.2g} ms" if seconds < 0.1 else duration(seconds)


def passes(value: Number) -> str:
    """Return a multiple of one forward pass: "0.02", "3.1", "81", "1,240"."""
    return number(value, ",.0f" if value >= 20 else ".1f" if value >= 1 else ".2g")


def empty_run(name: Empty) -> str:
    """Return the name of the run that counts as f = 0 in words."""
    return f"f = 0: {EMPTY_RUNS[name]}"


def yes_or_no(value: Any) -> str:
    """Return the truth of `value` as a word; "n/a" if it is missing."""
    return "n/a" if pd.isna(value) else "yes" if value else "no"


def mean_and_spread(values: pd.Series) -> tuple[float, float]:
    """Return the mean and the sample standard deviation of the finite values, NaN if too few."""
    numbers = values.to_numpy(dtype=float)
    known = numbers[np.isfinite(numbers)]
    mean = float(known.mean()) if len(known) else float("nan")
    return mean, float(known.std(ddof=1)) if len(known) > 1 else float("nan")


def mean_in_words(values: pd.Series, read: Read = score) -> str:
    """Return "0.712 \u00b1 0.014" of several seeds, "0.712" of one, "n/a" of none.

    Args:
        values: The values of the seeds.
        read: The function that formats a number.
    """
    mean, deviation = mean_and_spread(values)
    return f"{read(mean)} \u00b1 {read(deviation)}" if np.isfinite(deviation) else read(mean)


def spread(draws: Float[Tensor, " draw"]) -> str:
    """Return the median [5th, 95th percentile] of random draws."""
    if not len(draws):
        return "n/a"
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    low, middle, high = draws.double().cpu().quantile(levels).tolist()
    return f"{number(middle, 'z.3f')} [{number(low, 'z.3f')}, {number(high, 'z.3f')}]"


def limits(interval: tuple[float, float], read: str) -> str:
    """Return "[0.12, 0.34]", or "" where the limits are not known.

    Args:
        interval: The lower and the upper limit.
        read: The format of a number.
    """
    low, high = interval
    return f"[{number(low, read)}, {number(high, read)}]" if np.isfinite(low + high) else ""


def with_limits(value: float, interval: tuple[float, float]) -> str:
    """Return "0.234 [0.12, 0.34]", without the limits where they are not known.

    Args:
        value: The value.
        interval: The lower and the upper limit.
    """
    return f"{number(value, '.3f')} {limits(interval, 'z.3f')}".rstrip()


def median(draws: Float[Tensor, " draw"]) -> str:
    """Return the median of random draws."""
    return f"{float(draws.double().quantile(0.5)):.2f}" if len(draws) else "n/a"


def medians(draws: Mapping[str, Float[Tensor, " draw"]]) -> str:
    """Return the median of every random control that was drawn."""
    return ", ".join(median(values) for values in draws.values() if len(values)) or "not drawn"


def control_name(name: str) -> str:
    """Return the name of a random control; "random-per-layer" keeps the number in each layer."""
    known = {"random": "random heads", "random-per-layer": "random heads, same per layer"}
    return known.get(name, name)


def prompt_text(tokens: Sequence[str]) -> str:
    """Return the text of a prompt; tokens that lost their spaces are set apart.

    Args:
        tokens: The tokens, each decoded by itself. Some tokenizers keep the space before a word in
            its token; others drop it, and then no token holds one.
    """
    spaced = any(" " in token or "\n" in token for token in tokens)
    return "".join(tokens) if spaced or len(tokens) < 2 else " ".join(tokens)


def metric_name(name: str) -> str:
    """Return the name of a metric; "direction" is the task direction, in logits."""
    return "task direction" if name == "direction" else name


def in_words(value: object) -> str:
    """Return a plain or a nested value on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {in_words(entry)}" for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(in_words(entry) for entry in value)
    return "none" if value is None else str(value)


def provenance_rows(
    origins: Iterable[tuple[str, Mapping[str, Any]]],
) -> list[tuple[str, Groups]]:
    """Return provenance as text, with the entries that all results share only once, first.

    Args:
        origins: The name of each result, and the entries of its provenance.

    Returns:
        The name of each result, and its entries by group.
    """
    parts: list[tuple[str, Leaves]] = []
    for name, entries in origins:
        # The configuration of the model has a hundred values; the files hold it.
        shown = {key: value for key, value in entries.items() if key != "configuration"}
        part = (name, _leaves(shown))
        parts += [] if part in parts else [part]
    if len(parts) > 1:
        shared = dict(set.intersection(*(set(leaves.items()) for _, leaves in parts)))
        rest = [
            (name, {path: text for path, text in leaves.items() if path not in shared})
            for name, leaves in parts
        ]
        common = {path: text for path, text in parts[0][1].items() if path in shared}
        parts = [("Common to all results", common), *rest]
    return [(name, _grouped(leaves)) for name, leaves in parts if leaves]


def _leaves(entries: Mapping[str, Any], path: tuple[str, ...] = ()) -> Leaves:
    leaves: Leaves = {}
    for name, value in entries.items():
        inner = (*path, str(name))
        nested = isinstance(value, Mapping) and value
        leaves |= _leaves(value, inner) if nested else {inner: in_words(value)}
    return leaves


def _grouped(leaves: Leaves) -> Groups:
    """Group by the outermost name of each path; entries without one come first, under ""."""
    groups: Groups = {"": []}
    for (outer, *inner), value in leaves.items():
        group, name = (outer, " \u203a ".join(inner)) if inner else ("", outer)
        groups.setdefault(group, []).append((name, value))
    return {group: rows for group, rows in groups.items() if rows}
