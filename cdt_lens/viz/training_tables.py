"""Tables of fine-tuning and transfer: runs by target and scope, means over seeds, settings.

1. Accuracy, macro-F1 and retention (source accuracy after / before) have no unit; more is better.
2. A mean over several seeds comes with their sample standard deviation.
3. The best of a column within its target carries a star. Means that read the same are starred
   alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from cdt_lens.core.table import BELOW, BEST, Marked, Table, star_best
from cdt_lens.finetuning.adapt_result import AdaptResult
from cdt_lens.finetuning.result import FineTuneResult
from cdt_lens.finetuning.transfer_result import (
    NONE_KEEPS_ENOUGH,
    TIE,
    Measure,
    TransferResult,
)
from cdt_lens.tasks.intervals import share_interval
from cdt_lens.viz.words import (
    Read,
    count,
    duration,
    limits,
    mean_and_spread,
    mean_in_words,
    percent,
    provenance_rows,
    rate,
    score,
    short_count,
    yes_or_no,
)

UNTOUCHED = "untouched"  # the proxy checkpoint before any transfer
_MACRO_F1 = "target macro\u2011F1"  # with a hyphen that does not break the line

# The heading of each column, and the function that formats its values.
Columns = Mapping[str, tuple[str, Read]]


@dataclass(frozen=True)
class _Measure:
    """A column of the comparison: heading, format, best value, and whether it has a spread."""

    heading: str
    read: Read = score
    best: Callable[[Sequence[float]], float] = max
    spread: bool = True


MEASURES = {
    "accuracy": _Measure("target accuracy"),
    "macro_f1": _Measure(_MACRO_F1),
    "retention": _Measure("retention"),
    "source_accuracy": _Measure("source accuracy"),
    "related_retention": _Measure("retention of the related task"),
    "source_text_loss": _Measure("source text (nats a token)", best=min),
    "target_text_loss": _Measure("target text (nats a token)", best=min),
    "trained_parameters": _Measure("parameters trained (share)", short_count, min, spread=False),
    "seconds": _Measure("training time", duration, min, spread=False),
}
_RUNS: Columns = {
    "target": ("target", str),
    "scope": ("scope", str),
    "seed": ("seed", str),
    "accuracy": ("target accuracy", score),
    "interval": ("95 % interval", str),
    "macro_f1": (_MACRO_F1, score),
    "retention": ("retention", score),
    "valid_accuracy": ("validation accuracy", score),
    "valid_loss": ("validation loss (nats)", score),
    "best_epoch": ("best epoch", count),
    "learning_rate": ("learning rate", rate),
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
    "learning_rate": ("learning rate", rate),
    "seconds": ("seconds", lambda value: f"{value:.1f}"),
}
_CHOICES: Columns = {
    "target": ("target", str),
    "seed": ("seed", str),
    "rule": ("rule", str),
    "chosen": ("chosen", str),
    "better": ("better on test data", str),
    "right": ("right", yes_or_no),
    "inputs": ("what the rule saw", str),
}


def runs_of(result: TransferResult, target: str, scope: str) -> pd.DataFrame:
    """Return the runs of a target and a scope by seed; without rows if none has finished.

    Args:
        result: The transfer.
        target: The target language.
        scope: The scope.
    """
    # Before the first run has finished, the table may have no columns at all.
    columns = dict.fromkeys([*_RUNS, *MEASURES, "share"])
    runs = result.cells.reindex(columns=list(columns))
    return runs[(runs["target"] == target) & (runs["scope"] == scope)].sort_values("seed")


def finished(runs: pd.DataFrame) -> int:
    """Return the number of runs with an accuracy; runs that diverged have none."""
    return int(np.isfinite(runs["accuracy"].to_numpy(dtype=float)).sum())


def untouched(result: TransferResult, language: str, measure: str) -> float:
    """Return a measure of the proxy checkpoint before any transfer; NaN if it was not taken.

    Args:
        result: The transfer.
        language: The language that was measured.
        measure: The name of the measure.
    """
    rows = result.before[result.before["language"] == language]
    return float(rows[measure].iloc[0]) if len(rows) and measure in rows else float("nan")


def trained_in_words(result: FineTuneResult) -> str:
    """Return the number of trained parameters: "1,234,567 of 494,032,768 (0.25 %)"."""
    trained, total = result.trained_parameters, result.total_parameters
    return f"{count(trained)} of {count(total)} ({percent(trained / max(total, 1))})"


def history_table(result: FineTuneResult) -> Table:
    """Return one row for each evaluation; the epoch whose weights are kept is starred."""
    rows = _cells(result.history, _HISTORY)
    for epoch, row in zip(result.history["epoch"], rows, strict=True):
        if epoch == result.best_epoch:
            row[0] = Marked(row[0], BEST)
    caption = f"History, on validation data; {BEST} the epoch whose weights are kept"
    return Table(_headings(_HISTORY), rows, caption)


def comparison_table(result: TransferResult) -> Table:
    """Return one row for each scope of each target, after the untouched checkpoint."""
    rows = []
    for target in result.targets:
        scopes = [_untouched_row(result, target), *_scope_rows(result, target)]
        rows += [[target, *row] for row in scopes]
    several = len(result.seeds) > 1
    notes = ["mean \u00b1 standard deviation over seeds (costs: mean)"] if several else []
    notes += [f"{BEST} best of the scopes", f"{BELOW} below the untouched proxy checkpoint"]
    measures = _measured(result)
    headings = ["target", "scope", "seeds", *(MEASURES[name].heading for name in measures)]
    return Table(headings, rows, f"Scopes on test data; {', '.join(notes)}", grouped=True)


def _measured(result: TransferResult) -> list[str]:
    """Return the measures of the comparison; those that this result has no value of are left out.

    Files of 0.3 have no related task and no loss on text.
    """
    always = set(MEASURES) - {"related_retention", "source_text_loss", "target_text_loss"}
    known = set(result.cells.columns[result.cells.notna().any()])
    return [name for name in MEASURES if name in always | known]


def differences_table(result: TransferResult, of: str) -> Table:
    """Return the paired differences between one scope and every other, in accuracy and in loss.

    Args:
        result: The transfer.
        of: The scope.
    """
    columns = [
        "target",
        "compared with",
        "target accuracy",
        "target loss (nats)",
        "source accuracy",
    ]
    measures: tuple[Measure, ...] = ("right", "loss", "source_right")
    frames = [result.differences(of, name) for name in measures]
    rows = [
        [own[0]["target"], own[0]["other"], *map(_difference, own)]
        for own in zip(*(frame.to_dict("records") for frame in frames), strict=True)
    ]
    several = "test examples and seeds" if len(result.seeds) > 1 else "test examples, for one seed"
    caption = (
        f"{of} minus each other scope, on the same test examples: mean and 95 % interval over "
        f"{several}"
    )
    return Table(columns, rows, caption, grouped=True)


def _difference(row: Mapping[Any, Any]) -> str:
    return f"{row['difference']:+.3f} {limits((row['low'], row['high']), '+.3f')}"


def runs_table(result: TransferResult) -> Table:
    """Return every finished run, with the validation numbers of its training."""
    runs = [
        runs_of(result, target, scope).assign(interval=partial(_interval, result, target))
        for target in result.targets
        for scope in result.scopes
    ]
    rows = [row for part in runs for row in _cells(part, _RUNS)]
    caption = "Every run: on test data, and on validation data in training"
    return Table(_headings(_RUNS), rows, caption, grouped=True)


def _interval(result: TransferResult, target: str, runs: pd.DataFrame) -> list[str]:
    """Return the interval of each run's accuracy over the population of test examples."""
    examples = untouched(result, target, "examples")
    return [
        limits(share_interval(round(accuracy * examples), int(examples)), ".3f")
        if np.isfinite(accuracy * examples)
        else "n/a"
        for accuracy in runs["accuracy"].astype(float)
    ]


