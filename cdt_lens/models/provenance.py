"""Where a result came from: model and its weight hash, task, options, seed, versions, command."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

import cdt_lens
from cdt_lens.core.errors import ArtifactError
from cdt_lens.models.caller_hooks import caller_hooks
from cdt_lens.models.view import ModelView
from cdt_lens.models.weights import BLOCK_WEIGHTS, END_WEIGHTS, canonical, first_tensor, is_bias

# The hashes of the models seen within `hashed_once`.
_HASHES: ContextVar[dict[Any, str] | None] = ContextVar("weight hashes", default=None)
_PACKAGES = ("torch", "transformer_lens", "transformers")


@dataclass(frozen=True)
class Provenance:
    """What it takes to know, and to check, where a number came from.

    examples: number of examples per label that were used; options: every choice that changes the
    numbers; versions: of Python and of the packages; command: the command line that made it.
    """

    model: str
    model_hash: str
    model_shape: Mapping[str, int]
    task: str
    task_hash: str
    examples: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    created: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Provenance:
        """The inverse of `to_dict`."""
        return cls(**values)

    @property
    def key(self) -> dict[str, Any]:
        """What the result was made from, by the names of a kept result's key (`core.kept`)."""
        key: dict[str, Any] = {"model": self.model_hash, "data": self.task_hash}
        if "baseline_hash" in self.options:
            key["baseline"] = self.options["baseline_hash"]
        if "cdt_lens" in self.versions:
            key["version"] = self.versions["cdt_lens"]
        return key

    def check_model(self, view: ModelView, what: str) -> None:
        """Refuse to use this result with another model.

        Raises:
            ArtifactError: the weight hashes differ; the message shows both.
        """
        found = weight_hash(view)
        if found != self.model_hash:
            raise ArtifactError(
                f"{what} was made with model {self.model} (weights {self.model_hash[:12]}), "
                f"this model is {view.name} (weights {found[:12]}, in {str(view.dtype)[6:]}); load "
                "that model, in the type it had then, or make it again with this one"
            )


def provenance_of(
    view: ModelView, examples: Any, *, options: Mapping[str, Any], seed: int | None = None
) -> Provenance:
    """The provenance of a result computed now with `view` on `examples` (a `tasks.Examples`).

    Hooks of the caller's own act in the numbers and are named among the options.
    """
    hooks = caller_hooks(view.tl)
    told = {"caller_hooks": [*hooks[:8], *([f"{len(hooks) - 8} more"] if hooks[8:] else [])]}
    return Provenance(
        model=view.name,
        model_hash=weight_hash(view),
        model_shape={
            "n_layers": view.n_layers,
            "n_heads": view.n_heads,
            "n_kv_heads": view.n_kv_heads,
            "d_model": view.d_model,
            "parallel": view.parallel,
        },
        task=examples.name,
        task_hash=examples.hash,
        examples=dict(examples.counts),
        options={**options, **(told if hooks else {})},
        seed=seed,
        versions=versions(),
        command=command_line(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version(), "cdt_lens": cdt_lens.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def command_line() -> str:
    """The `cdt-lens` command being run, or "python" from a notebook or a script."""
    program = sys.argv[0].replace("\\", "/") if sys.argv else ""
    if program.rsplit("/", 1)[-1] == "cdt-lens" or program.endswith("cdt_lens/cli/__main__.py"):
        return shlex.join(["cdt-lens", *sys.argv[1:]])
    return "python"


@contextmanager
def hashed_once() -> Iterator[None]:
    """Hash the weights of each model only once within the `with`; nothing in it may change them.

    Every result checks its model, which takes about 0.6 s for 135 million parameters. Works as a
    decorator too, and an inner block shares the hashes of the outer one.
    """
    if _HASHES.get() is not None:
        yield
        return
    token = _HASHES.set({})
    try:
        yield
    finally:
        _HASHES.reset(token)


def weight_hash(view: ModelView) -> str:
    """sha256 over the weights in TransformerLens layout, in a fixed order.

    The same weights in a `HookedTransformer` and in a `TransformerBridge` have the same hash;
    weights folded or centred by TransformerLens have another one. Biases of zero do not count,
    nor does the configuration (such as a rotary base).
    """
    known = _HASHES.get()
    if known is None:
        return _hashed(view)
    if view.tl not in known:
        known[view.tl] = _hashed(view)
    return known[view.tl]


def _hashed(view: ModelView) -> str:
    digest = hashlib.sha256()
    parts = [(view.tl, "", name) for name in END_WEIGHTS]
    for layer, block in enumerate(view.blocks):
        parts += [(block, f"{layer}.", name) for name in BLOCK_WEIGHTS]
    for module, prefix, names in parts:
        tensor = first_tensor(module, names)
        if tensor is None or (is_bias(names) and not bool(tensor.any())):
            continue
        shape = f"{tuple(tensor.shape)}:{tensor.dtype}"
        digest.update(f"{prefix}{canonical(names)}:{shape}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
