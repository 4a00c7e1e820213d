"""What to look at in prompts: attention patterns of a circuit's heads, and relevance by position.

Both are plain results, so that notebooks and the report can show them without a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from cdt_lens.core import display
from cdt_lens.core.errors import InputError
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.decomposition.decompose import Node, decompose
from cdt_lens.decomposition.rules import DEFAULT_RULES, Rules
from cdt_lens.models.heads import Head, check_heads
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.tasks.metrics import task_direction
from cdt_lens.tasks.task import Examples, require_examples


@dataclass(frozen=True)
class AttentionView:
    """Attention patterns of chosen heads on example prompts; each row of a pattern sums to 1."""

    prompts: tuple[tuple[str, ...], ...]
    patterns: tuple[Float[Tensor, "head _query _key"], ...] = field(repr=False)
    heads: tuple[Head, ...]
    labels: tuple[str, ...]

    def __repr__(self) -> str:
        return display.line(self, f"{len(self.prompts)} prompts", display.few(self.heads))

    def to_dataframe(self) -> pd.DataFrame:
        """One row a prompt, head, query and key position (key <= query): the weight, 0 to 1."""
        rows = [
            (prompt, str(head), query, key, weight)
            for prompt, pattern in enumerate(self.patterns)
            for head, table in zip(self.heads, pattern.tolist(), strict=True)
            for query, weights in enumerate(table)
            for key, weight in enumerate(weights[: query + 1])
        ]
        return display.flat_frame(["prompt", "head", "query", "key", "weight"], rows)

    def widget(self, prompt: int = 0) -> display.Widget:
        """circuitsvis' view of one prompt's patterns, to show in a notebook; works offline."""
        return display.figure(self, prompt=prompt)

    def _repr_html_(self) -> str:
        return display.page(self)


@dataclass(frozen=True)
class TokenRelevance:
    """What chosen heads contribute at each position: logits, + = towards the gold label.

    directions: the full model's task direction of each prompt, in logits.
    """

    prompts: tuple[tuple[str, ...], ...]
    relevance: tuple[Float[Tensor, " _pos"], ...] = field(repr=False)
    labels: tuple[str, ...]
    directions: tuple[float, ...]

    def __repr__(self) -> str:
        end = f"largest magnitude {self.largest:.3g} logits"
        return display.line(self, f"{len(self.prompts)} prompts", end)

    @property
    def largest(self) -> float:
        """The largest magnitude over all prompts, in logits; 0 without tokens."""
        return max((float(v.abs().max()) for v in self.relevance if v.numel()), default=0.0)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a token: prompt, position, the token, and its relevance in logits."""
        rows = [
            (prompt, position, token, value)
            for prompt, tokens in enumerate(self.prompts)
            for position, (token, value) in enumerate(
                zip(tokens, self.relevance[prompt].tolist(), strict=True)
            )
        ]
        return display.flat_frame(["prompt", "position", "token", "relevance"], rows)

    def widget(self, prompt: int = 0) -> display.Widget:
        """circuitsvis' view of one prompt's coloured tokens, to show in a notebook; offline."""
        return display.figure(self, prompt=prompt)

    def _repr_html_(self) -> str:
        return display.page(self)


def attention_view(
    model: nn.Module | ModelView, examples: Examples, heads: Sequence[Head]
) -> AttentionView:
    """The attention patterns of `heads` on each of `examples` (a few: each is kept whole).

    Raises:
        InputError: no examples, no heads, or a head outside the model.
    """
    require_examples(examples)
    view = view_of(model)
    chosen = check_heads(heads, view.n_layers, view.n_heads)
    if not chosen:
        raise InputError("attention_view: expected at least one head")
    sites = [("pattern", layer) for layer in sorted({head.layer for head in chosen})]
    patterns = []
    for batch in examples.batches(1, sort_by_length=False):
        trace = view.run(batch.tokens, sites)
        rows = [trace["pattern", head.layer][0, head.head] for head in chosen]
        patterns.append(torch.stack(rows).float().cpu())
    prompts = tuple(token_strings(view, example.tokens) for example in examples)
    return AttentionView(prompts, tuple(patterns), chosen, tuple(e.label for e in examples))


def token_relevance(
    model: nn.Module | ModelView,
    examples: Examples,
    heads: Sequence[Head],
    baseline: Baseline,
    *,
    rules: str | Rules = DEFAULT_RULES,
    rows: int | None = None,
) -> TokenRelevance:
    """d(rel) of the single positions of `heads`: all of them at one position are one source set.

    Raises:
        InputError: no examples, no heads, or a head outside the model.
    """
    require_examples(examples)
    view = view_of(model)
    chosen = check_heads(heads, view.n_layers, view.n_heads)
    if not chosen:
        raise InputError("token_relevance: expected at least one head")
    relevance, directions = [], []
    for i, example in enumerate(examples):
        sources = [
            [Node(head.layer, head.head, position) for head in chosen]
            for position in range(len(example.tokens))
        ]
        parts = decompose(view, examples[i : i + 1], sources, baseline, rules=rules, rows=rows)
        relevance.append(rearrange(parts.relevant_direction, "pos 1 -> pos").float().cpu())
        directions.append(float(task_direction(parts.logits, parts.direction)))
    prompts = tuple(token_strings(view, example.tokens) for example in examples)
    labels = tuple(example.label for example in examples)
    return TokenRelevance(prompts, tuple(relevance), labels, tuple(directions))


def token_strings(view: ModelView, tokens: Sequence[int]) -> tuple[str, ...]:
    """Each token as text, decoded by itself."""
    tokenizer = view.tokenizer
    if tokenizer is None:
        return tuple(str(token) for token in tokens)
    return tuple(tokenizer.decode([token]) for token in tokens)
