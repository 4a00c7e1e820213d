"""The command line: the whole way through on a tiny model, and mistakes that a person makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.leading_on import leads_to
from helpers.saved import TEMPLATE, VERBALIZER, save_model, write_task
from typer.testing import CliRunner

import cdt_lens as cdt
from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import FaithfulnessCurve
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.circuits.reliability import reliability
from cdt_lens.cli import app as cli
from cdt_lens.core.errors import CdtLensError, InputError
from cdt_lens.experiments import inputs, runs
from cdt_lens.interchange.graphs import graph_from_circuit, write_graph
from cdt_lens.models.heads import all_heads
from cdt_lens.tasks.task import Task


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_model(folder / "tiny")
    write_task(folder / "data")
    return folder


def discover(place: Path, out: Path, *more: str, examples: int = 6) -> list[str]:
    files = [x for s in ("train", "valid") for x in (f"--{s}", str(place / "data" / f"{s}.csv"))]
    words = [x for label, word in VERBALIZER.items() for x in ("--verbalizer", f"{label}={word}")]
    return [
        "discover", "--model", str(place / "tiny"), "--out", str(out), "--task", "files", *files,
        "--template", TEMPLATE, *words, "--examples", str(examples), "--k", "2", *more,
    ]  # fmt: skip


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_from_files_to_the_report(place: Path, tmp_path: Path):
    out = tmp_path / "run"
    printed = run(*discover(place, out, "--ablation", "--calibrate"))
    assert leads_to(printed) == ["faithfulness", "report"]
    circuit = Circuit.load(out / "circuit.json")
    scores = HeadScores.load(out / "scores.json")
    assert circuit.heads == tuple(sorted(scores.top(2, by="signed")))
    assert all(str(head) in printed for head in circuit.heads)
    assert "Spearman" in printed
    assert circuit.provenance is not None
    assert circuit.provenance.examples == {"bad": 2, "fine": 2, "good": 2}

    printed = run("faithfulness", str(out), "--examples", "6", "--draws", "2")
    curve = FaithfulnessCurve.load(out / "faithfulness.json")
    assert curve.sizes[-1] == 8 and float(curve.faithfulness[-1]) == pytest.approx(1, abs=1e-5)
    assert f"CPR {curve.cpr:.3f}" in printed
    assert leads_to(printed) == ["report"]

    printed = run("trace", str(out), "--examples", "3", "--width", "2", "--fan-in", "1")
    traced = Circuit.load(out / "graph.json")
    assert traced.graph is not None
    assert all(edge.name in printed for edge in traced.graph.kept_edges)
    assert sum(edge.target == "logits" for edge in traced.graph.kept_edges) == 2

    everything = graph_from_circuit(replace(circuit, heads=all_heads(2, 4), graph=None))
    written = str(write_graph(everything, tmp_path / "graph.json"))
    printed = run("faithfulness", str(out), "--graph", written, "--examples", "6", "--draws", "2")
    assert "110 edges: f 1.000" in printed and "as many random edges 1.000" in printed
    with pytest.raises(InputError, match="expected direct edges"):
        paths = str(write_graph(traced, tmp_path / "traced.json"))
        run("faithfulness", str(out), "--graph", paths, "--examples", "6")

    printed = run("report", str(out))
    page = (out / "report.html").read_text("utf-8")
    assert "Circuit graph" in page
    assert str(out / "report.html") in printed.replace("\n", "")
    assert all(str(head) in page for head in circuit.heads)
    assert not list(out.glob("*partial*"))

    assert "weights" not in run("show", str(out / "circuit.json"))


@pytest.mark.filterwarnings("always:.*no better than chance")
def test_a_run_on_counterfactual_prompts(place: Path, tmp_path: Path, monkeypatch):
    """A column of the files holds the pairs; scores, curve, graph and report use them."""
    files = []
    for split in ("train", "valid"):
        lines = (place / "data" / f"{split}.csv").read_text("utf-8").splitlines()
        texts = [line.split(",")[0] for line in lines[1:]]
        pairs = [" ".join(reversed(text.split())) for text in texts]
        pairs = [pair if len(pair) > 4 else f"w{30 + i}" for i, pair in enumerate(pairs)]
        rows = [f"{line},{pair}" for line, pair in zip(lines, ["other", *pairs], strict=True)]
        (tmp_path / f"{split}.csv").write_text("\n".join(rows) + "\n", "utf-8")
        files += [f"--{split}", str(tmp_path / f"{split}.csv")]
    words = [x for label, word in VERBALIZER.items() for x in ("--verbalizer", f"{label}={word}")]
    given = [
        "discover", "--model", str(place / "tiny"), "--task", "files", *files, "--template",
        TEMPLATE, *words, "--examples", "6", "--k", "2", "--baseline", "counterfactual",
    ]  # fmt: skip
    out = tmp_path / "run"
    run(*given, "--pair", "other", "--out", str(out))
    scores = HeadScores.load(out / "scores.json")
    opened = runs.open_run(out, lambda _: None)
    expected = cdt.score_heads(
        opened.model, opened.scored(), cdt.counterfactual_baseline(opened.model, opened.task.train),
        progress=False,
    )  # fmt: skip
    assert scores.values.allclose(expected.values, atol=1e-6)
    assert not (out / "baseline.json").exists()  # the task holds the prompts
    run("faithfulness", str(out), "--examples", "6", "--draws", "1")
    curve = FaithfulnessCurve.load(out / "faithfulness.json")
    assert curve.provenance.options["baseline"] == "counterfactual"
    run("trace", str(out), "--examples", "3", "--width", "2", "--fan-in", "1")
    page = Path(run("report", str(out)).split()[-1]).read_text("utf-8")
    assert "Circuit graph" in page and f"{curve.cpr:.2f}" in page

    # A mean over the pairs is one over examples that have other lengths as well.
    other = [*given[: given.index("--baseline")], "--baseline", "counterfactual-mean"]
    run(*other, "--pair", "other", "--out", str(tmp_path / "mean"))
    kept = cdt.Baseline.load(tmp_path / "mean" / "baseline.json")
    assert kept.means.equal(
        cdt.mean_activations(opened.model, opened.task.train.pairs, progress=False).means
    )

    # What does not fit is refused before the model is loaded.
    monkeypatch.setattr(runs, "load_for", None)
    with pytest.raises(InputError, match=r"files/train: 24 of 24 .*no counterfactual.*--pair"):
        run(*given, "--out", str(tmp_path / "x"))
    long = (tmp_path / "valid.csv").read_text("utf-8").splitlines()
    long[2] += " w40"
    (tmp_path / "valid.csv").write_text("\n".join(long) + "\n", "utf-8")
    with pytest.raises(InputError, match=r"valid\.csv, line 3: the prompt has .* tokens"):
        run(*given, "--pair", "text=other", "--out", str(tmp_path / "x"))
    for wrong, said in {
        ("--pair", "other", "--baseline", "mean"): "--pair 'other' has no effect with .* 'mean'",
        ("--pair-label", "label"): "--pair-label 'label' has no effect",
        ("--pair", "other", "--baseline-examples", "6"): "--baseline-examples 6 has no effect",
        ("--data", "data"): "--data data has no effect with files of your own; omit it",
    }.items():
        kept = given[: given.index("--baseline")] if "--baseline" in wrong else given
        with pytest.raises(InputError, match=said):
            run(*kept, *wrong, "--out", str(tmp_path / "x"))
    with pytest.raises(InputError, match="task 'ioi': has data of its own; name the task files"):
        run(*("ioi" if word == "files" else word for word in given), "--out", str(tmp_path / "x"))
    named = ["discover", "--model", str(place), "--task", "xnli", "--out", str(tmp_path / "x")]
    with pytest.raises(InputError, match="--label-column tone has no effect with the task 'xnli'"):
        run(*named, "--label-column", "tone")
    with pytest.raises(InputError, match=r"pair 'text=other,w': expected one column, or column="):
        run(*given, "--pair", "text=other,w", "--out", str(tmp_path / "x"))


def test_a_sample_is_swept_where_the_circuit_is_open(place: Path, tmp_path: Path):
    """Twelve prompts; all heads are swept on six of them, and the open ones on twelve."""
    out, other = tmp_path / "run", tmp_path / "other"
    printed = run(*discover(place, out, "--exact", "12", "--decide", examples=15))
    scores = HeadScores.load(out / "scores.json")
    known = set((~torch.isnan(scores.corrections[0])).sum(0).flatten().tolist())
    assert scores.looks == 2 and known <= {6, 12} and len(scores.example_labels) == 15
    assert f"split-half reliability {reliability(scores).split_half:.2f} on 15" in printed
    left = scores.undecided(k=2)
    inside = sum(head in scores.select(k=2) for head in left)
    words = f"at 95 % confidence {2 - inside} of the circuit's 2 heads belong to it; "
    assert f"{words}{len(left) - inside} heads outside of it may" in printed.replace("\n", " ")
    page = Path(run("report", str(out)).split()[-1]).read_text("utf-8")
    assert "12 of 15 examples" in page and "selected again" in page
    run(*discover(place, other, "--exact", "6", examples=15))
    plain = HeadScores.load(other / "scores.json")
    assert plain.looks == 1 and int((~torch.isnan(plain.corrections[0][:, 0, 0])).sum()) == 6
    with pytest.raises(InputError, match=r"other settings \(exact, decide\)"):
        run(*discover(place, out, examples=15))
    with pytest.raises(InputError, match=r"other settings \(k\)"):  # they are those of k = 2
        given = discover(place, out, "--exact", "12", "--decide", examples=15)
        given[given.index("--k") + 1] = "3"
        run(*given)


def test_a_run_goes_on_and_keeps_what_it_has(place: Path, tmp_path: Path):
    out = tmp_path / "run"
    run(*discover(place, out))
    before = (out / "scores.json").read_bytes()
    stamp = (out / "scores.json").stat().st_mtime_ns
    run(*discover(place, out))
    assert (out / "scores.json").read_bytes() == before
    assert (out / "scores.json").stat().st_mtime_ns == stamp


def test_a_damaged_file_of_a_run_is_made_again(place: Path, tmp_path: Path):
    out = tmp_path / "run"
    run(*discover(place, out))
    scores = HeadScores.load(out / "scores.json")
    text = (out / "scores.json").read_text("utf-8")
    (out / "scores.json").write_text(text[: len(text) // 2], "utf-8")
    run(*discover(place, out))
    assert HeadScores.load(out / "scores.json").values.equal(scores.values)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "400",
    }
    return subprocess.run(
        [sys.executable, "-m", "cdt_lens.cli", *arguments],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip


def mistakes(place: Path, tmp_path: Path) -> dict[str, tuple[list[str], list[str]]]:
    """A mistake -> the arguments, and what its one line must say."""
    one_label = tmp_path / "one.csv"
    one_label.write_text("text,label\nw20,bad\nw21,bad\n", "utf-8")
    typo = tmp_path / "typo.csv"
    typo.write_text("text,label\nw20,bad\nw21,fien\nw22,good\n", "utf-8")
    empty = tmp_path / "empty.csv"
    empty.write_text("text,label\n", "utf-8")
    cut = tmp_path / "cut"
    save_model(cut)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    ok = discover(place, tmp_path / "x")

    def with_train(path: Path) -> list[str]:
        i = ok.index("--train")
        return [*ok[: i + 1], str(path), *ok[i + 2 :]]

    return {
        "no model": (["discover", "--model", str(tmp_path / "none"), "--out", "x"], ["none"]),
        "a cut file": (
            [*ok[:2], str(cut), *ok[3:]], ["cut", "damaged or incomplete"],
        ),
        "empty data": (with_train(empty), ["empty.csv"]),
        "a label without examples": (with_train(one_label), ["train", "fine"]),
        "a misspelt label": (with_train(typo), ["typo.csv", "3", "fien", "fine"]),
        "labels in one option": (
            [*ok, "--verbalizer", "a= w1,b= w2"], ["a= w1,b= w2", "again for each label"],
        ),
        "a label twice": ([*ok, "--verbalizer", "good= w12"], ["good= w12", "before"]),
        "no run": (["faithfulness", str(tmp_path / "nowhere")], ["nowhere", "discover"]),
        "an unknown task": (
            ["discover", "--model", str(place / "tiny"), "--out", "x", "--task", "io"], ["ioi"],
        ),
        "no such model to fetch": (["fetch", "gpt5"], ["smollm2-135m"]),
    }  # fmt: skip


MISTAKES = [
    "no model", "a cut file", "empty data", "a label without examples", "a misspelt label",
    "labels in one option", "a label twice", "no run", "an unknown task",
    "no such model to fetch",
]  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(mistake, place, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    arguments, said = mistakes(place, tmp_path)[mistake]
    monkeypatch.setattr(sys, "argv", ["cdt-lens", *arguments])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    printed = capfd.readouterr().err
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("cdt-lens:")]
    assert len(lines) == 1
    assert all(word in printed for word in said), printed
    assert not (tmp_path / "x").exists()


def test_in_a_process_of_its_own(place: Path, tmp_path: Path):
    result = command("report", str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.startswith("cdt-lens: ") and result.stderr.count("\n") == 1
    result = command("discover", "--rules", "wrong", "--model", "m", "--out", "o")
    assert result.returncode == 2 and "stable" in result.stderr


def test_another_models_run_is_refused(place: Path, tmp_path: Path, monkeypatch, capfd):
    out = tmp_path / "run"
    run(*discover(place, out))
    other = save_model(tmp_path / "other", "qwen2")
    body = json.loads((out / "run.json").read_text("utf-8"))
    assert body["settings"]["model"].endswith("tiny")
    arguments = [str(other) if a == str(place / "tiny") else a for a in discover(place, out)]
    monkeypatch.setattr(sys, "argv", ["cdt-lens", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    assert "model" in capfd.readouterr().err


# Rows to judge on


def one_file(place: Path, *more: str) -> list[str]:
    words = [x for label, word in VERBALIZER.items() for x in ("--verbalizer", f"{label}={word}")]
    return [
        "--model", str(place / "tiny"), "--task", "files", "--train",
        str(place / "data" / "train.csv"), "--template", TEMPLATE, *words, *more,
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["discover", "compare", "finetune"])
def test_one_file_without_a_split_is_refused_before_the_model_is_loaded(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
):
    monkeypatch.setattr(inputs, "load_model", None)
    with pytest.raises(CdtLensError, match=rf"{command}: expected --valid, .* or --split 0\.2"):
        run(command, *one_file(place), "--out", str(tmp_path / "x"))
    same = str(place / "data" / "train.csv")
    with pytest.raises(CdtLensError, match=r"train and valid are the same file"):
        run(command, *one_file(place, "--valid", same), "--out", str(tmp_path / "x"))
    other = str(place / "data" / "valid.csv")
    with pytest.raises(CdtLensError, match=r"valid.csv has validation examples; omit --split"):
        run(command, *one_file(place, "--valid", other, "--split", "0.2"), "--out", "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--exact", "2"), "--exact 2: expected at least 3, one prompt of each label"),
        (("--rules", "official", "--exact", "5"), "these rules have no first-order form"),
        (("--rules", "official", "--decide"), "omit exact, precision, minutes and decide"),
    ],
)
def test_a_sample_that_cannot_be_swept_is_refused_before_the_model_is_loaded(
    options, told, place: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(runs, "load_for", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(CdtLensError, match=told):
        run(*discover(place, tmp_path / "run", *options))
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_copy_of_the_training_file_is_refused(place: Path, tmp_path: Path):
    copy = tmp_path / "copy.csv"
    copy.write_bytes((place / "data" / "train.csv").read_bytes())
    for command in ("discover", "finetune"):
        given = one_file(place, "--valid", str(copy), "--out", str(tmp_path / "x"))
        given += ["--scope", "norms"] if command == "finetune" else []
        with pytest.raises(CdtLensError, match="all 24 examples are also in files/train"):
            run(command, *given)


@pytest.mark.filterwarnings("always:.*no better than chance")
def test_every_command_sets_the_same_rows_aside(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[str] = []
    make = inputs.make_task

    def watched(*given: object) -> Task:
        task: Task = make(*given)  # type: ignore[arg-type]
        seen.append(task.valid.hash)
        return task

    for module in (inputs, runs):
        monkeypatch.setattr(module, "make_task", watched)
    split = ("--split", "0.25")
    out = str(tmp_path / "run")
    printed = run("discover", *one_file(place, *split), "--out", out, "--examples", "6", "--k", "2")
    circuit = Circuit.load(tmp_path / "run" / "circuit.json")
    run("faithfulness", out, "--draws", "1", "--examples", "6")
    run("finetune", *one_file(place, *split), "--out", str(tmp_path / "f"), "--scope", "norms",
        "--epochs", "1", "--seed", "3")  # fmt: skip
    assert len(seen) >= 3 and len(set(seen)) == 1
    scores = HeadScores.load(tmp_path / "run" / "scores.json")
    assert len(circuit) == 2 and ("no better than chance" in printed) == (scores.direction <= 0)


def test_a_run_without_validation_rows_says_how_to_get_them(place: Path, tmp_path: Path):
    test = str(place / "data" / "test.csv")
    out = str(tmp_path / "run")
    run("discover", *one_file(place, "--test", test), "--out", out, "--examples", "6", "--k", "2")
    with pytest.raises(CdtLensError, match=r"this task has train, test\. .* --split 0\.2"):
        run("faithfulness", out)
    with pytest.raises(CdtLensError, match=r"split '0\.2': expected train, valid or test"):
        run("faithfulness", out, "--split", "0.2")
    run("faithfulness", out, "--split", "test", "--examples", "6", "--draws", "1")
