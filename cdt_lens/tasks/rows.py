"""Read rows of a file, of the hub or of a local folder, each with its place for error messages.

1. CSV, TSV and JSONL files, plain or gzipped, are read as UTF-8. A place counts lines from 1.
2. Hub data sets are read split by split. A place counts rows from 1.
3. Labels become words. Integers are refused unless their names are known.
"""

from __future__ import annotations

import csv
import gzip
import json
import tempfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from cdt_lens.core import display
from cdt_lens.core.errors import InputError, did_you_mean

SPLITS = ("train", "valid", "test")
# The hub's names for each split, in order of preference.
HUB_SPLITS = {
    "train": ("train",),
    "valid": ("validation", "valid", "dev", "val"),
    "test": ("test",),
}
# A gzipped file may hold this many bytes, or this multiple of its own size. Text compresses to a
# tenth at best, and a few hundred kB can hold half a gigabyte.
GZIP_BYTES, GZIP_RATIO = 64 << 20, 50


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
            if column_of(header, column) is None:
                raise InputError(
                    f"{self.header}: {no_column(column, header)}{_why_no_column(header, labels)}"
                )


def composed(text: str) -> str:
    """Return a name in Unicode's composed form (NFC).

    macOS and some exports write "é" as "e" and an accent, which is another string that looks the
    same. Labels and names of columns are compared in this form. The text of prompts is not changed.

    Args:
        text: the name.
    """
    return unicodedata.normalize("NFC", text)


def column_of(columns: Iterable[str], name: str) -> str | None:
    """Find a column by its name, in either Unicode form.

    Args:
        columns: the names of the columns.
        name: the name to find.

    Returns:
        The name as the columns spell it, or None.
    """
    columns = list(columns)
    if name in columns:
        return name
    return next((own for own in columns if composed(own) == composed(name)), None)


def no_column(column: str, columns: Iterable[str]) -> str:
    """Say that a column is missing, and which ones there are.

    Args:
        column: the missing column.
        columns: the names of the columns.
    """
    columns = list(columns)
    listed = display.few((display.short(name) for name in columns), 12)
    return f"no column {column!r}{did_you_mean(column, columns[:100])}; the columns are {listed}"


def check_paths(paths: Mapping[str, str | Path], name: str = "paths") -> None:
    """Check the names of splits before anything is read.

    Args:
        paths: path of each split.
        name: what the paths are called in the error message.

    Raises:
        InputError: the splits have other names.
    """
    unknown = [split for split in paths if split not in SPLITS]
    if unknown or not paths:
        raise InputError(f"{name}: expected splits among {', '.join(SPLITS)}, got {list(paths)}")


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
    if kind not in ("csv", "tsv", "jsonl") or "\0" in str(path):
        raise InputError(f"{path}: expected a .csv, .tsv or .jsonl file (.gz allowed)")
    quoted = kind == "csv" if quoting is None else quoting
    try:
        _check_gzip_size(path)
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
    label_columns: Sequence[str],
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
        label_columns: names of the columns with labels.
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
    loaded = _load_from_hub(
        repo, config, columns=(*columns, *label_columns), revision=revision, data_dir=data_dir
    )
    where = repo if config is None else f"{repo}/{config}"
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
        found = {
            column: column_of(data.column_names, column) for column in (*columns, *label_columns)
        }
        for column, own in found.items():
            if own is None:
                raise InputError(
                    f"{where}, split {name}: no column {column!r}"
                    f"{did_you_mean(column, data.column_names)}; it has "
                    f"{display.few(data.column_names, 12)}"
                )
        places = [f"{where}, split {name}, row {number}" for number in range(1, len(data) + 1)]
        rows = data.select_columns(list(dict.fromkeys(found.values()))).to_list()
        for own in (found[column] for column in label_columns):
            names = _label_names(where, data.features[own], label_names)
            for row, place in zip(rows, places, strict=True):
                row[own] = _label_word(row[own], names, place)
        tables[split] = Table(rows, places)
    return tables


