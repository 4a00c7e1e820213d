"""The documentation covers every public name, option and command; CI also builds it."""

from __future__ import annotations

import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from helpers.pages import blocks_of, commands
from helpers.places import ROOT
from helpers.public import HOMES, NAMES
from test_docstrings import CLASSES, FUNCTIONS, METHODS, named
from typer.main import get_command
from typer.testing import CliRunner

import cdt_lens
from cdt_lens import Rules
from cdt_lens.cli import app as cli
from cdt_lens.decomposition.slopes import Slopes

DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_ext"))
import command_line  # noqa: E402
import docstrings  # noqa: E402
import generated  # noqa: E402

PAGES = sorted(page for page in DOCS.rglob("*.md") if "generated" not in page.parts)
COMMANDS = {
    info.name or info.callback.__name__: info.callback for info in cli.app.registered_commands
}


def blocks(language: str) -> list[str]:
    return [code for page in PAGES for found, code in blocks_of(page) if found == language]


def test_every_public_name_stands_in_the_reference_once() -> None:
    directive = re.compile(r"^\.\. auto(\w+):: ([\w.]+)$", re.MULTILINE)
    found = [
        entry
        for page in sorted((DOCS / "reference").glob("*.md"))
        for entry in directive.findall(page.read_text("utf-8"))
    ]
    top = set(cdt_lens.__all__)
    written = {n: n if n in top else f"cdt_lens.{home}.{n}" for n, home in HOMES.items()}
    assert sorted(name for _, name in found) == sorted(written.values())
    for kind, name in found:
        thing = NAMES[name.rsplit(".", 1)[-1]]
        expected = "data"
        if inspect.isclass(thing):
            expected = "exception" if issubclass(thing, Exception) else "class"
        elif callable(thing):
            expected = "function"
        assert kind == expected, name


@pytest.mark.parametrize("options", [Rules, Slopes])
def test_every_choice_has_its_row(options: type[Any]) -> None:
    page = (DOCS / "method" / "decomposition.md").read_text("utf-8")
    section = page.split(f"## Every choice of `{options.__name__}`")[1].split("\n## ")[0]
    field, found = "", []
    for name, value in re.findall(r"^\|\s*(?:`(\w+)`)?[^|]*\| `?([^|`]+?)`? \|", section, re.M):
        field = name or field
        found.append((field, value))
    hints = get_type_hints(options)
    known = {bool: ("False", "True"), float: ("a number",)}
    expected = [
        (option.name, value)
        for option in fields(options)
        for value in known.get(hints[option.name]) or get_args(hints[option.name])
    ]
    names = {name for name, _ in expected}
    assert sorted(row for row in found if row[0] in names) == sorted(expected)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_has_the_options_that_the_command_has(name: str) -> None:
    text = command_line.reference(cli.app)
    section = text.split(f"\n## `{name}`\n")[1].split("\n## ")[0]
    documented = set(re.findall(r"`(--[\w-]+)`", section)) | set(
        re.findall(r"^`(--[\w-]+)`", section, re.M)
    )
    shown = (
        CliRunner()
        .invoke(cli.app, [name, "--help"], env={"COLUMNS": "250", "TERM": "dumb", "NO_COLOR": "1"})
        .output
    )
    own = set(re.findall(r"^[\s│|*]*(--[\w-]+)", shown, re.M)) - {"--help"}
    assert own <= documented
    assert all(re.search(rf"{flag}\b", shown) for flag in documented)


def test_an_entry_says_what_is_required_what_is_the_default_and_what_may_be_given() -> None:
    text = command_line.reference(cli.app)
    assert "`--out` `PATH`\n: " in text and "*Required.*" in text
    assert re.search(r"`--seed` `NUMBER`\n: .*Default: `0`\.", text)
    assert re.search(r"`--direction` `mean\|strongest`\n: .*Default: `mean`\.", text)
    assert re.search(r"`--ablation` / `--no-ablation`\n: .*Default: off\.", text)


