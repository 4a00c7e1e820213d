"""Prompts, refusals, batches, balance and hashes of `cdt_lens.tasks`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checks import unchecked_types
from helpers.words import ROWS, TEMPLATE, TEXTS, VERBALIZER, _reloaded, word_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase

from cdt_lens.core.errors import InputError, did_you_mean
from cdt_lens.tasks.prompts import PromptFormat, build_examples, template_columns
from cdt_lens.tasks.task import Batch, Example, Examples, Task


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return word_tokenizer(tmp_path_factory.mktemp("words"))


def build(tokenizer: PreTrainedTokenizerBase, rows: object = None, **options: object) -> Examples:
    given = {"template": TEMPLATE, "verbalizer": VERBALIZER, **options}
    return build_examples(ROWS if rows is None else rows, tokenizer=tokenizer, **given)


def make_task(tokenizer: PreTrainedTokenizerBase, **options: object) -> Task:
    examples = build(tokenizer, **options)
    format = PromptFormat(tokenizer, TEMPLATE, VERBALIZER)
    return Task(
        name="toy",
        labels=examples.labels,
        verbalizer=VERBALIZER,
        verbalizer_ids=format.verbalizer_ids,
        template=TEMPLATE,
        train=examples,
        valid=examples[:3],
        test=examples[:0],
        content_free=format.content_free("toy/content-free"),
    )


# Prompts and tokens


def test_places_name_every_row(tokenizer: PreTrainedTokenizerBase) -> None:
    places = [f"my file, row {number}" for number in range(len(ROWS))]
    build(tokenizer, places=places)
    for wrong in (places[:-1], [*places, "one more"]):
        with pytest.raises(InputError, match=f"places: {len(wrong)} for {len(ROWS)} rows"):
            build(tokenizer, places=wrong)


def test_example_has_prompt_tokens_answer_and_competitors(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    example = build(tokenizer)[0]
    assert example.prompt == "the food was good\nSentiment:"
    assert "".join(tokenizer.convert_ids_to_tokens(example.tokens)) == "<s>" + example.prompt
    assert example.label == "positive"
    assert tokenizer.convert_ids_to_tokens(list(example.answers)) == [" positive"]
    assert tokenizer.convert_ids_to_tokens(list(example.others)) == [" negative", " neutral"]
    assert example.fields == {"text": "the food was good", "label": "positive"}


def test_bos_is_prepended_iff_the_tokenizer_has_one(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    without = word_tokenizer(tmp_path, bos=None)
    plain = build(tokenizer, prepend_bos=False)[0].tokens
    assert build(tokenizer)[0].tokens == (1, *plain)
    assert build(tokenizer, prepend_bos=True)[0].tokens == (1, *plain)
    assert build(without)[0].tokens == plain
    with pytest.raises(InputError, match="no BOS token"):
        build(without, prepend_bos=True)


def test_prefix_stands_before_every_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    prefix = "a room\nSentiment: neutral\n\n"
    assert all(e.prompt.startswith(prefix) for e in build(tokenizer, prefix=prefix))


def test_braces_in_text_are_left_alone(tmp_path: Path) -> None:
    rows = [{"text": "{label} {", "label": "negative"}, {"text": "}", "label": "positive"}]
    verbalizer = {"negative": " negative", "positive": " positive"}
    tokenizer = word_tokenizer(tmp_path, (*TEXTS, "{label} {}}"))
    examples = build(tokenizer, rows, template="{{{text}}}\nSentiment:", verbalizer=verbalizer)
    assert examples[0].prompt == "{{label} {}\nSentiment:"


def test_labels_do_not_depend_on_the_order_of_the_verbalizer(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    turned = dict(reversed(VERBALIZER.items()))
    assert build(tokenizer, verbalizer=turned) == build(tokenizer)
    assert build(tokenizer).labels == ("negative", "neutral", "positive")


def test_content_free_prompts_have_candidates_in_the_order_of_labels(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    task = make_task(tokenizer)
    prompts = [example.prompt for example in task.content_free]
    assert prompts == ["N/A\nSentiment:", "\nSentiment:", "[MASK]\nSentiment:"]
    for example in task.content_free:
        assert example.answers + example.others == tuple(task.verbalizer_ids.values())
    assert tuple(task.verbalizer_ids) == task.labels


# Refusals


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "", "label": "positive"}, r"examples, row 1, column 'text': empty"),
        ({"text": "  \n", "label": "positive"}, r"column 'text': empty"),
        ({"text": None, "label": "positive"}, r"column 'text': empty"),
        ({"text": math.nan, "label": "positive"}, r"column 'text': empty"),
        ({"text": ["a"], "label": "positive"}, r"expected text, got list \['a'\]"),
        ({"text": "good", "label": None}, r"column 'label': empty"),
        ({"text": "good", "label": "postive"}, r"unknown label 'postive'; did you mean 'positive'"),
        ({"text": "good", "label": "Positive"}, r"did you mean 'positive'\?; expected one of neg"),
        ({"text": "good", "label": 2}, r"unknown label '2'; expected one of negative, neutral"),
        ({"txt": "good", "label": "positive"}, r"no column 'text'; did you mean 'txt'\?"),
        ({"text": "good"}, r"no column 'label'; the columns are 'text'"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build(tokenizer, [row, *ROWS])


def test_places_name_the_row(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"^mine.csv, line 7, column 'text': empty"):
        build(tokenizer, [{"text": "", "label": "neutral"}], places=["mine.csv, line 7"])


def test_no_rows_and_a_label_without_rows_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="examples: no rows"):
        build(tokenizer, [])
    with pytest.raises(InputError, match=r"label 'neutral' \(found: negative, positive\)"):
        build(tokenizer, ROWS[:2])


@pytest.mark.parametrize(
    ("verbalizer", "message"),
    [
        ({"a": " positive", "b": " unheard"}, r"label 'b': ' unheard' must have tokens.*<unk>"),
        ({"a": " positive", "b": " good unheard"}, r"label 'b': ' good unheard' .*<unk>"),
        ({"a": " positive", "b": ""}, r"label 'b': '' must have tokens.*got none"),
        ({"a": " positive", "b": " positive"}, r"are the same token ' positive'"),
        ({"a": " the food", "b": " the food"}, r"are the same tokens \[' the', ' food'\]"),
        (
            {"a": " good food", "b": " good"},
            r"' good food' \(a\) begin with those of ' good' \(b\)",
        ),
        ({"a": " good food\n", "b": " bad"}, r"label 'a': ' good food\\n' ends in white space"),
        ({"a": " positive"}, r"at least two labels"),
    ],
)
def test_verbalizer_mistakes_are_refused(
    tokenizer: PreTrainedTokenizerBase, verbalizer: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build(tokenizer, verbalizer=verbalizer)


@pytest.mark.parametrize(
    "template",
    ["no column", "{}", "{0}", "{text.x}", "{text[0]}", "{text!r}", "{text:>9}", "{text"],
)
def test_template_mistakes_are_refused(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    with pytest.raises(InputError, match="write a literal brace twice"):
        build(tokenizer, template=template)


def test_template_columns_are_plain_names_in_order() -> None:
    assert template_columns("{b}{{x}} {a b} {b}") == ("b", "a b")


def test_a_tokenizer_that_merges_over_the_cue_is_refused(tmp_path: Path) -> None:
    core = Tokenizer(BPE(unk_token="<unk>"))
    trainer = BpeTrainer(
        vocab_size=200,
        special_tokens=["<unk>"],
        initial_alphabet=sorted(set("".join(TEXTS))),
        show_progress=False,
    )
    # " good" stands alone more often than after ":", so it is a token; ": bad" is one as well.
    core.train_from_iterator([" good", " bad", "x: bad"] * 10 + [": bad"] * 200, trainer)
    tokenizer = _reloaded(core, tmp_path, unk_token="<unk>")
    verbalizer = {"g": " good", "b": " bad"}
    rows = [{"text": "a", "label": "g"}, {"text": "b", "label": "b"}]
    with pytest.raises(InputError, match=r"row 2: .*merges.*' bad'.*': bad'"):
        build(tokenizer, rows, template="{text}:", verbalizer=verbalizer)


@pytest.mark.parametrize(
    ("answers", "others"), [((), (1,)), ((1,), ()), ((1, 1), (2,)), ((1,), (1, 2))]
)
def test_example_refuses_bad_candidates(answers: tuple[int, ...], others: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="at least one answer and one other token"):
        Example("x", (1,), "a", answers, others)


def test_example_refuses_an_empty_prompt_and_examples_a_foreign_label() -> None:
    with pytest.raises(InputError, match="no tokens"):
        Example("", (), "a", (1,), (2,))
    with pytest.raises(InputError, match=r"x: labels \['c'\] are not among"):
        Examples((Example("x", (1,), "c", (1,), (2,)),), ("a", "b"), "x")


# Length


def test_a_prompt_over_the_limit_is_refused_with_its_length(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    longest = max(len(example.tokens) for example in build(tokenizer))
    assert len(build(tokenizer, max_length=longest)) == len(ROWS)
    message = rf"examples, row 2: the prompt has {longest} tokens, the limit is {longest - 1}"
    with pytest.raises(InputError, match=message):
        build(tokenizer, max_length=longest - 1)
    with pytest.raises(InputError, match="max_length=0: expected a whole number of at least 1"):
        build(tokenizer, max_length=0)


def test_the_tokenizers_own_limit_counts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the limit is 10"):
        build(word_tokenizer(tmp_path, max_length=10))


def test_truncation_cuts_the_text_and_keeps_prefix_and_cue(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    whole = build(tokenizer, prefix="we ate\n\n")
    cut = build(tokenizer, prefix="we ate\n\n", max_length=11, truncate=True)
    assert max(len(example.tokens) for example in cut) == 11
    assert cut[1].prompt == "we ate\n\nthe room was\nSentiment:"
    assert [e for e in cut if len(e.tokens) < 11] == [e for e in whole if len(e.tokens) < 11]


def test_truncation_that_is_not_enough_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="cutting column 'text' is not enough"):
        build(tokenizer, max_length=3, truncate=True)


# Batches


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("sort_by_length", [True, False])
def test_batches_hold_every_example_once_right_padded(
    tokenizer: PreTrainedTokenizerBase, batch_size: int, sort_by_length: bool
) -> None:
    examples = build(tokenizer)
    seen: list[int] = []
    for batch in examples.batches(batch_size, sort_by_length=sort_by_length, pad_id=99):
        seen += batch.index
        for row, position in enumerate(batch.index):
            example = examples[position]
            length = int(batch.lengths[row])
            assert tuple(batch.tokens[row, :length].tolist()) == example.tokens
            assert (batch.tokens[row, length:] == 99).all()
            assert examples.labels[int(batch.label_index[row])] == example.label
    assert sorted(seen) == list(range(len(examples)))
    assert sort_by_length or seen == sorted(seen)


def test_sorting_puts_the_longest_first(tokenizer: PreTrainedTokenizerBase) -> None:
    lengths = torch.cat([batch.lengths for batch in build(tokenizer).batches(2)])
    assert (lengths.diff() <= 0).all()


@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_shards_partition_the_split(tokenizer: PreTrainedTokenizerBase, world: int) -> None:
    examples = build(tokenizer)
    parts = [
        [i for batch in examples.batches(2, shard=(rank, world)) for i in batch.index]
        for rank in range(world)
    ]
    assert sorted(i for part in parts for i in part) == list(range(len(examples)))


def test_candidates_of_different_number_are_padded_with_direction_zero() -> None:
    items = (
        Example("x", (1, 2), "a", (5, 6), (7, 8, 9)),
        Example("y", (1,), "b", (3,), (4,)),
    )
    (batch,) = Examples(items, ("a", "b"), "toy").batches(2)
    assert batch.candidates.tolist() == [[5, 6, 7, 8, 9], [3, 4, 3, 3, 3]]
    torch.testing.assert_close(
        batch.direction,
        torch.tensor([[1 / 2, 1 / 2, -1 / 3, -1 / 3, -1 / 3], [1.0, -1.0, 0, 0, 0]]),
        rtol=0,
        atol=1e-7,
    )
    assert batch.is_answer.tolist() == [[True] * 2 + [False] * 3, [True] + [False] * 4]
    assert batch.is_candidate.tolist() == [[True] * 5, [True] * 2 + [False] * 3]
    assert batch.label_index.tolist() == [0, 1]


def test_direction_gives_mean_answer_minus_mean_other(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = build(tokenizer)
    logits = torch.randn(len(tokenizer), generator=torch.Generator().manual_seed(0))
    for batch in examples.batches(3):
        got = (batch.direction * logits[batch.candidates]).sum(-1)
        for value, i in zip(got, batch.index, strict=True):
            example = examples[i]
            expected = logits[list(example.answers)].mean() - logits[list(example.others)].mean()
            torch.testing.assert_close(value, expected)


def test_batch_moves_to_a_device(tokenizer: PreTrainedTokenizerBase) -> None:
    (batch,) = build(tokenizer).batches(100)
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert moved.index == batch.index
    assert {moved.tokens.device.type, moved.direction.device.type} == {"meta"}


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": 1, "shard": (1, 1)},
        {"batch_size": 1, "shard": (-1, 2)},
        {"batch_size": 1, "shard": (0, 0)},
    ],
)
def test_batch_arguments_out_of_range_are_refused_at_once(
    tokenizer: PreTrainedTokenizerBase, options: dict[str, object]
) -> None:
    with pytest.raises(
        InputError, match="batch_size=0: expected a whole number of at least 1|0 <= rank < world"
    ):
        build(tokenizer).batches(**options)


# Examples


def test_examples_are_a_sequence(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = build(tokenizer)
    assert len(examples) == len(list(examples)) == len(ROWS)
    assert examples[-1].prompt.startswith("a room")
    assert examples[1:3].items == examples.items[1:3]
    assert examples[1:3].labels == examples.labels
    assert examples.take(2) == examples[:2]
    assert examples.take(100) == examples
    assert examples.counts == {"negative": 2, "neutral": 2, "positive": 3}
    with pytest.raises(InputError, match="at least 1"):
        examples.take(0)


def test_balanced_takes_the_same_number_of_each_label(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = build(tokenizer)
    assert examples.balanced().counts == {"negative": 2, "neutral": 2, "positive": 2}
    assert examples.balanced(3).counts == {"negative": 1, "neutral": 1, "positive": 1}
    assert examples.balanced(5).counts == examples.balanced(3).counts
    assert examples.balanced(3, seed=1) == examples.balanced(3, seed=1)
    drawn = {examples.balanced(3, seed=seed).hash for seed in range(10)}
    assert len(drawn) > 1
    order = [examples.items.index(item) for item in examples.balanced()]
    assert order == sorted(order)


@pytest.mark.parametrize("n", [0, 2, 9])
def test_balanced_refuses_what_the_data_lack(tokenizer: PreTrainedTokenizerBase, n: int) -> None:
    with pytest.raises(InputError, match=r"label 'negative' has 2; n may be 3 to 6"):
        build(tokenizer).balanced(n)


def test_balanced_names_a_label_without_examples(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = build(tokenizer)
    some = examples[:1]
    missing = next(label for label in examples.labels if label != some[0].label)
    with pytest.raises(InputError, match=f"no example has the label '{missing}'"):
        some.balanced()


def test_an_empty_split_is_refused_where_it_is_used(tokenizer: PreTrainedTokenizerBase) -> None:
    empty = make_task(tokenizer).test
    assert len(empty) == 0
    for use in (lambda: empty.batches(1), empty.balanced, lambda: empty.take(1)):
        with pytest.raises(InputError, match="no examples; load this split"):
            use()


# Hashes


def test_examples_hash_follows_what_a_model_sees(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = build(tokenizer)
    first = examples[0]
    assert examples.hash == build(tokenizer).hash
    assert examples.hash == replace(examples, name="other").hash
    changes = [
        replace(first, tokens=(*first.tokens, 3)),
        replace(first, label="neutral"),
        replace(first, answers=first.others, others=first.answers),
        replace(first, others=first.others[:1]),
    ]
    hashes = {replace(examples, items=(c, *examples.items[1:])).hash for c in changes}
    hashes |= {examples[:3].hash, examples[::-1].hash, build(tokenizer, prepend_bos=False).hash}
    assert len(hashes | {examples.hash}) == len(changes) + 4


def test_task_hash_changes_with_what_matters_and_with_nothing_else(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    task = make_task(tokenizer)
    prior = {"negative": 0.5, "neutral": 0.0, "positive": -1.0}
    same = [
        make_task(tokenizer),
        replace(task, name="another name"),
        replace(task, verbalizer=dict(reversed(VERBALIZER.items()))),
        replace(task, verbalizer_ids=dict(reversed(task.verbalizer_ids.items()))),
    ]
    assert {other.hash for other in same} == {task.hash}
    other = [
        replace(task, template="{text}:"),
        replace(task, prefix="a"),
        replace(task, verbalizer={**VERBALIZER, "neutral": " food"}),
        replace(task, verbalizer_ids={**task.verbalizer_ids, "neutral": 0}),
        replace(task, train=task.train[1:]),
        replace(task, train=task.valid, valid=task.train),
        replace(task, test=task.valid),
        replace(task, content_free=task.content_free[:2]),
        task.with_prior(prior),
    ]
    assert len({task.hash, *(item.hash for item in other)}) == len(other) + 1
    turned = dict(reversed(prior.items()))
    assert task.with_prior(turned).hash == task.with_prior(prior).hash


# Tasks and their prior


def test_task_refuses_splits_of_other_labels(tokenizer: PreTrainedTokenizerBase) -> None:
    task = make_task(tokenizer)
    foreign = Examples((), ("no", "yes"), "toy/test")
    with pytest.raises(InputError, match=r"toy/test has labels \('no', 'yes'\), expected"):
        replace(task, test=foreign)


def test_candidate_prior_is_the_offset_of_each_candidate(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    task = make_task(tokenizer)
    (batch,) = task.train[:2].batches(2, sort_by_length=False)
    assert task.candidate_prior(batch).tolist() == [[0, 0, 0], [0, 0, 0]]
    prior = {"negative": 0.5, "neutral": 0.25, "positive": -1.0}
    calibrated = task.with_prior(prior)
    assert calibrated.prior == prior
    # The first row is positive, the second negative; the others follow in the order of the labels.
    assert calibrated.candidate_prior(batch).tolist() == [[-1.0, 0.5, 0.25], [0.5, 0.25, -1.0]]
    assert calibrated.train == task.train


def test_a_prior_removes_the_models_bias(tokenizer: PreTrainedTokenizerBase) -> None:
    task = make_task(tokenizer)
    ids = task.verbalizer_ids
    bias = torch.zeros(len(tokenizer))
    bias[ids["positive"]] = 10.0
    calibrated = task.with_prior({label: float(bias[token]) for label, token in ids.items()})
    for batch in task.train.batches(4):
        evidence = torch.where(batch.is_answer, 1.0, 0.0)
        logits = bias[batch.candidates] + evidence
        biased = logits.argmax(-1) == 0
        right = (logits - calibrated.candidate_prior(batch)).argmax(-1) == 0
        assert right.all()
        assert torch.equal(biased, batch.label_index == task.labels.index("positive"))


@pytest.mark.parametrize(
    "prior",
    [
        {"negative": 0.0, "neutral": 0.0},
        {"negative": 0.0, "neutral": 0.0, "positive": math.nan},
        {"negative": 0.0, "neutral": 0.0, "positive": 0.0, "more": 0.0},
    ],
)
def test_a_prior_that_does_not_fit_is_refused(
    tokenizer: PreTrainedTokenizerBase, prior: dict[str, float]
) -> None:
    with pytest.raises(
        InputError,
        match="a finite prior for each of negative, neutral, positive|positive: Input should be a finite",
    ):
        make_task(tokenizer).with_prior(prior)


def test_a_prior_needs_a_verbalizer(tokenizer: PreTrainedTokenizerBase) -> None:
    task = replace(make_task(tokenizer), verbalizer={}, verbalizer_ids={})
    with pytest.raises(InputError, match="no verbalizer"):
        task.with_prior({"negative": 0.0, "neutral": 0.0, "positive": 0.0})


def test_did_you_mean_names_the_closest_or_nothing() -> None:
    assert did_you_mean("Nuetral", ["neutral", "positive"]) == "; did you mean 'neutral'?"
    assert did_you_mean("label", [" label"]) == "; did you mean ' label'?"
    assert did_you_mean("zzz", ["neutral"]) == ""


# By hand


def test_lists_and_numbers_of_other_libraries_become_tuples_of_ids() -> None:
    with unchecked_types():
        made = Example("p", [np.int64(5), torch.tensor(6)], "a", [20], [np.int32(30)])
        data = Examples([made], ["a", "b"], "mine")
    plain = Example("p", (5, 6), "a", (20,), (30,))
    assert made == plain and all(type(id) is int for id in made.tokens + made.others)
    assert data == Examples((plain,), ("a", "b"), "mine")
    assert data.hash == Examples((plain,), ("a", "b"), "mine").hash


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"tokens": torch.tensor([5, 6])},
            r"tokens: expected token ids such as \(5, 6\), got Tensor",
        ),
        ({"tokens": [[5, 6]]}, r"tokens: \[5, 6\] is no token id"),
        ({"tokens": [5.0, 6]}, "tokens: 5.0 is no token id"),
        ({"tokens": [True]}, "tokens: True is no token id"),
        ({"answers": 20}, "answers: expected token ids such as .*, got int"),
        ({"others": "30"}, "others: expected token ids .*, got str"),
    ],
)
def test_ids_of_another_shape_are_refused(changes: dict[str, Any], told: str) -> None:
    values = {"prompt": "p", "tokens": (5, 6), "label": "a", "answers": (20,), "others": (30,)}
    with unchecked_types(), pytest.raises(InputError, match=told):
        Example(**{**values, **changes})


def test_items_that_are_no_examples_are_refused() -> None:
    with (
        unchecked_types(),
        pytest.raises(InputError, match="mine: item 0 is str, expected Example"),
    ):
        Examples(("a prompt",), ("a", "b"), "mine")
    with (
        unchecked_types(),
        pytest.raises(InputError, match="mine: items: expected a tuple, got str"),
    ):
        Examples("a prompt", ("a", "b"), "mine")
