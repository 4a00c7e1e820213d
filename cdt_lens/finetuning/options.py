"""`TrainingOptions`: every choice of a training run, checked when made, kept in the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from cdt_lens.core.checked import Checked
from cdt_lens.core.choices import (
    ChannelChoice,
    Count,
    FromZero,
    FromZeroCount,
    KeyValue,
    LoraModules,
    Norms,
    Scope,
    Seed,
)
from cdt_lens.core.errors import InputError, did_you_mean

SCOPES: tuple[Scope, ...] = get_args(Scope)
# Peak rates that did best of those tried on SmolLM2-135M, on validation data (benchmarks/rates.py).
DEFAULT_RATES: Mapping[str, float] = MappingProxyType(
    {"norms": 1e-3, "full": 1e-4, "lora": 1e-3}
    | dict.fromkeys(("decision", "near-zero", "random", "random-per-layer"), 1e-3)
)

# Those of transformers' schedules that need no more than warm-up and the number of steps.
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]


# Options that say how a number is computed, and change no more of it than its last bits.
FREE_OPTIONS = (
    "micro_batch", "gradient_checkpointing", "eval_batch_size", "keep_frozen", "checkpoint_every",
)  # fmt: skip


@dataclass(frozen=True)
class TrainingOptions(Checked):
    """How to train.

    Args:
        epochs: Maximum number of epochs.
        batch_size: Number of examples per step, over all processes.
        micro_batch: Number of examples per forward pass, to save memory; None takes the whole
            batch.
        gradient_checkpointing: Keep only the inputs of the blocks for the backward pass, which runs
            each block again. It saves memory and takes more time; the gradients are the same.
            Hooks of your own inside a block then run twice in a step.
        eval_batch_size: Number of validation examples per forward pass.
        learning_rate: Peak learning rate; None takes the default of the scope.
        weight_decay: Weight decay of weight matrices; norms and biases have none.
        warmup: Share of all steps in which the learning rate rises, 0 to 1. The schedule "constant"
            has none.
        schedule: Learning rate schedule, a name of transformers' `get_scheduler`.
        clip: Maximum norm of the gradients of what is trained; 0 does not clip.
        loss: Cross-entropy over the label tokens, or over the whole vocabulary.
        evaluate_every: Number of epochs between evaluations on the validation split.
        patience: Stop after this many evaluations without improvement; None never stops early.
        metric: The validation metric that selects the best epoch.
        least_retention: The best epoch is one of those that keep at least this share of the
            untouched model's accuracy on the source's validation split. Where none does, the
            untouched values are kept. None asks for none.
        norms: Which norms the head scopes train: all, those of the circuit's layers, or none.
        biases: Whether the head scopes train the heads' b_Q, b_K and b_V and the channels' b_in,
            which a LoRA cannot hold.
        channels: Number of MLP channels of every layer that the head scopes train as well.
        channel_choice: Whether these are drawn at random or have the largest weights
            (`slices.channel_slices`).
        kv: How key/value heads that several query heads share are trained, as in
            `slices.head_slices`.
        keep_frozen: Run the layers below the lowest trained one once per example instead of in
            every epoch. Needs norms="circuit" or "none": otherwise every layer is trained.
        lora_rank: Rank of the low-rank updates of the scope `lora`.
        lora_alpha: Scale of the low-rank updates, in units of the rank.
        lora_modules: Whether low-rank updates are of the attention's linear maps or of all.
        checkpoint_every: Number of steps between checkpoints within an epoch; None writes one at
            its end only.
        seed: Seed of every random draw.

    Raises:
        InputError: A value out of range; the message names the option and what it takes.
    """

    epochs: Annotated[int, Field(ge=0, description="Maximum number of epochs.")] = 3
    batch_size: Annotated[int, Field(ge=1, description="Number of examples per step.")] = 16
    micro_batch: Count | None = None
    gradient_checkpointing: bool = False
    eval_batch_size: Count = 32
    learning_rate: Annotated[
        float | None,
        Field(
            gt=0, allow_inf_nan=False,
            description="Peak learning rate; the default is that of the scope.",
        ),
    ] = None  # fmt: skip
    weight_decay: FromZero = 0.01
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    schedule: Schedule = "linear"
    clip: FromZero = 1.0
    loss: Literal["labels", "vocabulary"] = "labels"
    evaluate_every: Count = 1
    patience: Annotated[
        int | None,
        Field(ge=1, description="Stop after this many evaluations without improvement."),
    ] = None
    metric: Literal["accuracy", "macro_f1", "loss"] = "accuracy"
    least_retention: Annotated[float | None, Field(gt=0, le=1)] = None
    norms: Norms = "all"
    biases: bool = True
    channels: FromZeroCount = 0
    channel_choice: ChannelChoice = "random"
    kv: KeyValue = "shared"
    keep_frozen: bool = False
    lora_rank: Count = 8
    lora_alpha: Count = 16
    lora_modules: LoraModules = "attention"
    checkpoint_every: Count | None = None
    seed: Annotated[Seed, Field(description="Seed of every random draw.")] = 0

    def changed(self, **changes: Any) -> TrainingOptions:
        """Return these options with some of another value.

        Args:
            changes: The new values by name.

        Raises:
            InputError: A name that is no option, or a value out of range.
        """
        known = {field.name for field in fields(self)}
        for name in changes:
            if name not in known:
                raise InputError(
                    f"training option {name!r}: unknown{did_you_mean(name, known)}; "
                    f"the options are {', '.join(sorted(known))}"
                )
        return replace(self, **changes)

    def as_key(self) -> dict[str, Any]:
        """Return the options by name for the key of a kept result: `FREE_OPTIONS` at defaults."""
        plain = TrainingOptions()
        return asdict(replace(self, **{name: getattr(plain, name) for name in FREE_OPTIONS}))
