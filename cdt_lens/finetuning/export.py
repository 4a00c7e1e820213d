"""An adapter written into a plain Hugging Face checkpoint folder.

1. The base checkpoint is loaded by transformers; its state dict shares memory with what
   TransformerBridge then wraps.
2. The adapter is applied to the bridge: that writes the trained elements into the checkpoint's own
   tensors, fused projections included.
3. A fresh model of the same class takes the state dict and is saved, with the tokenizer. The saved
   folder is read back and must give the logits of the model that was trained.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdt_lens.core.artifacts import new_folder
from cdt_lens.core.errors import InputError
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.models.hugging_face import load_hugging_face, third_party_noise_off
from cdt_lens.models.loading import bridge_of
from cdt_lens.models.view import ModelView


def export(adapter: Adapter, base: str | Path, folder: str | Path) -> Path:
    """Write the base model with `adapter` in it to `folder`, for transformers alone.

    base: hub name, Hugging Face folder or .gguf file of the model that the adapter was trained on.
    Every element that was not trained is bit-identical to the base's, in the type of the training.

    Raises:
        ArtifactError: `base` is another model (both hashes are shown).
        InputError: the base cannot be loaded, `folder` exists and is not empty, or the disk is
            full; a folder is written whole or not at all.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not empty; name a new folder")
    with third_party_noise_off():
        hf_model, tokenizer = load_hugging_face(base, dtype=adapter.dtype)
        config = copy.deepcopy(hf_model.config)
        generation = copy.deepcopy(hf_model.generation_config)
        kind = type(hf_model)
        # These tensors are the model's own memory: what is written below is seen in them.
        state = hf_model.state_dict()
        view = ModelView(bridge_of(hf_model, tokenizer, dtype=adapter.dtype))
        view.tl.cfg.model_name = str(base)
        with adapter.applied(view):
            logits = view.logits(_tokens(view))
            fresh = _fresh(kind, config, state)
        fresh.generation_config = generation
        return _save(fresh, tokenizer, folder, logits, _tokens(view))


def _fresh(kind: Any, config: Any, state: dict[str, Tensor]) -> Any:
    # Drawing random weights only to overwrite them would also move the global generator.
    with torch.random.fork_rng():
        model = kind(config)
    model = model.to(next(iter(state.values())).dtype)
    model.load_state_dict(state)
    model.tie_weights()
    return model.eval()


def _tokens(view: ModelView) -> Tensor:
    length = min(16, view.n_ctx)
    size = view.tl.unembed.W_U.shape[-1]
    return torch.randint(size, (2, length), generator=torch.Generator().manual_seed(0))


def _save(model: Any, tokenizer: Any, folder: Path, logits: Tensor, tokens: Tensor) -> Path:
    with new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        again, _ = load_hugging_face(temporary, dtype=model.dtype)
        with torch.no_grad():
            found = again(tokens).logits
        tolerance = 1e-3 if model.dtype.itemsize >= 4 else 5e-2
        if bool((found - logits.to(found)).norm() > tolerance * logits.norm()):
            raise InputError(
                f"{folder}: the exported checkpoint does not give the trained model's logits; "
                "nothing was written. Please report the model's family"
            )
    return folder
