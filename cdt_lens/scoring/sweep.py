"""A sweep over source heads, projected on the task direction: one signed score per head.

1. Run each batch of examples through the full model.
2. For every head, carry the irrelevant stream from that head to the end (`decompose`), and compute
   d(rel) = d(full) - d(irrel) at the answer position.
3. score(l, h) is the label-balanced mean of d(rel) over the examples, in logits; positive pushes
   towards the gold label. It comes with its standard error.

With `rules="ablation"` the same sweep computes the exact effect of mean-ablating each head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm
from typing_extensions import TypedDict

from cdt_lens.circuits.head_scores import HeadScores, combined, label_index
from cdt_lens.circuits.measures import heads_at
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import DEFAULT_RULES, Count, Direction, Positive, Preset, Seed
from cdt_lens.core.errors import ArtifactError, InputError, did_you_mean
from cdt_lens.core.kept import Kept
from cdt_lens.core.passes import Passes
from cdt_lens.core.per_example import by_layer, share_rows, table
from cdt_lens.core.processes import shard
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.decomposition.decompose import irrelevant_logits, layers_to_run, refuse_linear
from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.decomposition.rules import Rules, resolve_rules
from cdt_lens.models.behaviour import PROMPTS, behaviour_of
from cdt_lens.models.heads import Head, all_heads
from cdt_lens.models.provenance import Provenance, hashed_once, provenance_of
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.scoring.estimate import (
    EXACT,
    Budget,
    Estimator,
    Part,
    Rows,
    Sampled,
    good_enough,
    is_small,
    largest,
    parts_of,
)
from cdt_lens.tasks.metrics import (
    balanced_mean,
    balanced_stderr,
    strongest_competitor,
    task_direction,
    warn_at_chance,
)
from cdt_lens.tasks.task import Batch, Examples, check_examples

SWEEP_FORMAT = "cdt_lens.sweep"


class _Finished(TypedDict):
    """The JSON of a checkpoint: the examples whose rows are finished."""

    index: list[int]


@checked_arguments
@uses_model
@hashed_once()
def score_heads(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    rules: Preset | Rules = DEFAULT_RULES,
    heads: Iterable[Head | str] | None = None,
    direction: Direction = "mean",
    exact: Count | Literal["all"] | None = None,
    precision: Positive | None = None,
    minutes: Positive | None = None,
    decide: Mapping[str, Any] | None = None,
    seed: Seed = 0,
    batch_size: Count = 16,
    rows: Count | None = None,
    checkpoint: str | Path | None = None,
    method: str = "cdt",
    progress: bool = True,
) -> HeadScores:
    """Score heads by contextual decomposition: d(rel) of each head as the only source.

    A sweep is exact and costs one or two passes for each head and example. Unless `exact` covers
    all examples, a random sample of them gets the sweep, all get a first-order score of one or two
    backward passes, and the two are combined without bias (`circuits.sampled`).

    Under `accelerate launch` each process scores its share of the examples.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score.
        baseline: The values that ablated heads take.
        rules: Name of a preset, or `Rules`.
        heads: The heads to score, as `Head` or by name, or a circuit of this model; None scores
            all.
        direction: "mean" of the competing answers, or "strongest" for the one that the full model
            rates highest.
        exact: Number of examples that get the exact sweep, drawn equally from the labels, or
            "all". None takes 15 where the rules have a first-order form (the presets "two-ended",
            "ablation", "stable", "shared" and "linear"), and doubles them while the standard error
            is more than twice that of a sweep over all examples. It takes all for other rules and
            for small models (whose sweep of an example costs fewer than 64 forward passes), and 30
            with `decide`.
        precision: Stops the sweep when the standard error is at most this share of the task
            direction: the median over the tenth of the heads with the largest scores. Unless
            `exact` is given, the sweep continues until then, up to all examples.
        minutes: Stops the sweep before a round of prompts would pass this time. Unless `exact` is
            given, the sweep continues until then, up to all examples. The first round is made in
            any case. It has two prompts of each label, or more with `precision` or
            `decide`.
        decide: The circuit that the scores shall decide, as arguments of `HeadScores.undecided`,
            such as {"k": 27}. The sweep then goes on only with the heads whose place in or out of
            it is open, and the intervals are wider, because it looks at them up to three times.
        seed: Seed of the sample.
        batch_size: Number of examples per batch.
        rows: Maximum number of (source x example) rows per forward pass, at least the batch size.
            None chooses it by the length of the prompts. The rows are halved when memory runs out.
        checkpoint: File that keeps finished batches, so that an interrupted call resumes.
        method: Name of the method in the result.
        progress: Whether to show a progress bar.

    Returns:
        Signed scores in logits (positive = pushes towards the gold label) with standard errors. A
        `CdtLensWarning` says if the model's own mean direction is not above 0.

    Raises:
        InputError: There are no examples, or a head is outside the model.
        UnsupportedModelError: A component of the model has no rule.
        NonFiniteError: A head left the finite range; the message names the head, the layer and the
            rule to change.
    """
    passes = Passes(batch_size, rows, progress)
    view = view_of(model)
    check_examples(view, examples)
    rules = resolve_rules(rules)
    baseline.check_model(view)
    chosen = None if heads is None else view.heads(heads)
    if chosen == ():
        raise InputError("score_heads: heads=[]: expected at least one head, or None for all")
    sources = all_heads(view.n_layers, view.n_heads) if chosen is None else chosen
    options = {
        "method": method,
        "rules": rules.to_dict(),
        **recorded_options(baseline, direction),
        "heads": "all" if chosen is None else [str(h) for h in chosen],
    }
    _check_decide(decide, len(sources), view)
    budget = _budget(view, rules, examples, exact, precision, minutes, decide)
    sweep = _Sweep(view, examples, baseline, rules, sources, direction, passes)
    if budget is None:
        provenance = provenance_of(view, examples, options=options)
        done = sweep.run(None if checkpoint is None else sweep.kept(Path(checkpoint), provenance))
        return collect_scores(view, examples, done, sources, method, provenance)
    provenance = provenance_of(view, examples, options=options | asdict(budget), seed=seed)
    return _estimate(sweep, budget, seed, checkpoint, method, provenance)


def _check_decide(decide: Mapping[str, Any] | None, scored: int, view: ModelView) -> None:
    """Refuse a circuit that cannot be decided, before anything is swept."""
    if decide is None:
        return
    known = signature(HeadScores.undecided).parameters.keys() - {"self"}
    for name in decide:
        if name not in known:
            raise InputError(
                f"decide: unknown {name!r}{did_you_mean(name, known)}; expected k, fraction or "
                "threshold, and by and level"
            )
    sizes = [n for n in ("k", "fraction", "threshold") if decide.get(n) is not None]
    if len(sizes) != 1:
        got = ", ".join(sizes) or "none"
        raise InputError(f"decide: expected one of k, fraction and threshold, got {got}")
    size = decide.get("k")
    if size is None or not isinstance(size, int) or size <= scored:
        _scores_of_nothing(view).undecided(**decide)  # refuses values out of range
        size = size or heads_at(decide.get("fraction") or 0.0, view.n_layers * view.n_heads)
    if size > scored:
        raise InputError(f"decide: a circuit of {size} heads, but only {scored} get a score")


def _scores_of_nothing(view: ModelView) -> HeadScores:
    """Return scores of 0 in the shape of a model's, without a pass."""
    none, nowhere = torch.zeros(view.n_layers, view.n_heads), Provenance("", "", {}, "", "", {})
    return HeadScores(none, none, torch.stack([none, none]), ("", ""), 0.0, "", nowhere)


