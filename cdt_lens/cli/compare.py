"""The command that compares methods of scoring heads: `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cdt_lens.cli import arguments
from cdt_lens.cli.console import say, tell
from cdt_lens.cli.show import show_comparison, show_planted
from cdt_lens.core.errors import InputError


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
    task: arguments.TaskName = "nusax-senti",
    language: arguments.Language = None,
    data: arguments.Data = None,
    train: arguments.TrainFile = None,
    valid: Annotated[
        Path | None, typer.Option(help="Likewise: the held-out prompts are drawn from it.")
    ] = None,
    template: arguments.Template = None,
    verbalizer: arguments.Verbalizer = None,
    label_column: arguments.LabelColumn = "label",
    shots: arguments.Shots = 0,
    examples: arguments.Scored = 48,
    held_out: Annotated[
        int, typer.Option(min=1, help="Validation examples to judge the rankings on, balanced.")
    ] = 48,
    baseline_examples: arguments.Averaged = None,
    positions: arguments.Positions = "answer",
    draws: Annotated[int, typer.Option(min=1, help="Random rankings beside the methods'.")] = 5,
    backend: arguments.ModelClass = "auto",
    device: arguments.Device = None,
    dtype: arguments.Dtype = "float32",
    batch_size: arguments.BatchSize = 16,
    rows: arguments.Rows = None,
    seed: arguments.Seed = 0,
) -> None:
    """Score all heads by several methods, and judge each: agreement, faithfulness, cost.

    Agreement is with exact mean-ablation on the scored examples; faithfulness is CPR and CMD of
    each ranking on held-out ones; cost is in plain forward passes. On planted circuits the heads
    are known, and AUROC and average precision say how well a method finds them.

    Writes `comparison.json`, `.csv` and `.png`, `report.html`, and each method's scores.
    """
    from cdt_lens.comparing.compare import checked_methods
    from cdt_lens.experiments import compare as experiments, runs
    from cdt_lens.planted.catalogue import PLANTED
    from cdt_lens.scoring.methods import DEFAULT_METHODS

    expected = InputError("compare: expected either --model or --planted")
    if planted is not None and model is not None:
        raise expected
    names = checked_methods(DEFAULT_METHODS if methods is None else _split(methods))
    if planted is not None:
        circuits = _split(planted)
        if circuits == ["all"]:
            circuits = list(PLANTED)
        show_planted(
            experiments.compare_planted(
                circuits, names, folder=out, draws=draws, seed=seed, backend=backend,
                batch_size=batch_size, rows=rows, say=say,
            )
        )  # fmt: skip
        tell(str(out / "report.html"))
        return
    if model is None:
        raise expected
    settings = arguments.task_settings(
        model=model, task=task, language=language, data=data,
        files={"train": train, "valid": valid}, template=template, verbalizer=verbalizer,
        label_column=label_column, shots=shots, backend=backend, device=device, dtype=dtype,
        positions=positions, examples=examples, baseline_examples=baseline_examples,
        batch_size=batch_size, rows=rows, seed=seed,
    )  # fmt: skip
    if settings.files and valid is None:
        raise InputError("compare: expected --valid, the file that held-out prompts are drawn from")
    run = runs.start_run(settings, out, say)
    show_comparison(
        experiments.compare_run(run, say, methods=names, held_out=held_out, draws=draws)
    )
    tell(str(out / "report.html"))


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]
