"""Counterfactual prompts of rows: from a column of files and of the hub, and what a bad one says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checks import assert_close
from helpers.saved import TEMPLATE, VERBALIZER, save_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import cdt_lens as cdt
from cdt_lens.core.errors import InputError
from cdt_lens.decomposition.baseline import counterfactual_baseline, mean_activations
from cdt_lens.models.view import view_of
from cdt_lens.tasks.datasets import task_from_files, task_from_hub
from cdt_lens.tasks.prompts import PromptFormat
from cdt_lens.tasks.task import Example, Task

ROWS = (
    ("w20 w21", "bad", "w22 w23", "good"),
    ("w24 w25 w26", "fine", "w27 w25 w26", "bad"),
    ("w28", "good", "w29", "fine"),
)
GIVEN: dict[str, Any] = {"template": TEMPLATE, "verbalizer": VERBALIZER, "pair": "other"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("pairs") / "tiny")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


def write(folder: Path, rows: Any = ROWS, name: str = "train.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["text,label,other,other_label", *(",".join(row) for row in rows)]
    (folder / name).write_text("\n".join(lines) + "\n", "utf-8")
    return folder / name


def from_file(path: Path, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Task:
    return task_from_files({"train": path}, tokenizer=tokenizer, **{**GIVEN, **options})


def test_the_template_makes_the_pair_as_it_makes_the_prompt(tmp_path, tokenizer):
    train = from_file(write(tmp_path), tokenizer, pair_label="other_label").train
    for item, (text, label, other, gold) in zip(train, ROWS, strict=True):
        assert (item.prompt, item.label) == (f"{text} w3", label)
        pair = item.pair
        assert pair is not None and (pair.prompt, pair.label) == (f"{other} w3", gold)
        # Begin-of-sequence, the words and the cue; w5 has the id 5.
        assert pair.tokens == (1, *(int(word[1:]) for word in other.split()), 3)
        assert pair.answers == (int(VERBALIZER[gold].strip()[1:]),)
        assert set(pair.answers + pair.others) == set(item.answers + item.others)
    assert [pair.label for pair in train.pairs] == [row[3] for row in ROWS]
    # Without a column for it, the label of the pair is the row's.
    assert [p.label for p in from_file(tmp_path / "train.csv", tokenizer).train.pairs] == [
        row[1] for row in ROWS
    ]


def test_shots_stand_before_the_pair_too_and_long_pairs_are_cut(tmp_path, tokenizer):
    more = [(f"{text} w30", *rest) for text, *rest in ROWS]
    task = from_file(write(tmp_path, (*ROWS, *more)), tokenizer, shots=3)
    for item in task.train:
        assert item.pair is not None and item.pair.prompt.startswith(task.prefix)
    rows = ((*ROWS[0][:2], "w22 w23 w40 w41 w42", "good"), *ROWS[1:])
    with pytest.raises(InputError, match=r"line 2, counterfactual: the prompt has 7 tokens"):
        from_file(write(tmp_path, rows), tokenizer, max_length=6)
    cut = from_file(tmp_path / "train.csv", tokenizer, max_length=6, truncate=True).train[0]
    assert cut.pair is not None and cut.pair.tokens[-1] == 3 and len(cut.pair.tokens) == 6


def test_pairs_change_neither_the_hash_nor_the_splits(tmp_path, tokenizer):
    path = write(tmp_path, ROWS * 4)
    paired, plain = from_file(path, tokenizer), from_file(path, tokenizer, pair=None)
    assert paired.hash == plain.hash
    assert paired.train.balanced(6, seed=3).hash == plain.train.balanced(6, seed=3).hash
    assert all(item.pair is not None for item in paired.train.balanced(6))
    with pytest.raises(InputError, match=r"files/train: 12 of 12 examples have no .*--pair"):
        _ = plain.train.pairs


def test_several_columns_of_a_template(tokenizer):
    rows = [
        {"a": "w20", "b": "w21", "label": label, "c": "w22", "d": "w23"} for label in VERBALIZER
    ]

    def prompts(pair: Any) -> str:
        made = PromptFormat(tokenizer, "{a} {b} w3", VERBALIZER, pair=pair).examples(rows)
        return made.pairs[0].prompt

    assert prompts({"b": "c"}) == "w20 w22 w3"
    assert prompts({"a": "d", "b": "c"}) == "w23 w22 w3"
    for wrong in ("c", {"x": "c"}, {"a": "c", "b": "c"}, {}):
        with pytest.raises(InputError, match=r"pair=.*among a, b, such as pair=\{'a'"):
            prompts(wrong)


MISTAKES = {
    "empty": ("w20,bad,,good", r"line 2, column 'other': empty"),
    "label": ("w20,bad,w21,godo", r"line 2, column 'other_label': unknown label 'godo'.*good"),
    "special": ("w20,bad,w21 </s>,good", r"line 2, column 'other': the text holds '</s>'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_pair_is_named_with_its_place(mistake, tmp_path, tokenizer):
    row, said = MISTAKES[mistake]
    path = write(tmp_path, (tuple(row.split(",")), *ROWS))
    with pytest.raises(InputError, match=said):
        from_file(path, tokenizer, pair_label="other_label")


def test_a_missing_column_is_named(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"header\): no column 'othr'.*did you mean.*other"):
        from_file(write(tmp_path), tokenizer, pair="othr")


def test_the_hubs_columns_give_the_same_pairs(tmp_path, tokenizer):
    write(tmp_path)
    options = {"tokenizer": tokenizer, "pair_label": "other_label", **GIVEN}
    ours = task_from_files({"train": tmp_path / "train.csv"}, **options).train
    assert task_from_hub(str(tmp_path), **options).train.pairs.items == ours.pairs.items


def test_a_pair_is_an_example():
    with pytest.raises(InputError, match="pair: expected an Example or None, got str"):
        Example("a", (1, 2), "good", (3,), (4,), pair="b")  # type: ignore[arg-type]


# The baseline -------------------------------------------------------------------------------------


def test_the_counterfactual_baseline_takes_the_pairs_of_the_examples(tmp_path, folder):
    model = cdt.load_model(str(folder))
    train = from_file(write(tmp_path), model.tokenizer).train
    own, given = (
        counterfactual_baseline(model, train), counterfactual_baseline(model, train, train.pairs)
    )  # fmt: skip
    assert own.hash == given.hash
    assert own.pairs == {item.tokens: item.pair.tokens for item in train}


def test_pairs_of_another_length_are_refused_by_row_where_positions_must_match(tmp_path, folder):
    model = cdt.load_model(str(folder), dtype=torch.float64)
    rows = (ROWS[0], (*ROWS[1][:2], "w27 w25 w26 w30", "bad"), ROWS[2])
    train = from_file(write(tmp_path, rows), model.tokenizer).train
    said = r"train.csv, line 3: the prompt has 5 tokens, its counterfactual prompt 6"
    with pytest.raises(InputError, match=said):
        counterfactual_baseline(model, train)
    # A mean has no such positions: the label-balanced mean over the pairs, each alone.
    view = view_of(model)
    sites = [("z", layer) for layer in range(view.n_layers)]
    last = []
    for pair in train.pairs:
        trace = view.run(torch.tensor([pair.tokens]), sites)
        last.append(torch.stack([trace[site][0, -1] for site in sites]))
    found = mean_activations(model, train.pairs, progress=False).means[:, 1]
    assert_close(found, torch.stack(last).mean(0), atol=2e-7)  # kept as float32
    # The prompts themselves are averaged as ever.
    plain = from_file(tmp_path / "train.csv", model.tokenizer, pair=None).train
    with_pairs = mean_activations(model, train, progress=False)
    assert with_pairs.hash == mean_activations(model, plain, progress=False).hash
