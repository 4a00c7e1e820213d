"""The sections of a report: key numbers, figures, tables and interactive views of one result.

A builder takes a result, the id of its section, and all results of the page. The explanations of
the numbers are in the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import (
    CircuitFaithfulness,
    FaithfulnessCurve,
    measured_for,
)
from cdt_lens.circuits.graph import Graph
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.circuits.measures import EMPTY_RUNS
from cdt_lens.circuits.reliability import reliability
from cdt_lens.core.choices import Metric
from cdt_lens.core.display import Figure
from cdt_lens.core.table import Table
from cdt_lens.scoring.agreement import MethodAgreement
from cdt_lens.scoring.prompt_views import AttentionView, TokenRelevance
from cdt_lens.tasks.metrics import chance_caution
from cdt_lens.viz import figures, graph_figure, tables, widgets, words
from cdt_lens.viz.report import explore
from cdt_lens.viz.tables import Scored
from cdt_lens.viz.widgets import View

_TOP = 20
_EDGES = 40
# Beyond these, f needs a word of why.
_LOWEST_F, _HIGHEST_F = -0.1, 1.5
_TITLE = 48  # characters of a prompt in its title


@dataclass(frozen=True)
class Example:
    """One prompt of a section.

    Args:
        title: The beginning of the prompt.
        facts: The facts about the prompt, by name.
        view: The view of the prompt.
        text: The text of the prompt; empty if the view shows it.
        numbers: The numbers of the view.
    """

    title: str
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
        figures: The figures.
        tables: The tables.
        changes: The test rows whose answer changed, which a page can filter by their first and
            last column.
        examples: The prompts.
        scale: The numbers at the ends of the colours of the views, and their unit.
        measures: The measures that the last figure can show, with their headings.
        scopes: The scopes that it can hide.
        provenance: The name of each result, and the entries of its provenance.
        id: The id of the section, with which the ids of its figures and views start.
        kind: The type of the result, which chooses the explanation in the template.
    """

    title: str
    headline: tuple[str, str]
    facts: Mapping[str, str]
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    changes: Table | None = None
    examples: tuple[Example, ...] = ()
    scale: tuple[str, str] | None = None
    measures: Mapping[str, str] = field(default_factory=dict)
    scopes: tuple[str, ...] = ()
    provenance: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    id: str = ""
    kind: str = ""

    @property
    def filters(self) -> dict[str, list[str]]:
        """The choices of the first and the last column of the changes, by heading."""
        if self.changes is None:
            return {}
        return {
            self.changes.headings[column]: sorted({str(row[column]) for row in self.changes.rows})
            for column in (0, -1)
        }


def head_scores_section(scores: HeadScores, id: str, results: Sequence[object]) -> Section:
    """Return bars and table of scores; the map of the first scores is among the linked figures."""
    finite = scores.values[scores.values.isfinite()]
    heads = scores.top(min(_TOP, finite.numel()))
    scored = Scored.of(scores)
    first = next(result for result in results if isinstance(result, HeadScores))
    maps = (
        () if scores is first else (figures.heatmap(scored, circuit=_circuit_of(scores, results)),)
    )
    return Section(
        title=f"Head scores: {scores.method}",
        headline=(f"{scores.direction:+.2f}", "logits, task direction of the full model"),
        facts={
            "Model": f"{scores.n_layers} layers of {scores.n_heads} heads",
            "Heads scored": str(finite.numel()),
            "Examples": str(len(scores.example_labels)),
            **_reliability(scores),
            "Task direction": f"{scores.direction:+.3f} logits",
            **_caution("direction", scores.direction),
            "Range of scores": f"{float(finite.min()):+.3f} to {float(finite.max()):+.3f} logits",
        },
        figures=(*maps, figures.bars(scores, _TOP)),
        tables=(tables.heads_table(scored, heads, caption=f"Top {len(heads)} heads"),),
        provenance=((f"Head scores: {scores.method}", scores.provenance.to_dict()),),
    )


def _circuit_of(scores: HeadScores, results: Sequence[object]) -> Circuit | None:
    circuits = (result for result in results if isinstance(result, Circuit))
    return next((c for c in circuits if explore.same(c.scores, scores.values)), None)


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


def _caution(metric: Metric, full: float, n_labels: int = 1) -> dict[str, str]:
    """Return the fact that the full model does not solve the task, if so.

    Results do not keep the candidates. Where no labels divide the examples, the accuracy of a guess
    is not known here; the measurement itself has warned.
    """
    caution = chance_caution(metric, full, 1 / n_labels if n_labels > 1 else 0.0)
    return {"Caution": caution} if caution else {}


