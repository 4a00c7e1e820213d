"""Names of the nodes of a circuit graph, and which node may read which.

1. The nodes are "input" (the embeddings), heads "L9H6", MLPs "M3" and "logits".
2. Each node writes into the residual stream and reads what earlier nodes wrote. A head of layer l
   reads everything before layer l. An MLP of layer l reads the heads of layer l as well, unless
   attention and MLP are parallel (Pythia). The logits read everything.
3. A head reads at three sites: its queries, keys and values. The other nodes read at one site, "".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cdt_lens.core.errors import InputError
from cdt_lens.models.heads import Head

Site = Literal["q", "k", "v", ""]
INPUT, LOGITS = "input", "logits"
# Units of scores: of this package, and of files of other tools, which do not state theirs.
OWN_UNIT = "logits (+ = towards the gold label)"
OTHER_UNIT = "the unit and with the sign of the tool that made them"

# Several times what the largest models have.
_MOST_HEADS, _MOST_EDGES = 100_000, 100_000_000
# No leading zeros: a node has one name.
_NAME = re.compile(r"L(0|[1-9][0-9]*)H(0|[1-9][0-9]*)|M(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class NodePlace:
    """Position of a node.

    Args:
        kind: Kind of the node.
        layer: Layer of the node; -1 for the input, `n_layers` for the logits.
        head: Index of a head in its layer.
    """

    kind: Literal["input", "head", "mlp", "logits"]
    layer: int
    head: int = 0

    def step(self, parallel: bool) -> int:
        """Return the step at which the node reads and writes; it reads nodes of smaller steps.

        Args:
            parallel: Whether attention and MLP of a layer read the same residual stream.
        """
        return 2 * self.layer + (self.kind == "mlp" and not parallel)


def parse_node(name: str, n_layers: int, n_heads: int) -> NodePlace:
    """Read the name of a node.

    Args:
        name: "input", "logits", a head such as "L9H6", or an MLP such as "M3".
        n_layers: Number of layers of the model.
        n_heads: Number of heads per layer.

    Raises:
        InputError: The name has another form, or the model has no such node.
    """
    if name == INPUT:
        return NodePlace("input", -1)
    if name == LOGITS:
        return NodePlace("logits", n_layers)
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(
            f"node {name!r}: expected input, a head such as L9H6, an MLP such as M3, or logits"
        )
    layer, head, mlp = (None if group is None else int(group) for group in match.groups())
    place = NodePlace("head", layer or 0, head or 0) if mlp is None else NodePlace("mlp", mlp)
    if place.layer >= n_layers or place.head >= n_heads:
        raise InputError(
            f"node {name!r}: the model has layers 0-{n_layers - 1} of heads 0-{n_heads - 1}"
        )
    return place


def check_size(n_layers: int, n_heads: int, what: str) -> None:
    """Refuse numbers of layers and heads that no model has, before anything of that size is made.

    Args:
        n_layers: Number of layers of the model.
        n_heads: Number of heads per layer.
        what: What names these numbers, for the message.

    Raises:
        InputError: A number is below 1, or their product is beyond any model.
    """
    for name, size in (("n_layers", n_layers), ("n_heads", n_heads)):
        if not 1 <= size <= _MOST_HEADS:
            raise InputError(f"{what}: {name}={size}, expected at least 1, at most {_MOST_HEADS}")
    if n_layers * n_heads > _MOST_HEADS:
        raise InputError(
            f"{what}: {n_layers} layers of {n_heads} heads, expected at most {_MOST_HEADS} heads"
        )


def node_names(n_layers: int, n_heads: int) -> tuple[str, ...]:
    """Return the names of all nodes of a model, in the order of the residual stream."""
    names = [INPUT]
    for layer in range(n_layers):
        names += [str(Head(layer, head)) for head in range(n_heads)]
        names.append(f"M{layer}")
    return (*names, LOGITS)


def readers(n_layers: int, n_heads: int) -> tuple[tuple[str, Site], ...]:
    """Return every target and site of a model, as EAP-IG orders them.

    Args:
        n_layers: Number of layers of the model.
        n_heads: Number of heads per layer.

    Returns:
        By layer the queries of every head, the keys, the values, and the MLP; then the logits.
    """
    found: list[tuple[str, Site]] = []
    sites: tuple[Site, ...] = ("q", "k", "v")
    for layer in range(n_layers):
        found += [(str(Head(layer, head)), site) for site in sites for head in range(n_heads)]
        found.append((f"M{layer}", ""))
    return (*found, (LOGITS, ""))


def possible_edges(
    n_layers: int, n_heads: int, *, parallel: bool = False
) -> Iterator[tuple[str, str, Site]]:
    """Iterate over the edges of a model: by layer of the target, heads first, then by source.

    Args:
        n_layers: Number of layers of the model.
        n_heads: Number of heads per layer.
        parallel: Whether attention and MLP of a layer read the same residual stream.

    Returns:
        Source, target and site of each edge.

    Raises:
        InputError: There are too many for the memory of a computer.
    """
    # Three sites of each head read about half of all heads.
    if (n_layers * n_heads) ** 2 * 3 / 2 > _MOST_EDGES:
        raise InputError(
            f"{n_layers} layers of {n_heads} heads: expected at most {_MOST_EDGES} edges; write "
            ".graphml or .dot, which hold the edges of the graph alone"
        )
    written = [INPUT]
    for layer in range(n_layers):
        heads = [str(Head(layer, head)) for head in range(n_heads)]
        mlp = f"M{layer}"
        readers = [*heads, mlp] if parallel else heads
        for source in written:
            for target in readers:
                yield from ((source, target, site) for site in _sites(target))
        written += heads
        if not parallel:
            yield from ((source, mlp, "") for source in written)
        written.append(mlp)
    yield from ((source, LOGITS, "") for source in written)


def why_no_edge(
    source: NodePlace, target: NodePlace, site: str, *, parallel: bool = False
) -> str | None:
    """Return why a model has no such edge, or None if it has it.

    Args:
        source: The node that writes.
        target: The node that reads.
        site: The site of the target: "q", "k" or "v" of a head, "" of other nodes.
        parallel: Whether attention and MLP of a layer read the same residual stream.
    """
    if source.step(parallel) >= target.step(parallel):
        beside = " (attention and MLP of a layer are parallel)" if parallel else ""
        return f"runs against the residual stream: a node reads what was written before it{beside}"
    if target.kind == "head" and site not in ("q", "k", "v"):
        return f"site {site!r}: expected q, k or v, as its target is a head"
    if target.kind != "head" and site:
        return f"site {site!r}: expected none, as its target is no head"
    return None


def edge_name(source: str, target: str, site: Site) -> str:
    """Return the name of an edge, such as "L0H1->L9H6<q>" or "M3->logits"."""
    return f"{source}->{target}" + (f"<{site}>" if site else "")


def _sites(target: str) -> tuple[Site, ...]:
    return ("q", "k", "v") if target.startswith("L") else ("",)
