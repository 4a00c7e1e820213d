"""Define `TransferResult`, the measurements of every scope on every target and on the source."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import TypedDict

from cdt_lens.core import display
from cdt_lens.core.axes import adapter_of, check_value
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Level
from cdt_lens.core.errors import InputError
from cdt_lens.core.kept import Cell
from cdt_lens.core.saved import Saved
from cdt_lens.models.provenance import Provenance
from cdt_lens.tasks.intervals import crossed_interval, paired_share_interval, share_interval

CELL_COLUMNS = (
    "target", "scope", "seed", "accuracy", "macro_f1", "source_accuracy", "source_macro_f1",
    "retention", "valid_accuracy", "valid_loss", "best_epoch", "heads", "trained_parameters",
    "share", "seconds", "learning_rate", "stopped",
)  # fmt: skip
# Columns that files of 0.3 lack: losses on test examples, in nats; losses of the language model on
# the text of the prompts, in nats a token; the accuracy on a related task, and after / before.
LATER_CELL_COLUMNS = (
    "trains", "loss", "source_loss", "source_text_loss", "target_text_loss", "related_accuracy",
    "related_retention",
)  # fmt: skip
BEFORE_COLUMNS = ("language", "accuracy", "macro_f1", "valid_accuracy", "examples")
LATER_BEFORE_COLUMNS = ("loss", "text_loss")
# What is kept of every test example.
Measure = Literal["right", "loss", "source_right", "source_loss"]
PER_EXAMPLE: tuple[Measure, ...] = ("right", "loss", "source_right", "source_loss")
_WORDS = {"target", "scope", "language", "rule", "chosen", "better", "inputs", "trains"}
_TEXT = {*_WORDS, "stopped", "right"}
AUTO_COLUMNS = ("target", "seed", "rule", "chosen", "better", "right", "inputs")
# What `better` of `auto` says where no scope is: all are equal, or none meets `least_retention`.
TIE, NONE_KEEPS_ENOUGH = "tie", "none keeps enough"
_TABLES = {"cells": CELL_COLUMNS, "before": BEFORE_COLUMNS, "auto": AUTO_COLUMNS}


class _Table(TypedDict):
    columns: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True, eq=False)
class TransferResult(Saved):
    """The measurements of a transfer experiment, finished or not.

    Attributes:
        task: name of the task.
        proxy: the source language.
        targets: the target languages.
        scopes: the names of the runs: scopes and variants of scopes.
        cells: one row for each (target, scope, seed), measured on the test split. It has accuracy
            and macro-F1 on the target, accuracy on the source after the transfer, and retention
            (after / before). `trains` is the scope of the run, losses are in nats.
        before: one row for each language, measured with the untouched proxy checkpoint.
        chance: by target, the accuracy of always choosing its most frequent label. Files of 0.3
            hold that of the first target only.
        auto: the scopes that the rules for choosing a scope chose, and whether they were the better
            ones.
        discovery: facts on the circuit of the proxy checkpoint, such as its size, the task
            direction in logits and its faithfulness.
        settings: the settings of the experiment.
        provenance: origin of the result, or None.
        per_example: for each run what it made of every test example, by
            `"measure|target|scope|seed"`: whether it was `right` (1 or 0) and the `loss` in nats,
            and the same of the source as `source_right` and `source_loss`. Empty in files of 0.3.
        test_rows: by target the prompt and the gold label of every test example, in the order of
            `per_example`. Empty in files of earlier versions.
    """

    task: str
    proxy: str
    targets: tuple[str, ...]
    scopes: tuple[str, ...]
    cells: pd.DataFrame = field(repr=False)
    before: pd.DataFrame = field(repr=False)
    chance: Mapping[str, float]
    auto: pd.DataFrame = field(repr=False)
    discovery: Mapping[str, Any] = field(default_factory=dict, repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    provenance: Provenance | None = field(default=None, repr=False)
    per_example: Mapping[str, Float[Tensor, " _example"]] = field(default_factory=dict, repr=False)
    test_rows: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict, repr=False)
    _format, _kind = "cdt_lens.transfer", "transfer result"
    _name = "result.json"

    def __repr__(self) -> str:
        facts = f"{self.proxy} to {display.few(self.targets)}", display.few(self.scopes)
        return display.line(self, self.task, *facts, f"{len(self.cells)} cells")

    def summary(self) -> pd.DataFrame:
        """Summarise the finished seeds of each (target, scope).

        Returns:
            One row for each (target, scope) with means and standard deviations. `seeds` is the
            number of seeds in the means, `asked` the number of all seeds, and `diverged` the number
            of failed runs. `accuracy_low` and `accuracy_high` are the limits of a 95 % interval
            over test examples and seeds, NaN for a file of 0.3.
        """
        rows = []
        asked = len(self.asked_seeds)
        for target in self.targets:
            for scope in self.scopes:
                of = self.cells[(self.cells["target"] == target) & (self.cells["scope"] == scope)]
                if not len(of):
                    continue
                seeds = int(of["accuracy"].notna().sum())
                row: dict[str, Any] = {"target": target, "scope": scope, "seeds": seeds}
                row |= {"asked": asked, "diverged": len(of) - seeds}
                for name in ("accuracy", "macro_f1", "source_accuracy", "retention"):
                    row[name] = float(of[name].mean())
                    row[f"{name}_std"] = float(of[name].std(ddof=1)) if len(of) > 1 else math.nan
                limits = self._accuracy_interval(target, scope)
                row["accuracy_low"], row["accuracy_high"] = limits
                row["seconds"] = float(of["seconds"].mean())
                trained = of["trained_parameters"].dropna()  # NaN where a run diverged
                row["trained_parameters"] = int(trained.iloc[0]) if len(trained) else 0
                row["share"] = float(of["share"].mean())
                rows.append(row)
        return pd.DataFrame(rows)

    def _accuracy_interval(self, target: str, scope: str) -> tuple[float, float]:
        """Return the limits of the mean accuracy over test examples and seeds."""
        found = (self.per_example.get(f"right|{target}|{scope}|{seed}") for seed in self.seeds)
        right = [values for values in found if values is not None]
        if not right:
            return math.nan, math.nan
        # Seeds that agree on every example say as much as one.
        if all(torch.equal(values, right[0]) for values in right):
            return share_interval(int(right[0].sum()), len(right[0]))
        low, high = crossed_interval(torch.stack(right))
        return max(0.0, float(low)), min(1.0, float(high))

    @checked_arguments
    def differences(
        self,
        of: str = "decision",
        measure: Measure = "right",
        level: Level = 0.95,
    ) -> pd.DataFrame:
        """Compare one scope with every other, example by example and seed by seed.

        Args:
            of: name of the scope or variant.
            measure: "right" compares accuracies on the target, "loss" the losses there in nats, and
                "source_right" and "source_loss" the same on the source.
            level: confidence level, above 0 and below 1.

        Returns:
            One row for each target and other scope: the mean `difference` (`of` minus the other)
            over the seeds that both have, and its limits `low` and `high`. Examples and seeds are
            seen as samples (`tasks.intervals.crossed_interval`). With one seed the limits say
            nothing about other seeds.

        Raises:
            InputError: there is no such run, or the file is of 0.3 and holds no test examples.
        """
        if of not in self.scopes:
            raise InputError(f"of={of!r}: expected one of {', '.join(self.scopes)}")
        if not self.per_example and len(self.cells.dropna(subset=["accuracy"])):
            raise InputError("differences: a result of cdt_lens 0.3 holds no test examples")
        rows = [
            self._difference(target, of, other, measure, level)
            for target in self.targets
            for other in self.scopes
            if other != of
        ]
        return pd.DataFrame([row for row in rows if row])

    @checked_arguments
    def among(self, sets: str) -> pd.DataFrame:
        """Place every run in the distribution of random sets of heads.

        Args:
            sets: name of a variant with `sets`, whose runs are `sets`-1, `sets`-2 and so on.

        Returns:
            One row for each target and other run, with means over its seeds: accuracy and loss (in
            nats) on the target, accuracy on the source. `as_accurate` is the share of random sets
            with at least that accuracy, `as_low_loss` the share with at most that loss, each a mean
            over the set's seeds. `above_line` is the accuracy minus that of random sets of the same
            source accuracy, by a straight line through them; NaN with fewer than three sets.

        Raises:
            InputError: there are no such runs.
        """
        parts = [(name, *name.rpartition("-")[::2]) for name in self.scopes]
        drawn = [name for name, start, number in parts if start == sets and number.isdecimal()]
        if not drawn or sets in self.scopes:
            raise InputError(f"sets={sets!r}: expected the name of a variant with random sets")
        columns = ["accuracy", "loss", "source_accuracy"]
        cells = self.cells.reindex(columns=["target", "scope", *columns])
        rows: list[dict[str, Any]] = []
        for target in self.targets:
            own = cells[cells["target"] == target].groupby("scope")[columns].mean()
            random: pd.DataFrame = own[own.index.isin(drawn)].dropna()
            means = {str(scope): values for scope, values in own.iterrows()}
            rows += [
                {"target": target, "scope": scope, **means[scope], **_placed(means[scope], random)}
                for scope in self.scopes
                if scope in means and scope not in drawn
            ]
        return pd.DataFrame(rows)

    def _difference(
        self, target: str, of: str, other: str, measure: str, level: float
    ) -> dict[str, Any]:
        """Return the row of two runs on one target; empty without a seed that both have."""
        values, seeds = [], []
        for seed in self.seeds:
            pair = [self.per_example.get(f"{measure}|{target}|{s}|{seed}") for s in (of, other)]
            if pair[0] is not None and pair[1] is not None:
                values.append(pair[0] - pair[1])
                seeds.append(seed)
        if not values:
            return {}
        stacked = torch.stack(values)
        share = measure in ("right", "source_right")
        low, high = (_share_limits if share else crossed_interval)(stacked, level)
        return {
            "target": target, "scope": of, "other": other, "difference": float(stacked.mean()),
            "low": float(low), "high": float(high), "seeds": len(seeds),
            "examples": stacked.shape[1],
        }  # fmt: skip

    @property
    def asked_seeds(self) -> list[Any]:
        """Every seed of the settings, and those that have a run."""
        wanted = self.settings.get("transfer", {}).get("seeds", ())
        return sorted({*self.seeds, *wanted})

    @property
    def seeds(self) -> list[Any]:
        """Every seed that has a run, finished or diverged."""
        return sorted(set(self.cells["seed"])) if len(self.cells) else []

    def to_dataframe(self) -> pd.DataFrame:
        """Return the cells."""
        return self.cells.copy()

    def plot(self) -> display.Figure:
        """Target accuracy against retention, a panel a target."""
        return display.figure(self)

    def _repr_html_(self) -> str:
        title = f"{self.task}: {self.proxy} to {', '.join(self.targets)}"
        return display.html(title, self.summary())

    def _to_file(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        body: dict[str, Any] = {
            "task": self.task, "proxy": self.proxy, "targets": list(self.targets),
            "scopes": list(self.scopes), "chance": dict(self.chance),
            "discovery": dict(self.discovery), "settings": dict(self.settings),
            "provenance": None if self.provenance is None else self.provenance.to_dict(),
        }  # fmt: skip
        if self.test_rows:
            rows = self.test_rows.items()
            body["test_rows"] = {target: [list(row) for row in own] for target, own in rows}
        tables = {name: frame_to_json(getattr(self, name)) for name in _TABLES}
        return body | tables, dict(self.per_example)

    @classmethod
    def _from_file(cls, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TransferResult:
        test_rows = {
            target: tuple((prompt, label) for prompt, label in rows)
            for target, rows in body.get("test_rows", {}).items()
        }
        _check_per_example(tensors, test_rows)
        provenance = body["provenance"]
        return cls(
            task=body["task"], proxy=body["proxy"], targets=tuple(body["targets"]),
            scopes=tuple(body["scopes"]), chance=_chance(body),
            discovery=body["discovery"], settings=body["settings"],
            provenance=None if provenance is None else Provenance.from_dict(provenance),
            per_example=tensors, test_rows=test_rows,
            **{name: _from_json(name, body[name]) for name in _TABLES},
        )  # fmt: skip


def _check_per_example(
    tensors: Mapping[str, Tensor], test_rows: Mapping[str, Sequence[tuple[str, str]]]
) -> None:
    """Refuse tensors that are no measure of a run, or not one value for each test example."""
    sizes = {(False, target): len(rows) for target, rows in test_rows.items()}
    for name, value in tensors.items():
        measure, _, place = name.partition("|")
        target = place.rsplit("|", 2)[0]
        of_source = measure.startswith("source_")
        key = of_source, "" if of_source else target
        if measure not in PER_EXAMPLE or value.dim() != 1 or place.count("|") < 2:
            raise ValueError(f"per_example: {name!r}: expected such as 'right|target|scope|0'")
        if sizes.setdefault(key, len(value)) != len(value):
            raise ValueError(
                f"per_example: {name!r} has {len(value)} examples, others {sizes[key]}"
            )


def _share_limits(
    changes: Float[Tensor, "seed example"], level: float
) -> tuple[float | Tensor, float | Tensor]:
    """Return the limits of a mean difference of right answers (1, 0 or -1 each).

    Few answers that differ say little about how many would in other examples. Seeds that agree on
    every example say as much as one.
    """
    first, examples = changes[0], changes.shape[1]
    if bool((changes == first).all()):
        return paired_share_interval(
            int((first > 0).sum()), int((first < 0).sum()), examples, level
        )
    _, least = paired_share_interval(0, 0, examples, level)
    low, high = crossed_interval(changes, level)
    mean = changes.double().mean()
    return torch.minimum(low, mean - least), torch.maximum(high, mean + least)


def _placed(run: pd.Series, random: pd.DataFrame) -> dict[str, int | float]:
    """Return where a run lies among random sets."""
    line = math.nan
    if len(random) > 2 and random["source_accuracy"].nunique() > 1:
        slope, start = np.polyfit(random["source_accuracy"], random["accuracy"], 1)
        line = float(run["accuracy"] - start - slope * run["source_accuracy"])
    return {
        "sets": len(random),
        "as_accurate": _share_of(random["accuracy"] >= run["accuracy"], run["accuracy"]),
        "as_low_loss": _share_of(random["loss"] <= run["loss"], run["loss"]),
        "above_line": line,
    }


def _share_of(at_least_as_good: pd.Series, run: float) -> float:
    """Return the share of random sets; NaN beside a run that diverged."""
    return math.nan if math.isnan(run) else float(at_least_as_good.mean())


def _chance(body: Mapping[str, Any]) -> dict[str, float]:
    chance = body["chance"]
    # 0.3 kept one number, the first target's.
    return dict(chance) if isinstance(chance, Mapping) else {body["targets"][0]: float(chance)}


def frame_to_json(values: pd.DataFrame) -> dict[str, Any]:
    """Return a table as JSON, which has no NaN and no numbers of numpy.

    Args:
        values: the table.
    """
    rows = [[_plain(cell) for cell in row] for row in values.itertuples(index=False)]
    return {"columns": list(values.columns), "rows": rows}


def _plain(cell: Any) -> Any:
    value = cell.item() if hasattr(cell, "item") else cell
    return None if isinstance(value, float) and math.isnan(value) else value


def frame_from_json(
    name: str, table: Mapping[str, Any], columns: Sequence[str], *, text: Set[str]
) -> pd.DataFrame:
    """Return the table that `frame_to_json` wrote: a target called "0.3" stays text.

    Args:
        name: name of the table in messages.
        table: the JSON.
        columns: columns that it has to have; it may have more.
        text: columns that are not numbers.

    Raises:
        ValueError: it is no such table.
    """
    check_value(name, table, adapter_of(_Table))
    found = table["columns"]
    if not {*columns} <= {*found} or len({*found}) < len(found):
        raise ValueError(f"{name}: expected the columns {', '.join(columns)}")
    frame = pd.DataFrame(table["rows"], columns=found)
    for column in {*map(str, frame)} - text:
        frame[column] = pd.to_numeric(frame[column])
    return frame


def _from_json(name: str, table: Mapping[str, Any]) -> pd.DataFrame:
    frame = frame_from_json(name, table, _TABLES[name], text=_TEXT)
    for column in {*map(str, frame)} & _WORDS:
        check_value(f"{name}.{column}", frame[column].tolist(), adapter_of(list[str | None]))
    return frame


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> pd.DataFrame:
    """Create a table with these columns, also without rows.

    Args:
        rows: cells by column.
        columns: the columns.

    Returns:
        The table.
    """
    return pd.DataFrame(rows, columns=list(columns))
