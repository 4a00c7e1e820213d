"""`Comparison`: methods of scoring heads side by side, on one model and one task.

1. Every method scores all heads: on the same examples, or on as many as it pays for at equal cost.
2. Agreement: rank and linear correlation with exact mean-ablation of single heads, the yardstick.
3. Use: the top heads are kept and the rest mean-ablated on held-out examples; f over the share of
   heads kept gives CPR and CMD (MIB, arXiv 2504.13151) and an area on a logarithmic axis, ranking
   by the score and by its magnitude. Intervals are over the held-out examples, and differences of
   two methods are paired.
4. Cost: seconds, and these as a multiple of one plain forward pass of the scored examples.
5. Truth, where a circuit was planted: AUROC and average precision of the magnitudes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cdt_lens.circuits.measures import AREAS, EMPTY_RUNS, area, area_effects
from cdt_lens.core import display
from cdt_lens.core.axes import along, own_axes
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Area, Empty, Level, Ranking
from cdt_lens.core.equality import EqualByContent
from cdt_lens.core.errors import InputError, did_you_mean
from cdt_lens.core.saved import Saved
from cdt_lens.models.provenance import Provenance
from cdt_lens.tasks.intervals import mean_interval

YARDSTICK = "exact"  # the method that the others' scores are compared with
RANKINGS: tuple[Ranking, ...] = get_args(Ranking)
# Whether a measure is better when large (+1) or small (-1).
Measure = Literal[
    "spearman", "pearson", "cpr", "cmd", "log_area", "auroc", "average_precision", "seconds",
    "forward_passes",
]  # fmt: skip
_BETTER: Mapping[Measure, int] = {
    "spearman": 1, "pearson": 1, "cpr": 1, "cmd": -1, "log_area": 1, "auroc": 1,
    "average_precision": 1, "seconds": -1, "forward_passes": -1,
}  # fmt: skip
_NUMBERS = ("spearman", "pearson", "seconds", "forward_passes", "auroc", "average_precision")


@dataclass(frozen=True, eq=False)
class RankingCurve(EqualByContent):
    """Faithfulness of the top heads of one ranking.

    Attributes:
        f: f at each size, without unit: 1 as the full model, 0 as the empty run.
        cpr: Area under f.
        cmd: Area under |1 - f|.
        log_area: Mean of f over sizes on a logarithmic axis, from the first size with a head.
        effects: For each held-out example a value whose mean over `Comparison.strata` is f, by
            size; None in files of earlier versions, which have no intervals.
    """

    f: Annotated[tuple[float, ...], along("size")] = field(repr=False)
    cpr: float
    cmd: float
    log_area: float = math.nan
    effects: Float[Tensor, "size example"] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        fractions: Sequence[float],
        sizes: Sequence[int],
        f: Sequence[float],
        effects: Float[Tensor, "size example"] | None = None,
    ) -> RankingCurve:
        """Return the curve through `f`.

        Args:
            fractions: Shares of all heads.
            sizes: Number of heads at each share.
            f: f at each share.
            effects: The values per example, by share.
        """
        values = torch.tensor(f, dtype=torch.float64)
        areas = {name: float(area(name, fractions, sizes, values)) for name in AREAS}
        return cls(tuple(f), **areas, effects=effects)


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
        scored: Number of examples that the method scored; None if it was refused.
        exact: Number of these that it swept to correct first-order scores; None if it corrects
            none.
        empty_run: What the run replaces that counts as f = 0; see `Comparison`.
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
    scored: int | None = None
    exact: int | None = None
    empty_run: Empty = "heads"

    def __repr__(self) -> str:
        measures: tuple[Measure, ...] = (
            "spearman", "cpr", "cmd", "average_precision", "seconds",
        )  # fmt: skip
        known = {name: self.value(name) for name in measures}
        facts = [f"{name} {value:.3g}" for name, value in known.items() if not math.isnan(value)]
        run = "" if self.signed is None else f"f = 0: {EMPTY_RUNS[self.empty_run]}"
        return display.line(self, self.method, *facts, run, self.refused or "")

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row with the numbers of the method, NaN where there are none."""
        return pd.DataFrame([_row(self)])

    def _repr_html_(self) -> str:
        return display.html(f"{self.method}: {self.description}", self.to_dataframe())

    @checked_arguments
    def curve(self, by: Ranking) -> RankingCurve | None:
        """Return the curve of one ranking, or None if the method was refused.

        Args:
            by: The ranking, "signed" or "magnitude".

        Raises:
            InputError: The ranking is unknown.
        """
        return self.signed if by == "signed" else self.magnitude

    @checked_arguments
    def value(self, measure: Measure, by: Ranking | None = None) -> float:
        """Return one number by name.

        Args:
            measure: Name of the number, such as "spearman" or "cpr".
            by: The ranking of "cpr", "cmd" and "log_area"; None takes the better of the two.

        Raises:
            InputError: The measure or the ranking is unknown.
        """
        if measure not in AREAS:
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
        scored: Number of examples to score; with a budget, the most that a method scores.
        held_out: Number of held-out examples.
        direction: Label-balanced mean task direction of the full model on the examples that the
            yardstick scores, in logits.
        full: The same on the held-out examples, in logits.
        empty: The same on the held-out examples in the run that counts as f = 0, in logits.
        provenance: Model, examples and options of the comparison.
        budget: Forward passes of one example that each method may use; None if every method scores
            all examples.
        strata: Number of each held-out example's label; None in files of earlier versions.
        empty_run: What the run replaces that counts as f = 0: "heads", or "all" for heads, MLPs
            and input (`faithfulness_curve`). Files of earlier versions have "heads".
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
    budget: float | None = None
    strata: Int[Tensor, " example"] | None = field(default=None, repr=False)
    empty_run: Empty = "heads"
    # Files of version 1 hold neither values per example nor a budget, those of version 2 no name
    # of the empty run.
    _format, _kind, _version = "cdt_lens.comparison", "comparison", 3
    _name = "comparison.json"

    def __repr__(self) -> str:
        run = f"f = 0: {EMPTY_RUNS[self.empty_run]}"
        return display.line(self, self.model, self.task, display.few(self.names), run)

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
    def best(self, measure: Measure, by: Ranking | None = None) -> MethodResult | None:
        """Return the method with the best value, or None if nothing was measured.

        Args:
            measure: "spearman" or "pearson" (without the yardstick, whose value is 1 by
                definition), "cpr", "cmd" or "log_area", "auroc", "average_precision", "seconds" or
                "forward_passes".
            by: The ranking of "cpr", "cmd" and "log_area"; None takes the better of the two.

        Returns:
            The result of the method, whose name is `method`; of equal values the first.

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
        """Return the median CPR, CMD and `log_area` of the random rankings."""
        return {
            name: statistics.median([getattr(c, name) for c in self.random] or [math.nan])
            for name in AREAS
        }

    @checked_arguments
    def faithfulness(self, level: Level = 0.95) -> pd.DataFrame:
        """Return f of every ranking at each size that keeps a head.

        Args:
            level: Level of the confidence intervals over the population of prompts.

        Returns:
            One row per method, ranking and size: `method`, `by`, `heads`, `fraction`, `f`, and the
            limits `low` and `high`, without unit; NaN in files of earlier versions. `empty_run`
            names the run that counts as f = 0.
        """
        rows = []
        for method, by, curve in self._curves():
            limits = self._limits(curve.effects, level, len(curve.f))
            rows += [
                (method, by, *point)
                for point in zip(self.sizes, self.fractions, curve.f, *limits, strict=True)
                if point[0]
            ]
        columns = ["method", "by", "heads", "fraction", "f", "low", "high"]
        return pd.DataFrame(rows, columns=columns).assign(empty_run=self.empty_run)

    @checked_arguments
    def areas(self, level: Level = 0.95) -> pd.DataFrame:
        """Return CPR, CMD and `log_area` of every ranking.

        Args:
            level: Level of the confidence intervals over the population of prompts.

        Returns:
            One row per method, ranking and area: `method`, `by`, `area`, `value`, and the limits
            `low` and `high`, without unit; NaN in files of earlier versions. `empty_run` names the
            run that counts as f = 0.
        """
        rows = []
        for method, by, curve in self._curves():
            for name in AREAS:
                ((low,), (high,)) = self._limits(self._by_example(curve, name), level)
                rows.append((method, by, name, getattr(curve, name), low, high))
        columns = ["method", "by", "area", "value", "low", "high"]
        return pd.DataFrame(rows, columns=columns).assign(empty_run=self.empty_run)

    @checked_arguments
    def differences(
        self,
        measure: Area = "log_area",
        by: Ranking = "signed",
        reference: str | None = None,
        level: Level = 0.95,
    ) -> pd.DataFrame:
        """Compare an area of every method with that of a reference, prompt by prompt.

        The circuits of both are measured on the same held-out prompts, so that the spread of the
        difference is that of the differences per prompt.

        Args:
            measure: The area: "cpr", "cmd" or "log_area".
            by: Rank heads by their "signed" score or by its "magnitude".
            reference: Name of a method. None takes the best, whose lead is then a little too large:
                it was chosen on the same prompts.
            level: Level of the confidence intervals over the population of prompts.

        Returns:
            One row per other method: `method`, `reference`, `difference` of the areas (method minus
            reference, without unit), its limits `low` and `high`, whether these leave 0 out
            (`real`), and the name of the run that counts as f = 0 (`empty_run`).

        Raises:
            InputError: There is no such method, or it was refused.
        """
        columns = ["method", "reference", "difference", "low", "high", "real"]
        name, base = self._reference(measure, by, reference)
        rows = []
        for each in self.methods:
            own = each.curve(by)
            if own is not None and base is not None and each.method != name:
                found = self._difference(own, base, measure, level)
                rows.append((each.method, name, *found))
        return pd.DataFrame(rows, columns=columns).assign(empty_run=self.empty_run)

    def _curves(self) -> Iterator[tuple[str, Ranking, RankingCurve]]:
        for each in self.methods:
            for by in RANKINGS:
                curve = each.curve(by)
                if curve is not None:
                    yield each.method, by, curve

    def _limits(
        self, values: Float[Tensor, "row example"] | None, level: float, rows: int = 1
    ) -> tuple[list[float], list[float]]:
        """Return the limits of each row; NaN where the values per example are not known."""
        if values is None or self.strata is None:
            return [math.nan] * rows, [math.nan] * rows
        low, high = mean_interval(values, self.strata, level)
        return low.tolist(), high.tolist()

    def _reference(
        self, measure: Area, by: Ranking, name: str | None
    ) -> tuple[str, RankingCurve | None]:
        """Return the method that others are compared with; no curve if nothing was measured."""
        chosen = self.best(measure, by) if name is None else self[name]
        curve = None if chosen is None else chosen.curve(by)
        if name is not None and curve is None:
            raise InputError(
                f"reference {name!r}: this method was refused, so it has no areas; name another one"
            )
        return ("" if chosen is None else chosen.method), curve

    def _difference(
        self, own: RankingCurve, base: RankingCurve, name: Area, level: float
    ) -> tuple[float, float, float, bool]:
        """Return the difference of an area, its limits, and whether these leave 0 out."""
        one, other = self._by_example(own, name), self._by_example(base, name)
        known = None if one is None or other is None else one - other
        ((low,), (high,)) = self._limits(known, level)
        return getattr(own, name) - getattr(base, name), low, high, low > 0 or high < 0

    def _by_example(self, curve: RankingCurve, name: Area) -> Float[Tensor, "1 example"] | None:
        if curve.effects is None:
            return None
        f = torch.tensor(curve.f, dtype=torch.float64)
        return area_effects(name, self.fractions, self.sizes, f, curve.effects)[None]

    def table(self) -> pd.DataFrame:
        """Return the numbers as text, with `*` at the best of a column other than the yardstick."""
        return display.table(self).to_dataframe()

    def plot(self) -> display.Figure:
        """Draw faithfulness curves, CPR and CMD beside random rankings, and agreement by cost."""
        return display.figure(self)

    def _repr_html_(self) -> str:
        return display.page(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested values; unknown numbers are None."""
        return {
            "methods": [_plain(each) for each in self.methods],
            "fractions": list(self.fractions),
            "sizes": list(self.sizes),
            "random": [_plain(each) for each in self.random],
            "scored": self.scored,
            "held_out": self.held_out,
            "direction": self.direction,
            "full": self.full,
            "empty": self.empty,
            "provenance": self.provenance.to_dict(),
            "budget": self.budget,
            "empty_run": self.empty_run,
        }

    def _tensors(self) -> dict[str, Tensor]:
        """Return the values per example by name, which `to_dict` leaves out."""
        curves = {
            f"methods.{number}.{by}": each.curve(by)
            for number, each in enumerate(self.methods)
            for by in RANKINGS
        }
        curves |= {f"random.{number}": curve for number, curve in enumerate(self.random)}
        values = {name: None if curve is None else curve.effects for name, curve in curves.items()}
        known = {name: value for name, value in values.items() if value is not None}
        return known if self.strata is None else known | {"strata": self.strata}

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> Comparison:
        """Return the comparison that `to_dict` converted.

        Args:
            values: The plain values.
            tensors: The values per example by name; without them intervals are not known.
        """
        _check_once("methods", [each["method"] for each in values["methods"]])
        tensors = tensors or {}
        axis = values["fractions"], values["sizes"]
        return cls(
            methods=tuple(
                _method(each, values["scored"], f"methods.{number}", axis, tensors)
                for number, each in enumerate(values["methods"])
            ),
            fractions=tuple(values["fractions"]),
            sizes=tuple(values["sizes"]),
            random=tuple(
                _curve(each, axis, tensors.get(f"random.{number}"))
                for number, each in enumerate(values["random"])
            ),
            scored=values["scored"],
            held_out=values["held_out"],
            direction=values["direction"],
            full=values["full"],
            empty=values["empty"],
            provenance=Provenance.from_dict(values["provenance"]),
            budget=values.get("budget"),
            strata=tensors.get("strata"),
            empty_run=values.get("empty_run", "heads"),
        )

    def _to_file(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        return self.to_dict(), self._tensors()

    @classmethod
    def _from_file(cls, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Comparison:
        return cls.from_dict(body, tensors)


def _row(result: MethodResult) -> dict[str, Any]:
    row: dict[str, Any] = {"method": result.method}
    row |= {"spearman": result.spearman, "pearson": result.pearson}
    for measure in AREAS:
        row |= {f"{measure}_{by}": result.value(measure, by) for by in RANKINGS}
    row |= {name: getattr(result, name) for name in _NUMBERS[2:]}
    row |= {"scored": result.scored, "exact": result.exact, "refused": result.refused}
    return row | {"empty_run": result.empty_run}


def _best_of(values: Sequence[float], measure: Measure) -> float:
    return max(values) if _BETTER[measure] > 0 else min(values)


def _check_once(what: str, names: Sequence[str]) -> None:
    twice = [name for name in names if names.count(name) > 1]
    if twice or not names:
        how = f"{twice[0]!r} is given twice" if twice else "there is none"
        raise ValueError(f"{what}: {how}; expected at least one, each once")


def _plain(value: Any) -> Any:
    """Return a value as JSON, without the tensors in it."""
    if isinstance(value, MethodResult | RankingCurve):
        own = {item.name: getattr(value, item.name) for item in fields(value)}
        return {name: _plain(v) for name, v in own.items() if name != "effects"}
    # JSON has no NaN.
    return None if isinstance(value, float) and math.isnan(value) else value


# Shares of all heads, and the number of heads at each.
_Axis = tuple[Sequence[float], Sequence[int]]


def _method(
    values: Mapping[str, Any], scored: int, prefix: str, axis: _Axis, tensors: Mapping[str, Tensor]
) -> MethodResult:
    # In files of earlier versions every method scored the same examples.
    given = {"scored": None if values["refused"] else scored, **values}
    for name in _NUMBERS:
        given[name] = math.nan if given[name] is None else float(given[name])
    for by in RANKINGS:
        effects = tensors.get(f"{prefix}.{by}")
        given[by] = None if given[by] is None else _curve(given[by], axis, effects)
    return MethodResult(**given)


def _curve(values: Mapping[str, Any], axis: _Axis, effects: Tensor | None) -> RankingCurve:
    # Files of earlier versions hold no area on the logarithmic axis.
    log_area = RankingCurve.of(*axis, values["f"]).log_area
    return RankingCurve(tuple(values["f"]), values["cpr"], values["cmd"], log_area, effects)


@dataclass(frozen=True, eq=False)
class PlantedComparison(Saved):
    """Methods compared on planted circuits.

    Attributes:
        circuits: The comparison on each circuit, by its name.
        why: What is planted in each circuit, in words.
    """

    circuits: Mapping[str, Annotated[Comparison, own_axes]]
    why: Mapping[str, str] = field(default_factory=dict, repr=False)
    _format, _kind, _version = "cdt_lens.planted_comparison", "comparison", 3

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
            measure: A column of `to_dataframe` that holds numbers.

        Raises:
            InputError: There is no such column, or it holds text.
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
        try:
            return pd.DataFrame(columns, dtype=float).reindex(list(self.methods))
        except ValueError as error:
            raise InputError(
                f"measure {measure!r}: expected a column of numbers, got text"
            ) from error

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

    def plot(self) -> display.Figure:
        """Draw AUROC and average precision of each method on each circuit."""
        return display.figure(self)

    def _repr_html_(self) -> str:
        return display.page(self)

    def _to_file(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        circuits = [{"name": name, **each.to_dict()} for name, each in self.circuits.items()]
        tensors = {
            f"{circuit}.{name}": value
            for circuit, each in self.circuits.items()
            for name, value in each._tensors().items()
        }
        return {"circuits": circuits, "why": dict(self.why)}, tensors

    @classmethod
    def _from_file(
        cls, body: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> PlantedComparison:
        _check_once("circuits", [each["name"] for each in body["circuits"]])
        circuits = {
            each["name"]: Comparison.from_dict(each, _below(each["name"], tensors))
            for each in body["circuits"]
        }
        return cls(circuits, body["why"])


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix and a dot, by the rest of their names."""
    start = f"{prefix}."
    return {name[len(start) :]: v for name, v in tensors.items() if name.startswith(start)}
