"""Load a hub name, a Hugging Face folder or a GGUF file as a TransformerLens model.

The weights stay unprocessed, without folding or centring. Folded norms have no parameters to train,
and the numbers are the same without folding. `HookedTransformer` exists up to transformer-lens 3.x
and not for every family. Otherwise `TransformerBridge` is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from cdt_lens.core.choices import Backend
from cdt_lens.core.errors import InputError, UnsupportedModelError
from cdt_lens.core.scratch import temporary_folder
from cdt_lens.models.hugging_face import first_line, load_hugging_face, third_party_noise_off
from cdt_lens.models.support import check_supported
from cdt_lens.models.view import is_model, view_of

# Families that HookedTransformer 3.9 reads correctly from any folder (measured on the logits).
_HOOKED_FAMILIES = frozenset(
    {
        "GPT2LMHeadModel", "GPTNeoXForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
        "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    }
)  # fmt: skip


# The errors of transformer-lens on an unexpected configuration have no common class.
_READING_FAILED = (
    AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


def load_model(
    source: str | Path | nn.Module,
    *,
    backend: Backend = "auto",
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    n_ctx: int | None = None,
) -> Any:
    """Load a model for every function of this package and check it against the rules.

    Args:
        source: a Hugging Face hub name, a local Hugging Face folder, a `.gguf` file, or a
            `HookedTransformer` or `TransformerBridge`, which is checked and returned unchanged.
        backend: "hooked" for `HookedTransformer` (transformer-lens 3.x), "bridge" for
            `TransformerBridge`, or "auto", which uses the first where it is available and correct.
        device: the device. None uses the GPU of this process if there is one, otherwise the CPU.
        dtype: floating point type of the weights.
        n_ctx: context length for `HookedTransformer`, which allocates masks of that size. None uses
            the model's own, at most 2048.

    Returns:
        The TransformerLens model, in evaluation mode. Its logits equal those of Hugging Face.

    Raises:
        InputError: nothing can be loaded from `source`, an argument is not valid, or a weight is
            not finite.
        UnsupportedModelError: a component of the model has no rule.
    """
    if isinstance(source, nn.Module):
        if not is_model(source):
            raise InputError(
                f"model: {type(source).__name__} is not a TransformerLens model. Pass its folder, "
                "or wrap it with TransformerBridge.boot_transformers(name, hf_model=...)."
            )
        check_supported(view_of(source))
        return source
    where = _checked_device(device) if device is not None else default_device()
    with third_party_noise_off():
        hf_model, tokenizer = load_hugging_face(source, dtype=dtype)
        name = _name_of(source)
        model = _wrapped(hf_model, tokenizer, backend, where, dtype, n_ctx)
    model.cfg.model_name = name
    model.eval()
    check_supported(view_of(model))
    return model


def _wrapped(
    hf_model: Any, tokenizer: Any, backend: Backend, device: str, dtype: torch.dtype,
    n_ctx: int | None,
) -> Any:  # fmt: skip
    """Wrap `hf_model`, and check that the logits equal those of Hugging Face.

    transformer-lens ignores some options of a family without a warning, such as a rotary scaling or
    the bias of a projection. Only the numbers show it.
    """
    family = type(hf_model).__name__
    if _use_hooked(backend, family):
        try:
            return _agreeing(
                hf_model, "HookedTransformer", dtype,
                lambda: _hooked(hf_model, tokenizer, device, dtype, n_ctx),
            )  # fmt: skip
        except UnsupportedModelError as error:
            if backend == "hooked":
                raise UnsupportedModelError(f"{error}; use backend='bridge'") from error
    return bridge_of(hf_model, tokenizer, device=device, dtype=dtype)


def bridge_of(
    hf_model: Any, tokenizer: Any, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """Wrap a Hugging Face model in a bridge. On the CPU both share their memory.

    Args:
        hf_model: the Hugging Face model.
        tokenizer: its tokenizer.
        device: the device.
        dtype: floating point type of the weights.

    Returns:
        The `TransformerBridge`, in evaluation mode.

    Raises:
        UnsupportedModelError: the bridge's logits differ from the model's.
    """
    return _agreeing(
        hf_model, "TransformerBridge", dtype, lambda: _bridge(hf_model, tokenizer, device, dtype)
    )


def _agreeing(hf_model: Any, kind: str, dtype: torch.dtype, make: Callable[[], Any]) -> Any:
    """Wrap `hf_model` with `make` and check that the logits equal those of Hugging Face."""
    # Before wrapping: the bridge takes the model's modules apart.
    tokens, expected = _sample(hf_model)
    try:
        model = make()
        if _agrees(model, tokens, expected, dtype):
            return model.eval()
        reason = "its logits differ from Hugging Face's"
    except _READING_FAILED as error:
        reason = first_line(error)
    raise UnsupportedModelError(
        f"{type(hf_model).__name__}: {kind} does not read this configuration correctly ({reason}), "
        "so every score would be wrong"
    )


def _sample(hf_model: Any) -> tuple[Tensor, Tensor]:
    """Return a few random tokens and the logits of Hugging Face's own model for them."""
    config = hf_model.config
    limit = getattr(config, "max_position_embeddings", None) or 64
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, min(64, limit)), generator=generator)
    with torch.no_grad():
        return tokens, hf_model.eval()(tokens).logits.float()


