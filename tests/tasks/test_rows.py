"""Rows of files: which mistake a message names, what is read as text, how much is read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets as hub
import pytest
from helpers.words import TEMPLATE, VERBALIZER, word_tokenizer
from transformers import PreTrainedTokenizerBase

from cdt_lens.core.errors import InputError
from cdt_lens.tasks import rows as module
from cdt_lens.tasks.datasets import task_from_files, task_from_hub
from cdt_lens.tasks.rows import read_table
from cdt_lens.tasks.task import Task


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    texts = ("null 007 NA 1.50 true good food 2020-01-01 Sentiment:\n", " negative positive")
    return word_tokenizer(tmp_path_factory.mktemp("words"), texts, number=r"[\d.-]+")


def from_file(tokenizer: PreTrainedTokenizerBase, path: Path, **options: object) -> Task:
    words = {label: VERBALIZER[label] for label in ("negative", "positive")}
    return task_from_files(
        {"train": path}, tokenizer=tokenizer, template=TEMPLATE, verbalizer=words, **options
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text;label\ngood, bad;positive\n", "separated by semicolons"),
        ("a.csv", "id;text;label\n1;good;positive\n", "separated by semicolons"),
        ("a.csv", 'text;"a, b"\ngood, bad;x, y\n', "separated by semicolons"),
        ("a.csv", "text\tlabel\ngood, bad\tpositive\n", "separated by tabs"),
        ("a.csv", "text|label\ngood, bad|positive\n", "separated by bars"),
        ("a.tsv", "text,label\ngood\tbad,positive\n", "separated by commas"),
        ("a.tsv", "text;label\ngood\tbad;positive\n", "separated by semicolons"),
        ("a.csv", "# from the net\ntext,label\ngood,positive\n", "the header: remove the comment"),
        ("a.csv", "# from a, b\ntext,label\ngood,positive\n", "the header: remove the comment"),
        ("a.csv", "// from a\ntext,label\ngood,positive\n", "the header: remove the comment"),
        ("a.csv", "sep=;\ntext;label\ngood;positive\n", "the header: remove the comment"),
        ("a.csv", "My reviews\ntext,label\ngood,positive\n", "first line must be the header"),
        ("a.csv", "text,label\ngood, food,positive\n", r"3 cells.*quotation marks around text"),
        (
            "a.csv",
            "text,label\n" + "good " * 40_000 + ",positive\n",
            "more than 131,072 characters",
        ),
        ("a.csv", 'text,label\n"' + "good,positive\n" * 40_000, "close the quotation mark before"),
        ("a.tsv", "text\tlabel\n" + "good " * 40_000 + "\tpositive\n", r"characters. Shorten it\."),
    ],
)
def test_the_advice_names_the_mistake(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as told:
        from_file(tokenizer, tmp_path / name)
    assert len(str(told.value)) < 500 and "\n" not in str(told.value)


def test_a_small_file_that_decompresses_to_much_is_refused_before_a_row_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(b"text,label\n" + b"good,positive\n" * 6_000_000))
    assert path.stat().st_size < 1 << 20

    def read(*_: object) -> None:
        raise AssertionError("rows are read")

    monkeypatch.setattr(module, "_separated_rows", read)
    with pytest.raises(InputError, match=r"decompress to more than 67,108,864\. Text does not"):
        read_table(path)


def test_a_gzipped_file_of_ordinary_text_is_read(tmp_path: Path) -> None:
    rows = [{"text": f"good {i * 7919 % 1000}", "label": "positive"} for i in range(2000)]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert read_table(path).rows == rows


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", ",".join(f"c{i % 50_000}" for i in range(100_000)) + "\nx\n"),
        ("a.jsonl", "{" + ", ".join(f'"c{i % 50_000}": 1' for i in range(100_000)) + "}\n"),
    ],
)
def test_many_columns_are_refused_at_once(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="column 'c0' occurs twice"):
        read_table(tmp_path / name)


# One reading of files and of the hub


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub.disable_progress_bars()


CELLS = ("null", "NA", "007", "1.50", "true", "nan", "good, food", 'a "b" c')


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
@pytest.mark.usefixtures("own_cache")
def test_cells_are_read_alike_from_a_file_and_by_datasets(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, kind: str
) -> None:
    rows = [{"text": cell, "label": f"0{i % 2}"} for i, cell in enumerate(CELLS)]
    folder = tmp_path / "repo"
    folder.mkdir()
    path = folder / f"train.{kind}"
    quote = (lambda x: '"' + x.replace('"', '""') + '"') if kind == "csv" else str
    separator = "," if kind == "csv" else "\t"
    lines = [separator.join(map(quote, row.values())) for row in rows]
    text = "\n".join(
        map(json.dumps, rows) if kind == "jsonl" else [f"text{separator}label", *lines]
    )
    path.write_text(text + "\n")
    given = {
        "tokenizer": tokenizer, "template": TEMPLATE,
        "verbalizer": {"00": " negative", "01": " positive"},
    }  # fmt: skip
    theirs, mine = task_from_hub(str(folder), **given), task_from_files({"train": path}, **given)
    assert [e.fields["text"] for e in mine.train] == list(CELLS)
    assert theirs.train.hash == mine.train.hash
    assert [e.prompt for e in theirs.train] == [e.prompt for e in mine.train]


@pytest.mark.usefixtures("own_cache")
def test_numbers_of_a_csv_still_get_their_names(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "train.csv").write_text("text,label\ngood,1\nfood,0\n")
    task = task_from_hub(
        str(tmp_path / "repo"), tokenizer=tokenizer, template=TEMPLATE,
        verbalizer={"bad": " negative", "fine": " positive"}, label_names=("bad", "fine"),
    )  # fmt: skip
    assert [e.label for e in task.train] == ["fine", "bad"]
