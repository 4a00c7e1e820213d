"""The guides: their code runs in order, and what they say of messages, files and tests is so."""

from __future__ import annotations

import ast
import re
import tomllib
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.pages import blocks_of, commands, save_demo
from helpers.places import ROOT
from typer.testing import CliRunner

from cdt_lens.cli import app as cli
from cdt_lens.core.errors import CdtLensWarning

DOCS = ROOT / "docs"
GUIDES = sorted((DOCS / "guide").glob("*.md"))
WITH_PYTHON = [
    page for page in GUIDES if any(language == "python" for language, _ in blocks_of(page))
]
RUN = ("practitioner",)  # pages whose commands run, too; those of the others are only read
QUOTED = re.compile(r"^`([^`]+)`\n: ", re.MULTILINE)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_demo(tmp_path_factory.mktemp("demo"))


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_the_code_of_a_guide_runs_in_order(
    page: Path, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(demo)
    names: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CdtLensWarning)  # the model is small, and the rows are few
        for language, code in blocks_of(page):
            if language == "python":
                exec(compile(code, page.name, "exec"), names)
            elif language == "bash" and page.stem in RUN:
                for words in commands(code):
                    ran = CliRunner().invoke(cli.app, words, catch_exceptions=False)
                    assert ran.exit_code == 0, (words, ran.output)


@cache
def messages() -> tuple[str, ...]:
    """Return every text in the code; what an f-string fills in is left out."""
    texts = []
    for path in sorted((ROOT / "cdt_lens").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "\0" for p in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return tuple(texts)


@pytest.mark.parametrize("quoted", QUOTED.findall((DOCS / "guide/refusals.md").read_text("utf-8")))
def test_the_messages_that_the_page_of_refusals_quotes_are_in_the_code(quoted: str):
    parts = [part.strip() for part in quoted.split("...")]
    assert any(all(part in text for part in parts) for text in messages())


@pytest.mark.parametrize(
    "page", [*sorted((DOCS / "contributing").glob("*.md")), DOCS / "correctness.md"],
    ids=lambda page: page.stem,
)  # fmt: skip
def test_files_and_tests_that_a_page_names_exist(page: Path):
    text = page.read_text("utf-8")
    files = re.findall(r"\b((?:tests|cdt_lens|docs|benchmarks)/[\w./]*\w)", text)
    assert [f for f in files if not (ROOT / f).exists()] in ([], ["docs/_build"])
    suite = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in suite] == []


def test_every_page_stands_in_the_contents():
    listed = set()
    for page in (DOCS / "index.md", DOCS / "contributing/index.md", DOCS / "reference/index.md"):
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            names = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / f"{name}.md").resolve() for name in names}
    pages = {page.resolve() for page in DOCS.rglob("*.md") if "generated" not in page.parts}
    assert pages - listed == {(DOCS / "index.md").resolve()}


def test_the_citation_file_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(cited)  # what the format requires
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
