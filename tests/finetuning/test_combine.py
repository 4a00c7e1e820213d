"""Sums of adapters: each change with its weight, the overlap told, the base checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.saved import TEMPLATE, VERBALIZER, save_model, write_csv
from helpers.shared import models
from helpers.tiny_models import prompts
from helpers.tiny_training import QUICK, task, values
from helpers.wrapped import view

import cdt_lens as cdt
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.finetuning.combine import combine, overlap
from cdt_lens.finetuning.finetune import finetune
from cdt_lens.finetuning.model_card import model_card

ONE, OTHER = ("L0H1", "L1H2"), ("L0H0", "L1H2")


@models(("llama", "gpt2"))
def test_the_sum_is_the_base_and_each_weighted_change(family, backend, tokenizer_folder, tmp_path):
    seen = view(family, backend, tokenizer_folder, torch.float32)
    seen.logits(prompts())
    options = {**QUICK, "norms": "none"}
    one = finetune(seen, task(), heads=ONE, channels=2, **options).adapter
    other = finetune(seen, task("second", seed=30), heads=OTHER, **options, kv="skip").adapter
    third = finetune(seen, task("third", seed=40), scope="norms", **QUICK).adapter
    base = values(seen)
    changed = []
    for adapter in (one, other, third):
        with adapter.applied(seen):
            changed.append(values(seen))
    parts, weights = (one, other, third), (1.0, 0.5, -2.0)
    both = combine(seen, parts, weights)
    both = type(both).load(both.save(tmp_path / "adapter"))
    with both.applied(seen):
        found = values(seen)
    for name, value in base.items():
        expected = value + sum(
            w * (own[name] - value) for w, own in zip(weights, changed, strict=True)
        )
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)
        if all(torch.equal(own[name], value) for own in changed):
            assert torch.equal(found[name], value)
    shared = overlap(parts).set_index("weight")["heads"]
    assert shared["blocks.1.attn.W_Q"] == [2] and "blocks.0.attn.W_Q" not in shared
    assert both.scope == "combined" and both.provenance.options["overlap"] > 0


def test_the_card_of_a_sum_counts_the_examples_of_all(tmp_path: Path):
    place = save_model(tmp_path / "tiny")
    model = cdt.load_model(place, backend="bridge")
    adapters = []
    for name, size in (("A", 13), ("B", 40)):
        path = write_csv(tmp_path / f"{name}.csv", size, size)
        data = cdt.task_from_files(
            {"train": path}, tokenizer=model.tokenizer, template=TEMPLATE, verbalizer=VERBALIZER,
            name=name,
        )  # fmt: skip
        options = {**QUICK, "seed": size, "epochs": 1}
        adapters.append(finetune(model, data, scope="norms", **options).adapter)
    both = combine(model, adapters)
    assert sum(both.provenance.examples.values()) == 53 and both.provenance.seed is None
    assert both.total_parameters == adapters[0].total_parameters
    assert both.task is not None and both.task.name == "A + B"
    assert both.task.longest == max(a.task.longest for a in adapters)
    page = model_card(both, str(place), "checkpoint").content
    assert "adapted to A + B" in page and "| training examples | 53 (" in page
    assert f"of {both.total_parameters:,} (" in page
    other = replace(adapters[1], task=replace(adapters[1].task, template="{text} w6"))
    apart = combine(model, [adapters[0], other])
    assert apart.task is None
    assert "make their prompts in different ways" in model_card(apart, str(place), "lora").content


def test_what_cannot_be_combined_is_refused(tokenizer_folder):
    seen = view("llama", "bridge", tokenizer_folder, torch.float32)
    adapter = finetune(seen, task(), heads=ONE, **QUICK).adapter
    with pytest.raises(InputError, match="two or more adapters and a weight for each, got 1 and 1"):
        combine(seen, [adapter])
    with pytest.raises(InputError, match="got 2 and 1"):
        combine(seen, [adapter, adapter], [1.0])
    foreign = view("qwen3", "bridge", tokenizer_folder, torch.float32)
    with pytest.raises(ArtifactError, match="weights"):
        combine(foreign, [adapter, adapter])
