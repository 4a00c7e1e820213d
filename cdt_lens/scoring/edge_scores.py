"""Scores of the edges between heads, MLPs and the logits (CD-T, arXiv 2407.00886, §3.3).

1. Every head and every MLP is a source once. Its irrelevant stream passes through the model under
   the rules; d(rel) at the end is the score of its edge to the logits.
2. On the way its relevant part is recorded at the q, k and v of every later head. The score of an
   edge is the loss of the target's own contribution when that part is subtracted from its q (k, v):
   sum over positions of <z - z(q - rel_q), g>, with g the gradient of the task direction at z.
   For an MLP as target it is <relevant part of its output, g>.

Scores are in logits; positive favours the gold label. An edge stands for all paths from source to
target, as in CD-T, not for the direct path alone. The gradient is the full model's, so the score of
an edge that changes its target by much (an MLP that makes the large activations of an attention
sink) may exceed the direction itself: it is a first-order estimate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from cdt_lens.circuits.nodes import Site
from cdt_lens.core import display
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count, Preset
from cdt_lens.core.equality import EqualByContent
from cdt_lens.core.errors import InputError, NonFiniteError
from cdt_lens.core.passes import Passes
from cdt_lens.core.processes import gather_items
from cdt_lens.decomposition.baseline import Baseline, no_mlp_baseline
from cdt_lens.decomposition.decompose import (
    build_mlp_resets,
    build_resets,
    check_finite,
    rows_per_chunk,
)
from cdt_lens.decomposition.gated_pass import GatedPass
from cdt_lens.decomposition.hooks import Tap
from cdt_lens.decomposition.propagate import Propagator
from cdt_lens.decomposition.rules import Rules, resolve_rules
from cdt_lens.decomposition.slopes import SLOPES
from cdt_lens.models.heads import Head, Mlp, all_heads
from cdt_lens.models.session import uses_model
from cdt_lens.models.sites import Hook
from cdt_lens.models.view import ModelView, at_least_float32, view_of
from cdt_lens.tasks.metrics import balanced_mean, label_numbers, task_direction
from cdt_lens.tasks.task import Batch, Examples, check_examples

Unit = Head | Mlp
_SITES: tuple[Site, Site, Site] = ("q", "k", "v")


@dataclass(frozen=True, eq=False)
class EdgeScores(EqualByContent):
    """Signed scores of all edges in logits, label-balanced over the examples; 0 where no edge is.

    Args:
        sources: All heads and MLPs, by layer.
        to_logits: Scores of the edges from each source to the logits.
        to_heads: Scores of the edges to heads, by the target's site (q, k, v), layer and head.
        to_mlps: Scores of the edges to MLPs, by the target's layer.
    """

    sources: tuple[Unit, ...]
    to_logits: Float[Tensor, " source"]
    to_heads: Float[Tensor, "source site layer head"]
    to_mlps: Float[Tensor, "source layer"]

    def __repr__(self) -> str:
        return display.line(self, f"{len(self.sources)} sources", f"{int(self._count())} edges")

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per edge: source, target, site, score in logits; the strongest first."""
        return edges_frame(self)

    def _repr_html_(self) -> str:
        return display.html("Scores of edges, in logits", self.to_dataframe())

    def _count(self) -> int:
        return sum(int(v.count_nonzero()) for v in (self.to_logits, self.to_heads, self.to_mlps))

    @checked_arguments
    def into(self, target: Unit | str) -> Iterator[tuple[Unit, Site, float]]:
        """Iterate over the edges that end in a head or MLP, the strongest first.

        Args:
            target: The head or MLP, or its name such as "L9H6" or "M9".

        Returns:
            Source, site and score in logits of each edge.

        Raises:
            InputError: The model has no such head or MLP.
        """
        named = {str(unit): unit for unit in self.sources}
        if str(target) not in named:
            raise InputError(f"edges into {target}: the units are {display.few(self.sources)}")
        target = named[str(target)]
        edges: list[tuple[Unit, Site, float]] = []
        for number, source in enumerate(self.sources):
            if isinstance(target, Mlp):
                edges.append((source, "", float(self.to_mlps[number, target.layer])))
                continue
            values = self.to_heads[number, :, target.layer, target.head].tolist()
            edges += [(source, site, value) for site, value in zip(_SITES, values, strict=True)]
        kept = [edge for edge in edges if edge[2] != 0]
        return iter(sorted(kept, key=lambda edge: -abs(edge[2])))


