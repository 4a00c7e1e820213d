"""Proof (a): the engine equals the literal two-stream reference; every family, both classes."""

from __future__ import annotations

import pytest
import torch
from helpers.reference import decompose as reference, rules_like
from helpers.tiny_models import FAMILIES, Float64Throughout, build, prompts
from helpers.wrapped import BACKENDS, view

from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.decomposition.rules import PRESETS, Rules

RULES = {
    **PRESETS,
    "frozen norms": Rules(norm="frozen"),
    "published, no sign": Rules(norm="frozen", attention="decomposed", bias="proportional"),
    "decomposed, own scale": Rules(attention="decomposed", bias="proportional"),
    "frozen activation": Rules(activation="frozen"),
    "averaged activation": Rules(activation="averaged"),
    "half attention": Rules(attention="half", bias="proportional"),
    "gate as a constant": Rules(attention="half", activation="averaged", product="gate"),
    "half product": Rules(product="half", bias="proportional"),
    "sign": Rules(norm="frozen", sign=True),
}
SOURCES = [
    [(0, 1, None)],
    [(1, 2, None)],
    [(0, 0, None), (0, 3, None), (1, 1, None)],
    [(0, 2, 4)],
    [(0, 1, 0), (1, 3, 8), (1, 0, 3)],
]


def resets(sources, n_pos, n_heads):
    """One source set as the propagator's masks [source, batch, pos, head]."""
    out = {}
    for layer, head, position in sources:
        mask = out.setdefault(layer, torch.zeros(1, 1, n_pos, n_heads, dtype=torch.bool))
        mask[0, 0, slice(None) if position is None else position, head] = True
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_two_stream_reference(family, backend, tokenizer_folder):
    with Float64Throughout():
        hf_model, model = build(family), view(family, backend, tokenizer_folder)
        tokens = prompts(3, 9, seed=1)
        shape = (model.n_layers, *tokens.shape, model.n_heads, model.d_head)
        generator = torch.Generator().manual_seed(2)
        baseline = torch.randn(shape, generator=generator, dtype=torch.float64)
        candidates = torch.arange(20).expand(3, -1)
        lengths = torch.full((3,), tokens.shape[1])
        for name, rules in RULES.items():
            engine = Propagator(model, tokens, lengths, lambda layer: baseline[layer], rules)
            full = engine.full_logits(candidates)
            told = rules_like(rules.to_dict())
            for sources in SOURCES:
                expected = reference(hf_model, tokens, sources, baseline, told)
                masks = resets(sources, tokens.shape[1], model.n_heads)
                irrel = engine.candidate_logits(engine.propagate(masks), candidates)[0]
                parts = ((irrel, expected.irrel_logits), (full - irrel, expected.rel_logits))
                tolerance = 1e-10 * max(1.0, float(expected.irrel_logits.abs().max()))
                for part, wanted in parts:
                    error = float((part - wanted[:, -1, :20]).abs().max())
                    assert error <= tolerance, f"{name}, {sources}: {error:.2g}"


MLP_RULES = (
    "official", "stable", "shared", "linear", "ablation", "published, no sign", "sign",
    "gate as a constant",
)  # fmt: skip
WITH_MLPS = [
    ([], [0]),
    ([], [1]),
    ([], [0, 1]),
    ([(0, 1, None)], [0]),
    ([(1, 2, None)], [0]),
    ([(0, 0, None), (1, 1, 4)], [1]),
    ([(1, 3, 8)], [0, 1]),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "pythia"])
def test_mlps_as_sources_equal_the_two_stream_reference(family, backend, tokenizer_folder):
    with Float64Throughout():
        hf_model, model = build(family), view(family, backend, tokenizer_folder)
        tokens = prompts(2, 9, seed=1)
        generator = torch.Generator().manual_seed(2)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        baseline = random(model.n_layers, *tokens.shape, model.n_heads, model.d_head)
        outputs = random(model.n_layers, *tokens.shape, model.d_model)
        candidates, lengths = torch.arange(20).expand(2, -1), torch.full((2,), 9)
        for name in MLP_RULES:
            rules = RULES[name]
            engine = Propagator(
                model, tokens, lengths, lambda layer: baseline[layer], rules,
                mlp_baseline=lambda layer: outputs[layer],
            )  # fmt: skip
            full = engine.full_logits(candidates)
            told = rules_like(rules.to_dict())
            for sources, mlps in WITH_MLPS:
                given = {layer: outputs[layer] for layer in mlps}
                expected = reference(hf_model, tokens, sources, baseline, told, given)
                masks = resets(sources, tokens.shape[1], model.n_heads)
                mlp_masks = {layer: torch.tensor([True]) for layer in mlps}
                irrel = engine.candidate_logits(
                    engine.propagate(masks, None, mlp_masks), candidates
                )[0]
                parts = ((irrel, expected.irrel_logits), (full - irrel, expected.rel_logits))
                tolerance = 1e-10 * max(1.0, float(expected.irrel_logits.abs().max()))
                for part, wanted in parts:
                    error = float((part - wanted[:, -1, :20]).abs().max())
                    assert error <= tolerance, f"{name}, {sources}, {mlps}: {error:.2g}"
