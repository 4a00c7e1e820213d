"""Load a hub name, a Hugging Face folder or a GGUF file as a TransformerLens model.

The weights stay unprocessed, without folding or centring. Folded norms have no parameters to train,
and the numbers are the same without folding. `HookedTransformer` exists up to transformer-lens 3.x
and not for every family. Otherwise `TransformerBridge` is used.
"""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Backend, Spread
from cdt_lens.core.errors import (
    CdtLensError,
    CdtLensWarning,
    InputError,
    UnsupportedModelError,
)
from cdt_lens.core.process_wide import process_wide
from cdt_lens.core.scratch import temporary_folder
from cdt_lens.models.hugging_face import (
    first_line,
    is_multimodal,
    load_hugging_face,
    third_party_noise_off,
)
from cdt_lens.models.positions import difference, sample_lengths
from cdt_lens.models.support import check_supported
from cdt_lens.models.view import ModelView, is_model, view_of

# Families that HookedTransformer 3.9 reads correctly from any folder (measured on the logits).
_HOOKED_FAMILIES = frozenset(
    {
        "GPT2LMHeadModel", "GPTJForCausalLM", "GPTNeoForCausalLM", "GPTNeoXForCausalLM",
        "LlamaForCausalLM", "MistralForCausalLM", "OPTForCausalLM", "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
    }
)  # fmt: skip
# Of these the bridge leaves the attention pattern to Hugging Face, so that no hook can edit it.
_HOOKED_ONLY = frozenset({"GPTJForCausalLM", "GPTNeoForCausalLM", "OPTForCausalLM"})
# A learned position table has its length in the weights; it cannot be cut.
_LEARNED_POSITIONS = frozenset({"GPT2LMHeadModel", "GPTNeoForCausalLM", "OPTForCausalLM"})

