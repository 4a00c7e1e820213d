"""Copies of weights that are not needed until later, which lie on the disk once they are large.

Training the whole of a model needs its values from before and its best values at the end only. In
memory, each copy would be as large as the model.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cdt_lens.core.errors import InputError
from cdt_lens.core.scratch import temporary_folder

# Copies of more bytes than this together lie on the disk.
IN_MEMORY = 2**28
_ALIGNED = 64  # every tensor begins at a multiple of this, as those that torch allocates


def set_aside(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors for later use.

    Args:
        tensors: The tensors by name.

    Returns:
        Detached copies with the same bits. Past `IN_MEMORY` bytes they are on the CPU, in a file
        without a name. The system reads it when a copy is used, and removes it with the last
        reference to a copy.

    Raises:
        InputError: The disk is full, or there is no temporary folder.
    """
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    # Windows cannot remove a file that is mapped into memory.
    if size <= IN_MEMORY or os.name == "nt":
        return {name: value.detach().clone() for name, value in tensors.items()}
    starts, end = [], 0
    for value in tensors.values():
        starts.append(end)
        end += -(-value.numel() * value.element_size() // _ALIGNED) * _ALIGNED
    with reserved_file(end, "values", "weights") as path:
        # Written, not mapped: pages of a mapped file would count as memory of the process.
        with open(path, "r+b", buffering=0) as file:
            for start, value in zip(starts, tensors.values(), strict=True):
                file.seek(start)
                _write(file.fileno(), value)
        stored = torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8)
    return {
        name: stored[start : start + value.numel() * value.element_size()]
        .view(value.dtype)
        .reshape(value.shape)
        for start, (name, value) in zip(starts, tensors.items(), strict=True)
    }


@contextlib.contextmanager
def reserved_file(size: int, name: str, content: str) -> Iterator[Path]:
    """Yield a file that has its room on the disk, and remove its name after the `with` block.

    Args:
        size: Number of bytes.
        name: Its name in a folder that only this user may read.
        content: What it is for, as the error says it.

    Yields:
        The file.

    Raises:
        InputError: The disk is full, or there is no temporary folder.
    """
    try:
        with temporary_folder() as folder:
            with open(folder / name, "xb", buffering=0) as file:
                _reserve(file.fileno(), size)
                file.truncate(size)
            yield folder / name
    except OSError as error:
        raise InputError(
            f"{size / 1e9:.1f} GB of {content} cannot be kept in the temporary folder "
            f"({error.strerror or error}); free the disk, or name another folder in TMPDIR"
        ) from error


def _reserve(handle: int, size: int) -> None:
    """Let a full disk show now: a process that writes through a map would end with SIGBUS."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise  # others mean that this file system cannot reserve


def _write(handle: int, value: Tensor) -> None:
    flat = value.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    rest: memoryview = flat.numpy().data
    while rest:  # a system call writes 2 GiB at most
        rest = rest[os.write(handle, rest) :]
