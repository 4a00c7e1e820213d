"""Read rows of a file, of the hub or of a local folder, each with its place for error messages.

1. CSV, TSV and JSONL files, plain or gzipped, are read as UTF-8. A place counts lines from 1.
2. Hub data sets are read split by split. A place counts rows from 1.
3. Labels become words. Integers are refused unless their names are known.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from cdt_lens.core.errors import InputError, did_you_mean, expect

SPLITS = ("train", "valid", "test")
# The hub's names for each split, in order of preference.
HUB_SPLITS = {
    "train": ("train",),
    "valid": ("validation", "valid", "dev", "val"),
    "test": ("test",),
}


@dataclass(frozen=True)
class Table:
    """The rows of one split with their places.

    Attributes:
        rows: cells by column.
        places: name of each row in error messages.
        header: place of the line that names the columns, or None for files without one.
    """

    rows: Sequence[Mapping[str, object]]
    places: Sequence[str]
    header: str | None = None

    def pick(self, index: Sequence[int]) -> Table:
        """Select rows.

        Args:
            index: positions of the rows.

        Returns:
            The rows at these positions, in this order.
        """
        picked = [self.rows[i] for i in index], [self.places[i] for i in index]
        return Table(*picked, self.header)

    def check_columns(self, columns: Iterable[str], labels: Iterable[str]) -> None:
        """Check that the header has every column.

        Args:
            columns: the required columns.
            labels: the labels, by which a missing header is recognised.

        Raises:
            InputError: a column is missing. The message says what the header looks like instead.
        """
        header = list(self.rows[0]) if self.rows else []
        for column in columns if self.header and self.rows else ():
            if column in header:
                continue
            raise InputError(
                f"{self.header}: no column {column!r}{did_you_mean(column, header)}; "
                f"the columns are {', '.join(map(repr, header))}{_why_no_column(header, labels)}"
            )


def read_table(path: str | Path, *, quoting: bool | None = None) -> Table:
    """Read a CSV, TSV or JSONL file, plain or gzipped.

    Args:
        path: the file.
        quoting: whether quotation marks enclose cells. None means yes in CSV and no in TSV.

    Returns:
        The rows. Their places count lines from 1.

    Raises:
        InputError: the file cannot be read, or a line of it is not a whole row.
    """
    path = Path(path)
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind not in ("csv", "tsv", "jsonl"):
        raise InputError(f"{path}: expected a .csv, .tsv or .jsonl file (.gz allowed)")
    quoted = kind == "csv" if quoting is None else quoting
    try:
        with _open_text(path) as file:
            numbered = list(
                _jsonl_rows(path, file)
                if kind == "jsonl"
                else _separated_rows(path, file, "," if kind == "csv" else "\t", quoted)
            )
    except UnicodeDecodeError as error:
        raise InputError(f"{_where_not_utf8(path)}. Save the file as UTF-8.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({error}). Download it again.") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    header = None
    if kind != "jsonl" and numbered:
        header = f"{path}, line {numbered.pop(0)[0]} (the header)"
    if not numbered:
        raise InputError(f"{path}: no rows; expected at least one of each label")
    places = [f"{path}, line {line}" for line, _ in numbered]
    return Table([row for _, row in numbered], places, header)


def hub_tables(
    repo: str,
    config: str | None,
    *,
    columns: Sequence[str],
    label_column: str,
    label_names: Sequence[str] | None,
    splits: Mapping[str, str] | None,
    revision: str | None,
    data_dir: str | None,
) -> dict[str, Table]:
    """Read the splits of a hub data set or of a local folder.

    Args:
        repo: name on the hub, or a folder that the `datasets` library reads.
        config: the data set's configuration, or None.
        columns: the columns to read.
        label_column: name of the column with the label.
        label_names: names of integer labels, in order, or None.
        splits: the data set's name for train, valid and test. None uses the splits with the usual
            names.
        revision: revision of the data set, or None.
        data_dir: folder in the data set, or None.

    Returns:
        One table for each split, with labels as words.

    Raises:
        InputError: the data cannot be loaded, lack a column or split, or have labels without names.
    """
    loaded = _load_from_hub(repo, config, revision=revision, data_dir=data_dir)
    where = repo if config is None else f"{repo}/{config}"
    if splits is not None:
        expect(splits, Mapping, f"{where}: splits", "such as {'train': 'train', 'test': 'test'}")
    if label_names is not None:
        expect(label_names, Sequence, f"{where}: label_names", "give the names in label order")
    wanted = splits or {
        split: next(name for name in names if name in loaded)
        for split, names in HUB_SPLITS.items()
        if any(name in loaded for name in names)
    }
    lacking = [name for name in wanted.values() if name not in loaded]
    if lacking or not wanted or not set(wanted) <= set(SPLITS):
        raise InputError(
            f"{where}: it has the splits {', '.join(loaded)}, wanted {dict(wanted)}. Pass "
            "splits={'train': ..., 'test': ...} with train, valid and test as keys and the data "
            "set's names as values."
        )
    tables = {}
    for split, name in wanted.items():
        data = loaded[name]
        for column in (*columns, label_column):
            if column not in data.column_names:
                raise InputError(
                    f"{where}, split {name}: no column {column!r}"
                    f"{did_you_mean(column, data.column_names)}; it has "
                    f"{', '.join(data.column_names)}"
                )
        names = _label_names(where, data.features[label_column], label_names)
        places = [f"{where}, split {name}, row {number}" for number in range(1, len(data) + 1)]
        rows = data.select_columns(list(dict.fromkeys((*columns, label_column)))).to_list()
        for row, place in zip(rows, places, strict=True):
            row[label_column] = _label_word(row[label_column], names, place)
        tables[split] = Table(rows, places)
    return tables


def _open_text(path: Path) -> TextIOWrapper:
    # utf-8-sig removes the byte order mark that spreadsheets write.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _where_not_utf8(path: Path) -> str:
    """Describe the first line that is not UTF-8 and its likely encoding."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            return f"{path}: not UTF-8, and a damaged gzip file ({error})"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return f"{path}, line 1: not UTF-8 but UTF-16"
    for line, text in enumerate(content.splitlines(), start=1):
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            wrong = text[error.start : error.start + 1]
            read = f"{wrong!r} would be {wrong.decode('latin-1')!r} in Latin-1"
            return f"{path}, line {line}, byte {error.start + 1}: not UTF-8 ({read})"
    return f"{path}: not UTF-8"