# Without instructions for bfloat16 25 to 140 times were measured, with them a quarter of the time.
_SLOW = 4
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@checked_arguments
def load_model(
    source: str | Path | nn.Module,
    *,
    backend: Backend = "auto",
    device: str | torch.device | None = None,
    device_map: Spread | Mapping[str, int | str | torch.device] | None = None,
    dtype: torch.dtype | str = torch.float32,
    n_ctx: int | None = None,
) -> Any:
    """Load a model for every function of this package and check it against the rules.

    Args:
        source: a Hugging Face hub name, a local Hugging Face folder, a `.gguf` file, or a
            `HookedTransformer` or `TransformerBridge`, which is checked and returned unchanged.
            The other arguments must not ask for another one.
        backend: "hooked" for `HookedTransformer` (transformer-lens 3.x), "bridge" for
            `TransformerBridge`, or "auto", which uses the first where it is available and correct.
        device: the device. None uses the GPU of this process if there is one, otherwise the CPU.
        device_map: how to spread one model over several GPUs, as a `TransformerBridge`: "auto", or
            another word or a table of accelerate. See docs/guide/processes.md.
        dtype: floating point type of the weights, such as `torch.bfloat16` or "bfloat16".
        n_ctx: context length: longer prompts are refused. None uses the model's own. A
            `HookedTransformer`, which allocates tables of that size, then has at most 2048.

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
        view = view_of(source)
        _check_as_asked(view, backend, device, device_map, dtype, n_ctx)
        check_supported(view)
        return source
    dtype, n_ctx = checked_dtype(dtype), _checked_length(n_ctx)
    if device_map is not None:
        _check_map(backend, device)
        backend = "bridge"
    where = _checked_device(device) if device is not None else default_device()
    if device_map is None and torch.device(where).type == "cpu":
        _warn_of_slow_products(dtype)
    with third_party_noise_off():
        hf_model, tokenizer = load_hugging_face(source, dtype=dtype, device_map=device_map)
        if device_map is not None:
            where = str(hf_model.device)
        _check_fits(hf_model, n_ctx)
        model = _wrapped(hf_model, tokenizer, backend, where, dtype, n_ctx)
    model.cfg.model_name = _name_of(source)
    if n_ctx is not None:
        model.cfg.n_ctx = n_ctx
    model.eval()
    _check_rules(view_of(model), type(hf_model).__name__)
    return model


def _check_as_asked(
    view: ModelView, backend: Backend, device: str | torch.device | None, device_map: Any,
    dtype: torch.dtype | str, n_ctx: int | None,
) -> None:  # fmt: skip
    """Refuse arguments that a model in memory, which stays as it is, does not follow."""
    wanted = checked_dtype(dtype)
    differs = {
        "backend": backend not in ("auto", "bridge" if view.is_bridge else "hooked"),
        "device": device is not None and not _is_on(view, torch.device(_checked_device(device))),
        "device_map": device_map is not None,
        "dtype": wanted not in (torch.float32, view.dtype),  # float32 is the default
        "n_ctx": n_ctx is not None and n_ctx != view.n_ctx,
    }
    for name, other in differs.items():
        if other:
            raise InputError(
                f"{name}: {view.name} is in memory already and stays as it is; omit {name}, or "
                "give the model's folder or hub name"
            )


def _is_on(view: ModelView, device: torch.device) -> bool:
    own = view.device
    return own.type == device.type and device.index in (None, own.index)


def _warn_of_slow_products(dtype: torch.dtype) -> None:
    """Warn where this CPU has no instructions for a type of half precision."""
    if dtype.itemsize >= 4:
        return
    times = _product_seconds(dtype) / _product_seconds(torch.float32)
    if times > _SLOW:
        name = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"dtype={name}: on this CPU a matrix product in {name} takes {times:.0f} times as long "
            "as in float32. float32 is faster, if its weights fit into memory.",
            CdtLensWarning, stacklevel=1,
        )  # fmt: skip


def _product_seconds(dtype: torch.dtype) -> float:
    """Return the shortest time of three small matrix products."""
    left, right = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _check_map(backend: Backend, device: str | torch.device | None) -> None:
    """Refuse arguments that contradict a device map."""
    if device is not None:
        raise InputError(f"device={str(device)!r}: device_map names the devices; give one of both")
    if backend == "hooked":
        raise InputError(
            "device_map: HookedTransformer copies its weights and moves the stream only in its own "
            "forward pass, not where a single block is run. Use backend='bridge'."
        )


def _check_rules(view: ModelView, family: str) -> None:
    """Check the rules, and advise the other class where only that one reads the family."""
    try:
        check_supported(view)
    except UnsupportedModelError as error:
        if not view.is_bridge or family not in _HOOKED_ONLY:
            raise
        advice = (
            "use backend='hooked'" if has_hooked_transformer() else "install 'transformer-lens<4'"
        )
        raise UnsupportedModelError(
            f"{error}. HookedTransformer reads this family: {advice}"
        ) from error


def _wrapped(
    hf_model: Any, tokenizer: Any, backend: Backend, device: str, dtype: torch.dtype,
    n_ctx: int | None,
) -> Any:  # fmt: skip
    """Wrap `hf_model`, and check that the logits equal those of Hugging Face.

    transformer-lens ignores some options of a family without a warning, such as a rotary scaling or
    the bias of a projection. Only the numbers show it.
    """
    family = type(hf_model).__name__
    if backend == "hooked" or (backend == "auto" and _may_be_hooked(family)):
        try:
            return _hooked_of(hf_model, tokenizer, device, dtype, n_ctx)
        except (InputError, UnsupportedModelError) as error:
            if backend == "hooked":
                advice = _advice(hf_model, tokenizer, device, dtype)
                raise type(error)(f"{error}{advice}") from error
    return bridge_of(hf_model, tokenizer, device=device, dtype=dtype)


def _may_be_hooked(family: str) -> bool:
    return has_hooked_transformer() and family in _HOOKED_FAMILIES


def _hooked_of(
    hf_model: Any, tokenizer: Any, device: str, dtype: torch.dtype, n_ctx: int | None
) -> Any:
    """Make a `HookedTransformer` whose logits equal those of Hugging Face, or refuse."""
    family = type(hf_model).__name__
    if not has_hooked_transformer():
        raise InputError(
            "backend='hooked': this transformer-lens has no HookedTransformer; install "
            "'transformer-lens<4'"
        )
    if family not in _HOOKED_FAMILIES:
        raise UnsupportedModelError(
            f"{family}: HookedTransformer does not read this family correctly"
        )
    return _agreeing(
        hf_model, "HookedTransformer", dtype,
        lambda model, dtype: _hooked(model, tokenizer, device, dtype, n_ctx),
    )  # fmt: skip


def _advice(hf_model: Any, tokenizer: Any, device: str, dtype: torch.dtype) -> str:
    """Return the advice to use the bridge, if the bridge supports the model."""
    try:
        check_supported(view_of(bridge_of(hf_model, tokenizer, device=device, dtype=dtype)))
    except CdtLensError as error:
        return f". TransformerBridge refuses it too: {error}"
    return "; use backend='bridge'"


def bridge_of(
    hf_model: Any, tokenizer: Any, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """Wrap a Hugging Face model in a bridge. On the CPU both share their memory.

    Args:
        hf_model: the Hugging Face model.
        tokenizer: its tokenizer.
        device: the device. A model with a device map stays where it is.
        dtype: floating point type of the weights.

    Returns:
        The `TransformerBridge`, in evaluation mode.

    Raises:
        UnsupportedModelError: the bridge's logits differ from the model's.
    """
    with temporary_folder() as folder:
        # transformer-lens may read the tokenizer again from its path, and sets it up once.
        set_up = _saved_and_read(tokenizer, folder)

        def make(model: Any, dtype: torch.dtype) -> Any:
            nonlocal set_up
            bridge = _bridge(model, set_up, device, dtype)
            set_up = bridge.tokenizer
            return bridge

        bridge = _agreeing(
            hf_model, "TransformerBridge", dtype, make,
            scored=type(hf_model).__name__ not in _HOOKED_ONLY,
        )  # fmt: skip
    bridge.tokenizer.name_or_path = tokenizer.name_or_path
    return bridge


# Wraps a Hugging Face model in a class of TransformerLens.
_Make = Callable[[Any, torch.dtype], Any]


def _agreeing(
    hf_model: Any, kind: str, dtype: torch.dtype, make: _Make, *, scored: bool = True
) -> Any:
    """Wrap `hf_model` with `make` and check that the logits equal those of Hugging Face.

    In half precision the logits of a correct model differ by some percent, which would hide a wrong
    one. So its first layers are compared in float32 before, with the long prompts as well. A bridge
    that only carries trained weights into a checkpoint (not `scored`) needs no rules.
    """
    lengths = sample_lengths(hf_model.config)
    if dtype.itemsize < 4:
        start = _compared(_first_layers(hf_model), kind, torch.float32, make, lengths)
        if scored:
            check_supported(view_of(start))
        lengths = lengths[:1]
    return _compared(hf_model, kind, dtype, make, lengths)


def _compared(
    hf_model: Any, kind: str, dtype: torch.dtype, make: _Make, lengths: Sequence[int]
) -> Any:
    # Before wrapping: the bridge takes the model's modules apart.
    samples = [_sample(hf_model, 2 if n == lengths[0] else 1, n) for n in lengths]
    try:
        model = make(hf_model, dtype)
        reason = None if kind == "TransformerBridge" else difference(hf_model, model)
        if reason is None and all(_agrees(model, *sample, dtype) for sample in samples):
            return model.eval()
        reason = reason or "its logits differ from Hugging Face's"
    except (CdtLensError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformer-lens' errors have no common class
        reason = first_line(error)
    raise UnsupportedModelError(
        f"{type(hf_model).__name__}: {kind} does not read this configuration correctly ({reason}), "
        "so every score would be wrong"
    )


def _first_layers(hf_model: Any) -> Any:
    """Return a float32 copy of the first layers, with one of each kind, and of both ends.

    The copy of a model with a device map is on the CPU.
    """
    config = hf_model.config.get_text_config()
    layers = config.num_hidden_layers
    name_of_kinds = "attention_layers" if hasattr(config, "attention_layers") else "layer_types"
    kinds = list(getattr(config, name_of_kinds, None) or ())
    kept = min(layers, max([2, *(kinds.index(kind) + 1 for kind in set(kinds))]))
    stacks = [
        (module, name, child)
        for module in hf_model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == layers
    ]
    try:
        for module, name, stack in stacks:
            setattr(module, name, stack[:kept])
        copied = copy.deepcopy(hf_model)
    finally:
        for module, name, stack in stacks:
            setattr(module, name, stack)
    if getattr(copied, "hf_device_map", None):
        from accelerate.hooks import remove_hook_from_module  # slow to import

        copied = remove_hook_from_module(copied, recurse=True).cpu()
        copied.hf_device_map = {"": "cpu"}
    shorter = copied.config.get_text_config()
    if kinds:
        setattr(shorter, name_of_kinds, kinds[:kept])
    if name_of_kinds == "attention_layers":  # GPT-Neo's, which are made of these at reading
        shorter.attention_types = [[kinds[:kept], 1]]
    shorter.num_hidden_layers = kept
    return copied.float()


def _sample(hf_model: Any, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Return a few random tokens and the logits of Hugging Face's own model for them."""
    vocabulary = hf_model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (rows, length), generator=generator)
    with torch.no_grad():
        return tokens, hf_model.eval()(tokens.to(hf_model.device)).logits.float().cpu()


