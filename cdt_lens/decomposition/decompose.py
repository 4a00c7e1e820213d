"""Decompose logits and head activations by source sets (CD-T, arXiv 2407.00886, section 3).

A source set is a set of heads, single positions of heads (`Node`) and MLPs. For each source set and
example, `decompose` computes the relevant part of the candidate tokens' logits. At chosen target
heads it also computes the relevant part of their q, k, v and z. See docs/method/decomposition.md.

1. Group the source sets by their first layer, because a set starts from the recorded residual
   stream there.
2. Split each group into chunks of (source x example) rows. The size of a chunk is halved when
   memory runs out.
3. Carry the irrelevant stream of a chunk through the model (`propagate`), and with `context="both"`
   also through the model whose heads are all ablated (`empty_model`).
4. Subtract the irrelevant logits from the plain model's logits. The difference is the relevant
   part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cdt_lens.core import display
from cdt_lens.core.checked import checked_arguments, whole_number
from cdt_lens.core.choices import DEFAULT_RULES, Count, Preset
from cdt_lens.core.display import few
from cdt_lens.core.equality import EqualByContent
from cdt_lens.core.errors import InputError, NonFiniteError
from cdt_lens.decomposition.baseline import Baseline, no_mlp_baseline
from cdt_lens.decomposition.empty_model import EmptyModel
from cdt_lens.decomposition.hooks import MlpResets, Resets
from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.decomposition.rules import Rules, resolve_rules
from cdt_lens.decomposition.targets import TargetParts, Targets
from cdt_lens.models.heads import Head, Mlp, check_heads, count_from_zero
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView, Site, view_of
from cdt_lens.models.words import Words
from cdt_lens.tasks.metrics import task_direction
from cdt_lens.tasks.task import Batch, Examples, check_examples

# Tokens in a chunk of rows. Larger chunks are no faster on a CPU.
TOKENS_PER_CHUNK = {"cpu": 4096, "cuda": 65536}


@dataclass(frozen=True, order=True)
class Node:
    """One position of an attention head.

    Attributes:
        layer: layer, counted from 0.
        head: head in its layer, counted from 0.
        position: token position. Negative positions count back from the answer, so -1 is the
            answer.

    Raises:
        InputError: a field is no whole number, or layer or head is negative.
    """

    layer: int
    head: int
    position: int

    def __post_init__(self) -> None:
        count_from_zero(self, "layer", "head")
        position = whole_number(self.position)
        if position is None:
            raise InputError(f"Node: position={self.position!r}: expected a whole number")
        object.__setattr__(self, "position", position)


Source = Head | Node | Mlp
SourceSet = Sequence[Source]


@dataclass(frozen=True, eq=False)
class Decomposition(EqualByContent):
    """The relevant part of the candidates' logits for every source set and example.

    All values are in logits. A positive value raises the token's logit.

    Attributes:
        sources: the source sets.
        tokens: ids of the candidate tokens of each example. Of words of several tokens all ids,
            then -1.
        direction: weights of the task direction over the candidates.
        logits: logits of the candidates in the plain model, at the answer position. The scores of
            words of several tokens stand in their place.
        relevant: contribution of each source set to these logits.
        targets: both parts at (site, head), where the site is one of "q", "k", "v" and "z".
    """

    sources: tuple[tuple[Source, ...], ...]
    tokens: Int[Tensor, "example k ..."]
    direction: Float[Tensor, "example k"] = field(repr=False)
    logits: Float[Tensor, "example k"] = field(repr=False)
    relevant: Float[Tensor, "source example k"] = field(repr=False)
    targets: Mapping[tuple[str, Head], TargetParts] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        sizes = f"{len(self.sources)} source sets on {len(self.tokens)} examples"
        targets = [f"{site} of {head}" for site, head in self.targets]
        return display.line(self, sizes, display.few(targets))

    def to_dataframe(self) -> pd.DataFrame:
        """Return the relevant part of the task direction as a table.

        Returns:
            One row for each source set and example, with d(rel) and the plain model's direction, in
            logits.
        """
        return decomposition_frame(self)

    def _repr_html_(self) -> str:
        return display.html("Relevant part of the task direction, in logits", self.to_dataframe())

    @property
    def irrelevant(self) -> Float[Tensor, "source example k"]:
        """The part of the logits that remains without the source sets' contribution, in logits."""
        return self.logits - self.relevant

    @property
    def relevant_direction(self) -> Float[Tensor, "source example"]:
        """The relevant part of the task direction, d(rel), in logits.

        Positive values push towards the gold label (docs/method/scores.md).
        """
        return task_direction(self.relevant, self.direction)


