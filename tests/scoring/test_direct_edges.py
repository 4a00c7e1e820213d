"""Direct edges against interventions by hand, autograd by hand, and numbers of the EAP-IG code."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
import torch
from helpers.attention_only import attention_only
from helpers.checks import assert_close
from helpers.edges_by_hand import ByHand
from helpers.places import TESTS
from helpers.shared import models, shared
from helpers.tiny_models import Float64Throughout, build
from helpers.tiny_tasks import examples
from helpers.wrapped import needs_hooked
from torch import Tensor

from cdt_lens.circuits.direct_edge_scores import DirectEdgeScores
from cdt_lens.circuits.edge_pass import EdgePass
from cdt_lens.core.errors import InputError, UnsupportedModelError
from cdt_lens.decomposition.baseline import (
    Baseline,
    counterfactual_baseline,
    mean_activations,
    zero_baseline,
)
from cdt_lens.interchange.mib_schema import their_name
from cdt_lens.models.heads import Head
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.direct_edges import (
    ablate_edges,
    edge_attribution_patching,
    edge_integrated_gradients,
)
from cdt_lens.tasks.metrics import balanced_mean, balanced_stderr
from cdt_lens.tasks.task import Example, Examples

FAMILIES = ("gpt2", "llama", "qwen3", "pythia")
PAIRS = examples(seed=9, name="tiny/pairs")
QUIET: dict[str, Any] = {"progress": False}
# Of two of three labels: prompts of 9, 5 and 4 tokens.
FEW = Examples(tuple(examples().items[i] for i in (0, 1, 3)), examples().labels, "tiny/few")
FEW_PAIRS = Examples(tuple(PAIRS.items[i] for i in (0, 1, 3)), PAIRS.labels, "tiny/few-pairs")


def baseline_of(kind: str, view: ModelView, data: Examples, pairs: Examples) -> Baseline:
    if kind == "mean":
        return mean_activations(view, data, mlps=True, progress=False)
    return (
        counterfactual_baseline(view, data, pairs) if kind == "pairs" else zero_baseline(view, data)
    )


def direction(logits: Tensor, item: Example) -> Tensor:
    return logits[list(item.answers)].mean() - logits[list(item.others)].mean()


def node(name: str) -> Any:
    if name[0] == "L" and name[1].isdigit():
        return "head", Head.parse(name).layer, Head.parse(name).head
    return ("mlp", int(name[1:])) if name[0] == "M" else name


def reader(name: str, site: str) -> Any:
    return (site, *node(name)[1:]) if site else node(name)


def baseline_outputs(hand: ByHand, kind: str, base: Baseline, item: Example, pair: Example) -> Any:
    """What every node writes under the baseline, [pos, d_model]."""
    if kind == "pairs":
        return hand.outputs(pair.tokens)
    found = dict.fromkeys(hand.outputs(item.tokens), torch.zeros(()).double())
    if kind == "zero":
        return found
    slots = [0] * (len(item.tokens) - 1) + [1]  # the answer's position has a mean of its own
    for name in found:
        if name == "input":
            found[name] = base.embed_means.double()[slots]
        elif name[0] == "mlp":
            found[name] = base.mlp_means.double()[name[1], slots]
        else:
            _, layer, head = name
            found[name] = hand.of_head(layer, head, base.means.double()[layer, slots, head])
    return found


def by_hand(hand: ByHand, kind: str, base: Baseline, scores: DirectEdgeScores) -> Tensor:
    """d(full) - d(edge cut) of every example and edge."""
    rows = []
    for item, pair in zip(FEW, FEW_PAIRS, strict=True):
        own = hand.outputs(item.tokens)
        away = {n: v - own[n] for n, v in baseline_outputs(hand, kind, base, item, pair).items()}
        full = direction(hand.logits(item.tokens), item)
        rows.append([
            float(full - direction(hand.cut(item.tokens, reader(t, site), away[node(s)]), item))
            for s, t, site in scores.edges
        ])  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64)


@cache
def hand_made(family: str, kind: str, folder: str) -> tuple[Tensor, tuple[Any, ...]]:
    view = shared(family, "bridge", folder)
    base = baseline_of(kind, view, FEW, FEW_PAIRS)
    scores = ablate_edges(view, FEW, base, **QUIET)
    return by_hand(ByHand(build(family)), kind, base, scores), scores.edges


@models(FAMILIES)
def test_every_edge_is_an_intervention_by_hand(family, backend, tokenizer_folder):
    """Plain Hugging Face modules with PyTorch's hooks, one unpadded prompt at a time."""
    kind = {"gpt2": "mean", "llama": "pairs", "qwen3": "zero", "pythia": "mean"}[family]
    with Float64Throughout():
        expected, edges = hand_made(family, kind, tokenizer_folder)
        view = shared(family, backend, tokenizer_folder)
        base = baseline_of(kind, view, FEW, FEW_PAIRS)
        found = ablate_edges(view, FEW, base, **QUIET)
        assert found.edges == edges
        assert len(edges) == (102 if family == "pythia" else 110)
        assert_close(found.per_example, expected, atol=1e-10)
        assert int((found.per_example.abs() > 1e-4).sum()) > 0.9 * expected.numel()


