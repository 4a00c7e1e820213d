"""Define `AdaptResult`: what was chosen, learnt and lost when a model was adapted to a language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor

from cdt_lens.core import display
from cdt_lens.core.saved import Saved
from cdt_lens.finetuning.transfer_result import frame_from_json, frame_to_json
from cdt_lens.models.provenance import Provenance

# Shares from 0 to 1, with the limits of 95 % intervals. `change` is after minus before, paired.
LANGUAGE_COLUMNS = (
    "language", "examples", "before", "before_low", "before_high", "after", "after_low",
    "after_high", "change", "change_low", "change_high",
)  # fmt: skip
TRIAL_COLUMNS = (
    "run", "scope", "heads", "learning_rate", "epoch", "target_accuracy", "target_loss",
    "source_accuracy", "seconds",
)  # fmt: skip
# Losses on the text of test prompts, in nats a token; the change with a 95 % interval over prompts.
TEXT_COLUMNS = (
    "language", "examples", "tokens", "before", "after", "change", "change_low", "change_high",
)  # fmt: skip
CHANGE_COLUMNS = ("language", "text", "label", "before", "after")
_TABLES = {
    "languages": LANGUAGE_COLUMNS, "trials": TRIAL_COLUMNS, "changes": CHANGE_COLUMNS,
    "texts": TEXT_COLUMNS,
}  # fmt: skip
_LATER = {"texts"}  # tables that older files lack
_TEXT = {"language", "run", "scope", "text", "label", "before", "after"}


@dataclass(frozen=True, eq=False)
class AdaptResult(Saved):
    """The outcome of `cdt-lens adapt`.

    Attributes:
        model: the base model.
        chosen: name of the run that was chosen.
        scope: its scope.
        heads: number of its heads; 0 where it trains no single heads.
        learning_rate: its peak learning rate.
        trained_parameters: number of trained parameters.
        total_parameters: number of parameters of the model.
        keep: the share of the source accuracy that had to be kept, on validation examples.
        languages: one row for the target and one for the source: accuracy on test examples before
            and after, and the change, with 95 % intervals.
        trials: one row for each training of the search, with the epoch that was best on validation
            examples.
        changes: the test examples whose answer changed: text, gold label, answer before and after.
        nothing_learnt: a sentence that says why nothing was learnt, or "".
        exported: folder of the adapted model, relative to the run directory; "" where nothing was
            learnt.
        settings: the settings.
        texts: one row for the target and one for the source: the loss of the language model on the
            text of test prompts (`tasks.text_loss`) before and after, and the change, in nats a
            token, with its 95 % interval over prompts. Less is better. Without rows in files that
            were written before it was measured.
        provenance: origin of the result, or None.
    """

    model: str
    chosen: str
    scope: str
    heads: int
    learning_rate: float
    trained_parameters: int
    total_parameters: int
    keep: float
    languages: pd.DataFrame = field(repr=False)
    trials: pd.DataFrame = field(repr=False)
    changes: pd.DataFrame = field(repr=False)
    nothing_learnt: str = ""
    exported: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    texts: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=list(TEXT_COLUMNS)), repr=False
    )
    provenance: Provenance | None = field(default=None, repr=False)
    _format, _kind = "cdt_lens.adapt", "result of adapt"
    _name = "adapt.json"

    def __repr__(self) -> str:
        target = self.languages.iloc[0]
        words = f"target accuracy {target['before']:.3f} to {target['after']:.3f}"
        return display.line(self, self.model, self.chosen, words)

    def to_dataframe(self) -> pd.DataFrame:
        """Return the accuracies before and after by language."""
        return self.languages.copy()

    def plot(self) -> display.Figure:
        """Draw the accuracies before and after by language, with their intervals."""
        return display.figure(self)

    def _repr_html_(self) -> str:
        return display.html(f"{self.model}, adapted by {self.chosen}", self.languages, self.trials)

    def _to_file(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        plain = (
            "model", "chosen", "scope", "heads", "learning_rate", "trained_parameters",
            "total_parameters", "keep", "nothing_learnt", "exported",
        )  # fmt: skip
        body: dict[str, Any] = {name: getattr(self, name) for name in plain}
        body["settings"] = dict(self.settings)
        body["provenance"] = None if self.provenance is None else self.provenance.to_dict()
        return body | {name: frame_to_json(getattr(self, name)) for name in _TABLES}, {}

    @classmethod
    def _from_file(cls, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdaptResult:
        values = {name: value for name, value in body.items() if name in cls.__annotations__}
        provenance = values.pop("provenance")
        frames = {
            name: frame_from_json(name, body[name], columns, text=_text(name))
            for name, columns in _TABLES.items()
            if name in body or name not in _LATER
        }
        origin = None if provenance is None else Provenance.from_dict(provenance)
        return cls(**values | frames, provenance=origin)


def _text(name: str) -> set[str]:
    """Return the columns of words: `before` and `after` are answers in one table only."""
    return _TEXT if name == "changes" else _TEXT - {"before", "after"}
