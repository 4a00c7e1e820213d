"""Options of the commands; those of settings are read from the fields of the settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from cdt_lens.core.errors import InputError
from cdt_lens.experiments.settings import Settings

Command = Callable[..., None]

Out = Annotated[Path, typer.Option(help="Run directory; an interrupted run resumes there.")]
RunFolder = Annotated[Path, typer.Argument(help="Run directory of cdt-lens discover.")]
TrainFile = Annotated[Path | None, typer.Option(help="Your CSV, TSV or JSONL file to train on.")]
ValidFile = Annotated[Path | None, typer.Option(help="Your file of validation examples.")]
TestFile = Annotated[Path | None, typer.Option(help="Your file of test examples.")]
LogWith = Annotated[
    list[str] | None,
    typer.Option(
        help="Tracker of accelerate that gets every step, such as tensorboard or wandb; repeat the "
        "option for each. Files are in the folder logs of --out."
    ),
]
Verbalizer = Annotated[
    list[str] | None,
    typer.Option(
        help='The word of one token for a label, as label=" word"; repeat the option for each '
        "label."
    ),
]


def with_options(**taken: tuple[type, tuple[str, ...]]) -> Callable[[Command], Command]:
    """Give a command the options of settings in place of a parameter.

    Each option has the name, type, limits, default and description of a field of the settings. The
    command gets their values as a dictionary.

    Args:
        taken: By the name of the command's parameter, the settings and the names of their fields.

    Returns:
        A decorator of commands.
    """

    def decorate(command: Command) -> Command:
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            kind, names = taken.get(parameter.name, (None, ()))
            parameters += [parameter] if kind is None else [_option(kind, name) for name in names]

        @wraps(command)
        def with_dictionaries(**values: Any) -> None:
            gathered = {
                parameter: {name: values.pop(name) for name in names}
                for parameter, (_, names) in taken.items()
            }
            command(**values, **gathered)

        keyword = inspect.Parameter.KEYWORD_ONLY
        signature = inspect.Signature([p.replace(kind=keyword) for p in parameters])
        with_dictionaries.__signature__ = signature  # type: ignore[attr-defined]
        with_dictionaries.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_dictionaries

    return decorate


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command: no other process may write into the folder `out` until it ends."""

    @wraps(function)
    def in_locked_folder(*, out: Path, **kwargs: Any) -> Any:
        from cdt_lens.core.run_lock import locked

        with locked(out):
            return function(out=out, **kwargs)

    return in_locked_folder


def _option(kind: type, name: str) -> inspect.Parameter:
    """Return the option of one field."""
    value, described = get_args(get_type_hints(kind, include_extras=True)[name])[:2]
    default = next(field.default for field in fields(kind) if field.name == name)
    least = next((limit.ge for limit in described.metadata if hasattr(limit, "ge")), None)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is MISSING else default,
        annotation=Annotated[value, typer.Option(help=described.description, min=least)],
    )  # fmt: skip


def settings_of(
    given: Mapping[str, Any], files: Mapping[str, Path | None], verbalizer: list[str] | None
) -> Settings:
    """Make settings of options as they are typed.

    Args:
        given: Values by the name of the setting.
        files: The file of each split, if the task is of files.
        verbalizer: Words as `label= word`.

    Raises:
        InputError: A value that a setting does not allow, or a malformed verbalizer.
    """
    typed = dict(given)
    if typed.get("template") is not None:
        typed["template"] = typed["template"].replace(r"\n", "\n")
    if typed.get("data") is not None:
        typed["data"] = str(Path(typed["data"]))
    paths = {name: str(path) for name, path in files.items() if path is not None}
    return Settings(files=paths, verbalizer=words_of(verbalizer or []), **typed)


def words_of(words: list[str]) -> dict[str, str]:
    """Make a verbalizer of `label= word` arguments, one for each label.

    Args:
        words: The arguments.

    Raises:
        InputError: An argument without `=`, several labels in one argument, or a label given twice.
    """
    verbalizer: dict[str, str] = {}
    for given in words:
        label, equals, word = given.partition("=")
        if not equals or "=" in word:
            raise InputError(
                f'--verbalizer {given!r}: expected label=" word", the option again for each label'
            )
        if label in verbalizer:
            raise InputError(f"--verbalizer {given!r}: label {label!r} was given before")
        verbalizer[label] = word
    return verbalizer
