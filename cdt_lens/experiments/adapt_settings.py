"""The settings of `adapt`, which the command line reads without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cdt_lens.core.choices import Seed
from cdt_lens.core.errors import InputError
from cdt_lens.experiments.settings import WeightSettings


@dataclass(frozen=True, kw_only=True)
class AdaptSettings(WeightSettings):
    """The settings of `adapt`, which loads the model as a `TransformerBridge`.

    Args:
        model: The base model, or with `ready` the model that does the task in the source language.
        template: The prompt, with the columns in braces.
        verbalizer: The word for each label.
        label_column: Column that holds the label.
        source: Files of the source language by split; train is needed.
        target: Files of the target language by split; train is needed.
        ready: Whether the model does the task in the source language already.
        keep: Share of the source accuracy that has to be kept, on validation rows.
        minutes: No training of the search for scope, size and rate begins after this time, which
            is counted from the start of the call. One is made in any case.
        epochs: Maximum number of epochs of every training, on the source as well.
        device: The device; None uses a GPU if there is one.
        dtype: The number type of the weights.
        set_aside: Share of the rows for each of valid and test where these have no file.
        seed: Seed of every random draw.
    """

    template: Annotated[
        str, Field(description=r'Prompt with the columns in braces, such as "{text}\nSentiment:".')
    ]
    verbalizer: dict[str, str]
    source: dict[str, str]
    target: dict[str, str]
    label_column: Annotated[str, Field(description="Column that holds the label.")] = "label"
    ready: bool = False
    keep: Annotated[
        float, Field(gt=0, le=1, description="Share of the source accuracy that must be kept.")
    ] = 0.95
    minutes: Annotated[
        float,
        Field(
            gt=0, description="Begin no training of the search after this time, except the first. "
            "Fine-tuning on the known language counts, and is not ended."
        ),
    ] = 30.0  # fmt: skip
    epochs: Annotated[
        int,
        Field(ge=1, description="Maximum number of epochs of every training, in both languages."),
    ] = 5
    device: Annotated[
        str | None,
        Field(description="Device, such as cuda or cpu; the default is a GPU if there is one."),
    ] = None
    set_aside: Annotated[
        float,
        Field(
            gt=0, lt=0.5, description="Share of the rows to set aside for each of validation and "
            "test, where these have no file.",
        ),
    ] = 0.2  # fmt: skip
    seed: Annotated[Seed, Field(description="Seed of every random draw.")] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        source = {Path(path).resolve(): split for split, path in self.source.items()}
        for split, path in self.target.items():
            own = Path(path).resolve()
            if own in source:
                raise InputError(
                    f"{path}: is the source's file for {source[own]} and the target's file for "
                    f"{split}; name a file of each language"
                )
