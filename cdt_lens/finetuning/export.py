"""Write the base model with an adapter as a plain Hugging Face checkpoint folder.

1. Load the base checkpoint with transformers. Its state dict shares memory with the model that
   TransformerBridge then wraps.
2. Apply the adapter to the bridge. This writes the trained elements into the checkpoint's own
   tensors, fused projections included.
3. Load the state dict into a fresh model of the same class and save it in the base's floating
   point type (`export_base`), with the tokenizer and the task (`export_task`). Read the saved
   folder back and compare its logits with those of the trained model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdt_lens.core.artifacts import new_folder
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.errors import InputError
from cdt_lens.core.folders import check_writable
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.export_base import (
    base_folder,
    copy_papers,
    is_lost,
    round_parameters,
    shard_size,
    shorter,
    stored_type,
)
from cdt_lens.finetuning.export_task import write_task
from cdt_lens.models.hugging_face import (
    blank_model,
    load_hugging_face,
    third_party_noise_off,
)
from cdt_lens.models.loading import bridge_of, checked_dtype
from cdt_lens.models.view import ModelView


@checked_arguments
def export(
    adapter: Adapter, base: str | Path, folder: str | Path, *,
    dtype: torch.dtype | str | None = None, allow_unchanged: bool = False,
) -> Path:  # fmt: skip
    """Write the base model with an adapter in it to a folder that transformers can load.

    Every element that was not trained is bit-identical to the base model's, in the floating point
    type of the export. The tokenizer of the folder gives the tokens of the training for the text
    of a prompt, and `cdt_task.json` and `README.md` say how to ask the model. The folder is written
    whole or not at all.

    Args:
        adapter: the adapter.
        base: hub name, Hugging Face folder or `.gguf` file of the model that the adapter was
            trained on.
        folder: a new or empty folder.
        dtype: floating point type of the export, such as "float32". None takes the type of the
            base's files, or that of the training if it is shorter, or if rounding to the type of
            the base's files would change the logits by more than a tenth of what the training did.
        allow_unchanged: whether to export an adapter that changes no weight, of a training that
            learnt nothing.

    Returns:
        The folder.

    Raises:
        ArtifactError: `base` has other weights. The message shows both hashes.
        InputError: the base cannot be loaded or holds a LoRA adapter of its own, the adapter
            changes nothing, `folder` is not empty or cannot be written, the exported checkpoint
            gives other logits or tokens, or rounding to `dtype` would undo the training.
        UnsupportedModelError: the bridge cannot represent the base model.
    """
    folder = new_export_folder(folder)
    asked = None if dtype is None else checked_dtype(dtype)
    files = base_folder(base)
    with third_party_noise_off():
        hf_model, tokenizer = base_of(base, adapter.dtype)
        config = copy.deepcopy(hf_model.config)
        generation = copy.deepcopy(hf_model.generation_config)
        kind = type(hf_model)
        # These tensors share the model's memory, so they receive what the adapter writes.
        state = hf_model.state_dict()
        view = ModelView(bridge_of(hf_model, tokenizer, dtype=adapter.dtype))
        view.tl.cfg.model_name = str(base)
        adapter.provenance.check_model(view, "this adapter")
        if not (allow_unchanged or adapter.changes(view)):
            raise InputError(
                "this adapter changes no weight: its training learnt nothing. Train again with "
                "another learning rate or more epochs, or export it with allow_unchanged=True "
                "(--allow-unchanged)."
            )
        tokens, stored = random_tokens(view), stored_type(files)
        before = view.logits(tokens)
        with adapter.applied(view, check=False):
            logits = view.logits(tokens)
            fresh = fresh_model(kind, config, state)
            written = asked or shorter(stored, adapter.dtype)
            if written != adapter.dtype:
                rounded = _rounded(fresh, written, tokens)
                if not is_lost(rounded, logits, before):
                    logits = rounded
                elif asked is not None:
                    _refuse_rounding(asked, adapter.dtype)
                else:
                    fresh, written = fresh_model(kind, config, state), adapter.dtype
        fresh.generation_config = generation
        with new_folder(folder) as temporary:
            sizes = shard_size(files, written.itemsize / (stored or written).itemsize)
            fresh.to(written).save_pretrained(temporary, **sizes)
            write_task(adapter, tokenizer, str(base), temporary)
            copy_papers(files, temporary)
            _check(temporary, logits, tokens, adapter.dtype)
    return folder


def _rounded(model: Any, dtype: torch.dtype, tokens: Tensor) -> Tensor:
    """Round the parameters to a type, and return the logits in the type of the training."""
    round_parameters(model, dtype)
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
    return logits


def _refuse_rounding(asked: torch.dtype, trained: torch.dtype) -> None:
    names = [str(kind).removeprefix("torch.") for kind in (asked, trained)]
    raise InputError(
        f"dtype={names[0]}: rounding to it would change the logits by more than a tenth of what "
        f"the training changed. Export in {names[1]}, the type of the training."
    )


def new_export_folder(folder: str | Path) -> Path:
    """Return the path of a folder to export to.

    Args:
        folder: a new or empty folder.

    Raises:
        InputError: it is not empty, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not empty. Name a new folder.")
    check_writable(folder)
    return folder


def base_of(base: str | Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load the base model of an adapter, and its tokenizer.

    Args:
        base: hub name, Hugging Face folder or `.gguf` file.
        dtype: floating point type of the weights.

    Raises:
        InputError: the base cannot be loaded, or its folder holds a LoRA adapter, which
            transformers attaches by itself.
    """
    hf_model, tokenizer = load_hugging_face(base, dtype=dtype)
    if getattr(hf_model, "_hf_peft_config_loaded", False):
        raise InputError(
            f"{base}: holds a LoRA adapter (adapter_config.json) beside its weights. Merge it with "
            "merge_and_unload of peft and save the model again, or remove its files."
        )
    return hf_model, tokenizer


def fresh_model(kind: Any, config: Any, state: Mapping[str, Tensor]) -> Any:
    """Return a Hugging Face model with a copy of these weights.

    Args:
        kind: class of the model.
        config: its configuration.
        state: its state dict.
    """
    # `third_party_noise_off` puts the global generator back, from which `kind` draws weights.
    model = blank_model(kind, config, next(iter(state.values())).dtype)
    model.load_state_dict(state)
    model.tie_weights()
    return model.eval()


def random_tokens(view: ModelView) -> Tensor:
    """Return two random prompts, by which logits are compared.

    Args:
        view: the model.
    """
    length = min(16, view.n_ctx)
    size = view.tl.unembed.W_U.shape[-1]
    return torch.randint(size, (2, length), generator=torch.Generator().manual_seed(0))


def _check(folder: Path, logits: Tensor, tokens: Tensor, dtype: torch.dtype) -> None:
    """Compare the logits of the saved checkpoint with those of the trained model."""
    again, _ = load_hugging_face(folder, dtype=dtype)
    with torch.no_grad():
        actual = again(tokens).logits
    tolerance = 1e-3 if dtype.itemsize >= 4 else 5e-2
    # A number that is not finite compares as False.
    if not bool((actual - logits.to(actual)).norm() <= tolerance * logits.norm()):
        raise InputError(
            "The exported checkpoint does not give the trained model's logits. "
            "Nothing was written. Please report the model's family."
        )
