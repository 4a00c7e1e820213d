"""Fine-tuning and transfer in numbers: runs by target and scope, means over seeds, tables.

1. Accuracy, macro-F1 and retention (source accuracy after / before) have no unit; more is better.
2. A mean over seeds comes with their sample standard deviation; of one seed there is none.
3. The best of a column within its target carries a star, never a colour alone; means that read
   the same are starred alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from cdt_lens.viz import words
from cdt_lens.viz.table import (
    Columns,
    _cells,
    _grouped_table,
    _headings,
    _marked,
    _starred,
    table_html,
)
from cdt_lens.viz.words import (
    BELOW,
    BEST,
    Read,
    _answer,
    _rate,
    count,
    duration,
    mean_and_spread,
    mean_in_words,
    percent,
    score,
    short_count,
)

if TYPE_CHECKING:
    from cdt_lens.finetuning.result import FineTuneResult
    from cdt_lens.finetuning.transfer_result import TransferResult

UNTOUCHED = "untouched"  # the proxy checkpoint before any transfer
_MACRO_F1 = "target macro\u2011F1"  # the hyphen at which no line breaks


@dataclass(frozen=True)
class _Measure:
    """A column of the comparison: its heading, how a value reads, and which value is best."""

    heading: str
    read: Read = score
    best: Callable[[Sequence[float]], float] = max
    spread: bool = True  # shown over seeds; a cost hardly has one


_MEASURES = {
    "accuracy": _Measure("target accuracy"),
    "macro_f1": _Measure(_MACRO_F1),
    "retention": _Measure("retention"),
    "source_accuracy": _Measure("source accuracy"),
    "trained_parameters": _Measure("parameters trained (share)", short_count, min, spread=False),
    "seconds": _Measure("training time", duration, min, spread=False),
}
_RUNS: Columns = {
    "target": ("target", str),
    "scope": ("scope", str),
    "seed": ("seed", str),
    "accuracy": ("target accuracy", score),
    "macro_f1": (_MACRO_F1, score),
    "retention": ("retention", score),
    "valid_accuracy": ("validation accuracy", score),
    "valid_loss": ("validation loss (nats)", score),
    "best_epoch": ("best epoch", count),
    "learning_rate": ("learning rate", _rate),
    "stopped": ("stopped", str),
}
_HISTORY: Columns = {
    "epoch": ("epoch", count),
    "step": ("step", count),
    "train_loss": ("training loss (nats)", score),
    "target_loss": ("target loss (nats)", score),
    "target_accuracy": ("target accuracy", score),
    "target_macro_f1": (_MACRO_F1, score),
    "source_accuracy": ("source accuracy", score),
    "learning_rate": ("learning rate", _rate),
    "seconds": ("seconds", lambda value: f"{value:.1f}"),
}
_CHOICES: Columns = {
    "target": ("target", str),
    "seed": ("seed", str),
    "rule": ("rule", str),
    "chosen": ("chosen", str),
    "better": ("better on test data", str),
    "right": ("right", _answer),
    "inputs": ("what the rule saw", str),
}


def runs_of(result: TransferResult, target: str, scope: str) -> pd.DataFrame:
    """The finished runs of a target and scope, by seed; no rows where none has finished."""
    # Before the first run has finished the table may have no columns at all.
    columns = dict.fromkeys([*_RUNS, *_MEASURES, "share"])
    runs = result.cells.reindex(columns=list(columns))
    return runs[(runs["target"] == target) & (runs["scope"] == scope)].sort_values("seed")


def finished(runs: pd.DataFrame) -> int:
    """How many runs have an accuracy: those that diverged have none."""
    return int(np.isfinite(runs["accuracy"].to_numpy(dtype=float)).sum())


def untouched(result: TransferResult, language: str, measure: str) -> float:
    """A measure of the proxy checkpoint before any transfer; NaN where it was not taken."""
    rows = result.before[result.before["language"] == language]
    return float(rows[measure].iloc[0]) if len(rows) else float("nan")


def trained_in_words(result: FineTuneResult) -> str:
    """ "1,234,567 of 494,032,768 (0.25 %)"."""
    trained, total = result.trained_parameters, result.total_parameters
    return f"{count(trained)} of {count(total)} ({percent(trained / max(total, 1))})"


def history_table(result: FineTuneResult) -> Markup:
    """One row an evaluation on validation data; the epoch whose weights are kept is starred."""
    records = result.history.to_dict("records")
    rows = _cells(records, _HISTORY)
    for record, row in zip(records, rows, strict=True):
        if record["epoch"] == result.best_epoch:
            row[0] = _starred(row[0])
    caption = f"History, on validation data; {BEST} the epoch whose weights are kept"
    return table_html(_headings(_HISTORY), rows, caption=caption)


def comparison_table(result: TransferResult) -> Markup:
    """One row a scope of each target, after the untouched checkpoint; the best are starred."""
    groups = {
        target: [_untouched_row(result, target), *_scope_rows(result, target)]
        for target in result.targets
    }
    several = len(result.seeds) > 1
    notes = ["mean \u00b1 standard deviation over seeds (costs: mean)"] if several else []
    notes += [f"{BEST} best of the scopes", f"{BELOW} below the untouched proxy checkpoint"]
    headings = [measure.heading for measure in _MEASURES.values()]
    caption = f"Scopes on test data; {', '.join(notes)}"
    return _grouped_table(("target", "scope", "seeds", *headings), groups, caption=caption)


def runs_table(result: TransferResult) -> Markup:
    """Every finished run, with what was seen of it in training."""
    groups: dict[str, list[list[str]]] = {}
    for target in result.targets:
        runs = (runs_of(result, target, scope).to_dict("records") for scope in result.scopes)
        rows = [row[1:] for each in runs for row in _cells(each, _RUNS)]
        groups |= {target: rows} if rows else {}
    caption = "Every run: on test data, and what its training saw"
    return _grouped_table(_headings(_RUNS), groups, caption=caption)


def choices_table(result: TransferResult) -> Markup:
    """The scope that each rule chose, beside the one that was better after the fact."""
    rows = _cells(result.auto.to_dict("records"), _CHOICES)
    told = (f"{rule} {words}" for rule, words in right_of(result).items())
    caption = (
        f"Automatic choice of scope; right about the better of decision and near-zero: "
        f"{', '.join(told)}; {_always(result.auto)}"
    )
    return table_html(_headings(_CHOICES), rows, caption=caption)


def right_of(result: TransferResult) -> dict[str, str]:
    """How often each rule picked the better scope: {"gap": "4 of 6"}; nothing known, no entry."""
    if result.auto.empty:
        return {}
    known = result.auto[result.auto["right"].notna()]
    answers = known["right"].astype(bool).groupby(known["rule"], sort=False)
    return {str(rule): f"{int(right.sum())} of {len(right)}" for rule, right in answers}


def settings_table(entries: Mapping[str, Any], *, caption: str) -> Markup:
    """Settings or facts, one row an entry, nested ones by their path."""
    rows = [
        (f"{group} \u203a {name}" if group else name, value)
        for _, groups in words.provenance_rows([(caption, entries)])
        for group, leaves in groups.items()
        for name, value in leaves
    ]
    table = table_html(("name", "value"), rows, caption=caption)
    return Markup('<div class="settings">{}</div>').format(table)


def _always(auto: pd.DataFrame) -> str:
    """What the rules have to beat: the same scope for every target."""
    known = auto[auto["right"].notna()].drop_duplicates(["target", "seed"])
    told = (
        f"{scope} {int(known['better'].isin([scope, 'tie']).sum())} of {len(known)}"
        for scope in ("decision", "near-zero")
    )
    ties = int((known["better"] == "tie").sum())
    return f"always taking {', always '.join(told)}" + (f" ({ties} tied)" if ties else "")


def _untouched_row(result: TransferResult, target: str) -> list[str]:
    scores = {
        "accuracy": untouched(result, target, "accuracy"),
        "macro_f1": untouched(result, target, "macro_f1"),
        "retention": 1.0,  # by definition
        "source_accuracy": untouched(result, result.proxy, "accuracy"),
    }
    return [UNTOUCHED, "\u2013", *map(score, scores.values()), "0 (0 %)", "\u2013"]


def _scope_rows(result: TransferResult, target: str) -> list[list[str]]:
    runs = [runs_of(result, target, scope) for scope in result.scopes]
    columns = {}
    for name, measure in _MEASURES.items():
        before = untouched(result, target, name) if name in ("accuracy", "macro_f1") else np.nan
        columns[name] = _column([each[name] for each in runs], measure, before)
    shares = (percent(mean_and_spread(each["share"])[0]) for each in runs)
    columns["trained_parameters"] = [
        number if share == "n/a" else Markup("{} ({})").format(number, share)
        for number, share in zip(columns["trained_parameters"], shares, strict=True)
    ]
    planned = len(result.seeds)
    done = (finished(each) for each in runs)
    seeds = [str(n) if n == planned else f"{n} of {planned}" for n in done]
    return [list(row) for row in zip(result.scopes, seeds, *columns.values(), strict=True)]


def _column(runs: Sequence[pd.Series], measure: _Measure, before: float) -> list[str]:
    """One measure of each scope, the best starred unless all of them read the same."""
    means = [mean_and_spread(values)[0] for values in runs]
    known = [mean for mean in means if np.isfinite(mean)]
    read = {measure.read(mean) for mean in known}
    best = measure.read(measure.best(known)) if len(read) > 1 else None
    cells = []
    for values, mean in zip(runs, means, strict=True):
        cell = mean_in_words(values, measure.read) if measure.spread else measure.read(mean)
        if mean < before and measure.read(mean) != measure.read(before):
            cell = _marked(BELOW, "below the untouched checkpoint", cell)
        cells.append(_starred(cell) if measure.read(mean) == best else cell)
    return cells
