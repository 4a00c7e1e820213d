"""Compute the reference value of each head's z, a label-balanced mean (docs/method/baseline.md).

No counterfactual prompts are needed. The reference value is the mean over labels of the per-label
means of `hook_z`, so that a frequent label has no more weight than a rare one. One pass over the
examples computes it in constant memory. Free text has no aligned positions, so a *slot* defines
which positions share a mean:

- "answer" (default): the answer position has its own mean, and all other real positions share one;
- "pooled": all real positions share one mean;
- "right": each position counted from the answer has its own mean. Positions beyond the longest
  averaged prompt use the mean of all positions;
- "left": each position counted from the start has its own mean, for templated prompts.

The answer position is the last token of the prompt. Where label words have several tokens, the
model also reads the words' first tokens behind it. Under "answer" the first of these positions has
a mean of its own over all words, and so have the second and each later one. Under "right" they use
the mean of all positions.

`zero_baseline` and `counterfactual_baseline` are the other references used in the literature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from cdt_lens.core import display
from cdt_lens.core.artifacts import content_hash
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count, Slots
from cdt_lens.core.errors import InputError
from cdt_lens.core.passes import Passes
from cdt_lens.core.processes import sum_over_processes
from cdt_lens.core.saved import Saved
from cdt_lens.models.provenance import Provenance, provenance_of
from cdt_lens.models.session import uses_model
from cdt_lens.models.support import (
    check_caller_hooks,
    check_embedding,
    check_supported,
    has_embedding,
)
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.tasks.task import Batch, Examples, check_examples

# Reference values at a layer, [batch, pos, head, d_head] or broadcastable to it.
BaselineAt = Callable[[int], Tensor]


@dataclass(frozen=True, eq=False)
class Baseline(Saved):
    """Reference values of z for every head, and optionally of the outputs of MLPs.

    Attributes:
        kind: one of the slots "answer", "pooled", "right" and "left", or "zero" or
            "counterfactual".
        means: mean z of each head in each slot, in the units of z. Empty unless `kind` is a slot.
        provenance: the model and the examples that the values come from.
        pairs: for a counterfactual baseline, the tokens of each prompt's counterfactual prompt.
        mlp_means: mean of what each MLP adds to the residual stream, or None.
        embed_means: mean token embedding, or None. Ablated edges from the input need it.
    """

    kind: str
    means: Float[Tensor, "layer slot head d_head"] = field(repr=False)
    provenance: Provenance = field(repr=False)
    pairs: Mapping[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict, repr=False)
    mlp_means: Float[Tensor, "layer slot d_model"] | None = field(default=None, repr=False)
    embed_means: Float[Tensor, "slot d_model"] | None = field(default=None, repr=False)
    _format, _kind = "cdt_lens.baseline", "baseline file"
    _name = "baseline.json"
    _advice = "mean_activations(model, task.train) makes one"

    def __repr__(self) -> str:
        shape = "layers {}, slots {}, heads {}".format(*self.means.shape[:3])
        mlps = "" if self.mlp_means is None else "with MLPs"
        return display.line(
            self, self.kind, self.provenance.task, shape if self.means.numel() else "", mlps
        )

    def to_dataframe(self) -> pd.DataFrame:
        """Return the size of the mean z of each head.

        Returns:
            One row for each layer and head, with the norm of the mean z, averaged over slots, in
            the units of z.
        """
        norms = self.means.float().norm(dim=-1)
        rows = [
            (layer, head, value)
            for layer, values in enumerate(norms.mean(1).tolist())
            for head, value in enumerate(values)
        ]
        return display.flat_frame(["layer", "head", "norm"], rows)

    def _repr_html_(self) -> str:
        title = f"Baseline {self.kind} from {self.provenance.task}"
        return display.html(title, self.to_dataframe())

    @property
    def hash(self) -> str:
        """The sha256 of everything that changes a number: kind, model, task, means and pairs.

        The mean embeddings are left out: model and task determine them, and runs of earlier
        versions, which have none, go on with the hash that they recorded.
        """
        origin = self.provenance
        pairs = sorted([list(k), list(v)] for k, v in self.pairs.items())
        parts = [self.kind, origin.model_hash, origin.task_hash, _digest(self.means), pairs]
        return content_hash(parts + ([] if self.mlp_means is None else [_digest(self.mlp_means)]))

    @checked_arguments
    @uses_model
    def check_model(self, model: nn.Module | ModelView) -> None:
        """Check that a model has the weights that this baseline was computed with.

        Args:
            model: the model.

        Raises:
            ArtifactError: the weight hashes differ. The message shows both.
        """
        self.provenance.check_model(view_of(model), "this baseline")

    def for_batch(self, view: ModelView, batch: Batch) -> BaselineAt:
        """Return the reference values of z for one batch.

        Args:
            view: the model.
            batch: the prompts.

        Returns:
            A function of the layer that returns values of shape `[batch, pos, head, d_head]`, or a
            shape that broadcasts to it.

        Raises:
            InputError: the baseline was made for a model of another shape or for shorter templated
                prompts, or a prompt has no counterfactual.
        """
        if self.kind == "zero":
            zero = torch.zeros((), device=view.device, dtype=view.dtype)
            return lambda _layer: zero
        if self.kind == "counterfactual":
            return self._paired(view, batch)
        expected = (view.n_layers, view.n_heads, view.d_head)
        shape = (self.means.shape[0], *self.means.shape[2:])
        if shape != expected:
            raise InputError(
                f"baseline: it was made for {shape[0]} layers of {shape[1]} heads of width "
                f"{shape[2]}; this model has {expected[0]} of {expected[1]} of {expected[2]}. "
                "Compute it again with mean_activations."
            )
        slots = self._slots(batch).to(view.device)
        means = self.means.to(view.device, view.dtype)
        return lambda layer: means[layer][slots]

    def mlps_for_batch(self, view: ModelView, batch: Batch) -> BaselineAt:
        """Return the reference values of the MLPs' outputs for one batch.

        Args:
            view: the model.
            batch: the prompts.

        Returns:
            A function of the layer that returns values of shape `[batch, pos, d_model]`, or a shape
            that broadcasts to it.

        Raises:
            InputError: the baseline has no values for MLPs, or was made for another model or other
                prompts.
        """
        if self.kind == "zero":
            return self.for_batch(view, batch)
        if self.kind == "counterfactual":
            return self._paired(view, batch, "mlp_out")
        if self.mlp_means is None:
            raise InputError(
                "baseline: it holds no values for MLPs. Compute it with mean_activations(model, "
                "examples, mlps=True)."
            )
        self.for_batch(view, batch)  # raises for another model
        slots = self._slots(batch).to(view.device)
        means = self.mlp_means.to(view.device, view.dtype)
        return lambda layer: means[layer][slots]

    def embedding_for_batch(
        self, view: ModelView, batch: Batch
    ) -> Float[Tensor, "*batch pos d_model"]:
        """Return the reference values of the token embeddings for one batch.

        Args:
            view: the model.
            batch: the prompts.

        Returns:
            Values of shape `[batch, pos, d_model]`, or a shape that broadcasts to it. Position
            embeddings are not part of them.

        Raises:
            InputError: the baseline has no values for embeddings, or was made for another model or
                other prompts.
            UnsupportedModelError: the model multiplies its embeddings.
        """
        check_embedding(view)
        if self.kind == "zero":
            return torch.zeros(1, 1, view.d_model, device=view.device, dtype=view.dtype)
        if self.kind == "counterfactual":
            return self._paired(view, batch, "embed")(0)
        if self.embed_means is None:
            raise InputError(
                "baseline: it holds no values for embeddings. Compute it with mean_activations("
                "model, examples, mlps=True)."
            )
        self.for_batch(view, batch)  # raises for another model
        slots = self._slots(batch).to(view.device)
        return self.embed_means.to(view.device, view.dtype)[slots]

    def input_for_batch(self, view: ModelView, batch: Batch) -> Float[Tensor, "*batch pos d_model"]:
        """Return the reference values of the residual stream before the first block.

        The token embeddings take their reference; position embeddings stay.

        Args:
            view: the model.
            batch: the prompts.

        Raises:
            InputError: as `embedding_for_batch`.
            UnsupportedModelError: the stream is not the sum of both kinds of embeddings.
        """
        check_embedding(view)
        trace = view.run(batch.tokens, [("embed", 0)])
        check_embedding(view, trace)
        return trace.resid[0] - trace["embed", 0] + self.embedding_for_batch(view, batch)

    def _slots(self, batch: Batch) -> Int[Tensor, "row pos"]:
        # Without a mean of its own, a position behind the prompt uses that of the answer.
        return _slot_of(self.kind, batch).clamp(max=self._last_slot(batch.tokens.shape[1]))

    def _last_slot(self, n_pos: int) -> int:
        n_slots = self.means.shape[1]
        if self.kind == "left" and n_pos > n_slots:
            raise InputError(
                f"baseline: its prompts had {n_slots} positions, these have {n_pos}. A mean per "
                "position from the left needs prompts of one template. Use positions='answer'."
            )
        return n_slots - 1

    def _paired(self, view: ModelView, batch: Batch, site: str = "z") -> BaselineAt:
        trace = view.run(self._pairs_of(batch), [s for s in view.sites if s[0] == site])
        return lambda layer: trace[site, layer]

    def _pairs_of(self, batch: Batch) -> Int[Tensor, "batch pos"]:
        """Return the batch with the counterfactual prompts in place of the prompts."""
        tokens = batch.tokens.clone()
        examples = batch.for_rows(torch.tensor(batch.index)).tolist()
        for row, length in enumerate(batch.prompt_lengths.tolist()):
            ids = self.pairs.get(tuple(batch.tokens[row, :length].tolist()))
            if ids is None:
                raise InputError(
                    f"baseline: example {examples[row]} has no counterfactual prompt. Make the "
                    "baseline with the examples that are scored."
                )
            tokens[row, :length] = torch.tensor(ids)
        return tokens

    def _to_file(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        if self.kind == "counterfactual":
            raise InputError("a counterfactual baseline holds prompts, not means; save the task")
        body = {"kind": self.kind, "provenance": self.provenance.to_dict()}
        tensors = {"means": self.means} if self.means.numel() else {}
        more = {"mlp_means": self.mlp_means, "embed_means": self.embed_means}
        return body, tensors | {name: means for name, means in more.items() if means is not None}

    @classmethod
    def _from_file(cls, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Baseline:
        provenance = Provenance.from_dict(body["provenance"])
        means = tensors.get("means", torch.zeros(0, 0, 0, 0))
        return cls(
            body["kind"], means, provenance, mlp_means=tensors.get("mlp_means"),
            embed_means=tensors.get("embed_means"),
        )  # fmt: skip


def no_mlp_baseline(layer: int) -> Tensor:
    """Stand in for the baseline of MLPs in a run that has no MLPs among its sources.

    Raises:
        InputError: Always; an MLP as a source needs a baseline.
    """
    raise InputError(
        f"MLP {layer} is a source, but the run has no baseline for MLPs; give mlp_baseline, such "
        "as baseline.mlps_for_batch(view, batch)"
    )


def _digest(means: Tensor) -> str:
    return hashlib.sha256(means.contiguous().numpy().tobytes()).hexdigest()


def _slot_of(kind: str, batch: Batch) -> Int[Tensor, "row pos"]:
    """Return the slot of each position, which may be beyond the last one; padding gets any slot."""
    positions = torch.arange(batch.tokens.shape[1], device=batch.lengths.device)
    from_right = rearrange(batch.prompt_lengths, "row -> row 1") - 1 - positions
    real = positions < rearrange(batch.lengths, "row -> row 1")
    if kind == "answer":
        return (1 - from_right).clamp(min=0) * real
    if kind == "right":
        return torch.where(from_right < 0, _BEYOND, from_right) * real
    if kind == "left":
        return positions.expand(*real.shape)
    return torch.zeros_like(real, dtype=torch.long)


# Larger than any slot, so that the last one is used.
_BEYOND = 2**31


@checked_arguments
@uses_model
def mean_activations(
    model: nn.Module | ModelView,
    examples: Examples,
    *,
    positions: Slots = "answer",
    mlps: bool = False,
    batch_size: Count = 16,
    progress: bool = True,
) -> Baseline:
    """Compute the label-balanced mean of every head's z over `examples`, in one pass.

    See docs/method/baseline.md. Under `accelerate launch` each process reads its share of the
    examples, and the sums are added.

    Args:
        model: the model.
        examples: the prompts to average over.
        positions: which positions share a mean, one of "answer", "pooled", "right" and "left".
        mlps: whether to average also what every MLP adds to the residual stream, and the token
            embeddings. Graphs of circuits, MLPs as sources, and faithfulness with `empty="all"`
            need these values.
        batch_size: number of prompts in one forward pass.
        progress: whether to show a progress bar.

    Returns:
        The baseline. Its means are computed in float64 and stored in float32.

    Raises:
        InputError: there are no examples, `positions` is unknown, a mean is missing or not finite,
            or a hook of the caller would be applied incompletely.
        UnsupportedModelError: a component of the model has no rule.
    """
    passes = Passes(batch_size, progress=progress)
    view = view_of(model)
    check_examples(view, examples)
    check_supported(view)
    first = next(examples.batches(batch_size, apart=view.longrope_limit))
    check_caller_hooks(view, first.tokens, first.lengths)
    sums, more_sums, counts = _streaming_sums(view, examples, positions, mlps, passes)
    if positions == "answer" and not bool(counts[:, 0].any()):
        raise InputError(
            f"{examples.name}: no prompt has a position before the answer, so those positions have "
            "no mean. Use positions='pooled'."
        )
    means = _balanced(rearrange(sums, "n l s h d -> n l s (h d)"), counts)
    means = rearrange(means, "l s (h d) -> l s h d", h=view.n_heads)
    mlp_means = embed_means = None
    if more_sums is not None:
        # The embedding stands behind the layers' MLPs.
        *layers, embed_means = _balanced(more_sums, counts).float()
        mlp_means = torch.stack(layers)
        embed_means = embed_means if has_embedding(view) else None
    if not bool(torch.isfinite(means).all()):
        raise InputError(f"{view.name}: z is not finite on {examples.name}. Check the weights.")
    if mlp_means is not None and not bool(torch.isfinite(mlp_means).all()):
        raise InputError(
            f"{view.name}: an MLP's output is not finite on {examples.name}. Load the model in "
            "float32."
        )
    options = {"kind": positions}
    provenance = provenance_of(view, examples, options=options)
    return Baseline(
        positions, means.float(), provenance, mlp_means=mlp_means, embed_means=embed_means,
    )  # fmt: skip


def _balanced(
    sums: Float[Tensor, "label layer slot d"], counts: Float[Tensor, "label slot"]
) -> Float[Tensor, "layer slot d"]:
    """Return the mean over labels of each label's mean."""
    per_label = sums / counts.clamp(min=1)[:, None, :, None]
    # Where a label has no prompt long enough for a slot, the mean is over the other labels.
    present = (counts > 0).double()
    weights = present / present.sum(0).clamp(min=1)
    return torch.einsum("ns,nlsd->lsd", weights, per_label)


