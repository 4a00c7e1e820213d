"""The folder that MIB's circuit track takes as a submission: written from our files, and checked.

1. A submission has one folder for each model and task, named as MIB's evaluation names them, such
   as "ioi_gpt2" and "arc-easy_llama3" (`COL_MAPPING` of hannamw/MIB-circuit-track).
2. A folder holds one file of importances, .json or .pt, from which MIB takes its circuits of 0.1 %
   to 100 % of the edges or nodes itself; or files of single circuits, at most 0.1, 0.2, 0.5, 1, 2,
   5, 10, 20 and 50 % of the edges, with an empty one beside them or not.
3. Importances are of edges, or of nodes. Ours are of nodes where only heads have scores. MIB keeps
   nodes without a score (MLPs and the input) in every circuit.
4. MIB ranks by the signed score, the largest first, or by the magnitude. Positive scores help there
   as here.

This module writes importances. Circuits that MIB ranks itself are nested; files of single circuits
are checked alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.graph import Graph
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.circuits.nodes import possible_edges
from cdt_lens.core import display
from cdt_lens.core.artifacts import artifact_format
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.errors import InputError, did_you_mean
from cdt_lens.interchange.graphs import graph_from_circuit, read_graph, write_graph

Ending = Literal["json", "pt"]
# Layers, heads per layer and width of the models that MIB evaluates, none of which has parallel
# blocks. The model of InterpBench is not published beside the others.
MODELS: Mapping[str, tuple[int, int, int] | None] = MappingProxyType(
    {
        "gpt2": (12, 12, 768), "qwen2.5": (24, 14, 896), "gemma2": (26, 8, 2304),
        "llama3": (32, 32, 4096), "interpbench": None,
    }
)  # fmt: skip
_TASKS_OF = {
    "gpt2": ("ioi",), "interpbench": ("ioi",), "qwen2.5": ("ioi", "mcqa"),
    "gemma2": ("ioi", "mcqa", "arc-easy"),
    "llama3": (
        "ioi", "mcqa", "arithmetic-addition", "arithmetic-subtraction", "arc-easy", "arc-challenge",
    ),
}  # fmt: skip
# The folders of a submission.
PLACES = tuple(f"{task}_{model}" for model in MODELS for task in _TASKS_OF[model])
# Limits of the files of single circuits, in per cent of the edges.
PERCENTAGES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)


@dataclass(frozen=True)
class SubmittedTask:
    """One folder of a submission.

    Attributes:
        name: name of the folder, the task and the model.
        files: names of its files.
        level: whether importances are of "edge" or "node", or "circuits" for single circuits.
        scored: number of edges or heads with a score; of circuits, the edges of the largest.
        total: number of edges of the model; of heads at the level "node".
    """

    name: str
    files: tuple[str, ...]
    level: Literal["edge", "node", "circuits"]
    scored: int
    total: int


@checked_arguments
def write_mib_submission(
    results: Mapping[str, Graph | Circuit | HeadScores],
    folder: str | Path,
    *,
    ending: Ending = "json",
) -> tuple[SubmittedTask, ...]:
    """Write importances into a submission folder, and check the whole folder.

    Args:
        results: a graph, a circuit with scores, or scores, by the name of the folder, such as
            "ioi_gpt2". Edges are written where a graph has a score for each, else heads.
        folder: the submission. Its other folders stay.
        ending: the format of the files. At the size of Llama a .json has 100 MB, a .pt 20 MB.

    Returns:
        The folders of the submission, those of earlier calls too.

    Raises:
        InputError: a name is none of MIB's, a result is of a model of another shape or of one whose
            shape is not known, not every head or edge has a score, or another file is in the way.
        ArtifactError: a file of the folder is damaged.
    """
    _check_folder(Path(folder))
    graphs = {}
    for name, result in results.items():
        _check_name(name, "results")
        where = f"results[{name!r}]"
        graphs[name] = _with_width(_importances(result, name), name, where)
        _check_shape(graphs[name], name, where)
        present = [path.name for path in _files_in(Path(folder, name))]
        if present and present != [f"importances.{ending}"]:
            raise InputError(
                f"{Path(folder, name)}: holds {display.few(present, 4)}; a folder takes one file "
                "of importances. Move the others away."
            )
    for name, graph in graphs.items():
        write_graph(graph, Path(folder, name, f"importances.{ending}"))
    return check_mib_submission(folder)


@checked_arguments
def check_mib_submission(folder: str | Path) -> tuple[SubmittedTask, ...]:
    """Check a submission folder as MIB's evaluation reads it.

    Args:
        folder: the submission.

    Returns:
        Its folders, in order of their names.

    Raises:
        InputError: a folder has another name, another number of files, a model of another shape,
            importances that are all the same, or a circuit with too many edges. The message names
            the file.
        ArtifactError: a file is damaged.
    """
    folder = Path(folder)
    _check_folder(folder)
    if not folder.exists():
        raise InputError(
            f"{folder}: no such folder; expected one with {', '.join(PLACES[:2])}, ..."
        )
    places = sorted(path for path in folder.iterdir() if path.is_dir())
    places = [path for path in places if not path.name.startswith(".")]
    if not places:
        raise InputError(f"{folder}: no folder such as {PLACES[0]} in it, so there is nothing yet")
    return tuple(_checked(path) for path in places)


def lacking(tasks: Sequence[SubmittedTask]) -> str:
    """Return what a submission lacks before MIB counts it, or "".

    Args:
        tasks: the folders of the submission.
    """
    parts = [each.name.split("_", 1) for each in tasks]
    counts = {"tasks": len({task for task, _ in parts}), "models": len({m for _, m in parts})}
    few = [f"{count} of {what}" for what, count in counts.items() if count < 2]
    if not few:
        return ""
    return f"MIB takes submissions of at least 2 tasks and 2 models; this one has {', '.join(few)}"


def submitted(path: str | Path) -> Graph | Circuit | HeadScores:
    """Read what is to be submitted: scores or a circuit of this package, a graph, or a run.

    Args:
        path: scores.json, circuit.json or graph.json of a run, a graph of MIB or .graphml, or the
            directory of a run, whose scores.json is taken.

    Raises:
        InputError: there is no such file, or it is of another kind.
        ArtifactError: the file is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or run directory")
    path = path / "scores.json" if path.is_dir() else path
    kind = artifact_format(path) if path.suffix == ".json" else ""
    if kind == HeadScores._format:
        return HeadScores.load(path)
    if kind == Circuit._format:
        return Circuit.load(path)
    return read_graph(path)


