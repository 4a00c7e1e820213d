"""Circuits measured on one set of examples, each once, and kept on disk as they come.

m(C) of method.md §6 by the heads of C: two rankings share many circuits, and a killed comparison
goes on with what it had measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cdt_lens.circuits.ablation import measure_circuits
from cdt_lens.circuits.faithfulness import f_of
from cdt_lens.core.kept import Say, keep, kept
from cdt_lens.core.passes import Passes
from cdt_lens.core.processes import wait_for_all
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.provenance import versions, weight_hash
from cdt_lens.models.view import ModelView
from cdt_lens.tasks.task import Examples

Heads = tuple[Head, ...]
_FORMAT = "cdt_lens.measured_circuits"


@dataclass
class MeasuredCircuits:
    """The task direction of every circuit that was asked for, in logits.

    path: where they are kept (None: nowhere); full, empty: with all heads and with none, measured
    when it is made.

    Raises:
        InputError: ablating every head leaves the metric as it was.
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
        self._key = {
            "model": weight_hash(self.view), "data": self.examples.hash,
            "baseline": self.baseline.hash, "version": versions()["cdt_lens"],
        }  # fmt: skip
        found = None if self.path is None else kept(self.path, _FORMAT, self._key, self.say)
        wait_for_all()  # no process writes before every one has looked
        self.metric = {} if found is None else dict(found["metric"])
        everyone = all_heads(self.view.n_layers, self.view.n_heads)
        self.measure([everyone, ()])
        self.full, self.empty = self.metric[_name(everyone)], self.metric[_name(())]
        self.f(everyone)  # refuses where there is nothing to explain

    def measure(self, circuits: Iterable[Heads]) -> None:
        """m(C) of each circuit that is not known yet."""
        wanted = [c for c in dict.fromkeys(circuits) if _name(c) not in self.metric]
        if not wanted:
            return
        found = measure_circuits(
            self.view, wanted, self.examples, self.baseline,
            passes=Passes(self.batch_size, self.rows, self.progress),
        )  # fmt: skip
        self.metric |= {_name(circuit): value for circuit, value in found.items()}
        if self.path is not None:
            keep(self.path, _FORMAT, {"key": self._key, "metric": self.metric})

    def f(self, circuit: Heads) -> float:
        """Faithfulness of a measured circuit: 1 is the full model, 0 no heads."""
        return f_of(self.metric[_name(circuit)], self.full, self.empty)

    def curve(self, circuits: Sequence[Heads]) -> tuple[float, ...]:
        """f of each circuit, measured now if it was not."""
        self.measure(circuits)
        return tuple(self.f(circuit) for circuit in circuits)


def _name(circuit: Heads) -> str:
    return " ".join(str(head) for head in sorted(circuit))
