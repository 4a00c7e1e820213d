"""Write an adapter as an exact LoRA of the peft library, and read it back.

A change of head slices has a low rank by construction, so a LoRA holds it without loss:

1. A changed matrix differs in a few rows (q, k, v, gate and up projections) or columns (output and
   down projections). One factor selects them and holds zeros and ones, the other holds the change.
   The rank is the number of changed rows or columns. Fused projections are one matrix. Where all
   heads share one key and one value projection, as in Gemma 3 270M, a trained head changes these
   as a whole; the LoRA holds them exactly and is larger than they are.
2. What the scope `lora` has learnt is of low rank as well; its factors come from a singular value
   decomposition, up to rounding.
3. Norms are no LoRA. `extras=True` stores them as peft's `modules_to_save`, which peft loads and
   most servers do not. Biases are refused: peft does not store those of a LoRA's layers.
4. The folder is read back by peft, and its logits are compared with those of the trained model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cdt_lens.core.artifacts import new_folder
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.core.process_wide import ignored
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.export import base_of, fresh_model, new_export_folder, random_tokens
from cdt_lens.finetuning.export_task import write_task
from cdt_lens.finetuning.slices import by_channel
from cdt_lens.models.hugging_face import first_line, load_hugging_face, third_party_noise_off
from cdt_lens.models.loading import bridge_of
from cdt_lens.models.view import ModelView, at_least_float32
from cdt_lens.models.weights import named_weights

# What peft asks of transformers is deprecated there.
_ADVICE = "is_gradient_checkpointing"
_ROUNDING = 1e-4
# The adapter without its values: heads, slices, origin and task, which a LoRA does not hold.
_FILE = "cdt_adapter.json"


@dataclass(frozen=True, eq=False)
class _Change:
    """The low-rank change of one linear map: B @ A."""

    a: Float[Tensor, "rank in"] = field(repr=False)
    b: Float[Tensor, "out rank"] = field(repr=False)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def padded(self, rank: int) -> _Change:
        more = rank - self.rank
        pad = nn.functional.pad
        return _Change(pad(self.a, (0, 0, 0, more)), pad(self.b, (0, more)))


@checked_arguments
def to_peft(
    adapter: Adapter, base: str | Path, folder: str | Path, *, rank: Count | None = None,
    extras: bool = False,
) -> Path:  # fmt: skip
    """Write an adapter as a LoRA that peft and the servers that read its files can load.

    Args:
        adapter: The adapter.
        base: Hub name, Hugging Face folder or `.gguf` file of the model that it was trained on.
        folder: A new or empty folder.
        rank: Rank of every module, filled up with zeros, for servers that want one rank. None
            gives each module the rank that its change needs.
        extras: Whether trained norms are stored as peft's `modules_to_save`. Without it they are
            refused.

    Returns:
        The folder.

    Raises:
        ArtifactError: `base` has other weights. The message shows both hashes.
        InputError: The adapter holds what a LoRA cannot hold exactly (the message names the option
            of the training that avoids it), it changes nothing, or the folder is not empty.
    """
    folder = new_export_folder(folder)
    with third_party_noise_off(), ignored(_ADVICE):
        hf_model, tokenizer = base_of(base, adapter.dtype)
        parameters = dict(hf_model.named_parameters())
        before = {name: value.detach().clone() for name, value in parameters.items()}
        kind, config = type(hf_model), copy.deepcopy(hf_model.config)
        fresh = fresh_model(kind, config, hf_model.state_dict())
        view = ModelView(bridge_of(hf_model, tokenizer, dtype=adapter.dtype))
        view.tl.cfg.model_name = str(base)
        adapter.provenance.check_model(view, "this adapter")
        with adapter.applied(view, check=False):
            logits, tokens = view.logits(random_tokens(view)), random_tokens(view)
            after = {name: value.detach().clone() for name, value in parameters.items()}
        changed = {n: after[n] for n in after if not torch.equal(after[n], before[n])}
        changes, saved = _split(fresh, before, changed, adapter, extras)
        model = _with_lora(fresh, _ranked(changes, rank), saved)
        with new_folder(folder) as temporary:
            if Path(base).exists():
                # A relative path would be a hub name wherever else the LoRA is read.
                model.peft_config["default"].base_model_name_or_path = str(Path(base).resolve())
            model.save_pretrained(str(temporary))
            write_task(adapter, tokenizer, str(base), temporary, lora=True)
            _emptied(adapter).save(temporary / _FILE)
            _check(base, temporary, logits, tokens, adapter.dtype)
    return folder


@checked_arguments
def from_peft(folder: str | Path, base: str | Path) -> Adapter:
    """Read back an adapter that `to_peft` wrote.

    Args:
        folder: The folder.
        base: The model that the adapter was trained on.

    Returns:
        The adapter. Its values are those of the base plus the change, which may differ from the
        trained ones by a rounding.

    Raises:
        InputError: The folder is not of `to_peft`, or the base cannot be loaded.
        ArtifactError: `base` has other weights, or a file is damaged.
    """
    from peft import PeftModel

    path = Path(folder) / _FILE
    if not path.exists():
        raise InputError(
            f"{folder}: holds no {_FILE}, which to_peft writes beside the LoRA; name such a folder"
        )
    empty = Adapter.load(path)
    with third_party_noise_off(), ignored(_ADVICE):
        hf_model, tokenizer = base_of(base, empty.dtype)
        kind, config = type(hf_model), copy.deepcopy(hf_model.config)
        plain = fresh_model(kind, config, hf_model.state_dict())
        empty.provenance.check_model(
            ModelView(bridge_of(plain, tokenizer, dtype=empty.dtype)), f"the adapter in {folder}"
        )
        try:
            merged = PeftModel.from_pretrained(hf_model, str(folder)).merge_and_unload()
        except Exception as error:  # the errors of peft and safetensors have no common class
            raise ArtifactError(
                f"{folder}: damaged: peft cannot read its LoRA ({first_line(error)})"
            ) from error
        weights = named_weights(ModelView(bridge_of(merged, tokenizer, dtype=empty.dtype)))
    return _filled(empty, weights, path)


def _emptied(adapter: Adapter) -> Adapter:
    slices = {name: (index, value[..., :0]) for name, (index, value) in adapter.slices.items()}
    return replace(adapter, slices=slices, whole={n: v[..., :0] for n, v in adapter.whole.items()})


def _filled(empty: Adapter, weights: Mapping[str, Tensor], path: Path) -> Adapter:
    """Return the adapter with the values that a model holds."""
    try:
        slices = {
            name: (index, by_channel(name.rpartition(".")[2], weights[name])[list(index)].cpu())
            for name, (index, _) in empty.slices.items()
        }
        whole = {name: weights[name].clone().cpu() for name in empty.whole}
    except (KeyError, IndexError) as error:
        raise ArtifactError(
            f"{path}: damaged: it names a weight or a head that the base does not have ({error})"
        ) from error
    return replace(empty, slices=slices, whole=whole)


def _split(
    model: nn.Module, before: Mapping[str, Tensor], changed: Mapping[str, Tensor],
    adapter: Adapter, extras: bool,
) -> tuple[dict[str, _Change], dict[str, Tensor]]:  # fmt: skip
    """Return the changes of linear maps by module, and the values of norms by parameter."""
    if not changed:
        raise InputError("this adapter changes no weight, so there is nothing to write as a LoRA")
    changes, saved = {}, {}
    for name, value in changed.items():
        module, _, part = name.rpartition(".")
        kind = model.get_submodule(module)
        if part == "weight" and isinstance(kind, nn.Linear | Conv1D) and not _tied(model, value):
            delta = at_least_float32(value) - at_least_float32(before[name])
            delta = delta.T if isinstance(kind, Conv1D) else delta
            low = adapter.scope == "lora"
            changes[module] = _singular(delta, value) if low else _selection(delta)
        elif part == "bias" and isinstance(kind, nn.Linear | Conv1D):
            raise InputError(
                f"the adapter changes {name}, and a LoRA has no biases. Train with biases=False, "
                "or write a checkpoint with export"
            )
        elif isinstance(kind, nn.Embedding | nn.Linear):
            raise InputError(
                f"the adapter changes {name} as a whole, as the scope {adapter.scope} does; a LoRA "
                "of it would not be smaller. Write a checkpoint with export"
            )
        elif not extras:
            raise InputError(
                f'the adapter changes {name}, and a LoRA has no norms. Train with norms="none", or '
                "pass extras=True (--extras): peft loads them as modules_to_save, most servers "
                "refuse them"
            )
        else:
            saved[name] = value
    return changes, saved


def _tied(model: Any, value: Tensor) -> bool:
    """Return whether a weight has the shape of the embedding, which the scope `full` changes."""
    return value.shape == model.get_input_embeddings().weight.shape


def _singular(delta: Float[Tensor, "out in"], merged: Tensor) -> _Change:
    """Return the factors of a change of low rank by its singular vectors.

    The rank of a fused projection is the sum of those of its parts.
    """
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    # The rest is the rounding of the merged weight. Its errors are even over half a step on each
    # side; their largest singular value is about sigma (sqrt(rows) + sqrt(columns)).
    sigma = torch.finfo(merged.dtype).eps * float(merged.double().square().mean().sqrt()) / 12**0.5
    noise = sigma * sum(size**0.5 for size in delta.shape)
    rank = max(1, int((values > max(_ROUNDING * float(values[0]), 1.5 * noise)).sum()))
    root = values[:rank].sqrt()
    return _Change((root[:, None] * right[:rank]).float(), (left[:, :rank] * root).float())


def _selection(delta: Float[Tensor, "out in"]) -> _Change:
    """Return the factors of a change of some rows or columns: these, and their selection."""
    rows, columns = (delta != 0).any(1).nonzero()[:, 0], (delta != 0).any(0).nonzero()[:, 0]
    if len(rows) <= len(columns):
        return _Change(delta[rows], torch.eye(len(delta))[:, rows])
    return _Change(torch.eye(delta.shape[1])[columns], delta[:, columns])


def _ranked(changes: Mapping[str, _Change], rank: int | None) -> dict[str, _Change]:
    most = max((change.rank for change in changes.values()), default=0)
    if rank is None:
        return dict(changes)
    if rank < most:
        name = next(n for n, change in changes.items() if change.rank == most)
        raise InputError(f"rank={rank}: the change of {name} has rank {most}; give at least that")
    return {name: change.padded(rank) for name, change in changes.items()}


def _with_lora(
    model: nn.Module, changes: Mapping[str, _Change], saved: Mapping[str, Tensor]
) -> Any:
    """Return the base with peft's layers that hold the changes."""
    from peft import LoraConfig, get_peft_model

    if not changes:
        raise InputError(
            "the adapter changes norms alone, and a LoRA has no norms; write a checkpoint with "
            "export"
        )
    ranks = {re.escape(name): change.rank for name, change in changes.items()}
    rank = max(ranks.values())
    norms = sorted({name.rpartition(".")[0] for name in saved})
    config = LoraConfig(
        r=rank, lora_alpha=rank, rank_pattern=ranks, alpha_pattern=dict(ranks), lora_dropout=0.0,
        target_modules=list(changes), modules_to_save=norms or None, bias="none",
        task_type="CAUSAL_LM", fan_in_fan_out=_any_transposed(model, changes),
    )  # fmt: skip
    with_layers: Any = get_peft_model(model, config)
    inner = with_layers.base_model.model
    with torch.no_grad():
        for name, change in changes.items():
            layer = inner.get_submodule(name)
            layer.lora_A["default"].weight.data = change.a.contiguous()
            layer.lora_B["default"].weight.data = change.b.contiguous()
        for name, value in saved.items():
            module, _, part = name.rpartition(".")
            wrapper = inner.get_submodule(module)
            getattr(wrapper.modules_to_save["default"], part).copy_(value)
    return with_layers


def _any_transposed(model: nn.Module, changes: Mapping[str, _Change]) -> bool:
    return any(isinstance(model.get_submodule(name), Conv1D) for name in changes)


def _check(
    base: str | Path, folder: Path, logits: Tensor, tokens: Tensor, dtype: torch.dtype
) -> None:
    """Compare the logits of the base with the saved LoRA with those of the trained model."""
    from peft import PeftModel

    model, _ = load_hugging_face(base, dtype=dtype)
    with torch.no_grad():
        actual = PeftModel.from_pretrained(model, str(folder)).eval()(tokens).logits
    tolerance = 1e-4 if dtype.itemsize >= 4 else 5e-2
    if not bool((actual - logits.to(actual)).norm() <= tolerance * logits.norm()):
        raise ArtifactError(
            "The LoRA does not give the trained model's logits in peft. Nothing was written. "
            "Please report the model's family."
        )
