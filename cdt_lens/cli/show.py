"""`cdt-lens show`, and the tables that other commands print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cdt_lens.cli.console import out, tell, tell_table

_AGREEMENT = ("Spearman", "Pearson", "forward passes", "time")


def show_transfer(result: Any) -> None:
    """The tables of a transfer result."""
    before = result.before.set_index("language")
    columns = ["target", "scope", "seeds", "accuracy", "macro-F1", "retention", "trained", "s"]
    rows: list[list[str]] = []
    fewer: list[str] = []
    for target in result.targets:
        if target in before.index:
            row = before.loc[target]
            rows.append(
                [target, "(none)", "", f"{row['accuracy']:.3f}", f"{row['macro_f1']:.3f}",
                 "1.000", "0", ""]
            )  # fmt: skip
        for row in result.summary().to_dict("records"):
            if row["target"] == target:
                whole = row["seeds"] == row["asked"]
                seeds = f"{row['seeds']}" if whole else f"{row['seeds']} of {row['asked']}"
                cells = _cells_of(row)
                rows.append([*cells[:2], seeds, *cells[2:]])
                if not whole:
                    broken = f", {row['diverged']} diverged" if row["diverged"] else ""
                    fewer.append(f"{target} {row['scope']} {seeds} seeds{broken}")
    tell_table(columns, rows)
    if fewer:
        tell(f"means over fewer seeds than asked: {'; '.join(fewer)}")
    tell(
        "accuracy and macro-F1 on the target's test split; retention: source accuracy after / "
        "before; (none): the proxy checkpoint as it is"
    )
    if len(result.auto):
        for rule, part in result.auto.groupby("rule"):
            ties = int((part["better"] == "tie").sum())
            decided = part[part["better"] != "tie"]
            tell(
                f"scope auto, {rule} rule: the better of decision and near-zero in "
                f"{int(decided['right'].sum())} of {len(decided)}"
                + (f", {ties} ties" if ties else "")
            )


def _cells_of(row: dict[str, Any]) -> list[str]:
    def spread(name: str) -> str:
        std = row[f"{name}_std"]
        return f"{row[name]:.3f}" + ("" if std != std else f" ±{std:.3f}")

    return [
        row["target"], row["scope"], spread("accuracy"), spread("macro_f1"), spread("retention"),
        f"{row['share']:.2%}", f"{row['seconds']:.0f}",
    ]  # fmt: skip


def tell_graph(graph: Any, limit: int = 12) -> None:
    """The strongest edges of a circuit's graph."""
    edges = graph.top_edges(limit)
    tell(f"graph of {len(graph.kept_nodes)} nodes and {len(graph.kept_edges)} edges")
    if edges:
        rows = [[edge.name, f"{edge.score:+.4f}"] for edge in edges]
        unit = f" ({graph.short_unit})" if graph.short_unit else ""
        tell_table(["edge", f"score{unit}"], rows)


def show_comparison(result: Any) -> None:
    """The tables of a comparison: agreement and cost, then faithfulness, then what was refused."""
    table = result.table()
    _tell(table[["method", *(c for c in table if c in _AGREEMENT)]])
    _tell(table[[c for c in table if c not in _AGREEMENT]])
    tell(
        "* the best of its column; Spearman and Pearson with exact mean-ablation on "
        f"{result.scored} examples of {result.task}, CPR and CMD on {result.held_out} held out"
    )
    tell(
        f"task direction {result.full:.3f} logits with all heads, {result.empty:.3f} with none, "
        "held out"
    )
    for each in result.methods:
        if each.refused:
            tell(f"{each.method} is refused: {each.refused}")


def show_planted(result: Any) -> None:
    """AUROC and average precision by method and planted circuit."""
    for measure, words in (("auroc", "AUROC"), ("average_precision", "average precision")):
        tell(f"{words} of the magnitude of the scores against the planted heads (* the best)")
        _tell(result.table(measure))
    for name, each in result.circuits.items():
        for method in each.methods:
            if method.refused:
                tell(f"{method.method} is refused on {name}: {method.refused}")


def _tell(table: Any) -> None:
    """A table, in as many parts as the terminal needs, each with the first column."""
    first, *rest = table.columns
    for part in _parts(table, first, rest):
        headings = [first, *(name.replace(" ", "\n") for name in part)]
        tell_table(headings, table[[first, *part]].to_numpy().tolist())


def _parts(table: Any, first: str, rest: Sequence[str]) -> list[list[str]]:
    """Columns that stand beside each other within the terminal's width."""

    def width(column: str) -> int:
        # A heading breaks between its words; a column has three blanks around it.
        words = [*column.split(), *table[column]]
        return 3 + max(len(str(word)) for word in words)

    room = out.width - width(first)
    parts: list[list[str]] = [[]]
    for column in rest:
        if parts[-1] and sum(map(width, parts[-1])) + width(column) > room:
            parts.append([])
        parts[-1].append(column)
    return parts


def show(
    file: Annotated[
        Path, typer.Argument(help="A circuit, an adapter, a comparison or a transfer result.")
    ],
) -> None:
    """What a file holds, and where it came from."""
    from cdt_lens.circuits.circuit import Circuit
    from cdt_lens.comparing.comparison import Comparison, PlantedComparison
    from cdt_lens.core.artifacts import artifact_format
    from cdt_lens.finetuning.adapter import Adapter
    from cdt_lens.finetuning.transfer_result import TransferResult

    path = file / "adapter.json" if file.is_dir() else file
    kind = artifact_format(path)
    provenance: Any
    if kind == "cdt_lens.adapter":
        adapter = Adapter.load(path)
        print(f"adapter, scope {adapter.scope}: {adapter.elements:,} trained elements")
        rows = adapter.to_dataframe().to_dict("records")
        columns = ["weight", "heads", "elements"]
        tell_table(columns, [[row[c] or "all" for c in columns] for row in rows])
        provenance = adapter.provenance
    elif kind == "cdt_lens.transfer":
        result = TransferResult.load(path)
        show_transfer(result)
        provenance = result.provenance
    elif kind == "cdt_lens.comparison":
        compared = Comparison.load(path)
        show_comparison(compared)
        provenance = compared.provenance
    elif kind == "cdt_lens.planted_comparison":
        show_planted(PlantedComparison.load(path))
        provenance = None
    else:
        circuit = Circuit.load(path)
        heads = circuit.n_layers * circuit.n_heads
        print(f"{len(circuit)} of {heads} heads, {dict(circuit.selection)}")
        _table(circuit.to_dataframe().to_dict("records"))
        if circuit.graph is not None:
            tell_graph(circuit.graph)
        provenance = circuit.provenance
    if provenance is not None:
        for name, value in provenance.to_dict().items():
            print(f"{name}: {value}")


def show_heads(scores: Any, circuit: Any, limit: int = 12) -> None:
    rows = [
        {
            "head": str(head),
            "score": float(scores.values[head.layer, head.head]),
            "stderr": float(scores.stderr[head.layer, head.head]),
        }
        for head in scores.ranking()
        if head in circuit
    ]
    _table(rows[:limit])
    if len(rows) > limit:
        print(f"... and {len(rows) - limit} more heads of the circuit")


def _table(rows: list[Any]) -> None:
    table = Table("head", "score (logits)", "standard error")
    for row in rows:
        values = [row["score"], row["stderr"]]
        table.add_row(str(row["head"]), *("" if v is None else f"{v:+.4f}" for v in values))
    out.print(table)
