"""Define `TransferResult`, the measurements of every scope on every target and on the source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor
from typing_extensions import TypedDict

from cdt_lens.core import display
from cdt_lens.core.axes import adapter_of, check_value
from cdt_lens.core.kept import Cell
from cdt_lens.core.saved import Saved
from cdt_lens.models.provenance import Provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL_COLUMNS = (
    "target", "scope", "seed", "accuracy", "macro_f1", "source_accuracy", "source_macro_f1",
    "retention", "valid_accuracy", "valid_loss", "best_epoch", "heads", "trained_parameters",
    "share", "seconds", "learning_rate", "stopped",
)  # fmt: skip
BEFORE_COLUMNS = ("language", "accuracy", "macro_f1", "valid_accuracy", "examples")
_WORDS = {"target", "scope", "language", "rule", "chosen", "better", "inputs"}
_TEXT = {*_WORDS, "stopped", "right"}
AUTO_COLUMNS = ("target", "seed", "rule", "chosen", "better", "right", "inputs")
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
        scopes: the scopes.
        cells: one row for each (target, scope, seed), measured on the test split. It has accuracy
            and macro-F1 on the target, accuracy on the source after the transfer, and retention
            (after / before).
        before: one row for each language, measured with the untouched proxy checkpoint.
        chance: by target, the accuracy of always choosing its most frequent label. Files of 0.3
            hold that of the first target only.
        auto: the scopes that the rules for choosing a scope chose, and whether they were the better
            ones.
        discovery: facts on the circuit of the proxy checkpoint, such as its size, the task
            direction in logits and its faithfulness.
        settings: the settings of the experiment.
        provenance: origin of the result, or None.
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
    _format, _kind = "cdt_lens.transfer", "transfer result"

    def __repr__(self) -> str:
        facts = f"{self.proxy} to {display.few(self.targets)}", display.few(self.scopes)
        return display.line(self, self.task, *facts, f"{len(self.cells)} cells")

    def summary(self) -> pd.DataFrame:
        """Summarise the finished seeds of each (target, scope).

        Returns:
            One row for each (target, scope) with means and standard deviations. `seeds` is the
            number of seeds in the means, `asked` the number of all seeds, and `diverged` the number
            of failed runs.
        """
        rows = []
        asked = len(self.seeds)
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
                row["seconds"] = float(of["seconds"].mean())
                trained = of["trained_parameters"].dropna()  # NaN where a run diverged
                row["trained_parameters"] = int(trained.iloc[0]) if len(trained) else 0
                row["share"] = float(of["share"].mean())
                rows.append(row)
        return pd.DataFrame(rows)

    @property
    def seeds(self) -> list[Any]:
        """Every seed that has a run, finished or diverged."""
        return sorted(set(self.cells["seed"])) if len(self.cells) else []

    def to_dataframe(self) -> pd.DataFrame:
        """Return the cells."""
        return self.cells.copy()

    def plot(self) -> Figure:
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
        return body | {name: _to_json(getattr(self, name)) for name in _TABLES}, {}

    @classmethod
    def _from_file(cls, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TransferResult:
        provenance = body["provenance"]
        return cls(
            task=body["task"], proxy=body["proxy"], targets=tuple(body["targets"]),
            scopes=tuple(body["scopes"]), chance=_chance(body),
            discovery=body["discovery"], settings=body["settings"],
            provenance=None if provenance is None else Provenance.from_dict(provenance),
            **{name: _from_json(name, body[name]) for name in _TABLES},
        )  # fmt: skip


def _chance(body: Mapping[str, Any]) -> dict[str, float]:
    chance = body["chance"]
    # 0.3 kept one number, the first target's.
    return dict(chance) if isinstance(chance, Mapping) else {body["targets"][0]: float(chance)}


def _to_json(values: pd.DataFrame) -> dict[str, Any]:
    # JSON has no NaN; numpy's numbers are no JSON.
    rows = [[_plain(cell) for cell in row] for row in values.itertuples(index=False)]
    return {"columns": list(values.columns), "rows": rows}


def _plain(cell: Any) -> Any:
    value = cell.item() if hasattr(cell, "item") else cell
    return None if isinstance(value, float) and math.isnan(value) else value


def _from_json(name: str, table: Mapping[str, Any]) -> pd.DataFrame:
    """As it was: a target called "0.3" stays text, a missing number is NaN again."""
    check_value(name, table, adapter_of(_Table))
    columns = table["columns"]
    if not {*_TABLES[name]} <= {*columns} or len({*columns}) < len(columns):
        raise ValueError(f"{name}: expected the columns {', '.join(_TABLES[name])}")
    frame = pd.DataFrame(table["rows"], columns=columns)
    for column in set(frame) - _TEXT:
        frame[column] = pd.to_numeric(frame[column])
    for column in set(frame) & _WORDS:
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
