"""The settings of `adapt`, which the command line reads without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from cdt_lens.core.choices import Seed
from cdt_lens.experiments.settings import ModelSettings


@dataclass(frozen=True, kw_only=True)
class AdaptSettings(ModelSettings):
    """The settings of `adapt`.

    Args:
        model: The base model, or with `ready` the model that does the task in the source language.
        template: The prompt, with the columns in braces.
        verbalizer: The word for each label.
        label_column: Column that holds the label.
        source: Files of the source language by split; train is needed.
        target: Files of the target language by split; train is needed.
        ready: Whether the model does the task in the source language already.
        keep: Share of the source accuracy that has to be kept, on validation rows.
        minutes: The search for scope, size and rate ends after this time.
        epochs: Number of epochs of every training on the target.
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
        float, Field(gt=0, description="End the search for scope, size and rate after this time.")
    ] = 30.0
    epochs: Annotated[
        int, Field(ge=1, description="Number of epochs of every training on the target.")
    ] = 5
    set_aside: Annotated[
        float,
        Field(
            gt=0, lt=0.5, description="Share of the rows to set aside for each of validation and "
            "test, where these have no file.",
        ),
    ] = 0.2  # fmt: skip
    seed: Annotated[Seed, Field(description="Seed of every random draw.")] = 0
