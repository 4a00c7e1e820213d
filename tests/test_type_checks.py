"""The run time type checks of the suite find wrong types and shapes, so that they cannot rot."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from helpers import type_checks
from helpers.checks import unchecked_types
from helpers.places import ROOT

import cdt_lens as cdt

SOURCE = """
from __future__ import annotations
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from jaxtyping import Float
from torch import Tensor

def repeat(text: str, n: int = 2) -> str:
    return text * n if n else n

def add(a: Float[Tensor, " n"], b: Float[Tensor, " n"], keep: bool = True) -> Float[Tensor, " n"]:
    return a + b if keep else (a + b)[:1]

@contextlib.contextmanager
def opened(name: str) -> Iterator[str]:
    yield name

@dataclass(frozen=True)
class Point:
    x: int

    @property
    def wrong(self) -> str:
        return self.x

    @classmethod
    def of(cls, x: int) -> Point:
        return cls(x)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """A module with the source above, imported under the checks."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "written_for_checks.py").write_text(SOURCE, "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "meta_path", list(sys.meta_path))
        patch.syspath_prepend(folder)
        type_checks.install("written_for_checks")
        yield importlib.import_module("written_for_checks")
    del sys.modules["written_for_checks"]


def test_what_fits_goes_through(written: ModuleType):
    assert written.repeat("ab") == "abab"
    assert torch.equal(written.add(torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))
    assert written.Point.of(3) == written.Point(3)
    with written.opened("x") as name:
        assert name == "x"


def test_wrong_types_and_shapes_are_refused(written: ModuleType):
    two, three = torch.ones(2), torch.ones(3)
    wrong = (
        lambda: written.repeat(7),
        lambda: written.repeat("ab", 0),  # returns a number
        lambda: written.add(two, three),  # n is 2 and 3
        lambda: written.add(two, two, keep=False),  # returns one element
        lambda: written.add(two.long(), two.long()),
        lambda: written.opened(1).__enter__(),
        lambda: written.Point("3"),
        lambda: written.Point.of("3"),
        lambda: written.Point(3).wrong,
    )
    for number, call in enumerate(wrong):
        with pytest.raises(TypeError):
            call()
            pytest.fail(f"call {number} was not refused")
    with unchecked_types():
        assert written.Point("3").wrong == "3"
        assert written.repeat("ab", 0) == 0


def test_the_package_is_checked():
    with pytest.raises(TypeError):
        cdt.Head(0, "1")
    loaded = [m for name, m in sys.modules.items() if name.split(".")[0] == "cdt_lens"]
    assert len(loaded) > 1
    assert all(hasattr(module, "_check_types") for module in loaded)


def test_a_package_that_is_imported_already_is_refused():
    with pytest.raises(RuntimeError, match="imported already"):
        type_checks.install("cdt_lens")


def test_no_function_inside_a_function_has_a_shape():
    """Those are not checked at run time; mypy knows everything but the shapes."""
    for path in sorted((ROOT / "cdt_lens").rglob("*.py")):
        for outer in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(outer, ast.FunctionDef):
                for inner in ast.walk(outer):
                    if isinstance(inner, ast.FunctionDef) and inner is not outer:
                        signature = f"{ast.unparse(inner.args)} {inner.returns and ast.unparse(inner.returns)}"
                        assert not any(shape in signature for shape in type_checks.SHAPES), (
                            f"{path}, line {inner.lineno}"
                        )
