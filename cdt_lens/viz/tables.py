"""The results' numbers as tables: head scores, circuits, faithfulness, agreement.

Scores are in logits, signed: positive pushes towards the gold label.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from markupsafe import Markup
from torch import Tensor

from cdt_lens.models.heads import Head, all_heads
from cdt_lens.viz.style import control_name
from cdt_lens.viz.table import table_html
from cdt_lens.viz.words import number, spread

if TYPE_CHECKING:
    from cdt_lens.circuits.circuit import Circuit
    from cdt_lens.circuits.faithfulness import FaithfulnessCurve
    from cdt_lens.circuits.graph import Edge
    from cdt_lens.circuits.head_scores import HeadScores


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores and standard errors of every head, whether they come with examples or a circuit.

    direction: the full model's task direction in logits, where it is known. NaN: not scored.
    """

    values: Float[Tensor, "layer head"]
    stderr: Float[Tensor, "layer head"]
    method: str
    direction: float | None = None

    @classmethod
    def of(cls, scores: HeadScores) -> Scored:
        """The part of `scores` that is about heads."""
        return cls(scores.values, scores.stderr, scores.method, scores.direction)

    @classmethod
    def kept_by(cls, circuit: Circuit) -> Scored | None:
        """The scores that `circuit` was selected from, if it kept them."""
        if circuit.scores is None:
            return None
        stderr = circuit.stderr
        unknown = torch.full_like(circuit.scores, torch.nan)
        method = str(circuit.selection.get("method", "scores"))
        return cls(circuit.scores, unknown if stderr is None else stderr, method)

    def at(self, head: Head) -> tuple[float, float]:
        """Score and standard error of `head`."""
        place = head.layer, head.head
        return float(self.values[place]), float(self.stderr[place])

    def lines(self) -> list[str]:
        """One line a head, layer by layer, such as "L9H6: +0.12 ± 0.01 logits (cdt)"."""
        return [self.line(head) for head in all_heads(*self.values.shape)]

    def line(self, head: Head) -> str:
        """The score of `head` in words."""
        value, error = self.at(head)
        if value != value:
            return f"{head}: not scored ({self.method})"
        return f"{head}: {value:+.4g} \u00b1 {error:.2g} logits ({self.method})"


def heads_table(scored: Scored, heads: Iterable[Head], *, caption: str) -> Markup:
    """Score, standard error, their ratio and, where known, the share of the task direction."""
    columns = ["head", "score (logits)", "standard error", "score / s.e."]
    if scored.direction is not None:
        columns.append("share of direction")
    rows = []
    for head in heads:
        value, error = scored.at(head)
        row = [head, number(value, "+z.4f"), number(error, ".4f")]
        row.append(number(value / error if error else torch.nan, "+z.1f"))
        if scored.direction is not None:
            share = value / scored.direction if scored.direction else torch.nan
            row.append(number(share, "+z.1%"))
        rows.append(row)
    return table_html(columns, rows, caption=caption)


def layers_table(circuit: Circuit) -> Markup:
    """The circuit's heads, one row a layer."""
    rows = []
    for layer, members in groupby(sorted(circuit.heads), key=lambda head: head.layer):
        names = [str(head) for head in members]
        rows.append((layer, len(names), ", ".join(names)))
    return table_html(("layer", "heads", "which"), rows, caption="Circuit by layer")


def edges_table(edges: Sequence[Edge], *, caption: str, unit: str = "logits") -> Markup:
    """The edges of a circuit graph: who writes, who reads and how, and the score."""
    sites = {"q": "queries", "k": "keys", "v": "values", "": ""}
    rows = [
        (
            edge.source,
            edge.target,
            sites[edge.site],
            "not scored" if edge.score is None else number(edge.score, "+z.4f"),
        )
        for edge in edges
    ]
    score = f"score ({unit})" if unit else "score"
    return table_html(("from", "to", "read by its", score), rows, caption=caption)


def areas_table(curve: FaithfulnessCurve) -> Markup:
    """CPR and CMD of the circuit and, as median [5 %, 95 %], of its random controls."""
    rows = [["circuit", number(curve.cpr, ".3f"), number(curve.cmd, ".3f")]]
    for name in curve.random_cpr:
        areas = (spread(draws[name]) for draws in (curve.random_cpr, curve.random_cmd))
        rows.append([control_name(name), *areas])
    columns = ("", "CPR (higher is better)", "CMD (lower is better)")
    caption = "Areas; of random heads the median [5 %, 95 %]"
    return table_html(columns, rows, caption=caption)


def sizes_table(curve: FaithfulnessCurve) -> Markup:
    """f of the circuit, without it, and of its random controls, one row a size."""
    columns = ["heads", "share", "f of the circuit", "f without it"]
    for name in curve.random:
        columns += [f"f of {control_name(name)}", "beaten"]
    rows = []
    for index, (size, share) in enumerate(zip(curve.sizes, curve.fractions, strict=True)):
        row = [size, f"{100 * share:.3g} %"]
        row += [number(float(f[index]), ".3f") for f in (curve.faithfulness, curve.completeness)]
        for name, draws in curve.random.items():
            row += [spread(draws[:, index]), number(float(curve.beaten[name][index]), ".0%")]
        rows.append(row)
    return table_html(columns, rows, caption="Faithfulness by size")


def differences_table(scores: Scored, reference: Scored, count: int = 10) -> Markup:
    """The heads on which the two differ most."""
    gaps = (scores.values - reference.values).abs().flatten().nan_to_num(nan=-1.0)
    heads = all_heads(*scores.values.shape)
    worst = [heads[i] for i in gaps.argsort(descending=True)[:count].tolist() if gaps[i] >= 0]
    rows = [
        (head, *(number(side.at(head)[0], "+z.4f") for side in (scores, reference)))
        for head in worst
    ]
    columns = ("head", f"{scores.method} (logits)", f"{reference.method} (logits)")
    return table_html(columns, rows, caption="Largest differences")


def tokens_table(tokens: Sequence[str], values: Sequence[float]) -> Markup:
    """The relevance of each token in logits, with spaces and line breaks made visible."""
    shown = {" ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5"}
    rows = [
        (place, "".join(shown.get(c, c) for c in token), number(value, "+z.4f"))
        for place, (token, value) in enumerate(zip(tokens, values, strict=True))
    ]
    return table_html(("position", "token", "relevance (logits)"), rows)
