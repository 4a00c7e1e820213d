"""`cdt-lens convert`: circuits to other tools and back, and mistakes in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import sample_graph, sample_results
from helpers.saved import TEMPLATE, VERBALIZER, save_model, write_task
from typer.testing import CliRunner

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.graph import Graph, GraphNode
from cdt_lens.circuits.nodes import OTHER_UNIT, OWN_UNIT, node_names
from cdt_lens.cli import app as cli
from cdt_lens.core.errors import ArtifactError, CdtLensError, InputError
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.interchange.graphs import read_graph, write_graph
from cdt_lens.models.heads import Head


def run(*arguments: object) -> str:
    words = [str(argument) for argument in arguments]
    result = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def small() -> Circuit:
    graph = sample_graph.small()
    return Circuit(graph.heads, 2, 2, graph=graph)


@pytest.mark.parametrize("ending", [".json", ".pt", ".graphml"])
def test_a_circuit_goes_out_and_comes_back(ending: str, tmp_path: Path):
    circuit = small()
    theirs, again = tmp_path / f"theirs{ending}", tmp_path / "again.json"
    printed = run("convert", circuit.save(tmp_path / "c.json"), theirs)
    assert "2 of 4 heads, 6 edges" in printed and theirs.name in printed.replace("\n", "")
    printed = run("convert", theirs, again, "--to", "circuit")
    assert "circuit of 2 of 4 heads" in printed
    found = Circuit.load(again)
    assert found.heads == circuit.heads
    assert found.selection["file"] == theirs.name
    assert found.graph is not None
    assert [e.name for e in found.graph.kept_edges] == [e.name for e in small().graph.kept_edges]  # type: ignore[union-attr]
    shown = run("show", again)
    assert "L0H1" in shown and "graph of 6 nodes and 6 edges" in shown
    assert "input->L0H1<v>" in shown and "+0.5000" in shown


def test_between_the_layouts_and_to_graphviz(tmp_path: Path):
    one = write_graph(sample_graph.small(), tmp_path / "one.json")
    run("convert", one, tmp_path / "two.pt")
    assert read_graph(tmp_path / "two.pt").heads == sample_graph.small().heads
    run("convert", tmp_path / "two.pt", tmp_path / "three.dot")
    assert (tmp_path / "three.dot").read_text().startswith("digraph")


def test_a_circuit_of_heads_alone(tmp_path: Path):
    path = sample_results.scores(2, 2).select(k=1).save(tmp_path / "c.json")
    run("convert", path, tmp_path / "g.json", "--parallel")
    document = json.loads((tmp_path / "g.json").read_text())
    assert document["cfg"] == {
        "n_layers": 2, "n_heads": 2, "parallel_attn_mlp": True, "d_model": 576,
    }  # fmt: skip
    bare = Circuit(sample_graph.small().heads, 2, 2).save(tmp_path / "bare.json")
    with pytest.raises(InputError, match="does not tell whether attention and MLP"):
        run("convert", bare, tmp_path / "bare.pt")
    with pytest.raises(InputError, match="give it as d_model"):
        run("convert", bare, tmp_path / "bare.pt", "--sequential")
    run("convert", bare, tmp_path / "bare.pt", "--d-model", "16", "--sequential")
    assert read_graph(tmp_path / "bare.pt").d_model == 16


def test_a_circuit_of_another_tool_can_be_trained(tmp_path: Path):
    save_model(tmp_path / "tiny")
    write_task(tmp_path / "data")
    nodes = {name: GraphNode(None, name in ("L0H1", "M0", "L1H2")) for name in node_names(2, 4)}
    theirs = write_graph(Graph(2, 4, nodes, (), d_model=64), tmp_path / "theirs.pt")
    run("convert", theirs, tmp_path / "c.json", "--to", "circuit")
    words = [x for label, word in VERBALIZER.items() for x in ("--verbalizer", f"{label}={word}")]
    files = [x for s in ("train", "valid") for x in (f"--{s}", tmp_path / "data" / f"{s}.csv")]
    run(
        "finetune", "--model", tmp_path / "tiny", "--circuit", tmp_path / "c.json", "--out",
        tmp_path / "out", "--task", "files", *files, "--template", TEMPLATE, *words, "--epochs", 1,
    )  # fmt: skip
    adapter = Adapter.load(tmp_path / "out")
    assert adapter.heads == (Head(0, 1), Head(1, 2))


def test_scores_are_shown_in_their_unit(tmp_path: Path):
    """Those of another tool, of learned gates and of a seed are in no unit of ours."""
    nodes = {
        name: GraphNode(0.25 if name.startswith("L0") else None, name != "M1")
        for name in node_names(2, 2)
    }
    for unit in (OWN_UNIT, OTHER_UNIT):
        graph = Graph(2, 2, nodes, (), d_model=64, unit=unit)
        theirs = write_graph(graph, tmp_path / "theirs.json")
        again = tmp_path / "again.json"
        run("convert", theirs, again, "--to", "circuit")
        shown = run("show", again)
        assert ("(logits)" in shown) == (unit == OWN_UNIT)
        assert "+0.2500" in shown and "nan" not in shown
        again.unlink()
    for method in ("cdt", "gates", "random"):
        scores = sample_results.scores(2, 2, method=method)
        scores = replace(scores, stderr=torch.full_like(scores.stderr, torch.nan))
        for saved in (
            scores.save(tmp_path / method),
            scores.select(k=2).save(tmp_path / f"{method}.json"),
        ):
            shown = run("show", saved)
            assert ("(logits)" in shown) == (method == "cdt") and "nan" not in shown


def test_mistakes_are_told_and_write_nothing(tmp_path: Path):
    ours = small().save(tmp_path / "c.json")
    theirs = write_graph(sample_graph.small(), tmp_path / "g.json")
    none = write_graph(small().graph.pruned(), tmp_path / "none.json")  # type: ignore[union-attr]
    document = json.loads(none.read_text())
    for name, node in document["nodes"].items():
        node["in_graph"] = not name.startswith("a")
    none.write_text(json.dumps(document))
    (tmp_path / "cut.json").write_text(theirs.read_text()[:99])
    scores = sample_results.scores(2, 2).save(tmp_path / "s.json")
    to_circuit = [tmp_path / "x.json", "--to", "circuit"]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    small().save(tmp_path / "run" / "circuit.json")
    kept = (tmp_path / "run" / "circuit.json").read_bytes()
    mistakes: list[tuple[list[object], str, type[CdtLensError]]] = [
        ([ours, ours], "is the file to convert", InputError),
        ([theirs, ours], "c.json: is a result of cdt-lens", InputError),
        ([tmp_path / "run", tmp_path / "run" / "circuit.json"], "is the file to conv", InputError),
        ([ours, tmp_path / "x.json", "--to", "circuit"], "circuit of cdt-lens already", InputError),
        ([ours, tmp_path / "x.yaml"], "x.yaml: expected a graph to go to", InputError),
        ([theirs, tmp_path / "x.pt", "--to", "circuit"], "expected a circuit to go to", InputError),
        (
            [theirs, tmp_path / "x.json", "--to", "circuit", "--d-model", "8"],
            "--d-model: a circuit does not hold it",
            InputError,
        ),
        (
            [theirs, tmp_path / "x.json", "--to", "circuit", "--sequential"],
            "--parallel/--sequential: a circuit does not hold it",
            InputError,
        ),
        ([none, tmp_path / "x.json", "--to", "circuit"], "no head belongs", InputError),
        ([tmp_path / "no.json", tmp_path / "x.pt"], "no.json: no such file", InputError),
        ([tmp_path / "cut.json", tmp_path / "x.pt"], "cut.json: damaged", ArtifactError),
        ([scores, tmp_path / "x.pt"], "expected a cdt_lens.circuit file", ArtifactError),
        (
            [scores, *to_circuit],
            "expected a cdt_lens.circuit file, got 'cdt_lens.sc",
            ArtifactError,
        ),
        ([tmp_path / "no", tmp_path / "x.pt"], "no: no such file or folder", InputError),
    ]
    for arguments, told, error in mistakes:
        with pytest.raises(error, match=told):
            run("convert", *arguments)
    found = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert found == before and (tmp_path / "run" / "circuit.json").read_bytes() == kept
