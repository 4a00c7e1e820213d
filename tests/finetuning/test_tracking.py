"""Trackers get each step once: read back by TensorBoard's own reader and by W&B's."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType
from helpers.tiny_training import HEADS, QUICK, task
from helpers.wrapped import view
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cdt_lens as cdt
from cdt_lens.core.errors import InputError
from cdt_lens.finetuning.finetune import finetune
from cdt_lens.finetuning.result import FineTuneResult
from cdt_lens.finetuning.tracking import Tracking
from cdt_lens.finetuning.trainer import Trainer
from cdt_lens.models.view import ModelView

EPOCHS, STEPS = 4, 12  # 13 examples in batches of 5


class Seen(GeneralTracker):
    """A tracker of a user's own, which keeps everything that it is given."""

    name, requires_logging_directory = "seen", False

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.config: list[dict[str, Any]] = []
        self.calls: list[str] = []

    @property
    def tracker(self) -> Any:
        return self.rows

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.rows.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.fixture(scope="module")
def model(tokenizer_folder: str) -> ModelView:
    return view("llama", "bridge", tokenizer_folder, torch.float32)


def run(model: ModelView, **more: Any) -> FineTuneResult:
    options = {**QUICK, "epochs": EPOCHS}
    return finetune(model, task(), heads=HEADS, source=task("source", seed=50), **options, **more)


