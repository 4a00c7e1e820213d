"""Fixtures of all tests. The package's types are checked from its first import on."""

from __future__ import annotations

import gc

import pytest
from helpers import type_checks

type_checks.install("cdt_lens")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("tokenizer"))


def pytest_collection_finish() -> None:
    """Leave what the imports have made out of the garbage collector's rounds."""
    gc.collect()
    gc.freeze()
