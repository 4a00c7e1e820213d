"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cdt_lens.core.errors import InputError

# Options that several commands have.
TrainFile = Annotated[Path | None, typer.Option(help="Your CSV, TSV or JSONL for training.")]
Data = Annotated[Path | None, typer.Option(help="Folder with the data sets; default: the hub.")]
Template = Annotated[
    str | None, typer.Option(help=r'Prompt with columns in braces: "{text}\nSentiment:".')
]
Verbalizer = Annotated[
    list[str] | None, typer.Option(help='label=" word", once a label; one token each.')
]
LabelColumn = Annotated[str, typer.Option(help="Column with the label.")]
ModelClass = Annotated[Literal["auto", "hooked", "bridge"], typer.Option(help="Model class.")]
Device = Annotated[str | None, typer.Option(help="Such as cuda or cpu.")]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
# Options of the commands that score heads.
TaskName = Annotated[
    str,
    typer.Option(
        help="nusax-senti, xnli, ioi, greater-than, gendered-pronoun, pseudo-sentiment, or "
        "files (your own)."
    ),
]
Language = Annotated[str | None, typer.Option(help="Such as english, javanese; xnli: en.")]
Shots = Annotated[int, typer.Option(min=0, help="Solved examples before every prompt.")]
Scored = Annotated[int, typer.Option(min=1, help="Examples to score, balanced.")]
Averaged = Annotated[
    int | None, typer.Option(min=1, help="Examples to average; default: all of train.")
]
Positions = Annotated[
    Literal["answer", "pooled", "right", "left"],
    typer.Option(help="Positions that share a mean."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples per batch.")]
Rows = Annotated[
    int | None,
    typer.Option(min=1, help="Rows (sources x examples) per pass; default by length."),
]
Seed = Annotated[int, typer.Option(help="Decides every draw.")]


def task_settings(
    *,
    data: Path | None,
    files: Mapping[str, Path | None],
    template: str | None,
    verbalizer: list[str] | None,
    **rest: Any,
) -> Any:
    """`runs.Settings` from options as a person writes them."""
    from cdt_lens.experiments.settings import Settings

    return Settings(
        data=None if data is None else str(data),
        files={name: str(path) for name, path in files.items() if path is not None},
        template=None if template is None else template.replace(r"\n", "\n"),
        verbalizer=words_of(verbalizer or []),
        **rest,
    )


def words_of(words: list[str]) -> dict[str, str]:
    """A verbalizer from `label= word` arguments, one a label.

    Raises:
        InputError: no `=`, several labels in one argument, or a label given twice.
    """
    found: dict[str, str] = {}
    for given in words:
        label, equals, word = given.partition("=")
        if not equals or "=" in word:
            raise InputError(
                f'--verbalizer {given!r}: expected label=" word", the option again for each label'
            )
        if label in found:
            raise InputError(f"--verbalizer {given!r}: label {label!r} was given before")
        found[label] = word
    return found
