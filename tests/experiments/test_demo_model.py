"""The demo model: an ordinary folder, what its pre-training may see, and the seed's promises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.words import label_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from cdt_lens.core.errors import InputError
from cdt_lens.experiments import demo_model
from cdt_lens.experiments.demo_model import demo_tokenizer, make_demo_model
from cdt_lens.models.loading import load_model
from cdt_lens.tasks.datasets import load_task
from cdt_lens.tasks.evaluate import evaluate
from cdt_lens.tasks.prompts import encode
from cdt_lens.tasks.pseudo_languages import VERBALIZER, pseudo_sentences

DISTANCES = (0.3, "0.8")


@pytest.fixture(autouse=True)
def few_reviews(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "REVIEWS", 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_model, "REVIEWS", 30)
        place = tmp_path_factory.mktemp("models") / "demo"
        yield make_demo_model(place, distances=DISTANCES, steps=4)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def test_the_folder_is_an_ordinary_one(folder: Path) -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads) == (4, 8)
    assert config.num_key_value_heads == 4
    assert config.vocab_size == len(tokenizer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name in ("bos", "eos", "pad"):
        assert getattr(config, f"{name}_token_id") == getattr(tokenizer, f"{name}_token_id")


@pytest.mark.parametrize("config", ["source", "0.3", "0.8"])
def test_load_model_and_the_task_take_it(folder: Path, config: str) -> None:
    model = load_model(folder)
    task = load_task("pseudo-sentiment", config, tokenizer=model.tokenizer, n=(6, 3, 6))
    known = {tuple(e.tokens) for e in task.train}
    assert not {model.tokenizer.unk_token_id} & {i for tokens in known for i in tokens}
    assert all(tokens[0] == model.tokenizer.bos_token_id for tokens in known)
    assert task.verbalizer == VERBALIZER
    assert 0 <= evaluate(model, task.test, task).accuracy <= 1


def test_one_token_a_word() -> None:
    tokenizer = demo_tokenizer(DISTANCES)
    for distance in ("source", *DISTANCES):
        for row in pseudo_sentences(60, distance):
            (ids,) = encode(tokenizer, [f"{row['text']}\nSentiment: {row['label']}"])
            assert tokenizer.convert_ids_to_tokens(ids) == [
                *row["text"].split(), "Sentiment:", row["label"],
            ]  # fmt: skip


def test_pre_training_sees_unlabelled_reviews_of_one_mood() -> None:
    tokenizer = demo_tokenizer([0])
    labelled = {
        row["text"]
        for part in ("train", "valid", "test")
        for seed in range(3)
        for plain in (False, True)
        for row in pseudo_sentences(300, 0, seed, part=part, plain=plain)
    }
    hidden = {"Sentiment:", *(word.strip() for word in VERBALIZER.values())}
    found: list[set[str]] = []
    for plain, size in ((True, 5), (False, 3)):
        # Two languages that are both English, so that both can be read here.
        reviews = demo_model._encoded(tokenizer, ("source", 0), seed=1, plain=plain)
        assert len(reviews) == 2 * 30
        for ids in reviews:
            begin, *words, end = tokenizer.convert_ids_to_tokens(ids.tolist())
            assert (begin, end) == ("<s>", ".")
            assert not hidden & set(words)
            sentences = " ".join(words).split(" . ")
            assert len(sentences) == size
            assert len({label_of(sentence) for sentence in sentences}) == 1
            found.append(set(sentences))
    assert not set().union(*found) & labelled
    first, second = set().union(*found[:30]), set().union(*found[30:60])
    assert len(first & second) < 0.1 * len(first)


def test_plain_reviews_come_first() -> None:
    plain, full = [torch.tensor([1])], [torch.tensor([2])]
    kinds = [int(batch[0, 0]) for batch in demo_model._batches(plain, full, 100, seed=0)]
    assert set(kinds[:35]) == {1}
    assert set(kinds[90:]) == {2}
    assert 20 < kinds[35:90].count(2) < 40


def test_pre_training_learns() -> None:
    tokenizer = demo_tokenizer([])
    reviews = demo_model._encoded(tokenizer, ("source",), seed=0, plain=True)
    model = demo_model._new_model(len(tokenizer), seed=0)
    batches = demo_model._batches(reviews, reviews, 30, seed=0)
    losses = [loss for _, loss in demo_model._pretrain(model, batches, 30)]
    assert len(losses) == 30
    assert losses[0] > 4 > 2.5 > losses[-1]
    assert not model.training


def test_the_seed_decides_the_weights_and_no_global_state_moves(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    heard: list[str] = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_demo_model(tmp_path / name, distances=[1], seed=seed, steps=2, say=heard.append)
    assert torch.equal(state, torch.get_rng_state())
    assert heard[::2] == ["writing reviews in 2 languages"] * 3
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    matrices = [name for name, value in a.items() if value.ndim == 2]
    assert not any(torch.equal(a[name], c[name]) for name in matrices)


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        demo_model,
        "_pretrain",
        lambda _model, _batches, steps: ((i + 1, 2.5) for i in range(steps)),
    )
    heard: list[str] = []
    make_demo_model(tmp_path / "m", distances=[], say=heard.append)
    assert heard[-1] == "pre-training step 240 of 240: 2.500 nats a word"


def test_mistakes_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="config=1.2: expected"):
        make_demo_model(tmp_path / "m", distances=[1.2])
    with pytest.raises(InputError, match="steps=0: expected a whole number of at least 1"):
        make_demo_model(tmp_path / "m", distances=[0.3], steps=0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").write_text("kept")
    for taken in (tmp_path, tmp_path / "mine"):
        with pytest.raises(InputError, match="exists and is not an empty folder; name another"):
            make_demo_model(taken, distances=[0.3])
    assert (tmp_path / "mine").read_text() == "kept"
