"""Load a Hugging Face model and its tokenizer from a hub name, a folder or a GGUF file.

Weights that are missing, damaged, left over or randomly initialised raise an error, and code that a
folder brings along is never run. The loaded weights are plain floats.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging as hf_logging

from cdt_lens.core.errors import InputError, UnsupportedModelError
from cdt_lens.core.process_wide import GENERATOR, ignored, process_wide
from cdt_lens.models.gguf import check_gguf
from cdt_lens.models.packaged import how_to_fetch

_EPSILON = re.compile(r"(^|_)eps(ilon)?$")
# Buffers that old checkpoints hold and that transformers computes.
_COMPUTED = re.compile(r"(^|\.)(inv_freq|masked_bias|attn\.bias|attention\.bias)$")


def load_hugging_face(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device_map: str | Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Load a Hugging Face model, without quantisation, and its tokenizer.

    Args:
        source: a hub name, a folder or a `.gguf` file.
        dtype: floating point type of the weights.
        device_map: the device of each module, or how accelerate chooses them. Each weight is read
            to its device. None reads all to the CPU.

    Returns:
        The model and the tokenizer.

    Raises:
        InputError: there is no such folder or file, it is damaged or incomplete, it needs code of
            its own, its configuration names other weights than it holds, or the hub cannot be
            reached. Or `device_map` is not one of this model, or one of a GGUF file.
        UnsupportedModelError: its weights are quantised, some of its layers have no attention, or
            some do not fit the GPUs of `device_map`.
    """
    path = Path(source)
    if path.suffix == ".gguf":
        if device_map is not None:
            raise InputError(
                f"device_map: {source} is a GGUF file, whose weights are unpacked on the CPU. "
                "Convert it with cdt-lens convert, and load the folder."
            )
        return _from_gguf(path, dtype)
    is_local = _is_local(source)
    try:
        described = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # as below
        raise InputError(
            f"{source}: cannot be loaded: {_reason(error, source, is_local)}"
        ) from error
    _refuse_by_configuration(source, described)
    placed = {} if device_map is None else {"device_map": _plain_map(device_map)}
    try:
        # Eager attention: the bridge reads and edits its pattern. Without an answer about its code,
        # transformers asks for one on the terminal.
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation="eager", output_loading_info=True,
            trust_remote_code=False, **_in_float64(dtype), **placed,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the errors of transformers and safetensors have no common class
        if placed and "device" in str(error):
            raise InputError(f"device_map={device_map!r}: {first_line(error)}") from error
        raise InputError(
            f"{source}: cannot be loaded: {_reason(error, source, is_local)}"
        ) from error
    _check_complete(source, model, loading_info)
    _check_configuration(source, model.config.to_dict())
    _check_words(source, tokenizer)
    _state_bos(tokenizer)
    _check_placed(source, getattr(model, "hf_device_map", {}))
    return model, tokenizer


def _plain_map(device_map: str | Mapping[str, Any]) -> str | dict[str, Any]:
    return device_map if isinstance(device_map, str) else dict(device_map)


def _check_placed(source: str | Path, device_map: Mapping[str, Any]) -> None:
    """Refuse a model of which accelerate keeps a part on the CPU or on disk until it runs."""
    away = [name for name, device in device_map.items() if str(device) in ("cpu", "disk")]
    if away and len(set(map(str, device_map.values()))) > 1:
        raise UnsupportedModelError(
            f"{source}: device_map leaves {len(away)} of its {len(device_map)} parts on the CPU or "
            f"on disk (first: {away[0]}), because the GPUs are full or because it says so. Norms "
            "and the unembedding are read past the hooks that would load them. Use more GPUs or "
            "dtype='bfloat16', or offload the projections of a model on the CPU "
            "(cdt_lens.models.offload)."
        )


def is_multimodal(config: Any) -> bool:
    """Return whether a configuration is of a model that has more than its language model."""
    return config.get_text_config() is not config


