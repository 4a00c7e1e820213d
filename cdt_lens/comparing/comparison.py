"""`Comparison`: methods of scoring heads side by side, on one model and one task.

1. Every method scores all heads on the same examples.
2. Agreement: rank and linear correlation with exact mean-ablation of single heads, the yardstick.
3. Use: the top heads are kept and the rest mean-ablated on held-out examples; f over the share of
   heads kept gives CPR and CMD (MIB, arXiv 2504.13151), ranking by the score and by its magnitude.
4. Cost: seconds, and these as a multiple of one plain forward pass of the scored examples.
5. Truth, where a circuit was planted: AUROC and average precision of the magnitudes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pandas as pd
import torch
from torch import Tensor

from cdt_lens.circuits.measures import cmd, cpr
from cdt_lens.core import display
from cdt_lens.core.axes import along, own_axes
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.equality import EqualByContent
from cdt_lens.core.errors import InputError, did_you_mean
from cdt_lens.core.saved import Saved
from cdt_lens.models.provenance import Provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

YARDSTICK = "exact"  # the method that the others' scores are compared with
RANKINGS: tuple[Literal["signed", "magnitude"], ...] = ("signed", "magnitude")
# Whether a measure is better when large (+1) or small (-1).
Measure = Literal[
    "spearman", "pearson", "cpr", "cmd", "auroc", "average_precision", "seconds", "forward_passes"
]
_BETTER: Mapping[Measure, int] = {
    "spearman": 1, "pearson": 1, "cpr": 1, "cmd": -1, "auroc": 1, "average_precision": 1,
    "seconds": -1, "forward_passes": -1,
}  # fmt: skip
_NUMBERS = ("spearman", "pearson", "seconds", "forward_passes", "auroc", "average_precision")


@dataclass(frozen=True, eq=False)
class RankingCurve(EqualByContent):
    """Faithfulness of the top heads of one ranking.

    Attributes:
        f: f at each size, without unit: 1 as the full model, 0 as no heads.
        cpr: Area under f.
        cmd: Area under |1 - f|.
    """

    f: Annotated[tuple[float, ...], along("size")] = field(repr=False)
    cpr: float
    cmd: float

    @classmethod
    def of(cls, fractions: Sequence[float], f: Sequence[float]) -> RankingCurve:
        """Return the curve through `f`, which has one value per fraction of the heads."""
        values = torch.tensor(f, dtype=torch.float64)
        return cls(tuple(f), float(cpr(fractions, values)), float(cmd(fractions, values)))


@dataclass(frozen=True, eq=False)
class MethodResult(EqualByContent):
    """How good the scores of one method are. NaN stands for what was not measured.

    Attributes:
        method: Name of the method.
        description: What the method does, in a few words.
        spearman: Rank correlation with exact mean-ablation over all heads, from -1 to 1.
        pearson: Linear correlation with exact mean-ablation over all heads, from -1 to 1.
        signed: Faithfulness of the ranking by signed score; None if the method was refused.
        magnitude: Faithfulness of the ranking by magnitude; None if the method was refused.
        seconds: Time to score all heads; NaN if the sweep was interrupted.
        forward_passes: The same time in plain forward passes of the examples.
        auroc: Area under the ROC curve of the magnitudes against the planted heads, from 0 to 1.
        average_precision: Average precision of the magnitudes against the planted heads.
        refused: Why the method gave no scores, or None.
    """

    method: str
    description: str = ""
    spearman: float = math.nan
    pearson: float = math.nan
    signed: RankingCurve | None = None
    magnitude: RankingCurve | None = None
    seconds: float = math.nan
    forward_passes: float = math.nan
    auroc: float = math.nan
    average_precision: float = math.nan
    refused: str | None = None

    def __repr__(self) -> str:
        measures: tuple[Measure, ...] = (
            "spearman", "cpr", "cmd", "average_precision", "seconds",
        )  # fmt: skip
        known = {name: self.value(name) for name in measures}
        facts = [f"{name} {value:.3g}" for name, value in known.items() if not math.isnan(value)]
        return display.line(self, self.method, *facts, self.refused or "")

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row with the numbers of the method, NaN where there are none."""
        return pd.DataFrame([_row(self)])

    def _repr_html_(self) -> str:
        return display.html(f"{self.method}: {self.description}", self.to_dataframe())

    @checked_arguments
    def curve(self, by: Literal["signed", "magnitude"]) -> RankingCurve | None:
        """Return the curve of one ranking, or None if the method was refused.

        Args:
            by: The ranking, "signed" or "magnitude".

        Raises:
            InputError: The ranking is unknown.
        """
        return self.signed if by == "signed" else self.magnitude

    @checked_arguments
    def value(self, measure: Measure, by: Literal["signed", "magnitude"] | None = None) -> float:
        """Return one number by name.

        Args:
            measure: Name of the number, such as "spearman" or "cpr".
            by: The ranking of "cpr" and "cmd"; None takes the better of the two.

        Raises:
            InputError: The measure or the ranking is unknown.
        """
        if measure not in ("cpr", "cmd"):
            return float(getattr(self, measure))
        curves = [self.curve(each) for each in (RANKINGS if by is None else (by,))]
        areas = [getattr(curve, measure) for curve in curves if curve is not None]
        return float(_best_of(areas, measure)) if areas else math.nan


