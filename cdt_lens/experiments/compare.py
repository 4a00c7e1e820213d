"""`cdt-lens compare`: methods compared in a run directory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from cdt_lens.comparing.budget import check_budget, sweep_price
from cdt_lens.comparing.compare import checked_methods, compare_methods
from cdt_lens.comparing.comparison import Comparison, PlantedComparison
from cdt_lens.core.artifacts import atomic_write
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Backend, Count, Empty, Seed
from cdt_lens.core.errors import InputError, did_you_mean
from cdt_lens.core.folders import check_run_folder
from cdt_lens.core.kept import Say, file_name
from cdt_lens.core.processes import is_main, wait_for_all
from cdt_lens.decomposition.baseline import mean_activations
from cdt_lens.experiments.discovery import judged_on, make_baseline, whole_baseline
from cdt_lens.experiments.runs import Run, kept_at, refuse_other_settings, writes
from cdt_lens.experiments.settings import Settings
from cdt_lens.models.view import view_of
from cdt_lens.planted.catalogue import PLANTED, planted_circuit
from cdt_lens.scoring.methods import DEFAULT_METHODS
from cdt_lens.tasks.task import Task
from cdt_lens.viz.report.report import render_report

# Forward passes of one example for each method, or the price of an exact sweep of 16 prompts under
# the default rules; None for the same examples, whatever they cost.
Budget = float | Literal["sweep"] | None


@writes
def compare_run(
    run: Run,
    say: Say,
    *,
    methods: Iterable[str] = DEFAULT_METHODS,
    budget: Budget = "sweep",
    held_out: int = 128,
    empty: Empty = "heads",
    draws: int = 5,
    progress: bool = True,
) -> Comparison:
    """Compare methods on the task of a run, and write the comparison into its directory.

    Args:
        run: An opened run directory.
        say: Takes one line of progress.
        methods: The methods to compare.
        budget: Forward passes of one example that each method may use. "sweep" is the price of an
            exact sweep of 16 prompts under the default rules. None scores the same examples by
            every method.
        held_out: Number of validation examples to judge on, balanced over the labels; as many as
            the split holds, if there are fewer.
        empty: The run that counts as f = 0; see `compare_methods`.
        draws: Number of random rankings.
        progress: Whether to show progress bars.

    Raises:
        InputError: `compare_methods` refuses the call, or the task has no validation split.
    """
    names = checked_methods(methods)
    settings = run.settings
    check_compare(run.folder, settings, run.task, budget=budget, held_out=held_out, empty=empty)
    valid = judged_on(run.task, "valid", held_out, settings.seed)
    train = run.scored()
    view = view_of(run.model)
    passes = _passes(budget, view.n_layers, view.n_heads)
    each = "" if passes is None else f", {passes:g} forward passes each"
    if passes is not None:
        check_budget(names, train, passes, layers=view.n_layers, heads=view.n_heads)
    say(
        f"{len(names)} methods on {len(train)} examples of {train.name}{each}, {len(valid)} held "
        "out"
    )
    baseline = make_baseline(run, say) if empty == "heads" else whole_baseline(run)
    result = compare_methods(
        run.model, train, valid, baseline, names, budget=passes, empty=empty, draws=draws,
        seed=settings.seed, folder=run.folder, batch_size=settings.batch_size, rows=settings.rows,
        progress=progress, say=say,
    )  # fmt: skip
    write_comparison(result, run.folder)
    return result


def _passes(budget: Budget, layers: int, heads: int) -> float | None:
    return sweep_price(layers, heads) if budget == "sweep" else budget


def check_compare(
    folder: Path, settings: Settings, task: Task, *, budget: Budget, held_out: int, empty: Empty
) -> None:
    """Check before the model is loaded that another comparison is not written over.

    Methods may be added to a comparison, and draws: what is measured is kept.

    Args:
        folder: The run directory.
        settings: The settings of the run.
        task: The task of the run.
        budget: Forward passes of one example for each method; see `compare_run`.
        held_out: Number of validation examples to judge on.
        empty: The run that counts as f = 0.

    Raises:
        InputError: No validation split, or the run holds a comparison on other examples or of
            another budget.
    """
    valid = judged_on(task, "valid", held_out, settings.seed)
    path = folder / "comparison.json"
    kept = kept_at(path, Comparison.load)
    if kept is not None:
        shape = kept.provenance.model_shape
        passes = _passes(budget, shape["n_layers"], shape["n_heads"])
        refuse_other_settings(
            path,
            {
                "held-out": kept.held_out, "budget": _in_words(kept.budget),
                "empty": kept.empty_run,
            },
            {"held-out": len(valid), "budget": _in_words(passes), "empty": empty},
        )  # fmt: skip


def _in_words(passes: float | None) -> str:
    return "none (--same-examples)" if passes is None else f"{passes:g}"


@checked_arguments
def compare_planted(
    circuits: Iterable[str] = tuple(PLANTED),
    methods: Iterable[str] = DEFAULT_METHODS,
    *,
    folder: str | Path | None = None,
    draws: Count = 5,
    seed: Seed = 0,
    backend: Backend = "auto",
    batch_size: Count = 16,
    rows: Count | None = None,
    progress: bool = True,
    say: Say | None = None,
) -> PlantedComparison:
    """Compare methods on planted circuits, whose heads are known, at every size of a circuit.

    Args:
        circuits: Names of planted circuits.
        methods: The methods to compare.
        folder: Folder for the results; None writes nothing. Circuits that it holds from earlier
            calls stay in the comparison.
        draws: Number of random rankings.
        seed: Seed of every random draw.
        backend: TransformerLens class to make the models as.
        batch_size: Number of examples per batch.
        rows: Number of rows (sources x examples) per pass; None chooses it by the length.
        progress: Whether to show progress bars.
        say: Takes one line of progress.

    Returns:
        The comparison on each circuit, those of the folder too.

    Raises:
        InputError: An unknown planted circuit or method, or the folder holds other files or a
            comparison with another seed.
    """
    names, methods = checked_circuits(circuits), checked_methods(methods)
    say = say or (lambda _: None)
    comparisons: dict[str, Comparison] = {}
    why: dict[str, str] = {}
    if folder is not None:
        # A folder with comparison.json alone may hold the comparison of a model.
        check_run_folder(folder, *map(file_name, PLANTED))
        kept = _kept_planted(Path(folder, "comparison.json"), seed)
        comparisons, why = dict(kept.circuits), dict(kept.why)
    for name in [name for name in comparisons if name not in names]:
        say(f"planted circuit {name}: kept from an earlier call")
    for name in names:
        say(f"planted circuit {name}")
        planted = planted_circuit(name, seed=seed, backend=backend)
        baseline = mean_activations(planted.model, planted.train, progress=False)
        total = planted.truth.numel()
        why[name] = planted.why
        comparisons[name] = compare_methods(
            planted.model, planted.train, planted.valid, baseline, methods, truth=planted.truth,
            fractions=[kept / total for kept in range(total + 1)], draws=draws, seed=seed,
            folder=None if folder is None else Path(folder) / file_name(name),
            batch_size=batch_size, rows=rows, progress=progress, say=say,
        )  # fmt: skip
    result = PlantedComparison(comparisons, why)
    if folder is not None:
        write_comparison(result, folder)
    return result


def _kept_planted(path: Path, seed: int) -> PlantedComparison:
    """Return what earlier calls compared, without circuits if there is nothing.

    Raises:
        InputError: It was compared with another seed.
    """
    kept = kept_at(path, PlantedComparison.load) or PlantedComparison({})
    for each in kept.circuits.values():
        refuse_other_settings(path, {"seed": each.provenance.seed}, {"seed": seed})
    return kept


def write_comparison(result: Comparison | PlantedComparison, folder: str | Path) -> None:
    """Write `comparison.json`, `.csv` and `.png`, and `report.html`, from one process.

    Args:
        result: The comparison.
        folder: The folder to write into.
    """
    folder = Path(folder)
    if is_main():
        result.save(folder / "comparison.json")
        atomic_write(folder / "comparison.csv", result.to_dataframe().to_csv(index=False))
        result.plot().save(folder / "comparison.png")
        title = "Methods on planted circuits"
        if isinstance(result, Comparison):
            title = f"{result.task}: {len(result.methods)} methods on {result.model}"
        render_report(result, path=folder / "report.html", title=title)
    wait_for_all()


def checked_circuits(circuits: Iterable[str]) -> tuple[str, ...]:
    """Return names of planted circuits, each once.

    Args:
        circuits: The names.

    Raises:
        InputError: An unknown name, or no name.
    """
    names, known = tuple(dict.fromkeys(circuits)), ", ".join(PLANTED)
    if not names:
        raise InputError(f"planted circuits: expected any of {known}; got none")
    for name in names:
        if name not in PLANTED:
            hint = did_you_mean(name, PLANTED)
            raise InputError(f"planted circuit {name!r}: unknown{hint}; expected any of {known}")
    return names
