"""The sections of a report about compared methods."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cdt_lens.comparing.comparison import RANKINGS, Comparison, Measure, PlantedComparison
from cdt_lens.core.table import Table
from cdt_lens.viz import comparison_figures, comparison_tables
from cdt_lens.viz.report.sections import Section
from cdt_lens.viz.words import empty_run, score


def comparison_section(result: Comparison, id: str, _: Sequence[object]) -> Section:
    """Return the methods on one model and task: figure, numbers, meanings, refusals."""
    best = result.best("cpr")
    value = math.nan if best is None else best.value("cpr")
    refused = sum(method.refused is not None for method in result.methods)
    areas, run = result.random_areas(), empty_run(result.empty_run)
    return Section(
        title="Methods compared",
        headline=(
            score(value),
            "best mean of f over the sizes of circuits (CPR), by "
            f"{best.method if best else 'no method'}; {run}",
        ),
        facts={
            "Methods": f"{len(result.methods)}, {refused} refused",
            **_budget(result),
            "Examples": f"{result.scored} scored, {result.held_out} held out",
            "Task direction, scored": f"{result.direction:+.3f} logits",
            "Held out": f"{result.full:+.3f} logits with all heads, {result.empty:+.3f} in the "
            f"empty run ({run})",
            "Random rankings": f"{len(result.random)}: median CPR {score(areas['cpr'])}, "
            f"CMD {score(areas['cmd'])}, area on log sizes {score(areas['log_area'])}",
            **_best(result),
        },
        figures=(comparison_figures.comparison(result),),
        tables=(
            comparison_tables.agreement(result),
            comparison_tables.use(result),
            *_tables(result),
            comparison_tables.meanings(result),
            comparison_tables.descriptions(result),
        ),
        provenance=(("Methods compared", result.provenance.to_dict()),),
    )


def planted_section(result: PlantedComparison, id: str, _: Sequence[object]) -> Section:
    """Return the methods on every planted circuit: shades, numbers, meanings."""
    means = result.matrix("average_precision").mean(axis=1, skipna=False).dropna()
    best = str(means.idxmax()) if len(means) else None
    value = score(float(means.max())) if best else "n/a"
    first = next(iter(result.circuits.values()), None)
    tables = [comparison_tables.planted(result, m) for m in ("average_precision", "auroc")]
    if result.why:
        tables.append(comparison_tables.planted_meanings(result))
    if first is not None:
        tables.append(comparison_tables.meanings(first))
    return Section(
        title="Methods on planted circuits",
        headline=(value, f"best mean average precision, by {best or 'no method'}"),
        facts={
            "Methods": str(len(result.methods)),
            "Planted circuits": f"{len(result.circuits)}: {', '.join(result.circuits)}",
        },
        figures=(comparison_figures.planted(result),),
        tables=tuple(tables),
        provenance=tuple(
            (f"Planted circuit {name}", comparison.provenance.to_dict())
            for name, comparison in result.circuits.items()
        ),
    )


def _budget(result: Comparison) -> dict[str, str]:
    if result.budget is None:
        return {}
    return {"Budget of each method": f"{result.budget:g} forward passes of one example"}


def _tables(result: Comparison) -> list[Table]:
    """Return the tables with intervals that are not empty."""
    tables = [
        *(comparison_tables.differences(result, by) for by in RANKINGS),
        comparison_tables.sizes(result),
        comparison_tables.areas(result),
    ]
    return [table for table in tables if table.rows]


def _best(result: Comparison) -> dict[str, str]:
    """Return the best method of each measure as text."""
    names: dict[Measure, str] = {
        "spearman": "Spearman", "cpr": "CPR", "cmd": "CMD", "log_area": "area on log sizes",
    }  # fmt: skip
    best = {measure: result.best(measure) for measure in names}
    return {
        f"Best {names[measure]}": f"{method.method} ({score(method.value(measure))})"
        for measure, method in best.items()
        if method is not None
    }
