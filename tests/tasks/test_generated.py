"""The generated tasks: balance, disjoint prompts, right answers, and what a tokenizer must know."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.words import WORDS, YEARS, word_tokenizer
from transformers import PreTrainedTokenizerBase

from cdt_lens.core.errors import InputError
from cdt_lens.tasks import generated as generators
from cdt_lens.tasks.generated import GENERATORS, gendered_pronoun, greater_than, ioi
from cdt_lens.tasks.prompts import encode
from cdt_lens.tasks.task import Task

NUMBERS = {"digits": r"\d", "pairs": r"\d{2}", "whole": r"\d+"}


@pytest.fixture(scope="module", params=["digits", "pairs"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp(request.param)
    return word_tokenizer(folder, (*WORDS, *YEARS), number=NUMBERS[request.param])


def words_of(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(ids))


@pytest.mark.parametrize("name", GENERATORS)
def test_splits_are_balanced_disjoint_and_of_the_sizes_asked_for(
    tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    task = GENERATORS[name](tokenizer, n=(20, 10, 6))
    splits = (task.train, task.valid, task.test)
    assert [len(split) for split in splits] == [20, 10, 6]
    assert [split.name for split in splits] == [f"{name}/train", f"{name}/valid", f"{name}/test"]
    for split in splits:
        assert len(set(split.counts.values())) == 1
    prompts = [example.prompt for split in splits for example in split]
    assert len(set(prompts)) == 36
    assert len(task.labels) == 2
    assert len(task.content_free) == 0


@pytest.mark.parametrize("name", GENERATORS)
def test_the_seed_decides_everything(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    def make(seed: int) -> Task:
        return GENERATORS[name](tokenizer, n=(8, 4, 4), seed=seed)

    assert make(3).hash == make(3).hash
    assert make(3).hash != make(4).hash


@pytest.mark.parametrize("name", GENERATORS)
def test_tokens_are_those_of_the_prompt(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    with_bos = GENERATORS[name](tokenizer, n=(4, 0, 0))
    without = GENERATORS[name](tokenizer, n=(4, 0, 0), prepend_bos=False)
    for example, bare in zip(with_bos.train, without.train, strict=True):
        assert example.prompt == bare.prompt
        assert bare.tokens == tuple(encode(tokenizer, [bare.prompt])[0])
        assert example.tokens == (tokenizer.bos_token_id, *bare.tokens)
        assert tokenizer.unk_token_id not in example.tokens


def test_ioi_answers_with_the_name_that_stands_once(tokenizer: PreTrainedTokenizerBase) -> None:
    task = ioi(tokenizer, n=(40, 4, 4))
    for example in task.train:
        (answer,) = words_of(tokenizer, example.answers)
        (subject,) = words_of(tokenizer, example.others)
        assert example.prompt.count(answer) == 1
        assert example.prompt.count(subject) == 2
        order = "ABBA" if example.prompt.index(answer) < example.prompt.index(subject) else "BABA"
        assert example.label == order
        assert example.fields["indirect_object"] == answer.strip()
    assert task.labels == ("ABBA", "BABA")
    assert task.verbalizer == task.verbalizer_ids == {}


def test_greater_than_answers_are_the_later_years(tokenizer: PreTrainedTokenizerBase) -> None:
    task = greater_than(tokenizer, n=(40, 4, 4))
    for example in task.train:
        stem, start = example.fields["stem"], example.fields["start"]
        assert example.prompt.endswith(f"from the year {stem}{start} to the year {stem}")
        assert len(stem) + len(start) == 4
        answers = words_of(tokenizer, example.answers)
        others = words_of(tokenizer, example.others)
        assert all(ending > start for ending in answers)
        assert all(ending <= start for ending in others)
        assert len(answers) + len(others) == 10 ** len(start)
        middle = {1: "5", 2: "50"}[len(start)]
        assert example.label == ("early" if start < middle else "late")


def test_greater_than_takes_two_digits_where_the_tokenizer_has_them(tmp_path: Path) -> None:
    for kind, length in (("digits", 1), ("pairs", 2)):
        tokenizer = word_tokenizer(tmp_path / kind, (*WORDS, *YEARS), number=NUMBERS[kind])
        task = greater_than(tokenizer, n=(10, 2, 2))
        assert {len(example.fields["start"]) for example in task.train} == {length}


def test_greater_than_refuses_a_tokenizer_that_keeps_years_whole(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path, (*WORDS, *YEARS), number=NUMBERS["whole"])
    with pytest.raises(InputError, match="neither with two-digit tokens nor digit by digit"):
        greater_than(tokenizer)


def test_pronoun_follows_the_name(tokenizer: PreTrainedTokenizerBase) -> None:
    task = gendered_pronoun(tokenizer, n=(40, 4, 4))
    for example in task.train:
        assert words_of(tokenizer, example.answers) == [f" {example.label}"]
        names = generators.MEN if example.label == "he" else generators.WOMEN
        assert example.fields["name"] in names
    assert task.verbalizer == {"he": " he", "she": " she"}
    assert tuple(task.verbalizer_ids) == task.labels == ("he", "she")


def test_no_name_is_on_both_lists() -> None:
    assert not set(generators.MEN) & set(generators.WOMEN)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ioi", r"ioi: only 2 of 61 names are single tokens here; at least 6"),
        ("greater-than", r"greater-than: only 0 of 18 events"),
        ("gendered-pronoun", r"gendered-pronoun: only 1 of 30 men's names"),
    ],
)
def test_too_few_single_token_words_are_refused(tmp_path: Path, name: str, message: str) -> None:
    tokenizer = word_tokenizer(tmp_path, (" Adam Alice he she", *YEARS))
    with pytest.raises(InputError, match=message):
        GENERATORS[name](tokenizer)


@pytest.mark.parametrize("n", [(1, 2, 2), (2, 2), (-2, 2, 2)])
def test_sizes_that_cannot_hold_each_label_are_refused(
    tokenizer: PreTrainedTokenizerBase, n: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match="each 0 or at least 2|greater than or equal to 0"):
        ioi(tokenizer, n=n)


def test_more_prompts_than_exist_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="different prompts can be made"):
        gendered_pronoun(tokenizer, n=(100_000, 2, 2))
