"""Contextual decomposition of a transformer: what chosen heads contribute, to logits and to heads.

A source set is a set of heads, single positions of heads (`Node`), and MLPs. `decompose` answers,
for each source set and example, which part of the candidate tokens' logits is relevant, and, at
chosen target heads, which part of their q, k, v and z (CD-T, arXiv 2407.00886, §3; method.md §3).

The batch axis is (source x example). Source sets are grouped by their first layer, because a set
starts from the recorded residual stream there, and chunked to a number of rows, which is halved
when memory runs out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cdt_lens.core import display
from cdt_lens.core.choices import DEFAULT_RULES
from cdt_lens.core.display import few
from cdt_lens.core.equality import EqualByContent
from cdt_lens.core.errors import InputError, NonFiniteError
from cdt_lens.core.passes import Passes
from cdt_lens.decomposition.baseline import Baseline, check_baseline, no_mlp_baseline
from cdt_lens.decomposition.empty_model import EmptyModel
from cdt_lens.decomposition.hooks import MlpResets, Resets
from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.decomposition.rules import Rules, resolve_rules
from cdt_lens.decomposition.targets import TargetParts, Targets
from cdt_lens.models.heads import Head, Mlp, check_heads
from cdt_lens.models.view import ModelView, Site, view_of
from cdt_lens.tasks.metrics import task_direction
from cdt_lens.tasks.task import Batch, Examples, require_examples

# Tokens in flight per chunk of rows: past this, larger chunks bring a CPU no more speed.
TOKENS_PER_CHUNK = {"cpu": 4096, "cuda": 65536}


@dataclass(frozen=True, order=True)
class Node:
    """One position of a head; negative positions count back from the answer (-1 is the answer)."""

    layer: int
    head: int
    position: int


Source = Head | Node | Mlp
SourceSet = Sequence[Source]


@dataclass(frozen=True, eq=False)
class Decomposition(EqualByContent):
    """Relevant parts for every source set and example, in logits (+ raises the token's logit).

    tokens: candidate token ids; logits: the plain model's logits of them at the answer position;
    relevant: what each source set contributes to them; direction: weights of the task direction;
    targets: parts at (site, head), site one of "q", "k", "v", "z".
    """

    sources: tuple[tuple[Source, ...], ...]
    tokens: Int[Tensor, "example k"]
    direction: Float[Tensor, "example k"] = field(repr=False)
    logits: Float[Tensor, "example k"] = field(repr=False)
    relevant: Float[Tensor, "source example k"] = field(repr=False)
    targets: Mapping[tuple[str, Head], TargetParts] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        told = f"{len(self.sources)} source sets on {len(self.tokens)} examples"
        targets = [f"{site} of {head}" for site, head in self.targets]
        return display.line(self, told, display.few(targets))

    def to_dataframe(self) -> pd.DataFrame:
        """One row a source set and example: d(rel), and the plain model's direction, in logits."""
        return decomposition_frame(self)

    def _repr_html_(self) -> str:
        return display.html("Relevant part of the task direction, in logits", self.to_dataframe())

    @property
    def irrelevant(self) -> Float[Tensor, "source example k"]:
        """What is left of the logits without the source sets' contribution."""
        return self.logits - self.relevant

    @property
    def relevant_direction(self) -> Float[Tensor, "source example"]:
        """d(rel) in logits: positive = the sources push towards the gold label (method.md §4)."""
        return task_direction(self.relevant, self.direction)


def decompose(
    model: nn.Module | ModelView,
    examples: Examples,
    sources: Sequence[Source | str | Iterable[Source | str]],
    baseline: Baseline,
    *,
    rules: str | Rules = DEFAULT_RULES,
    targets: Sequence[Head | str] = (),
    rows: int | None = None,
) -> Decomposition:
    """Split the logits of `examples`, and the activations at `targets`, for each source set.

    Args:
        examples: a few; all of them run in one batch.
        sources: sets of `Head` (or its name), `Node` or `Mlp` (one by itself is a set of one); the
            empty set has a relevant part of exactly 0. MLPs need a baseline with `mlps=True`.
        targets: heads at whose q, k, v and z the two parts are recorded.
        rows: (source x example) rows per forward pass, at least the number of examples; chosen
            by the prompts' length if None.

    Raises:
        InputError: no examples, or a source outside the model or its prompts.
        UnsupportedModelError: a component of the model has no rule.
        NonFiniteError: a source set left the finite range; says where and which rule to change.
    """
    require_examples(examples)
    rows = Passes(rows=rows).rows
    view = view_of(model)
    check_baseline(baseline, view)
    batch = next(examples.batches(len(examples), sort_by_length=False)).to(view.device)
    sets = tuple(
        tuple(_source(s) for s in ((each,) if isinstance(each, Head | Node | Mlp | str) else each))
        for each in sources
    )
    for source in sets:
        check_sources(view, source)
    target_heads = check_heads(targets, view.n_layers, view.n_heads)
    record = [(site, head.layer) for head in target_heads for site in ("q", "k", "v", "z")]
    has_mlp = any(isinstance(s, Mlp) for source in sets for s in source)
    propagator = Propagator(
        view, batch.tokens, batch.lengths, baseline.for_batch(view, batch),
        resolve_rules(rules), record=record,
        mlp_baseline=baseline.mlps_for_batch(view, batch) if has_mlp else no_mlp_baseline,
    )  # fmt: skip
    taps = Targets(propagator, target_heads, len(sets))
    full = propagator.full_logits(batch.candidates)
    irrel = irrelevant_logits(propagator, sets, batch, rows=rows, taps=taps)
    return Decomposition(sets, batch.candidates, batch.direction, full, full - irrel, taps.parts())


def _source(source: object) -> Source:
    read = Head.parse(source) if isinstance(source, str) else source
    if not isinstance(read, Head | Node | Mlp):
        raise InputError(
            f"source {source!r}: expected Head(9, 6), 'L9H6', Node(9, 6, -1) or Mlp(9)"
        )
    return read


def check_sources(view: ModelView, sources: SourceSet) -> None:
    """Refuse a source that the model does not have.

    Raises:
        InputError: a layer or head out of range, or an MLP that the model has not.
    """
    heads = (Head(s.layer, s.head) for s in sources if not isinstance(s, Mlp))
    check_heads(heads, view.n_layers, view.n_heads)
    for s in sources:
        if isinstance(s, Mlp) and ("mlp_out", s.layer) not in view.sites:
            raise InputError(f"MLP {s}: the model has no MLP in layer {s.layer}")


def irrelevant_logits(
    propagator: Propagator,
    sets: Sequence[SourceSet],
    batch: Batch,
    *,
    rows: int | None = None,
    taps: Targets | None = None,
    done: Callable[[int], None] | None = None,
) -> Float[Tensor, "source example k"]:
    """Irrelevant logits of the batch's candidates for each source set, in chunks of rows.

    done: called with the number of source sets that each chunk finished.
    """
    full = propagator.full_logits(batch.candidates)
    out = full.expand(len(sets), *full.shape).clone()
    # The empty set leaves everything irrelevant: no pass, and a relevant part of exactly 0.
    order = sorted((i for i, s in enumerate(sets) if s), key=lambda i: _first_layer(sets[i]))
    size = rows_per_chunk(propagator, rows) // len(batch.lengths)
    empty = EmptyModel(propagator) if propagator.rules.context == "both" else None
    for _, group in groupby(order, key=lambda i: _first_layer(sets[i])):
        for chunk in _chunks(list(group), max(1, size)):
            out[chunk] = _with_halving(propagator, empty, sets, batch, chunk, taps)
            if done is not None:
                done(len(chunk))
    if done is not None:
        done(len(sets) - len(order))
    check_finite(propagator, sets, batch, out)
    return out


def rows_per_chunk(propagator: Propagator, rows: int | None) -> int:
    """Rows of one forward pass: as asked for, or by the prompts' length and the device."""
    batch, n_pos, _ = propagator.trace.resid[-1].shape
    if rows is not None:
        return max(rows, batch)
    budget = TOKENS_PER_CHUNK.get(propagator.view.device.type, TOKENS_PER_CHUNK["cuda"])
    return max(batch, budget // n_pos)


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _first_layer(source: SourceSet) -> int:
    return min(s.layer for s in source)


def _with_halving(
    propagator: Propagator,
    empty: EmptyModel | None,
    sets: Sequence[SourceSet],
    batch: Batch,
    chunk: list[int],
    taps: Targets | None,
) -> Float[Tensor, "source example k"]:
    """One chunk; on out-of-memory, two of half the size, down to single source sets."""
    try:
        return _chunk(propagator, empty, [sets[i] for i in chunk], batch, taps, chunk)
    except RuntimeError as error:
        if len(chunk) == 1 or not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(chunk) // 2
    halves = (chunk[:middle], chunk[middle:])
    return torch.cat([_with_halving(propagator, empty, sets, batch, half, taps) for half in halves])


def _chunk(
    propagator: Propagator,
    empty: EmptyModel | None,
    chosen: Sequence[SourceSet],
    batch: Batch,
    taps: Targets | None,
    chunk: list[int],
) -> Float[Tensor, "source example k"]:
    """Irrelevant logits of a chunk of source sets in one pass (two where both contexts count)."""
    resets = build_resets(chosen, batch, propagator.view.n_heads)
    mlp_resets = build_mlp_resets(chosen, batch)
    hooks = {} if taps is None else taps.hooks(chunk)
    resid = propagator.propagate(resets, hooks, mlp_resets)
    irrel = propagator.candidate_logits(resid, batch.candidates)
    if empty is None:
        return irrel
    added = empty.added_logits(resets, mlp_resets, batch.candidates)
    return (irrel + propagator.full_logits(batch.candidates) - added) / 2


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is a device's or the CPU allocator's refusal of memory."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in text for sign in ("out of memory", "not enough memory", "DefaultCPUAllocator")
    )


def build_resets(sets: Sequence[SourceSet], batch: Batch, n_heads: int) -> Resets:
    """Where the baseline goes in, layer by layer, for a chunk of source sets.

    Raises:
        InputError: a position that some prompt does not have.
    """
    lengths, n_pos = batch.lengths, batch.tokens.shape[1]
    by_position = any(isinstance(s, Node) for source in sets for s in source)
    shape = (len(sets), len(lengths), n_pos) if by_position else (len(sets), 1, 1)
    resets: dict[int, Bool[Tensor, "source _batch _pos head"]] = {}
    for row, source in enumerate(sets):
        for s in source:
            if isinstance(s, Mlp):
                continue
            if s.layer not in resets:
                resets[s.layer] = torch.zeros(*shape, n_heads, dtype=torch.bool)
            if isinstance(s, Head):
                resets[s.layer][row, :, :, s.head] = True
                continue
            position = lengths.cpu() + s.position if s.position < 0 else s.position
            at = torch.as_tensor(position).expand(len(lengths))
            if bool((at < 0).any()) or bool((at >= lengths.cpu()).any()):
                raise InputError(
                    f"{s}: the prompts have {int(lengths.min())} to {int(lengths.max())} tokens"
                )
            resets[s.layer][row, torch.arange(len(lengths)), at, s.head] = True
    return {layer: mask.to(lengths.device) for layer, mask in resets.items()}


def build_mlp_resets(sets: Sequence[SourceSet], batch: Batch) -> MlpResets:
    """Which source sets hold the MLP of each layer, for a chunk of them."""
    layers = {s.layer for source in sets for s in source if isinstance(s, Mlp)}
    return {
        layer: torch.tensor([Mlp(layer) in source for source in sets], device=batch.lengths.device)
        for layer in layers
    }


def check_finite(
    propagator: Propagator, sets: Sequence[SourceSet], batch: Batch, out: Tensor
) -> None:
    if not bool(torch.isfinite(propagator.full_logits(batch.candidates)).all()):
        raise NonFiniteError(
            f"{propagator.view.name}: its own logits are not finite on these prompts; load it in "
            "float32"
        )
    bad = (~torch.isfinite(out)).flatten(1).any(1).nonzero().flatten().tolist()
    if not bad:
        return
    source = sets[bad[0]]
    layer = _left_finite_range(propagator, source, batch)
    names = ", ".join(str(s) for s in source[:4]) + (", ..." if len(source) > 4 else "")
    suggestion = (
        "norm='through' (a frozen scale never pulls a growing stream back)"
        if propagator.rules.norm == "frozen"
        else "the 'ablation' preset, or float32 weights"
    )
    raise NonFiniteError(
        f"{len(bad)} of {len(sets)} source sets left the finite range under these rules; first: "
        f"{names}, in layer {layer}; use {suggestion}"
    )


def _left_finite_range(propagator: Propagator, source: SourceSet, batch: Batch) -> int:
    """The first layer after which a source set's irrelevant stream is not finite."""
    view, found = propagator.view, []

    def tap(layer: int) -> Callable[[Tensor], None]:
        def check(value: Tensor) -> None:
            if not bool(torch.isfinite(value).all()):
                found.append(layer)

        return check

    taps: dict[Site, Callable[[Tensor], None]] = {
        ("resid_post", layer): tap(layer) for layer in range(view.n_layers)
    }
    resets = build_resets([source], batch, view.n_heads)
    propagator.propagate(resets, taps, build_mlp_resets([source], batch))
    return min(found, default=view.n_layers - 1)


def decomposition_frame(parts: Decomposition) -> pd.DataFrame:
    """One row a source set and example: d(rel) and the share of the direction it is."""
    full = (parts.logits * parts.direction).sum(-1).tolist()
    rows = [
        (few(source, 4), example, value, full[example])
        for source, values in zip(parts.sources, parts.relevant_direction.tolist(), strict=True)
        for example, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["sources", "example", "relevant", "direction"])
