"""The command that compares methods of scoring heads: `compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cdt_lens import commands
from cdt_lens.commands import task_settings
from cdt_lens.console import out as terminal
from cdt_lens.console import say, tell, tell_table
from cdt_lens.errors import InputError

_AGREEMENT = ("Spearman", "Pearson", "forward passes", "time")


def compare(
    out: Annotated[Path, typer.Option(help="Run directory; an interrupted run goes on there.")],
    model: Annotated[
        str | None, typer.Option(help="Hub name, Hugging Face folder or .gguf file.")
    ] = None,
    planted: Annotated[
        str | None,
        typer.Option(help="Instead of a model: planted circuits, by name with commas, or all."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Names with commas, such as exact,cdt:stable,one-pass; default: all."),
    ] = None,
    task: commands.TaskName = "nusax-senti",
    language: commands.Language = None,
    data: commands.Data = None,
    train: commands.TrainFile = None,
    valid: Annotated[
        Path | None, typer.Option(help="Likewise: the held-out prompts are drawn from it.")
    ] = None,
    template: commands.Template = None,
    verbalizer: commands.Verbalizer = None,
    label_column: commands.LabelColumn = "label",
    shots: commands.Shots = 0,
    examples: commands.Scored = 48,
    held_out: Annotated[
        int, typer.Option(min=1, help="Validation examples to judge the rankings on, balanced.")
    ] = 48,
    baseline_examples: commands.Averaged = None,
    positions: commands.Positions = "answer",
    draws: Annotated[int, typer.Option(min=1, help="Random rankings beside the methods'.")] = 5,
    backend: commands.ModelClass = "auto",
    device: commands.Device = None,
    dtype: commands.Dtype = "float32",
    batch_size: commands.BatchSize = 16,
    rows: commands.Rows = None,
    seed: commands.Seed = 0,
) -> None:
    """Score all heads by several methods, and judge each: agreement, faithfulness, cost.

    Agreement is with exact mean-ablation on the scored examples; faithfulness is CPR and CMD of
    each ranking on held-out ones; cost is in plain forward passes. On planted circuits the heads
    are known, and AUROC and average precision say how well a method finds them.

    Writes `comparison.json`, `.csv` and `.png`, `report.html`, and each method's scores.
    """
    from cdt_lens import compare as comparing
    from cdt_lens import runs
    from cdt_lens.attribution import DEFAULT_METHODS

    if (model is None) == (planted is None):
        raise InputError("compare: expected either --model or --planted")
    names = comparing.checked_methods(DEFAULT_METHODS if methods is None else _split(methods))
    if planted is not None:
        circuits = _split(planted)
        if circuits == ["all"]:
            circuits = list(comparing.PLANTED)
        show_planted(
            comparing.compare_planted(
                circuits, names, folder=out, draws=draws, seed=seed, backend=backend,
                batch_size=batch_size, rows=rows, say=say,
            )
        )  # fmt: skip
        tell(str(out / "report.html"))
        return
    assert model is not None
    settings = task_settings(
        model=model, task=task, language=language, data=data,
        files={"train": train, "valid": valid}, template=template, verbalizer=verbalizer,
        label_column=label_column, shots=shots, backend=backend, device=device, dtype=dtype,
        positions=positions, examples=examples, baseline_examples=baseline_examples,
        batch_size=batch_size, rows=rows, seed=seed,
    )  # fmt: skip
    if settings.files and valid is None:
        raise InputError("compare: expected --valid, the file that held-out prompts are drawn from")
    run = runs.start_run(settings, out, say)
    show_comparison(comparing.compare_run(run, say, methods=names, held_out=held_out, draws=draws))
    tell(str(out / "report.html"))


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

    room = terminal.width - width(first)
    parts: list[list[str]] = [[]]
    for column in rest:
        if parts[-1] and sum(map(width, parts[-1])) + width(column) > room:
            parts.append([])
        parts[-1].append(column)
    return parts


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]
