"""One self-contained HTML report of any results; it opens without a network.

1. Each result becomes a section by its type: figures, tables, interactive views, key numbers.
2. The sections stand in the order of the method, whatever order the results came in.
3. The template adds the words: what a section shows, its sign and unit, what would be a bad sign.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from torch import Tensor

from cdt_lens import figures, tables, widgets
from cdt_lens.artifacts import atomic_write
from cdt_lens.artists import control_name, metric_name
from cdt_lens.errors import InputError
from cdt_lens.markup import figure_html, table_html
from cdt_lens.tables import Scored
from cdt_lens.widgets import View, attention_widget, tokens_widget

if TYPE_CHECKING:
    from cdt_lens.circuit import Circuit
    from cdt_lens.faithfulness import FaithfulnessCurve
    from cdt_lens.head_scores import HeadScores, MethodAgreement
    from cdt_lens.views import AttentionView, TokenRelevance

__all__ = ["attention_widget", "figure_html", "render_report", "table_html", "tokens_widget"]

_TOP = 20


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


def render_report(*results: object, path: str | Path, title: str | None = None) -> Path:
    """Write `results`, in any order, as one HTML file at `path`, whole or not at all.

    A result is a Circuit, HeadScores, FaithfulnessCurve, MethodAgreement, AttentionView or
    TokenRelevance. The file holds everything that it shows and never uses the network; the same
    results give the same bytes.

    Raises:
        InputError: no results, one of another type, or `path` cannot be written.
        NonFiniteError: a prompt's pattern or relevance holds a value that is not finite.
    """
    if not results:
        raise InputError("render_report: expected at least one result, got none")
    order = list(_SECTIONS)
    ordered = sorted(results, key=lambda result: order.index(_kind(result)))
    sections = _distinct(
        _SECTIONS[_kind(result)](result, f"s{number}", ordered)
        for number, result in enumerate(ordered, start=1)
    )
    views = [example.view for section in sections for example in section.examples]
    page = _template().render(
        title=title or "Circuit report",
        version=_version(),
        sections=sections,
        provenance=tables.provenance_rows(entry for s in sections for entry in s.provenance),
        policy=widgets.policy(views),
        scripts=widgets.scripts(views),
    )
    # A byte-level token may leave a lone surrogate, which has no place in a UTF-8 file.
    return atomic_write(path, page.encode("utf-8", "replace"))


def _kind(result: object) -> str:
    """The name of the result's type, or of its first base type, that has a section.

    By name, so that reading a result does not import the modules that make the others.
    """
    names = [base.__name__ for base in type(result).__mro__]
    found = next((name for name in names if name in _SECTIONS), None)
    if found is None:
        raise InputError(
            f"render_report: no section for {names[0]}; expected any of {', '.join(_SECTIONS)}"
        )
    return found


def _scores(scores: HeadScores, id: str, results: Sequence[object]) -> Section:
    finite = scores.values[scores.values.isfinite()]
    heads = scores.top(min(_TOP, finite.numel()))
    circuits: Any = (result for result in results if _kind(result) == "Circuit")
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


def _circuit(circuit: Circuit, id: str, results: Sequence[object]) -> Section:
    total = circuit.n_layers * circuit.n_heads
    count = len(circuit.heads)
    scored = Scored.kept_by(circuit)
    others: Any = (result for result in results if _kind(result) == "HeadScores")
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
            "Selection": tables.in_words(circuit.selection) or "not recorded",
        },
        figures=() if scored is None or drawn else (_map(scored, circuit, f"{id}-map"),),
        tables=tuple(parts),
        provenance=() if recorded is None else (("Circuit", recorded.to_dict()),),
    )


def _faithfulness(curve: FaithfulnessCurve, id: str, _: Sequence[object]) -> Section:
    unit = " logits" if curve.metric == "direction" else ""
    drawn = (f"{len(draws)} {control_name(key)}" for key, draws in curve.random.items())
    name = f"Faithfulness: {metric_name(curve.metric)}"
    return Section(
        kind="FaithfulnessCurve",
        id=id,
        title=name,
        headline=(f"{curve.cpr:.2f}", f"CPR; random heads {tables.medians(curve.random_cpr)}"),
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


def _agreement(agreement: MethodAgreement, id: str, _: Sequence[object]) -> Section:
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


def _attention(view: AttentionView, id: str, _: Sequence[object]) -> Section:
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


def _relevance(relevance: TokenRelevance, id: str, _: Sequence[object]) -> Section:
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


# In the order of the method, which is the order of the report.
_SECTIONS: dict[str, Callable[..., Section]] = {
    "HeadScores": _scores,
    "Circuit": _circuit,
    "FaithfulnessCurve": _faithfulness,
    "MethodAgreement": _agreement,
    "AttentionView": _attention,
    "TokenRelevance": _relevance,
}


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


def _distinct(sections: Iterable[Section]) -> list[Section]:
    """The sections, with a number behind a title that an earlier one has."""
    seen: Counter[str] = Counter()
    named = []
    for section in sections:
        seen[section.title] += 1
        count = seen[section.title]
        named.append(
            section if count == 1 else replace(section, title=f"{section.title} ({count})")
        )
    return named


def _version() -> str:
    try:
        return importlib.metadata.version("cdt_lens")
    except importlib.metadata.PackageNotFoundError:
        return ""


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("cdt_lens"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")
