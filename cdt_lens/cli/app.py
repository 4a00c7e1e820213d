"""The `cdt-lens` command: each sub-command is one call of the functions that a notebook uses.

Exit codes: 0, done. 1, an error that the user can correct (one line on standard error, with the
fix). 2, unusable options. 130, interrupted; finished work is kept and the same command resumes.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer
from typer.core import TyperGroup

from cdt_lens.cli.compare import compare
from cdt_lens.cli.console import err
from cdt_lens.cli.convert import convert, fetch
from cdt_lens.cli.discover import discover, faithfulness, report, trace
from cdt_lens.cli.finetune import demo, export, finetune, transfer
from cdt_lens.cli.show import show
from cdt_lens.core.errors import CdtLensError, CdtLensWarning


class Commands(TyperGroup):
    """The commands; typer itself would end an interrupted one without a word on resuming."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; an interrupt ends it with exit code 130."""
        try:
            with warnings.catch_warnings():
                _show_warnings_in_one_line()
                return super().invoke(ctx)
        except KeyboardInterrupt:
            err.print("cdt-lens: interrupted; give the same command again to resume")
            raise typer.Exit(130) from None


def _show_warnings_in_one_line() -> None:
    """Show warnings of this package without the place in its code."""
    show = warnings.showwarning

    def in_one_line(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, CdtLensWarning):
            show(message, category, *where, **more)
            return
        err.print(f"cdt-lens: warning: {message}", markup=False, soft_wrap=True)

    warnings.showwarning = in_one_line


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "Find the attention heads that carry a task (contextual decomposition), measure how "
        "faithful their circuit is, and draw it.\n\n"
        "Adapt the circuit to another language by training its heads alone.\n\n"
        "Start with `cdt-lens demo --out runs/demo`, which needs no download."
    ),
)

for _command in (
    demo, discover, faithfulness, trace, report, show, compare, finetune, transfer, export, convert,
    fetch,
):  # fmt: skip
    app.command()(_command)


def main() -> None:
    """Run the command line; an error that the user can correct is one line and exit code 1."""
    try:
        app()
    except CdtLensError as error:
        err.print(f"cdt-lens: {error}", markup=False, soft_wrap=True)
        sys.exit(1)