def _budget(
    view: ModelView,
    rules: Rules,
    examples: Examples,
    exact: int | Literal["all"] | None,
    precision: float | None,
    minutes: float | None,
    decide: Mapping[str, Any] | None,
) -> Budget | None:
    """Return the budget of an estimate, or None where every example gets the exact sweep."""
    stops = any(each is not None for each in (precision, minutes, decide))
    check_sample(rules, examples, exact, stops)
    if not parts_of(rules):
        return None
    grows = exact is None and not stops and not is_small(view, rules)
    most = len(examples)
    if exact not in (None, "all"):
        most = min(int(exact), most)
    elif decide is not None:
        most = min(2 * max(EXACT, _labels(examples)), most)
    budget = Budget(most, precision, minutes, decide, grows)
    whole = most == len(examples) and (most <= EXACT or not grows)
    return None if whole and not stops else budget


def check_sample(
    rules: Rules, examples: Examples, exact: int | Literal["all"] | None, stops: bool
) -> None:
    """Refuse examples or a sample that cannot be swept; this needs no model.

    Args:
        rules: The propagation rules.
        examples: The examples to score.
        exact: Number of examples to sweep, "all", or None for the default.
        stops: Whether the sweep is to end at a precision, after a time or by a decision.

    Raises:
        InputError: The rules have no first-order form that a sample could correct, or the sample
            is too small for one prompt of each label; names the least number that works. The rules
            are linear and a label word has several tokens.
    """
    refuse_linear(rules, examples)
    if not parts_of(rules):
        if stops or exact not in (None, "all"):
            raise InputError(
                "these rules have no first-order form, so every example gets the exact sweep: omit "
                "exact, precision, minutes and decide. Score fewer examples, or use another preset"
            )
        return
    labels = _labels(examples)
    if exact not in (None, "all") and min(int(exact), len(examples)) < labels:
        raise InputError(f"exact={exact}: expected at least {labels}, one prompt of each label")


