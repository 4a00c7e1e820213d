"""Where the nodes and lines of a circuit graph are drawn: a layered drawing, after Sugiyama.

1. Nodes of one step of the residual stream share a row, the input lowest.
2. A line that passes rows on its way has a bend in each of them, and so finds its way around the
   nodes there.
3. Sweeps up and down put the nodes and bends of a row in the order of the mean place of their
   neighbours in the row before, which takes most crossings away.
4. In that order each is drawn as near to the mean place of all its neighbours as the room in its
   row allows (least squares, by isotonic regression).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import isotonic_regression

# Inches: the distance of two rows, the room of a node in its row, and that of a bend.
_ROW, _NODE_ROOM, _BEND_ROOM = 0.74, 0.7, 0.13
_ORDER_SWEEPS, _PLACE_SWEEPS = 24, 40

Spot = tuple[float, float]
# A node by its name, or (line, row): the bend of a line.
_Point = str | tuple[int, int]
_Near = Mapping[_Point, Sequence[_Point]]


@dataclass(frozen=True)
class Layout:
    """The middle of each node, and of each line the bends from its source up, in inches."""

    nodes: Mapping[str, Spot]
    bends: Sequence[Sequence[Spot]]


def layered(steps: Mapping[str, int], lines: Sequence[tuple[str, str]]) -> Layout:
    """Place nodes by their steps (a larger one is higher), and lines (source, target) upwards."""
    levels = {step: row for row, step in enumerate(sorted(set(steps.values())))}
    row_of = {name: levels[step] for name, step in steps.items()}
    bends = [
        [(line, row) for row in range(row_of[source] + 1, row_of[target])]
        for line, (source, target) in enumerate(lines)
    ]
    rows: list[list[_Point]] = [[] for _ in levels]
    for name, row in row_of.items():
        rows[row].append(name)
    for bend in (bend for each in bends for bend in each):
        rows[bend[1]].append(bend)
    x = _places(rows, [[s, *each, t] for (s, t), each in zip(lines, bends, strict=True)])
    return Layout(
        nodes={name: (x[name], _ROW * row) for name, row in row_of.items()},
        bends=[[(x[bend], _ROW * bend[1]) for bend in each] for each in bends],
    )


def _places(rows: list[list[_Point]], chains: Sequence[Sequence[_Point]]) -> dict[_Point, float]:
    """How far to the right each point stands; the rows are put in order on the way."""
    below: dict[_Point, list[_Point]] = {point: [] for row in rows for point in row}
    above: dict[_Point, list[_Point]] = {point: [] for row in rows for point in row}
    for low, high in (pair for chain in chains for pair in pairwise(chain)):
        above[low].append(high)
        below[high].append(low)
    x: dict[_Point, float] = {}
    for row in rows:
        x |= _spread(row, [0.0] * len(row))
    for sweep in range(_ORDER_SWEEPS):
        near = above if sweep % 2 else below
        for row in reversed(rows) if sweep % 2 else rows:
            wishes = dict(zip(row, _wishes(row, near, x), strict=True))
            row.sort(key=wishes.__getitem__)
            x |= _spread(row, [wishes[point] for point in row])
    around = {point: below[point] + above[point] for point in below}
    for sweep in range(_PLACE_SWEEPS):
        for row in reversed(rows) if sweep % 2 else rows:
            x |= _spread(row, _wishes(row, around, x))
    return x


def _wishes(row: Sequence[_Point], near: _Near, x: Mapping[_Point, float]) -> list[float]:
    """The mean place of each point's neighbours; without any, the point's own."""
    around = ([x[other] for other in near[point]] or [x[point]] for point in row)
    return [sum(places) / len(places) for places in around]


def _spread(row: Sequence[_Point], wishes: Sequence[float]) -> dict[_Point, float]:
    """The places nearest to `wishes` that keep the order of the row and the room of each point."""
    room = np.array([_NODE_ROOM if isinstance(point, str) else _BEND_ROOM for point in row])
    least = np.concatenate([[0.0], np.cumsum((room[1:] + room[:-1]) / 2)])
    placed = isotonic_regression(np.array(wishes) - least).x + least
    return dict(zip(row, placed.tolist(), strict=True))
