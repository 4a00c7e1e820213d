"""Store trained elements in an `Adapter`, a small file that can be applied to a model and removed.

1. An adapter holds the trained slices and whole weights (norms) by TransformerLens name, with the
   hash of the base model's weights. Names and shapes are the same for both model classes.
2. `apply` writes exactly these elements and keeps the values that it replaces. `remove` restores
   them bit for bit. A model with other weights raises an error that shows both hashes.
3. `export` writes a plain Hugging Face folder: the base checkpoint with these elements replaced,
   fused projections included, and every other weight bit-identical (docs/method/training.md).
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from cdt_lens.core import display
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.errors import InputError
from cdt_lens.core.saved import Saved
from cdt_lens.core.undo import take_back_if_failed, unbroken
from cdt_lens.finetuning.score import Score
from cdt_lens.finetuning.slices import CHANNEL_ROLES, WeightSlice, by_channel
from cdt_lens.finetuning.trainable import Slices
from cdt_lens.models.heads import Head
from cdt_lens.models.provenance import Provenance
from cdt_lens.models.session import ModelHeld, uses_model
from cdt_lens.models.view import ModelView, view_of
from cdt_lens.models.weights import check_fused, check_gradients, named_weights, sync_fused
from cdt_lens.tasks.card import TaskCard

ADAPTER_FILE = "adapter.json"
_SLICE = re.compile(r"blocks\.\d+\.(attn\.[Wb]_[QKVO]|mlp\.(W_in|W_gate|b_in|W_out))")


@dataclass(frozen=True, eq=False)
class Adapter(Saved):
    """The trained elements of a model.

    Attributes:
        scope: the scope of the training, such as "decision".
        heads: the selected query heads.
        slices: by weight name, the trained heads (key/value heads for W_K, W_V, b_K and b_V) and
            their values `[head, ...]`.
        whole: the weights that were trained whole, by name.
        provenance: origin of the adapter, with the base model's hash.
        task: how the prompts of the training were made of text. None for prompts that were made by
            hand, and in files of cdt_lens 0.3.
        scores: accuracies before and after the training, of the target and the source language.
            Empty where nothing was evaluated.
        total_parameters: number of parameters of the model, or None where it was not recorded.
    """

    scope: str
    heads: tuple[Head, ...]
    slices: Slices = field(repr=False)
    whole: Mapping[str, Tensor] = field(repr=False)
    provenance: Provenance = field(repr=False)
    task: TaskCard | None = field(default=None, repr=False)
    scores: tuple[Score, ...] = field(default=(), repr=False)
    total_parameters: int | None = field(default=None, repr=False)
    _format, _kind = "cdt_lens.adapter", "adapter"
    _advice = "finetune(...).adapter is one"

    def __repr__(self) -> str:
        sizes = f"{self.elements:,} elements of {len(self.slices) + len(self.whole)} weights"
        return display.line(self, self.scope, display.few(self.heads), sizes)

    @property
    def elements(self) -> int:
        """The number of trained elements."""
        return sum(v.numel() for _, v in self.slices.values()) + sum(
            v.numel() for v in self.whole.values()
        )

    @property
    def parameters(self) -> int:
        """The number of trained parameters: an embedding that is the unembedding counts once."""
        one, other = (self.whole.get(name) for name in ("embed.W_E", "unembed.W_U"))
        tied = one is not None and other is not None and torch.equal(one, other.T)
        return self.elements - (other.numel() if tied and other is not None else 0)

    @property
    def dtype(self) -> torch.dtype:
        """The floating point type of the trained model."""
        values = [*(v for _, v in self.slices.values()), *self.whole.values()]
        return values[0].dtype if values else torch.float32

    def to_dataframe(self) -> pd.DataFrame:
        """Return one row for each weight: name, trained heads (None if whole) and elements."""
        rows: list[dict[str, Any]] = [
            {"weight": name, "heads": list(index), "elements": values.numel()}
            for name, (index, values) in self.slices.items()
        ]
        rows += [
            {"weight": name, "heads": None, "elements": values.numel()}
            for name, values in self.whole.items()
        ]
        return pd.DataFrame(rows, columns=["weight", "heads", "elements"])

    def _repr_html_(self) -> str:
        title = f"Adapter, scope {self.scope}: {self.elements:,} trained elements"
        return display.html(title, self.to_dataframe())

    # ------------------------------------------------------------------ on and off

    @checked_arguments
    @uses_model
    def apply(self, model: nn.Module | ModelView, *, check: bool = True) -> Applied:
        """Write the trained elements into a model.

        Args:
            model: a model that holds the base weights.
            check: whether to compare the hash of its weights with the base model's.

        Returns:
            A handle whose `remove` restores the model.

        Raises:
            ArtifactError: the model has other weights. The message shows both hashes.
            InputError: the model lacks a weight, has one of another shape, or was created under
                `torch.inference_mode`. Nothing is written.
            UnsupportedModelError: a fused projection has an order that cannot be written back.
        """
        view = view_of(model)
        if check:
            self.provenance.check_model(view, "this adapter")
        check_gradients(view)
        check_fused(view)
        parts, whole = self._places(view)
        before = {name: part.read() for name, part in parts.items()}
        before_whole = {name: value.clone() for name, value in whole.items()}
        applied = Applied(view, self, before, before_whole)
        take_back_if_failed(applied._write_back)
        with torch.no_grad():
            for name, part in parts.items():
                part.write(self.slices[name][1].to(part.whole.device))
            for name, value in whole.items():
                value.copy_(self.whole[name])
        sync_fused(view)
        _APPLIED.setdefault(view.tl, []).append(applied.mark)
        return applied

    @checked_arguments
    def applied(
        self, model: nn.Module | ModelView, *, check: bool = True
    ) -> AbstractContextManager[None]:
        """Apply the adapter within the `with` block, and restore the model afterwards.

        Within the block other threads do not use the model: their calls raise an error.

        Args:
            model: a model that holds the base weights.
            check: whether to compare the hash of its weights with the base model's.

        Returns:
            The context. Entering it raises the errors below.

        Raises:
            ArtifactError: the model has other weights.
            InputError: the model lacks a weight, or has one of another shape.
            UnsupportedModelError: a fused projection has an order that cannot be written back.
        """
        return ModelHeld(model, lambda: self.apply(model, check=check).remove)

    @checked_arguments
    @uses_model
    def changes(self, model: nn.Module | ModelView) -> bool:
        """Return whether any trained element has another value than the model's.

        Args:
            model: a model that holds the base weights.

        Returns:
            False for an adapter of a training that learnt nothing.

        Raises:
            InputError: the model lacks a weight, or has one of another shape.
        """
        parts, whole = self._places(view_of(model))
        trained = {name: values for name, (_, values) in self.slices.items()} | dict(self.whole)
        held = {name: part.read() for name, part in parts.items()} | whole
        return any(not torch.equal(held[name], trained[name].to(held[name])) for name in trained)

    def _places(self, view: ModelView) -> tuple[dict[str, WeightSlice], dict[str, Tensor]]:
        weights = named_weights(view)

        def weight(name: str, shape: Sequence[int], role: str | None = None) -> Tensor:
            value = weights.get(name)
            # The axis of the heads or channels of a slice may be longer in the model.
            own = None if role is None else -1 if role in ("W_in", "W_gate") else 0
            if value is None or _but(value.shape, own) != _but(shape, own):
                has = "no such weight" if value is None else f"shape {tuple(value.shape)}"
                raise InputError(
                    f"adapter: {name} of shape {tuple(shape)} does not fit {view.name}: {has}. "
                    "Use the base model that it was trained on."
                )
            return value

        parts = {}
        for name, (index, values) in self.slices.items():
            _, layer, _, role = name.split(".")
            whole = by_channel(role, weight(name, by_channel(role, values).shape, role))
            if max(index) >= whole.shape[0]:
                kind = "channel" if role in CHANNEL_ROLES else "head"
                raise InputError(
                    f"adapter: {name}: {kind} {max(index)} is outside {view.name}. Use the base "
                    "model that it was trained on."
                )
            parts[name] = WeightSlice(int(layer), role, index, whole)
        return parts, {n: weight(n, v.shape) for n, v in self.whole.items()}

    # ------------------------------------------------------------------ on disk

    def _to_file(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        body = {
            "scope": self.scope,
            "heads": [str(head) for head in self.heads],
            "slices": {name: list(index) for name, (index, _) in self.slices.items()},
            "provenance": self.provenance.to_dict(),
            **({} if self.task is None else {"task": self.task.to_dict()}),
            **({"scores": [asdict(score) for score in self.scores]} if self.scores else {}),
            **({"total_parameters": self.total_parameters} if self.total_parameters else {}),
        }
        tensors = {f"slice/{name}": value for name, (_, value) in self.slices.items()}
        return body, tensors | {f"whole/{name}": value for name, value in self.whole.items()}

    @classmethod
    def _from_file(cls, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
        for name, index in body["slices"].items():
            if len(index) != len(tensors[f"slice/{name}"]) or min(index, default=0) < 0:
                raise ValueError(f"slices: {name}: expected one head for each of its values")
            if _SLICE.fullmatch(name) is None:
                raise ValueError(f"slices: {name!r}: expected such as blocks.0.attn.W_Q")
        return cls(
            scope=body["scope"],
            heads=tuple(Head.parse(text) for text in body["heads"]),
            slices={
                name: (tuple(index), tensors[f"slice/{name}"])
                for name, index in body["slices"].items()
            },
            whole={
                name.removeprefix("whole/"): value
                for name, value in tensors.items()
                if name.startswith("whole/")
            },
            provenance=Provenance.from_dict(body["provenance"]),
            task=TaskCard.from_dict(body["task"]) if "task" in body else None,
            scores=tuple(Score.from_dict(score) for score in body.get("scores", ())),
            total_parameters=body.get("total_parameters"),
        )

    @classmethod
    def _path(cls, path: str | Path) -> Path:
        return Path(path) if Path(path).suffix == ".json" else Path(path) / ADAPTER_FILE


def _but(shape: Sequence[int], axis: int | None) -> list[int]:
    """Return a shape without one of its axes."""
    return [n for i, n in enumerate(shape) if axis is None or i != axis % len(shape)]


@dataclass(eq=False)
class _Mark:
    """Whether an adapter was removed; it does not keep its model alive, as a handle does."""

    removed: bool = False


# The adapters on each model, in the order in which they were applied; also those whose handle is
# gone, because their values are still on the model.
_APPLIED: weakref.WeakKeyDictionary[nn.Module, list[_Mark]]
_APPLIED = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class Applied:
    """An adapter on a model, with the values that it replaced.

    Attributes:
        view: the model.
        adapter: the adapter.
        before: values of its slices before.
        before_whole: values of its whole weights before.
        mark: whether it was removed, for the list of all adapters on the model.
    """

    view: ModelView
    adapter: Adapter = field(repr=False)
    before: Mapping[str, Tensor] = field(repr=False)
    before_whole: Mapping[str, Tensor] = field(repr=False)
    mark: _Mark = field(default_factory=_Mark, repr=False)

    @property
    def removed(self) -> bool:
        """Whether `remove` was called."""
        return self.mark.removed

    def remove(self) -> None:
        """Restore the base model's elements bit for bit. A second call changes nothing.

        If the model was moved or cast in between, they are moved and cast as well.

        Raises:
            InputError: another adapter was applied later and is still on the model. Its values
                before are this one's, and it would bring them back.
        """
        if not self.removed:
            _remove(self.view, self)

    def _write_back(self) -> None:
        # Looked up again: `model.to(...)` gives the weights other memory.
        parts, whole = self.adapter._places(self.view)
        with torch.no_grad():
            for name, part in parts.items():
                part.write(self.before[name].to(part.whole.device))
            for name, value in whole.items():
                value.copy_(self.before_whole[name])
        sync_fused(self.view)


@uses_model
@unbroken
def _remove(model: ModelView, applied: Applied) -> None:
    live = [mark for mark in _APPLIED.get(model.tl, []) if not mark.removed]
    if live and live[-1] is not applied.mark:
        raise InputError(
            f"{model.name}: an adapter that was applied later is still on the model; remove the "
            "last one first"
        )
    applied._write_back()
    applied.mark.removed = True
    _APPLIED[model.tl] = live[:-1]
