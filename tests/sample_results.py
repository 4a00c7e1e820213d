"""Made-up results as large as a real run's: 30 layers of 9 heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cdt_lens.circuit import Circuit
from cdt_lens.faithfulness import FaithfulnessCurve
from cdt_lens.head_scores import HeadScores, MethodAgreement, compare_scores
from cdt_lens.metrics import MIB_FRACTIONS
from cdt_lens.provenance import Provenance
from cdt_lens.views import AttentionView, TokenRelevance

LABELS = ("positive", "neutral", "negative")
PROMPTS = (
    ("<s>", "The", " food", " was", " awful", " and", " cold", ".", "\n", "Sentiment", ":"),
    ("<s>", "Mak", "an", "annya", " enak", " sekali", "!", "\n", "Sentiment", ":"),
    ("<s>", " \u0627\u0644\u0637\u0639\u0627\u0645", " \u7f8e\u5473", "\n", "Sentiment", ":"),
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def provenance(options: Mapping[str, Any] | None = None) -> Provenance:
    return Provenance(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        model_hash="9f2c" * 16,
        model_shape={"n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "d_model": 576},
        task="nusax-senti/english/train",
        task_hash="ab12" * 16,
        examples={"positive": 80, "neutral": 80, "negative": 80},
        options={"rules": {"norm": "through", "attention": "frozen"}, **(options or {})},
        seed=0,
        versions={"python": "3.11.7", "torch": "2.13.0"},
        command="python",
        created="2026-02-03T10:11:12+00:00",
    )


def scores(layers: int = 30, heads: int = 9, *, method: str = "cdt", seed: int = 0) -> HeadScores:
    generator = seeded(seed)
    # A few strong heads, mostly late ones, and many near zero: what real scores look like.
    values = torch.randn(layers, heads, generator=generator) ** 3
    values *= torch.linspace(0.2, 1.4, layers)[:, None]
    values *= 0.8 / values.abs().max()
    stderr = 0.01 + 0.1 * values.abs() * torch.rand(layers, heads, generator=generator)
    noise = torch.randn(24, layers, heads, generator=generator)
    return HeadScores(
        values=values,
        stderr=stderr,
        per_example=values + noise * stderr,
        example_labels=LABELS * 8,
        direction=6.8,
        method=method,
        provenance=provenance({"method": method}),
    )


def circuit() -> Circuit:
    return scores().select(fraction=0.1)


def curve() -> FaithfulnessCurve:
    f = torch.tensor([0, 0.02, 0.08, 0.17, 0.35, 0.63, 0.84, 0.97, 1.04, 1])
    middle = torch.tensor([0, 0, 0.01, 0.02, 0.03, 0.06, 0.12, 0.25, 0.62, 1])
    spread = 0.12 * (middle * (1 - middle)).sqrt()
    draws = {
        name: middle + spread * torch.randn(50, 10, generator=seeded(seed))
        for seed, name in enumerate(("random", "random-per-layer"))
    }
    return FaithfulnessCurve(
        sizes=(0, 1, 1, 3, 5, 14, 27, 54, 135, 270),
        fractions=tuple(MIB_FRACTIONS),
        faithfulness=f,
        completeness=1 - 0.9 * f,
        random=draws,
        full=6.81,
        empty=0.12,
        metric="direction",
        cpr=0.93,
        cmd=0.09,
        random_cpr={name: values.mean(1) + 0.4 for name, values in draws.items()},
        random_cmd={name: 0.6 - values.mean(1) for name, values in draws.items()},
        beaten={name: (values < f).float().mean(0) for name, values in draws.items()},
        provenance=provenance({"metric": "direction"}),
    )


def agreement() -> MethodAgreement:
    one = scores()
    noise = 0.03 * torch.randn(one.values.shape, generator=seeded(7))
    other = HeadScores(
        values=0.9 * one.values + noise,
        stderr=one.stderr,
        per_example=one.per_example,
        example_labels=one.example_labels,
        direction=one.direction,
        method="mean-ablation",
        provenance=provenance({"method": "mean-ablation"}),
    )
    return compare_scores(one, other)


def attention_view(prompts: tuple[tuple[str, ...], ...] = PROMPTS) -> AttentionView:
    generator = seeded(3)
    patterns = []
    for tokens in prompts:
        scaled = 2 * torch.randn(12, len(tokens), len(tokens), generator=generator)
        future = torch.ones(len(tokens), len(tokens)).triu(1).bool()
        patterns.append(scaled.masked_fill(future, -torch.inf).softmax(-1))
    return AttentionView(prompts, tuple(patterns), scores().top(12), LABELS[: len(prompts)])


def token_relevance(prompts: tuple[tuple[str, ...], ...] = PROMPTS) -> TokenRelevance:
    generator = seeded(4)
    relevance = tuple(0.3 * torch.randn(len(tokens), generator=generator) for tokens in prompts)
    return TokenRelevance(
        prompts, relevance, LABELS[: len(prompts)], (6.1, 5.4, 1.2)[: len(prompts)]
    )


def everything() -> list[object]:
    """One result of each kind, in no order."""
    return [token_relevance(), agreement(), circuit(), attention_view(), curve(), scores()]
