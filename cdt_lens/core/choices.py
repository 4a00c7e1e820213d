"""The choices that users make by name, and the numbers that many functions take, as types.

The functions, the settings files and the command line all take them from here. The module imports
nothing heavy, so that the command line starts at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Backend = Literal["auto", "hooked", "bridge"]
Dtype = Literal["float32", "bfloat16", "float64"]
# How accelerate spreads a model over the GPUs.
Spread = Literal["auto", "balanced", "balanced_low_0", "sequential"]
# The keys of `decomposition.rules.PRESETS`.
Preset = Literal["two-ended", "shared", "stable", "official", "linear", "ablation"]
# The rules that found every planted circuit (docs/results/methods.md).
DEFAULT_RULES: Preset = "two-ended"
Slots = Literal["answer", "pooled", "right", "left"]
# Where the reference values of the heads come from (`decomposition.baseline`).
Reference = Literal["mean", "counterfactual", "counterfactual-mean"]
# What the run replaces that faithfulness counts as 0 (`circuits.measures.EMPTY_RUNS`).
Empty = Literal["heads", "all"]
Direction = Literal["mean", "strongest"]
Ranking = Literal["signed", "magnitude"]
Metric = Literal["direction", "accuracy", "balanced_accuracy"]
# Areas under the faithfulness of circuits of growing size (`circuits.measures`).
Area = Literal["cpr", "cmd", "log_area"]
KeyValue = Literal["shared", "skip", "groups"]
Norms = Literal["all", "circuit", "none"]
Scope = Literal["decision", "near-zero", "random", "random-per-layer", "norms", "full", "lora"]
# The scopes that train heads.
HEAD_SCOPES = ("decision", "near-zero", "random", "random-per-layer")
# How the heads of the scope `decision` are chosen.
HeadChoice = Literal["circuit", "gradient", "both"]
Protocol = Literal["tuned", "paper"]
# How the MLP channels of the head scopes are chosen.
ChannelChoice = Literal["random", "weight"]
LoraModules = Literal["attention", "all"]

Count = Annotated[int, Field(ge=1)]
FromZeroCount = Annotated[int, Field(ge=0)]
# The range of torch's generators.
SEEDS = 2**63  # Seeds that are derived from one are taken modulo this number.
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
FromZero = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Level = Annotated[float, Field(gt=0, lt=1)]
