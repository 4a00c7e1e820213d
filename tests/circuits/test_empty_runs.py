"""The two empty runs of faithfulness against plain transformers: no heads, and nothing at all.

MIB divides by a wholly corrupted run, this package by one whose MLPs are intact. Both are computed
here with forward hooks on the Hugging Face model, one unpadded prompt at a time, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.by_hand import balanced, direction
from helpers.checks import assert_close
from helpers.shared import models, shared
from helpers.tiny_models import Float64Throughout, build
from helpers.tiny_tasks import examples
from torch import Tensor, nn

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import (
    FaithfulnessCurve,
    circuit_faithfulness,
    faithfulness_curve,
)
from cdt_lens.comparing.compare import compare_methods
from cdt_lens.core.errors import InputError
from cdt_lens.decomposition.baseline import (
    Baseline,
    counterfactual_baseline,
    mean_activations,
    zero_baseline,
)
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.sweep import score_heads
from cdt_lens.tasks.task import Example, Examples

FRACTIONS = (0.0, 0.3, 0.6, 1.0)
QUIET = {"progress": False}
# By position of a prompt: the token embedding (input), z of a layer, and what the MLP of a layer adds.
Values = dict[Any, Tensor]


def parts(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The output maps of heads, and the MLPs."""
    if hasattr(model, "transformer"):
        blocks = model.transformer.h
        return [b.attn.c_proj for b in blocks], [b.mlp for b in blocks]
    blocks = model.model.layers
    return [b.self_attn.o_proj for b in blocks], [b.mlp for b in blocks]


def run(
    model: nn.Module, tokens: Sequence[int], given: Values, heads: Iterable[Head], width: int
) -> tuple[Tensor, Values]:
    """Logits at the answer and what was seen, with the z of `heads`, MLPs and input replaced."""
    outputs, mlps = parts(model)
    seen: Values = {}
    replaced = [(head.layer, slice(head.head * width, (head.head + 1) * width)) for head in heads]

    def before(name: Any) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            value = args[0].clone()
            seen[name] = value[0]
            for layer, part in replaced:
                if name == ("z", layer):
                    value[0, :, part] = given[name][:, part]
            return (value, *args[1:])

        return hook

    def after(name: Any) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, value: Tensor) -> Tensor | None:
            seen[name] = value[0]
            return given[name][None] if name in given else None

        return hook

    handles = [model.get_input_embeddings().register_forward_hook(after("input"))]
    for layer, (output, mlp) in enumerate(zip(outputs, mlps, strict=True)):
        handles.append(output.register_forward_pre_hook(before(("z", layer))))
        handles.append(mlp.register_forward_hook(after(("mlp", layer))))
    try:
        with torch.no_grad():
            return model(torch.tensor([list(tokens)])).logits[0, -1], seen
    finally:
        for handle in handles:
            handle.remove()


def means_of(model: nn.Module, data: Examples, width: int) -> Callable[[Example], Values]:
    """Label-balanced means, the answer position apart, each position of each prompt by itself."""
    sums: dict[Any, dict[str, list[Tensor]]] = {}
    for item in data:
        _, seen = run(model, item.tokens, {}, (), width)
        for name, value in seen.items():
            for slot, rows in ((0, value[:-1]), (1, value[-1:])):
                sums.setdefault((name, slot), {}).setdefault(item.label, []).extend(rows)
    means = {
        key: torch.stack([torch.stack(rows).mean(0) for rows in by_label.values()]).mean(0)
        for key, by_label in sums.items()
    }

    def values(item: Example) -> Values:
        n = len(item.tokens) - 1
        names = {name for name, _ in means}
        return {name: torch.stack([means[name, 0]] * n + [means[name, 1]]) for name in names}

    return values


class ByHand:
    """f of circuits, and both empty runs, without any code of the package's engine."""

    def __init__(self, family: str, data: Examples, values: Any, view: ModelView) -> None:
        self.model = build(family, torch.float64).eval()
        self.data, self.width = data, view.d_head
        self.values = values if callable(values) else means_of(self.model, data, self.width)
        self.everyone = all_heads(view.n_layers, view.n_heads)
        self.full = self.metric(self.everyone)

    def metric(self, kept: Iterable[Head]) -> float:
        outside = [head for head in self.everyone if head not in set(kept)]
        return self._mean(lambda item: ({k: v for k, v in self.values(item).items() if k[0] == "z"},
                                        outside))  # fmt: skip

    def empty(self, run: str) -> float:
        if run == "heads":
            return self.metric(())
        return self._mean(lambda item: (self.values(item), self.everyone))

    def _mean(self, given: Callable[[Example], tuple[Values, Iterable[Head]]]) -> float:
        values = []
        for item in self.data:
            logits, _ = run(self.model, item.tokens, *given(item), self.width)
            values.append(direction(logits, item))
        return balanced(values, self.data)

    def curve(self, circuits: Sequence[Iterable[Head]], empty: float) -> list[float]:
        return [(self.metric(c) - empty) / (self.full - empty) for c in circuits]


