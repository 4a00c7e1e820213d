"""Known data sets, files and hub data sets as tasks, and the mistakes that files hold."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets as hub
import pytest
from helpers.places import DATA
from helpers.words import (
    ROWS,
    TEMPLATE,
    TEXTS,
    VERBALIZER,
    WORDS as GENERATOR_WORDS,
    YEARS,
    word_tokenizer,
)
from transformers import PreTrainedTokenizerBase

from cdt_lens.cli import app as cli
from cdt_lens.core.errors import CdtLensWarning, InputError
from cdt_lens.experiments import inputs
from cdt_lens.tasks.datasets import (
    KNOWN,
    TASK_NAMES,
    load_task,
    read_table,
    task_from_files,
    task_from_hub,
)
from cdt_lens.tasks.task import Examples, Task

NLI_TEXTS = ("a b c d e f\nQuestion: x y z True, False, or Neither?\nAnswer: True False Neither",)
SIZES = {"train": 12, "valid": 6, "test": 9}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    texts = (*TEXTS, *NLI_TEXTS, *GENERATOR_WORDS, *YEARS)
    return word_tokenizer(tmp_path_factory.mktemp("words"), texts)


def packed(content: bytes) -> bytes:
    """Gzipped; without the time of day, which would give a test another name in each process."""
    return gzip.compress(content, mtime=0)


def write_csv(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def sentiment_rows(n: int, word: str = "food") -> list[dict[str, str]]:
    labels = list(VERBALIZER)
    texts = [f"{word} {'good ' * i}bad" for i in range(n)]
    return [{"id": str(i), "text": t, "label": labels[i % 3]} for i, t in enumerate(texts)]


@pytest.fixture
def nusax(tmp_path: Path) -> Path:
    for language in ("english", "javanese"):
        for split, size in SIZES.items():
            rows = sentiment_rows(size, word=split)
            write_csv(tmp_path / "nusax-senti" / language / f"{split}.csv", rows)
    return tmp_path


@pytest.fixture
def xnli(tmp_path: Path) -> Path:
    (tmp_path / "xnli").mkdir()
    for split, size in (("dev", 30), ("test", 9)):
        lines = ["premise\thypothesis\tlabel"]
        for i in range(size):
            label = ("neutral", "contradiction", "entailment")[i % 3]
            lines.append(f'{split} "a {i // 3}\tb" {i}\t{label}')
        with gzip.open(tmp_path / "xnli" / f"{split}-en.tsv.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    return tmp_path


def small(name: str, tokenizer: PreTrainedTokenizerBase, **options: object) -> Task:
    config = {"nusax-senti": "english", "xnli": "en"}[name]
    return load_task(name, config, tokenizer=tokenizer, check_counts=False, **options)


def texts_of(task: Task) -> dict[str, list[str]]:
    return {s: [e.fields["text"] for e in getattr(task, s)] for s in ("train", "valid", "test")}


# NusaX-Senti and XNLI in a folder


def test_nusax_from_a_folder(tokenizer: PreTrainedTokenizerBase, nusax: Path) -> None:
    task = small("nusax-senti", tokenizer, folder=nusax)
    assert task.name == "nusax-senti/english"
    assert {s: len(getattr(task, s)) for s in SIZES} == SIZES
    assert task.labels == ("negative", "neutral", "positive")
    assert task.train.name == "nusax-senti/english/train"
    assert task.train[0].prompt == "train bad\nSentiment:"
    assert task.train[0].fields == {"id": "0", "text": "train bad", "label": "negative"}
    assert len(task.content_free) == 3
    assert task.prefix == ""


def test_folder_may_be_the_data_sets_own_or_its_parent_and_language_a_code(
    tokenizer: PreTrainedTokenizerBase, nusax: Path
) -> None:
    task = small("nusax-senti", tokenizer, folder=nusax)
    own = load_task(
        "nusax-senti",
        "eng",
        tokenizer=tokenizer,
        folder=str(nusax / "nusax-senti"),
        check_counts=False,
    )
    assert own == task
    assert own.hash == task.hash


def test_xnli_divides_dev_and_keeps_premises_together(
    tokenizer: PreTrainedTokenizerBase, xnli: Path
) -> None:
    task = small("xnli", tokenizer, folder=xnli)
    assert (len(task.train), len(task.valid), len(task.test)) == (24, 6, 9)
    premises = [{e.fields["premise"] for e in split} for split in (task.train, task.valid)]
    assert not premises[0] & premises[1]
    assert len(premises[0] | premises[1]) == 10
    assert task.train.counts == {"contradiction": 8, "entailment": 8, "neutral": 8}
    assert small("xnli", tokenizer, folder=xnli).hash == task.hash
    # A model trained with one seed is judged on rows that it has not seen, whatever the other seed.
    assert small("xnli", tokenizer, folder=xnli, seed=1).hash == task.hash


def test_xnli_takes_quotation_marks_as_they_stand(
    tokenizer: PreTrainedTokenizerBase, xnli: Path
) -> None:
    task = small("xnli", tokenizer, folder=xnli)
    expected = 'test "a 0\nQuestion: b" 0 True, False, or Neither?\nAnswer:'
    assert task.test[0].prompt == expected
    words = [tokenizer.convert_ids_to_tokens(task.verbalizer_ids[label]) for label in task.labels]
    assert words == [" False", " True", " Neither"]


def test_wrong_counts_are_refused(tokenizer: PreTrainedTokenizerBase, nusax: Path) -> None:
    with pytest.raises(InputError, match=r"split train has 12 rows, expected 500.*check_counts"):
        load_task("nusax-senti", "english", tokenizer=tokenizer, folder=nusax, limit=3)


def test_another_template_and_verbalizer(tokenizer: PreTrainedTokenizerBase, nusax: Path) -> None:
    verbalizer = {"negative": " bad", "neutral": " food", "positive": " good"}
    task = small("nusax-senti", tokenizer, folder=nusax, template="{text}:", verbalizer=verbalizer)
    assert task.template == "{text}:"
    assert task.verbalizer == verbalizer
    with pytest.raises(InputError, match=r"english/train.csv, line 4, .*unknown label 'positive'"):
        small(
            "nusax-senti",
            tokenizer,
            folder=nusax,
            verbalizer={"negative": " bad", "neutral": " food"},
        )


def test_limit_draws_the_same_rows_in_every_language(
    tokenizer: PreTrainedTokenizerBase, nusax: Path
) -> None:
    whole = small("nusax-senti", tokenizer, folder=nusax)
    task = small("nusax-senti", tokenizer, folder=nusax, limit=7)
    assert {s: len(getattr(task, s)) for s in SIZES} == {"train": 7, "valid": 6, "test": 7}
    positions = [texts_of(whole)["train"].index(text) for text in texts_of(task)["train"]]
    assert positions == sorted(positions)
    other = load_task(
        "nusax-senti", "jav", tokenizer=tokenizer, folder=nusax, check_counts=False, limit=7
    )
    assert texts_of(other) == texts_of(task)
    with pytest.raises(InputError, match="limit=0: expected a whole number of at least 1"):
        small("nusax-senti", tokenizer, folder=nusax, limit=0)
    with pytest.raises(InputError, match=r"no row has label .* raise the limit"):
        small("nusax-senti", tokenizer, folder=nusax, limit=2)


@pytest.mark.parametrize(
    ("name", "config", "options", "message"),
    [
        ("nusax", "english", {}, r"task 'nusax': unknown; did you mean 'nusax-senti'"),
        ("zzz", None, {}, r"unknown; expected one of nusax-senti, xnli, ioi"),
        ("nusax-senti", None, {}, r"config=None: expected a language; one of acehnese"),
        ("nusax-senti", "javanes", {}, r"did you mean 'javanese'"),
        ("xnli", "english", {}, r"config='english': expected a language"),
        ("xnli", "en", {"n": (2, 2, 2)}, r"\(use limit\): n=\(2, 2, 2\) does not apply"),
        ("ioi", "english", {}, r"'ioi' is generated: config='english' does not apply"),
        ("ioi", None, {"shots": 2}, r"is generated: shots=2 does not apply"),
        ("ioi", None, {"limit": 0}, r"limit=0: expected a whole"),
        ("xnli", "en", {"folder": "nowhere"}, r"folder nowhere: expected dev-en.tsv.gz"),
        ("xnli", "en", {"folder": "x", "revision": "y"}, r"revision='y' does not apply"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    config: str | None,
    options: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        load_task(name, config, tokenizer=tokenizer, **options)


def test_a_missing_file_beside_others_is_named(
    tokenizer: PreTrainedTokenizerBase, nusax: Path
) -> None:
    (nusax / "nusax-senti" / "english" / "valid.csv").unlink()
    with pytest.raises(InputError, match=r"english/valid.csv: cannot be read \(No such file"):
        small("nusax-senti", tokenizer, folder=nusax)


@pytest.mark.parametrize("name", ["ioi", "greater-than", "gendered-pronoun"])
def test_generated_tasks_load_by_name(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    assert name in TASK_NAMES
    task = load_task(name, tokenizer=tokenizer, n=(8, 4, 4), limit=6, seed=1)
    assert (len(task.train), len(task.valid), len(task.test)) == (6, 4, 4)


# Few-shot


def test_few_shot_examples_are_balanced_and_leave_train(
    tokenizer: PreTrainedTokenizerBase, nusax: Path
) -> None:
    plain = small("nusax-senti", tokenizer, folder=nusax)
    task = small("nusax-senti", tokenizer, folder=nusax, shots=6)
    shown = task.prefix.removesuffix("\n\n").split("\n\n")
    assert len(shown) == 6
    texts, words = zip(*(example.split("\nSentiment:") for example in shown), strict=True)
    assert sorted(words) == sorted([*VERBALIZER.values()] * 2)
    rows = {e.fields["text"]: e.label for e in plain.train}
    assert all(rows[t] == w.strip() for t, w in zip(texts, words, strict=True))
    assert set(texts_of(task)["train"]) == set(rows) - set(texts)
    assert texts_of(task)["test"] == texts_of(plain)["test"]
    for split in (task.train, task.valid, task.test, task.content_free):
        assert all(example.prompt.startswith(task.prefix) for example in split)
    again = small("nusax-senti", tokenizer, folder=nusax, shots=6)
    assert again.prefix == task.prefix
    others = {small("nusax-senti", tokenizer, folder=nusax, shots=6, seed=s).prefix for s in (1, 2)}
    assert len({task.prefix, *others}) > 1


def test_few_shot_examples_are_not_in_blocks_of_labels(
    tokenizer: PreTrainedTokenizerBase, nusax: Path
) -> None:
    in_blocks = []
    for seed in range(5):
        prefix = small("nusax-senti", tokenizer, folder=nusax, shots=6, seed=seed).prefix
        words = [part.split("\nSentiment:")[1] for part in prefix.strip().split("\n\n")]
        in_blocks.append(words == sorted(words))
    assert not all(in_blocks)


@pytest.mark.parametrize("shots", [1, 4])
def test_shots_must_be_a_multiple_of_the_labels(
    tokenizer: PreTrainedTokenizerBase, nusax: Path, shots: int
) -> None:
    with pytest.raises(InputError, match="expected a multiple of 3"):
        small("nusax-senti", tokenizer, folder=nusax, shots=shots)


def test_shots_must_leave_each_label_in_train(
    tokenizer: PreTrainedTokenizerBase, nusax: Path
) -> None:
    with pytest.raises(InputError, match=r"only 4 rows with label 'negative'"):
        small("nusax-senti", tokenizer, folder=nusax, shots=12)


def test_shots_need_a_train_split(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "test.csv", ROWS)
    with pytest.raises(InputError, match="no train split"):
        from_files(tokenizer, {"test": path}, shots=3)


# Files


def from_files(
    tokenizer: PreTrainedTokenizerBase, paths: Mapping[str, Path], **options: object
) -> Task:
    given = {"template": TEMPLATE, "verbalizer": VERBALIZER, **options}
    return task_from_files(paths, tokenizer=tokenizer, **given)


def write_kind(folder: Path, kind: str, rows: Sequence[Mapping[str, str]]) -> Path:
    path = folder / f"data.{kind}"
    separator = "\t" if kind.startswith("tsv") else ","
    if kind.startswith("jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        lines = [list(rows[0]), *([*row.values()] for row in rows)]
        text = "".join(separator.join(line) + "\n" for line in lines)
    write = gzip.open if kind.endswith(".gz") else open
    with write(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv", "tsv.gz", "jsonl", "jsonl.gz"])
def test_every_format_gives_the_same_task(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, kind: str
) -> None:
    expected = from_files(tokenizer, {"train": write_csv(tmp_path / "plain.csv", ROWS)})
    task = from_files(tokenizer, {"train": write_kind(tmp_path, kind, ROWS)}, name="mine")
    assert task.hash == expected.hash
    assert task.name == "mine"
    assert task.train.name == "mine/train"
    assert len(task.valid) == len(task.test) == 0


def test_other_columns_labels_and_label_column(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"a b": "good", "y": 0}\n\n{"a b": 3, "y": 1}\n', "utf-8")
    task = from_files(
        tokenizer,
        {"test": path},
        template="{a b}:",
        label_column="y",
        verbalizer={"0": " bad", "1": " good"},
    )
    assert [(e.prompt, e.label) for e in task.test] == [("good:", "0"), ("3:", "1")]


def test_byte_order_mark_windows_line_ends_and_quoted_cells_are_read(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "data.csv"
    text = (
        '\ufefftext,label\r\n"good, ""good""\nfood",positive\r\n\r\nbad,negative\r\na,neutral\r\n'
    )
    path.write_bytes(text.encode("utf-8"))
    task = from_files(tokenizer, {"train": path})
    assert [e.fields["text"] for e in task.train] == ['good, "good"\nfood', "bad", "a"]
    assert read_table(path).places == [f"{path}, line {line}" for line in (2, 5, 6)]


def test_quoting_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "data.tsv"
    path.write_text('text\tlabel\n"a\tb"\tc\n', "utf-8")
    assert read_table(path, quoting=True).rows == [{"text": "a\tb", "label": "c"}]
    with pytest.raises(InputError, match=r"line 2: 3 cells, the header has 2"):
        read_table(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\ngood,positive\n,negative\n", r"a.csv, line 3, column 'text': empty"),
        ("a.csv", "text,label\ngood\n", r"a.csv, line 2, column 'label': empty"),
        ("a.csv", "text,label\n\nbad,negatve\n", r"line 3, .*'negatve'; did you mean 'negative'"),
        ("a.csv", "txt,label\nbad,negative\n", r"line 1 .*: no column 'text'; did you mean 'txt'"),
        (
            "a.csv",
            "text;label\nbad;negative\n",
            r"a.csv, line 1 .*'text;label'. .*by semicolons. Save",
        ),
        (
            "a.csv",
            "text\tlabel\nbad\tnegative\n",
            r"line 1 .*: no column 'text'.*separated by tabs",
        ),
        ("a.tsv", "text,label\nbad,negative\n", r"a.tsv, line 1 .*separated by commas"),
        (
            "a.csv",
            "bad,negative\ngood,positive\n",
            r"line 1 .*'negative' is a label. The first line",
        ),
        ("a.csv", "\ntext, label\nbad,negative\n", r"line 2 .*'label'; did you mean ' label'"),
        (
            "a.csv",
            'text,label\n"a\nb",neutral\nbad,Negative\n',
            r"line 4, column 'label': .*'Negative'",
        ),
        ("a.csv", "text,label\nbad,negative \n", r"line 2, .*'negative '; did you mean 'negative'"),
        (
            "a.csv",
            "text,label\nbad,0\n",
            r"line 2, column 'label': unknown label '0'; .*each number",
        ),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}',
            r"line 1, column 'label': .*'1'.*a word for each number",
        ),
        ("a.csv", "text,label\r\nbad,wrong\r\n", r"line 2, column 'label'"),
        ("a.csv", "text,label\rbad,neutral\rbad,wrong\r", r"line 3, column 'label'"),
        ("a.csv", "text,label\na,b,positive\n", r"line 2: 3 cells, .*quotation marks.*','"),
        ("a.csv", 'text,label\n"bad,negative\ngood,positive\n', r"line 2: .*quotation mark"),
        ("a.csv", "text,text\na,b\n", r"line 1: column 'text' occurs twice"),
        ("a.csv", "", r"a.csv: no rows"),
        ("a.csv", "text,label\n", r"a.csv: no rows"),
        ("a.csv", "\n\ntext,text\na,b\n", r"line 3: column 'text' occurs twice"),
        (
            "a.csv",
            b"text,label\nbad,neutral\ncaf\xe9,positive\n",
            r"a.csv, line 3, byte 4: not UTF-8 .*'é'",
        ),
        (
            "a.csv.gz",
            packed(b"text,label\ncaf\xe9,neutral\n"),
            r"a.csv.gz, line 2, byte 4: not",
        ),
        ("a.csv", "text,label\n".encode("utf-16"), r"a.csv, line 1: not UTF-8 but UTF-16"),
        ("a.csv.gz", b"no gzip", r"a.csv.gz: damaged gzip file"),
        ("a.csv.gz", packed(b"text,label\n" * 999)[:-12], r"a.csv.gz: damaged gzip file"),
        ("a.xlsx", b"", r"a.xlsx: expected a .csv, .tsv or .jsonl file"),
        ("a.jsonl", '{"text": "a"', r"a.jsonl, line 1: not JSON"),
        ("a.jsonl", '\n{"text": "a",}\n', r"a.jsonl, line 2: not JSON \(.*, at character 1\d\)"),
        (
            "a.jsonl",
            '{\n  "text": "a"\n}\n',
            r"line 1: not JSON .*Write one whole object on each line",
        ),
        ("a.jsonl", '{"text": "a", "text": "b"}', r"line 1: column 'text' occurs twice"),
        (
            "a.jsonl",
            '{"txt": "a", "label": "neutral"}',
            r"line 1: no column 'text'; did you mean 'txt'",
        ),
        (
            "a.jsonl",
            '\n[{"text": "a"}]\n',
            r"line 2: expected one JSON object on each line, got a list",
        ),
        ("a.jsonl", '{"text": null, "label": "neutral"}', r"line 1, column 'text': empty"),
        ("a.jsonl", '{"text": {"a": 1}, "label": "neutral"}', r"line 1, .*got dict"),
        ("a.jsonl", "[" * 100_000, r"a.jsonl, line 1: nested too deeply"),
        (
            "a.jsonl",
            '{"text": "good \\ud83d", "label": "neutral"}',
            r"a.jsonl, line 1, column 'text', character 6: half of a character",
        ),
        (
            "a.csv.gz",
            packed(b"text,label\ncaf\xe9,neutral\n" * 999)[:-12],
            r"a.csv.gz: (damaged gzip file|not UTF-8, and a damaged gzip file)",
        ),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_place(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    name: str,
    content: str | bytes,
    message: str,
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    with pytest.raises(InputError, match=message):
        from_files(tokenizer, {"train": path})


def test_a_template_that_tells_the_answer_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """As templates for training do: every prompt would end in its gold word."""
    path = write_csv(tmp_path / "a.csv", ROWS)
    with pytest.raises(InputError, match=r"it holds \{label\}, the answer itself"):
        from_files(tokenizer, {"train": path}, template=TEMPLATE + " {label}")


def test_a_word_that_ends_in_a_space_and_one_unknown_are_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write_csv(tmp_path / "a.csv", ROWS)
    for word, got in ((" unheard", "got the unknown token"), (" good\n", "ends in white space")):
        said = f"verbalizer of label 'neutral': {re.escape(repr(word))} .*{got}"
        with pytest.raises(InputError, match=said):
            from_files(tokenizer, {"train": path}, verbalizer={**VERBALIZER, "neutral": word})


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ("text;label\nbad;negative\n", VERBALIZER, "train.csv, line 1 (the header): no column"),
        ("text,label\nbad,negatve\n", VERBALIZER, "train.csv, line 2, column 'label': unknown"),
        ("text,label\nbad,negative\n,neutral\n", VERBALIZER, "line 3, column 'text': empty"),
        (b"text,label\ncaf\xe9,neutral\n", VERBALIZER, "train.csv, line 2, byte 4: not UTF-8"),
        ("", VERBALIZER, "train.csv: no rows"),
        ('text,label\n"bad,negative\n', VERBALIZER, "line 2: unexpected end of data"),
        (
            "text,label\nx,a\n",
            {"a": " good", "b": " good food"},
            "verbalizer: the tokens of ' good food' (b) begin with those of ' good' (a)",
        ),
    ],
)
def test_the_command_line_says_a_mistake_in_one_line(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str | bytes,
    words: Mapping[str, str],
    message: str,
) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    monkeypatch.setattr(inputs, "load_tokenizer", lambda *_: tokenizer)
    given = [x for label, word in words.items() for x in ("--verbalizer", f"{label}={word}")]
    command = [
        "discover",
        "--model",
        "x",
        "--task",
        "files",
        "--train",
        str(path),
        "--split",
        "0.2",
    ]
    command += ["--template", TEMPLATE, "--out", str(tmp_path / "run"), *given]
    monkeypatch.setattr("sys.argv", ["cdt-lens", *command])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    told = capsys.readouterr().err
    assert stopped.value.code == 1
    assert told.startswith("cdt-lens: ") and told.count("\n") == 1 and message in told
    assert not (tmp_path / "run").exists(), "nothing is left behind"


def test_paths_must_be_splits_that_exist(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"among train, valid, test, got \['validation'\]"):
        from_files(tokenizer, {"validation": tmp_path})
    with pytest.raises(InputError, match="expected splits among"):
        from_files(tokenizer, {})
    with pytest.raises(InputError, match=r"none.csv: cannot be read \(No such file"):
        from_files(tokenizer, {"train": tmp_path / "none.csv"})


# The hub, with local folders in its place


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub.disable_progress_bars()


def from_hub(
    tokenizer: PreTrainedTokenizerBase,
    repo: Path | str,
    config: str | None = None,
    **options: object,
) -> Task:
    given = {"template": TEMPLATE, "verbalizer": VERBALIZER, **options}
    return task_from_hub(str(repo), config, tokenizer=tokenizer, **given)


def parquet_folder(folder: Path, *, named: bool = True, names: Sequence[str] = ()) -> Path:
    """A folder with train and validation in parquet, labels as integers of a ClassLabel or not."""
    names = list(names or VERBALIZER)
    kind = hub.ClassLabel(names=names) if named else hub.Value("int64")
    features = hub.Features({"text": hub.Value("string"), "label": kind})
    for split in ("train", "validation"):
        rows = [{"text": r["text"], "label": list(VERBALIZER).index(r["label"])} for r in ROWS]
        data = hub.Dataset.from_list(rows, features=features)
        folder.mkdir(exist_ok=True)
        data.to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.filterwarnings("ignore:.*examples are also in")  # the same rows in every split
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_hub_code_reads_a_local_folder(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "repo"
    folder.mkdir()
    for split in ("train", "dev", "test"):
        write_kind(folder, kind, ROWS).rename(folder / f"{split}.{kind}")
    task = from_hub(tokenizer, folder)
    assert [len(s) for s in (task.train, task.valid, task.test)] == [len(ROWS)] * 3
    assert task.train.hash == from_files(tokenizer, {"train": folder / f"train.{kind}"}).train.hash
    assert task.name == str(folder)


def test_class_label_names_are_used(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    task = from_hub(tokenizer, parquet_folder(tmp_path / "repo"))
    assert [e.label for e in task.train] == [row["label"] for row in ROWS]
    assert len(task.valid) == len(ROWS)
    assert len(task.test) == 0


def test_integer_labels_need_names(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder = parquet_folder(tmp_path / "repo", named=False)
    with pytest.raises(InputError, match=r"split train, row 1: the label is the integer 2.*names="):
        from_hub(tokenizer, folder)
    task = from_hub(tokenizer, folder, label_names=list(VERBALIZER))
    assert [e.label for e in task.train] == [row["label"] for row in ROWS]
    with pytest.raises(InputError, match=r"row 1: label 2: expected 0 to 1 \(negative, neutral\)"):
        from_hub(tokenizer, folder, label_names=["negative", "neutral"])


def test_class_labels_that_are_digits_count_as_nameless(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = parquet_folder(tmp_path / "repo", names=["0", "1", "2"])
    with pytest.raises(InputError, match="the label is the integer 2"):
        from_hub(tokenizer, folder)


def test_label_names_may_not_contradict_the_data(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = parquet_folder(tmp_path / "repo")
    with pytest.raises(InputError, match=r"contradict the data set's own"):
        from_hub(tokenizer, folder, label_names=list(reversed(VERBALIZER)))


def test_splits_columns_and_rows_are_checked(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = parquet_folder(tmp_path / "repo")
    task = from_hub(tokenizer, folder, splits={"test": "validation"})
    assert [len(s) for s in (task.train, task.valid, task.test)] == [0, 0, len(ROWS)]
    for splits in ({"test": "test"}, {"validation": "validation"}):
        with pytest.raises(InputError, match=r"it has the splits train, validation, wanted"):
            from_hub(tokenizer, folder, splits=splits)
    with pytest.raises(InputError, match=r"no column 'txt'; did you mean 'text'\?; it has text"):
        from_hub(tokenizer, folder, template="{txt}:")
    with pytest.raises(InputError, match=r"split train: no column 'gold'; it has text, label"):
        from_hub(tokenizer, folder, label_column="gold")


def test_an_empty_cell_is_named_with_split_and_row(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [*ROWS, {"text": "", "label": "neutral"}]
    (tmp_path / "repo").mkdir()
    write_kind(tmp_path / "repo", "jsonl", rows).rename(tmp_path / "repo" / "train.jsonl")
    with pytest.raises(InputError, match=r"repo, split train, row 8, column 'text': empty"):
        from_hub(tokenizer, tmp_path / "repo")


def test_what_datasets_cannot_load_is_said(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: `datasets` cannot load it"):
        from_hub(tokenizer, tmp_path / "empty")
    with pytest.raises(InputError, match=r"repo/eng: `datasets` cannot load it: .*'eng' not found"):
        from_hub(tokenizer, parquet_folder(tmp_path / "repo"), "eng")


@pytest.mark.parametrize("name", ["nusax-senti", "xnli"])
def test_without_network_the_way_out_is_said(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def unreachable(*arguments: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(hub, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"hub could not be reached .*folder= of load_task"):
        small(name, tokenizer)


@pytest.mark.filterwarnings("ignore:.*examples are also in")  # the same rows in every split
def test_nusax_from_the_hub_names_integers_in_the_known_order(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def load(repo: str, config: str, **options: object) -> hub.DatasetDict:
        asked.append((repo, config, options["revision"]))
        rows = [{"text": r["text"], "label": list(VERBALIZER).index(r["label"])} for r in ROWS]
        data = hub.Dataset.from_list(rows)
        return hub.DatasetDict(train=data, validation=data, test=data)

    monkeypatch.setattr(hub, "load_dataset", load)
    task = small("nusax-senti", tokenizer, revision="abc")
    assert asked == [("mteb/NusaX-senti", "eng", "abc")]
    assert [e.label for e in task.valid] == [row["label"] for row in ROWS]
    with pytest.raises(InputError, match="split train has 7 rows, expected 500"):
        load_task("nusax-senti", "eng", tokenizer=tokenizer)


@pytest.mark.filterwarnings("ignore:.*examples are also in")  # by the hypothesis alone they are
def test_xnli_from_the_hub_leaves_its_translated_train_alone(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, xnli: Path
) -> None:
    names = ["entailment", "neutral", "contradiction"]

    def load(repo: str, config: str, **options: object) -> hub.DatasetDict:
        assert (repo, config) == ("facebook/xnli", "en")
        data = {}
        for split, file in (("validation", "dev"), ("test", "test")):
            rows = [dict(row) for row in read_table(xnli / "xnli" / f"{file}-en.tsv.gz").rows]
            for row in rows:
                row["label"] = names.index(row["label"])
            features = hub.Features(
                premise=hub.Value("string"),
                hypothesis=hub.Value("string"),
                label=hub.ClassLabel(names=names),
            )
            data[split] = hub.Dataset.from_list(rows, features=features)
        return hub.DatasetDict(train=data["test"], **data)

    monkeypatch.setattr(hub, "load_dataset", load)
    for template in (None, "{hypothesis}:"):  # the premise divides the data all the same
        options = {"template": template} if template else {}
        found = small("xnli", tokenizer, **options)
        assert found.hash == small("xnli", tokenizer, folder=xnli, **options).hash


# The real data, where they are


@pytest.mark.skipif(
    not (DATA / "nusax-senti").is_dir(),
    reason="the real data sets are not in $CDT_DATA (nor in ../shared/data)",
)
@pytest.mark.parametrize(
    ("name", "config", "counts"),
    [
        ("nusax-senti", "english", (500, 100, 400)),
        ("nusax-senti", "javanese", (500, 100, 400)),
        ("xnli", "en", (1992, 498, 5010)),
    ],
)
def test_real_data_load_whole(
    tmp_path: Path, name: str, config: str, counts: tuple[int, ...]
) -> None:
    known = KNOWN[name]
    texts = ["".join(known.verbalizer.values()), "\nSentiment:\nQuestion:?\nAnswer: True, or"]
    tokenizer = word_tokenizer(tmp_path, texts)
    task = load_task(name, config, tokenizer=tokenizer, folder=DATA)
    assert (len(task.train), len(task.valid), len(task.test)) == counts
    assert all(min(s.counts.values()) > 0 for s in (task.train, task.valid, task.test))


# Validation rows of one file


def one_file(folder: Path, n: int = 40) -> Path:
    return write_csv(folder / "one.csv", sentiment_rows(n))


@pytest.mark.parametrize("options", [{}, {"seed": 7}, {"shots": 3}, {"shots": 6, "seed": 1}])
def test_a_split_sets_the_same_balanced_rows_aside_whatever_the_seed(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, options: dict[str, int]
) -> None:
    path = one_file(tmp_path)
    given = {"template": TEMPLATE, "verbalizer": VERBALIZER, "tokenizer": tokenizer, "split": 0.2}
    plain = task_from_files({"train": path}, **given)
    assert plain.valid.counts == {"negative": 3, "neutral": 3, "positive": 3}
    assert len(plain.train) + len(plain.valid) == 40
    texts = texts_of(plain)
    assert not set(texts["train"]) & set(texts["valid"])
    assert texts_of(task_from_files({"train": path}, **given, **options))["valid"] == texts["valid"]


def test_a_split_is_refused_where_it_means_nothing(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path, other = one_file(tmp_path), write_csv(tmp_path / "b.csv", sentiment_rows(6, "room"))
    for paths in ({"train": path, "valid": other}, {"test": path}):
        with pytest.raises(InputError, match="divides train where there is no valid split"):
            from_files(tokenizer, paths, split=0.2)
    for share in (0, 1, 1.5, True, "0.2", float("nan")):
        with pytest.raises(InputError, match=r"split=.*: expected a number above 0 and below 1"):
            from_files(tokenizer, {"train": path}, split=share)
    with pytest.raises(InputError, match="train has only 1 rows with label 'negative'"):
        from_files(
            tokenizer, {"train": write_csv(tmp_path / "c.csv", sentiment_rows(3))}, split=0.2
        )


def test_validation_on_the_training_rows_is_recognised(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path, other = one_file(tmp_path), write_csv(tmp_path / "copy.csv", sentiment_rows(30))
    task = from_files(tokenizer, {"train": path, "valid": other})
    with pytest.raises(InputError, match="all 30 examples are also in files/train"):
        task.require_held_out()
    task.require_held_out("test")
    from_files(tokenizer, {"train": path}, split=0.5).require_held_out()


def repeated_rows(texts: int, times: int) -> list[dict[str, str]]:
    rows = sentiment_rows(texts)
    return [row | {"id": f"{row['id']}.{i}"} for i in range(times) for row in rows]


def prompts_of(examples: Examples) -> set[tuple[str, str]]:
    return {(example.prompt, example.label) for example in examples}


def test_rows_of_the_same_text_stay_on_one_side_of_a_split(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write_csv(tmp_path / "twice.csv", repeated_rows(30, 2))
    task = from_files(tokenizer, {"train": path}, split=0.2)
    assert (len(task.train), len(task.valid)) == (48, 12)
    assert not prompts_of(task.train) & prompts_of(task.valid)
    same = write_csv(tmp_path / "same.csv", repeated_rows(3, 5))
    with pytest.raises(InputError, match="train has only 1 rows .* that differ"):
        from_files(tokenizer, {"train": same}, split=0.2)


def test_a_shot_is_no_question_of_train(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "twice.csv", repeated_rows(12, 2))
    task = from_files(tokenizer, {"train": path}, shots=6)
    shown = task.prefix.removesuffix("\n\n").split("\n\n")
    assert len(set(shown)) == 6 and len(task.train) == 12
    for example in task.train:
        asked = example.prompt.removeprefix(task.prefix)
        assert not any(own.startswith(asked) for own in shown)


@pytest.mark.parametrize("shots", [0, 3])
def test_held_out_examples_that_are_also_in_train_are_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, shots: int
) -> None:
    known = sentiment_rows(12)
    valid = write_csv(tmp_path / "valid.csv", [*known[:4], *sentiment_rows(6, "room")])
    paths = {"train": write_csv(tmp_path / "train.csv", known), "valid": valid}
    with pytest.warns(CdtLensWarning, match="files/valid: 4 of 10 examples are also in files/tr"):
        from_files(tokenizer, paths, shots=shots)


def test_a_split_holds_its_share_of_the_rows(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """One text is most of a label, and more than the share: the four others are valid."""
    rows = sentiment_rows(312)
    often = [row | {"text": "food"} for row in rows if row["label"] == "negative"][:100]
    rest = [row for row in rows if row["label"] != "negative"] + [
        row for row in rows if row["label"] == "negative"
    ][:4]
    task = from_files(
        tokenizer, {"train": write_csv(tmp_path / "a.csv", [*often, *rest])}, split=0.2
    )
    assert task.valid.counts == {"negative": 4, "neutral": 21, "positive": 21}


def test_examples_of_test_that_are_also_in_valid_are_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    train = write_csv(tmp_path / "train.csv", sentiment_rows(12))
    other = write_csv(tmp_path / "valid.csv", sentiment_rows(6, "room"))
    with pytest.warns(CdtLensWarning, match="test: 6 of 6 examples are also in files/valid"):
        from_files(tokenizer, {"train": train, "valid": other, "test": other})
