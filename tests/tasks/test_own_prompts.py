"""Prompts written by hand: answers, competitors, labels, and the mistakes that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.tokenizers import save_tokenizer
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


def test_chance_is_the_share_of_the_candidates_that_are_right(tokenizer: PreTrainedTokenizerBase):
    several = cdt.task_from_prompts(
        PROMPTS, [" John", [" Mary", " Tom"], " Mary"], [[" Mary", " Tom"], " John", " John"],
        tokenizer=tokenizer, labels=["a", "b", "c"],
    )  # fmt: skip
    assert several.train.guess == pytest.approx((1 / 3 + 2 / 3 + 1 / 2) / 3)


@pytest.mark.parametrize(
    ("answer", "others"), [("b", "d"), ("d", "b"), (["d", "b"], "e"), ("d", ["e", "b"])]
)
def test_no_candidate_may_merge_with_the_end_of_its_prompt(tmp_path: Path, answer, others):
    merging = save_tokenizer("gpt2", tmp_path)
    with pytest.raises(InputError, match="merges the end of the prompt with the answer 'b'"):
        cdt.task_from_prompts(["a so: "], [answer], [others], tokenizer=merging)
