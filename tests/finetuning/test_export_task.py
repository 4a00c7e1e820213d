"""What an exported folder says about its task: the same tokens, one file, and code that runs."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.sample_results import fine_tuning
from helpers.saved import VERBALIZER as WORDS, save_model, write_task
from helpers.tokenizers import ROWS, TEMPLATE, TOKENIZERS, VERBALIZER, save_tokenizer
from transformers import AutoConfig, AutoTokenizer

import cdt_lens as cdt
from cdt_lens.core.errors import InputError
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.export_task import write_task as write_export
from cdt_lens.finetuning.model_card import TASK_FILE
from cdt_lens.finetuning.predict import predict
from cdt_lens.tasks.card import TaskCard
from cdt_lens.tasks.prompts import build_examples
from cdt_lens.tasks.rows import read_table
from cdt_lens.tasks.task import Examples, Task

REAL = Path(os.environ.get("CDT_LENS_SMOLLM2", "models/smollm2-135m"))

FAMILIES = {"gpt2": "gpt2", "gpt2 with BOS": "gpt2", "neox": "gpt_neox", "qwen2": "qwen2"}


def task_of(tokenizer: Any, prepend_bos: bool | None = None, template: str = TEMPLATE) -> Task:
    data = build_examples(
        ROWS, tokenizer=tokenizer, template=template, verbalizer=VERBALIZER,
        prepend_bos=prepend_bos, name="t/train",
    )  # fmt: skip
    ids = {example.label: example.answers[0] for example in data}
    none = Examples((), data.labels, "none")
    return Task("t", data.labels, VERBALIZER, ids, template, data, none, none, none)


def adapter_of(task: Task, tokenizer: Any) -> Adapter:
    return replace(fine_tuning().adapter, task=TaskCard.of(task, tokenizer))


def check_tokens(source: str | Path, task: Task, folder: Path) -> None:
    """Plain `tokenizer(text)` gives the tokens that were trained on."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    write_export(adapter_of(task, tokenizer), tokenizer, "base", folder)
    again = AutoTokenizer.from_pretrained(folder)
    for example in task.train:
        assert tuple(again(example.prompt).input_ids) == example.tokens


