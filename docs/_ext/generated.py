"""Make pages at build time, in docs/generated: commands, presets, planted circuits, tutorials."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import command_line

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def setup(app: Any) -> dict[str, bool]:
    """Connect the hook that makes the pages before Sphinx reads its sources."""
    app.connect("builder-inited", _make)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _make(app: Any) -> None:
    # Imported here because it takes seconds, and configuration errors should show at once.
    from cdt_lens import METHODS, PRESETS, one_pass, score_heads
    from cdt_lens.cli.app import app as commands
    from cdt_lens.decomposition.slopes import SLOPES
    from cdt_lens.planted.catalogue import PLANTED

    folder = Path(app.srcdir) / "generated"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "commands.md").write_text(command_line.reference(commands), "utf-8")
    tutorials(Path(app.srcdir).parent / "tutorials", folder)
    # Other pages include the parts, so Sphinx must not build them as pages.
    app.config.exclude_patterns.append("generated/parts")
    parts = folder / "parts"
    parts.mkdir()
    (parts / "presets.md").write_text(_table_of(PRESETS, _default(score_heads, "rules")), "utf-8")
    (parts / "slopes.md").write_text(_table_of(SLOPES, _default(one_pass, "slopes")), "utf-8")
    described = {name: method.description for name, method in METHODS.items()}
    (parts / "methods.md").write_text(_list_of(described, "method"), "utf-8")
    (parts / "planted.md").write_text(_list_of(PLANTED, "circuit"), "utf-8")


def _default(function: Callable[..., Any], name: str) -> Any:
    return inspect.signature(function).parameters[name].default


def _table_of(presets: Mapping[str, Any], default: Any) -> str:
    """Return a table of frozen dataclasses by name, with one column per field."""
    names = [field.name for field in fields(next(iter(presets.values())))]
    rows = [
        [
            f"`{name}`" + " (default)" * (name == default),
            *(_cell(getattr(preset, field)) for field in names),
        ]
        for name, preset in presets.items()
    ]
    return _table(["preset", *names], rows)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _list_of(described: Mapping[str, str], heading: str) -> str:
    rows = [[f"`{name}`", text] for name, text in described.items()]
    return _table([heading, "description"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def tutorials(source: Path, folder: Path) -> None:
    """Copy the notebooks, and write the page that lists them."""
    target = folder / "tutorials"
    target.mkdir()
    notebooks = sorted(source.glob("*.ipynb"))
    for notebook in notebooks:
        content = json.loads(notebook.read_text("utf-8"))
        for cell in content["cells"]:
            if cell["cell_type"] == "markdown":
                # Files of the repository are not on the site, so their links become plain text.
                cell["source"] = _OUTSIDE.sub(r"\1", "".join(cell["source"]))
        (target / notebook.name).write_text(json.dumps(content), "utf-8")
    lines = [
        "# Tutorials", "",
        "These notebooks are in the folder `tutorials/` of the repository, with the outputs of "
        "their last run. Each runs by itself, without a network, in less than a minute on two "
        "cores.", "",
    ]  # fmt: skip
    if notebooks:
        lines += ["```{toctree}", ":maxdepth: 1", "", *(n.stem for n in notebooks), "```", ""]
    (target / "index.md").write_text("\n".join(lines), "utf-8")
