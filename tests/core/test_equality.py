"""One meaning of `==`: the same class and the same content, and never an exception."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import sample_comparison, sample_graph, sample_results as sample

import cdt_lens
from cdt_lens.circuits.circuit import Circuit
from cdt_lens.circuits.faithfulness import CircuitFaithfulness
from cdt_lens.comparing.timed_scores import TimedScores
from cdt_lens.core.equality import same_content
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.decomposition.decompose import Decomposition
from cdt_lens.decomposition.targets import TargetParts
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.models.heads import Head
from cdt_lens.scoring.edge_scores import EdgeScores
from cdt_lens.tasks.evaluate import Evaluation

ONES = torch.ones(2, 2)


def baseline() -> Baseline:
    return Baseline("pooled", torch.ones(2, 1, 2, 3), sample.provenance(), mlp_means=ONES[:, None])


def adapter() -> Adapter:
    index = ((0, 2), torch.ones(2, 4, 3, dtype=torch.bfloat16))
    slices = {"blocks.0.attn.W_Q": index}
    return Adapter("decision", (Head(0, 0),), slices, {"ln": torch.ones(3)}, sample.provenance())


def faithful() -> CircuitFaithfulness:
    draws = {"random": torch.tensor([0.1, torch.nan])}
    return CircuitFaithfulness(
        (Head(0, 1),), 0.5, 0.2, draws, {"random": 1.0}, 2.0, 0.1, "direction", sample.provenance()
    )


def decomposition() -> Decomposition:
    parts = {("q", Head(1, 0)): TargetParts(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))}
    return Decomposition(((Head(0, 1),),), ONES.int(), ONES, ONES, ONES[None], parts)


def evaluation() -> Evaluation:
    return Evaluation("files/test", 0.5, None, 0.1, 1.0, 4, 0.4, pd.DataFrame({"good": [1, 2]}))


def edge_scores() -> EdgeScores:
    return EdgeScores((Head(0, 0), Head(0, 1)), ONES[0], torch.ones(2, 3, 2, 1), ONES)


MAKERS: list[Callable[[], Any]] = [
    sample.scores, sample.circuit, sample.curve, sample.agreement, sample.attention_view,
    sample.token_relevance, sample.fine_tuning, sample.transfer, sample_comparison.comparison,
    sample_comparison.planted, sample_graph.small, baseline, adapter, faithful, decomposition,
    evaluation, edge_scores, lambda: TimedScores("direct", sample.scores()),
]  # fmt: skip


def changed(value: Any) -> Any:
    """Another value of the same kind, with one number or word changed; None where there is none."""
    if isinstance(value, torch.Tensor):
        other = value.clone()
        other.view(-1)[-1] += 1
        return other
    if isinstance(value, pd.DataFrame):
        return value.iloc[:-1]
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, int | float):
        return 0.5 if math.isnan(value) else value + 1
    if isinstance(value, dict):
        return dict(list(value.items())[:-1]) if value else None
    if isinstance(value, tuple):
        return value[:-1] if value else None
    return None


@pytest.mark.parametrize("make", MAKERS)
def test_equal_results_are_equal_and_one_change_anywhere_is_seen(make: Callable[[], Any]):
    one, other = make(), make()
    assert one == other and one == one
    assert hash(one) == hash(other) and len({one, other}) == 1
    assert one != "text" and one != None  # noqa: E711
    seen = 0
    for field in dataclasses.fields(one):
        value = changed(getattr(one, field.name))
        if value is None:
            continue
        different = object.__new__(type(one))
        different.__dict__.update({**one.__dict__, field.name: value})
        assert one != different, field.name
        seen += 1
    assert seen


SAVED = [m for m in MAKERS if hasattr(m(), "save")]


@pytest.mark.parametrize("make", SAVED)
def test_a_saved_and_loaded_result_equals_itself(make: Callable[[], Any], tmp_path: Path):
    result = make()
    if make is sample.curve:  # Its made-up areas are computed from the points when it is loaded.
        result = type(result).load(result.save(tmp_path / "first.json"))
    again = type(result).load(result.save(tmp_path / "saved.json"))
    assert again == result and again is not result


def test_a_circuit_with_its_graph_equals_itself_after_a_round_trip(tmp_path: Path):
    graph = sample_graph.small()
    circuit = Circuit(graph.heads, graph.n_layers, graph.n_heads, graph=graph)
    assert Circuit.load(circuit.save(tmp_path / "c.json")) == circuit


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), True),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(2), torch.ones(1, 2), False),
        (torch.ones(2), [1.0, 1.0], False),
        (torch.tensor([True]), torch.tensor([True]), True),
        (np.array([1.0, np.nan]), np.array([1.0, np.nan]), True),
        (np.array([1, 2]), np.array([1, 3]), False),
        ([1, (2.0, float("nan"))], (1, [2.0, float("nan")]), True),
        ({"a": torch.ones(1)}, {"a": torch.ones(1)}, True),
        ({"a": 1}, {"b": 1}, False),
        (pd.DataFrame({"a": [1, None]}), pd.DataFrame({"a": [1.0, float("nan")]}), True),
        (pd.DataFrame({"a": [1]}), pd.DataFrame({"b": [1]}), False),
        (pd.Series([1, 2]), pd.Series([1, 2], index=[1, 2]), False),
        (float("nan"), float("nan"), True),
        (0.1 + 0.2, 0.3, False),
        ("a", 1, False),
    ],
)
def test_what_same_content_means(one: Any, other: Any, same: bool):
    assert same_content(one, other) is same


def dataclasses_of_the_package() -> list[type]:
    modules = pkgutil.walk_packages(cdt_lens.__path__, "cdt_lens.")
    names = [module.name for module in modules if not module.name.endswith("__main__")]
    classes = {
        value
        for name in names
        for value in vars(importlib.import_module(name)).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value)
        and value.__module__.startswith("cdt_lens.")
    }  # fmt: skip
    return sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__))


def test_no_dataclass_compares_tensors_or_frames_field_by_field():
    """Python's own comparison of fields raises there; comparing identity or content does not."""
    array = re.compile(r"Tensor|DataFrame|ndarray")
    for cls in dataclasses_of_the_package():
        annotations = [str(field.type) for field in dataclasses.fields(cls) if field.compare]
        if any(array.search(annotation) for annotation in annotations):
            assert "__eq__" not in vars(cls), f"{cls.__module__}.{cls.__qualname__}: eq=False"
