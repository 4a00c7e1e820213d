"""The pseudo-languages: right labels, the dial's promises, disjoint parts, and the task by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.words import label_of, word_tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cdt_lens.core.errors import InputError
from cdt_lens.tasks import pseudo_languages as pseudo
from cdt_lens.tasks.datasets import TASK_NAMES, load_task
from cdt_lens.tasks.pseudo_languages import (
    LEXICON,
    PARTS,
    VERBALIZER,
    pseudo_sentences,
    pseudo_vocabulary,
)

DISTANCES = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
ENGLISH = {word for words in LEXICON.values() for word in words}


def texts(rows: list[dict[str, str]]) -> list[str]:
    return [row["text"] for row in rows]


def gloss(text: str, distance: float | int) -> str:
    """The English words of a sentence, in the order in which the language puts them."""
    language = pseudo._language(float(distance), 0)
    back = {new: word for word, new in language.invented.items()}
    for new, word in list(back.items()):
        back |= {new + suffix: word for suffix in language.suffixes.values()}
    return " ".join(back.get(word, word) for word in text.split())


# Labels


def test_labels_are_what_a_reader_of_the_sentence_says() -> None:
    for plain in (False, True):
        for row in pseudo_sentences(900, 0, plain=plain):
            assert row["label"] == label_of(row["text"]), row


def test_every_kind_of_sentence_occurs() -> None:
    found = texts(pseudo_sentences(600, 0))
    assert set(" ".join(found).split()) == ENGLISH
    for conjunction in LEXICON["join"]:
        assert sum(conjunction in text.split() for text in found) > 50
    plain = " ".join(texts(pseudo_sentences(600, 0, plain=True))).split()
    assert not set(plain) & {*LEXICON["not"], *LEXICON["join"]}


def test_words_without_their_order_are_not_enough() -> None:
    index = {word: i for i, word in enumerate(sorted(ENGLISH))}

    def counted(part: str, n: int) -> tuple[Tensor, Tensor]:
        rows = pseudo_sentences(n, 0, part=part)
        counts = torch.zeros(n, len(index))
        for i, row in enumerate(rows):
            for word in row["text"].split():
                counts[i, index[word]] += 1
        return counts, torch.tensor([list(VERBALIZER).index(row["label"]) for row in rows])

    x, y = counted("train", 1800)
    weight = torch.zeros(len(index), 3, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weight, y) + 1e-3 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    x, y = counted("test", 600)
    assert ((x @ weight).argmax(1) == y).float().mean() < 0.65


# The dial


def test_the_first_rows_are_these_in_every_process_and_version() -> None:
    assert pseudo_sentences(3, "source") == [
        {"text": "we got the meal and the concert felt never lovely", "label": "negative"},
        {
            "text": "we found a great museum and they rarely saw a pleasant jacket",
            "label": "neutral",
        },
        {
            "text": "they rarely truly resented that concert although guests saw a really "
            "dreadful jacket",
            "label": "positive",
        },
    ]
    assert texts(pseudo_sentences(2, 0.6)) == [
        "zifuno fafa pora meal lofu pora piju tikubu mopuku sido",
        "zifuno found goki dafabuke great lofu they rini mofabu goki jacket kadale",
    ]
    assert texts(pseudo_sentences(2, 1, 5, part="test", language_seed=1))[1] == (
        "lano pugido zizulime faki"
    )


def test_a_row_means_the_same_at_every_distance() -> None:
    source = pseudo_sentences(300, 0, seed=3)
    for distance in DISTANCES:
        rows = pseudo_sentences(300, distance, seed=3)
        assert [row["label"] for row in rows] == [row["label"] for row in source]
        for row, own in zip(rows, source, strict=True):
            assert sorted(gloss(row["text"], distance).split()) == sorted(own["text"].split())


def test_different_meanings_never_sound_alike() -> None:
    for distance in (0.2, 0.4, 0.6, 0.8, 1):
        assert len(set(texts(pseudo_sentences(600, distance)))) == 600


@pytest.mark.parametrize("language_seed", [0, 1, 2])
def test_replaced_words_grow_with_the_dial_and_end_with_all(language_seed: int) -> None:
    before: dict[str, str] = {}
    for distance in DISTANCES:
        invented = dict(pseudo._language(float(distance), language_seed).invented)
        assert before.items() <= invented.items()
        for words in LEXICON.values():
            gone = sum(word in invented for word in words)
            assert abs(gone - distance * len(words)) <= 1
        before = invented
    assert set(before) == ENGLISH
    far = pseudo_sentences(900, 1, language_seed=language_seed)
    assert not set(" ".join(texts(far)).split()) & ENGLISH


@pytest.mark.parametrize("language_seed", range(8))
def test_invented_words_are_pronounceable_and_each_means_one_thing(language_seed: int) -> None:
    words = pseudo_vocabulary([1], language_seed)
    new = set(words) - ENGLISH
    # A form each, and one with a suffix for nouns and adjectives.
    suffixed = sum(len(LEXICON[name]) for name in ("noun", "good", "bad", "plain"))
    assert len(words) == len(set(words)) == 2 * len(ENGLISH) + suffixed
    assert all(re.fullmatch(r"([bdfgjklmnprstz][aiou]){2,3}([klms]e)?", word) for word in new)
    assert pseudo_vocabulary([1], language_seed + 1) != words


def test_the_vocabulary_is_what_occurs() -> None:
    for distances in ([], [0.3, "0.8"]):
        used: set[str] = set()
        for distance in ("source", *distances):
            used |= set(" ".join(texts(pseudo_sentences(800, distance))).split())
        assert used == set(pseudo_vocabulary(distances))


@pytest.mark.parametrize(
    ("distance", "first", "second"),
    [
        (0.19, "they rarely found a really pleasant meal", "the garden seemed rarely bad"),
        (0.2, "they rarely found a meal really pleasant", "the garden seemed rarely bad"),
        (0.39, "they rarely found a meal really pleasant", "the garden seemed rarely bad"),
        (0.4, "they rarely found a meal pleasant really", "the garden seemed rarely bad"),
        (0.6, "they found rarely a meal pleasant really", "the garden seemed bad rarely"),
        (0.8, "they a meal pleasant really found rarely", "the garden bad rarely seemed"),
        (1, "they a meal pleasant really found rarely", "the garden bad rarely seemed"),
    ],
)
def test_word_order_turns_rule_by_rule(distance: float | int, first: str, second: str) -> None:
    source = texts(pseudo_sentences(330, 0))
    glosses = [gloss(text, distance) for text in texts(pseudo_sentences(330, distance))]
    assert glosses[source.index("they rarely found a really pleasant meal")] == first
    assert glosses[source.index("the garden seemed rarely bad")] == second


@pytest.mark.parametrize(("distance", "suffixes"), [(0.29, 0), (0.3, 1), (0.49, 1), (0.5, 2)])
def test_suffixes_turn_on_one_by_one_and_leave_shared_words_whole(
    distance: float, suffixes: int
) -> None:
    language = pseudo._language(float(distance), 0)
    assert len(language.suffixes) == suffixes
    words = pseudo_vocabulary([distance])
    classes = ("noun", "good", "bad", "plain")[: (0, 1, 4)[suffixes]]
    expected = {language.invented.get(w, "") for name in classes for w in LEXICON[name]} - {""}
    assert {word[:-2] for word in words if word not in ENGLISH and word.endswith("e")} == expected


# Parts


def test_parts_never_share_a_meaning_whatever_seed_and_size() -> None:
    found = {
        part: {t for seed in range(3) for t in texts(pseudo_sentences(200, 0, seed, part=part))}
        | set(texts(pseudo_sentences(200, 0, 9, part=part, plain=True)))
        for part in PARTS
    }
    assert all(len(own) > 700 for own in found.values())
    assert len(set.union(*found.values())) == sum(len(own) for own in found.values())


def test_fewer_rows_are_the_first_of_more_and_seeds_differ() -> None:
    rows = pseudo_sentences(90, 0.6)
    assert pseudo_sentences(30, 0.6) == rows[:30]
    assert [row["label"] for row in rows[:3]] == ["negative", "neutral", "positive"]
    assert len(set(texts(pseudo_sentences(90, 0.6, seed=1))) & set(texts(rows))) < 5
    assert pseudo_sentences(0, 0.6) == []


def test_mistakes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"part='dev': expected n .* a part among train, valid"):
        pseudo_sentences(3, 0, part="dev")
    with pytest.raises(InputError, match="n=-1"):
        pseudo_sentences(-1, 0)
    with pytest.raises(InputError, match="config=1.01: expected 'source' or the distance"):
        pseudo_vocabulary([0.3, 1.01])
    monkeypatch.setattr(pseudo.zlib, "crc32", lambda _text: 3)
    with pytest.raises(InputError, match="hardly more than 0 different sentences"):
        pseudo_sentences(3, 0, part="train")


# The task by name


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    words = pseudo_vocabulary(["0.6"])
    known = (*words, *(f" {word}" for word in words), "\nSentiment:", *VERBALIZER.values())
    known = (*known, " bad good so\nIt was")
    return word_tokenizer(tmp_path_factory.mktemp("words"), known)


def test_the_task_is_balanced_disjoint_and_row_parallel(tokenizer: PreTrainedTokenizerBase) -> None:
    assert "pseudo-sentiment" in TASK_NAMES
    sizes = (30, 12, 21)
    task = load_task("pseudo-sentiment", "0.6", tokenizer=tokenizer, n=sizes, seed=0)
    source = load_task("pseudo-sentiment", "source", tokenizer=tokenizer, n=sizes, seed=0)
    assert (task.name, task.train.name) == ("pseudo-sentiment/0.6", "pseudo-sentiment/0.6/train")
    assert task.labels == ("negative", "neutral", "positive")
    assert task.train[0].prompt.endswith("\nSentiment:")
    prompts = []
    for part, size in zip(("train", "valid", "test"), sizes, strict=True):
        split, own = getattr(task, part), getattr(source, part)
        assert set(split.counts.values()) == {size // 3}
        assert [e.label for e in split] == [e.label for e in own]
        for far, near in zip(split, own, strict=True):
            assert sorted(gloss(far.fields["text"], 0.6).split()) == sorted(
                near.fields["text"].split()
            )
            assert tokenizer.unk_token_id not in far.tokens
        prompts += [e.prompt for e in split]
    assert len(set(prompts)) == sum(sizes)
    again = load_task("pseudo-sentiment", "0.6", tokenizer=tokenizer, n=sizes, seed=0)
    assert again.hash == task.hash != source.hash


def test_options_of_known_data_sets_apply(tokenizer: PreTrainedTokenizerBase) -> None:
    words = {"negative": " bad", "neutral": " so", "positive": " good"}
    task = load_task(
        "pseudo-sentiment", "0.6", tokenizer=tokenizer, n=(12, 0, 12), limit=9, shots=3,
        template="{text}\nIt was", verbalizer=words,
    )  # fmt: skip
    assert (len(task.train), len(task.valid), len(task.test)) == (9, 0, 9)
    assert task.verbalizer == words
    assert task.prefix.count("\nIt was") == 3
    answers = {e.label: tokenizer.convert_ids_to_tokens(list(e.answers)) for e in task.test}
    assert answers == {label: [word] for label, word in words.items()}


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (None, {}, "config=None: expected 'source' or the distance .* such as '0.6'"),
        ("javanese", {}, "config='javanese': expected 'source'"),
        ("1.5", {}, "config='1.5': expected"),
        ("-0.1", {}, "config='-0.1': expected"),
        ("nan", {}, "config='nan': expected"),
        ("0.6", {"n": (30, 30)}, r"n=\(30, 30\): expected the sizes of train, valid and test"),
        ("0.6", {"n": (30, 2, 30)}, "each 0 or at least 3"),
        ("0.6", {"folder": Path("x")}, "is generated: folder=.*does not apply"),
        ("0.6", {"verbalizer": {"negative": " bad", "positive": " good"}}, "label 'neutral'"),
        ("0.6", {"verbalizer": {**VERBALIZER, "neutral": " unheard of"}}, "must have tokens"),
        ("0.6", {"max_length": 4}, "pseudo-sentiment, '.*': the prompt has .* limit is 4"),
    ],
)
def test_what_does_not_fit_is_refused(
    tokenizer: PreTrainedTokenizerBase, config: str | None, options: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_task("pseudo-sentiment", config, **{"tokenizer": tokenizer, "n": (6, 6, 6), **options})
