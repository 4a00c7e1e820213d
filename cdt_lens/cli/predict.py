"""The command `predict`, which asks an exported model about new rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdt_lens.cli.console import tell_csv
from cdt_lens.core.errors import InputError

if TYPE_CHECKING:
    from cdt_lens.tasks.rows import Table


def predict(
    folder: Annotated[Path, typer.Argument(help="Folder that cdt-lens export or adapt wrote.")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to label; repeat the option for each text."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="CSV, TSV or JSONL file with the columns of the template."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of rows per batch.")] = 16,
) -> None:
    """Predict the labels of new rows with an exported model.

    Prints CSV: the columns of the rows, the predicted label, and the probability of each label.
    """
    import pandas as pd

    from cdt_lens.finetuning import predict as prediction

    if bool(text) == (file is not None):
        raise InputError("predict: expected either --text or --file")
    card = prediction.load_card(folder)
    rows = _rows_of(text or [], card.columns) if file is None else _read(file, card.columns)
    # As objects: a column that a row lacks would turn whole numbers into floats.
    given = pd.DataFrame(list(rows.rows), dtype=object)
    taken = sorted({*given} & {"prediction", *(f"p({label})" for label in card.labels)})
    if taken:
        raise InputError(f"{file}: it has a column {taken[0]!r}, as the result has; rename it")
    predicted = prediction.predict(folder, rows.rows, places=rows.places, batch_size=batch_size)
    tell_csv(pd.concat([given, predicted], axis=1).to_csv(index=False))


def _rows_of(texts: list[str], columns: tuple[str, ...]) -> Table:
    from cdt_lens.core.display import short
    from cdt_lens.tasks.rows import Table

    if len(columns) != 1:
        raise InputError(
            f"--text: the template has the columns {', '.join(columns)}; give a file with them by "
            "--file"
        )
    places = [f"--text {short(text)}" for text in texts]
    return Table([{columns[0]: text} for text in texts], places)


def _read(file: Path, columns: tuple[str, ...]) -> Table:
    from cdt_lens.tasks.rows import read_table

    table = read_table(file)
    table.check_columns(columns, ())
    return table
