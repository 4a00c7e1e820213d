"""What MIB and EAP-IG call the parts of a model, and what their `cfg` says of it.

Nodes are named input, a9.h6 (a head), m3 (an MLP) and logits, edges a0.h1->a9.h6<q> and m3->logits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdt_lens.errors import InputError
from cdt_lens.fields import count, field_of, flag, mapping, text_of
from cdt_lens.graph_nodes import (
    LOGITS,
    OTHER_UNIT,
    NodePlace,
    Site,
    parse_node,
    why_no_edge,
)
from cdt_lens.heads import Head

_NODE = re.compile(r"a(0|[1-9][0-9]*)\.h(0|[1-9][0-9]*)|m(0|[1-9][0-9]*)|input|logits")
_EDGE = re.compile(r"([^>]+)->([^<]+)(?:<(.+)>)?")
_TARGET = re.compile(r"([^<]+)(?:<([qkv])>)?")


@dataclass(frozen=True)
class MibModel:
    """What `cfg` says of the model, and the names that make sense in it."""

    n_layers: int
    n_heads: int
    d_model: int | None
    parallel: bool
    unit: str

    @classmethod
    def read(cls, document: Mapping[str, Any], path: Path) -> MibModel:
        at = f"{path}: cfg"
        cfg = mapping(field_of(document, "cfg", str(path)), at)
        d_model = cfg.get("d_model")
        return cls(
            n_layers=count(field_of(cfg, "n_layers", at), f"{at}.n_layers"),
            n_heads=count(field_of(cfg, "n_heads", at), f"{at}.n_heads"),
            d_model=None if d_model is None else count(d_model, f"{at}.d_model"),
            parallel=flag(field_of(cfg, "parallel_attn_mlp", at), f"{at}.parallel_attn_mlp"),
            unit=text_of(document.get("unit", OTHER_UNIT), f"{path}: unit"),
        )

    def node(self, text: str, at: str) -> tuple[str, NodePlace]:
        """This package's name for a node, and where it stands."""
        match = _NODE.fullmatch(text)
        if match is None:
            raise InputError(f"{at}: node {text!r}: expected such as input, a9.h6, m3 or logits")
        layer, head, mlp = match.groups()
        name = f"L{layer}H{head}" if layer else f"M{mlp}" if mlp else text
        try:
            return name, parse_node(name, self.n_layers, self.n_heads)
        except InputError as error:
            raise InputError(f"{at}: {error}") from error

    def reader(self, text: str, at: str) -> tuple[str, NodePlace, Any]:
        """A target such as a9.h6<q>: its node, where that stands, and the site."""
        match = _TARGET.fullmatch(text)
        if match is None:
            raise InputError(f"{at}: {text!r}: expected such as a9.h6<q>, m3 or logits")
        own, place = self.node(match[1], at)
        if (place.kind == "head") != bool(match[2]):
            raise InputError(
                f"{at}: {text!r}: a head has <q>, <k> or <v> behind it, others nothing"
            )
        return own, place, match[2] or ""

    def edge(self, text: str, at: str) -> tuple[str, str, Any]:
        """Source, target and site of an edge."""
        match = _EDGE.fullmatch(text)
        if match is None:
            raise InputError(f"{at}: expected an edge such as a0.h1->a9.h6<q> or m3->logits")
        (source, start), (target, end) = self.node(match[1], at), self.node(match[2], at)
        why = why_no_edge(start, end, match[3] or "", parallel=self.parallel)
        if why is not None:
            raise InputError(f"{at}: {why}")
        return source, target, match[3] or ""


def their_name(name: str) -> str:
    """A node's name in MIB's files: a9.h6 for L9H6, m3 for M3."""
    if not name.startswith("L"):
        return name.lower()
    head = Head.parse(name)
    return f"a{head.layer}.h{head.head}"


def their_targets(n_layers: int, n_heads: int) -> list[tuple[str, Site]]:
    """Every (target, site) in the order of a .pt file: layer by layer q, k, v, then the MLP."""
    found: list[tuple[str, Site]] = []
    sites: tuple[Site, ...] = ("q", "k", "v")
    for layer in range(n_layers):
        found += [(str(Head(layer, head)), site) for site in sites for head in range(n_heads)]
        found.append((f"M{layer}", ""))
    return [*found, (LOGITS, "")]
