"""What a public call may leave behind in a model or in the process, and every such call."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import logging as hf_logging

import cdt_lens as cdt
from cdt_lens.circuits.ablation import circuit_metric
from cdt_lens.circuits.edge_faithfulness import edge_faithfulness, edge_faithfulness_curve
from cdt_lens.decomposition.baseline import zero_baseline
from cdt_lens.interchange.graphs import circuit_from_graph
from cdt_lens.models import provenance, session
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.direct_edges import (
    ablate_edges,
    edge_attribution_patching,
    edge_integrated_gradients,
)
from cdt_lens.scoring.edge_scores import score_edges
from cdt_lens.scoring.ensemble import ensemble_scores
from cdt_lens.scoring.expected_gradients import expected_gradients
from cdt_lens.scoring.gates import learned_gates
from cdt_lens.scoring.methods import direct_attribution, random_scores
from cdt_lens.scoring.one_pass import position_relevance
from cdt_lens.scoring.prompt_views import attention_view, token_relevance
from cdt_lens.scoring.replay import replayed_scores
from cdt_lens.tasks.evaluate import label_prior
from helpers.checks import _state
from helpers.tiny_tasks import examples
from helpers.tiny_training import HEADS, QUICK, task
from helpers.wrapped import wrap

QUIET: dict[str, Any] = {"progress": False}


@dataclass
class Subject:
    """A model with traces of a caller's own use, and what the calls need beside it."""

    model: Any
    view: ModelView
    data: Any
    task: Any
    baseline: Any
    scores: Any
    circuit: Any
    graph: Any
    edges: Any
    adapter: Any
    is_bridge: bool
    take_off: Callable[[], object] = list

    def can(self, name: str) -> bool:
        return self.is_bridge or name != "finetune lora"


def subject(backend: str, folder: str | None = None) -> Subject:
    """A tiny Llama that a caller hooks, trains a part of, and holds a gradient of."""
    model = wrap("llama", backend, folder or tempfile.mkdtemp(), torch.float32)
    model.blocks[0].train()
    parameters = list(model.parameters())
    parameters[1].requires_grad_(True)
    parameters[1].grad = torch.ones_like(parameters[1])
    model.blocks[1].register_forward_pre_hook(_reads)
    data, own = examples(), task()
    own = replace(own, content_free=examples((1,), ("positive",), name="free"))
    baseline = cdt.mean_activations(model, data, mlps=True, **QUIET)
    scores = cdt.score_heads(model, data, baseline, **QUIET)
    circuit = scores.select(k=3)
    adapter = cdt.finetune(model, own, heads=HEADS, **{**QUICK, "epochs": 1}).adapter
    graph = cdt.trace_circuit(model, data, baseline, **QUIET).graph
    edges = edge_attribution_patching(model, data, baseline, **QUIET)
    return Subject(
        model, ModelView(model), data, own, baseline, scores, circuit, graph, edges, adapter,
        backend == "bridge",
    )  # fmt: skip


def _reads(_module: Any, _args: Any) -> None:
    """The caller's own hook, which changes nothing."""


def _applied(s: Subject) -> None:
    with s.adapter.applied(s.model):
        cdt.evaluate(s.model, s.data)


def _kept(s: Subject) -> None:
    handles: list[Any] = []
    # A caller who is interrupted in `remove` calls it again.
    s.take_off = lambda: [handle.remove() for handle in handles]
    handles.append(s.adapter.apply(s.model))
    s.take_off()


def _tune(scope: str) -> Callable[[Subject], Any]:
    return lambda s: cdt.finetune(
        s.model, s.task, heads=s.circuit, scope=scope, **{**QUICK, "epochs": 1}
    )


def _race(s: Subject) -> None:
    cdt.finetune(s.model, s.task, heads=s.circuit, scope="auto", rule="race", **QUICK)


