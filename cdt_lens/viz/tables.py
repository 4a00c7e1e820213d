"""Tables of head scores, circuits, faithfulness and agreement.

Scores are in logits and signed: positive pushes towards the gold label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import CircuitFaithfulness, FaithfulnessCurve
from cdt_lens.circuits.graph import Edge
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.circuits.reliability import membership
from cdt_lens.core.errors import InputError
from cdt_lens.core.table import Table
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.viz.words import control_name, empty_run, limits, number, spread, with_limits


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of every head, which come from `HeadScores` or were kept by a circuit.

    Args:
        values: The scores in logits; NaN for a head without a score.
        stderr: The standard errors in logits; NaN if unknown.
        method: The name of the method.
        direction: The task direction of the full model in logits; None if unknown.
        low: Lower limits of the 95 % intervals in logits; None if unknown.
        high: Their upper limits.
    """

    values: Float[Tensor, "layer head"]
    stderr: Float[Tensor, "layer head"]
    method: str
    direction: float | None = None
    low: Float[Tensor, "layer head"] | None = None
    high: Float[Tensor, "layer head"] | None = None

    @classmethod
    def of(cls, scores: HeadScores) -> Scored:
        """Return the part of `scores` that is about heads."""
        low, high = scores.interval()
        return cls(scores.values, scores.stderr, scores.method, scores.direction, low, high)

    @property
    def unresolved(self) -> Bool[Tensor, "layer head"]:
        """True for scored heads whose 95 % interval holds 0 or is not known."""
        if self.low is None or self.high is None:
            return torch.zeros_like(self.values, dtype=torch.bool)
        return ~((self.low > 0) | (self.high < 0)) & self.values.isfinite()

    @classmethod
    def kept_by(cls, circuit: Circuit) -> Scored | None:
        """Return the scores that `circuit` was selected from; None if it did not keep them."""
        if circuit.scores is None:
            return None
        unknown = torch.full_like(circuit.scores, torch.nan)
        method = str(circuit.selection.get("method", "scores"))
        return cls(circuit.scores, unknown if circuit.stderr is None else circuit.stderr, method)

    def at(self, head: Head) -> tuple[float, float]:
        """Return the score and the standard error of `head`, in logits."""
        index = head.layer, head.head
        return float(self.values[index]), float(self.stderr[index])

    def interval(self, head: Head) -> str:
        """Return the 95 % interval of `head` in logits, or "n/a"."""
        if self.low is None or self.high is None:
            return "n/a"
        index = head.layer, head.head
        return limits((float(self.low[index]), float(self.high[index])), "+z.4f")


SELECTED_AGAIN = "selected again: how often prompts that are drawn anew select the head, too"


def heads_table(
    scored: Scored,
    heads: Iterable[Head],
    *,
    caption: str,
    members: Mapping[Head, float] | None = None,
) -> Table:
    """Return score, standard error, interval, and the share of the task direction if known.

    Args:
        scored: The scores of all heads.
        heads: The heads to list, in order.
        caption: The title of the table.
        members: For heads of a circuit, how often other draws of the prompts select them
            (`membership`).
    """
    columns = ["head", "score (logits)", "standard error", "95 % interval"]
    if scored.direction is not None:
        columns.append("share of direction")
    if members:
        columns.append("selected again")
        caption = f"{caption}; {SELECTED_AGAIN}".removeprefix("; ")
    rows = []
    for head in heads:
        value, error = scored.at(head)
        row = [head, number(value, "+z.4f"), number(error, ".4f")]
        row.append(scored.interval(head))
        if scored.direction is not None:
            share = value / scored.direction if scored.direction else torch.nan
            row.append(number(share, "+z.1%"))
        if members:
            row.append(number(members[head], ".0%") if head in members else "")
        rows.append(row)
    return Table(columns, rows, caption)


def members_of(scores: HeadScores, circuit: Circuit) -> dict[Head, float] | None:
    """Return `membership`, or None for a circuit of another rule and for too few examples."""
    try:
        return membership(scores, circuit)
    except InputError:
        return None


def layers_table(circuit: Circuit) -> Table:
    """Return the heads of `circuit`, one row for each layer."""
    rows = []
    for layer, members in groupby(sorted(circuit.heads), key=lambda head: head.layer):
        names = [str(head) for head in members]
        rows.append((layer, len(names), ", ".join(names)))
    return Table(("layer", "heads", "which"), rows, "Circuit by layer")


