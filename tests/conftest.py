"""Fixtures of all tests."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("tokenizer"))


def pytest_collection_finish() -> None:
    """Leave what the imports have made out of the garbage collector's rounds."""
    gc.collect()
    gc.freeze()
