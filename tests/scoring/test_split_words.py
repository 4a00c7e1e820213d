"""Scores of heads for label words of several tokens, against TransformerLens' own hooks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers import split_words
from helpers.checks import assert_close
from helpers.shared import models, shared
from helpers.split_words import SPLIT
from helpers.tiny_models import D_VOCAB, Float64Throughout
from helpers.tiny_tasks import LABELS, many
from torch import Tensor

from cdt_lens.circuits.ablation import circuit_metric
from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import circuit_faithfulness
from cdt_lens.core.errors import InputError
from cdt_lens.decomposition.baseline import (
    Baseline,
    counterfactual_baseline,
    mean_activations,
    zero_baseline,
)
from cdt_lens.decomposition.decompose import Node, decompose
from cdt_lens.experiments.discovery import check_trace
from cdt_lens.experiments.settings import Settings
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.edge_scores import score_edges
from cdt_lens.scoring.methods import METHODS, attribution_patching, score_by
from cdt_lens.scoring.one_pass import one_pass, position_relevance
from cdt_lens.scoring.prompt_views import attention_view, token_relevance
from cdt_lens.scoring.sweep import score_heads
from cdt_lens.tasks.metrics import balanced_mean
from cdt_lens.tasks.task import Example, Examples

EVERYONE = all_heads(2, 4)
QUIET: dict[str, Any] = {"progress": False}


def means(view: ModelView, data: Examples, **options: Any) -> Baseline:
    return mean_activations(view, data, progress=False, **options)


def directions(view: ModelView, data: Examples, off: Any, baseline: Baseline) -> Tensor:
    """The task direction of each example with some heads at their mean."""
    with torch.no_grad():
        return torch.stack([
            split_words.direction(
                split_words.scores(split_words.ablated(view, off, baseline, item), item)
            )
            for item in data
        ])  # fmt: skip


def balanced(values: Tensor, data: Examples) -> Tensor:
    return balanced_mean(values, torch.tensor([data.labels.index(item.label) for item in data]))


@models(("gpt2", "llama"))
def test_everything_replaced_is_the_plain_run_of_the_pair_at_every_token(
    family, backend, tokenizer_folder
):
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), split_words.examples(seed=3)
        pairs = split_words.examples(seed=9, name="tiny/pairs")
        base, circuit = counterfactual_baseline(view, data, pairs), Circuit((Head(0, 0),), 2, 4)
        found = circuit_faithfulness(view, circuit, data, base, empty="all", draws=1, **QUIET)
        read = lambda tokens: view.logits(tokens)[0]  # noqa: E731
        with torch.no_grad():
            values = [
                split_words.direction(
                    split_words.scores(read, dataclasses.replace(item, tokens=pair.tokens))
                )
                for item, pair in zip(data, pairs, strict=True)
            ]
    assert found.empty == pytest.approx(float(balanced(torch.stack(values), data)), abs=1e-9)


# Baselines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["answer", "pooled", "right", "left"])
def test_a_baseline_counts_each_position_once(kind, tokenizer_folder):
    """By loops over single sequences: the prompt, and each further beginning of a word."""
    view, data = shared("gpt2", "bridge", tokenizer_folder), split_words.examples()
    seen: dict[tuple[int, str], list[Tensor]] = {}
    beginnings = {word[:n] for word in map(split_words.ids, SPLIT.values()) for n in (1, 2)}
    longest = 9
    for item in data:
        length = len(item.tokens)
        sequences = [(), *(b for b in beginnings if any(
            len(w) > len(b) and w[: len(b)] == b for w in map(split_words.ids, SPLIT.values())
        ))]  # fmt: skip
        for added in sequences:
            tokens = torch.tensor([[*item.tokens, *added]])
            trace = view.run(tokens, [("z", 0), ("z", 1)])
            z = torch.stack([trace["z", layer][0] for layer in (0, 1)], 1).double()
            for position in range(length) if not added else [length + len(added) - 1]:
                slots = {
                    "answer": [max(0, position - length + 2)], "pooled": [0], "left": [position],
                    "right": [longest, *([length - 1 - position] if position < length else [])],
                }[kind]  # fmt: skip
                for slot in slots:
                    seen.setdefault((slot, item.label), []).append(z[position])
    found = means(view, data, positions=kind).means
    assert found.shape[1] == max(slot for slot, _ in seen) + 1
    for slot in range(found.shape[1]):
        labels = [torch.stack(z).mean(0) for (s, _), z in seen.items() if s == slot]
        assert_close(found[:, slot], sum(labels) / len(labels), atol=1e-6)


def test_a_baseline_of_another_task_gives_the_answer_mean_behind_the_prompt(tokenizer_folder):
    view, data = shared("llama", "bridge", tokenizer_folder), many()
    own = means(view, data)
    batch = split_words.split(data).one_batch()
    values = own.for_batch(view, batch)(1)
    behind = torch.arange(values.shape[1]) >= batch.prompt_lengths[:, None] - 1
    real = torch.arange(values.shape[1]) < batch.lengths[:, None]
    assert_close(values[behind & real], own.means[1, 1].expand(int((behind & real).sum()), -1, -1))
    assert_close(values[~behind], own.means[1, 0].expand(int((~behind).sum()), -1, -1))


# Ablation ------------------------------------------------------------------------------------------


@models(("gpt2", "llama", "gemma2"))
def test_ablations_equal_those_by_hand(family, backend, tokenizer_folder):
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), split_words.examples()
        baseline = means(view, data)
        found = score_heads(view, data, baseline, rules="ablation", batch_size=4, **QUIET)
        full = directions(view, data, (), baseline)
        assert found.direction == pytest.approx(float(balanced(full, data)), abs=1e-6)
        for head in (Head(0, 1), Head(1, 2)):
            lost = full - directions(view, data, (head,), baseline)
            assert_close(found.per_example[:, head.layer, head.head], lost, atol=1e-6)
        circuits = ((), (Head(0, 1),), tuple(EVERYONE))
        off = [[head for head in EVERYONE if head not in circuit] for circuit in circuits]
        expected = [balanced(directions(view, data, each, baseline), data) for each in off]
        metric = circuit_metric(view, circuits, data, baseline, batch_size=4, rows=7, **QUIET)
        assert_close(metric, torch.stack(expected), atol=1e-6)
        circuit = Circuit(circuits[1], 2, 4)
        f = circuit_faithfulness(view, circuit, data, baseline, draws=2, **QUIET)
    assert f.faithfulness == pytest.approx(
        float((expected[1] - expected[0]) / (expected[2] - expected[0])), abs=1e-5
    )


def test_accuracy_counts_the_best_word(tokenizer_folder):
    view, data = shared("llama", "bridge", tokenizer_folder), split_words.split(many())
    baseline = means(view, data)
    off = [head for head in EVERYONE if head != Head(1, 0)]
    with torch.no_grad():
        right = [
            int(split_words.scores(split_words.ablated(view, off, baseline, e), e).argmax()) == 0
            for e in data
        ]
    found = circuit_metric(view, [(Head(1, 0),)], data, baseline, metric="accuracy", **QUIET)
    assert float(found[0]) == pytest.approx(sum(right) / len(data))


@models(("gpt2", "llama"))
def test_two_ended_scores_are_the_marginal_contributions(family, backend, tokenizer_folder):
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), split_words.examples()
        baseline, head = means(view, data), Head(0, 2)
        found = score_heads(view, data, baseline, rules="two-ended", heads=[head], **QUIET)
        rest = [h for h in EVERYONE if h != head]
        ends = [directions(view, data, off, baseline) for off in ((), (head,), EVERYONE, rest)]
    expected = (ends[0] - ends[1] + ends[3] - ends[2]) / 2
    assert_close(found.per_example[:, 0, 2], expected, atol=1e-6)


@pytest.mark.parametrize("rules", ["stable", "shared", "official"])
def test_rules_leave_no_part_out(rules, tokenizer_folder):
    """No source: exactly 0. All heads of the last layer: their ablation, whatever the rules."""
    with Float64Throughout():
        view, data = shared("llama", "bridge", tokenizer_folder), split_words.examples()
        baseline = means(view, data)
        parts = decompose(view, data, [[], [Head(1, 0)]], baseline, rules=rules)
        by_rows = score_heads(view, data, baseline, rules=rules, batch_size=2, **QUIET)
    assert not parts.relevant[0].any() and parts.relevant[1].any()
    assert parts.tokens.shape == (6, 3, 3)
    assert_close(parts.relevant_direction[1], by_rows.per_example[:, 1, 0], atol=1e-5)


@models(("gpt2", "llama", "gemma2"))
@pytest.mark.parametrize("rules", ["official", "stable", "shared"])
def test_parts_are_log_probabilities_of_the_irrelevant_logits(
    family, backend, rules, tokenizer_folder
):
    """The whole vocabulary as candidates of one token, one question after another."""
    vocabulary = range(D_VOCAB)
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), split_words.examples()[1:3]
        baseline = means(view, data, positions="pooled")
        found = decompose(view, data, [[Head(0, 1)]], baseline, rules=rules)
        for number, item in enumerate(data):
            for k, word in enumerate(item.candidates):
                total = 0.0
                for i, token in enumerate(split_words.ids(word)):
                    tokens = (*item.tokens, *split_words.ids(word)[:i])
                    rest = tuple(v for v in vocabulary if v != token)
                    asked = Examples(
                        (Example("x", tokens, item.label, (token,), rest),), LABELS, "x"
                    )
                    parts = decompose(view, asked, [[Head(0, 1)]], baseline, rules=rules)
                    total += float(parts.irrelevant[0, 0].log_softmax(-1)[0])
                assert float(found.irrelevant[0, number, k]) == pytest.approx(total, abs=1e-6)


def test_nodes_are_positions_of_the_prompt(tokenizer_folder):
    """-1 is the prompt's last token, also where a word stands behind it."""
    with Float64Throughout():
        view, item = shared("gpt2", "bridge", tokenizer_folder), split_words.examples()[:1]
        baseline = zero_baseline(view, item)
        last = len(item[0].tokens) - 1
        parts = decompose(
            view, item, [[Node(0, 1, -1)], [Node(0, 1, last)]], baseline, rules="ablation"
        )

        def off(z: Tensor, hook: Any) -> Tensor:
            z = z.clone()
            z[0, last, 1] = 0
            return z

        def read(tokens: Tensor) -> Tensor:
            hooks = [("blocks.0.attn.hook_z", off)]
            return view.tl.run_with_hooks(tokens, fwd_hooks=hooks, use_cache=False)[0]

        with torch.no_grad():
            expected = parts.logits[0] - split_words.scores(read, item[0])
    assert_close(parts.relevant[0, 0], expected, atol=1e-8)
    assert_close(parts.relevant[1, 0], expected, atol=1e-8)
    with pytest.raises(InputError, match="the prompts have 9 to 9 tokens"):
        decompose(view, item, [[Node(0, 1, last + 1)]], baseline)


