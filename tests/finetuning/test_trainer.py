"""The training loop against a literal one: plain Hugging Face, dense gradients, `torch.optim.AdamW`."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.checks import assert_same_bits, left_untouched
from helpers.hf_layout import selected
from helpers.shared import models
from helpers.tiny_models import Float64Throughout, build, prompts
from helpers.tiny_tasks import ANSWERS
from helpers.tiny_training import HEADS, QUICK, split, task
from helpers.wrapped import tokenizer, view
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import get_scheduler

from cdt_lens.core import set_aside as set_aside_module
from cdt_lens.core.errors import InputError, NonFiniteError
from cdt_lens.finetuning import trainer as training
from cdt_lens.finetuning.answer_pass import AnswerPass
from cdt_lens.finetuning.checkpoints import Checkpoint, Log
from cdt_lens.finetuning.finetune import finetune, make_trainable
from cdt_lens.finetuning.options import TrainingOptions
from cdt_lens.finetuning.scopes import choose_by_race
from cdt_lens.finetuning.trainer import Trained, Trainer, epoch_batches, rank_of
from cdt_lens.models.heads import Head
from cdt_lens.models.loading import bridge_of
from cdt_lens.models.view import ModelView
from cdt_lens.models.weights import named_weights
from cdt_lens.tasks.evaluate import Evaluation
from cdt_lens.tasks.task import Task

COLUMNS = [
    "epoch", "step", "train_loss", "learning_rate", "target_loss", "target_accuracy",
    "target_macro_f1", "source_accuracy", "seconds",
]  # fmt: skip
CHOSEN = tuple(map(Head.parse, HEADS))


def train(seen: ModelView, data: Task, options: TrainingOptions, **given: Any) -> Trained:
    """One run of the loop over the slices of `HEADS` and the norms, whose values stay."""
    trainable = make_trainable(seen, "decision", CHOSEN, options)
    with trainable.attached():
        return Trainer(AnswerPass(seen), trainable, data, options, progress=False, **given).run()


def options(**changes: Any) -> TrainingOptions:
    given = {k: v for k, v in QUICK.items() if k != "progress"}
    return TrainingOptions(**{**given, **changes})


# A literal reference -------------------------------------------------------------------------------


def reference(model: Any, data: Task, options: TrainingOptions, masks: dict[str, Tensor]) -> list:
    """AdamW over all of Hugging Face's parameters; what is not selected is put back each step.

    Prompts run one by one and unpadded. Decay on matrices. Returns (loss, norm, rate) by step.
    """
    model.requires_grad_(True)
    named = dict(model.named_parameters())
    frozen = {name: p.detach().clone() for name, p in named.items()}
    matrices = [p for p in named.values() if p.ndim > 1]
    vectors = [p for p in named.values() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
    )
    plan = [batch for e in range(options.epochs) for batch in epoch_batches(data.train, options, e)]
    rows = []
    for step, batch in enumerate(plan):
        adam.zero_grad()
        loss = sum(loss_of(model, data.train[i], options.loss) for i in batch) / len(batch)
        loss.backward()
        for name, parameter in named.items():
            parameter.grad *= masks[name]
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in named.values()))
        if options.clip and norm > options.clip:
            for parameter in named.values():
                parameter.grad *= options.clip / (norm + 1e-6)
        for group in adam.param_groups:
            group["lr"] = rate_at(step, len(plan), options)
        adam.step()
        with torch.no_grad():
            for name, parameter in named.items():
                parameter[~masks[name]] = frozen[name][~masks[name]]
        rows.append((float(loss.detach()), norm, rate_at(step, len(plan), options)))
    return rows


def loss_of(model: Any, example: Any, over: str) -> Tensor:
    logits = model(torch.tensor([example.tokens])).logits[0, -1]
    if over == "vocabulary":
        return cross_entropy(logits, torch.tensor(example.answers[0]))
    return cross_entropy(logits[[*example.answers, *example.others]], torch.tensor(0))


def rate_at(step: int, steps: int, options: TrainingOptions) -> float:
    """Up from one share of the peak to the peak in the warm-up steps, then down to nearly 0."""
    warm = min(math.ceil(options.warmup * steps), steps - 1)
    assert options.learning_rate is not None
    if step < warm:
        return options.learning_rate * (step + 1) / warm
    left = (steps - step) / (steps - warm)
    if options.schedule == "cosine":
        return options.learning_rate * 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return options.learning_rate * left


def assert_same_weights(seen: ModelView, model: Any, folder: str, atol: float) -> None:
    expected = named_weights(ModelView(bridge_of(model, tokenizer(folder), dtype=torch.float64)))
    found = named_weights(seen)
    for name, value in expected.items():
        if name in found:
            difference = float((found[name] - value).abs().max())
            assert difference <= atol, f"{name}: {difference:.2e}"


CASES = {
    "plain": {},
    "harsh": {"weight_decay": 2.0, "clip": 0.3, "warmup": 0.4, "batch_size": 4},
    "no clipping, cosine": {"clip": 0.0, "schedule": "cosine", "warmup": 0.0},
    "vocabulary": {"loss": "vocabulary", "batch_size": 13},
}


@models(("gpt2", "pythia", "qwen2", "qwen3", "gemma2"))
def test_equals_the_literal_loop(family, backend, tokenizer_folder, tmp_path):
    check_against_the_literal_loop(family, backend, "decision", tokenizer_folder, tmp_path)


@models(("gpt2", "pythia"))
def test_full_fine_tuning_equals_the_literal_loop(family, backend, tokenizer_folder, tmp_path):
    """Tied embeddings and fused projections."""
    check_against_the_literal_loop(family, backend, "full", tokenizer_folder, tmp_path)


@pytest.mark.parametrize(("family", "scope"), [("gemma2", "full"), ("qwen3", "norms")])
def test_other_scopes_equal_the_literal_loop(family, scope, tokenizer_folder, tmp_path):
    check_against_the_literal_loop(family, "bridge", scope, tokenizer_folder, tmp_path)


def check_against_the_literal_loop(
    family: str, backend: str, scope: str, tokenizer_folder: str, tmp_path: Path
) -> None:
    """Weights, losses, norms and rates, in float64, after six steps, for every scope and class."""
    chosen = options(**CASES["harsh" if scope == "decision" else "plain"])
    data = task(valid=0)
    with Float64Throughout():
        own = build(family)
        total = sum(p.numel() for p in own.parameters())
        heads = [(h.layer, h.head) for h in CHOSEN] if scope == "decision" else []
        masks = selected(own, heads)
        if scope == "full":
            masks = {name: torch.ones_like(mask) for name, mask in masks.items()}
        expected = reference(own, data, chosen, masks)
        seen = view(family, backend, tokenizer_folder)
        result = finetune(
            seen, data, heads=HEADS, scope=scope, options=chosen, keep=True, progress=False,
            log=tmp_path / "log.jsonl",
        )  # fmt: skip
        assert_same_weights(seen, own, tokenizer_folder, atol=1e-9)
    lines = steps_of(tmp_path / "log.jsonl")
    assert len(lines) == len(expected) >= 6
    for line, (loss, norm, rate) in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-9)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-7)
        assert line["learning_rate"] == pytest.approx(rate, rel=1e-12)
    assert result.trained_parameters == sum(int(mask.sum()) for mask in masks.values())
    assert result.total_parameters == total


@pytest.mark.parametrize("case", CASES)
def test_equals_the_literal_loop_with_other_options(case, tokenizer_folder):
    data, chosen = task(valid=0), options(**CASES[case])
    with Float64Throughout():
        own = build("llama")
        reference(own, data, chosen, selected(own, [(h.layer, h.head) for h in CHOSEN]))
        seen = view("llama", "bridge", tokenizer_folder)
        train(seen, data, chosen)
        assert_same_weights(seen, own, tokenizer_folder, atol=1e-9)


def steps_of(log: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    return [row for row in rows if "kind" not in row]


# Batches and rates ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "size"), [(13, 5), (24, 4), (3, 16), (100, 3)])
def test_every_example_once_an_epoch(n, size):
    data, chosen = split(n, 0, "many"), options(batch_size=size)
    for epoch in range(3):
        batches = epoch_batches(data, chosen, epoch)
        assert len(batches) == math.ceil(n / size)
        assert Counter(i for batch in batches for i in batch) == Counter(range(n))
        assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)


def test_batches_depend_on_the_seed_and_the_epoch_alone():
    data = split(30, 0, "many")
    drawn = [
        epoch_batches(data, options(seed=seed), epoch) for seed in range(3) for epoch in range(3)
    ]
    assert len({str(batches) for batches in drawn}) == 9
    torch.manual_seed(5)
    assert epoch_batches(data, options(seed=1), 2) == drawn[5]
    assert epoch_batches(data, options(seed=1, learning_rate=1.0, epochs=9), 2) == drawn[5]


def test_prompts_of_like_length_share_a_batch():
    data = split(32, 0, "many")
    spread = [
        max(lengths) - min(lengths)
        for batch in epoch_batches(data, options(batch_size=4), 0)
        for lengths in [[len(data[i].tokens) for i in batch]]
    ]
    assert sum(spread) / len(spread) <= 1.5  # 3 to 9 tokens: batches at random would spread by 4


def rates(steps: int, **changes: Any) -> list[float]:
    return [training._rates(options(learning_rate=0.5, **changes), steps)(s) for s in range(steps)]


def test_no_step_of_the_warm_up_is_lost():
    assert rates(10, warmup=0.3) == pytest.approx(
        [0.5 / 3, 1 / 3, 0.5, 0.5, *(0.5 * left / 7 for left in range(6, 0, -1))]
    )
    assert rates(4, warmup=1.0) == pytest.approx([0.5 / 3, 1 / 3, 0.5, 0.5])
    assert rates(1, warmup=0.1) == [0.5]  # all of a tiny run
    for schedule in ("linear", "cosine", "constant_with_warmup", "constant"):
        for share in (0.0, 0.05, 0.5, 1.0):
            for steps in (1, 2, 7):
                found = rates(steps, warmup=share, schedule=schedule)
                assert all(0 < rate <= 0.5 for rate in found), (schedule, share, steps)
                if share or schedule != "cosine":
                    assert max(found) == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_after_the_warm_up_rates_are_transformers_own(schedule):
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.5)
    theirs = get_scheduler(schedule, dummy, 3, 12)
    expected = []
    for _ in range(12):
        expected.append(theirs.get_last_lr()[0])
        dummy.step()
        theirs.step()
    assert rates(12, warmup=0.25, schedule=schedule)[3:] == pytest.approx(expected[3:])


# Accumulation and losses ---------------------------------------------------------------------------


@models(("llama",))
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_accumulated_parts_equal_one_batch(family, backend, micro_batch, tokenizer_folder):
    found = []
    for size in (None, micro_batch):
        with Float64Throughout():
            seen = view(family, backend, tokenizer_folder)
            run = train(seen, task(), options(micro_batch=size, epochs=1))
        found.append((named_weights(seen), run.history[-1]))
    for name, value in found[0][0].items():
        assert float((found[1][0][name] - value).abs().max()) <= 1e-10, name
    for column in ("train_loss", "target_loss"):
        assert found[1][1][column] == pytest.approx(found[0][1][column], rel=1e-10)


def test_several_right_answers_share_the_probability(tokenizer_folder, tmp_path):
    """As in generated tasks: minus the log of what the answers have together, of the candidates."""
    base = task(train=6, valid=0)
    items = tuple(
        dataclasses.replace(e, answers=(5, 6)[: 1 + i % 2], others=(7, 8, 9)[: 1 + i % 3])
        for i, e in enumerate(base.train)
    )
    data = dataclasses.replace(base, train=dataclasses.replace(base.train, items=items))
    for over in ("labels", "vocabulary"):
        seen = view("llama", "bridge", tokenizer_folder)
        log = tmp_path / f"{over}.jsonl"
        expected = []
        for e in items:
            logits = seen.logits(torch.tensor([e.tokens]))[0, -1]
            among = logits[[*e.answers, *e.others]] if over == "labels" else logits
            expected.append(float(among.logsumexp(0) - logits[list(e.answers)].logsumexp(0)))
        train(seen, data, options(loss=over, batch_size=6, epochs=1), log=Log(log))
        assert steps_of(log)[0]["loss"] == pytest.approx(sum(expected) / 6, abs=1e-6)


def test_steps_below_half_precision_add_up(tokenizer_folder):
    """Each step is a sixteenth of what bf16 can tell from 1; the masters are float32."""
    seen = view("llama", "bridge", tokenizer_folder, torch.bfloat16)
    start = named_weights(seen)["ln_final.w"].clone()
    plain = options(learning_rate=2**-11, schedule="constant", warmup=0.0, epochs=12)
    train(seen, task(valid=0), plain)
    found = named_weights(seen)["ln_final.w"]
    near_1 = (start > 1) & (start < 2)
    assert found.dtype == torch.bfloat16 and int(near_1.sum()) > 10
    assert float((found != start)[near_1].double().mean()) > 0.5


# Looking at validation data ------------------------------------------------------------------------


@models(("llama", "gpt2"))
def test_the_history(family, backend, tokenizer_folder, tmp_path):
    seen = view(family, backend, tokenizer_folder, torch.float32)
    data, source = task(), task("source", seed=50)
    chosen = options(epochs=5, evaluate_every=2, learning_rate=2e-3)
    run = train(seen, data, chosen, source=source, log=Log(tmp_path / "log.jsonl"))
    table = pd.DataFrame(run.history)
    assert list(table.columns) == COLUMNS
    assert table["epoch"].tolist() == [0, 2, 4, 5]  # the last epoch is always looked at
    assert table["step"].tolist() == [0, 6, 12, 15]
    assert set(table["learning_rate"]) == {2e-3}
    assert table["seconds"].iloc[0] == 0 and table["seconds"].is_monotonic_increasing
    assert table["seconds"].iloc[-1] == run.seconds > 0
    losses = [row["loss"] for row in steps_of(tmp_path / "log.jsonl")]
    assert len(losses) == 15
    expected = [sum(losses[:6]) / 6, sum(losses[6:12]) / 6, sum(losses[12:]) / 3]
    assert table["train_loss"].tolist()[1:] == pytest.approx(expected)
    assert math.isnan(table["train_loss"][0])
    plain = view(family, backend, tokenizer_folder, torch.float32)
    before = by_hand(plain, data)
    assert table["target_accuracy"][0] == before[0]
    assert table["target_loss"][0] == pytest.approx(before[1], rel=1e-5)
    assert table["source_accuracy"][0] == by_hand(plain, source)[0]
    assert table["target_macro_f1"].between(0, 1).all()
    # The model holds the best epoch's values.
    assert by_hand(seen, data)[1] == pytest.approx(
        table.set_index("epoch")["target_loss"][run.best_epoch], rel=1e-5
    )


def by_hand(seen: ModelView, data: Task) -> tuple[float, float]:
    """Validation accuracy and mean loss, each prompt alone."""
    ids = torch.tensor(list(ANSWERS.values()))
    right, losses = 0, []
    for example in data.valid:
        logits = seen.logits(torch.tensor([example.tokens]))[0, -1][ids]
        gold = list(ANSWERS).index(example.label)
        right += int(logits.argmax() == gold)
        losses.append(float(cross_entropy(logits, torch.tensor(gold))))
    return right / len(losses), sum(losses) / len(losses)


def scripted(monkeypatch: pytest.MonkeyPatch, rows: Sequence[tuple[float, float]]) -> None:
    """Looks at validation data find these accuracies and losses, whatever the model."""
    left = list(rows)

    def evaluate(_view: Any, examples: Any, _task: Any, **_: Any) -> Evaluation:
        accuracy, loss = left.pop(0)
        return Evaluation(examples.name, accuracy, 1 - accuracy, 0.0, loss, len(examples), accuracy)

    monkeypatch.setattr(training, "evaluate", evaluate)


@pytest.mark.parametrize(
    ("metric", "rows", "best"),
    [
        ("accuracy", [(0.4, 1.0), (0.5, 1.0), (0.6, 1.0), (0.6, 1.1)], 2),
        ("accuracy", [(0.4, 1.0), (0.6, 1.0), (0.6, 0.9), (0.6, 1.1)], 2),  # a tie: the lower loss
        ("accuracy", [(0.6, 1.0), (0.6, 1.0), (0.5, 0.1), (0.4, 0.1)], 0),  # none better: untouched
        ("loss", [(0.4, 1.0), (0.9, 1.1), (0.1, 0.9), (0.9, 1.0)], 2),
        ("macro_f1", [(0.4, 1.0), (0.3, 1.0), (0.5, 1.0), (0.6, 1.0)], 1),  # here 1 - accuracy
    ],
)
def test_the_best_epochs_values_are_kept(metric, rows, best, monkeypatch, tokenizer_folder):
    data = task()
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    start = named_weights(seen)["blocks.1.attn.W_Q"].clone()
    values = [start]
    true = Trainer._validate

    def look(self: Trainer, state: Any) -> None:
        values.append(named_weights(seen)["blocks.1.attn.W_Q"].clone())
        true(self, state)

    monkeypatch.setattr(Trainer, "_validate", look)
    scripted(monkeypatch, rows)
    run = train(seen, data, options(epochs=3, metric=metric))
    assert run.best_epoch == best and run.stopped == "all epochs"
    assert torch.equal(named_weights(seen)["blocks.1.attn.W_Q"], values[best])
    assert not torch.equal(values[1], values[2])


@pytest.mark.parametrize(
    ("patience", "accuracies", "stopped", "epochs"),
    [
        (1, [0.5, 0.6, 0.6, 0.9, 0.9], "early: no better for 1 evaluations", 2),
        (2, [0.5, 0.4, 0.4, 0.9, 0.9], "early: no better for 2 evaluations", 2),
        (2, [0.5, 0.4, 0.6, 0.5, 0.5], "all epochs", 4),  # it would stop after the last anyway
        (3, [0.5, 0.4, 0.4, 0.6, 0.5], "all epochs", 4),
        (None, [0.5, 0.4, 0.4, 0.4, 0.4], "all epochs", 4),
    ],
)
def test_a_run_that_gets_no_better_stops(
    patience, accuracies, stopped, epochs, monkeypatch, tokenizer_folder
):
    scripted(monkeypatch, [(a, 1.0) for a in accuracies])
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    run = train(seen, task(), options(epochs=4, patience=patience))
    assert (run.stopped, run.history[-1]["epoch"]) == (stopped, epochs)


def test_without_validation_data_the_last_epoch_is_kept(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    start = named_weights(seen)["ln_final.w"].clone()
    run = train(seen, task(valid=0), options(epochs=3, evaluate_every=2))
    assert run.best_epoch == 3
    assert [row["epoch"] for row in run.history] == [0, 2, 3]
    assert all(math.isnan(row["target_accuracy"]) for row in run.history)
    assert not torch.equal(named_weights(seen)["ln_final.w"], start)


def test_no_epochs_is_a_look_and_nothing_more(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    before = {name: value.clone() for name, value in named_weights(seen).items()}
    run = train(seen, task(), options(epochs=0))
    assert [row["epoch"] for row in run.history] == [0] and run.best_epoch == 0
    for name, value in named_weights(seen).items():
        assert torch.equal(value, before[name])


def test_it_learns(tokenizer_folder):
    """An easy task: the answer is the last word's; from chance to all right, on unseen prompts."""
    labels = list(ANSWERS)

    def easy(data: Any) -> Any:
        items = []
        for i, e in enumerate(data):
            label = labels[i % 3]
            others = tuple(v for k, v in ANSWERS.items() if k != label)
            items.append(
                dataclasses.replace(
                    e, tokens=(*e.tokens[:-1], 100 + i % 3), label=label,
                    answers=(ANSWERS[label],), others=others,
                )
            )  # fmt: skip
        return dataclasses.replace(data, items=tuple(items))

    base = task(train=36, valid=18)
    data = dataclasses.replace(base, train=easy(base.train), valid=easy(base.valid))
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    run = train(seen, data, options(epochs=6, weight_decay=0.0, batch_size=6))
    assert run.history[0]["target_accuracy"] < 0.7
    assert run.history[-1]["target_accuracy"] == 1.0
    assert run.history[-1]["target_loss"] < 0.1