def _streaming_sums(
    view: ModelView,
    examples: Examples,
    positions: Slots,
    mlps: bool,
    passes: Passes,
) -> tuple[
    Float[Tensor, "label layer slot head d_head"],
    Float[Tensor, "label layer_and_embedding slot d_model"] | None,
    Float[Tensor, "label slot"],
]:
    """Sum z, MLP outputs and embeddings, per label and slot, over all processes, and count."""
    n_slots = _n_slots(examples, positions)
    n_labels = len(examples.labels)
    # Sum in float64 on the CPU: the order is the same for every device, and some lack float64.
    sums = torch.zeros(
        n_labels, view.n_layers, n_slots, view.n_heads, view.d_head, dtype=torch.float64
    )
    counts = torch.zeros(n_labels, n_slots, dtype=torch.float64)
    width = view.d_model if mlps else 0
    more_sums = torch.zeros(n_labels, view.n_layers + 1, n_slots, width, dtype=torch.float64)
    sites = [("z", layer) for layer in range(view.n_layers)]
    more_sites = [s for s in view.sites if s[0] in ("mlp_out", "embed")] if mlps else []
    batches = passes.batches(examples, view.longrope_limit)
    for batch in passes.bar(batches, name="baseline", leave=False):
        trace = view.run(batch.tokens, [*sites, *more_sites])
        slots = _slot_of(positions, batch).clamp(max=n_slots - 1)
        member = torch.nn.functional.one_hot(slots, n_slots).double()
        if positions == "right":
            member[..., -1] = 1
        member *= batch.counted[..., None]
        label = torch.nn.functional.one_hot(batch.for_rows(batch.label_index), n_labels).double()
        counts += torch.einsum("bn,bps->ns", label, member)
        for layer in range(view.n_layers):
            z = trace["z", layer].cpu().double()
            per_example = torch.einsum("bps,bphd->bshd", member, z)
            sums[:, layer] += torch.einsum("bn,bshd->nshd", label, per_example)
        for site in more_sites:
            out = torch.einsum("bps,bpd->bsd", member, trace[site].cpu().double())
            place = -1 if site[0] == "embed" else site[1]
            more_sums[:, place] += torch.einsum("bn,bsd->nsd", label, out)
    summed = sum_over_processes(more_sums) if mlps else None
    return sum_over_processes(sums), summed, sum_over_processes(counts)


