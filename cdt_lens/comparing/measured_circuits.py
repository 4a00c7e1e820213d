"""Circuits measured on one set of examples, once each, and kept on disk one after another.

Two rankings of heads share many circuits, and an interrupted comparison resumes with the circuits
that it had measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from typing_extensions import TypedDict

from cdt_lens.circuits.ablation import measure_circuits
from cdt_lens.circuits.faithfulness import f_of
from cdt_lens.core.kept import Kept, Say
from cdt_lens.core.passes import Passes
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.provenance import model_key
from cdt_lens.models.view import ModelView
from cdt_lens.tasks.task import Examples

Heads = tuple[Head, ...]
_FORMAT = "cdt_lens.measured_circuits"


class _Measured(TypedDict):
    metric: dict[str, float]


@dataclass
class MeasuredCircuits:
    """The task direction m(C) of circuits: every head outside of C is mean-ablated.

    Attributes:
        view: The model.
        examples: The examples that m(C) is measured on.
        baseline: The reference values of the ablated heads.
        path: The file in which the values are kept, or None to keep none.
        say: Receives the reason why kept values are measured again.
        batch_size: Examples in a batch.
        rows: (circuit x example) rows in a forward pass; chosen from `batch_size` if None.
        progress: Whether to show a progress bar.
        metric: m(C) in logits, by the names of the heads of C.
        full: m of all heads, in logits, measured on construction.
        empty: m of no heads, in logits, measured on construction.

    Raises:
        InputError: Ablating every head does not change the metric.
    """

    view: ModelView
    examples: Examples
    baseline: Baseline
    path: Path | None
    say: Say
    batch_size: int = 16
    rows: int | None = None
    progress: bool = True
    metric: dict[str, float] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        made_from = {
            "model": model_key(self.view), "data": self.examples.hash,
            "baseline": self.baseline.hash,
        }  # fmt: skip
        self._kept = (
            None if self.path is None else Kept(self.path, _FORMAT, made_from, holds=_Measured)
        )
        kept = None if self._kept is None else self._kept.reuse(self.say)
        self.metric = {} if kept is None else dict(kept["metric"])
        everyone = all_heads(self.view.n_layers, self.view.n_heads)
        self.measure([everyone, ()])
        self.full, self.empty = self.metric[_name(everyone)], self.metric[_name(())]
        self.f(everyone)  # refuses where there is nothing to explain

    def measure(self, circuits: Iterable[Heads]) -> None:
        """Measure m(C) of the circuits that are not known yet, and keep the values.

        Args:
            circuits: The heads of each circuit, in any order.
        """
        wanted = [c for c in dict.fromkeys(circuits) if _name(c) not in self.metric]
        if not wanted:
            return
        measured = measure_circuits(
            self.view, wanted, self.examples, self.baseline,
            passes=Passes(self.batch_size, self.rows, self.progress),
        ).means()  # fmt: skip
        self.metric |= {_name(circuit): value for circuit, value in measured.items()}
        if self._kept is not None:
            self._kept.keep({"metric": self.metric})

    def f(self, circuit: Heads) -> float:
        """Return the faithfulness f of a measured circuit.

        Args:
            circuit: Its heads.

        Returns:
            f without unit: 1 is the full model, 0 the model without heads.
        """
        return f_of(self.metric[_name(circuit)], self.full, self.empty)

    def curve(self, circuits: Sequence[Heads]) -> tuple[float, ...]:
        """Return f of several circuits, and measure those that are not known yet.

        Args:
            circuits: The heads of each circuit.

        Returns:
            f of each circuit, in their order.
        """
        self.measure(circuits)
        return tuple(self.f(circuit) for circuit in circuits)


def _name(circuit: Heads) -> str:
    return " ".join(str(head) for head in sorted(circuit))