def _open_text(path: Path) -> TextIOWrapper:
    # utf-8-sig removes the byte order mark that spreadsheets write.
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _check_gzip_size(path: Path) -> None:
    """Refuse a gzipped file that would fill the memory, before any row of it is kept."""
    if path.suffix != ".gz":
        return
    limit = max(GZIP_BYTES, GZIP_RATIO * path.stat().st_size)
    size = 0
    with gzip.open(path, "rb") as file:
        while block := file.read(1 << 20):
            size += len(block)
            if size > limit:
                raise InputError(
                    f"{path}: {path.stat().st_size:,} bytes that decompress to more than "
                    f"{limit:,}. Text does not compress so well. Check the file, or decompress it."
                )


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
    """Describe a header that lacks a column: another delimiter, a comment, or a row of data."""
    why = _not_a_header(header)
    given = [cell for cell in header if cell in set(labels)]
    if not why and given:
        why = f". {given[0]!r} is a label. The first line must hold the names of the columns."
    return why


def _not_a_header(header: Sequence[str]) -> str:
    """Describe a first line that holds another delimiter or a comment, not names of columns."""
    if header[0].lstrip().startswith(("#", "//", "%", "sep=")):
        return ". It seems to be a comment. The first line must be the header: remove the comment."
    for delimiter, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars"), (",", "commas")):
        # A name in quotation marks may hold a comma.
        cells = header if delimiter != "," else header[: len(header) == 1]
        if any(delimiter in cell for cell in cells):
            return (
                f". The cells seem to be separated by {name}. Save the file with commas as .csv, "
                "or with tabs as .tsv."
            )
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
                    f"{path}, line {start}: {_too_many_cells(len(cells), header, delimiter)}"
                )
            yield start, dict(zip_longest(header, cells))
    except csv.Error as error:
        raise InputError(f"{path}, line {line}: {_csv_advice(error, quoted)}") from error


def _too_many_cells(n: int, header: Sequence[str], delimiter: str) -> str:
    shown = display.few((display.short(cell) for cell in header), 12)
    why = _not_a_header(header) or (
        f". Put quotation marks around text that holds {delimiter!r}. The first line must be the "
        "header, with a name for every column."
    )
    return f"{n} cells, the header has {len(header)} ({shown}){why}"


def _csv_advice(error: csv.Error, quoted: bool) -> str:
    if "field limit" not in str(error):
        return f"{error}. Close or double the quotation mark."
    unclosed = ", or close the quotation mark before it" if quoted else ""
    return f"a cell of more than {csv.field_size_limit():,} characters. Shorten it{unclosed}."


def _check_header(path: Path, header: Sequence[str], line: int) -> None:
    twice = [column for column, n in Counter(map(composed, header)).items() if n > 1]
    if twice:
        raise InputError(
            f"{path}, line {line}: column {display.short(twice[0])} occurs twice. Rename one of "
            "them."
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
    twice = [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]
    if twice:
        raise ValueError(f"column {display.short(twice[0])} occurs twice. Rename one of them.")
    return dict(pairs)


def _load_from_hub(
    repo: str,
    config: str | None,
    *,
    columns: Iterable[str],
    revision: str | None,
    data_dir: str | None,
) -> Mapping[str, Any]:
    import datasets  # imported here, because it is slow and only the hub needs it

    source: dict[str, Any] = {"revision": revision, "data_dir": data_dir}
    try:
        loaded = datasets.load_dataset(repo, config, **source)
        if not any(data.info.builder_name == "csv" for data in loaded.values()):
            return loaded
        # In a cache of its own the builder knows the types that the data set states, and not those
        # that pandas has guessed above.
        with tempfile.TemporaryDirectory(prefix="cdt-lens-") as cache:
            builder = datasets.load_dataset_builder(repo, config, cache_dir=cache, **source)
        return datasets.load_dataset(repo, config, **source, **_csv_reading(builder, columns))
    except ConnectionError as error:
        raise InputError(
            f"{repo}: the Hugging Face hub could not be reached ({error}). Go online, or pass the "
            "data as files: folder= of load_task, or task_from_files."
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        where = repo if config is None else f"{repo}/{config}"
        why = "" if error.__cause__ is None else f" ({error.__cause__})"
        raise InputError(f"{where}: `datasets` cannot load it: {error}{why}") from error


def _csv_reading(builder: Any, columns: Iterable[str]) -> dict[str, Any]:
    """Return the options with which `datasets` reads the cells of CSV files as `read_table` does.

    By default pandas takes "null" for an empty cell and 007 for the number 7.
    """
    if builder.info.features:
        return {}
    options: dict[str, Any] = {"converters": dict.fromkeys(columns, str), "keep_default_na": False}
    if builder.config.sep == "\t":
        options["quoting"] = csv.QUOTE_NONE
    return options


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
    if names is not None and isinstance(label, str) and label.isdecimal():
        label = int(label)  # a CSV file holds numbers as text
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