def _refuse_by_configuration(source: str | Path, config: Any) -> None:
    """Refuse, before any weight is read, what no rule and no export can represent."""
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        values = quantised if isinstance(quantised, Mapping) else quantised.to_dict()
        raise UnsupportedModelError(
            f"{source}: its weights are quantised ({_quantisation(values)}). Heads are scored and "
            "trained on plain floating point weights. Load the unquantised model, with "
            "dtype='bfloat16' if memory is short."
        )
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    others = sorted(kind for kind in kinds if not kind.endswith("attention") or "linear" in kind)
    if others:
        raise UnsupportedModelError(
            f"{source}: {type(config).__name__} has layers of kind {', '.join(others)}, which have "
            "no attention heads with a pattern: no propagation rule exists for them"
        )


def _quantisation(values: Mapping[str, Any]) -> str:
    """Return the method and the number of bits, such as "bitsandbytes, 4 bits"."""
    method = values.get("quant_method") or "bitsandbytes"
    given = values.get("bits") or values.get("w_bit")
    bits = given or (4 if values.get("load_in_4bit") or values.get("_load_in_4bit") else None)
    bits = bits or (8 if values.get("load_in_8bit") or values.get("_load_in_8bit") else None)
    name = str(getattr(method, "value", method))
    return f"{name}, {bits} bits" if bits else name


def _in_float64(dtype: torch.dtype) -> dict[str, str]:
    """Return how to run experts in float64, which torch's grouped products do not have."""
    return {"experts_implementation": "eager"} if dtype == torch.float64 else {}


def _reason(error: Exception, source: str | Path, is_local: bool) -> str:
    """Return why a folder or a hub name cannot be loaded."""
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return (
            "the model or its tokenizer needs code of its own, which is never run here. Convert it "
            "to a family that transformers contains."
        )
    if is_local:
        return f"the file or folder is damaged or incomplete ({first_line(error)})"
    return (
        "there is no such folder here, and the hub did not provide it; check the name and the "
        f"network, or pass a local folder ({first_line(error)}){how_to_fetch(source)}"
    )


def _check_complete(source: str | Path, model: Any, info: Mapping[str, Any]) -> None:
    """Refuse weights that would be random, and weights of the model that nothing would read."""
    missing = [*sorted(info["missing_keys"]), *(key[0] for key in info["mismatched_keys"])]
    if missing:
        raise InputError(
            f"{source}: {len(missing)} weights are missing or of another shape; the first is "
            f"{missing[0]}. They would be random. Save the model again."
        )
    # Weights beside the language model, such as those of a value head, do not act on its logits.
    parts = {name for root in (model, model.base_model) for name, _ in root.named_children()}
    unread = [key for key in sorted(info["unexpected_keys"]) if key.split(".")[0] in parts]
    unread = [key for key in unread if not _COMPUTED.search(key)]
    if unread:
        raise InputError(
            f"{source}: {len(unread)} weights have no place in the model that its configuration "
            f"describes; the first is {unread[0]}. They would not be read. Use the configuration "
            "that belongs to the weights."
        )


