"""One backward pass gives what sweeps, finite differences and exact ablations give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.attention_only import attention_only
from helpers.checks import assert_close, left_untouched, unchecked_types
from helpers.shared import EVERY_FAMILY, models, shared
from helpers.tiny_models import EXPERTS, Float64Throughout
from helpers.tiny_tasks import examples
from helpers.wrapped import needs_hooked, wrap

from cdt_lens.circuits.ablation import circuit_metric
from cdt_lens.core.errors import InputError, NonFiniteError
from cdt_lens.decomposition.baseline import Baseline, mean_activations, zero_baseline
from cdt_lens.decomposition.gated_pass import GatedPass
from cdt_lens.decomposition.rules import Rules
from cdt_lens.decomposition.slopes import Slopes
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.view import ModelView
from cdt_lens.models.weights import named_weights
from cdt_lens.scoring.one_pass import one_pass, position_relevance
from cdt_lens.scoring.sweep import score_heads
from cdt_lens.tasks.metrics import task_direction
from cdt_lens.tasks.task import Examples

# Scores are kept as float32.
KEPT = 2e-6


def means(view: ModelView, data: Examples) -> Baseline:
    return mean_activations(view, data, progress=False)


@models()
def test_linear_slopes_give_what_a_sweep_with_the_linear_rules_gives(
    family, backend, tokenizer_folder
):
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline = means(view, data)
        swept = score_heads(view, data, baseline, rules="linear", progress=False)
        found = one_pass(view, data, baseline, slopes="linear", batch_size=3, progress=False)
    assert_close(found.per_example, swept.per_example, atol=KEPT)
    assert_close(found.values, swept.values, atol=KEPT)
    assert_close(found.stderr, swept.stderr, atol=KEPT)
    assert found.direction == pytest.approx(swept.direction, abs=1e-9)
    assert found.example_labels == swept.example_labels


@models(("gpt2", "llama"))
def test_linear_slopes_of_a_stream_as_small_as_epsilon(family, backend, tokenizer_folder):
    """Whether a norm centres its input is not seen from its scale there, unless epsilon counts."""
    written = ("embed.W_E", "pos_embed.W_pos", "W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")
    with Float64Throughout():
        view, data = ModelView(wrap(family, backend, tokenizer_folder)), examples()
        with torch.no_grad():
            for name, weight in named_weights(view).items():
                if name.endswith(written):
                    weight.mul_(0.003).add_(0.0015 if name == "embed.W_E" else 0.0)
        baseline = means(view, data)
        assert float(view.run(next(data.batches(6)).tokens).resid[-1].std()) < 0.02
        swept = score_heads(view, data, baseline, rules="linear", progress=False)
        found = one_pass(view, data, baseline, slopes="linear", progress=False)
    assert_close(found.per_example, swept.per_example, atol=KEPT)


@models((*EVERY_FAMILY, *EXPERTS))
def test_plain_derivatives_are_those_of_the_ablated_model(family, backend, tokenizer_folder):
    """d(direction) / d(gate) against a central difference of real, partly ablated forward passes."""
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline = means(view, data)
        batch = next(data.batches(len(data)))
        at = baseline.for_batch(view, batch)
        found, full = GatedPass(view, Slopes("tangent", "tangent", "tangent", "tangent")).scores(
            batch, at, [1.0], "mean"
        )

        def direction(layer: int, head: int, gate: float) -> torch.Tensor:
            def partly(z: torch.Tensor) -> torch.Tensor:
                z = z.clone()
                mean = at(layer).expand(z.shape)[:, :, head]
                z[:, :, head] = mean + gate * (z[:, :, head] - mean)
                return z

            with view.hooked({("z", layer): partly}):
                logits = view.logits(batch.tokens)
            rows = torch.arange(len(data))
            last = logits[rows, batch.lengths - 1].gather(1, batch.candidates)
            return task_direction(last, batch.direction)

        step = 3e-5
        for layer, head in ((0, 0), (0, 3), (1, 1)):
            slope = (direction(layer, head, 1 + step) - direction(layer, head, 1 - step)) / 2 / step
            assert_close(found[:, layer, head].sum(-1), slope, atol=1e-7)
        assert_close(full, direction(0, 0, 1.0), atol=1e-10)


@models(("gpt2", "llama", "gemma2"))
def test_along_the_path_the_scores_add_up_to_what_ablating_every_head_takes(
    family, backend, tokenizer_folder
):
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline = means(view, data)
        found = one_pass(view, data, baseline, slopes="gradient", steps=60, progress=False)
        everyone = all_heads(view.n_layers, view.n_heads)
        full, empty = circuit_metric(view, [everyone, ()], data, baseline, progress=False).tolist()
    # The midpoint rule of 60 steps errs by the third derivative / (24 x 3600).
    assert float(found.values.sum()) == pytest.approx(full - empty, abs=1e-4)
    assert found.direction == pytest.approx(full, abs=1e-9)


@models(("gpt2", "llama"))
def test_the_two_ends_are_the_slopes_at_both(family, backend, tokenizer_folder):
    """Their mean; the one at the ablated model against a central difference of real runs."""
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline = means(view, data)
        found = one_pass(view, data, baseline, slopes="gradient", steps="ends", progress=False)
        plain = one_pass(view, data, baseline, slopes="gradient", progress=False)
        batch = next(data.batches(len(data)))
        at = baseline.for_batch(view, batch)

        def direction(head: Head, gate: float) -> torch.Tensor:
            def pinned(layer: int) -> Any:
                def hook(z: torch.Tensor) -> torch.Tensor:
                    pin = at(layer).expand(z.shape).clone()
                    if layer == head.layer:
                        away = z[:, :, head.head] - pin[:, :, head.head]
                        pin[:, :, head.head] += gate * away
                    return pin

                return hook

            with view.hooked({("z", layer): pinned(layer) for layer in range(view.n_layers)}):
                logits = view.logits(batch.tokens)
            last = logits[torch.arange(len(data)), batch.lengths - 1].gather(1, batch.candidates)
            return task_direction(last, batch.direction)

        step = 3e-5
        for head in (Head(0, 2), Head(1, 1)):
            slope = (direction(head, step) - direction(head, -step)) / 2 / step
            at_full = plain.per_example[:, head.layer, head.head]
            in_order = torch.empty_like(at_full)
            in_order[list(batch.index)] = slope.to(in_order)
            mean = (in_order + at_full) / 2
            assert_close(found.per_example[:, head.layer, head.head], mean, atol=KEPT)


@models(("gpt2", "llama", "qwen3"))
@pytest.mark.parametrize(
    ("slopes", "rules"),
    [
        (Slopes(product="gate"), Rules("frozen", "frozen", "frozen", "gate")),
        (Slopes(activation="tangent"), None),
    ],
)
def test_other_slopes(family, backend, slopes, rules, tokenizer_folder):
    """The gate as a constant is a sweep's rule too; a tangent differs from a secant."""
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline = means(view, data)
        found = one_pass(view, data, baseline, slopes=slopes, progress=False)
        linear = one_pass(view, data, baseline, slopes="linear", progress=False)
        if rules is not None:
            swept = score_heads(view, data, baseline, rules=rules, progress=False)
            assert_close(found.per_example, swept.per_example, atol=KEPT)
    same = rules is not None and family == "gpt2"  # no gate there
    assert torch.allclose(found.values, linear.values, atol=1e-5) == same


