"""A GGUF file is read whole, or refused with the name of what would be ignored or random."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.tiny_gguf import tensors, write_gguf
from helpers.tiny_models import prompts

from cdt_lens.core.errors import InputError
from cdt_lens.models.hugging_face import load_hugging_face
from cdt_lens.models.loading import load_model
from cdt_lens.models.provenance import weight_hash
from cdt_lens.models.view import view_of


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in tensors().items() if key != name}


# Each writes a file that says something else than it holds, with the words of the refusal.
UNREAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a tensor less": (
        lambda path: write_gguf(path, without("blk.1.attn_output.weight")),
        "missing.*layers.1.self_attn.o_proj",
    ),
    "a norm less": (lambda path: write_gguf(path, without("output_norm.weight")), "missing.*norm"),
    "more layers than it holds": (lambda path: write_gguf(path, layers=3), r"missing.*layers\.2"),
    "fewer layers than it holds": (
        lambda path: write_gguf(path, layers=1), r"blk\.1\..*has 1 layers",
    ),
    "rotary factors": (
        lambda path: write_gguf(
            path, {**tensors(), "rope_freqs.weight": np.array([1, 1, 2, 8], np.float32)}
        ),
        "rotary factors",
    ),
    "a rotary scaling": (
        lambda path: write_gguf(
            path, more=lambda writer: writer.add_string("llama.rope.scaling.type", "yarn")
        ),
        "rotary scaling.*yarn",
    ),
    "a scale of the logits": (
        lambda path: write_gguf(path, more=lambda writer: writer.add_logit_scale(0.25)),
        "logit_scale=0.25",
    ),
    "a bias": (
        lambda path: write_gguf(
            path, {**tensors(), "blk.0.attn_q.bias": np.ones(32, np.float32)}
        ),
        "22 weights, of which transformers reads 21",
    ),
    "a factor of a rotary scaling": (
        lambda path: write_gguf(
            path, more=lambda writer: writer.add_float32("llama.rope.scaling.factor", 4.0)
        ),
        r"rotary scaling \(rope.scaling.factor=4",
    ),
    "an old linear scaling": (
        lambda path: write_gguf(
            path, more=lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0)
        ),
        r"rotary scaling \(rope.scale_linear=4",
    ),
    "a clamp": (
        lambda path: write_gguf(
            path, more=lambda writer: writer.add_float32("llama.attention.clamp_kqv", 8.0)
        ),
        "attention.clamp_kqv=8",
    ),
    "biases by distance": (
        lambda path: write_gguf(
            path, more=lambda writer: writer.add_float32("llama.attention.max_alibi_bias", 8.0)
        ),
        "attention.max_alibi_bias=8",
    ),
    "attention to later tokens": (
        lambda path: write_gguf(path, more=lambda writer: writer.add_causal_attention(False)),
        "not causal",
    ),
    "experts": (
        lambda path: write_gguf(path, more=lambda writer: writer.add_expert_count(4)),
        "mixture of experts",
    ),
    "an epsilon that is no number": (
        lambda path: write_gguf(
            path, more=lambda writer: writer.add_layer_norm_rms_eps(float("nan"))
        ),
        "rms_norm_eps=nan",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_what_would_be_random_or_ignored_is_refused_by_name(name, tmp_path):
    make, words = UNREAD[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the writer notes an entry that is given twice
        make(tmp_path / "model.gguf")
    with pytest.raises(InputError, match=words) as caught:
        load_model(tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)


def test_a_whole_file_is_read_the_same_each_time(tmp_path):
    """Also with factors of one, and with the end tied to the embedding."""
    ones = {**tensors(), "rope_freqs.weight": np.ones(4, np.float32)}
    paths = [
        write_gguf(tmp_path / "a.gguf"),
        write_gguf(tmp_path / "b.gguf", ones),
        write_gguf(tmp_path / "tied.gguf", without("output.weight")),
    ]
    hashes = [weight_hash(view_of(load_model(path))) for path in [*paths, *paths]]
    assert hashes[:3] == hashes[3:] and hashes[0] == hashes[1] != hashes[2]


def test_loading_moves_no_random_generator(tmp_path):
    """The model is made with random weights before those of the file are read."""
    path = write_gguf(tmp_path / "a.gguf")
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    filters = list(warnings.filters)
    view = view_of(load_model(path))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert warnings.filters == filters
    assert bool(torch.isfinite(view.logits(prompts() % 64)).all())


def test_half_precision_keeps_the_rotary_frequencies(tmp_path):
    """As transformers does for a folder. Rounded, the angles of late positions are wrong."""
    path = write_gguf(tmp_path / "a.gguf")
    whole, half = (
        load_hugging_face(path, dtype=dtype)[0] for dtype in (torch.float32, torch.bfloat16)
    )
    assert next(half.parameters()).dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "folder")
    folder = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "folder", dtype=torch.bfloat16
    )
    expected = whole.model.rotary_emb.inv_freq
    for model in (half, folder):
        found = model.model.rotary_emb.inv_freq
        assert found.dtype == torch.float32 and torch.equal(found, expected)
