"""The sections of a report: key numbers, figures, tables and interactive views of one result.

A builder takes a result, the id of its section, and all results of the page. The explanations of
the numbers are in the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from markupsafe import Markup
from torch import Tensor

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import FaithfulnessCurve
from cdt_lens.circuits.graph import Graph
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.circuits.measures import EMPTY_RUNS
from cdt_lens.circuits.reliability import reliability
from cdt_lens.core.choices import Metric
from cdt_lens.core.table import Table
from cdt_lens.scoring.agreement import MethodAgreement
from cdt_lens.scoring.prompt_views import AttentionView, TokenRelevance
from cdt_lens.tasks.metrics import chance_caution
from cdt_lens.viz import figures, graph_figure, tables, widgets, words
from cdt_lens.viz.svg import figure_html
from cdt_lens.viz.tables import Scored
from cdt_lens.viz.widgets import View

_TOP = 20
_EDGES = 40


@dataclass(frozen=True)
class Example:
    """One prompt of a section.

    Args:
        facts: The facts about the prompt, by name.
        view: The view of the prompt.
        text: The text of the prompt; empty if the view shows it.
        numbers: The numbers of the view.
    """

    facts: Mapping[str, str]
    view: View
    text: str = ""
    numbers: Table | None = None


@dataclass(frozen=True)
class Section:
    """The part of a report about one result.

    Args:
        title: The title.
        headline: A number, and its name.
        facts: The facts about the result, by name.
        figures: The figures, as SVG.
        tables: The tables.
        examples: The prompts.
        scale: The relevance at which the colours of the tokens end, in logits.
        provenance: The name of each result, and the entries of its provenance.
        id: The id of the section, with which the ids of its figures and views start.
        kind: The type of the result, which chooses the explanation in the template.
    """

    title: str
    headline: tuple[str, str]
    facts: Mapping[str, str]
    figures: tuple[Markup, ...] = ()
    tables: tuple[Table, ...] = ()
    examples: tuple[Example, ...] = ()
    scale: float | None = None
    provenance: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    id: str = ""
    kind: str = ""


def head_scores_section(scores: HeadScores, id: str, results: Sequence[object]) -> Section:
    """Return map, bars and table of scores; the map outlines a circuit selected from them."""
    finite = scores.values[scores.values.isfinite()]
    heads = scores.top(min(_TOP, finite.numel()))
    circuits = (result for result in results if isinstance(result, Circuit))
    circuit = next((c for c in circuits if _same(c.scores, scores.values)), None)
    scored = Scored.of(scores)
    return Section(
        title=f"Head scores: {scores.method}",
        headline=(f"{scores.direction:+.2f}", "logits, task direction of the full model"),
        facts={
            "Model": f"{scores.n_layers} layers of {scores.n_heads} heads",
            "Heads scored": str(finite.numel()),
            "Examples": str(len(scores.example_labels)),
            **_reliability(scores),
            "Task direction": f"{scores.direction:+.3f} logits",
            **_caution("direction", scores.direction, len(set(scores.example_labels))),
            "Range of scores": f"{float(finite.min()):+.3f} to {float(finite.max()):+.3f} logits",
        },
        figures=(
            _map(scored, circuit, f"{id}-map"),
            figure_html(figures.bars(scores, _TOP), prefix=f"{id}-bars"),
        ),
        tables=(tables.heads_table(scored, heads, caption=f"Top {len(heads)} heads"),),
        provenance=((f"Head scores: {scores.method}", scores.provenance.to_dict()),),
    )


def _reliability(scores: HeadScores) -> dict[str, str]:
    """Return how much of the ranking is signal, and what it was computed from."""
    found = reliability(scores)
    facts = {}
    if scores.corrections:
        exact = int((~torch.isnan(scores.corrections[0])).flatten(1).any(1).sum())
        facts["Exact sweep"] = f"{exact} of {found.examples} examples"
    if np.isfinite(found.split_half):
        facts["Split-half reliability"] = f"{found.split_half:.2f} (Spearman)"
    facts["Heads with an interval without 0"] = words.number(found.resolved, ".0%")
    return facts


def _caution(metric: Metric, full: float, n_labels: int) -> dict[str, str]:
    """Return the fact that the full model does not solve the task, if so."""
    caution = chance_caution(metric, full, max(n_labels, 1))
    return {"Caution": caution} if caution else {}


def circuit_section(circuit: Circuit, id: str, results: Sequence[object]) -> Section:
    """Return the heads of a circuit; their map only if no scores of the page draw the same one."""
    total = circuit.n_layers * circuit.n_heads
    count = len(circuit.heads)
    others = (result for result in results if isinstance(result, HeadScores))
    own = next((scores for scores in others if _same(circuit.scores, scores.values)), None)
    scored = Scored.kept_by(circuit) if own is None else Scored.of(own)
    parts = [tables.layers_table(circuit)]
    if scored is not None:
        size = scored.values.abs()
        best = sorted(circuit.heads, key=lambda head: -float(size[head.layer, head.head]))
        caption = f"The {count} heads of the circuit, largest first"
        members = None if own is None else tables.members_of(own, circuit)
        parts.insert(0, tables.heads_table(scored, best, caption=caption, members=members))
    recorded = circuit.provenance
    return Section(
        title="Circuit",
        headline=(f"{count} of {total}", "heads in the circuit"),
        facts={
            "Heads": f"{count} of {total} ({count / total:.1%})",
            "Selection": words.in_words(circuit.selection) or "not recorded",
        },
        figures=() if scored is None or own is not None else (_map(scored, circuit, f"{id}-map"),),
        tables=tuple(parts),
        provenance=() if recorded is None else (("Circuit", recorded.to_dict()),),
    )


def graph_section(graph: Graph, id: str, _: Sequence[object]) -> Section:
    """Return the drawing of a graph, and a table of its strongest edges."""
    drawn = graph_figure.drawn_edges(graph, _EDGES)
    kept, edges = graph.kept_nodes, graph.kept_edges
    mlps = sum(name.startswith("M") for name in kept)
    lines = {f"edge-{n}": [graph_figure.edge_line(graph, edge)] for n, edge in enumerate(drawn)}
    drawing = graph_figure.graph_figure(graph, _EDGES)
    if not edges:
        headline = (str(len(graph.heads)), "heads in the graph, without edges")
    else:
        headline = (str(len(edges)), f"edges between {len(graph.heads)} heads and {mlps} MLPs")
    caption = f"The {len(drawn)} edges drawn, of {len(edges)}" if drawn else "No edge is drawn"
    listed = tables.edges_table(drawn, caption=caption, unit=graph.short_unit)
    return Section(
        title="Circuit graph",
        headline=headline,
        facts={
            "Model": f"{graph.n_layers} layers of {graph.n_heads} heads",
            "Heads": str(len(graph.heads)),
            "MLPs": str(mlps),
            "Edges": f"{len(edges)} in the graph, {len(drawn)} drawn",
            "Scores": f"in {graph.unit}",
        },
        figures=(figure_html(drawing, prefix=f"{id}-graph", tooltips=lines),),
        tables=(listed,) if drawn else (),
    )


def faithfulness_section(curve: FaithfulnessCurve, id: str, _: Sequence[object]) -> Section:
    """Return the curve beside its random controls, its areas, and f by size."""
    unit = " logits" if curve.metric == "direction" else ""
    drawn = (f"{len(draws)} {words.control_name(key)}" for key, draws in curve.random.items())
    name = f"Faithfulness: {words.metric_name(curve.metric)}"
    return Section(
        title=name,
        headline=(
            f"{curve.cpr:.2f}",
            f"CPR ({words.empty_run(curve.empty_run)}); random heads "
            f"{words.medians(curve.random_cpr)}",
        ),
        facts={
            "Metric": words.metric_name(curve.metric),
            "Full model": f"{curve.full:.3f}{unit}",
            **_caution(curve.metric, curve.full, len(curve.provenance.examples)),
            "Empty run (f = 0)": f"{curve.empty:.3f}{unit}, {EMPTY_RUNS[curve.empty_run]}",
            "Random circuits": "; ".join(drawn) or "none",
        },
        figures=(figure_html(figures.curve(curve), prefix=f"{id}-curve"),),
        tables=(tables.areas_table(curve), tables.sizes_table(curve)),
        provenance=((name, curve.provenance.to_dict()),),
    )


def agreement_section(agreement: MethodAgreement, id: str, _: Sequence[object]) -> Section:
    """Return the scatter of a method against its reference, and their largest differences."""
    one, other = Scored.of(agreement.scores), Scored.of(agreement.reference)
    both = (one.values + other.values).isfinite().flatten().tolist()
    lines = zip(one.lines(), other.lines(), both, strict=True)
    points = [f"{line}; {reference}" for line, reference, drawn in lines if drawn]
    drawing = figure_html(
        figures.agreement(agreement), prefix=f"{id}-scatter", tooltips={"points": points}
    )
    named = (agreement.scores, agreement.reference)
    return Section(
        title=f"Agreement: {one.method} and {other.method}",
        headline=(f"{agreement.spearman:.2f}", f"Spearman with {other.method}"),
        facts={
            "Spearman (order)": f"{agreement.spearman:.3f}",
            "Pearson (value)": f"{agreement.pearson:.3f}",
            "Heads": str(len(points)),
        },
        figures=(drawing,),
        tables=(tables.differences_table(one, other),),
        provenance=tuple((f"Head scores: {s.method}", s.provenance.to_dict()) for s in named),
    )


def attention_section(view: AttentionView, id: str, _: Sequence[object]) -> Section:
    """Return the attention patterns of the heads, prompt by prompt."""
    examples = tuple(
        Example(
            facts={"Gold label": label},
            view=widgets.attention(view, index, id=f"{id}-view{index}"),
            text="".join(view.prompts[index]),
        )
        for index, label in enumerate(view.labels)
    )
    return Section(
        title="Attention patterns",
        headline=(str(len(view.prompts)), f"prompts with the patterns of {len(view.heads)} heads"),
        facts={"Heads": ", ".join(str(head) for head in view.heads)},
        examples=examples,
    )


def relevance_section(relevance: TokenRelevance, id: str, _: Sequence[object]) -> Section:
    """Return the tokens coloured by relevance, prompt by prompt, with tables of the numbers."""
    examples = []
    for index, label in enumerate(relevance.labels):
        values = relevance.relevance[index].tolist()
        facts = {
            "Gold label": label,
            "Task direction": f"{relevance.directions[index]:+.3f} logits",
            "Sum over tokens": f"{sum(values):+.3f} logits",
        }
        view = widgets.colored_tokens(relevance, index, id=f"{id}-view{index}")
        numbers = tables.tokens_table(relevance.prompts[index], values)
        examples.append(Example(facts, view, numbers=numbers))
    return Section(
        title="Token relevance",
        headline=(f"\u00b1{relevance.largest:.2g}", "logits, the largest relevance of a token"),
        facts={"Prompts": str(len(relevance.prompts))},
        examples=tuple(examples),
        scale=relevance.largest,
    )


def _map(scored: Scored, circuit: Circuit | None, prefix: str) -> Markup:
    figure = figures.heatmap(scored, circuit=circuit)
    return figure_html(figure, prefix=prefix, tooltips={"cells": scored.lines()})


def _same(
    one: Float[Tensor, "layer head"] | None, other: Float[Tensor, "layer head"] | None
) -> bool:
    """Return whether two sets of scores are equal, also if one of them was saved and loaded."""
    if one is None or other is None or one.shape != other.shape:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
