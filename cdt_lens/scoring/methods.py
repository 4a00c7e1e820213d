"""The methods that score heads, under one interface: same task, same baseline, signed, in logits.

exact                  mean-ablation of each head, the yardstick
cdt:<rules>            contextual decomposition with a preset's rules (arXiv 2407.00886), or
                       with rules spelt out: cdt:norm=frozen+attention=decomposed
estimate:<rules>       the same, swept on a sample of the prompts and corrected to first order on
                       the others (`estimate`)
one-pass[:<slopes>]    the decomposition's linear forms, one backward pass for all heads; slopes
                       by a preset's name (one-pass:gim: arXiv 2505.17630) or spelt out likewise
attribution-patching   z's gradient times its distance from the baseline (Nanda 2023;
                       Syed et al., arXiv 2310.10348)
integrated-gradients   the same, averaged over 5 midpoints of the path on which all heads go
                       together from ablated to plain (arXiv 1703.01365; for gates of heads)
expected-gradients     the same at random points of paths that start at another prompt
                       (arXiv 1906.10670)
replay:two-ended       removal carried exactly through the head's own MLP, and to first order from
                       there on; the return to the empty model to first order
ensemble               mean of one-pass:two-ended, integrated-gradients and
                       attribution-patching
gates                  a logit for each head, learned for faithful circuits of every size
                       (arXiv 2609.25518)
direct                 direct logit attribution: what a head writes straight to the logits
random                 scores from a seed, the floor
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import nn

from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import DEFAULT_RULES, Count, Direction, Seed
from cdt_lens.core.errors import InputError, did_you_mean
from cdt_lens.core.per_example import table
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.decomposition.decompose import check_finite
from cdt_lens.decomposition.gated_pass import Steps
from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.decomposition.rules import PRESETS, Rules
from cdt_lens.decomposition.slopes import SLOPES, Slopes
from cdt_lens.models.heads import Head
from cdt_lens.models.provenance import hashed_once, provenance_of
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.scoring import gates
from cdt_lens.scoring.ensemble import MEMBERS, ensemble_scores
from cdt_lens.scoring.estimate import Part, in_sparse_part, parts_of, sweep_cost
from cdt_lens.scoring.expected_gradients import expected_gradients
from cdt_lens.scoring.one_pass import IG_STEPS, one_pass
from cdt_lens.scoring.replay import replayed_scores
from cdt_lens.scoring.sweep import collect_scores, score_heads
from cdt_lens.tasks.metrics import task_direction
from cdt_lens.tasks.task import Examples, check_examples


@checked_arguments
@uses_model
def exact_ablation(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    heads: Iterable[Head | str] | None = None,
    direction: Direction = "mean",
    batch_size: Count = 16,
    rows: Count | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> HeadScores:
    """Measure the exact effect of mean-ablating each head on the task direction.

    score = d(full) - d(with the head's z set to the baseline). This is a real intervention on the
    model: `score_heads` with the "ablation" preset, in which every rule is *through*.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score.
        baseline: The values that ablated heads take.
        heads: The heads to score, as `Head` or by name; None scores all.
        direction: "mean" of the competing answers, or "strongest" for the one that the full model
            rates highest.
        batch_size: Number of examples per batch.
        rows: Maximum number of (source x example) rows per forward pass, at least the batch size.
            None chooses it by the length of the prompts.
        checkpoint: File that keeps finished batches, so that an interrupted call resumes.
        progress: Whether to show a progress bar.

    Returns:
        Signed scores in logits (positive = pushes towards the gold label) with standard errors.

    Raises:
        InputError, UnsupportedModelError, NonFiniteError: As `score_heads`.
    """
    return score_heads(
        model,
        examples,
        baseline,
        rules="ablation",
        heads=heads,
        direction=direction,
        exact="all",
        batch_size=batch_size,
        rows=rows,
        checkpoint=checkpoint,
        method="mean-ablation",
        progress=progress,
    )


@checked_arguments
@uses_model
def attribution_patching(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    direction: Direction = "mean",
    batch_size: Count = 16,
    progress: bool = True,
) -> HeadScores:
    """Estimate `exact_ablation` to first order, as in attribution patching.

    score = sum over positions of <d(direction) / dz, z - baseline>.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score.
        baseline: The values that ablated heads take.
        direction: "mean" of the competing answers, or "strongest" for the one that the full model
            rates highest.
        batch_size: Number of examples per batch.
        progress: Whether to show a progress bar.

    Returns:
        Signed scores in logits (positive = pushes towards the gold label) with standard errors.

    Raises:
        InputError, UnsupportedModelError, NonFiniteError: As `one_pass`.
    """
    return one_pass(
        model, examples, baseline, slopes="gradient", direction=direction, batch_size=batch_size,
        method="attribution-patching", progress=progress,
    )  # fmt: skip


@checked_arguments
@uses_model
def integrated_gradients(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    steps: Count = IG_STEPS,
    direction: Direction = "mean",
    batch_size: Count = 16,
    progress: bool = True,
) -> HeadScores:
    """Average the gradients by each head's gate over the path from ablated to plain.

    The gates of all heads move together, so the scores add up to m(full) - m(empty), up to the step
    size. Those of a mixture of experts do not, because the choice of the experts jumps on the path,
    and no gradient sees a jump.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score.
        baseline: The values that ablated heads take.
        steps: Number of midpoints of the path.
        direction: "mean" of the competing answers, or "strongest" for the one that the full model
            rates highest.
        batch_size: Number of examples per batch.
        progress: Whether to show a progress bar.

    Returns:
        Signed scores in logits (positive = pushes towards the gold label) with standard errors.

    Raises:
        InputError, UnsupportedModelError, NonFiniteError: As `one_pass`.
    """
    return one_pass(
        model, examples, baseline, slopes="gradient", steps=steps, direction=direction,
        batch_size=batch_size, method="integrated-gradients", progress=progress,
    )  # fmt: skip


@checked_arguments
@uses_model
def direct_attribution(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    direction: Direction = "mean",
    batch_size: Count = 16,
    progress: bool = True,
) -> HeadScores:
    """Attribute logits directly: (z - baseline) W_O through the final norm's scale.

    No later block sees this part.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score.
        baseline: The values that ablated heads take.
        direction: "mean" of the competing answers, or "strongest" for the one that the full model
            rates highest.
        batch_size: Number of examples per batch.
        progress: Whether to show a progress bar.

    Returns:
        Signed scores in logits (positive = pushes towards the gold label) with standard errors.

    Raises:
        InputError, UnsupportedModelError, NonFiniteError: As `one_pass`.
    """
    return one_pass(
        model, examples, baseline, slopes="direct", direction=direction, batch_size=batch_size,
        method="direct", progress=progress,
    )  # fmt: skip


@checked_arguments
@uses_model
@hashed_once()
def random_scores(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    seed: Seed = 0,
    batch_size: Count = 16,
) -> HeadScores:
    """Draw normal scores, the same for every example, as the floor of a comparison.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score.
        baseline: The values that ablated heads take.
        seed: Seed of the draw.
        batch_size: Number of examples per batch.

    Returns:
        Scores without meaning and without standard errors (NaN), with the task direction of the
        full model.

    Raises:
        InputError: There are no examples, or the baseline belongs to another model.
    """
    view = view_of(model)
    check_examples(view, examples)
    baseline.check_model(view)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(view.n_layers * view.n_heads, generator=generator)
    rows = table(len(examples), len(scores) + 1, dtype=torch.float32)
    rows[:, :-1] = scores
    for batch in examples.batches(batch_size, apart=view.longrope_limit):
        batch = batch.to(view.device)
        run = Propagator(
            view, batch.tokens, batch.lengths, baseline.for_batch(view, batch), PRESETS["ablation"],
            candidates=batch.candidates,
        )  # fmt: skip
        check_finite(run, (), batch, run.full_logits(batch.candidates)[None, :0])
        full = task_direction(run.full_logits(batch.candidates), batch.direction)
        rows[list(batch.index), -1] = full.float().cpu()
    options = {"method": "random", "seed": seed, "baseline_hash": baseline.hash}
    provenance = provenance_of(view, examples, options=options)
    drawn = collect_scores(view, examples, rows, None, "random", provenance)
    return dataclasses.replace(drawn, stderr=torch.full_like(drawn.stderr, torch.nan))


_SWEEP = ("batch_size", "rows", "checkpoint", "progress")
_BACKWARD = ("batch_size", "progress")
# A forward pass, and a backward pass that needs no gradients of weights: 2.2 were measured.
_GRADIENT = 2.0
Cost = Callable[[int, int], float]
ExactCost = Callable[[int, int, int], float]


def _sweep_cost(rules: Rules) -> Cost:
    return partial(sweep_cost, rules)


def _sample_cost(parts: Sequence[Part]) -> ExactCost:
    """Return the cost of the exact passes of one example of the sample."""

    def cost(layers: int, heads: int, rank: int) -> float:
        own = [part for part in parts if not part.sparse or in_sparse_part(rank)]
        return sum(sweep_cost(part.rules, layers, heads) for part in own)

    return cost


def _gradients(passes: int, more: int = 0) -> Cost:
    """Return the cost of a number of backward passes, and of forward passes without one."""
    return lambda layers, heads: passes * _GRADIENT + more


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to score heads.

    Args:
        name: Its name in tables and in `score_by`.
        description: One line about it.
        run: The function that scores.
        takes: Names of the options that the function takes.
        cost: Forward passes that one example costs, by number of layers and of heads in a layer.
        exact_cost: The same for the exact sweep of an example of a sample, by its place among those
            of its label too, from 0 on; None if no example is swept besides.
    """

    name: str
    description: str
    run: Callable[..., HeadScores] = dataclasses.field(repr=False)
    takes: tuple[str, ...] = _BACKWARD
    cost: Cost = dataclasses.field(default=_gradients(1), repr=False)
    exact_cost: ExactCost | None = dataclasses.field(default=None, repr=False)


def _decomposed(name: str, rules: Rules) -> Method:
    passes = "two forward passes" if rules.context == "both" else "one forward pass"
    words = f"contextual decomposition, {passes} a head"
    run = partial(score_heads, rules=rules, method=name, exact="all")
    return Method(name, words, run, _SWEEP, _sweep_cost(rules))


def _estimated(name: str, rules: Rules) -> Method:
    parts = parts_of(rules)
    if not parts:
        raise InputError(
            f"method {name!r}: these rules have no first-order form; expected estimate: and one of "
            f"{', '.join(n for n, preset in PRESETS.items() if parts_of(preset))}"
        )
    words = "first order on all prompts, corrected by the sweep of a sample"
    run = partial(score_heads, rules=rules, method=name)
    takes = (*_SWEEP, "exact", "seed")
    return Method(name, words, run, takes, _gradients(len(parts)), _sample_cost(parts))


def _backward(
    name: str, description: str, slopes: str | Slopes, steps: Steps = None, passes: int = 1
) -> Method:
    run = partial(one_pass, slopes=slopes, steps=steps, method=name)
    return Method(name, description, run, cost=_gradients(passes))


_ALL = (
    Method(
        "exact", "mean-ablation of each head, the yardstick", exact_ablation, _SWEEP,
        _sweep_cost(PRESETS["ablation"]),
    ),
    *(_decomposed(f"cdt:{name}", rules) for name, rules in PRESETS.items() if name != "ablation"),
    _estimated(f"estimate:{DEFAULT_RULES}", PRESETS[DEFAULT_RULES]),
    _backward("one-pass", "the stable rules to first order, one backward pass", "stable"),
    _backward(
        "one-pass:two-ended", "the two-ended rules to first order, two backward passes",
        "gradient", "ends", 2,
    ),
    _backward("one-pass:shared", "the shared rules to first order, one backward pass", "shared"),
    _backward("one-pass:linear", "the linear rules, one backward pass", "linear"),
    _backward("one-pass:gim", "gradient interaction modifications, one backward pass", "gim"),
    Method(
        "attribution-patching", "gradient times distance from the baseline", attribution_patching
    ),
    Method(
        "integrated-gradients", f"gradients averaged over {IG_STEPS} points from ablated to plain",
        integrated_gradients, cost=_gradients(IG_STEPS, 1),
    ),
    # Each point has a reference run. No point is the plain model, which takes a run more.
    Method(
        "expected-gradients", "gradients at random points of paths from other prompts",
        expected_gradients, (*_BACKWARD, "seed"), _gradients(IG_STEPS, IG_STEPS + 1),
    ),
    # Each head runs its own block once more.
    Method(
        "replay:two-ended", "removal exact through the head's own MLP, first order from there on",
        replayed_scores, ("batch_size", "rows", "progress"),
        lambda layers, heads: 2 * _GRADIENT + 1 + heads,
    ),
    Method(
        "ensemble", f"mean of {', '.join(MEMBERS)}, each of the same spread", ensemble_scores,
        cost=_gradients(2 + IG_STEPS + 1, 1),
    ),
    # The ranking to begin with, the full model, and the steps.
    Method(
        "gates", "a logit for each head, learned for faithful circuits of every size",
        gates.learned_gates, (*_BACKWARD, "seed"), _gradients(2 + gates.EPOCHS, 1),
    ),
    Method("direct", "what a head writes straight to the logits", direct_attribution),
    Method(
        "random", "scores from a seed, the floor", random_scores, ("batch_size", "seed"),
        lambda layers, heads: 1.0,
    ),
)  # fmt: skip
METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})
# One backward pass gives the numbers of the linear sweep.
DEFAULT_METHODS: tuple[str, ...] = tuple(name for name in METHODS if name != "cdt:linear")


