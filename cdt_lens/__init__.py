"""Contextual decomposition and circuit-targeted fine-tuning for TransformerLens models.

The pipeline is `load_model`, `load_task`, `mean_activations`, `score_heads`, `HeadScores.select`,
`faithfulness_curve`, `finetune` and `render_report`.

A name is imported from its module on first use (PEP 562), so `import cdt_lens` loads neither torch
nor TransformerLens.
"""

from __future__ import annotations

import importlib
import warnings
from importlib.metadata import PackageNotFoundError, version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # The same names for type checkers; a test compares the two lists.
    from cdt_lens.circuits.circuit import Circuit as Circuit
    from cdt_lens.circuits.faithfulness import (
        CircuitFaithfulness as CircuitFaithfulness,
        FaithfulnessCurve as FaithfulnessCurve,
        circuit_faithfulness as circuit_faithfulness,
        faithfulness_curve as faithfulness_curve,
    )
    from cdt_lens.circuits.graph import Graph as Graph
    from cdt_lens.circuits.greedy import greedy_circuit as greedy_circuit
    from cdt_lens.circuits.head_scores import HeadScores as HeadScores
    from cdt_lens.circuits.reliability import (
        Reliability as Reliability,
        membership as membership,
        reliability as reliability,
    )
    from cdt_lens.circuits.smallest import smallest_circuit as smallest_circuit
    from cdt_lens.comparing.compare import compare_methods as compare_methods
    from cdt_lens.comparing.comparison import Comparison as Comparison
    from cdt_lens.core.errors import (
        ArtifactError as ArtifactError,
        CdtLensError as CdtLensError,
        InputError as InputError,
        NonFiniteError as NonFiniteError,
        UnsupportedModelError as UnsupportedModelError,
    )
    from cdt_lens.decomposition.baseline import (
        Baseline as Baseline,
        counterfactual_baseline as counterfactual_baseline,
        mean_activations as mean_activations,
    )
    from cdt_lens.decomposition.decompose import (
        Decomposition as Decomposition,
        Node as Node,
        decompose as decompose,
    )
    from cdt_lens.decomposition.rules import PRESETS as PRESETS, Rules as Rules
    from cdt_lens.experiments.adapt import run_adapt as run_adapt
    from cdt_lens.experiments.adapt_settings import AdaptSettings as AdaptSettings
    from cdt_lens.experiments.transfer import run_transfer as run_transfer
    from cdt_lens.experiments.transfer_config import read_config as read_config
    from cdt_lens.finetuning.adapt_result import AdaptResult as AdaptResult
    from cdt_lens.finetuning.adapter import Adapter as Adapter
    from cdt_lens.finetuning.combine import combine as combine
    from cdt_lens.finetuning.export import export as export
    from cdt_lens.finetuning.finetune import finetune as finetune
    from cdt_lens.finetuning.hub import push_to_hub as push_to_hub
    from cdt_lens.finetuning.options import TrainingOptions as TrainingOptions
    from cdt_lens.finetuning.peft_files import from_peft as from_peft, to_peft as to_peft
    from cdt_lens.finetuning.result import FineTuneResult as FineTuneResult
    from cdt_lens.finetuning.transfer_result import TransferResult as TransferResult
    from cdt_lens.interchange.graphs import read_graph as read_graph, write_graph as write_graph
    from cdt_lens.models.fetch import fetch as fetch
    from cdt_lens.models.heads import Head as Head, Mlp as Mlp
    from cdt_lens.models.loading import load_model as load_model
    from cdt_lens.scoring.agreement import compare_scores as compare_scores
    from cdt_lens.scoring.iterative import trace_circuit as trace_circuit
    from cdt_lens.scoring.methods import (
        METHODS as METHODS,
        attribution_patching as attribution_patching,
        exact_ablation as exact_ablation,
        integrated_gradients as integrated_gradients,
        score_by as score_by,
    )
    from cdt_lens.scoring.one_pass import one_pass as one_pass
    from cdt_lens.scoring.prompt_views import (
        attention_view as attention_view,
        token_relevance as token_relevance,
    )
    from cdt_lens.scoring.sweep import score_heads as score_heads
    from cdt_lens.tasks.datasets import (
        load_task as load_task,
        task_from_files as task_from_files,
        task_from_hub as task_from_hub,
    )
    from cdt_lens.tasks.evaluate import (
        Evaluation as Evaluation,
        calibrate as calibrate,
        evaluate as evaluate,
    )
    from cdt_lens.tasks.task import Examples as Examples, Task as Task
    from cdt_lens.viz.report.report import render_report as render_report