def choices_table(result: TransferResult) -> Table:
    """Return the scope that each rule chose, beside the one that was better on test data."""
    shares = (f"{rule} {share}" for rule, share in right_of(result).items())
    caption = (
        f"Automatic choice of scope; right about the best scope of those that the rule compares: "
        f"{', '.join(shares)}; {_always(result.auto)}"
    )
    return Table(_headings(_CHOICES), _cells(result.auto, _CHOICES), caption)


def right_of(result: TransferResult) -> dict[str, str]:
    """Return how often each rule picked the better scope: {"gap": "4 of 6 (1 tie)"}.

    Where both scopes are equally good, no choice is right or wrong.
    """
    if result.auto.empty:
        return {}
    known = result.auto[result.auto["right"].notna()]
    return {str(rule): _right(own) for rule, own in known.groupby("rule", sort=False)}


def _right(choices: pd.DataFrame) -> str:
    decided = choices[choices["better"] != TIE]
    ties = len(choices) - len(decided)
    tied = f" ({ties} tie{'s' if ties > 1 else ''})" if ties else ""
    return f"{int(decided['right'].astype(bool).sum())} of {len(decided)}{tied}"


def languages_table(result: AdaptResult) -> Table:
    """Return the accuracy of both languages before and after an adaptation, and the change."""
    rows = [
        [
            row["language"], count(row["examples"]),
            *(_with_limits(row, name) for name in ("before", "after")),
            _with_limits(row, "change", "+.3f"),
        ]
        for row in result.languages.to_dict("records")
    ]  # fmt: skip
    headings = ["language", "test rows", "accuracy before", "accuracy after", "change"]
    caption = "Accuracy on test rows, with 95 % intervals over the rows; the change is row by row"
    return Table(headings, rows, caption)


