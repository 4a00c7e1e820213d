"""Temporary folders of which a killed process leaves nothing behind.

A folder is locked (by the kernel, so that a kill releases it) as long as its process lives. Whoever
makes the next one with the same prefix removes those that nobody holds any more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Some file systems have no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def take_lock(handle: int) -> bool:
    """Take the lock of an open file or folder without waiting.

    Args:
        handle: The file descriptor. The lock lasts until it is closed.

    Returns:
        Whether this process holds the lock. A system without locks gives it to everybody.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return True


def is_at(handle: int, path: Path) -> bool:
    """Return whether an open file or folder is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield an empty folder in the system's place for them, which only this user may read."""
    # Version 0.3 named its folders cdt-lens-* and held no lock.
    with scratch_folder(Path(tempfile.gettempdir()), "cdt-lens.", mode=0o700) as folder:
        yield folder


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str, *, mode: int = 0o777) -> Iterator[Path]:
    """Yield an empty folder and remove it afterwards, unless the block has moved it elsewhere.

    Folders with the same prefix that killed processes left are removed as well.

    Args:
        parent: The folder to make it in.
        prefix: How its name begins.
        mode: Its permissions, before the umask.

    Yields:
        The folder.

    Raises:
        OSError: The folder cannot be made.
    """
    if fcntl is not None:
        _remove_dead(parent, prefix)
    path, handle = _make(parent, prefix, mode)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _make(parent: Path, prefix: str, mode: int) -> tuple[Path, int | None]:
    while True:
        path = parent / f"{prefix}{secrets.token_hex(8)}"
        path.mkdir(mode=mode)
        if fcntl is None:
            return path, None
        # Between the two, another process may take it for one that nobody holds.
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDONLY)
            if take_lock(handle) and is_at(handle, path):
                return path, handle
            os.close(handle)


def _remove_dead(parent: Path, prefix: str) -> None:
    own = re.compile(re.escape(prefix) + "[0-9a-f]{16}")
    with contextlib.suppress(OSError):
        for path in [path for path in parent.iterdir() if own.fullmatch(path.name)]:
            with contextlib.suppress(OSError):
                remove_if_dead(path)


def remove_if_dead(folder: Path) -> None:
    """Remove a folder that `scratch_folder` made, unless its process lives.

    Args:
        folder: The folder.

    Raises:
        OSError: A process holds the folder, or it cannot be read.
    """
    if fcntl is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)
