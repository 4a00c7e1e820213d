"""Scopes: the heads that a transfer trains, and the rules that choose a scope before training.

Scopes (CT-SFT, arXiv 2601.08146): `decision` is the circuit; `near-zero` (`near_zero_heads`),
`random` and `random-per-layer` are sets of as many heads; `norms`, `full` and `lora` select none.
The `gap` rule calls a transfer hard if the proxy model loses at least half of its margin over
chance between the source and the target language. Hard transfers take `decision`, easy ones
`near-zero`. The rule uses validation data and the untouched proxy model only.
The `race` rule trains each of `RACERS` for a short time. It takes the one with the best validation
result among those that keep enough of the source accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cdt_lens.circuits.circuit import Circuit, near_zero_heads, random_heads, random_heads_like
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import HEAD_SCOPES, Scope, Seed
from cdt_lens.core.errors import InputError, did_you_mean
from cdt_lens.finetuning.options import SCOPES
from cdt_lens.models.heads import Head
from cdt_lens.tasks.metrics import is_kept

# The scopes that the race rule compares, the smallest first: a tie goes to it.
RACERS: tuple[Scope, ...] = ("norms", "near-zero", "decision", "lora", "full")
_HARD = 0.5


@dataclass(frozen=True)
class ScopeChoice:
    """A scope chosen before the transfer was trained.

    Args:
        rule: Name of the rule, "gap" or "race".
        scope: The chosen scope.
        inputs: The numbers that the rule used.
    """

    rule: str
    scope: Scope
    inputs: Mapping[str, float]


def check_scope(scope: str) -> str:
    """Return `scope` if it is the name of a scope.

    Raises:
        InputError: There is no such scope.
    """
    if scope not in SCOPES:
        raise InputError(
            f"scope {scope!r}: unknown{did_you_mean(scope, SCOPES)}; expected one of "
            f"{', '.join(SCOPES)}, auto"
        )
    return scope


@checked_arguments
def scope_heads(scope: str, circuit: Circuit | None, *, seed: Seed = 0) -> tuple[Head, ...]:
    """Return the heads that `scope` trains; none for norms, full and lora.

    Args:
        scope: Name of the scope.
        circuit: The circuit, whose heads or size the scope takes.
        seed: Seed of the random scopes.

    Returns:
        The heads, in order.

    Raises:
        InputError: The scope is unknown, there is no circuit, or `near-zero` is asked for a circuit
            without scores or with too few scored heads outside it.
    """
    if check_scope(scope) not in HEAD_SCOPES:
        return ()
    if circuit is None or not len(circuit):
        raise InputError(f"scope {scope!r}: expected a circuit, or heads, to take its size from")
    if scope == "decision":
        return circuit.heads
    if scope == "near-zero":
        return _near_zero(circuit)
    if scope == "random":
        return random_heads(len(circuit), circuit.n_layers, circuit.n_heads, seed=seed)
    return random_heads_like(circuit.heads, circuit.n_layers, circuit.n_heads, seed=seed)


def _near_zero(circuit: Circuit) -> tuple[Head, ...]:
    if circuit.scores is None:
        raise InputError(
            "scope 'near-zero': the circuit has no scores; take it from HeadScores.select"
        )
    return near_zero_heads(circuit.scores, circuit.heads)


@checked_arguments
def choose_by_gap(source: float, target: float, chance: float) -> ScopeChoice:
    """Choose by the `gap` rule.

    Args:
        source: Validation accuracy of the proxy model on the source language, from 0 to 1.
        target: Its validation accuracy on the target language.
        chance: Accuracy of always giving the most frequent label.
    """
    margin = source - chance
    lost = (source - target) / margin if margin > 0 else 1.0
    inputs = {"source_accuracy": source, "target_accuracy": target, "chance": chance}
    return ScopeChoice(
        "gap", "decision" if lost >= _HARD else "near-zero", {**inputs, "margin_lost": lost}
    )


def choose_by_race(
    rows: Mapping[Scope, Mapping[str, Any]], *, least_retention: float | None = None,
    source_before: float | None = None,
) -> ScopeChoice:  # fmt: skip
    """Choose by the `race` rule: the best scope on validation data after a short run.

    Args:
        rows: One row of the training history of each scope (`FineTuneResult.history`). A tie in
            accuracy goes to the lower loss.
        least_retention: Only scopes whose source accuracy is at least this share of that before are
            considered. If there is none, the scope with the highest source accuracy is chosen.
            None considers all.
        source_before: The source accuracy of the untouched model, from 0 to 1; needed with
            `least_retention`.
    """
    inputs = {
        f"{scope}_{name}": float(row[f"target_{name}"])
        for scope, row in rows.items()
        for name in ("accuracy", "loss")
    }
    able = list(rows)
    if least_retention is not None:
        kept = {scope: float(row["source_accuracy"]) for scope, row in rows.items()}
        inputs |= {f"{scope}_source_accuracy": value for scope, value in kept.items()}
        before = source_before or 0.0
        able = [scope for scope in rows if is_kept(kept[scope], before, least_retention)]
        able = able or [scope for scope in rows if kept[scope] == max(kept.values())]
    keys = {s: (rows[s]["target_accuracy"], -rows[s]["target_loss"]) for s in able}
    return ScopeChoice("race", max(keys, key=lambda scope: keys[scope]), inputs)
