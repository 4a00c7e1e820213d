"""Fixtures of all tests."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Wider vectors of newer processors round float32 in another order, and what a tiny model learns
# turns on that. torch reads these names at the first operation.
if torch.cpu._is_avx2_supported():
    os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")
    os.environ.setdefault("MKL_CBWR", "AVX2")
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a tiny family's Hugging Face folder, made when first asked for."""
    from helpers.saved import save_model

    root = tmp_path_factory.mktemp("families")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # advice of transformers about saving
                save_model(root / family, family)
        return root / family

    return folder


def pytest_collection_finish() -> None:
    """Leave what the imports have made out of the garbage collector's rounds."""
    gc.collect()
    gc.freeze()
