"""The package reads in the order of the method: imports go to lower ranks, never sideways."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cdt_lens"
# The same table stands in the README ("Map of the package").
RANKS = [
    ["console", "errors", "markup"],
    [
        "artifacts",
        "caller_hooks",
        "display",
        "distributed",
        "fields",
        "graph_layout",
        "heads",
        "metrics",
        "rules",
        "sites",
        "widgets",
    ],
    ["artists", "checkpoints", "graph_nodes", "hugging_face", "model", "tasks"],
    ["answers", "hand_built", "mib_names", "planting", "tables"],
    [
        "figures",
        "graph_dot",
        "graph_figures",
        "hand_built_circuits",
        "trained_circuits",
        "transfer_tables",
    ],
    [
        "comparison_figures",
        "comparison_tables",
        "graph",
        "prompts",
        "sections",
        "slopes",
        "support",
        "transfer_figures",
        "weights",
    ],
    [
        "comparison_sections",
        "generators",
        "loading",
        "mib_files",
        "options",
        "provenance",
        "pseudo",
        "slices",
        "sources",
    ],
    [
        "baselines",
        "circuit",
        "comparison",
        "planted",
        "trainable",
        "transfer_config",
        "transfer_result",
        "transfer_sections",
    ],
    [
        "adapter",
        "datasets",
        "demo_model",
        "fetch",
        "head_scores",
        "interchange",
        "lora",
        "planted_comparison",
        "rule_hooks",
        "scopes",
    ],
    ["export", "choices", "finetune_result", "languages", "propagate"],
    ["evaluate", "insertion", "targets"],
    ["decompose"],
    ["ablation", "scores", "training", "views"],
    ["one_pass"],
    ["attribution", "edge_scores", "faithfulness", "finetune", "greedy"],
    ["edges", "report", "runs"],
    ["cells", "experiment", "measured_circuits", "timed_scores"],
    ["compare", "transfer"],
    ["demo"],
    ["commands", "convert_command"],
    ["compare_command"],
    ["cli"],
]
RANK = {module: rank for rank, row in enumerate(RANKS) for module in row}
KNOWS_TRANSFORMER_LENS = {"model", "loading"}
FILES = sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports(tree: ast.AST) -> set[str]:
    """Modules imported at run time; what stands under `if TYPE_CHECKING` is for types alone."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert all(alias.name != "*" for alias in node.names), "no import *"
            module = node.module or ""
            names |= (
                {f"cdt_lens.{a.name}" for a in node.names} if module == "cdt_lens" else {module}
            )
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_go_down(path: Path):
    source = path.read_text("utf-8")
    tree = ast.parse(source)
    found = imports(tree)
    ours = {name.split(".")[1] for name in found if name.startswith("cdt_lens.")}
    wrong = {name for name in ours if RANK[name] >= RANK[path.stem]}
    assert not wrong, f"{path.stem} (rank {RANK[path.stem]}) imports {wrong}"
    if path.stem not in KNOWS_TRANSFORMER_LENS:
        assert not any(name.split(".")[0] == "transformer_lens" for name in found)
    calls = {
        n.func.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    assert "print" not in calls or path.stem == "cli"
    assert len(source.splitlines()) <= 380, "one idea a file"


def test_every_module_has_a_rank():
    assert {path.stem for path in FILES} == set(RANK)