def _agrees(model: Any, tokens: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    view = view_of(model)
    tokens = tokens[:, : view.n_ctx]
    actual = view.logits(tokens).float().cpu()
    expected = expected[:, : view.n_ctx]
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    # `check_supported` runs later and names the weights that are not finite.
    if not bool(torch.isfinite(expected).all()):
        return True
    return bool((actual - expected).norm() <= tolerance * expected.norm())


def _checked_device(device: str | torch.device) -> str:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"device={device!r}: expected cpu, cuda or cuda:0 and so on") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={str(device)!r}: this torch sees no GPU; use cpu")
    return str(device)


def default_device() -> str:
    """Return the GPU of this process under a launcher, the first GPU otherwise, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"


def _use_hooked(backend: Backend, family: str) -> bool:
    if backend == "bridge":
        return False
    if backend not in ("auto", "hooked"):
        raise InputError(f"backend={backend!r}: expected auto, hooked or bridge")
    possible = has_hooked_transformer()
    if backend == "auto":
        return possible and family in _HOOKED_FAMILIES
    if not possible:
        raise InputError(
            "backend='hooked': this transformer-lens has no HookedTransformer; install "
            "'transformer-lens<4' or use backend='bridge'"
        )
    if family not in _HOOKED_FAMILIES:
        raise UnsupportedModelError(
            f"{family}: HookedTransformer does not read this family correctly; use backend='bridge'"
        )
    return True


def has_hooked_transformer() -> bool:
    """Return whether the installed transformer-lens has `HookedTransformer` (3.x)."""
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return False
    return True


def _hooked(
    hf_model: Any, tokenizer: Any, device: str, dtype: torch.dtype, n_ctx: int | None
) -> Any:
    from transformer_lens import HookedTransformer, loading_from_pretrained
    from transformer_lens.weight_processing import ProcessWeights

    config = hf_model.config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", 2048)
    length = min(n_ctx or 2048, int(limit or 2048))
    with temporary_folder() as folder:
        # transformer-lens recognises known models by substrings of the path, so it gets the
        # configuration under a neutral path.
        shown = folder / "model"
        if not hasattr(config, "n_ctx"):
            config.n_ctx = limit
        config.architectures = [type(hf_model).__name__]
        config.save_pretrained(shown)
        cfg = loading_from_pretrained.get_pretrained_model_config(
            str(shown), hf_cfg=config.to_dict(), fold_ln=False, device=device, dtype=dtype,
            n_ctx=length if "n_ctx" not in _fixed_positions(hf_model) else None,
        )  # fmt: skip
        state = loading_from_pretrained.get_pretrained_state_dict(
            str(shown), cfg, hf_model, dtype=dtype
        )
        # It also reads the tokenizer again from its path. The path of a GGUF file holds none.
        tokenizer.save_pretrained(shown)
        model = HookedTransformer(cfg, AutoTokenizer.from_pretrained(shown), move_to_device=False)
    model.tokenizer.name_or_path = tokenizer.name_or_path
    state = model.fill_missing_keys({k: v.detach() for k, v in state.items()})
    state = ProcessWeights.process_weights(
        state, cfg, fold_ln=False, center_writing_weights=False, center_unembed=False,
        fold_value_biases=False, refactor_factored_attn_matrices=False,
    )  # fmt: skip
    outcome = model.load_state_dict(state, strict=False)
    buffers = ("mask", "IGNORE", "rotary_sin", "rotary_cos")
    missing = [key for key in outcome.missing_keys if not key.endswith(buffers)]
    if missing:
        raise UnsupportedModelError(f"weights are missing for HookedTransformer: {missing[:4]}")
    model.move_model_modules_to_device()
    model.setup()
    return model


def _fixed_positions(hf_model: Any) -> tuple[str, ...]:
    # A learned position table has its length in the weights; it cannot be cut.
    return ("n_ctx",) if type(hf_model).__name__ == "GPT2LMHeadModel" else ()


def _bridge(hf_model: Any, tokenizer: Any, device: str, dtype: torch.dtype) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    hf_model.config.architectures = [type(hf_model).__name__]
    with temporary_folder() as folder:
        # As above: the tokenizer may be read again from its path.
        tokenizer.save_pretrained(folder)
        model = TransformerBridge.boot_transformers(
            "model", hf_model=hf_model.to(device), tokenizer=AutoTokenizer.from_pretrained(folder),
            device=device, dtype=dtype,
        )  # fmt: skip
    model.tokenizer.name_or_path = tokenizer.name_or_path
    return model


def _name_of(source: str | Path) -> str:
    path = Path(source)
    return path.stem if path.suffix == ".gguf" else (path.name if path.exists() else str(source))
