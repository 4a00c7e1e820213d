"""Made-up results as large as a real run's: 30 layers of 9 heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import FaithfulnessCurve
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.circuits.measures import MIB_FRACTIONS
from cdt_lens.finetuning.adapt_result import (
    CHANGE_COLUMNS,
    LANGUAGE_COLUMNS,
    TEXT_COLUMNS,
    TRIAL_COLUMNS,
    AdaptResult,
)
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.result import FineTuneResult
from cdt_lens.finetuning.transfer_result import (
    AUTO_COLUMNS,
    BEFORE_COLUMNS,
    CELL_COLUMNS,
    PER_EXAMPLE,
    TransferResult,
    table,
)
from cdt_lens.models.heads import Head
from cdt_lens.models.provenance import Provenance
from cdt_lens.scoring.agreement import MethodAgreement, compare_scores
from cdt_lens.scoring.prompt_views import AttentionView, TokenRelevance

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
        provenance=provenance(
            {
                "metric": "direction",
                "by": "signed",
                "scores": scores().provenance.options,
                "scores_task": scores().provenance.task_hash,
            }
        ),
        effects=f[:, None] + torch.tensor([-0.1, 0.0, 0.1] * 4),
        without_effects=1 - 0.9 * f[:, None] + torch.tensor([-0.2, 0.0, 0.2] * 4),
        strata=torch.tensor([0] * 6 + [1] * 6),
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


def fine_tuning(scope: str = "decision", *, source: bool = True) -> FineTuneResult:
    epochs = np.arange(7)
    rise = 1 - np.exp(-epochs / 2)
    history = pd.DataFrame(
        {
            "epoch": epochs,
            "step": 25 * epochs,
            "train_loss": [np.nan, *(1.05 - 0.8 * rise[1:])],
            "learning_rate": 1e-4 * (1 - epochs / 8),
            "target_loss": 1.04 - 0.55 * rise + 0.03 * np.maximum(epochs - 4, 0) ** 2,
            "target_accuracy": [0.49, 0.58, 0.66, 0.69, 0.72, 0.7, 0.69],
            "target_macro_f1": [0.41, 0.52, 0.61, 0.66, 0.7, 0.68, 0.66],
            "source_accuracy": [0.79, 0.785, 0.78, 0.77, 0.765, 0.75, 0.74] if source else np.nan,
            "seconds": 11.5 * epochs,
        }
    )
    kept = circuit().heads if scope == "decision" else ()
    origin = provenance({"scope": scope})
    siblings = {Head(h.layer, 3 * (h.head // 3) + i) for h in kept for i in range(3)} - set(kept)
    return FineTuneResult(
        scope=scope,
        heads=kept,
        siblings=tuple(sorted(siblings)),
        n_layers=30,
        n_heads=9,
        trained_parameters=1_343_808,
        total_parameters=134_515_008,
        options={"epochs": 10, "batch_size": 16, "learning_rate": None, "seed": 0},
        history=history,
        best_epoch=4,
        stopped="early: no better for 2 evaluations",
        seconds=93.4,
        provenance=origin,
        adapter=Adapter(scope, kept, {}, {}, origin),
    )


SCOPES = ("decision", "near-zero", "random", "norms", "full", "lora")
TARGETS = ("javanese", "sundanese", "minangkabau")


def transfer(
    targets: tuple[str, ...] = TARGETS,
    scopes: tuple[str, ...] = SCOPES,
    seeds: tuple[int, ...] = (0, 1, 2),
    per_example: bool = False,
) -> TransferResult:
    draw = np.random.default_rng(5)
    shares = {"decision": 0.01, "near-zero": 0.01, "random": 0.01, "norms": 0.0003, "lora": 0.004}
    forgets = {"norms": 0.01, "full": 0.16, "lora": 0.07}
    cells, before = [], [("english", 0.79, 0.78, 0.8, 400)]
    for place, target in enumerate(targets):
        start = 0.5 - 0.03 * (place % 4)
        before.append((target, start, start - 0.05, start + 0.02, 400))
        for index, scope in enumerate(scopes):
            share = shares.get(scope, 1.0)
            for seed in seeds:
                kept = 1 - forgets.get(scope, 0.03) + 0.01 * draw.standard_normal()
                accuracy = start + 0.2 - 0.025 * index + 0.012 * draw.standard_normal()
                cell = {
                    "target": target, "scope": scope, "seed": seed, "accuracy": accuracy,
                    "macro_f1": accuracy - 0.03, "source_accuracy": 0.79 * kept,
                    "source_macro_f1": 0.78 * kept, "retention": kept,
                    "valid_accuracy": accuracy + 0.02, "valid_loss": 1.4 - accuracy,
                    "best_epoch": 3 + seed, "heads": 27, "share": share,
                    "trained_parameters": round(share * 134_515_008),
                    "seconds": 80.0 + 40 * share + seed, "learning_rate": 1e-4,
                    "stopped": "all epochs",
                }  # fmt: skip
                cells.append(cell)
    return TransferResult(
        task="nusax-senti",
        proxy="english",
        targets=targets,
        scopes=scopes,
        cells=table(cells, CELL_COLUMNS),
        before=pd.DataFrame(before, columns=list(BEFORE_COLUMNS)),
        chance={target: 0.3825 + 0.01 * place for place, target in enumerate(targets)},
        auto=choices(targets, seeds),
        discovery={"heads in circuit": 27, "f(C), proxy validation": 0.83, "rule": "magnitude"},
        settings={"examples": 24, "training": {"epochs": 10, "batch_size": 16}, "kv": "share"},
        provenance=provenance({"scopes": list(scopes)}),
        per_example={
            f"{measure}|{target}|{scope}|{seed}": torch.rand(20, generator=seeded(place))
            for measure in PER_EXAMPLE
            for place, target in enumerate(targets if per_example else ())
            for scope in scopes
            for seed in seeds
        },
        test_rows={
            target: tuple((f"Prompt {n} in {target}:", LABELS[n % 3]) for n in range(20))
            for target in (targets if per_example else ())
        },
    )


def choices(targets: tuple[str, ...], seeds: tuple[int, ...]) -> pd.DataFrame:
    """Of each three choices of a rule one is wrong, and the first one of all is a tie."""
    rows = []
    for rule in ("gap", "race"):
        for place, target in enumerate(targets):
            for seed in seeds:
                chosen = "decision" if place % 2 == 0 else "near-zero"
                other = "near-zero" if chosen == "decision" else "decision"
                right = (place + seed) % 3 != 2
                tie = place == seed == 0
                better = "tie" if tie else chosen if right else other
                inputs = f"gap {0.29 + 0.01 * place:.2f}, threshold 0.25"
                rows.append((target, seed, rule, chosen, better, right, inputs))
    return pd.DataFrame(rows, columns=list(AUTO_COLUMNS))


def everything() -> list[object]:
    """One result of each kind, in no order."""
    return [
        token_relevance(), transfer(), agreement(), circuit(), fine_tuning(), attention_view(),
        curve(), scores(),
    ]  # fmt: skip


def adaptation() -> AdaptResult:
    """A model adapted with 27 heads: better in the target, a little worse in the source."""
    languages = [
        ("target", 60, 0.3, 0.2, 0.43, 0.55, 0.42, 0.67, 0.25, 0.1, 0.4),
        ("source", 240, 0.9, 0.86, 0.93, 0.88, 0.83, 0.92, -0.02, -0.05, 0.01),
    ]
    trials = [
        ("heads", "decision", 27, 1e-3, 3, 0.52, 0.91, 0.89, 61.0),
        ("norms", "norms", 0, 1e-3, 5, 0.43, 1.02, 0.9, 58.0),
    ]
    texts = [
        ("target", 48, 900, 7.4, 7.9, 0.5, 0.3, 0.7),
        ("source", 48, 800, 4.3, 4.55, 0.25, 0.14, 0.36),
    ]
    changes = [("target", "Makanannya <b>enak</b> sekali!", "positive", "negative", "positive")]
    return AdaptResult(
        model="HuggingFaceTB/SmolLM2-135M-Instruct", chosen="heads", scope="decision", heads=27,
        learning_rate=1e-3, trained_parameters=5_000_000, total_parameters=134_515_008, keep=0.95,
        languages=pd.DataFrame(languages, columns=list(LANGUAGE_COLUMNS)),
        trials=pd.DataFrame(trials, columns=list(TRIAL_COLUMNS)),
        changes=pd.DataFrame(changes, columns=list(CHANGE_COLUMNS)), exported="model",
        settings={"keep": 0.95}, provenance=provenance(),
        texts=pd.DataFrame(texts, columns=list(TEXT_COLUMNS)),
    )  # fmt: skip