def _labels(examples: Examples) -> int:
    return sum(count > 0 for count in examples.counts.values())


def _estimate(
    sweep: _Sweep,
    budget: Budget,
    seed: int,
    checkpoint: str | Path | None,
    method: str,
    provenance: Provenance,
) -> HeadScores:
    view, examples = sweep.view, sweep.examples
    parts = parts_of(sweep.rules)
    # The rows of finished examples do not depend on where the sweep stops.
    whole = Budget(0 if budget.decide is None else budget.exact, decide=budget.decide)
    made_from = replace(provenance, options={**provenance.options, **asdict(whole), "seed": seed})
    bar = sweep.passes.bar(name="heads", total=0)
    estimator = Estimator(
        view, examples, sweep.baseline, parts, sweep.direction, sweep.passes, seed,
        lambda rules, batch, heads: replace(sweep, rules=rules).some(batch, bar, heads),
        lambda heads: sweep.cost(heads or sweep.sources), bar,
    )  # fmt: skip
    kept = None if checkpoint is None else sweep.kept(Path(checkpoint), made_from, Sampled)
    own = estimator.read(kept)  # A checkpoint of another run is refused before any pass.
    looks = 1 if budget.decide is None else len(estimator.ends(budget))
    cheap = estimator.cheap()
    estimator.draw(first_of(cheap, parts))

    def collected(done: Sequence[Rows]) -> HeadScores:
        scores = collect_estimate(
            view, cheap, done, parts, sweep.sources, examples, method, provenance
        )
        return replace(scores, looks=looks)

    def enough(done: list[Rows]) -> bool:
        if budget.precision is not None:
            return relative_error(collected(done)) <= budget.precision
        return budget.grows and good_enough(collected(done))

    def wanted(done: list[Rows]) -> tuple[Head, ...]:
        return collected(done).undecided(**(budget.decide or {}))

    with bar:
        done = estimator.exact(budget, kept, own, enough, wanted)
    scores = collected(done)
    _warn_at_chance(examples, scores.direction, provenance)
    return scores


def _warn_at_chance(examples: Examples, direction: float, provenance: Provenance) -> None:
    """Warn where the direction is that of a guess. The strongest of others has no such value."""
    if provenance.options.get("direction") != "strongest":
        warn_at_chance(examples.name, "direction", direction, examples.guess)


def relative_error(scores: HeadScores) -> float:
    """Return the standard error of the largest tenth of the heads (median) over the direction."""
    errors = torch.stack([scores.stderr[h.layer, h.head] for h in largest(scores)])
    return float(errors.median()) / abs(scores.direction)


