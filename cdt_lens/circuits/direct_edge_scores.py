"""`DirectEdgeScores`: one signed score per direct edge with its standard error, and graphs of them.

The score of an edge is the label-balanced mean over the examples of what the task direction loses
when the edge carries its baseline, exactly or to first order (`scoring.direct_edges`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from cdt_lens.circuits.edge_pass import Ends
from cdt_lens.circuits.graph import Edge, Graph, GraphNode
from cdt_lens.circuits.head_scores import label_index
from cdt_lens.circuits.measures import heads_at
from cdt_lens.circuits.nodes import edge_name, node_names
from cdt_lens.core import display
from cdt_lens.core.axes import along
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Fraction, FromZeroCount, Ranking
from cdt_lens.core.equality import EqualByContent
from cdt_lens.core.errors import InputError
from cdt_lens.models.provenance import Provenance
from cdt_lens.models.view import ModelView
from cdt_lens.tasks.metrics import balanced_mean, balanced_stderr

# Columns that are reduced at a time, in double precision.
_BLOCK = 2**15


@dataclass(frozen=True, eq=False)
class DirectEdgeScores(EqualByContent):
    """Signed scores of direct edges, in logits: positive pushes towards the gold label.

    Args:
        edges: Source, target and site of each edge of the model; see `Edge`.
        values: Label-balanced mean over the examples, NaN for edges that were not scored.
        stderr: Standard error of `values`.
        per_example: Score of each example.
        example_labels: Label of each example.
        direction: Label-balanced mean task direction of the full model, in logits.
        method: Name of the method.
        n_layers: Number of layers of the model.
        n_heads: Number of heads per layer.
        d_model: Width of the residual stream.
        parallel: Whether attention and MLP of a layer read the same residual stream.
        provenance: Model, task and options that the scores were computed with.
    """

    edges: Annotated[tuple[Ends, ...], along("edge")] = field(repr=False)
    values: Float[Tensor, " edge"]
    stderr: Float[Tensor, " edge"] = field(repr=False)
    per_example: Float[Tensor, "example edge"] = field(repr=False)
    example_labels: Annotated[tuple[str, ...], along("example")] = field(repr=False)
    direction: float
    method: str
    n_layers: int
    n_heads: int
    d_model: int
    parallel: bool
    provenance: Provenance = field(repr=False)

    def __repr__(self) -> str:
        scored = int((~self.values.isnan()).sum())
        sizes = f"{scored} direct edges on {len(self.example_labels)} examples"
        return display.line(self, self.method, sizes, f"direction {self.direction:+.3g} logits")

    @checked_arguments
    def ranking(self, by: Ranking = "signed") -> tuple[int, ...]:
        """Return the numbers of all scored edges, the one of largest score first.

        Args:
            by: "signed" for the score itself, "magnitude" for its absolute value.

        Returns:
            Positions in `edges`.
        """
        keys = (self.values.abs() if by == "magnitude" else self.values).nan_to_num(nan=-torch.inf)
        order = keys.argsort(descending=True, stable=True)
        return tuple(order[~self.values[order].isnan()].tolist())

    @checked_arguments
    def graph(
        self,
        *,
        k: FromZeroCount | None = None,
        fraction: Fraction | None = None,
        by: Ranking = "signed",
    ) -> Graph:
        """Return the graph whose circuit is made of the edges of largest score, pruned.

        This is the selection of MIB and EAP-IG. A pruned circuit has fewer edges than were selected
        where some of them are on no path from the input to the logits.

        Args:
            k: Number of edges to select.
            fraction: Share of all edges of the model to select, rounded down as in MIB.
            by: "signed" for the score itself, "magnitude" for its absolute value.

        Returns:
            The graph, with the scores of all edges.

        Raises:
            InputError: Both or none of `k` and `fraction` are given, or fewer edges are scored.
        """
        if (k is None) == (fraction is None):
            raise InputError("graph: expected exactly one of k and fraction")
        size = heads_at(fraction or 0.0, len(self.edges)) if k is None else k
        ranking = self.ranking(by)
        if size > len(ranking):
            raise InputError(f"graph: {size} edges to select, but only {len(ranking)} have scores")
        inside = set(ranking[:size])
        return Graph(
            self.n_layers,
            self.n_heads,
            {name: GraphNode(None, True) for name in node_names(self.n_layers, self.n_heads)},
            tuple(
                Edge(*ends, None if value != value else value, number in inside)
                for number, (ends, value) in enumerate(
                    zip(self.edges, self.values.tolist(), strict=True)
                )
            ),
            d_model=self.d_model,
            parallel=self.parallel,
            direct=True,
        ).pruned()

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row per scored edge: edge, source, target, site, score, standard error.

        Returns:
            The rows in logits, the strongest edge first.
        """
        rows = [
            (
                edge_name(*self.edges[i]),
                *self.edges[i],
                float(self.values[i]),
                float(self.stderr[i]),
            )
            for i in self.ranking("magnitude")
        ]
        columns = ["edge", "source", "target", "site", "score", "stderr"]
        return pd.DataFrame(rows, columns=columns)

    def _repr_html_(self) -> str:
        return display.html(
            f"Scores of direct edges ({self.method}), in logits", self.to_dataframe()
        )


def collect_edge_scores(
    view: ModelView,
    edges: tuple[Ends, ...],
    rows: Float[Tensor, "example edge_and_direction"],
    labels: tuple[str, ...],
    method: str,
    provenance: Provenance,
) -> DirectEdgeScores:
    """Collect scores of edges from one row per example.

    Args:
        view: The model.
        edges: The edges.
        rows: The score of every edge, then the full model's direction, of each example, in logits.
        labels: Label of each example.
        method: Name of the method.
        provenance: Origin of the scores.
    """
    index = label_index(labels)

    def reduced(function: object) -> Tensor:
        blocks = rows.split(_BLOCK, dim=1)
        return torch.cat([function(own.double().T, index) for own in blocks])  # type: ignore[operator]

    means, errors = reduced(balanced_mean), reduced(balanced_stderr)
    return DirectEdgeScores(
        edges=edges,
        values=means[:-1].to(rows.dtype),
        stderr=errors[:-1].to(rows.dtype),
        per_example=rows[:, :-1],
        example_labels=labels,
        direction=float(means[-1]),
        method=method,
        n_layers=view.n_layers,
        n_heads=view.n_heads,
        d_model=view.d_model,
        parallel=view.parallel,
        provenance=provenance,
    )