def _agrees(model: Any, tokens: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    view = view_of(model)
    tokens = tokens[:, : view.n_ctx]
    actual = view.logits(tokens).float().cpu()
    expected = expected[:, : view.n_ctx]
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    if not bool(torch.isfinite(expected).all()):
        # `check_supported` runs later and names the weights that are not finite.
        return not all(bool(torch.isfinite(weight).all()) for weight in view.tl.parameters())
    return bool((actual - expected).norm() <= tolerance * expected.norm())


def checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a floating point type, which may be given by its name.

    Args:
        dtype: the type or its name.

    Raises:
        InputError: it is not one of float32, bfloat16, float16 and float64.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in _DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        raise InputError(f"dtype={dtype!r}: expected one of {names}, or torch's type")
    return found


def _checked_length(n_ctx: Any) -> int | None:
    if n_ctx is None:
        return None
    if isinstance(n_ctx, bool) or not isinstance(n_ctx, Integral) or n_ctx < 1:
        raise InputError(f"n_ctx={n_ctx!r}: expected a whole number of at least 1, or None")
    return int(n_ctx)


def _check_fits(hf_model: Any, n_ctx: int | None) -> None:
    limit = _own_context(hf_model.config)
    if n_ctx is not None and limit is not None and n_ctx > limit:
        raise InputError(f"n_ctx={n_ctx}: this model reads at most {limit} tokens")


def _own_context(config: Any) -> int | None:
    """Return the number of tokens that a model reads, or None where the configuration is silent."""
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return None


def _checked_device(device: str | torch.device) -> str:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"device={device!r}: expected cpu, cuda or cuda:0 and so on") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={str(device)!r}: this torch sees no GPU; use cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device={str(device)!r}: this torch cannot use it; use cpu") from error
    return str(device)


