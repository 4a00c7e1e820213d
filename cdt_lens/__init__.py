"""Contextual decomposition for TransformerLens: circuits of attention heads, and what they do.

The usual way through: `load_model`, `load_task`, `mean_activations`, `score_heads`,
`HeadScores.select`, `faithfulness_curve`, `render_report`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version

from cdt_lens.ablation import circuit_metric
from cdt_lens.adapter import Adapter
from cdt_lens.attribution import (
    DEFAULT_METHODS,
    METHODS,
    attribution_patching,
    direct_attribution,
    exact_ablation,
    integrated_gradients,
    random_scores,
    score_by,
)
from cdt_lens.baselines import (
    Baseline,
    counterfactual_baseline,
    mean_activations,
    zero_baseline,
)
from cdt_lens.circuit import Circuit, random_heads, random_heads_like
from cdt_lens.compare import compare_methods, compare_planted
from cdt_lens.comparison import Comparison, MethodResult
from cdt_lens.datasets import load_task, task_from_files, task_from_hub
from cdt_lens.decompose import Decomposition, Node, decompose
from cdt_lens.demo_model import make_demo_model
from cdt_lens.edge_scores import EdgeScores, score_edges
from cdt_lens.edges import select_edges, trace_circuit
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
from cdt_lens.graph import Edge, Graph, GraphNode
from cdt_lens.greedy import greedy_circuit
from cdt_lens.head_scores import HeadScores, MethodAgreement, compare_scores
from cdt_lens.heads import Head, Mlp
from cdt_lens.interchange import circuit_from_graph, graph_from_circuit, read_graph, write_graph
from cdt_lens.loading import load_model
from cdt_lens.one_pass import one_pass, position_relevance
from cdt_lens.options import TrainingOptions
from cdt_lens.planted import PLANTED, PlantedCircuit, planted_circuit
from cdt_lens.planted_comparison import PlantedComparison
from cdt_lens.report import render_report
from cdt_lens.rules import PRESETS, Rules
from cdt_lens.scopes import scope_heads
from cdt_lens.scores import score_heads
from cdt_lens.slopes import SLOPES, Slopes
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
    "DEFAULT_METHODS",
    "METHODS",
    "PLANTED",
    "PRESETS",
    "SLOPES",
    "Adapter",
    "ArtifactError",
    "AttentionView",
    "Baseline",
    "CdtLensError",
    "Circuit",
    "CircuitFaithfulness",
    "Comparison",
    "Decomposition",
    "Edge",
    "EdgeScores",
    "Evaluation",
    "Example",
    "Examples",
    "FaithfulnessCurve",
    "FineTuneResult",
    "Graph",
    "GraphNode",
    "Head",
    "HeadScores",
    "InputError",
    "MethodAgreement",
    "MethodResult",
    "Mlp",
    "Node",
    "NonFiniteError",
    "PlantedCircuit",
    "PlantedComparison",
    "Rules",
    "Slopes",
    "Task",
    "TokenRelevance",
    "TrainingOptions",
    "TransferConfig",
    "TransferResult",
    "UnsupportedModelError",
    "attention_view",
    "attribution_patching",
    "calibrate",
    "circuit_faithfulness",
    "circuit_from_graph",
    "circuit_metric",
    "compare_methods",
    "compare_planted",
    "compare_scores",
    "counterfactual_baseline",
    "decompose",
    "direct_attribution",
    "evaluate",
    "exact_ablation",
    "export",
    "faithfulness_curve",
    "fetch",
    "finetune",
    "graph_from_circuit",
    "greedy_circuit",
    "integrated_gradients",
    "label_prior",
    "load_model",
    "load_task",
    "make_demo_model",
    "mean_activations",
    "one_pass",
    "planted_circuit",
    "position_relevance",
    "random_heads",
    "random_heads_like",
    "random_scores",
    "read_config",
    "read_graph",
    "render_report",
    "run_transfer",
    "scope_heads",
    "score_by",
    "score_edges",
    "score_heads",
    "select_edges",
    "task_from_files",
    "task_from_hub",
    "token_relevance",
    "trace_circuit",
    "write_graph",
    "zero_baseline",
]
