"""Mean-ablation experiments: the metric of a model in which only chosen heads are left.

m(C) is the metric with every head outside C set to its baseline, MLPs intact (MIB, arXiv
2504.13151). An ablated model is the irrelevant stream under the all-through rules, so the engine of
the decomposition runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from cdt_lens.circuits.measures import check_directions
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count, Empty, Metric
from cdt_lens.core.passes import Passes
from cdt_lens.core.processes import gather_items
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.decomposition.decompose import irrelevant_logits, layers_to_run
from cdt_lens.decomposition.empty_model import nothing_left
from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.decomposition.rules import PRESETS
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.tasks.intervals import ratio_effects
from cdt_lens.tasks.metrics import average, correct, label_numbers, task_direction
from cdt_lens.tasks.task import Batch, Examples, Task, check_examples


@checked_arguments
@uses_model
def circuit_metric(
    model: nn.Module | ModelView,
    circuits: Sequence[Iterable[Head | str]],
    examples: Examples,
    baseline: Baseline,
    *,
    metric: Metric = "direction",
    task: Task | None = None,
    batch_size: Count = 16,
    rows: Count | None = None,
    progress: bool = True,
) -> Float[Tensor, " circuit"]:
    """Compute m(C) of each circuit: the metric with every other head mean-ablated.

    Args:
        model: A TransformerLens model or its `ModelView`.
        circuits: The heads of each circuit, as `Head` or by name such as "L9H6", or a `Circuit` of
            this model.
        examples: The examples to measure on.
        baseline: The values that ablated heads take.
        metric: "direction", the label-balanced mean task direction; "accuracy", the share of right
            answers; or "balanced_accuracy", that share averaged over the labels. An answer is right
            if it is the best candidate (after the task's prior is subtracted, if it has one).
        task: Supplies the prior.
        batch_size: Number of examples per batch.
        rows: Maximum number of (circuit x example) rows per forward pass; None chooses it by the
            length of the prompts.
        progress: Whether to show a progress bar.

    Returns:
        m(C), in logits for "direction" and a share from 0 to 1 for the accuracies.

    Raises:
        InputError: There are no examples, the metric is unknown, or a head is outside the model.
        ArtifactError: The baseline or a circuit belongs to another model.
    """
    passes = Passes(batch_size, rows, progress)
    table, labels = _by_example(view_of(model), circuits, examples, baseline, metric, task, passes)
    return average(metric, table, labels)


def _by_example(
    view: ModelView,
    circuits: Sequence[Iterable[Head | str]],
    examples: Examples,
    baseline: Baseline,
    metric: Metric,
    task: Task | None,
    passes: Passes,
) -> tuple[Float[Tensor, "circuit example"], Int[Tensor, " example"]]:
    """Compute the metric of each circuit on each example, and the number of each label."""
    check_examples(view, examples)
    baseline.check_model(view)
    everyone = all_heads(view.n_layers, view.n_heads)
    kept = [set(view.heads(circuit)) for circuit in circuits]
    complements = [tuple(h for h in everyone if h not in inside) for inside in kept]
    batches = passes.batches(examples, view.longrope_limit)
    total = len(batches) * layers_to_run(complements, view.n_layers)
    with passes.bar(name="circuits", total=total) as bar:

        def measured(batch: Batch) -> Tensor:
            return _per_example(
                view, batch.to(view.device), complements, baseline, metric, task, passes.rows, bar
            )

        table = _gathered(batches, measured, len(examples))
    return table, label_numbers([e.label for e in examples], examples.labels)


def _gathered(
    batches: Sequence[Batch],
    measured: Callable[[Batch], Float[Tensor, "row example"]],
    n_examples: int,
) -> Float[Tensor, "row example"]:
    """Return the values of all batches, of all processes, in the order of the examples."""
    items: list[tuple[int, Tensor]] = []
    for batch in batches:
        values = measured(batch)
        items += [(index, values[:, row]) for row, index in enumerate(batch.index)]
    ordered = dict(gather_items(items))
    return torch.stack([ordered[i] for i in range(n_examples)], dim=-1).double()


def _per_example(
    view: ModelView,
    batch: Batch,
    complements: Sequence[tuple[Head, ...]],
    baseline: Baseline,
    metric: Metric,
    task: Task | None,
    rows: int | None,
    bar: tqdm,
) -> Float[Tensor, "circuit example"]:
    # An ablated model is the irrelevant stream under the all-through rules: what is left when
    # the complement's contribution is taken away.
    propagator = Propagator(
        view, batch.tokens, batch.lengths, baseline.for_batch(view, batch), PRESETS["ablation"],
        candidates=batch.candidates,
    )  # fmt: skip
    logits = irrelevant_logits(propagator, complements, batch, rows=rows, done=bar.update)
    return metric_values(logits, batch, metric, task).float().cpu()


def metric_values(
    logits: Float[Tensor, "circuit example k"], batch: Batch, metric: Metric, task: Task | None
) -> Float[Tensor, "circuit example"]:
    """Compute the metric of each example from the candidates' logits of ablated models.

    Args:
        logits: Logits of the candidates.
        batch: The examples.
        metric: Name of the metric, see `circuit_metric`.
        task: Supplies the prior, if it has one.

    Returns:
        The direction in logits, or 1 and 0 for right and wrong answers.
    """
    if metric == "direction":
        return task_direction(logits, batch.direction)
    prior = None if task is None or task.prior is None else task.candidate_prior(batch)
    right = correct(
        logits, batch.is_answer, batch.is_candidate, None if prior is None else prior.to(logits)
    )
    return right.to(logits)


def empty_metric(
    view: ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    metric: Metric = "direction",
    task: Task | None = None,
    passes: Passes,
) -> Float[Tensor, " example"]:
    """Compute the metric of the run in which heads, MLPs and the input take their baseline.

    Args:
        view: The model.
        examples: The examples to measure on.
        baseline: The baseline, with values for the MLPs and the input.
        metric: The metric.
        task: Supplies the prior, if it has one.
        passes: Sizes of the forward passes.

    Returns:
        The metric of each example, in logits, or 1 and 0 for right and wrong answers.

    Raises:
        InputError: The baseline has no values for the MLPs or the input; see `nothing_left`.
    """

    def measured(batch: Batch) -> Tensor:
        batch = batch.to(view.device)
        return (
            metric_values(nothing_left(view, batch, baseline)[None], batch, metric, task)
            .float()
            .cpu()
        )

    batches = passes.batches(examples, view.longrope_limit)
    return _gathered(batches, measured, len(examples))[0]


@dataclass(frozen=True, eq=False)
class Measurement:
    """The metric of different circuits on the same examples.

    Args:
        circuits: The heads of each circuit.
        table: The metric by circuit and example, in logits, or 1 and 0 for right and wrong answers.
        labels: Number of each example's label.
        metric: Name of the metric.
        replaced: The metric of each example where MLPs and input take their baseline as well, if
            this run counts as f = 0; None counts the circuit without heads as 0.
    """

    circuits: tuple[tuple[Head, ...], ...]
    table: Float[Tensor, "circuit example"]
    labels: Int[Tensor, " example"]
    metric: Metric
    replaced: Float[Tensor, " example"] | None = None

    @property
    def empty(self) -> Float[Tensor, " example"]:
        """The metric of each example in the run that counts as f = 0."""
        return self.table[self.circuits.index(())] if self.replaced is None else self.replaced

    @property
    def empty_mean(self) -> float:
        """The mean metric of the run that counts as f = 0, m(empty)."""
        return float(average(self.metric, self.empty, self.labels))

    def means(self) -> dict[tuple[Head, ...], float]:
        """Return m(C) by the heads of C."""
        found = average(self.metric, self.table, self.labels).tolist()
        return dict(zip(self.circuits, found, strict=True))

    def effects(
        self, circuits: Sequence[tuple[Head, ...]], full: tuple[Head, ...]
    ) -> Float[Tensor, "circuit example"]:
        """Return a value per example whose mean over examples is f of each circuit.

        Args:
            circuits: Measured circuits.
            full: All heads of the model.

        Returns:
            The values without unit (`intervals.ratio_effects`), to be averaged over `strata`.
        """
        row = {heads: self.table[number] for number, heads in enumerate(self.circuits)}
        own = torch.stack([row[heads] for heads in circuits]) - self.empty
        return ratio_effects(own, (row[full] - self.empty)[None], self.strata)

    @property
    def strata(self) -> Int[Tensor, " example"]:
        """The examples' labels if the metric is averaged over labels, else zeros."""
        return torch.zeros_like(self.labels) if self.metric == "accuracy" else self.labels


def measure_circuits(
    view: ModelView,
    circuits: Sequence[tuple[Head, ...]],
    examples: Examples,
    baseline: Baseline,
    *,
    metric: Metric = "direction",
    task: Task | None = None,
    empty: Empty = "heads",
    passes: Passes,
) -> Measurement:
    """Compute m(C) of each different circuit once; see `circuit_metric`.

    Args:
        view: The model.
        circuits: The heads of each circuit, in order.
        examples: The examples to measure on.
        baseline: The values that ablated heads take.
        metric: The metric.
        task: Supplies the prior, if it has one.
        empty: The run that counts as f = 0: "heads" ablates every head, "all" replaces the MLPs'
            outputs and the input as well.
        passes: Sizes of the forward passes.

    Returns:
        The metric by circuit and example.

    Raises:
        InputError: All heads and the empty run are measured, and differ only by rounding, or the
            baseline has no values for the empty run.
    """
    unique = tuple(dict.fromkeys(circuits))
    table, labels = _by_example(view, unique, examples, baseline, metric, task, passes)
    replaced = None
    if empty == "all":
        replaced = empty_metric(view, examples, baseline, metric=metric, task=task, passes=passes)
    measurement = Measurement(unique, table, labels, metric, replaced)
    everyone = all_heads(view.n_layers, view.n_heads)
    if metric == "direction" and everyone in unique and (() in unique or replaced is not None):
        check_directions(
            table[unique.index(everyone)], measurement.empty, measurement.means()[everyone],
            measurement.empty_mean, view.dtype,
        )  # fmt: skip
    return measurement
