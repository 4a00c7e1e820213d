"""One self-contained HTML report of any results; it opens without a network.

1. Each result becomes a section by its type: figures, tables, interactive views, key numbers.
2. The sections stand in the order of the method, whatever order the results came in.
3. The template adds the words: what a section shows, its sign and unit, what would be a bad sign.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from cdt_lens.core.artifacts import atomic_write
from cdt_lens.core.errors import InputError
from cdt_lens.viz import widgets, words
from cdt_lens.viz.report import (
    comparison_sections,
    sections,
    training_sections as transfer_sections,
)
from cdt_lens.viz.report.sections import Section
from cdt_lens.viz.svg import figure_html
from cdt_lens.viz.table import table_html
from cdt_lens.viz.widgets import attention_widget, tokens_widget

__all__ = ["attention_widget", "figure_html", "render_report", "table_html", "tokens_widget"]

# In the order of the method, which is the order of the report. A transfer comes last although it
# is what most readers look for: it rests on every section before it (the circuit that it trains,
# whether that circuit is faithful), and its headline stands at the top of the page all the same.
# A single fine-tuning, one of the runs that a transfer compares, comes before it.
_SECTIONS: dict[str, Callable[..., Section]] = {
    "HeadScores": sections.head_scores_section,
    "Circuit": sections.circuit_section,
    "Graph": sections.graph_section,
    "FaithfulnessCurve": sections.faithfulness_section,
    "MethodAgreement": sections.agreement_section,
    "Comparison": comparison_sections.comparison_section,
    "PlantedComparison": comparison_sections.planted_section,
    "AttentionView": sections.attention_section,
    "TokenRelevance": sections.relevance_section,
    "FineTuneResult": transfer_sections.fine_tune_section,
    "TransferResult": transfer_sections.transfer_section,
}


def render_report(*results: object, path: str | Path, title: str | None = None) -> Path:
    """Write `results`, in any order, as one HTML file at `path`, whole or not at all.

    A result is a Circuit (whose graph has a section of its own), Graph, HeadScores,
    FaithfulnessCurve, MethodAgreement, Comparison, PlantedComparison, AttentionView,
    TokenRelevance, FineTuneResult or TransferResult. The file holds everything that it shows and
    never uses the network; the same results give the same bytes.

    Raises:
        InputError: no results, one of another type, or `path` cannot be written.
        NonFiniteError: a prompt's pattern or relevance holds a value that is not finite.
    """
    if not results:
        raise InputError("render_report: expected at least one result, got none")
    order = list(_SECTIONS)
    ordered = sorted(_with_graphs(results), key=lambda result: order.index(_kind(result)))
    parts = _distinct(
        _SECTIONS[_kind(result)](result, f"s{number}", ordered)
        for number, result in enumerate(ordered, start=1)
    )
    views = [example.view for part in parts for example in part.examples]
    page = _template().render(
        title=title or "Circuit report",
        version=_version(),
        sections=parts,
        provenance=words.provenance_rows(entry for part in parts for entry in part.provenance),
        policy=widgets.policy(views),
        scripts=widgets.scripts(views),
    )
    # A byte-level token may leave a lone surrogate, which has no place in a UTF-8 file.
    return atomic_write(path, page.encode("utf-8", "replace"))


def _with_graphs(results: Iterable[object]) -> list[object]:
    """The results, and the graphs of circuits that are not among them already."""
    found = list(results)
    for circuit in [each for each in found if sections.is_a(each, "Circuit")]:
        graph = getattr(circuit, "graph", None)
        if graph is not None and all(graph is not each for each in found):
            found.append(graph)
    return found


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


def _distinct(parts: Iterable[Section]) -> list[Section]:
    """The sections, with a number behind a title that an earlier one has."""
    seen: Counter[str] = Counter()
    named = []
    for part in parts:
        seen[part.title] += 1
        count = seen[part.title]
        named.append(part if count == 1 else replace(part, title=f"{part.title} ({count})"))
    return named


def _version() -> str:
    try:
        return importlib.metadata.version("cdt_lens")
    except importlib.metadata.PackageNotFoundError:
        return ""


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("cdt_lens.viz.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")
