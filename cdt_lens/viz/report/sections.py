"""What a report shows of each result: key numbers, figures, tables, interactive views.

1. A builder takes one result, the id of its section, and all results of the page.
2. It reads fields alone; the words around the numbers stand in the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from markupsafe import Markup
from torch import Tensor

from cdt_lens.viz import figures, graph_figure as graph_figures, tables, widgets, words
from cdt_lens.viz.style import control_name, metric_name
from cdt_lens.viz.svg import figure_html
from cdt_lens.viz.tables import Scored
from cdt_lens.viz.widgets import View

if TYPE_CHECKING:
    from cdt_lens.circuits.circuit import Circuit
    from cdt_lens.circuits.faithfulness import FaithfulnessCurve
    from cdt_lens.circuits.graph import Graph
    from cdt_lens.circuits.head_scores import HeadScores
    from cdt_lens.scoring.agreement import MethodAgreement
    from cdt_lens.scoring.prompt_views import AttentionView, TokenRelevance

_TOP = 20
_EDGES = 40


@dataclass(frozen=True)
class Example:
    """One prompt of a section: facts about it, its view, and the view's numbers as a table."""

    facts: Mapping[str, str]
    view: View
    text: str = ""
    numbers: Markup | None = None


@dataclass(frozen=True)
class Section:
    """What the template shows of one result; `kind` chooses the words around it."""

    kind: str
    id: str
    title: str
    headline: tuple[str, str]  # a number, and what it is
    facts: Mapping[str, str]
    figures: tuple[Markup, ...] = ()
    tables: tuple[Markup, ...] = ()
    examples: tuple[Example, ...] = ()
    scale: float | None = None  # where the token colours end, in logits
    provenance: tuple[tuple[str, Mapping[str, Any]], ...] = ()  # whose, what


def is_a(result: object, kind: str) -> bool:
    """Whether the result's type, or a base type of it, has this name."""
    return kind in (base.__name__ for base in type(result).__mro__)


def head_scores_section(scores: HeadScores, id: str, results: Sequence[object]) -> Section:
    """Map, bars and table of the scores; the heads of a circuit selected from them are outlined."""
    finite = scores.values[scores.values.isfinite()]
    heads = scores.top(min(_TOP, finite.numel()))
    circuits: Any = (result for result in results if is_a(result, "Circuit"))
    circuit = next((each for each in circuits if _same(each.scores, scores.values)), None)
    scored = Scored.of(scores)
    return Section(
        kind="HeadScores",
        id=id,
        title=f"Head scores: {scores.method}",
        headline=(f"{scores.direction:+.2f}", "logits, task direction of the full model"),
        facts={
            "Model": f"{scores.n_layers} layers of {scores.n_heads} heads",
            "Heads scored": str(finite.numel()),
            "Examples": str(len(scores.example_labels)),
            "Task direction": f"{scores.direction:+.3f} logits",
            "Range of scores": f"{float(finite.min()):+.3f} to {float(finite.max()):+.3f} logits",
        },
        figures=(
            _map(scored, circuit, f"{id}-map"),
            figure_html(figures.bars(scores, _TOP), prefix=f"{id}-bars"),
        ),
        tables=(tables.heads_table(scored, heads, caption=f"Top {len(heads)} heads"),),
        provenance=((f"Head scores: {scores.method}", scores.provenance.to_dict()),),
    )


def circuit_section(circuit: Circuit, id: str, results: Sequence[object]) -> Section:
    """The circuit's heads; their map only where no scores on the page draw the same one."""
    total = circuit.n_layers * circuit.n_heads
    count = len(circuit.heads)
    scored = Scored.kept_by(circuit)
    others: Any = (result for result in results if is_a(result, "HeadScores"))
    drawn = any(_same(circuit.scores, each.values) for each in others)
    parts = [tables.layers_table(circuit)]
    if scored is not None:
        best = sorted(circuit.heads, key=lambda head: -abs(scored.at(head)[0]))
        caption = f"The {count} heads of the circuit, largest first"
        parts.insert(0, tables.heads_table(scored, best, caption=caption))
    recorded = circuit.provenance
    return Section(
        kind="Circuit",
        id=id,
        title="Circuit",
        headline=(f"{count} of {total}", "heads in the circuit"),
        facts={
            "Heads": f"{count} of {total} ({count / total:.1%})",
            "Selection": words.in_words(circuit.selection) or "not recorded",
        },
        figures=() if scored is None or drawn else (_map(scored, circuit, f"{id}-map"),),
        tables=tuple(parts),
        provenance=() if recorded is None else (("Circuit", recorded.to_dict()),),
    )


