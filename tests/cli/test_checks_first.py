"""Every command names a mistake in its arguments before it loads a model or computes anything.

The weights of the model are damaged here, so a command that loads it first says so instead.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.saved import TEMPLATE, VERBALIZER, save_model, write_task
from typer.testing import CliRunner

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import FaithfulnessCurve
from cdt_lens.cli import app as cli
from cdt_lens.core.errors import CdtLensError

WORDS = [x for label, word in VERBALIZER.items() for x in ("--verbalizer", f"{label}={word}")]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def of_files(place: Path, command: str, out: Path, *more: str, train: str = "train.csv"):
    return [
        command, "--model", str(place / "tiny"), "--out", str(out), "--task", "files",
        "--train", str(place / "data" / train), "--valid", str(place / "data" / "valid.csv"),
        "--template", TEMPLATE, *WORDS, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, whose model is then damaged."""
    place = tmp_path_factory.mktemp("checks")
    save_model(place / "tiny")
    write_task(place / "data")
    run(*of_files(place, "discover", place / "run", "--examples", "6", "--k", "2"))
    run("faithfulness", str(place / "run"), "--examples", "6", "--draws", "1")
    run("trace", str(place / "run"), "--examples", "3", "--width", "2", "--fan-in", "1")
    shutil.copytree(place / "run", place / "without")
    (place / "without" / "scores.json").unlink()
    weights = place / "tiny" / "model.safetensors"
    (place / "whole").write_bytes(weights.read_bytes())
    weights.write_bytes(weights.read_bytes()[:5000])
    (place / "foreign").mkdir()
    (place / "foreign" / "notes.txt").write_text("keep", "utf-8")
    (place / "data" / "label.csv").write_text("text,label\nw20,bad\nw21,fien\nw22,good\n", "utf-8")
    (place / "data" / "one.csv").write_text("text,label\nw20,bad\nw21,bad\n", "utf-8")
    (place / "data" / "column.csv").write_text("words,label\nw20,bad\n", "utf-8")
    (place / "transfer.toml").write_text(
        f"model = {str(place / 'tiny')!r}\n[task]\nname = 'files'\nsource = 'a'\ntargets = ['b']\n"
        f"template = {TEMPLATE!r}\n[task.verbalizer]\n"
        + "".join(f"{label} = {word!r}\n" for label, word in VERBALIZER.items())
        + "".join(
            f"[task.files.{name}]\ntrain = {str(place / 'data' / train)!r}\n"
            for name, train in (("a", "train.csv"), ("b", "label.csv"))
        ),
        "utf-8",
    )
    return place