# Every public function and method that takes a model, by the name that the package gives it.
CALLS: dict[str, Callable[[Subject], Any]] = {
    "mean_activations": lambda s: cdt.mean_activations(s.model, s.data, mlps=True, **QUIET),
    "zero_baseline": lambda s: zero_baseline(s.model, s.data),
    "counterfactual_baseline": lambda s: cdt.counterfactual_baseline(s.model, s.data, s.data),
    "Baseline.check_model": lambda s: s.baseline.check_model(s.model),
    "Circuit.check_model": lambda s: s.circuit.check_model(s.model),
    "decompose": lambda s: cdt.decompose(
        s.model, s.data, [["L0H0"], "L1H1"], s.baseline, targets=["L1H0"]
    ),
    "evaluate": lambda s: cdt.evaluate(s.model, s.data, s.task),
    "label_prior": lambda s: label_prior(s.model, s.task),
    "calibrate": lambda s: cdt.calibrate(s.model, s.task),
    "circuit_metric": lambda s: circuit_metric(s.model, [HEADS], s.data, s.baseline, **QUIET),
    "circuit_faithfulness": lambda s: cdt.circuit_faithfulness(
        s.model, s.circuit, s.task.valid, s.baseline, draws=2, **QUIET
    ),
    "faithfulness_curve": lambda s: cdt.faithfulness_curve(
        s.model, s.scores, s.task.valid, s.baseline, draws=2, **QUIET
    ),
    "greedy_circuit": lambda s: cdt.greedy_circuit(
        s.model, s.scores, s.data, s.baseline, k=2, **QUIET
    ),
    "smallest_circuit": lambda s: cdt.smallest_circuit(
        s.model, s.scores, s.task.valid, s.baseline, target=0.1, **QUIET
    ),
    "score_heads": lambda s: cdt.score_heads(s.model, s.data, s.baseline, **QUIET),
    "score_heads of a sample": lambda s: cdt.score_heads(
        s.model, s.data, s.baseline, exact=4, **QUIET
    ),
    "score_by": lambda s: cdt.score_by("cdt:official", s.model, s.data, s.baseline, **QUIET),
    "exact_ablation": lambda s: cdt.exact_ablation(s.model, s.data, s.baseline, **QUIET),
    "one_pass": lambda s: cdt.one_pass(s.model, s.data, s.baseline, **QUIET),
    "position_relevance": lambda s: position_relevance(s.model, s.data, s.baseline),
    "attribution_patching": lambda s: cdt.attribution_patching(
        s.model, s.data, s.baseline, **QUIET
    ),
    "integrated_gradients": lambda s: cdt.integrated_gradients(
        s.model, s.data, s.baseline, **QUIET
    ),
    "expected_gradients": lambda s: expected_gradients(s.model, s.data, s.baseline, **QUIET),
    "replayed_scores": lambda s: replayed_scores(s.model, s.data, s.baseline, **QUIET),
    "ensemble_scores": lambda s: ensemble_scores(s.model, s.data, s.baseline, **QUIET),
    "learned_gates": lambda s: learned_gates(s.model, s.data, s.baseline, **QUIET),
    "direct_attribution": lambda s: direct_attribution(s.model, s.data, s.baseline, **QUIET),
    "random_scores": lambda s: random_scores(s.model, s.data, s.baseline),
    "score_edges": lambda s: score_edges(s.model, s.data, s.baseline, **QUIET),
    "ablate_edges": lambda s: ablate_edges(
        s.model, s.data, s.baseline, edges=["M0->L1H3<k>", "input->logits"], **QUIET
    ),
    "edge_attribution_patching": lambda s: edge_attribution_patching(
        s.model, s.data, s.baseline, **QUIET
    ),
    "edge_integrated_gradients": lambda s: edge_integrated_gradients(
        s.model, s.data, s.baseline, steps=2, **QUIET
    ),
    "edge_faithfulness": lambda s: edge_faithfulness(
        s.model, replace(s.graph, direct=True), s.data, s.baseline, draws=1, **QUIET
    ),
    "edge_faithfulness_curve": lambda s: edge_faithfulness_curve(
        s.model, s.edges, s.data, s.baseline, fractions=(0.2, 1.0), draws=0, **QUIET
    ),
    "trace_circuit": lambda s: cdt.trace_circuit(s.model, s.data, s.baseline, **QUIET),
    "attention_view": lambda s: attention_view(s.model, s.data[:2], s.circuit.heads),
    "token_relevance": lambda s: token_relevance(s.model, s.data[:2], s.circuit.heads, s.baseline),
    "compare_methods": lambda s: cdt.compare_methods(
        s.model, s.data, s.task.valid, s.baseline, ("one-pass", "random"), draws=1, **QUIET
    ),
    "circuit_from_graph": lambda s: circuit_from_graph(s.graph, s.model),
    "Adapter.apply": _kept,
    "Adapter.applied": _applied,
    "Adapter.changes": lambda s: s.adapter.changes(s.model),
    "combine": lambda s: cdt.combine(s.model, [s.adapter, s.adapter]),
    "finetune": _tune("decision"),
    "finetune norms": _tune("norms"),
    "finetune full": _tune("full"),
    "finetune lora": _tune("lora"),
    "finetune auto": _race,
}


