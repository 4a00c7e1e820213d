"""The commands that find and measure a circuit: `discover`, `faithfulness`, `trace`, `report`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cdt_lens.cli.arguments import (
    Out,
    RunFolder,
    TestFile,
    TrainFile,
    ValidFile,
    Verbalizer,
    settings_of,
    with_options,
)
from cdt_lens.cli.console import lead_on, say, tell
from cdt_lens.cli.show import show_curve, show_edge_faithfulness, show_heads, tell_graph
from cdt_lens.core.choices import Empty, Metric
from cdt_lens.core.errors import InputError
from cdt_lens.experiments.settings import Settings

_PROMPTS, _HEADS = 3, 8  # that a page shows
_OPTIONS = (
    "model", "task", "language", "data", "template", "label_column", "split", "pair", "pair_label",
    "baseline", "shots", "calibrate", "examples", "baseline_examples", "exact", "precision",
    "minutes", "decide", "correct_only", "rules", "positions", "direction", "k", "fraction", "by",
    "backend", "device", "dtype", "batch_size", "rows", "seed",
)  # fmt: skip


@with_options(given=(Settings, _OPTIONS))
def discover(
    given: dict[str, Any],
    out: Out,
    train: TrainFile = None,
    valid: ValidFile = None,
    test: TestFile = None,
    verbalizer: Verbalizer = None,
    ablation: Annotated[
        bool, typer.Option(help="Also ablate each head exactly, and compare the scores with it.")
    ] = False,
) -> None:
    """Score every head on a task and select its circuit.

    Writes the baseline, the scores and the circuit into the run directory. Under
    `accelerate launch` the examples are divided between the processes.
    """
    from cdt_lens.experiments import discovery as experiment, runs

    settings = settings_of(given, {"train": train, "valid": valid, "test": test}, verbalizer)
    if test is None:  # faithfulness needs rows that are not scored
        settings.require_valid("discover")
    run = runs.start_run(settings, out, say)
    circuit, scores, _ = experiment.discover(run, say)
    show_heads(scores, circuit)
    if ablation:
        agreement = experiment.ablate(run, say)
        tell(
            f"agreement with exact mean-ablation: Spearman {agreement.spearman:.3f}, "
            f"Pearson {agreement.pearson:.3f}"
        )
    tell(f"circuit of {len(circuit)} heads: {run.path('circuit.json')}")
    lead_on(["faithfulness", out], ["report", out])


def faithfulness(
    run: RunFolder,
    split: Annotated[
        str, typer.Option(help="Split to measure on; the scores should not have seen it.")
    ] = "valid",
    examples: Annotated[
        int, typer.Option(min=1, help="Number of examples, balanced over the labels.")
    ] = 48,
    metric: Annotated[
        Metric, typer.Option(help="What the circuit should keep of the full model.")
    ] = "direction",
    draws: Annotated[
        int, typer.Option(min=1, help="Number of random circuits of each kind and size.")
    ] = 5,
    empty: Annotated[
        Empty,
        typer.Option(
            help="What the run replaces that counts as f = 0: the heads, or all of heads, MLPs and "
            "input, as in MIB."
        ),
    ] = "heads",
    graph: Annotated[
        Path | None,
        typer.Option(
            help="Measure this graph of direct edges instead (.json, .pt or .graphml), such as a "
            "circuit of EAP-IG or MIB."
        ),
    ] = None,
) -> None:
    """Measure the faithfulness of the circuit with every other head ablated.

    Random circuits of the same sizes are measured as well. With --graph every direct edge outside
    the graph is ablated, and nothing is written.
    """
    from cdt_lens.experiments import discovery as experiment, runs

    wanted: dict[str, Any] = {
        "split": split, "examples": examples, "metric": metric, "draws": draws,
        "empty": empty,
    }  # fmt: skip
    if graph is not None:
        if empty != "heads":
            raise InputError("--empty: of a graph of direct edges, a run without any edge is f = 0")
        wanted.pop("empty")
        _measure_graph(run, graph, wanted)
        return
    opened = runs.open_run(run, say, partial(experiment.check_measure, **wanted))
    curve = experiment.measure(opened, say, **wanted)
    show_curve(curve)
    tell(str(opened.path("faithfulness.json")))
    lead_on(["report", run])


def _measure_graph(run: Path, file: Path, wanted: dict[str, Any]) -> None:
    from cdt_lens.experiments import discovery as experiment, runs
    from cdt_lens.interchange.graphs import read_graph

    graph = read_graph(file)

    def check(_folder: Path, settings: Settings, task: Any) -> None:
        experiment.judged_on(task, wanted["split"], wanted["examples"], settings.seed)

    opened = runs.open_run(run, say, check)
    show_edge_faithfulness(experiment.measure_graph(opened, say, graph, **wanted))


def trace(
    run: RunFolder,
    examples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of examples, balanced over the labels; default: those that were "
            "scored.",
        ),
    ] = None,
    width: Annotated[
        int, typer.Option(min=1, help="Number of heads and MLPs to keep below the logits.")
    ] = 8,
    fan_in: Annotated[
        int, typer.Option(min=1, help="Number of edges to keep into each head or MLP.")
    ] = 3,
) -> None:  # fmt: skip
    """Trace from the logits down which heads and MLPs feed which.

    Writes the graph of the circuit, which `report` draws and `convert` writes for other tools.
    """
    from cdt_lens.experiments import discovery as experiment, runs

    wanted: dict[str, Any] = {"examples": examples, "width": width, "fan_in": fan_in}
    opened = runs.open_run(run, say, partial(experiment.check_trace, **wanted))
    circuit = experiment.trace(opened, say, **wanted)
    if circuit.graph is not None:
        tell_graph(circuit.graph)
    tell(f"graph of {len(circuit)} heads: {opened.path('graph.json')}")
    lead_on(["report", run])


def report(
    run: RunFolder,
    prompts: Annotated[
        int, typer.Option(min=1, help="Number of example prompts to show.")
    ] = _PROMPTS,
    heads: Annotated[
        int, typer.Option(min=1, help="Number of heads whose attention is shown.")
    ] = _HEADS,
) -> None:
    """Write one self-contained HTML file of the run.

    It shows the scores, the circuit, its faithfulness, and attention and relevance on prompts.
    """
    from cdt_lens.experiments import discovery as experiment, runs

    page = run / "report.html"
    if (run / "adapter.json").is_file() and page.is_file():  # `finetune` has written it
        if (prompts, heads) != (_PROMPTS, _HEADS):
            option = "--prompts" if prompts != _PROMPTS else "--heads"
            raise InputError(
                f"{option}: has no effect with {run}, whose page cdt-lens finetune has written; "
                "omit it"
            )
        tell(str(page))
        return
    opened = runs.open_run(run, say, experiment.check_report)
    tell(str(experiment.report(opened, say, prompts=prompts, heads=heads)))
