"""`Circuit`: a set of heads with the scores and the provenance that led to it; on disk as well.

Also the controls of the same size (method.md §5): random heads, random heads with the same number
in each layer, and near-zero heads, all reproducible from a seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cdt_lens.circuits.graph import Graph
from cdt_lens.core import display
from cdt_lens.core.artifacts import load_artifact, save_artifact
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.models.heads import Head, all_heads, check_heads, heads_to_mask
from cdt_lens.models.provenance import Provenance
from cdt_lens.models.view import ModelView, view_of

_FORMAT, _VERSION = "cdt_lens.circuit", 1


@dataclass(frozen=True, eq=False)
class Circuit:
    """Heads of one model for one task.

    heads: in order; scores, stderr: of all heads, `[layer, head]`, signed, in logits (+ pushes
    towards the gold label), or None; selection: how the heads were chosen from the scores; graph:
    what heads and MLPs hand to each other, if that is known.

    Raises:
        InputError: a head lies outside the model, or the graph is of another model's shape.
    """

    heads: tuple[Head, ...]
    n_layers: int
    n_heads: int
    scores: Float[Tensor, "layer head"] | None = field(default=None, repr=False)
    stderr: Float[Tensor, "layer head"] | None = field(default=None, repr=False)
    selection: Mapping[str, Any] = field(default_factory=dict)
    provenance: Provenance | None = field(default=None, repr=False)
    graph: Graph | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
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
        """The heads outside the circuit."""
        inside = set(self.heads)
        return tuple(h for h in all_heads(self.n_layers, self.n_heads) if h not in inside)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a head: name, layer, index, score and standard error in logits."""
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

    def check_model(self, model: nn.Module | ModelView) -> None:
        """Refuse to use the circuit with a model whose weights are not those it was found in.

        Raises:
            InputError: the model has other layers, heads or width. ArtifactError: the weight hashes
                differ; the message shows both.
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

    def save(self, path: str | Path) -> Path:
        """Save as JSON, with the scores beside it as safetensors; whole or not at all.

        Raises:
            InputError: the place cannot be written.
        """
        body: dict[str, Any] = {
            "heads": [str(head) for head in self.heads],
            "n_layers": self.n_layers,
            "n_heads": self.n_heads,
            "selection": dict(self.selection),
            "provenance": None if self.provenance is None else self.provenance.to_dict(),
        }
        if self.graph is not None:
            body["graph"] = self.graph.to_dict()
        named = {"scores": self.scores, "stderr": self.stderr}
        tensors = {name: value for name, value in named.items() if value is not None}
        return save_artifact(path, body, format=_FORMAT, version=_VERSION, tensors=tensors)

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote.

        Raises:
            InputError: no such file. ArtifactError: damaged, another kind of file, or newer.
        """
        body, tensors = load_artifact(path, format=_FORMAT, version=_VERSION)
        try:
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
        except (KeyError, TypeError, InputError) as error:
            raise ArtifactError(f"{path}: not a whole circuit file ({error})") from error


def random_heads(k: int, n_layers: int, n_heads: int, *, seed: int) -> tuple[Head, ...]:
    """`k` heads drawn without replacement.

    Raises:
        InputError: the model has fewer heads.
    """
    everyone = all_heads(n_layers, n_heads)
    if not 0 <= k <= len(everyone):
        raise InputError(f"random_heads: k={k}, the model has {len(everyone)} heads")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(everyone), generator=generator)[:k].tolist()
    return tuple(sorted(everyone[i] for i in order))


def random_heads_like(
    heads: Iterable[Head], n_layers: int, n_heads: int, *, seed: int
) -> tuple[Head, ...]:
    """Heads drawn without replacement, as many in each layer as `heads` has there."""
    chosen = check_heads(heads, n_layers, n_heads)
    generator = torch.Generator().manual_seed(seed)
    drawn: list[Head] = []
    for layer, count in sorted(Counter(h.layer for h in chosen).items()):
        order = torch.randperm(n_heads, generator=generator)[:count].tolist()
        drawn += [Head(layer, head) for head in order]
    return tuple(sorted(drawn))