@checked_arguments
@uses_model
def decompose(
    model: nn.Module | ModelView,
    examples: Examples,
    sources: Sequence[Source | str | Iterable[Source | str]],
    baseline: Baseline,
    *,
    rules: Preset | Rules = DEFAULT_RULES,
    targets: Iterable[Head | str] = (),
    rows: Count | None = None,
) -> Decomposition:
    """Split the logits of `examples`, and the activations at `targets`, for each source set.

    Args:
        model: the model.
        examples: a few examples. All of them run in one batch.
        sources: sets of `Head` (or its name), `Node` or `Mlp`. A single source is a set of one, and
            a circuit of this model is the set of its heads. The empty set has a relevant part of
            exactly 0. MLPs need a baseline with `mlps=True`.
        baseline: the reference values of z, see `mean_activations`.
        rules: a preset's name or a `Rules`.
        targets: heads at whose q, k, v and z both parts are recorded, in the run of the full model;
            rules with context "both" have that run as well.
        rows: number of (source x example) rows in a forward pass, at least the number of examples.
            None chooses it by the prompts' length.

    Returns:
        The relevant parts, in logits. Positive values raise the logit of the token.

    Raises:
        InputError: there are no examples, a source is outside the model or its prompts, or targets
            are asked for under rules with context "empty".
        UnsupportedModelError: a component of the model has no rule.
        NonFiniteError: a source set left the finite range. The message names the layer and the rule
            to change.
    """
    view = view_of(model)
    check_examples(view, examples)
    rules = resolve_rules(rules)
    refuse_linear(rules, examples)
    target_heads = view.heads(targets)
    if target_heads:
        examples.require_one_token("decompose(targets=...)")
        if rules.context == "empty":
            raise InputError(
                "decompose(targets=...): parts of activations are those of the full model's run; "
                'expected rules with context "full" or "both", got "empty"'
            )
    baseline.check_model(view)
    batch = examples.one_batch(view.longrope_limit).to(view.device)
    sets = tuple(_source_set(view, item) for item in sources)
    record = [(site, head.layer) for head in target_heads for site in ("q", "k", "v", "z")]
    has_mlp = any(isinstance(s, Mlp) for source in sets for s in source)
    propagator = Propagator(
        view, batch.tokens, batch.lengths, baseline.for_batch(view, batch),
        rules, candidates=batch.candidates, record=record,
        mlp_baseline=baseline.mlps_for_batch(view, batch) if has_mlp else no_mlp_baseline,
    )  # fmt: skip
    taps = Targets(propagator, target_heads, len(sets))
    full = propagator.full_logits(batch.candidates)
    irrel = irrelevant_logits(propagator, sets, batch, rows=rows, taps=taps)
    candidates = batch.candidates
    tokens = candidates.tokens if isinstance(candidates, Words) else candidates
    return Decomposition(sets, tokens, batch.direction, full, full - irrel, taps.parts())


def refuse_linear(rules: Rules, examples: Examples) -> None:
    """Refuse linear rules for words of several tokens, whose log-probability is not linear.

    Args:
        rules: the propagation rules.
        examples: the examples to score.

    Raises:
        InputError: the rules are linear, and some candidates have several tokens.
    """
    if rules.activation == "frozen":
        examples.require_one_token(
            "a rule with activation='frozen', such as the preset 'linear',",
            "other rules, such as 'two-ended' or 'stable'",
        )


def _source_set(view: ModelView, item: Any) -> tuple[Source, ...]:
    """Return one source set, all of whose members the model has."""
    if hasattr(item, "check_model"):
        item.check_model(view)
    members = (item,) if isinstance(item, Head | Node | Mlp | str) else item
    sources = tuple(_source(member) for member in members)
    check_sources(view, sources)
    return sources


def _source(source: object) -> Source:
    read = Head.parse(source) if isinstance(source, str) else source
    if not isinstance(read, Head | Node | Mlp):
        raise InputError(
            f"source {source!r}: expected Head(9, 6), 'L9H6', Node(9, 6, -1) or Mlp(9)"
        )
    return read