def default_device() -> str:
    """Return the GPU of this process under a launcher, the first GPU otherwise, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"


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
    limit = _own_context(config) or 2048
    length = min(n_ctx or 2048, limit)
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
            n_ctx=None if type(hf_model).__name__ in _LEARNED_POSITIONS else length,
        )  # fmt: skip
        _check_head_width(config, int(cfg.d_head))
        state = loading_from_pretrained.get_pretrained_state_dict(
            str(shown), cfg, hf_model, dtype=dtype
        )
        # It also reads the tokenizer again from its path. The path of a GGUF file holds none.
        model = HookedTransformer(cfg, _saved_and_read(tokenizer, shown), move_to_device=False)
    model.tokenizer.name_or_path = tokenizer.name_or_path
    model.hugging_face_config = config  # for `models.configuration`
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
    if type(hf_model).__name__ == "GPTJForCausalLM":
        _share_norm(model)
    model.move_model_modules_to_device()
    model.setup()
    return model


def _check_head_width(config: Any, d_head: int) -> None:
    own = getattr(config, "head_dim", None)
    if own is not None and own != d_head:
        raise UnsupportedModelError(
            f"HookedTransformer reads this family with heads of width d_model / n_heads = {d_head},"
            f" and its heads have width {own}"
        )


def _share_norm(model: Any) -> None:
    """Make the two norms of a block one, whose weights HookedTransformer keeps twice.

    Training would otherwise move them apart, which no checkpoint of the family can store.
    """
    for block in model.blocks:
        block.ln2.w, block.ln2.b = block.ln1.w, block.ln1.b


def _saved_and_read(tokenizer: Any, folder: str | Path) -> Any:
    try:
        tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises a bare Exception
        raise InputError(
            f"tokenizer: it cannot be saved and read again ({first_line(error)}). Use the "
            "tokenizer that belongs to the model."
        ) from error


def _bridge(hf_model: Any, tokenizer: Any, device: str, dtype: torch.dtype) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    if not getattr(hf_model, "hf_device_map", None):
        hf_model = hf_model.to(device)
    hf_model.config.architectures = [type(hf_model).__name__]
    with _without_processor() if is_multimodal(hf_model.config) else nullcontext():
        return TransformerBridge.boot_transformers(
            "model", hf_model=hf_model, tokenizer=tokenizer, device=str(hf_model.device),
            dtype=dtype,
        )  # fmt: skip


def _without_processor() -> process_wide:
    """Keep TransformerLens from reading a processor of images, which no text needs.

    For a multimodal model without one it runs `pip install torchvision`, and so installs another
    torch below the running program.
    """
    from transformers import AutoProcessor  # needed for these models alone

    def put(method: Any) -> None:
        AutoProcessor.from_pretrained = method

    own = (lambda: vars(AutoProcessor)["from_pretrained"], put)
    return process_wide(own, change=lambda: put(classmethod(lambda *_, **__: None)))


def _name_of(source: str | Path) -> str:
    path = Path(source)
    return path.stem if path.suffix == ".gguf" else (path.name if path.exists() else str(source))
