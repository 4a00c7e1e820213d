"""The same quantities from other libraries: captum, scikit-learn and TransformerLens' own tools.

captum sees a function of one gate per head, written here with TransformerLens' hooks. peft is in
`tests/finetuning/test_lora.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import FeatureAblation, InputXGradient, IntegratedGradients
from helpers import tiny_training
from helpers.shared import models, shared
from helpers.tiny_models import Float64Throughout
from helpers.tiny_tasks import ANSWERS, examples, many
from helpers.wrapped import wrap
from jaxtyping import Float
from sklearn import metrics as sklearn_metrics
from torch import Tensor

from cdt_lens.decomposition.baseline import Baseline, counterfactual_baseline, mean_activations
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.agreement import auroc, average_precision
from cdt_lens.scoring.methods import attribution_patching, exact_ablation, integrated_gradients
from cdt_lens.tasks.evaluate import evaluate
from cdt_lens.tasks.metrics import macro_f1
from cdt_lens.tasks.task import Example

FAMILIES = ("gpt2", "llama", "gemma2")
STEPS = 5
Gated = Callable[[Float[Tensor, "row gate"]], Float[Tensor, " row"]]


def gated_direction(view: ModelView, item: Example, baseline: Baseline) -> Gated:
    """Return the task direction as a function of the heads' gates.

    z becomes baseline + gate * (z - baseline).
    """

    def direction(gates: Float[Tensor, "row gate"]) -> Float[Tensor, " row"]:
        by_head = gates.unflatten(1, (view.n_layers, view.n_heads))

        def gate(z: Tensor, hook: Any) -> Tensor:
            layer = int(hook.name.split(".")[1])
            means = baseline.means[layer]
            other = means[torch.tensor([0] * (z.shape[1] - 1) + [1])].to(z.dtype)
            return other + by_head[:, layer, None, :, None] * (z - other)

        hooks = [(f"blocks.{layer}.attn.hook_z", gate) for layer in range(view.n_layers)]
        more = {"use_cache": False} if view.is_bridge else {}
        tokens = torch.tensor([item.tokens] * len(gates))
        last = view.tl.run_with_hooks(tokens, fwd_hooks=hooks, **more)[:, -1]
        return last[:, list(item.answers)].mean(1) - last[:, list(item.others)].mean(1)

    return direction


CAPTUM: list[tuple[Any, Any, dict[str, Any], dict[str, Any]]] = [
    (
        integrated_gradients,
        IntegratedGradients,
        {"steps": STEPS},
        {"n_steps": STEPS, "method": "riemann_middle"},
    ),
    (attribution_patching, InputXGradient, {}, {}),
    (exact_ablation, FeatureAblation, {}, {}),
]


@models(FAMILIES)
@pytest.mark.parametrize(("ours", "theirs", "options", "their_options"), CAPTUM)
def test_scores_are_captums_of_the_gates(
    ours, theirs, options, their_options, family, backend, tokenizer_folder
):
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline = mean_activations(view, data, progress=False)
        found = ours(view, data, baseline, batch_size=2, progress=False, **options)
        gates = torch.ones(1, view.n_layers * view.n_heads, dtype=torch.float64, requires_grad=True)
        for number, item in enumerate(data):
            method = theirs(gated_direction(view, item, baseline))
            expected = method.attribute(gates, **their_options).detach()
            actual = found.per_example[number].double().flatten()
            # The scores are kept as float32.
            torch.testing.assert_close(actual, expected[0], rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_attribution_patching_is_that_of_transformer_lens(family, tokenizer_folder):
    """Their effect goes from the corrupt run to the clean one: ours with the sign changed."""
    tools = pytest.importorskip("transformer_lens.tools.analysis.attribution_patching")
    model = wrap(family, "bridge", tokenizer_folder)
    model.requires_grad_(True)  # their tool differentiates the whole model
    view = ModelView(model)
    data, pairs = examples(lengths=(6,) * 6), examples(lengths=(6,) * 6, seed=9)
    with Float64Throughout():
        baseline = counterfactual_baseline(view, data, pairs)
        found = attribution_patching(view, data, baseline, progress=False)
        for number, (item, pair) in enumerate(zip(data, pairs, strict=True)):
            answers, others = list(item.answers), list(item.others)

            def direction(
                logits: Tensor, answers: list[int] = answers, others: list[int] = others
            ) -> Tensor:
                return logits[0, -1, answers].mean() - logits[0, -1, others].mean()

            theirs = tools.attribution_patch(
                model, torch.tensor([pair.tokens]), torch.tensor([item.tokens]), direction
            )
            expected = torch.zeros(view.n_layers, view.n_heads, dtype=torch.float64)
            for node, effect in theirs.node_scores.items():
                if node.kind == "attn_head_out":
                    expected[node.layer, node.head] -= effect
            actual = found.per_example[number].double()
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2e-7)


def test_an_evaluation_is_scikit_learns(tokenizer_folder):
    view, data = shared("llama", "bridge", tokenizer_folder), many()
    found = evaluate(view, data, tiny_training.task(), batch_size=4)
    gold = [item.label for item in data]
    predicted = []
    for item in data:
        with torch.no_grad():
            last = view.tl(torch.tensor([item.tokens]))[0, -1]
        predicted.append(max(ANSWERS, key=lambda label: float(last[ANSWERS[label]])))
    assert len({*predicted}) > 1
    labels = list(data.labels)
    assert found.accuracy == pytest.approx(sklearn_metrics.accuracy_score(gold, predicted))
    balanced = sklearn_metrics.balanced_accuracy_score(gold, predicted)
    assert found.balanced_accuracy == pytest.approx(balanced)
    f1 = sklearn_metrics.f1_score(gold, predicted, labels=labels, average="macro")
    assert found.macro_f1 == pytest.approx(f1)
    assert macro_f1(predicted, gold, labels) == pytest.approx(f1)
    confusion = sklearn_metrics.confusion_matrix(gold, predicted, labels=labels)
    assert found.confusion.to_numpy().tolist() == confusion.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_areas_under_curves_are_scikit_learns(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 12, (4, 10), generator=generator).double()  # with ties
    truth = torch.rand(4, 10, generator=generator) < 0.3
    flat = truth.flatten().numpy(), scores.flatten().numpy()
    assert auroc(scores, truth) == pytest.approx(sklearn_metrics.roc_auc_score(*flat))
    expected = sklearn_metrics.average_precision_score(*flat)
    assert average_precision(scores, truth) == pytest.approx(expected)
