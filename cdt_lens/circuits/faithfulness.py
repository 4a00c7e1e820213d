"""Is a circuit enough, and is it needed? Mean-ablation experiments (method.md §6; MIB, 2504.13151).

1. m(C): the metric with every head outside C set to the baseline, MLPs intact.
2. f(C) = (m(C) - m(empty)) / (m(full) - m(empty)), over circuits of growing size.
3. Completeness is f of the complement: the circuit is knocked out instead.
4. Controls of the same size: random heads, and random heads with as many in each layer.
5. CPR is the area under f, CMD the area under |1 - f|, over MIB's fractions.

Scores should be fitted on one split and faithfulness measured on another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cdt_lens.circuits.ablation import Metric, measure_circuits
from cdt_lens.circuits.circuit import Circuit, random_heads, random_heads_like
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.circuits.measures import MIB_FRACTIONS, cmd, cpr, faithfulness
from cdt_lens.core import display
from cdt_lens.core.artifacts import load_artifact, save_artifact
from cdt_lens.core.errors import ArtifactError, InputError, expect
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.provenance import Provenance, provenance_of
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.tasks.task import Examples, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Ranking = Literal["magnitude", "signed"]
_FORMAT = "cdt_lens.faithfulness"
CONTROLS = ("random", "random-per-layer")


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve:
    """Faithfulness of circuits of growing size, beside random ones.

    sizes: heads kept; fractions: of all heads, as asked for (the areas use these);
    faithfulness: f, 1 = as the full model, 0 = as no heads; completeness: f of the complement;
    random: f of random circuits by control; beaten: share of them with a smaller f than the
    circuit's, equal ones counted half; full, empty: the metric with all heads and with none, in
    logits or as a share.
    """

    sizes: tuple[int, ...]
    fractions: tuple[float, ...]
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

    def __repr__(self) -> str:
        areas = f"CPR {self.cpr:.3f}", f"CMD {self.cmd:.3f}"
        return display.line(self, self.metric, *areas, f"{len(self.sizes)} sizes")

    def to_dataframe(self) -> pd.DataFrame:
        """One row a size: f, completeness, and the median f of each control (no unit)."""
        table = {
            "heads": self.sizes,
            "fraction": self.fractions,
            "faithfulness": self.faithfulness.tolist(),
            "completeness": self.completeness.tolist(),
        }
        for name, values in self.random.items():
            table[f"{name} (median)"] = values.quantile(0.5, dim=0).tolist()
            table[f"beats {name}"] = self.beaten[name].tolist()
        return pd.DataFrame(table)

    def plot(self) -> Figure:
        """f over the share of heads kept, with the band of random circuits."""
        return display.figure(self)

    def _repr_html_(self) -> str:
        return display.page(self)

    def save(self, path: str | Path) -> Path:
        """Save as JSON beside safetensors, whole or not at all."""
        body = {
            "sizes": list(self.sizes),
            "fractions": list(self.fractions),
            "full": self.full,
            "empty": self.empty,
            "metric": self.metric,
            "controls": list(self.random),
            "provenance": self.provenance.to_dict(),
        }
        tensors = {"faithfulness": self.faithfulness, "completeness": self.completeness}
        tensors |= {f"random.{name}": value for name, value in self.random.items()}
        return save_artifact(path, body, format=_FORMAT, version=1, tensors=tensors)

    @classmethod
    def load(cls, path: str | Path) -> FaithfulnessCurve:
        """Read what `save` wrote.

        Raises:
            InputError: no such file. ArtifactError: damaged, or another kind of file.
        """
        body, tensors = load_artifact(path, format=_FORMAT, version=1)
        try:
            return _curve(
                sizes=tuple(body["sizes"]),
                fractions=tuple(body["fractions"]),
                values=tensors["faithfulness"],
                completeness=tensors["completeness"],
                random={name: tensors[f"random.{name}"] for name in body["controls"]},
                full=body["full"],
                empty=body["empty"],
                metric=body["metric"],
                provenance=Provenance.from_dict(body["provenance"]),
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: not a whole faithfulness file ({error})") from error


def _curve(
    *,
    sizes: tuple[int, ...],
    fractions: tuple[float, ...],
    values: Float[Tensor, " size"],
    random: Mapping[str, Float[Tensor, "draw size"]],
    **rest: Any,
) -> FaithfulnessCurve:
    """A curve with everything that follows from its points: areas and shares beaten."""
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


@dataclass(frozen=True)
class CircuitFaithfulness:
    """Faithfulness of one given circuit, and the same-size random circuits beside it."""

    heads: tuple[Head, ...]
    faithfulness: float
    completeness: float
    random: Mapping[str, Float[Tensor, " draw"]] = field(repr=False)
    beaten: Mapping[str, float]
    full: float
    empty: float
    metric: Metric
    provenance: Provenance = field(repr=False)

    def __repr__(self) -> str:
        told = f"f {self.faithfulness:.3f}", f"completeness {self.completeness:.3f}"
        return display.line(self, f"{len(self.heads)} heads", self.metric, *told)

    def to_dataframe(self) -> pd.DataFrame:
        """f of the circuit, without it, and of its controls; shares of draws beaten, 0 to 1."""
        return faithfulness_frame(self)

    def _repr_html_(self) -> str:
        title = f"Faithfulness of {len(self.heads)} heads ({self.metric})"
        return display.html(title, self.to_dataframe())


def faithfulness_curve(
    model: nn.Module | ModelView,
    scores: HeadScores,
    examples: Examples,
    baseline: Baseline,
    *,
    fractions: Sequence[float] = MIB_FRACTIONS,
    by: Ranking = "signed",
    metric: Metric = "direction",
    draws: int = 5,
    seed: int = 0,
    task: Task | None = None,
    batch_size: int = 16,
    rows: int | None = None,
    progress: bool = True,
) -> FaithfulnessCurve:
    """Keep the top heads by score, ablate the rest, for each fraction; and random heads likewise.

    Args:
        by: rank heads by the "signed" score or by "magnitude"; draws: random circuits of each
            kind and size; seed: draw i of a size uses seed + i.

    Raises:
        InputError: fractions out of order or range, scores of another model's shape, or a metric
            that ablating every head does not change.
    """
    expect(scores, HeadScores, "faithfulness_curve", "for a circuit use circuit_faithfulness")
    view = view_of(model)
    scores.provenance.check_model(view, "these scores")
    _check_draws(draws)
    fractions = checked_fractions(fractions)
    everyone = all_heads(view.n_layers, view.n_heads)
    ranking = scores.ranking(by)
    if len(ranking) < len(everyone):
        raise InputError(
            f"faithfulness_curve: only {len(ranking)} of {len(everyone)} heads have scores; score "
            "all heads, or use circuit_faithfulness"
        )
    sizes = sizes_at(fractions, len(everyone))
    circuits = {size: tuple(sorted(ranking[:size])) for size in sizes}
    wanted: list[tuple[Head, ...]] = [everyone, ()]
    for size in dict.fromkeys(sizes):
        wanted += _family(circuits[size], view, draws, seed)
    measured = measure_circuits(
        view, wanted, examples, baseline, metric=metric, task=task, batch_size=batch_size,
        rows=rows, progress=progress,
    )  # fmt: skip
    full, empty = measured[everyone], measured[()]

    def f(heads: Sequence[Head]) -> float:
        return f_of(measured[tuple(heads)], full, empty)

    families = {size: _family(circuits[size], view, draws, seed) for size in sizes}
    values = torch.tensor([f(families[size][0]) for size in sizes])
    random = {
        name: torch.tensor(
            [[f(families[size][2 + n * draws + i]) for size in sizes] for i in range(draws)]
        ).reshape(draws, len(sizes))
        for n, name in enumerate(CONTROLS)
    }
    options = {
        "scores": scores.provenance.options,
        "scores_task": scores.provenance.task_hash,
        "by": by,
        "metric": metric,
        "draws": draws,
        "baseline": baseline.kind,
        "baseline_hash": baseline.hash,
    }
    return _curve(
        sizes=sizes,
        fractions=fractions,
        values=values,
        completeness=torch.tensor([f(families[size][1]) for size in sizes]),
        random=random,
        full=full,
        empty=empty,
        metric=metric,
        provenance=provenance_of(view, examples, options=options, seed=seed),
    )


def circuit_faithfulness(
    model: nn.Module | ModelView,
    circuit: Circuit,
    examples: Examples,
    baseline: Baseline,
    *,
    metric: Metric = "direction",
    draws: int = 5,
    seed: int = 0,
    task: Task | None = None,
    batch_size: int = 16,
    rows: int | None = None,
    progress: bool = True,
) -> CircuitFaithfulness:
    """Faithfulness and completeness of one circuit, against random circuits of its size.

    Raises:
        ArtifactError: the circuit was found in another model.
        InputError: no examples, or a metric that ablating every head does not change.
    """
    fix = "scores.select(...) makes one, and so does Circuit(heads, n_layers, n_heads)"
    expect(circuit, Circuit, "circuit_faithfulness", fix)
    view = view_of(model)
    circuit.check_model(view)
    _check_draws(draws)
    everyone = all_heads(view.n_layers, view.n_heads)
    family = _family(circuit.heads, view, draws, seed)
    options = {
        "circuit": [str(head) for head in circuit.heads],
        "metric": metric,
        "draws": draws,
        "baseline": baseline.kind,
        "baseline_hash": baseline.hash,
    }
    wanted = [everyone, (), *family]
    measured = measure_circuits(
        view, wanted, examples, baseline, metric=metric, task=task, batch_size=batch_size,
        rows=rows, progress=progress,
    )  # fmt: skip
    full, empty = measured[everyone], measured[()]

    def f(heads: tuple[Head, ...]) -> float:
        return f_of(measured[heads], full, empty)

    own = f(family[0])
    random = {
        name: torch.tensor([f(h) for h in family[2 + n * draws : 2 + (n + 1) * draws]])
        for n, name in enumerate(CONTROLS)
    }
    return CircuitFaithfulness(
        heads=circuit.heads,
        faithfulness=own,
        completeness=f(family[1]),
        random=random,
        beaten={name: float(_beaten(value, own)) for name, value in random.items()},
        full=full,
        empty=empty,
        metric=metric,
        provenance=provenance_of(view, examples, options=options, seed=seed),
    )


def f_of(metric: float, full: float, empty: float) -> float:
    """f of one circuit, in double precision: 1 exactly for the full model."""
    return float(faithfulness(torch.tensor(metric, dtype=torch.float64), full, empty))


def _beaten(random: Tensor, own: Tensor | float) -> Tensor:
    """Share of random circuits with a smaller f than the circuit's; equal ones count half."""
    return ((random < own).float() + (random == own).float() / 2).mean(0)


