"""Folders to write into: new, empty and own ones are taken, others are refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdt_lens.core.errors import InputError
from cdt_lens.core.folders import check_run_folder


def test_new_empty_and_own_folders_are_taken(tmp_path: Path):
    assert check_run_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    check_run_folder(str(tmp_path))
    (tmp_path / ".hidden").touch()
    check_run_folder(tmp_path)
    (tmp_path / "run.json").touch()
    (tmp_path / "notes.txt").touch()
    check_run_folder(tmp_path, "run.json")
    assert not (tmp_path / "a").exists()


def test_files_and_foreign_folders_are_refused(tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="holds other files, such as notes.txt, .* empty folder"):
        check_run_folder(tmp_path, "run.json")
    for place in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "run"):
        with pytest.raises(InputError, match="notes.txt is a file. Name a folder"):
            check_run_folder(place)
