"""Proof (a): the engine equals the literal two-stream reference; every family, both classes."""

from __future__ import annotations

import pytest
import torch
from helpers.reference import decompose as reference, rules_like
from helpers.shared import classes_of
from helpers.tiny_models import EXPERTS, FAMILIES, Float64Throughout, build, prompts
from helpers.wrapped import view

from cdt_lens.core.errors import UnsupportedModelError
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


def engines(views, tokens, baseline, rules, mlp_baseline=None):
    """A propagator for each class of TransformerLens."""
    lengths = torch.full((len(tokens),), tokens.shape[1])
    return [
        Propagator(view, tokens, lengths, baseline.__getitem__, rules, mlp_baseline=mlp_baseline)
        for view in views
    ]


def assert_equals(engine, masks, expected, about):
    """The relevant and irrelevant logits at the last position are the reference's."""
    candidates = torch.arange(20).expand(len(expected.irrel_logits), -1)
    irrel = engine.candidate_logits(engine.propagate(*masks), candidates)[0]
    full = engine.full_logits(candidates)
    tolerance = 1e-10 * max(1.0, float(expected.irrel_logits.abs().max()))
    for part, wanted in ((irrel, expected.irrel_logits), (full - irrel, expected.rel_logits)):
        error = float((part - wanted[:, -1, :20]).abs().max())
        assert error <= tolerance, f"{about}: {error:.2g}"


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_equals_the_two_stream_reference(family, tokenizer_folder):
    """Both classes in one test: the reference, the slower part, is the same for both."""
    if not classes_of(family):
        pytest.skip(f"{family} is read by no class of this transformer-lens")
    with Float64Throughout():
        hf_model = build(family)
        views = [view(family, backend, tokenizer_folder) for backend in classes_of(family)]
        n_layers, n_heads, d_head = views[0].n_layers, views[0].n_heads, views[0].d_head
        tokens = prompts(3, 9, seed=1)
        generator = torch.Generator().manual_seed(2)
        shape = (n_layers, *tokens.shape, n_heads, d_head)
        baseline = torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, rules in RULES.items():
            if family in EXPERTS and (rules.mlp_by_formula or rules.sign):
                with pytest.raises(UnsupportedModelError, match="MLP"):
                    engines(views, tokens, baseline, rules)
                continue
            both = engines(views, tokens, baseline, rules)
            told = rules_like(rules.to_dict())
            for sources in SOURCES:
                expected = reference(hf_model, tokens, sources, baseline, told)
                masks = (resets(sources, tokens.shape[1], n_heads),)
                for engine in both:
                    about = f"{type(engine.view.tl).__name__}, {name}, {sources}"
                    assert_equals(engine, masks, expected, about)


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


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "pythia", "granite"])
def test_mlps_as_sources_equal_the_two_stream_reference(family, tokenizer_folder):
    with Float64Throughout():
        hf_model = build(family)
        views = [view(family, backend, tokenizer_folder) for backend in classes_of(family)]
        n_layers, n_heads, d_head = views[0].n_layers, views[0].n_heads, views[0].d_head
        tokens = prompts(2, 9, seed=1)
        generator = torch.Generator().manual_seed(2)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        baseline = random(n_layers, *tokens.shape, n_heads, d_head)
        outputs = random(n_layers, *tokens.shape, views[0].d_model)
        for name in MLP_RULES:
            rules = RULES[name]
            both = engines(views, tokens, baseline, rules, outputs.__getitem__)
            told = rules_like(rules.to_dict())
            for sources, mlps in WITH_MLPS:
                given = {layer: outputs[layer] for layer in mlps}
                expected = reference(hf_model, tokens, sources, baseline, told, given)
                mlp_masks = {layer: torch.tensor([True]) for layer in mlps}
                masks = (resets(sources, tokens.shape[1], n_heads), None, mlp_masks)
                for engine in both:
                    about = f"{type(engine.view.tl).__name__}, {name}, {sources}, {mlps}"
                    assert_equals(engine, masks, expected, about)
