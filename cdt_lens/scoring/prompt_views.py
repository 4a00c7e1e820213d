"""Views of prompts: attention patterns of a circuit's heads, and relevance by position.

Both are plain results, so that notebooks and the report can show them without a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from cdt_lens.core import display
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import DEFAULT_RULES, Count, FromZeroCount, Preset
from cdt_lens.core.equality import EqualByContent
from cdt_lens.core.errors import InputError
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.decomposition.decompose import Node, decompose
from cdt_lens.decomposition.rules import Rules
from cdt_lens.models.heads import Head
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.tasks.metrics import task_direction
from cdt_lens.tasks.task import Examples, check_examples


@dataclass(frozen=True, eq=False)
class AttentionView(EqualByContent):
    """Attention patterns of chosen heads on example prompts.

    Args:
        prompts: Tokens of each prompt, as text.
        patterns: Attention weights of each prompt; each row sums to 1.
        heads: The heads.
        labels: Gold label of each prompt.
    """

    prompts: tuple[tuple[str, ...], ...]
    patterns: tuple[Float[Tensor, "head _query _key"], ...] = field(repr=False)
    heads: tuple[Head, ...]
    labels: tuple[str, ...]

    def __repr__(self) -> str:
        return display.line(self, f"{len(self.prompts)} prompts", display.few(self.heads))

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per prompt, head, query and key position: the weight, from 0 to 1."""
        rows = [
            (prompt, str(head), query, key, weight)
            for prompt, pattern in enumerate(self.patterns)
            for head, table in zip(self.heads, pattern.tolist(), strict=True)
            for query, weights in enumerate(table)
            for key, weight in enumerate(weights[: query + 1])
        ]
        return display.flat_frame(["prompt", "head", "query", "key", "weight"], rows)

    @checked_arguments
    def widget(self, prompt: FromZeroCount = 0) -> display.Widget:
        """circuitsvis' view of one prompt's patterns, to show in a notebook; works offline."""
        return display.figure(self, prompt=prompt)

    def _repr_html_(self) -> str:
        return display.page(self)


@dataclass(frozen=True, eq=False)
class TokenRelevance(EqualByContent):
    """Contribution of chosen heads at each position, in logits.

    Args:
        prompts: Tokens of each prompt, as text.
        relevance: d(rel) at each position; positive favours the gold label.
        labels: Gold label of each prompt.
        directions: Task direction of the full model on each prompt.
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
        """Return one row per token: prompt, position, token, and its relevance in logits."""
        rows = [
            (prompt, position, token, value)
            for prompt, tokens in enumerate(self.prompts)
            for position, (token, value) in enumerate(
                zip(tokens, self.relevance[prompt].tolist(), strict=True)
            )
        ]
        return display.flat_frame(["prompt", "position", "token", "relevance"], rows)

    @checked_arguments
    def widget(self, prompt: FromZeroCount = 0) -> display.Widget:
        """circuitsvis' view of one prompt's coloured tokens, to show in a notebook; offline."""
        return display.figure(self, prompt=prompt)

    def _repr_html_(self) -> str:
        return display.page(self)


@checked_arguments
@uses_model
def attention_view(
    model: nn.Module | ModelView, examples: Examples, heads: Iterable[Head | str]
) -> AttentionView:
    """Record the attention patterns of heads on a few examples.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: A few examples; all patterns are kept in memory.
        heads: The heads, as `Head` or by name, or a circuit of this model.

    Returns:
        The patterns of each example, with its tokens.

    Raises:
        InputError: There are no examples or no heads, or a head is outside the model.
    """
    view, chosen = _checked(model, examples, heads, "attention_view")
    sites = [("pattern", layer) for layer in sorted({head.layer for head in chosen})]
    patterns = []
    for batch in examples.batches(1, sort_by_length=False):
        # Tokens of a label word may stand behind the prompt.
        trace = view.run(batch.tokens[:1, : int(batch.prompt_lengths[0])], sites)
        rows = [trace["pattern", head.layer][0, head.head] for head in chosen]
        patterns.append(torch.stack(rows).float().cpu())
    prompts = tuple(token_strings(view, example.tokens) for example in examples)
    return AttentionView(prompts, tuple(patterns), chosen, tuple(e.label for e in examples))


@checked_arguments
@uses_model
def token_relevance(
    model: nn.Module | ModelView,
    examples: Examples,
    heads: Iterable[Head | str],
    baseline: Baseline,
    *,
    rules: Preset | Rules = DEFAULT_RULES,
    rows: Count | None = None,
) -> TokenRelevance:
    """Decompose the contribution of heads by position.

    All heads at one position are one source set.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: A few examples.
        heads: The heads, as `Head` or by name, or a circuit of this model.
        baseline: The values that ablated heads take.
        rules: Name of a preset, or `Rules`.
        rows: Maximum number of (position x example) rows per forward pass; None chooses it by the
            length of the prompts.

    Returns:
        d(rel) at each position of the prompts, in logits; positive favours the gold label.

    Raises:
        InputError: There are no examples or no heads, or a head is outside the model.
    """
    view, chosen = _checked(model, examples, heads, "token_relevance")
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


def _checked(
    model: nn.Module | ModelView, examples: Examples, heads: Iterable[Head | str], where: str
) -> tuple[ModelView, tuple[Head, ...]]:
    view = view_of(model)
    check_examples(view, examples)
    chosen = view.heads(heads)
    if not chosen:
        raise InputError(f"{where}: expected at least one head")
    return view, chosen


def token_strings(view: ModelView, tokens: Sequence[int]) -> tuple[str, ...]:
    """Decode each token by itself; its number where the model has no tokenizer."""
    tokenizer = view.tokenizer
    if tokenizer is None:
        return tuple(str(token) for token in tokens)
    return tuple(tokenizer.decode([token]) for token in tokens)
