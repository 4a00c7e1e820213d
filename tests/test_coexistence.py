"""A caller's own hooks, caches, modes and flags beside ours: seen, counted, kept, or refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.checks import assert_close, assert_same_bits, left_untouched
from helpers.shared import models
from helpers.tiny_models import prompts
from helpers.tiny_tasks import examples
from helpers.tiny_training import QUICK, task
from helpers.wrapped import needs_hooked, wrap
from torch import Tensor, nn

import cdt_lens as cdt
from cdt_lens.circuits.ablation import circuit_metric
from cdt_lens.core.errors import InputError
from cdt_lens.decomposition.baseline import zero_baseline
from cdt_lens.models.caller_hooks import caller_hooks, lifted
from cdt_lens.models.heads import all_heads
from cdt_lens.scoring.edge_scores import score_edges

CLASSES = ("gpt2", "llama")
DATA = examples()
TUNED: dict[str, Any] = {**QUICK, "heads": ("L0H1",), "epochs": 1}


@pytest.fixture
def model(family: str, backend: str, tokenizer_folder: str) -> nn.Module:
    """One of a test's own, past a bridge's first run, at which it attaches hooks for good."""
    made = wrap(family, backend, tokenizer_folder, torch.float32)
    made(prompts(1, 3))
    return made


def calls(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """The numbers of each kind of function: plain, replayed, differentiated, trained."""
    quiet: dict[str, Any] = {"progress": False}
    data, zero = DATA, zero_baseline(model, DATA)
    return {
        "evaluate": lambda: torch.tensor(cdt.evaluate(model, data).direction),
        "mean_activations": lambda: cdt.mean_activations(model, data, **quiet).means,
        "score_heads": lambda: cdt.score_heads(model, data, zero, **quiet).values,
        "exact_ablation": lambda: cdt.exact_ablation(model, data, zero, **quiet).values,
        "one_pass": lambda: cdt.one_pass(model, data, zero, **quiet).values,
        "circuit_metric": lambda: circuit_metric(model, [["L0H1"]], data, zero, **quiet),
        "attention_view": lambda: cdt.attention_view(model, data[:1], [cdt.Head(1, 0)]).patterns[0],
        "finetune": lambda: torch.tensor(
            cdt.finetune(model, task(), **TUNED).history["train_loss"]
        ),
    }


# What a caller may attach: a name and how; each edits the model's activations.
def _steer(value: Tensor, hook: Any = None) -> Tensor:
    return value + 0.5 * torch.linspace(-1, 1, value.shape[-1]).to(value)


def _in_place(value: Tensor, hook: Any = None) -> Tensor:
    value[..., 0] = value[..., 0] + 1.0
    return value


def _silence(value: Tensor, hook: Any = None) -> Tensor:
    value = value.clone()
    value[:, :, 2] = 0.0
    return value


def _before_block(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (_steer(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _steer(kwargs["hidden_states"])}


EDITS: dict[str, Callable[[Any], Any]] = {
    "embedding": lambda m: m.add_hook("hook_embed", _steer),
    "z": lambda m: m.add_hook("blocks.0.attn.hook_z", _silence),
    "queries": lambda m: m.add_hook("blocks.1.attn.hook_q", _steer),
    "stream": lambda m: m.add_hook("blocks.1.hook_resid_post", _steer),
    "stream in place": lambda m: m.add_hook("blocks.1.hook_resid_pre", _in_place),
    "torch's own": lambda m: m.blocks[1].register_forward_pre_hook(_before_block, with_kwargs=True),
}


def by_hand(model: Any, hooks: list[tuple[str, Any]] = ()) -> Tensor:
    """The task direction of each example, by TransformerLens alone; logits."""
    found = []
    for example in DATA:
        batch = next(DATA[DATA.items.index(example) :].take(1).batches(1))
        with torch.no_grad():
            logits = model.run_with_hooks(batch.tokens, fwd_hooks=list(hooks))
        chosen = logits[0, -1].float()[batch.candidates[0]]
        found.append((chosen * batch.direction[0]).sum())
    return torch.stack(found)


def balanced(values: Tensor) -> Tensor:
    groups = [[i for i, e in enumerate(DATA) if e.label == label] for label in DATA.labels]
    return torch.stack([values[group].mean() for group in groups]).mean()


# Hooks that look -----------------------------------------------------------------------------------


@models(CLASSES)
def test_looking_hooks_change_no_number_and_stay(family, backend, model):
    expected = {name: call() for name, call in calls(model).items()}
    seen: list[str] = []
    _, cache = model.run_with_cache(prompts(1, 3))
    for name in cache:
        model.add_hook(name, lambda value, hook, name=name: seen.append(name))
    model.blocks[0].register_forward_hook(lambda *_: seen.append("torch"))
    for name, call in calls(model).items():
        seen.clear()
        with left_untouched(model):
            found = call()
        assert_same_bits(found, expected[name])
        assert {"torch", "blocks.1.attn.hook_z"} <= set(seen), name


@models(CLASSES)
def test_we_work_inside_hooks_and_caches_and_leave_them_working(family, backend, model):
    tokens = prompts(2, 6)
    _, before = model.run_with_cache(tokens)
    expected = cdt.evaluate(model, DATA).direction
    seen: list[Tensor] = []
    look = [("blocks.0.attn.hook_z", lambda value, hook: seen.append(value))]
    with model.hooks(fwd_hooks=look), left_untouched(model):
        assert cdt.evaluate(model, DATA).direction == expected
        cdt.exact_ablation(model, DATA, zero_baseline(model, DATA), progress=False)
    count = len(seen)
    assert count > 0
    _, after = model.run_with_cache(tokens)
    assert len(seen) == count, "the hooks of the `with` are gone"
    assert list(before) == list(after)
    for name in before:
        assert_same_bits(after[name], before[name])


@models(("gpt2",))
def test_a_hook_that_raises_is_heard_and_nothing_stays_behind(family, backend, model):
    def refuse(value: Tensor, hook: Any) -> None:
        raise ZeroDivisionError("in hook_z")

    for name, call in calls(model).items():
        given = model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", refuse)])
        with left_untouched(model), pytest.raises(ZeroDivisionError, match="hook_z"), given:
            call()
        assert call().isfinite().sum() > 0, name  # works again


# Hooks that edit -----------------------------------------------------------------------------------


@models(("gpt2",))
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_a_part_of_the_model(family, backend, model, edit):
    """Evaluation and exact ablation equal TransformerLens' own interventions beside the edit."""
    plain = balanced(by_hand(model))
    EDITS[edit](model)
    full = by_hand(model)
    assert abs(balanced(full) - plain) > 1e-3, "the edit does something"
    with left_untouched(model):
        assert_close(torch.tensor(cdt.evaluate(model, DATA).direction), balanced(full), atol=2e-5)
        zero = zero_baseline(model, DATA)
        scores = cdt.exact_ablation(model, DATA, zero, progress=False)
    assert len(scores.provenance.options["caller_hooks"]) == 1, "the result says so"
    for head in all_heads(scores.n_layers, scores.n_heads):

        def without(value: Tensor, hook: Any, number: int = head.head) -> Tensor:
            value = value.clone()
            value[:, :, number] = 0.0
            return value

        ablated = by_hand(model, [(f"blocks.{head.layer}.attn.hook_z", without)])
        assert_close(scores.per_example[:, head.layer, head.head], full - ablated, atol=2e-5)


