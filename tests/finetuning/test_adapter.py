"""Adapters: exact on disk, exact on and off, the right model only."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from helpers.checks import assert_close, assert_same_bits, left_untouched
from helpers.shared import BOTH_CLASSES, models, other_weights
from helpers.tiny_models import prompts
from helpers.tiny_training import HEADS, QUICK, task, values
from helpers.wrapped import needs_hooked, view

from cdt_lens.circuits.circuit import Circuit
from cdt_lens.core.artifacts import content_hash
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.finetune import finetune
from cdt_lens.models.heads import Head
from cdt_lens.models.provenance import weight_hash
from cdt_lens.models.view import ModelView


def trained(seen: ModelView, scope: str = "decision") -> Adapter:
    return finetune(seen, task(valid=0), heads=HEADS, scope=scope, **QUICK).adapter


def assert_same(found: Adapter, expected: Adapter) -> None:
    assert (found.scope, found.heads) == (expected.scope, expected.heads)
    assert found.provenance == expected.provenance
    assert found.slices.keys() == expected.slices.keys()
    assert found.whole.keys() == expected.whole.keys()
    for name, (index, value) in expected.slices.items():
        assert found.slices[name][0] == index
        assert_same_bits(found.slices[name][1], value)
    for name, value in expected.whole.items():
        assert_same_bits(found.whole[name], value)


@models(("qwen2",))
@pytest.mark.parametrize("scope", ["decision", "norms", "full"])
def test_a_round_trip_is_exact(family, backend, scope, tokenizer_folder, tmp_path):
    seen = view(family, backend, tokenizer_folder, torch.float32)
    adapter = trained(seen, scope)
    path = adapter.save(tmp_path / "deep" / "javanese")
    assert path == tmp_path / "deep" / "javanese" / "adapter.json"
    for place in (path, path.parent, str(path.parent)):
        assert_same(Adapter.load(place), adapter)
    assert_same(Adapter.load(adapter.save(tmp_path / "other.json")), adapter)


def test_half_precision_is_kept(tokenizer_folder, tmp_path):
    seen = view("llama", "bridge", tokenizer_folder, torch.bfloat16)
    adapter = trained(seen)
    assert adapter.dtype == torch.bfloat16
    assert_same(Adapter.load(adapter.save(tmp_path)), adapter)


@models(("qwen2", "pythia"))
def test_on_and_off_is_exact(family, backend, tokenizer_folder):
    seen = view(family, backend, tokenizer_folder, torch.float32)
    adapter = trained(seen)
    before, base, logits = values(seen), weight_hash(seen), seen.logits(prompts())
    handle = adapter.apply(seen)
    on = seen.logits(prompts())
    assert not torch.equal(on, logits)
    handle.remove()
    for name, value in values(seen).items():
        assert_same_bits(value, before[name])
    handle.remove()  # nothing more
    assert weight_hash(seen) == base
    with adapter.applied(seen.tl):  # a bare model as well
        assert torch.equal(seen.logits(prompts()), on)
    assert torch.equal(seen.logits(prompts()), logits)


@models(("llama", "pythia"))
@pytest.mark.parametrize("move", ["there and back", "wider"])
def test_a_model_that_was_cast_in_between_is_restored(family, backend, move, tokenizer_folder):
    """A cast gives the weights other memory, which views from before do not see."""
    seen = view(family, backend, tokenizer_folder, torch.float32)
    adapter, before = trained(seen), seen.logits(prompts())
    handle = adapter.apply(seen)
    seen.tl.to(torch.float64)
    if move == "there and back":
        seen.tl.to(torch.float32)
    assert not torch.allclose(seen.logits(prompts()).float(), before, atol=1e-3)
    handle.remove()
    assert handle.removed
    torch.testing.assert_close(seen.logits(prompts()).float(), before, rtol=0, atol=1e-4)


@models(("qwen2",))
def test_taken_off_when_the_body_raises(family, backend, tokenizer_folder):
    seen = view(family, backend, tokenizer_folder, torch.float32)
    adapter = trained(seen)
    seen.logits(prompts())
    with left_untouched(seen.tl), pytest.raises(KeyboardInterrupt), adapter.applied(seen):
        raise KeyboardInterrupt


@models(("llama",))
def test_adapters_come_off_in_the_reverse_order_alone(family, backend, tokenizer_folder):
    """The one below would leave its elements behind when the one above brings them back."""
    seen = view(family, backend, tokenizer_folder, torch.float32)
    first, second = trained(seen), trained(seen, "full")
    before = values(seen)
    below, above = first.apply(seen), second.apply(seen, check=False)
    with pytest.raises(InputError, match="applied later is still on the model"):
        below.remove()
    above.remove()
    below.remove()
    for name, value in values(seen).items():
        assert_same_bits(value, before[name])
    lost = first.apply(seen)
    del lost  # a handle that is gone can bring nothing back
    second.apply(seen, check=False).remove()


@models(("llama",))
def test_a_second_removal_never_undoes_what_came_after(family, backend, tokenizer_folder):
    seen = view(family, backend, tokenizer_folder, torch.float32)
    first, second = trained(seen), trained(seen, "norms")
    handle = first.apply(seen)
    handle.remove()
    with second.applied(seen):
        on = seen.logits(prompts())
        handle.remove()
        assert torch.equal(seen.logits(prompts()), on)


@needs_hooked
@pytest.mark.parametrize(
    ("family", "made_with"),
    [*((family, "hooked") for family in BOTH_CLASSES), ("gpt2", "bridge"), ("pythia", "bridge")],
)
def test_both_classes_take_the_same_adapter(family, made_with, tokenizer_folder):
    """Of slices and norms, and of a whole model; trained with one class, put on the other."""
    two = {b: view(family, b, tokenizer_folder, torch.float32) for b in ("hooked", "bridge")}
    for scope in ("decision", "full") if family in ("gpt2", "qwen3") else ("decision",):
        adapter = trained(two[made_with], scope)
        plain = two["bridge"].logits(prompts())
        with adapter.applied(two["hooked"]), adapter.applied(two["bridge"]):
            found = two["hooked"].logits(prompts())
            assert_close(found, two["bridge"].logits(prompts()), atol=2e-5)
            assert weight_hash(two["hooked"]) == weight_hash(two["bridge"])
        assert float((found - plain).abs().max()) > 1e-2


@models(("llama",))
def test_another_model_is_refused_with_both_hashes(family, backend, tokenizer_folder):
    seen = view(family, backend, tokenizer_folder, torch.float32)
    adapter, other = trained(seen), other_weights(family, tokenizer_folder, torch.float32)
    with left_untouched(other.tl), pytest.raises(ArtifactError) as caught:
        adapter.apply(other)
    for each in (seen, other):
        assert weight_hash(each)[:12] in str(caught.value)
    with adapter.applied(seen), pytest.raises(ArtifactError, match="this adapter was made with"):
        adapter.apply(seen)  # it is on already
    with adapter.applied(other, check=False):
        pass


def test_what_does_not_fit_is_refused_and_nothing_is_written(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    other = view("gpt2", "bridge", tokenizer_folder, torch.float32)
    seen.logits(prompts())
    adapter = trained(other)
    with (
        left_untouched(seen.tl),
        pytest.raises(InputError, match=r"b_Q.*does not fit tiny-llama: no such"),
    ):
        adapter.apply(seen, check=False)
    wide = trained(seen)
    name = "blocks.1.attn.W_O"
    slices = {**wide.slices, name: ((7,), wide.slices[name][1])}
    bad = Adapter(wide.scope, wide.heads, slices, wide.whole, wide.provenance)
    with left_untouched(seen.tl), pytest.raises(InputError, match=f"{name}: head 7 is outside"):
        bad.apply(seen)
    bad = Adapter(wide.scope, wide.heads, {}, {"ln_final.w": torch.ones(3)}, wide.provenance)
    with left_untouched(seen.tl), pytest.raises(InputError, match=r"ln_final.w of shape \(3,\)"):
        bad.apply(seen)


def test_what_it_holds_as_a_table(tokenizer_folder):
    adapter = trained(view("llama", "bridge", tokenizer_folder, torch.float32))
    table = adapter.to_dataframe().set_index("weight")
    assert table.loc["blocks.1.attn.W_K", "heads"] == [1]
    assert table.loc["blocks.1.attn.W_Q", "heads"] == [2]
    assert pd.isna(table.loc["ln_final.w", "heads"]) and table.loc["ln_final.w", "elements"] == 64
    assert table["elements"].sum() == adapter.elements
    assert f"{adapter.elements:,} trained" in adapter._repr_html_()


# Damaged files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tokenizer_folder, tmp_path_factory) -> tuple[bytes, bytes, str]:
    """The bytes of an adapter's two files, and the name of the second."""
    folder = tmp_path_factory.mktemp("adapter")
    trained(view("llama", "bridge", tokenizer_folder, torch.float32)).save(folder)
    (tensors,) = folder.glob("*.safetensors")
    return (folder / "adapter.json").read_bytes(), tensors.read_bytes(), tensors.name


