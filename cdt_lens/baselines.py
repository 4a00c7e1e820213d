"""The reference value of each head's z: a label-balanced streaming mean (method.md §2).

No counterfactual prompts are needed: the mean over labels of the per-label means of `hook_z`, so
that a label with more examples does not pull it. One pass, constant memory. Free text has no
aligned positions, so a *slot* says which positions share a mean:

- "answer" (default): the answer position by itself, all other real positions pooled;
- "pooled": one mean for all real positions;
- "right": one mean per position counted from the answer;
- "left": one mean per position counted from the start, for templated prompts.

`zero_baseline` and `counterfactual_baseline` are the other references of the literature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from cdt_lens.artifacts import load_artifact, save_artifact
from cdt_lens.distributed import shard, sum_over_processes
from cdt_lens.errors import InputError
from cdt_lens.model import ModelView, view_of
from cdt_lens.provenance import Provenance, provenance_of
from cdt_lens.support import check_supported
from cdt_lens.tasks import Batch, Examples

Slots = Literal["answer", "pooled", "right", "left"]
# Reference values at a layer, [batch, pos, head, d_head] or broadcastable to it.
BaselineAt = Callable[[int], Tensor]


@dataclass(frozen=True)
class Baseline:
    """Reference values of z for every head.

    kind: one of the slots, "zero" or "counterfactual"; means: `[layer, slot, head, d_head]`, in
    the units of z (empty unless the kind is a slot); pairs: the counterfactual prompts.
    """

    kind: str
    means: Float[Tensor, "layer slot head d_head"] = field(repr=False)
    provenance: Provenance = field(repr=False)
    pairs: Examples | None = field(default=None, repr=False)

    def for_batch(self, view: ModelView, batch: Batch) -> BaselineAt:
        """The values for one batch: a function of the layer giving `[batch, pos, head, d_head]`.

        Raises:
            InputError: made for a model of another shape, or for shorter templated prompts.
        """
        if self.kind == "zero":
            zero = torch.zeros((), device=view.device, dtype=view.dtype)
            return lambda _layer: zero
        if self.kind == "counterfactual":
            return self._paired(view, batch)
        expected = (view.n_layers, view.n_heads, view.d_head)
        found = (self.means.shape[0], *self.means.shape[2:])
        if found != expected:
            raise InputError(
                f"baseline: made for {found[0]} layers of {found[1]} heads of width {found[2]}; "
                f"this model has {expected[0]} of {expected[1]} of {expected[2]}; "
                "compute it again with mean_activations"
            )
        slots = self._slots(batch.lengths, batch.tokens.shape[1]).to(view.device)
        means = self.means.to(view.device, view.dtype)
        return lambda layer: means[layer][slots]

    def _slots(self, lengths: Int[Tensor, " batch"], n_pos: int) -> Int[Tensor, "batch pos"]:
        return _slot_of(self.kind, lengths, n_pos).clamp(max=self._last_slot(n_pos))

    def _last_slot(self, n_pos: int) -> int:
        n_slots = self.means.shape[1]
        if self.kind == "left" and n_pos > n_slots:
            raise InputError(
                f"baseline: its prompts had {n_slots} positions, these have {n_pos}; a mean per "
                "position from the left needs prompts of one template; use positions='answer'"
            )
        return n_slots - 1

    def _paired(self, view: ModelView, batch: Batch) -> BaselineAt:
        pairs = self.pairs
        if pairs is None or max(batch.index) >= len(pairs):
            raise InputError(
                "baseline: counterfactual prompts must pair with the scored examples one to one"
            )
        other = [pairs[i].tokens for i in batch.index]
        if [len(t) for t in other] != batch.lengths.tolist():
            raise InputError(
                "baseline: a counterfactual prompt must have as many tokens as its example"
            )
        tokens = batch.tokens.clone()
        for row, ids in enumerate(other):
            tokens[row, : len(ids)] = torch.tensor(ids)
        trace = view.run(tokens, [("z", layer) for layer in range(view.n_layers)])
        return lambda layer: trace["z", layer]

    def save(self, path: str | Path) -> Path:
        """Save as JSON beside safetensors, atomically; counterfactual baselines are not files.

        Raises:
            InputError: a counterfactual baseline, or a place that cannot be written.
        """
        if self.pairs is not None:
            raise InputError("a counterfactual baseline holds prompts, not means; save the task")
        body = {"kind": self.kind, "provenance": self.provenance.to_dict()}
        return save_artifact(
            path, body, format="cdt_lens.baseline", version=1, tensors={"means": self.means}
        )

    @classmethod
    def load(cls, path: str | Path) -> Baseline:
        """Read what `save` wrote.

        Raises:
            InputError: no such file. ArtifactError: damaged, or another kind of file.
        """
        body, tensors = load_artifact(path, format="cdt_lens.baseline", version=1)
        return cls(body["kind"], tensors["means"], Provenance.from_dict(body["provenance"]))


def _slot_of(kind: str, lengths: Int[Tensor, " batch"], n_pos: int) -> Int[Tensor, "batch pos"]:
    """Which mean each position uses; positions after the answer are padding and get any."""
    positions = torch.arange(n_pos, device=lengths.device)
    from_right = rearrange(lengths, "batch -> batch 1") - 1 - positions
    if kind == "answer":
        return (from_right == 0).long()
    if kind == "right":
        return from_right.clamp(min=0)
    if kind == "left":
        return positions.expand(len(lengths), n_pos)
    return torch.zeros(len(lengths), n_pos, dtype=torch.long, device=lengths.device)


def mean_activations(
    model: nn.Module | ModelView,
    examples: Examples,
    *,
    positions: Slots = "answer",
    batch_size: int = 16,
    progress: bool = True,
) -> Baseline:
    """Label-balanced mean of every head's z over `examples` (method.md §2), in one pass.

    Under `accelerate launch` each process reads its share and the sums are added.

    Raises:
        InputError: no examples, or an unknown choice of positions.
        UnsupportedModelError: a component of the model has no rule.
    """
    if positions not in get_args(Slots):
        raise InputError(f"positions={positions!r}: expected one of {', '.join(get_args(Slots))}")
    examples.require_some()
    view = view_of(model)
    check_supported(view)
    sums, counts = _streaming_sums(view, examples, positions, batch_size, progress)
    per_label = sums / counts.clamp(min=1)[:, None, :, None, None]
    # A slot that some label never reaches (its prompts are shorter) is a mean over the others.
    present = (counts > 0).double()
    weights = present / present.sum(0).clamp(min=1)
    means = torch.einsum("ns,nlshd->lshd", weights, per_label)
    if not bool(torch.isfinite(means).all()):
        raise InputError(f"{view.name}: z is not finite on {examples.name}; check the weights")
    options = {"kind": positions}
    provenance = provenance_of(view, examples, options=options)
    return Baseline(positions, means.to(torch.float32), provenance)


def _streaming_sums(
    view: ModelView, examples: Examples, positions: Slots, batch_size: int, progress: bool
) -> tuple[Float[Tensor, "label layer slot head d_head"], Float[Tensor, "label slot"]]:
    """Sums of z and numbers of positions, per label and slot; added up over processes."""
    longest = max(len(example.tokens) for example in examples)
    n_slots = {"answer": 2, "pooled": 1}.get(positions, longest)
    n_labels = len(examples.labels)
    # float64 on the CPU: one summation order for every device, and devices without float64.
    sums = torch.zeros(
        n_labels, view.n_layers, n_slots, view.n_heads, view.d_head, dtype=torch.float64
    )
    counts = torch.zeros(n_labels, n_slots, dtype=torch.float64)
    sites = [("z", layer) for layer in range(view.n_layers)]
    batches = list(examples.batches(batch_size, shard=shard()))
    for batch in tqdm(batches, desc="baseline", disable=not progress, leave=False):
        trace = view.run(batch.tokens, sites)
        n_pos = batch.tokens.shape[1]
        slots = _slot_of(positions, batch.lengths, n_pos)
        real = torch.arange(n_pos) < batch.lengths[:, None]
        member = torch.nn.functional.one_hot(slots, n_slots).double() * real[..., None]
        label = torch.nn.functional.one_hot(batch.label_index, n_labels).double()
        counts += torch.einsum("bn,bps->ns", label, member)
        for layer in range(view.n_layers):
            z = trace["z", layer].double().cpu()
            per_example = torch.einsum("bps,bphd->bshd", member, z)
            sums[:, layer] += torch.einsum("bn,bshd->nshd", label, per_example)
    return sum_over_processes(sums), sum_over_processes(counts)


def zero_baseline(model: nn.Module | ModelView, examples: Examples) -> Baseline:
    """Reference value 0 for every head: its whole z counts as relevant."""
    view = view_of(model)
    return Baseline("zero", torch.zeros(0, 0, 0, 0), _named(view, examples, "zero"))


def counterfactual_baseline(model: nn.Module | ModelView, pairs: Examples) -> Baseline:
    """Reference values from paired counterfactual prompts, example i of `pairs` for example i.

    Raises:
        InputError: no examples.
    """
    pairs.require_some()
    view = view_of(model)
    empty = torch.zeros(0, 0, 0, 0)
    return Baseline("counterfactual", empty, _named(view, pairs, "counterfactual"), pairs)


def _named(view: ModelView, examples: Examples, kind: str) -> Provenance:
    options: Mapping[str, Any] = {"kind": kind}
    return provenance_of(view, examples, options=options)
