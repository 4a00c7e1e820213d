"""Tables past a size lie on the disk, and every number stays the same."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.checks import assert_same_bits
from helpers.places import TESTS
from helpers.shared import shared
from helpers.tiny_tasks import LABELS, examples

from cdt_lens.circuits.reliability import membership, reliability
from cdt_lens.core import per_example
from cdt_lens.core.errors import InputError
from cdt_lens.core.per_example import table
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.scoring.sweep import score_heads

MEASURE = """
import sys
from pathlib import Path
import torch
from cdt_lens.circuits.head_scores import combined
from cdt_lens.circuits.reliability import reliability
from cdt_lens.core import per_example
from helpers.sample_results import provenance

def private() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def scored(n: int) -> tuple:
    cheap, part = per_example.table(n, 64, 4), per_example.table(n, 64, 4)
    for start in range(0, n, 1000):
        cheap[start : start + 1000] = torch.randn(1000, 64, 4)
    part[:40] = torch.randn(40, 64, 4)
    labels = ["a", "b"] * (n // 2)
    scores = combined(cheap, [part], labels, direction=1.0, method="m", provenance=provenance())
    reliability(scores, splits=2)
    return cheap, part, scores

per_example.IN_MEMORY = 2**20
scored(2000)
before = private()
kept = scored(20_000)
print((private() - before) / 1024)
"""


def test_a_table_past_the_size_is_a_file_that_vanishes(tmp_path, monkeypatch):
    monkeypatch.setattr(per_example, "IN_MEMORY", 100)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    large, small = table(6, 5), table(5, 5)
    assert bool(large.isnan().all()) and bool(small.isnan().all())
    assert not list(tmp_path.iterdir())  # without a name, and still there
    large[3] = 1.0
    assert float(large[3].sum()) == 5.0
    maps = "/proc/self/maps"
    if os.path.exists(maps):
        with open(maps, encoding="utf-8") as file:
            assert any("cdt-lens-table." in line for line in file)


def test_a_disk_without_room_for_a_table_is_told_before_it_is_written(tmp_path, monkeypatch):
    """A write through the map would end the process with SIGBUS."""
    asked = []

    def full(handle: int, start: int, size: int) -> None:
        asked.append(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(per_example, "IN_MEMORY", 100)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(InputError, match="No space left on device.*; free the disk, or .* TMPDIR"):
        table(6, 5, dtype=torch.float64)
    assert asked == [6 * 5 * 8]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exact", ["all", 6])
def test_scores_are_the_same_on_the_disk(exact, tmp_path, tokenizer_folder, monkeypatch):
    view = shared("llama", "bridge", tokenizer_folder, torch.float32)
    gold = [LABELS[i % 3] for i in range(24)]
    data = examples([5 + i % 3 for i in range(24)], gold, seed=3)
    baseline = mean_activations(view, data, progress=False)
    found = []
    for limit in (2**28, 10):
        monkeypatch.setattr(per_example, "IN_MEMORY", limit)
        scores = score_heads(view, data, baseline, exact=exact, progress=False)
        sure = membership(scores, scores.select(k=2), resamples=50)
        found.append((scores, reliability(scores, splits=3), sure))
        scores.save(tmp_path / "scores.json")
        assert type(scores).load(tmp_path / "scores.json") == scores
    (one, *measured), (other, *again) = found
    for name in ("values", "stderr", "per_example"):
        assert_same_bits(getattr(other, name), getattr(one, name))
    for own, their in zip(one.interval(), other.interval(), strict=True):
        assert_same_bits(own, their)
    assert measured == again
    assert replace(one, provenance=other.provenance) == other


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_prompts():
    """20,000 prompts of 256 heads: tables of 20 MiB each, which would add 70 MiB while they live."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 30
