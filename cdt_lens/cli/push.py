"""The command `push`: upload an adapter, a LoRA or an exported checkpoint to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdt_lens.cli.console import tell


def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder of an adapter, or one that cdt-lens export wrote.")
    ],
    name: Annotated[str, typer.Argument(help="Repository, such as name/javanese-sentiment.")],
    public: Annotated[
        bool, typer.Option(help="Make a public repository; the default is private.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option(help="Replace the files of a repository that holds some.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Name on the hub of the base model, for the model card.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence for the model card; the default is none.")
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(help="Code of a language for the model card, such as jv; repeat the option."),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Name on the hub of a data set for the model card; repeat the option."),
    ] = None,
) -> None:
    """Upload an adapter or an exported model to the Hugging Face hub, with a model card.

    Needs an access token (`hf auth login` or `HF_TOKEN`). The card says what was trained on what,
    and the accuracies before and after.
    """
    from cdt_lens.finetuning.hub import push_to_hub

    url = push_to_hub(
        folder, name, private=not public, overwrite=overwrite, base_model=base_model,
        license=license, language=language or (), datasets=dataset or (),
    )  # fmt: skip
    tell(url)
