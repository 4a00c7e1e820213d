"""The names of MIB and EAP-IG for the parts of a model, and the fields of their files.

Nodes are named input, a9.h6 (a head), m3 (an MLP) and logits, edges a0.h1->a9.h6<q> and m3->logits.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdt_lens.circuits.nodes import OTHER_UNIT, NodePlace, parse_node, why_no_edge
from cdt_lens.core.errors import InputError
from cdt_lens.models.heads import Head

_NODE = re.compile(r"a(0|[1-9][0-9]*)\.h(0|[1-9][0-9]*)|m(0|[1-9][0-9]*)|input|logits")
_EDGE = re.compile(r"([^>]+)->([^<]+)(?:<(.+)>)?")
_TARGET = re.compile(r"([^<]+)(?:<([qkv])>)?")


@dataclass(frozen=True)
class MibModel:
    """The model that `cfg` describes, and the names that exist in it."""

    n_layers: int
    n_heads: int
    d_model: int | None
    parallel: bool
    unit: str
    direct: bool

    @classmethod
    def read(cls, document: Mapping[str, Any], path: Path) -> MibModel:
        at = f"{path}: cfg"
        cfg = mapping(field_of(document, "cfg", str(path)), at)
        d_model = cfg.get("d_model")
        unit = text_of(document.get("unit", OTHER_UNIT), f"{path}: unit")
        direct = document.get("edges_direct", unit == OTHER_UNIT)
        return cls(
            n_layers=count(field_of(cfg, "n_layers", at), f"{at}.n_layers"),
            n_heads=count(field_of(cfg, "n_heads", at), f"{at}.n_heads"),
            d_model=None if d_model is None else count(d_model, f"{at}.d_model"),
            parallel=flag(field_of(cfg, "parallel_attn_mlp", at), f"{at}.parallel_attn_mlp"),
            unit=unit,
            direct=flag(direct, f"{path}: edges_direct"),
        )

    def node(self, text: str, at: str) -> tuple[str, NodePlace]:
        """Return this package's name for a node, and its place."""
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
        """Return node, place and site of a target such as a9.h6<q>."""
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
        """Return source, target and site of an edge."""
        match = _EDGE.fullmatch(text)
        if match is None:
            raise InputError(f"{at}: expected an edge such as a0.h1->a9.h6<q> or m3->logits")
        (source, start), (target, end) = self.node(match[1], at), self.node(match[2], at)
        why = why_no_edge(start, end, match[3] or "", parallel=self.parallel)
        if why is not None:
            raise InputError(f"{at}: {why}")
        return source, target, match[3] or ""


def their_name(name: str) -> str:
    """Return the name of a node in MIB's files: a9.h6 for L9H6, m3 for M3."""
    if not name.startswith("L"):
        return name.lower()
    head = Head.parse(name)
    return f"a{head.layer}.h{head.head}"


def field_of(values: Mapping[str, Any], name: str, at: str) -> Any:
    """Return the value of a field that must exist.

    Raises:
        InputError: It is missing; the message names the fields that exist.
    """
    if name not in values:
        present = ", ".join(map(str, list(values)[:8])) or "nothing"
        raise InputError(f"{at}: {name} is missing; found {present}")
    return values[name]


def mapping(value: Any, at: str) -> Mapping[str, Any]:
    """Return `value`, which must hold fields by name.

    Raises:
        InputError: It is anything else; the message names the field `at`.
    """
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{at}: expected fields by name, got {type(value).__name__}")
    return value


def names(value: Any, at: str) -> list[str]:
    """Return `value`, which must be a list of different names.

    Raises:
        InputError: It is anything else; the message names the field `at`.
    """
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{at}: expected a list of names, got {type(value).__name__}")
    if len(set(value)) < len(value):
        raise InputError(f"{at}: {repeated(value)!r} is there twice; keep one of the two")
    return list(value)


def repeated(values: Iterable[str]) -> str:
    """Return the most frequent of several values."""
    return Counter(values).most_common(1)[0][0]


def flag(value: Any, at: str) -> bool:
    """Return `value`, which must be true or false.

    Raises:
        InputError: It is anything else; the message names the field `at`.
    """
    if not isinstance(value, bool):
        raise InputError(f"{at}: expected true or false, got {value!r}")
    return value


def number(value: Any, at: str) -> float:
    """Return `value` as a float; it must be a finite number.

    Raises:
        InputError: It is anything else; the message names the field `at`.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{at}: expected a number, got {value!r}")
    try:
        result = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        result = math.inf
    if not math.isfinite(result):
        raise InputError(f"{at}: expected a finite number, got {result}")
    return result


def count(value: Any, at: str) -> int:
    """Return `value`, which must be a whole number of at least 1.

    Raises:
        InputError: It is anything else; the message names the field `at`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{at}: expected a whole number of at least 1, got {value!r}")
    return value


def text_of(value: Any, at: str) -> str:
    """Return `value`, which must be text.

    Raises:
        InputError: It is anything else; the message names the field `at`.
    """
    if not isinstance(value, str):
        raise InputError(f"{at}: expected text, got {value!r}")
    return value


def tensor(value: Any, shape: tuple[int, ...], at: str, *, flags: bool = False) -> Tensor:
    """Return `value`, which must be a tensor of `shape`, of numbers or of true and false.

    Raises:
        InputError: It is anything else; the message names the field `at`.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
        raise InputError(f"{at}: expected a dense tensor, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise InputError(f"{at}: expected the shape {shape}, got {tuple(value.shape)}")
    if flags and value.dtype != torch.bool:
        raise InputError(f"{at}: expected true and false (torch.bool), got {value.dtype}")
    if not flags and not value.is_floating_point():
        raise InputError(f"{at}: expected floating point numbers, got {value.dtype}")
    return value
