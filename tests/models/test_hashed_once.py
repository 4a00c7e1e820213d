"""The weights of a model are hashed once in a call, however many results the call checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.shared import shared
from helpers.tiny_tasks import examples
from helpers.tiny_training import HEADS, QUICK, task

import cdt_lens as cdt
from cdt_lens.models import provenance
from cdt_lens.models.provenance import hashed_once, weight_hash
from cdt_lens.models.view import ModelView

DATA = examples()


@pytest.fixture
def view(tokenizer_folder: str) -> ModelView:
    return shared("llama", "bridge", tokenizer_folder, torch.float32)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one each time the weights are read and hashed."""
    count: list[int] = []
    true = provenance._hashed
    monkeypatch.setattr(provenance, "_hashed", lambda view: count.append(1) or true(view))
    return count


CALLS: dict[str, Callable[..., Any]] = {
    "score_heads": lambda m, base, s: cdt.score_heads(
        m, DATA, base, rules="stable", progress=False
    ),
    "one_pass": lambda m, base, s: cdt.one_pass(m, DATA, base, progress=False),
    "faithfulness_curve": lambda m, base, s: cdt.faithfulness_curve(
        m, s, DATA, base, draws=1, progress=False
    ),
    "circuit_faithfulness": lambda m, base, s: cdt.circuit_faithfulness(
        m, s.select(k=2), DATA, base, draws=1, progress=False
    ),
    "greedy_circuit": lambda m, base, s: cdt.greedy_circuit(m, s, DATA, base, k=2, progress=False),
    "trace_circuit": lambda m, base, s: cdt.trace_circuit(m, DATA, base, progress=False),
    "finetune": lambda m, base, s: cdt.finetune(m, task(), heads=s.select(k=2), **QUICK),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_hashes_the_weights_once(name: str, view: ModelView, hashed: list[int]):
    base = cdt.mean_activations(view, DATA, mlps=True, progress=False)
    scores = cdt.score_heads(view, DATA, base, rules="stable", progress=False)
    hashed.clear()
    CALLS[name](view, base, scores)
    assert len(hashed) == 1


def test_the_next_call_reads_the_weights_again(tokenizer_folder: str, view: ModelView):
    with hashed_once():
        with hashed_once():
            first = weight_hash(view)
        assert weight_hash(view) == first
    weight = view.blocks[0].attn.W_O
    with torch.no_grad():
        weight.data[0, 0, 0] += 1
    try:
        assert weight_hash(view) != first
    finally:
        with torch.no_grad():
            weight.data[0, 0, 0] -= 1


def test_a_function_that_judges_within_a_training_run_sees_the_trained_weights(view: ModelView):
    before = weight_hash(view)
    result = cdt.finetune(view, task(), heads=HEADS, judge=lambda: weight_hash(view), **QUICK)
    assert result.judged != before == weight_hash(view)
