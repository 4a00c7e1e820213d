"""Numbers of every public computation on the tiny models, to compare one version with another.

`python tests/snapshot.py FILE` records them; `python tests/snapshot.py FILE --check OTHER` compares
two records bit for bit. Only public names are used, so that the same script runs on a version whose
modules lie elsewhere. Each number is kept twice: as the sha256 of its bytes, which decides whether
two versions agree bit for bit on one machine, and as a few projections in float64, which another
machine reproduces within rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cdt_lens as cdt
from helpers.tiny_models import Float64Throughout
from helpers.tiny_tasks import many
from helpers.tiny_training import QUICK, task as training_task
from helpers.wrapped import wrap

FAMILIES = (
    "gpt2", "pythia", "neox_seq", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3",
)  # fmt: skip
BRIDGE_ONLY = ("gemma2", "gemma3")
CASES = tuple(
    (family, backend)
    for family in FAMILIES
    for backend in ("hooked", "bridge")
    if not (backend == "hooked" and family in BRIDGE_ONLY)
)
SCOPES = ("decision", "near-zero", "random", "random-per-layer", "norms", "full", "lora")
_FEW = 8  # projections of a tensor


def digest(value: Any) -> dict[str, Any]:
    """The sha256 of a value's bytes, and for tensors a few projections on fixed directions."""
    if not isinstance(value, Tensor):
        text = json.dumps(value, sort_keys=True, default=str)
        return {"sha256": _sha(text.encode()), "text": text[:400]}
    flat = value.detach().cpu().contiguous().flatten()
    bits = flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)
    found = {"sha256": _sha(bits.numpy().tobytes()), "shape": list(value.shape)}
    numbers = flat.double().nan_to_num(nan=0.0)
    if numbers.numel() > _FEW:
        generator = torch.Generator().manual_seed(0)
        directions = torch.randn(_FEW, numbers.numel(), generator=generator, dtype=torch.float64)
        numbers = directions @ numbers / numbers.numel() ** 0.5
    return found | {"values": numbers.tolist()}


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _scores(scores: Any) -> dict[str, Any]:
    picked = {
        f"select {by}": [str(h) for h in scores.select(k=3, by=by).heads]
        for by in ("signed", "magnitude")
    }
    return {
        "values": scores.values, "stderr": scores.stderr, "per_example": scores.per_example,
        "direction": scores.direction, **picked,
        "near-zero": [str(h) for h in scores.near_zero(3).heads],
        **(
            {"confident": [str(h) for h in scores.select(confidence=0.9).heads]}
            if scores.has_intervals else {}
        ),
    }  # fmt: skip


def _curve(curve: Any) -> dict[str, Any]:
    return {
        "f": curve.faithfulness, "completeness": curve.completeness, "full": curve.full,
        "empty": curve.empty, "random": torch.cat(list(curve.random.values())),
    }  # fmt: skip


def _decomposition(parts: Any) -> dict[str, Any]:
    found = {"relevant": parts.relevant, "logits": parts.logits}
    for (site, head), part in parts.targets.items():
        found |= {f"{site} {head} relevant": part.relevant}
        found |= {f"{site} {head} irrelevant": part.irrelevant}
    return found


def _adapter(result: Any) -> dict[str, Any]:
    adapter = result.adapter
    found: dict[str, Any] = {name: values for name, (_, values) in adapter.slices.items()}
    found |= dict(adapter.whole)
    history = result.history.drop(columns="seconds")
    heads = [str(head) for head in result.heads]
    return {"heads": heads, "history": history.to_dict("list"), **found}


