"""Mean-ablation experiments: the metric of a model in which only chosen heads are left.

m(C) is the metric with every head outside C set to its baseline, MLPs intact (MIB, arXiv
2504.13151). An ablated model is the irrelevant stream under the all-through rules, so the engine of
the decomposition runs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from cdt_lens.circuits.measures import check_gap
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count, Metric
from cdt_lens.core.passes import Passes
from cdt_lens.core.processes import gather_items
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.decomposition.decompose import irrelevant_logits
from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.decomposition.rules import PRESETS
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.tasks.intervals import ratio_effects
from cdt_lens.tasks.metrics import average, correct, label_numbers, task_direction
from cdt_lens.tasks.task import Batch, Examples, Task, check_examples

# Of the size of the task direction: what float32 leaves where ablation changes nothing.
_ROUNDING = 1e-4


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
    items: list[tuple[int, Tensor]] = []
    with passes.bar(name="circuits", total=len(batches) * len(circuits)) as bar:
        for batch in batches:
            values = _per_example(
                view, batch.to(view.device), complements, baseline, metric, task, passes.rows, bar
            )
            items += [(index, values[:, row]) for row, index in enumerate(batch.index)]
    ordered = dict(gather_items(items))
    table = torch.stack([ordered[i] for i in range(len(examples))], dim=-1)
    return table.double(), label_numbers([e.label for e in examples], examples.labels)


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
        view, batch.tokens, batch.lengths, baseline.for_batch(view, batch), PRESETS["ablation"]
    )
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


@dataclass(frozen=True, eq=False)
class Measurement:
    """The metric of different circuits on the same examples.

    Args:
        circuits: The heads of each circuit.
        table: The metric by circuit and example, in logits, or 1 and 0 for right and wrong answers.
        labels: Number of each example's label.
        metric: Name of the metric.
    """

    circuits: tuple[tuple[Head, ...], ...]
    table: Float[Tensor, "circuit example"]
    labels: Int[Tensor, " example"]
    metric: Metric

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
        own = torch.stack([row[heads] for heads in circuits]) - row[()]
        return ratio_effects(own, (row[full] - row[()])[None], self.strata)

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
        passes: Sizes of the forward passes.

    Returns:
        The metric by circuit and example.

    Raises:
        InputError: All heads and none are among the circuits, and differ only by rounding.
    """
    unique = tuple(dict.fromkeys(circuits))
    table, labels = _by_example(view, unique, examples, baseline, metric, task, passes)
    measurement = Measurement(unique, table, labels, metric)
    everyone = all_heads(view.n_layers, view.n_heads)
    if metric == "direction" and everyone in unique and () in unique:
        # Means may cancel, so rounding is judged by the size of the examples' own values.
        ends = table[[unique.index(everyone), unique.index(())]]
        share = max(_ROUNDING, 4 * torch.finfo(view.dtype).eps)
        values = measurement.means()
        check_gap(values[everyone], values[()], share * float(ends.abs().max(0).values.mean()))
    return measurement
