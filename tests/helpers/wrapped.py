"""The tiny models of `tiny_models`, wrapped as each of TransformerLens' two classes."""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cdt_lens.models.loading import _HOOKED_FAMILIES, _bridge, _hooked, has_hooked_transformer
from cdt_lens.models.view import ModelView
from helpers.tiny_models import D_VOCAB, Float64Throughout, build

needs_hooked = pytest.mark.skipif(
    not has_hooked_transformer(), reason="HookedTransformer was removed in transformer-lens 4"
)
BACKENDS = [pytest.param("hooked", marks=needs_hooked), "bridge"]


@functools.cache
def tokenizer(folder: str) -> Any:
    """A tokenizer from disk (TransformerLens needs one with a path): one word a token."""
    words = {f"w{i}": i for i in range(D_VOCAB)}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")),
        unk_token="w0", pad_token="w0", bos_token="w1", eos_token="w2",
    )  # fmt: skip
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def wrap(family: str, backend: str, folder: str, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model of `family` as `backend`; both have the same weights."""
    hf_model = build(family, dtype)
    if backend == "hooked" and type(hf_model).__name__ not in _HOOKED_FAMILIES:
        pytest.skip(f"{family} is read through the bridge only")
    widened = Float64Throughout() if dtype is torch.float64 else contextlib.nullcontext()
    with warnings.catch_warnings(), widened:
        warnings.simplefilter("ignore")
        words = tokenizer(folder)
        if backend == "hooked":
            model = _hooked(hf_model, words, "cpu", dtype, None)
        else:
            model = _bridge(hf_model, words, "cpu", dtype)
    model.cfg.model_name = f"tiny-{family}"
    return model.eval()


def view(family: str, backend: str, folder: str, dtype: torch.dtype = torch.float64) -> ModelView:
    return ModelView(wrap(family, backend, folder, dtype))