def _n_slots(examples: Examples, positions: Slots) -> int:
    longest = max(len(example.tokens) for example in examples)
    if positions == "answer":
        return 2 + max(example.length - len(example.tokens) for example in examples)
    if positions == "right":
        # One more slot, the mean of all positions, for prompts longer than these.
        return longest + 1
    return 1 if positions == "pooled" else max(example.length for example in examples)


@checked_arguments
@uses_model
def zero_baseline(model: nn.Module | ModelView, examples: Examples) -> Baseline:
    """Return the reference value 0 for every head, so that its whole z counts as relevant.

    Args:
        model: the model.
        examples: the prompts that the provenance names. No forward pass is made.

    Returns:
        The baseline, of kind "zero".

    Raises:
        InputError: there are no examples.
    """
    view = view_of(model)
    check_examples(view, examples)
    return Baseline("zero", torch.zeros(0, 0, 0, 0), _named(view, examples, "zero"))


@checked_arguments
@uses_model
def counterfactual_baseline(
    model: nn.Module | ModelView, examples: Examples, pairs: Examples | None = None
) -> Baseline:
    """Take the reference values of each prompt from a run on its counterfactual prompt.

    Any part of `examples` may be scored with this baseline later, in any order.

    Args:
        model: the model.
        examples: the prompts that will be scored.
        pairs: the counterfactual prompts. Prompt i belongs to example i and has as many tokens.
            None takes those of the examples (`Examples.pairs`), which a task has whose data name
            them in a column.

    Returns:
        The baseline, of kind "counterfactual". It holds the tokens of the prompts and no means.

    Raises:
        InputError: there are no examples, an example has no counterfactual prompt, the numbers of
            examples or tokens differ, or one prompt has two different counterfactual prompts.
    """
    view = view_of(model)
    check_examples(view, examples)
    pairs = examples.pairs if pairs is None else pairs
    check_examples(view, pairs)
    partners = paired_tokens(examples, pairs)
    empty = torch.zeros(0, 0, 0, 0)
    return Baseline("counterfactual", empty, _named(view, pairs, "counterfactual"), partners)


