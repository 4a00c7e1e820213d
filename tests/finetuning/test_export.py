"""Exported folders: plain transformers reads the trained model, and nothing else has changed."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.checks import assert_close, unchecked_types
from helpers.hf_layout import selected
from helpers.shared import BRIDGE_FAMILIES, HOOKED_ONLY
from helpers.tiny_models import EXPERTS, build, prompts
from helpers.tiny_training import HEADS, QUICK, least_moved, task
from helpers.wrapped import needs_hooked
from torch import Tensor

import cdt_lens as cdt
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.export import export
from cdt_lens.finetuning.export_base import is_lost
from cdt_lens.finetuning.finetune import finetune
from cdt_lens.models.provenance import weight_hash
from cdt_lens.models.view import ModelView


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """By transformers alone."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    ).eval()


def load(folder: Path, backend: str, dtype: torch.dtype = torch.float32) -> ModelView:
    return ModelView(cdt.load_model(folder, backend=backend, dtype=dtype, device="cpu"))


def trained(seen: ModelView, scope: str, **changes: Any) -> Adapter:
    heads = None if scope in ("full", "norms", "lora") else HEADS
    return finetune(seen, task(valid=0), heads=heads, scope=scope, **{**QUICK, **changes}).adapter


def may_move(family: str, scope: str) -> dict[str, Tensor]:
    """True where the scope trains, by Hugging Face name; peft's projections whole."""
    own = build(family)
    if scope == "full":
        return {n: torch.ones_like(p, dtype=torch.bool) for n, p in own.named_parameters()}
    if scope == "lora":
        everyone = [(layer, h) for layer in range(len(list(blocks(own)))) for h in range(4)]
        masks = selected(own, everyone, norms_of="none")
        return {n: mask if mask.ndim > 1 else torch.zeros_like(mask) for n, mask in masks.items()}
    heads = [(h.layer, h.head) for h in map(cdt.Head.parse, HEADS)] if scope == "decision" else []
    return selected(own, heads)


def blocks(model: Any) -> Any:
    inner = getattr(model, "model", None) or getattr(model, "transformer", None) or model.gpt_neox
    return getattr(inner, "layers", None) or inner.h


def check_export(family: str, backend: str, scope: str, base: Path, place: Path) -> None:
    """Logits, untouched elements, and moved ones."""
    seen = load(base, backend)
    adapter = trained(seen, scope)
    assert export(adapter, base, place) == place
    before, after = plain(base).state_dict(), plain(place)
    with adapter.applied(seen):
        expected = seen.logits(prompts())
        trained_hash = weight_hash(seen)
    with torch.no_grad():
        assert_close(after(prompts()).logits, expected, atol=2e-5)
    found = after.state_dict()
    assert found.keys() == before.keys()
    masks = may_move(family, scope)
    for name, value in before.items():
        # A tied output matrix is another name of the embedding, which has the mask.
        mask = masks.get(name)
        if mask is None:
            mask = torch.full_like(value, scope == "full", dtype=torch.bool)
        assert torch.equal(found[name][~mask], value[~mask]), name
        if bool(mask.any()):
            assert float((found[name] != value)[mask].double().mean()) > least_moved(name), name
    assert (
        after.get_output_embeddings().weight is after.get_input_embeddings().weight
    ) == after.config.tie_word_embeddings
    # The folder is a model of this package again, of the trained weights.
    read_again = backend if family in HOOKED_ONLY else "bridge"
    assert weight_hash(load(place, read_again)) == trained_hash


@pytest.mark.parametrize("family", [*BRIDGE_FAMILIES, *EXPERTS])
def test_plain_transformers_reads_the_trained_model(family, folders, tmp_path):
    check_export(family, "bridge", "decision", folders(family), tmp_path / "out")


@needs_hooked
@pytest.mark.parametrize(
    ("family", "scope"),
    [
        ("gpt2", "decision"), ("pythia", "decision"), ("gpt2", "full"), ("gptj", "decision"),
        ("gptj", "full"), ("gpt_neo", "decision"), ("opt", "decision"), ("opt", "full"),
    ],
)  # fmt: skip
def test_also_what_a_hooked_transformer_learnt(family, scope, folders, tmp_path):
    check_export(family, "hooked", scope, folders(family), tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "scope"),
    [
        ("gpt2", "full"),
        ("pythia", "full"),
        ("llama", "norms"),
        ("gpt2", "lora"),
        ("pythia", "lora"),
    ],
)
def test_other_scopes(family, scope, folders, tmp_path):
    check_export(family, "bridge", scope, folders(family), tmp_path / "out")


