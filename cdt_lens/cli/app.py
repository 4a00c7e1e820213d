"""The `cdt-lens` command: each sub-command is one call of the functions that a notebook uses.

Exit codes: 0, done. 1, an error that the user can correct (one line on standard error, with the
fix). 2, unusable options. 130 and 143, interrupted by Ctrl-C or SIGTERM; finished work is kept and
the same command resumes.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from cdt_lens.cli.adapt import adapt
from cdt_lens.cli.compare import compare
from cdt_lens.cli.console import err, print_utf8, tell
from cdt_lens.cli.convert import convert, fetch, mib_submission
from cdt_lens.cli.discover import discover, faithfulness, report, trace
from cdt_lens.cli.finetune import demo, export, finetune, transfer
from cdt_lens.cli.interrupts import reported_interrupts
from cdt_lens.cli.predict import predict
from cdt_lens.cli.push import push
from cdt_lens.cli.show import show
from cdt_lens.core.errors import CdtLensError, CdtLensWarning


class Command(TyperCommand):
    """A command that refuses an option given twice, and shows warnings in one line."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the command.

        Args:
            ctx: The context of the command.
            args: The arguments.

        Returns:
            The arguments that are left over.

        Raises:
            typer.BadParameter: An option that takes one value was given twice.
        """
        given: list[Any] = list(self.make_parser(ctx).parse_args(list(args))[-1])
        for option in given:
            single = option.param_type_name == "option" and not option.multiple
            if single and given.count(option) > 1:
                raise typer.BadParameter("it takes one value but was given twice", ctx, option)
        rest: list[str] = super().parse_args(ctx, args)
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command, with the warnings of this package in one line each.

        Args:
            ctx: The context of the command.
        """
        with warnings.catch_warnings():
            _show_warnings_in_one_line()
            try:
                return super().invoke(ctx)
            except CdtLensError as error:
                raise type(error)(_with_options(str(error), self.params)) from error


def _with_options(message: str, params: Sequence[Any]) -> str:
    """Name the options of a command in a message as they are typed: `k=5` becomes `--k 5`.

    Parts of paths and quoted text stay, and so does a name without a value, as in `pass source=,`.
    """
    typed = {p.name: p.opts[0] for p in params if p.param_type_name == "option"}
    if "language" in typed:
        typed["config"] = typed["language"]  # as `load_task` calls it
    names = "|".join(map(re.escape, sorted(typed, key=len, reverse=True)))
    named = re.sub(
        rf"(?<![\w.\[/\\'\"-])({names})=(?:True\b|(?=[^\s=,;.)]|\.\S))",
        lambda found: typed[found[1]] + ("" if found[0].endswith("True") else " "),
        message,
    )
    return _once(named)


def _once(message: str) -> str:
    """Drop what a message says twice now: `--extras (--extras)`, an option that ignores itself."""
    message = re.sub(r"(--[\w-]+) \(\1\)", r"\1", message)
    given = r"(--[\w-]+ (?:'[^']*'|\S+))"
    return re.sub(rf"{given}( has no effect with .+?) and \1(?!\w)", r"\1\2", message)


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
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "Find the attention heads that carry a task (contextual decomposition), measure how "
        "faithful their circuit is, and draw it.\n\n"
        "Adapt a model to another language by training these heads and the norms.\n\n"
        "Start with `cdt-lens demo --out runs/demo`, which needs no download."
    ),
)

# In the order in which a person needs them.
_PANELS = {
    "Start here": (demo, fetch),
    "Find a circuit": (discover, faithfulness, trace, report, compare),
    "Adapt a model to another language": (adapt, finetune, export, push, predict, transfer),
    "Files": (show, convert, mib_submission),
}
for _panel, _commands in _PANELS.items():
    for _command in _commands:
        _name = _command.__name__.replace("_", "-")
        app.command(_name, cls=Command, rich_help_panel=_panel)(_command)


def _tell_versions(asked: bool) -> bool:
    if asked:
        for package in ("cdt_lens", "torch", "transformer-lens", "transformers"):
            tell(f"{package} {metadata.version(package)}")
        raise typer.Exit
    return asked


@app.callback()
def _before(
    _version: Annotated[
        bool,
        typer.Option("--version", help="Print versions.", callback=_tell_versions, is_eager=True),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; an error that the user can correct is one line and exit code 1."""
    with reported_interrupts():
        print_utf8()
        try:
            app()
        except CdtLensError as error:
            _end(str(error))
        except PermissionError as error:
            if error.filename is None:
                raise
            _end(f"{error.filename}: cannot be accessed ({error.strerror})")


def _end(message: str) -> None:
    err.print(f"cdt-lens: {message}", markup=False, soft_wrap=True)
    sys.exit(1)