def areas(f: Sequence[float]) -> tuple[float, float]:
    """CPR and CMD as MIB's evaluation adds them up."""
    cpr = cmd = 0.0
    for a, b, left, right in zip(f, f[1:], FRACTIONS, FRACTIONS[1:], strict=False):
        cpr += (right - left) * (a + b) / 2
        cmd += (right - left) * (abs(1 - a) + abs(1 - b)) / 2
    return cpr, cmd


def pairs_by_hand(family: str, pairs: Examples, view: ModelView) -> Callable[[Example], Values]:
    model = build(family, torch.float64).eval()
    of_prompt = {}
    for item, pair in zip(examples(), pairs, strict=True):
        of_prompt[item.tokens] = run(model, pair.tokens, {}, (), view.d_head)[1]
    return lambda item: of_prompt[item.tokens]


def zeros(view: ModelView) -> Callable[[Example], Values]:
    def values(item: Example) -> Values:
        n = len(item.tokens)
        z = torch.zeros(n, view.n_heads * view.d_head, dtype=torch.float64)
        d = torch.zeros(n, view.d_model, dtype=torch.float64)
        layers = range(view.n_layers)
        return {"input": d} | {("z", i): z for i in layers} | {("mlp", i): d for i in layers}

    return values


def baseline_and_values(kind: str, family: str, view: ModelView) -> tuple[Baseline, Any]:
    data = examples()
    if kind == "mean":
        return mean_activations(view, data, mlps=True, **QUIET), None
    if kind == "zero":
        return zero_baseline(view, data), zeros(view)
    pairs = examples(seed=9, name="tiny/pairs")
    return counterfactual_baseline(view, data, pairs), pairs_by_hand(family, pairs, view)


@models(("gpt2", "llama"))
@pytest.mark.parametrize("kind", ["mean", "counterfactual", "zero"])
def test_both_empty_runs_by_hand(kind, family, backend, tokenizer_folder):
    """Curves and areas of both, and that they are the same where both divide by the same run."""
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        baseline, values = baseline_and_values(kind, family, view)
        scores = score_heads(view, data, baseline, rules="ablation", **QUIET)
        hand = ByHand(family, data, values, view)
        ranking = scores.ranking()
        found = {}
        for empty in ("heads", "all"):
            curve = faithfulness_curve(
                view, scores, data, baseline, fractions=FRACTIONS, draws=1, empty=empty, **QUIET
            )
            found[empty] = curve
            circuits = [ranking[:size] for size in curve.sizes]
            expected = hand.empty(empty)
            # The means are kept in single precision.
            tight = 1e-9 if kind == "counterfactual" else 1e-5
            assert curve.empty_run == empty
            assert curve.full == pytest.approx(hand.full, abs=tight)
            assert curve.empty == pytest.approx(expected, abs=tight)
            f = hand.curve(circuits, expected)
            assert curve.faithfulness.tolist() == pytest.approx(f, abs=1e-4, rel=1e-4)
            cpr, cmd = areas(f)
            assert curve.cpr == pytest.approx(cpr, abs=1e-4, rel=1e-4)
            assert curve.cmd == pytest.approx(cmd, abs=1e-4, rel=1e-4)
            f = hand.curve([set(hand.everyone) - set(circuit) for circuit in circuits], expected)
            assert curve.completeness.tolist() == pytest.approx(f, abs=1e-4, rel=1e-4)
        one, other = found["heads"], found["all"]
        assert abs(one.empty - other.empty) > 1e-3 and abs(one.cpr - other.cpr) > 1e-3
        # The same m(C): with one empty run for both, the curves are the same.
        m = other.empty + other.faithfulness.double() * (other.full - other.empty)
        again = (m - one.empty) / (one.full - one.empty)
        assert_close(again, one.faithfulness.double(), atol=2e-5)


@models(("gpt2",))
def test_nothing_left_is_the_plain_run_of_the_counterfactual_prompt(
    family, backend, tokenizer_folder
):
    """MIB's wholly corrupted run: the pair's own logits, at the candidates of the example."""
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        pairs = examples(seed=9, name="tiny/pairs")
        baseline = counterfactual_baseline(view, data, pairs)
        circuit = Circuit((Head(0, 0), Head(1, 1)), view.n_layers, view.n_heads)
        found = circuit_faithfulness(view, circuit, data, baseline, draws=1, empty="all", **QUIET)
        model = build(family, torch.float64).eval()
        with torch.no_grad():
            values = [
                direction(model(torch.tensor([pair.tokens])).logits[0, -1], item)
                for item, pair in zip(data, pairs, strict=True)
            ]
        assert found.empty == pytest.approx(balanced(values, data), abs=1e-9)
        assert found.empty_run == "all"
        assert "heads, MLPs and input replaced, as in MIB" in repr(found)
        assert set(found.to_dataframe()["empty run"]) == {"all"}