def _check_configuration(source: str | Path, values: Mapping[Any, Any]) -> None:
    """Refuse numbers that no model can have: NaN anywhere, and a negative epsilon."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            _check_configuration(source, value)
        if not isinstance(value, float | int):
            continue
        if math.isnan(value) or (_EPSILON.search(str(name)) and not 0 <= value < math.inf):
            raise InputError(
                f"{source}: its configuration says {name}={value}; expected a finite number of at "
                "least 0"
            )


def load_tokenizer(source: str | Path) -> Any:
    """Load the tokenizer of a model without the model, to check data before a long load.

    Args:
        source: a hub name, a folder or a `.gguf` file.

    Returns:
        The tokenizer.

    Raises:
        InputError: there is no such folder or file, or it holds no tokenizer that can be read.
    """
    path = Path(source)
    packed = path.suffix == ".gguf"
    if packed and not path.is_file():
        raise InputError(f"{path}: no such file")
    is_local = packed or _is_local(source)
    where, options = (path.parent, {"gguf_file": path.name}) if packed else (source, {})
    try:
        return AutoTokenizer.from_pretrained(str(where), trust_remote_code=False, **options)
    except Exception as error:  # the errors of the tokenizer libraries have no common class
        why = _reason(error, source, is_local)
        raise InputError(f"{source}: its tokenizer cannot be loaded: {why}") from error


def _is_local(source: str | Path) -> bool:
    """Return whether `source` is a folder here, which must then hold a model."""
    path = Path(source)
    is_local = path.exists() or path.is_absolute() or str(source).startswith(".")
    if is_local and not (path / "config.json").is_file():
        raise InputError(
            f"{source}: expected a Hugging Face folder with a config.json, or a .gguf file"
        )
    return is_local


def _check_words(source: str | Path, tokenizer: Any) -> None:
    """Refuse a vocabulary in which two words share an id: each save would lose another one."""
    words: dict[int, str] = {}
    for word, number in tokenizer.get_vocab().items():
        other = words.setdefault(number, word)
        if other != word:
            first, second = sorted((other, word))
            raise InputError(
                f"{source}: its tokenizer gives the id {number} to {first!r} and to {second!r}. "
                "The file is damaged. Fetch it again."
            )


def _from_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        loaded, loading_info = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # the gguf reader's errors have no common class
        raise InputError(
            f"{path}: cannot be read as GGUF ({first_line(error)}). It may be cut short. Fetch it "
            "again."
        ) from error
    _check_complete(path, loaded, loading_info)
    check_gguf(path, loaded.config, len(list(loaded.parameters())))
    clean = _unquantised(loaded, dtype)
    _check_configuration(path, clean.config.to_dict())
    _check_words(path, tokenizer)
    _state_bos(tokenizer)
    return clean, tokenizer


def _state_bos(tokenizer: Any) -> None:
    """Keep in the options of a tokenizer whether it has a BOS token (`tasks.prompts.bos_ids`).

    TransformerLens sets EOS as BOS where there is none, and the files of many tokenizers then do
    not name BOS at all.
    """
    getattr(tokenizer, "init_kwargs", {}).setdefault("bos_token", tokenizer.bos_token)


def _unquantised(loaded: Any, dtype: torch.dtype) -> Any:
    """Return a fresh model with the weights of one that was read from a GGUF file.

    transformers marks such a model as quantised and then refuses to save or wrap it. Its weights
    are plain floats by now.
    """
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
    clean = blank_model(type(loaded), clean_config, dtype)
    clean.load_state_dict(loaded.state_dict())
    clean.tie_weights()
    clean.generation_config = loaded.generation_config
    return clean.eval()


def blank_model(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """Return a model without trained weights, as transformers makes it before it reads a folder.

    A model that is cast to half precision afterwards has rounded rotary frequencies, by which
    the angles of later positions are off by a large part of a turn.

    Args:
        kind: class of the model.
        config: its configuration.
        dtype: type of its weights.
    """
    attention = config._attn_implementation
    return kind._from_config(deepcopy(config), dtype=dtype, attn_implementation=attention)


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
        hub_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        root.setLevel(logging.ERROR)
        ignored().__enter__()  # until the scope of the block closes

    return process_wide(
        (hf_logging.get_verbosity, hf_logging.set_verbosity),
        (hub_logging.get_verbosity, hub_logging.set_verbosity),
        (hf_logging.is_progress_bar_enabled, _show_bars),
        (lambda: root.level, root.setLevel),
        GENERATOR,
        change=hush,
    )


def _show_bars(shown: bool) -> None:
    (hf_logging.enable_progress_bar if shown else hf_logging.disable_progress_bar)()
