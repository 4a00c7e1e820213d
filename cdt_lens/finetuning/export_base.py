"""What an exported checkpoint takes over from its base: floating point type, shards and licence.

1. The type is the one that the base's files store, or that of the training if that one is shorter.
   A base in bfloat16 is usually read as float32, and its export is then as small as the base.
2. Rounding to a shorter type may undo what was trained, because a small change of a weight can be
   less than half the distance of two numbers of that type. So the rounded model is run in the type
   of the training. Its error is compared with what the training changed, on the logits.
3. Shards are as large as the base's. LICENSE, NOTICE and similar files are copied, and the base's
   README.md as README.base.md.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

_LARGEST_LOSS = 0.1  # of the change of the logits by the training
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
BASE_README = "README.base.md"
_INDEX = "model.safetensors.index.json"
# Names of the files that a licence may ask to hand on, in any case and with any ending.
LEGAL = ("license", "licence", "notice", "copying", "use_policy")


def base_folder(base: str | Path) -> Path | None:
    """Return the folder that holds the files of a base model.

    Args:
        base: a folder, a hub name or a `.gguf` file.

    Returns:
        The folder, or that of the hub's cache. None for a `.gguf` file.
    """
    path = Path(base)
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        return None
    try:
        found = try_to_load_from_cache(str(base), "config.json")
    except HFValidationError:  # a path of no folder; loading it says so
        return None
    return Path(found).parent if isinstance(found, str) else None


def stored_type(folder: Path | None) -> torch.dtype | None:
    """Return the floating point type in which most weights of a base are stored.

    Args:
        folder: the folder of the base, see `base_folder`.

    Returns:
        The type, or None where there are no safetensors files.
    """
    counts: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        try:
            with safe_open(path, "pt") as file:
                counts.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
        except SafetensorError:
            continue
    known = [kind for kind, _ in counts.most_common() if kind in _TYPES]
    return _TYPES[known[0]] if known else None


def shorter(stored: torch.dtype | None, trained: torch.dtype) -> torch.dtype:
    """Return the type to export.

    Args:
        stored: type of the base's files, or None.
        trained: type of the training.

    Returns:
        `stored` where it has fewer bits than `trained`, otherwise `trained`.
    """
    return trained if stored is None or stored.itemsize >= trained.itemsize else stored


def round_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to a shorter type, and keep the type that it has.

    Args:
        model: a Hugging Face model. Its buffers, such as rotary frequencies, stay as they are.
        dtype: the shorter type.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))


def is_lost(rounded: Tensor, trained: Tensor, before: Tensor) -> bool:
    """Return whether rounding undoes a part of the training that counts.

    Args:
        rounded: logits of the rounded model.
        trained: logits of the trained model, for the same tokens.
        before: logits of the base model.

    Returns:
        True if the error of rounding is more than a tenth of what the training changed.
    """
    # The logits of the base and of the rounded model come from two implementations.
    noise = (1e-5 if trained.dtype.itemsize >= 4 else 2e-2) * trained.norm()
    error, change = (rounded.to(trained) - trained).norm(), (trained - before.to(trained)).norm()
    if not change:
        return False
    return not bool(error <= _LARGEST_LOSS * change + noise)  # nor where it is not finite


def shard_size(folder: Path | None, ratio: float) -> dict[str, Any]:
    """Return the option of `save_pretrained` that makes shards as those of the base.

    Args:
        folder: the folder of the base.
        ratio: size of a number in the export, in sizes of a number in the base.

    Returns:
        `max_shard_size` in bytes. Empty where the base has no shards.
    """
    if folder is None or not (folder / _INDEX).is_file():
        return {}
    names = set(json.loads((folder / _INDEX).read_text())["weight_map"].values())
    sizes = [(folder / name).stat().st_size for name in names if (folder / name).is_file()]
    return {"max_shard_size": int(max(sizes) * ratio)} if sizes else {}


def copy_papers(folder: Path | None, to: Path) -> None:
    """Copy the licence files and the README of a base.

    Args:
        folder: the folder of the base.
        to: the new folder, which has a README.md of its own.
    """
    for path in sorted(folder.iterdir()) if folder is not None else ():
        if path.is_file() and path.name.lower().startswith(LEGAL):
            shutil.copyfile(path, to / path.name)
        elif path.is_file() and path.name == "README.md":
            shutil.copyfile(path, to / BASE_README)
