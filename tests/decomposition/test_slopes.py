"""The slopes: direct logit attribution by hand, the presets as limits of sweeps, refusals."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from helpers.checks import assert_close, assert_same_bits, unchecked_types
from helpers.shared import models, shared
from helpers.tiny_models import Float64Throughout, build
from helpers.tiny_tasks import examples
from helpers.wrapped import wrap
from torch import Tensor

from cdt_lens.core.errors import InputError, UnsupportedModelError
from cdt_lens.decomposition import slopes as slopes_module
from cdt_lens.decomposition.baseline import Baseline, mean_activations, zero_baseline
from cdt_lens.decomposition.gated_pass import GatedPass
from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.decomposition.rules import PRESETS
from cdt_lens.decomposition.slopes import SLOPES, Slopes, resolve_slopes, slope_hooks
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.one_pass import one_pass
from cdt_lens.tasks.metrics import task_direction
from cdt_lens.tasks.task import Example, Examples

# Scores are kept as float32.
KEPT = 2e-6


def means(view: ModelView, data: Examples) -> Baseline:
    return mean_activations(view, data, progress=False)


# Direct logit attribution by hand -------------------------------------------------------------------


def norm_weights(family: str) -> tuple[Tensor, list[Tensor | None], bool]:
    """Weights of the final norm and of each norm behind attention; whether norms subtract means."""
    hf_model: Any = build(family)
    if family == "gpt2":
        return hf_model.transformer.ln_f.weight, [None] * 2, True
    if family == "pythia":
        return hf_model.gpt_neox.final_layer_norm.weight, [None] * 2, True
    if family.startswith("gemma"):
        behind = [1 + layer.post_attention_layernorm.weight for layer in hf_model.model.layers]
        return 1 + hf_model.model.norm.weight, behind, False
    return hf_model.model.norm.weight, [None] * 2, False


def by_hand(view: ModelView, family: str, item: Example, baseline: Baseline) -> Tensor:
    """(z - mean) @ W_O through the recorded scales, dot the difference of unembeddings."""
    more = {"use_cache": False} if view.is_bridge else {}
    with torch.no_grad():
        logits, cache = view.tl.run_with_cache(torch.tensor([item.tokens]), **more)
    final, behind, centred = norm_weights(family)
    scores = torch.zeros(view.n_layers, view.n_heads, dtype=torch.float64)
    for head in all_heads(view.n_layers, view.n_heads):
        name = f"blocks.{head.layer}"
        z = cache[f"{name}.attn.hook_z"][0, -1, head.head]
        away = z - baseline.means[head.layer, 1, head.head]  # slot 1: the answer position
        written = away @ view.blocks[head.layer].attn.W_O[head.head]
        weight = behind[head.layer]
        if weight is not None:
            written = written / cache[f"{name}.ln1_post.hook_scale"][0, -1] * weight
        if centred:
            written = written - written.mean()
        moved = written / cache["ln_final.hook_scale"][0, -1] * final @ view.tl.unembed.W_U
        cap = view.logit_softcap
        if cap is not None:
            capped = logits[0, -1]
            moved = moved * capped / (cap * torch.atanh(capped / cap))
        scores[head.layer, head.head] = (
            moved[list(item.answers)].mean() - moved[list(item.others)].mean()
        )
    return scores


@models(("gpt2", "llama", "pythia", "gemma2", "gemma3"))
def test_direct_slopes_are_direct_logit_attribution_by_hand(family, backend, tokenizer_folder):
    """Prompts of five lengths, batched and padded here, alone there."""
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline = means(view, data)
        found = one_pass(view, data, baseline, slopes="direct", batch_size=4, progress=False)
        for number, item in enumerate(data):
            expected = by_hand(view, family, item, baseline)
            assert_close(found.per_example[number], expected, atol=KEPT)
    assert bool((found.per_example.abs() > 1e-4).any())


# Presets as limits of sweeps ------------------------------------------------------------------------


@models(("gpt2", "llama", "gemma2"))
@pytest.mark.parametrize(
    ("slopes", "rules"),
    [("stable", "stable"), ("shared", "shared"), ("gradient", "ablation"), ("linear", "linear")],
)
def test_slopes_are_the_first_order_of_the_rules_of_their_name(
    family, backend, slopes, rules, tokenizer_folder
):
    """A sweep whose baseline lies a small step from z, over that step, on either side of z."""
    heads, step = (Head(0, 1), Head(0, 2), Head(1, 0)), 1e-4
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        batch = next(data.batches(len(data)))
        at = means(view, data).for_batch(view, batch)
        found, _ = GatedPass(view, SLOPES[slopes]).scores(batch, at, [1.0], "mean")
        z = view.run(batch.tokens, [("z", layer) for layer in range(view.n_layers)])

        def swept(head: Head, step: float) -> Tensor:
            def near(layer: int) -> Tensor:
                return z["z", layer] + step * (at(layer) - z["z", layer])

            engine = Propagator(view, batch.tokens, batch.lengths, near, PRESETS[rules])
            mask = torch.zeros(1, 1, 1, view.n_heads, dtype=torch.bool)
            mask[..., head.head] = True
            irrel = engine.candidate_logits(engine.propagate({head.layer: mask}), batch.candidates)
            full = engine.full_logits(batch.candidates)
            return task_direction(full - irrel, batch.direction)[0] / step

        for head in heads:
            expected = (swept(head, step) + swept(head, -step)) / 2
            assert_close(found[:, head.layer, head.head].sum(-1), expected, atol=2e-7)


@models(("gpt2", "llama"))
def test_half_attention_lies_midway_between_pattern_and_values(family, backend, tokenizer_folder):
    """One attention layer lies above layer 0, so the two paths through it are shared by halves."""
    tangent = {"norm": "tangent", "activation": "tangent", "product": "tangent"}
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        batch = next(data.batches(len(data)))
        at = means(view, data).for_batch(view, batch)

        def found(attention: Any, cut: tuple[str, ...] = ()) -> Tensor:
            passes = GatedPass(view, Slopes(attention=attention, **tangent))
            with view.hooked({(name, 1): Tensor.detach for name in cut}):
                return passes.scores(batch, at, [1.0], "mean")[0][:, 0]

        by_values, by_pattern = found("frozen"), found("tangent", ("v",))
        half = found("half")
    assert_close(half, (by_values + by_pattern) / 2, atol=1e-12)
    assert float((by_values - by_pattern).abs().max()) > 1e-3


# Gradient interaction modifications by hand ---------------------------------------------------------


class TemperedSoftmax(torch.autograd.Function):
    """The softmax, with the slope of one at temperature 2 as GIM's authors define it."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        ctx.save_for_backward(scores)
        return scores.softmax(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        soft = (ctx.saved_tensors[0] / 2).softmax(-1)
        return soft * (gradient - (soft * gradient).sum(-1, keepdim=True))


def shared_out(value: Tensor, by: int) -> Tensor:
    """The value, with its gradient divided."""
    return value / by + (value - value / by).detach()


def frozen_norm(x: Tensor, norm: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt().detach()
    return centred / scale * norm.weight + norm.bias


def gim_by_hand(view: ModelView, item: Example, baseline: Baseline) -> Tensor:
    """GPT-2 from Hugging Face's weights, from the z of layer 0 on; z of layer 1 on the way."""
    hf_model: Any = build("gpt2").transformer
    more = {"use_cache": False} if view.is_bridge else {}
    with torch.no_grad():
        _, cache = view.tl.run_with_cache(torch.tensor([item.tokens]), **more)
    n = len(item.tokens)
    z = [cache[f"blocks.{layer}.attn.hook_z"][0].clone() for layer in (0, 1)]
    z[0].requires_grad_()
    resid = cache["blocks.0.hook_resid_pre"][0]
    zs: list[Tensor] = []
    for layer, block in enumerate(hf_model.h):
        if layer == 0:
            mixed = z[0]
        else:
            q, k, v = block.attn.c_attn(frozen_norm(resid, block.ln_1)).view(n, 3, 4, 16).unbind(1)
            q, k, v = shared_out(q, 4), shared_out(k, 4), shared_out(v, 2)
            scores = torch.einsum("qhd,khd->hqk", q, k) / 4
            scores = scores.masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf)
            mixed = torch.einsum("hqk,khd->qhd", TemperedSoftmax.apply(scores), v)
        zs.append(mixed)
        resid = resid + block.attn.c_proj(mixed.reshape(n, 64))
        resid = resid + block.mlp(frozen_norm(resid, block.ln_2))
    logits = frozen_norm(resid[-1], hf_model.ln_f) @ hf_model.wte.weight.T
    d = logits[list(item.answers)].mean() - logits[list(item.others)].mean()
    gradients = torch.autograd.grad(d, zs)
    rows = []
    for layer, gradient in enumerate(gradients):
        mean = baseline.means[layer, 0].expand(n, 4, 16).clone()
        mean[-1] = baseline.means[layer, 1]
        rows.append((gradient * (zs[layer].detach() - mean)).sum((0, 2)))
    return torch.stack(rows)


@models(("gpt2",))
def test_gim_slopes_by_hand(family, backend, tokenizer_folder):
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline = means(view, data)
        found = one_pass(view, data, baseline, slopes="gim", batch_size=4, progress=False)
        for number, item in enumerate(data):
            assert_close(found.per_example[number], gim_by_hand(view, item, baseline), atol=KEPT)
        plain = one_pass(view, data, baseline, slopes="gradient", progress=False)
    assert not torch.allclose(found.per_example[:, 0], plain.per_example[:, 0], atol=1e-3)


@models(("llama",))
def test_a_tempered_pattern_with_values_and_gates_shared_by_halves(
    family, backend, tokenizer_folder
):
    """One MLP lies above layer 1: each factor of its product gets half of its gradient."""
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        batch = next(data.batches(len(data)))
        at = means(view, data).for_batch(view, batch)

        def found(slopes: Slopes, cut: str = "") -> Tensor:
            with view.hooked({(cut, 1): Tensor.detach} if cut else {}):
                return GatedPass(view, slopes).scores(batch, at, [1.0], "mean")[0][:, 1]

        plain = Slopes("tangent", "tangent", "tangent", "tangent")
        by_gate, by_linear = found(plain, "pre_linear"), found(plain, "pre")
        half = found(Slopes("tangent", "tempered", "tangent", "half"))
    assert_close(half, (by_gate + by_linear) / 2, atol=1e-12)


def test_a_tempered_pattern_bears_entries_of_0():
    """Masked keys have no gradient, and rounding to 0 makes no NaN."""
    scores = torch.tensor([[0.0, -300.0, 1.0, -torch.inf]], requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    pattern = slopes_module._tempered_softmax(scores.softmax(-1))
    (found,) = torch.autograd.grad((pattern * weights).sum(), scores)
    (expected,) = torch.autograd.grad((TemperedSoftmax.apply(scores) * weights).sum(), scores)
    assert_close(found, expected, atol=1e-6)
    assert_same_bits(pattern, scores.softmax(-1))


# What the hooks leave alone -------------------------------------------------------------------------


@models(("gpt2", "llama"))
@pytest.mark.parametrize("slopes", SLOPES)
def test_no_value_changes(family, backend, slopes, tokenizer_folder):
    """In float32 to the bit, at the end of the model."""
    view = shared(family, backend, tokenizer_folder, torch.float32)
    tokens = next(examples().batches(6)).tokens
    with view.quiet(gradients=True):
        plain = view.stream(tokens)[0][-1]
        with view.hooked(slope_hooks(view, SLOPES[slopes])):
            hooked = view.stream(tokens)[0][-1]
    assert_same_bits(hooked, plain)


@models(("gpt2", "llama"))
@pytest.mark.parametrize("slopes", ["linear", "direct"])
def test_float16_bears_a_large_residual_stream(family, backend, slopes, tokenizer_folder):
    """Squares of a stream of some hundreds go past 65504; the norms' slopes must not square it."""
    found = []
    for dtype in (torch.float16, torch.float32):
        model = wrap(family, backend, tokenizer_folder, dtype)
        embedding = model.embed.weight if backend == "bridge" else model.W_E
        embedding.detach().mul_(3000.0)
        view, data = ModelView(model), examples()
        baseline = zero_baseline(view, data)
        found.append(one_pass(view, data, baseline, slopes=slopes, progress=False).values)
    assert bool(torch.isfinite(found[0]).all())
    # Ten bits of mantissa, through two layers.
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.05


# Refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [field.name for field in fields(Slopes)])
def test_an_unknown_choice_is_refused_by_name(field: str):
    wrong: Any = {field: "nonsense"}
    with unchecked_types(), pytest.raises(InputError, match=f"{field}='nonsense': expected one of"):
        Slopes(**wrong)


def test_presets_are_found_by_name():
    assert all(resolve_slopes(name) is slopes for name, slopes in SLOPES.items())
    own = Slopes(norm="tangent")
    assert resolve_slopes(own) is own
    with pytest.raises(InputError, match=r"slopes='liner': expected one of linear.*direct"):
        resolve_slopes("liner")


def test_slopes_that_a_model_has_not_are_refused(tokenizer_folder, monkeypatch):
    """An MLP of another form has derivatives, but no secant and no factors to share."""
    monkeypatch.setattr(ModelView, "activation", lambda self, layer: None)
    view = ModelView(wrap("llama", "bridge", tokenizer_folder, torch.float32))
    for slopes in (Slopes(), Slopes(activation="tangent"), Slopes(product="tangent")):
        with pytest.raises(UnsupportedModelError, match="only .*tangent.* use slopes='stable'"):
            GatedPass(view, slopes)
    for name in ("stable", "shared", "gradient", "direct"):
        GatedPass(view, SLOPES[name])
