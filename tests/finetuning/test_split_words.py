"""Training, export and prediction with label words of several tokens, against plain transformers."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import split_words
from helpers.checks import assert_same_bits
from helpers.hf_layout import home, norms
from helpers.saved import save_model, write_task
from helpers.shared import models
from helpers.tiny_models import Float64Throughout, build
from helpers.tiny_training import HEADS, QUICK, task as plain_task, values
from helpers.wrapped import view
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import cdt_lens as cdt
from cdt_lens.core.errors import InputError
from cdt_lens.experiments.adapt import run_adapt
from cdt_lens.experiments.adapt_settings import AdaptSettings
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.answer_pass import AnswerPass
from cdt_lens.finetuning.export_task import TASK_FILE
from cdt_lens.finetuning.finetune import finetune
from cdt_lens.finetuning.predict import predict
from cdt_lens.finetuning.slices import head_slices, norm_weights
from cdt_lens.finetuning.trainable import SlicesAndWholes
from cdt_lens.finetuning.training_signal import training_signal
from cdt_lens.models.heads import all_heads
from cdt_lens.models.words import among
from cdt_lens.tasks.card import TaskCard
from cdt_lens.tasks.evaluate import evaluate
from cdt_lens.tasks.metrics import answer_loss
from cdt_lens.tasks.rows import read_table

WORDS = {"bad": " w10 w13", "fine": " w11", "good": " w10 w14 w15"}


def loss_of(found: Tensor, over: str = "labels") -> Tensor:
    """Minus the log of the answer's probability, among the words or among all texts."""
    return -(found.log_softmax(0) if over == "labels" else found)[0]


@models(("gpt2", "llama"))
def test_gradients_of_slices_are_autograds(family, backend, tokenizer_folder):
    data = split_words.examples()
    with Float64Throughout():
        own = build(family).requires_grad_(True)
        for item in data:
            loss_of(split_words.scores(split_words.plain(own), item)).backward()
        dense = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
        seen = view(family, backend, tokenizer_folder)
        parts = head_slices(seen, all_heads(seen.n_layers, seen.n_heads))
        trainable = SlicesAndWholes(seen, parts, tuple(norm_weights(seen)))
        passes = AnswerPass(seen)
        with trainable.attached(), seen.quiet(gradients=True):
            for batch in data.batches(4):
                found = among(passes(batch), batch.candidates)
                answer_loss(found, batch.is_answer, batch.is_candidate).sum().backward()
            found = {m.name: m.value.grad.clone() for m in trainable.masters}
        signal = training_signal(seen, data, batch_size=4)
    scale = max(float(g.norm()) for g in dense.values())
    for part in parts:
        for row, head in enumerate(part.index):
            expected = home(own, part.role, part.layer, head).of(dense)
            size = max(float(expected.norm()), 1e-3 * scale)
            assert float((found[part.name][row] - expected).norm()) <= 1e-10 * size, part.name
    for theirs, ours in norms(own).items():
        assert float((found[ours] - dense[theirs]).norm()) <= 1e-10 * float(dense[theirs].norm())
    roles = [p for p in parts if p.layer == 1 and p.role in ("W_Q", "W_O", "b_Q")]
    least = sum(float(found[part.name][2].abs().sum()) for part in roles) / len(data)
    assert float(signal[1, 2]) >= least * (1 - 1e-6) > 0


@models(("llama",))
@pytest.mark.parametrize("over", ["labels", "vocabulary"])
def test_the_first_loss_is_the_one_by_hand(family, backend, over, tokenizer_folder, tmp_path):
    data, log = split_words.task(train=6, valid=0), tmp_path / "log.jsonl"
    with Float64Throughout():
        hf, seen = build(family), view(family, backend, tokenizer_folder)
        finetune(
            seen, data, scope="norms", log=log, **QUICK | {"epochs": 1, "batch_size": 6}, loss=over
        )
        by_hand = [
            float(loss_of(split_words.scores(split_words.plain(hf), item), over))
            for item in data.train
        ]
    steps = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    first = next(step["loss"] for step in steps if "loss" in step)
    assert first == pytest.approx(sum(by_hand) / 6, abs=1e-9)


