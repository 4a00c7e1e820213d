"""The command that compares methods of scoring heads: `compare`."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cdt_lens.cli.arguments import (
    Out,
    TrainFile,
    ValidFile,
    Verbalizer,
    settings_of,
    with_options,
)
from cdt_lens.cli.console import say, tell
from cdt_lens.cli.show import show_comparison, show_planted
from cdt_lens.core.choices import Empty
from cdt_lens.core.errors import InputError
from cdt_lens.experiments.settings import Settings

_OPTIONS = (
    "task", "language", "data", "template", "label_column", "split", "pair", "pair_label",
    "baseline", "shots", "examples", "baseline_examples", "positions", "backend", "device", "dtype",
    "batch_size", "rows", "seed",
)  # fmt: skip
_OF_PLANTED = ("seed", "backend", "batch_size", "rows")
_HELD_OUT = 128


@with_options(given=(Settings, _OPTIONS))
def compare(
    out: Out,
    model: Annotated[
        str | None, typer.Option(help="Hub name, Hugging Face folder or .gguf file.")
    ] = None,
    planted: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare on planted circuits instead of a model: their names, or all. Repeat the "
            "option or separate the names by commas."
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help="Methods, such as exact,cdt:stable,one-pass; default: all. Repeat the option or "
            "separate the names by commas."
        ),
    ] = None,
    train: TrainFile = None,
    valid: ValidFile = None,
    verbalizer: Verbalizer = None,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="PASSES", help="Forward passes of one example that each method may use: a "
            "cheap method scores more of the examples. The default is the price of an exact sweep "
            "of 16 examples under the default rules.",
        ),
    ] = None,
    same_examples: Annotated[
        bool,
        typer.Option(
            help="No budget: every method scores all of the examples, whatever they cost."
        ),
    ] = False,
    held_out: Annotated[
        int,
        typer.Option(
            min=1, help="Number of validation examples to judge the rankings on, balanced over "
            "the labels; as many as there are, if there are fewer.",
        ),
    ] = _HELD_OUT,
    draws: Annotated[int, typer.Option(min=1, help="Number of random rankings.")] = 5,
    empty: Annotated[
        Empty,
        typer.Option(
            help="What the run replaces that counts as f = 0: the heads, or all of heads, MLPs and "
            "input, as in MIB."
        ),
    ] = "heads",
    *,
    given: dict[str, Any],
) -> None:  # fmt: skip
    """Score all heads by several methods at equal cost and compare what they find.

    Every method has the same budget of forward passes, and scores as many of --examples as it pays
    for. Agreement is with exact mean-ablation on the examples that the budget buys for it.
    Faithfulness of each ranking is measured on held-out examples, with 95 % intervals, and the
    differences between methods prompt by prompt. On planted circuits the heads are known: every
    method scores the same examples, and AUROC and average precision say how well it finds the
    heads.

    Writes `comparison.json`, `.csv` and `.png`, `report.html`, and the scores of each method.
    """
    from cdt_lens.comparing.compare import checked_methods
    from cdt_lens.experiments import compare as experiments, runs
    from cdt_lens.scoring.methods import DEFAULT_METHODS

    if (model is None) == (not planted):
        raise InputError("compare: expected either --model or --planted")
    names = checked_methods(_split(methods) if methods else DEFAULT_METHODS)
    if budget is not None and (planted or same_examples):
        other = "--planted" if planted else "--same-examples"
        raise InputError(f"compare: expected either --budget or {other}, got both")
    if planted and empty != "heads":
        raise InputError("compare: --empty all is for models; planted circuits have --empty heads")
    if planted:
        more = {"train": train, "valid": valid, "verbalizer": verbalizer}
        _refuse_unused(more | given, held_out)
        _compare_planted(planted, names, out, draws, given)
        return
    files = {"train": train, "valid": valid}
    settings = settings_of({"model": model, **given}, files, verbalizer)
    settings.require_valid("compare")
    passes = None if same_examples else "sweep" if budget is None else budget
    how: dict[str, Any] = {"budget": passes, "held_out": held_out, "empty": empty}
    check = partial(experiments.check_compare, **how)
    # The circuit of `discover` in the same folder has a size and a ranking of its own.
    run = runs.start_run(settings, out, say, check, keep=runs.OF_THE_CIRCUIT)
    show_comparison(experiments.compare_run(run, say, methods=names, draws=draws, **how))
    tell(str(out / "report.html"))


def _refuse_unused(given: dict[str, Any], held_out: int) -> None:
    """Refuse options that mean nothing for planted circuits, which have data of their own."""
    defaults = {field.name: field.default for field in fields(Settings)}
    unused = [
        name for name, value in given.items()
        if name not in _OF_PLANTED and value not in (None, defaults.get(name))
    ] + (["held_out"] if held_out != _HELD_OUT else [])  # fmt: skip
    if unused:
        raise InputError(
            f"compare: --{unused[0].replace('_', '-')}: for --model; omit it with --planted, whose "
            "circuits have data of their own"
        )


def _compare_planted(
    planted: list[str], methods: tuple[str, ...], out: Path, draws: int, given: dict[str, Any]
) -> None:
    from cdt_lens.experiments.compare import compare_planted
    from cdt_lens.planted.catalogue import PLANTED

    names = _split(planted)
    circuits = list(PLANTED) if names == ["all"] else names
    options = {name: given[name] for name in _OF_PLANTED}
    show_planted(compare_planted(circuits, methods, folder=out, draws=draws, say=say, **options))
    tell(str(out / "report.html"))


def _split(given: list[str]) -> list[str]:
    """Return the names of a repeated option, each of which may hold several between commas."""
    return [name.strip() for names in given for name in names.split(",") if name.strip()]
