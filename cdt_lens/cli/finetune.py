"""The commands that train: `finetune`, `export`, `transfer` and `demo`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from cdt_lens.cli.arguments import (
    Data,
    Device,
    Dtype,
    LabelColumn,
    ModelClass,
    Template,
    TrainFile,
    Verbalizer,
    task_settings,
)
from cdt_lens.cli.console import say, tell, tell_table
from cdt_lens.cli.show import show_transfer
from cdt_lens.core.errors import InputError
from cdt_lens.finetuning.options import SCOPES, TrainingOptions


def finetune(
    model: Annotated[str, typer.Option(help="The checkpoint that does the source language.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter, the log and the report.")],
    circuit: Annotated[
        Path | None, typer.Option(help="circuit.json of cdt-lens discover on that checkpoint.")
    ] = None,
    scope: Annotated[str, typer.Option(help=f"auto, or one of {', '.join(SCOPES)}.")] = "decision",
    task: Annotated[str, typer.Option(help="As for discover, or files.")] = "nusax-senti",
    language: Annotated[str | None, typer.Option(help="The target language.")] = None,
    source: Annotated[
        str | None, typer.Option(help="The source language, to follow forgetting.")
    ] = None,
    data: Data = None,
    train: TrainFile = None,
    valid: Annotated[Path | None, typer.Option(help="Likewise, to choose the epoch by.")] = None,
    source_valid: Annotated[
        Path | None, typer.Option(help="Your file in the source language, to follow forgetting.")
    ] = None,
    template: Template = None,
    verbalizer: Verbalizer = None,
    label_column: LabelColumn = "label",
    epochs: Annotated[int, typer.Option(min=0, help="The most.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of a step.")] = 16,
    learning_rate: Annotated[
        float | None, typer.Option(help="The peak; default: the scope's own.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many looks without improvement.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides every draw.")] = 0,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Any other training option as name=value, such as norms=circuit."),
    ] = None,
    backend: ModelClass = "auto",
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Train a circuit's heads (or a control) on a target language; the model itself is kept.

    Writes `adapter.json` with its tensors, `history.csv`, `log.jsonl` and `report.html`. An
    interrupted run goes on where it stopped. `cdt-lens export` makes a checkpoint of it.
    """
    import cdt_lens as cdt
    from cdt_lens.core.artifacts import atomic_write, remove_artifact
    from cdt_lens.core.processes import is_main
    from cdt_lens.experiments.settings import load_for, make_task

    if (out / "adapter.json").exists() and not (out / "checkpoint.json").exists():
        raise InputError(
            f"{out}: holds a finished adapter; name another folder, or remove that one"
        )
    more: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "patience": patience}
    more |= {"learning_rate": learning_rate, "seed": seed, **_options(option or [])}
    options = TrainingOptions().changed(**more)
    settings = task_settings(
        model=model, task=task, language=language, data=data,
        files={"train": train, "valid": valid}, template=template, verbalizer=verbalizer,
        label_column=label_column, backend=backend, device=device, dtype=dtype, seed=seed,
    )  # fmt: skip
    loaded = load_for(settings, say)
    target = make_task(settings, loaded.tokenizer)
    told = _source_settings(settings, source, source_valid)
    result = cdt.finetune(
        loaded, target, heads=None if circuit is None else cdt.Circuit.load(circuit), scope=scope,
        source=None if told is None else make_task(told, loaded.tokenizer),
        options=options, checkpoint=out / "checkpoint.json", keep_checkpoint=True,
        log=out / "log.jsonl",
    )  # fmt: skip
    if is_main():
        result.adapter.save(out)
        atomic_write(out / "history.csv", result.history.to_csv(index=False))
        remove_artifact(out / "checkpoint.json")
        cdt.render_report(result, path=out / "report.html", title=f"{target.name}: {result.scope}")
    columns = ["epoch", "train_loss", "target_loss", "target_accuracy", "source_accuracy"]
    rows = [[f"{row[c]:.3f}" for c in columns[1:]] for row in result.history.to_dict("records")]
    epochs_seen = result.history["epoch"].tolist()
    tell_table(columns, [[e, *row] for e, row in zip(epochs_seen, rows, strict=True)])
    tell(
        f"{result.trained_parameters:,} of {result.total_parameters:,} parameters "
        f"({result.share:.2%}): {_trained(result)}; "
        f"best epoch {result.best_epoch}: {out / 'adapter.json'}"
    )


def _trained(result: Any) -> str:
    """What a run trained, in words."""
    whole = {"full": "every weight", "norms": "the norms", "lora": "low-rank updates"}
    if result.scope in whole:
        return whole[result.scope]
    norms = {"all": " and the norms", "circuit": " and the norms of their layers", "none": ""}
    return f"{len(result.heads)} heads{norms[result.options['norms']]}"


def _source_settings(settings: Any, language: str | None, valid: Path | None) -> Any:
    """The settings of the task in the source language, if it is to be followed."""
    from dataclasses import replace

    own = bool(settings.files) or settings.task == "files"
    if own and language is not None:
        raise InputError(
            f"--source {language}: your own files have no languages by name; give a file in the "
            "source language with --source-valid"
        )
    if not own and valid is not None:
        raise InputError(f"--source-valid {valid}: for your own files only; use --source LANGUAGE")
    if own:
        return None if valid is None else replace(settings, files={"valid": str(valid)})
    return None if language is None else replace(settings, language=language)


def export(
    adapter: Annotated[Path, typer.Argument(help="Folder or file of an adapter.")],
    base: Annotated[str, typer.Option(help="The model that it was trained on.")],
    to: Annotated[Path, typer.Option(help="New folder for the Hugging Face checkpoint.")],
) -> None:
    """Write a Hugging Face checkpoint with the adapter in it; all else stays bit-identical."""
    import cdt_lens as cdt

    tell(str(cdt.export(cdt.Adapter.load(adapter), base, to)))


def transfer(
    config: Annotated[
        Path, typer.Argument(help="TOML file; benchmarks/nusax.toml shows the keys.")
    ],
    out: Annotated[Path, typer.Option(help="Run directory; an interrupted run goes on there.")],
    device: Device = None,
) -> None:
    """Proxy stage, discovery, every scope x target x seed, and one report.

    Under `accelerate launch` the examples of every step are shared out over the processes.
    """
    from dataclasses import replace

    from cdt_lens.experiments.transfer import run_transfer
    from cdt_lens.experiments.transfer_config import read_config

    read = read_config(config)
    show_transfer(run_transfer(replace(read, device=device or read.device), out, say))
    tell(str(out / "report.html"))


def demo(
    out: Annotated[Path, typer.Option(help="Run directory; an interrupted run goes on there.")],
    seed: Annotated[int, typer.Option(min=0, help="Decides every draw.")] = 0,
) -> None:
    """The whole experiment offline: a small model, an invented language, minutes on two cores."""
    from cdt_lens.experiments.demo import run_demo

    show_transfer(run_demo(out, say, seed=seed))
    tell(str(out / "report.html"))


def _options(pairs: list[str]) -> dict[str, Any]:
    """Training options from `name=value` arguments; values are read as TOML, else as text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise InputError(f"--option {pair!r}: expected name=value, such as norms=circuit")
        try:
            found[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[name] = text
    return found
