"""Made-up comparisons as large as a real one's: 12 methods on 30 layers of 9 heads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from cdt_lens.circuits.measures import MIB_FRACTIONS
from cdt_lens.comparing.comparison import Comparison, MethodResult, PlantedComparison, RankingCurve
from helpers import sample_results as sample

SIZES = (0, 0, 1, 2, 5, 13, 27, 54, 135, 270)
# Spearman, Pearson, how steep the curve by signed score is, seconds, forward passes.
MADE_UP = {
    "exact": (1.0, 1.0, 14.0, 410.0, 246.0),
    "cdt:stable": (0.35, 0.646, 22.0, 405.0, 243.0),
    "cdt:official": (-0.131, 0.067, 4.0, 433.0, 260.0),
    "cdt:linear": (0.233, 0.635, 2.5, 398.0, 239.0),
    "cdt:decomposed": (0.311, 0.641, 6.0, 437.0, 262.0),
    "cdt:both": (0.52, 0.71, 24.0, 812.0, 487.0),
    "one-pass": (0.233, 0.634, 2.6, 5.1, 3.06),
    "one-pass:tangent": (0.41, 0.66, 12.0, 5.4, 3.2),
    "attribution-patching": (0.412, 0.655, 11.0, 5.2, 3.1),
    "integrated-gradients": (0.62, 0.81, 19.0, 52.0, 31.2),
    "direct": (0.12, 0.41, 9.0, 1.9, 1.1),
    "random": (0.02, -0.01, 0.5, 0.01, 0.006),
}


def f_of(steepness: float, bump: float = 0.0) -> tuple[float, ...]:
    """f over MIB's fractions: up to the full model's 1, the steeper the sooner."""
    x = np.asarray(MIB_FRACTIONS)
    rise = (1 - np.exp(-steepness * x)) / (1 - np.exp(-steepness))
    f = rise + bump * np.sin(3 * np.pi * x**0.3) * (1 - x)
    f[:2], f[-1] = 0.0, 1.0  # no head is kept, and all are
    return tuple(f.tolist())


def curve(steepness: float, bump: float = 0.0) -> RankingCurve:
    """f of 16 examples of two labels, which spread the more, the further f is from both ends."""
    f = f_of(steepness, bump)
    middle = torch.tensor(f)[:, None]
    spread = torch.linspace(-0.3, 0.3, 8).repeat(2) * middle * (1 - middle)
    return RankingCurve.of(MIB_FRACTIONS, SIZES, f, middle + spread)


def comparison(
    methods: Sequence[str] = tuple(MADE_UP), *, refused: Sequence[str] = (), truth: bool = False
) -> Comparison:
    rows = []
    for place, name in enumerate(methods):
        told = f"What {name} does, in words."
        if name in refused:
            reason = "10 of 270 source sets left the finite range under these rules"
            rows.append(MethodResult(name, told, refused=reason))
            continue
        spearman, pearson, steep, seconds, passes = MADE_UP[name]
        known = (0.5 + spearman / 2, max(spearman, 0.05)) if truth else (math.nan, math.nan)
        signed = curve(steep, 0.02 * (place % 3))
        magnitude = curve(0.6 * steep, -0.03 * (place % 4))
        rows.append(
            MethodResult(
                name, told, spearman, pearson, signed, magnitude, seconds, passes, *known, scored=16
            )
        )
    return Comparison(
        methods=tuple(rows),
        fractions=tuple(MIB_FRACTIONS),
        sizes=SIZES,
        random=tuple(curve(0.4 + 0.3 * draw, 0.02 * draw - 0.04) for draw in range(5)),
        scored=16,
        held_out=16,
        direction=2.78,
        full=2.81,
        empty=0.12,
        provenance=sample.provenance({"methods": list(methods), "draws": 5}),
        strata=torch.tensor([0] * 8 + [1] * 8),
    )


CIRCUITS = (
    "trained-gpt2", "trained-llama", "trained-attention-only", "hand-cancellation",
    "hand-duplication", "hand-or", "hand-and", "hand-gated-and", "hand-composition", "hand-dead",
)  # fmt: skip


def planted(
    circuits: Sequence[str] = CIRCUITS, methods: Sequence[str] = tuple(MADE_UP)
) -> PlantedComparison:
    """On the third circuit the official rules are refused."""
    found = {
        name: comparison(methods, truth=True, refused=["cdt:official"] if place == 2 else [])
        for place, name in enumerate(circuits)
    }
    return PlantedComparison(found, {name: f"{name}: two heads write it." for name in circuits})
