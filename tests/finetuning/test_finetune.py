"""CT-SFT end to end: proofs (i) and (j), resuming, refusals."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.checks import assert_same_bits, left_untouched, unchecked_types
from helpers.places import ROOT, TESTS
from helpers.saved import save_model, write_task
from helpers.shared import EVERY_FAMILY, models, other_weights
from helpers.tiny_models import build, prompts
from helpers.tiny_training import HEADS, QUICK, assert_moved_only, may_move, task, values
from helpers.two_processes import train
from helpers.wrapped import needs_hooked, view, wrap
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import cdt_lens as cdt
from cdt_lens.circuits.circuit import Circuit
from cdt_lens.core.errors import (
    ArtifactError,
    CdtLensWarning,
    InputError,
    NonFiniteError,
    UnsupportedModelError,
)
from cdt_lens.finetuning import finetune as fine_tuning, trainer as training
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.answer_pass import AnswerPass
from cdt_lens.finetuning.finetune import finetune
from cdt_lens.finetuning.options import DEFAULT_RATES, SCOPES, TrainingOptions
from cdt_lens.finetuning.result import FineTuneResult
from cdt_lens.finetuning.trainer import Trainer
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.provenance import provenance_of, weight_hash
from cdt_lens.models.view import ModelView
from cdt_lens.tasks.evaluate import evaluate

COLUMNS = [
    "epoch", "step", "train_loss", "learning_rate", "target_loss", "target_accuracy",
    "target_macro_f1", "source_accuracy", "seconds",
]  # fmt: skip


def circuit_for(seen: ModelView) -> Circuit:
    """`HEADS` with random scores, found in this very model."""
    scores = torch.randn(seen.n_layers, seen.n_heads, generator=torch.Generator().manual_seed(0))
    provenance = provenance_of(seen, task().train, options={})
    heads = tuple(map(Head.parse, HEADS))
    return Circuit(heads, seen.n_layers, seen.n_heads, scores, provenance=provenance)


def scopes_of(seen: ModelView) -> list[str]:
    return [scope for scope in SCOPES if scope != "lora" or seen.is_bridge]


# They train what `decision` trains, in other heads.
OTHER_HEADS = ("near-zero", "random", "random-per-layer")


def assert_same_adapters(found: Adapter, expected: Adapter) -> None:
    assert found.slices.keys() == expected.slices.keys()
    for name, (index, value) in expected.slices.items():
        assert found.slices[name][0] == index
        assert_same_bits(found.slices[name][1], value)
    assert found.whole.keys() == expected.whole.keys()
    for name, value in expected.whole.items():
        assert_same_bits(found.whole[name], value)


def without_seconds(history: pd.DataFrame) -> pd.DataFrame:
    return history.drop(columns="seconds")


# Proof (i): nothing else moves ---------------------------------------------------------------------


@models((*EVERY_FAMILY, "qwen3_moe"))
def test_nothing_outside_the_scope_moves(family, backend, tokenizer_folder):
    """Every element of every weight; AdamW with harsh decay, clipping, momentum; each scope.

    The run leaves the model untouched (proof j), its adapter moves what it may, and taking the
    adapter off gives the bits back. Two families have every scope, the others each kind of slices.
    """
    seen, own = view(family, backend, tokenizer_folder, torch.float32), build(family)
    seen.logits(prompts())  # at its first run a bridge attaches hooks of its own, for good
    before, base = values(seen), weight_hash(seen)
    circuit, data = circuit_for(seen), task(valid=0)
    for scope in scopes_of(seen):
        if scope in OTHER_HEADS and family not in ("gpt2", "llama"):
            continue
        with left_untouched(seen.tl):
            result = finetune(seen, data, heads=circuit, scope=scope, **QUICK)
        masks = may_move(seen, own, scope, result.heads)
        handle = result.adapter.apply(seen)
        assert_moved_only(before, values(seen), masks)
        handle.remove()
        assert weight_hash(seen) == base
        for name, value in values(seen).items():
            assert_same_bits(value, before[name])
        assert result.adapter.elements == sum(int(mask.sum()) for mask in masks.values())


@models(("llama",))
def test_a_judge_sees_the_best_values_in_the_model(family, backend, tokenizer_folder):
    """Also LoRA's in bf16, whose merged adapter is rounded to what the model can hold."""
    seen = view(family, backend, tokenizer_folder, torch.bfloat16)
    circuit, data = circuit_for(seen), task()
    for scope in scopes_of(seen):
        passes = AnswerPass(seen)

        def judge(passes: AnswerPass = passes) -> float:
            with seen.quiet():
                return evaluate(seen, data.valid, data, logits_of=passes.candidates).loss

        result = finetune(
            seen, data, heads=circuit, scope=scope, judge=judge, **{**QUICK, "metric": "loss"}
        )
        assert result.judged == pytest.approx(float(result.after["target_loss"]), abs=1e-12)


