"""Scopes: which heads a transfer trains, and the rule that chooses a scope before training.

Scopes (CT-SFT, arXiv 2601.08146): `decision` is the circuit; `near-zero`, `random` and
`random-per-layer` are head sets of its size; `norms`, `full` and `lora` select no heads.
`gap` rule: a transfer is hard when the proxy model lost at least half of its margin over chance
on its way from the source to the target language; hard transfers take `decision`, easy ones
`near-zero`. It uses validation data and the untouched proxy model only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cdt_lens.circuits.circuit import Circuit, random_heads, random_heads_like
from cdt_lens.core.errors import InputError, did_you_mean
from cdt_lens.finetuning.options import SCOPES
from cdt_lens.models.heads import Head, all_heads

HEAD_SCOPES = ("decision", "near-zero", "random", "random-per-layer")
_HARD = 0.5


@dataclass(frozen=True)
class ScopeChoice:
    """A scope chosen by `rule` from `inputs`, before the transfer was trained."""

    rule: str
    scope: str
    inputs: Mapping[str, float]


def check_scope(scope: str) -> str:
    """`scope`, if there is one of that name.

    Raises:
        InputError: there is none.
    """
    if scope not in SCOPES:
        raise InputError(
            f"scope {scope!r}: unknown{did_you_mean(scope, SCOPES)}; expected one of "
            f"{', '.join(SCOPES)}, auto"
        )
    return scope


def scope_heads(scope: str, circuit: Circuit | None, *, seed: int = 0) -> tuple[Head, ...]:
    """The heads that `scope` trains, given the circuit; none for norms, full and lora.

    Raises:
        InputError: an unknown scope, no circuit, or one without scores for `near-zero`.
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
    """The scored heads of the smallest magnitude outside the circuit, as many as it has."""
    scores = circuit.scores
    if scores is None:
        raise InputError(
            "scope 'near-zero': the circuit has no scores; take it from HeadScores.select"
        )
    everyone = all_heads(circuit.n_layers, circuit.n_heads)
    scored = [h for h in everyone if not bool(scores[h.layer, h.head].isnan())]
    outside = [h for h in scored if h not in circuit]
    if len(outside) < len(circuit):
        raise InputError(
            f"scope 'near-zero': only {len(outside)} scored heads lie outside a circuit of "
            f"{len(circuit)}; select a smaller circuit, or score all heads"
        )
    outside.sort(key=lambda head: abs(float(scores[head.layer, head.head])))
    return tuple(sorted(outside[: len(circuit)]))


def choose_by_gap(source: float, target: float, chance: float) -> ScopeChoice:
    """The `gap` rule, from the proxy model's validation accuracies and chance, shares 0 to 1."""
    margin = source - chance
    lost = (source - target) / margin if margin > 0 else 1.0
    inputs = {"source_accuracy": source, "target_accuracy": target, "chance": chance}
    return ScopeChoice(
        "gap", "decision" if lost >= _HARD else "near-zero", {**inputs, "margin_lost": lost}
    )


def choose_by_race(rows: Mapping[str, Mapping[str, Any]]) -> ScopeChoice:
    """The `race` rule: of `decision` and `near-zero`, the better on validation after a short run.

    rows: a row of each scope's training history (see `finetune.FineTuneResult.history`); a tie in
    accuracy goes to the lower loss.
    """
    keys = {s: (rows[s]["target_accuracy"], -rows[s]["target_loss"]) for s in rows}
    inputs = {
        f"{scope}_{name}": float(row[f"target_{name}"])
        for scope, row in rows.items()
        for name in ("accuracy", "loss")
    }
    return ScopeChoice("race", max(keys, key=lambda scope: keys[scope]), inputs)