@needs_hooked
@pytest.mark.parametrize("norm", [None, "LN"])
@torch.no_grad()
def test_attention_alone_equals_transformer_lens_hooks(norm):
    """A model without MLPs, with TransformerLens' own split inputs and head outputs."""
    model = attention_only(norm)
    view = ModelView(model)
    base = counterfactual_baseline(view, FEW, FEW_PAIRS)
    found = ablate_edges(view, FEW, base, **QUIET)
    estimate = edge_attribution_patching(view, FEW, base, **QUIET)
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    assert not any(name.startswith("M") for ends in found.edges for name in ends[:2])
    for row, (item, pair) in enumerate(zip(FEW, FEW_PAIRS, strict=True)):
        own, other = (model.run_with_cache(torch.tensor([e.tokens]))[1] for e in (item, pair))
        full = direction(model(torch.tensor([item.tokens]))[0, -1], item)
        for column, (source, target, site) in enumerate(found.edges):
            if source == "input":
                away = other["hook_embed"] - own["hook_embed"]
            else:
                _, layer, head = node(source)
                name = f"blocks.{layer}.attn.hook_result"
                away = (other[name] - own[name])[:, :, head]

            def add(value: Tensor, hook: Any, site=site, target=target, away=away) -> Tensor:
                value = value.clone()
                value[:, :, node(target)[2]] += away
                return value

            hooks = [("blocks.1.hook_resid_post", lambda v, hook, away=away: v + away)]
            if site:
                hooks = [(f"blocks.{node(target)[1]}.hook_{site}_input", add)]
            cut = model.run_with_hooks(torch.tensor([item.tokens]), fwd_hooks=hooks)[0, -1]
            expected = float(full - direction(cut, item))
            assert float(found.per_example[row, column]) == pytest.approx(expected, abs=1e-10)
            if target == "logits" and norm is None:  # the edge is linear
                value = float(estimate.per_example[row, column])
                assert value == pytest.approx(expected, abs=1e-10)


@models(("gpt2", "llama", "pythia"))
def test_attribution_patching_is_the_slope_of_the_exact_effect(family, backend, tokenizer_folder):
    """The input of one reader moves a little way: central differences of the exact intervention."""
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), FEW
        base = baseline_of("mean", view, data, FEW_PAIRS)
        found = edge_attribution_patching(view, data, base, **QUIET)
        hand, step = ByHand(build(family)), 1e-4
        for row, item in enumerate(data):
            own = hand.outputs(item.tokens)
            base_out = baseline_outputs(hand, "mean", base, item, item)
            for column in range(row, len(found.edges), 7):
                source, target, site = found.edges[column]
                away = base_out[node(source)] - own[node(source)]
                ends = [
                    direction(hand.cut(item.tokens, reader(target, site), s * away), item)
                    for s in (step, -step)
                ]
                expected = float(ends[1] - ends[0]) / (2 * step)
                actual = float(found.per_example[row, column])
                assert actual == pytest.approx(expected, abs=2e-6)


