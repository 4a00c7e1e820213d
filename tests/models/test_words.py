"""Words of several tokens: their scores against plain transformers, one sequence at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import split_words
from helpers.checks import assert_close, assert_same_bits
from helpers.shared import models, shared
from helpers.split_words import SPLIT
from helpers.tiny_models import Float64Throughout, build
from helpers.tiny_tasks import LABELS, examples

from cdt_lens.core.errors import InputError
from cdt_lens.models import words as words_module
from cdt_lens.models.view import at_answer
from cdt_lens.models.words import Words
from cdt_lens.tasks.evaluate import candidate_logits, evaluate, label_prior
from cdt_lens.tasks.task import Example, Examples
from cdt_lens.tasks.text_loss import text_loss


@models(("gpt2", "llama", "gemma2"))
def test_scores_are_sums_of_log_probabilities(family, backend, tokenizer_folder):
    """In a padded batch, with words of different lengths; with a soft-cap in gemma2."""
    data = split_words.examples()
    with Float64Throughout():
        hf, view = build(family), shared(family, backend, tokenizer_folder)
        batch = data.one_batch()
        resid = view.run(batch.tokens).resid[-1]
        answer = at_answer(resid, batch.lengths, batch.candidates)
        found = view.candidate_logits(answer, batch.candidates)
        by_hand = [split_words.scores(split_words.plain(hf), item) for item in data]
        assert_close(found, torch.stack(by_hand), atol=1e-9)
        seen = evaluate(view, data, batch_size=4)
    losses = [float(-own.log_softmax(-1)[0]) for own in by_hand]
    assert seen.loss == pytest.approx(sum(losses) / len(data), abs=1e-5)
    directions = [float(split_words.direction(own)) for own in by_hand]
    assert seen.answers["direction"].tolist() == pytest.approx(directions, abs=1e-5)
    best = [item.candidates[int(own.argmax())] for item, own in zip(data, by_hand, strict=True)]
    assert seen.answers["answer"].tolist() == best


def test_the_task_names_the_answers(tokenizer_folder):
    task = split_words.task()
    view = shared("llama", "bridge", tokenizer_folder)
    seen = evaluate(view, task.valid, task)
    bare = evaluate(view, task.valid)
    names = {word: label for label, word in SPLIT.items()}
    assert seen.answers["answer"].tolist() == [names[a] for a in bare.answers["answer"]]
    # A prior of a word is subtracted from its score.
    certain = evaluate(view, task.valid, task.with_prior(dict.fromkeys(LABELS, 0.0)))
    assert certain.answers.equals(seen.answers)
    favoured = task.with_prior({"positive": 0.0, "neutral": 0.0, "negative": -1e3})
    assert set(evaluate(view, task.valid, favoured).answers["answer"]) == {"negative"}


def test_a_prior_is_the_mean_score_of_each_word(tokenizer_folder):
    task = split_words.task()
    items = tuple(
        replace(item, answers=(SPLIT["negative"],), others=(30, (20, 21)))
        for item in task.valid[:3]
    )
    task = replace(task, content_free=replace(task.content_free, items=items))
    with Float64Throughout():
        hf, view = build("llama"), shared("llama", "bridge", tokenizer_folder)
        found = label_prior(view, task)
        scores = torch.stack([split_words.scores(split_words.plain(hf), item) for item in items])
    mean = scores.mean(0) - scores.mean()
    expected = dict(zip(("negative", "neutral", "positive"), mean.tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-5)


def test_each_question_is_asked_once():
    """(20,) and (20, 40) stand in one row; (20, 50) needs another one, which begins alike."""
    words = ((20, 21),), ((20, 40, 41), (20, 50, 51), 30)
    item = Example("x", (5, 6, 7), "a", *words)
    other = Example("y", (8, 9), "b", (30,), ((60, 61),))
    batch = Examples((item, other), ("a", "b"), "x").one_batch()
    real = [row[:n].tolist() for row, n in zip(batch.tokens, batch.lengths.tolist(), strict=True)]
    assert real == [[5, 6, 7, 20, 40], [5, 6, 7, 20, 50], [8, 9, 60]]
    read = batch.candidates
    at = [
        tuple(batch.tokens[row, : position + 1].tolist())
        for row, position in zip(read.rows.tolist(), read.positions.tolist(), strict=True)
    ]
    assert len(set(at)) == len(at) == 6
    for number, (prompt, group) in enumerate([((5, 6, 7), item), ((8, 9), other)]):
        for k, word in enumerate(group.candidates):
            ids = split_words.ids(word)
            questions = [at[i] for i in read.reads[number, k, : len(ids)].tolist()]
            assert questions == [(*prompt, *ids[:i]) for i in range(len(ids))]
    assert batch.prompt_lengths.tolist() == [3, 3, 2]
    assert batch.counted.sum(1).tolist() == [5, 1, 3]
    assert batch.firsts.tolist() == [True, False, True]
    assert batch.by_example(torch.tensor([1.0, 2.0, 4.0])).tolist() == [3.0, 4.0]
    assert batch.for_rows(torch.tensor([1, 2])).tolist() == [1, 1, 2]
    first = [False, True, False, False], [False] * 4
    assert batch.is_word((20, 40, 41)).tolist() == list(first)
    # The first candidate again, as padding.
    assert batch.is_word(30).tolist() == [[False, False, False, True], [True, False, True, True]]
    assert not batch.is_word((1, 2, 3, 4)).any()
    assert batch.is_candidate.tolist() == [[True] * 4, [True, True, False, False]]


def test_words_are_not_read_at_the_ends_of_rows(tokenizer_folder):
    view, batch = shared("gpt2", "bridge", tokenizer_folder), split_words.examples().one_batch()
    ends = at_answer(view.run(batch.tokens).resid[-1], batch.lengths)
    with pytest.raises(InputError, match="expected logits at 24 reads, got 12; select"):
        view.candidate_logits(ends, batch.candidates)


def test_batches_and_parts_change_nothing(tokenizer_folder, monkeypatch):
    view, data = shared("gpt2", "bridge", tokenizer_folder), split_words.examples()
    (whole,) = data.batches(10, sort_by_length=False)
    expected = candidate_logits(view, whole)
    alone = torch.cat([candidate_logits(view, data[i : i + 1].one_batch()) for i in range(6)])
    assert_close(alone, expected, atol=1e-5)
    resid = at_answer(view.run(whole.tokens).resid[-1], whole.lengths, whole.candidates)
    many = torch.stack([resid, 2 * resid, resid])
    once = view.candidate_logits(many, whole.candidates)
    monkeypatch.setattr(words_module, "_MOST", 1)
    assert_close(view.candidate_logits(many, whole.candidates), once)


def test_words_of_one_token_are_tokens():
    """The same examples, the same hash, and the same batch, without log-probabilities."""
    data = examples()
    listed = replace(
        data,
        items=tuple(replace(e, answers=[list(e.answers)], others=list(e.others)) for e in data),
    )
    assert listed == data and not data.has_words
    assert listed.hash == data.hash
    # As the version without words of several tokens computed it.
    assert data.hash == "bf8c663fd846f11cf2e144f0d694f3b5497a21f2128a11e78f0b37df40c41b70"
    batch = listed.one_batch()
    assert not isinstance(batch.candidates, Words)
    assert_same_bits(batch.candidates, data.one_batch().candidates)
    assert batch.by_example(batch.lengths) is batch.lengths is batch.prompt_lengths


def test_the_text_of_a_prompt_counts_once(tokenizer_folder):
    view = shared("llama", "bridge", tokenizer_folder)
    assert text_loss(view, split_words.examples()) == pytest.approx(
        text_loss(view, examples()), abs=1e-6
    )


@pytest.mark.parametrize(
    ("answers", "others", "message"),
    [
        (((20, 21),), ((20, 21),), "all different"),
        (((20, 21),), (20,), r"\(20, 21\) begins with the candidate 20"),
        (((),), (20,), "a candidate has no tokens"),
        (((20, 2.5),), (20,), "2.5 is no token id"),
    ],
)
def test_candidates_that_cannot_be_told_apart_are_refused(answers, others, message):
    with pytest.raises(InputError, match=message):
        Example("x", (1,), "a", answers, others)


def test_words_and_single_tokens_are_not_mixed():
    items = (*examples()[:1], *split_words.examples()[:1])
    with pytest.raises(InputError, match=r"example 0 have one token.*Make two splits"):
        Examples(items, LABELS, "mixed")


def test_a_sequence_beyond_the_context_is_refused(tokenizer_folder):
    view = shared("gpt2", "bridge", tokenizer_folder)
    fits = split_words.examples(lengths=(62,), gold=("positive",))
    assert evaluate(view, fits).examples == 1
    with pytest.raises(InputError, match="prompt of 65 tokens: tiny-gpt2 reads at most 64"):
        evaluate(view, split_words.examples(lengths=(63,), gold=("positive",)))
