"""Whose hooks are whose: the caller's, ours, and those of other libraries."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook
from helpers.shared import shared
from helpers.tiny_models import prompts
from helpers.tiny_tasks import examples, many
from helpers.wrapped import BACKENDS, wrap

import cdt_lens as cdt
from cdt_lens.core.errors import InputError
from cdt_lens.models.caller_hooks import caller_hooks, lifted


def read(*_: Any, name: str = "") -> None:
    """A caller's hook that changes nothing."""


@pytest.fixture
def view(tokenizer_folder: str) -> Any:
    return shared("llama", "bridge", tokenizer_folder, torch.float32)


def test_our_own_hooks_are_not_the_callers(view: Any):
    seen = []
    hooks = {("z", 0): lambda z: seen.append(caller_hooks(view.tl))}
    with view.hooked(hooks):
        view.run(prompts())
    assert seen == [()]


def test_a_recorded_run_copies_no_stream_without_hooks_of_the_caller(view: Any, monkeypatch):
    """Copies guard against hooks that edit in place; our own hooks do not."""
    copies = []
    clone = torch.clone
    monkeypatch.setattr(torch, "clone", lambda value: copies.append(1) or clone(value))
    view.run(prompts(), [("z", 0), ("pattern", 1)])
    assert copies == []
    handle = view.blocks[0].register_forward_hook(read)
    try:
        view.run(prompts(), [("z", 0)])
    finally:
        handle.remove()
    assert len(copies) == view.n_layers + 1


@pytest.mark.parametrize(
    ("hook", "own"),
    [
        (read, True),
        (partial(read, name="mine"), True),
        (partial(partial(read), name="mine"), True),
        (ModelHook().post_forward, False),
        (partial(ModelHook.post_forward, ModelHook()), False),
        (partial(partial(torch.nn.functional.relu)), False),
    ],
)
def test_a_partial_belongs_to_whoever_wrote_its_function(view: Any, hook: Any, own: bool):
    handle = view.blocks[1].register_forward_hook(hook)
    try:
        assert bool(caller_hooks(view.tl)) == own
        with lifted(view.tl):
            assert caller_hooks(view.tl) == ()
    finally:
        handle.remove()
    assert caller_hooks(view.tl) == ()


def first_row(z: torch.Tensor, hook: Any) -> torch.Tensor:
    z = z.clone()
    z[0, :, 1] = 0
    return z


@pytest.mark.parametrize("backend", BACKENDS)
def test_edits_of_single_rows_are_refused(backend: str, tokenizer_folder: str):
    """One prompt takes a row for each head: an edit of row 0 would be missing in all others."""
    model, data = (
        wrap("llama", backend, tokenizer_folder, torch.float32),
        examples([7], ["positive"]),
    )
    baseline = cdt.mean_activations(model, many(6), progress=False)
    model.add_hook("blocks.0.attn.hook_z", first_row)
    for call in (
        lambda: cdt.score_heads(model, data, baseline, rules="ablation", progress=False),
        lambda: cdt.mean_activations(model, data, progress=False),
        lambda: cdt.evaluate(model, data),
    ):
        with pytest.raises(InputError, match="treat the rows of a batch differently"):
            call()
