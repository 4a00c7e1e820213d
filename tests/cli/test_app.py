"""The command line as a process: how it starts, what an interrupt does, options from settings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
from helpers.saved import TEMPLATE, VERBALIZER, save_model, write_task
from typer.main import get_command
from typer.testing import CliRunner

from cdt_lens.cli import app as cli
from cdt_lens.experiments.settings import Settings
from cdt_lens.finetuning.options import TrainingOptions

ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
HEAVY = "('torch', 'transformers', 'transformer_lens', 'matplotlib', 'pandas')"
COMMANDS = sorted(info.callback.__name__ for info in cli.app.registered_commands)  # type: ignore[union-attr]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=120,
        check=False,
    )  # fmt: skip


def test_the_package_and_the_help_of_every_command_import_nothing_heavy():
    code = f"""
import sys
import cdt_lens
from typer.testing import CliRunner
from cdt_lens.cli.app import app
for command in ([], *[[name] for name in {COMMANDS}]):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0, (command, result.output)
    heavy = [name for name in {HEAVY} if name in sys.modules]
    assert not heavy, (command, heavy)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("command", "kind"),
    [("discover", Settings), ("compare", Settings), ("finetune", TrainingOptions)],
)
def test_options_are_those_of_the_settings(command: str, kind: type):
    """A default or a description that is changed in the settings changes on the command line."""
    shown = {option.name: option for option in get_command(cli.app).commands[command].params}  # type: ignore[attr-defined]
    hints = get_type_hints(kind, include_extras=True)
    same = {field.name: field for field in fields(kind) if field.name in shown}
    described = {
        name: field
        for name, field in same.items()
        if getattr(hints[name], "__metadata__", None) and name not in ("verbalizer", "model")
    }
    assert len(described) >= 5
    for name, field in described.items():
        assert shown[name].help == hints[name].__metadata__[0].description
        assert shown[name].default == field.default


def test_a_setting_out_of_range_is_an_unusable_option():
    result = CliRunner().invoke(
        cli.app, ["discover", "--model", "m", "--out", "o", "--examples", "0"]
    )
    assert result.exit_code == 2 and "--examples" in result.output


def test_an_interrupted_command_says_that_it_resumes(tmp_path: Path):
    """A real signal to a real process, in the middle of its work."""
    save_model(tmp_path / "tiny")
    files = write_task(tmp_path / "data")
    words = [x for label, word in VERBALIZER.items() for x in ("--verbalizer", f"{label}={word}")]
    process = subprocess.Popen(
        [
            sys.executable, "-m", "cdt_lens.cli", "discover", "--model", str(tmp_path / "tiny"),
            "--out", str(tmp_path / "run"), "--task", "files", "--train", str(files["train"]),
            "--split", "0.2", "--template", TEMPLATE, *words,
        ],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline().startswith("loading ")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "cdt-lens: interrupted; give the same command again to resume" in errors
    assert "Traceback" not in errors