@checked_arguments
def method_of(name: str) -> Method:
    """Return the method of a name.

    Args:
        name: One of `METHODS`, or "cdt:" or "one-pass:" followed by the name of a preset or by
            choices such as norm=frozen+attention=half, or "estimate:" and the name of a preset.

    Raises:
        InputError: There is no such method, rule or value.
    """
    if name in METHODS:
        return METHODS[name]
    kind, _, spelt = name.partition(":")
    if kind == "cdt" and spelt in PRESETS:
        return _decomposed(name, PRESETS[spelt])
    if kind == "estimate" and spelt in PRESETS:
        return _estimated(name, PRESETS[spelt])
    if kind == "one-pass" and spelt in SLOPES:
        return _backward(name, f"the {spelt} slopes, one backward pass", spelt)
    if kind == "cdt" and "=" in spelt:
        return _decomposed(name, Rules(**_spelt(name, spelt, Rules)))
    if kind == "one-pass" and "=" in spelt:
        return _backward(
            name, "linear rules, one backward pass", Slopes(**_spelt(name, spelt, Slopes))
        )
    raise InputError(
        f"method {name!r}: unknown{did_you_mean(name, METHODS)}; expected one of "
        f"{', '.join(METHODS)}, or choices spelt out, such as cdt:norm=frozen+attention=half"
    )