def interrupted(monkeypatch: pytest.MonkeyPatch, n: int, call: Callable[[], Any]) -> None:
    """Make a call whose `n`-th step is interrupted."""
    true, steps = Trainer._step, []

    def step(self: Trainer, *args: Any) -> Any:
        steps.append(args)
        if len(steps) == n:
            raise KeyboardInterrupt
        return true(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            call()


def scalars(folder: Path, *, purge: bool = True) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder; without `purge` also what it would hide."""
    reader = EventAccumulator(str(folder), purge_orphaned_data=purge).Reload()
    return {
        tag: [(event.step, event.value) for event in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def check_against_the_log(found: dict[str, list[tuple[int, float]]], log: Path) -> None:
    rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    steps = [row for row in rows if "kind" not in row]
    assert [step for step, _ in found["train/loss"]] == list(range(1, STEPS + 1))
    for name in ("loss", "learning_rate", "grad_norm", "epoch"):
        assert found[f"train/{name}"] == [
            (row["step"], pytest.approx(row[name], rel=1e-6)) for row in steps
        ]
    looks = [row for row in rows if "kind" in row]
    assert [row["step"] for row in looks] == [0, 3, 6, 9, 12]
    for name in ("target_loss", "target_accuracy", "source_accuracy"):
        assert found[f"validation/{name}"] == [
            (row["step"], pytest.approx(row[name], rel=1e-6)) for row in looks
        ]


def test_tensorboard_reads_every_step_and_evaluation(model, tmp_path):
    log, folder = tmp_path / "log.jsonl", tmp_path / "logs"
    result = run(model, log=log, log_with="tensorboard", logging_dir=folder)
    found = scalars(folder, purge=False)
    check_against_the_log(found, log)
    accuracy = [value for _, value in found["validation/target_accuracy"]]
    assert accuracy == pytest.approx(result.history["target_accuracy"].tolist(), rel=1e-6)
    (config,) = folder.glob("*/hparams.yml")
    assert "scope: decision" in config.read_text("utf-8")
    # Another run into the same folder takes the place of the first.
    run(model, log_with=LoggerType.TENSORBOARD, logging_dir=folder)
    assert scalars(folder)["train/loss"] == found["train/loss"]


@pytest.mark.parametrize(
    ("n", "every"),
    [
        (2, None),  # before any checkpoint
        (6, None),  # two steps after one
        (6, 2),
    ],
)
def test_a_resumed_run_sends_no_step_twice_and_loses_none(n, every, model, tmp_path, monkeypatch):
    log, folder, seen = tmp_path / "log.jsonl", tmp_path / "logs", Seen()
    given: dict[str, Any] = {
        "log": log, "log_with": ["tensorboard", seen], "logging_dir": folder,
        "checkpoint": tmp_path / "run.json", "checkpoint_every": every,
    }  # fmt: skip
    interrupted(monkeypatch, n, lambda: run(model, **given))
    assert seen.calls == ["start", "finish"]
    before = len(seen.rows)
    run(model, **given)
    check_against_the_log(scalars(folder, purge=n == 2), log)
    # Without a checkpoint the run begins anew, for its trackers too.
    sent = seen.rows[before:] if n == 2 else seen.rows
    steps = [step for step, values in sent if "train/loss" in values]
    assert steps == list(range(1, STEPS + 1))
    assert [step for step, values in sent if "train/loss" not in values] == [0, 3, 6, 9, 12]
    assert len(seen.config) == (2 if n == 2 else 1)
    assert seen.calls == ["start", "finish"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "logs"]


def test_trackers_may_join_a_run_that_resumes(model, tmp_path, monkeypatch):
    seen, place = Seen(), tmp_path / "run.json"
    interrupted(monkeypatch, 6, lambda: run(model, checkpoint=place))
    run(model, checkpoint=place, log_with=seen)
    assert [step for step, values in seen.rows if "train/loss" in values] == list(
        range(4, STEPS + 1)
    )
    assert len(seen.config) == 1


def test_a_finished_run_that_is_kept_sends_nothing_again(model, tmp_path):
    seen = Seen()
    given: dict[str, Any] = {
        "log_with": seen,
        "checkpoint": tmp_path / "run.json",
        "keep_checkpoint": True,
    }
    first = run(model, **given)
    rows = list(seen.rows)
    assert run(model, **given).history.equals(first.history)
    assert seen.rows == rows and seen.calls == ["start", "finish"]
    config = seen.config[0]
    assert config["scope"] == "decision" and config["heads"] == " ".join(HEADS)
    assert config["learning_rate"] == QUICK["learning_rate"]


def test_tracking_changes_no_bit_of_the_training(model, tmp_path):
    plain = run(model)
    tracked = run(model, log_with="tensorboard", logging_dir=tmp_path)
    assert tracked.adapter.slices.keys() == plain.adapter.slices.keys()
    for name, (_, value) in plain.adapter.slices.items():
        assert tracked.adapter.slices[name][1].equal(value)


class Failing(Seen):
    """A tracker that cannot finish."""

    def finish(self) -> None:
        super().finish()
        raise OSError("no room for the rest")


def test_a_record_that_cannot_be_written_is_told_and_every_tracker_finishes(tmp_path):
    """Even where the first cannot, which says less than the record's error."""
    trackers, record = (Failing(), Seen()), tmp_path / "run" / ".run.tracked"
    with (
        pytest.raises(InputError, match=r"\.run\.tracked: cannot be written .*checkpoint is whole"),
        Tracking(trackers, None, "run", {}, record) as tracking,
    ):
        tracking.begin(0)
        record.unlink()
        record.parent.rmdir()
        record.parent.touch()
        tracking.log({"step": 1, "loss": 0.5})
    assert [tracker.calls for tracker in trackers] == [["start", "finish"]] * 2


def test_one_tracker_that_cannot_finish_keeps_no_other_from_it():
    trackers = (Seen(), Failing(), Seen())
    with (
        pytest.raises(OSError, match="no room for the rest"),
        Tracking(trackers, None, "run", {}, None) as tracking,
    ):
        tracking.begin(0)
        tracking.log({"step": 1, "loss": 0.5})
    assert [tracker.calls for tracker in trackers] == [["start", "finish"]] * 3


def wandb_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a file of W&B: records of its protocol in a log of blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole, rows = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, part = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if part in (1, 4):  # the whole of a record, or its last part
            record = Record()
            record.ParseFromString(whole)
            items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            rows += [{name: float(value) for name, value in items.items()}] if items else []
            whole = b""
    return rows


def test_wandb_writes_one_run_without_a_network(model, tmp_path, monkeypatch):
    """A resumed run has the same id, by which W&B joins the two."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = tmp_path / "log.jsonl"
    given: dict[str, Any] = {
        "log": log, "log_with": "wandb", "checkpoint": tmp_path / "run.json"
    }  # fmt: skip
    # The names of W&B's folders tell seconds apart.
    interrupted(monkeypatch, 6, lambda: run(model, **given, logging_dir=tmp_path / "1"))
    run(model, **given, logging_dir=tmp_path / "2")
    assert wandb.run is None
    wandb.teardown()  # waits until the files are written
    paths = sorted(tmp_path.glob("*/wandb/offline-run-*/*.wandb"))
    assert len(paths) == 2 and paths[0].name == paths[1].name
    rows = [row for path in paths for row in wandb_rows(path) if "train/loss" in row]
    expected = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert [(row["_step"], row["train/loss"]) for row in rows] == [
        (row["step"], row["loss"]) for row in expected if "kind" not in row
    ]


@pytest.mark.parametrize(
    ("log_with", "told"),
    [
        ("tensorbord", "log_with: Unsupported logging capability: tensorbord"),
        ("tensorboard", "requires a `logging_dir`"),
        ("all", "tensorboard writes files; give their folder as logging_dir="),
        (3, "expected names of trackers or GeneralTracker of accelerate, got int"),
        (["seen", None], "got NoneType"),
    ],
)
def test_trackers_that_cannot_be_used_are_refused_before_training(log_with, told, model):
    with pytest.raises(InputError, match=told):
        run(model, log_with=log_with)


def test_a_tracker_that_is_not_installed_is_refused_with_its_package(model, tmp_path):
    known = {"comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio"}
    missing = sorted(known - {str(name) for name in get_available_trackers()})[0]
    with pytest.raises(InputError, match=f"is not installed; run pip install {missing}"):
        run(model, log_with=missing, logging_dir=tmp_path)


def test_a_folder_without_trackers_is_refused(model, tmp_path):
    with pytest.raises(InputError, match='logging_dir=.*expected log_with="tensorboard"'):
        cdt.finetune(model, task(), heads=HEADS, logging_dir=tmp_path)
