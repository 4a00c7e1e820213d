"""What a report shows of compared methods: key numbers, figures, tables, what the columns mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cdt_lens.viz import comparison_figures, comparison_tables
from cdt_lens.viz.report.sections import Section
from cdt_lens.viz.svg import figure_html
from cdt_lens.viz.words import score

if TYPE_CHECKING:
    from cdt_lens.comparing.comparison import Comparison, PlantedComparison


def comparison_section(result: Comparison, id: str, _: Sequence[object]) -> Section:
    """The methods on one model and task: figure, table, meanings, refusals."""
    best = result.best("cpr")
    value = math.nan if best is None else best.value("cpr")
    refused = [each.method for each in result.methods if each.refused]
    areas = result.random_areas()
    drawing = figure_html(
        result.plot(),
        prefix=f"{id}-methods",
        tooltips=comparison_figures.point_lines(result),
    )
    return Section(
        kind="Comparison",
        id=id,
        title="Methods compared",
        headline=(score(value), f"best CPR, by {best.method if best else 'no method'}"),
        facts={
            "Methods": f"{len(result.methods)}, {len(refused)} refused",
            "Examples": f"{result.scored} scored, {result.held_out} held out",
            "Task direction, scored": f"{result.direction:+.3f} logits",
            "Held out": f"{result.full:+.3f} logits with all heads, {result.empty:+.3f} with none",
            "Random rankings": f"{len(result.random)}: median CPR {score(areas['cpr'])}, "
            f"CMD {score(areas['cmd'])}",
            **_best(result),
        },
        figures=(drawing,),
        tables=(
            comparison_tables.html(result),
            comparison_tables.meanings(result),
            comparison_tables.methods_table(result),
        ),
        provenance=(("Methods compared", result.provenance.to_dict()),),
    )


def planted_section(result: PlantedComparison, id: str, _: Sequence[object]) -> Section:
    """The methods on every planted circuit: shades, tables, what is planted."""
    means = result.matrix("average_precision").mean(axis=1, skipna=False).dropna()
    best = str(means.idxmax()) if len(means) else None
    value = score(float(means.max())) if best else "n/a"
    first = next(iter(result.circuits.values()), None)
    tables = [comparison_tables.planted_html(result, m) for m in ("average_precision", "auroc")]
    if result.why:
        tables.append(comparison_tables.planted_words(result))
    if first is not None:
        tables.append(comparison_tables.meanings(first))
    return Section(
        kind="PlantedComparison",
        id=id,
        title="Methods on planted circuits",
        headline=(value, f"best mean average precision, by {best or 'no method'}"),
        facts={
            "Methods": str(len(result.methods)),
            "Planted circuits": f"{len(result.circuits)}: {', '.join(result.circuits)}",
        },
        figures=(figure_html(result.plot(), prefix=f"{id}-planted"),),
        tables=tuple(tables),
        provenance=tuple(
            (f"Planted circuit {name}", each.provenance.to_dict())
            for name, each in result.circuits.items()
        ),
    )


def _best(result: Comparison) -> dict[str, str]:
    """The best method of each measure, in words."""
    told = {}
    for measure, words in (("spearman", "Spearman"), ("cpr", "CPR"), ("cmd", "CMD")):
        found = result.best(measure)
        if found is not None:
            told[f"Best {words}"] = f"{found.method} ({score(found.value(measure))})"
    return told
