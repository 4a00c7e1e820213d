"""Evaluation of a model on a task: accuracy, macro-F1, mean direction, loss; label priors.

A zero-shot model prefers some labels whatever the text says. The prior of a label is its mean
logit on content-free prompts ("N/A", "", "[MASK]"; contextual calibration, arXiv 2102.09690). An
answer is right if its logit minus its prior is the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor, nn

from cdt_lens.core import display
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count
from cdt_lens.core.equality import EqualByContent
from cdt_lens.core.errors import InputError, NonFiniteError
from cdt_lens.core.passes import Passes
from cdt_lens.core.processes import gather_items
from cdt_lens.models.session import uses_model
from cdt_lens.models.support import check_caller_hooks, check_supported
from cdt_lens.models.view import ModelView, at_answer, view_of
from cdt_lens.tasks.intervals import balanced_share_interval, mean_interval, share_interval
from cdt_lens.tasks.metrics import (
    answer_loss,
    average,
    correct,
    label_numbers,
    macro_f1,
    task_direction,
)
from cdt_lens.tasks.task import Batch, Examples, Task, WordIds, check_examples


@dataclass(frozen=True, eq=False)
class Evaluation(EqualByContent):
    """Results on one split; `tasks.metrics` defines accuracy, balanced accuracy and direction.

    Args:
        split: Name of the split.
        accuracy: Share of right answers among all examples, from 0 to 1.
        macro_f1: Mean F1 over the labels, from 0 to 1; None where the labels do not name the
            answers (generated tasks).
        direction: Label-balanced mean task direction in logits; positive favours the gold label.
            For words of several tokens the log-probabilities of the words stand for the logits,
            here and in the loss.
        loss: Mean cross-entropy over the candidates, in nats.
        examples: Number of examples.
        balanced_accuracy: Share of right answers within each label, averaged over the labels.
        confusion: Number of examples by gold label (rows) and predicted label (columns).
        intervals: 95 % confidence intervals over the population of examples, by "accuracy",
            "balanced_accuracy" and "direction" (`tasks.intervals`).
        answers: One row for each example, in their order: the gold `label`, the `answer` (a label;
            token ids where labels do not name the answers), whether it is `right`, the `direction`
            in logits and the `loss` in nats.
    """

    split: str
    accuracy: float
    macro_f1: float | None
    direction: float
    loss: float
    examples: int
    balanced_accuracy: float
    confusion: pd.DataFrame | None = field(default=None, repr=False)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict, repr=False)
    answers: pd.DataFrame | None = field(default=None, repr=False)

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row: shares from 0 to 1, the direction in logits, the loss in nats.

        Columns such as "accuracy low" hold the limits of the 95 % intervals.
        """
        names = (
            "split", "examples", "accuracy", "balanced_accuracy", "macro_f1", "direction", "loss",
        )  # fmt: skip
        row = {name: getattr(self, name) for name in names}
        for name, (low, high) in self.intervals.items():
            row |= {f"{name} low": low, f"{name} high": high}
        return pd.DataFrame([row])

    def _repr_html_(self) -> str:
        parts = [self.to_dataframe()]
        if self.confusion is not None:
            named = self.confusion.rename_axis(columns=None)
            parts.append(named.reset_index(names="gold \\ predicted"))
        return display.html(f"Evaluation on {self.split}", *parts)


@checked_arguments
@uses_model
def evaluate(
    model: nn.Module | ModelView,
    examples: Examples,
    task: Task | None = None,
    *,
    batch_size: Count = 32,
    logits_of: Callable[[Batch], Tensor] | None = None,
) -> Evaluation:
    """Evaluate `model` on `examples`.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: One split of a task.
        task: Supplies the verbalizer (for macro-F1) and the label prior, which is subtracted
            before an answer counts as right.
        batch_size: Number of examples per forward pass.
        logits_of: Computes the candidates' logits `[batch, k]` of a batch in another way than the
            model's ordinary run.

    Returns:
        Accuracy, balanced accuracy, macro-F1, mean task direction and loss.

    Raises:
        InputError: There are no examples, or the labels of `task` have other tokens than theirs.
        NonFiniteError: A logit is not finite, as in float16 where activations overflow.
    """
    view = view_of(model)
    check_examples(view, examples)
    if task is not None:
        _check_words(examples, task)
    items: list[tuple[int, tuple[bool, float, float, WordIds]]] = []
    for batch in Passes(batch_size).batches(examples, view.longrope_limit):
        logits = candidate_logits(view, batch) if logits_of is None else logits_of(batch)
        if not bool(torch.isfinite(logits[batch.is_candidate]).all()):
            raise NonFiniteError(
                f"{examples.name}: the logits of {view.name} are not finite on these prompts. Load "
                "the model in float32; after a training step, take a smaller learning rate."
            )
        direction = task_direction(logits, batch.direction)
        losses = answer_loss(logits, batch.is_answer, batch.is_candidate)
        prior = None if task is None else task.candidate_prior(batch).to(logits)
        right = correct(logits, batch.is_answer, batch.is_candidate, prior)
        shifted = logits if prior is None else logits - prior
        # In a tie with an answer the other candidate counts, as it does for accuracy.
        others = shifted.masked_fill(batch.is_answer | ~batch.is_candidate, -torch.inf)
        best = torch.where(
            right,
            shifted.masked_fill(~batch.is_answer, -torch.inf).argmax(-1),
            others.argmax(-1),
        )
        for row, index in enumerate(batch.index):
            answer = examples[index].candidates[int(best[row])]
            values = (bool(right[row]), float(direction[row]), float(losses[row]), answer)
            items.append((index, values))
    gathered = dict(gather_items(items))
    rows = [gathered[i] for i in range(len(examples))]
    labels = label_numbers([example.label for example in examples], examples.labels)
    right = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    directions = torch.tensor([row[1] for row in rows])
    low, high = mean_interval(directions, labels)
    f1, confusion = _by_label(examples, [row[-1] for row in rows], task)
    return Evaluation(
        split=examples.name,
        accuracy=float(average("accuracy", right, labels)),
        macro_f1=f1,
        direction=float(average("direction", directions, labels)),
        loss=math.fsum(row[2] for row in rows) / len(rows),
        examples=len(rows),
        balanced_accuracy=float(average("balanced_accuracy", right, labels)),
        intervals={
            "accuracy": share_interval(int(right.sum()), len(rows)),
            "balanced_accuracy": balanced_share_interval(right, labels),
            "direction": (float(low), float(high)),
        },
        confusion=confusion,
        answers=_answers(examples, rows, task),
    )