def _spelt(method: str, spelt: str, kind: type[Rules] | type[Slopes]) -> dict[str, Any]:
    """Read the choices of `kind` from name=value+name=value."""
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for part in spelt.split("+"):
        name, _, value = part.partition("=")
        if name in values:
            raise InputError(f"method {method!r}: {name} is given twice; keep one of the two")
        switch = hints.get(name) is bool
        allowed = ("true", "false") if switch else get_args(hints.get(name))
        if value not in allowed:
            known = ", ".join(n for n in hints if n != "eps")
            raise InputError(
                f"method {method!r}: {part!r} is no rule; expected name=value with a name of "
                f"{known}" + (f", and {name} one of {', '.join(allowed)}" if allowed else "")
            )
        values[name] = value == "true" if switch else value
    return values


@checked_arguments
@uses_model
def score_by(
    method: str,
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    batch_size: Count = 16,
    rows: Count | None = None,
    checkpoint: str | Path | None = None,
    exact: Count | Literal["all"] | None = None,
    seed: Seed = 0,
    progress: bool = True,
) -> HeadScores:
    """Score all heads by the method of a name.

    Args:
        method: Name of the method; see `method_of`.
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score.
        baseline: The values that ablated heads take.
        batch_size: Number of examples per batch.
        rows: Maximum number of (source x example) rows per forward pass of a sweep ("exact",
            "cdt:...", "estimate:..." and "replay:..."), at least the batch size. None chooses it by
            the length of the prompts.
        checkpoint: File that keeps finished batches of a sweep, so that an interrupted call
            resumes.
        exact: Number of examples that get the exact sweep in "estimate:..."; see `score_heads`.
        seed: Seed of "random", "expected-gradients" and "gates", and of the sample of
            "estimate:...".
        progress: Whether to show a progress bar.

    Returns:
        Signed scores in logits (positive = pushes towards the gold label) with standard errors.

    Raises:
        InputError: There is no such method.
        UnsupportedModelError: The method's rules have no meaning for this model.
        NonFiniteError: The method's rules left the finite range.
    """
    chosen = method_of(method)
    options = {
        "batch_size": batch_size, "rows": rows, "checkpoint": checkpoint, "exact": exact,
        "seed": seed, "progress": progress,
    }  # fmt: skip
    return chosen.run(model, examples, baseline, **{name: options[name] for name in chosen.takes})