# What stops a run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_it_reaches_the_weights(
    what, monkeypatch, tokenizer_folder, tmp_path
):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    true, calls = Trainer._loss, []

    def loss(self: Trainer, batch: Any) -> Tensor:
        calls.append(batch)
        found = true(self, batch)
        if len(calls) < 5:
            return found
        if what == "loss":
            return found * math.nan
        return found + (0 * found).sqrt()  # finite, with an infinite slope

    monkeypatch.setattr(Trainer, "_loss", loss)
    checkpoint = Checkpoint(tmp_path / "run.json", {"a": 1})
    weights = []
    true_step = Trainer._step

    def step(self: Trainer, *args: Any) -> Any:
        weights.append({n: v.clone() for n, v in named_weights(seen).items()})
        return true_step(self, *args)

    monkeypatch.setattr(Trainer, "_step", step)
    with pytest.raises(NonFiniteError) as caught:
        train(seen, task(), options(epochs=3), checkpoint=checkpoint, name="javanese decision")
    told = str(caught.value)
    assert told.startswith("javanese decision: step 5 (epoch 2): the ")
    assert (what in told) and "nan" in told and str(checkpoint.path) in told
    assert "learning rate (0.01 now)" in told
    for name, value in named_weights(seen).items():
        assert torch.equal(value, weights[-1][name]), name
    state = checkpoint.load()
    assert state is not None and (state.epoch, state.step) == (1, 3)
    assert all(bool(v.isfinite().all()) for v in (*state.masters.values(), *state.moments.values()))


