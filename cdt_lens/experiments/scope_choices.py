"""The scope that each rule for `scope="auto"` would have chosen in a transfer.

The rules see validation data only. The race rule reads the runs of the cells after `race_epochs`.
Whether a choice was right is judged on the test split, afterwards. What the rules are is written
down before the first cell is judged (`fix_rules`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from cdt_lens.core.artifacts import content_hash, load_artifact, save_artifact
from cdt_lens.core.axes import adapter_of, check_value
from cdt_lens.core.choices import Scope
from cdt_lens.core.errors import ArtifactError
from cdt_lens.experiments.transfer_config import TransferConfig
from cdt_lens.finetuning.scopes import RACERS, ScopeChoice, choose_by_gap, choose_by_race
from cdt_lens.finetuning.transfer_result import NONE_KEEPS_ENOUGH, TIE
from cdt_lens.tasks.task import Task

_PAIR: tuple[Scope, ...] = ("decision", "near-zero")
_RULES = "cdt_lens.auto_rules"
# The cells of one target and seed by scope.
_Cells = Mapping[Scope, Mapping[str, Any]]


def fix_rules(config: TransferConfig, path: Path, finished_cells: int) -> None:
    """Write the rules down, with the time and a hash; rules that have changed are added.

    The file proves that the rules were fixed before a test split was read: `finished_cells` of its
    first entry is 0.

    Args:
        config: The settings of the experiment.
        path: The JSON file.
        finished_cells: Number of cells that are finished by now, whose test splits were read.

    Raises:
        ArtifactError: The file is damaged.
    """
    kept = _kept_rules(path) if path.exists() else []
    transfer = config.transfer
    rule = {
        "gap": {"scopes": list(_PAIR)},
        "race": {
            "scopes": [scope for scope in RACERS if scope in transfer.scopes],
            "epochs": transfer.race_epoch, "least_retention": transfer.training.least_retention,
        },
    }  # fmt: skip
    digest = content_hash(rule)
    if kept and kept[-1]["sha256"] == digest:
        return
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"rule": rule, "sha256": digest, "created": now, "finished_cells": finished_cells}
    save_artifact(path, {"rules": [*kept, entry]}, format=_RULES, version=1)


class _Entry(TypedDict):
    rule: dict[str, Any]
    sha256: str
    created: str
    finished_cells: int


def _kept_rules(path: Path) -> list[dict[str, Any]]:
    body, _ = load_artifact(path, format=_RULES, version=1)
    try:
        check_value("rules", body.get("rules"), adapter_of(list[_Entry]))
    except ValueError as error:
        raise ArtifactError(f"{path}: damaged: {error}; move it away") from error
    rules: list[dict[str, Any]] = body["rules"]
    return rules


def choices(
    config: TransferConfig, tasks: Mapping[str, Task], before: Sequence[Mapping[str, Any]],
    cells: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the rows of `TransferResult.auto`, for each target, seed and rule.

    Args:
        config: The settings of the experiment.
        tasks: The task in each language.
        before: The rows of the untouched proxy model.
        cells: The finished cells. A rule is left out for a target and seed unless two of its scopes
            finished, and all of those that are run.
    """
    by_place = {(c["row"]["target"], c["row"]["seed"], c["row"]["scope"]): c for c in cells}
    judged = {row["language"]: row["valid_accuracy"] for row in before}
    rows: list[dict[str, Any]] = []
    for target in config.task.targets:
        for seed in config.transfer.seeds:
            own = {s: by_place.get((target, seed, s), {}) for s in config.transfer.scopes}
            place = {"target": target, "seed": seed}
            if pair := _finished(own, _PAIR):
                gap = choose_by_gap(
                    judged[config.task.source], judged[target], tasks[target].valid.chance
                )
                rows.append(place | _judged(gap, pair, None))
            if racers := _finished(own, [s for s in RACERS if s in config.transfer.scopes]):
                rows.append(place | _race(config, racers, judged[config.task.source]))
    return rows


def _finished(cells: Mapping[str, Mapping[str, Any]], scopes: Sequence[Scope]) -> _Cells:
    """Return the cells of these scopes; none unless two or more are asked for and all finished."""
    found: dict[Scope, Mapping[str, Any]] = {
        s: cells[s] for s in scopes if cells.get(s, {}).get("history")
    }
    return found if 2 <= len(scopes) == len(found) else {}


def _race(config: TransferConfig, racers: _Cells, source_before: float) -> dict[str, Any]:
    least = config.transfer.training.least_retention
    rows = {
        scope: next(
            (row for row in cell["history"] if row["epoch"] >= config.transfer.race_epoch),
            cell["history"][-1],
        )
        for scope, cell in racers.items()
    }
    choice = choose_by_race(rows, least_retention=least, source_before=source_before)
    return _judged(choice, racers, least)


def _judged(choice: ScopeChoice, racers: _Cells, least_retention: float | None) -> dict[str, Any]:
    """Return whether the test split agrees: the best scope among those that keep enough there."""
    kept = {
        scope: cell["row"]["accuracy"]
        for scope, cell in racers.items()
        if least_retention is None
        # NaN: the untouched model answers nothing right, so nothing can be lost.
        or not cell["row"]["retention"] < least_retention - 1e-9
    }
    best = [scope for scope in kept if kept[scope] == max(kept.values())]
    tie = len(best) == len(racers)
    better: str = TIE if tie else ", ".join(best) or NONE_KEEPS_ENOUGH
    return {
        "rule": choice.rule, "chosen": choice.scope, "better": better,
        "right": tie or choice.scope in best,
        "inputs": ", ".join(f"{name} {value:.3f}" for name, value in choice.inputs.items()),
    }  # fmt: skip
