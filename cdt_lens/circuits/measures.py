"""Measures of faithfulness over circuit sizes, and the sizes (MIB, arXiv 2504.13151)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from cdt_lens.core.choices import Area, Empty
from cdt_lens.core.errors import InputError

# The circuit sizes at which MIB (arXiv 2504.13151, §3) integrates, as fractions of the whole.
MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
AREAS: tuple[Area, ...] = get_args(Area)
# What is replaced in the run that f counts as 0, in words: this package's choice, and MIB's.
EMPTY_RUNS: Mapping[Empty, str] = MappingProxyType(
    {"heads": "heads ablated, MLPs intact", "all": "heads, MLPs and input replaced, as in MIB"}
)

# Of the size of the task direction: what float32 leaves where ablation changes nothing.
_ROUNDING = 1e-4


def heads_at(fraction: float, n_heads: int) -> int:
    """Return how many of `n_heads` heads a fraction of them is, rounded down as in MIB.

    Args:
        fraction: Share of the heads, from 0 to 1.
        n_heads: Number of heads to choose from.
    """
    # A product such as 0.29 * 100 lies just below the whole number that it stands for.
    return min(n_heads, int(fraction * n_heads + 1e-9))


def faithfulness(
    circuit: Float[Tensor, "*rows"], full: float, empty: float
) -> Float[Tensor, "*rows"]:
    """Compute f = (m(C) - m(empty)) / (m(full) - m(empty)).

    Args:
        circuit: m(C) of each circuit.
        full: m with all heads.
        empty: m with no heads.

    Returns:
        f of each circuit, without unit: 1 for the full model, 0 for no heads.

    Raises:
        InputError: Ablating every head leaves the metric as it was, so that f has no meaning.
    """
    check_gap(full, empty)
    return (circuit - empty) / (full - empty)


def check_gap(full: float, empty: float, least: float = 1e-9) -> None:
    """Refuse to divide by a difference between all heads and none of `least` or less.

    Args:
        full: m with all heads.
        empty: m with no heads.
        least: The largest difference that counts as rounding, in the unit of the metric.

    Raises:
        InputError: Ablating every head leaves the metric as it was.
    """
    if abs(full - empty) <= least:
        raise InputError(
            f"faithfulness: the metric is {full:.4g} with all heads and {empty:.4g} with none, so "
            "there is nothing to explain; choose another metric, baseline or task"
        )


def check_directions(
    full: Float[Tensor, " example"],
    empty: Float[Tensor, " example"],
    full_mean: float,
    empty_mean: float,
    dtype: torch.dtype,
) -> None:
    """Refuse task directions that differ by rounding between all heads and none.

    Means may cancel, so rounding is judged by the size of the examples' own values.

    Args:
        full: d of each example with all heads, in logits.
        empty: d of each example with no heads.
        full_mean: Mean of `full`, balanced over the labels.
        empty_mean: Mean of `empty`.
        dtype: Floating point type of the model.

    Raises:
        InputError: Ablating every head leaves the direction as it was.
    """
    largest = float(torch.maximum(full.abs(), empty.abs()).mean())
    check_gap(full_mean, empty_mean, max(_ROUNDING, 4 * torch.finfo(dtype).eps) * largest)


def cpr(fractions: Sequence[float], f: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows"]:
    """Compute the circuit performance ratio: the trapezoid area under f (MIB §3).

    Args:
        fractions: Circuit sizes as rising shares of all heads.
        f: Faithfulness at each size.

    Returns:
        The area, without unit; larger is better.
    """
    return torch.trapezoid(f.double(), torch.tensor(fractions, dtype=torch.float64), dim=-1)


def cmd(fractions: Sequence[float], f: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows"]:
    """Compute the circuit-model distance: the trapezoid area under |1 - f| (MIB §3).

    Args:
        fractions: Circuit sizes as rising shares of all heads.
        f: Faithfulness at each size.

    Returns:
        The area, without unit; 0 is best.
    """
    return cpr(fractions, (1 - f).abs())


def log_area(fractions: Sequence[float], f: Float[Tensor, "*rows size"]) -> Float[Tensor, "*rows"]:
    """Compute the mean of f over circuit sizes on a logarithmic axis.

    On the linear axis of CPR half of the area lies above half of the heads. Here every doubling of
    the size counts alike.

    Args:
        fractions: Circuit sizes as rising shares of all heads; a share of 0 does not count.
        f: Faithfulness at each size.

    Returns:
        The area under f over log(fraction), divided by the axis' length; without unit. NaN where
        fewer than two shares are above 0.
    """
    used = [i for i, share in enumerate(fractions) if share > 0]
    if len(used) < 2:
        return torch.full_like(f[..., 0], torch.nan, dtype=torch.float64)
    across = torch.tensor([fractions[i] for i in used], dtype=torch.float64).log()
    return torch.trapezoid(f.double()[..., used], across, dim=-1) / (across[-1] - across[0])


def area(
    name: Area, fractions: Sequence[float], sizes: Sequence[int], f: Float[Tensor, "*rows size"]
) -> Float[Tensor, "*rows"]:
    """Compute an area by its name.

    Args:
        name: "cpr", "cmd" or "log_area".
        fractions: Circuit sizes as rising shares of all heads.
        sizes: Number of heads at each share. The logarithmic axis starts at the first head.
        f: Faithfulness at each size.

    Returns:
        The area, without unit.
    """
    if name == "log_area":
        kept = [share if size else 0.0 for share, size in zip(fractions, sizes, strict=True)]
        return log_area(kept, f)
    return (cpr if name == "cpr" else cmd)(fractions, f)


def area_effects(
    name: Area,
    fractions: Sequence[float],
    sizes: Sequence[int],
    f: Float[Tensor, " size"],
    effects: Float[Tensor, "size example"],
) -> Float[Tensor, " example"]:
    """Return a value per example whose mean is an area, to first order.

    Args:
        name: "cpr", "cmd" or "log_area".
        fractions: Circuit sizes as rising shares of all heads.
        sizes: Number of heads at each share.
        f: Faithfulness at each size.
        effects: For each example a value whose mean is f, by size (`intervals.ratio_effects`).

    Returns:
        The values, without unit. Those of two rankings may be subtracted before an interval is
        made.
    """
    rows = effects.T.double()
    if name == "cmd":
        # |1 - f| changes with f by the sign of f - 1.
        return cpr(fractions, (f.double() - 1).sign() * (rows - 1))
    return area(name, fractions, sizes, rows)
