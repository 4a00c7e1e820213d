"""Every public call leaves the model and the process as they were, whatever ends it."""

from __future__ import annotations

import gc
import inspect
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from helpers.left_behind import CALLS, Interrupts, Left, Subject, subject
from helpers.public import NAMES
from helpers.wrapped import BACKENDS
from torch import nn

import cdt_lens as cdt
from cdt_lens.core.process_wide import ignored, one_thread, seeded

QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module", params=BACKENDS)
def used(request: pytest.FixtureRequest, tokenizer_folder: str) -> Subject:
    return subject(request.param, tokenizer_folder)


def call_of(name: str, used: Subject) -> partial[Any]:
    if not used.can(name):
        pytest.skip("this class cannot")
    return partial(CALLS[name], used)


def takes_its_turn(function: Any) -> bool:
    """Whether one of the wrappers of a function is that of `uses_model`."""
    while hasattr(function, "__wrapped__"):
        if function.__code__.co_name == "in_turn":
            return True
        function = function.__wrapped__
    return False


def public_functions_of_a_model() -> Iterator[tuple[str, Any]]:
    for name, value in NAMES.items():
        functions = {name: value}
        if inspect.isclass(value):
            methods = {key: getattr(m, "__func__", m) for key, m in vars(value).items()}
            functions = {f"{name}.{key}": m for key, m in methods.items() if key != "__init__"}
        for spelt, function in functions.items():
            if not inspect.isfunction(function):
                continue
            model = inspect.signature(function).parameters.get("model")
            if model is not None and "nn.Module" in str(model.annotation):
                yield spelt, function


def test_the_proof_has_every_public_function_that_takes_a_model():
    found = dict(public_functions_of_a_model())
    assert found.keys() <= CALLS.keys()
    without = {name for name, function in found.items() if not takes_its_turn(function)}
    assert without == {"Adapter.applied"}  # a context, whose block is the caller's


@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_nothing_behind(used: Subject, name: str):
    call = call_of(name, used)
    before = Left(used)
    call()
    assert before.changed(used) == []


@pytest.mark.parametrize("name", CALLS)
def test_an_error_in_a_pass_leaves_nothing_behind(used: Subject, name: str):
    call = call_of(name, used)
    passes = [0]

    def fail(_module: nn.Module, _args: Any) -> None:
        passes[0] += 1
        if passes[0] == 3:
            raise MemoryError("no more memory")

    handle = used.model.blocks[1].register_forward_pre_hook(fail)
    before = Left(used)
    try:
        with suppress(MemoryError):  # not every call makes three passes
            call()
        assert before.changed(used) == []
    finally:
        handle.remove()


# An interrupt may arrive in a destructor, which Python reports and ignores.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", CALLS)
def test_interrupts_leave_nothing_behind(used: Subject, name: str):
    if name == "compare_methods":
        pytest.skip("a sequence of other calls; benchmarks/interrupts.py has it")
    call = call_of(name, used)
    draw = random.Random(name)
    with Interrupts() as interrupts:
        before = Left(used)
        call()  # the first also fills caches, and counting its steps is the slow part
        steps = interrupts.steps(call)
        for second in (0.0, 1e-4):
            assert interrupts.run(call, draw.randint(steps // 10, steps * 9 // 10), second)
            used.take_off()
            assert before.changed(used) == []


def test_calls_of_two_threads_take_turns(used: Subject):
    calls = [CALLS[name] for name in ("score_heads", "evaluate", "mean_activations", "one_pass")]
    expected = [call(used) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda call: call(used), calls * 3))
    torch.testing.assert_close(got[0].values, expected[0].values, rtol=0, atol=0)
    for number, result in enumerate(got):
        wanted = expected[number % 4]
        values = {k: v for k, v in vars(wanted).items() if isinstance(v, torch.Tensor | float)}
        for key, value in values.items():
            torch.testing.assert_close(vars(result)[key], value, rtol=0, atol=0, equal_nan=True)


def test_other_threads_do_not_run_with_an_adapter_of_a_with_block(used: Subject):
    with ThreadPoolExecutor(1) as pool:
        with used.adapter.applied(used.model):
            refused = pool.submit(cdt.evaluate, used.model, used.data)
            with pytest.raises(cdt.InputError, match="another thread runs `with adapter.applied"):
                refused.result()
        pool.submit(cdt.evaluate, used.model, used.data).result()


def test_threads_leave_the_settings_of_the_process_as_they_were(used: Subject):
    def work(number: int) -> None:
        for _ in range(20):
            with seeded(number), ignored("a"), one_thread():
                torch.rand(3)
            with ignored(f"{number}"):
                pass
        used.scores._repr_html_()

    before = Left(used)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert before.changed(used) == []


@pytest.mark.parametrize("rules", cdt.PRESETS)
def test_activations_are_freed_without_the_cycle_collector(used: Subject, rules: str):
    def held() -> int:
        run()
        return sum(o.numel() for o in gc.get_objects() if isinstance(o, torch.Tensor))

    def run() -> None:
        cdt.score_heads(used.model, used.data, used.baseline, rules=rules, **QUIET)

    run()
    gc.collect()
    gc.disable()
    try:
        assert held() == held()
    finally:
        gc.enable()