@pytest.mark.parametrize("scope", ["decision", "norms", "full", "lora"])
def test_every_scope_learns(scope, tokenizer_folder):
    """The adapter, applied to the model, gives the accuracy and loss that training reported."""
    if scope == "lora":
        pytest.importorskip("peft")
    seen, data = view("llama", "bridge", tokenizer_folder, torch.float32), split_words.task()
    heads = HEADS if scope == "decision" else None
    before = values(seen)
    result = finetune(seen, data, heads=heads, scope=scope, **QUICK | {"epochs": 6})
    for name, value in values(seen).items():
        assert_same_bits(value, before[name])
    table = result.history
    assert table["train_loss"].dropna().iloc[-1] < table["train_loss"].dropna().iloc[0]
    applied = result.adapter.apply(seen)
    found = evaluate(seen, data.valid, data)
    applied.remove()
    best = table[table["epoch"] == result.best_epoch].iloc[0]
    assert found.accuracy == best["target_accuracy"] and found.macro_f1 == best["target_macro_f1"]
    assert found.loss == pytest.approx(best["target_loss"], abs=1e-4)


def test_kept_streams_change_nothing(tokenizer_folder):
    """`keep_frozen` starts each row at the first trained layer."""
    found = []
    for keep in (True, False):
        seen = view("llama", "bridge", tokenizer_folder, torch.float32)
        result = finetune(
            seen, split_words.task(), heads=["L1H2"], keep_frozen=keep, norms="none", **QUICK
        )
        found.append(result.history["target_loss"].tolist())
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_run_resumes_to_the_same_bits(tokenizer_folder, tmp_path):
    seen, data = view("gpt2", "bridge", tokenizer_folder, torch.float32), split_words.task()
    whole = finetune(seen, data, scope="norms", **QUICK)
    path = tmp_path / "checkpoint.json"
    for _ in range(2):
        again = finetune(seen, data, scope="norms", checkpoint=path, keep_checkpoint=True, **QUICK)
    drop = ["seconds"]
    assert again.history.drop(columns=drop).equals(whole.history.drop(columns=drop))
    # The same prompts with words of one token are other data.
    with pytest.raises(InputError, match=r"other settings or data \(task\)"):
        finetune(seen, plain_task(), scope="norms", checkpoint=path, **QUICK)


def test_a_prompt_that_leaves_no_room_for_a_word_is_refused_before_training(tokenizer_folder):
    seen, data = view("gpt2", "bridge", tokenizer_folder, torch.float32), split_words.task()
    long = split_words.examples(lengths=(63,), gold=("positive",))
    data = replace(data, train=replace(data.train, items=data.train.items + long.items))
    with pytest.raises(InputError, match="tiny/train: prompt of 65 tokens"):
        finetune(seen, data, scope="norms", **QUICK)


# The whole way -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, cdt.Task, Any, Adapter]:
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
    result.adapter.save(place / "adapter")
    cdt.export(result.adapter, place / "base", place / "out")
    return place, task, model, result.adapter


def by_plain_transformers(place: Path, task: cdt.Task) -> list[dict[str, float]]:
    """The score of each word for every validation prompt, minus its prior."""
    tokenizer = AutoTokenizer.from_pretrained(place / "out")
    read = split_words.plain(AutoModelForCausalLM.from_pretrained(place / "out").eval())
    prior = task.prior or {}
    found = []
    with torch.no_grad():
        for item in task.valid:
            assert tuple(tokenizer(item.prompt).input_ids) == item.tokens
            found.append({
                label: float(split_words.score(read, item, word)) - prior[label]
                for label, word in task.verbalizer_ids.items()
            })  # fmt: skip
    return found


