"""`Circuit`: a set of heads with the scores and the provenance that led to it.

The controls of the same size are here as well: random heads, random heads with the same number in
each layer (both reproducible from a seed), and the heads with scores nearest to zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cdt_lens.circuits.graph import Graph
from cdt_lens.circuits.nodes import check_size
from cdt_lens.core import display
from cdt_lens.core.axes import size_of
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import FromZeroCount, Seed
from cdt_lens.core.errors import InputError
from cdt_lens.core.saved import Saved
from cdt_lens.models.heads import (
    Head,
    all_heads,
    check_heads,
    count_from_one,
    heads_to_mask,
    mask_to_heads,
)
from cdt_lens.models.provenance import Provenance
from cdt_lens.models.session import uses_model
from cdt_lens.models.view import ModelView, view_of


@dataclass(frozen=True, eq=False)
class Circuit(Saved):
    """Heads of one model for one task.

    Args:
        heads: The heads; kept in order and without repeats.
        n_layers: Number of layers of the model.
        n_heads: Number of heads per layer.
        scores: Signed scores of all heads in logits (positive = pushes towards the gold label), or
            None.
        stderr: Standard errors of the scores in logits, or None.
        selection: How the heads were chosen from the scores.
        provenance: Origin of the scores.
        graph: Edges between heads and MLPs, if known.

    Raises:
        InputError: A head is outside the model, or the graph belongs to a model of another shape.
    """

    heads: tuple[Head, ...]
    n_layers: Annotated[int, size_of("layer")]
    n_heads: Annotated[int, size_of("head")]
    scores: Float[Tensor, "layer head"] | None = field(default=None, repr=False)
    stderr: Float[Tensor, "layer head"] | None = field(default=None, repr=False)
    selection: Mapping[str, Any] = field(default_factory=dict)
    provenance: Provenance | None = field(default=None, repr=False)
    graph: Graph | None = field(default=None, repr=False)
    _format, _kind = "cdt_lens.circuit", "circuit file"
    _name = "circuit.json"
    _advice = "scores.select(...) makes one, and so does Circuit(heads, n_layers, n_heads)"

    def __post_init__(self) -> None:
        count_from_one(self, "n_layers", "n_heads")
        check_size(self.n_layers, self.n_heads, "circuit")
        object.__setattr__(self, "heads", check_heads(self.heads, self.n_layers, self.n_heads))
        for name in ("n_layers", "n_heads"):
            own = getattr(self, name)
            if self.graph is not None and getattr(self.graph, name) != own:
                raise InputError(
                    f"circuit: {name}={own}, its graph has {getattr(self.graph, name)}; "
                    "give the graph of the same model"
                )

    def __len__(self) -> int:
        return len(self.heads)

    def __repr__(self) -> str:
        total = self.n_layers * self.n_heads
        edges = "" if self.graph is None else f"{len(self.graph.kept_edges)} edges"
        return display.line(self, f"{len(self)} of {total} heads", display.few(self.heads), edges)

    def __iter__(self) -> Iterator[Head]:
        return iter(self.heads)

    def __contains__(self, head: object) -> bool:
        """Whether a `Head`, or a head by name such as "L9H6", belongs to the circuit."""
        return (Head.parse(head) if isinstance(head, str) else head) in self.heads

    @property
    def mask(self) -> Bool[Tensor, "layer head"]:
        """True at the circuit's heads."""
        return heads_to_mask(self.heads, self.n_layers, self.n_heads)

    @property
    def complement(self) -> tuple[Head, ...]:
        """The heads outside the circuit, in order."""
        inside = set(self.heads)
        return tuple(h for h in all_heads(self.n_layers, self.n_heads) if h not in inside)

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per head: name, layer, index, score and standard error in logits."""
        rows = [
            {
                "head": str(h),
                "layer": h.layer,
                "index": h.head,
                "score": None if self.scores is None else float(self.scores[h.layer, h.head]),
                "stderr": None if self.stderr is None else float(self.stderr[h.layer, h.head]),
            }
            for h in self.heads
        ]
        return pd.DataFrame(rows, columns=["head", "layer", "index", "score", "stderr"])

    def _repr_html_(self) -> str:
        return display.page(self)

    @checked_arguments
    @uses_model
    def check_model(self, model: nn.Module | ModelView) -> None:
        """Refuse a model other than the one that the circuit was found in.

        Args:
            model: A TransformerLens model or its `ModelView`.

        Raises:
            InputError: The model has another number of layers or heads, or another width.
            ArtifactError: The weight hashes differ; the message shows both.
        """
        view = view_of(model)
        own = (self.n_layers, self.n_heads, None if self.graph is None else self.graph.d_model)
        names = ("n_layers", "n_heads", "d_model")
        for name, value in zip(names, own, strict=True):
            if value is not None and value != getattr(view, name):
                raise InputError(
                    f"this circuit: {name}={value}, the model has {getattr(view, name)}; use the "
                    "model that the circuit is of"
                )
        if self.provenance is not None:
            self.provenance.check_model(view, "this circuit")

    def _to_file(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        body: dict[str, Any] = {
            "heads": [str(head) for head in self.heads],
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "selection": dict(self.selection),
            "provenance": None if self.provenance is None else self.provenance.to_dict(),
        }
        if self.graph is not None:
            body["graph"] = self.graph.to_dict()
        tensors = {"scores": self.scores, "stderr": self.stderr}
        return body, {name: value for name, value in tensors.items() if value is not None}

    @classmethod
    def _from_file(cls, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Circuit:
        provenance, graph = body["provenance"], body.get("graph")
        return cls(
            heads=tuple(Head.parse(text) for text in body["heads"]),
            n_layers=body["n_layers"],
            n_heads=body["n_heads"],
            scores=tensors.get("scores"),
            stderr=tensors.get("stderr"),
            selection=body["selection"],
            provenance=None if provenance is None else Provenance.from_dict(provenance),
            graph=None if graph is None else Graph.from_dict(graph),
        )


@checked_arguments
def random_heads(k: FromZeroCount, n_layers: int, n_heads: int, *, seed: Seed) -> tuple[Head, ...]:
    """Draw `k` heads without replacement.

    Args:
        k: Number of heads to draw.
        n_layers: Number of layers of the model.
        n_heads: Number of heads per layer.
        seed: Seed of the draw.

    Returns:
        The heads, in order.

    Raises:
        InputError: The model has fewer than `k` heads.
    """
    everyone = all_heads(n_layers, n_heads)
    if not 0 <= k <= len(everyone):
        raise InputError(f"random_heads: k={k}, the model has {len(everyone)} heads")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(everyone), generator=generator)[:k].tolist()
    return tuple(sorted(everyone[i] for i in order))


@checked_arguments
def random_heads_like(
    heads: Iterable[Head], n_layers: int, n_heads: int, *, seed: Seed
) -> tuple[Head, ...]:
    """Draw heads without replacement, as many in each layer as `heads` has there.

    Args:
        heads: The heads whose numbers per layer are kept.
        n_layers: Number of layers of the model.
        n_heads: Number of heads per layer.
        seed: Seed of the draw.

    Returns:
        The heads, in order.
    """
    chosen = check_heads(heads, n_layers, n_heads)
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Head] = []
    for layer, count in sorted(Counter(h.layer for h in chosen).items()):
        order = torch.randperm(n_heads, generator=generator)[:count].tolist()
        drawn += [Head(layer, head) for head in order]
    return tuple(sorted(drawn))


@checked_arguments
def near_zero_heads(
    scores: Float[Tensor, "layer head"], circuit: Iterable[Head | str]
) -> tuple[Head, ...]:
    """Choose the scored heads of smallest magnitude outside a circuit, as many as it has.

    Args:
        scores: Scores of the heads in logits, NaN where a head was not scored.
        circuit: The heads of the circuit, or their names.

    Returns:
        The heads, in order. Equal magnitudes are taken in order of layer and head.

    Raises:
        InputError: Too few scored heads lie outside the circuit.
    """
    inside = set(check_heads(circuit, *scores.shape))
    outside = [h for h in mask_to_heads(~scores.isnan()) if h not in inside]
    if len(outside) < len(inside):
        raise InputError(
            f"near-zero: only {len(outside)} scored heads lie outside a circuit of {len(inside)}; "
            "select a smaller circuit, or score all heads"
        )
    outside.sort(key=lambda head: abs(float(scores[head.layer, head.head])))
    return tuple(sorted(outside[: len(inside)]))