def test_code_on_the_pages_uses_public_names_and_real_options() -> None:
    python = "\n".join(blocks("python"))
    used = set(re.findall(r"\bcdt\.(\w+)", python))
    assert used and used <= set(cdt_lens.__all__)
    called = [words for block in blocks("bash") for words in commands(block)]
    assert called
    for name, *arguments in called:
        # Reads the options, and refuses an unknown or a missing one, without running anything.
        get_command(cli.app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[str], set[str]]]:
    """Return, of each callable as Sphinx shows it, the names in its signature and in its list."""
    pytest.importorskip("sphinx", reason="needs the extra `docs`; .ci/run runs it with that")
    from sphinx.application import Sphinx

    folder = tmp_path_factory.mktemp("rendered")
    directives = [
        f".. auto{'class' if inspect.isclass(thing) else 'function'}:: cdt_lens.{home}.{name}"
        for name, home in HOMES.items()
        if callable(thing := NAMES[name])
    ]
    (folder / "index.rst").write_text("\n\n".join(directives), "utf-8")
    conf = {
        "extensions": ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings"],
        "autodoc_default_options": {"members": True}, "napoleon_use_param": False,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within Sphinx and docutils
        app = Sphinx(
            folder, None, folder / "out", folder / "trees", "dummy", conf, status=None, warning=None
        )
        app.build()
        return dict(_shown(app.env.get_doctree("index")))


def _shown(tree: Any) -> Iterator[tuple[str, tuple[list[str], set[str]]]]:
    from docutils import nodes
    from sphinx import addnodes

    for entry in tree.findall(addnodes.desc):
        signature = next(entry.findall(addnodes.desc_signature))
        named = [
            next(parameter.findall(addnodes.desc_sig_name), None)
            for parameter in signature.findall(addnodes.desc_parameter)
        ]
        own = [part for part in entry.children[-1].children if isinstance(part, nodes.field_list)]
        strong = [words.astext() for part in own for words in part.findall(nodes.strong)]
        listed = {name.lstrip("*") for words in strong for name in words.split(", ")}
        yield signature["fullname"], ([n.astext() for n in named if n is not None], listed)


def test_the_reference_shows_every_parameter(
    rendered: dict[str, tuple[list[str], set[str]]],
) -> None:
    """A signature that Sphinx cannot read as Python is shown as one word, without parameters."""
    wrong = {}
    for name, thing in (FUNCTIONS | CLASSES | METHODS).items():
        expected = [p for p in inspect.signature(thing).parameters if p not in ("self", "cls")]
        shown, listed = rendered[name]
        if shown != expected:
            wrong[name] = shown
        elif name not in CLASSES and not named(thing, "Args") <= listed:
            wrong[name] = sorted(named(thing, "Args") - listed)
    assert wrong == {}
    assert {"load_task", "task_from_files", "score_heads"} <= set(rendered)


def test_code_in_single_backticks_becomes_references_and_literals() -> None:
    text = """*Signed* relevance of |W rel| and *dims: `Head`s, or `[layer, head]`.

    Args:
        rows: `run_with_cache()` or `L0H1->L9H6<q>`.
    """
    expected = r"""*Signed* relevance of \|W rel\| and \*dims: `Head`\ s, or ``[layer, head]``.

    Args:
        rows: `run_with_cache()` or ``L0H1->L9H6<q>``.
    """
    assert docstrings.to_rst(text) == expected


def test_notebooks_are_copied_without_links_that_lead_off_the_site(tmp_path: Path) -> None:
    source, folder = tmp_path / "tutorials", tmp_path / "site"
    source.mkdir()
    folder.mkdir()
    cells = [
        {"cell_type": "markdown", "source": ["# One\n", "[a](../README.md), [b](02.ipynb)"]},
        {"cell_type": "code", "source": ["x[1](../y)"]},
    ]
    (source / "01.ipynb").write_text(json.dumps({"cells": cells}), "utf-8")
    generated.tutorials(source, folder)
    copied = json.loads((folder / "tutorials" / "01.ipynb").read_text("utf-8"))["cells"]
    assert copied[0]["source"] == "# One\na, [b](02.ipynb)"
    assert copied[1]["source"] == ["x[1](../y)"]
    assert "\n01\n" in (folder / "tutorials" / "index.md").read_text("utf-8")


def test_without_notebooks_there_is_no_empty_list_of_them(tmp_path: Path) -> None:
    generated.tutorials(tmp_path / "none", tmp_path)
    assert "toctree" not in (tmp_path / "tutorials" / "index.md").read_text("utf-8")