@models(("gpt2",))
@pytest.mark.parametrize("edit", ["z", "stream in place"])
def test_means_and_patterns_are_of_the_edited_model(family, backend, model, edit):
    EDITS[edit](model)
    name, where = "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern"
    example = DATA[:1]
    _, cache = model.run_with_cache(next(example.batches(1)).tokens)
    found = cdt.mean_activations(model, example, positions="pooled", progress=False)
    assert_close(found.means[1, 0].float(), cache[name][0].mean(0), atol=1e-5)
    seen = cdt.attention_view(model, example, [cdt.Head(1, 3)])
    assert_close(seen.patterns[0][0], cache[where][0, 3], atol=1e-6)


@models(("gpt2",))
@pytest.mark.parametrize("edit", EDITS)
def test_gradients_are_of_the_edited_model(family, backend, model, edit):
    """d(direction)/dz . z summed over positions, by hand on the edited model."""
    EDITS[edit](model)
    zero = zero_baseline(model, DATA)
    found = cdt.one_pass(model, DATA, zero, slopes="gradient", progress=False)
    batch = next(DATA[:1].batches(1))
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> Tensor:
        layer = int(hook.name.split(".")[1])
        kept[layer] = value.detach().requires_grad_() if layer == 0 else value
        kept[layer].retain_grad()
        return kept[layer]

    names = [(f"blocks.{layer}.attn.hook_z", keep) for layer in range(2)]
    with torch.enable_grad():
        logits = model.run_with_hooks(batch.tokens, fwd_hooks=names)
        (logits[0, -1][batch.candidates[0]] * batch.direction[0]).sum().backward()
    for layer, z in kept.items():
        expected = (z.grad * z.detach())[0].sum((0, 2))
        assert_close(found.per_example[0, layer], expected, atol=2e-5)