def _answers(
    examples: Examples, rows: list[tuple[bool, float, float, WordIds]], task: Task | None
) -> pd.DataFrame:
    """Return one row for each example: what was answered, and how well."""
    table = pd.DataFrame(rows, columns=["right", "direction", "loss", "answer"])
    names = {} if task is None else {id: label for label, id in task.verbalizer_ids.items()}
    table["answer"] = [names.get(token, token) for token in table["answer"]]
    table.insert(0, "label", [example.label for example in examples])
    return table[["label", "answer", "right", "direction", "loss"]]


def candidate_logits(view: ModelView, batch: Batch) -> Tensor:
    """Compute the model's logits of the candidates (scores of words), on the CPU.

    Raises:
        UnsupportedModelError: a component of the model has no rule.
        InputError: hooks of the caller's act behind the last block.
    """
    check_supported(view)
    trace = view.run(batch.tokens)
    check_caller_hooks(view, batch.tokens, batch.lengths)
    with view.quiet():
        answer = at_answer(trace.resid[-1], batch.lengths, batch.candidates)
        logits = view.candidate_logits(answer, batch.candidates)
    return logits.float().cpu()


@checked_arguments
@uses_model
def label_prior(model: nn.Module | ModelView, task: Task) -> dict[str, float]:
    """Compute the mean logit of each label on content-free prompts.

    Args:
        model: A TransformerLens model or its `ModelView`.
        task: A task with a verbalizer.

    Returns:
        The prior of each label in logits, centred: the priors sum to 0.

    Raises:
        InputError: The task has no verbalizer, so its labels have no logits.
    """
    if not len(task.content_free):
        raise InputError(f"task {task.name}: no content-free prompts, so no label prior")
    view = view_of(model)
    check_examples(view, task.content_free)
    batch = task.content_free.one_batch(view.longrope_limit)
    logits = candidate_logits(view, batch)
    values = {
        label: float(logits[batch.is_word(word)].mean())
        for label, word in task.verbalizer_ids.items()
    }
    mean = sum(values.values()) / len(values)
    return {label: value - mean for label, value in values.items()}


@checked_arguments
@uses_model
def calibrate(model: nn.Module | ModelView, task: Task) -> Task:
    """Return `task` with the model's label prior, which both accuracies then subtract.

    Args:
        model: A TransformerLens model or its `ModelView`.
        task: A task with a verbalizer.

    Returns:
        The task with its prior.

    Raises:
        InputError: The task has no verbalizer.
    """
    return task.with_prior(label_prior(model, task))


def _check_words(examples: Examples, task: Task) -> None:
    """Refuse a task that would take one label's token for another's."""
    for example in examples if task.verbalizer_ids else ():
        if example.answers != (task.verbalizer_ids.get(example.label),):
            raise InputError(
                f"{examples.name}: the answer of label {example.label!r} is token "
                f"{example.answers[0]}, in task {task.name} it is "
                f"{task.verbalizer_ids.get(example.label)}; give the task that they are of"
            )


def _by_label(
    examples: Examples, tokens: list[WordIds], task: Task | None
) -> tuple[float | None, pd.DataFrame | None]:
    if task is None or not task.verbalizer_ids:
        return None, None
    names = {id: label for label, id in task.verbalizer_ids.items()}
    predicted = [names[token] for token in tokens]
    gold = [example.label for example in examples]
    table = pd.crosstab(
        pd.Categorical(gold, task.labels), pd.Categorical(predicted, task.labels), dropna=False
    )
    table.index.name, table.columns.name = "gold", "predicted"
    return macro_f1(predicted, gold, task.labels), table