@dataclass(frozen=True, eq=False)
class Comparison(Saved):
    """Methods of scoring heads, compared on one model and task.

    Attributes:
        methods: One result per method.
        fractions: Shares of all heads at which rankings were measured.
        sizes: Number of heads at each fraction.
        random: Curves of random rankings.
        scored: Number of scored examples.
        held_out: Number of held-out examples.
        direction: Label-balanced mean task direction of the full model on the scored examples, in
            logits.
        full: The same on the held-out examples, in logits.
        empty: The same on the held-out examples with every head ablated, in logits.
        provenance: Model, examples and options of the comparison.
    """

    methods: tuple[MethodResult, ...]
    fractions: Annotated[tuple[float, ...], along("size")]
    sizes: Annotated[tuple[int, ...], along("size")]
    random: tuple[RankingCurve, ...] = field(repr=False)
    scored: int
    held_out: int
    direction: float
    full: float
    empty: float
    provenance: Provenance = field(repr=False)
    _format, _kind = "cdt_lens.comparison", "comparison"

    def __repr__(self) -> str:
        return display.line(self, self.model, self.task, display.few(self.names))

    @property
    def task(self) -> str:
        """Name of the scored examples."""
        return self.provenance.task

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.provenance.model

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the methods, in order."""
        return tuple(each.method for each in self.methods)

    def __getitem__(self, method: str) -> MethodResult:
        result = next((each for each in self.methods if each.method == method), None)
        if result is None:
            raise InputError(f"method {method!r}: expected one of {', '.join(self.names)}")
        return result

    @checked_arguments
    def best(
        self, measure: Measure, by: Literal["signed", "magnitude"] | None = None
    ) -> MethodResult | None:
        """Return the method with the best value, or None if nothing was measured.

        Args:
            measure: "spearman" or "pearson" (without the yardstick, whose value is 1 by
                definition), "cpr" or "cmd", "auroc", "average_precision", "seconds" or
                "forward_passes".
            by: The ranking of "cpr" and "cmd"; None takes the better of the two.

        Returns:
            The name of the method; of equal values the first.

        Raises:
            InputError: The measure or the ranking is unknown.
        """
        agreement = measure in ("spearman", "pearson")
        values = {
            each.method: each.value(measure, by)
            for each in self.methods
            if not (agreement and each.method == YARDSTICK)
        }
        known = {name: value for name, value in values.items() if not math.isnan(value)}
        if not known:
            return None
        best = _best_of(list(known.values()), measure)
        return self[next(name for name, value in known.items() if value == best)]

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per method with its numbers, NaN where there are none."""
        return pd.DataFrame([_row(each) for each in self.methods])

    def random_areas(self) -> dict[str, float]:
        """Return the median CPR and CMD of the random rankings."""
        return {
            name: statistics.median([getattr(c, name) for c in self.random] or [math.nan])
            for name in ("cpr", "cmd")
        }

    def table(self) -> pd.DataFrame:
        """Return the numbers as text, with `*` at the best of a column other than the yardstick."""
        return display.table(self).to_dataframe()

    def plot(self) -> Figure:
        """Draw faithfulness curves, CPR and CMD beside random rankings, and agreement by cost."""
        return display.figure(self)

    def _repr_html_(self) -> str:
        return display.page(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested values; unknown numbers are None."""
        return {
            "methods": [_without_nan(asdict(each)) for each in self.methods],
            "fractions": list(self.fractions),
            "sizes": list(self.sizes),
            "random": [asdict(each) for each in self.random],
            "scored": self.scored,
            "held_out": self.held_out,
            "direction": self.direction,
            "full": self.full,
            "empty": self.empty,
            "provenance": self.provenance.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """Return the comparison that `to_dict` converted."""
        _check_once("methods", [each["method"] for each in values["methods"]])
        return cls(
            methods=tuple(_method(each) for each in values["methods"]),
            fractions=tuple(values["fractions"]),
            sizes=tuple(values["sizes"]),
            random=tuple(_curve(each) for each in values["random"]),
            scored=values["scored"],
            held_out=values["held_out"],
            direction=values["direction"],
            full=values["full"],
            empty=values["empty"],
            provenance=Provenance.from_dict(values["provenance"]),
        )

    def _to_file(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        return self.to_dict(), {}

    @classmethod
    def _from_file(cls, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Comparison:
        return cls.from_dict(body)


def _row(result: MethodResult) -> dict[str, Any]:
    row: dict[str, Any] = {"method": result.method}
    row |= {"spearman": result.spearman, "pearson": result.pearson}
    for measure in ("cpr", "cmd"):
        row |= {f"{measure}_{by}": result.value(measure, by) for by in RANKINGS}
    row |= {name: getattr(result, name) for name in _NUMBERS[2:]}
    return row | {"refused": result.refused}


def _best_of(values: Sequence[float], measure: Measure) -> float:
    return max(values) if _BETTER[measure] > 0 else min(values)


def _check_once(what: str, names: Sequence[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{what}: {twice[0]!r} is given twice")


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    # JSON has no NaN.
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def _method(values: Mapping[str, Any]) -> MethodResult:
    given = dict(values)
    for name in _NUMBERS:
        given[name] = math.nan if given[name] is None else float(given[name])
    for by in RANKINGS:
        given[by] = None if given[by] is None else _curve(given[by])
    return MethodResult(**given)


def _curve(values: Mapping[str, Any]) -> RankingCurve:
    return RankingCurve(tuple(values["f"]), values["cpr"], values["cmd"])


@dataclass(frozen=True, eq=False)
class PlantedComparison(Saved):
    """Methods compared on planted circuits.

    Attributes:
        circuits: The comparison on each circuit, by its name.
        why: What is planted in each circuit, in words.
    """

    circuits: Mapping[str, Annotated[Comparison, own_axes]]
    why: Mapping[str, str] = field(default_factory=dict, repr=False)
    _format, _kind = "cdt_lens.planted_comparison", "comparison"

    def __repr__(self) -> str:
        return display.line(self, display.few(self.methods), f"on {display.few(self.circuits)}")

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods of all circuits, in order."""
        return tuple(dict.fromkeys(name for each in self.circuits.values() for name in each.names))

    @checked_arguments
    def matrix(self, measure: str = "average_precision") -> pd.DataFrame:
        """Return a measure by method (rows) and circuit (columns), NaN where it was refused.

        Args:
            measure: A column of `to_dataframe`.

        Raises:
            InputError: There is no such column.
        """
        frames = {
            name: each.to_dataframe().set_index("method") for name, each in self.circuits.items()
        }
        for frame in frames.values():
            if measure not in frame.columns:
                raise InputError(
                    f"measure {measure!r}: unknown{did_you_mean(measure, frame.columns)}; expected "
                    f"one of {', '.join(frame.columns)}"
                )
        columns = {name: frame[measure] for name, frame in frames.items()}
        return pd.DataFrame(columns, dtype=float).reindex(list(self.methods))

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per circuit and method, with every number."""
        parts = [each.to_dataframe().assign(circuit=name) for name, each in self.circuits.items()]
        rows = [row for part in parts for row in part.to_dict("records")]
        names = [c for c in (parts[0].columns if parts else ()) if c != "circuit"]
        return pd.DataFrame(rows, columns=["circuit", *names])

    @checked_arguments
    def table(self, measure: str = "average_precision") -> pd.DataFrame:
        """Return a measure as text, with `*` at the best of a circuit, and the mean over all."""
        return display.table(self, measure=measure).to_dataframe()

    def plot(self) -> Figure:
        """Draw AUROC and average precision of each method on each circuit."""
        return display.figure(self)

    def _repr_html_(self) -> str:
        return display.page(self)

    def _to_file(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        circuits = [{"name": name, **each.to_dict()} for name, each in self.circuits.items()]
        return {"circuits": circuits, "why": dict(self.why)}, {}

    @classmethod
    def _from_file(
        cls, body: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> PlantedComparison:
        _check_once("circuits", [each["name"] for each in body["circuits"]])
        return cls({v["name"]: Comparison.from_dict(v) for v in body["circuits"]}, body["why"])