def _family(
    heads: tuple[Head, ...], view: ModelView, draws: int, seed: int
) -> list[tuple[Head, ...]]:
    """A circuit, its complement, and its random controls, in that order."""
    shape = (view.n_layers, view.n_heads)
    inside = set(heads)
    complement = tuple(h for h in all_heads(*shape) if h not in inside)
    free = [random_heads(len(heads), *shape, seed=seed + i) for i in range(draws)]
    layered = [random_heads_like(heads, *shape, seed=seed + i) for i in range(draws)]
    return [heads, complement, *free, *layered]


def _check_draws(draws: int) -> None:
    if draws < 1:
        raise InputError(f"draws={draws}: expected at least 1 random circuit of each kind")


def sizes_at(fractions: Sequence[float], n_heads: int) -> tuple[int, ...]:
    """Heads kept at each fraction of `n_heads`, rounded down."""
    return tuple(min(n_heads, int(fraction * n_heads + 1e-9)) for fraction in fractions)


def checked_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    """At least two fractions, rising, each from 0 to 1; raises InputError for anything else."""
    values = tuple(float(x) for x in fractions)
    if (
        len(values) < 2
        or list(values) != sorted(set(values))
        or not 0 <= values[0] <= values[-1] <= 1
    ):
        raise InputError(f"fractions={values}: expected at least two, rising, each from 0 to 1")
    return values


def faithfulness_frame(result: CircuitFaithfulness) -> pd.DataFrame:
    """The circuit, its complement and each control: f, and the share of draws beaten."""
    rows: list[tuple[str, float, float | None]] = [
        ("circuit", result.faithfulness, None),
        ("without the circuit", result.completeness, None),
    ]
    rows += [
        (f"{name} (median of {len(draws)})", float(draws.quantile(0.5)), result.beaten[name])
        for name, draws in result.random.items()
    ]
    frame = pd.DataFrame(rows, columns=["heads kept", "f", "beaten"])
    return frame.astype({"f": float, "beaten": float})
