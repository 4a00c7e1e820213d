"""Define `Score`: accuracy on one split before and after a training, kept with its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cdt_lens.core.checked import Checked
from cdt_lens.core.choices import Count
from cdt_lens.tasks.intervals import share_interval

# An accuracy from 0 to 1 and the limits of its 95 % interval.
Estimate = tuple[float, float, float]


@dataclass(frozen=True)
class Score(Checked):
    """The accuracy on one split of a task before and after a training.

    Attributes:
        role: "target" for the language of the training, "source" for the one it may forget.
        task: name of the task.
        split: the split, "validation" or "test". The epoch and the options may have been chosen on
            the validation split, whose accuracy is then too high.
        examples: number of examples.
        before: accuracy of the base model, from 0 to 1, and its 95 % interval.
        after: the same of the trained model.
    """

    role: str
    task: str
    split: str
    examples: Count
    before: Estimate
    after: Estimate

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Score:
        """Create a score from the values of its fields.

        Args:
            values: the fields by name, as a file holds them.

        Returns:
            The score.

        Raises:
            InputError: a value is of another type.
        """
        pairs = {name: tuple(values[name]) for name in ("before", "after")}
        return cls(**{**values, **pairs})


def estimate(accuracy: float, examples: int) -> Estimate:
    """Return an accuracy with Wilson's 95 % interval.

    Args:
        accuracy: share of right answers, from 0 to 1.
        examples: number of examples, at least one.

    Returns:
        The accuracy, and the lower and the upper limit.
    """
    return accuracy, *share_interval(round(accuracy * examples), examples)
