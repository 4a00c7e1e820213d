"""The command `show`, and how the other commands print their results."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cdt_lens.cli.console import tell, tell_table
from cdt_lens.core.errors import InputError

# The files that show a folder's result, the most of it first.
_RESULTS = (
    "adapt.json", "adapter.json", "result.json", "comparison.json", "circuit.json", "scores.json",
    "run.json",
)  # fmt: skip

# Methods whose scores have no unit. "gates, fitted" is one of them, too.
_ORDERS = ("gates", "random")


def show_transfer(result: Any) -> None:
    """Print the tables of a transfer result."""
    from cdt_lens.viz.training_tables import right_of

    columns = [
        "target", "scope", "seeds", "accuracy", "interval", "macro-F1", "retention", "trained",
        "s",
    ]  # fmt: skip
    runs = result.summary().to_dict("records")
    rows: list[list[str]] = []
    for target in result.targets:
        rows += _untouched(result, target)
        rows += [_cells_of(run) for run in runs if run["target"] == target]
    tell_table(columns, rows, repeat=2)
    fewer = [_missing(run) for run in runs if run["seeds"] < run["asked"]]
    if fewer:
        tell(f"means over fewer seeds than asked: {'; '.join(fewer)}")
    tell(
        "accuracy (95 % interval over test rows and seeds) and macro-F1 on the target's test "
        "split; retention: source accuracy after / before; (none): the proxy checkpoint without "
        "training on the target"
    )
    for rule, right in right_of(result).items():
        tell(f"scope auto, {rule} rule: chose the best of its scopes in {right}")


def _untouched(result: Any, target: str) -> list[list[str]]:
    """Return the row of the proxy checkpoint on a target, if it was measured."""
    measured = result.before[result.before["language"] == target].to_dict("records")
    return [
        [
            target,
            "(none)",
            "",
            f"{row['accuracy']:.3f}",
            "",
            f"{row['macro_f1']:.3f}",
            "1.000",
            "0",
            "",
        ]
        for row in measured
    ]


def _cells_of(run: dict[str, Any]) -> list[str]:
    from cdt_lens.viz.words import number, percent, score

    def spread(name: str) -> str:
        std = run[f"{name}_std"]
        return score(run[name]) + ("" if std != std else f" ±{score(std)}")

    low = run["accuracy_low"]
    return [
        run["target"], run["scope"], _seeds(run), spread("accuracy"),
        "" if low != low else f"{low:.2f} to {run['accuracy_high']:.2f}", spread("macro_f1"),
        spread("retention"), percent(run["share"]), number(run["seconds"], ".0f"),
    ]  # fmt: skip


def _seeds(run: dict[str, Any]) -> str:
    whole = run["seeds"] == run["asked"]
    return f"{run['seeds']}" if whole else f"{run['seeds']} of {run['asked']}"


def _missing(run: dict[str, Any]) -> str:
    diverged = f", {run['diverged']} diverged" if run["diverged"] else ""
    return f"{run['target']} {run['scope']} {_seeds(run)} seeds{diverged}"


def show_curve(curve: Any) -> None:
    """Print a faithfulness curve beside its random circuits."""
    from cdt_lens.viz.words import empty_run

    columns = ["heads", "fraction", "faithfulness", "completeness"]
    rows = [
        [
            row["heads"], f"{row['fraction']:g}", f"{row['faithfulness']:.2f}",
            f"{row['completeness']:.2f}",
            *(f"{row[f'{name} (median)']:.2f}" for name in curve.random),
        ]
        for row in curve.to_dataframe().to_dict("records")
    ]  # fmt: skip
    tell_table([*columns, *curve.random], rows)
    tell(
        f"metric {curve.metric}: {curve.full:.3f} with all heads, {curve.empty:.3f} in the empty "
        f"run ({empty_run(curve.empty_run)})"
    )
    controls = "; ".join(
        f"{name} {float(curve.random_cpr[name].mean()):.3f} and "
        f"{float(curve.random_cmd[name].mean()):.3f}"
        for name in curve.random
    )
    tell(
        f"CPR {curve.cpr:.3f}, CMD {curve.cmd:.3f}, {empty_run(curve.empty_run)} (means of the "
        f"random circuits: {controls})"
    )


def show_edge_faithfulness(result: Any) -> None:
    """Print the faithfulness of graphs of direct edges."""
    for row in result.to_dataframe().to_dict("records"):
        limits = f"{row['faithfulness low']:.3f}, {row['faithfulness high']:.3f}"
        tell(
            f"{row['edges']} edges: f {row['faithfulness']:.3f} [{limits}]; as many random edges "
            f"{row['random (median)']:.3f}"
        )
    tell(f"metric {result.metric}: {result.full:.3f} with all edges, {result.empty:.3f} with none")


def tell_graph(graph: Any, limit: int = 12) -> None:
    """Print the strongest edges of the graph of a circuit."""
    edges = graph.top_edges(limit)
    tell(f"graph of {len(graph.kept_nodes)} nodes and {len(graph.kept_edges)} edges")
    if edges:
        rows = [[edge.name, f"{edge.score:+.4f}"] for edge in edges]
        unit = f" ({graph.short_unit})" if graph.short_unit else ""
        tell_table(["edge", f"score{unit}"], rows)


def show_adaptation(result: Any) -> None:
    """Print what was tried, and the accuracies before and after."""
    from cdt_lens.viz.training_tables import languages_table, texts_table, trials_table

    for table in (trials_table(result), languages_table(result), texts_table(result)):
        if table is not None:
            tell(table.caption)
            tell_table(table.headings, table.rows)
    if result.nothing_learnt:
        tell(result.nothing_learnt)


def show_comparison(result: Any) -> None:
    """Print agreement and cost, then faithfulness, then what differs and what was refused."""
    from cdt_lens.viz.comparison_tables import agreement, differences, use
    from cdt_lens.viz.words import empty_run

    for table in (agreement(result), use(result)):
        _tell_frame(table.to_dataframe())
    tell(
        "* the best of its column; Spearman and Pearson with exact mean-ablation on "
        f"{result.methods[0].scored} examples of {result.task}, areas on {result.held_out} held "
        f"out, {empty_run(result.empty_run)}"
    )
    real = differences(result)
    if real.rows:
        tell(real.caption)
        _tell_frame(real.to_dataframe())
    tell(
        f"task direction on the held-out examples: {result.full:.3f} logits with all heads, "
        f"{result.empty:.3f} in the empty run ({empty_run(result.empty_run)})"
    )
    for method in result.methods:
        if method.refused:
            tell(f"{method.method} is refused: {method.refused}")


def show_planted(result: Any) -> None:
    """Print AUROC and average precision by method and planted circuit."""
    for measure, words in (("auroc", "AUROC"), ("average_precision", "average precision")):
        tell(f"{words} of the magnitude of the scores against the planted heads (* the best)")
        _tell_frame(result.table(measure))
    for name, comparison in result.circuits.items():
        for method in comparison.methods:
            if method.refused:
                tell(f"{method.method} is refused on {name}: {method.refused}")


def _tell_frame(table: Any) -> None:
    tell_table(list(table.columns), table.to_numpy().tolist())


def show(
    file: Annotated[Path, typer.Argument(help="A file that a command wrote, or its folder.")],
) -> None:
    """Print the contents of a file and its provenance."""
    from cdt_lens.core.artifacts import artifact_format

    path = _file_in(file) if file.is_dir() else file
    kind = artifact_format(path)
    if kind in _SETTINGS:
        _show_settings(path, kind)
        return
    if kind not in _SHOWN:
        known = ", ".join(sorted([*_SHOWN, *_SETTINGS]))
        other = "another file (cdt-lens convert reads graphs of other tools)"
        got = other if kind == "None" else kind
        raise InputError(f"{path}: expected a file of {known}; got {got}")
    home, name, show_it = _SHOWN[kind]
    result = getattr(importlib.import_module(f"cdt_lens.{home}"), name).load(path)
    show_it(result)
    provenance = getattr(result, "provenance", None)
    if provenance is not None:
        for entry, value in provenance.to_dict().items():
            tell(f"{entry}: {value}")


def _file_in(folder: Path) -> Path:
    """Return the file of a folder that says most about it."""
    inside = [folder / name for name in _RESULTS if (folder / name).is_file()]
    if not inside and (folder / "config.json").is_file():
        raise InputError(f"{folder}: holds a model; {_use_of(folder)}")
    if not inside:
        raise InputError(
            f"{folder}: expected one of {', '.join(_RESULTS)} in it; give a file, or the folder "
            "that a command wrote"
        )
    return inside[0]


def _use_of(folder: Path) -> str:
    """Return what to do with the folder of a model."""
    from cdt_lens.finetuning.model_card import TASK_FILE

    if (folder / TASK_FILE).is_file():
        return "cdt-lens predict labels rows with it"
    return f"cdt-lens discover --model {folder} finds a circuit in it"


def _show_adapter(adapter: Any) -> None:
    tell(f"adapter, scope {adapter.scope}: {adapter.elements:,} trained elements")
    if adapter.heads:
        tell(f"heads: {', '.join(map(str, adapter.heads))}")
    frame = adapter.to_dataframe()
    layers = frame["weight"].str.extract(r"\.(\d+)\.")[0].astype(float)
    parts = frame.groupby(layers, dropna=False)["elements"]
    rows = [
        ["outside the layers" if layer != layer else int(layer), len(own), f"{own.sum():,}"]
        for layer, own in parts
    ]
    tell_table(["layer", "weights", "elements"], rows)


def _show_scores(scores: Any) -> None:
    tell(repr(scores))
    _tell_heads(scores.to_dataframe().head(12).to_dict("records"), _unit_of(scores.method))


def _show_baseline(baseline: Any) -> None:
    tell(repr(baseline))


def _show_settings(path: Path, kind: str) -> None:
    from cdt_lens.experiments.runs import kept_settings

    for name, value in kept_settings(path, kind).items():
        if value not in (None, {}, []):
            tell(f"{name}: {value}")


def _show_circuit(circuit: Any) -> None:
    heads = circuit.n_layers * circuit.n_heads
    tell(f"{len(circuit)} of {heads} heads, {dict(circuit.selection)}")
    unit = circuit.selection.get("unit")  # of a circuit that was converted
    known = _unit_of(circuit.selection.get("method")) if unit is None else _short(unit)
    _tell_heads(circuit.to_dataframe().to_dict("records"), known)
    if circuit.graph is not None:
        tell_graph(circuit.graph)


def show_heads(scores: Any, circuit: Any, limit: int = 12) -> None:
    """Print the strongest heads of a circuit, and how reliable their ranking is."""
    from cdt_lens.circuits.head_scores import NO_INTERVALS
    from cdt_lens.circuits.reliability import is_top, reliability
    from cdt_lens.viz.tables import Scored, heads_table, members_of

    heads = [head for head in scores.ranking() if head in circuit]
    members = members_of(scores, circuit)
    table = heads_table(Scored.of(scores), heads[:limit], caption="", members=members)
    tell_table(table.headings, table.rows)
    if table.caption:
        tell(table.caption)
    if len(heads) > limit:
        tell(f"... and {len(heads) - limit} more heads of the circuit")
    if not scores.has_intervals:
        tell(NO_INTERVALS)
        return
    found = reliability(scores)
    tell(f"split-half reliability {found.split_half:.2f} on {found.examples} examples")
    tell(f"the 95 % interval of {found.resolved:.0%} of the heads excludes 0")
    if is_top(circuit):
        tell(_open(scores, circuit))


def _open(scores: Any, circuit: Any) -> str:
    """Return how many heads of the circuit are sure, and how many outside may belong to it."""
    chosen = {
        name: circuit.selection[name] for name in ("k", "fraction") if name in circuit.selection
    }
    left = scores.undecided(**chosen, by=circuit.selection["by"])
    inside = sum(head in circuit for head in left)
    return (
        f"at 95 % confidence {len(circuit) - inside} of the circuit's {len(circuit)} heads belong "
        f"to it; {len(left) - inside} heads outside of it may as well"
    )


def _tell_heads(rows: list[Any], unit: str) -> None:
    """Print heads with their scores in a unit, "" if it is not known."""
    cells = [
        [row["head"], *(_signed(value) for value in (row["score"], row["stderr"]))] for row in rows
    ]
    tell_table(["head", f"score ({unit})" if unit else "score", "standard error"], cells)


def _signed(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:+.4f}"


def _unit_of(method: object) -> str:
    """Return the unit of the scores of a method, "" if only their order has a meaning."""
    return "" if str(method).partition(",")[0] in _ORDERS else "logits"


def _short(unit: object) -> str:
    from cdt_lens.circuits.nodes import OWN_UNIT

    return "logits" if unit == OWN_UNIT else ""


# By kind of file: the module and the class that read it, and what prints it.
_SHOWN: dict[str, tuple[str, str, Callable[[Any], None]]] = {
    "cdt_lens.adapt": ("finetuning.adapt_result", "AdaptResult", show_adaptation),
    "cdt_lens.adapter": ("finetuning.adapter", "Adapter", _show_adapter),
    "cdt_lens.baseline": ("decomposition.baseline", "Baseline", _show_baseline),
    "cdt_lens.circuit": ("circuits.circuit", "Circuit", _show_circuit),
    "cdt_lens.comparison": ("comparing.comparison", "Comparison", show_comparison),
    "cdt_lens.faithfulness": ("circuits.faithfulness", "FaithfulnessCurve", show_curve),
    "cdt_lens.planted_comparison": ("comparing.comparison", "PlantedComparison", show_planted),
    "cdt_lens.scores": ("circuits.head_scores", "HeadScores", _show_scores),
    "cdt_lens.transfer": ("finetuning.transfer_result", "TransferResult", show_transfer),
}
_SETTINGS = ("cdt_lens.run", "cdt_lens.transfer_run")  # of run directories