class Left:
    """The state of a model and of the process; `changed` names what differs later."""

    def __init__(self, of: Subject) -> None:
        self._before = _everything(of)

    def changed(self, of: Subject) -> list[str]:
        after = _everything(of)
        return [name for name, value in self._before.items() if not _equal(value, after[name])]


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def _everything(of: Subject) -> dict[str, Any]:
    model = of.model
    everything = torch.nn.ModuleDict({"own": model})
    if of.is_bridge:
        everything["original"] = model.original_model
    values = [value.detach().flatten().view(torch.uint8) for value in everything.parameters()]
    return {
        **_state(model),
        "modules": [(n, id(m)) for n, m in everything.named_modules() if n],
        "peft": "peft_config" in vars(getattr(model, "original_model", model)),
        "values": torch.cat(values).clone(),
        "grad hooks": [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        **_process(),
        "turn": _free(model),
    }


def _process() -> dict[str, Any]:
    return {
        "inference mode": torch.is_inference_mode_enabled(),
        "torch generator": torch.get_rng_state(),
        "numpy generator": str(np.random.get_state()),
        "random": random.getstate(),
        "warnings": list(warnings.filters),
        "torch threads": torch.get_num_threads(),
        "threads": {t for t in threading.enumerate() if not t.daemon},
        "signals": [signal.getsignal(n) for n in signal.valid_signals()],
        "logging": (hf_logging.get_verbosity(), logging.getLogger().level),
        "umask": _umask(),
        "hashes": provenance._HASHES.get(),
    }


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _free(model: Any) -> bool:
    """Whether another thread would get its turn."""
    turns = session._turns_of(model)
    found: list[bool] = []

    def ask() -> None:
        found.append(turns.held_by is None and turns.lock.acquire(blocking=False))
        if found[0]:
            turns.lock.release()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return found[0]


class Interrupts:
    """Interrupts at a chosen step of a call, and perhaps once more soon after.

    A step is where Python looks for signals: the start of a function, and the end of one of C's.
    """

    def __enter__(self) -> Interrupts:
        # Python reports an interrupt of a destructor to this hook, where the second could arrive.
        self._hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        self._before = signal.signal(signal.SIGALRM, self._ring)
        self._armed, self.rung, self._second, self._steps, self._at = False, 0, 0.0, 0, 0
        return self

    def __exit__(self, *error: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)
        sys.unraisablehook = self._hook

    def steps(self, call: Callable[[], object]) -> int:
        """Return the number of steps of an undisturbed call."""
        self._steps, self._at, self._armed = 0, -1, False
        try:
            sys.setprofile(self._step)
            call()
        finally:
            sys.setprofile(None)
        return self._steps

    def run(self, call: Callable[[], object], at: int, second: float = 0.0) -> int:
        """Interrupt a call at step `at`, and `second` seconds later; return how often it was."""
        self._steps, self._at, self._second, self.rung = 0, at, second, 0
        self._armed = True
        with suppress(KeyboardInterrupt):  # the second interrupt may arrive after the call
            with suppress(KeyboardInterrupt):
                sys.setprofile(self._step)
                call()
            sys.setprofile(None)
            self._armed = False
        sys.setprofile(None)
        self._armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        return self.rung

    def _step(self, _frame: Any, event: str, _value: Any) -> None:
        if event in ("call", "c_return"):
            self._steps += 1
            if self._steps == self._at:
                signal.raise_signal(signal.SIGALRM)

    def _ring(self, _number: int, _frame: Any) -> None:
        if not self._armed:
            return
        self.rung += 1
        if self._second:
            signal.setitimer(signal.ITIMER_REAL, self._second)
            self._second = 0.0
        raise KeyboardInterrupt
