"""Run directories: two processes under a launcher share one and give the numbers of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.places import ROOT
from helpers.saved import TEMPLATE, VERBALIZER, save_model, write_csv, write_task

from cdt_lens.circuits.faithfulness import FaithfulnessCurve
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core.errors import InputError
from cdt_lens.core.processes import gather_items, is_main, shard, sum_over_processes, wait_for_all
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.experiments import discovery as experiment
from cdt_lens.experiments.runs import Run, open_run, start_run
from cdt_lens.experiments.settings import Settings


def discover(place: Path, out: Path) -> list[str]:
    files = [x for s in ("train", "valid") for x in (f"--{s}", str(place / "data" / f"{s}.csv"))]
    words = [x for label, word in VERBALIZER.items() for x in ("--verbalizer", f"{label}={word}")]
    return [
        "discover", "--model", str(place / "tiny"), "--out", str(out), "--task", "files", *files,
        "--template", TEMPLATE, *words, "--examples", "9", "--k", "2", "--ablation",
        "--batch-size", "2", "--backend", "bridge",
    ]  # fmt: skip


def launch(processes: int, arguments: list[str]) -> str:
    """Run the command line under accelerate's launcher, on the CPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc_per_node={processes}", "-m", "cdt_lens.cli",
    ]  # fmt: skip
    result = subprocess.run(
        [*launcher, *arguments], capture_output=True, text=True, timeout=300, env=environment,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("distributed")
    save_model(place / "tiny")
    write_task(place / "data")
    for processes in (1, 2):
        launch(processes, discover(place, place / f"run{processes}"))
        launch(processes, ["faithfulness", str(place / f"run{processes}"), "--examples", "6"])
    return place / "run1", place / "run2"


def test_two_processes_give_the_numbers_of_one(runs: tuple[Path, Path]):
    one, two = runs
    # float32 in batches of another composition: logits of order 1 differ in the last bits.
    close = {"rtol": 0, "atol": 1e-5}
    a, b = (Baseline.load(run / "baseline.json") for run in (one, two))
    torch.testing.assert_close(b.means, a.means, **close)
    for name in ("scores.json", "ablation.json"):
        a, b = (HeadScores.load(run / name) for run in (one, two))
        torch.testing.assert_close(b.per_example, a.per_example, **close)
        torch.testing.assert_close(b.stderr, a.stderr, **close)
        assert b.example_labels == a.example_labels
    a, b = (FaithfulnessCurve.load(run / "faithfulness.json") for run in (one, two))
    torch.testing.assert_close(b.faithfulness, a.faithfulness, rtol=0, atol=1e-4)


def test_one_set_of_files(runs: tuple[Path, Path]):
    names = [sorted(p.name.split(".")[0] for p in run.iterdir()) for run in runs]
    assert names[0] == names[1]
    assert not list(runs[1].glob("*partial*"))


def test_alone_everything_is_a_no_op():
    assert shard() == (0, 1) and is_main()
    value = torch.ones(2)
    assert sum_over_processes(value) is value
    assert gather_items([1, 2]) == [1, 2]
    wait_for_all()


def test_a_report_leaves_out_faithfulness_on_other_examples(tmp_path: Path):
    """The scores, and so their options, are the same: only what was measured on is other."""
    save_model(tmp_path / "tiny")
    files = write_task(tmp_path / "data")
    settings = Settings(
        model=str(tmp_path / "tiny"), task="files", files={k: str(v) for k, v in files.items()},
        template=TEMPLATE, verbalizer=VERBALIZER, backend="bridge", examples=6, k=2,
    )  # fmt: skip
    told: list[str] = []

    def opened() -> Run:
        return start_run(settings, tmp_path / "run", told.append)

    def shown(run: Run) -> bool:
        told.clear()
        page = experiment.report(run, told.append).read_text("utf-8")
        left_out = any("on other examples and is left out; measure again" in t for t in told)
        assert left_out != ("CPR" in page)
        return not left_out

    run = opened()
    experiment.discover(run, told.append)
    for split in ("valid", "test"):
        experiment.measure(run, told.append, split=split, examples=6, draws=1)
        assert shown(run)
    write_csv(files["valid"], 12, 77)
    assert shown(opened()), "measured on test"
    write_csv(files["test"], 12, 78)
    run = opened()
    assert not shown(run)
    experiment.measure(run, told.append, split="test", examples=6, draws=1)
    assert shown(run)


def test_the_discovery_of_a_transfer_of_0_3_is_refused_with_the_way_to_open_it():
    with pytest.raises(InputError, match="no run.json.*give the command that made it .* again"):
        open_run(ROOT / "tests" / "files_0_3" / "transfer" / "discovery", print)
