"""Two processes, as `accelerate launch` starts them, give what one gives.

Each launch imports torch three times, so a single one does all the work: the command line, which
starts the group of processes, then the functions of the library, then training.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from helpers.checks import assert_close
from helpers.places import TESTS
from helpers.saved import save_model, write_task
from helpers.tiny_tasks import examples
from helpers.two_processes import commands, measure, one_example, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cdt_lens.circuits.faithfulness import FaithfulnessCurve
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.cli.app import app
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.finetuning.adapter import Adapter

# float32 activations in batches of another composition: logits of order 1 differ in the last bits.
ROUNDING = 1e-5

SCRIPT = """
import atexit, os, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
folder = Path(sys.argv[2])
# Called last: what was registered first is.
left = folder / f"left-{os.environ['RANK']}"
atexit.register(lambda: left.write_text(str(torch.distributed.is_initialized())))
from cdt_lens.cli.app import app
from helpers.tiny_tasks import examples
from helpers.two_processes import commands, measure, one_example, train
for arguments in commands(folder, folder / "run2"):
    app(arguments, standalone_mode=False)
for _ in range(2):
    measure(folder, examples(), checkpoint=folder / "sweep.json")
    # A machine that is lost loses its share alone.
    lost = folder / "estimate.0of2.json"
    if os.environ["RANK"] == "0" and lost.exists():
        lost.unlink()
measure(folder / "single", one_example())
logs = {"log_with": "tensorboard", "logging_dir": folder / "logs"}
result = train(folder, log=folder / "log.jsonl", **logs)
result.adapter.save(folder / "adapter")
result.history.to_json(folder / "history.json", orient="records", double_precision=15)
"""

# With --cpu accelerate starts a single process, whatever the number asked for.
ACCELERATE = [
    "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have done the work of `SCRIPT`."""
    folder = tmp_path_factory.mktemp("launched")
    save_model(folder / "tiny")
    write_task(folder / "data")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
    }
    finished = subprocess.run(
        [sys.executable, "-m", *ACCELERATE, str(script), str(TESTS), str(folder)],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder


def test_the_command_line_gives_the_numbers_of_one(launched: Path):
    one, two = launched / "run1", launched / "run2"
    for arguments in commands(launched, one):
        app(arguments, standalone_mode=False)
    a, b = (Baseline.load(run / "baseline.json") for run in (one, two))
    assert_close(b.means, a.means, atol=ROUNDING)
    for name in ("scores.json", "ablation.json"):
        a, b = (HeadScores.load(run / name) for run in (one, two))
        assert_close(b.per_example, a.per_example, atol=ROUNDING)
        assert_close(b.stderr, a.stderr, atol=ROUNDING)
        assert b.example_labels == a.example_labels
    a, b = (FaithfulnessCurve.load(run / "faithfulness.json") for run in (one, two))
    assert_close(b.faithfulness, a.faithfulness, atol=1e-4)
    names = [sorted(p.name.split(".")[0] for p in run.iterdir()) for run in (one, two)]
    assert names[0] == names[1], "one set of files"
    assert not list(two.glob("*partial*"))


def test_means_scores_and_circuits(launched: Path):
    """Also with fewer examples than processes, and from a checkpoint."""
    for folder, data in ((launched, examples()), (launched / "single", one_example())):
        measure(folder, data)
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
            if folder == launched:
                names = ("values", "stderr", "per_example")
                estimate, one = (HeadScores.load(x / "estimate.json") for x in (theirs, alone))
                for name in names:
                    assert_close(getattr(estimate, name), getattr(one, name), atol=ROUNDING)
            metric, one = (json.loads((x / "metric.json").read_text()) for x in (theirs, alone))
            assert metric == pytest.approx(one, abs=ROUNDING)
    # Each process keeps its own share of the sweep.
    assert len(list(launched.glob("sweep*of2*.json"))) == 2
    assert len(list(launched.glob("estimate*of2*.json"))) >= 1


def test_training(launched: Path):
    one, two = train(launched, log=launched / "whole.jsonl"), Adapter.load(launched / "adapter")
    assert two.slices.keys() == one.adapter.slices.keys()
    for name, (index, value) in one.adapter.slices.items():
        assert two.slices[name][0] == index
        assert_close(two.slices[name][1], value, atol=ROUNDING)
    for name, value in one.adapter.whole.items():
        assert_close(two.whole[name], value, atol=ROUNDING)
    history = pd.read_json(launched / "history.json", orient="records")
    pd.testing.assert_frame_equal(
        history.drop(columns="seconds"), one.history.drop(columns="seconds"),
        rtol=0, atol=ROUNDING, check_dtype=False,
    )  # fmt: skip
    logs = [(launched / name).read_text("utf-8") for name in ("log.jsonl", "whole.jsonl")]
    assert logs[0].count("\n") == logs[1].count("\n")
    # The first process alone sends each step.
    assert len(list((launched / "logs").glob("events.out.*"))) == 1
    steps = [row["step"] for row in map(json.loads, logs[0].splitlines()) if "kind" not in row]
    losses = EventAccumulator(str(launched / "logs")).Reload().Scalars("train/loss")
    assert [event.step for event in losses] == steps


def test_no_process_ends_with_its_groups_threads_alive(launched: Path):
    assert [(launched / f"left-{rank}").read_text() for rank in (0, 1)] == ["False", "False"]