def first_of(
    cheap: Float[Tensor, "part_and_direction example layer head"], parts: Sequence[Part]
) -> Float[Tensor, "example layer head"]:
    """Return the first-order score: the weighted sum of its parts."""
    weights = torch.tensor([part.weight for part in parts])[:, None, None]
    out = table(*cheap.shape[1:], dtype=torch.float32)
    for layer in range(out.shape[1]):
        out[:, layer] = (weights * cheap[:-1, :, layer]).sum(0)
    return out


def collect_estimate(
    view: ModelView,
    cheap: Float[Tensor, "part_and_direction example layer head"],
    done: Sequence[Rows],
    parts: Sequence[Part],
    sources: Sequence[Head],
    examples: Examples,
    method: str,
    provenance: Provenance,
) -> HeadScores:
    """Combine first-order scores of all examples with exact ones of a sample.

    Args:
        view: The model.
        cheap: The first-order score of each example under each part, then d(full), in logits.
        done: For each part the exact rows of its examples: d(rel) of every source, then d(full).
        parts: The terms of the score.
        sources: The scored heads.
        examples: The scored examples.
        method: Name of the method.
        provenance: Origin of the scores.
    """
    labels = tuple(example.label for example in examples)
    scored = torch.full((view.n_layers, view.n_heads), torch.nan)
    layers, heads = [h.layer for h in sources], [h.head for h in sources]
    scored[layers, heads] = 0.0
    first, corrections = first_of(cheap, parts), []
    first += scored
    for part, rows, own in zip(parts, done, cheap, strict=False):
        correction = table(*first.shape, dtype=torch.float32)
        for position, row in rows.items():
            exact = scored.clone()
            exact[layers, heads] = row[:-1]
            correction[position] = part.weight * (exact - own[position])
        corrections.append(correction)
    direction = balanced_mean(cheap[-1, :, 0, 0].double(), label_index(labels))
    return combined(
        first, corrections, labels, direction=float(direction), method=method,
        provenance=provenance,
    )  # fmt: skip


def recorded_options(baseline: Baseline, direction: Direction) -> dict[str, Any]:
    """Return the options that the provenance of any scores records.

    Args:
        baseline: The baseline of the scores.
        direction: Their direction.
    """
    return {
        "direction": direction,
        "baseline": baseline.kind,
        "baseline_task": baseline.provenance.task_hash,
        "baseline_hash": baseline.hash,
    }


