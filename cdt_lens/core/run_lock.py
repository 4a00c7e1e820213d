"""Run directories: one process at a time writes in them, and a killed one leaves no litter.

1. `locked` gives a run directory to one process. The lock is the kernel's, so that a kill releases
   it. The file `.lock` names the process, for the message to the others.
2. Nobody else writes in a locked directory. Unfinished files, and tensors that no JSON beside them
   names, are thus what a killed process left, and are removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from cdt_lens.core.artifacts import tensor_file
from cdt_lens.core.errors import CdtLensError, InputError
from cdt_lens.core.folders import check_writable
from cdt_lens.core.processes import is_main
from cdt_lens.core.scratch import is_at, remove_if_dead, take_lock

# Names as `artifacts` makes them: of unfinished files and folders, and of tensors.
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{16}")
_TENSORS = re.compile(r"(.+\.json)\.[0-9a-f]{12}\.safetensors")
# The directories that this process holds, with the thread that asked for each.
_held: dict[Path, int] = {}
_guard = threading.Lock()


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep every other process out of a run directory within the `with` block.

    The directory is made (and removed again if it stays empty), and what a killed process left in
    it is removed. A block within another one of the same thread changes nothing. Under a launcher
    the main process holds the lock.

    Args:
        folder: The run directory.

    Raises:
        InputError: Another process or thread holds the directory, or it cannot be written.
    """
    folder = Path(folder).resolve()
    if not is_main() or _held.get(folder) == threading.get_ident():
        yield
        return
    check_writable(folder)
    new = not folder.exists()
    with _guard:
        if folder in _held:
            raise InputError(_in_use(folder, "another thread of this process"))
        handle = _take(folder)
        _held[folder] = threading.get_ident()
    try:
        remove_litter(folder)
        yield
        remove_litter(folder)
    finally:
        with _guard:
            del _held[folder]
            _release(handle, folder / ".lock")
        if new:
            with contextlib.suppress(OSError):  # it holds files
                folder.rmdir()


def _take(folder: Path) -> int:
    """Return the open lock file of a directory, which this process then holds."""
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if not take_lock(handle):
                owner = os.read(handle, 200).decode("utf-8", "replace").strip()
                os.close(handle)
                raise InputError(_in_use(folder, owner or "another process"))
            if is_at(handle, path):
                break
            os.close(handle)  # Its last owner has just removed it.
        try:
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError:
            _release(handle, path)
            raise
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}); choose another place"
        ) from error
    return handle


def _in_use(folder: Path, owner: str) -> str:
    return f"{folder}: in use by {owner}; wait until it ends, or name another folder"


def _release(handle: int, path: Path) -> None:
    # Removed while it is held: whoever opened it meanwhile notices (`is_at`).
    with contextlib.suppress(OSError):
        path.unlink()
    os.close(handle)


def remove_litter(folder: Path) -> None:
    """Remove what killed processes left in a run directory that this process holds.

    Run directories inside it that are in use stay as they are.

    Args:
        folder: The run directory.
    """
    inside = (lock.parent for lock in folder.rglob(".lock") if lock.parent != folder)
    used = [place for place in inside if _in_use_now(place / ".lock")]
    for path in sorted(folder.rglob("*")):
        if any(path.is_relative_to(place) for place in used):
            continue
        if _UNFINISHED.fullmatch(path.name) or _is_orphan(path):
            with contextlib.suppress(OSError):
                remove_if_dead(path) if path.is_dir() else path.unlink()


def _in_use_now(lock: Path) -> bool:
    try:
        handle = os.open(lock, os.O_RDWR)
    except OSError:
        return lock.exists()
    try:
        return not take_lock(handle)
    finally:
        os.close(handle)


def _is_orphan(path: Path) -> bool:
    """Return whether a file holds tensors of ours that no JSON file beside it names."""
    of_json = _TENSORS.fullmatch(path.name)
    if of_json is None:
        return False
    own = path.with_name(of_json[1])
    for json_file in {own, *path.parent.glob("*.json")}:  # a person may have renamed it
        try:
            if tensor_file(json_file) == path:
                return False
        except CdtLensError:  # a damaged file does not tell what it names
            if json_file == own:
                return False
    return True
