"""A sweep over source heads, projected on the task direction: one signed score per head.

1. Run each batch of examples through the full model.
2. For every head, carry the irrelevant stream from that head to the end (`decompose`), and compute
   d(rel) = d(full) - d(irrel) at the answer position.
3. score(l, h) is the label-balanced mean of d(rel) over the examples, in logits; positive pushes
   towards the gold label. It comes with its standard error.

With `rules="ablation"` the same sweep computes the exact effect of mean-ablating each head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from cdt_lens.circuits.head_scores import HeadScores, label_index
from cdt_lens.core.artifacts import content_hash, load_artifact, save_artifact
from cdt_lens.core.errors import InputError
from cdt_lens.core.passes import Passes
from cdt_lens.core.processes import gather_items, shard
from cdt_lens.decomposition.baseline import Baseline, check_baseline
from cdt_lens.decomposition.decompose import irrelevant_logits
from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.decomposition.rules import DEFAULT_RULES, Rules, resolve_rules
from cdt_lens.models.heads import Head, all_heads, check_heads
from cdt_lens.models.provenance import Provenance, provenance_of
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.tasks.metrics import (
    Direction,
    balanced_mean,
    balanced_stderr,
    strongest_competitor,
    task_direction,
)
from cdt_lens.tasks.task import Batch, Examples, require_examples


def score_heads(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    rules: str | Rules = DEFAULT_RULES,
    heads: Sequence[Head | str] | None = None,
    direction: Direction = "mean",
    batch_size: int = 16,
    rows: int | None = None,
    checkpoint: str | Path | None = None,
    method: str = "cdt",
    progress: bool = True,
) -> HeadScores:
    """Score heads by contextual decomposition: d(rel) of each head as the only source.

    Under `accelerate launch` each process scores its share of the examples.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score.
        baseline: The values that ablated heads take.
        rules: Name of a preset, or `Rules`.
        heads: The heads to score, as `Head` or by name; None scores all.
        direction: "mean" of the competing answers, or "strongest" for the one that the full model
            rates highest.
        batch_size: Number of examples per batch.
        rows: Maximum number of (source x example) rows per forward pass, at least the batch size.
            None chooses it by the length of the prompts. The rows are halved when memory runs out.
        checkpoint: File that keeps finished batches, so that an interrupted call resumes.
        method: Name of the method in the result.
        progress: Whether to show a progress bar.

    Returns:
        Signed scores in logits (positive = pushes towards the gold label) with standard errors.

    Raises:
        InputError: There are no examples, or a head is outside the model.
        UnsupportedModelError: A component of the model has no rule.
        NonFiniteError: A head left the finite range; the message names the head, the layer and the
            rule to change.
    """
    require_examples(examples)
    passes = Passes(batch_size, rows, progress)
    view = view_of(model)
    rules = resolve_rules(rules)
    check_baseline(baseline, view)
    chosen = None if heads is None else check_heads(heads, view.n_layers, view.n_heads)
    if chosen == ():
        raise InputError("score_heads: heads=[]: expected at least one head, or None for all")
    sources = all_heads(view.n_layers, view.n_heads) if chosen is None else chosen
    options = {
        "method": method,
        "rules": rules.to_dict(),
        **recorded_options(baseline, direction),
        "heads": "all" if chosen is None else [str(h) for h in chosen],
    }
    provenance = provenance_of(view, examples, options=options)
    sweep = _Sweep(view, examples, baseline, rules, sources, direction, passes)
    done = sweep.run(_store(checkpoint, provenance))
    return collect_scores(view, examples, done, sources, method, provenance)


def recorded_options(baseline: Baseline, direction: Direction) -> dict[str, Any]:
    """Return the options that the provenance of any scores records.

    Args:
        baseline: The baseline of the scores.
        direction: Their direction.

    Raises:
        InputError: The direction is unknown.
    """
    if direction not in get_args(Direction):
        raise InputError(f"direction={direction!r}: expected {' or '.join(get_args(Direction))}")
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

    def run(self, store: _Store | None) -> dict[int, Float[Tensor, " source_and_direction"]]:
        """Compute d(rel) of each source, then d(full), of each example, in all processes."""
        done = {} if store is None else store.read()
        batches = [
            batch
            for batch in self.passes.batches(self.examples)
            if not set(batch.index) <= done.keys()
        ]
        total = len(batches) * len(self.sources)
        with self.passes.bar(name="heads", total=total, unit="head") as bar:
            for batch in batches:
                done |= self._batch(batch.to(self.view.device), bar)
                if store is not None:
                    store.write(done)
        items = gather_items(list(done.items()))
        return dict(items)

    def _batch(self, batch: Batch, bar: tqdm) -> dict[int, Tensor]:
        propagator = Propagator(
            self.view, batch.tokens, batch.lengths,
            self.baseline.for_batch(self.view, batch), self.rules,
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
    done: Mapping[int, Tensor],
    sources: Sequence[Head] | None,
    method: str,
    provenance: Provenance,
) -> HeadScores:
    """Collect scores from one row per example.

    Args:
        view: The model.
        examples: The scored examples.
        done: For the index of each example d(rel) of every source, then d(full), in logits.
        sources: The scored heads; None for all.
        method: Name of the method.
        provenance: Origin of the scores.
    """
    sources = all_heads(view.n_layers, view.n_heads) if sources is None else sources
    table = torch.stack([done[i] for i in range(len(examples))])
    labels = tuple(example.label for example in examples)
    index = label_index(labels)
    per_example = torch.full((len(examples), view.n_layers, view.n_heads), torch.nan)
    for column, head in enumerate(sources):
        per_example[:, head.layer, head.head] = table[:, column]
    by_head = per_example.double().permute(1, 2, 0)
    return HeadScores(
        values=balanced_mean(by_head, index).float(),
        stderr=balanced_stderr(by_head, index).float(),
        per_example=per_example,
        example_labels=labels,
        direction=float(balanced_mean(table[:, -1].double(), index)),
        method=method,
        provenance=provenance,
    )


@dataclass(frozen=True)
class _Store:
    """Finished examples on disk, under a key of everything that changes their numbers."""

    path: Path
    key: str

    def read(self) -> dict[int, Tensor]:
        """What an interrupted call with the same key had finished; nothing if it is new.

        Raises:
            InputError: of another run. ArtifactError: damaged, or no checkpoint at all.
        """
        if not self.path.exists():
            return {}
        body, tensors = load_artifact(self.path, format="cdt_lens.sweep", version=1)
        if body["key"] != self.key:
            raise InputError(
                f"{self.path}: a checkpoint of another run (model, task or options differ); "
                "remove it or name another file"
            )
        return dict(zip(body["index"], tensors["rows"], strict=True))

    def write(self, done: Mapping[int, Tensor]) -> None:
        body = {"key": self.key, "index": list(done)}
        tensors = {"rows": torch.stack(list(done.values()))}
        save_artifact(self.path, body, format="cdt_lens.sweep", version=1, tensors=tensors)


def _store(path: str | Path | None, provenance: Provenance) -> _Store | None:
    if path is None:
        return None
    rank, world = shard()
    path = Path(path) if world == 1 else Path(path).with_suffix(f".{rank}of{world}.json")
    what = [provenance.model_hash, provenance.task_hash, provenance.options]
    return _Store(path, content_hash(what))
