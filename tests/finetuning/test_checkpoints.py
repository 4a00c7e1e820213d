"""Checkpoints and logs of a run: whole or not at all, and of this run only."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checks import assert_same_bits

from cdt_lens.core.artifacts import content_hash, save_artifact
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.finetuning.checkpoints import Checkpoint, Log, State

KEY = {"scope": "decision", "heads": ["L0H1"], "options": {"epochs": 3, "learning_rate": 1e-3}}


def state(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    name = "blocks.0.attn.W_Q"
    return State(
        masters={name: draw(1, 4, 2)},
        best={name: draw(1, 4, 2)},
        moments={f"{name}|exp_avg": draw(1, 4, 2), f"{name}|step": torch.tensor(7.0)},
        epoch=2, step=7, best_epoch=1, loss_sum=0.1 + seed, loss_count=3, seconds=1.5,
        stopped=None, history=[{"epoch": 0, "train_loss": math.nan, "target_loss": 1 / 3}],
    )  # fmt: skip


def assert_same(found: State | None, expected: State) -> None:
    assert found is not None
    for part in ("masters", "best", "moments"):
        a, b = getattr(found, part), getattr(expected, part)
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert_same_bits(a[name], value)
    plain = ("epoch", "step", "best_epoch", "loss_sum", "loss_count", "seconds", "stopped")
    assert [getattr(found, n) for n in plain] == [getattr(expected, n) for n in plain]
    assert repr(found.history) == repr(expected.history)  # NaN is no equal of itself


def test_a_round_trip_is_exact(tmp_path: Path):
    checkpoint = Checkpoint(tmp_path / "deep" / "run.json", KEY)
    assert checkpoint.load() is None
    for seed in (0, 1):
        checkpoint.save(state(seed))
        assert_same(checkpoint.load(), state(seed))
    assert len(list(checkpoint.path.parent.iterdir())) == 2  # the old tensors are gone


def test_it_is_removed_with_its_tensors(tmp_path: Path):
    checkpoint = Checkpoint(tmp_path / "run.json", KEY)
    checkpoint.save(state())
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []
    checkpoint.remove()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"heads": ["L0H2"]}, "heads"),
        ({"scope": "norms", "heads": []}, "heads, scope"),
        ({"options": {"epochs": 4, "learning_rate": 1e-3}}, "options"),
        ({"model": "abc"}, "model"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_kept(tmp_path: Path, change, told):
    path = tmp_path / "run.json"
    Checkpoint(path, KEY).save(state())
    with pytest.raises(InputError, match=rf"{path}.*another run, .*data \({told}\); remove it"):
        Checkpoint(path, {**KEY, **change}).load()
    assert_same(Checkpoint(path, KEY).load(), state())


def test_a_key_is_compared_as_json_keeps_it(tmp_path: Path):
    Checkpoint(tmp_path / "run.json", {"heads": ("L0H1",), "3": 0.1}).save(state())
    assert_same(Checkpoint(tmp_path / "run.json", {"heads": ["L0H1"], "3": 0.1}).load(), state())


def test_a_damaged_or_foreign_file_is_refused_with_its_path(tmp_path: Path):
    checkpoint = Checkpoint(tmp_path / "run.json", KEY)
    checkpoint.save(state())
    whole = checkpoint.path.read_bytes()
    checkpoint.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=str(checkpoint.path)):
        checkpoint.load()
    save_artifact(checkpoint.path, {"key": KEY}, format="something else", version=1)
    with pytest.raises(ArtifactError, match=str(checkpoint.path)):
        checkpoint.load()
    document = json.loads(whole)
    del document["history"], document["sha256"]
    document["sha256"] = content_hash(document)
    Checkpoint(checkpoint.path, KEY).save(state())
    checkpoint.path.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=f"{checkpoint.path}: damaged: history: Field required"):
        checkpoint.load()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Killed()])
def test_a_full_disk_or_a_kill_in_the_middle_leaves_the_last_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException
):
    checkpoint = Checkpoint(tmp_path / "run.json", KEY)
    checkpoint.save(state(1))
    true, calls = os.replace, []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == call:
            raise error
        true(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", failing)
        with pytest.raises((InputError, Killed)):
            checkpoint.save(state(2))
    assert_same(checkpoint.load(), state(1))
    checkpoint.save(state(2))
    assert_same(checkpoint.load(), state(2))


# The log -------------------------------------------------------------------------------------------


def rows(log: Log) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.path.read_text("utf-8").splitlines()]


def test_lines_are_appended(tmp_path: Path):
    log = Log(tmp_path / "deep" / "log.jsonl")
    for step in (1, 2):
        log.write({"step": step, "loss": 0.5})
    assert rows(log) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]


def test_a_cut_drops_later_steps_and_a_line_cut_short(tmp_path: Path):
    log = Log(tmp_path / "log.jsonl")
    log.cut(3)  # nothing is there yet
    assert not log.path.exists()
    for step in range(6):
        log.write({"step": step})
    with open(log.path, "a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')
    log.cut(3)
    assert [row["step"] for row in rows(log)] == [0, 1, 2, 3]
    log.write({"step": 4})
    assert [row["step"] for row in rows(log)] == [0, 1, 2, 3, 4]
    log.cut(-1)
    assert log.path.read_text() == ""


def test_a_place_that_cannot_be_written_is_a_persons_mistake(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="file/log.jsonl: cannot be written.*checkpoint is whole"):
        Log(tmp_path / "file" / "log.jsonl").write({"step": 1})


@pytest.mark.parametrize("line", ['{"text": "a", "label": "b"}', "[1]", "text,label", '"step"'])
def test_a_file_that_is_no_log_is_never_cut(tmp_path: Path, line: str):
    """Somebody's data: a wrong name must not cost them."""
    path = tmp_path / "train.jsonl"
    path.write_text(f"{line}\n{line}\n", "utf-8")
    for step in (-1, 3):
        with pytest.raises(InputError, match="train.jsonl, line 1: not a line of a training log"):
            Log(path).cut(step)
    assert path.read_text("utf-8") == f"{line}\n{line}\n"
    path.write_text(line, "utf-8")  # also where it is the only line
    with pytest.raises(InputError, match="line 1: not a line of a training log"):
        Log(path).cut(-1)
    assert path.read_text("utf-8") == line
