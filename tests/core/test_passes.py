"""The record of batch size, rows and progress checks them for every public function."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
from helpers.checks import unchecked_types
from helpers.shared import shared
from helpers.terminal import Terminal
from helpers.tiny_tasks import examples, many

import cdt_lens as cdt
from cdt_lens.circuits.ablation import circuit_metric
from cdt_lens.core.errors import InputError
from cdt_lens.core.passes import Passes
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.models.heads import Head
from cdt_lens.scoring.edge_scores import score_edges
from cdt_lens.scoring.methods import METHODS, score_by
from cdt_lens.scoring.one_pass import position_relevance
from cdt_lens.tasks.evaluate import evaluate

WRONG = [
    ("batch_size", 0), ("batch_size", -1), ("batch_size", 2.5), ("batch_size", True),
    ("batch_size", "4"), ("batch_size", None), ("rows", 0), ("rows", 1.0), ("rows", True),
    ("progress", 1), ("progress", None), ("progress", "no"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_values_that_mean_nothing_are_refused(name: str, value: Any):
    with unchecked_types(), pytest.raises(InputError, match=f"{name}={value!r}: expected"):
        Passes(**{name: value})


def test_integers_of_numpy_are_integers():
    with unchecked_types():
        passes = Passes(np.int64(4), np.int32(9))
    assert (passes.batch_size, passes.rows) == (4, 9)
    assert type(passes.batch_size) is type(passes.rows) is int
    assert Passes() == Passes(16, None, True)


def test_batches_are_those_of_the_examples():
    data = examples()
    sizes = [len(batch.index) for batch in Passes(4).batches(data)]
    assert sizes == [len(batch.index) for batch in data.batches(4)]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_log_holds_no_progress_bar(terminal, monkeypatch):
    written = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", written)
    with Passes().bar(name="heads", total=2) as bar:
        bar.update(2)
    assert ("heads: 100%" in written.getvalue()) is terminal
    assert terminal or not written.getvalue()


@pytest.mark.parametrize(("rules", "exact"), [("two-ended", "all"), ("ablation", 3)])
def test_a_sweep_counts_its_layers(rules, exact, tokenizer_folder, monkeypatch):
    """A head of the first layer costs as many steps of the bar as the model has layers."""
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    baseline = mean_activations(view, data, progress=False)
    monkeypatch.setattr("sys.stderr", written := Terminal())
    monkeypatch.setattr("cdt_lens.core.passes.BAR", "<{n_fmt}/{total_fmt}>")
    cdt.score_heads(view, data, baseline, rules=rules, exact=exact, batch_size=1)
    done = [tuple(map(int, pair)) for pair in re.findall(r"<(\d+)/(\d+)>", written.getvalue())]
    batches = len(data) if exact == "all" else exact
    steps = batches * sum(view.n_heads * (1 + layer) for layer in range(view.n_layers))
    assert (steps, steps) in done


def test_every_public_function_refuses_them(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    baseline = mean_activations(view, data, progress=False)
    scores = score_by("random", view, data, baseline)
    circuit = scores.select(k=1)
    sized: list[Any] = [
        lambda **o: mean_activations(view, data, **o),
        lambda **o: circuit_metric(view, [()], data, baseline, **o),
        lambda **o: cdt.faithfulness_curve(view, scores, data, baseline, **o),
        lambda **o: cdt.circuit_faithfulness(view, circuit, data, baseline, **o),
        lambda **o: cdt.greedy_circuit(view, scores, data, baseline, k=1, **o),
        lambda **o: score_edges(view, data, baseline, **o),
        lambda **o: cdt.compare_methods(view, data, many(6), baseline, **o),
        *(lambda n=name, **o: score_by(n, view, data, baseline, **o) for name in METHODS),
        lambda **o: position_relevance(view, data, baseline, **o),
        lambda **o: evaluate(view, data, **o),
    ]
    for call in sized:
        with pytest.raises(InputError, match="batch_size=0: expected a whole number of at least 1"):
            call(batch_size=0)
    for call in (*sized[1:7], lambda **o: cdt.decompose(view, data, [Head(0, 0)], baseline, **o)):
        with pytest.raises(InputError, match="rows=0: expected a whole number of at least 1"):
            call(rows=0)
