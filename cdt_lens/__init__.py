"""Contextual decomposition for TransformerLens: circuits of attention heads, and what they do.

The usual way through: `load_model`, `load_task`, `mean_activations`, `score_heads`,
`HeadScores.select`, `faithfulness_curve`, `render_report`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version

from cdt_lens.ablation import circuit_metric
from cdt_lens.adapter import Adapter
from cdt_lens.attribution import exact_ablation
from cdt_lens.baselines import (
    Baseline,
    counterfactual_baseline,
    mean_activations,
    zero_baseline,
)
from cdt_lens.circuit import Circuit, random_heads, random_heads_like
from cdt_lens.datasets import load_task, task_from_files, task_from_hub
from cdt_lens.decompose import Decomposition, Node, decompose
from cdt_lens.errors import (
    ArtifactError,
    CdtLensError,
    InputError,
    NonFiniteError,
    UnsupportedModelError,
)
from cdt_lens.evaluate import Evaluation, calibrate, evaluate, label_prior
from cdt_lens.export import export
from cdt_lens.faithfulness import (
    CircuitFaithfulness,
    FaithfulnessCurve,
    circuit_faithfulness,
    faithfulness_curve,
)
from cdt_lens.fetch import fetch
from cdt_lens.finetune import finetune
from cdt_lens.finetune_result import FineTuneResult
from cdt_lens.greedy import greedy_circuit
from cdt_lens.head_scores import HeadScores, MethodAgreement, compare_scores
from cdt_lens.heads import Head
from cdt_lens.loading import load_model
from cdt_lens.options import TrainingOptions
from cdt_lens.report import render_report
from cdt_lens.rules import PRESETS, Rules
from cdt_lens.scopes import scope_heads
from cdt_lens.scores import score_heads
from cdt_lens.tasks import Example, Examples, Task
from cdt_lens.transfer import run_transfer
from cdt_lens.transfer_config import TransferConfig, read_config
from cdt_lens.transfer_result import TransferResult
from cdt_lens.views import AttentionView, TokenRelevance, attention_view, token_relevance

try:
    __version__ = _version("cdt_lens")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "PRESETS",
    "Adapter",
    "ArtifactError",
    "AttentionView",
    "Baseline",
    "CdtLensError",
    "Circuit",
    "CircuitFaithfulness",
    "Decomposition",
    "Evaluation",
    "Example",
    "Examples",
    "FaithfulnessCurve",
    "FineTuneResult",
    "Head",
    "HeadScores",
    "InputError",
    "MethodAgreement",
    "Node",
    "NonFiniteError",
    "Rules",
    "Task",
    "TokenRelevance",
    "TrainingOptions",
    "TransferConfig",
    "TransferResult",
    "UnsupportedModelError",
    "attention_view",
    "calibrate",
    "circuit_faithfulness",
    "circuit_metric",
    "compare_scores",
    "counterfactual_baseline",
    "decompose",
    "evaluate",
    "exact_ablation",
    "export",
    "faithfulness_curve",
    "fetch",
    "finetune",
    "greedy_circuit",
    "label_prior",
    "load_model",
    "load_task",
    "mean_activations",
    "random_heads",
    "random_heads_like",
    "read_config",
    "render_report",
    "run_transfer",
    "scope_heads",
    "score_heads",
    "task_from_files",
    "task_from_hub",
    "token_relevance",
    "zero_baseline",
]