_PUBLIC = {
    "core.errors": (
        "ArtifactError",
        "CdtLensError",
        "InputError",
        "NonFiniteError",
        "UnsupportedModelError",
    ),
    "models.fetch": ("fetch",),
    "models.heads": ("Head", "Mlp"),
    "models.loading": ("load_model",),
    "tasks.datasets": ("load_task", "task_from_files", "task_from_hub"),
    "tasks.evaluate": ("Evaluation", "calibrate", "evaluate"),
    "tasks.task": ("Examples", "Task"),
    "decomposition.baseline": ("Baseline", "counterfactual_baseline", "mean_activations"),
    "decomposition.decompose": ("Decomposition", "Node", "decompose"),
    "decomposition.rules": ("PRESETS", "Rules"),
    "circuits.circuit": ("Circuit",),
    "circuits.faithfulness": (
        "CircuitFaithfulness",
        "FaithfulnessCurve",
        "circuit_faithfulness",
        "faithfulness_curve",
    ),
    "circuits.graph": ("Graph",),
    "circuits.greedy": ("greedy_circuit",),
    "circuits.head_scores": ("HeadScores",),
    "circuits.reliability": ("Reliability", "membership", "reliability"),
    "circuits.smallest": ("smallest_circuit",),
    "scoring.agreement": ("compare_scores",),
    "scoring.iterative": ("trace_circuit",),
    "scoring.methods": (
        "METHODS",
        "attribution_patching",
        "exact_ablation",
        "integrated_gradients",
        "score_by",
    ),
    "scoring.one_pass": ("one_pass",),
    "scoring.prompt_views": ("attention_view", "token_relevance"),
    "scoring.sweep": ("score_heads",),
    "finetuning.adapter": ("Adapter",),
    "finetuning.export": ("export",),
    "finetuning.finetune": ("finetune",),
    "finetuning.hub": ("push_to_hub",),
    "finetuning.options": ("TrainingOptions",),
    "experiments.adapt": ("run_adapt",),
    "experiments.adapt_settings": ("AdaptSettings",),
    "finetuning.combine": ("combine",),
    "finetuning.peft_files": ("from_peft", "to_peft"),
    "finetuning.adapt_result": ("AdaptResult",),
    "finetuning.result": ("FineTuneResult",),
    "finetuning.transfer_result": ("TransferResult",),
    "interchange.graphs": ("read_graph", "write_graph"),
    "comparing.compare": ("compare_methods",),
    "comparing.comparison": ("Comparison",),
    "viz.report.report": ("render_report",),
    "experiments.transfer": ("run_transfer",),
    "experiments.transfer_config": ("read_config",),
}
# Names that stood at the top level in 0.3; each stays importable from its module.
_FORMER = {
    "circuits.ablation": ("circuit_metric",),
    "circuits.circuit": ("random_heads", "random_heads_like"),
    "circuits.graph": ("Edge", "GraphNode"),
    "comparing.comparison": ("MethodResult", "PlantedComparison"),
    "decomposition.baseline": ("zero_baseline",),
    "decomposition.slopes": ("SLOPES", "Slopes"),
    "experiments.compare": ("compare_planted",),
    "experiments.demo_model": ("make_demo_model",),
    "experiments.transfer_config": ("TransferConfig",),
    "finetuning.scopes": ("scope_heads",),
    "interchange.graphs": ("circuit_from_graph", "graph_from_circuit"),
    "planted.catalogue": ("PLANTED", "PlantedCircuit", "planted_circuit"),
    "scoring.agreement": ("MethodAgreement",),
    "scoring.edge_scores": ("EdgeScores", "score_edges"),
    "scoring.iterative": ("select_edges",),
    "scoring.methods": ("DEFAULT_METHODS", "direct_attribution", "random_scores"),
    "scoring.one_pass": ("position_relevance",),
    "scoring.prompt_views": ("AttentionView", "TokenRelevance"),
    "tasks.evaluate": ("label_prior",),
    "tasks.task": ("Example",),
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}
_FORMER_HOMES = {name: module for module, names in _FORMER.items() for name in names}

try:
    __version__ = _version("cdt_lens")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        home = _FORMER_HOMES.get(name)
        if home is None:
            raise _unknown(name)
        warnings.warn(
            f"cdt_lens.{name} will leave the top level; use cdt_lens.{home}.{name}",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(f"cdt_lens.{home}"), name)
    value = getattr(importlib.import_module(f"cdt_lens.{home}"), name)
    globals()[name] = value  # the next access needs no call
    return value


def _unknown(name: str) -> Exception:
    if name.startswith("_"):  # what Python and its tools ask every module for
        return AttributeError(f"module 'cdt_lens' has no attribute {name!r}")
    from cdt_lens.core.errors import UnknownNameError, did_you_mean

    longer = [known for known in __all__ if name.lower() in known.lower()]
    hint = f"; did you mean {longer[0]!r}?" if longer else did_you_mean(name, __all__)
    return UnknownNameError(f"module 'cdt_lens' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