def computations(
    family: str, backend: str, tokenizer_folder: str
) -> Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]:
    """(name, what computes it) of every number of one model, in an order that reuses the first."""
    wide = Float64Throughout()
    with wide:
        model = wrap(family, backend, tokenizer_folder)
        narrow = wrap(family, backend, tokenizer_folder, torch.float32)
        data, task = many(12), training_task()
        base = cdt.mean_activations(model, data, mlps=True, progress=False)
        scores = cdt.score_heads(model, data, base, rules="stable", progress=False)
    quiet = {"progress": False}
    head = cdt.Head

    def evaluation() -> dict[str, Any]:
        found = cdt.evaluate(model, data)
        return {"direction": found.direction, "loss": found.loss, "accuracy": found.accuracy}

    yield "evaluate", evaluation
    yield (
        "prior",
        lambda: {
            "accuracy": cdt.evaluate(model, task.valid, task).accuracy,
            "macro_f1": cdt.evaluate(model, task.valid, task).macro_f1,
        },
    )
    for slots in ("answer", "pooled", "right", "left"):
        yield (
            f"baseline {slots}",
            lambda slots=slots: {
                "means": cdt.mean_activations(model, data, positions=slots, **quiet).means
            },
        )
    yield "baseline mlps", lambda: {"means": base.means, "mlps": base.mlp_means}
    for rules in cdt.PRESETS:
        yield (
            f"score_heads {rules}",
            lambda rules=rules: _scores(cdt.score_heads(model, data, base, rules=rules, **quiet)),
        )
    for name in cdt.METHODS:
        if not name.startswith("cdt:"):
            yield (
                f"method {name}",
                lambda name=name: _scores(cdt.score_by(name, model, data, base, **quiet)),
            )
    yield (
        "score_heads strongest",
        lambda: _scores(
            cdt.score_heads(model, data, base, direction="strongest", batch_size=5, **quiet)
        ),
    )
    for rules in ("shared", "official"):
        yield f"decompose {rules}", lambda rules=rules: _decomposition(
            cdt.decompose(
                model, data[:4], baseline=base, rules=rules,
                sources=[[head(0, 1)], [cdt.Node(0, 2, -1), head(0, 3)], [cdt.Mlp(0)]],
                targets=[head(1, 0), head(1, 2)],
            )
        )  # fmt: skip
    for metric in ("direction", "accuracy"):
        yield (
            f"curve {metric}",
            lambda metric=metric: _curve(
                cdt.faithfulness_curve(model, scores, data, base, metric=metric, draws=2, **quiet)
            ),
        )
    yield (
        "circuit_faithfulness",
        lambda: {
            name: getattr(found, name)
            for found in [
                cdt.circuit_faithfulness(model, scores.select(k=3), data, base, draws=2, **quiet)
            ]
            for name in ("faithfulness", "completeness", "full", "empty", "beaten")
        },
    )
    yield (
        "score_edges",
        lambda: {
            name: getattr(found, name)
            for found in [cdt.score_edges(model, data[:6], base, **quiet)]
            for name in ("to_logits", "to_heads", "to_mlps")
        },
    )
    yield (
        "trace_circuit",
        lambda: {
            "edges": [
                [edge.source, edge.target, edge.site, edge.score]
                for edge in cdt.trace_circuit(
                    model, data[:6], base, width=3, fan_in=2, **quiet
                ).graph.edges
            ]
        },
    )
    yield (
        "greedy",
        lambda: {
            "heads": [
                str(h) for h in cdt.greedy_circuit(model, scores, data, base, k=2, **quiet).heads
            ]
        },
    )
    yield "position_relevance", lambda: {"z": cdt.position_relevance(model, data[:4], base)}
    circuit = scores.select(k=2)
    for scope in SCOPES:
        if scope == "lora" and backend == "hooked":
            continue
        yield f"finetune {scope}", lambda scope=scope: _adapter(
            cdt.finetune(
                narrow, task, scope=scope, source=task,
                heads=_in_narrow(narrow, circuit) if scope not in ("norms", "full", "lora") else None,
                **QUICK,
            )
        )  # fmt: skip


def _in_narrow(narrow: Any, circuit: Any) -> Any:
    """The same heads with scores from the float32 model, which is the one that is trained."""
    data = many(12)
    base = cdt.mean_activations(narrow, data, progress=False)
    return cdt.score_heads(
        narrow, data, base, rules="stable", progress=False
    ).select(k=len(circuit.heads))  # fmt: skip


def record(
    cases: Iterable[tuple[str, str]] = CASES, only: Callable[[str], bool] = lambda _: True
) -> dict[str, dict[str, Any]]:
    """Every number by "family-backend | computation | part"."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for family, backend in cases:
                found |= _record_one(family, backend, folder, only)
    finally:
        torch.set_num_threads(threads)
    return found


def _record_one(
    family: str, backend: str, folder: str, only: Callable[[str], bool]
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, compute in computations(family, backend, folder):
        if not only(name):
            continue
        narrow = name.startswith("finetune")
        try:
            with contextlib.nullcontext() if narrow else Float64Throughout():
                parts = compute()
        except cdt.CdtLensError as error:
            parts = {"refused": type(error).__name__}
        for part, value in parts.items():
            found[f"{family}-{backend} | {name} | {part}"] = digest(value)
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The places whose bits differ."""
    return [
        f"{name}: {_brief(old.get(name))} -> {_brief(new.get(name))}"
        for name in sorted({*old, *new})
        if (old.get(name) or {}).get("sha256") != (new.get(name) or {}).get("sha256")
    ]


def _brief(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "absent"
    return str(entry.get("text", entry.get("values")))[:90]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--check", type=Path, help="a record to compare with")
    parser.add_argument("--case", action="append", help="such as llama-bridge")
    given = parser.parse_args()
    cases = [c for c in CASES if not given.case or "-".join(c) in given.case]
    found = record(cases)
    given.file.write_text(json.dumps(found, indent=0) + "\n", "utf-8")
    sys.stdout.write(f"{len(found)} numbers\n")
    if given.check is not None:
        old = json.loads(given.check.read_text("utf-8"))
        if given.case:
            old = {k: v for k, v in old.items() if k.split(" | ")[0] in given.case}
        different = differences(old, found)
        sys.stdout.write("\n".join([*different, f"{len(different)} differ"]) + "\n")


if __name__ == "__main__":
    main()