@checked_arguments
@uses_model
def score_edges(
    model: nn.Module | ModelView,
    examples: Examples,
    baseline: Baseline,
    *,
    rules: Preset | Rules = "shared",
    batch_size: Count = 16,
    rows: Count | None = None,
    progress: bool = True,
) -> EdgeScores:
    """Score all edges between heads, MLPs and the logits, in about the time of four sweeps.

    Args:
        model: A TransformerLens model or its `ModelView`.
        examples: The examples to score.
        baseline: The values that ablated heads and MLPs take; `mean_activations(..., mlps=True)`.
        rules: Name of a preset, or `Rules`, with context="full".
        batch_size: Number of examples per batch.
        rows: Maximum number of (source x example) rows per forward pass, at least the batch size.
            None chooses it by the length of the prompts.
        progress: Whether to show a progress bar.

    Returns:
        Signed scores in logits.

    Raises:
        InputError: There are no examples, the baseline has no MLPs for a model that has them, or
            the rules have a context other than "full", which is defined for logits only.
        UnsupportedModelError: A component of the model has no rule.
        NonFiniteError: A source left the finite range under these rules.
    """
    passes = Passes(batch_size, rows, progress)
    view = view_of(model)
    check_examples(view, examples)
    rules = resolve_rules(rules)
    if rules.context != "full":
        raise InputError(
            f"score_edges: context={rules.context!r} is defined for logits only, not inside the "
            "model; use rules with context='full', such as the preset 'shared'"
        )
    examples.require_one_token("score_edges", "score_heads")
    baseline.check_model(view)
    sources = _units(view)
    items: list[tuple[int, tuple[Tensor, Tensor, Tensor]]] = []
    batches = passes.batches(examples, view.longrope_limit)
    with passes.bar(name="edges", total=len(batches) * len(sources)) as bar:
        for batch in batches:
            sweep = _EdgeSweep(view, batch.to(view.device), baseline, rules, sources)
            for chunk in sweep.chunks(passes.rows):
                sweep.run(chunk)
                bar.update(len(chunk))
            sweep.check_finite()
            items += sweep.by_example()
    done = dict(gather_items(items))
    labels = label_numbers([example.label for example in examples], examples.labels)

    def mean(part: int) -> Tensor:
        table = torch.stack([done[i][part] for i in range(len(examples))], dim=-1)
        return balanced_mean(table.double(), labels).float()

    return EdgeScores(sources, mean(0), mean(1), mean(2))


def depth(unit: Unit) -> tuple[int, bool]:
    """Return the depth of a head or MLP as a sort key; the MLP of a layer is after its heads."""
    return unit.layer, isinstance(unit, Mlp)


def _units(view: ModelView) -> tuple[Unit, ...]:
    heads: tuple[Unit, ...] = all_heads(view.n_layers, view.n_heads)
    mlps = tuple(Mlp(layer) for name, layer in view.sites if name == "mlp_out")
    return tuple(sorted([*heads, *mlps], key=lambda unit: (*depth(unit), getattr(unit, "head", 0))))


class _Stop(Exception):
    """Ends a replay once z is known."""