def test_a_counterfactual_prompt_is_followed_by_the_same_word(tokenizer_folder):
    with Float64Throughout():
        view, data = shared("gpt2", "bridge", tokenizer_folder), split_words.examples()
        pairs = split_words.examples(seed=9)
        found = score_heads(
            view, data, counterfactual_baseline(view, data, pairs), rules="ablation", **QUIET
        )
        head, item, other = Head(1, 2), data[1], pairs[1]

        def read(tokens: Tensor) -> Tensor:
            there = torch.tensor([[*other.tokens, *tokens[0, len(other.tokens) :].tolist()]])
            z = view.run(there, [("z", 1)])["z", 1]

            def put(own: Tensor, hook: Any) -> Tensor:
                own = own.clone()
                own[:, :, head.head] = z[:, :, head.head]
                return own

            hooks = [("blocks.1.attn.hook_z", put)]
            return view.tl.run_with_hooks(tokens, fwd_hooks=hooks, use_cache=False)[0]

        with torch.no_grad():
            plain = split_words.ablated(view, (), zero_baseline(view, data), item)
            lost = split_words.direction(split_words.scores(plain, item))
            lost = lost - split_words.direction(split_words.scores(read, item))
    assert float(found.per_example[1, 1, 2]) == pytest.approx(float(lost), abs=1e-6)