@models(("gpt2", "llama", "pythia"))
def test_integrated_gradients_of_the_input_are_complete(family, backend, tokenizer_folder):
    """The edges from the input add up to the effect of all embeddings at their baseline."""
    with Float64Throughout():
        view = shared(family, backend, tokenizer_folder)
        base = baseline_of("pairs", view, FEW, FEW_PAIRS)
        from_input = [n for n, ends in enumerate(ablated(view, base).edges) if ends[0] == "input"]
        errors = []
        for steps in (8, 64):
            found = edge_integrated_gradients(view, FEW, base, steps=steps, **QUIET)
            both = [
                torch.stack([direction(view.logits(torch.tensor([e.tokens]))[0, -1], item)
                             for item, e in zip(FEW, split, strict=True)])
                for split in (FEW, FEW_PAIRS)
            ]  # fmt: skip
            total = found.per_example[:, from_input].sum(1)
            errors.append(float((total - (both[0] - both[1])).abs().max()))
        assert errors[1] < 2e-3 and errors[1] < errors[0] / 10


def ablated(view: ModelView, base: Baseline) -> DirectEdgeScores:
    return ablate_edges(view, FEW, base, edges=["input->logits"], **QUIET)


# The EAP-IG code --------------------------------------------------------------------------------


@cache
def of_eap_ig() -> dict[str, Any]:
    return json.loads((TESTS / "scoring" / "eap_ig.json").read_text("utf-8"))["models"]


def their_numbers(family: str, kind: str, edges: Any) -> Tensor:
    """In the order of `edges`, with this package's sign."""
    found = of_eap_ig()[family]
    numbers = dict(zip(found["edges"], found[kind], strict=True))
    assert len(numbers) == len(edges)
    names = [f"{their_name(s)}->{their_name(t)}" + (f"<{q}>" if q else "") for s, t, q in edges]
    return -torch.tensor([numbers[name] for name in names], dtype=torch.float64)


@models(("gpt2", "llama", "pythia"))
def test_scores_are_those_of_the_eap_ig_code(family, backend, tokenizer_folder):
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        base = counterfactual_baseline(view, data, PAIRS)
        exact = ablate_edges(view, data, base, batch_size=4, **QUIET)
        assert_close(
            exact.per_example.mean(0), their_numbers(family, "exact", exact.edges), atol=1e-10
        )
        first = edge_attribution_patching(view, data, base, batch_size=4, **QUIET)
        assert_close(
            first.per_example.mean(0), their_numbers(family, "EAP", exact.edges), atol=1e-10
        )
        # EAP-IG's points are left ends of its steps, not midpoints.
        total = sum(
            EdgePass(view, batch, base).attributions([0.0, 0.25, 0.5, 0.75])[0].sum(0)
            for batch in data.batches(4)
        )
        found = [total[place] for place in places(view, exact)]
        expected = their_numbers(family, "EAP-IG", exact.edges)
        assert_close(torch.stack(found) / len(data), expected, atol=1e-10)


def places(view: ModelView, scores: DirectEdgeScores) -> list[tuple[int, int]]:
    from cdt_lens.circuits.edge_pass import places_of

    rows, columns = places_of(scores.edges, view.n_layers, view.n_heads)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


# The result ---------------------------------------------------------------------------------------


