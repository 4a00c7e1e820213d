"""Copies past a size lie on the disk with the same bits, and a full disk is told in one sentence."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from helpers.checks import assert_same_bits
from torch import Tensor

from cdt_lens.core import set_aside as module
from cdt_lens.core.errors import InputError
from cdt_lens.core.set_aside import set_aside


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    odd = torch.randn(5, 7, generator=generator)
    odd[0, 0], odd[0, 1] = torch.nan, -0.0
    return {
        "transposed": odd.T, "half": odd.bfloat16()[1:, 2:5], "number": torch.tensor(2.0).double(),
        "empty": torch.zeros(0, 3), "parameter": torch.nn.Parameter(odd.clone()),
    }  # fmt: skip


@pytest.mark.parametrize("limit", [0, 2**28])
def test_copies_have_the_same_bits_and_are_apart(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IN_MEMORY", limit)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    given = tensors()
    wanted = {name: value.detach().clone() for name, value in given.items()}
    copies = set_aside(given)
    assert not list(tmp_path.iterdir())  # without a name, and still there
    with torch.no_grad():
        for value in given.values():
            value.zero_()
    assert list(copies) == list(wanted)
    for name, value in wanted.items():
        assert not copies[name].requires_grad
        assert_same_bits(copies[name], value)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux' list of maps")
def test_a_large_copy_is_a_mapped_file_that_goes_with_it(tmp_path, monkeypatch):
    def mapped() -> bool:
        with open("/proc/self/maps", encoding="utf-8") as file:
            return str(tmp_path) in file.read()

    monkeypatch.setattr(module, "IN_MEMORY", 100)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    small = set_aside({"small": torch.zeros(25)})
    assert not mapped()
    copies = set_aside({"large": torch.ones(26)})
    assert mapped() and len(small) == 1
    copies["large"][:] = 3.0  # a private map: the file stays
    del copies
    assert not mapped()


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "IN_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(InputError, match="No space left on device.*; free the disk, or .* TMPDIR"):
        set_aside({"weight": torch.ones(3)})
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_cannot_reserve_is_written_to(tmp_path, monkeypatch):
    def unable(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "")

    monkeypatch.setattr(module, "IN_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", unable, raising=False)
    assert_same_bits(set_aside({"weight": torch.ones(3)})["weight"], torch.ones(3))