def test_the_loop_wants_a_rate(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    with pytest.raises(InputError, match="learning_rate: expected a number"):
        train(seen, task(), options(learning_rate=None))


@models(("gpt2", "qwen3"))
@pytest.mark.parametrize(
    ("scope", "more"),
    [("full", {}), ("norms", {}), ("lora", {}), ("decision", {"micro_batch": 2}),
     ("decision", {"norms": "circuit", "keep_frozen": True})],
)  # fmt: skip
def test_gradient_checkpointing_keeps_every_bit(family, backend, scope, more, tokenizer_folder):
    """Each block runs twice in a step, and what is learnt has the same bits."""
    if scope == "lora" and backend == "hooked":
        pytest.skip("LoRA needs the bridge")
    seen = view(family, backend, tokenizer_folder, torch.float32)
    seen.logits(prompts())  # a bridge attaches hooks of its own at its first run
    heads = ["L1H2", "L1H0"] if scope == "decision" else None
    calls = [0]
    last = seen.blocks[-1]
    counted = last.attn.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    found, counts = [], []
    for checkpointed in (False, True):
        calls[0] = 0
        with left_untouched(seen.tl):
            result = finetune(
                seen, task(), heads=heads, scope=scope, gradient_checkpointing=checkpointed,
                **QUICK | more,
            )  # fmt: skip
        found.append(result)
        counts.append(calls[0])
        assert all("forward" not in vars(block) for block in seen.blocks)
    counted.remove()
    assert counts[1] > counts[0]
    plain, recomputed = (result.adapter for result in found)
    assert plain.elements and recomputed.slices.keys() == plain.slices.keys()
    for name, (_, value) in plain.slices.items():
        assert_same_bits(recomputed.slices[name][1], value)
    for name, value in plain.whole.items():
        assert_same_bits(recomputed.whole[name], value)
    assert found[0].history.drop(columns="seconds").equals(found[1].history.drop(columns="seconds"))


@models(("gpt2",))
@pytest.mark.parametrize("scope", ["full", "decision"])
def test_copies_on_the_disk_change_no_bit(family, backend, scope, tokenizer_folder, monkeypatch):
    """Nor does a run that resumes, and the model is restored from the file."""
    seen = view(family, backend, tokenizer_folder, torch.float32)
    seen.logits(prompts())  # a bridge attaches hooks of its own at its first run
    heads = ["L0H1"] if scope == "decision" else None
    adapters = []
    for limit in (2**28, 0):
        monkeypatch.setattr(set_aside_module, "IN_MEMORY", limit)
        with left_untouched(seen.tl):
            adapters.append(finetune(seen, task(), heads=heads, scope=scope, **QUICK).adapter)
    for name, value in adapters[0].whole.items():
        assert_same_bits(adapters[1].whole[name], value)


@models(("qwen3",))
def test_a_disk_that_fills_up_in_training_leaves_the_model(
    family, backend, tokenizer_folder, monkeypatch
):
    """The best values of the first evaluations are kept; there is no room for the next."""
    seen = view(family, backend, tokenizer_folder, torch.float32)
    seen.logits(prompts())  # a bridge attaches hooks of its own at its first run
    left = [2]

    def reserve(*_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(set_aside_module, "IN_MEMORY", 0)
    monkeypatch.setattr(set_aside_module, "_reserve", reserve)
    with left_untouched(seen.tl), pytest.raises(InputError, match="GB of weights cannot be kept"):
        finetune(seen, task(valid=0), scope="full", **QUICK)
    assert left[0] < 0


def test_a_share_that_is_just_kept_is_kept():
    """0.9 * 0.8 is 0.7200000000000001."""
    rows = [{"source_accuracy": n, "target_accuracy": 0.5, "target_loss": 1.0} for n in (0.8, 0.72)]
    options = TrainingOptions(least_retention=0.9)
    assert rank_of(rows[1], rows[0], options)[0] == 1.0
    kept = {
        "a": rows[1],
        "b": {"source_accuracy": 0.71, "target_accuracy": 0.9, "target_loss": 0.1},
    }
    assert choose_by_race(kept, least_retention=0.9, source_before=0.8).scope == "a"


def test_without_validation_rows_the_last_epoch_that_keeps_enough_is_kept(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    source = task("source", seed=50, train=21)
    finetune(seen, source, scope="full", keep=True, **QUICK | {"epochs": 8})
    source = dataclasses.replace(source, valid=source.train, train=source.train[:1])
    given = {**QUICK, "epochs": 6, "learning_rate": 3e-2, "least_retention": 0.8}
    result = finetune(seen, task(valid=0), scope="full", source=source, **given)
    rows = result.history.to_dict("records")
    able = [r["epoch"] for r in rows if r["source_accuracy"] >= 0.8 * rows[0]["source_accuracy"]]
    assert result.best_epoch == max(able) < len(rows) - 1


@pytest.mark.parametrize("least", [None, 0.8])
def test_an_epoch_is_kept_only_if_it_holds_enough_of_the_source(least, tokenizer_folder):
    """By the history alone: the best of the epochs whose source accuracy is high enough."""
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    given = {
        **QUICK,
        "epochs": 6,
        "learning_rate": 3e-2,
        "metric": "loss",
        "least_retention": least,
    }
    source = task("source", seed=50, train=21)
    finetune(seen, source, scope="full", keep=True, **QUICK | {"epochs": 8})
    source = dataclasses.replace(source, valid=source.train, train=source.train[:1])
    result = finetune(seen, task(), scope="full", source=source, **given)
    rows = result.history.to_dict("records")
    first = rows[0]["source_accuracy"]
    able = [r for r in rows if least is None or r["source_accuracy"] >= least * first]
    assert result.best_epoch == min(able, key=lambda row: row["target_loss"])["epoch"]
    if least is None:
        return
    assert len(able) < len(rows), "no epoch forgets too much, so nothing is tested"