def mistakes(place: Path, tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    """A mistake -> the arguments, and what the one line says."""
    new, foreign, file = tmp_path / "new", place / "foreign", place / "transfer.toml"
    other, is_file = "holds other files, such as notes.txt", "is a file. Name a folder"
    cases: dict[str, tuple[list[str], str]] = {}
    for command in ("discover", "compare", "finetune"):
        more = ["--scope", "norms"] if command == "finetune" else []

        def made(out: Path, train: str = "train.csv", command: str = command, more=more):
            return of_files(place, command, out, *more, train=train)

        cases |= {
            f"{command}: a foreign folder": (made(foreign), other),
            f"{command}: a file": (made(file), is_file),
            f"{command}: a label": (made(new, "label.csv"), "unknown label 'fien'"),
            f"{command}: a column": (made(new, "column.csv"), "no column 'text'"),
            f"{command}: a file of data": (made(new, "none.csv"), "none.csv: cannot be read"),
            f"{command}: a word": (
                [a.replace("good=", "good= x") for a in made(new)], "must have tokens",
            ),
            f"{command}: a template": (
                [a.replace("{text}", "{tekst}") for a in made(new)], "no column 'tekst'",
            ),
        }  # fmt: skip
    ran, without = str(place / "run"), str(place / "without")
    tuning = of_files(place, "finetune", new)
    return cases | {
        "finetune: a circuit that is a folder": (
            [*tuning, "--circuit", str(foreign)], "foreign/circuit.json: no such file",
        ),
        "finetune: no circuit": (tuning, "scope 'decision': expected a circuit"),
        "finetune: no source": (
            [*tuning, "--scope", "norms", "--source", "x"], "your own files have no languages",
        ),
        "finetune: one label": (
            of_files(place, "finetune", new, "--scope", "norms", train="one.csv"), "no row has",
        ),
        "compare: a method": ([*of_files(place, "compare", new), "--methods", "x"], "'x'"),
        "compare: planted in a foreign folder": (
            ["compare", "--planted", "all", "--out", str(foreign)], other,
        ),
        "faithfulness: another metric": (
            ["faithfulness", ran, "--examples", "6", "--draws", "1", "--metric", "accuracy"],
            r"faithfulness.json: holds a result with other settings \(metric direction\)",
        ),
        "faithfulness: other draws": (
            ["faithfulness", ran, "--draws", "2"], r"other settings \(examples 6, draws 1\)",
        ),
        "faithfulness: no such split": (["faithfulness", ran, "--split", "dev"], "split 'dev'"),
        "faithfulness: no examples": (["faithfulness", ran, "--split", "test"], "no examples"),
        "faithfulness: no scores": (["faithfulness", without], "scores.json: no such file"),
        "trace: another width": (
            ["trace", ran, "--examples", "3", "--fan-in", "1"], r"other settings \(width 2\)",
        ),
        "report: no scores": (["report", without], "scores.json: no such file"),
        "transfer: a foreign folder": (["transfer", str(file), "--out", str(foreign)], other),
        "transfer: a file": (["transfer", str(file), "--out", str(file)], is_file),
        "transfer: a label of a target": (
            ["transfer", str(file), "--out", str(new)], "unknown label 'fien'",
        ),
        "demo: a foreign folder": (["demo", "--out", str(foreign)], other),
        "demo: a file": (["demo", "--out", str(file)], is_file),
        "demo: another run": (["demo", "--out", ran], "holds other files"),
        "fetch: a file": (["fetch", "smollm2-135m", "--out", str(file)], is_file),
        "show: a table": (["show", str(place / "data" / "one.csv")], "one.csv: is not a JSON file"),
        "show: a folder": (["show", str(foreign)], "foreign: expected one of adapt.json, .* give a file, or the"),
        "show: a checkpoint": (
            ["show", str(place / "tiny" / "config.json")],
            "expected a file of cdt.* got another file .cdt-lens convert reads graphs",
        ),
        "show: a model": (["show", str(place / "tiny")], "holds a model; cdt-lens discover"),
    }  # fmt: skip


NAMES = sorted(mistakes(Path("place"), Path("new")))


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_named_before_the_model_is_loaded(name: str, place: Path, tmp_path: Path):
    arguments, said = mistakes(place, tmp_path)[name]
    with pytest.raises(CdtLensError, match=said) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (place / "foreign").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "new" / "run.json").exists()


def test_the_same_settings_take_the_kept_results(place: Path):
    weights = place / "tiny" / "model.safetensors"
    damaged = weights.read_bytes()
    weights.write_bytes((place / "whole").read_bytes())
    ran = place / "run"
    kept = {name: (ran / name).read_bytes() for name in ("faithfulness.json", "graph.json")}
    said = run("faithfulness", str(ran), "--examples", "6", "--draws", "1")
    said += run("trace", str(ran), "--examples", "3", "--width", "2", "--fan-in", "1")
    assert said.count("using the kept result") == 2
    assert {name: (ran / name).read_bytes() for name in kept} == kept
    # After a damage both are made again, as other stages are.
    for name in kept:
        (ran / name).write_bytes(kept[name][:100])
    run("faithfulness", str(ran), "--examples", "6", "--draws", "1")
    run("trace", str(ran), "--examples", "3", "--width", "2", "--fan-in", "1")
    FaithfulnessCurve.load(ran / "faithfulness.json")
    assert Circuit.load(ran / "graph.json").graph is not None
    weights.write_bytes(damaged)


def test_show_takes_the_folder_of_a_run(place: Path):
    assert "2 of 8 heads" in run("show", str(place / "run"))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("run.json", "k: 2"), ("scores.json", "L0H1"), ("baseline.json", "Baseline"),
        ("faithfulness.json", "CPR"), ("circuit.json", "2 of 8 heads"),
    ],
)  # fmt: skip
def test_show_takes_every_file_of_a_run(name: str, told: str, place: Path):
    assert told in run("show", str(place / "run" / name))
