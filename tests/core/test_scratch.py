"""Temporary folders: gone afterwards, also those of processes that were killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers.places import ROOT

from cdt_lens.core.scratch import scratch_folder, temporary_folder

HOLD = """
import sys, time
from pathlib import Path
from cdt_lens.core.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1]), "made.") as folder:
    (folder / "file").write_text("text")
    print(folder, flush=True)
    time.sleep(60)
"""


def test_a_folder_is_new_and_gone_afterwards(tmp_path: Path):
    with scratch_folder(tmp_path, "a[*].") as one, scratch_folder(tmp_path, "a[*].") as two:
        (one / "deep").mkdir()
        assert one != two and sorted(tmp_path.iterdir()) == sorted([one, two])
    with pytest.raises(ZeroDivisionError), scratch_folder(tmp_path, "b.") as one:
        raise ZeroDivisionError
    with scratch_folder(tmp_path, "c.") as one:
        one.rename(tmp_path / "kept")
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]


def test_that_of_a_killed_process_goes_and_that_of_a_living_one_stays(tmp_path: Path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    others = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    folders = [Path(p.stdout.readline().strip()) for p in others if p.stdout is not None]
    try:
        others[0].send_signal(signal.SIGKILL)
        others[0].communicate()
        (tmp_path / "made.by a person").mkdir()
        assert (folders[0] / "file").exists()
        with scratch_folder(tmp_path, "made."):
            pass
        assert not folders[0].exists()
        assert (folders[1] / "file").exists() and (tmp_path / "made.by a person").exists()
    finally:
        for process in others:
            if process.returncode is None:
                process.kill()
                process.communicate()


def test_the_systems_place_is_private(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder() as folder:
        assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    assert list(tmp_path.iterdir()) == []