def _importances(result: Graph | Circuit | HeadScores, name: str) -> Graph:
    """Return the graph of a result, with a score for every edge or for every head.

    Raises:
        InputError: some have no score.
    """
    if isinstance(result, HeadScores):
        result = result.circuit(result.ranking(), {})
    if isinstance(result, Circuit):
        own = result.graph
        level = None if own is None else _level(own)
        if own is not None and (level == "edge" or (level == "node" and own.direct)):
            return graph_from_circuit(result)
        result = graph_from_circuit(replace(result, graph=None), parallel=_parallel(result, name))
    if _level(result) is None:
        scored = sum(edge.score is not None for edge in result.edges)
        heads = sum(_is_head(n) and node.score is not None for n, node in result.nodes.items())
        raise InputError(
            f"{name}: {scored} of {_n_edges(result)} edges and {heads} of "
            f"{result.n_layers * result.n_heads} heads have a score. MIB ranks all edges or all "
            "heads: give the scores of all heads, or a graph with a score for every edge."
        )
    return result


def _parallel(circuit: Circuit, name: str) -> bool:
    """Return whether a circuit is of parallel blocks; where it does not tell, as in MIB's model.

    Raises:
        InputError: MIB's model is not known.
    """
    recorded = {} if circuit.provenance is None else circuit.provenance.model_shape
    known = recorded.get("parallel") if circuit.graph is None else circuit.graph.parallel
    if known is None and _shape_of(name) is None:
        raise InputError(
            f"results[{name!r}]: it does not tell whether attention and MLP of a layer read the "
            "same stream; give graph_from_circuit(circuit, parallel=...) in its place"
        )
    return bool(known)