@models(("gpt2", "llama"))
def test_heads_that_a_hook_cuts_off_have_a_gradient_of_zero(family, backend, model):
    """As exact ablation says: with a layer's attention knocked out its heads do nothing."""
    baseline = cdt.mean_activations(model, DATA, progress=False)
    model.add_hook("blocks.1.hook_attn_out", lambda value, hook: torch.zeros_like(value))
    exact = cdt.exact_ablation(model, DATA, baseline, progress=False)
    fast = cdt.one_pass(model, DATA, baseline, slopes="gradient", progress=False)
    assert float(exact.values[1].abs().max()) < 1e-6
    assert not fast.values[1].any() and bool(fast.values[0].all())
    edges = score_edges(
        model, DATA, cdt.mean_activations(model, DATA, mlps=True, progress=False),
        rules="ablation", progress=False,
    )  # fmt: skip
    assert not edges.to_heads[:, :, 1].any(), "nothing of them reaches the logits"


@models(("gpt2", "llama"))
def test_a_stream_put_in_from_elsewhere_leaves_nothing_before_it(family, backend, model):
    """Activation patching of the whole stream: no head below matters, in any method."""
    baseline = cdt.mean_activations(model, DATA, progress=False)
    with torch.no_grad():
        stored = model.run_with_cache(prompts(1, 1))[1]["blocks.1.hook_resid_pre"][0, 0]
    model.add_hook("blocks.1.hook_resid_pre", lambda value, hook: stored.expand_as(value).clone())
    for found in (
        cdt.exact_ablation(model, DATA, baseline, progress=False),
        cdt.attribution_patching(model, DATA, baseline, progress=False),
    ):
        assert float(found.values[0].abs().max()) < 1e-6
        assert float(found.values[1].abs().max()) > 0


@models(("gpt2", "llama"))
def test_a_hook_through_which_no_gradient_goes_is_named(family, backend, model):
    """The bridge's softmax keeps its output for the gradient; HookedTransformer hands on a copy."""

    def in_place(pattern: Tensor, hook: Any) -> Tensor:
        pattern[..., 0] *= 0.5
        return pattern

    baseline = zero_baseline(model, DATA)
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", in_place)]):
        if backend == "bridge":
            with pytest.raises(InputError, match="in place") as caught:
                cdt.attribution_patching(model, DATA, baseline, progress=False)
            assert "blocks.1.attn.hook_pattern" in str(caught.value)
            assert "\n" not in str(caught.value)
            return
        found = cdt.attribution_patching(model, DATA, baseline, progress=False)
    copied = [("blocks.1.attn.hook_pattern", lambda pattern, hook: in_place(pattern.clone(), hook))]
    with model.hooks(fwd_hooks=copied):
        expected = cdt.attribution_patching(model, DATA, baseline, progress=False)
    assert_close(found.values, expected.values, atol=1e-6)


@models(("gpt2",))
def test_training_and_judging_are_of_the_edited_model(family, backend, model):
    plain = cdt.finetune(model, task(), **TUNED).before["target_loss"]
    EDITS["stream"](model)
    with left_untouched(model):
        result = cdt.finetune(model, task(), **TUNED)
    judged = cdt.evaluate(model, task().valid, task())
    assert result.before["target_loss"] == pytest.approx(judged.loss, rel=1e-4)
    assert abs(result.before["target_loss"] - plain) > 1e-3


def _noise(value: Tensor, hook: Any = None) -> Tensor:
    return value + torch.randn_like(value)


BEHIND: dict[str, Callable[[Any], Any]] = {
    "logits": lambda m: m.unembed.register_forward_hook(lambda _m, _a, out: out + _ramp(out)),
    "one logit": lambda m: m.unembed.register_forward_hook(lambda _m, _a, out: _one(out)),
    "whole model": lambda m: m.register_forward_hook(lambda _m, _a, out: 2 * out),
    "random": lambda m: m.add_hook("blocks.0.hook_resid_post", _noise),
}


def _ramp(value: Tensor) -> Tensor:
    return torch.linspace(0, 3, value.shape[-1]).to(value)


def _one(value: Tensor) -> Tensor:
    value = value.clone()
    value[..., 20] += 0.1
    return value


@models(("gpt2",))
@pytest.mark.parametrize("edit", BEHIND)
def test_an_edit_that_would_act_by_half_is_refused(family, backend, model, edit):
    chosen = calls(model)
    BEHIND[edit](model)
    for name in ("evaluate", "score_heads", "exact_ablation", "one_pass", "finetune"):
        with (
            left_untouched(model),
            pytest.raises(InputError, match="your hooks .on .*incompletely"),
        ):
            chosen[name]()


@models(("gpt2",))
def test_rules_that_do_not_follow_an_edit_are_refused_and_say_so(family, backend, model):
    zero = zero_baseline(model, DATA)
    rules = [cdt.Rules(attention="decomposed"), cdt.Rules(attention="half"), "linear"]
    quiet: dict[str, Any] = {"progress": False}
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    for each in rules:
        cdt.score_heads(model, DATA, zero, rules=each, **quiet)  # looking is no edit
    handle.remove()
    EDITS["stream"](model)
    for each in rules:
        with pytest.raises(InputError, match="blocks.1.hook_.*edit activations.*exact_ablation"):
            cdt.score_heads(model, DATA, zero, rules=each, **quiet)
    with pytest.raises(InputError, match="slopes by formula.*cannot follow"):
        cdt.one_pass(model, DATA, zero, slopes="linear", **quiet)


