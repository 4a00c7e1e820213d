"""How results show themselves: a line in a terminal, a table or a figure in a notebook.

1. `__repr__` is one line of facts, never a tensor. 2. `_repr_html_` needs no network, escapes what
comes from data, and names no colour, so that it reads on a light and on a dark page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from markupsafe import Markup

if TYPE_CHECKING:
    from cdt_lens.decompose import Decomposition
    from cdt_lens.edges import EdgeScores
    from cdt_lens.faithfulness import CircuitFaithfulness
    from cdt_lens.tasks import Examples

_ROWS = 40  # of a table; a longer one is cut in its middle
_WIDTH = 160  # characters of a cell


def line(result: object, *facts: object) -> str:
    """Such as "Circuit(27 of 270 heads; L9H6, L9H9, ...)": the type and what to know of it."""
    return f"{type(result).__name__}({'; '.join(str(fact) for fact in facts if fact != '')})"


def few(items: Iterable[object], most: int = 6) -> str:
    """The first of the items, and how many there are where they are more."""
    listed = [str(item) for item in items]
    shown = ", ".join(listed[:most])
    return shown if len(listed) <= most else f"{shown}, ... ({len(listed)})"


def short(text: str, most: int = 60) -> str:
    """The beginning of a text, on one line and in quotation marks."""
    return repr(text if len(text) <= most else f"{text[:most]}...")


def html(title: str, *parts: str | pd.DataFrame) -> str:
    """A paragraph, escaped, and under it tables and ready HTML."""
    shown = [Markup(frame_html(p) if isinstance(p, pd.DataFrame) else p) for p in parts]
    return str(Markup("<p>{}</p>{}").format(title, Markup("").join(shown)))


def frame_html(frame: pd.DataFrame, form: str = "{:.4g}") -> str:
    """A table of `frame`, escaped; missing values stay empty."""
    with pd.option_context("display.max_colwidth", _WIDTH):
        return str(
            frame.to_html(
                index=False, border=0, max_rows=_ROWS, na_rep="", float_format=form.format
            )
        )


def examples_frame(examples: Examples) -> pd.DataFrame:
    """One row an example: prompt, label, and the numbers of tokens, answers and competitors."""
    rows = [
        (e.prompt, e.label, len(e.tokens), len(e.answers), len(e.others)) for e in examples.items
    ]
    return pd.DataFrame(rows, columns=["prompt", "label", "tokens", "answers", "others"])


def counts_frame(splits: Sequence[Examples]) -> pd.DataFrame:
    """One row a split: its name, the number of examples, and of each label."""
    return pd.DataFrame([{"split": s.name, "examples": len(s), **s.counts} for s in splits])


def decomposition_frame(parts: Decomposition) -> pd.DataFrame:
    """One row a source set and example: d(rel) and the share of the direction it is."""
    full = (parts.logits * parts.direction).sum(-1).tolist()
    rows = [
        (few(source, 4), example, value, full[example])
        for source, values in zip(parts.sources, parts.relevant_direction.tolist(), strict=True)
        for example, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["sources", "example", "relevant", "direction"])


def faithfulness_frame(result: CircuitFaithfulness) -> pd.DataFrame:
    """The circuit, its complement and each control: f, and the share of draws beaten."""
    rows: list[tuple[str, float, float | None]] = [
        ("circuit", result.faithfulness, None),
        ("without the circuit", result.completeness, None),
    ]
    rows += [
        (f"{name} (median of {len(draws)})", float(draws.quantile(0.5)), result.beaten[name])
        for name, draws in result.random.items()
    ]
    frame = pd.DataFrame(rows, columns=["heads kept", "f", "beaten"])
    return frame.astype({"f": float, "beaten": float})


def edges_frame(scores: EdgeScores) -> pd.DataFrame:
    """One row an edge that has a score: source, target, site and score, the strongest first."""
    rows: list[tuple[str, str, str, float]] = []
    heads, mlps, ends = (
        each.tolist() for each in (scores.to_heads, scores.to_mlps, scores.to_logits)
    )
    for number, source in enumerate(map(str, scores.sources)):
        rows.append((source, "logits", "", ends[number]))
        rows += [(source, f"M{n}", "", value) for n, value in enumerate(mlps[number])]
        for site, layers in zip("qkv", heads[number], strict=True):
            rows += [
                (source, f"L{layer}H{head}", site, value)
                for layer, values in enumerate(layers)
                for head, value in enumerate(values)
            ]
    kept = sorted((row for row in rows if row[-1]), key=lambda row: -abs(row[-1]))
    return pd.DataFrame(kept, columns=["source", "target", "site", "score"])


def flat_frame(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> pd.DataFrame:
    """Rows as a table with these columns, also where there are none."""
    return pd.DataFrame(list(rows), columns=list(columns))
