"""Measures of faithfulness over circuit sizes (MIB, arXiv 2504.13151)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cdt_lens.core.errors import InputError

# The circuit sizes at which MIB (arXiv 2504.13151, §3) integrates, as fractions of the whole.
MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def faithfulness(
    circuit: Float[Tensor, "*rows"], full: float, empty: float
) -> Float[Tensor, "*rows"]:
    """f = (m(C) - m(empty)) / (m(full) - m(empty)); 1 for the full model, 0 for no heads.

    Raises:
        InputError: ablating every head leaves the metric as it was, so that f has no meaning.
    """
    check_gap(full, empty)
    return (circuit - empty) / (full - empty)


def check_gap(full: float, empty: float, least: float = 1e-9) -> None:
    """Refuse to divide by what all heads together change, where that is `least` or less.

    Raises:
        InputError: ablating every head leaves the metric as it was.
    """
    if abs(full - empty) <= least:
        raise InputError(
            f"faithfulness: the metric is {full:.4g} with all heads and {empty:.4g} with none, so "
            "there is nothing to explain; choose another metric, baseline or task"
        )


def cpr(fractions: Sequence[float], f: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows"]:
    """Circuit performance ratio: trapezoid area under f over the fractions (MIB §3)."""
    return torch.trapezoid(f.double(), torch.tensor(fractions, dtype=torch.float64), dim=-1)


def cmd(fractions: Sequence[float], f: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows"]:
    """Circuit-model distance: trapezoid area under |1 - f| (MIB §3); 0 is best."""
    return cpr(fractions, (1 - f).abs())
