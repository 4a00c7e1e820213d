"""Files changed at random are read right or refused in one line (`benchmarks/fuzz.py`: at length)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from helpers.fuzzing import RESULTS, WRITERS, complaint, one_input, seeds
from hypothesis import HealthCheck, given, settings, strategies as st

KINDS = [*RESULTS, *WRITERS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return seeds(tmp_path_factory.mktemp("seeds"))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_raise_no_complaint(whole: dict[str, Path], kind: str):
    assert complaint(kind, whole[kind]) is None


@settings(
    max_examples=400, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32))
def test_changed_files_are_read_right_or_refused(
    whole: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int
):
    folder = tmp_path_factory.getbasetemp() / "changed"
    assert one_input(kind, whole[kind], folder, random.Random(seed)) is None
