"""Record the origin of a result: model, weight hash, task, options, seed, versions and command."""

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
from cdt_lens.core.undo import undoing
from cdt_lens.models.caller_hooks import caller_hooks
from cdt_lens.models.configuration import (
    configuration,
    digest as digest_of,
    first_difference,
)
from cdt_lens.models.resident import resident
from cdt_lens.models.view import ModelView
from cdt_lens.models.weights import (
    adapter_layers,
    block_weights,
    end_weights,
    is_bias,
    other_parameters,
)

# The hashes of the models within `hashed_once`.
_HASHES: ContextVar[dict[Any, str] | None] = ContextVar("weight hashes", default=None)
_PACKAGES = ("torch", "transformer_lens", "transformers")


@dataclass(frozen=True)
class Provenance:
    """The origin of a number, enough to reproduce it and to check it against a model.

    Attributes:
        model: name of the model.
        model_hash: sha256 of its weights, see `weight_hash`.
        model_shape: numbers of layers, heads and key/value heads, the width, and whether blocks are
            parallel.
        task: name of the examples.
        task_hash: sha256 of the examples.
        examples: number of examples of each label.
        options: every choice that changes the numbers.
        seed: seed of the random draws, or None.
        versions: versions of Python and of the packages.
        command: the command line, or "python".
        created: time in UTC, in ISO format.
        configuration: the values besides the weights that change the model's logits, see
            `models.configuration`. Empty in files of 0.3.0.
    """

    model: str
    model_hash: str
    model_shape: Mapping[str, int | bool]
    task: str
    task_hash: str
    examples: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    created: str = ""
    configuration: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain nested values, without a configuration that is not known."""
        values = asdict(self)
        if not values["configuration"]:
            del values["configuration"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Provenance:
        """Create a provenance from the values that `to_dict` returned.

        Args:
            values: the fields by name.

        Returns:
            The provenance.
        """
        return cls(**values)

    @property
    def key(self) -> dict[str, Any]:
        """What the result was made from, by the names of a kept result's key (`core.kept`)."""
        key: dict[str, Any] = {"model": self.model_key, "data": self.task_hash}
        if "baseline_hash" in self.options:
            key["baseline"] = self.options["baseline_hash"]
        if "cdt_lens" in self.versions:
            key["version"] = self.versions["cdt_lens"]
        return key

    @property
    def model_key(self) -> str:
        """The model in the key of a kept result, see `model_key`."""
        return _model_key(self.model_hash, self.configuration)

    def difference(self, model_hash: str, values: Mapping[str, Any]) -> str | None:
        """Compare the model of this provenance with another one.

        Args:
            model_hash: the weight hash of the other model.
            values: its configuration. What one of the two does not record is not compared.

        Returns:
            What differs, in words, or None.
        """
        if model_hash != self.model_hash:
            return f"weights {self.model_hash[:12]}, and here {model_hash[:12]}"
        return first_difference(self.configuration, values)

    def check_model(self, view: ModelView, what: str) -> None:
        """Check that a model has the weights and the configuration of this provenance.

        Args:
            view: the model.
            what: name of the result in the error message, such as "this baseline".

        Raises:
            ArtifactError: the model is another one. The message shows what differs.
        """
        different = self.difference(weight_hash(view), configuration(view))
        if different is not None:
            raise ArtifactError(
                f"{what} was made with another model than {view.name} in {str(view.dtype)[6:]}: "
                f"model {self.model} ({different}). Load that model in the type that it had then, "
                "or compute the result again with this model."
            )


def provenance_of(
    view: ModelView, examples: Any, *, options: Mapping[str, Any], seed: int | None = None
) -> Provenance:
    """Return the provenance of a result that is computed now.

    The caller's own hooks change the numbers, so they are named among the options.

    Args:
        view: the model.
        examples: the `tasks.task.Examples` that were used.
        options: every choice that changes the numbers.
        seed: seed of the random draws, if there are any.

    Returns:
        The provenance.
    """
    hooks = caller_hooks(view.tl)
    named_hooks = {"caller_hooks": [*hooks[:8], *([f"{len(hooks) - 8} more"] if hooks[8:] else [])]}
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
        options={**options, **(named_hooks if hooks else {})},
        configuration=configuration(view),
        seed=seed,
        versions=versions(),
        command=command_line(),
        created=now(),
    )


def now() -> str:
    """Return the time in UTC, in ISO format, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the numbers depend on."""
    installed = {"python": platform.python_version(), "cdt_lens": cdt_lens.__version__}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "unknown"
    return installed


def command_line() -> str:
    """Return the running `cdt-lens` command, or "python" in a notebook or a script."""
    program = sys.argv[0].replace("\\", "/") if sys.argv else ""
    if program.rsplit("/", 1)[-1] == "cdt-lens" or program.endswith("cdt_lens/cli/__main__.py"):
        # Bytes of names that are not UTF-8 stand as escapes.
        return shlex.join(["cdt-lens", *sys.argv[1:]]).encode(errors="backslashreplace").decode()
    return "python"


@contextmanager
def hashed_once() -> Iterator[None]:
    """Hash the weights of each model only once within the `with` block.

    The weights must not change in the block. Every result checks its model, which takes about 0.6 s
    for 135 million parameters. It also works as a decorator, and an inner block shares the hashes
    of the outer one.
    """
    if _HASHES.get() is not None:
        yield
        return
    with undoing(lambda: _HASHES.set(None)):
        _HASHES.set({})
        yield


def weight_hash(view: ModelView) -> str:
    """Compute the sha256 over the weights in TransformerLens layout, in a fixed order.

    The same weights in a `HookedTransformer` and in a `TransformerBridge` have the same hash.
    Weights that TransformerLens has folded or centred have another one. Weights without a name in
    TransformerLens and peft's active adapters count, biases of zero do not. The configuration is
    not in the hash, see `models.configuration`.

    Args:
        view: the model.

    Returns:
        The hash in hexadecimal.
    """
    known = _HASHES.get()
    if known is None:
        return _hashed(view)
    if view.tl not in known:
        known[view.tl] = _hashed(view)
    return known[view.tl]


def _hashed(view: ModelView) -> str:
    digest = hashlib.sha256()
    _add_all(digest, end_weights(view))
    for layer, block in enumerate(view.blocks):
        with resident(block):
            _add_all(digest, block_weights(view, layer))
    for name, parameter in sorted(other_parameters(view).items()):
        _add(digest, name, parameter)
    for adapted, added in adapter_layers(view).items():
        for name, parameter in added.items():
            _add(digest, f"{adapted}.{name}", parameter)
    return digest.hexdigest()


def _add_all(digest: Any, weights: Mapping[str, torch.Tensor]) -> None:
    for name, value in weights.items():
        if not is_bias(name) or bool(value.any()):
            _add(digest, name.removeprefix("blocks."), value)


def _add(digest: Any, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
    flat = tensor.detach().cpu().contiguous().flatten()
    digest.update(flat.view(torch.uint8).numpy().data)


def model_key(view: ModelView) -> str:
    """Return the model in the key of a kept result: its weights and its configuration.

    Args:
        view: the model.

    Returns:
        The weight hash and a hash of the configuration.
    """
    return _model_key(weight_hash(view), configuration(view))


def _model_key(model_hash: str, values: Mapping[str, Any]) -> str:
    return f"{model_hash}.{digest_of(values)}"