def texts_table(result: AdaptResult) -> Table | None:
    """Return the loss on the text of both languages before and after; None in older results."""
    rows = [
        [
            row["language"], count(row["examples"]), count(row["tokens"]),
            *(score(row[name]) for name in ("before", "after")),
            _with_limits(row, "change", "+.3f"),
        ]
        for row in result.texts.to_dict("records")
    ]  # fmt: skip
    headings = ["language", "test rows", "tokens", "loss before", "loss after", "change"]
    caption = (
        "Loss of the language model on the text of test rows, in nats a token (less is better), "
        "with the 95 % interval of the change over the rows"
    )
    return Table(headings, rows, caption) if rows else None


def _with_limits(row: Mapping[Any, Any], name: str, read: str = ".3f") -> str:
    return f"{row[name]:{read}} {limits_of(row, name, read)}"


def limits_of(row: Any, name: str, read: str = "+.3f") -> str:
    """Return the limits of a column of `AdaptResult.languages`, such as "[-0.054, +0.220]".

    Args:
        row: A row of the table.
        name: The column.
        read: The format of a number.
    """
    return limits((row[f"{name}_low"], row[f"{name}_high"]), read)


def trials_table(result: AdaptResult) -> Table:
    """Return the trainings of a search, the chosen one starred."""
    columns: Columns = {
        "run": ("run", str), "heads": ("heads", count), "learning_rate": ("learning rate", rate),
        "epoch": ("best epoch", count), "target_accuracy": ("target accuracy", score),
        "target_loss": ("target loss (nats)", score),
        "source_accuracy": ("source accuracy", score), "seconds": ("time", duration),
    }  # fmt: skip
    rows = _cells(result.trials, columns)
    chosen = (result.trials["run"] == result.chosen) & (
        result.trials["learning_rate"] == result.learning_rate
    )
    for row, is_chosen in zip(rows, chosen, strict=True):
        if is_chosen:
            row[0] = Marked(row[0], BEST)
    caption = (
        f"What was tried, on validation rows; {BEST} chosen. Each row is the best epoch that keeps "
        f"{result.keep:.0%} of the source accuracy; epoch 0 is the untouched model"
    )
    return Table(_headings(columns), rows, caption)


def changes_table(result: AdaptResult) -> Table:
    """Return the test rows whose answer changed, with what it was and what it is."""
    known = result.changes
    rows = [
        [row["language"], row["text"], row["label"], row["before"], row["after"], _verdict(row)]
        for row in known.to_dict("records")
    ]
    verdicts = [row[-1] for row in rows]
    caption = (
        f"Test rows whose answer changed: {verdicts.count('now right')} now right, "
        f"{verdicts.count('now wrong')} now wrong, {verdicts.count('still wrong')} still wrong"
    )
    headings = ["language", "text", "gold label", "answer before", "answer after", "verdict"]
    return Table(headings, rows, caption, sentences=True)


def _verdict(row: Mapping[Any, Any]) -> str:
    if row["after"] == row["label"]:
        return "now right"
    return "now wrong" if row["before"] == row["label"] else "still wrong"


def disagreements_table(result: TransferResult, of: str, most: int = 200) -> Table | None:
    """Return the test examples that one scope answers rightly more or less often than another.

    Args:
        result: The transfer.
        of: The scope.
        most: The maximum number of rows, those of the largest differences.

    Returns:
        The table; None if no row differs, or the result holds no test examples.
    """
    gaps = []
    for target in result.targets:
        right = {scope: _right_of_rows(result, target, scope) for scope in result.scopes}
        texts = result.test_rows.get(target, ())
        for other, values in right.items():
            shared = sorted(values.keys() & right[of].keys())
            if other == of or not shared:
                continue
            # Another seed has other answers, whatever the scope.
            own, its = (np.mean([each[s] for s in shared], axis=0) for each in (right[of], values))
            for row in np.flatnonzero(own != its).tolist():
                ours, theirs = own[row], its[row]
                verdict = f"{of} better" if ours > theirs else f"{other} better"
                shares = f"{ours:.0%}", f"{theirs:.0%}"
                text = texts[row] if row < len(texts) else (f"example {row + 1}", "n/a")
                gaps.append((-abs(ours - theirs), [target, *text, other, *shares, verdict]))
    gaps.sort(key=lambda gap: gap[0])
    headings = [
        "target", "text", "gold label", "compared with", f"{of} right", "other right", "verdict",
    ]  # fmt: skip
    caption = (
        "Test examples whose answer depends on the scope, with the share of the seeds of both that "
        f"give the right answer; {min(most, len(gaps))} of {len(gaps)}"
    )
    rows = [row for _, row in gaps[:most]]
    return Table(headings, rows, caption, sentences=True) if gaps else None


