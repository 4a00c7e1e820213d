"""Loading: the numbers of Hugging Face for both classes, and what cannot be loaded."""

from __future__ import annotations

import pytest
import torch
from saved import save_model
from tiny_models import FAMILIES, build, prompts
from wrapped import BACKENDS, needs_hooked

from cdt_lens.errors import InputError, UnsupportedModelError
from cdt_lens.loading import _HOOKED_FAMILIES, has_hooked_transformer, load_model
from cdt_lens.model import view_of
from cdt_lens.provenance import weight_hash


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_the_logits_of_hugging_face(family, backend, tmp_path):
    hf_model = build(family, torch.float32)
    if backend == "hooked" and type(hf_model).__name__ not in _HOOKED_FAMILIES:
        pytest.skip(f"{family} is read through the bridge only")
    # A path that names other families, by which transformer-lens would guess.
    model = load_model(save_model(tmp_path / "llama-gemma-270m", family), backend=backend)
    tokens = prompts(2, 9, seed=0)
    with torch.no_grad():
        expected = hf_model(tokens).logits
    torch.testing.assert_close(view_of(model).logits(tokens), expected, rtol=0, atol=5e-5)
    assert not model.training
    assert load_model(model) is model


@needs_hooked
@pytest.mark.parametrize("family", ["gpt2", "pythia", "llama", "qwen2", "qwen3"])
def test_both_classes_hold_the_same_weights(family, tmp_path):
    folder = save_model(tmp_path / "tiny", family)
    hashes = {weight_hash(view_of(load_model(folder, backend=b))) for b in ("hooked", "bridge")}
    assert len(hashes) == 1


def test_auto_takes_the_class_that_can(tmp_path):
    llama = load_model(save_model(tmp_path / "a", "llama"))
    gemma = load_model(save_model(tmp_path / "b", "gemma2"))
    assert view_of(llama).is_bridge == (not has_hooked_transformer())
    assert view_of(gemma).is_bridge


def test_hooked_where_it_cannot_be(tmp_path):
    folder = save_model(tmp_path / "gemma", "gemma2")
    with pytest.raises((InputError, UnsupportedModelError), match="bridge"):
        load_model(folder, backend="hooked")


def test_what_cannot_be_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: expected a Hugging Face folder"):
        load_model(tmp_path / "empty")
    with pytest.raises(InputError, match=r"none\.gguf: no such file"):
        load_model(tmp_path / "none.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(InputError, match=r"cut\.gguf: cannot be read as GGUF"):
        load_model(tmp_path / "cut.gguf")
    folder = save_model(tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"cut: cannot be loaded: the folder is damaged"):
        load_model(folder)
    with pytest.raises(InputError, match=r"not a TransformerLens model"):
        load_model(torch.nn.Linear(2, 2))


def test_weights_that_are_not_finite(tmp_path):
    hf_model = build("llama", torch.float32)
    folder = save_model(tmp_path / "tiny")
    with torch.no_grad():
        hf_model.model.layers[1].mlp.down_proj.weight[3, 3] = torch.nan
    hf_model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"NaN or infinity"):
        load_model(folder)


def test_a_prompt_longer_than_the_context(tmp_path):
    model = load_model(save_model(tmp_path / "tiny", "gpt2"))
    with pytest.raises(InputError, match=r"prompt of 65 tokens: .* reads at most 64"):
        view_of(model).run(torch.zeros(1, 65, dtype=torch.long))