# Gradients -----------------------------------------------------------------------------------------


def slope(view: ModelView, item: Example, baseline: Baseline, head: Head, at: float) -> float:
    """The derivative of the direction by one head's gate, all gates at one point."""
    others = [h for h in EVERYONE if h != head]
    gate = torch.tensor(at, dtype=torch.float64, requires_grad=True)

    def read(tokens: Tensor) -> Tensor:
        def reset(z: Tensor, hook: Any) -> Tensor:
            layer, z = int(hook.name.split(".")[1]), z.clone()
            slots = [0] * (len(item.tokens) - 1)
            slots += list(range(1, z.shape[1] - len(item.tokens) + 2))
            for heads, own in ((others, at), ([head], gate)):
                for h in heads:
                    if h.layer == layer:
                        mean = baseline.means[layer, slots, h.head].to(z.dtype)
                        z[0, :, h.head] = mean + own * (z[0, :, h.head] - mean)
            return z

        hooks = [(f"blocks.{layer}.attn.hook_z", reset) for layer in range(2)]
        more = {"use_cache": False} if view.is_bridge else {}
        return view.tl.run_with_hooks(tokens, fwd_hooks=hooks, **more)[0]

    split_words.direction(split_words.scores(read, item)).backward()
    return float(gate.grad)