@dataclass
class _Sweep:
    """The parts of a sweep that all batches share."""

    view: ModelView
    examples: Examples
    baseline: Baseline
    rules: Rules
    sources: tuple[Head, ...]
    direction: Direction
    passes: Passes

    def run(self, kept: Kept | None) -> Float[Tensor, "example source_and_direction"]:
        """Compute d(rel) of each source, then d(full), of each example, in all processes."""
        rows = table(len(self.examples), len(self.sources) + 1, dtype=torch.float32)
        batches = self.passes.batches(self.examples, self.view.longrope_limit)
        wanted = {index for batch in batches for index in batch.index}
        done = _read_rows(kept, wanted, rows)
        batches = [batch for batch in batches if not set(batch.index) <= done.keys()]
        total = len(batches) * self.cost(self.sources)
        with self.passes.bar(name="heads", total=total) as bar:
            for batch in batches:
                for index, row in self._batch(batch.to(self.view.device), bar).items():
                    rows[index], done[index] = row, None
                if kept is not None:
                    kept.write({"index": list(done)}, {"rows": rows[list(done)]})
        share_rows(rows, done)
        return rows

    def kept(self, path: Path, provenance: Provenance, holds: type = _Finished) -> Kept:
        """Return where this process keeps its finished examples, under all that changes a number.

        Args:
            path: The file.
            provenance: The model, the examples and the options.
            holds: The `TypedDict` of its JSON.

        Raises:
            InputError: The model has hooks of the caller's, which no file can identify.
        """
        rank, world = shard()
        path = path if world == 1 else path.with_suffix(f".{rank}of{world}.json")
        made_from = {
            "model": provenance.model_key, "data": provenance.task_hash,
            "options": provenance.options,
        }  # fmt: skip
        batch = next(self.examples.batches(PROMPTS, apart=self.view.longrope_limit))
        behaviour = behaviour_of(self.view, batch.tokens, batch.lengths)
        return Kept(path, SWEEP_FORMAT, made_from, holds=holds, behaviour=behaviour)

    def cost(self, heads: Sequence[Head]) -> int:
        """Return the cost of some heads for one batch, as steps of the progress bar.

        Args:
            heads: The heads.
        """
        return layers_to_run([(head,) for head in heads], self.view.n_layers)

    def some(
        self, batch: Batch, bar: tqdm, heads: tuple[Head, ...] | None
    ) -> dict[int, Float[Tensor, " source_and_direction"]]:
        """Compute the rows of a batch for some of the sources, NaN for the others.

        Args:
            batch: The examples.
            bar: The progress bar.
            heads: The heads; None takes all sources.
        """
        if heads is None:
            return self._batch(batch, bar)
        rows = replace(self, sources=heads)._batch(batch, bar)
        columns = [*map(self.sources.index, heads), len(self.sources)]
        out = {}
        for index, row in rows.items():
            out[index] = torch.full((len(self.sources) + 1,), torch.nan)
            out[index][columns] = row
        return out

    def _batch(self, batch: Batch, bar: tqdm) -> dict[int, Tensor]:
        propagator = Propagator(
            self.view, batch.tokens, batch.lengths,
            self.baseline.for_batch(self.view, batch), self.rules, candidates=batch.candidates,
        )  # fmt: skip
        full = propagator.full_logits(batch.candidates)
        weights = batch.direction
        if self.direction == "strongest":
            weights = strongest_competitor(full, batch.is_answer, batch.is_candidate)
        sets = [(head,) for head in self.sources]
        irrel = irrelevant_logits(propagator, sets, batch, rows=self.passes.rows, done=bar.update)
        relevant = task_direction(full - irrel, weights)
        both = torch.cat([relevant, task_direction(full, weights)[None]]).float().cpu()
        return {index: both[:, row] for row, index in enumerate(batch.index)}


def collect_scores(
    view: ModelView,
    examples: Examples,
    rows: Float[Tensor, "example source_and_direction"],
    sources: Sequence[Head] | None,
    method: str,
    provenance: Provenance,
) -> HeadScores:
    """Collect scores from one row per example.

    Args:
        view: The model.
        examples: The scored examples.
        rows: d(rel) of every source, then d(full), of each example, in logits.
        sources: The scored heads; None for all.
        method: Name of the method.
        provenance: Origin of the scores.
    """
    sources = all_heads(view.n_layers, view.n_heads) if sources is None else sources
    labels = tuple(example.label for example in examples)
    index = label_index(labels)
    per_example = table(len(examples), view.n_layers, view.n_heads)
    for column, head in enumerate(sources):
        per_example[:, head.layer, head.head] = rows[:, column]
    direction = float(balanced_mean(rows[:, -1].double(), index))
    _warn_at_chance(examples, direction, provenance)
    mean, error = (
        by_layer(lambda own, _, f=f: f(own.double().permute(1, 2, 0), index), per_example, ())
        for f in (balanced_mean, balanced_stderr)
    )
    return HeadScores(
        values=mean.float(),
        stderr=error.float(),
        per_example=per_example,
        example_labels=labels,
        direction=direction,
        method=method,
        provenance=provenance,
    )


def _read_rows(
    kept: Kept | None, wanted: set[int], rows: Float[Tensor, "example source_and_direction"]
) -> dict[int, None]:
    """Fill in the rows that an interrupted call had finished, and return their examples."""
    found = None if kept is None else kept.read(lambda body: wanted <= set(body["index"]))
    if kept is None or found is None:
        return {}
    body, tensors = found
    own = tensors.get("rows", torch.empty(0))
    if own.shape != (len(body["index"]), rows.shape[1]):
        raise ArtifactError(
            f"{kept.path}: damaged: rows of shape {tuple(own.shape)}; remove it to begin anew"
        )
    rows[body["index"]] = own
    return dict.fromkeys(body["index"])
