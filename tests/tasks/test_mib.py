"""MIB's tasks from small files with the documented fields, as its evaluation reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets as hub
import pytest
import torch
import transformers
from helpers.saved import save_model
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

import cdt_lens as cdt
from cdt_lens.circuits.faithfulness import FaithfulnessCurve
from cdt_lens.cli import app as cli
from cdt_lens.core.errors import InputError
from cdt_lens.decomposition.baseline import counterfactual_baseline
from cdt_lens.tasks.datasets import load_task
from cdt_lens.tasks.metrics import chance_caution

Rows = Sequence[Mapping[str, Any]]
NAMES = ("Mary", "John", "Anna", "Tom")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """GPT-2's kind: a space belongs to the word behind it. Names are one token, Bartholomew not."""
    merges, words = [], ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    for word in ["Ġ" + name for name in NAMES] + [str(n) for n in range(10, 100)]:
        piece = word[0]
        for letter in word[1:]:
            if piece + letter not in words:
                merges.append((piece, letter))
                words.append(piece + letter)
            piece += letter
    core = Tokenizer(BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    folder = tmp_path_factory.mktemp("gpt2")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def ioi(io: str, subject: str, third: str = "Anna") -> dict[str, Any]:
    prompt = f"When {io} and {subject} met, {subject} gave a book to"
    return {
        "template": "When {name_A} and {name_B} met, {name_C} gave a book to",
        "metadata": {
            "indirect_object": io, "subject": subject, "object": "book", "place": None,
            "random_a": "Tom", "random_b": "Tom", "random_c": third,
        },
        "prompt": prompt, "choices": [io, subject], "answerKey": 0,
        "s2_io_flip_counterfactual": {
            "prompt": f"When {io} and {subject} met, {io} gave a book to",
            "choices": [io, subject], "answerKey": 1,
        },
        "abc_counterfactual": {
            "prompt": f"When {third} and Tom met, {third} gave a book to",
            "choices": [io, subject], "answerKey": 0,
        },
    }  # fmt: skip


def sums(a: int, b: int, other: tuple[int, int] | None, operator: str = "+") -> dict[str, Any]:
    def asked(x: int, y: int) -> str:
        return f"Q: How much is {x} {operator} {y}? A: "

    result = a + b if operator == "+" else a - b
    pair = None
    if other is not None:
        x, y = other
        pair = {
            "label": x + y if operator == "+" else x - y, "operand1": x, "operand2": y,
            "prompt": asked(x, y),
        }  # fmt: skip
    return {
        "idx": 1, "template": "sum", "prompt": asked(a, b), "label": str(result),
        "operator": operator, "num_digit": 2, "operand1": a, "operand2": b,
        "random_counterfactual": pair,
    }  # fmt: skip


def choices(colour: str, right: int, labels: Sequence[str] = "ABCD") -> dict[str, Any]:
    texts = ["red", "green", "blue", "gray"]
    texts[right] = colour
    question = f"A box is {colour}. What color is a box?"

    def shown(names: Sequence[Any]) -> str:
        listed = [f"\n{name}. {text}" for name, text in zip(names, texts, strict=True)]
        return question + "".join(listed) + "\nAnswer:"

    numbers = [1, 2, 3, 4]
    return {
        "question": question, "choices": {"label": list(labels), "text": texts},
        "answerKey": right, "prompt": shown(labels), "idx": 0,
        "symbol_counterfactual": {
            "prompt": shown(numbers), "choices": {"label": numbers, "text": texts},
            "answerKey": right,
        },
    }  # fmt: skip


def write(folder: Path, kind: str, **splits: Rows) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        path = folder / f"{split}.{kind}"
        if kind == "parquet":
            hub.Dataset.from_list(list(rows)).to_parquet(path)
        elif kind == "json":
            path.write_text(json.dumps(list(rows)), "utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


IOI = [ioi("Mary", "John"), ioi("Tom", "Mary"), ioi("John", "Tom", "Mary")]
SUMS = [sums(10, 12, (11, 20)), sums(20, 25, (30, 31)), sums(15, 16, (17, 40))]


def id_of(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    (one,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    return one


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json"])
def test_ioi_in_every_kind_of_file(kind, tmp_path, tokenizer):
    write(tmp_path / "ioi", kind, train=IOI, validation=IOI[1:], test=IOI[:1])
    task = load_task("mib-ioi", tokenizer=tokenizer, folder=tmp_path)
    assert [len(s) for s in (task.train, task.valid, task.test)] == [3, 2, 1]
    assert task.name == "mib-ioi" and task.train.name == "mib-ioi/train"
    for item, row in zip(task.train, IOI, strict=True):
        names = row["metadata"]
        io, subject = (id_of(tokenizer, f" {names[n]}") for n in ("indirect_object", "subject"))
        # MIB's logit difference: the indirect object minus the subject.
        assert (item.prompt, item.answers, item.others) == (row["prompt"], (io,), (subject,))
        assert list(item.tokens) == tokenizer(row["prompt"])["input_ids"]
        pair = item.pair
        assert pair is not None and pair.prompt == row["s2_io_flip_counterfactual"]["prompt"]
        assert (pair.answers, pair.others) == ((subject,), (io,))
        assert len(pair.tokens) == len(item.tokens)
    # The folder of the data set itself, and its parquet files as the hub has them.
    (tmp_path / "ioi" / f"train.{kind}").rename(tmp_path / "ioi" / f"train-00000-of-00001.{kind}")
    again = load_task("mib-ioi", tokenizer=tokenizer, folder=tmp_path / "ioi")
    assert again.hash == task.hash and again.train.pairs.hash == task.train.pairs.hash


def test_another_counterfactual_of_ioi(tmp_path, tokenizer):
    write(tmp_path, "jsonl", train=IOI)
    own, abc = (
        load_task("mib-ioi", tokenizer=tokenizer, folder=tmp_path, pair=pair).train
        for pair in (None, "abc_counterfactual")
    )
    assert own.hash == abc.hash  # the candidates are those of the prompt
    assert [p.prompt for p in abc.pairs] == [row["abc_counterfactual"]["prompt"] for row in IOI]
    # Its answer is the prompt's own, so the competitor is as well.
    assert [(p.answers, p.others) for p in abc.pairs] == [(i.answers, i.others) for i in abc]
    with pytest.raises(InputError, match=r"no column 'abd_counterfactual'.*abc_counterfactual"):
        load_task("mib-ioi", tokenizer=tokenizer, folder=tmp_path, pair="abd_counterfactual")


def test_rows_that_mib_leaves_out(tmp_path, tokenizer):
    """Names of other numbers of tokens; sums without a pair, of several tokens, or with equal ones."""
    rows = [ioi("Bartholomew", "John"), ioi("Mary", "John", "Bartholomew"), IOI[0]]
    write(tmp_path / "ioi", "jsonl", train=rows)
    task = load_task("mib-ioi", tokenizer=tokenizer, folder=tmp_path)
    assert [item.prompt for item in task.train] == [IOI[0]["prompt"]]
    rows = [
        sums(10, 12, None), sums(90, 80, (11, 20)), sums(10, 12, (90, 80)), sums(10, 12, (11, 11)),
        sums(30, 12, (11, 20), "-"), SUMS[1],
    ]  # fmt: skip
    write(tmp_path / "arithmetic_addition", "jsonl", train=rows)
    task = load_task("mib-arithmetic", "addition", tokenizer=tokenizer, folder=tmp_path)
    assert [item.prompt for item in task.train] == [SUMS[1]["prompt"]]
    assert task.train[0].place.endswith("split train, row 6")
    write(tmp_path / "ioi", "jsonl", train=[ioi("Bartholomew", "John")])
    with pytest.raises(InputError, match=r"mib-ioi/train: none of 1 rows can be used"):
        load_task("mib-ioi", tokenizer=tokenizer, folder=tmp_path)


@pytest.mark.parametrize("config", ["addition", "subtraction"])
def test_arithmetic(config, tmp_path, tokenizer):
    operator = {"addition": "+", "subtraction": "-"}[config]
    rows = [sums(50, 12, (43, 20), operator), sums(60, 25, (51, 31), operator)]
    write(tmp_path / f"arithmetic_{config}", "jsonl", train=rows)
    task = load_task("mib-arithmetic", config, tokenizer=tokenizer, folder=tmp_path)
    assert task.name == f"mib-arithmetic/{config}" and len(task.train) == 2
    for item, row in zip(task.train, rows, strict=True):
        pair = row["random_counterfactual"]
        right, wrong = (id_of(tokenizer, str(x["label"])) for x in (row, pair))
        assert (item.answers, item.others) == ((right,), (wrong,))
        assert item.pair is not None and item.pair.prompt == pair["prompt"]


@pytest.mark.parametrize(
    ("name", "config", "folder"),
    [
        ("mib-mcqa", None, "copycolors_mcqa/4_answer_choices"),
        ("mib-mcqa", "4_answer_choices", "copycolors_mcqa"),
        ("mib-arc", "easy", "arc_easy"),
        ("mib-arc", "challenge", "arc_challenge"),
    ],
)
def test_choices(name, config, folder, tmp_path, tokenizer):
    """Symbols as MIB reads them: without a space, and numbers in the counterfactual."""
    rows = [choices("pink", 2), choices("black", 0), choices("white", 3)]
    write(tmp_path / folder, "parquet", train=rows, validation=rows[:1])
    task = load_task(name, config, tokenizer=tokenizer, folder=tmp_path)
    found = [(item.answers, item.others) for item in task.train]
    symbols = [("C", "3"), ("A", "1"), ("D", "4")]
    assert found == [tuple((id_of(tokenizer, symbol),) for symbol in pair) for pair in symbols]
    assert [len(i.tokens) for i in task.train] == [len(p.tokens) for p in task.train.pairs]
    assert len(task.valid) == 1 and not len(task.test)


@pytest.mark.parametrize("folder", ["copycolors_mcqa", "mib-mcqa/copycolors_mcqa", "mib-mcqa", "."])
def test_the_asked_folder_is_read_among_others(folder, tmp_path, tokenizer):
    own, others = choices("pink", 2), [choices("black", 0)]
    for config in ("2_answer_choices", "3_answer_choices"):
        write(tmp_path / folder / config, "jsonl", train=others)
    write(tmp_path / folder / "4_answer_choices", "jsonl", train=[own])
    write(tmp_path / "arc_easy", "jsonl", train=others)
    for config in (None, "4_answer_choices"):
        task = load_task("mib-mcqa", config, tokenizer=tokenizer, folder=tmp_path)
        assert [item.prompt for item in task.train] == [own["prompt"]]


# The asked task and configuration, the folder with rows, the folder that is given, what is named.
OTHERS: dict[str, tuple[str, str | None, str, str, str]] = {
    "a data set": ("mib-arc", "challenge", "arc_easy", ".", r"arc_challenge.*got arc_easy"),
    "that itself": ("mib-arc", "challenge", "arc_easy", "arc_easy", r"arc_challenge.*got arc_easy"),
    "in the task's": ("mib-arc", "easy", "mib-arc/arc_challenge", ".", "got arc_challenge"),
    "a task": ("mib-ioi", None, "mib-arc", ".", "folder ioi.*got mib-arc"),
    "choices": (
        "mib-mcqa", "4_answer_choices", "copycolors_mcqa/2_answer_choices", ".",
        r"folder 4_answer_choices.*got 2_answer_choices",
    ),
    "default choices": (
        "mib-mcqa", None, "copycolors_mcqa/2_answer_choices", ".", "got 2_answer_choices"
    ),
    "choices themselves": (
        "mib-mcqa", None, "2_answer_choices", "2_answer_choices", "got 2_answer_choices"
    ),
    "choices of another name": (
        "mib-mcqa", "4_answer_choices", "copycolors_mcqa/two", ".", "got no parquet or JSON files"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_rows_of_another_data_set_are_refused(kind, tmp_path, tokenizer):
    name, config, place, folder, said = OTHERS[kind]
    write(tmp_path / place, "jsonl", train=IOI if name == "mib-ioi" else [choices("pink", 2)])
    with pytest.raises(InputError, match=rf"task '{name}', folder .*{said}.*Put the files"):
        load_task(name, config, tokenizer=tokenizer, folder=tmp_path / folder)


def test_choices_in_the_folder_of_the_data_set(tmp_path, tokenizer):
    write(tmp_path / "copycolors_mcqa", "json", train=[choices("pink", 2)])
    assert len(load_task("mib-mcqa", tokenizer=tokenizer, folder=tmp_path).train) == 1


MISTAKES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no metadata": (
        lambda: {**IOI[0], "metadata": {"subject": "John"}},
        "metadata.indirect_object",
    ),
    "no pair": (lambda: {**IOI[0], "s2_io_flip_counterfactual": None}, "s2_io_flip_counterfactual"),
    "a wrong number": (
        lambda: {
            **IOI[0],
            "s2_io_flip_counterfactual": {**IOI[0]["s2_io_flip_counterfactual"], "answerKey": 7},
        },
        r"expected a list with item 7, got \['Mary', 'John'\]",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_malformed_row_is_named(mistake, tmp_path, tokenizer):
    row, said = MISTAKES[mistake]
    write(tmp_path, "jsonl", train=[IOI[1], row()])
    with pytest.raises(InputError, match=rf"split train, row [12].*{said}"):
        load_task("mib-ioi", tokenizer=tokenizer, folder=tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a template": ({"name": "mib-ioi", "template": "{prompt}!"}, "template='{prompt}!' does not"),
    "shots": ({"name": "mib-ioi", "shots": 2}, "shots=2 does not apply"),
    "sizes": ({"name": "mib-ioi", "n": (1, 1, 1)}, "does not apply"),
    "a config": ({"name": "mib-ioi", "config": "easy"}, "expected none"),
    "no config": ({"name": "mib-arc"}, "expected one of easy, challenge"),
    "a misspelt config": ({"name": "mib-arithmetic", "config": "additon"}, "addition, subtraction"),
    "no folder": ({"name": "mib-ioi", "folder": "nowhere"}, "nowhere: no such folder"),
    "a long prompt": ({"name": "mib-ioi", "max_length": 5}, r"row 1: the prompt has \d+ tokens"),
    "pairs of others": ({"name": "ioi", "pair": "abc"}, "pair='abc' does not apply"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_options_that_do_not_fit_are_refused(mistake, tmp_path, tokenizer):
    given, said = REFUSED[mistake]
    write(tmp_path, "jsonl", train=IOI)
    folder = {} if given["name"] == "ioi" else {"folder": tmp_path}
    with pytest.raises(InputError, match=said):
        load_task(tokenizer=tokenizer, **folder | given)


def test_a_pair_of_sums_is_a_record(tmp_path, tokenizer):
    write(tmp_path / "arithmetic_addition", "jsonl", train=SUMS)
    with pytest.raises(InputError, match="row 1.*: pair='prompt': expected a column that holds"):
        load_task("mib-arithmetic", "addition", pair="prompt", tokenizer=tokenizer, folder=tmp_path)


def test_a_limit_draws_usable_rows(tmp_path, tokenizer):
    write(tmp_path, "jsonl", train=[ioi("Bartholomew", "John"), *IOI])
    whole, drawn = (
        load_task("mib-ioi", tokenizer=tokenizer, folder=tmp_path, limit=n, seed=1).train
        for n in (None, 2)
    )
    assert len(drawn) == 2 and set(drawn) <= set(whole)


def test_the_hub_is_asked_for_mibs_data_sets(tmp_path, tokenizer, monkeypatch):
    asked = []
    rows = [choices("pink", 2)]

    def load(repo: str, config: str | None, **_: Any) -> Any:
        asked.append((repo, config))
        return hub.DatasetDict(train=hub.Dataset.from_list(rows))

    monkeypatch.setattr(hub, "load_dataset", load)
    for name, config in (("mib-mcqa", None), ("mib-mcqa", "2_answer_choices"), ("mib-arc", "easy")):
        load_task(name, config, tokenizer=tokenizer)
    assert asked == [
        ("mib-bench/copycolors_mcqa", "4_answer_choices"),
        ("mib-bench/copycolors_mcqa", "2_answer_choices"),
        ("mib-bench/arc_easy", None),
    ]


def test_one_label_makes_every_mean_plain_and_chance_a_half(tmp_path, tokenizer):
    write(tmp_path, "jsonl", train=IOI)
    guess = load_task("mib-ioi", tokenizer=tokenizer, folder=tmp_path).train.guess
    assert chance_caution("accuracy", 0.6, guess) == ""
    assert "chance 0.5" in chance_caution("accuracy", 0.5, guess)


# A run ---------------------------------------------------------------------------------------------


def word_rows(n: int, first: int) -> list[dict[str, Any]]:
    """IOI's fields with the words of the tiny model's tokenizer."""
    rows = []
    for i in range(first, first + n):
        io, subject, third = f"w{20 + i}", f"w{60 + i}", "w19"
        row = ioi(io, subject, third)
        row["prompt"] = f"{io} {subject} {subject} w5"
        row["s2_io_flip_counterfactual"] |= {"prompt": f"{io} {subject} {io} w5"}
        rows.append(row)
    return rows


@pytest.mark.filterwarnings("always:.*no better than chance")
def test_a_run_of_discover_with_mibs_pairs_and_empty_run(tmp_path: Path):
    """From the command line to a curve that divides by the plain run of the counterfactuals."""
    model_folder = save_model(tmp_path / "tiny")
    write(tmp_path / "data" / "ioi", "jsonl", train=word_rows(8, 0), validation=word_rows(6, 10))
    out = tmp_path / "run"
    given = [
        "discover", "--model", str(model_folder), "--task", "mib-ioi", "--data",
        str(tmp_path / "data"), "--baseline", "counterfactual", "--examples", "8", "--k", "2",
        "--out", str(out),
    ]  # fmt: skip
    for command in (given, ["faithfulness", str(out), "--draws", "1", "--empty", "all"]):
        result = CliRunner().invoke(cli.app, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert "f = 0: heads, MLPs and input replaced" in " ".join(result.output.split())
    curve = FaithfulnessCurve.load(out / "faithfulness.json")
    model = cdt.load_model(str(model_folder))
    task = load_task("mib-ioi", tokenizer=model.tokenizer, folder=tmp_path / "data")
    plain = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    differences = []
    with torch.no_grad():
        for item in task.valid:
            logits = plain(torch.tensor([item.pair.tokens])).logits[0, -1]
            differences.append(float(logits[item.answers[0]] - logits[item.others[0]]))
    assert curve.empty == pytest.approx(sum(differences) / len(differences), abs=1e-4)
    assert curve.empty_run == "all" and curve.provenance.examples == {"answer": 6}
    assert counterfactual_baseline(model, task.valid).kind == "counterfactual"
    with pytest.raises(InputError, match=r"result with other settings \(empty all\)"):
        CliRunner().invoke(
            cli.app, ["faithfulness", str(out), "--draws", "1"], catch_exceptions=False
        )
