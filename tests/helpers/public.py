"""Every documented name: those of the top level, and those that are imported from a module."""

from __future__ import annotations

import importlib
from typing import Any

import cdt_lens

# Documented names that have never stood at the top level.
_IN_MODULES = {
    "circuits.direct_edge_scores": ("DirectEdgeScores",),
    "circuits.edge_faithfulness": (
        "EdgeFaithfulness",
        "edge_faithfulness",
        "edge_faithfulness_curve",
    ),
    "scoring.direct_edges": (
        "ablate_edges",
        "edge_attribution_patching",
        "edge_integrated_gradients",
    ),
    "viz.figures": ("overview",),
    "viz.training_figures": ("before_and_after",),
}
HOMES = {
    **cdt_lens._HOMES,
    **cdt_lens._FORMER_HOMES,
    **{name: module for module, names in _IN_MODULES.items() for name in names},
}
NAMES: dict[str, Any] = {
    name: getattr(importlib.import_module(f"cdt_lens.{home}"), name) for name, home in HOMES.items()
}
