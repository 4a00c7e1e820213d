"""The commands that train: `finetune`, `export`, `transfer` and `demo`."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from cdt_lens.cli.arguments import (
    LogWith,
    Out,
    TrainFile,
    ValidFile,
    Verbalizer,
    alone,
    settings_of,
    with_options,
)
from cdt_lens.cli.console import lead_on, say, tell, tell_table
from cdt_lens.cli.show import show_transfer
from cdt_lens.core.errors import InputError
from cdt_lens.experiments.settings import ModelSettings, Settings
from cdt_lens.finetuning.options import SCOPES, TrainingOptions

_OPTIONS = (
    "task", "language", "data", "template", "label_column", "split", "backend", "device", "dtype",
)  # fmt: skip
_TRAINING = ("epochs", "batch_size", "learning_rate", "patience", "seed")


@with_options(given=(Settings, _OPTIONS), training=(TrainingOptions, _TRAINING))
@alone
def finetune(
    model: Annotated[
        str, typer.Option(help="Model to train; for its circuit, the one that it was found in.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the adapter, the log and the report.")],
    given: dict[str, Any],
    training: dict[str, Any],
    circuit: Annotated[
        Path | None,
        typer.Option(help="Run directory of cdt-lens discover on that checkpoint, or a circuit."),
    ] = None,
    scope: Annotated[
        str, typer.Option(help=f"What to train: auto, or one of {', '.join(SCOPES)}.")
    ] = "decision",
    source: Annotated[
        str | None, typer.Option(help="Source language, to measure what is forgotten of it.")
    ] = None,
    train: TrainFile = None,
    valid: ValidFile = None,
    source_valid: Annotated[
        Path | None,
        typer.Option(help="Your file in the source language, to measure what is forgotten of it."),
    ] = None,
    verbalizer: Verbalizer = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Any other training option as name=value, such as norms=circuit; repeat the "
            "option for each."
        ),
    ] = None,
    log_with: LogWith = None,
) -> None:
    """Train the heads of a circuit (or a control) on a target language.

    The model itself is not changed. Writes `adapter.json` with its tensors, `history.csv`,
    `log.jsonl` and `report.html`. An interrupted run resumes where it stopped. `cdt-lens export`
    makes a checkpoint of the adapter.
    """
    from cdt_lens.circuits.circuit import Circuit
    from cdt_lens.core.folders import check_run_folder
    from cdt_lens.experiments.inputs import check_inputs, load_for, make_task
    from cdt_lens.finetuning.finetune import check_splits, finetune as train_on
    from cdt_lens.finetuning.scopes import scope_heads
    from cdt_lens.finetuning.tracking import check_trackers, tracked

    if (out / "adapter.json").exists() and not (out / "checkpoint.json").exists():
        raise InputError(
            f"{out}: holds a finished adapter; name another folder, or remove that one"
        )
    check_run_folder(out, "checkpoint.json", "log.jsonl")
    options = TrainingOptions().changed(**{**training, **_options(option or [])})
    trackers = tracked(log_with, out, "")
    check_trackers(**trackers)
    chosen = {"model": model, "seed": training["seed"], **given}
    settings = settings_of(chosen, {"train": train, "valid": valid}, verbalizer)
    settings.require_valid("finetune")
    of_source = _source_settings(settings, source, source_valid)
    heads = None if circuit is None else Circuit.load(circuit)
    scope_heads("decision" if scope == "auto" else scope, heads, seed=options.seed)
    _check_lora(scope, option or [])
    tasks = check_inputs(settings, *([] if of_source is None else [of_source]))
    tasks[0].require_held_out()
    check_splits(tasks[0], None if of_source is None else tasks[1], options)
    loaded = load_for(settings, say)
    target = make_task(settings, loaded.tokenizer)
    result = train_on(
        loaded, target, heads=heads, scope=cast(Any, scope),
        source=None if of_source is None else make_task(of_source, loaded.tokenizer),
        options=options, checkpoint=out / "checkpoint.json", keep_checkpoint=True,
        log=out / "log.jsonl", **trackers,
    )  # fmt: skip
    _write(result, out, target.name)
    _show(result, out)
    if not result.nothing_learnt:
        lead_on(["export", out, "--base", model, "--out", f"{out}-exported"])


def _write(result: Any, out: Path, name: str) -> None:
    from cdt_lens.core.artifacts import atomic_write
    from cdt_lens.core.processes import is_main
    from cdt_lens.finetuning.checkpoints import remove_checkpoint
    from cdt_lens.viz.report.report import render_report

    if is_main():
        result.adapter.save(out)
        atomic_write(out / "history.csv", result.history.to_csv(index=False))
        render_report(result, path=out / "report.html", title=f"{name}: {result.scope}")
        # Last: with a checkpoint the same command goes on after a kill.
        remove_checkpoint(out / "checkpoint.json")


def _show(result: Any, out: Path) -> None:
    columns = ["epoch", "train_loss", "target_loss", "target_accuracy", "source_accuracy"]
    history = result.history.to_dict("records")
    # Epoch 0 is the untrained model, which has no training loss.
    rows = [
        [row["epoch"], *("" if row[c] != row[c] else f"{row[c]:.3f}" for c in columns[1:])]
        for row in history
    ]
    tell_table(columns, rows)
    tell(
        f"{result.trained_parameters:,} of {result.total_parameters:,} parameters "
        f"({result.share:.2%}): {_trained(result)}; "
        f"best epoch {result.best_epoch}: {out / 'adapter.json'}"
    )
    if result.nothing_learnt:
        tell(result.nothing_learnt)


def _trained(result: Any) -> str:
    """Return in words what a run trained."""
    whole = {"full": "every weight", "norms": "the norms", "lora": "low-rank updates"}
    if result.scope in whole:
        return whole[result.scope]
    norms = {"all": " and the norms", "circuit": " and the norms of their layers", "none": ""}
    return f"{len(result.heads)} heads{norms[result.options['norms']]}"


def _source_settings(
    settings: Settings, language: str | None, valid: Path | None
) -> Settings | None:
    """Return the settings of the task in the source language; None if it is not measured."""
    own = bool(settings.files) or settings.task == "files"
    if own and language is not None:
        raise InputError(
            f"--source {language}: your own files have no languages by name; give a file in the "
            "source language with --source-valid"
        )
    if not own and valid is not None:
        raise InputError(f"--source-valid {valid}: for your own files only; use --source LANGUAGE")
    if own:
        return None if valid is None else replace(settings, files={"valid": str(valid)}, split=None)
    return None if language is None else replace(settings, language=language)


def export(
    adapter: Annotated[Path, typer.Argument(help="Folder or file of an adapter.")],
    base: Annotated[str, typer.Option(help="Model that the adapter was trained on.")],
    out: Annotated[
        Path, typer.Option("--out", "--to", help="New folder for the Hugging Face checkpoint.")
    ],
    to_peft: Annotated[
        bool,
        typer.Option(
            help="Write an exact LoRA in the files of peft, in place of a checkpoint. Needs an "
            "adapter trained with norms=none and biases=false, or --extras.",
        ),
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="With --to-peft: one rank for all modules, filled with zeros."),
    ] = None,
    extras: Annotated[
        bool,
        typer.Option(help="With --to-peft: store trained norms as peft's modules_to_save."),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Floating point type of the checkpoint. The default is that of the base's files."
        ),
    ] = None,
    allow_unchanged: Annotated[
        bool,
        typer.Option(
            help="Export an adapter that changes no weight, of a training that learnt nothing.",
        ),
    ] = False,
) -> None:
    """Write a Hugging Face checkpoint of the base model with the adapter applied.

    Every weight that the adapter does not hold stays bit-identical. The folder's tokenizer gives
    the tokens of the training, and its README.md says how to ask the model.
    """
    from cdt_lens.finetuning.adapter import Adapter
    from cdt_lens.finetuning.export import export as write
    from cdt_lens.finetuning.peft_files import to_peft as write_lora

    if to_peft and dtype is not None:
        raise InputError("--dtype: for a checkpoint; omit it with --to-peft")
    if to_peft and allow_unchanged:
        raise InputError("--allow-unchanged: for a checkpoint; omit it with --to-peft")
    if to_peft:
        tell(str(write_lora(Adapter.load(adapter), base, out, rank=rank, extras=extras)))
        return
    if rank is not None or extras:
        raise InputError("--rank and --extras: for --to-peft; give that as well, or omit them")
    found = write(Adapter.load(adapter), base, out, dtype=dtype, allow_unchanged=allow_unchanged)
    tell(str(found))
    lead_on(["predict", out, "--file", "rows.csv"])


def _above_zero(value: float | None) -> float | None:
    if value is not None and not value > 0:
        raise typer.BadParameter(f"{value:g} is not above 0")
    return value


@with_options(given=(ModelSettings, ("device",)))
def transfer(
    config: Annotated[
        Path, typer.Argument(help="TOML file; benchmarks/nusax.toml shows the keys.")
    ],
    out: Out,
    given: dict[str, Any],
    hours: Annotated[
        float | None,
        typer.Option(
            callback=_above_zero,
            help="Begin no run after this time; the same command goes on with those left.",
        ),
    ] = None,
    log_with: LogWith = None,
) -> None:
    """Run a transfer experiment: proxy stage, discovery, and training of every scope.

    Every scope is trained on every target with every seed, and one report compares them. Under
    `accelerate launch` the examples of every step are divided between the processes.
    """
    from cdt_lens.experiments.transfer import run_transfer
    from cdt_lens.experiments.transfer_config import read_config

    read = read_config(config)
    config_read = replace(read, device=given["device"] or read.device)
    show_transfer(run_transfer(config_read, out, say, hours=hours, log_with=log_with))
    tell(str(out / "report.html"))
    lead_on(["report", out / "discovery"])


@with_options(given=(Settings, ("seed",)))
def demo(
    out: Out,
    given: dict[str, Any],
    full: Annotated[
        bool,
        typer.Option(help="Train every scope with two seeds; takes some three minutes."),
    ] = False,
) -> None:
    """Run a whole transfer experiment offline, in about a minute on two cores.

    A small model is trained on the spot and adapted to two invented languages, a near and a far
    one.
    """
    from cdt_lens.experiments.demo import FAR, run_demo

    show_transfer(run_demo(out, say, full=full, **given))
    tell(str(out / "report.html"))
    task = ["--task", "pseudo-sentiment", "--language", FAR, "--source", "source"]
    lead_on(
        ["report", out],
        ["finetune", "--model", out / "proxy", "--circuit", out, *task, "--out", f"{out}-far"],
        ["export", f"{out}-far", "--base", out / "proxy", "--out", f"{out}-far-model"],
    )


def _check_lora(scope: str, pairs: list[str]) -> None:
    """Refuse options of low-rank updates for a scope that has none."""
    for pair in pairs:
        if pair.startswith("lora_") and scope not in ("auto", "lora"):
            raise InputError(
                f"--option {pair}: has no effect with the scope {scope!r}; omit it, or give "
                "--scope lora"
            )


def _options(pairs: list[str]) -> dict[str, Any]:
    """Read training options from `name=value` arguments; a value is TOML, or else text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or "=" in text:
            raise InputError(
                f"--option {pair!r}: expected name=value, such as norms=circuit, the option again "
                "for each"
            )
        if name in _TRAINING:
            own = f"--{name.replace('_', '-')}"
            raise InputError(f"--option: {name} has an option of its own; give {own} {text}")
        if name in options:
            raise InputError(f"--option {pair!r}: {name} was given before")
        try:
            options[name] = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            options[name] = text
    return options