def test_scores_are_balanced_over_labels_and_have_errors(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder, torch.float32), examples()
    data = Examples(tuple(e for e in data if e.label != "neutral"), data.labels, "tiny/two")
    base = baseline_of("mean", view, data, data)
    found = edge_attribution_patching(view, data, base, batch_size=2, **QUIET)
    labels = torch.tensor([e.label == "positive" for e in data]).long()
    rows = found.per_example.double().T
    assert_close(found.values, balanced_mean(rows, labels), atol=1e-6)
    assert_close(found.stderr, balanced_stderr(rows, labels), atol=1e-6)
    text, html = repr(found), found._repr_html_()
    assert "110 direct edges on 5 examples" in text and "\n" not in text and "<table" in html
    table = found.to_dataframe()
    assert len(table) == 110 and table["score"].abs().is_monotonic_decreasing
    whole = edge_attribution_patching(view, data, base, **QUIET)
    assert_close(found.values, whole.values, atol=1e-5)


def test_some_edges_are_those_of_all(tokenizer_folder):
    view = shared("llama", "bridge", tokenizer_folder)
    base = baseline_of("pairs", view, FEW, FEW_PAIRS)
    every = ablate_edges(view, FEW, base, rows=7, **QUIET)
    some = ablate_edges(view, FEW, base, edges=["M0->logits", "input->L1H3<k>"], **QUIET)
    scored = [n for n, value in enumerate(some.values.tolist()) if value == value]
    assert [every.edges[n] for n in scored] == [("input", "L1H3", "k"), ("M0", "logits", "")]
    assert_close(some.per_example[:, scored], every.per_example[:, scored], atol=1e-10)
    assert len(some.ranking()) == 2
    with pytest.raises(InputError, match=r"no edge 'L0H0->M7'; expected names such as input->L0H0"):
        ablate_edges(view, FEW, base, edges=["L0H0->M7"], **QUIET)
    with pytest.raises(InputError, match="edges: expected at least one edge, or None for all"):
        ablate_edges(view, FEW, base, edges=[], **QUIET)
    with pytest.raises(InputError, match="3 edges to select, but only 2 have scores"):
        some.graph(k=3)
    with pytest.raises(InputError, match="exactly one of k and fraction"):
        every.graph()


def test_what_has_no_direct_edges_is_refused(tokenizer_folder):
    view = shared("gemma2", "bridge", tokenizer_folder)
    with pytest.raises(UnsupportedModelError, match="ln1_post.*no term of a sum"):
        ablate_edges(view, FEW, zero_baseline(view, FEW), **QUIET)
    view = shared("gpt2", "bridge", tokenizer_folder)
    with pytest.raises(InputError, match=re.escape("mean_activations(model, examples, mlps=True)")):
        edge_attribution_patching(view, FEW, mean_activations(view, FEW, progress=False), **QUIET)


def test_a_hook_that_detaches_is_refused_by_name(tokenizer_folder):
    view = shared("llama", "bridge", tokenizer_folder)
    base = baseline_of("pairs", view, FEW, FEW_PAIRS)
    cut = [("blocks.0.hook_resid_post", lambda value, hook: value.detach())]
    with view.tl.hooks(fwd_hooks=cut):
        for attribute in (edge_attribution_patching, edge_integrated_gradients):
            with pytest.raises(InputError, match=r"own hooks \(blocks.0.hook_.*detach"):
                attribute(view, FEW, base, **QUIET)
        ablate_edges(view, FEW, base, edges=["M0->logits"], **QUIET)


def test_half_precision_and_inference_mode_change_little_and_nothing(tokenizer_folder):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        view = shared("llama", "bridge", tokenizer_folder, dtype)
        base = baseline_of("pairs", view, FEW, FEW_PAIRS)
        scores = [f(view, FEW, base, **QUIET) for f in (ablate_edges, edge_attribution_patching)]
        with torch.inference_mode():
            again = edge_attribution_patching(view, FEW, base, **QUIET)
        assert_close(again.values, scores[1].values, atol=0)
        found.append([own.values for own in scores])
        assert scores[0].values.dtype == torch.float32
    for exact, half in zip(*found, strict=True):
        assert float((half - exact).norm() / exact.norm()) < 0.1
