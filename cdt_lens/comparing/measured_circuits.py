"""Circuits measured on one set of examples, once each, and kept on disk one after another.

Two rankings of heads share many circuits, and an interrupted comparison resumes with the circuits
that it had measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import TypedDict

from cdt_lens.circuits.ablation import Measurement, empty_metric, measure_circuits
from cdt_lens.circuits.faithfulness import f_of
from cdt_lens.circuits.measures import check_directions
from cdt_lens.core.choices import Empty
from cdt_lens.core.kept import Kept, Say
from cdt_lens.core.passes import Passes
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.provenance import model_key
from cdt_lens.models.view import ModelView
from cdt_lens.tasks.metrics import label_numbers
from cdt_lens.tasks.task import Examples

Heads = tuple[Head, ...]
_FORMAT = "cdt_lens.measured_circuits"


class _Measured(TypedDict):
    """The names of the circuits; their rows are in the tensor "table"."""

    circuits: list[str]


@dataclass(eq=False)
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
        empty_run: The run that counts as f = 0: "heads", or "all" for heads, MLPs and input.
        by_example: m(C) of each example in logits, by the names of the heads of C.
        strata: Number of each example's label, over which m(C) is averaged.
        full: m of all heads, in logits, measured on construction.
        empty: m of the run that counts as f = 0, in logits, measured on construction.

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
    empty_run: Empty = "heads"
    by_example: dict[str, Float[Tensor, " example"]] = field(
        init=False, default_factory=dict, repr=False
    )
    strata: Int[Tensor, " example"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        made_from = {
            "model": model_key(self.view), "data": self.examples.hash,
            # Files of another form hold the mean over the examples alone.
            "baseline": self.baseline.hash, "form": "by example",
        }  # fmt: skip
        self._kept = (
            None if self.path is None else Kept(self.path, _FORMAT, made_from, holds=_Measured)
        )
        self.strata = label_numbers([e.label for e in self.examples], self.examples.labels)
        self.by_example = self._known()
        self._everyone = all_heads(self.view.n_layers, self.view.n_heads)
        self._replaced = self._empty_run()
        if self._replaced is None:
            self.measure([self._everyone, ()])  # refuses what differs by rounding
        else:  # Heads alone may do nothing here.
            self.measure([self._everyone])
            self.measure([()])
        self.full = self._mean(self._everyone)
        self.empty = self._measurement(((),)).empty_mean
        if self._replaced is not None:
            every = self.by_example[_name(self._everyone)]
            check_directions(every, self._replaced, self.full, self.empty, self.view.dtype)
        self.f(self._everyone)  # refuses where there is nothing to explain

    def _known(self) -> dict[str, Tensor]:
        """Return what an earlier call measured."""
        kept = None if self._kept is None else self._kept.reuse_with_tensors(self.say)
        if kept is None:
            return {}
        body, tensors = kept
        table = tensors.get("table", torch.empty(0))
        if table.shape != (len(body["circuits"]), len(self.examples)):
            self.say(f"{self.path}: damaged: values are missing; making it again")
            return {}
        return dict(zip(body["circuits"], table, strict=True))

    def _empty_run(self) -> Float[Tensor, " example"] | None:
        """Measure the run without heads, MLPs and input, one pass that is not worth a file."""
        if self.empty_run == "heads":
            return None
        passes = Passes(self.batch_size, self.rows, self.progress)
        return empty_metric(self.view, self.examples, self.baseline, passes=passes)

    def measure(self, circuits: Iterable[Heads]) -> None:
        """Measure m(C) of the circuits that are not known yet, and keep the values.

        Args:
            circuits: The heads of each circuit, in any order.
        """
        wanted = [c for c in dict.fromkeys(circuits) if _name(c) not in self.by_example]
        if not wanted:
            return
        measured = measure_circuits(
            self.view, wanted, self.examples, self.baseline,
            passes=Passes(self.batch_size, self.rows, self.progress),
        )  # fmt: skip
        names = map(_name, measured.circuits)
        self.by_example |= dict(zip(names, measured.table.float(), strict=True))
        if self._kept is not None:
            table = torch.stack(list(self.by_example.values()))
            self._kept.keep({"circuits": list(self.by_example)}, {"table": table})

    def f(self, circuit: Heads) -> float:
        """Return the faithfulness f of a measured circuit.

        Args:
            circuit: Its heads.

        Returns:
            f without unit: 1 is the full model, 0 the empty run.
        """
        return f_of(self._mean(circuit), self.full, self.empty)

    def curve(self, circuits: Sequence[Heads]) -> tuple[float, ...]:
        """Return f of several circuits, and measure those that are not known yet.

        Args:
            circuits: The heads of each circuit.

        Returns:
            f of each circuit, in their order.
        """
        self.measure(circuits)
        return tuple(self.f(circuit) for circuit in circuits)

    def effects(self, circuits: Sequence[Heads]) -> Float[Tensor, "circuit example"]:
        """Return a value per example whose mean over `strata` is f, for each measured circuit.

        Args:
            circuits: The heads of each circuit.

        Returns:
            The values without unit, single precision; see `Measurement.effects`.
        """
        measured = self._measurement((*circuits, self._everyone, ()))
        return measured.effects(circuits, self._everyone).float()

    def _mean(self, circuit: Heads) -> float:
        return self._measurement((circuit,)).means()[circuit]

    def _measurement(self, circuits: Sequence[Heads]) -> Measurement:
        table = torch.stack([self.by_example[_name(circuit)] for circuit in circuits]).double()
        return Measurement(tuple(circuits), table, self.strata, "direction", self._replaced)


def _name(circuit: Heads) -> str:
    return " ".join(str(head) for head in sorted(circuit))