def edges_table(edges: Sequence[Edge], *, caption: str, unit: str = "logits") -> Table:
    """Return the edges of a graph: the node that writes, the node that reads, and the score.

    Args:
        edges: The edges to list, in order.
        caption: The title of the table.
        unit: The unit of the scores; empty if unknown.
    """
    sites = {"q": "queries", "k": "keys", "v": "values", "": ""}
    scores = ("not scored" if e.score is None else number(e.score, "+z.4f") for e in edges)
    rows = [(e.source, e.target, sites[e.site], s) for e, s in zip(edges, scores, strict=True)]
    return Table(
        ("from", "to", "read by its", f"score ({unit})" if unit else "score"), rows, caption
    )


def areas_table(curve: FaithfulnessCurve) -> Table:
    """Return the areas of the circuit with 95 % intervals, and of its random controls."""
    intervals = curve.area_intervals()
    named = (("cpr", curve.cpr), ("cmd", curve.cmd), ("log_area", curve.log_area))
    own = (with_limits(area, intervals[name]) for name, area in named)
    rows = [["circuit", *own]]
    for name, draws in curve.random.items():
        areas = (spread(area[name]) for area in (curve.random_cpr, curve.random_cmd))
        rows.append([control_name(name), *areas, spread(curve.log_area_of(draws))])
    columns = ("", "CPR (higher is better)", "CMD (lower is better)", "area, log sizes")
    caption = (
        f"Areas ({empty_run(curve.empty_run)}) with 95 % intervals over prompts; of random heads "
        "the median [5 %, 95 %]"
    )
    return Table(columns, rows, caption)


def sizes_table(curve: FaithfulnessCurve) -> Table:
    """Return f of the circuit, of its complement, and of the controls, by size above 0."""
    columns = ["heads", "share", "f of the circuit", "f without it"]
    for name in curve.random:
        columns += [f"f of {control_name(name)}", "beaten"]
    rows = []
    measured = (
        (curve.faithfulness, curve.interval()),
        (curve.completeness, curve.completeness_interval()),
    )
    for index, (size, share) in enumerate(zip(curve.sizes, curve.fractions, strict=True)):
        if not size:
            continue
        row = [size, f"{100 * share:.3g} %"]
        for f, (low, high) in measured:
            interval = float(low[index]), float(high[index])
            row.append(with_limits(float(f[index]), interval))
        for name, draws in curve.random.items():
            row += [spread(draws[:, index]), number(float(curve.beaten[name][index]), ".0%")]
        rows.append(row)
    caption = f"Faithfulness by size ({empty_run(curve.empty_run)}), with 95 % intervals"
    return Table(columns, rows, f"{caption} over prompts")


def circuit_faithfulness_table(result: CircuitFaithfulness) -> Table:
    """Return f of one circuit, of its complement, and of random circuits, with the shares beaten.

    Args:
        result: The measurement of the circuit.
    """
    rows: list[list[object]] = [
        ["circuit", with_limits(result.faithfulness, result.interval), ""],
        ["without it", with_limits(result.completeness, result.completeness_interval), ""],
    ]
    for name, draws in result.random.items():
        beaten = number(float(result.beaten[name]), ".0%")
        rows.append([control_name(name), spread(draws), beaten])
    caption = f"Faithfulness ({empty_run(result.empty_run)}) with 95 % intervals over prompts"
    caption += "; of random heads the median [5 %, 95 %], and the share with a smaller f"
    return Table(("heads kept", "f", "beaten by the circuit"), rows, caption)


def differences_table(scores: Scored, reference: Scored, count: int = 10) -> Table:
    """Return the heads on which two sets of scores differ most.

    Args:
        scores: The scores of the method.
        reference: The scores of the reference.
        count: The maximum number of heads.
    """
    gaps = (scores.values - reference.values).abs().flatten().nan_to_num(nan=-1.0)
    heads = all_heads(*scores.values.shape)
    worst = [heads[i] for i in gaps.argsort(descending=True)[:count].tolist() if gaps[i] >= 0]
    rows = [
        (head, *(number(side.at(head)[0], "+z.4f") for side in (scores, reference)))
        for head in worst
    ]
    columns = ("head", f"{scores.method} (logits)", f"{reference.method} (logits)")
    return Table(columns, rows, "Largest differences")


def tokens_table(tokens: Sequence[str], values: Sequence[float]) -> Table:
    """Return the relevance of each token, with spaces and line breaks made visible.

    Args:
        tokens: The tokens of a prompt.
        values: The relevance of each token, in logits.
    """
    rows = [
        (position, visible(token), number(value, "+z.4f"))
        for position, (token, value) in enumerate(zip(tokens, values, strict=True))
    ]
    return Table(("position", "token", "relevance (logits)"), rows)


def visible(token: str) -> str:
    """Return a token with its spaces and line breaks as signs."""
    return token.translate(str.maketrans(" \n\t", "\u00b7\u21b5\u21e5"))
