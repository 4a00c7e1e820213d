"""Checkpoints know what a model computes, and not only its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_tasks import examples
from helpers.tiny_training import HEADS, QUICK, task
from helpers.wrapped import BACKENDS, needs_hooked, wrap
from torch import Tensor

import cdt_lens as cdt
from cdt_lens.scoring.sweep import _Sweep

QUIET: dict[str, Any] = {"progress": False}


class Interrupted(Exception):
    """Ends a call between two batches."""


def scaled(model: Any, scale: float) -> None:
    for block in model.blocks:
        block.attn.attn_scale = scale


def two_then_stop() -> Any:
    real, done = _Sweep._batch, []

    def batch(self: Any, *args: Any) -> Any:
        if len(done) == 2:
            raise Interrupted
        done.append(1)
        return real(self, *args)

    return batch


@needs_hooked
def test_a_sweep_is_not_continued_by_a_model_with_other_settings(
    tmp_path: Path, tokenizer_folder: str
):
    model, file = wrap("llama", "hooked", tokenizer_folder, torch.float32), tmp_path / "sweep.json"
    data = examples()
    baseline = cdt.mean_activations(model, data, **QUIET)

    def run(checkpoint: Path | None) -> Tensor:
        scores = cdt.exact_ablation(
            model, data, baseline, batch_size=2, checkpoint=checkpoint, **QUIET
        )
        return scores.values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cdt_lens.scoring.sweep._Sweep._batch", two_then_stop())
        with pytest.raises(Interrupted):
            run(file)
    scaled(model, 1.0)
    with pytest.raises(cdt.InputError, match="a model that gives other logits"):
        run(file)
    file.unlink()
    assert torch.equal(run(file), run(None))
    scaled(model, 2.0)  # the checkpoint is finished: nothing is lost
    assert torch.equal(run(file), run(None))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_checkpoint_is_refused_while_the_caller_has_hooks(
    backend: str, tmp_path: Path, tokenizer_folder: str
):
    model = wrap("llama", backend, tokenizer_folder, torch.float32)
    model.blocks[0].register_forward_pre_hook(lambda _module, _args: None)
    data, file = examples(), tmp_path / "kept.json"
    baseline = cdt.mean_activations(model, data, **QUIET)
    with pytest.raises(cdt.InputError, match="checkpoint: the model has hooks of your own"):
        cdt.score_heads(model, data, baseline, checkpoint=file, **QUIET)
    with pytest.raises(cdt.InputError, match="checkpoint: the model has hooks of your own"):
        cdt.finetune(model, task(), heads=HEADS, checkpoint=file, **QUICK)
    assert not file.exists()


@needs_hooked
def test_training_is_not_continued_by_a_model_with_other_settings(
    tmp_path: Path, tokenizer_folder: str
):
    model, file = wrap("llama", "hooked", tokenizer_folder, torch.float32), tmp_path / "kept.json"
    settings: dict[str, Any] = {"heads": HEADS, "checkpoint": file, "keep_checkpoint": True}
    cdt.finetune(model, task(), **settings, **QUICK)
    scaled(model, 1.0)
    with pytest.raises(cdt.InputError, match="a model that gives other logits"):
        cdt.finetune(model, task(), **settings, **QUICK)
