"""Two processes, as `accelerate launch` starts them, give what one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checks import assert_close
from helpers.places import TESTS
from helpers.tiny_models import build, prompts
from helpers.tiny_tasks import examples
from helpers.two_processes import one_example, work

from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core import processes as distributed
from cdt_lens.decomposition.baseline import Baseline

# float32 activations in batches of another composition: logits of order 1 differ in the last bits.
ROUNDING = 1e-5


SCRIPT = """
import atexit, os, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from helpers.two_processes import one_example, work
from helpers.tiny_tasks import examples
out = Path(sys.argv[2])
# Called last: what was registered first is.
left = out / f"left-{os.environ['RANK']}"
atexit.register(lambda: left.write_text(str(torch.distributed.is_initialized())))
work(out, examples(), checkpoint=out / "sweep.json")
work(out, examples(), checkpoint=out / "sweep.json")
work(out / "single", one_example())
"""


def launch(command: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
    }
    arguments = [str(script), str(TESTS), str(tmp_path)]
    return subprocess.run(
        [sys.executable, "-m", *command, *arguments],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


# With --cpu accelerate starts a single process, whatever the number asked for.
ACCELERATE = [
    "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip


def test_two_processes_give_what_one_gives(tmp_path: Path):
    """Means, scores and circuits; with fewer examples than processes, too; and from a checkpoint."""
    finished = launch(ACCELERATE, tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for folder, data in ((tmp_path, examples()), (tmp_path / "single", one_example())):
        work(folder, data)
        alone = folder / "0of1"
        for rank in (0, 1):
            theirs = folder / f"{rank}of2"
            found, expected = (Baseline.load(x / "baseline.json") for x in (theirs, alone))
            assert_close(found.means, expected.means, atol=ROUNDING)
            scored, alone_scored = (HeadScores.load(x / "scores.json") for x in (theirs, alone))
            assert_close(scored.per_example, alone_scored.per_example, atol=ROUNDING)
            assert_close(scored.values, alone_scored.values, atol=ROUNDING)
            assert scored.direction == pytest.approx(alone_scored.direction, abs=ROUNDING)
            assert scored.example_labels == alone_scored.example_labels
            assert scored.provenance.task_hash == alone_scored.provenance.task_hash
            metric, one = (json.loads((x / "metric.json").read_text()) for x in (theirs, alone))
            assert metric == pytest.approx(one, abs=ROUNDING)
    # No process goes into the interpreter's end with its group's threads alive.
    assert [(tmp_path / f"left-{rank}").read_text() for rank in (0, 1)] == ["False", "False"]
    # Each process keeps its own share of the sweep.
    assert len(list(tmp_path.glob("sweep*of2*.json"))) == 2


def test_alone_nothing_is_started(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    value: Any = torch.arange(3.0)
    assert distributed.shard() == (0, 1)
    assert distributed.is_main()
    assert distributed.sum_over_processes(value) is value
    assert distributed.gather_items([1, 2]) == [1, 2]
    assert not torch.distributed.is_initialized()
    assert build("gpt2")(prompts(1, 3)).logits.shape == (1, 3, 128)
