"""The scope that each rule for `scope="auto"` would have chosen in a transfer.

The rules see validation data only. The race rule reads the runs of the cells after `race_epochs`.
Whether a choice was right is judged on the test split, afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cdt_lens.core.choices import Scope
from cdt_lens.experiments.transfer_config import TransferConfig
from cdt_lens.finetuning.scopes import choose_by_gap, choose_by_race
from cdt_lens.tasks.task import Task

_RACERS: tuple[Scope, Scope] = ("decision", "near-zero")


def choices(
    config: TransferConfig, tasks: Mapping[str, Task], before: Sequence[Mapping[str, Any]],
    cells: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return the rows of `TransferResult.auto`, for each target, seed and rule.

    Args:
        config: The settings of the experiment.
        tasks: The task in each language.
        before: The rows of the untouched proxy model.
        cells: The finished cells. A target and seed is left out unless both scopes finished.
    """
    by_place = {(c["row"]["target"], c["row"]["seed"], c["row"]["scope"]): c for c in cells}
    judged = {row["language"]: row["valid_accuracy"] for row in before}
    rows: list[dict[str, Any]] = []
    for target in config.task.targets:
        for seed in config.transfer.seeds:
            racers = {
                scope: by_place[target, seed, scope]
                for scope in _RACERS
                if by_place.get((target, seed, scope), {}).get("history")
            }
            if len(racers) == len(_RACERS):
                gap = choose_by_gap(
                    judged[config.task.source], judged[target], tasks[target].valid.chance
                )
                race = choose_by_race(_raced(racers, config.transfer.race_epochs))
                place = {"target": target, "seed": seed}
                rows += [place | _judged(choice, racers) for choice in (gap, race)]
    return rows


def _raced(racers: Mapping[Scope, Any], epochs: int) -> dict[Scope, Mapping[str, Any]]:
    """Return the first evaluation of each scope from this epoch on."""
    return {
        scope: next((row for row in cell["history"] if row["epoch"] >= epochs), cell["history"][-1])
        for scope, cell in racers.items()
    }


def _judged(choice: Any, racers: Mapping[Scope, Any]) -> dict[str, Any]:
    accuracy = {scope: cell["row"]["accuracy"] for scope, cell in racers.items()}
    tie = len(set(accuracy.values())) == 1
    better: str = "tie" if tie else max(accuracy, key=lambda scope: accuracy[scope])
    return {
        "rule": choice.rule, "chosen": choice.scope, "better": better,
        "right": tie or better == choice.scope,
        "inputs": ", ".join(f"{name} {value:.3f}" for name, value in choice.inputs.items()),
    }  # fmt: skip
