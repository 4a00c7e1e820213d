"""One process at a time in a run directory; a killed one leaves a lock that is free, no litter."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from helpers.locks import held_elsewhere

from cdt_lens.core.artifacts import load_artifact, new_folder, save_artifact
from cdt_lens.core.errors import InputError
from cdt_lens.core.run_lock import locked, remove_litter
from cdt_lens.core.scratch import scratch_folder


def test_a_second_process_is_refused_by_name_until_the_first_is_killed(tmp_path: Path):
    other = held_elsewhere(tmp_path)
    try:
        with pytest.raises(InputError, match=f"in use by process {other.pid} on ") as caught:
            locked(tmp_path).__enter__()
        assert "\n" not in str(caught.value)
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_the_blocks_of_one_thread_may_be_nested_and_those_of_two_may_not(tmp_path: Path):
    found: list[Exception] = []

    def second() -> None:
        try:
            with locked(tmp_path):
                pass
        except InputError as error:
            found.append(error)

    with locked(tmp_path / "run"), locked(tmp_path), locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "another thread" in str(found[0])
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == [], "a directory that stays empty is not left behind"


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(InputError, match="cannot be written"), locked(tmp_path / "file"):
        pass


def test_a_lock_whose_file_cannot_be_written_is_released(tmp_path: Path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(InputError, match="cannot be written .No space left"), locked(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass


def test_litter_goes_and_nothing_else(tmp_path: Path):
    """Unfinished files and folders, and tensors that no JSON beside them names."""
    deep = tmp_path / "cells"
    kept = save_artifact(deep / "a.json", {}, format="x", version=1, tensors={"t": torch.ones(2)})
    (tensors,) = deep.glob("*.safetensors")
    renamed = save_artifact(
        deep / "b.json", {}, format="x", version=1, tensors={"t": torch.ones(3)}
    )
    renamed.rename(deep / "mine.json")
    damaged = save_artifact(
        deep / "c.json", {}, format="x", version=1, tensors={"t": torch.ones(4)}
    )
    damaged.write_text(damaged.read_text()[:20])
    (tmp_path / ".notes").write_text("of a person")
    before = sorted(tmp_path.rglob("*"))
    (deep / f".scores.partial.json.{'ab' * 8}").write_text("{")
    (tmp_path / f".proxy.{'0' * 16}").mkdir()
    (tmp_path / f".proxy.{'0' * 16}" / "model.safetensors").write_bytes(b"half")
    (deep / f"a.json.{'0' * 12}.safetensors").write_bytes(tensors.read_bytes())
    (deep / f"gone.json.{'0' * 12}.safetensors").write_bytes(tensors.read_bytes())
    with locked(tmp_path):
        assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / ".lock"])
        (tmp_path / f".late.{'0' * 16}").write_text("")
    assert sorted(tmp_path.rglob("*")) == before
    for path in (kept, deep / "mine.json"):
        load_artifact(path, format="x", version=1)
    damaged.unlink()
    remove_litter(tmp_path)
    assert not list(deep.glob("c.json*"))


def test_what_live_processes_write_inside_is_no_litter(tmp_path: Path):
    """A run directory inside that is in use, and an unfinished folder whose process lives."""
    with scratch_folder(tmp_path, ".model.") as model, new_folder(tmp_path / "out") as out:
        (model / "weights").write_bytes(b"half")
        other = held_elsewhere(tmp_path / "inside")
        try:
            unfinished = tmp_path / "inside" / f".checkpoint.json.{'a' * 16}"
            unfinished.write_text("{")
            with locked(tmp_path):
                pass
            assert unfinished.exists() and (model / "weights").exists() and out.exists()
        finally:
            other.send_signal(signal.SIGKILL)
            other.communicate()
        with locked(tmp_path):
            assert not unfinished.exists()
    assert (tmp_path / "out").is_dir()
