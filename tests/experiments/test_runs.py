"""Run directories: what is measured again when the data have changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.places import ROOT
from helpers.saved import TEMPLATE, VERBALIZER, save_model, write_csv, write_task

from cdt_lens.core.errors import InputError
from cdt_lens.experiments import discovery as experiment
from cdt_lens.experiments.runs import Run, open_run, start_run
from cdt_lens.experiments.settings import Settings


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
        (tmp_path / "run" / "faithfulness.json").unlink(missing_ok=True)
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