class _EdgeSweep:
    """All sources over one batch; it fills tables of (source, ..., example)."""

    def __init__(
        self,
        view: ModelView,
        batch: Batch,
        baseline: Baseline,
        rules: Rules,
        sources: tuple[Unit, ...],
    ) -> None:
        self.view, self.batch, self.sources = view, batch, sources
        self.mlps = [site for site in view.sites if site[0] == "mlp_out"]
        heads = [("z", layer) for layer in range(view.n_layers)]
        self.run_of = Propagator(
            view, batch.tokens, batch.lengths, baseline.for_batch(view, batch), rules,
            record=[*heads, *self.mlps],
            mlp_baseline=baseline.mlps_for_batch(view, batch) if self.mlps else no_mlp_baseline,
        )  # fmt: skip
        gated = GatedPass(view, SLOPES["gradient"])
        gradients = gated.gradients(batch, [*heads, *self.mlps])
        self.slopes = {site: at_least_float32(slope) for site, slope in gradients.items()}
        self.full = self.run_of.full_logits(batch.candidates)
        n, examples = len(sources), len(batch.index)
        self.to_logits = torch.zeros(n, examples)
        self.irrel = self.full.expand(n, *self.full.shape).clone()
        self.to_heads = torch.zeros(n, 3, view.n_layers, view.n_heads, examples)
        self.to_mlps = torch.zeros(n, view.n_layers, examples)

    def chunks(self, rows: int | None) -> Iterator[list[int]]:
        size = max(1, rows_per_chunk(self.run_of, rows) // len(self.batch.index))
        for _, group in groupby(range(len(self.sources)), key=lambda i: self.sources[i].layer):
            members = list(group)
            yield from (members[at : at + size] for at in range(0, len(members), size))

    def run(self, chunk: list[int]) -> None:
        """Carry the streams of sources of one layer through the model and score their edges."""
        chosen = [(self.sources[i],) for i in chunk]
        layer = self.sources[chunk[0]].layer
        seen: dict[tuple[str, int], Tensor] = {}

        def keep(site: tuple[str, int]) -> Tap:
            def tap(value: Tensor) -> None:
                seen[site] = value

            return tap

        later_layers = range(layer + 1, self.view.n_layers)
        sites: list[tuple[str, int]] = [(name, later) for later in later_layers for name in _SITES]
        # What rounding leaves in a parallel MLP of the source's own layer is no edge.
        first = layer + self.view.parallel
        sites += [site for site in self.mlps if site[1] >= first]
        resid = self.run_of.propagate(
            build_resets(chosen, self.batch, self.view.n_heads),
            {site: keep(site) for site in sites},
            build_mlp_resets(chosen, self.batch),
        )
        irrel = self.run_of.candidate_logits(resid, self.batch.candidates)
        self.irrel[chunk] = irrel
        relevant = task_direction(self.full - irrel, self.batch.direction)
        self.to_logits[chunk] = relevant.to(self.to_logits)
        for later in later_layers:
            for number, name in enumerate(_SITES):
                lost = self._lost_z(later, name, seen[name, later])
                self.to_heads[chunk, number, later] = lost.to(self.to_heads)
        for site in self.mlps:
            if site not in seen:
                continue
            away = at_least_float32(self.run_of.trace[site] - seen[site])
            lost = einsum(away, self.slopes[site], "s b p d, b p d -> s b").to(self.to_mlps)
            # An MLP is no target of itself.
            own = torch.tensor([self.sources[i] == Mlp(site[1]) for i in chunk])
            self.to_mlps[chunk, site[1]] = lost.masked_fill(own[:, None], 0.0)

    def _lost_z(self, layer: int, name: str, irrel: Tensor) -> Float[Tensor, "source head example"]:
        """Compute <z - z with `irrel` for q, k or v, gradient at z> of every head of a layer."""
        trace, n_sources = self.run_of.trace, irrel.shape[0]
        replayed: dict[str, Tensor] = {}

        def put(value: Tensor) -> Tensor:
            return irrel.reshape(value.shape)

        def stop(value: Tensor) -> None:
            replayed["z"] = value
            raise _Stop

        hooks: dict[tuple[str, int], Hook] = {(name, layer): put, ("z", layer): stop}
        rows = trace.resid[layer].repeat(n_sources, 1, 1)
        with contextlib.suppress(_Stop):
            self.view.replay(trace, rows, layer, hooks, stop=layer + 1)
        z = rearrange(replayed["z"], "(s b) p h d -> s b p h d", s=n_sources)
        away = at_least_float32(trace["z", layer] - z)
        return einsum(away, self.slopes["z", layer], "s b p h d, b p h d -> s h b")

    def check_finite(self) -> None:
        """Refuse sources that left the finite range.

        Raises:
            NonFiniteError: The message names the first source.
        """
        check_finite(self.run_of, [(unit,) for unit in self.sources], self.batch, self.irrel)
        for table in (self.to_heads, self.to_mlps):
            bad = (~torch.isfinite(table)).flatten(1).any(1).nonzero().flatten().tolist()
            if bad:
                raise NonFiniteError(
                    f"{self.view.name}: edges from {len(bad)} units are not finite; first: "
                    f"{self.sources[bad[0]]}; load the model in float32"
                )

    def by_example(self) -> list[tuple[int, tuple[Tensor, Tensor, Tensor]]]:
        # Copies: a view would carry its whole table along to the other processes.
        logits, heads, mlps = (
            [part.clone() for part in table.unbind(-1)]
            for table in (self.to_logits, self.to_heads, self.to_mlps)
        )
        return list(zip(self.batch.index, zip(logits, heads, mlps, strict=True), strict=True))


def edges_frame(scores: EdgeScores) -> pd.DataFrame:
    """Return one row per edge with a score: source, target, site, score; the strongest first."""
    rows: list[tuple[str, str, str, float]] = []
    heads, mlps, ends = (
        table.tolist() for table in (scores.to_heads, scores.to_mlps, scores.to_logits)
    )
    for number, source in enumerate(map(str, scores.sources)):
        rows.append((source, "logits", "", ends[number]))
        rows += [(source, f"M{n}", "", value) for n, value in enumerate(mlps[number])]
        for site, layers in zip("qkv", heads[number], strict=True):
            rows += [
                (source, f"L{layer}H{head}", site, value)
                for layer, values in enumerate(layers)
                for head, value in enumerate(values)
            ]
    kept = sorted((row for row in rows if row[-1]), key=lambda row: -abs(row[-1]))
    return pd.DataFrame(kept, columns=["source", "target", "site", "score"])
