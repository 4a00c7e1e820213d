"""The part of a report in which the heat map, the curve and the prompts are linked.

1. One row of numbers for each head: score, interval, rank under each method, effects on prompts.
2. One row of numbers for each size of the curve, if the curve was measured for these scores.
3. The edges of the graph, and what the heads read on each prompt.

`report.js` shows these numbers as they stand here. They are those of the results.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import FaithfulnessCurve, measured_for
from cdt_lens.circuits.graph import Graph
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core.display import Figure
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.scoring.agreement import MethodAgreement
from cdt_lens.scoring.prompt_views import AttentionView
from cdt_lens.viz import figures, words
from cdt_lens.viz.spec import plain
from cdt_lens.viz.tables import Scored

# A page holds at most this many effects on single prompts, those of the strongest heads.
_MOST_EFFECTS = 60_000
_READ = 5  # positions that a head reads most, of each prompt


@dataclass(frozen=True)
class Explorer:
    """The linked figures of a page and the numbers behind them.

    Args:
        figures: The map, the effects on prompts and the curve, by the name of their place.
        data: The numbers, as JSON values.
    """

    figures: Mapping[str, Figure]
    data: Mapping[str, Any]


def explorer(results: Sequence[object]) -> Explorer | None:
    """Return the linked part of a report; None without scores of heads.

    Args:
        results: All results of the page.
    """
    scores = next((r for r in results if isinstance(r, HeadScores)), None)
    circuits = [r for r in results if isinstance(r, Circuit)]
    circuit = next((c for c in circuits if scores is None or same(c.scores, scores.values)), None)
    scored = Scored.of(scores) if scores else Scored.kept_by(circuit) if circuit else None
    if scored is None:
        return None
    curve = linked_curve(results)
    ranking = ranking_of(scores, curve) if scores else ()
    drawn = {"map": figures.heatmap(scored, circuit=circuit, ranking=ranking)}
    heads = all_heads(*scored.values.shape)
    data: dict[str, Any] = {
        "shape": list(scored.values.shape), "method": scored.method,
        "heads": [_head(scored, head) for head in heads],
        "circuit": [str(head) for head in circuit.heads] if circuit else [],
        "ranks": _ranks(results, heads), "sizes": [], "labels": [], "effects": {},
        "edges": _edges(results), "reads": _reads(results),
    }  # fmt: skip
    if scores:
        data |= _effects(scores)
        drawn["effects"] = figures.effects(sorted(set(scores.example_labels)))
    if curve:
        drawn["curve"] = figures.curve(curve)
        own = own_size(curve, ranking, circuit)
        data |= {"sizes": _sizes(curve), "own": None if own is None else curve.sizes[own]}
    return Explorer(drawn, plain(data))


def linked_curve(results: Sequence[object]) -> FaithfulnessCurve | None:
    """Return the first curve that was measured for the first scores, which the map shows."""
    scores = next((r for r in results if isinstance(r, HeadScores)), None)
    return next((r for r in results if scores and curve_of(r, scores)), None)


def ranking_of(scores: HeadScores, curve: FaithfulnessCurve | None) -> tuple[Head, ...]:
    """Return the heads in the order in which the circuits of a curve grow."""
    magnitude = curve is not None and curve.provenance.options.get("by") == "magnitude"
    return scores.ranking("magnitude" if magnitude else "signed")


def curve_of(result: object, scores: HeadScores) -> TypeGuard[FaithfulnessCurve]:
    """Return whether a result is a curve whose circuits are the top heads of these scores."""
    return isinstance(result, FaithfulnessCurve) and measured_for(result, scores)


def own_size(
    curve: FaithfulnessCurve, ranking: Sequence[Head], circuit: Circuit | None
) -> int | None:
    """Return the place of a circuit on a curve; None if the curve does not hold this circuit.

    Args:
        curve: The curve.
        ranking: The heads in the order in which its circuits grow.
        circuit: The circuit.
    """
    if circuit is None or len(circuit) not in curve.sizes:
        return None
    same_heads = set(ranking[: len(circuit)]) == set(circuit.heads)
    return curve.sizes.index(len(circuit)) if same_heads else None


def same(
    one: Float[Tensor, "layer head"] | None, other: Float[Tensor, "layer head"] | None
) -> bool:
    """Return whether two sets of scores are equal, also if one of them was saved and loaded."""
    if one is None or other is None or one.shape != other.shape:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _head(scored: Scored, head: Head) -> dict[str, Any]:
    value, error = scored.at(head)
    limits = [
        None if limit is None else float(limit[head.layer, head.head])
        for limit in (scored.low, scored.high)
    ]
    return {"name": head, "score": value, "stderr": error, "low": limits[0], "high": limits[1]}


def _ranks(results: Sequence[object], heads: Sequence[Head]) -> list[dict[str, Any]]:
    """Return the place of every head by signed score under each method, from 1."""
    methods: list[HeadScores] = []
    for result in results:
        pair = (
            (result.scores, result.reference) if isinstance(result, MethodAgreement) else (result,)
        )
        methods += [r for r in pair if isinstance(r, HeadScores)]
    shown: list[HeadScores] = []
    for scores in methods:
        fits = scores.values.numel() == len(heads)
        if fits and not any(same(scores.values, other.values) for other in shown):
            shown.append(scores)
    rows = []
    for scores in shown:
        order = {head: place for place, head in enumerate(scores.ranking(), start=1)}
        rows.append(
            {"method": scores.method, "of": len(order), "places": [order.get(h) for h in heads]}
        )
    return rows


def _effects(scores: HeadScores) -> dict[str, Any]:
    """Return the effects on single prompts, for as many of the strongest heads as fit."""
    effects = scores.effects
    count = _MOST_EFFECTS // max(len(effects), 1)
    kept = scores.ranking("magnitude")[:count]
    return {
        "labels": list(scores.example_labels),
        "effects": {
            str(head): [float(f"{v:.6g}") for v in effects[:, head.layer, head.head].tolist()]
            for head in kept
        },
    }


def _sizes(curve: FaithfulnessCurve) -> list[dict[str, Any]]:
    low, high = curve.interval()
    columns = {"f": curve.faithfulness, "low": low, "high": high, "without": curve.completeness}
    rows: list[dict[str, Any]] = []
    for i, (heads, share) in enumerate(zip(curve.sizes, curve.fractions, strict=True)):
        random = [
            {"name": words.control_name(name), "median": float(draws[:, i].double().quantile(0.5)),
             "beaten": float(curve.beaten[name][i])}
            for name, draws in curve.random.items()
            if len(draws)
        ]  # fmt: skip
        numbers = {key: float(values[i]) for key, values in columns.items()}
        rows.append({"heads": heads, "share": share, "random": random, **numbers})
    return [row for row in rows if row["heads"] > 0]


def _edges(results: Iterable[object]) -> list[dict[str, Any]]:
    graph = next((result for result in results if isinstance(result, Graph)), None)
    if graph is None:
        return []
    unscored = (edge for edge in graph.kept_edges if edge.score is None)
    edges = (*graph.top_edges(len(graph.kept_edges)), *unscored)
    return [
        {"from": e.source, "to": e.target, "site": e.site, "score": e.score,
         "unit": graph.short_unit}
        for e in edges
    ]  # fmt: skip


def _reads(results: Iterable[object]) -> list[dict[str, Any]]:
    """Return, for each prompt, what each head reads most from the last position."""
    return [
        {"prompt": place, "label": view.labels[place], "heads": {
            str(head): strongest(view, place, index) for index, head in enumerate(view.heads)
        }}
        for view in results if isinstance(view, AttentionView)
        for place in range(len(view.prompts))
    ]  # fmt: skip


def strongest(view: AttentionView, prompt: int, head: int) -> list[tuple[int, str, float]]:
    """Return the positions that a head reads most from the last one, with tokens and weights.

    Args:
        view: The patterns of all prompts.
        prompt: The index of the prompt.
        head: The index of the head.
    """
    weights = view.patterns[prompt][head, -1]
    top = torch.topk(weights, min(_READ, len(weights)))
    return [
        (position, view.prompts[prompt][position], weight)
        for position, weight in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
