"""A LoRA of an adapter, read by peft itself: the logits of the trained model, and back again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from helpers.shared import BRIDGE_FAMILIES
from helpers.tiny_models import prompts
from helpers.tiny_training import HEADS, QUICK, task
from helpers.tokenizers import save_tokenizer
from torch import Tensor

import cdt_lens as cdt
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.export import base_of, fresh_model
from cdt_lens.finetuning.finetune import finetune
from cdt_lens.finetuning.peft_files import from_peft, to_peft
from cdt_lens.models.view import ModelView

# What peft asks of transformers is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
EXACT: dict[str, Any] = {"norms": "none", "biases": False}


def load(folder: Path) -> ModelView:
    return ModelView(cdt.load_model(folder, backend="bridge", device="cpu"))


def trained(base: Path, scope: str = "decision", **changes: Any) -> Adapter:
    heads = None if scope in ("full", "norms", "lora") else HEADS
    options = {**QUICK, **changes}
    return finetune(load(base), task(valid=0), heads=heads, scope=scope, **options).adapter


def by_peft(base: Path, folder: Path) -> Tensor:
    """Plain transformers and peft, without this package."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, folder).eval()(prompts()).logits


def check(adapter: Adapter, base: Path, folder: Path, **options: Any) -> dict[str, Any]:
    assert to_peft(adapter, base, folder, **options) == folder
    seen = load(base)
    plain = seen.logits(prompts())
    with adapter.applied(seen):
        expected = seen.logits(prompts())
    found = by_peft(base, folder)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float((expected - plain).abs().max()) > 1e-3
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    return config


@pytest.mark.parametrize("family", BRIDGE_FAMILIES)
def test_heads_are_an_exact_lora(family: str, folders, tmp_path: Path):
    """Fused and transposed projections included; ranks are the widths of the trained heads."""
    base = folders(family)
    adapter = trained(base, **EXACT)
    config = check(adapter, base, tmp_path / "lora")
    width = load(base).d_head
    ranks = config["rank_pattern"].values()
    assert ranks and all(rank % width == 0 for rank in ranks) and config["r"] == max(ranks)
    again = from_peft(tmp_path / "lora", base)
    assert again.heads == adapter.heads and again.scope == adapter.scope
    for name, (index, values) in adapter.slices.items():
        assert again.slices[name][0] == index
        torch.testing.assert_close(again.slices[name][1], values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "gpt2"])
def test_a_projection_that_is_changed_as_a_whole(family: str, folders, tmp_path: Path):
    """As in a model whose heads share one key and one value projection."""
    base = folders(family)
    heads = [cdt.Head(0, head) for head in range(load(base).n_heads)]
    options = {**QUICK, **EXACT, "heads": heads}
    adapter = finetune(load(base), task(valid=0), scope="decision", **options).adapter
    config = check(adapter, base, tmp_path / "lora")
    weights = dict(transformers.AutoModelForCausalLM.from_pretrained(base).named_parameters())
    ranks = {
        name: [rank for part, rank in config["rank_pattern"].items() if re.fullmatch(part, name)]
        for name in config["target_modules"]
    }
    assert any(rank == [min(weights[f"{name}.weight"].shape)] for name, rank in ranks.items())
    assert from_peft(tmp_path / "lora", base).heads == adapter.heads


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_channels_norms_one_rank_and_low_rank_updates(family: str, folders, tmp_path: Path):
    base = folders(family)
    check(trained(base, **EXACT, channels=2), base, tmp_path / "channels")
    config = check(trained(base, biases=False), base, tmp_path / "norms", extras=True)
    assert config["modules_to_save"]
    config = check(trained(base, **EXACT), base, tmp_path / "padded", rank=64)
    assert config["r"] == 64 and set(config["rank_pattern"].values()) == {64}
    config = check(trained(base, "lora", lora_rank=3), base, tmp_path / "low")
    assert set(config["rank_pattern"].values()) <= {3, 9}  # GPT-2's q, k and v are one matrix


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_rank_of_a_low_rank_update_in_half_precision(family: str, folders, tmp_path: Path):
    """The rounding of the merged weights has a full rank, and none of it is written."""
    base = folders(family)
    model = cdt.load_model(base, backend="bridge", device="cpu", dtype="bfloat16")
    options = {**QUICK, "lora_rank": 2, "epochs": 4, "learning_rate": 3e-2}
    adapter = finetune(model, task(valid=0), scope="lora", **options).adapter
    to_peft(adapter, base, tmp_path / "low")
    config = json.loads((tmp_path / "low" / "adapter_config.json").read_text("utf-8"))
    ranks = set(config["rank_pattern"].values()) | {config["r"]}
    assert ranks <= {1, 2, 3, 4, 5, 6} if family == "gpt2" else ranks <= {1, 2}


def test_what_a_lora_cannot_hold_is_refused_with_the_way_out(folders, tmp_path: Path):
    base = folders("gpt2")
    cases = [
        (trained(base, biases=False), {}, 'a LoRA has no norms. Train with norms="none"'),
        (trained(base, norms="none"), {}, "a LoRA has no biases. Train with biases=False"),
        (trained(base, "full"), {"extras": True}, "Write a checkpoint with export"),
        (trained(base, "norms"), {"extras": True}, "changes norms alone"),
        (trained(base, **EXACT), {"rank": 1}, "has rank .*; give at least that"),
    ]
    for adapter, options, told in cases:
        with pytest.raises(InputError, match=told):
            to_peft(adapter, base, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"holds no cdt_adapter\.json"):
        from_peft(base, base)


def test_another_base_is_refused(folders, tmp_path: Path):
    base = folders("llama")
    adapter = trained(base, **EXACT)
    to_peft(adapter, base, tmp_path / "lora")
    with pytest.raises(ArtifactError, match="weights"):
        to_peft(adapter, folders("qwen3"), tmp_path / "other")
    with pytest.raises(ArtifactError, match="weights"):
        from_peft(tmp_path / "lora", folders("qwen3"))


def test_transformers_alone_reads_the_folder_with_its_tokenizer(folders, tmp_path: Path):
    base = folders("llama")
    to_peft(trained(base, **EXACT), base, tmp_path / "lora")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lora")
    assert any("lora_A" in name for name, _ in model.named_parameters())
    assert "peft" in (tmp_path / "lora" / "README.md").read_text("utf-8")


def test_half_precision_comes_back_to_its_base(tmp_path: Path):
    """Rotary frequencies that bfloat16 cannot hold are those of the base again."""
    base = tmp_path / "base"
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, rope_parameters={"rope_theta": 3e4, "rope_type": "default"},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(base)
    save_tokenizer("words", base)
    view = ModelView(cdt.load_model(base, backend="bridge", dtype="bfloat16"))
    adapter = finetune(view, task(valid=0), heads=HEADS, **{**QUICK, **EXACT}).adapter
    to_peft(adapter, base, tmp_path / "lora")
    assert from_peft(tmp_path / "lora", base).heads == adapter.heads
    model, _ = base_of(base, torch.bfloat16)
    fresh = fresh_model(type(model), model.config, model.state_dict())
    assert fresh.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(fresh.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_a_base_in_a_folder_has_the_same_name_from_everywhere(folders, tmp_path, monkeypatch):
    base = folders("llama")
    monkeypatch.chdir(base.parent)
    to_peft(trained(base, **EXACT), base.name, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == str(base.resolve())