def lay(folder: Path, saved: tuple[bytes, bytes, str]) -> tuple[Path, Path]:
    path, tensors = folder / "adapter.json", folder / saved[2]
    path.write_bytes(saved[0])
    tensors.write_bytes(saved[1])
    return path, tensors


def test_a_damaged_file_is_refused_with_its_path(saved, tmp_path):
    path, tensors = lay(tmp_path, saved)
    Adapter.load(path)
    for file in (path, tensors):
        whole = file.read_bytes()
        for bad in (whole[: len(whole) // 2], whole[:-9] + b"x" + whole[-8:], b""):
            file.write_bytes(bad)
            with pytest.raises(ArtifactError) as caught:
                Adapter.load(tmp_path)
            assert str(file) in str(caught.value)
        file.write_bytes(whole)
    tensors.unlink()
    with pytest.raises(ArtifactError, match="tensors .* are missing"):
        Adapter.load(tmp_path)


@pytest.mark.parametrize("change", ["heads", "provenance", "slices", "wrong head", "unknown field"])
def test_a_file_that_is_whole_but_no_adapter_is_refused_with_its_path(saved, tmp_path, change):
    path, _ = lay(tmp_path, saved)
    document = json.loads(path.read_text())
    document.pop("sha256")
    if change == "wrong head":
        document["heads"] = ["first"]
    elif change == "unknown field":
        document["provenance"]["colour"] = "red"
    elif change == "slices":
        document["slices"]["blocks.9.attn.W_Q"] = [0]
    else:
        del document[change]
    path.write_text(json.dumps({**document, "sha256": content_hash(document)}))
    with pytest.raises(ArtifactError, match=f"{path}: not a whole adapter"):
        Adapter.load(path)


def test_no_file_and_another_kind_of_file(saved, tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path / 'adapter.json'}: no such file"):
        Adapter.load(tmp_path)
    path = Circuit((Head(0, 1),), 2, 4).save(tmp_path / "circuit.json")
    with pytest.raises(ArtifactError, match=f"{path}: expected a cdt_lens.adapter file"):
        Adapter.load(path)


def test_an_adapter_below_another_stays_though_the_handle_of_that_one_is_gone(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    adapter = trained(seen)
    below = adapter.apply(seen)
    adapter.apply(seen, check=False)
    gc.collect()
    with pytest.raises(InputError, match="applied later is still on the model"):
        below.remove()