@models(("gpt2", "pythia"))
def test_kept_values_are_the_adapters_and_nothing_else_stays(family, backend, tokenizer_folder):
    seen, own = view(family, backend, tokenizer_folder, torch.float32), build(family)
    seen.logits(prompts())
    before = values(seen)
    for scope in ("decision", "full", "lora")[: 3 if backend == "bridge" else 2]:
        model = wrap(family, backend, tokenizer_folder, torch.float32)
        model(prompts())
        kept = ModelView(model)
        state = modes_and_flags(model)
        result = finetune(
            kept, task(valid=0), heads=circuit_for(kept), scope=scope, keep=True, **QUICK
        )
        assert modes_and_flags(model) == state
        assert_moved_only(before, values(kept), may_move(kept, own, scope, result.heads))
        with result.adapter.applied(seen):
            assert weight_hash(kept) == weight_hash(seen)
            assert torch.equal(kept.logits(prompts()), seen.logits(prompts()))


def modes_and_flags(model: nn.Module) -> Any:
    return (
        [(name, module.training) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    )


@models(("llama", "gpt2"))
def test_the_options_that_choose_what_moves(family, backend, tokenizer_folder):
    seen, own = view(family, backend, tokenizer_folder, torch.float32), build(family)
    before, data = values(seen), task(valid=0)
    for kv, norms in (("shared", "none"), ("skip", "circuit"), ("groups", "all")):
        result = finetune(seen, data, heads=["L1H2"], kv=kv, norms=norms, **QUICK)
        grouped = family == "llama" and kv == "groups"
        assert result.heads == ((Head(1, 2), Head(1, 3)) if grouped else (Head(1, 2),))
        assert result.adapter.heads == result.heads
        assert result.siblings == ((Head(1, 3),) if family == "llama" and kv == "shared" else ())
        masks = may_move(seen, own, "decision", result.heads)
        for name, mask in masks.items():
            if name.endswith((".W_K", ".W_V", ".b_K", ".b_V")) and kv == "skip":
                mask[:] = False
            inside = norms == "all" or (norms == "circuit" and name.startswith("blocks.1."))
            if "ln" in name and not inside:
                mask[:] = False
        with result.adapter.applied(seen):
            assert_moved_only(before, values(seen), masks)


# Proof (j): the caller's model ---------------------------------------------------------------------


def unusual(model: nn.Module) -> None:
    """Mixed modes, gradient flags and gradients, and hooks of the user's own."""
    model(prompts(1, 3))
    model.train()
    for number, module in enumerate(model.modules()):
        if number % 3 == 0:
            module.training = False
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
        if number % 5 == 0:
            parameter.grad = torch.full_like(parameter, number)
    model.blocks[1].register_forward_hook(lambda *_: None)
    model.add_hook("blocks.1.attn.hook_z", lambda z, hook: z)


class Stop(Exception):
    pass


@models(("gpt2", "pythia"))
def test_the_callers_model_is_left_as_it_was(family, backend, tokenizer_folder, monkeypatch):
    """Finished or raising in the middle, whatever state the model and the caller were in."""
    model = wrap(family, backend, tokenizer_folder, torch.float32)
    unusual(model)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    copies = {name: grad.clone() for name, grad in grads.items()}
    true = Trainer._step
    for scope in ("decision", "full", "lora")[: 3 if backend == "bridge" else 2]:
        for stop_at in (0, 4):
            left = [stop_at]

            def step(self: Trainer, *args: Any, left: list[int] = left) -> Any:
                found = true(self, *args)
                left[0] -= 1
                if left[0] == 0:
                    raise Stop
                return found

            monkeypatch.setattr(Trainer, "_step", step)
            with torch.set_grad_enabled(stop_at == 0), left_untouched(model):
                try:
                    finetune(model, task(), heads=HEADS, scope=scope, source=task(), **QUICK)
                except Stop:
                    assert stop_at
            for name, parameter in model.named_parameters():
                assert parameter.grad is grads.get(name)
                assert parameter.grad is None or torch.equal(parameter.grad, copies[name])


@models(("llama",))
def test_training_is_in_evaluation_mode(family, backend, tokenizer_folder):
    """Dropout of a model in training mode changes nothing: GPT-2's configuration has some."""
    found = []
    for training_mode in (False, True):
        model = wrap("gpt2", backend, tokenizer_folder, torch.float32)
        model.train(training_mode)
        found.append(finetune(model, task(), heads=HEADS, **QUICK))
    assert_same_adapters(found[0].adapter, found[1].adapter)


# Resuming ------------------------------------------------------------------------------------------


def interrupted_at(monkeypatch: pytest.MonkeyPatch, n: int) -> Callable[[], None]:
    """The `n`-th step from now raises KeyboardInterrupt; call the result to undo it."""
    true, calls = Trainer._step, []

    def step(self: Trainer, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == n:
            raise KeyboardInterrupt
        return true(self, *args)

    monkeypatch.setattr(Trainer, "_step", step)
    return lambda: monkeypatch.setattr(Trainer, "_step", true)


def log_rows(path: Path) -> list[str]:
    """Lines of a log without the seconds."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [json.dumps({k: v for k, v in row.items() if k != "seconds"}) for row in rows]


@pytest.mark.parametrize(
    ("family", "backend", "n", "changes"),
    [
        pytest.param("pythia", "hooked", 2, {}, marks=needs_hooked),  # before any checkpoint
        ("gpt2", "bridge", 5, {}),  # in the second epoch
        pytest.param("llama", "hooked", 5, {}, marks=needs_hooked),
        ("pythia", "bridge", 6, {"checkpoint_every": 2}),  # after a checkpoint within an epoch
        ("qwen3", "bridge", 8, {"evaluate_every": 2, "micro_batch": 2}),
        ("gemma3", "bridge", 6, {"keep_frozen": True, "norms": "circuit", "checkpoint_every": 1}),
        pytest.param(
            "qwen2", "hooked", 7,
            {"keep_frozen": True, "norms": "none", "checkpoint_every": 2, "metric": "loss"},
            marks=needs_hooked,
        ),
    ],
)  # fmt: skip
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    family, backend, n, changes, tokenizer_folder, tmp_path, monkeypatch
):
    seen = view(family, backend, tokenizer_folder, torch.float32)
    heads = ["L1H2"] if changes.get("keep_frozen") else HEADS
    # Where the interruption falls is the same for every scope; two of them have their own state.
    for scope in {"gpt2": ("decision", "lora"), "llama": ("full",)}.get(family, ("decision",)):
        log, place = tmp_path / scope / "log.jsonl", tmp_path / scope / "run.json"

        def run(log: Path, scope: str = scope, **more: Any) -> FineTuneResult:
            given = {**QUICK, "epochs": 4, **changes, **more}
            return finetune(
                seen, task(), heads=heads, scope=scope, source=task("source", seed=50), log=log, **given
            )  # fmt: skip

        whole = run(tmp_path / scope / "whole.jsonl")
        undo = interrupted_at(monkeypatch, n)
        with pytest.raises(KeyboardInterrupt):
            run(log, checkpoint=place)
        undo()
        assert place.exists() == (n > 3)
        resumed = run(log, checkpoint=place)
        assert_same_adapters(resumed.adapter, whole.adapter)
        pd.testing.assert_frame_equal(
            without_seconds(resumed.history), without_seconds(whole.history), check_exact=True
        )
        assert (resumed.best_epoch, resumed.stopped) == (whole.best_epoch, whole.stopped)
        assert log_rows(log) == log_rows(tmp_path / scope / "whole.jsonl")
        assert [p.name for p in place.parent.iterdir() if p.name.startswith("run")] == []


def test_a_run_interrupted_again_and_again(tokenizer_folder, tmp_path, monkeypatch):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)

    def run(**more: Any) -> FineTuneResult:
        return finetune(seen, task(), heads=HEADS, **{**QUICK, "epochs": 3, **more})

    whole = run()
    for _ in range(4):
        undo = interrupted_at(monkeypatch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint=tmp_path / "run.json", checkpoint_every=1)
        undo()
    resumed = run(checkpoint=tmp_path / "run.json", checkpoint_every=1)
    assert_same_adapters(resumed.adapter, whole.adapter)


def test_a_run_that_had_stopped_early_stays_stopped(tokenizer_folder, tmp_path, monkeypatch):
    """Killed between its last checkpoint and its end."""
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)

    def run(**more: Any) -> FineTuneResult:
        return finetune(seen, task(), heads=HEADS, **{**QUICK, "epochs": 9, "patience": 1, **more})

    whole = run()
    assert whole.stopped.startswith("early")
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_put", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint=tmp_path / "run.json")
    resumed = run(checkpoint=tmp_path / "run.json")
    assert resumed.stopped == whole.stopped
    assert_same_adapters(resumed.adapter, whole.adapter)


def test_prompts_in_both_languages_do_not_make_a_resumed_run_differ(
    tokenizer_folder, tmp_path, monkeypatch
):
    """Kept activations depend on the width of the batch that they were computed in."""
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    data, source = task(train=16, valid=2), task("source", train=3, valid=9, seed=70)
    mixed = (*data.train.items[:8], *source.valid.items)
    source = dataclasses.replace(source, valid=dataclasses.replace(source.valid, items=mixed))

    def run(**more: Any) -> FineTuneResult:
        given = {**QUICK, "epochs": 3, "eval_batch_size": 4, "keep_frozen": True, **more}
        return finetune(seen, data, heads=["L1H2"], norms="none", source=source, **given)

    whole = run()
    undo = interrupted_at(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=tmp_path / "run.json", checkpoint_every=1)
    undo()
    resumed = run(checkpoint=tmp_path / "run.json", checkpoint_every=1)
    assert_same_adapters(resumed.adapter, whole.adapter)


def test_a_kept_checkpoint_gives_the_same_result_at_once(tokenizer_folder, tmp_path, monkeypatch):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    given = {"heads": HEADS, "checkpoint": tmp_path / "run.json", "keep_checkpoint": True, **QUICK}
    first = finetune(seen, task(), **given)
    interrupted_at(monkeypatch, 1)
    again = finetune(seen, task(), **given)
    assert_same_adapters(again.adapter, first.adapter)
    pd.testing.assert_frame_equal(again.history, first.history, check_exact=True)
    assert again.seconds == first.seconds


def test_a_checkpoint_of_another_run_is_refused(tokenizer_folder, tmp_path, monkeypatch):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    seen.logits(prompts())
    given = {"task": task(), "heads": HEADS, "checkpoint": tmp_path / "run.json", **QUICK}
    undo = interrupted_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        finetune(seen, **given)
    undo()
    for change, told in (
        ({"seed": 1}, "options"), ({"heads": ["L0H0"]}, "heads"), ({"scope": "norms"}, "scope"),
        ({"task": task(seed=90)}, "task"), ({"source": task()}, "source"),
    ):  # fmt: skip
        with (
            left_untouched(seen.tl),
            pytest.raises(InputError, match=rf"another run, .*\(.*{told}"),
        ):
            finetune(seen, **{**given, **change})
    assert finetune(seen, **given).stopped == "all epochs"


def test_a_full_disk_in_the_middle_leaves_the_last_checkpoint(
    tokenizer_folder, tmp_path, monkeypatch
):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    seen.logits(prompts())

    def run(**more: Any) -> FineTuneResult:
        return finetune(seen, task(), heads=HEADS, **{**QUICK, "epochs": 4, **more})

    true, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        true(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with left_untouched(seen.tl), pytest.raises(InputError, match="No space left.*") as caught:
            run(checkpoint=tmp_path / "run.json")
    assert str(tmp_path / "run.json") in str(caught.value)
    state = json.loads((tmp_path / "run.json").read_text())
    assert state["epoch"] == 2
    assert_same_adapters(run(checkpoint=tmp_path / "run.json").adapter, run().adapter)


SCRIPT = """
import os, signal, sys
from pathlib import Path
from cdt_lens.finetuning.trainer import Trainer
from helpers.two_processes import train
folder = Path(sys.argv[1])
true, calls = Trainer._step, []
def step(*args):
    calls.append(args)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return true(*args)
Trainer._step = step
logs = {"log_with": "tensorboard", "logging_dir": folder / "logs"}
train(folder, checkpoint=folder / "run.json", log=folder / "log.jsonl", **logs)
"""


def run_until_killed(folder: Path) -> None:
    """Run `SCRIPT` in another process, which is killed at its eighth step."""
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (TESTS, ROOT)))
    result = subprocess.run(
        [sys.executable, str(folder / "script.py"), str(folder)],
        capture_output=True, text=True, timeout=300, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_model(tmp_path / "tiny")
    write_task(tmp_path / "data")
    return tmp_path


def test_a_killed_process_is_resumed_to_the_same_bits(place):
    """SIGKILL in the second epoch of another process; this one goes on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as there: sums over threads would be rounded in another order
    try:
        run_until_killed(place)
        logs = {"log_with": "tensorboard", "logging_dir": place / "logs"}
        resumed = train(place, checkpoint=place / "run.json", log=place / "log.jsonl", **logs)
        whole = train(place, log=place / "whole.jsonl")
    finally:
        torch.set_num_threads(threads)
    assert_same_adapters(resumed.adapter, whole.adapter)
    pd.testing.assert_frame_equal(
        without_seconds(resumed.history), without_seconds(whole.history), check_exact=True
    )
    assert log_rows(place / "log.jsonl") == log_rows(place / "whole.jsonl")
    rows = [json.loads(line) for line in (place / "log.jsonl").read_text("utf-8").splitlines()]
    reader = EventAccumulator(str(place / "logs"), purge_orphaned_data=False).Reload()
    assert [(event.step, event.value) for event in reader.Scalars("train/loss")] == [
        (row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows if "kind" not in row
    ]


# Frozen layers -------------------------------------------------------------------------------------


@models(("gpt2", "qwen3", "gemma2"))
def test_kept_frozen_layers_change_nothing_but_the_work(
    family, backend, tokenizer_folder, monkeypatch
):
    seen = view(family, backend, tokenizer_folder)
    data, found, rows, true = task(), [], [], Trainer.run

    def count(_module: nn.Module, args: Any, kwargs: Any) -> None:
        rows[-1].append((args[0] if args else kwargs["hidden_states"]).shape[0])

    def run(self: Trainer) -> Any:
        """Only here, without the checks of the model before."""
        rows.append([])
        handle = seen.blocks[0].register_forward_pre_hook(count, with_kwargs=True)
        try:
            return true(self)
        finally:
            handle.remove()

    monkeypatch.setattr(Trainer, "run", run)
    for keep in (False, True):
        result = finetune(
            seen, data, heads=["L1H2"], norms="circuit", keep_frozen=keep, **{**QUICK, "epochs": 4}
        )
        found.append(result)
    for column in ("train_loss", "target_loss", "target_accuracy"):
        expected = found[0].history[column].tolist()
        assert found[1].history[column].tolist() == pytest.approx(expected, abs=1e-6, nan_ok=True)
    for name, (_, value) in found[0].adapter.slices.items():
        if not (family == "gpt2" and name.endswith("b_K")):
            torch.testing.assert_close(found[1].adapter.slices[name][1], value, rtol=0, atol=1e-5)
    once = len(data.train) + len(data.valid)
    assert sum(rows[0]) == 4 * once + len(data.valid)  # four epochs, five looks
    # Each prompt once, and one more row for each width of a batch, 3 to 9.
    assert once <= sum(rows[1]) <= once + 7


@pytest.mark.parametrize("changes", [{"norms": "all"}, {"scope": "norms"}, {"scope": "full"}])
def test_keep_frozen_where_the_first_layer_is_trained_is_the_ordinary_run(
    changes, tokenizer_folder
):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    plain, kept = (
        finetune(seen, task(), heads=["L1H2"], keep_frozen=keep, **changes, **QUICK)
        for keep in (False, True)
    )
    assert_same_adapters(kept.adapter, plain.adapter)


# The result ----------------------------------------------------------------------------------------


def test_the_result_tells_what_was_done(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    data = task()
    result = finetune(
        seen, data, heads=circuit_for(seen), source=data, metric="loss", seed=3,
        **{**QUICK, "learning_rate": 1e-3},
    )  # fmt: skip
    assert list(result.history.columns) == COLUMNS == list(result.to_dataframe().columns)
    assert result.scope == "decision" and result.heads == (Head(0, 1), Head(1, 2))
    assert result.siblings == (Head(0, 0), Head(1, 3))
    assert (result.n_layers, result.n_heads) == (2, 4)
    d, h = seen.d_model, seen.d_head
    assert result.trained_parameters == 2 * 4 * d * h + 5 * d == result.adapter.elements
    assert result.share == result.trained_parameters / result.total_parameters
    assert result.before["epoch"] == 0 and result.after["epoch"] == result.best_epoch
    assert result.retention == pytest.approx(
        result.after["target_accuracy"] / result.before["target_accuracy"]
    )
    assert result.options["seed"] == 3 and result.options["learning_rate"] == 1e-3
    assert result.options["epochs"] == 2 and set(result.options) == set(
        TrainingOptions().__dataclass_fields__
    )
    assert result.provenance.model_hash == weight_hash(seen)
    assert result.provenance.task_hash == data.train.hash and result.provenance.seed == 3
    assert result.provenance.options["scope"] == "decision"
    assert "Scope decision" in result._repr_html_()
    with result.adapter.applied(seen):
        found = cdt.evaluate(seen, data.valid, data)
    assert found.loss == pytest.approx(result.after["target_loss"], abs=1e-5)
    assert found.accuracy == result.after["target_accuracy"]
    assert found.macro_f1 == pytest.approx(result.after["target_macro_f1"])


def test_retention_without_a_source_or_with_a_hopeless_one_is_nan(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    result = finetune(seen, task(), heads=HEADS, **QUICK)
    assert pd.isna(result.retention) and result.history["source_accuracy"].isna().all()
    history = result.history.assign(source_accuracy=0.0)
    assert pd.isna(dataclasses.replace(result, history=history).retention)


def test_scope_and_rate_by_default(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    quick = {k: v for k, v in QUICK.items() if k != "learning_rate"}
    assert finetune(seen, task(), heads=HEADS, **quick).scope == "decision"
    with pytest.raises(InputError, match=r"expected heads= .* or scope="):
        finetune(seen, task(), **quick)
    for scope in SCOPES:
        result = finetune(
            seen, task(), heads=circuit_for(seen), scope=scope, **quick | {"epochs": 0}
        )
        assert result.options["learning_rate"] == DEFAULT_RATES[scope]


def test_the_same_seed_gives_the_same_bits_whatever_the_global_generator(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    for scope in ("decision", "lora"):
        found = []
        for seed in (0, 0, 1):
            torch.manual_seed(len(found))
            drawn = torch.get_rng_state()
            found.append(finetune(seen, task(), heads=HEADS, scope=scope, seed=seed, **QUICK))
            assert torch.equal(torch.get_rng_state(), drawn)
        assert_same_adapters(found[0].adapter, found[1].adapter)
        with pytest.raises(AssertionError):
            assert_same_adapters(found[0].adapter, found[2].adapter)


# The scope chosen by rule --------------------------------------------------------------------------


@pytest.mark.parametrize("right_in_target", [2, 7])
def test_auto_by_the_gap_is_the_run_of_the_scope_that_it_chose(
    right_in_target, tokenizer_folder, monkeypatch
):
    """From the untouched model's accuracies: one kept most of its margin over 3/7, one did not."""
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    seen.logits(prompts())
    data, source, found = task(), task("source", seed=50), {"tiny": right_in_target, "source": 7}
    true = fine_tuning.evaluate

    def evaluate(model: Any, examples: Any, of: Any) -> Any:
        assert examples.name.endswith("/valid") and of.name in found
        return dataclasses.replace(true(model, examples, of), accuracy=found[of.name] / 7)

    monkeypatch.setattr(fine_tuning, "evaluate", evaluate)
    given = {"heads": circuit_for(seen), "source": source, **QUICK}
    with left_untouched(seen.tl):
        result = finetune(seen, data, scope="auto", **given)
    assert result.scope == ("near-zero" if right_in_target == 7 else "decision")
    assert_same_adapters(result.adapter, finetune(seen, data, scope=result.scope, **given).adapter)
    chosen = result.options["chosen_by"]
    assert (chosen["rule"], chosen["scope"]) == ("gap", result.scope)
    assert chosen["inputs"]["target_accuracy"] == right_in_target / 7
    assert chosen["inputs"]["chance"] == pytest.approx(3 / 7)


def test_auto_by_the_race_takes_the_better_after_one_epoch(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    seen.logits(prompts())
    given = {"heads": circuit_for(seen), **QUICK}
    with left_untouched(seen.tl):
        result = finetune(seen, task(), scope="auto", rule="race", **given)
    after = {
        scope: finetune(seen, task(), scope=scope, **given | {"epochs": 1}).history.iloc[-1]
        for scope in ("norms", "near-zero", "decision", "lora", "full")
    }
    keys = {scope: (row["target_accuracy"], -row["target_loss"]) for scope, row in after.items()}
    assert result.scope == max(keys, key=lambda scope: keys[scope])
    inputs = result.options["chosen_by"]["inputs"]
    assert inputs == {
        f"{scope}_{name}": row[f"target_{name}"]
        for scope, row in after.items()
        for name in ("accuracy", "loss")
    }
    assert result.history["epoch"].tolist() == [0, 1, 2]


def test_the_race_runs_what_the_model_and_the_heads_allow(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    every = ["norms", "near-zero", "decision", "lora", "full"]
    assert fine_tuning._racers(seen, circuit_for(seen)) == every
    assert fine_tuning._racers(seen, HEADS) == ["norms", "decision", "lora", "full"]
    assert fine_tuning._racers(seen, None) == ["norms", "lora", "full"]


def test_the_race_goes_on_without_a_scope_that_diverges(tokenizer_folder, monkeypatch):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    true = Trainer.run

    def run(self: Trainer) -> Any:
        if self.name.endswith(" full") or everything:
            raise NonFiniteError("step 3: the loss is nan")
        return true(self)

    everything: list[str] = []
    monkeypatch.setattr(Trainer, "run", run)
    heads = (head for head in HEADS)
    result = finetune(seen, task(), heads=heads, scope="auto", rule="race", **QUICK)
    inputs = result.options["chosen_by"]["inputs"]
    assert {name.rpartition("_")[0] for name in inputs} == {"norms", "decision", "lora"}
    everything.append("diverges")
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        finetune(seen, task(), heads=HEADS, scope="auto", rule="race", **QUICK)


def test_the_race_goes_on_without_a_scope_that_cannot_be_trained(tokenizer_folder):
    """A circuit of most scored heads leaves too few for `near-zero`."""
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    large = dataclasses.replace(circuit_for(seen), heads=all_heads(seen.n_layers, seen.n_heads)[:5])
    with pytest.warns(CdtLensWarning, match="the race leaves out near-zero: .*only 3 scored heads"):
        result = finetune(seen, task(), heads=large, scope="auto", rule="race", **QUICK)
    raced = {name.rpartition("_")[0] for name in result.options["chosen_by"]["inputs"]}
    assert raced == {"norms", "decision", "lora", "full"}


def test_options_that_would_be_ignored_are_refused(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    with pytest.raises(InputError, match="rule='race': is of scope='auto'; omit it"):
        finetune(seen, task(), heads=HEADS, rule="race", **QUICK)
    with pytest.raises(InputError, match="keep_checkpoint=True: there is none to keep"):
        finetune(seen, task(), heads=HEADS, keep_checkpoint=True, **QUICK)


def test_auto_says_what_it_needs(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    given = {"heads": circuit_for(seen), "scope": "auto", **QUICK}
    with pytest.raises(InputError, match="'auto': tiny has no validation split to choose by"):
        finetune(seen, task(valid=0), source=task(), **given)
    with pytest.raises(InputError, match="'auto' by the gap rule: pass source="):
        finetune(seen, task(), **given)
    with (
        unchecked_types(),
        pytest.raises(InputError, match="rule='best': expected one of gap, race"),
    ):
        finetune(seen, task(), rule="best", **given)
    with pytest.raises(InputError, match="least_retention=0.9: pass source="):
        finetune(seen, task(), rule="race", least_retention=0.9, **given)


# Refusals ------------------------------------------------------------------------------------------


def test_nan_stops_the_run_and_puts_the_model_back(tokenizer_folder, tmp_path, monkeypatch):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    seen.logits(prompts())
    true, calls = Trainer._loss, []

    def loss(self: Trainer, batch: Any) -> Any:
        calls.append(batch)
        return true(self, batch) * (float("nan") if len(calls) == 5 else 1)

    given = {"checkpoint": tmp_path / "run.json", **QUICK, "epochs": 3}
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_loss", loss)
        with (
            left_untouched(seen.tl),
            pytest.raises(NonFiniteError, match=r"tiny decision: step 5 \(epoch 2\).*run.json"),
        ):
            finetune(seen, task(), heads=HEADS, **given)
    resumed = finetune(seen, task(), heads=HEADS, **given)
    assert_same_adapters(
        resumed.adapter,
        finetune(seen, task(), heads=HEADS, **{**given, "checkpoint": None}).adapter,
    )


def one_label(data: Any) -> Any:
    return dataclasses.replace(data, items=tuple(e for e in data if e.label == "neutral"))


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        (
            {"task": dataclasses.replace(task(), train=one_label(task().train))},
            InputError, "tiny/train: all 4 examples have the label 'neutral'",
        ),
        ({"task": task(train=0)}, InputError, "tiny/train: no examples"),
        ({"source": task("source", valid=0)}, InputError, "source/valid: no examples"),
        ({"task": task(valid=0), "patience": 2}, InputError, "patience=2: tiny has no validation"),
        (
            {"task": dataclasses.replace(task(), verbalizer={}, verbalizer_ids={}), "metric": "macro_f1"},
            InputError, "metric='macro_f1': tiny has no verbalizer; use accuracy",
        ),
        ({"scope": "decison"}, InputError, "'decison': expected one of .*did you mean 'decision'"),
        ({"epoch": 3}, InputError, "'epoch': unknown; did you mean 'epochs'?"),
        ({"epochs": -1}, InputError, "epochs=-1"),
        ({"scope": "near-zero"}, InputError, "near-zero.*no scores"),
        ({"heads": []}, InputError, "'decision': expected a circuit, or heads"),
        ({"heads": ["L0H9"]}, InputError, "L0H9"),
        ({"heads": ["first"]}, InputError, "'first': expected the form L9H6"),
        ({"scope": "random", "heads": None}, InputError, "'random': expected a circuit, or heads"),
    ],
)  # fmt: skip
@models(("llama",))
def test_what_cannot_be_trained_is_refused_beforehand(
    family, backend, given, error, told, tokenizer_folder, monkeypatch
):
    model = wrap(family, backend, tokenizer_folder, torch.float32)
    model(prompts())
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("it ran"))
    with left_untouched(model), pytest.raises(error, match=told):
        finetune(model, **{"task": task(), "heads": HEADS, **QUICK, **given})


def test_validation_on_the_training_examples_is_warned_of(tokenizer_folder):
    seen, data = view("llama", "bridge", tokenizer_folder, torch.float32), task()
    same = dataclasses.replace(data, valid=dataclasses.replace(data.train, name="tiny/valid"))
    with pytest.warns(CdtLensWarning, match="tiny/valid: all 13 examples are also in tiny/train"):
        finetune(seen, same, heads=HEADS, **QUICK)


@models(("gpt2", "llama"))
def test_a_prompt_longer_than_the_context_is_refused_beforehand(
    family, backend, tokenizer_folder, monkeypatch
):
    """On rotary models the bridge would go on past the positions that were trained."""
    model = wrap(family, backend, tokenizer_folder, torch.float32)
    data = task()
    long = dataclasses.replace(data.train[0], tokens=(5,) * 65)
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("it ran"))
    for name in ("train", "valid"):
        split = dataclasses.replace(getattr(data, name), items=(*data.train.items, long))
        changed = dataclasses.replace(data, **{name: split})
        with pytest.raises(InputError, match="prompt of 65 tokens.*at most 64"):
            finetune(model, changed, heads=HEADS, **QUICK)
    with pytest.raises(InputError, match="prompt of 65 tokens"):
        finetune(model, data, heads=HEADS, source=changed, **QUICK)


def test_a_circuit_of_another_model_is_refused_with_both_hashes(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    other = other_weights("llama", tokenizer_folder, torch.float32)
    with pytest.raises(ArtifactError) as caught:
        finetune(seen, task(), heads=circuit_for(other), **QUICK)
    for each in (seen, other):
        assert weight_hash(each)[:12] in str(caught.value)


def test_what_is_no_model_is_refused():
    with unchecked_types(), pytest.raises(InputError, match="expected a HookedTransformer or"):
        finetune(nn.Linear(2, 2), task(), heads=HEADS)


@models(("llama",))
def test_lora_needs_a_bridge(family, backend, tokenizer_folder):
    model = wrap(family, backend, tokenizer_folder, torch.float32)
    if backend == "bridge":
        assert finetune(model, task(), scope="lora", **QUICK).scope == "lora"
        return
    with pytest.raises(UnsupportedModelError, match="'lora' needs a TransformerBridge.*backend="):
        finetune(model, task(), scope="lora", **QUICK)


def test_the_loop_looks_at_validation_data_only(tokenizer_folder, monkeypatch):
    """The test split decides nothing, and the source task's training split is never read."""
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    looked = []
    true = training.evaluate

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        looked.append(args[1].name)
        return true(*args, **kwargs)

    monkeypatch.setattr(training, "evaluate", evaluate)
    finetune(seen, task(), heads=HEADS, source=task("source", seed=50), **QUICK)
    assert set(looked) == {"tiny/valid", "source/valid"}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_parameters_of_an_adapter_are_the_trained_ones(family, tokenizer_folder):
    """A tied embedding is one weight."""
    seen = view(family, "bridge", tokenizer_folder, torch.float32)
    for scope in ("full", "norms"):
        result = finetune(seen, task(), scope=scope, **QUICK)
        assert result.adapter.parameters == result.trained_parameters <= result.total_parameters
