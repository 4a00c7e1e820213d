"""Circuits are measured once, with the numbers of the ablation, and kept for the next call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import by_hand
from helpers.shared import shared
from helpers.tiny_tasks import examples, many
from helpers.wrapped import wrap

from cdt_lens.circuits.ablation import circuit_metric
from cdt_lens.comparing import measured_circuits as module
from cdt_lens.comparing.measured_circuits import MeasuredCircuits
from cdt_lens.core.errors import InputError
from cdt_lens.core.kept import Kept
from cdt_lens.core.passes import Passes
from cdt_lens.decomposition.baseline import Baseline, mean_activations, zero_baseline
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.provenance import model_key
from cdt_lens.models.view import ModelView
from cdt_lens.models.weights import named_weights

ONE, TWO = (Head(0, 1),), (Head(0, 2), Head(1, 3))


class Counted:
    """Counts the circuits that are really measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[Head, ...]] = []
        true = module.measure_circuits

        def measure(view: ModelView, circuits: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen += circuits
            return true(view, circuits, *args, **kwargs)

        monkeypatch.setattr(module, "measure_circuits", measure)


def setting(folder: str) -> tuple[ModelView, Baseline]:
    view = shared("gpt2", "bridge", folder, torch.float32)
    return view, mean_activations(view, examples(), progress=False)


def measured(view: ModelView, baseline: Baseline, path: Path | None = None, **more: Any) -> Any:
    said = more.pop("said", [])
    data = more.pop("data", many())
    return MeasuredCircuits(view, data, baseline, path, said.append, progress=False, **more)


def test_it_is_the_metric_of_the_ablation(tokenizer_folder):
    view, baseline = setting(tokenizer_folder)
    circuits = measured(view, baseline)
    wanted = [tuple(all_heads(2, 4)), (), ONE, TWO]
    expected = circuit_metric(view, wanted, many(), baseline, progress=False).tolist()
    full, empty, *rest = expected
    assert (circuits.full, circuits.empty) == pytest.approx((full, empty), abs=1e-6)
    f = circuits.curve([(), ONE, TWO, wanted[0]])
    assert (f[0], f[-1]) == (0.0, 1.0)
    assert f[1:3] == pytest.approx([(m - empty) / (full - empty) for m in rest], abs=1e-5)


def test_each_circuit_is_measured_once_in_any_order_of_its_heads(tokenizer_folder, monkeypatch):
    view, baseline = setting(tokenizer_folder)
    count = Counted(monkeypatch)
    circuits = measured(view, baseline)
    circuits.measure([ONE, TWO, ONE])
    circuits.curve([TWO[::-1], ()])
    circuits.measure([])
    assert count.seen == [tuple(all_heads(2, 4)), (), ONE, TWO]


def test_what_was_measured_is_there_for_the_next_call(tokenizer_folder, monkeypatch, tmp_path):
    view, baseline = setting(tokenizer_folder)
    first = measured(view, baseline, tmp_path / "c.json")
    first.measure([ONE])
    count = Counted(monkeypatch)
    again = measured(view, baseline, tmp_path / "c.json")
    again.measure([ONE, TWO])
    assert count.seen == [TWO]
    assert again.f(ONE) == first.f(ONE)
    assert (again.full, again.empty) == (first.full, first.empty)


def test_values_of_examples_average_to_f(tokenizer_folder, tmp_path):
    view, baseline = setting(tokenizer_folder)
    circuits = measured(view, baseline, tmp_path / "c.json")
    f = torch.tensor(circuits.curve([ONE, TWO, ()]))
    effects = circuits.effects([ONE, TWO, ()])
    assert effects.shape == (3, 24) and effects.dtype == torch.float32
    labels = [e.label for e in many()]
    means = [effects[:, [own == label for own in labels]].mean(1) for label in set(labels)]
    torch.testing.assert_close(torch.stack(means).mean(0), f, rtol=0, atol=1e-5)
    again = measured(view, baseline, tmp_path / "c.json").effects([ONE[::-1], TWO, ()])
    assert again.equal(effects)


def test_a_file_of_means_alone_is_measured_again_with_the_reason(
    tokenizer_folder, monkeypatch, tmp_path
):
    view, baseline = setting(tokenizer_folder)
    path = tmp_path / "c.json"
    key = {"model": model_key(view), "data": many().hash, "baseline": baseline.hash}
    Kept(path, "cdt_lens.measured_circuits", key).keep({"metric": {"": 0.5, "L0H1": 0.1}})
    count, said = Counted(monkeypatch), []
    measured(view, baseline, path, said=said).measure([ONE])
    assert ONE in count.seen and "other settings or data (form)" in said[0]
    # A file whose tensors are not those of its circuits is no help, either.
    Kept(path, "cdt_lens.measured_circuits", {**key, "form": "by example"}).keep(
        {"circuits": ["", "L0H1"]}, {"table": torch.zeros(1, 24)}
    )
    count.seen.clear(), said.clear()
    measured(view, baseline, path, said=said).measure([ONE])
    assert ONE in count.seen and "values are missing" in said[0]


def test_of_other_data_nothing_is_taken(tokenizer_folder, monkeypatch, tmp_path):
    view, baseline = setting(tokenizer_folder)
    path = tmp_path / "c.json"
    measured(view, baseline, path).measure([ONE])
    count, said = Counted(monkeypatch), []
    measured(view, zero_baseline(view, examples()), path, said=said).measure([ONE])
    assert ONE in count.seen and "other settings or data" in said[0]
    count.seen.clear()
    measured(view, baseline, path, data=examples(), said=said).measure([ONE])
    assert ONE in count.seen
    path.write_text(path.read_text("utf-8")[:40], "utf-8")
    said.clear()
    measured(view, baseline, path, said=said)
    assert "damaged" in said[0]


def test_the_run_that_counts_as_empty_is_the_one_that_is_checked(tokenizer_folder, monkeypatch):
    """Heads that write nothing explain nothing, but a run without MLPs and input still differs."""
    view = ModelView(wrap("gpt2", "bridge", tokenizer_folder, torch.float32))
    with torch.no_grad():
        for name, weight in named_weights(view).items():
            if name.endswith(("attn.W_O", "attn.b_O")):
                weight.zero_()
    baseline = mean_activations(view, examples(), mlps=True, progress=False)
    with pytest.raises(InputError, match="nothing to explain"):
        measured(view, baseline)
    circuits = measured(view, baseline, empty_run="all")
    assert abs(circuits.full - circuits.empty) > 0.01
    assert circuits.curve([(), ONE]) == pytest.approx([1.0, 1.0], abs=1e-5)

    plain, _ = setting(tokenizer_folder)
    known = mean_activations(plain, examples(), mlps=True, progress=False)
    every = module.measure_circuits(
        plain, [all_heads(2, 4)], many(), known, passes=Passes(16, progress=False)
    ).table[0]
    monkeypatch.setattr(module, "empty_metric", lambda *_, **__: every + 1e-6)
    with pytest.raises(InputError, match="nothing to explain"):
        measured(plain, known, empty_run="all")


def test_heads_that_change_nothing_are_refused(tokenizer_folder, monkeypatch):
    view, baseline = setting(tokenizer_folder)
    monkeypatch.setattr(module, "measure_circuits", by_hand.flat_measurement(0.5))
    with pytest.raises(InputError, match="nothing to explain"):
        measured(view, baseline)
