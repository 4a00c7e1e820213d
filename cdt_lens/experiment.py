"""From settings to a run directory: discover a circuit, measure it, report it.

A run directory holds `run.json` (the settings), `baseline`, `scores`, `circuit`, `ablation`,
`faithfulness` (JSON, with tensors beside them) and `report.html`. Every file is written whole; a
stage whose file is there for the same settings is not run again, and a sweep that was cut off
goes on after its last finished batch.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cdt_lens.ablation import Metric
from cdt_lens.artifacts import load_artifact, save_artifact
from cdt_lens.attribution import exact_ablation
from cdt_lens.baselines import Baseline, Slots, mean_activations
from cdt_lens.circuit import Circuit
from cdt_lens.datasets import load_task, task_from_files
from cdt_lens.distributed import is_main
from cdt_lens.errors import ArtifactError, InputError
from cdt_lens.evaluate import Evaluation, calibrate, evaluate
from cdt_lens.faithfulness import FaithfulnessCurve, Ranking, faithfulness_curve
from cdt_lens.head_scores import HeadScores, MethodAgreement, compare_scores
from cdt_lens.loading import Backend, load_model
from cdt_lens.model import view_of
from cdt_lens.report import render_report
from cdt_lens.scores import Direction, score_heads
from cdt_lens.tasks import Examples, Task
from cdt_lens.views import attention_view, token_relevance

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What a discovery run does; all of it is kept in `run.json`.

    model: hub name, folder or GGUF file; task and language: see `datasets.load_task`, or "files"
    with `files` by split, `template` and `verbalizer`; examples: scored, balanced over labels;
    baseline_examples: averaged (None: as many as can be balanced); k or fraction: circuit size.
    """

    model: str
    task: str
    language: str | None = None
    data: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None
    verbalizer: Mapping[str, str] = field(default_factory=dict)
    label_column: str = "label"
    shots: int = 0
    calibrate: bool = False
    backend: Backend = "auto"
    device: str | None = None
    dtype: str = "float32"
    rules: str = "stable"
    positions: Slots = "answer"
    direction: Direction = "mean"
    examples: int = 48
    baseline_examples: int | None = None
    k: int | None = None
    fraction: float | None = None
    by: Ranking = "magnitude"
    batch_size: int = 16
    rows: int | None = None
    seed: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """The inverse of `dataclasses.asdict`.

        Raises:
            InputError: a name that is no setting.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"settings: unknown {', '.join(unknown)}; this cdt_lens may be older")
        return cls(**values)


@dataclass(frozen=True)
class Run:
    """An opened run directory: its settings, and the model and task they name."""

    folder: Path
    settings: Settings
    model: nn.Module
    task: Task

    def path(self, name: str) -> Path:
        return self.folder / name

    def scored(self) -> Examples:
        """The training examples that the scores are computed on."""
        train = self.task.train
        return train.balanced(min(self.settings.examples, _most(train)), seed=self.settings.seed)

    def averaged(self) -> Examples:
        """The training examples that the baseline is averaged over: all, or as many as set."""
        n = self.settings.baseline_examples
        if n is None:
            return self.task.train
        return self.task.train.balanced(min(n, _most(self.task.train)), seed=self.settings.seed)


def _most(examples: Examples) -> int:
    """How many examples can be drawn with the same number of each label."""
    return min(examples.counts.values()) * len(examples.labels)


def start_run(settings: Settings, folder: str | Path, say: Say) -> Run:
    """Open a run directory for `settings`, new or as an earlier call left it.

    Raises:
        InputError: the folder holds a run with other settings.
    """
    folder = Path(folder)
    path = folder / "run.json"
    wanted = json.loads(json.dumps(asdict(settings)))
    if path.exists():
        body, _ = load_artifact(path, format="cdt_lens.run", version=1)
        different = [k for k, v in wanted.items() if body["settings"].get(k) != v]
        if different:
            raise InputError(
                f"{folder}: holds a run with other settings ({', '.join(different)}); "
                "name another folder, or remove it"
            )
    run = _open(folder, settings, say)
    if is_main():
        save_artifact(path, {"settings": wanted}, format="cdt_lens.run", version=1)
    return run


def open_run(folder: str | Path, say: Say) -> Run:
    """Open a run directory that `discover` has made.

    Raises:
        InputError: the folder holds no run.
    """
    path = Path(folder) / "run.json"
    if not path.exists():
        raise InputError(f"{folder}: holds no run (no run.json); make one with cdt-lens discover")
    body, _ = load_artifact(path, format="cdt_lens.run", version=1)
    return _open(Path(folder), Settings.from_dict(body["settings"]), say)


def _open(folder: Path, settings: Settings, say: Say) -> Run:
    dtype = getattr(torch, settings.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype={settings.dtype!r}: expected float32, bfloat16 or float64")
    say(f"loading {settings.model}")
    model = load_model(
        settings.model, backend=settings.backend, device=settings.device, dtype=dtype
    )
    task = make_task(settings, model.tokenizer)
    if settings.calibrate:
        task = calibrate(model, task)
    return Run(folder, settings, model, task)


def make_task(settings: Settings, tokenizer: Any) -> Task:
    """The task that `settings` name.

    Raises:
        InputError: an unknown task, files that cannot be read, or words of several tokens.
    """
    if settings.task == "files" or settings.files:
        if not settings.files or settings.template is None or not settings.verbalizer:
            raise InputError(
                "task files: expected a file for train (and valid, test), a template with the "
                'columns in braces, and a verbalizer word for each label, such as positive=" good"'
            )
        return task_from_files(
            settings.files, tokenizer=tokenizer, template=settings.template,
            verbalizer=settings.verbalizer, label_column=settings.label_column,
            shots=settings.shots, seed=settings.seed,
        )  # fmt: skip
    return load_task(
        settings.task, settings.language, tokenizer=tokenizer, folder=settings.data,
        template=settings.template, verbalizer=settings.verbalizer or None,
        shots=settings.shots, seed=settings.seed,
    )  # fmt: skip


# ------------------------------------------------------------------ stages


def discover(run: Run, say: Say) -> tuple[Circuit, HeadScores, Evaluation]:
    """Baseline, scores, circuit; each saved when done and reused when there."""
    settings = run.settings
    evaluation = evaluate(run.model, run.scored(), run.task)
    prior = "label-prior calibrated" if run.task.prior else "uncalibrated"
    f1 = "" if evaluation.macro_f1 is None else f", macro-F1 {evaluation.macro_f1:.3f}"
    say(
        f"{run.task.name}: accuracy {evaluation.accuracy:.3f}{f1} ({prior}), mean direction "
        f"{evaluation.direction:+.3f} logits on the {evaluation.examples} examples to be scored"
    )
    baseline = _stage(run, "baseline.json", Baseline.load, lambda: _baseline(run), say)
    scores = _stage(run, "scores.json", HeadScores.load, lambda: _scores(run, baseline), say)
    circuit = _select(scores, settings)
    if is_main():
        circuit.save(run.path("circuit.json"))
    return circuit, scores, evaluation


def ablate(run: Run, say: Say) -> MethodAgreement:
    """Exact mean-ablation of every head, and how well the scores predict it."""
    baseline, scores = load_baseline(run), load_scores(run)

    def compute() -> HeadScores:
        return exact_ablation(
            run.model, run.scored(), baseline, direction=run.settings.direction,
            batch_size=run.settings.batch_size, rows=run.settings.rows,
            checkpoint=run.path("ablation.partial.json"),
        )  # fmt: skip

    reference = _stage(run, "ablation.json", HeadScores.load, compute, say)
    return compare_scores(scores, reference)


def measure(
    run: Run, say: Say, *, split: str = "valid", examples: int = 48, metric: Metric = "direction",
    draws: int = 5,
) -> FaithfulnessCurve:  # fmt: skip
    """The faithfulness curve on a split that the scores have not seen."""
    data = split_of(run.task, split)
    data = data.balanced(min(examples, _most(data)), seed=run.settings.seed)
    baseline, scores = load_baseline(run), load_scores(run)
    say(f"faithfulness on {len(data)} examples of {data.name}")
    curve = faithfulness_curve(
        run.model, scores, data, baseline, by=run.settings.by, metric=metric, draws=draws,
        seed=run.settings.seed, task=run.task, batch_size=run.settings.batch_size,
        rows=run.settings.rows,
    )  # fmt: skip
    if is_main():
        curve.save(run.path("faithfulness.json"))
    return curve


def report(run: Run, say: Say, *, prompts: int = 3, heads: int = 8) -> Path:
    """One HTML file of everything that the run directory holds, with views of a few prompts."""
    circuit, scores = Circuit.load(run.path("circuit.json")), load_scores(run)
    circuit.check_model(run.model)
    results: list[object] = [circuit, scores]
    if run.path("faithfulness.json").exists():
        results.append(FaithfulnessCurve.load(run.path("faithfulness.json")))
    if run.path("ablation.json").exists():
        results.append(compare_scores(scores, HeadScores.load(run.path("ablation.json"))))
    shown = _short(run.task.valid if len(run.task.valid) else run.task.train, prompts)
    say(f"views of {len(shown)} prompts")
    strongest = [h for h in scores.ranking() if h in circuit][:heads]
    results.append(attention_view(run.model, shown, strongest))
    results.append(
        token_relevance(
            run.model, shown, circuit.heads, load_baseline(run), rules=run.settings.rules
        )
    )
    title = f"{run.task.name}: {len(circuit)} heads of {circuit.provenance.model}"  # type: ignore[union-attr]
    return render_report(*results, path=run.path("report.html"), title=title)


def _short(examples: Examples, n: int) -> Examples:
    """The `n` shortest prompts, taking the labels in turn: what fits a page is read."""
    by_label = [
        sorted((e for e in examples if e.label == label), key=lambda e: len(e.tokens))
        for label in examples.labels
    ]
    turns = [e for row in itertools.zip_longest(*by_label) for e in row if e is not None]
    return replace(examples, items=tuple(turns[:n]))


def load_scores(run: Run) -> HeadScores:
    """The run's scores, which must be this model's."""
    scores = HeadScores.load(run.path("scores.json"))
    _check(run, scores.provenance, "scores.json")
    return scores


def load_baseline(run: Run) -> Baseline:
    """The run's baseline, which must be this model's."""
    baseline = Baseline.load(run.path("baseline.json"))
    _check(run, baseline.provenance, "baseline.json")
    return baseline


def split_of(task: Task, name: str) -> Examples:
    """A split by name.

    Raises:
        InputError: an unknown split, or one without examples.
    """
    if name not in ("train", "valid", "test"):
        raise InputError(f"split {name!r}: expected train, valid or test")
    examples: Examples = getattr(task, name)
    examples.require_some()
    return examples


def _baseline(run: Run) -> Baseline:
    settings = run.settings
    return mean_activations(
        run.model, run.averaged(), positions=settings.positions, batch_size=settings.batch_size
    )


def _scores(run: Run, baseline: Baseline) -> HeadScores:
    settings = run.settings
    scores = score_heads(
        run.model, run.scored(), baseline, rules=settings.rules, direction=settings.direction,
        batch_size=settings.batch_size, rows=settings.rows,
        checkpoint=run.path("scores.partial.json"),
    )  # fmt: skip
    # The seed drew the examples.
    return replace(scores, provenance=replace(scores.provenance, seed=settings.seed))


def _select(scores: HeadScores, settings: Settings) -> Circuit:
    if settings.k is None and settings.fraction is None:
        return scores.select(fraction=0.1, by=settings.by)
    return scores.select(k=settings.k, fraction=settings.fraction, by=settings.by)


def _check(run: Run, provenance: Any, name: str) -> None:
    provenance.check_model(view_of(run.model), str(run.path(name)))


def _stage(
    run: Run, name: str, load: Callable[[Path], Any], compute: Callable[[], Any], say: Say
) -> Any:
    """The stage's file if it is there and this model's; else compute it and save it."""
    path = run.path(name)
    if path.exists():
        try:
            found = load(path)
            _check(run, found.provenance, name)
        except ArtifactError as error:
            say(f"{error}; making it again")
        else:
            say(f"{path} is there already")
            return found
    result = compute()
    if is_main():
        result.save(path)
        for rest in path.parent.glob(f"{path.stem}.partial*"):
            rest.unlink()
    return result
