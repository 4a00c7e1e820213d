"""The commands that train, from the outside: files in, files and a table out, mistakes in a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.leading_on import leads_to
from helpers.locks import held_elsewhere
from helpers.saved import TEMPLATE, VERBALIZER, save_model, write_task
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from cdt_lens.cli import app as cli
from cdt_lens.core.errors import CdtLensError, InputError
from cdt_lens.finetuning.adapter import Adapter


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    save_model(folder / "tiny")
    write_task(folder / "data")
    return folder


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def data(place: Path, *splits: str) -> list[str]:
    splits = splits or ("train", "valid")
    files = [x for s in splits for x in (f"--{s}", str(place / "data" / f"{s}.csv"))]
    words = [x for label, word in VERBALIZER.items() for x in ("--verbalizer", f"{label}={word}")]
    return ["--task", "files", *files, "--template", TEMPLATE, *words]


def test_circuit_to_adapter_to_checkpoint(place: Path, tmp_path: Path):
    model = str(place / "tiny")
    run("discover", "--model", model, "--out", str(tmp_path / "run"), *data(place),
        "--examples", "6", "--k", "2")  # fmt: skip
    circuit = tmp_path / "run"
    out = tmp_path / "adapted"
    printed = run(
        "finetune", "--model", model, "--circuit", str(circuit), "--out", str(out),
        *data(place, "train"), "--valid", str(place / "data" / "test.csv"), "--epochs", "2", "--learning-rate", "0.01", "--option",
        "norms=circuit", "--option", "clip=0.5", "--source-valid",
        str(place / "data" / "test.csv"), "--log-with", "tensorboard",
    )  # fmt: skip
    assert leads_to(printed) == ["export"]
    adapter = Adapter.load(out)
    assert f"{adapter.elements:,} of" in printed
    assert "2 heads and the norms of their layers" in " ".join(printed.split())
    again = ["--model", model, "--out", str(out), *data(place), "--scope", "norms"]
    kept = (out / "adapter.json").read_bytes()
    with pytest.raises(CdtLensError, match="holds a finished adapter; name another folder"):
        run("finetune", *again)
    assert (out / "adapter.json").read_bytes() == kept
    assert adapter.provenance.options["norms"] == "circuit"
    assert adapter.provenance.options["clip"] == 0.5
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    losses = EventAccumulator(str(out / "logs")).Reload().Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3, 4]
    assert (out / "report.html").exists() and (out / "history.csv").exists()
    assert run("report", str(out)).replace("\n", "") == str(out / "report.html")
    for option in ("--prompts", "--heads"):
        with pytest.raises(InputError, match=f"{option}: has no effect with .*finetune has writ"):
            run("report", str(out), option, "9")
    assert not (out / "checkpoint.json").exists()
    shown = run("show", str(out))
    assert "scope decision" in shown and "model_hash" in shown
    assert all(str(head) in shown for head in adapter.heads)
    assert "ln_final.w" not in set(adapter.to_dataframe()["weight"]), "norms=circuit trains its own"
    printed = run("export", str(out), "--base", model, "--out", str(tmp_path / "hf"))
    assert leads_to(printed) == ["predict"]
    base, new = (AutoModelForCausalLM.from_pretrained(p) for p in (model, tmp_path / "hf"))
    changed = {
        name for name, value in new.state_dict().items()
        if not torch.equal(value, base.state_dict()[name])
    }  # fmt: skip
    assert changed and all("self_attn" in n or "norm" in n for n in changed)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--option", "norm=all"], "training option 'norm': unknown; did you mean 'norms'?"),
        (["--option", "norms"], "--option 'norms': expected name=value"),
        (["--option", "norms=all,clip=1"], "--option 'norms=all,clip=1': expected name=value"),
        (["--option", "clip=1", "--option", "clip=2"], "--option 'clip=2': clip was given before"),
        (["--option", "epochs=5"], "--option: epochs has an option of its own; give --epochs 5"),
        (["--scope", "ful"], "did you mean 'full'?"),
        (["--scope", "decision"], "scope 'decision': expected a circuit"),
        (["--source", "english"], "--source english: your own files have no languages"),
        (["--option", "lora_rank=4"], "lora_rank=4: has no effect with the scope 'norms'; omit it"),
        (["--learning-rate", "-1"], "--learning-rate -1.0: expected a number above 0"),
    ],
)
def test_mistakes_are_one_line(place: Path, tmp_path: Path, arguments: list[str], told: str):
    with pytest.raises(CdtLensError, match=told.replace("?", r"\?")):
        run(
            "finetune", "--model", str(place / "tiny"), "--out", str(tmp_path), *data(place),
            *([] if "--scope" in arguments else ["--scope", "norms"]), *arguments,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("scope", "told"),
    [("full", "(100.00%): every weight;"), ("norms", "): the norms;"), ("lora", "): low-rank")],
)
def test_what_was_trained_is_told_as_it_was(place: Path, tmp_path: Path, scope: str, told: str):
    printed = run(
        "finetune", "--model", str(place / "tiny"), "--out", str(tmp_path / "out"), *data(place),
        "--scope", scope, "--epochs", "1", "--backend", "bridge",
    )  # fmt: skip
    assert told in " ".join(printed.split())


def test_a_training_that_learnt_nothing_says_so_and_is_not_exported(place: Path, tmp_path: Path):
    model, out = str(place / "tiny"), tmp_path / "out"
    printed = run(
        "finetune", "--model", model, "--out", str(out), *data(place), "--scope", "norms",
        "--epochs", "1", "--learning-rate", "1e-12",
    )  # fmt: skip
    assert "Nothing was learnt: " in " ".join(printed.split())
    assert leads_to(printed) == [], "export would refuse it"
    to = ["export", str(out), "--base", model, "--out", str(tmp_path / "hf")]
    with pytest.raises(CdtLensError, match="changes no weight.*--allow-unchanged"):
        run(*to)
    run(*to, "--allow-unchanged")
    with pytest.raises(InputError, match="--allow-unchanged: for a checkpoint; omit it"):
        run(*to, "--allow-unchanged", "--to-peft")


def test_a_transfer_from_its_file(place: Path, tmp_path: Path):
    files = {s: str(place / "data" / f"{s}.csv") for s in ("train", "valid", "test")}
    words = "\n".join(f"{label} = {word!r}" for label, word in VERBALIZER.items())
    paths = "\n".join(f"{split} = {path!r}" for split, path in files.items())
    config = tmp_path / "transfer.toml"
    config.write_text(
        f"""
        model = {str(place / "tiny")!r}
        [task]
        name = "files"
        source = "a"
        targets = ["b"]
        template = {TEMPLATE!r}
        [task.verbalizer]\n{words}
        [task.files.a]\n{paths}
        [task.files.b]\n{paths}
        [proxy]
        epochs = 1
        [discovery]
        examples = 6
        k = 2
        faithfulness_examples = 6
        draws = 1
        [transfer]
        scopes = ["decision", "near-zero"]
        epochs = 1
        """
    )
    out = tmp_path / "run"
    printed = run("transfer", str(config), "--out", str(out))
    assert "near-zero" in printed and "(none)" in printed and str(out / "report.html") in printed
    assert "gap rule" in printed and "race rule" in printed
    shown = run("show", str(out / "result.json"))
    assert "decision" in shown and "model_hash" in shown


@pytest.mark.parametrize("hours", ["0", "-1", "nan"])
def test_a_transfer_of_no_time_is_an_unusable_option(tmp_path: Path, hours: str):
    given = ["transfer", "none.toml", "--out", str(tmp_path), "--hours", hours]
    result = CliRunner().invoke(cli.app, given)
    assert result.exit_code == 2
    assert f"'--hours': {hours} is not above 0" in " ".join(result.output.split())


def test_a_folder_in_which_another_process_writes_is_refused(tmp_path: Path):
    """Before anything is read or loaded: the two would mix their logs."""
    other = held_elsewhere(tmp_path / "out")
    try:
        with pytest.raises(InputError, match=f"out: in use by process {other.pid} "):
            call = ["finetune", "--model", "none", "--out", str(tmp_path / "out")]
            cli.app(call, standalone_mode=False)
    finally:
        other.kill()
        other.communicate()


def test_a_run_that_was_stopped_before_its_page_goes_on(place: Path, tmp_path: Path, monkeypatch):
    command = [
        "finetune", "--model", str(place / "tiny"), "--out", str(tmp_path / "out"), *data(place),
        "--scope", "norms", "--epochs", "1", "--learning-rate", "0.01",
    ]  # fmt: skip

    def stopped(*_: object, **__: object) -> None:
        raise InputError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="the disk is full"):
        patch.setattr("cdt_lens.viz.report.report.render_report", stopped)
        run(*command)
    adapter = Adapter.load(tmp_path / "out")
    run(*command)
    assert (tmp_path / "out" / "report.html").exists()
    again = Adapter.load(tmp_path / "out").whole
    assert again.keys() == adapter.whole.keys()
    assert all(torch.equal(again[name], value) for name, value in adapter.whole.items())