@models(("gpt2", "llama", "gemma2"))
def test_gradients_equal_autograd(family, backend, tokenizer_folder):
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), split_words.examples()
        baseline = means(view, data)
        patching = attribution_patching(view, data, baseline, batch_size=4, **QUIET)
        ends = one_pass(view, data, baseline, slopes="gradient", steps="ends", **QUIET)
        for number, head in ((0, Head(0, 1)), (3, Head(1, 3))):
            at = [slope(view, data[number], baseline, head, point) for point in (1.0, 0.0)]
            place = number, head.layer, head.head
            assert float(patching.per_example[place]) == pytest.approx(at[0], abs=1e-6)
            assert float(ends.per_example[place]) == pytest.approx(sum(at) / 2, abs=1e-6)
        by_position = position_relevance(view, data, baseline, slopes="gradient")
    assert by_position.shape[-1] == 9 + 2
    assert_close(by_position.nansum(-1), patching.per_example, atol=1e-6)


def test_integrated_gradients_add_up(tokenizer_folder):
    with Float64Throughout():
        view, data = shared("llama", "bridge", tokenizer_folder), split_words.examples()
        baseline = means(view, data)
        found = one_pass(view, data, baseline, slopes="gradient", steps=64, **QUIET)
        ends = [directions(view, data, off, baseline) for off in ((), EVERYONE)]
    assert_close(found.per_example.sum((1, 2)), ends[0] - ends[1], atol=2e-3)


@pytest.mark.parametrize(
    "method",
    ["estimate:two-ended", "replay:two-ended", "expected-gradients", "ensemble", "gates",
     "one-pass:gim", "one-pass:shared", "random"],
)  # fmt: skip
def test_methods_give_a_score_to_every_head_in_any_batch(method, tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), split_words.examples()
    baseline = means(view, data)
    one, other = (
        score_by(method, view, data, baseline, batch_size=size, progress=False) for size in (1, 4)
    )
    assert bool(torch.isfinite(one.values).all())
    assert_close(one.values, other.values, atol=1e-4)
    assert one.direction == pytest.approx(
        float(balanced(directions(view, data, (), baseline), data)), abs=1e-4
    )


def test_replays_are_close_to_the_exact_scores(tokenizer_folder):
    """The removal is exact for heads of the last layer but for the final norm and log-softmax."""
    view, data = shared("gpt2", "bridge", tokenizer_folder), split_words.split(many())
    baseline = means(view, data)
    exact, replayed, random = (
        score_by(name, view, data, baseline, progress=False).values.flatten()
        for name in ("cdt:two-ended", "replay:two-ended", "random")
    )
    assert float(torch.corrcoef(torch.stack([exact, replayed]))[0, 1]) > 0.9
    assert float(torch.corrcoef(torch.stack([exact, random]))[0, 1]) < 0.8


# What has no meaning -------------------------------------------------------------------------------

LINEAR = {
    "cdt:linear": "a rule with activation='frozen', such as the preset 'linear', needs answers of "
    "one token each, .* or use other rules",
    "estimate:linear": "a rule with activation='frozen'",
    "direct": "direct logit attribution needs answers of one token each, .* or use another method",
    "one-pass:linear": "a backward pass with activation='frozen', such as the slopes 'linear', ",
}  # fmt: skip


@pytest.mark.parametrize("method", LINEAR)
def test_linear_methods_are_refused(method, tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), split_words.examples()
    baseline = means(view, data)
    with pytest.raises(InputError, match=LINEAR[method]) as refused:
        score_by(method, view, data, baseline, progress=False)
    assert r"splits one into [20, 21]. Choose label words of one token" in str(refused.value)
    assert method in METHODS or method == "estimate:linear"


def test_edges_and_targets_are_refused(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), split_words.examples()
    baseline = means(view, data, mlps=True)
    with pytest.raises(InputError, match="score_edges needs answers of one token each"):
        score_edges(view, data, baseline, rules="stable", progress=False)
    with pytest.raises(InputError, match=r"decompose\(targets=...\) needs answers"):
        decompose(view, data, [Head(0, 1)], baseline, targets=[Head(1, 0)])
    with pytest.raises(InputError, match="a rule with activation='frozen'"):
        decompose(view, data, [Head(0, 1)], baseline, rules="linear")


def test_a_graph_is_refused_before_the_model_is_loaded(tmp_path):
    settings, task = Settings(model="nowhere", task="files"), split_words.task()
    with pytest.raises(InputError, match="a graph of edges needs answers of one token each"):
        check_trace(tmp_path, settings, task, examples=None, width=8, fan_in=3)


def test_views_show_the_prompt(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), split_words.examples()[:2]
    seen = attention_view(view, data, [Head(0, 1)])
    assert [pattern.shape for pattern in seen.patterns] == [(1, 9, 9), (1, 5, 5)]
    relevance = token_relevance(view, data, [Head(0, 1)], means(view, split_words.examples()))
    assert [len(values) for values in relevance.relevance] == [9, 5]
