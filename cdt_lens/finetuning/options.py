"""`TrainingOptions`: every choice of a training run, checked when made, kept in the result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal

from cdt_lens.core.errors import InputError, did_you_mean

SCOPES = ("decision", "near-zero", "random", "random-per-layer", "norms", "full", "lora")
# Peak rates that did best of those tried on SmolLM2-135M, on validation data (benchmarks/rates.py).
DEFAULT_RATES: Mapping[str, float] = MappingProxyType(
    {"norms": 1e-3, "full": 1e-4, "lora": 1e-3}
    | dict.fromkeys(("decision", "near-zero", "random", "random-per-layer"), 1e-3)
)

# Those of transformers' schedules that need no more than warm-up and the number of steps.
_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
_LEAST = {
    "epochs": 0, "batch_size": 1, "micro_batch": 1, "eval_batch_size": 1, "evaluate_every": 1,
    "patience": 1, "lora_rank": 1, "lora_alpha": 1, "checkpoint_every": 1, "seed": 0,
    "weight_decay": 0, "clip": 0, "warmup": 0,
}  # fmt: skip
_FRACTIONS = ("weight_decay", "clip", "warmup")
_MAY_BE_NONE = ("micro_batch", "patience", "checkpoint_every")


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    epochs: the most; evaluate_every: epochs between looks at the validation split; patience: stop
        after so many looks without improvement (None: never); metric: what better means.
    batch_size: examples of a step, over all processes; micro_batch: examples at a time, to save
        memory (None: all at once); eval_batch_size: likewise on validation data.
    learning_rate: the peak (None: the scope's default); schedule: a name of transformers'
        `get_scheduler`; warmup: share of all steps; weight_decay: of weight matrices, never of
        norms and biases; clip: largest norm of the selected gradients (0: none).
    loss: cross-entropy over the label tokens, or over the whole vocabulary.
    norms: which norms the head scopes train; kv: see `slices.head_slices`; keep_frozen: run the
        layers below the lowest trained one once per example instead of in every epoch; it needs
        norms="circuit" or "none", as there is no such layer while every norm is trained.
    checkpoint_every: steps between checkpoints within an epoch (None: at its end only).
    """

    epochs: int = 3
    batch_size: int = 16
    micro_batch: int | None = None
    eval_batch_size: int = 32
    learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup: float = 0.1
    schedule: str = "linear"
    clip: float = 1.0
    loss: Literal["labels", "vocabulary"] = "labels"
    evaluate_every: int = 1
    patience: int | None = None
    metric: Literal["accuracy", "macro_f1", "loss"] = "accuracy"
    norms: Literal["all", "circuit", "none"] = "all"
    kv: Literal["shared", "skip", "groups"] = "shared"
    keep_frozen: bool = False
    lora_rank: int = 8
    lora_alpha: int = 16
    checkpoint_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in _LEAST.items():
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            kind = (int, float) if name in _FRACTIONS else int
            if not (isinstance(value, kind) and not isinstance(value, bool) and value >= low):
                what = "" if name in _FRACTIONS else "a whole number of "
                raise InputError(f"{name}={value!r}: expected {what}at least {low}")
        if self.warmup > 1:
            raise InputError(f"warmup={self.warmup}: expected a share of all steps, 0 to 1")
        rate = self.learning_rate
        if rate is not None and not (_is_number(rate) and 0 < rate < math.inf):
            raise InputError(f"learning_rate={rate!r}: expected a number above 0")
        choices = {
            "loss": ("labels", "vocabulary"),
            "metric": ("accuracy", "macro_f1", "loss"),
            "norms": ("all", "circuit", "none"),
            "kv": ("shared", "skip", "groups"),
            "schedule": _SCHEDULES,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
        if not isinstance(self.keep_frozen, bool):
            raise InputError(f"keep_frozen={self.keep_frozen!r}: expected true or false")

    def changed(self, **changes: Any) -> TrainingOptions:
        """These options with some of another value.

        Raises:
            InputError: a name that is no option, or a value out of range.
        """
        known = {field.name for field in fields(self)}
        for name in changes:
            if name not in known:
                raise InputError(
                    f"training option {name!r}: unknown{did_you_mean(name, known)}; "
                    f"the options are {', '.join(sorted(known))}"
                )
        return replace(self, **changes)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
