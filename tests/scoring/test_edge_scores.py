"""Edges against ablations and gradients by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.attention_only import attention_only
from helpers.checks import assert_close
from helpers.shared import models, shared
from helpers.tiny_models import Float64Throughout
from helpers.tiny_tasks import examples
from helpers.wrapped import needs_hooked, wrap

from cdt_lens.core.errors import InputError, NonFiniteError
from cdt_lens.decomposition.baseline import Baseline, mean_activations
from cdt_lens.decomposition.rules import PRESETS, Rules
from cdt_lens.models.heads import Head, Mlp
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.edge_scores import score_edges
from cdt_lens.scoring.iterative import trace_circuit
from cdt_lens.scoring.sweep import score_heads
from cdt_lens.tasks.metrics import balanced_mean, task_direction
from cdt_lens.tasks.task import Examples

# Scores are kept as float32.
KEPT = 2e-6
EDGE_RULES = [name for name, rules in PRESETS.items() if rules.context == "full"]


def means(view: ModelView, data: Examples) -> Baseline:
    return mean_activations(view, data, mlps=True, progress=False)


def by_hand(
    view: ModelView, data: Examples, baseline: Baseline, ablate: Any, target: Any, site: str
) -> float:
    """What the target's z (or MLP output) loses through `site`, weighed by its gradient.

    Three kinds of real forward passes: as it is, with the source ablated, and with q (k, v) of
    that run alone put into the first; the gradient by autograd through the whole model.
    """
    batch = next(data.batches(len(data)))
    where = ("z" if isinstance(target, Head) else "mlp_out", target.layer)
    probe: dict[str, torch.Tensor] = {}

    def watch(value: torch.Tensor) -> torch.Tensor:
        probe["at"] = torch.zeros_like(value, requires_grad=True)
        probe["value"] = value.detach()
        return value + probe["at"]

    with view.quiet(gradients=True), view.hooked({where: watch}):
        logits = view._forward(batch.tokens)
    last = logits[torch.arange(len(data)), batch.lengths - 1].gather(1, batch.candidates)
    (slope,) = torch.autograd.grad(task_direction(last, batch.direction).sum(), probe["at"])
    record = [(name, target.layer) for name in ("q", "k", "v")] + [where]
    with view.hooked(ablate(batch, baseline)):
        without = view.run(batch.tokens, record)
    changed = without[where]
    if site:
        put = {(site, target.layer): lambda value: without[site, target.layer]}
        with view.hooked(put):
            changed = view.run(batch.tokens, [where])[where]
    lost = (probe["value"] - changed) * slope
    if isinstance(target, Head):
        lost = lost[:, :, target.head]
    return float(balanced_mean(lost.flatten(1).sum(1).double(), batch.label_index))


def head_off(view: ModelView, head: Head) -> Any:
    def hooks(batch: Any, baseline: Baseline) -> Any:
        def ablated(z: torch.Tensor) -> torch.Tensor:
            z = z.clone()
            z[:, :, head.head] = baseline.for_batch(view, batch)(head.layer)[:, :, head.head]
            return z

        return {("z", head.layer): ablated}

    return hooks


def mlp_off(view: ModelView, mlp: Mlp) -> Any:
    def hooks(batch: Any, baseline: Baseline) -> Any:
        return {("mlp_out", mlp.layer): lambda _: baseline.mlps_for_batch(view, batch)(mlp.layer)}

    return hooks


@models(("gpt2", "llama", "qwen3", "gemma2", "pythia", "granite", "gptj"))
def test_an_edge_is_what_the_target_loses_by_hand(family, backend, tokenizer_folder):
    """Under the rules in which everything goes through the model, an edge is an experiment."""
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline = means(view, data)
        found = score_edges(view, data, baseline, rules="ablation", batch_size=8, progress=False)
        number = {str(unit): i for i, unit in enumerate(found.sources)}
        head, mlp = Head(0, 1), Mlp(0)
        for target in (Head(1, 0), Head(1, 3)):
            for place, site in enumerate(("q", "k", "v")):
                for source, off in ((head, head_off), (mlp, mlp_off)):
                    expected = by_hand(view, data, baseline, off(view, source), target, site)
                    actual = found.to_heads[number[str(source)], place, 1, target.head]
                    assert float(actual) == pytest.approx(expected, abs=KEPT)
        for layer in (0, 1):
            expected = by_hand(view, data, baseline, head_off(view, head), Mlp(layer), "")
            assert float(found.to_mlps[number["L0H1"], layer]) == pytest.approx(expected, abs=KEPT)
        expected = by_hand(view, data, baseline, mlp_off(view, mlp), Mlp(1), "")
        assert float(found.to_mlps[number["M0"], 1]) == pytest.approx(expected, abs=KEPT)
        swept = score_heads(view, data, baseline, rules="ablation", progress=False)
        for unit, value in zip(found.sources, found.to_logits, strict=True):
            if isinstance(unit, Head):
                assert_close(value, swept.values[unit.layer, unit.head], atol=KEPT)


@models(("gpt2", "llama"))
def test_nothing_runs_against_the_residual_stream(family, backend, tokenizer_folder):
    view, data = shared(family, backend, tokenizer_folder), examples()
    found = score_edges(view, data, means(view, data), rows=24, progress=False)
    for unit, heads, mlps in zip(found.sources, found.to_heads, found.to_mlps, strict=True):
        assert bool((heads[:, : unit.layer + 1] == 0).all())
        first = unit.layer + isinstance(unit, Mlp)
        assert bool((mlps[:first] == 0).all())
        assert bool((mlps[first:] != 0).all())


@models(("pythia",))
@pytest.mark.parametrize("rules", EDGE_RULES)
def test_no_edge_runs_to_the_mlp_beside_a_head(family, backend, rules, tokenizer_folder):
    """In a parallel block neither reads the other; not even rounding is left of it."""
    view, data = shared(family, backend, tokenizer_folder, torch.float32), examples()
    baseline = means(view, data)
    found = score_edges(view, data, baseline, rules=rules, progress=False)
    for unit, mlps in zip(found.sources, found.to_mlps, strict=True):
        assert bool((mlps[: unit.layer + 1] == 0).all())
        assert bool((mlps[unit.layer + 1 :] != 0).all())
    circuit = trace_circuit(view, data, baseline, rules=rules, width=10, fan_in=99, progress=False)
    assert circuit.graph.parallel
    swept = score_heads(view, data, baseline, rules=rules, progress=False)
    assert_close(circuit.scores, swept.values, atol=1e-5)


@needs_hooked
@pytest.mark.parametrize("norm", [None, "LN"])
def test_a_model_of_attention_alone_needs_no_means_of_mlps(norm):
    view, data = ModelView(attention_only(norm)), examples()
    baseline = mean_activations(view, data, progress=False)
    for rules in EDGE_RULES:
        found = score_edges(view, data, baseline, rules=rules, progress=False)
        assert not bool(found.to_mlps.any())
        assert bool((found.to_heads[:4, :, 1] != 0).all())
        swept = score_heads(view, data, baseline, rules=rules, progress=False)
        assert_close(found.to_logits, swept.values.flatten(), atol=1e-5)
        circuit = trace_circuit(
            view, data, baseline, rules=rules, width=8, fan_in=2, progress=False
        )
        named = {name for edge in circuit.graph.edges for name in (edge.source, edge.target)}
        assert not {"M0", "M1"} & named
    found = score_edges(view, data, baseline, rules="ablation", progress=False)
    for place, site in enumerate(("q", "k", "v")):
        off = head_off(view, Head(0, 1))
        expected = by_hand(view, data, baseline, off, Head(1, 2), site)
        assert float(found.to_heads[1, place, 1, 2]) == pytest.approx(expected, abs=1e-5)


@models(("gpt2", "llama"))
def test_inference_mode_around_it_changes_nothing(family, backend, tokenizer_folder):
    view, data = shared(family, backend, tokenizer_folder, torch.float32), examples()
    expected = score_edges(view, data, means(view, data), progress=False)
    with torch.inference_mode():
        found = score_edges(view, data, means(view, data), progress=False)
    assert_close(found.to_heads, expected.to_heads, atol=0)
    assert_close(found.to_mlps, expected.to_mlps, atol=0)


def test_bfloat16_is_near_float32(tokenizer_folder):
    data, found = examples(), []
    for dtype in (torch.float32, torch.bfloat16):
        view = shared("llama", "bridge", tokenizer_folder, dtype)
        found.append(score_edges(view, data, means(view, data), progress=False))
    for name in ("to_logits", "to_heads", "to_mlps"):
        exact, half = (getattr(scores, name) for scores in found)
        assert float((half - exact).norm() / exact.norm()) < 0.1, name


def test_what_goes_to_other_processes_is_no_more_than_the_examples(tokenizer_folder, monkeypatch):
    """A view would be sent with the table that it looks into."""
    view, data = shared("gpt2", "bridge", tokenizer_folder, torch.float32), examples()
    sent: list[Any] = []

    def gather(items: list[Any]) -> list[Any]:
        sent.extend(items)
        return items

    monkeypatch.setattr("cdt_lens.scoring.edge_scores.gather_items", gather)
    score_edges(view, data, means(view, data), batch_size=6, progress=False)
    assert sorted(index for index, _ in sent) == list(range(len(data)))
    for _, tables in sent:
        for table in tables:
            assert table.untyped_storage().nbytes() == table.numel() * table.element_size()


def test_edges_that_are_not_finite_are_never_returned(tokenizer_folder):
    model = wrap("gpt2", "bridge", tokenizer_folder, torch.float32)
    model.unembed.W_U.detach().mul_(1e4)  # tied: the stream grows as well, and norms undo that
    view, data = ModelView(model), examples()
    huge = means(view, data)
    huge.mlp_means[0] = 3e38
    with pytest.raises(NonFiniteError):
        score_edges(view, data, huge, progress=False)


@pytest.mark.parametrize("context", ["both", "empty"])
def test_rules_of_another_context_are_named_in_the_refusal(context, tokenizer_folder):
    view, data = shared("llama", "bridge", tokenizer_folder, torch.float32), examples()
    with pytest.raises(InputError, match=f"score_edges: context='{context}' is defined for logits"):
        score_edges(view, data, means(view, data), rules=Rules(context=context), progress=False)
