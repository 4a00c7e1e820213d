"""`cdt-lens predict`: an exported folder and new rows in, CSV out, mistakes in a line."""

from __future__ import annotations

import csv
import errno
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.saved import TEMPLATE, VERBALIZER, save_model, write_task
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from cdt_lens.cli import app as cli
from cdt_lens.core.errors import CdtLensError
from cdt_lens.finetuning import predict as prediction
from cdt_lens.finetuning.model_card import TASK_FILE
from cdt_lens.models.hugging_face import load_hugging_face


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and a folder that `finetune` and `export` have made of it."""
    folder = tmp_path_factory.mktemp("predict")
    save_model(folder / "tiny")
    files = write_task(folder / "data")
    words = [x for label, word in VERBALIZER.items() for x in ("--verbalizer", f"{label}={word}")]
    run(
        "finetune", "--model", str(folder / "tiny"), "--out", str(folder / "tuned"), "--task",
        "files", "--train", str(files["train"]), "--split", "0.2", "--template", TEMPLATE, *words, "--scope",
        "norms", "--epochs", "1", "--learning-rate", "0.01",
    )  # fmt: skip
    out = str(folder / "out")
    run("export", str(folder / "tuned"), "--base", str(folder / "tiny"), "--out", out)
    return folder


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def rows_of(printed: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(printed)))


def test_half_precision_makes_no_ties(place: Path, tmp_path: Path):
    """Logits of trained models are large; in bfloat16 those of two labels would often be equal."""
    model = AutoModelForCausalLM.from_pretrained(place / "tiny", dtype=torch.float32)
    head = model.get_output_embeddings()
    seen: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, given: seen.append(given[0][:, -1].detach()))
    with torch.no_grad():
        for start in range(60):
            model(torch.tensor([[1, 20 + start, 30, 3]]))
        # All label words get a logit near 20, and differ by less than 1.
        shift = torch.linalg.lstsq(torch.cat(seen), torch.full((60, 1), 20.0)).solution[:, 0]
        head.weight[10:13] = shift + 0.6 * head.weight[10:13]
    handle.remove()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(place / "tiny").save_pretrained(tmp_path / "half")
    shutil.copy(place / "out" / TASK_FILE, tmp_path / "half" / TASK_FILE)
    texts = [f"w{20 + i % 40} w{20 + i // 4}" for i in range(160)]
    found = prediction.predict(tmp_path / "half", [{"text": text} for text in texts])
    shares = torch.tensor(found[[f"p({label})" for label in VERBALIZER]].to_numpy())
    best = shares.topk(2, dim=1).values
    assert not bool((best[:, 0] == best[:, 1]).any())


def test_rows_keep_their_order_and_few_positions_are_unembedded(place: Path, monkeypatch):
    """Logits of every position of a batch can need more memory than the model."""
    unembedded: list[tuple[int, ...]] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        model, rest = load_hugging_face(*args, **kwargs)
        model.get_output_embeddings().register_forward_pre_hook(
            lambda _, given: unembedded.append(tuple(given[0].shape[:2]))
        )
        return model, rest

    monkeypatch.setattr(prediction, "load_hugging_face", load)
    texts = [" ".join(f"w{20 + (7 * i + j) % 40}" for j in range(1 + 5 * i % 9)) for i in range(12)]
    lengths = sorted(len(text.split()) for text in texts)
    found = prediction.predict(place / "out", [{"text": text} for text in texts], batch_size=4)
    assert unembedded == [(4, len({*lengths[i : i + 4]})) for i in (0, 4, 8)]

    model = AutoModelForCausalLM.from_pretrained(place / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place / "out")
    words = [tokenizer.encode(word)[-1] for word in VERBALIZER.values()]
    for text, shares in zip(texts, found.drop(columns="prediction").to_numpy(), strict=True):
        with torch.no_grad():
            prompt = tokenizer(TEMPLATE.format(text=text), return_tensors="pt").input_ids
            logits = model(prompt).logits[0, -1, words]
        assert torch.allclose(logits.softmax(-1), torch.tensor(shares).float(), atol=1e-6)


def test_texts_and_a_file_get_the_same_answers(place: Path, tmp_path: Path):
    texts = ["w20 w21", "w30, w40 :smile: [bold]"]
    with_texts = run("predict", str(place / "out"), *(x for t in texts for x in ("--text", t)))
    file = tmp_path / "rows.csv"
    with open(file, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["text", "id"], *([t, i] for i, t in enumerate(texts))])
    with_file = run("predict", str(place / "out"), "--file", str(file), "--batch-size", "1")
    one, two = rows_of(with_texts), rows_of(with_file)
    assert [row["text"] for row in one] == [row["text"] for row in two] == texts
    assert [row["id"] for row in two] == ["0", "1"]
    for a, b in zip(one, two, strict=True):
        assert a["prediction"] == b["prediction"] in VERBALIZER
        shares = {label: float(a[f"p({label})"]) for label in VERBALIZER}
        assert max(shares, key=lambda label: shares[label]) == a["prediction"]
        assert float(b[f"p({a['prediction']})"]) == pytest.approx(shares[a["prediction"]], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["out"], "expected either --text or --file"),
        (["out", "--text", "w20", "--file", "rows.csv"], "expected either --text or --file"),
        (["out", "--text", " "], "--text ' ', column 'text': empty"),
        (["out", "--text", "w20 </s> w21"], "--text .*: the text holds '</s>'"),
        (["out", "--text", " ".join(["w20"] * 70)], "has 72 tokens, the model reads at most 64"),
        (["out", "--file", "none.csv"], "none.csv: cannot be read"),
        (["out", "--file", "other.csv"], "other.csv, line 1 .*: no column 'text'"),
        (["out", "--file", "taken.csv"], "taken.csv: it has a column 'prediction'"),
        (["tiny", "--text", "w20"], "tiny: holds no cdt_task.json"),
        (["nowhere", "--text", "w20"], "nowhere: no such folder"),
    ],
)
def test_mistakes_are_one_line(place: Path, monkeypatch, arguments: list[str], said: str):
    monkeypatch.chdir(place)
    (place / "other.csv").write_text("words,label\nw20,bad\n", "utf-8")
    (place / "taken.csv").write_text("text,prediction\nw20,bad\n", "utf-8")
    with pytest.raises(CdtLensError, match=said) as caught:
        run("predict", *arguments)
    assert "\n" not in str(caught.value)


class Failing(io.StringIO):
    """A standard output that takes nothing."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, "No space left on device")


