"""Submissions to MIB: names, shapes, levels and sizes, read back as MIB's evaluation reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import sample_results
from typer.testing import CliRunner

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.graph import Edge, Graph, GraphNode
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.circuits.nodes import node_names, possible_edges
from cdt_lens.cli import app as cli
from cdt_lens.core.errors import InputError
from cdt_lens.interchange.graphs import (
    circuit_from_graph,
    graph_from_circuit,
    read_graph,
    write_graph,
)
from cdt_lens.interchange.mib_submission import (
    PERCENTAGES,
    PLACES,
    check_mib_submission,
    lacking,
    write_mib_submission,
)

GPT2 = {"n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "d_model": 768, "parallel": False}
N_EDGES = 32491  # of GPT-2 small, as EAP-IG counts them


def scores(**shape: Any) -> HeadScores:
    found = sample_results.scores(12, 12)
    return replace(found, provenance=replace(found.provenance, model_shape={**GPT2, **shape}))


def edges(n: int = N_EDGES, kept: int = 0, scored: bool = True) -> Graph:
    """A graph of GPT-2 small with scores at its first `n` edges, `kept` of them in the circuit."""
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(n, generator=draw).tolist()
    listed = list(possible_edges(12, 12))[:n]
    nodes = {name: GraphNode(None, True) for name in node_names(12, 12)}
    made = tuple(
        Edge(*ends, value if scored else None, number < kept)
        for number, (ends, value) in enumerate(zip(listed, values, strict=True))
        if scored or number < kept
    )
    return Graph(12, 12, nodes, made, d_model=768)


def run(*arguments: object) -> str:
    words = [str(argument) for argument in arguments]
    result = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_places_are_those_of_mibs_evaluation():
    assert set(PLACES) == {
        "ioi_gpt2", "ioi_qwen2.5", "ioi_gemma2", "ioi_llama3", "mcqa_qwen2.5", "mcqa_gemma2",
        "mcqa_llama3", "arithmetic-addition_llama3", "arithmetic-subtraction_llama3",
        "arc-easy_gemma2", "arc-easy_llama3", "arc-challenge_llama3", "ioi_interpbench",
    }  # fmt: skip
    assert len(list(possible_edges(12, 12))) == N_EDGES


def test_scores_of_heads_as_json(tmp_path: Path):
    """MIB reads cfg, nodes and edges; nodes without `score` are not ranked and always kept."""
    given = scores()
    (task,) = write_mib_submission({"ioi_gpt2": given}, tmp_path)
    assert (task.name, task.files, task.level) == ("ioi_gpt2", ("importances.json",), "node")
    assert (task.scored, task.total) == (144, 144)
    document = json.loads((tmp_path / "ioi_gpt2" / "importances.json").read_text("utf-8"))
    assert document["cfg"] == {
        "n_layers": 12, "n_heads": 12, "parallel_attn_mlp": False, "d_model": 768,
    }  # fmt: skip
    ranked = {name: node["score"] for name, node in document["nodes"].items() if "score" in node}
    assert len(ranked) == 144 and len(document["edges"]) == N_EDGES
    assert ranked["a3.h7"] == float(given.values[3, 7])
    assert {"input", "m0", "m11", "logits"} <= set(document["nodes"]) - set(ranked)
    # What MIB takes first: the largest signed scores.
    best = max(ranked, key=ranked.__getitem__)
    head = given.ranking()[0]
    assert best == f"a{head.layer}.h{head.head}"


def test_a_circuit_that_was_read_from_a_graph(tmp_path: Path):
    """It names no model; its graph knows the blocks, and the scores of MLPs."""
    write_mib_submission({"ioi_gpt2": scores()}, tmp_path / "first", ending="pt")
    graph = read_graph(tmp_path / "first" / "ioi_gpt2" / "importances.pt")
    circuit = circuit_from_graph(graph)
    saved = Circuit.load(circuit.save(tmp_path / "circuit.json"))
    for name, given in (("made", circuit), ("saved", saved)):
        (task,) = write_mib_submission({"ioi_gpt2": given}, tmp_path / name, ending="pt")
        assert (task.level, task.scored) == ("node", 144)
        assert read_graph(tmp_path / name / "ioi_gpt2" / "importances.pt") == graph


def test_scores_of_heads_as_pt(tmp_path: Path):
    given = scores()
    write_mib_submission({"ioi_gpt2": given}, tmp_path, ending="pt")
    loaded = torch.load(tmp_path / "ioi_gpt2" / "importances.pt", weights_only=True)
    assert {
        "cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph", "nodes_in_graph",
    } <= set(loaded)  # fmt: skip
    assert loaded["edges_scores"].shape == loaded["edges_in_graph"].shape == (157, 445)
    known = ~loaded["nodes_scores"].isnan()
    assert int(known.sum()) == 144
    row = loaded["src_nodes"].index("a3.h7")
    assert float(loaded["nodes_scores"][row]) == float(given.values[3, 7])


def test_edges_where_every_edge_has_a_score(tmp_path: Path):
    (task,) = write_mib_submission({"ioi_gpt2": edges()}, tmp_path)
    assert (task.level, task.scored, task.total) == ("edge", N_EDGES, N_EDGES)
    # A circuit whose graph has scores for some edges gives those of its heads.
    circuit = replace(scores().select(k=3), graph=edges(40))
    (task,) = write_mib_submission({"ioi_gpt2": circuit}, tmp_path)
    assert task.level == "node"


def test_what_a_result_does_not_tell_is_taken_from_mibs_model(tmp_path: Path):
    """Of a circuit without provenance, old scores and a graph without width."""
    given = scores()
    write_mib_submission({"ioi_gpt2": given}, tmp_path / "told")
    expected = read_graph(tmp_path / "told" / "ioi_gpt2" / "importances.json")
    bare = Circuit(given.ranking(), 12, 12, scores=given.values)
    old = {name: value for name, value in GPT2.items() if name != "parallel"}
    silent: dict[str, Any] = {
        "circuit": bare,
        "scores": replace(given, provenance=replace(given.provenance, model_shape=old)),
        "graph": graph_from_circuit(bare, parallel=False),
    }
    for name, result in silent.items():
        write_mib_submission({"ioi_gpt2": result}, tmp_path / name)
        assert read_graph(tmp_path / name / "ioi_gpt2" / "importances.json") == expected


def small() -> Circuit:
    values = torch.arange(12.0).reshape(3, 4)
    return Circuit([], 3, 4, scores=values)


def few() -> HeadScores:
    given = scores()
    values = given.values.clone()
    values[0, 0] = torch.nan
    return replace(given, values=values)


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "a name": (lambda: {"ioi_gpt": scores()}, r"'ioi_gpt': expected TASK_MODEL.*ioi_gpt2"),
    "a task with an underscore": (lambda: {"arc_easy_llama3": scores()}, "arc-easy_llama3"),
    "a task of another model": (lambda: {"mcqa_gpt2": scores()}, "mcqa_gpt2"),
    "another model": (
        lambda: {"ioi_qwen2.5": scores()}, r"\(12, 12, 768\).*ioi_qwen2.5 has \(24, 14, 896\)",
    ),
    "another width": (lambda: {"ioi_gpt2": scores(d_model=512)}, r"\(12, 12, 512\)"),
    "parallel blocks": (lambda: {"ioi_gpt2": scores(parallel=True)}, "parallel blocks"),
    "a head without a score": (
        lambda: {"ioi_gpt2": few()}, "0 of 32491 edges and 143 of 144 heads have a score",
    ),
    "some edges": (lambda: {"ioi_gpt2": edges(100)}, "100 of 32491 edges and 0 of 144 heads"),
    "other heads without width": (
        lambda: {"ioi_gpt2": graph_from_circuit(small(), parallel=False)}, r"\(3, 4, None\)",
    ),
    "unknown width, after another": (
        lambda: {
            "ioi_gpt2": scores(), "ioi_interpbench": graph_from_circuit(small(), parallel=False),
        },
        r"results\['ioi_interpbench'\]: .*give dataclasses.replace\(graph, d_model=\.\.\.\)",
    ),
    "unknown blocks": (
        lambda: {"ioi_interpbench": small()},
        r"results\['ioi_interpbench'\]: .*give graph_from_circuit\(circuit, parallel=\.\.\.\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_mib_could_not_read_is_refused_and_nothing_is_written(mistake: str, tmp_path: Path):
    given, said = REFUSED[mistake]
    with pytest.raises(InputError, match=said):
        write_mib_submission(given(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def circuits(place: Path, sizes: list[int]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        write_graph(edges(size, kept=size, scored=False), place / f"{number}.pt")


def test_single_circuits_are_checked_by_size(tmp_path: Path):
    limits = [int(p / 100 * N_EDGES) for p in PERCENTAGES]
    circuits(tmp_path / "ioi_gpt2", limits)
    (task,) = check_mib_submission(tmp_path)
    assert (task.level, task.scored, task.total) == ("circuits", limits[-1], N_EDGES)
    assert len(task.files) == 9
    circuits(tmp_path / "ioi_gpt2", [limits[0] + 1])
    with pytest.raises(InputError, match=r"0\.pt: 33 of 32491 edges; expected at most 0.1 %"):
        check_mib_submission(tmp_path)
    circuits(tmp_path / "ioi_gpt2", [0, *limits])  # an empty one beside them
    assert len(check_mib_submission(tmp_path)[0].files) == 10
    for number in range(3):
        (tmp_path / "ioi_gpt2" / f"{number}.pt").unlink()
    with pytest.raises(InputError, match=r"ioi_gpt2: 7 files .* expected one .* or 9 circuits"):
        check_mib_submission(tmp_path)


def test_a_folder_that_mib_would_pass_over_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="no such folder"):
        check_mib_submission(tmp_path / "none")
    with pytest.raises(InputError, match=r"no folder such as ioi_gpt2"):
        check_mib_submission(tmp_path)
    write_mib_submission({"ioi_gpt2": scores()}, tmp_path)
    flat = json.loads((tmp_path / "ioi_gpt2" / "importances.json").read_text("utf-8"))
    for node in flat["nodes"].values():
        node.pop("score", None)
    flat.pop("edges_scored")
    (tmp_path / "ioi_gpt2" / "importances.json").write_text(json.dumps(flat), "utf-8")
    with pytest.raises(InputError, match=r"importances.json: it ranks neither edges nor nodes"):
        check_mib_submission(tmp_path)
    (tmp_path / "ioi_gpt2").rename(tmp_path / "gpt2_ioi")
    with pytest.raises(InputError, match=r"'gpt2_ioi': expected TASK_MODEL"):
        check_mib_submission(tmp_path)
    circuits(tmp_path / "x" / "ioi_gpt2", [3])
    with pytest.raises(InputError, match=r"ioi_gpt2: holds 0.pt; .*Move the others away"):
        write_mib_submission({"ioi_gpt2": scores()}, tmp_path / "x")


def test_heads_are_counted_where_mlps_have_scores_too(tmp_path: Path):
    given = graph_from_circuit(scores().circuit(scores().ranking(), {}))
    nodes = {name: replace(n, score=n.score or 0.5) for name, n in given.nodes.items()}
    nodes["logits"] = given.nodes["logits"]
    (task,) = write_mib_submission({"ioi_gpt2": replace(given, nodes=nodes)}, tmp_path)
    assert (task.level, task.scored, task.total) == ("node", 144, 144)
    document = json.loads((tmp_path / "ioi_gpt2" / "importances.json").read_text("utf-8"))
    assert sum("score" in node for node in document["nodes"].values()) == 157


def test_options_and_folders_that_cannot_be_meant(tmp_path: Path):
    write_mib_submission({"ioi_gpt2": scores()}, tmp_path / "out")
    file = tmp_path / "out" / "ioi_gpt2" / "importances.json"
    with pytest.raises(InputError, match="--ending pt: has no effect without --add; omit it"):
        run("mib-submission", tmp_path / "out", "--ending", "pt")
    for more in ([], ["--add", f"ioi_gpt2={file}"]):
        with pytest.raises(InputError, match=r"importances.json: is a file. Name the folder"):
            run("mib-submission", file, *more)
    run("mib-submission", tmp_path / "two", "--add", f"ioi_gpt2={file}", "--ending", "pt")
    assert (tmp_path / "two" / "ioi_gpt2" / "importances.pt").is_file()


def test_the_command_writes_and_checks(tmp_path: Path):
    """A run directory, then a circuit of the same scores; one task is not yet a submission."""
    (tmp_path / "run").mkdir()
    scores().save(tmp_path / "run" / "scores.json")
    scores().select(k=4).save(tmp_path / "circuit.json")
    out = tmp_path / "out"
    printed = " ".join(run("mib-submission", out, "--add", f"ioi_gpt2={tmp_path / 'run'}").split())
    assert "144 of 144" in printed
    assert "at least 2 tasks and 2 models; this one has 1 of tasks, 1 of models" in printed
    first = json.loads((out / "ioi_gpt2" / "importances.json").read_text("utf-8"))
    run("mib-submission", out, "--add", f"ioi_gpt2={tmp_path / 'circuit.json'}")
    again = json.loads((out / "ioi_gpt2" / "importances.json").read_text("utf-8"))
    ranked = [{k: v.get("score") for k, v in d["nodes"].items()} for d in (first, again)]
    assert ranked[0] == ranked[1]
    assert "144 of 144" in run("mib-submission", out)
    for wrong in ("ioi_gpt2", "=file", "ioi_gpt2="):
        with pytest.raises(InputError):
            run("mib-submission", out, "--add", wrong)
    with pytest.raises(InputError, match="none: no such file or run directory"):
        run("mib-submission", out, "--add", f"ioi_gpt2={tmp_path / 'none'}")
    (task,) = check_mib_submission(out)
    assert lacking([task, replace(task, name="mcqa_qwen2.5")]) == ""
    assert "1 of models" in lacking([task, replace(task, name="mcqa_gpt2")])
