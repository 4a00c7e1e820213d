"""Compare methods of scoring heads, on one model and task or on planted circuits.

1. The inputs are checked, then m(full) and m(empty) are measured on the held-out examples. A task
   in which the heads change nothing is refused before the first sweep.
2. Each method scores all heads, against the clock (`timed_scores`), on the examples that it may
   use (`budget`).
3. The circuits of its two rankings, and those of random rankings, are measured on the held-out
   examples (`measured_circuits`). The result is a `Comparison`.

Finished parts are kept. An interruption loses at most the method that was running, and of a sweep
at most one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cdt_lens.circuits.circuit import random_heads
from cdt_lens.circuits.faithfulness import checked_fractions
from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.circuits.measures import MIB_FRACTIONS, heads_at
from cdt_lens.comparing.budget import Share, shares
from cdt_lens.comparing.comparison import (
    RANKINGS,
    YARDSTICK,
    Comparison,
    MethodResult,
    RankingCurve,
)
from cdt_lens.comparing.measured_circuits import MeasuredCircuits
from cdt_lens.comparing.timed_scores import TimedScorer, TimedScores
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import SEEDS, Count, Empty, Positive, Seed
from cdt_lens.core.errors import InputError, NonFiniteError
from cdt_lens.core.kept import Say
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.models.caller_hooks import caller_hooks
from cdt_lens.models.heads import Head
from cdt_lens.models.provenance import hashed_once, provenance_of
from cdt_lens.models.session import uses_model
from cdt_lens.models.support import check_supported
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.scoring.agreement import auroc, average_precision, pearson, spearman
from cdt_lens.scoring.methods import DEFAULT_METHODS, METHODS, method_of
from cdt_lens.tasks.task import Examples, check_examples

# A share of the task direction: scores below it do not tell heads apart.
_NOTHING = 1e-4


@checked_arguments
@uses_model
def compare_methods(
    model: nn.Module | ModelView,
    train: Examples,
    valid: Examples,
    baseline: Baseline,
    methods: Iterable[str] = DEFAULT_METHODS,
    *,
    budget: Positive | None = None,
    truth: Any = None,
    fractions: Sequence[float] = MIB_FRACTIONS,
    empty: Empty = "heads",
    draws: Count = 5,
    seed: Seed = 0,
    folder: str | Path | None = None,
    batch_size: Count = 16,
    rows: Count | None = None,
    progress: bool = True,
    say: Say | None = None,
) -> Comparison:
    """Score heads by several methods, and measure each ranking on held-out examples.

    Exact mean-ablation, the yardstick, always runs. A method that refuses this model keeps its row,
    with the reason.

    Args:
        model: A TransformerLens model or its `ModelView`.
        train: The examples to score, or to draw from if there is a budget.
        valid: The held-out examples on which faithfulness is measured.
        baseline: The values that ablated heads take.
        methods: Names of the methods (`METHODS`, or choices spelt out).
        budget: Forward passes of one example that each method may use. A method scores as many
            examples as it pays for, drawn equally from the labels. None lets every method score
            all of `train`.
        truth: Mask `[layer, head]` of the heads of a planted circuit, or None.
        fractions: Shares of all heads at which rankings are measured.
        empty: The run that counts as f = 0: "heads" ablates every head and leaves the MLPs intact;
            "all" replaces the MLPs' outputs and the input as well, as MIB's evaluation does. For
            "all" a mean baseline needs `mlps=True`.
        draws: Number of random rankings.
        seed: Seed of the random rankings, of methods that draw, and of the examples of a budget.
        folder: Folder that keeps each method's scores and each circuit's metric. A call with the
            same model, data and baseline resumes there. None keeps nothing.
        batch_size: Number of examples per batch.
        rows: Maximum number of (source x example) rows per forward pass; None chooses it by the
            length of the prompts.
        progress: Whether to show progress bars.
        say: Receives one line of progress.

    Returns:
        One result per method: agreement with the yardstick, faithfulness, and cost.

    Raises:
        InputError: A method is unknown, there are no examples, the budget is too small for one
            example of each label, all held-out examples were scored as well, the truth is no mask
            of the heads, no head changes anything on the held-out examples, or a folder is given
            for a model with hooks of the caller's, which the files in it could not identify.
        UnsupportedModelError: A component of the model has no rule.
        NonFiniteError: The yardstick itself left the finite range.
    """
    names = checked_methods(methods)
    fractions = checked_fractions(fractions)
    view = view_of(model)
    say = say or (lambda _: None)
    shared = _check(view, train, valid, baseline, say)
    mask = None if truth is None else _mask(truth, (view.n_layers, view.n_heads))
    check_supported(view)
    given = shares(names, train, budget, layers=view.n_layers, heads=view.n_heads, seed=seed)
    place = None if folder is None else Path(folder)
    if place is not None and caller_hooks(view.tl):
        raise InputError(
            f"compare_methods: the model has hooks of your own ({caller_hooks(view.tl)[0]}), and "
            f"what is kept in {place} could not be told from numbers without them; leave folder "
            "out, or take the hooks off"
        )
    how: dict[str, Any] = {"batch_size": batch_size, "rows": rows, "progress": progress}
    kept_at = None if place is None else place / "circuits.json"
    circuits = MeasuredCircuits(view, valid, baseline, kept_at, say, **how, empty_run=empty)
    with hashed_once():
        scorer = TimedScorer(view, train, baseline, place, say, seed, **how)

        def score(name: str) -> TimedScores:
            own = given[name]
            return replace(scorer, examples=own.examples, exact=own.exact).score(name)

        yardstick = score(YARDSTICK)
        exact = yardstick.scores
        if exact is None:
            raise NonFiniteError(f"the yardstick was refused: {yardstick.refused}")
        scored = [yardstick, *(score(name) for name in names if name != YARDSTICK)]
    sizes = tuple(heads_at(f, view.n_layers * view.n_heads) for f in fractions)
    results = []
    for each in scored:
        say(f"faithfulness: {each.method}")
        results.append(_judged(each, given[each.method], exact, mask, circuits, fractions, sizes))
    say("faithfulness: random rankings")
    options = {
        "methods": list(names), "budget": budget, "draws": draws, "metric": "direction",
        "held_out": valid.name, "held_out_hash": valid.hash, "held_out_scored": shared,
        "baseline": baseline.kind, "baseline_hash": baseline.hash, "empty": empty,
        "batch_size": batch_size,
        "threads": torch.get_num_threads(), "device": str(view.device),
        "dtype": str(view.dtype)[6:],
    }  # fmt: skip
    return Comparison(
        methods=tuple(results),
        fractions=fractions,
        sizes=sizes,
        random=_random_rankings(circuits, fractions, sizes, draws, seed),
        scored=len(train),
        held_out=len(valid),
        direction=exact.direction,
        full=circuits.full,
        empty=circuits.empty,
        provenance=provenance_of(view, train, options=options, seed=seed),
        budget=budget,
        strata=circuits.strata,
        empty_run=empty,
    )


def checked_methods(methods: Iterable[str]) -> tuple[str, ...]:
    """Return the names without repeats, the yardstick first.

    Raises:
        InputError: A name is unknown, or there is none.
    """
    names = tuple(dict.fromkeys(methods))
    if not names:
        raise InputError(f"methods: expected any of {', '.join(METHODS)}; got none")
    for name in names:
        method_of(name)
    return (YARDSTICK, *(name for name in names if name != YARDSTICK))


def _check(
    view: ModelView,
    train: Examples,
    valid: Examples,
    baseline: Baseline,
    say: Say,
) -> int:
    """Refuse inputs that cannot be compared; return the held-out prompts that are also scored."""
    check_examples(view, train)
    if not len(valid):
        raise InputError(
            f"{valid.name}: no held-out examples to judge the rankings on; give a validation split"
        )
    check_examples(view, valid)
    seen = {(example.tokens, example.label) for example in train}
    shared = sum((example.tokens, example.label) in seen for example in valid)
    if shared == len(valid):
        raise InputError(
            f"{valid.name}: the held-out examples are all among the scored ones; rankings must be "
            "judged on others"
        )
    if shared:
        say(f"{shared} of the {len(valid)} held-out prompts are among the scored ones too")
    baseline.check_model(view)
    return shared


def _mask(truth: Any, shape: tuple[int, int]) -> Bool[Tensor, "layer head"]:
    """Convert `truth`, a tensor, array or nested list of booleans or of 1 and 0, to booleans."""
    try:
        given = torch.as_tensor(truth)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"truth: expected an array of {shape}, True or False ({error})") from error
    mask = given.bool().cpu()
    if tuple(given.shape) != shape or mask.all() or not mask.any():
        raise InputError(
            f"truth: {int(mask.sum())} heads of {tuple(given.shape)}; expected some, not all, of "
            f"{shape}"
        )
    if not torch.equal(mask.to(given.dtype), given.cpu()):
        raise InputError("truth: expected True and False, or 1 and 0, at each head")
    return mask


def _judged(
    scored: TimedScores,
    share: Share,
    exact: HeadScores,
    truth: Bool[Tensor, "layer head"] | None,
    circuits: MeasuredCircuits,
    fractions: tuple[float, ...],
    sizes: tuple[int, ...],
) -> MethodResult:
    """Measure the scores of one method."""
    measured: dict[str, Any] = {
        "method": scored.method,
        "description": method_of(scored.method).description,
        "empty_run": circuits.empty_run,
    }
    scores = scored.scores
    if scores is None:
        return MethodResult(**measured, refused=scored.refused)
    rankings = {by: scores.ranking(by) for by in RANKINGS}
    kept = {by: [tuple(sorted(r[:size])) for size in sizes] for by, r in rankings.items()}
    circuits.measure([circuit for each in kept.values() for circuit in each])
    curves = {by: _curve(circuits, each, fractions, sizes) for by, each in kept.items()}
    if truth is not None:
        magnitude = _magnitude(scores)
        measured["auroc"] = auroc(magnitude, truth)
        measured["average_precision"] = average_precision(magnitude, truth)
    return MethodResult(
        **measured,
        scored=len(share.examples),
        exact=share.exact,
        spearman=spearman(scores.values, exact.values),
        pearson=pearson(scores.values, exact.values),
        signed=curves["signed"],
        magnitude=curves["magnitude"],
        seconds=scored.seconds,
        forward_passes=scored.passes,
    )


def _curve(
    circuits: MeasuredCircuits,
    kept: Sequence[tuple[Head, ...]],
    fractions: tuple[float, ...],
    sizes: tuple[int, ...],
) -> RankingCurve:
    """Return the curve through circuits of growing size."""
    return RankingCurve.of(fractions, sizes, circuits.curve(kept), circuits.effects(kept))


def _magnitude(scores: HeadScores) -> Float[Tensor, "layer head"]:
    """Return magnitudes of scores; rounding of heads that do nothing becomes 0, and tied."""
    magnitude = scores.values.abs()
    scale = max(abs(scores.direction), float(magnitude.max()))
    return torch.where(magnitude < _NOTHING * scale, 0.0, magnitude)


def _random_rankings(
    circuits: MeasuredCircuits,
    fractions: tuple[float, ...],
    sizes: tuple[int, ...],
    draws: int,
    seed: int,
) -> tuple[RankingCurve, ...]:
    """Return curves of random rankings; the circuits of one draw contain its smaller ones."""
    shape = (circuits.view.n_layers, circuits.view.n_heads)
    drawn = [
        [random_heads(size, *shape, seed=(seed + draw) % SEEDS) for size in sizes]
        for draw in range(draws)
    ]
    circuits.measure([circuit for each in drawn for circuit in each])
    return tuple(_curve(circuits, each, fractions, sizes) for each in drawn)
