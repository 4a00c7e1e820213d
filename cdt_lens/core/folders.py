"""Check the folder that a command will write into before it computes anything."""

from __future__ import annotations

import os
from pathlib import Path

from cdt_lens.core.errors import InputError


def check_run_folder(folder: str | Path, *own: str) -> Path:
    """Check that a folder can take the files of a run.

    Args:
        folder: The folder. It need not exist.
        own: Names of files and folders by which a folder of an earlier call is recognised.

    Returns:
        `folder` as a `Path`.

    Raises:
        InputError: The folder is a file, holds other files, or cannot be written.
    """
    folder = Path(folder)
    check_writable(folder)
    # Hidden files are no results: those of the system, and of a run that has just begun.
    held = sorted(path.name for path in _listed(folder) if not path.name.startswith("."))
    if held and not set(own) & set(held):
        raise InputError(
            f"{folder}: holds other files, such as {held[0]}, and no run of this command. Name a "
            "new or an empty folder."
        )
    return folder


def check_writable(folder: Path) -> None:
    """Check that a folder can be made, or written if it exists.

    Args:
        folder: The folder.

    Raises:
        InputError: It or one of its parents is a file, or cannot be written.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise InputError(f"{folder}: cannot be written: {nearest} is a file. Name a folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: {nearest} cannot be written to. Name another folder.")


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror or error})") from error