def test_the_folder_is_complete(folders, tmp_path):
    base = folders("llama")
    place = export(trained(load(base, "bridge"), "decision"), str(base), str(tmp_path / "a" / "b"))
    # `trained` makes its prompts by hand, so there is no task to describe.
    assert {p.name for p in place.iterdir()} == {p.name for p in base.iterdir()} | {"README.md"}
    config, before = (json.loads((p / "config.json").read_text()) for p in (place, base))
    assert config["architectures"] == before["architectures"]
    assert {k: v for k, v in config.items() if not k.startswith("_")} == {
        k: v for k, v in before.items() if not k.startswith("_")
    }
    words = transformers.AutoTokenizer.from_pretrained(place)
    assert (
        words("w7 w20").input_ids
        == transformers.AutoTokenizer.from_pretrained(base)("w7 w20").input_ids
    )
    assert place.stat().st_mode & 0o777 == 0o755
    assert [p.name for p in place.parent.iterdir()] == ["b"]


def test_an_adapter_from_disk_and_an_empty_folder(folders, tmp_path):
    base = folders("pythia")
    adapter = trained(load(base, "bridge"), "decision")
    adapter.save(tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    export(Adapter.load(tmp_path / "adapter"), base, tmp_path / "out")
    with adapter.applied(seen := load(base, "bridge")), torch.no_grad():
        found = plain(tmp_path / "out")(prompts()).logits
        assert_close(found, seen.logits(prompts()), atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_half_precision_is_exported_as_it_was_trained(family, folders, tmp_path):
    base = folders(family)
    seen = load(base, "bridge", torch.bfloat16)
    adapter = trained(seen, "decision")
    export(adapter, base, tmp_path / "out")
    found, before = plain(tmp_path / "out", torch.bfloat16), plain(base, torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    masks = may_move(family, "decision")
    for name, value in before.state_dict().items():
        mask = masks.get(name, torch.zeros_like(value, dtype=torch.bool))
        assert torch.equal(found.state_dict()[name][~mask], value[~mask]), name
    with adapter.applied(seen), torch.no_grad():
        assert_close(found(prompts()).logits, seen.logits(prompts()), atol=0.1)


# What it takes over from the base -------------------------------------------------------------


def in_half_precision(base: Path, folder: Path, **options: Any) -> Path:
    """The base stored in bfloat16, as most published models are."""
    plain(base, torch.bfloat16).save_pretrained(folder, **options)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "pythia"])
def test_a_base_in_bfloat16_stays_one(family, folders, tmp_path):
    """Read and trained in float32; its untouched elements keep their bits, the others round."""
    base = in_half_precision(folders(family), tmp_path / "base", max_shard_size="60KB")
    seen = load(base, "bridge")
    adapter = trained(seen, "decision")
    place = export(adapter, base, tmp_path / "out")
    assert json.loads((place / "config.json").read_text())["dtype"] == "bfloat16"
    assert size(place) == pytest.approx(size(base), rel=0.02)
    assert len(list(place.glob("*.safetensors"))) == len(list(base.glob("*.safetensors"))) > 1
    before, after = (plain(p, torch.bfloat16).state_dict() for p in (base, place))
    with adapter.applied(seen):
        exact = export(adapter, base, tmp_path / "exact", dtype="float32")
    full = plain(exact).state_dict()
    masks = may_move(family, "decision")
    for name, value in before.items():
        mask = masks.get(name, torch.zeros_like(value, dtype=torch.bool))
        assert torch.equal(after[name][~mask], value[~mask]), name
        assert torch.equal(after[name], full[name].to(torch.bfloat16)), name
    with adapter.applied(seen), torch.no_grad():
        assert_close(plain(exact)(prompts()).logits, seen.logits(prompts()), atol=2e-5)
    assert size(exact) == pytest.approx(2 * size(base), rel=0.02)


def test_a_change_that_rounding_would_undo_is_not_rounded(folders, tmp_path):
    """Steps of 1e-5 are far below half the distance of two numbers of bfloat16."""
    base = in_half_precision(folders("llama"), tmp_path / "base")
    seen = load(base, "bridge")
    adapter = trained(seen, "norms", learning_rate=1e-5, weight_decay=0.0)
    place = export(adapter, base, tmp_path / "out")
    assert json.loads((place / "config.json").read_text())["dtype"] == "float32"
    with adapter.applied(seen), torch.no_grad():
        assert_close(plain(place)(prompts()).logits, seen.logits(prompts()), atol=2e-5)
    with pytest.raises(InputError, match="dtype=bfloat16: rounding.*Export in float32"):
        export(adapter, base, tmp_path / "other", dtype=torch.bfloat16)
    assert not (tmp_path / "other").exists()


def test_the_licence_and_the_readme_of_the_base_come_along(folders, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folders("llama"), base)
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "README.md", "training_args.bin"):
        (base / name).write_text(f"the base's {name}")
    place = export(trained(load(base, "bridge"), "decision"), base, tmp_path / "out")
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md"):
        assert (place / name).read_text() == f"the base's {name}"
    assert (place / "README.base.md").read_text() == "the base's README.md"
    assert (place / "README.md").read_text() != "the base's README.md"
    assert not (place / "training_args.bin").exists()


