"""The `cdt-lens` command: each sub-command is one call of the functions that a notebook uses.

Exit codes: 0, done. 1, an error that the user can correct (one line on standard error, with the
fix). 2, unusable options. 130, interrupted; finished work is kept and the same command resumes.
"""

from __future__ import annotations

import sys

import typer

from cdt_lens.cli.compare import compare
from cdt_lens.cli.console import err
from cdt_lens.cli.convert import convert, fetch
from cdt_lens.cli.discover import discover, faithfulness, report, trace
from cdt_lens.cli.finetune import demo, export, finetune, transfer
from cdt_lens.cli.show import show
from cdt_lens.core.errors import CdtLensError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "Find the attention heads that carry a task (contextual decomposition), prove the circuit "
        "faithful, and look at it.\n\n"
        "Adapt it to another language by training its heads alone.\n\n"
        "Start with `cdt-lens demo --out runs/demo`, which needs no download."
    ),
)

for _command in (
    demo, discover, faithfulness, trace, report, show, compare, finetune, transfer, export, convert,
    fetch,
):  # fmt: skip
    app.command()(_command)


def main() -> None:
    """Entry point: errors of a person's making become one line and exit code 1."""
    try:
        app()
    except CdtLensError as error:
        err.print(f"cdt-lens: {error}", markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("cdt-lens: interrupted; the same command goes on where it stopped")
        sys.exit(130)