@models(("gpt2",))
def test_an_edit_attached_before_or_after_the_check_counts_alike(family, backend, model):
    fresh = wrap(family, backend, str(model.tokenizer.name_or_path), torch.float32)
    cdt.evaluate(model, DATA)  # the check of the architecture is done
    for each in (model, fresh):
        EDITS["z"](each)
    assert cdt.evaluate(model, DATA).direction == cdt.evaluate(fresh, DATA).direction


@models(("gpt2",))
def test_only_the_callers_hooks_are_found_and_lifted(family, backend, model):
    assert caller_hooks(model) == ()
    fired: list[str] = []
    for name in ("first", "second"):
        model.add_hook("blocks.0.attn.hook_z", lambda v, hook, name=name: fired.append(name))
    model.blocks[1].register_full_backward_hook(lambda *_: fired.append("backward"))
    point = "blocks.0.attn.hook_z" if backend == "hooked" else "blocks.0.attn.o.hook_in"
    assert set(caller_hooks(model)) == {point, "blocks.1"}
    with left_untouched(model), lifted(model):
        assert caller_hooks(model) == ()
        model(prompts(1, 3))
    assert not fired
    with pytest.raises(ZeroDivisionError), left_untouched(model), lifted(model):
        raise ZeroDivisionError
    model(prompts(1, 3))
    assert fired == ["first", "second"]


# Modes, types and flags ----------------------------------------------------------------------------


MODES = [(nullcontext, True), (torch.no_grad, False), (torch.inference_mode, True)]


@models(("gpt2",))
def test_modes_of_the_caller_change_no_number(family, backend, model):
    expected = {name: call() for name, call in calls(model).items()}
    model.train()
    for mode, flag in MODES:
        model.requires_grad_(flag)
        for name, call in calls(model).items():
            with left_untouched(model), mode():
                found = call()
            assert_close(found.clone(), expected[name], atol=1e-6)
        assert all(module.training for module in model.modules()), "left in train()"


@models(("gpt2",))
def test_a_model_in_bfloat16_stays_so_and_gives_float32_scores(family, backend, tokenizer_folder):
    low = wrap(family, backend, tokenizer_folder, torch.bfloat16)
    high = wrap(family, backend, tokenizer_folder, torch.float32)
    low(prompts(1, 3))
    low.add_hook("blocks.0.attn.hook_z", lambda value, hook: None)
    expected = calls(high)
    for name, call in calls(low).items():
        with left_untouched(low):
            found = call().float()
        wanted = expected[name]().float()
        assert bool((found.isnan() == wanted.isnan()).all()), name
        error = (found - wanted).nan_to_num().norm() / wanted.nan_to_num().norm()
        assert float(error) < 0.15, f"{name}: {error:.3f}"
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


@models(("gpt2",))
@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_the_caller_change_no_number_or_are_refused(family, backend, model, flag):
    expected = {name: call() for name, call in calls(model).items()}
    switch = getattr(model, f"set_{flag}", None)
    if switch is None:
        pytest.skip(f"this class has no set_{flag}")
    try:
        switch(True)
    except (AssertionError, NotImplementedError, ValueError) as error:
        pytest.skip(f"TransformerLens itself refuses it: {error}")
    refused = []
    for name, call in calls(model).items():
        with left_untouched(model):
            try:
                found = call()
            except cdt.UnsupportedModelError as error:
                assert f"set_{flag}(False)" in str(error)
                refused.append(name)
                continue
        # After steps of training, another order of sums is seen.
        assert_close(found, expected[name], atol=1e-3 if name == "finetune" else 1e-5)
    assert getattr(model.cfg, flag) is True, "left as it was"
    if family == "gpt2" and backend == "hooked":
        splits = flag in ("use_split_qkv_input", "use_attn_in")
        assert refused == (["finetune"] if splits else [])


# Devices -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("backend", [pytest.param("hooked", marks=needs_hooked), "bridge"])
def test_a_model_on_a_gpu_gives_the_same_numbers_on_the_cpu(backend, tokenizer_folder):
    model = wrap("llama", backend, tokenizer_folder, torch.float32)
    expected = {name: call() for name, call in calls(model).items()}
    model.to("cuda")
    model.add_hook("blocks.0.attn.hook_z", lambda value, hook: None)
    for name, call in calls(model).items():
        with left_untouched(model):
            found = call()
        assert found.device.type == "cpu", name
        assert_close(found, expected[name], atol=1e-3)  # other kernels, TF32 where it is on