@models(("gpt2", "llama"))
def test_positions_add_up_to_the_head(family, backend, tokenizer_folder):
    view, data = shared(family, backend, tokenizer_folder), examples()
    baseline = means(view, data)
    by_position = position_relevance(view, data, baseline, batch_size=2)
    whole = one_pass(view, data, baseline, progress=False)
    assert_close(by_position.nansum(-1), whole.per_example, atol=1e-5)
    lengths = [len(example.tokens) for example in data]
    assert by_position[:, 0, 0].isfinite().sum(-1).tolist() == lengths
    # The first position's z in the last layer never reaches the answer of a longer prompt.
    assert bool((by_position[:, -1, :, 0] == 0).all())


@models(("gpt2", "llama"))
def test_batches_and_padding_change_nothing(family, backend, tokenizer_folder):
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline = means(view, data)
        together = one_pass(view, data, baseline, steps=2, progress=False)
        alone = one_pass(view, data, baseline, steps=2, batch_size=1, progress=False)
    assert_close(together.per_example, alone.per_example, atol=KEPT)


@models(("gpt2", "llama"))
@pytest.mark.parametrize("trainable", [True, False])
def test_the_model_is_left_as_it_was(family, backend, trainable, tokenizer_folder):
    model = wrap(family, backend, tokenizer_folder, torch.float32)
    model.requires_grad_(trainable)
    data = examples()
    baseline = zero_baseline(model, data)
    ModelView(model).run(next(data.batches(2)).tokens)  # a bridge wires its own hooks on first use
    with left_untouched(model), torch.no_grad():
        one_pass(model, data, baseline, slopes="linear", progress=False)
        position_relevance(model, data, baseline)


