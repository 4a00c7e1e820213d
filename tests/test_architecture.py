"""The package reads in the order of the method: the README's folder table, enforced.

Each folder imports only folders above it in that table, and no modules import each other in a
circle. Imports for type checkers alone count as well.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import networkx as nx
import pytest
from helpers.places import ROOT

import cdt_lens

PACKAGE = ROOT / "cdt_lens"
FOLDERS = re.findall(r"^\| `(\w+)/` \|", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
# Folders of equal standing: none of a row imports another.
SIDE_BY_SIDE = ({"decomposition", "planted"}, {"scoring", "finetuning", "interchange"})
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(path) for path in FILES}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, the package's own without `cdt_lens.`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: import *"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in whole if name.removeprefix("cdt_lens.") in MODULES}
            found |= modules or {str(node.module)}
    return {name.removeprefix("cdt_lens.") for name in found}


GRAPH = {name_of(path): imported(path) for path in FILES}


def test_the_table_lists_every_folder():
    assert sorted(FOLDERS) == sorted({name.split(".")[0] for name in MODULES})


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_up_the_table(module: str):
    own = module.split(".")[0]
    for target in GRAPH[module] & MODULES:
        folder = target.split(".")[0]
        assert FOLDERS.index(folder) <= FOLDERS.index(own), f"{module} imports {target}"
        beside = any({folder, own} <= row for row in SIDE_BY_SIDE)
        assert folder == own or not beside, f"{module} imports {target}"
    if own != "models":
        assert not any(name.split(".")[0] == "transformer_lens" for name in GRAPH[module])


def test_no_modules_import_each_other_in_a_circle():
    graph = nx.DiGraph((a, b) for a, targets in GRAPH.items() for b in targets & MODULES)
    assert [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_command_line_prints(path: Path):
    calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)]
    names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    assert "print" not in names or path.parent.name == "cli"


def test_the_top_level_shows_type_checkers_what_it_gives():
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    block = next(
        n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"
    )
    shown = {
        alias.name: str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert shown == {name: f"cdt_lens.{home}" for name, home in cdt_lens._HOMES.items()}


@pytest.mark.parametrize("name", sorted(cdt_lens._FORMER_HOMES))
def test_names_of_the_former_top_level_are_still_found(name: str):
    with pytest.warns(DeprecationWarning, match=name):
        assert getattr(cdt_lens, name) is not None