def ended(monkeypatch, stdout: Any, *arguments: str) -> object:
    """Run the command line with another standard output, and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["cdt-lens", *arguments])
    monkeypatch.setattr(sys, "stdout", stdout)
    for name in ("stderr", "excepthook"):  # which typer replaces
        monkeypatch.setattr(sys, name, getattr(sys, name))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def test_a_file_gets_utf8_whatever_the_encoding_of_the_output(place: Path, tmp_path, monkeypatch):
    """Nothing that a row holds may end the command when its work is done."""
    file, taken = tmp_path / "rows.jsonl", io.BytesIO()
    row = {"text": "w20 \u65e5\u672c\u8a9e w21", "half": "\ud800", "colour": "\x1b[31mred"}
    file.write_text(json.dumps(row), "utf-8")
    stdout = io.TextIOWrapper(taken, encoding="cp1252")
    assert ended(monkeypatch, stdout, "predict", str(place / "out"), "--file", str(file)) == 0
    (printed,) = rows_of(taken.getvalue().decode("utf-8"))
    assert printed["text"] == row["text"] and printed["prediction"] in VERBALIZER
    assert printed["half"] == "\\ud800" and printed["colour"] == row["colour"]


@pytest.mark.parametrize("arguments", [["predict", "out", "--text", "w20"], ["show", "tuned"]])
def test_a_full_disk_is_one_line(place: Path, monkeypatch, capsys, arguments: list[str]):
    monkeypatch.chdir(place)
    assert ended(monkeypatch, Failing(errno.ENOSPC), *arguments) == 1
    said = "cdt-lens: standard output: cannot be written (No space left on device)"
    assert capsys.readouterr().err.splitlines()[-1] == said


def test_a_reader_that_has_gone_is_no_error_to_tell(place: Path, monkeypatch, capsys):
    arguments = ["predict", str(place / "out"), "--text", "w20"]
    assert ended(monkeypatch, Failing(errno.EPIPE), *arguments) == 1
    assert "cdt-lens:" not in capsys.readouterr().err


def test_show_leads_from_an_exported_folder_to_predict(place: Path):
    """A folder without a task, which predict refuses, leads elsewhere."""
    for folder, said in (("out", "cdt-lens predict labels"), ("tiny", "cdt-lens discover --model")):
        with pytest.raises(CdtLensError, match=f"{folder}: holds a model; {said}"):
            run("show", str(place / folder))


def test_a_folder_whose_model_is_gone_is_refused(place: Path, tmp_path: Path):
    card = (place / "out" / "cdt_task.json").read_bytes()
    (tmp_path / "cdt_task.json").write_bytes(card)
    with pytest.raises(CdtLensError, match=r"expected a Hugging Face folder with a config.json"):
        run("predict", str(tmp_path), "--text", "w20")


def test_several_columns_need_a_file(place: Path, tmp_path: Path):
    from dataclasses import replace

    from cdt_lens.tasks.card import TaskCard

    card = TaskCard.load(place / "out" / "cdt_task.json")
    replace(card, template="{text} {other} w3").save(tmp_path / "cdt_task.json")
    with pytest.raises(CdtLensError, match="columns text, other; give a file with them by --file"):
        run("predict", str(tmp_path), "--text", "w20")


def test_whole_numbers_of_a_column_that_a_row_lacks_stay_whole(place: Path, tmp_path: Path):
    lines = [{"id": 1234567890123456789, "text": "w20"}, {"text": "w21"}, {"id": 7, "text": "w22"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    printed = rows_of(run("predict", str(place / "out"), "--file", str(file)))
    assert [row["id"] for row in printed] == ["1234567890123456789", "", "7"]


def test_a_row_is_read_alike_whatever_other_rows_are_there(place: Path, tmp_path: Path):
    """Longrope takes its long factors for a batch with one long prompt."""
    shutil.copytree(place / "out", tmp_path / "long")
    config = transformers.Phi3Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, original_max_position_embeddings=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "attention_factor": 1.0,
        },
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Phi3ForCausalLM(config)
    for weight in model.parameters():
        weight.data *= 4
    model.save_pretrained(tmp_path / "long")
    short = [{"text": f"w{20 + i} w{30 + i}"} for i in range(6)]
    alone = prediction.predict(tmp_path / "long", short)
    beside = prediction.predict(tmp_path / "long", [*short, {"text": " ".join(["w40"] * 30)}])
    columns = [name for name in alone if name.startswith("p(")]
    assert alone[columns].to_numpy() == pytest.approx(beside[columns].to_numpy()[:6], abs=1e-5)