@pytest.mark.parametrize("prepend_bos", [None, True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_exported_tokenizer_gives_the_tokens_of_the_training(name, prepend_bos, tmp_path):
    tokenizer = save_tokenizer(name, tmp_path / "base")
    if prepend_bos and tokenizer.bos_token is None:
        pytest.skip("no BOS")
    out = tmp_path / "out"
    # The model's configuration has a say in the class of the tokenizer.
    AutoConfig.for_model(FAMILIES.get(name, "llama")).save_pretrained(out)
    check_tokens(tmp_path / "base", task_of(tokenizer, prepend_bos), out)


@pytest.mark.parametrize("prepend_bos", [None, False])
@pytest.mark.parametrize("name", ["words", "words with BOS"])
def test_a_template_that_begins_with_bos_gets_no_second_one(name, prepend_bos, tmp_path):
    tokenizer = save_tokenizer(name, tmp_path / "base")
    task = task_of(tokenizer, prepend_bos, template="<s> {text} so:")
    assert [ids.count(1) for ids in (e.tokens for e in task.train)] == [1] * 4
    (tmp_path / "out").mkdir()
    check_tokens(tmp_path / "base", task, tmp_path / "out")


@pytest.mark.skipif(not REAL.is_dir(), reason="cdt-lens fetch smollm2-135m gets the model")
@pytest.mark.parametrize("prepend_bos", [None, False])
def test_the_real_tokenizer_of_smollm2(prepend_bos, tmp_path):
    verbalizer = {"negative": " negative", "positive": " positive"}
    rows = [{"text": f"it was {label}", "label": label} for label in verbalizer]
    tokenizer = AutoTokenizer.from_pretrained(REAL)
    template = "{text}\nSentiment:"
    data = build_examples(
        rows, tokenizer=tokenizer, template=template, verbalizer=verbalizer, prepend_bos=prepend_bos
    )
    none = Examples((), data.labels, "none")
    ids = {example.label: example.answers[0] for example in data}
    task = Task("t", data.labels, verbalizer, ids, template, data, none, none, none)
    check_tokens(REAL, task, tmp_path)


def test_a_tokenizer_that_cannot_be_saved_so_is_refused(tmp_path):
    tokenizer = save_tokenizer("words", tmp_path / "base")
    card = TaskCard.of(task_of(tokenizer), tokenizer)
    assert card is not None

    class Slow:
        """A tokenizer without a post-processor, such as those in Python."""

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return tokenizer(*arguments, **options)

        def save_pretrained(self, folder: Path) -> None:
            tokenizer.save_pretrained(folder)

    adapter = replace(fine_tuning().adapter, task=replace(card, bos_ids=(1, 1)))
    with pytest.raises(InputError, match=r"Slow cannot be saved .* begin with \[1, 1\]"):
        write_export(adapter, Slow(), "base", tmp_path)


# The whole way -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Task, Any]:
    """A folder, its task and the trained model, with few-shot examples and a label prior."""
    place = tmp_path_factory.mktemp("exported")
    save_model(place / "base")
    model = cdt.load_model(place / "base", backend="bridge")
    task = cdt.task_from_files(
        write_task(place / "data"), tokenizer=model.tokenizer, template="{text} w5",
        verbalizer=WORDS, shots=3,
    )  # fmt: skip
    task = cdt.calibrate(model, task)
    options: dict[str, Any] = {"scope": "norms", "epochs": 1, "learning_rate": 1e-2}
    result = cdt.finetune(model, task, **options, keep=True, progress=False)
    cdt.export(result.adapter, place / "base", place / "out")
    return place, task, model


def test_predictions_of_the_folder_are_those_that_were_judged(exported):
    place, task, model = exported
    rows = read_table(place / "data" / "valid.csv")
    frame = predict(place / "out", rows.rows, places=rows.places, batch_size=5)
    gold = [row["label"] for row in rows.rows]
    judged = cdt.evaluate(model, task.valid, task)
    assert (frame["prediction"] == gold).mean() == judged.accuracy
    table = judged.confusion
    for label in task.labels:
        assert (frame["prediction"] == label).sum() == table[label].sum()
    parts = frame[[f"p({label})" for label in task.labels]]
    assert parts.sum(axis=1).to_numpy() == pytest.approx([1] * len(rows.rows))


def test_the_snippet_of_the_readme_runs_without_this_package(exported, monkeypatch, capsys):
    place, _, _ = exported
    readme = (place / "out" / "README.md").read_text("utf-8")
    assert "w5" in readme and all(word in readme for word in WORDS.values())
    code, own = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert "cdt.load_model(folder)" in own
    assert "cdt_lens" not in code
    row = next(iter(read_table(place / "data" / "valid.csv").rows))
    code = code.replace("Put your text here.", str(row["text"]))
    monkeypatch.chdir(place / "out")
    exec(code, {})
    printed = capsys.readouterr().out
    expected = predict(place / "out", [row])["prediction"][0]
    assert printed.split()[0] == expected


def test_the_file_holds_the_task(exported):
    place, task, _ = exported
    card = TaskCard.load(place / "out" / TASK_FILE)
    assert (card.template, card.prefix, card.labels) == (task.template, task.prefix, task.labels)
    assert card.verbalizer_ids == task.verbalizer_ids and card.prior == task.prior
    assert card.bos_ids == task.train[0].tokens[:1] == (1,)
    assert card.longest == max(len(e.tokens) for s in (task.train, task.valid) for e in s)


def test_prompts_made_by_hand_have_no_task(tmp_path):
    tokenizer = save_tokenizer("words", tmp_path / "base")
    write_export(fine_tuning().adapter, tokenizer, "base", tmp_path)
    assert "given as token ids" in (tmp_path / "README.md").read_text("utf-8")
    with pytest.raises(InputError, match=f"holds no {TASK_FILE}"):
        predict(tmp_path, [{"text": "b"}])


@pytest.mark.parametrize("stated", [True, False])
def test_a_model_that_was_trained_with_eos_as_bos_predicts(stated, tmp_path):
    base = save_model(tmp_path / "base")
    path = base / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8"))
    del settings["bos_token"]
    path.write_text(json.dumps(settings | ({"bos_token": None} if stated else {})), "utf-8")
    model = cdt.load_model(base, backend="bridge")
    task = cdt.task_from_files(
        write_task(tmp_path / "data"), tokenizer=model.tokenizer, template="{text} w5",
        verbalizer=WORDS, prepend_bos=True,
    )  # fmt: skip
    assert {example.tokens[0] for example in task.train} == {2}
    options: dict[str, Any] = {"scope": "norms", "epochs": 1, "learning_rate": 1e-2}
    result = cdt.finetune(model, task, **options, keep=True, progress=False)
    cdt.export(result.adapter, base, tmp_path / "out", allow_unchanged=True)
    rows = read_table(tmp_path / "data" / "valid.csv")
    frame = predict(tmp_path / "out", rows.rows, places=rows.places)
    judged = cdt.evaluate(model, task.valid, task)
    assert list(frame["prediction"]) == list(judged.answers["answer"])