@models(("gpt2", "llama"))
def test_pairs_that_end_alike_have_one_empty_run(family, backend, tokenizer_folder):
    """At the answer the MLPs then see what they see in the pair's run, as in all tasks of MIB."""
    with Float64Throughout():
        view, data = shared(family, backend, tokenizer_folder), examples()
        drawn = examples(seed=9, name="tiny/pairs")
        items = tuple(
            replace(pair, tokens=(*pair.tokens[:-1], item.tokens[-1]))
            for item, pair in zip(data, drawn, strict=True)
        )
        baseline = counterfactual_baseline(view, data, replace(drawn, items=items))
        circuit = Circuit((Head(0, 0), Head(1, 1)), view.n_layers, view.n_heads)
        one, other = (
            circuit_faithfulness(view, circuit, data, baseline, draws=1, empty=empty, **QUIET)
            for empty in ("heads", "all")
        )
        assert one.empty == pytest.approx(other.empty, abs=1e-7)  # kept in single precision
        assert one.faithfulness == pytest.approx(other.faithfulness, rel=1e-5)


def test_intervals_are_of_the_same_empty_run(tokenizer_folder):
    """The first-order effects of the prompts average to f, whichever run counts as 0."""
    view = shared("gpt2", "bridge", tokenizer_folder)
    data = examples((9,) * 12, ("positive",) * 6 + ("negative",) * 6)
    baseline = mean_activations(view, data, mlps=True, **QUIET)
    scores = score_heads(view, data, baseline, **QUIET)
    curve = faithfulness_curve(
        view, scores, data, baseline, fractions=FRACTIONS, draws=1, empty="all", **QUIET
    )
    assert curve.effects is not None
    halves = [curve.effects[:, :6].mean(1), curve.effects[:, 6:].mean(1)]
    assert_close(sum(halves) / 2, curve.faithfulness.double(), atol=1e-5)
    low, high = curve.interval()
    assert bool(
        (low <= curve.faithfulness + 1e-6).all() and (curve.faithfulness <= high + 1e-6).all()
    )


def test_a_baseline_without_values_for_it_is_refused(tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    scores = score_heads(view, data, mean_activations(view, data, **QUIET), **QUIET)
    for lacking in ("mlp_means", "embed_means"):
        baseline = mean_activations(view, data, mlps=True, **QUIET)
        object.__setattr__(baseline, lacking, None)
        with pytest.raises(InputError, match=r"it holds no values for .*mlps=True"):
            faithfulness_curve(view, scores, data, baseline, empty="all", draws=1, **QUIET)


def test_the_choice_is_kept_in_files_and_shown(tmp_path: Path, tokenizer_folder):
    view, data = shared("gpt2", "bridge", tokenizer_folder), examples()
    held_out = examples(seed=5, name="tiny/valid")
    baseline = mean_activations(view, data, mlps=True, **QUIET)
    scores = score_heads(view, data, baseline, **QUIET)
    curve = faithfulness_curve(view, scores, data, baseline, empty="all", draws=1, **QUIET)
    loaded = FaithfulnessCurve.load(curve.save(tmp_path / "curve.json"))
    assert loaded == curve and loaded.empty_run == "all"
    assert curve.provenance.options["empty"] == "all"
    words = "f = 0: heads, MLPs and input replaced, as in MIB"
    assert words in repr(curve) and words in curve._repr_html_()
    assert words in curve.plot().title
    assert set(curve.to_dataframe()["empty run"]) == {"all"}

    by_run = {
        empty: compare_methods(
            view, data, held_out, baseline, ["exact", "random"], draws=1, fractions=FRACTIONS,
            empty=empty, folder=tmp_path / "kept", **QUIET,
        )
        for empty in ("heads", "all")
    }  # fmt: skip
    for empty, result in by_run.items():
        measured = faithfulness_curve(
            view, score_heads(view, data, baseline, rules="ablation", **QUIET), held_out, baseline,
            empty=empty, draws=1, fractions=FRACTIONS, **QUIET,
        )  # fmt: skip
        assert result.empty_run == result["exact"].empty_run == empty
        assert result.empty == pytest.approx(measured.empty, abs=1e-5)
        assert result["exact"].value("cpr", "signed") == pytest.approx(measured.cpr, abs=1e-4)
        for frame in (result.to_dataframe(), result.areas(), result.faithfulness()):
            assert set(frame["empty_run"]) == {empty}
    result = by_run["all"]
    assert words in repr(result) and words in repr(result["exact"])
    assert result._repr_html_().count(words) >= 3
    again = type(result).load(result.save(tmp_path / "comparison.json"))
    assert again == result and again.empty_run == "all"
