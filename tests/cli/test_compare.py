"""`cdt-lens compare`, from the outside: files in, tables and files out, mistakes in a line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers import sample_comparison as sample
from helpers.saved import TEMPLATE, VERBALIZER, save_model, write_task
from typer.testing import CliRunner

from cdt_lens.cli import app as cli, compare as compare_command, console
from cdt_lens.comparing import timed_scores as scores_module
from cdt_lens.comparing.comparison import Comparison, PlantedComparison
from cdt_lens.core.errors import CdtLensError
from cdt_lens.experiments import compare as experiments, inputs
from cdt_lens.experiments.runs import kept_settings
from cdt_lens.planted.catalogue import PLANTED


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    save_model(folder / "tiny")
    write_task(folder / "data")
    return folder


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass before a method and one after it: time is the matter of test_timed_scores."""
    monkeypatch.setattr(scores_module, "_PASSES", 1)
    monkeypatch.setattr(scores_module, "_REPEATS", 1)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def of_files(
    place: Path, out: Path, *more: str, splits: tuple[str, ...] = ("train", "valid")
) -> list[str]:
    files = [x for s in splits for x in (f"--{s}", str(place / "data" / f"{s}.csv"))]
    words = [x for label, word in VERBALIZER.items() for x in ("--verbalizer", f"{label}={word}")]
    return [
        "--model", str(place / "tiny"), "--out", str(out), "--task", "files", *files,
        "--template", TEMPLATE, *words, "--examples", "6", *more,
    ]  # fmt: skip


def test_from_files_to_the_report(place: Path, tmp_path: Path):
    out = tmp_path / "run"
    arguments = of_files(
        place, out, "--held-out", "6", "--methods", "cdt:stable,random", "--draws", "2"
    )
    printed = run("compare", *arguments)
    result = Comparison.load(out / "comparison.json")
    assert result.names == ("exact", "cdt:stable", "random")
    assert (result.scored, result.held_out, len(result.random)) == (6, 6, 2)
    assert result.provenance.examples == {"bad": 2, "fine": 2, "good": 2}
    for text in (
        "exact (yardstick)",
        "Spearman",
        f"{result['cdt:stable'].pearson:.3f}",
        "magnitude",
    ):
        assert text in printed
    assert str(out / "report.html") in printed.replace("\n", "")
    frame = pd.read_csv(out / "comparison.csv")
    assert frame["cpr_signed"].tolist() == pytest.approx(
        result.to_dataframe()["cpr_signed"].tolist()
    )
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text("utf-8")
    assert "cdt:stable" in page and "What the columns mean" in page
    shown = run("show", str(out / "comparison.json"))
    assert "exact (yardstick)" in shown and "model_hash" in shown

    # The same command finds all of it there; another method is added to it.
    stamp = (out / "scores-exact.json").stat().st_mtime_ns
    again = run("compare", *arguments[:-4], "--methods", "random", "--methods", "direct")
    assert (out / "scores-exact.json").stat().st_mtime_ns == stamp
    assert "direct" in again
    # A run of discover goes on with its baseline.
    stamp = (out / "baseline.json").stat().st_mtime_ns
    run("discover", *of_files(place, out, "--k", "2", "--by", "magnitude"))
    assert (out / "baseline.json").stat().st_mtime_ns == stamp
    # The circuit keeps its size and its ranking when a method is added.
    run("compare", *arguments[:-4], "--methods", "random")
    kept = kept_settings(out / "run.json", "cdt_lens.run")
    assert (kept["k"], kept["by"]) == (2, "magnitude")


def test_methods_have_the_same_budget_unless_told_otherwise(place: Path, tmp_path: Path):
    out = tmp_path / "run"
    arguments = of_files(place, out, "--methods", "cdt:two-ended,direct", "--draws", "1")
    printed = run("compare", *arguments, "--budget", "40")
    result = Comparison.load(out / "comparison.json")
    # An exact sweep costs 1 + 4 * (2 + 1) / 2 passes, one with both ends 13.
    assert {m.method: m.scored for m in result.methods} == {
        "exact": 5, "cdt:two-ended": 3, "direct": 6,
    }  # fmt: skip
    assert (result.budget, result.held_out) == (40, 12)  # all there are
    assert "Which differences are real" in printed
    assert re.search(r"[+-]\d\.\d{3} \[[+-]\d\.\d{3}, [+-]\d\.\d{3}\] +(yes|no)", printed)
    page = (out / "report.html").read_text("utf-8")
    assert "40 forward passes of one example" in page and "Which differences are real" in page
    for other in ([], ["--same-examples"], ["--budget", "41"]):
        with pytest.raises(CdtLensError, match=r"other settings \(budget 40\)"):
            run("compare", *arguments, *other)
    run("compare", *arguments, "--budget", "40")
    (out / "comparison.json").unlink()
    run("compare", *arguments, "--same-examples")
    found = Comparison.load(out / "comparison.json")
    assert found.budget is None and {m.scored for m in found.methods} == {6}
    with pytest.raises(CdtLensError, match=r"budget none \(--same-examples\)"):
        run("compare", *arguments)
    (out / "comparison.json").unlink()
    run("compare", *arguments)
    assert Comparison.load(out / "comparison.json").budget == 16 * 13