def test_files_make_a_task_of_split_words(exported):
    _, task, _, _ = exported
    assert task.verbalizer_ids == {"bad": (10, 13), "fine": 11, "good": (10, 14, 15)}
    for item in task.train:
        assert item.answers == (task.verbalizer_ids[item.label],)
        assert set(item.candidates) == set(task.verbalizer_ids.values())
    # The examples before the prompts spell the whole words.
    assert sum(f" w5{word}\n\n" in task.prefix for word in WORDS.values()) == 3


def test_predictions_are_those_of_the_trained_model_and_of_plain_transformers(exported):
    place, task, model, _ = exported
    rows = read_table(place / "data" / "valid.csv")
    frame = predict(place / "out", rows.rows, places=rows.places, batch_size=5)
    scores = by_plain_transformers(place, task)
    best = [max(each, key=lambda label: each[label]) for each in scores]
    assert frame["prediction"].tolist() == best
    judged = cdt.evaluate(model, task.valid, task)
    assert judged.answers["answer"].tolist() == best
    for row, each in enumerate(scores):
        total = math.fsum(map(math.exp, each.values()))
        for label, score in each.items():
            assert frame[f"p({label})"][row] == pytest.approx(math.exp(score) / total, abs=1e-5)


def test_the_snippet_of_the_readme_runs_without_this_package(exported, monkeypatch, capsys):
    place, task, _, _ = exported
    readme = (place / "out" / "README.md").read_text("utf-8")
    assert '| good | " w10 w14 w15" | 10, 14, 15 |' in readme and "| 11 |" in readme
    code, _ = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert "cdt_lens" not in code
    rows = read_table(place / "data" / "valid.csv").rows
    monkeypatch.chdir(place / "out")
    for row, expected in list(zip(rows, by_plain_transformers(place, task), strict=True))[:2]:
        found: dict[str, Any] = {}
        exec(code.replace("Put your text here.", str(row["text"])), found)
        assert found["scores"] == pytest.approx(expected, abs=1e-4)
        assert capsys.readouterr().out.split()[0] == max(expected, key=lambda k: expected[k])


def test_files_keep_the_words(exported):
    place, task, _, adapter = exported
    card = TaskCard.load(place / "out" / TASK_FILE)
    assert card.verbalizer_ids == task.verbalizer_ids
    assert card == adapter.task == Adapter.load(place / "adapter").task


def test_a_row_that_leaves_no_room_for_a_word_is_named(exported):
    place, task, _, _ = exported
    room = 64 - len(task.prefix.split()) - 2  # BOS and the cue
    assert len(predict(place / "out", [{"text": " ".join(["w30"] * (room - 2))}])) == 1
    with pytest.raises(InputError, match="row 1: the prompt has 63 tokens with 2 more for the"):
        predict(place / "out", [{"text": " ".join(["w30"] * (room - 1))}])


@pytest.mark.filterwarnings("ignore::cdt_lens.core.errors.CdtLensWarning")
def test_a_language_is_adapted(tmp_path):
    """The whole command: circuit, search, export and page."""
    save_model(tmp_path / "tiny")
    files = write_task(tmp_path / "data")
    source, target = (
        {split: str(path) for split, path in own.items()}
        for own in (write_task(tmp_path / "source"), files)
    )
    result = run_adapt(
        AdaptSettings(
            model=str(tmp_path / "tiny"), template="{text} w5", verbalizer=WORDS, source=source,
            target=target, epochs=1, minutes=0.001, keep=0.5,
        ),
        tmp_path / "run", lambda _: None, progress=False,
    )  # fmt: skip
    card = TaskCard.load(tmp_path / "run" / "model" / TASK_FILE)
    assert card.verbalizer_ids["good"] == (10, 14, 15)
    rows = read_table(files["test"]).rows
    frame = predict(tmp_path / "run" / "model", rows)
    right = (frame["prediction"] == [row["label"] for row in rows]).mean()
    after = result.languages.set_index("language").loc["target"]
    assert right == pytest.approx(after["after"])
