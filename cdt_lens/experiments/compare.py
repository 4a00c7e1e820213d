"""`cdt-lens compare`: methods side by side in a run directory."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cdt_lens.comparing.compare import checked_methods, compare_methods
from cdt_lens.comparing.comparison import Comparison, PlantedComparison
from cdt_lens.core.artifacts import atomic_write
from cdt_lens.core.errors import InputError, did_you_mean
from cdt_lens.core.kept import Say, file_name
from cdt_lens.core.processes import is_main, wait_for_all
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.experiments.discovery import make_baseline, split_of
from cdt_lens.experiments.runs import Run
from cdt_lens.planted.catalogue import PLANTED, planted_circuit
from cdt_lens.scoring.methods import DEFAULT_METHODS
from cdt_lens.tasks.task import most_balanced
from cdt_lens.viz.report.report import render_report


def compare_run(
    run: Run,
    say: Say,
    *,
    methods: Iterable[str] = DEFAULT_METHODS,
    held_out: int = 48,
    draws: int = 5,
    progress: bool = True,
) -> Comparison:
    """Compare methods on a run's task, in its directory, and write what came of it there.

    Raises:
        InputError: what `compare_methods` refuses, or a task without a validation split.
    """
    names = checked_methods(methods)
    settings = run.settings
    valid = split_of(run.task, "valid")
    valid = valid.balanced(min(held_out, most_balanced(valid)), seed=settings.seed)
    train = run.scored()
    say(f"{len(names)} methods on {len(train)} examples of {train.name}, {len(valid)} held out")
    result = compare_methods(
        run.model, train, valid, make_baseline(run, say), names, draws=draws, seed=settings.seed,
        folder=run.folder, batch_size=settings.batch_size, rows=settings.rows, progress=progress,
        say=say,
    )  # fmt: skip
    write_comparison(result, run.folder)
    return result


def compare_planted(
    circuits: Iterable[str] = tuple(PLANTED),
    methods: Iterable[str] = DEFAULT_METHODS,
    *,
    folder: str | Path | None = None,
    draws: int = 5,
    seed: int = 0,
    backend: Any = "auto",
    batch_size: int = 16,
    rows: int | None = None,
    progress: bool = True,
    say: Say | None = None,
) -> PlantedComparison:
    """Compare methods on planted circuits, whose heads are known; at every size of a circuit.

    Raises:
        InputError: an unknown planted circuit or method.
    """
    names, methods = checked_circuits(circuits), checked_methods(methods)
    say = say or (lambda _: None)
    found: dict[str, Comparison] = {}
    why: dict[str, str] = {}
    for name in names:
        say(f"planted circuit {name}")
        planted = planted_circuit(name, seed=seed, backend=backend)
        baseline = mean_activations(planted.model, planted.train, progress=False)
        total = planted.truth.numel()
        why[name] = planted.why
        found[name] = compare_methods(
            planted.model, planted.train, planted.valid, baseline, methods, truth=planted.truth,
            fractions=[kept / total for kept in range(total + 1)], draws=draws, seed=seed,
            folder=None if folder is None else Path(folder) / file_name(name),
            batch_size=batch_size, rows=rows, progress=progress, say=say,
        )  # fmt: skip
    result = PlantedComparison(found, why)
    if folder is not None:
        write_comparison(result, folder)
    return result


def write_comparison(result: Comparison | PlantedComparison, folder: str | Path) -> None:
    """`comparison.json`, `.csv` and `.png`, and `report.html`, in `folder`, from one process."""
    folder = Path(folder)
    if is_main():
        result.save(folder / "comparison.json")
        atomic_write(folder / "comparison.csv", result.to_dataframe().to_csv(index=False))
        picture = io.BytesIO()
        result.plot().savefig(picture, format="png", dpi=150, bbox_inches="tight")
        atomic_write(folder / "comparison.png", picture.getvalue())
        title = "Methods on planted circuits"
        if isinstance(result, Comparison):
            title = f"{result.task}: {len(result.methods)} methods on {result.model}"
        render_report(result, path=folder / "report.html", title=title)
    wait_for_all()


def checked_circuits(circuits: Iterable[str]) -> tuple[str, ...]:
    """Names of planted circuits, each once.

    Raises:
        InputError: an unknown name, or none.
    """
    names, known = tuple(dict.fromkeys(circuits)), ", ".join(PLANTED)
    if not names:
        raise InputError(f"planted circuits: expected any of {known}; got none")
    for name in names:
        if name not in PLANTED:
            hint = did_you_mean(name, PLANTED)
            raise InputError(f"planted circuit {name!r}: unknown{hint}; expected any of {known}")
    return names
