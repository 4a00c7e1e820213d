"""Training options: refused when made, with the name, the value and the choices."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers.checks import unchecked_types
from transformers import get_scheduler

from cdt_lens.core.errors import InputError
from cdt_lens.finetuning.options import DEFAULT_RATES, SCOPES, TrainingOptions


def test_every_scope_has_a_default_rate():
    assert set(DEFAULT_RATES) == set(SCOPES)
    assert all(0 < rate < 1e-2 for rate in DEFAULT_RATES.values())


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("epochs", 0), ("batch_size", 1), ("micro_batch", 1), ("eval_batch_size", 1),
        ("evaluate_every", 1), ("patience", 1), ("lora_rank", 1), ("lora_alpha", 1),
        ("weight_decay", 0), ("clip", 0), ("warmup", 0), ("checkpoint_every", 1), ("seed", 0),
    ],
)  # fmt: skip
def test_numbers_have_a_least_value(name, least):
    with unchecked_types():
        assert getattr(TrainingOptions(**{name: least}), name) == least
        for wrong in (least - 1, "3", math.nan, True):
            with pytest.raises(InputError, match=f"{name}={wrong!r}: expected .*at least {least}"):
                TrainingOptions(**{name: wrong})


@pytest.mark.parametrize("name", ["batch_size", "epochs", "micro_batch", "seed", "lora_rank"])
def test_counts_are_whole_numbers(name):
    with unchecked_types(), pytest.raises(InputError, match=f"{name}=2.5"):
        TrainingOptions(**{name: 2.5})
    with unchecked_types(), pytest.raises(InputError, match="a whole number of at least"):
        TrainingOptions(**{name: 3.0})


@pytest.mark.parametrize("name", ["micro_batch", "patience", "checkpoint_every"])
def test_optional_numbers_may_be_none(name):
    assert getattr(TrainingOptions(**{name: None}), name) is None


@pytest.mark.parametrize("name", ["epochs", "batch_size", "weight_decay", "clip", "seed"])
def test_other_numbers_may_not_be_none(name):
    with unchecked_types(), pytest.raises(InputError, match=f"{name}=None"):
        TrainingOptions(**{name: None})


@pytest.mark.parametrize("rate", [0.0, -1e-3, math.inf, math.nan])
def test_a_learning_rate_is_finite_and_above_0(rate):
    with pytest.raises(InputError, match="learning_rate=.*expected a number above 0"):
        TrainingOptions(learning_rate=rate)
    assert TrainingOptions(learning_rate=None).learning_rate is None


def test_warmup_is_a_share():
    assert TrainingOptions(warmup=1.0).warmup == 1.0
    with pytest.raises(InputError, match="warmup=1.5: expected .*of at least 0.* and of at most 1"):
        TrainingOptions(warmup=1.5)


@pytest.mark.parametrize("name", ["loss", "metric", "norms", "kv", "schedule"])
def test_choices_are_told(name):
    with unchecked_types(), pytest.raises(InputError, match=f"{name}='best': expected one of .*, "):
        TrainingOptions(**{name: "best"})


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_schedules_are_transformers_own(name):
    TrainingOptions(schedule=name)
    get_scheduler(name, torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0), 1, 10)


def test_changed_options_are_checked_and_the_old_ones_stay():
    options = TrainingOptions(epochs=7)
    assert options.changed(batch_size=4) == TrainingOptions(epochs=7, batch_size=4)
    assert options.changed() == options == TrainingOptions(epochs=7)
    with pytest.raises(InputError, match="epochs=-1"):
        options.changed(epochs=-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.epochs = 3


def test_an_unknown_option_names_the_nearest_and_all():
    with pytest.raises(InputError) as caught:
        TrainingOptions().changed(learning_rat=1e-3)
    told = str(caught.value)
    assert "'learning_rat': unknown; did you mean 'learning_rate'?" in told
    assert all(field.name in told for field in dataclasses.fields(TrainingOptions))