def circuit_section(circuit: Circuit, id: str, results: Sequence[object]) -> Section:
    """Return the heads of a circuit, and its own f; a map only if no other part draws the same."""
    total = circuit.n_layers * circuit.n_heads
    count = len(circuit.heads)
    others = [result for result in results if isinstance(result, HeadScores)]
    own = next((scores for scores in others if explore.same(circuit.scores, scores.values)), None)
    scored = Scored.kept_by(circuit) if own is None else Scored.of(own)
    parts = [tables.layers_table(circuit)]
    if scored is not None:
        size = scored.values.abs()
        best = sorted(circuit.heads, key=lambda head: -float(size[head.layer, head.head]))
        caption = f"The {count} heads of the circuit, largest first"
        members = None if own is None else tables.members_of(own, circuit)
        parts.insert(0, tables.heads_table(scored, best, caption=caption, members=members))
    # Without any scores on the page the first circuit is the one whose map is linked.
    linked = own is not None or (
        not others and circuit is next(r for r in results if isinstance(r, Circuit))
    )
    recorded = circuit.provenance
    headline, facts = _own_f(circuit, own, results)
    return Section(
        title="Circuit",
        headline=headline or (f"{count} of {total}", "heads in the circuit"),
        facts={
            "Heads": f"{count} of {total} ({count / total:.1%})",
            **facts,
            "Selection": words.in_words(circuit.selection) or "not recorded",
        },
        figures=() if scored is None or linked else (figures.heatmap(scored, circuit=circuit),),
        tables=tuple(parts),
        provenance=() if recorded is None else (("Circuit", recorded.to_dict()),),
    )


def _own_f(
    circuit: Circuit, scores: HeadScores | None, results: Sequence[object]
) -> tuple[tuple[str, str] | None, dict[str, str]]:
    """Return f of the circuit itself as a headline and as facts, where a curve holds it."""
    for curve in (result for result in results if isinstance(result, FaithfulnessCurve)):
        if scores is None or not measured_for(curve, scores):
            continue
        place = explore.own_size(curve, explore.ranking_of(scores, curve), circuit)
        if place is None:
            continue
        f = float(curve.faithfulness[place])
        low, high = (float(limit[place]) for limit in curve.interval())
        total = circuit.n_layers * circuit.n_heads
        name = f"faithfulness f of the circuit: {len(circuit)} of {total} heads"
        read = words.with_limits(f, (low, high))
        facts = {"Faithfulness f": f"{read} ({words.metric_name(curve.metric)})"}
        return (f"{f:.2f}", name), facts | _odd_f(curve, [place])
    return None, {}


def _odd_f(curve: FaithfulnessCurve, places: Sequence[int]) -> dict[str, str]:
    """Return the fact that f lies far outside 0 to 1, and why, at the farthest of some sizes."""
    f = {place: float(curve.faithfulness[place]) for place in places if curve.sizes[place]}
    place = max(f, key=lambda p: abs(f[p] - 0.5), default=None)
    if place is None or _LOWEST_F <= f[place] <= _HIGHEST_F:
        return {}
    unit = " logits" if curve.metric == "direction" else ""
    gap = curve.full - curve.empty
    kept = curve.empty + f[place] * gap
    side = "below the empty run" if f[place] < 0 else "beyond the full model"
    why = (
        f"f = {f[place]:.2f} with {curve.sizes[place]} heads: kept alone they give "
        f"{kept:+.3f}{unit}, which is {side}. f counts in units of {gap:+.3f}{unit}, the "
        f"difference between the full model ({curve.full:+.3f}) and the empty run "
        f"({curve.empty:+.3f}; {EMPTY_RUNS[curve.empty_run]})."
    )
    return {"f outside 0 to 1": why}


def graph_section(graph: Graph, id: str, _: Sequence[object]) -> Section:
    """Return the drawing of a graph, and a table of its strongest edges."""
    drawn = graph_figure.drawn_edges(graph, _EDGES)
    kept, edges = graph.kept_nodes, graph.kept_edges
    mlps = sum(name.startswith("M") for name in kept)
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
        figures=(graph_figure.graph_figure(graph, _EDGES),),
        tables=(listed,) if drawn else (),
    )


def faithfulness_section(curve: FaithfulnessCurve, id: str, results: Sequence[object]) -> Section:
    """Return the areas of a curve, and f by size; a linked curve is drawn beside the map."""
    unit = " logits" if curve.metric == "direction" else ""
    drawn = (f"{len(draws)} {words.control_name(key)}" for key, draws in curve.random.items())
    name = f"Faithfulness: {words.metric_name(curve.metric)}"
    return Section(
        title=name,
        headline=(
            f"{curve.cpr:.2f}",
            f"mean of f over the sizes of circuits (CPR); {words.empty_run(curve.empty_run)}; "
            f"random heads {words.medians(curve.random_cpr)}",
        ),
        facts={
            "Metric": words.metric_name(curve.metric),
            "Full model": f"{curve.full:.3f}{unit}",
            **_caution(curve.metric, curve.full, len(curve.provenance.examples)),
            "Empty run (f = 0)": f"{curve.empty:.3f}{unit}, {EMPTY_RUNS[curve.empty_run]}",
            "Random circuits": "; ".join(drawn) or "none",
            **_odd_f(curve, range(len(curve.sizes))),
        },
        figures=() if curve is explore.linked_curve(results) else (figures.curve(curve),),
        tables=(tables.areas_table(curve), tables.sizes_table(curve)),
        provenance=((name, curve.provenance.to_dict()),),
    )


