"""Prompts written by hand: answers, competitors, labels, and the mistakes that are refused."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.words import WORDS, word_tokenizer
from transformers import PreTrainedTokenizerBase

import cdt_lens as cdt
from cdt_lens.core.errors import InputError

PROMPTS = ["Then Mary gave it to", "When John and Mary went, John said to", "Then Tom gave it to"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return word_tokenizer(tmp_path_factory.mktemp("words"), WORDS)


def words(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> list[str]:
    return [tokenizer.decode([i]).strip() for i in ids]


def test_each_prompt_has_its_own_answers(tokenizer: PreTrainedTokenizerBase):
    task = cdt.task_from_prompts(
        PROMPTS, [" John", [" Mary", " Tom"], " Mary"], [" Mary", " John", [" Tom", " John"]],
        tokenizer=tokenizer, labels=["a", "b", "a"], valid=1,
    )  # fmt: skip
    first, second = task.train
    assert (first.prompt, first.label, task.labels) == (PROMPTS[0], "a", ("a", "b"))
    assert words(tokenizer, second.answers) == ["Mary", "Tom"]
    assert words(tokenizer, second.others) == ["John"]
    assert words(tokenizer, task.valid[0].others) == ["Tom", "John"]
    plain = tokenizer(PROMPTS[0], add_special_tokens=False)["input_ids"]
    assert list(first.tokens) == [tokenizer.bos_token_id, *plain]


def test_the_answers_of_the_other_prompts_compete(tokenizer: PreTrainedTokenizerBase):
    task = cdt.task_from_prompts(PROMPTS, [" John", " Mary", " Mary"], tokenizer=tokenizer)
    assert [words(tokenizer, e.others) for e in task.train] == [["Mary"], ["John"], ["John"]]
    assert task.labels == ("prompt",) and not len(task.valid)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"answers": [" John"]}, "answers: 1 for 3 prompts"),
        ({"others": [" John"]}, "others: 1 for 3 prompts"),
        ({"labels": ["a"]}, "labels: 1 for 3 prompts"),
        ({"valid": 3}, "prompts: 3, of which 3 for valid"),
        (
            {"answers": [" John", " Zyx", " Mary"]},
            "prompt 1: the tokenizer does not know the word ' Zyx'",
        ),
        ({"answers": [" Mary"] * 3}, "expected at least one answer and one other token"),
        ({"others": [" John", " John", " Tom"]}, "all different"),
    ],
)
def test_mistakes_are_named(
    tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any], told: str
):
    given = {"answers": [" John", " Mary", " Mary"], "tokenizer": tokenizer} | arguments
    with pytest.raises(InputError, match=told):
        cdt.task_from_prompts(PROMPTS, **given)