def check_sources(view: ModelView, sources: SourceSet) -> None:
    """Check that the model has every source.

    Args:
        view: the model.
        sources: the sources to check.

    Raises:
        InputError: a layer or head is out of range, or the model has no MLP in that layer.
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
    """Compute the irrelevant logits of the batch's candidates for each source set.

    Args:
        propagator: the batch, with its recorded run.
        sets: the source sets.
        batch: the same batch.
        rows: number of (source x example) rows in a forward pass. None chooses it by the prompts'
            length.
        taps: collects the parts at target heads.
        done: called after each chunk with its cost as `layers_to_run` counts it.

    Returns:
        The logits, soft-capped where the model does that.

    Raises:
        InputError: a source position is outside a prompt.
        NonFiniteError: a source set left the finite range.
    """
    full = propagator.full_logits(batch.candidates)
    out = full.expand(len(sets), *full.shape).clone()
    # The empty set needs no pass: everything is irrelevant, and the relevant part is exactly 0.
    order = sorted((i for i, s in enumerate(sets) if s), key=lambda i: _first_layer(sets[i]))
    size = rows_per_chunk(propagator, rows) // len(batch.lengths)
    empty = None if propagator.rules.context == "full" else EmptyModel(propagator)
    for first, group in groupby(order, key=lambda i: _first_layer(sets[i])):
        for chunk in _chunks(list(group), max(1, size)):
            out[chunk] = _with_halving(propagator, empty, sets, batch, chunk, taps)
            if done is not None:
                done(len(chunk) * (propagator.view.n_layers - first))
    check_finite(propagator, sets, batch, out)
    return out


def layers_to_run(sets: Iterable[SourceSet], n_layers: int) -> int:
    """Count the layers that source sets run through, each from the layer of its first source on.

    This is the cost of `irrelevant_logits` for one batch: a head of the last layer costs one layer,
    a head of the first layer all of them.

    Args:
        sets: the source sets; an empty set costs nothing.
        n_layers: number of layers of the model.
    """
    return sum(n_layers - _first_layer(each) for each in sets if each)


def rows_per_chunk(propagator: Propagator, rows: int | None) -> int:
    """Choose the number of rows of one forward pass.

    Args:
        propagator: the batch, with its recorded run.
        rows: the number that the caller asked for. None chooses it by the prompts' length and the
            device.

    Returns:
        The number of (source x example) rows, at least the number of examples.
    """
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
    """Run one chunk; when memory runs out, run its halves, down to single source sets."""
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
    """Compute the irrelevant logits of a chunk, in one pass for each end that the context names."""
    resets = build_resets(chosen, batch, propagator.view.n_heads)
    mlp_resets = build_mlp_resets(chosen, batch)
    without: list[Tensor] = []
    if propagator.rules.context != "empty":
        hooks = {} if taps is None else taps.hooks(chunk)
        resid = propagator.propagate(resets, hooks, mlp_resets)
        without.append(propagator.candidate_logits(resid, batch.candidates))
    if empty is not None:
        added = empty.added_logits(resets, mlp_resets, batch.candidates)
        without.append(propagator.full_logits(batch.candidates) - added)
    return without[0] if len(without) == 1 else (without[0] + without[1]) / 2


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error says that a device or the CPU allocator has no more memory.

    Args:
        error: the error.

    Returns:
        True for an out-of-memory error.
    """
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in text for sign in ("out of memory", "not enough memory", "DefaultCPUAllocator")
    )


def build_resets(sets: Sequence[SourceSet], batch: Batch, n_heads: int) -> Resets:
    """Build the masks that say where the baseline replaces z, for a chunk of source sets.

    Args:
        sets: the source sets.
        batch: the prompts.
        n_heads: number of heads in a layer.

    Returns:
        A mask for each layer that has sources, `[source, batch or 1, pos or 1, head]`.

    Raises:
        InputError: a prompt does not have a source's position.
    """
    # Positions are counted in the prompts; a word may stand behind them.
    lengths, n_pos = batch.prompt_lengths, batch.tokens.shape[1]
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
    """Build the masks that say which source sets contain the MLP of a layer.

    Args:
        sets: the source sets.
        batch: the prompts.

    Returns:
        A mask over the source sets for each layer whose MLP is a source.
    """
    layers = {s.layer for source in sets for s in source if isinstance(s, Mlp)}
    return {
        layer: torch.tensor([Mlp(layer) in source for source in sets], device=batch.lengths.device)
        for layer in layers
    }


def check_finite(
    propagator: Propagator, sets: Sequence[SourceSet], batch: Batch, out: Tensor
) -> None:
    """Check that the irrelevant logits are finite.

    Args:
        propagator: the batch, with its recorded run.
        sets: the source sets.
        batch: the same batch.
        out: the irrelevant logits `[source, example, k]`.

    Raises:
        NonFiniteError: the model's own logits or those of a source set are not finite. The message
            names the first such set, the layer where it left the finite range and the rule to
            change.
    """
    if not bool(torch.isfinite(propagator.full_logits(batch.candidates)).all()):
        raise NonFiniteError(
            f"{propagator.view.name}: its own logits are not finite on these prompts. Load the "
            "model in float32."
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
        f"{names}, in layer {layer}. Use {suggestion}."
    )


def _left_finite_range(propagator: Propagator, source: SourceSet, batch: Batch) -> int:
    """Return the first layer after which a source set's irrelevant stream is not finite."""
    view, bad_layers = propagator.view, []

    def tap(layer: int) -> Callable[[Tensor], None]:
        def check(value: Tensor) -> None:
            if not bool(torch.isfinite(value).all()):
                bad_layers.append(layer)

        return check

    taps: dict[Site, Callable[[Tensor], None]] = {
        ("resid_post", layer): tap(layer) for layer in range(view.n_layers)
    }
    resets = build_resets([source], batch, view.n_heads)
    propagator.propagate(resets, taps, build_mlp_resets([source], batch))
    return min(bad_layers, default=view.n_layers - 1)


def decomposition_frame(parts: Decomposition) -> pd.DataFrame:
    """Return a decomposition as a table.

    Args:
        parts: the decomposition.

    Returns:
        One row for each source set and example, with d(rel) and the plain model's direction, in
        logits.
    """
    full = (parts.logits * parts.direction).sum(-1).tolist()
    rows = [
        (few(source, 4), example, value, full[example])
        for source, values in zip(parts.sources, parts.relevant_direction.tolist(), strict=True)
        for example, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["sources", "example", "relevant", "direction"])
