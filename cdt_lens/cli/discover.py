"""The commands that find and measure a circuit: `discover`, `faithfulness`, `trace`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from cdt_lens.cli import arguments
from cdt_lens.cli.console import out, say
from cdt_lens.cli.show import show_heads, tell_graph


def discover(
    model: Annotated[str, typer.Option(help="Hub name, Hugging Face folder or .gguf file.")],
    out: Annotated[Path, typer.Option(help="Run directory; an interrupted run goes on there.")],
    task: arguments.TaskName = "nusax-senti",
    language: arguments.Language = None,
    data: arguments.Data = None,
    train: arguments.TrainFile = None,
    valid: Annotated[Path | None, typer.Option(help="Likewise, for faithfulness.")] = None,
    test: Annotated[Path | None, typer.Option(help="Likewise, for the last word.")] = None,
    template: arguments.Template = None,
    verbalizer: arguments.Verbalizer = None,
    label_column: arguments.LabelColumn = "label",
    shots: arguments.Shots = 0,
    calibrate: Annotated[
        bool, typer.Option(help="Take the label prior off before judging accuracy.")
    ] = False,
    examples: arguments.Scored = 48,
    baseline_examples: arguments.Averaged = None,
    rules: Annotated[
        Literal["two-ended", "shared", "stable", "official", "linear", "ablation"],
        typer.Option(help="Propagation rules."),
    ] = "two-ended",
    positions: arguments.Positions = "answer",
    direction: Annotated[
        Literal["mean", "strongest"], typer.Option(help="Competing labels.")
    ] = "mean",
    k: Annotated[int | None, typer.Option(min=1, help="Heads in the circuit.")] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Share of heads in the circuit; default 0.1.")
    ] = None,
    by: Annotated[
        Literal["magnitude", "signed"], typer.Option(help="How to rank heads.")
    ] = "signed",
    ablation: Annotated[
        bool, typer.Option(help="Also ablate each head exactly, and compare.")
    ] = False,
    backend: arguments.ModelClass = "auto",
    device: arguments.Device = None,
    dtype: arguments.Dtype = "float32",
    batch_size: arguments.BatchSize = 16,
    rows: arguments.Rows = None,
    seed: arguments.Seed = 0,
) -> None:
    """Score every head on a task and select its circuit.

    Writes baseline, scores and circuit into the run directory. Under `accelerate launch` the
    examples are shared out over the processes.
    """
    from cdt_lens.experiments import discovery as experiment, runs

    settings = arguments.task_settings(
        model=model, task=task, language=language, data=data,
        files={"train": train, "valid": valid, "test": test}, template=template,
        verbalizer=verbalizer, label_column=label_column, shots=shots, calibrate=calibrate,
        backend=backend, device=device, dtype=dtype, rules=rules, positions=positions,
        direction=direction, examples=examples, baseline_examples=baseline_examples, k=k,
        fraction=fraction, by=by, batch_size=batch_size, rows=rows, seed=seed,
    )  # fmt: skip
    run = runs.start_run(settings, out, say)
    circuit, scores, _ = experiment.discover(run, say)
    show_heads(scores, circuit)
    if ablation:
        found = experiment.ablate(run, say)
        print(
            f"against exact mean-ablation: Spearman {found.spearman:.3f}, "
            f"Pearson {found.pearson:.3f}"
        )
    print(f"circuit of {len(circuit)} heads: {run.path('circuit.json')}")


def faithfulness(
    run: Annotated[Path, typer.Argument(help="Run directory of cdt-lens discover.")],
    split: Annotated[str, typer.Option(help="Split that the scores have not seen.")] = "valid",
    examples: Annotated[int, typer.Option(min=1, help="Examples, balanced.")] = 48,
    metric: Annotated[
        Literal["direction", "accuracy", "balanced_accuracy"],
        typer.Option(help="The metric that f is computed from."),
    ] = "direction",
    draws: Annotated[int, typer.Option(min=1, help="Random circuits of each kind and size.")] = 5,
) -> None:
    """Keep the circuit, ablate the rest: the faithfulness curve beside random circuits."""
    from cdt_lens.experiments import discovery as experiment, runs

    opened = runs.open_run(run, say)
    curve = experiment.measure(
        opened, say, split=split, examples=examples, metric=metric, draws=draws
    )
    table = Table("heads", "fraction", "faithfulness", "completeness", *curve.random)
    for row in curve.to_dataframe().to_dict("records"):
        medians = [f"{row[f'{name} (median)']:.2f}" for name in curve.random]
        table.add_row(
            str(row["heads"]), f"{row['fraction']:g}", f"{row['faithfulness']:.2f}",
            f"{row['completeness']:.2f}", *medians,
        )  # fmt: skip
    out.print(table)
    print(f"metric {curve.metric}: {curve.full:.3f} with all heads, {curve.empty:.3f} with none")
    controls = "; ".join(
        f"{name} {float(curve.random_cpr[name].mean()):.3f} and "
        f"{float(curve.random_cmd[name].mean()):.3f}"
        for name in curve.random
    )
    print(f"CPR {curve.cpr:.3f}, CMD {curve.cmd:.3f} (mean of the controls: {controls})")
    print(opened.path("faithfulness.json"))


def trace(
    run: Annotated[Path, typer.Argument(help="Run directory of cdt-lens discover.")],
    examples: Annotated[
        int | None, typer.Option(min=1, help="Examples, balanced; default: the scored ones.")
    ] = None,
    width: Annotated[int, typer.Option(min=1, help="Heads and MLPs taken at the logits.")] = 8,
    fan_in: Annotated[int, typer.Option(min=1, help="Edges kept into each of them.")] = 3,
) -> None:
    """What feeds what, from the logits down: a circuit's graph, for `report` and `convert`."""
    from cdt_lens.experiments import discovery as experiment, runs

    opened = runs.open_run(run, say)
    circuit = experiment.trace(opened, say, examples=examples, width=width, fan_in=fan_in)
    if circuit.graph is not None:
        tell_graph(circuit.graph)
    print(f"graph of {len(circuit)} heads: {opened.path('graph.json')}")


def report(
    run: Annotated[Path, typer.Argument(help="Run directory of cdt-lens discover.")],
    prompts: Annotated[int, typer.Option(min=1, help="Example prompts to look at.")] = 3,
    heads: Annotated[int, typer.Option(min=1, help="Heads whose attention is shown.")] = 8,
) -> None:
    """One self-contained HTML file: scores, circuit, faithfulness, attention, tokens."""
    from cdt_lens.experiments import discovery as experiment, runs

    print(experiment.report(runs.open_run(run, say), say, prompts=prompts, heads=heads))
