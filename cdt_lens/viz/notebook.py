"""What a notebook shows of each result: registers `display.figure` and `display.page` by type."""

from __future__ import annotations

from typing import Literal

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import FaithfulnessCurve
from cdt_lens.circuits.graph import Graph
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.comparing.comparison import Comparison, PlantedComparison
from cdt_lens.core import display
from cdt_lens.core.display import Figure
from cdt_lens.finetuning.adapt_result import AdaptResult
from cdt_lens.finetuning.result import FineTuneResult
from cdt_lens.finetuning.transfer_result import TransferResult
from cdt_lens.scoring.agreement import MethodAgreement
from cdt_lens.scoring.prompt_views import AttentionView, TokenRelevance
from cdt_lens.viz import (
    comparison_figures,
    comparison_tables,
    figures,
    graph_figure,
    training_figures,
    widgets,
)
from cdt_lens.viz.tables import Scored

display.figure.register(Graph, graph_figure.graph_figure)
display.figure.register(FaithfulnessCurve, figures.curve)
display.figure.register(MethodAgreement, figures.agreement)
display.figure.register(Comparison, comparison_figures.comparison)
display.figure.register(PlantedComparison, comparison_figures.planted)
display.figure.register(FineTuneResult, training_figures.learning_curve)
display.figure.register(TransferResult, training_figures.trade_off)
display.figure.register(AdaptResult, training_figures.adaptation)
display.figure.register(AttentionView, widgets.attention_widget)
display.figure.register(TokenRelevance, widgets.tokens_widget)
display.table.register(Comparison, comparison_tables.methods)
display.table.register(PlantedComparison, comparison_tables.planted)


@display.figure.register(HeadScores)
def _scores_figure(
    scores: HeadScores,
    kind: Literal["heatmap", "bars"] = "heatmap",
    *,
    circuit: Circuit | None = None,
    k: int = 20,
) -> Figure:
    return figures.bars(scores, k) if kind == "bars" else figures.heatmap(scores, circuit=circuit)


@display.page.register(HeadScores)
@display.page.register(Graph)
@display.page.register(FaithfulnessCurve)
@display.page.register(MethodAgreement)
def _figure_page(result: object) -> str:
    return str(display.figure(result).svg())


@display.page.register(Comparison)
@display.page.register(PlantedComparison)
def _comparison_page(result: object) -> str:
    return str(display.table(result).__html__() + display.figure(result).svg())


@display.page.register(Circuit)
def _circuit_page(circuit: Circuit) -> str:
    scored = Scored.kept_by(circuit)
    parts = [] if scored is None else [figures.heatmap(scored, circuit=circuit).svg()]
    if circuit.graph is not None:
        parts.append(display.figure(circuit.graph).svg())
    title = f"Circuit of {len(circuit)} of {circuit.n_layers * circuit.n_heads} heads"
    return display.html(title, *parts, circuit.to_dataframe())


@display.page.register(AttentionView)
def _attention_page(view: AttentionView) -> str:
    return widgets.attention_widget(view)._repr_html_()


@display.page.register(TokenRelevance)
def _relevance_page(relevance: TokenRelevance) -> str:
    parts = (widgets.tokens_widget(relevance, i) for i in range(len(relevance.prompts)))
    return "".join(part._repr_html_() for part in parts)
