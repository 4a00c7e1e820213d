"""Load a Hugging Face model and its tokenizer from a hub name, a folder or a GGUF file.

Missing, damaged or randomly initialised weights raise an error. The loaded weights are plain
floats.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging as hf_logging

from cdt_lens.core.errors import InputError
from cdt_lens.core.process_wide import GENERATOR, ignored, process_wide


def load_hugging_face(source: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a Hugging Face model, without quantisation, and its tokenizer.

    Args:
        source: a hub name, a folder or a `.gguf` file.
        dtype: floating point type of the weights.

    Returns:
        The model and the tokenizer.

    Raises:
        InputError: there is no such folder or file, it is damaged or incomplete, or the hub cannot
            be reached.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        return _from_gguf(path, dtype)
    is_local = path.exists() or path.is_absolute() or str(source).startswith(".")
    if is_local and not (path / "config.json").is_file():
        raise InputError(
            f"{source}: expected a Hugging Face folder with a config.json, or a .gguf file"
        )
    try:
        # Eager attention: the bridge reads and edits its pattern.
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the errors of transformers and safetensors have no common class
        reason = (
            "the folder is damaged or incomplete"
            if is_local
            else (
                "there is no such folder here, and the hub did not provide it; check the name and "
                "the network, or pass a local folder"
            )
        )
        raise InputError(f"{source}: cannot be loaded: {reason} ({first_line(error)})") from error
    missing = [*loading_info["missing_keys"], *(key[0] for key in loading_info["mismatched_keys"])]
    if missing:
        raise InputError(
            f"{source}: {len(missing)} weights are missing or of another shape; the first is "
            f"{missing[0]}. They would be random. Save the model again."
        )
    return model, tokenizer


def _from_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=dtype
        )
    except Exception as error:  # the gguf reader's errors have no common class
        raise InputError(
            f"{path}: cannot be read as GGUF ({first_line(error)}). It may be cut short. Fetch it "
            "again."
        ) from error
    # transformers marks the model as quantised and then refuses to save or wrap it. Its weights
    # are plain floats by now, so they are copied into a fresh model of the same class.
    config = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    clean_config = type(loaded.config)(**config)
    clean_config._attn_implementation = "eager"
    clean_config.architectures = [type(loaded).__name__]
    for key in ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"):
        # GGUF stores eps as float32, 9.9999997e-06 where the model was trained with 1e-05.
        value = getattr(clean_config, key, None)
        if isinstance(value, float):
            setattr(clean_config, key, float(f"{value:.6g}"))
    clean = type(loaded)(clean_config).to(dtype)
    clean.load_state_dict(loaded.state_dict())
    clean.tie_weights()
    clean.generation_config = loaded.generation_config
    return clean.eval(), tokenizer


def first_line(error: Exception) -> str:
    """Return the class of an error and the first line of its message.

    Args:
        error: the error.

    Returns:
        Text such as "OSError: no such file".
    """
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def third_party_noise_off() -> process_wide:
    """Hide progress bars and warnings of the loading libraries within the `with` block.

    The block leaves torch's generator as it was: a model that is created before its weights are
    read draws random ones.

    Returns:
        The context.
    """
    root = logging.getLogger()

    def hush() -> None:
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        root.setLevel(logging.ERROR)
        ignored().__enter__()  # until the scope of the block closes

    return process_wide(
        (hf_logging.get_verbosity, hf_logging.set_verbosity),
        (hf_logging.is_progress_bar_enabled, _show_bars),
        (lambda: root.level, root.setLevel),
        GENERATOR,
        change=hush,
    )


def _show_bars(shown: bool) -> None:
    (hf_logging.enable_progress_bar if shown else hf_logging.disable_progress_bar)()
