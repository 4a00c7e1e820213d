"""Cards of tasks: what they keep, and when there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.tiny_training import task as made_by_hand
from helpers.words import ROWS, TEMPLATE, VERBALIZER, word_tokenizer

from cdt_lens.core.errors import InputError
from cdt_lens.tasks.card import TaskCard
from cdt_lens.tasks.datasets import load_task
from cdt_lens.tasks.prompts import PromptFormat, build_examples
from cdt_lens.tasks.task import Examples, Task


@pytest.fixture
def words(tmp_path):
    return word_tokenizer(tmp_path)


def task_of(words) -> Task:
    data = build_examples(ROWS, tokenizer=words, template=TEMPLATE, verbalizer=VERBALIZER)
    ids = {example.label: example.answers[0] for example in data}
    none = Examples((), data.labels, "none")
    return Task("t", data.labels, VERBALIZER, ids, TEMPLATE, data, none, none, none)


def test_a_card_makes_the_prompts_of_the_task_again(words, tmp_path):
    task = task_of(words)
    card = TaskCard.of(task, words)
    assert card is not None
    again = TaskCard.load(card.save(tmp_path / "card.json"))
    assert again == card
    rows = [{"text": row["text"]} for row in ROWS]
    places = [str(i) for i in range(len(rows))]
    assert again.format(words).unlabelled(rows, places) == [e.tokens for e in task.train]


def test_there_is_no_card_of_prompts_that_are_not_text(words):
    assert TaskCard.of(made_by_hand(), words) is None
    assert TaskCard.of(task_of(words), None) is None


def test_other_label_tokens_are_refused(words):
    card = TaskCard.of(task_of(words), words)
    assert card is not None
    other = replace(card, verbalizer_ids={**card.verbalizer_ids, "neutral": 99})
    with pytest.raises(InputError, match="expected .*99.*tokenizer of the exported folder"):
        other.format(words)


def test_a_generated_task_has_a_card_but_no_words_to_predict(tmp_path):
    from helpers.words import WORDS

    words = word_tokenizer(tmp_path, WORDS)
    card = TaskCard.of(load_task("ioi", tokenizer=words, n=(4, 2, 2)), words)
    assert card is not None and card.bos_ids == (1,)
    with pytest.raises(InputError, match="no template with a word for each label"):
        card.format(words)


def test_a_column_of_text_may_be_called_label(words):
    template = "{label}\nSentiment:"
    format = PromptFormat(words, template, VERBALIZER, label_column="gold")
    data = format.examples([{"label": row["text"], "gold": row["label"]} for row in ROWS])
    none = Examples((), data.labels, "none")
    task = Task(
        "t", data.labels, VERBALIZER, format.verbalizer_ids, template, data, none, none, none
    )
    card = TaskCard.of(task, words)
    assert card is not None
    made = card.format(words).unlabelled([{"label": ROWS[0]["text"]}], ["row 1"])
    assert made == [data[0].tokens]
