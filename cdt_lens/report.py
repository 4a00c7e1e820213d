"""One self-contained HTML report of any results; it opens without a network.

1. Each result becomes a section by its type: figures, tables, interactive views, key numbers.
2. The sections stand in the order of the method, whatever order the results came in.
3. The template adds the words: what a section shows, its sign and unit, what would be a bad sign.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cdt_lens import figures, widgets
from cdt_lens.artifacts import atomic_write
from cdt_lens.errors import InputError
from cdt_lens.heads import Head, all_heads
from cdt_lens.markup import figure_html, table_html
from cdt_lens.widgets import View, attention_widget, tokens_widget

if TYPE_CHECKING:
    from cdt_lens.circuit import Circuit
    from cdt_lens.faithfulness import FaithfulnessCurve
    from cdt_lens.scores import HeadScores, MethodAgreement
    from cdt_lens.views import AttentionView, TokenRelevance

__all__ = ["attention_widget", "figure_html", "render_report", "table_html", "tokens_widget"]

_TOP = 20

Grouped = dict[str, list[tuple[str, str]]]


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
    provenance: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # whose -> what


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
    sections = [
        _SECTIONS[_kind(result)](result, f"s{number}", ordered)
        for number, result in enumerate(ordered, start=1)
    ]
    views = [example.view for section in sections for example in section.examples]
    page = _template().render(
        title=title or "Circuit report",
        version=_version(),
        sections=sections,
        provenance=_provenance(sections),
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
    heads = scores.top(min(_TOP, scores.values.numel()))
    circuits = [result for result in results if _kind(result) == "Circuit"]
    circuit = next((circuit for circuit in circuits if circuit.scores is scores), None)
    return Section(
        kind="HeadScores",
        id=id,
        title=f"Head scores: {scores.method}",
        headline=(f"{scores.direction:+.2f}", "logits, task direction of the full model"),
        facts={
            "Model": f"{scores.n_layers} layers of {scores.n_heads} heads",
            "Examples": str(len(scores.example_labels)),
            "Task direction": f"{scores.direction:+.3f} logits",
            "Largest score": f"{float(scores.values.max()):+.3g} logits",
            "Smallest score": f"{float(scores.values.min()):+.3g} logits",
        },
        figures=(
            _map(scores, circuit, f"{id}-map"),
            Markup(figure_html(figures.bars(scores, _TOP), prefix=f"{id}-bars")),
        ),
        tables=(_heads_table(scores, heads, f"Top {len(heads)} heads"),),
        provenance={f"Head scores: {scores.method}": scores.provenance.to_dict()},
    )


def _circuit(circuit: Circuit, id: str, results: Sequence[object]) -> Section:
    total = circuit.n_layers * circuit.n_heads
    drawn = any(result is circuit.scores for result in results)
    scores = circuit.scores
    tables = [_layers_table(circuit)]
    if scores is not None:
        best = sorted(circuit.heads, key=lambda head: -abs(float(_at(scores.values, head))))
        tables.insert(0, _heads_table(scores, best, f"The {len(best)} heads of the circuit, largest first"))
    return Section(
        kind="Circuit",
        id=id,
        title="Circuit",
        headline=(f"{len(circuit.heads)} of {total}", "heads in the circuit"),
        facts={
            "Heads": f"{len(circuit.heads)} of {total} ({len(circuit.heads) / total:.1%})",
            "Selection": _text(circuit.selection) or "not recorded",
            "Scores": scores.method if scores is not None else "none kept",
        },
        figures=() if scores is None or drawn else (_map(scores, circuit, f"{id}-map"),),
        tables=tuple(tables),
        provenance={"Circuit": circuit.provenance.to_dict()},
    )


def _faithfulness(curve: FaithfulnessCurve, id: str, _: Sequence[object]) -> Section:
    unit = " logits" if curve.metric == "direction" else ""
    return Section(
        kind="FaithfulnessCurve",
        id=id,
        title=f"Faithfulness: {curve.metric}",
        headline=(f"{curve.cpr:.2f}", f"CPR; random heads {_middle(curve.random_cpr)}"),
        facts={
            "Metric": curve.metric,
            "Full model": f"{curve.full:.3f}{unit}",
            "All heads ablated": f"{curve.empty:.3f}{unit}",
        },
        figures=(Markup(figure_html(figures.curve(curve), prefix=f"{id}-curve")),),
        tables=(_areas_table(curve), _sizes_table(curve)),
        provenance={f"Faithfulness: {curve.metric}": curve.provenance.to_dict()},
    )


def _agreement(agreement: MethodAgreement, id: str, _: Sequence[object]) -> Section:
    scores, reference = agreement.scores, agreement.reference
    heads = all_heads(*scores.values.shape)
    lines = [f"{_told(scores, head)}; {_told(reference, head)}" for head in heads]
    drawing = figure_html(
        figures.agreement(agreement), prefix=f"{id}-scatter", tooltips={"points": lines}
    )
    return Section(
        kind="MethodAgreement",
        id=id,
        title=f"Agreement: {scores.method} and {reference.method}",
        headline=(f"{agreement.spearman:.2f}", f"Spearman with {reference.method}"),
        facts={
            "Spearman (order)": f"{agreement.spearman:.3f}",
            "Pearson (value)": f"{agreement.pearson:.3f}",
            "Heads": str(len(heads)),
        },
        figures=(Markup(drawing),),
        tables=(_pairs_table(scores, reference),),
        provenance={
            f"Head scores: {scores.method}": scores.provenance.to_dict(),
            f"Head scores: {reference.method}": reference.provenance.to_dict(),
        },
    )


def _attention(view: AttentionView, id: str, _: Sequence[object]) -> Section:
    examples = [
        Example(
            {"Gold label": label},
            widgets.attention(view, index, id=f"{id}-view{index}"),
            text="".join(view.prompts[index]),
        )
        for index, label in enumerate(view.labels)
    ]
    return Section(
        kind="AttentionView",
        id=id,
        title="Attention patterns",
        headline=(str(len(view.prompts)), f"prompts with the patterns of {len(view.heads)} heads"),
        facts={"Heads": ", ".join(str(head) for head in view.heads)},
        examples=tuple(examples),
    )


def _relevance(relevance: TokenRelevance, id: str, _: Sequence[object]) -> Section:
    scale = widgets.largest_relevance(relevance)
    examples = []
    for index, (label, direction) in enumerate(
        zip(relevance.labels, relevance.directions, strict=True)
    ):
        view = widgets.colored_tokens(relevance, index, id=f"{id}-view{index}")
        values = relevance.relevance[index].tolist()
        facts = {
            "Gold label": label,
            "Task direction": f"{direction:+.3f} logits",
            "Sum over tokens": f"{sum(values):+.3f} logits",
        }
        rows = [
            (place, _visible(token), f"{value:+z.4f}")
            for place, (token, value) in enumerate(
                zip(relevance.prompts[index], values, strict=True)
            )
        ]
        columns = ("position", "token", "relevance (logits)")
        examples.append(Example(facts, view, numbers=Markup(table_html(columns, rows))))
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


def _map(scores: HeadScores, circuit: Circuit | None, prefix: str) -> Markup:
    lines = [_told(scores, head) for head in all_heads(*scores.values.shape)]
    figure = figures.heatmap(scores, circuit=circuit)
    return Markup(figure_html(figure, prefix=prefix, tooltips={"cells": lines}))


def _at(values: torch.Tensor, head: Head) -> float:
    return float(values[head.layer, head.head])


def _told(scores: HeadScores, head: Head) -> str:
    value, error = _at(scores.values, head), _at(scores.stderr, head)
    return f"{head}: {value:+.4g} \u00b1 {error:.2g} logits ({scores.method})"


def _heads_table(scores: HeadScores, heads: Iterable[Head], caption: str) -> Markup:
    rows = []
    for head in heads:
        value, error = _at(scores.values, head), _at(scores.stderr, head)
        ratio = f"{value / error:+.1f}" if error else "n/a"
        share = f"{value / scores.direction:+.1%}" if scores.direction else "n/a"
        rows.append((head, f"{value:+z.4f}", f"{error:.4f}", ratio, share))
    columns = ("head", "score (logits)", "standard error", "score / s.e.", "share of direction")
    return Markup(table_html(columns, rows, caption=caption))


def _layers_table(circuit: Circuit) -> Markup:
    rows = []
    for layer, members in groupby(circuit.heads, key=lambda head: head.layer):
        names = [str(head) for head in members]
        rows.append((f"layer {layer}", len(names), ", ".join(names)))
    return Markup(table_html(("layer", "heads", "which"), rows, caption="Circuit by layer"))


def _areas_table(curve: FaithfulnessCurve) -> Markup:
    rows = [("circuit", f"{curve.cpr:.3f}", f"{curve.cmd:.3f}")]
    for name in curve.random:
        areas = (_spread(draws[name]) for draws in (curve.random_cpr, curve.random_cmd))
        rows.append((figures.control_name(name), *areas))
    columns = ("", "CPR (higher is better)", "CMD (lower is better)")
    return Markup(table_html(columns, rows, caption="Areas, with median and 5-95 % for random"))


def _sizes_table(curve: FaithfulnessCurve) -> Markup:
    columns = ["heads", "share", "f of the circuit", "f without it"]
    for name in curve.random:
        columns += [f"f of {figures.control_name(name)}", "beaten"]
    rows = []
    for index, (size, share) in enumerate(zip(curve.sizes, curve.fractions, strict=True)):
        row = [size, f"{100 * share:.3g} %"]
        row += [f"{float(f[index]):.3f}" for f in (curve.faithfulness, curve.completeness)]
        for name, draws in curve.random.items():
            row += [_spread(draws[:, index]), f"{float(curve.beaten[name][index]):.0%}"]
        rows.append(row)
    return Markup(table_html(columns, rows, caption="Faithfulness by size"))


def _pairs_table(scores: HeadScores, reference: HeadScores) -> Markup:
    """The heads on which the two differ most."""
    gaps = (scores.values - reference.values).abs().flatten()
    heads = all_heads(*scores.values.shape)
    worst = [heads[index] for index in gaps.argsort(descending=True)[:10].tolist()]
    rows = [
        (head, *(f"{_at(side.values, head):+z.4f}" for side in (scores, reference)))
        for head in worst
    ]
    columns = ("head", f"{scores.method} (logits)", f"{reference.method} (logits)")
    return Markup(table_html(columns, rows, caption="Largest differences"))


def _spread(draws: torch.Tensor) -> str:
    low, middle, high = draws.double().quantile(torch.tensor([0.05, 0.5, 0.95]).double()).tolist()
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def _middle(draws: Mapping[str, torch.Tensor]) -> str:
    return ", ".join(f"{float(values.median()):.2f}" for values in draws.values()) or "not drawn"


def _visible(token: str) -> str:
    return token.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("\t", "\u21e5")


def _provenance(sections: Iterable[Section]) -> list[tuple[str, Grouped]]:
    """(whose, what), with what is common to all results told once, first."""
    told = {
        whose: _leaves(entries)
        for section in sections
        for whose, entries in section.provenance.items()
    }
    if len(told) < 2:
        return [(whose, _grouped(leaves)) for whose, leaves in told.items()]
    first, *others = told.values()
    common = {path: v for path, v in first.items() if all(o.get(path) == v for o in others)}
    rest = {
        whose: {path: value for path, value in leaves.items() if path not in common}
        for whose, leaves in told.items()
    }
    parts = {"Common to all results": common, **rest}
    return [(whose, _grouped(leaves)) for whose, leaves in parts.items() if leaves]


def _leaves(entries: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    found: dict[tuple[str, ...], str] = {}
    for name, value in entries.items():
        here = (*path, str(name))
        nested = isinstance(value, Mapping) and value
        found |= _leaves(value, here) if nested else {here: _text(value)}
    return found


def _grouped(leaves: Mapping[tuple[str, ...], str]) -> Grouped:
    """Rows of (name, value) by the outermost name; what has none comes first, under ""."""
    groups: Grouped = {"": []}
    for (outer, *inner), value in leaves.items():
        group, name = (outer, " \u203a ".join(inner)) if inner else ("", outer)
        groups.setdefault(group, []).append((name, value))
    return {group: rows for group, rows in groups.items() if rows}


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {_text(entry)}" for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(entry) for entry in value)
    return "none" if value is None else str(value)


def _version() -> str:
    try:
        return importlib.metadata.version("cdt_lens")
    except importlib.metadata.PackageNotFoundError:
        return ""


@cache
def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("cdt_lens"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")
