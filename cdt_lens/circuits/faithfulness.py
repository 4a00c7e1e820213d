"""Faithfulness of circuits, by mean-ablation experiments (MIB, arXiv 2504.13151).

1. m(C) is the metric with every head outside C set to the baseline, MLPs intact.
2. f(C) = (m(C) - m(empty)) / (m(full) - m(empty)), over circuits of growing size.
3. Completeness is f of the complement: the circuit is ablated instead.
4. Controls of the same size: random heads, and random heads with as many in each layer.
5. CPR is the area under f, CMD the area under |1 - f|, over MIB's fractions.
6. m(empty) is the metric without heads, MLPs intact (`empty="heads"`), or that of a run whose MLPs
   and input take their baseline as well (`empty="all"`, as MIB's evaluation does). Every result
   names its choice, because the areas differ.

Scores should be fitted on one split and faithfulness measured on another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cdt_lens.circuits.ablation import measure_circuits
from cdt_lens.circuits.circuit import Circuit, random_heads, random_heads_like
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.circuits.measures import (
    AREAS,
    EMPTY_RUNS,
    MIB_FRACTIONS,
    Area,
    area,
    area_effects,
    cmd,
    cpr,
    faithfulness,
    heads_at,
)
from cdt_lens.core import display
from cdt_lens.core.axes import along
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import SEEDS, Count, Empty, Level, Metric, Ranking, Seed
from cdt_lens.core.equality import EqualByContent
from cdt_lens.core.errors import InputError
from cdt_lens.core.kept import as_json
from cdt_lens.core.passes import Passes
from cdt_lens.core.saved import Saved
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.provenance import Provenance, hashed_once, provenance_of
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.tasks.intervals import Interval, answers_interval, mean_interval
from cdt_lens.tasks.metrics import warn_at_chance
from cdt_lens.tasks.task import Examples, Task

CONTROLS = ("random", "random-per-layer")
Heads = tuple[Head, ...]


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve(Saved):
    """Faithfulness of circuits of growing size, beside random circuits.

    Args:
        sizes: Number of heads kept at each point.
        fractions: Shares of all heads that were asked for; the areas are taken over these.
        faithfulness: f of each circuit, without unit: 1 as the full model, 0 as the empty run.
        completeness: f of each complement.
        random: f of the random circuits by control.
        full: The metric with all heads, in logits or as a share from 0 to 1.
        empty: The metric of the run that counts as f = 0.
        metric: Name of the metric (`tasks.metrics`).
        cpr: Area under f.
        cmd: Area under |1 - f|.
        random_cpr: CPR of each draw by control.
        random_cmd: CMD of each draw by control.
        beaten: Share of the random circuits with a smaller f than the circuit's, by control; equal
            ones count half.
        provenance: Model, examples and options of the measurement.
        effects: For each example a value whose mean over `strata` is f, by size; None in files of
            earlier versions, which have no intervals.
        without_effects: The same for completeness.
        strata: Number of each example's label, or zeros where the metric is no mean over labels.
        empty_run: What the run replaces that counts as f = 0: "heads", or "all" for heads, MLPs
            and input. Files of earlier versions have "heads".
    """

    sizes: Annotated[tuple[int, ...], along("size")]
    fractions: Annotated[tuple[float, ...], along("size")]
    faithfulness: Float[Tensor, " size"]
    completeness: Float[Tensor, " size"]
    random: Mapping[str, Float[Tensor, "draw size"]] = field(repr=False)
    full: float
    empty: float
    metric: Metric
    cpr: float
    cmd: float
    random_cpr: Mapping[str, Float[Tensor, " draw"]] = field(repr=False)
    random_cmd: Mapping[str, Float[Tensor, " draw"]] = field(repr=False)
    beaten: Mapping[str, Float[Tensor, " size"]] = field(repr=False)
    provenance: Provenance = field(repr=False)
    effects: Float[Tensor, "size example"] | None = field(default=None, repr=False)
    without_effects: Float[Tensor, "size example"] | None = field(default=None, repr=False)
    strata: Int[Tensor, " example"] | None = field(default=None, repr=False)
    empty_run: Empty = "heads"
    # In files of version 1 "accuracy" is the label-balanced share of right answers. Those of
    # version 2 do not name the empty run.
    _format, _kind, _version = "cdt_lens.faithfulness", "faithfulness file", 3
    _name = "faithfulness.json"

    def __repr__(self) -> str:
        areas = f"CPR {self.cpr:.3f}", f"CMD {self.cmd:.3f}"
        run = f"f = 0: {EMPTY_RUNS[self.empty_run]}"
        return display.line(self, self.metric, *areas, f"{len(self.sizes)} sizes", run)

    @property
    def log_area(self) -> float:
        """The mean of f over sizes on a logarithmic axis, from the first size with a head."""
        return float(self.log_area_of(self.faithfulness))

    @checked_arguments
    def log_area_of(self, values: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows"]:
        """Return `log_area` of other values by size, such as those of random circuits.

        Args:
            values: f at each size.
        """
        return area("log_area", self.fractions, self.sizes, values)

    @checked_arguments
    def interval(self, level: Level = 0.95) -> Interval:
        """Return the confidence interval of f at each size, over the population of prompts.

        Args:
            level: Confidence level, above 0 and below 1.

        Returns:
            The lower and the upper limit without unit; NaN if the curve is of an earlier version
            or a label has a single example.
        """
        return self._interval(self.effects, self._defined(), level)

    @checked_arguments
    def completeness_interval(self, level: Level = 0.95) -> Interval:
        """Return the confidence interval of completeness at each size; see `interval`.

        Args:
            level: Confidence level, above 0 and below 1.
        """
        return self._interval(self.without_effects, self._defined(complement=True), level)

    @checked_arguments
    def area_intervals(self, level: Level = 0.95) -> dict[str, tuple[float, float]]:
        """Return the confidence intervals of CPR, CMD and `log_area`; see `interval`.

        Args:
            level: Confidence level, above 0 and below 1.

        Returns:
            The lower and the upper limit by "cpr", "cmd" and "log_area".
        """
        if self.effects is None or self.strata is None:
            return dict.fromkeys(AREAS, (math.nan, math.nan))
        measured = (~torch.tensor(self._defined())).double()
        gap = self.full - self.empty
        limits = {}
        for name in AREAS:
            values = area_effects(name, self.fractions, self.sizes, self.faithfulness, self.effects)
            # How much the area changes if f changes by 1 wherever it was measured.
            linear: Area = "cpr" if name == "cmd" else name
            step = float(area(linear, self.fractions, self.sizes, measured)) / gap
            low, high = (
                mean_interval(values, self.strata, level)
                if self.metric == "direction"
                else answers_interval(values, self.strata, step, level)
            )
            limits[str(name)] = float(low), float(high)
        return limits

    def _defined(self, *, complement: bool = False) -> list[bool]:
        """Return at which sizes f, or that of the complement, is 0 or 1 by its definition."""
        known = []
        for fraction, size in zip(self.fractions, self.sizes, strict=True):
            every, none = (size == 0, fraction == 1) if complement else (fraction == 1, size == 0)
            known.append(_is_defined(every, none, self.empty_run))
        return known

    def _interval(self, effects: Tensor | None, exact: Sequence[bool], level: float) -> Interval:
        if effects is None or self.strata is None:
            unknown = torch.full((len(self.sizes),), math.nan, dtype=torch.float64)
            return unknown, unknown
        return f_interval(effects, self.strata, self.metric, self.full - self.empty, exact, level)

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per size that keeps a head.

        Returns:
            f and completeness with their 95 % intervals, the median f of each control, and
            the name of the empty run.
        """
        low, high = self.interval()
        below, above = self.completeness_interval()
        table = {
            "heads": self.sizes,
            "fraction": self.fractions,
            "faithfulness": self.faithfulness.tolist(),
            "faithfulness low": low.tolist(),
            "faithfulness high": high.tolist(),
            "completeness": self.completeness.tolist(),
            "completeness low": below.tolist(),
            "completeness high": above.tolist(),
        }
        for name, values in self.random.items():
            table[f"{name} (median)"] = values.quantile(0.5, dim=0).tolist()
            table[f"beats {name}"] = self.beaten[name].tolist()
        frame = pd.DataFrame(table).assign(**{"empty run": self.empty_run})
        return frame[frame["heads"] > 0].reset_index(drop=True)

    def plot(self) -> display.Figure:
        """f over the share of heads kept, with the band of random circuits."""
        return display.figure(self)

    def _repr_html_(self) -> str:
        return display.page(self)

    def _to_file(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        body = {
            "sizes": list(self.sizes),
            "fractions": list(self.fractions),
            "full": self.full,
            "empty": self.empty,
            "metric": self.metric,
            "empty_run": self.empty_run,
            "controls": list(self.random),
            "provenance": self.provenance.to_dict(),
        }
        tensors = {
            "faithfulness": self.faithfulness, "completeness": self.completeness,
            "effects": self.effects, "without_effects": self.without_effects,
            "strata": self.strata,
        }  # fmt: skip
        known = {name: value for name, value in tensors.items() if value is not None}
        return body, known | {f"random.{name}": value for name, value in self.random.items()}

    @classmethod
    def _from_file(
        cls, body: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> FaithfulnessCurve:
        body = body if body["version"] > 1 else _renamed(body)
        return _curve(
            sizes=tuple(body["sizes"]),
            fractions=tuple(body["fractions"]),
            values=tensors["faithfulness"],
            completeness=tensors["completeness"],
            random={name: tensors[f"random.{name}"] for name in body["controls"]},
            full=body["full"],
            empty=body["empty"],
            metric=body["metric"],
            empty_run=body.get("empty_run", "heads"),
            provenance=Provenance.from_dict(body["provenance"]),
            **{name: tensors.get(name) for name in ("effects", "without_effects", "strata")},
        )


def _renamed(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the contents of a file of version 1 with the metric's present name."""
    if body["metric"] != "accuracy":
        return body
    provenance = body["provenance"]
    options = {**provenance["options"], "metric": "balanced_accuracy"}
    provenance = {**provenance, "options": options}
    return {**body, "metric": "balanced_accuracy", "provenance": provenance}


def _curve(
    *,
    sizes: tuple[int, ...],
    fractions: tuple[float, ...],
    values: Float[Tensor, " size"],
    random: Mapping[str, Float[Tensor, "draw size"]],
    **rest: Any,
) -> FaithfulnessCurve:
    """Return a curve with everything that follows from its points: areas and shares beaten."""
    return FaithfulnessCurve(
        sizes=sizes,
        fractions=fractions,
        faithfulness=values,
        random=random,
        cpr=float(cpr(fractions, values)),
        cmd=float(cmd(fractions, values)),
        random_cpr={name: cpr(fractions, value) for name, value in random.items()},
        random_cmd={name: cmd(fractions, value) for name, value in random.items()},
        beaten={name: _beaten(value, values) for name, value in random.items()},
        **rest,
    )


@dataclass(frozen=True, eq=False)
class CircuitFaithfulness(EqualByContent):
    """Faithfulness of one circuit, beside random circuits of its size.

    Args:
        heads: The heads of the circuit.
        faithfulness: f of the circuit, without unit: 1 as the full model, 0 as the empty run.
        completeness: f of the complement.
        random: f of the random circuits by control.
        beaten: Share of the random circuits with a smaller f, by control; equal ones count half.
        full: The metric with all heads, in logits or as a share from 0 to 1.
        empty: The metric of the run that counts as f = 0.
        metric: Name of the metric (`tasks.metrics`).
        provenance: Model, examples and options of the measurement.
        interval: 95 % confidence interval of f over the population of prompts.
        completeness_interval: The same of completeness.
        empty_run: What the run replaces that counts as f = 0; see `FaithfulnessCurve`.
    """

    heads: tuple[Head, ...]
    faithfulness: float
    completeness: float
    random: Mapping[str, Float[Tensor, " draw"]] = field(repr=False)
    beaten: Mapping[str, float]
    full: float
    empty: float
    metric: Metric
    provenance: Provenance = field(repr=False)
    interval: tuple[float, float] = (math.nan, math.nan)
    completeness_interval: tuple[float, float] = (math.nan, math.nan)
    empty_run: Empty = "heads"

    def __repr__(self) -> str:
        low, high = self.interval
        values = (
            f"f {self.faithfulness:.3f} [{low:.3f}, {high:.3f}]",
            f"completeness {self.completeness:.3f}",
            f"f = 0: {EMPTY_RUNS[self.empty_run]}",
        )
        return display.line(self, f"{len(self.heads)} heads", self.metric, *values)

    def to_dataframe(self) -> pd.DataFrame:
        """Return f of the circuit, of its complement and of its controls, and the shares beaten."""
        return faithfulness_frame(self)

    def _repr_html_(self) -> str:
        run = EMPTY_RUNS[self.empty_run]
        title = f"Faithfulness of {len(self.heads)} heads ({self.metric}; f = 0: {run})"
        return display.html(title, self.to_dataframe())


@checked_arguments
@uses_model
@hashed_once()
def faithfulness_curve(
    model: nn.Module | ModelView,
    scores: HeadScores,
    examples: Examples,
    baseline: Baseline,
    *,
    fractions: Sequence[float] = MIB_FRACTIONS,
    by: Ranking = "signed",
    metric: Metric = "direction",
    empty: Empty = "heads",
    draws: Count = 5,
    seed: Seed = 0,
    task: Task | None = None,
    batch_size: Count = 16,
    rows: Count | None = None,
    progress: bool = True,
) -> FaithfulnessCurve:
    """Measure f of the top heads of a ranking at growing sizes, and of random circuits.

    Args:
        model: A TransformerLens model or its `ModelView`.
        scores: Scores of all heads of this model.
        examples: The examples to measure on, other ones than those scored.
        baseline: The values that ablated heads take.
        fractions: Circuit sizes as rising shares of all heads, each rounded down to whole heads.
        by: Rank heads by their "signed" score or by its "magnitude".
        metric: "direction", "accuracy" or "balanced_accuracy"; see `circuit_metric`.
        empty: The run that counts as f = 0: "heads" ablates every head and leaves the MLPs intact;
            "all" replaces the MLPs' outputs and the input as well, as MIB's evaluation does. For
            "all" a mean baseline needs `mlps=True`.
        draws: Number of random circuits of each kind and size.
        seed: Seed of the draws; draw i uses seed + i.
        task: Supplies the prior for the accuracies, if it has one. Its valid and test splits are
            refused where they hold only training examples.
        batch_size: Number of examples per batch.
        rows: Maximum number of (circuit x example) rows per forward pass; None chooses it by the
            length of the prompts.
        progress: Whether to show a progress bar.

    Returns:
        f, completeness, controls and areas, without unit.

    Raises:
        InputError: The fractions are out of order or range, some heads have no score, or ablating
            every head does not change the metric.
        ArtifactError: The scores belong to another model.
    """
    view = view_of(model)
    scores.provenance.check_model(view, "this set of scores")
    fractions = checked_fractions(fractions)
    total = view.n_layers * view.n_heads
    ranking = scores.ranking(by)
    if len(ranking) < total:
        raise InputError(
            f"faithfulness_curve: only {len(ranking)} of {total} heads have scores; score all "
            "heads, or use circuit_faithfulness"
        )
    sizes = tuple(heads_at(fraction, total) for fraction in fractions)
    circuits = [tuple(sorted(ranking[:size])) for size in sizes]
    measured = _measure(
        view, circuits, examples, baseline, metric=metric, task=task, draws=draws, seed=seed,
        empty=empty, passes=Passes(batch_size, rows, progress),
    )  # fmt: skip
    origin = {
        "scores": scores.provenance.options,
        "scores_hash": scores.hash,
        "by": by,
    }
    return _curve(
        sizes=sizes,
        fractions=fractions,
        values=torch.tensor(measured.faithfulness),
        completeness=torch.tensor(measured.completeness),
        random=measured.random,
        full=measured.full,
        empty=measured.empty,
        metric=metric,
        provenance=_provenance(view, examples, baseline, origin, metric, empty, draws, seed),
        effects=measured.effects,
        without_effects=measured.without_effects,
        strata=measured.strata,
        empty_run=empty,
    )


def measured_for(curve: FaithfulnessCurve, scores: HeadScores) -> bool:
    """Return whether the circuits of a curve are the top heads of these scores.

    Args:
        curve: The curve of `faithfulness_curve`.
        scores: The scores. Those of another seed or estimate have other circuits.
    """
    options, made = curve.provenance.options, scores.provenance
    if "scores_hash" in options:
        return bool(options["scores_hash"] == scores.hash)
    # Files of 0.4 and earlier hold what the scores were made from. Scores that an upgrade made
    # again have the same, but are younger than the curve.
    same = as_json([options.get("scores"), options.get("scores_task")])
    later = curve.provenance.created >= made.created
    fits = curve.sizes[-1] <= scores.values.numel()
    return later and fits and bool(same == as_json([dict(made.options), made.task_hash]))


@checked_arguments
@uses_model
@hashed_once()
def circuit_faithfulness(
    model: nn.Module | ModelView,
    circuit: Circuit,
    examples: Examples,
    baseline: Baseline,
    *,
    metric: Metric = "direction",
    empty: Empty = "heads",
    draws: Count = 5,
    seed: Seed = 0,
    task: Task | None = None,
    batch_size: Count = 16,
    rows: Count | None = None,
    progress: bool = True,
) -> CircuitFaithfulness:
    """Measure f and completeness of one circuit, and f of random circuits of its size.

    Args:
        model: A TransformerLens model or its `ModelView`.
        circuit: A circuit of this model.
        examples: The examples to measure on, other ones than those scored.
        baseline: The values that ablated heads take.
        metric: "direction", "accuracy" or "balanced_accuracy"; see `circuit_metric`.
        empty: The run that counts as f = 0: "heads" ablates every head and leaves the MLPs intact;
            "all" replaces the MLPs' outputs and the input as well, as MIB's evaluation does. For
            "all" a mean baseline needs `mlps=True`.
        draws: Number of random circuits of each kind.
        seed: Seed of the draws; draw i uses seed + i.
        task: Supplies the prior for the accuracies, if it has one. Its valid and test splits are
            refused where they hold only training examples.
        batch_size: Number of examples per batch.
        rows: Maximum number of (circuit x example) rows per forward pass; None chooses it by the
            length of the prompts.
        progress: Whether to show a progress bar.

    Returns:
        f, completeness and controls, without unit.

    Raises:
        ArtifactError: The circuit was found in another model.
        InputError: There are no examples, or ablating every head does not change the metric.
    """
    view = view_of(model)
    circuit.check_model(view)
    measured = _measure(
        view, [circuit.heads], examples, baseline, metric=metric, task=task, draws=draws, seed=seed,
        empty=empty, passes=Passes(batch_size, rows, progress),
    )  # fmt: skip
    own = measured.faithfulness[0]
    random = {name: values[:, 0] for name, values in measured.random.items()}
    origin = {"circuit": [str(head) for head in circuit.heads]}
    kept = len(circuit.heads)
    none, every = kept == 0, kept == view.n_layers * view.n_heads

    def limits(effects: Float[Tensor, "1 example"], defined: bool) -> tuple[float, float]:
        gap = measured.full - measured.empty
        low, high = f_interval(effects, measured.strata, metric, gap, [defined])
        return float(low), float(high)

    return CircuitFaithfulness(
        heads=circuit.heads,
        faithfulness=own,
        completeness=measured.completeness[0],
        random=random,
        beaten={name: float(_beaten(values, own)) for name, values in random.items()},
        full=measured.full,
        empty=measured.empty,
        metric=metric,
        provenance=_provenance(view, examples, baseline, origin, metric, empty, draws, seed),
        interval=limits(measured.effects, _is_defined(every, none, empty)),
        completeness_interval=limits(measured.without_effects, _is_defined(none, every, empty)),
        empty_run=empty,
    )


@dataclass(frozen=True, eq=False)
class _Measured:
    """f of circuits, of their complements and of their controls, and the metric at both ends."""

    faithfulness: tuple[float, ...]
    completeness: tuple[float, ...]
    random: dict[str, Float[Tensor, "draw size"]]
    full: float
    empty: float
    effects: Float[Tensor, "circuit example"]
    without_effects: Float[Tensor, "circuit example"]
    strata: Int[Tensor, " example"]


def _measure(
    view: ModelView,
    circuits: Sequence[Heads],
    examples: Examples,
    baseline: Baseline,
    *,
    metric: Metric,
    task: Task | None,
    empty: Empty,
    draws: int,
    seed: int,
    passes: Passes,
) -> _Measured:
    """Measure circuits with their complements and random controls, each different one once."""
    for name in ("valid", "test"):
        if task is not None and examples.name == getattr(task, name).name:
            task.warn_unless_held_out(name)
    everyone = all_heads(view.n_layers, view.n_heads)
    families = [_family(heads, view, draws, seed) for heads in circuits]
    wanted = [everyone, (), *(heads for family in families for heads in family)]
    measurement = measure_circuits(
        view, wanted, examples, baseline, metric=metric, task=task, empty=empty, passes=passes
    )
    measured = measurement.means()
    full, nothing = measured[everyone], measurement.empty_mean
    warn_at_chance(examples.name, metric, full, examples.guess)
    # One row per member of a family: the circuit, its complement, then the draws of each control.
    own, without, *drawn = zip(
        *([f_of(measured[heads], full, nothing) for heads in family] for family in families),
        strict=True,
    )
    random = {
        name: torch.tensor(drawn[n * draws : (n + 1) * draws]) for n, name in enumerate(CONTROLS)
    }
    effects = measurement.effects(circuits, everyone)
    without_effects = measurement.effects([family[1] for family in families], everyone)
    return _Measured(
        own, without, random, full, nothing, effects, without_effects, measurement.strata
    )


def _provenance(
    view: ModelView,
    examples: Examples,
    baseline: Baseline,
    origin: Mapping[str, Any],
    metric: Metric,
    empty: Empty,
    draws: int,
    seed: int,
) -> Provenance:
    options = {
        **origin,
        "metric": metric,
        "empty": empty,
        "draws": draws,
        "baseline": baseline.kind,
        "baseline_hash": baseline.hash,
    }
    return provenance_of(view, examples, options=options, seed=seed)


def f_of(metric: float, full: float, empty: float) -> float:
    """Compute f of one circuit in double precision, so that it is exactly 1 for the full model.

    Args:
        metric: m(C) of the circuit.
        full: m with all heads.
        empty: m of the run that counts as 0.

    Raises:
        InputError: Ablating every head leaves the metric as it was.
    """
    return float(faithfulness(torch.tensor(metric, dtype=torch.float64), full, empty))


def _is_defined(every: bool, none: bool, empty: Empty) -> bool:
    """Return whether f is 0 or 1 by its definition.

    Args:
        every: Whether the run keeps all heads.
        none: Whether it keeps no head. Where another run counts as f = 0, its f is measured.
        empty: What the run replaces that counts as f = 0.
    """
    return every or (none and empty == "heads")


def f_interval(
    effects: Float[Tensor, "circuit example"],
    strata: Int[Tensor, " example"],
    metric: Metric,
    gap: float,
    exact: Sequence[bool],
    level: float = 0.95,
) -> Interval:
    """Compute the confidence interval of f of circuits over the population of prompts.

    Args:
        effects: The first-order effect of each prompt on f.
        strata: Number of each prompt's label, or zeros where the metric is no mean over labels.
        metric: The metric. Where no answer of the sample differs, an accuracy still may elsewhere.
        gap: m(full) - m(empty).
        exact: Whether f of a circuit is 0 or 1 by its definition: that of no head, or of all.
        level: Confidence level, above 0 and below 1.

    Returns:
        The lower and the upper limit of each circuit, without unit.
    """
    low, high = mean_interval(effects, strata, level)
    if metric == "direction":
        return low, high
    known, (below, above) = torch.tensor(exact), answers_interval(effects, strata, 1 / gap, level)
    return torch.where(known, low, below), torch.where(known, high, above)


def _beaten(random: Tensor, own: Tensor | float) -> Tensor:
    """Compute the share of random circuits with a smaller f; equal ones count half."""
    return ((random < own).float() + (random == own).float() / 2).mean(0)


def _family(heads: Heads, view: ModelView, draws: int, seed: int) -> list[Heads]:
    """Return a circuit, its complement, and its random controls, in that order."""
    shape = (view.n_layers, view.n_heads)
    complement = Circuit(heads, *shape).complement
    seeds = [(seed + i) % SEEDS for i in range(draws)]
    free = [random_heads(len(heads), *shape, seed=own) for own in seeds]
    layered = [random_heads_like(heads, *shape, seed=own) for own in seeds]
    return [heads, complement, *free, *layered]


def checked_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    """Return `fractions` as a tuple of at least two rising shares, each from 0 to 1.

    Raises:
        InputError: The fractions are fewer, out of order or out of range.
    """
    values = tuple(fractions)
    if (
        len(values) < 2
        or list(values) != sorted(set(values))
        or not 0 <= values[0] <= values[-1] <= 1
    ):
        raise InputError(f"fractions={values}: expected at least two, rising, each from 0 to 1")
    return values


def faithfulness_frame(result: CircuitFaithfulness) -> pd.DataFrame:
    """Return one row for the circuit, its complement and each control: f, and the share beaten.

    The column "empty run" names the run that counts as f = 0.
    """
    rows: list[tuple[str, float, float | None, float | None, float | None]] = [
        ("circuit", result.faithfulness, *result.interval, None),
        ("without the circuit", result.completeness, *result.completeness_interval, None),
    ]
    for name, draws in result.random.items():
        middle = float(draws.quantile(0.5))
        rows.append((f"{name} (median of {len(draws)})", middle, None, None, result.beaten[name]))
    frame = pd.DataFrame(rows, columns=["heads kept", "f", "low", "high", "beaten"])
    numbers = dict.fromkeys(["f", "low", "high", "beaten"], float)
    return frame.astype(numbers).assign(**{"empty run": result.empty_run})