def paired_tokens(examples: Examples, pairs: Examples) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens of each prompt's counterfactual prompt, by the tokens of the prompt.

    Args:
        examples: the prompts.
        pairs: the counterfactual prompt of each example.

    Returns:
        The token ids.

    Raises:
        InputError: the numbers of examples or tokens differ, or one prompt has two different
            counterfactual prompts. The message names the row.
    """
    if len(examples) != len(pairs):
        raise InputError(
            f"counterfactual_baseline: got {len(examples)} examples and {len(pairs)} "
            "counterfactual prompts; expected one prompt for each example"
        )
    partners: dict[tuple[int, ...], tuple[int, ...]] = {}
    for i, (example, pair) in enumerate(zip(examples, pairs, strict=True)):
        where = example.place or f"example {i} of {examples.name}"
        if len(example.tokens) != len(pair.tokens):
            raise InputError(
                f"counterfactual_baseline: {where}: the prompt has {len(example.tokens)} tokens, "
                f"its counterfactual prompt {len(pair.tokens)}; expected the same number, because "
                "each position takes its value from the same position of the pair. Change the row, "
                "or take means, such as mean_activations(model, examples.pairs)"
            )
        if partners.setdefault(example.tokens, pair.tokens) != pair.tokens:
            raise InputError(
                f"counterfactual_baseline: {where}: the prompt occurs twice, with different "
                "counterfactual prompts. Remove one of them."
            )
    return partners


def _named(view: ModelView, examples: Examples, kind: str) -> Provenance:
    """Return the provenance of a baseline of this kind."""
    options: Mapping[str, Any] = {"kind": kind}
    return provenance_of(view, examples, options=options)
