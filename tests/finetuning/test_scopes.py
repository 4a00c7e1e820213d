"""Scopes: which heads each takes, and the rules that choose between them."""

from __future__ import annotations

import pytest
import torch

from cdt_lens.circuits.circuit import Circuit, random_heads, random_heads_like
from cdt_lens.core.choices import HEAD_SCOPES
from cdt_lens.core.errors import InputError
from cdt_lens.finetuning.options import SCOPES
from cdt_lens.finetuning.scopes import (
    check_scope,
    choose_by_gap,
    choose_by_race,
    scope_heads,
)
from cdt_lens.models.heads import Head

# Largest in magnitude: L0H1 and L1H2 (negative); nearest zero: L1H0, L0H3, then L0H0 and L1H3.
SCORES = torch.tensor([[0.3, 5.0, 2.0, -0.1], [0.0, 1.0, -6.0, -0.4]])


def circuit(*heads: str, scores: torch.Tensor | None = SCORES) -> Circuit:
    return Circuit(tuple(map(Head.parse, heads or ("L0H1", "L1H2"))), 2, 4, scores)


def test_decision_is_the_circuit():
    assert scope_heads("decision", circuit()) == (Head(0, 1), Head(1, 2))


def test_near_zero_is_the_smallest_in_magnitude_outside_the_circuit():
    assert scope_heads("near-zero", circuit()) == (Head(0, 3), Head(1, 0))
    assert scope_heads("near-zero", circuit("L0H1", "L1H2", "L1H1")) == (
        Head(0, 0), Head(0, 3), Head(1, 0),
    )  # fmt: skip
    # A circuit chosen in another way may hold small heads: they are not taken twice.
    assert scope_heads("near-zero", circuit("L1H0", "L1H2")) == (Head(0, 0), Head(0, 3))


def test_near_zero_needs_scores_and_room():
    with pytest.raises(InputError, match="near-zero.*no scores.*HeadScores.select"):
        scope_heads("near-zero", circuit(scores=None))
    with pytest.raises(InputError, match="only 3 scored heads lie outside a circuit of 5"):
        scope_heads("near-zero", circuit("L0H0", "L0H1", "L0H2", "L0H3", "L1H1"))


def test_near_zero_takes_no_head_that_was_never_scored():
    values = torch.tensor([[-0.10, -0.43, torch.nan, torch.nan], [-0.12, -0.02, torch.nan, -0.15]])
    made = Circuit((Head(0, 1), Head(1, 3)), 2, 4, scores=values)
    assert scope_heads("near-zero", made) == (Head(0, 0), Head(1, 1))
    larger = Circuit((Head(0, 0), Head(0, 1), Head(1, 3)), 2, 4, scores=values)
    with pytest.raises(InputError, match="only 2 scored heads lie outside a circuit of 3"):
        scope_heads("near-zero", larger)


def test_random_scopes_are_the_controls_of_the_same_seed():
    one = circuit("L0H1", "L0H2", "L1H2")
    assert scope_heads("random", one, seed=3) == random_heads(3, 2, 4, seed=3)
    per_layer = scope_heads("random-per-layer", one, seed=3)
    assert per_layer == random_heads_like(one.heads, 2, 4, seed=3)
    assert [h.layer for h in per_layer] == [0, 0, 1]
    assert len({scope_heads("random", one, seed=s) for s in range(8)}) > 1


@pytest.mark.parametrize("scope", ["norms", "full", "lora"])
def test_other_scopes_take_no_heads(scope):
    assert scope_heads(scope, circuit()) == scope_heads(scope, None) == ()


@pytest.mark.parametrize("scope", HEAD_SCOPES)
def test_head_scopes_need_a_circuit(scope):
    for nothing in (None, Circuit((), 2, 4, SCORES)):
        with pytest.raises(InputError, match=f"scope '{scope}': expected a circuit, or heads"):
            scope_heads(scope, nothing)


def test_an_unknown_scope_names_the_nearest_and_all():
    with pytest.raises(InputError) as caught:
        check_scope("decisions")
    told = str(caught.value)
    assert "did you mean 'decision'?" in told and all(scope in told for scope in SCOPES)
    assert [check_scope(scope) for scope in SCOPES] == list(SCOPES)
    assert set(HEAD_SCOPES) < set(SCOPES)


@pytest.mark.parametrize(
    ("source", "target", "scope", "lost"),
    [
        (0.9, 0.85, "near-zero", 0.1),
        (0.9, 0.65, "decision", 0.5),  # at half of the margin a transfer is hard
        (0.9, 0.66, "near-zero", 0.48),
        (0.9, 0.3, "decision", 1.2),
        (0.9, 0.95, "near-zero", -0.1),
        (0.4, 0.4, "decision", 1.0),  # a proxy at chance has nothing to carry over
        (0.3, 0.5, "decision", 1.0),
    ],
)
def test_the_gap_rule(source, target, scope, lost):
    choice = choose_by_gap(source, target, 0.4)
    assert (choice.rule, choice.scope) == ("gap", scope)
    assert choice.inputs == pytest.approx(
        {"source_accuracy": source, "target_accuracy": target, "chance": 0.4, "margin_lost": lost}
    )


@pytest.mark.parametrize(
    ("decision", "near_zero", "scope"),
    [
        ((0.8, 0.9), (0.7, 0.1), "decision"),
        ((0.7, 0.1), (0.8, 0.9), "near-zero"),
        ((0.8, 0.5), (0.8, 0.4), "near-zero"),
        ((0.8, 0.4), (0.8, 0.5), "decision"),
    ],
)
def test_the_race_rule_takes_the_better_and_in_a_tie_the_lower_loss(decision, near_zero, scope):
    rows = {
        name: {"target_accuracy": accuracy, "target_loss": loss}
        for name, (accuracy, loss) in (("decision", decision), ("near-zero", near_zero))
    }
    choice = choose_by_race(rows)
    assert (choice.rule, choice.scope) == ("race", scope)
    assert choose_by_race(rows, least_retention=None, source_before=1.0) == choice
    assert choice.inputs == {
        "decision_accuracy": decision[0], "decision_loss": decision[1],
        "near-zero_accuracy": near_zero[0], "near-zero_loss": near_zero[1],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("least", "scope"), [(0.5, "full"), (0.8, "decision"), (0.95, "norms"), (1.0, "norms")]
)
def test_the_race_rule_takes_the_best_of_those_that_keep_enough(least, scope):
    """Source accuracy 0.9 before: `full` keeps 0.6 / 0.9 of it, `decision` 0.75, `norms` 0.88."""
    values = {"full": (0.9, 0.6), "decision": (0.8, 0.75), "norms": (0.7, 0.88)}
    rows = {
        name: {"target_accuracy": target, "target_loss": 0.1, "source_accuracy": source}
        for name, (target, source) in values.items()
    }
    choice = choose_by_race(rows, least_retention=least, source_before=0.9)
    assert choice.scope == scope
    assert choice.inputs["full_source_accuracy"] == 0.6
