"""Check the package's annotations at run time, jaxtyping's shapes included.

This takes the place of jaxtyping's own pytest option, which needs half of the suite's time: it
checks every function as if its annotations held shapes, and decorates the functions inside
functions anew at each call. No function inside a function has a shape in its signature, so mypy
sees all that there is to see.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import config, jaxtyped

SHAPES = ("Float[", "Int[", "Bool[", "Shaped[")
_CHECK = "_check_types"
_beartype = beartype(conf=BeartypeConf(violation_type=TypeError))


def install(package: str) -> None:
    """Check every function, method and dataclass of a package that is imported from now on."""
    loaded = [name for name in sys.modules if _belongs(name, package)]
    if loaded:
        raise RuntimeError(f"{loaded} are imported already, so their types cannot be checked")
    sys.meta_path.insert(0, _Finder(package))


def checked(function: Any) -> Any:
    """Return the function with its arguments and result checked; of a dataclass, its `__init__`."""
    if inspect.isclass(function):
        if "__dataclass_fields__" in vars(function) and "__init__" in vars(function):
            function.__init__ = checked(function.__init__)
        return function
    if any(shape in str(hint) for hint in function.__annotations__.values() for shape in SHAPES):
        return jaxtyped(function, typechecker=_beartype)
    strict = _beartype(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if config.jaxtyping_disable else strict)(*args, **kwargs)

    return call


class _Decorate(ast.NodeTransformer):
    """Put the check below a function's other decorators and above a class's."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list.append(_name(node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        node.decorator_list.insert(0, _name(node))
        return node


def _name(node: ast.AST) -> ast.Name:
    return ast.copy_location(ast.Name(_CHECK, ast.Load()), node)


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """Compile the source anew: the cached bytecode is without the checks."""
        path = self.get_filename(fullname)
        tree = _Decorate().visit(ast.parse(self.get_data(path), path))
        return compile(tree, path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, _CHECK, checked)
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not _belongs(fullname, self.package):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


def _belongs(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")
