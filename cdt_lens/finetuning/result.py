"""`FineTuneResult`: what one fine-tuning run trained, how it went, and its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from cdt_lens.core import display
from cdt_lens.core.equality import EqualByContent
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.models.heads import Head
from cdt_lens.models.provenance import Provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class FineTuneResult(EqualByContent):
    """What one fine-tuning run did.

    heads: whose slices were trained; siblings: unselected query heads that share a trained
    key/value slice; history: one row a look at validation data, row 0 before the first step
    (losses in nats, shares 0 to 1); best_epoch: the epoch whose values the adapter holds, 0 where
    no epoch was better than the model as it was.
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

    def __repr__(self) -> str:
        told = f"{self.trained_parameters:,} parameters ({self.share:.2%})"
        accuracy = [f"{row['target_accuracy']:.3f}" for row in (self.before, self.after)]
        return display.line(
            self, self.scope, display.few(self.heads), told,
            f"target accuracy {' to '.join(accuracy)}", f"best epoch {self.best_epoch}",
        )  # fmt: skip

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
        """Source accuracy after / before; NaN without a source task."""
        before = float(self.before["source_accuracy"])
        return float(self.after["source_accuracy"]) / before if before else float("nan")

    @property
    def share(self) -> float:
        """Trained parameters as a share of all, 0 to 1."""
        return self.trained_parameters / self.total_parameters

    def to_dataframe(self) -> pd.DataFrame:
        """The history."""
        return self.history.copy()

    def plot(self) -> Figure:
        """Target and source accuracy over the epochs."""
        return display.figure(self)

    def _repr_html_(self) -> str:
        title = (
            f"Scope {self.scope}: {self.trained_parameters:,} of {self.total_parameters:,} "
            f"parameters trained ({self.share:.2%}); best epoch {self.best_epoch}"
        )
        return display.html(title, self.history)
