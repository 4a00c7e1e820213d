"""The command-line reference, from the commands' own signatures."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


def reference(app: Any) -> str:
    """Return Markdown that describes every command of a Typer `app`."""
    parts = [
        "# Command line",
        app.info.help,
        "Exit codes: 0 means success. 1 means an error in the input; one line says how to fix it. "
        "2 means invalid options. 130 and 143 mean interrupted by Ctrl-C or SIGTERM: finished work "
        "is kept, and the same command resumes.",
        "Options without a default are optional unless they are marked *Required*.",
    ]
    for info in app.registered_commands:
        parts.append(_command(info.name or info.callback.__name__.replace("_", "-"), info.callback))
    return "\n\n".join(parts) + "\n"


def _command(name: str, function: Callable[..., Any]) -> str:
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    arguments = [p for p in parameters if _is_argument(hints[p.name])]
    options = [p for p in parameters if not _is_argument(hints[p.name])]
    needed = [f"{flags(o)[0]} {_value(hints[o.name])}" for o in options if _required(o)]
    usage = ["cdt-lens", name, *(a.name.upper() for a in arguments), *needed, "[OPTIONS]"]
    lines = [f"## `{name}`", f"```bash\n{' '.join(usage)}\n```", inspect.getdoc(function) or ""]
    for parameter in [*arguments, *options]:
        lines.append(_entry(parameter, hints[parameter.name]))
    return "\n\n".join(lines)


def _entry(parameter: inspect.Parameter, hint: Any) -> str:
    """Return an item of a definition list."""
    info = get_args(hint)[1]
    if _is_argument(hint):
        term = f"`{parameter.name.upper()}`"
    else:
        shown = [f"`{flag}`" for flag in flags(parameter)]
        term = " / ".join(shown) + (f" `{_value(hint)}`" if _value(hint) else "")
    notes = [str(info.help or "")]
    if _required(parameter):
        notes.append("*Required.*")
    elif isinstance(parameter.default, bool):
        notes.append(f"Default: {'on' if parameter.default else 'off'}.")
    elif parameter.default is not None:
        notes.append(f"Default: `{parameter.default}`.")
    if info.min is not None:
        notes.append(f"At least {info.min}.")
    # A backslash in a help text is literal.
    text = " ".join(notes).replace("\\", "\\\\")
    return f"{term}\n: {text}"


def flags(parameter: inspect.Parameter) -> list[str]:
    """Return the flags of an option; a switch also has its negation."""
    name = parameter.name.replace("_", "-")
    switch = isinstance(parameter.default, bool)
    return [f"--{name}", f"--no-{name}"] if switch else [f"--{name}"]


def _is_argument(hint: Any) -> bool:
    return type(get_args(hint)[1]).__name__ == "ArgumentInfo"


def _required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


def _value(hint: Any) -> str:
    """Return what follows a flag: a kind of value, or the choices."""
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is list:
        return "TEXT..."
    return {bool: "", Path: "PATH", int: "NUMBER", float: "NUMBER"}.get(kind, "TEXT")
