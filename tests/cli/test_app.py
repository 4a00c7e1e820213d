"""The command line as a process: how it starts, what an interrupt does, options from settings."""

from __future__ import annotations

import errno
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
from cdt_lens.cli.console import say, tell, tell_table
from cdt_lens.core.errors import InputError
from cdt_lens.experiments.settings import Settings
from cdt_lens.finetuning.options import TrainingOptions

ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
HEAVY = "('torch', 'transformers', 'transformer_lens', 'vl_convert', 'pandas')"
COMMANDS = sorted(str(info.name) for info in cli.app.registered_commands)


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


def test_paths_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]):
    path = "runs/:key:/[bold]x"
    say(path)
    tell(path)
    tell_table(["file"], [[path]])
    printed = capsys.readouterr()
    assert printed.err == f"{path}\n" and printed.out.count(path) == 2


def test_a_setting_out_of_range_is_an_unusable_option():
    result = CliRunner().invoke(
        cli.app, ["discover", "--model", "m", "--out", "o", "--examples", "0"]
    )
    assert result.exit_code == 2 and "--examples" in result.output


@pytest.mark.parametrize("option", ["--task", "--train", "--examples", "--out"])
def test_an_option_of_one_value_is_refused_where_it_is_given_twice(option: str):
    """The parser would take the last one without a word."""
    given = ["discover", "--model", "m", "--out", "o", option, "3", option, "4"]
    result = CliRunner().invoke(cli.app, given)
    assert result.exit_code == 2
    assert f"{option}': it takes one value but was given twice" in " ".join(result.output.split())


def test_every_option_takes_one_value_or_all_that_are_given():
    """The convention for lists: the option is repeated."""
    commands = get_command(cli.app).commands  # type: ignore[attr-defined]
    repeated = {(n, p.name) for n, c in commands.items() for p in c.params if p.multiple}
    words = {(n, "verbalizer") for n in ("discover", "compare", "finetune")}
    assert repeated >= words | {("compare", "methods"), ("compare", "planted")}
    assert repeated >= {("finetune", "option"), ("predict", "text")}
    for name, command in commands.items():
        assert isinstance(command, cli.Command), name
        for option in command.params:
            takes = "epeat the option" in (option.help or "")
            assert takes == option.multiple or option.param_type_name == "argument", option.name


@pytest.mark.parametrize(
    "methods",
    [["--methods", "random,nosuch"], ["--methods", "random", "--methods", "nosuch"],
     ["--methods", "nosuch", "--methods", "random"]],
)  # fmt: skip
def test_names_may_be_repeated_or_separated_by_commas(methods: list[str]):
    with pytest.raises(InputError, match="nosuch"):
        CliRunner().invoke(
            cli.app, ["compare", "--model", "m", "--out", "o", *methods], catch_exceptions=False
        )


# Interrupts ----------------------------------------------------------------------------------------

LINE = "cdt-lens: Interrupted. Run the same command again to continue."


def interrupted_at(module: str, number: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that gets a real signal when it imports `module`."""
    return python(
        f"""
import os, runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
sys.argv = ["cdt-lens", *{arguments!r}]
runpy.run_module("cdt_lens.cli", run_name="__main__", alter_sys=True)
"""
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["typer", "torch"])
def test_an_interrupt_during_the_imports_is_one_line(module: str, number: int, tmp_path: Path):
    result = interrupted_at(module, number, "report", str(tmp_path))
    assert (result.returncode, result.stderr) == (128 + number, f"{LINE}\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_says_that_it_resumes(tmp_path: Path, number: int):
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
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert errors.splitlines()[-1] == LINE
    assert "Traceback" not in errors


def test_messages_name_options_as_they_are_typed():
    params = get_command(cli.app).commands["discover"].params  # type: ignore[attr-defined]
    said = "config=None; exact=2: calibrate=True, k=1 and baseline_examples=4; not direction==5, norms=none or [seed=3]"
    typed = "--language None; --exact 2: --calibrate, --k 1 and --baseline-examples 4; not direction==5, norms=none or [seed=3]"
    assert cli._with_options(said, params) == typed


@pytest.mark.parametrize(
    ("command", "said", "typed"),
    [
        ("finetune", "runs/seed=0/trian.csv: cannot be read", "runs/seed=0/trian.csv: cannot be read"),
        ("finetune", r"runs\seed=0\x.csv: gone", r"runs\seed=0\x.csv: gone"),
        ("finetune", "--option 'seed=0': twice", "--option 'seed=0': twice"),
        ("finetune", "pass source=, the task (or exact=)", "pass source=, the task (or exact=)"),
        ("discover", "data=../x has no effect", "--data ../x has no effect"),
        ("export", "pass extras=True (--extras): peft", "pass --extras: peft"),
        ("export", "with allow_unchanged=True (--allow-unchanged).", "with --allow-unchanged."),
        (
            "discover",
            "pair='a b' has no effect with the baseline 'mean' and pair='a b'. Omit it",
            "--pair 'a b' has no effect with the baseline 'mean'. Omit it",
        ),
        (
            "discover",
            "pair_label='x' has no effect with the baseline 'mean' and pair=None. Omit it",
            "--pair-label 'x' has no effect with the baseline 'mean' and --pair None. Omit it",
        ),
    ],
)  # fmt: skip
def test_paths_and_quoted_text_stay_and_nothing_is_said_twice(command: str, said: str, typed: str):
    params = get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
    assert cli._with_options(said, params) == typed


def test_a_folder_that_may_not_be_entered_is_one_line(tmp_path: Path, monkeypatch, capsys):
    """Root may enter every folder, so the refusal is simulated."""
    stat = Path.stat

    def refused(path: Path, **how: bool) -> os.stat_result:
        if "noread" in path.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **how)

    file = tmp_path / "noread" / "circuit.json"
    monkeypatch.setattr(Path, "stat", refused)
    monkeypatch.setattr(sys, "argv", ["cdt-lens", "show", str(file)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which typer replaces
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"cdt-lens: {file}: cannot be accessed (Permission denied)\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--version"], "transformer-lens"),
        (["fetch"], "gemma3-270m"),
        (["fetch"], "next: cdt-lens"),
    ],
)
def test_what_is_asked_for_without_a_name(arguments: list[str], told: str):
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0 and told in result.output
