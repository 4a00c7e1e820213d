"""The commands that a command prints for the user to type next."""

from __future__ import annotations

import shlex

from typer.main import get_command

from cdt_lens.cli.app import app


def leads_to(printed: str) -> list[str]:
    """Return the names of the commands, in order; each must be one that the command line reads."""
    lines = [line for line in printed.splitlines() if line.startswith(("next: ", "then: "))]
    names = []
    for line in lines:
        program, name, *arguments = shlex.split(line.split(": ", 1)[1])
        assert program == "cdt-lens"
        # Reads the options, and refuses an unknown or a missing one, without running anything.
        get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]
        names.append(name)
    return names
