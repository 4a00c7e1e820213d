"""Define `FineTuneResult`, the outcome of one fine-tuning run with its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from cdt_lens.core import display
from cdt_lens.core.equality import EqualByContent
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.options import TrainingOptions
from cdt_lens.finetuning.trainer import best_without_floor
from cdt_lens.models.heads import Head
from cdt_lens.models.provenance import Provenance


@dataclass(frozen=True, eq=False)
class FineTuneResult(EqualByContent):
    """The outcome of one fine-tuning run.

    Attributes:
        scope: the scope, such as "decision".
        heads: the heads whose slices were trained.
        siblings: unselected query heads that share a trained key/value slice.
        n_layers: number of layers of the model.
        n_heads: number of heads in a layer.
        trained_parameters: number of trained parameters.
        total_parameters: number of parameters of the model.
        options: the training options.
        history: one row for each evaluation on validation data. Row 0 is before the first step.
            Losses are in nats and shares are from 0 to 1. `train_loss` is the mean over the steps
            since the last row.
        best_epoch: the epoch whose values the adapter holds. 0 where no epoch was better than the
            untrained model.
        stopped: why the run ended.
        seconds: time of the training steps.
        provenance: origin of the result.
        adapter: the trained elements.
        judged: the measurement of the trained model that `judge` of `finetune` returned, or None.
        changed: whether the adapter changes any weight.
    """

    scope: str
    heads: tuple[Head, ...]
    siblings: tuple[Head, ...]
    n_layers: int
    n_heads: int
    trained_parameters: int
    total_parameters: int
    options: Mapping[str, Any] = field(repr=False)
    history: pd.DataFrame = field(repr=False)
    best_epoch: int
    stopped: str
    seconds: float
    provenance: Provenance = field(repr=False)
    adapter: Adapter = field(repr=False)
    judged: Any = field(default=None, repr=False)
    changed: bool = field(default=True, repr=False)

    def __repr__(self) -> str:
        sizes = f"{self.trained_parameters:,} parameters ({self.share:.2%})"
        accuracy = [f"{row['target_accuracy']:.3f}" for row in (self.before, self.after)]
        return display.line(
            self, self.scope, display.few(self.heads), sizes,
            f"target accuracy {' to '.join(accuracy)}", f"best epoch {self.best_epoch}",
            *(["nothing was learnt"] if self.nothing_learnt else []),
        )  # fmt: skip

    @property
    def nothing_learnt(self) -> str:
        """A sentence that says why nothing was learnt, or "" where something was."""
        if self.best_epoch == 0:
            return self._forgotten or (
                "Nothing was learnt: no epoch was better on the validation data than the untrained "
                "model, so the adapter holds the base model's values."
            )
        if not self.changed:
            return (
                "Nothing was learnt: the training changed no weight. The learning rate may be too "
                "small."
            )
        return ""

    @property
    def _forgotten(self) -> str:
        """A sentence about the best of the epochs that forget too much, or "" if none is better."""
        least, metric = self.options.get("least_retention"), self.options.get("metric", "accuracy")
        if least is None or len(self.history) < 2:
            return ""
        rows: list[Any] = self.history.to_dict("records")
        # Without validation rows the last epoch would be kept.
        unknown = bool(self.history[f"target_{metric}"].isna().all())
        best = rows[-1] if unknown else best_without_floor(rows, TrainingOptions(metric=metric))
        if best["epoch"] == 0:
            return ""
        scores = (
            "" if unknown else f"had a target accuracy of {best['target_accuracy']:.3f} "
            f"({self.before['target_accuracy']:.3f} before) and "
        )  # fmt: skip
        kept = best["source_accuracy"] / self.before["source_accuracy"]
        which = "" if unknown else " that was better on the validation data"
        return (
            f"Nothing was learnt: every epoch{which} kept less than {least:.0%} of the source "
            f"accuracy. Epoch {best['epoch']:.0f} {scores}kept {kept:.0%} of it. Ask to keep less, "
            "or train less: fewer heads, or a lower learning rate."
        )

    @property
    def before(self) -> pd.Series:
        """The row of the history before the first step."""
        return self.history.iloc[0]

    @property
    def after(self) -> pd.Series:
        """The row of the history whose values the adapter holds."""
        return self.history[self.history["epoch"] == self.best_epoch].iloc[0]

    @property
    def retention(self) -> float:
        """The source accuracy after training, divided by that before. NaN without a source task."""
        before = float(self.before["source_accuracy"])
        return float(self.after["source_accuracy"]) / before if before else float("nan")

    @property
    def share(self) -> float:
        """The trained parameters as a share of all, from 0 to 1."""
        return self.trained_parameters / self.total_parameters

    def to_dataframe(self) -> pd.DataFrame:
        """Return the history."""
        return self.history.copy()

    def plot(self) -> display.Figure:
        """Target and source accuracy over the epochs."""
        return display.figure(self)

    def _repr_html_(self) -> str:
        title = (
            f"Scope {self.scope}: {self.trained_parameters:,} of {self.total_parameters:,} "
            f"parameters trained ({self.share:.2%}); best epoch {self.best_epoch}"
        )
        return display.html(f"{title}. {self.nothing_learnt}".rstrip(". "), self.history)