def test_areas_of_mibs_empty_run_say_so_everywhere(place: Path, tmp_path: Path):
    out = tmp_path / "run"
    arguments = of_files(place, out, "--methods", "direct", "--draws", "1")
    printed = " ".join(run("compare", *arguments, "--empty", "all").split())
    result = Comparison.load(out / "comparison.json")
    assert result.empty_run == "all"
    words = "f = 0: heads, MLPs and input replaced, as in MIB"
    assert words in printed
    page = (out / "report.html").read_text("utf-8")
    assert page.count(words) >= 4
    assert set(pd.read_csv(out / "comparison.csv")["empty_run"]) == {"all"}
    with pytest.raises(CdtLensError, match=r"other settings \(empty all\)"):
        run("compare", *arguments)
    (out / "comparison.json").unlink()
    other = " ".join(run("compare", *arguments).split())
    assert "f = 0: heads ablated, MLPs intact" in other
    found = Comparison.load(out / "comparison.json")
    assert found.full == pytest.approx(result.full, abs=1e-6) and found.empty != result.empty
    with pytest.raises(CdtLensError, match="--empty all is for models"):
        run("compare", "--planted", "hand-or", "--empty", "all", "--out", str(tmp_path / "x"))


def test_a_budget_that_pays_for_nothing_is_told_before_anything_runs(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(experiments, "make_baseline", None)
    arguments = of_files(place, tmp_path / "x", "--methods", "cdt:two-ended", "--budget", "38")
    with pytest.raises(CdtLensError, match="--budget 38: too small for cdt:two-ended, .* 39 "):
        run("compare", *arguments)


def test_planted_circuits(tmp_path: Path):
    name = next(name for name in PLANTED if name.startswith("hand-"))
    printed = run(
        "compare", "--planted", name, "--methods", "cdt:stable", "--out", str(tmp_path),
        "--backend", "bridge", "--draws", "1",
    )  # fmt: skip
    result = PlantedComparison.load(tmp_path / "comparison.json")
    assert list(result.circuits) == [name]
    assert "AUROC" in printed and "average precision" in printed and name in printed
    assert "cdt:stable" in run("show", str(tmp_path / "comparison.json"))


MISTAKES: dict[str, tuple[list[str], str]] = {
    "an unknown method": (["--methods", "cdt:stabel"], "did you mean 'cdt:stable'"),
    "no method": (["--methods", ","], "expected any of exact"),
    "both kinds": (["--planted", "all"], "either --model or --planted"),
    "budget and none": (
        ["--budget", "9", "--same-examples"],
        "either --budget or --same-examples",
    ),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_told_before_the_model_is_loaded(
    mistake, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inputs, "load_model", None)
    arguments, told = MISTAKES[mistake]
    with pytest.raises(CdtLensError, match=told):
        run("compare", *of_files(place, tmp_path / "x", *arguments))
    assert not (tmp_path / "x").exists()


def test_a_task_without_held_out_examples_is_told_before_the_model_is_loaded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inputs, "load_model", None)
    with pytest.raises(CdtLensError, match="expected --valid, the file"):
        run("compare", *of_files(place, tmp_path / "x", splits=("train",)))
    for planted, told in (
        ("hand-nothing", "planted circuit 'hand-nothing': unknown"),
        (",", "got none"),
    ):
        with pytest.raises(CdtLensError, match=told):
            run("compare", "--planted", planted, "--out", str(tmp_path / "x"))
    for unused in (["--examples", "7"], ["--train", "no.csv"], ["--held-out", "3"]):
        with pytest.raises(CdtLensError, match=f"compare: {unused[0]}: for --model"):
            run("compare", "--planted", "all", *unused, "--out", str(tmp_path / "x"))
    with pytest.raises(CdtLensError, match="either --budget or --planted"):
        run("compare", "--planted", "all", "--budget", "9", "--out", str(tmp_path / "x"))
    with pytest.raises(CdtLensError, match="either --model or --planted"):
        run("compare", "--out", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("width", [60, 80, 120, 300])
def test_tables_fit_the_terminal_without_breaking_a_word(
    width, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setattr(console.out, "_width", width)
    compare_command.show_comparison(sample.comparison(refused=["cdt:official"], truth=True))
    compare_command.show_planted(sample.planted())
    printed = capsys.readouterr().out
    tables = [line for line in printed.splitlines() if line.startswith(" ")]
    assert max(map(len, tables)) <= width
    assert "\u2026" not in printed
    for name in (*sample.MADE_UP, *sample.CIRCUITS, "random rankings (median of 5)"):
        assert name in printed
    assert "cdt:official is refused on trained-attention-only: 10 of 270" in printed
