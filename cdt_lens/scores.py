"""A sweep over source heads, projected on the task direction: one signed score per head.

1. Each batch of examples is run once as it is.
2. For every head, the irrelevant stream is carried from that head to the end (`decompose`), and
   d(rel) = d(full) - d(irrel) is read at the answer position.
3. score(l, h) = label-balanced mean over examples of d(rel), in logits (method.md §4): positive
   pushes towards the gold label. The standard error over examples comes with it.

With `rules="ablation"` the same sweep is the exact effect of mean-ablating each head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from cdt_lens.artifacts import content_hash, load_artifact, save_artifact
from cdt_lens.baselines import Baseline
from cdt_lens.circuit import Circuit
from cdt_lens.decompose import irrelevant_logits
from cdt_lens.distributed import gather_items, is_main, shard
from cdt_lens.errors import ArtifactError, InputError
from cdt_lens.heads import Head, all_heads, check_heads
from cdt_lens.metrics import (
    balanced_mean,
    balanced_stderr,
    pearson,
    spearman,
    strongest_competitor,
    task_direction,
)
from cdt_lens.model import ModelView, view_of
from cdt_lens.propagate import Propagator
from cdt_lens.provenance import Provenance, provenance_of
from cdt_lens.rules import Rules, resolve_rules
from cdt_lens.tasks import Batch, Examples

Direction = Literal["mean", "strongest"]


@dataclass(frozen=True)
class HeadScores:
    """Signed relevance of every head, in logits: positive pushes towards the gold label.

    values: label-balanced mean over examples; stderr: its standard error; per_example: d(rel) of
    each example; direction: the full model's label-balanced mean task direction, in logits.
    Heads that were not asked for are NaN.
    """

    values: Float[Tensor, "layer head"]
    stderr: Float[Tensor, "layer head"] = field(repr=False)
    per_example: Float[Tensor, "example layer head"] = field(repr=False)
    example_labels: tuple[str, ...] = field(repr=False)
    direction: float
    method: str
    provenance: Provenance = field(repr=False)

    @property
    def n_layers(self) -> int:
        return self.values.shape[0]

    @property
    def n_heads(self) -> int:
        return self.values.shape[1]

    def ranking(self, by: Literal["magnitude", "signed"] = "magnitude") -> tuple[Head, ...]:
        """All scored heads, the largest first; ties in order of layer and head."""
        if by not in ("magnitude", "signed"):
            raise InputError(f"by={by!r}: expected 'magnitude' or 'signed'")
        keys = (self.values.abs() if by == "magnitude" else self.values).flatten()
        order = torch.argsort(keys.nan_to_num(nan=-torch.inf), descending=True, stable=True)
        everyone = all_heads(self.n_layers, self.n_heads)
        return tuple(everyone[i] for i in order.tolist() if not torch.isnan(keys[i]))

    def top(self, k: int, by: Literal["magnitude", "signed"] = "magnitude") -> tuple[Head, ...]:
        """The `k` heads with the largest magnitude (or signed score), the largest first."""
        ranking = self.ranking(by)
        if not 0 <= k <= len(ranking):
            raise InputError(f"k={k}: expected 0 to {len(ranking)}, the number of scored heads")
        return ranking[:k]

    def near_zero(self, k: int) -> Circuit:
        """The `k` heads with the smallest magnitude, a control (method.md §5)."""
        ranking = self.ranking()
        if not 0 <= k <= len(ranking):
            raise InputError(f"k={k}: expected 0 to {len(ranking)}, the number of scored heads")
        return self.circuit(ranking[len(ranking) - k :], {"rule": "near-zero", "k": k})

    def select(
        self,
        *,
        k: int | None = None,
        fraction: float | None = None,
        threshold: float | None = None,
        confidence: float | None = None,
        by: Literal["magnitude", "signed"] = "magnitude",
        resamples: int = 1000,
        seed: int = 0,
    ) -> Circuit:
        """Choose a circuit by exactly one of `k`, `fraction`, `threshold`, `confidence`.

        k, fraction: that many of the heads, rounded, at least one. threshold: scores (magnitudes)
        of at least that many logits. confidence: heads whose bootstrap interval of that level over
        examples, drawn within each label, excludes 0 (and lies above it, if `by="signed"`).

        Raises:
            InputError: none or several of the four, or a value out of range.
        """
        given = dict(k=k, fraction=fraction, threshold=threshold, confidence=confidence)
        chosen = {name: value for name, value in given.items() if value is not None}
        if len(chosen) != 1:
            raise InputError(
                f"select: expected exactly one of {', '.join(given)}, got "
                f"{', '.join(chosen) or 'none'}"
            )
        ranking = self.ranking(by)
        if k is not None:
            heads = self.top(k, by)
        elif fraction is not None:
            if not 0 < fraction <= 1:
                raise InputError(f"select: fraction={fraction}, expected more than 0 and at most 1")
            heads = ranking[: max(1, round(fraction * len(ranking)))]
        elif threshold is not None:
            heads = tuple(h for h in ranking if self._key(h, by) >= threshold)
        else:
            heads = self._confident(float(confidence or 0.0), by, resamples, seed)
            chosen |= {"resamples": resamples, "seed": seed}
        return self.circuit(heads, {"by": by, **chosen})

    def circuit(self, heads: Sequence[Head], selection: Mapping[str, Any]) -> Circuit:
        """A circuit of chosen heads that carries these scores and their provenance."""
        return Circuit(
            heads=tuple(heads),
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            scores=self.values,
            stderr=self.stderr,
            selection={"method": self.method, **selection},
            provenance=self.provenance,
        )

    def _key(self, head: Head, by: str) -> float:
        value = float(self.values[head.layer, head.head])
        return abs(value) if by == "magnitude" else value

    def _confident(self, level: float, by: str, resamples: int, seed: int) -> tuple[Head, ...]:
        if not 0 < level < 1:
            raise InputError(f"select: confidence={level}, expected between 0 and 1, such as 0.95")
        generator = torch.Generator().manual_seed(seed)
        labels = _label_index(self.example_labels)
        flat = self.per_example.flatten(1).double()
        total = torch.zeros(resamples, flat.shape[1], dtype=torch.float64)
        for label in labels.unique():
            group = flat[labels == label]
            draw = torch.randint(len(group), (resamples, len(group)), generator=generator)
            weights = torch.zeros(resamples, len(group), dtype=torch.float64)
            weights.scatter_add_(1, draw, torch.ones_like(draw, dtype=torch.float64))
            total += weights @ group / len(group)
        means = total / len(labels.unique())
        low = means.quantile((1 - level) / 2, dim=0)
        high = means.quantile((1 + level) / 2, dim=0)
        keep = low > 0 if by == "signed" else (low > 0) | (high < 0)
        everyone = all_heads(self.n_layers, self.n_heads)
        inside = {everyone[i] for i in keep.nonzero().flatten().tolist()}
        return tuple(h for h in self.ranking() if h in inside)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a head: layer, head, score and standard error in logits."""
        return pd.DataFrame(
            [
                {
                    "head": str(h),
                    "score": float(self.values[h.layer, h.head]),
                    "stderr": float(self.stderr[h.layer, h.head]),
                }
                for h in all_heads(self.n_layers, self.n_heads)
            ]
        )

    def save(self, path: str | Path) -> Path:
        """Save as JSON beside safetensors, whole or not at all."""
        body = {
            "example_labels": list(self.example_labels),
            "direction": self.direction,
            "method": self.method,
            "provenance": self.provenance.to_dict(),
        }
        tensors = {"values": self.values, "stderr": self.stderr, "per_example": self.per_example}
        return save_artifact(path, body, format="cdt_lens.scores", version=1, tensors=tensors)

    @classmethod
    def load(cls, path: str | Path) -> HeadScores:
        """Read what `save` wrote.

        Raises:
            InputError: no such file. ArtifactError: damaged, or another kind of file.
        """
        body, tensors = load_artifact(path, format="cdt_lens.scores", version=1)
        try:
            return cls(
                values=tensors["values"],
                stderr=tensors["stderr"],
                per_example=tensors["per_example"],
                example_labels=tuple(body["example_labels"]),
                direction=body["direction"],
                method=body["method"],
                provenance=Provenance.from_dict(body["provenance"]),
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: not a whole scores file ({error})") from error


@dataclass(frozen=True)
class MethodAgreement:
    """How well scores predict a reference, over all heads; correlations without unit."""

    scores: HeadScores
    reference: HeadScores
    spearman: float
    pearson: float


def compare_scores(scores: HeadScores, reference: HeadScores) -> MethodAgreement:
    """Rank and linear correlation between two sets of scores of one model.

    Raises:
        InputError: they score different heads.
    """
    if scores.values.shape != reference.values.shape:
        raise InputError(
            f"compare_scores: {tuple(scores.values.shape)} against "
            f"{tuple(reference.values.shape)} heads; both must score the same model"
        )
    a, b = scores.values.flatten(), reference.values.flatten()
    both = ~(a.isnan() | b.isnan())
    return MethodAgreement(scores, reference, spearman(a[both], b[both]), pearson(a[both], b[both]))


def score_heads(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    rules: str | Rules = "stable",
    heads: Sequence[Head] | None = None,
    direction: Direction = "mean",
    batch_size: int = 16,
    rows: int | None = None,
    checkpoint: str | Path | None = None,
    method: str = "cdt",
    progress: bool = True,
) -> HeadScores:
    """Relevance of each head (method.md §4): signed, in logits, with standard errors.

    Args:
        rules: a preset's name or `Rules`; heads: the ones to score, all if None.
        direction: "mean", or "strongest" for the competitor that the full model rates highest.
        rows: (source x example) rows per forward pass; halved when memory runs out.
        checkpoint: a file that keeps finished batches, so that an interrupted call resumes.

    Under `accelerate launch` each process scores its share of the examples.

    Raises:
        InputError: no examples, or heads outside the model.
        UnsupportedModelError: a component of the model has no rule.
        NonFiniteError: a head left the finite range; names it, the layer and the rule to change.
    """
    examples.require_some()
    view = view_of(model)
    rules = resolve_rules(rules)
    chosen = check_heads(heads, view.n_layers, view.n_heads) if heads is not None else None
    sources = chosen or all_heads(view.n_layers, view.n_heads)
    options = {
        "method": method,
        "rules": rules.to_dict(),
        "direction": direction,
        "baseline": baseline.kind,
        "baseline_task": baseline.provenance.task_hash,
        "heads": "all" if chosen is None else [str(h) for h in chosen],
    }
    provenance = provenance_of(view, examples, options=options)
    sweep = _Sweep(view, examples, baseline, rules, sources, direction, rows)
    rows_done = sweep.run(batch_size, _store(checkpoint, provenance), progress)
    return _collect(view, examples, rows_done, sources, method, provenance)


@dataclass
class _Sweep:
    """What does not change from batch to batch."""

    view: ModelView
    examples: Examples
    baseline: Baseline
    rules: Rules
    sources: tuple[Head, ...]
    direction: Direction
    rows: int | None

    def run(
        self, batch_size: int, store: _Store | None, progress: bool
    ) -> dict[int, Float[Tensor, " source_and_direction"]]:
        """d(rel) of each source, then d(full), for each example index; from all processes."""
        done = {} if store is None else store.read()
        batches = [
            batch
            for batch in self.examples.batches(batch_size, shard=shard())
            if not set(batch.index) <= done.keys()
        ]
        total = len(batches) * len(self.sources)
        with tqdm(total=total, desc="heads", unit="head", disable=not (progress and is_main())) as bar:
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
        irrel = irrelevant_logits(propagator, sets, batch, rows=self.rows, done=bar.update)
        relevant = task_direction(full - irrel, weights)
        both = torch.cat([relevant, task_direction(full, weights)[None]]).float().cpu()
        return {index: both[:, row] for row, index in enumerate(batch.index)}


def _collect(
    view: ModelView,
    examples: Examples,
    done: Mapping[int, Tensor],
    sources: Sequence[Head],
    method: str,
    provenance: Provenance,
) -> HeadScores:
    table = torch.stack([done[i] for i in range(len(examples))])
    labels = tuple(example.label for example in examples)
    index = _label_index(labels)
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


def _label_index(labels: Sequence[str]) -> Int[Tensor, " example"]:
    names = sorted(set(labels))
    return torch.tensor([names.index(label) for label in labels])


@dataclass(frozen=True)
class _Store:
    """Finished examples on disk, under a key of everything that changes their numbers."""

    path: Path
    key: str

    def read(self) -> dict[int, Tensor]:
        """What an interrupted call with the same key had finished; nothing otherwise."""
        if not self.path.exists():
            return {}
        try:
            body, tensors = load_artifact(self.path, format="cdt_lens.sweep", version=1)
        except ArtifactError:
            return {}  # cut off between its two files: the batches are simply done again
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