@pytest.mark.parametrize("dtype", ["int8", 16])
def test_an_unknown_type_is_refused_before_the_base_is_read(dtype, folders, tmp_path):
    adapter = trained(load(folders("llama"), "bridge"), "norms")
    with unchecked_types(), pytest.raises(InputError, match="dtype=.*(float32|text)"):
        export(adapter, tmp_path / "nowhere", tmp_path / "out", dtype=dtype)


def test_the_global_generator_and_bars_are_left_alone(folders, tmp_path, capfd):
    base = folders("llama")
    adapter = trained(load(base, "bridge"), "decision")
    capfd.readouterr()
    state = torch.get_rng_state()
    export(adapter, base, tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()


# Refusals ------------------------------------------------------------------------------------------


def test_another_base_is_refused_with_both_hashes(folders, tmp_path):
    base = folders("llama")
    seen = load(base, "bridge")
    adapter = trained(seen, "decision")
    other = plain(base)
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError) as caught:
        export(adapter, tmp_path / "other", tmp_path / "out")
    assert weight_hash(seen)[:12] in str(caught.value)
    assert weight_hash(load(tmp_path / "other", "bridge"))[:12] in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_refused(folders, tmp_path):
    base = folders("llama")
    adapter = trained(load(base, "bridge"), "decision")
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match=f"{tmp_path}: exists and is not empty"):
        export(adapter, base, tmp_path)
    with pytest.raises(InputError, match="mine.txt: "):
        export(adapter, base, tmp_path / "mine.txt")
    with pytest.raises(InputError, match="mine.txt/out: cannot be written"):
        export(adapter, base, tmp_path / "mine.txt" / "out")
    assert (tmp_path / "mine.txt").read_text() == "keep"
    with pytest.raises(InputError, match="nowhere: "):
        export(adapter, tmp_path / "nowhere", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_training_that_learnt_nothing_is_exported_only_if_told(folders, tmp_path):
    base = folders("llama")
    seen = load(base, "bridge")
    result = finetune(seen, task(), heads=HEADS, **{**QUICK, "learning_rate": 1e-12, "epochs": 1})
    assert not result.adapter.changes(seen) and not result.changed
    assert "nothing was learnt" in repr(result)
    with pytest.raises(InputError, match="changes no weight: its training learnt nothing"):
        export(result.adapter, base, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    export(result.adapter, base, tmp_path / "out", allow_unchanged=True)
    before, after = plain(base).state_dict(), plain(tmp_path / "out").state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("scope", ["decision", "norms", "lora", "full"])
def test_an_adapter_that_was_trained_changes_the_model(scope, folders):
    seen = load(folders("llama"), "bridge")
    adapter = trained(seen, scope)
    assert adapter.changes(seen)
    with adapter.applied(seen):
        assert not adapter.changes(seen)


def test_a_base_with_an_adapter_of_its_own_is_refused(folders, tmp_path):
    """transformers attaches a LoRA adapter that it finds beside the weights."""
    peft = pytest.importorskip("peft")
    base = folders("llama")
    adapter = trained(load(base, "bridge"), "norms")
    shutil.copytree(base, tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's use of transformers
        peft.get_peft_model(plain(base), config).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match="base: holds a LoRA adapter"):
        export(adapter, tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing past `size` bytes fails, as on a full disk (Python ignores the signal)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_behind(folders, tmp_path):
    base = folders("llama")
    adapter = trained(load(base, "bridge"), "decision")
    with file_size_limit(100_000), pytest.raises(InputError, match="out: cannot be written"):
        export(adapter, base, tmp_path / "out")
    assert os.listdir(tmp_path) == []
    export(adapter, base, tmp_path / "out")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_others_may_read_an_exported_folder_as_the_umask_says(folders, tmp_path, mask):
    """safetensors itself writes weights that only their owner may read."""
    base = folders("llama")
    adapter = trained(load(base, "bridge"), "decision")
    before = os.umask(mask)
    try:
        export(adapter, base, tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o666 & ~mask}


def test_rounding_loses_what_is_not_finite_and_nothing_where_nothing_changed():
    trained, before = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
    assert is_lost(torch.tensor([1.0, math.nan]), trained, before)
    assert not is_lost(torch.tensor([1.0, 2.01]), trained, before)
    assert not is_lost(torch.tensor([1.0, 2.01]), trained, trained)