def test_wrong_arguments_are_refused(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    baseline = zero_baseline(view, data)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"steps": 0}, "steps=0: expected a whole number of at least 1"),
        ({"slopes": "steep"}, "expected one of linear, stable, shared, gradient, direct"),
    ]
    for arguments, words in refused:
        with pytest.raises(InputError, match=words):
            one_pass(view, data, baseline, progress=False, **arguments)
    wrong: Any = "flat"
    with (
        unchecked_types(),
        pytest.raises(InputError, match="norm='flat': expected one of frozen, tangent"),
    ):
        Slopes(norm=wrong)


@models(("gpt2",))
@pytest.mark.parametrize("trainable", [True, False])
def test_inference_mode_around_it_changes_nothing(family, backend, trainable, tokenizer_folder):
    """Whatever the caller makes there, the baseline too, is fit for a backward pass."""
    model = wrap(family, backend, tokenizer_folder, torch.float32)
    model.requires_grad_(trainable)
    data = examples()
    options: dict[str, Any] = {"direction": "strongest", "progress": False}
    expected = one_pass(model, data, means(ModelView(model), data), **options)
    ModelView(model).run(next(data.batches(2)).tokens)
    with left_untouched(model), torch.inference_mode():
        baseline = means(ModelView(model), data)
        found = one_pass(model, data, baseline, **options)
        by_position = position_relevance(model, data, baseline)
        assert torch.is_inference_mode_enabled()
    assert_close(found.values, expected.values, atol=0)
    assert by_position.shape[:3] == found.per_example.shape


def test_weights_made_in_inference_mode_are_refused_with_the_fix(tokenizer_folder):
    with torch.inference_mode():
        model = wrap("gpt2", "bridge", tokenizer_folder, torch.float32).requires_grad_(False)
    data = examples()
    baseline = zero_baseline(model, data)
    with pytest.raises(
        InputError, match=r"weights were created under torch.inference_mode.*outside"
    ):
        one_pass(model, data, baseline, progress=False)
    score_heads(model, data, baseline, heads=["L0H1"], progress=False)  # needs no gradient


@models(("llama",))
def test_prompts_past_the_context_are_refused(family, backend, tokenizer_folder):
    """Rotary models would run on without a word."""
    view = shared(family, backend, tokenizer_folder, torch.float32)
    long, baseline = examples((70, 5), ("positive", "negative")), means(view, examples())
    words = "prompt of 70 tokens: .* reads at most 64. Shorten"
    with pytest.raises(InputError, match=words):
        one_pass(view, long, baseline, progress=False)
    with pytest.raises(InputError, match=words):
        position_relevance(view, long, baseline)


@models(("gpt2",))
def test_a_score_that_is_not_finite_is_never_returned(family, backend, tokenizer_folder):
    """NaN in `HeadScores` would pass for a head that nobody asked for."""
    model = wrap(family, backend, tokenizer_folder, torch.float32)
    model.unembed.W_U.detach().mul_(1e4)
    view, data = ModelView(model), examples()
    huge = means(view, data)
    huge.means[1, :, 2] = 3e38
    with pytest.raises(NonFiniteError, match=r"1 heads are not finite.*first: L1H2. Load"):
        one_pass(view, data, huge, progress=False)
    with pytest.raises(NonFiniteError, match=r"1 heads are not finite.*first: L1H2. Load"):
        position_relevance(view, data, huge)


@models(("llama",))
def test_bfloat16_is_near_float32(family, backend, tokenizer_folder):
    data, found = examples(), []
    for dtype in (torch.float32, torch.bfloat16):
        view = shared(family, backend, tokenizer_folder, dtype)
        found.append(one_pass(view, data, means(view, data), slopes="linear", progress=False))
    error = found[1].values - found[0].values
    assert float(error.norm() / found[0].values.norm()) < 0.05


@needs_hooked
@pytest.mark.parametrize("norm", [None, "LN"])
def test_a_model_of_attention_alone(norm):
    """No MLP has slopes; the linear sweep is the measure."""
    view, data = ModelView(attention_only(norm)), examples()
    baseline = means(view, data)
    swept = score_heads(view, data, baseline, rules="linear", progress=False)
    found = one_pass(view, data, baseline, slopes="linear", progress=False)
    assert_close(found.per_example, swept.per_example, atol=1e-5)
    direct = one_pass(view, data, baseline, slopes="direct", progress=False)
    assert_close(direct.per_example[:, -1], swept.per_example[:, -1], atol=1e-5)
    assert not torch.allclose(direct.per_example[:, 0], swept.per_example[:, 0], atol=1e-3)