def _why_no_column(header: Sequence[str], labels: Iterable[str]) -> str:
    """Describe a header that lacks a column: another delimiter, or a row of data."""
    for delimiter, name in ((";", "semicolons"), ("\t", "tabs"), (",", "commas"), ("|", "bars")):
        if len(header) == 1 and delimiter in header[0]:
            return (
                f". The cells seem to be separated by {name}. Save the file with commas as .csv, "
                "or with tabs as .tsv."
            )
    given = [cell for cell in header if cell in set(labels)]
    if given:
        return f". {given[0]!r} is a label. The first line must hold the names of the columns."
    return ""


def _separated_rows(
    path: Path, file: Iterable[str], delimiter: str, quoted: bool
) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield the header and each row, with the number of the line on which it starts."""
    rule: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(file, delimiter=delimiter, quoting=rule, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            start, line = line, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                _check_header(path, header, start)
                yield start, dict.fromkeys(header)
                continue
            if len(cells) > len(header):
                raise InputError(
                    f"{path}, line {start}: {len(cells)} cells, the header has {len(header)}. Put "
                    f"quotation marks around text that holds {delimiter!r}."
                )
            yield start, dict(zip_longest(header, cells))
    except csv.Error as error:
        raise InputError(
            f"{path}, line {line}: {error}. Close or double the quotation mark."
        ) from error


def _check_header(path: Path, header: Sequence[str], line: int) -> None:
    twice = [column for column in header if header.count(column) > 1]
    if twice:
        raise InputError(
            f"{path}, line {line}: column {twice[0]!r} occurs twice. Rename one of them."
        )


def _jsonl_rows(path: Path, file: Iterable[str]) -> Iterator[tuple[int, dict[str, object]]]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_distinct_keys)
        except json.JSONDecodeError as error:
            hint = ". Write one whole object on each line." if text.strip() in ("[", "{") else ""
            raise InputError(
                f"{path}, line {line}: not JSON ({error.msg}, at character {error.pos + 1}){hint}"
            ) from error
        except ValueError as error:
            raise InputError(f"{path}, line {line}: {error}") from error
        except RecursionError:
            raise InputError(f"{path}, line {line}: nested too deeply for a row") from None
        if not isinstance(row, dict):
            raise InputError(
                f"{path}, line {line}: expected one JSON object on each line, got a "
                f"{type(row).__name__}"
            )
        yield line, row


def _distinct_keys(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"column {twice!r} occurs twice. Rename one of them.")
    return dict(pairs)


def _load_from_hub(
    repo: str, config: str | None, *, revision: str | None, data_dir: str | None
) -> Mapping[str, Any]:
    import datasets  # imported here, because it is slow and only the hub needs it

    try:
        return datasets.load_dataset(repo, config, revision=revision, data_dir=data_dir)
    except ConnectionError as error:
        raise InputError(
            f"{repo}: the Hugging Face hub could not be reached ({error}). Go online, or pass the "
            "data as files: folder= of load_task, or task_from_files."
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        where = repo if config is None else f"{repo}/{config}"
        raise InputError(f"{where}: `datasets` cannot load it: {error}") from error


def _label_names(where: str, feature: Any, given: Sequence[str] | None) -> Sequence[str] | None:
    """Return the names of integer labels: the data set's own, otherwise those given."""
    own = getattr(feature, "names", None)
    if own is None or all(name.isdigit() for name in own):
        return given
    if given is not None and list(given) != list(own):
        raise InputError(
            f"{where}: label_names {list(given)} contradict the data set's own {list(own)}. Omit "
            "label_names and use the data set's names in the verbalizer."
        )
    return own


def _label_word(label: object, names: Sequence[str] | None, place: str) -> object:
    if isinstance(label, bool) or not isinstance(label, int):
        return label
    if names is None:
        raise InputError(
            f"{place}: the label is the integer {label}, whose meaning differs from data set to "
            "data set. Pass label_names=('name of 0', 'name of 1', ...)."
        )
    if not 0 <= label < len(names):
        raise InputError(
            f"{place}: label {label}: expected 0 to {len(names) - 1} ({', '.join(names)}). Use "
            "splits= to leave out a split without labels."
        )
    return names[label]