def _with_width(graph: Graph, name: str, where: str) -> Graph:
    """Return a graph with its width; where it is not known, that of MIB's model of the same heads.

    Raises:
        InputError: MIB's model is not known.
    """
    shape, own = _shape_of(name), (graph.n_layers, graph.n_heads)
    if graph.d_model is not None:
        return graph
    if shape is None:
        raise InputError(
            f"{where}: the width of the residual stream is not known, and MIB's files hold it; "
            "give dataclasses.replace(graph, d_model=...)"
        )
    return replace(graph, d_model=shape[2]) if own == shape[:2] else graph


def _level(graph: Graph) -> Literal["edge", "node"] | None:
    """Return what a graph ranks: all edges, or all heads, or None.

    A file in which every edge has the same score ranks no edges.
    """
    edges = [edge.score for edge in graph.edges if edge.score is not None]
    if len(edges) == _n_edges(graph) and len(set(edges)) > 1:
        return "edge"
    nodes = [node.score for name, node in graph.nodes.items() if _is_head(name)]
    known = [score for score in nodes if score is not None]
    whole = len(known) == graph.n_layers * graph.n_heads
    return "node" if whole and len(set(known)) > 1 else None


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file. Name the folder of the submission.")


def _is_head(name: str) -> bool:
    return name.startswith("L")


def _n_edges(graph: Graph) -> int:
    return sum(1 for _ in possible_edges(graph.n_layers, graph.n_heads, parallel=graph.parallel))


def _check_name(name: str, where: str) -> None:
    if name not in PLACES:
        raise InputError(
            f"{where}: {name!r}: expected TASK_MODEL{did_you_mean(name, PLACES)}; one of "
            f"{', '.join(PLACES)}"
        )


def _shape_of(name: str) -> tuple[int, int, int] | None:
    return MODELS[name.split("_", 1)[1]]


def _check_shape(graph: Graph, name: str, where: str) -> None:
    shape = _shape_of(name)
    own = (graph.n_layers, graph.n_heads, graph.d_model)
    if shape is not None and (own != shape or graph.parallel):
        blocks = ", parallel blocks" if graph.parallel else ""
        raise InputError(
            f"{where}: layers, heads and width {own}{blocks}, but MIB's model of {name} has {shape}"
        )


def _files_in(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    return sorted(path for path in place.iterdir() if path.suffix in (".json", ".pt"))


def _checked(place: Path) -> SubmittedTask:
    """Check one folder."""
    _check_name(place.name, str(place))
    files = _files_in(place)
    names = tuple(path.name for path in files)
    if len(files) == 1:
        return _checked_importances(place.name, files[0])
    if len(files) not in (len(PERCENTAGES), len(PERCENTAGES) + 1):
        raise InputError(
            f"{place}: {len(files)} files of .json and .pt; expected one with importances, or "
            f"{len(PERCENTAGES)} circuits of at most {', '.join(f'{p:g}' for p in PERCENTAGES)} % "
            "of the edges"
        )
    sizes, total = [], 0
    for path in files:
        graph = read_graph(path)
        _check_shape(graph, place.name, str(path))
        total = _n_edges(graph)
        sizes.append((sum(edge.in_graph for edge in graph.edges), path))
    sizes.sort(key=lambda pair: pair[0])
    limits = [0.0] * (len(files) - len(PERCENTAGES)) + list(PERCENTAGES)
    for (size, path), limit in zip(sizes, limits, strict=True):
        if size > limit / 100 * total:
            raise InputError(
                f"{path}: {size} of {total} edges; expected at most {limit:g} % of them, as the "
                f"circuit number {limits.index(limit) + 1} of this folder by size"
            )
    return SubmittedTask(place.name, names, "circuits", sizes[-1][0], total)


def _checked_importances(name: str, path: Path) -> SubmittedTask:
    graph = read_graph(path)
    _check_shape(graph, name, str(path))
    level = _level(graph)
    if level is None:
        raise InputError(
            f"{path}: it ranks neither edges nor nodes: not all edges and not all heads have a "
            "score, or all scores are the same"
        )
    if level == "edge":
        total = _n_edges(graph)
        return SubmittedTask(name, (path.name,), level, total, total)
    total = graph.n_layers * graph.n_heads  # all of them have a score; MLPs may have one, too
    return SubmittedTask(name, (path.name,), level, total, total)