def _right_of_rows(result: TransferResult, target: str, scope: str) -> dict[int, Any]:
    """Return by seed which test rows are answered rightly, as far as it is known."""
    names = {seed: f"right|{target}|{scope}|{seed}" for seed in result.seeds}
    known = result.per_example
    return {seed: known[name].numpy() for seed, name in names.items() if name in known}


def settings_table(entries: Mapping[str, Any], *, caption: str) -> Table:
    """Return settings, one row for each entry, with the path of names of nested entries.

    Args:
        entries: The settings.
        caption: The title of the table.
    """
    rows = [
        (f"{group} \u203a {name}" if group else name, value)
        for _, groups in provenance_rows([(caption, entries)])
        for group, leaves in groups.items()
        for name, value in leaves
    ]
    return Table(("name", "value"), rows, caption, sentences=True)


def _headings(columns: Columns) -> list[str]:
    return [heading for heading, _ in columns.values()]


def _cells(frame: pd.DataFrame, columns: Columns) -> list[list[object]]:
    records: Iterable[Mapping[Any, Any]] = frame.to_dict("records")
    return [[read(record[name]) for name, (_, read) in columns.items()] for record in records]


def _always(auto: pd.DataFrame) -> str:
    """Return how often always the same scope would have been right, which the rules must beat."""
    undecided = auto["right"].isna() | auto["better"].isin([TIE, NONE_KEEPS_ENOUGH])
    decided = auto[~undecided]
    shares = []
    for rule, own in decided.groupby("rule", sort=False):
        better = own["better"].str.split(", ")
        for scope in sorted({scope for scopes in better for scope in scopes}):
            right = sum(scope in scopes for scopes in better)
            shares.append(f"{scope} ({rule}) {right} of {len(own)}")
    return f"always taking one scope: {', '.join(shares) or 'all tie'}"


def _untouched_row(result: TransferResult, target: str) -> list[object]:
    values = {
        "accuracy": score(untouched(result, target, "accuracy")),
        "macro_f1": score(untouched(result, target, "macro_f1")),
        "retention": score(1.0),  # by definition
        "source_accuracy": score(untouched(result, result.proxy, "accuracy")),
        "related_retention": score(1.0),
        "source_text_loss": score(untouched(result, result.proxy, "text_loss")),
        "target_text_loss": score(untouched(result, target, "text_loss")),
        "trained_parameters": "0 (0 %)",
    }
    return [UNTOUCHED, "\u2013", *(values.get(name, "\u2013") for name in _measured(result))]


def _scope_rows(result: TransferResult, target: str) -> list[list[object]]:
    runs = [runs_of(result, target, scope) for scope in result.scopes]
    planned = len(result.asked_seeds)
    seeds = [str(n) if n == planned else f"{n} of {planned}" for n in map(finished, runs)]
    columns = []
    for name in _measured(result):
        measure = MEASURES[name]
        before = untouched(result, target, name) if name in ("accuracy", "macro_f1") else np.nan
        shares = [part["share"] for part in runs] if name == "trained_parameters" else None
        columns.append(_column([part[name] for part in runs], measure, before, shares))
    return [list(row) for row in zip(result.scopes, seeds, *columns, strict=True)]


def _column(
    runs: Sequence[pd.Series],
    measure: _Measure,
    before: float,
    shares: Sequence[pd.Series] | None,
) -> list[object]:
    """Return one measure of every scope, the best starred unless all of them read the same."""
    means = [mean_and_spread(values)[0] for values in runs]
    cells: list[object] = []
    for index, (values, mean) in enumerate(zip(runs, means, strict=True)):
        cell = mean_in_words(values, measure.read) if measure.spread else measure.read(mean)
        share = "n/a" if shares is None else percent(mean_and_spread(shares[index])[0])
        cell += "" if share == "n/a" else f" ({share})"
        below = mean < before and measure.read(mean) != measure.read(before)
        cells.append(Marked(cell, BELOW) if below else cell)
    return star_best(cells, means, measure.read, measure.best)
