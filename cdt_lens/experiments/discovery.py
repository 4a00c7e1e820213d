"""The stages of a discovery run: discover a circuit, ablate, measure faithfulness, report.

Each stage takes an opened run directory (`runs`). It reuses results of the same model and data, and
saves the results that it computes.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.edge_faithfulness import EdgeFaithfulness, edge_faithfulness
from cdt_lens.circuits.faithfulness import (
    FaithfulnessCurve,
    faithfulness_curve,
    measured_for,
)
from cdt_lens.circuits.graph import Graph
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.circuits.reliability import NOISE, reliability
from cdt_lens.core.choices import Empty, Metric, Ranking
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.core.kept import Say
from cdt_lens.core.processes import is_main, wait_for_all
from cdt_lens.decomposition.baseline import (
    Baseline,
    counterfactual_baseline,
    mean_activations,
)
from cdt_lens.experiments.inputs import paired_examples
from cdt_lens.experiments.runs import (
    ROWS,
    Run,
    check_run_model,
    kept_at,
    refuse_other_settings,
    scored,
    stage,
    writes,
)
from cdt_lens.experiments.settings import Settings
from cdt_lens.scoring.agreement import MethodAgreement, compare_scores
from cdt_lens.scoring.iterative import trace_circuit
from cdt_lens.scoring.methods import exact_ablation
from cdt_lens.scoring.prompt_views import attention_view, token_relevance
from cdt_lens.scoring.sweep import score_heads
from cdt_lens.tasks.evaluate import Evaluation, evaluate
from cdt_lens.tasks.metrics import warn_at_chance
from cdt_lens.tasks.task import Examples, Task, most_balanced
from cdt_lens.viz.report.report import render_report


@writes
def discover(run: Run, say: Say) -> tuple[Circuit, HeadScores, Evaluation]:
    """Compute baseline, scores and circuit; each is saved when done and reused by later calls."""
    settings = run.settings
    evaluation = evaluate(run.model, run.scored(), run.task)
    if evaluation.examples < settings.examples:
        say(f"only {evaluation.examples} examples can be balanced over the labels")
    prior = "label-prior calibrated" if run.task.prior else "uncalibrated"
    f1 = "" if evaluation.macro_f1 is None else f", macro-F1 {evaluation.macro_f1:.3f}"
    say(
        f"{run.task.name}: accuracy {evaluation.accuracy:.3f}{f1} ({prior}), mean direction "
        f"{evaluation.direction:+.3f} logits on the {evaluation.examples} examples to be scored"
    )
    guess = run.scored().guess
    warn_at_chance(evaluation.split, "accuracy", evaluation.accuracy, guess)
    warn_at_chance(evaluation.split, "direction", evaluation.direction, guess)
    baseline = make_baseline(run, say)
    began = time.monotonic()
    scores = stage(
        run, "scores.json", HeadScores.load, lambda: _scores(run, baseline), say,
        made_from={"data": run.scored().hash, "baseline": baseline.hash},
    )  # fmt: skip
    _tell_noise(run, scores, time.monotonic() - began, say)
    circuit = _select(scores, settings)
    if is_main():
        circuit.save(run.path("circuit.json"))
    wait_for_all()
    return circuit, scores, evaluation


@writes
def make_baseline(run: Run, say: Say) -> Baseline:
    """Return the baseline of the run, averaged now or by an earlier call."""
    if run.settings.baseline == "counterfactual":
        return _paired_baseline(run)
    baseline: Baseline = stage(
        run, "baseline.json", Baseline.load, lambda: _baseline(run), say,
        made_from={"data": _averaged(run).hash},
    )  # fmt: skip
    return baseline


def made_from(result: HeadScores | FaithfulnessCurve, data: Examples, baseline: Baseline) -> bool:
    """Return whether a result was computed on these examples with this baseline."""
    provenance = result.provenance
    return (
        provenance.task_hash == data.hash
        and provenance.options.get("baseline_hash") == baseline.hash
    )


@writes
def ablate(run: Run, say: Say) -> MethodAgreement:
    """Ablate every head exactly, and compute how well the scores predict the effects."""
    baseline, scores = load_baseline(run), load_scores(run)

    def compute() -> HeadScores:
        return exact_ablation(
            run.model, run.scored(), baseline, direction=run.settings.direction,
            batch_size=run.settings.batch_size, rows=run.settings.rows,
            checkpoint=run.path("ablation.partial.json"),
        )  # fmt: skip

    reference = stage(
        run, "ablation.json", HeadScores.load, compute, say,
        made_from={"data": run.scored().hash, "baseline": baseline.hash},
    )  # fmt: skip
    return compare_scores(scores, reference)


@writes
def measure(
    run: Run, say: Say, *, split: str = "valid", examples: int = 48, metric: Metric = "direction",
    draws: int = 5, empty: Empty = "heads",
) -> FaithfulnessCurve:  # fmt: skip
    """Measure the faithfulness curve on a split that was not scored, or return the kept one.

    Raises:
        InputError: The run holds a curve of other settings.
    """
    check_measure(
        run.folder, run.settings, run.task, split=split, examples=examples, metric=metric,
        draws=draws, empty=empty,
    )  # fmt: skip
    data = judged_on(run.task, split, examples, run.settings.seed)
    return make_curve(run, say, data, metric=metric, draws=draws, empty=empty)


def measure_graph(
    run: Run, say: Say, graph: Graph, *, split: str = "valid", examples: int = 48,
    metric: Metric = "direction", draws: int = 5,
) -> EdgeFaithfulness:  # fmt: skip
    """Measure the faithfulness of a graph of direct edges; nothing is written.

    Args:
        run: The opened run directory.
        say: Receives one line of progress.
        graph: The graph, such as one of EAP-IG or MIB.
        split: The split to measure on.
        examples: Number of examples, balanced over the labels.
        metric: What the graph should keep of the full model.
        draws: Number of random graphs of as many edges.

    Returns:
        f of the graph, with the run's kind of baseline.

    Raises:
        InputError: No such split, or a graph of another model's shape or of all paths.
    """
    data = judged_on(run.task, split, examples, run.settings.seed)
    say(f"faithfulness of direct edges on {len(data)} examples of {data.name}")
    settings = run.settings
    return edge_faithfulness(
        run.model, graph, data, whole_baseline(run), metric=metric, draws=draws, seed=settings.seed,
        task=run.task, batch_size=settings.batch_size, rows=settings.rows,
    )  # fmt: skip


def make_curve(
    run: Run, say: Say, data: Examples, *, metric: Metric = "direction", draws: int = 5,
    empty: Empty = "heads",
) -> FaithfulnessCurve:  # fmt: skip
    """Return the faithfulness curve of the run on `data`, measured now or by an earlier call."""
    settings, baseline, scores = run.settings, _baseline_for(run, empty), load_scores(run)

    def load(path: Path) -> FaithfulnessCurve:
        curve = FaithfulnessCurve.load(path)
        options = curve.provenance.options
        same = curve.metric == metric and options.get("draws") == draws
        same = same and curve.empty_run == empty
        if not (same and curve_fits(curve, scores, settings.by, baseline, data)):
            raise ArtifactError(f"{path} was measured for other scores or examples")
        return curve

    def compute() -> FaithfulnessCurve:
        say(f"faithfulness on {len(data)} examples of {data.name}")
        return faithfulness_curve(
            run.model, scores, data, baseline, by=settings.by, metric=metric, empty=empty,
            draws=draws, seed=settings.seed, task=run.task, batch_size=settings.batch_size,
            rows=settings.rows,
        )  # fmt: skip

    curve: FaithfulnessCurve = stage(
        run, "faithfulness.json", load, compute, say,
        made_from={"data": data.hash, "baseline": baseline.hash},
    )  # fmt: skip
    return curve


def check_measure(
    folder: Path, settings: Settings, task: Task, *, split: str, examples: int, metric: Metric,
    draws: int, empty: Empty,
) -> None:  # fmt: skip
    """Check before the model is loaded that a run can be measured with these settings.

    Args:
        folder: The run directory.
        settings: The settings of the run.
        task: The task of the run.
        split: The split to measure on.
        examples: The number of examples.
        metric: The metric of the curve.
        draws: The number of random circuits of each kind and size.
        empty: The run that counts as f = 0.

    Raises:
        InputError: No such split, no scores, or a curve of other settings.
    """
    data = judged_on(task, split, examples, settings.seed)
    HeadScores.load(folder / "scores.json")
    path = folder / "faithfulness.json"
    curve = kept_at(path, FaithfulnessCurve.load)
    if curve is None:
        return
    kept = curve.provenance
    refuse_other_settings(
        path,
        {
            "split": kept.task, "examples": sum(kept.examples.values()), "metric": curve.metric,
            "draws": kept.options.get("draws"), "empty": curve.empty_run,
        },
        {
            "split": data.name, "examples": len(data), "metric": metric, "draws": draws,
            "empty": empty,
        },
    )  # fmt: skip


def judged_on(task: Task, split: str, examples: int, seed: int) -> Examples:
    """Return the examples that faithfulness is measured on, balanced over the labels."""
    data = split_of(task, split)
    return data.balanced(min(examples, most_balanced(data)), seed=seed)


def curve_fits(
    curve: FaithfulnessCurve, scores: HeadScores, by: Ranking, baseline: Baseline,
    data: Examples | None,
) -> bool:  # fmt: skip
    """Return whether a curve belongs to this ranking, this baseline and these examples."""
    same_ranking = measured_for(curve, scores) and curve.provenance.options.get("by") == by
    return same_ranking and data is not None and made_from(curve, data, baseline)


def _data_of(curve: FaithfulnessCurve, run: Run) -> Examples | None:
    """Return the examples that the settings of the curve draw from the present data."""
    provenance = curve.provenance
    for split in ("train", "valid", "test"):
        data = getattr(run.task, split)
        if data.name == provenance.task and most_balanced(data):
            n = sum(provenance.examples.values())
            return judged_on(run.task, split, n, run.settings.seed)
    return None


@writes
def trace(
    run: Run, say: Say, *, examples: int | None = None, width: int = 8, fan_in: int = 3
) -> Circuit:
    """Trace which heads and MLPs feed which, from the logits down, or return the kept graph.

    Args:
        run: The opened run directory.
        say: Receives one line of progress.
        examples: Number of training examples, balanced; None takes the scored examples.
        width: Number of heads and MLPs selected at the logits.
        fan_in: Number of edges kept into each selected one.

    Returns:
        The circuit with its graph.

    Raises:
        InputError: The run holds a graph of other settings.
    """
    check_trace(
        run.folder, run.settings, run.task, examples=examples, width=width, fan_in=fan_in
    )  # fmt: skip
    data = _traced(run.settings, run.task, examples)
    say(f"edges on {len(data)} examples of {data.name}")
    baseline = whole_baseline(run)

    def compute() -> Circuit:
        return trace_circuit(
            run.model, data, baseline, width=width, fan_in=fan_in,
            batch_size=run.settings.batch_size, rows=run.settings.rows,
        )  # fmt: skip

    circuit: Circuit = stage(
        run, "graph.json", _with_origin, compute, say,
        made_from={"data": data.hash, "baseline": baseline.hash},
    )  # fmt: skip
    return circuit


def check_trace(
    folder: Path, settings: Settings, task: Task, *, examples: int | None, width: int, fan_in: int
) -> None:
    """Check before the model is loaded that a graph of other settings is not written over.

    Args:
        folder: The run directory.
        settings: The settings of the run.
        task: The task of the run.
        examples: Number of training examples; None takes the scored examples.
        width: Number of heads and MLPs selected at the logits.
        fan_in: Number of edges kept into each selected one.

    Raises:
        InputError: The run holds a graph of other settings, or a label word has several tokens.
    """
    task.train.require_one_token("a graph of edges")
    path = folder / "graph.json"
    kept = getattr(kept_at(path, Circuit.load), "provenance", None)
    if kept is not None:
        names = ("width", "fan_in")
        refuse_other_settings(
            path,
            {"examples": sum(kept.examples.values()), **{n: kept.options.get(n) for n in names}},
            {"examples": len(_traced(settings, task, examples)), "width": width, "fan_in": fan_in},
        )


def _traced(settings: Settings, task: Task, examples: int | None) -> Examples:
    """Return the examples whose edges are scored."""
    data = scored(settings, task)
    if examples is None:
        return data
    return data.balanced(min(examples, most_balanced(data)), seed=settings.seed)


def _is_present(traced: Circuit, run: Run) -> bool:
    """Return whether a graph was made from the examples that the run has now."""
    kept = traced.provenance
    if kept is None:
        return False
    whole = _traced(run.settings, run.task, None)
    part = _traced(run.settings, run.task, sum(kept.examples.values()))
    return kept.task_hash in (whole.hash, part.hash)


def _with_origin(path: Path) -> Circuit:
    circuit = Circuit.load(path)
    if circuit.provenance is None:
        raise ArtifactError(f"{path} does not say what it was made from")
    return circuit


def check_report(folder: Path, settings: Settings, task: Task) -> None:
    """Check before the model is loaded that a run holds the results that a report needs.

    Args:
        folder: The run directory.
        settings: The settings of the run.
        task: The task of the run.

    Raises:
        InputError: There is no circuit, or there are no scores.
    """
    Circuit.load(folder / "circuit.json")
    HeadScores.load(folder / "scores.json")


@writes
def report(run: Run, say: Say, *, prompts: int = 3, heads: int = 8) -> Path:
    """Write one HTML file of all results in the run directory, with views of a few prompts."""
    circuit, scores = Circuit.load(run.path("circuit.json")), load_scores(run)
    circuit.check_model(run.model)
    results: list[object] = [circuit, scores]
    if run.path("faithfulness.json").exists():
        curve = FaithfulnessCurve.load(run.path("faithfulness.json"))
        baseline = _baseline_for(run, curve.empty_run)
        if curve_fits(curve, scores, run.settings.by, baseline, _data_of(curve, run)):
            results.append(curve)
        else:
            say(
                "faithfulness.json was measured for another ranking or on other examples and is "
                "left out; measure again"
            )
    if run.path("ablation.json").exists():
        exact = HeadScores.load(run.path("ablation.json"))
        if made_from(exact, run.scored(), load_baseline(run)):
            results.append(compare_scores(scores, exact))
        else:
            say("ablation.json was computed on other examples and is left out; run discover again")
    if run.path("graph.json").exists():
        traced = Circuit.load(run.path("graph.json"))
        traced.check_model(run.model)
        if _is_present(traced, run):
            results.append(traced.graph)
        else:
            say("graph.json was computed on other examples and is left out; run trace again")
    shown = _short(run.task.valid if len(run.task.valid) else run.task.train, prompts)
    say(f"views of {len(shown)} prompts")
    strongest = [h for h in scores.ranking(run.settings.by) if h in circuit][:heads]
    results.append(attention_view(run.model, shown, strongest))
    results.append(
        token_relevance(
            run.model, shown, circuit.heads, load_baseline(run), rules=run.settings.rules
        )
    )
    title = f"{run.task.name}: {len(circuit)} heads of {circuit.provenance.model}"  # type: ignore[union-attr]
    return render_report(*results, path=run.path("report.html"), title=title)


def _short(examples: Examples, n: int) -> Examples:
    """Return the `n` shortest prompts, taking the labels in turn; short prompts fit the page."""
    by_label = [
        sorted((e for e in examples if e.label == label), key=lambda e: len(e.tokens))
        for label in examples.labels
    ]
    turns = [e for row in itertools.zip_longest(*by_label) for e in row if e is not None]
    return replace(examples, items=tuple(turns[:n]))


def _baseline_for(run: Run, empty: Empty) -> Baseline:
    """Return the baseline of the run with the values that an empty run needs."""
    return load_baseline(run) if empty == "heads" else whole_baseline(run)


def whole_baseline(run: Run) -> Baseline:
    """Return the baseline of the run with values for the MLPs and the input."""
    if run.settings.baseline == "counterfactual":
        return _paired_baseline(run)
    return mean_activations(
        run.model, _averaged(run), positions=run.settings.positions, mlps=True,
        batch_size=run.settings.batch_size,
    )  # fmt: skip


def load_scores(run: Run) -> HeadScores:
    """Load the scores of the run; those of another model are refused."""
    scores = HeadScores.load(run.path("scores.json"))
    check_run_model(run, scores.provenance, "scores.json")
    return scores


def load_baseline(run: Run) -> Baseline:
    """Load the baseline of the run; that of another model is refused."""
    if run.settings.baseline == "counterfactual":
        return _paired_baseline(run)
    baseline = Baseline.load(run.path("baseline.json"))
    check_run_model(run, baseline.provenance, "baseline.json")
    return baseline


def split_of(task: Task, name: str) -> Examples:
    """Return a split by name.

    Raises:
        InputError: an unknown split, or one without examples.
    """
    if name not in ("train", "valid", "test"):
        raise InputError(
            f"split {name!r}: expected train, valid or test (discover sets rows aside: --split 0.2)"
        )
    examples: Examples = getattr(task, name)
    if not len(examples):
        given = [part for part in ("train", "valid", "test") if len(getattr(task, part))]
        raise InputError(
            f"{examples.name}: no examples; this task has {', '.join(given)}. Run discover again "
            "with a file for this split, or with --split 0.2 to set aside validation rows."
        )
    if name != "train":
        task.require_held_out(name)
    return examples


def _paired_baseline(run: Run) -> Baseline:
    # It holds prompts alone, which the task gives again at any time.
    return counterfactual_baseline(run.model, paired_examples(run.task))


def _averaged(run: Run) -> Examples:
    """Return the prompts that the baseline averages."""
    examples = run.averaged()
    return examples.pairs if run.settings.baseline == "counterfactual-mean" else examples


def _baseline(run: Run) -> Baseline:
    settings = run.settings
    return mean_activations(
        run.model, _averaged(run), positions=settings.positions, batch_size=settings.batch_size
    )


def _scores(run: Run, baseline: Baseline) -> HeadScores:
    settings = run.settings
    scores = score_heads(
        run.model, run.scored(), baseline, rules=settings.rules, direction=settings.direction,
        exact=settings.exact, precision=settings.precision, minutes=settings.minutes,
        decide={**_size(settings), "by": settings.by} if settings.decide else None,
        seed=settings.seed, batch_size=settings.batch_size, rows=settings.rows,
        checkpoint=run.path("scores.partial.json"),
    )  # fmt: skip
    # The seed drew the examples.
    return replace(scores, provenance=replace(scores.provenance, seed=settings.seed))


def _tell_noise(run: Run, scores: HeadScores, seconds: float, say: Say) -> None:
    """Say if much of the ranking is noise, and what would help."""
    found = reliability(scores)
    if not found.split_half < NOISE:
        return
    more = min(4 * found.examples, most_balanced(run.task.train))
    examples, exact = f"--examples {more}", "--exact"
    parent = run.folder.parent
    if (parent / "transfer.json").exists():  # whose settings are in a file
        examples, exact = f"[discovery] examples = {more}", "[discovery] exact"
    ways = [f"score more prompts ({examples})"] if more > found.examples else []
    if scores.cheap is not None:
        ways.append(f"sweep more of them ({exact})")
    if (parent / ROWS).is_dir():  # of `adapt`, which has a third of its time for the scores
        ways = ["give adapt more minutes in another folder"]
    advice = ", or ".join(ways) or "every balanced training prompt is swept"
    took = f"; these scores took {seconds / 60:.1f} minutes" if seconds > 60 else ""
    say(
        f"caution: much of the ranking is noise (split-half reliability {found.split_half:.2f} "
        f"from {found.examples} prompts); {advice}{took}"
    )


def _select(scores: HeadScores, settings: Settings) -> Circuit:
    return scores.select(**_size(settings), by=settings.by)


def _size(settings: Settings) -> dict[str, Any]:
    """Return the size of the circuit as an argument of `HeadScores.select`."""
    if settings.k is None and settings.fraction is None:
        return {"fraction": 0.1}
    return {"fraction": settings.fraction} if settings.k is None else {"k": settings.k}
