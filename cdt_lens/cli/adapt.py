"""The command `adapt`: a model, labelled rows of two languages, and out comes an adapted model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cdt_lens.cli.arguments import LogWith, Out, Verbalizer, with_options, words_of
from cdt_lens.cli.console import lead_on, say, tell
from cdt_lens.cli.show import show_adaptation
from cdt_lens.experiments.adapt_settings import AdaptSettings

_OPTIONS = (
    "template", "label_column", "keep", "minutes", "epochs", "set_aside", "seed", "device", "dtype",
)  # fmt: skip
File = Annotated[Path | None, typer.Option(help="Rows of that split; the default is a share.")]


@with_options(given=(AdaptSettings, _OPTIONS))
def adapt(
    model: Annotated[str, typer.Option(help="Hub name, Hugging Face folder or .gguf file.")],
    train: Annotated[
        Path, typer.Option(help="Labelled rows of the new language (CSV, TSV, JSONL).")
    ],
    source_train: Annotated[Path, typer.Option(help="Labelled rows of the known language.")],
    out: Out,
    given: dict[str, Any],
    verbalizer: Verbalizer = None,
    valid: File = None,
    test: File = None,
    source_valid: File = None,
    source_test: File = None,
    ready: Annotated[
        bool, typer.Option(help="The model does the task in the known language already.")
    ] = False,
    log_with: LogWith = None,
) -> None:
    """Adapt a model to another language, with a few hundred labelled rows.

    Fine-tunes the model on the known language, finds the heads that do the task, chooses on
    validation rows what to train on the new language (single heads, norms, low-rank updates or
    everything), trains it, and measures it on test rows. Writes the adapted model, its adapter and
    a page that explains what was gained and lost.
    """
    from cdt_lens.experiments.adapt import run_adapt

    files = {"train": train, "valid": valid, "test": test}
    source = {"train": source_train, "valid": source_valid, "test": source_test}
    given["template"] = given["template"].replace(r"\n", "\n")
    settings = AdaptSettings(
        model=model, ready=ready, verbalizer=words_of(verbalizer or []),
        target=_paths(files), source=_paths(source), **given,
    )  # fmt: skip
    result = run_adapt(settings, out, say, log_with=log_with)
    show_adaptation(result)
    if result.exported:
        tell(f"the adapted model: {out / result.exported}")
    tell(str(out / "report.html"))
    if result.exported:
        lead_on(["predict", out / result.exported, "--file", "rows.csv"])


def _paths(files: dict[str, Path | None]) -> dict[str, str]:
    return {split: str(path) for split, path in files.items() if path is not None}
