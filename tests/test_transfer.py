"""A transfer experiment on a tiny model: what is measured, what is reused, what goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from saved import TEMPLATE, VERBALIZER, save_model, write_csv
from transformers import AutoModelForCausalLM

from cdt_lens import cells, training, transfer
from cdt_lens.adapter import Adapter
from cdt_lens.datasets import task_from_files
from cdt_lens.errors import InputError, NonFiniteError
from cdt_lens.evaluate import evaluate
from cdt_lens.loading import load_model
from cdt_lens.transfer import run_transfer
from cdt_lens.transfer_config import TransferConfig, config_of
from cdt_lens.transfer_result import TransferResult

SCOPES = ["full", "decision", "near-zero", "norms"]


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transfer")
    save_model(folder / "tiny")
    for number, language in enumerate(("source", "near", "far")):
        (folder / language).mkdir()
        for part, (split, size) in enumerate({"train": 24, "valid": 12, "test": 18}.items()):
            write_csv(folder / language / f"{split}.csv", size, 10 * number + part)
    return folder


def files(place: Path, language: str) -> dict[str, str]:
    return {s: str(place / language / f"{s}.csv") for s in ("train", "valid", "test")}


def settings(place: Path, **changes: Any) -> TransferConfig:
    values: dict[str, Any] = {
        "model": str(place / "tiny"),
        "task": {
            "name": "files", "source": "source", "targets": ["near", "far"],
            "template": TEMPLATE, "verbalizer": VERBALIZER,
            "files": {name: files(place, name) for name in ("source", "near", "far")},
        },
        "proxy": {"epochs": 2, "learning_rate": 3e-3},
        "discovery": {"examples": 9, "k": 2, "faithfulness_examples": 6, "draws": 2},
        "transfer": {"scopes": SCOPES, "epochs": 2, "learning_rate": 1e-2, "examples": 20},
    }  # fmt: skip
    for name, value in changes.items():
        section = values.get(name)
        values[name] = section | value if isinstance(section, dict) else value
    return config_of(values)


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[TransferResult, Path]:
    out = place / "run"
    return run_transfer(settings(place), out, quiet, progress=False), out


def test_every_cell_and_every_file(finished: tuple[TransferResult, Path]):
    result, out = finished
    assert result.cells[["target", "scope"]].to_numpy().tolist() == [
        [target, scope] for target in ("near", "far") for scope in SCOPES
    ]
    assert result.before["language"].tolist() == ["source", "near", "far"]
    again = TransferResult.load(out / "result.json")
    assert again.cells["accuracy"].tolist() == result.cells["accuracy"].tolist()
    for name in ("cells.csv", "summary.csv", "trade_off.png", "accuracies.png", "report.html"):
        assert (out / name).stat().st_size > 100
    assert not list(out.rglob("*checkpoint*")), "a finished cell leaves no checkpoint"
    # The proxy is an ordinary checkpoint.
    AutoModelForCausalLM.from_pretrained(out / "proxy")


def test_a_cell_is_the_adapter_on_the_proxy(finished: tuple[TransferResult, Path], place: Path):
    """The numbers of the table are what anyone gets from the saved adapter and the test file."""
    result, out = finished
    model = load_model(out / "proxy", backend="bridge")
    words = {"tokenizer": model.tokenizer, "template": TEMPLATE, "verbalizer": VERBALIZER}
    tasks = {n: task_from_files(files(place, n), **words) for n in ("source", "far")}
    adapter = Adapter.load(out / "adapters" / "far" / "decision-0")
    row = result.cells[(result.cells.target == "far") & (result.cells.scope == "decision")].iloc[0]
    with adapter.applied(model):
        found = evaluate(model, tasks["far"].test, tasks["far"])
        source = evaluate(model, tasks["source"].test, tasks["source"])
    assert (row.accuracy, row.macro_f1) == pytest.approx((found.accuracy, found.macro_f1))
    before = evaluate(model, tasks["source"].test, tasks["source"])
    assert row.retention == pytest.approx(source.accuracy / before.accuracy)
    assert result.before.set_index("language").loc["source", "accuracy"] == before.accuracy
    assert row.trained_parameters == adapter.elements
    assert 0 < row.share < 1


def test_nothing_is_done_twice(finished: tuple[TransferResult, Path], place: Path, monkeypatch):
    result, out = finished

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("trained or judged again")

    for module, name in ((cells, "finetune"), (cells, "evaluate"), (transfer, "finetune")):
        monkeypatch.setattr(module, name, refuse)
    again = run_transfer(settings(place), out, quiet, progress=False)
    assert again.cells.equals(result.cells)


def test_a_killed_cell_goes_on(place: Path, finished: tuple[TransferResult, Path], monkeypatch):
    """Cut off in the middle of a cell, the experiment ends with the numbers of an uncut one."""
    result, _ = finished
    out = place / "killed"
    real, steps = training.Trainer._step, []

    def cut(self: training.Trainer, index: Any, optimizer: Any, state: Any) -> Any:
        steps.append(self.name)
        if steps[-1] == "files/near decision" and state.epoch == 1:
            raise KeyboardInterrupt
        return real(self, index, optimizer, state)

    monkeypatch.setattr(training.Trainer, "_step", cut)
    with pytest.raises(KeyboardInterrupt):
        run_transfer(settings(place), out, quiet, progress=False)
    assert list(out.rglob("decision-0.checkpoint.json"))
    monkeypatch.setattr(training.Trainer, "_step", real)
    again = run_transfer(settings(place), out, quiet, progress=False)
    timing = ["seconds"]
    assert again.cells.drop(columns=timing).equals(result.cells.drop(columns=timing))
    one, two = (
        Adapter.load(run / "adapters" / "near" / "decision-0")
        for run in (out, place / "run")
    )  # fmt: skip
    for name, (index, values) in one.slices.items():
        assert index == two.slices[name][0] and torch.equal(values, two.slices[name][1])


def test_targets_and_seeds_can_be_added_later(place: Path, finished: tuple[TransferResult, Path]):
    result, _ = finished
    out = place / "grown"
    small = {"task": {"targets": ["near"]}, "transfer": {"scopes": ["norms"]}}
    run_transfer(settings(place, **small), out, quiet, progress=False)
    told: list[str] = []
    grown = {"transfer": {"scopes": ["norms"], "seeds": [0, 1]}}
    more = run_transfer(settings(place, **grown), out, told.append, progress=False)
    assert len(more.cells) == 4
    kept = result.cells[(result.cells.target == "near") & (result.cells.scope == "norms")]
    assert more.cells["accuracy"].iloc[0] == kept["accuracy"].iloc[0]
    assert "near, norms, seed 0" not in told and "near, norms, seed 1" in told


def test_another_experiment_is_not_written_over(place: Path, finished: tuple[TransferResult, Path]):
    _, out = finished
    with pytest.raises(InputError, match=r"other settings \(proxy\); name another folder"):
        run_transfer(settings(place, proxy={"epochs": 3}), out, quiet, progress=False)


def test_a_cell_that_diverges_is_told_and_the_rest_goes_on(place: Path, monkeypatch):
    real = cells.finetune

    def diverge(*args: Any, **kwargs: Any) -> Any:
        if kwargs["scope"] == "norms":
            raise NonFiniteError("step 3: the loss is nan")
        return real(*args, **kwargs)

    monkeypatch.setattr(cells, "finetune", diverge)
    few = {"task": {"targets": ["near"]}, "transfer": {"scopes": ["norms", "decision"]}}
    result = run_transfer(settings(place, **few), place / "nan", quiet, progress=False)
    norms, decision = (result.cells[result.cells.scope == s].iloc[0] for s in ("norms", "decision"))
    assert norms.stopped == "diverged: step 3: the loss is nan" and norms.accuracy != norms.accuracy
    assert decision.accuracy == decision.accuracy
    assert (place / "nan" / "report.html").exists()


def test_the_choice_of_scope_uses_validation_data_only(
    finished: tuple[TransferResult, Path], place: Path
):
    result, out = finished
    assert result.auto["rule"].tolist() == ["gap", "race"] * 2
    judged = result.before.set_index("language")["valid_accuracy"]
    for row in result.auto.to_dict("records"):
        own = result.cells[result.cells.target == row["target"]].set_index("scope")["accuracy"]
        if own["decision"] == own["near-zero"]:
            assert row["better"] == "tie" and row["right"]
        else:
            better = "decision" if own["decision"] > own["near-zero"] else "near-zero"
            assert row["better"] == better and row["right"] == (row["chosen"] == better)
        if row["rule"] == "gap":
            assert f"target_accuracy {judged[row['target']]:.3f}" in row["inputs"]
        else:
            path = out / "cells" / row["target"] / "decision-0.json"
            first = json.loads(path.read_text())["history"][1]
            assert f"decision_loss {first['target_loss']:.3f}" in row["inputs"]


def test_a_ready_proxy_checkpoint_is_used(place: Path, finished: tuple[TransferResult, Path]):
    result, out = finished
    few = {"task": {"targets": ["near"]}, "transfer": {"scopes": ["norms"]}}
    ready = {"proxy": {"checkpoint": str(out / "proxy")}}
    found = run_transfer(settings(place, **few, **ready), place / "ready", quiet, progress=False)
    assert not (place / "ready" / "proxy").exists()
    expected = result.cells[(result.cells.target == "near") & (result.cells.scope == "norms")]
    assert found.cells["accuracy"].tolist() == expected["accuracy"].tolist()


def test_files_without_a_language_are_named(place: Path, tmp_path: Path):
    task = {"targets": ["elsewhere"]}
    with pytest.raises(InputError, match=r"expected \[task\.files\.elsewhere\]"):
        run_transfer(settings(place, task=task), tmp_path / "run", quiet, progress=False)
    assert not (tmp_path / "run" / "proxy").exists(), "told before anything is trained"
