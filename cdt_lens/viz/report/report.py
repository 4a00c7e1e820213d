"""One self-contained HTML report of any results, which opens without a network.

1. The type of a result chooses the builder of its section: key numbers, figures, tables, views.
2. The sections stand in the order of the method, in whatever order the results came.
3. The template explains each section: its subject, its sign and unit, and signs of trouble. The
   sections are not built in Jinja, because their facts are computed and checked in Python.
4. Scripts draw the figures and link the map of the heads with the curve and the prompts
   (`explore.py`). Without them the tables hold the numbers.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, singledispatch
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import CircuitFaithfulness, FaithfulnessCurve
from cdt_lens.circuits.graph import Graph
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.comparing.comparison import Comparison, PlantedComparison
from cdt_lens.core.artifacts import atomic_write
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.errors import InputError
from cdt_lens.core.table import Table
from cdt_lens.finetuning.adapt_result import AdaptResult
from cdt_lens.finetuning.result import FineTuneResult
from cdt_lens.finetuning.transfer_result import TransferResult
from cdt_lens.scoring.agreement import MethodAgreement
from cdt_lens.scoring.prompt_views import AttentionView, TokenRelevance
from cdt_lens.viz import widgets, words
from cdt_lens.viz.report import comparison_sections, sections, training_sections
from cdt_lens.viz.report.explore import explorer
from cdt_lens.viz.report.sections import Section
from cdt_lens.viz.scripts import Library, policy, scripts

__all__ = ["render_report"]


@singledispatch
def _section(result: object, id: str, results: Sequence[object]) -> Section:
    names = ", ".join(kind.__name__ for kind in _section.registry if kind is not object)
    raise InputError(
        f"render_report: no section for {type(result).__name__}; expected any of {names}"
    )


# In the order of the method, which is the order of the sections. A transfer comes last, although
# most readers want it first: it rests on every section before it, and its headline stands at the
# top of the page. A fine-tuning, one of the runs that a transfer compares, comes before it.
_section.register(HeadScores, sections.head_scores_section)
_section.register(Circuit, sections.circuit_section)
_section.register(Graph, sections.graph_section)
_section.register(FaithfulnessCurve, sections.faithfulness_section)
_section.register(CircuitFaithfulness, sections.circuit_faithfulness_section)
_section.register(MethodAgreement, sections.agreement_section)
_section.register(Comparison, comparison_sections.comparison_section)
_section.register(PlantedComparison, comparison_sections.planted_section)
_section.register(AttentionView, sections.attention_section)
_section.register(TokenRelevance, sections.relevance_section)
_section.register(FineTuneResult, training_sections.fine_tune_section)
_section.register(TransferResult, training_sections.transfer_section)
_section.register(AdaptResult, training_sections.adapt_section)


@checked_arguments
def render_report(*results: object, path: str | Path, title: str | None = None) -> Path:
    """Write results as one HTML file, completely or not at all.

    The file holds everything that it shows and never uses the network. The same results give the
    same bytes, in whatever order they come.

    Args:
        *results: The results: Circuit (whose graph gets a section of its own), Graph, HeadScores,
            FaithfulnessCurve, CircuitFaithfulness, MethodAgreement, Comparison, PlantedComparison,
            AttentionView, TokenRelevance, FineTuneResult, TransferResult, AdaptResult, or
            subclasses of these.
        path: The file to write.
        title: The title of the page.

    Returns:
        The path of the file.

    Raises:
        InputError: There are no results, one is of another type, or `path` cannot be written.
        NonFiniteError: A pattern or the relevance of a prompt holds a value that is not finite.
    """
    if not results:
        raise InputError("render_report: expected at least one result, got none")
    kinds = list(_section.registry)
    ordered = sorted(_with_graphs(results), key=lambda result: kinds.index(_kind(result)))
    built = []
    for number, result in enumerate(ordered, start=1):
        part = _section(result, f"s{number}", ordered)
        built.append(replace(part, id=f"s{number}", kind=_kind(result).__name__))
    parts = _distinct(built)
    views = [example.view for part in parts for example in part.examples]
    linked = explorer(ordered)
    drawn = {f"{part.id}-figure{n}": f for part in parts for n, f in enumerate(part.figures)}
    drawn |= {f"explore-{name}": f for name, f in (linked.figures.items() if linked else ())}
    libraries: list[Library] = ["circuitsvis"] if views else []
    libraries += ["vega"] if drawn else []
    data: dict[str, Any] = {"views": widgets.data(views)}
    data["figures"] = {id: figure.spec for id, figure in drawn.items()}
    data |= {"explore": linked.data} if linked else {}
    page = _template().render(
        title=title or "Circuit report",
        version=_version(),
        sections=parts,
        linked=linked,
        provenance=_provenance(parts),
        policy=policy(libraries),
        scripts=scripts(data, libraries),
    )
    # A byte-level token may hold a lone surrogate, which UTF-8 cannot encode.
    return atomic_write(path, page.encode("utf-8", "replace"))


def _with_graphs(results: Sequence[object]) -> list[object]:
    """Return the results, and the graphs of circuits that are not among them."""
    every = list(results)
    for circuit in (result for result in results if isinstance(result, Circuit)):
        if circuit.graph is not None and all(circuit.graph is not other for other in every):
            every.append(circuit.graph)
    return every


def _kind(result: object) -> type:
    """Return the type that chose the section of `result`: its own or a base type."""
    return next(kind for kind in type(result).__mro__ if kind in _section.registry)


def _provenance(parts: Iterable[Section]) -> list[tuple[str, Table]]:
    origins = words.provenance_rows(entry for part in parts for entry in part.provenance)
    return [
        (
            name,
            Table(
                ("part", "name", "value"),
                [(group or "general", *row) for group, rows in groups.items() for row in rows],
                grouped=True,
            ),
        )
        for name, groups in origins
    ]


def _distinct(parts: Iterable[Section]) -> list[Section]:
    """Return the sections, with a number after a title that an earlier one has."""
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