def circuit_faithfulness_section(
    result: CircuitFaithfulness, id: str, _: Sequence[object]
) -> Section:
    """Return f of one circuit and of its complement, beside random circuits of its size."""
    unit = " logits" if result.metric == "direction" else ""
    name = f"Faithfulness of one circuit: {words.metric_name(result.metric)}"
    drawn = (f"{len(draws)} {words.control_name(key)}" for key, draws in result.random.items())
    return Section(
        title=name,
        headline=(
            words.with_limits(result.faithfulness, result.interval),
            f"f of the circuit of {len(result.heads)} heads; {words.empty_run(result.empty_run)}",
        ),
        facts={
            "Heads": ", ".join(map(str, result.heads)),
            "Without them (completeness)": words.with_limits(
                result.completeness, result.completeness_interval
            ),
            "Full model": f"{result.full:.3f}{unit}",
            **_caution(result.metric, result.full, len(result.provenance.examples)),
            "Empty run (f = 0)": f"{result.empty:.3f}{unit}, {EMPTY_RUNS[result.empty_run]}",
            "Random circuits": "; ".join(drawn) or "none",
        },
        tables=(tables.circuit_faithfulness_table(result),),
        provenance=((name, result.provenance.to_dict()),),
    )


def agreement_section(agreement: MethodAgreement, id: str, _: Sequence[object]) -> Section:
    """Return the scatter of a method against its reference, and their largest differences."""
    one, other = Scored.of(agreement.scores), Scored.of(agreement.reference)
    both = (one.values + other.values).isfinite().flatten().tolist()
    named = (agreement.scores, agreement.reference)
    return Section(
        title=f"Agreement: {one.method} and {other.method}",
        headline=(f"{agreement.spearman:.2f}", f"Spearman with {other.method}"),
        facts={
            "Spearman (order)": f"{agreement.spearman:.3f}",
            "Pearson (value)": f"{agreement.pearson:.3f}",
            "Heads": str(sum(both)),
        },
        figures=(figures.agreement(agreement),),
        tables=(tables.differences_table(one, other),),
        provenance=tuple((f"Head scores: {s.method}", s.provenance.to_dict()) for s in named),
    )


def attention_section(view: AttentionView, id: str, _: Sequence[object]) -> Section:
    """Return the attention patterns of the heads, prompt by prompt, with tables of the numbers."""
    examples = tuple(
        Example(
            title=_title(view.prompts[index]),
            facts={"Gold label": label},
            view=widgets.attention(view, index, id=f"{id}-view{index}"),
            text=words.prompt_text(view.prompts[index]),
            numbers=_reads(view, index),
        )
        for index, label in enumerate(view.labels)
    )
    return Section(
        title="Attention patterns",
        headline=(str(len(view.prompts)), f"prompts with the patterns of {len(view.heads)} heads"),
        facts={"Heads": ", ".join(str(head) for head in view.heads)},
        examples=examples,
        scale=("0", "1, weight of attention"),
    )


def _reads(view: AttentionView, prompt: int) -> Table:
    rows = [
        (head, position, tables.visible(token), words.score(weight))
        for index, head in enumerate(view.heads)
        for position, token, weight in explore.strongest(view, prompt, index)
    ]
    caption = "What each head reads most from the last position"
    return Table(("head", "position", "token", "weight"), rows, caption, grouped=True)


def _title(tokens: Sequence[str]) -> str:
    text = " ".join(words.prompt_text(tokens).split())
    return text if len(text) <= _TITLE else f"{text[:_TITLE]}\u2026"


def relevance_section(relevance: TokenRelevance, id: str, _: Sequence[object]) -> Section:
    """Return the tokens coloured by relevance, prompt by prompt, with tables of the numbers."""
    examples = []
    for index, label in enumerate(relevance.labels):
        values = relevance.relevance[index].tolist()
        tokens = relevance.prompts[index]
        facts = {
            "Gold label": label,
            "Task direction": f"{relevance.directions[index]:+.3f} logits",
            "Sum over tokens": f"{sum(values):+.3f} logits",
        }
        view = widgets.colored_tokens(relevance, index, id=f"{id}-view{index}")
        numbers = tables.tokens_table(tokens, values)
        examples.append(Example(_title(tokens), facts, view, numbers=numbers))
    end = f"{relevance.largest:.3g}"
    return Section(
        title="Token relevance",
        headline=(f"\u00b1{relevance.largest:.2g}", "logits, the largest relevance of a token"),
        facts={"Prompts": str(len(relevance.prompts))},
        examples=tuple(examples),
        scale=(f"-{end}", f"+{end} logits"),
    )