def graph_section(graph: Graph, id: str, _: Sequence[object]) -> Section:
    """The drawing of a circuit graph, and its strongest edges as a table."""
    drawn = graph_figures.drawn_edges(graph, _EDGES)
    kept, edges = graph.kept_nodes, graph.kept_edges
    mlps = sum(name.startswith("M") for name in kept)
    lines = {f"edge-{n}": [graph_figures.edge_line(graph, edge)] for n, edge in enumerate(drawn)}
    drawing = graph_figures.graph_figure(graph, _EDGES)
    if not edges:
        headline = (str(len(graph.heads)), "heads in the graph, without edges")
    else:
        headline = (str(len(edges)), f"edges between {len(graph.heads)} heads and {mlps} MLPs")
    caption = f"The {len(drawn)} edges drawn, of {len(edges)}" if drawn else "No edge is drawn"
    listed = tables.edges_table(drawn, caption=caption, unit=graph.short_unit)
    return Section(
        kind="Graph",
        id=id,
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
    """The curve beside its random controls, its areas, and f by size."""
    unit = " logits" if curve.metric == "direction" else ""
    drawn = (f"{len(draws)} {control_name(key)}" for key, draws in curve.random.items())
    name = f"Faithfulness: {metric_name(curve.metric)}"
    return Section(
        kind="FaithfulnessCurve",
        id=id,
        title=name,
        headline=(f"{curve.cpr:.2f}", f"CPR; random heads {words.medians(curve.random_cpr)}"),
        facts={
            "Metric": metric_name(curve.metric),
            "Full model": f"{curve.full:.3f}{unit}",
            "All heads ablated": f"{curve.empty:.3f}{unit}",
            "Random circuits": "; ".join(drawn) or "none",
        },
        figures=(figure_html(figures.curve(curve), prefix=f"{id}-curve"),),
        tables=(tables.areas_table(curve), tables.sizes_table(curve)),
        provenance=((name, curve.provenance.to_dict()),),
    )


def agreement_section(agreement: MethodAgreement, id: str, _: Sequence[object]) -> Section:
    """Scatter of a method against exact ablation, and the heads on which they differ most."""
    one, other = Scored.of(agreement.scores), Scored.of(agreement.reference)
    both = (one.values + other.values).isfinite().flatten().tolist()
    lines = zip(one.lines(), other.lines(), both, strict=True)
    points = [f"{line}; {reference}" for line, reference, drawn in lines if drawn]
    drawing = figure_html(
        figures.agreement(agreement), prefix=f"{id}-scatter", tooltips={"points": points}
    )
    named = (agreement.scores, agreement.reference)
    return Section(
        kind="MethodAgreement",
        id=id,
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
    """The attention patterns of the heads, prompt by prompt."""
    examples = tuple(
        Example(
            facts={"Gold label": label},
            view=widgets.attention(view, index, id=f"{id}-view{index}"),
            text="".join(view.prompts[index]),
        )
        for index, label in enumerate(view.labels)
    )
    return Section(
        kind="AttentionView",
        id=id,
        title="Attention patterns",
        headline=(str(len(view.prompts)), f"prompts with the patterns of {len(view.heads)} heads"),
        facts={"Heads": ", ".join(str(head) for head in view.heads)},
        examples=examples,
    )


def relevance_section(relevance: TokenRelevance, id: str, _: Sequence[object]) -> Section:
    """The tokens coloured by relevance, prompt by prompt, with the numbers in a table."""
    scale = widgets.largest_relevance(relevance)
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
        kind="TokenRelevance",
        id=id,
        title="Token relevance",
        headline=(f"\u00b1{scale:.2g}", "logits, the largest relevance of a token"),
        facts={"Prompts": str(len(relevance.prompts))},
        examples=tuple(examples),
        scale=scale,
    )


def _map(scored: Scored, circuit: Circuit | None, prefix: str) -> Markup:
    figure = figures.heatmap(scored, circuit=circuit)
    return figure_html(figure, prefix=prefix, tooltips={"cells": scored.lines()})


def _same(
    one: Float[Tensor, "layer head"] | None, other: Float[Tensor, "layer head"] | None
) -> bool:
    """Whether two sets of scores are the same, also when one of them was saved and loaded."""
    if one is None or other is None or one.shape != other.shape:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
