"""A small task for training the tiny models, and which elements of a model a scope may change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cdt_lens.models.heads import Head
from cdt_lens.models.view import ModelView
from cdt_lens.models.weights import named_weights
from cdt_lens.tasks.task import Examples, Task
from helpers.hf_layout import ROLES, home, kv_head_of, norms
from helpers.tiny_tasks import ANSWERS, LABELS, examples

HEADS = ("L0H1", "L1H2")  # of different key/value groups, in different layers
# The biases besides those of q, k, v and of norms.
_BIASES = {
    **dict.fromkeys(("gpt2", "gpt_neox", "gpt_neo", "opt"), ("b_O", "b_in", "b_out")),
    "gptj": ("b_in", "b_out", "b_U"),
}
QUICK: dict[str, Any] = {
    "learning_rate": 1e-2, "weight_decay": 0.5, "batch_size": 5, "epochs": 2, "progress": False,
}  # fmt: skip


def split(n: int, seed: int, name: str) -> Examples:
    """`n` prompts of 3 to 9 tokens, the labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (n,), generator=generator).tolist()
    return examples(lengths, [LABELS[i % 3] for i in range(n)], seed=seed, name=name)


def task(name: str = "tiny", *, train: int = 13, valid: int = 7, seed: int = 10) -> Task:
    """A task with a verbalizer; without validation examples the last epoch is the one kept."""
    return Task(
        name=name, labels=LABELS, verbalizer={k: f" w{v}" for k, v in ANSWERS.items()},
        verbalizer_ids=ANSWERS, template="{text}", train=split(train, seed, f"{name}/train"),
        valid=split(valid, seed + 1, f"{name}/valid"), test=split(3, seed + 2, f"{name}/test"),
        content_free=split(0, 0, f"{name}/free"),
    )  # fmt: skip


def values(view: ModelView) -> dict[str, Tensor]:
    """A copy of every weight, by TransformerLens name."""
    return {name: value.clone() for name, value in named_weights(view).items()}


def may_move(
    view: ModelView, model: PreTrainedModel, scope: str, heads: Iterable[Head]
) -> dict[str, Tensor]:
    """For each named weight, True where `scope` trains it; from Hugging Face's layout alone."""
    masks = {n: torch.zeros_like(v, dtype=torch.bool) for n, v in named_weights(view).items()}
    if scope == "full":
        for name, mask in masks.items():
            mask[:] = _in_checkpoint(model, name)
        return masks
    if scope == "lora":
        for name, mask in masks.items():
            mask[:] = name.endswith(("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O"))
        return masks
    for name in norms(model).values():
        masks[name][:] = True
    for head in heads:
        for role in ROLES:
            index = kv_head_of(model, head.head) if role[-1] in "KV" else head.head
            if home(model, role, head.layer, index) is not None:
                masks[f"blocks.{head.layer}.attn.{role}"][index] = True
    return masks


def _in_checkpoint(model: PreTrainedModel, name: str) -> bool:
    """Whether the family has this weight: HookedTransformer and the bridge add biases of zero."""
    role = name.rsplit(".", 1)[-1]
    if not role.startswith("b") or name in norms(model).values():
        return True
    if role in ROLES:
        return home(model, role, 0, 0) is not None
    return role in _BIASES.get(model.config.model_type, ())


def assert_moved_only(
    before: dict[str, Tensor], after: dict[str, Tensor], masks: dict[str, Tensor]
) -> None:
    """Outside the masks every element has the same bits; inside, nearly all are others."""
    assert before.keys() == after.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(after[name][~mask], before[name][~mask]), name
        if bool(mask.any()):
            moved = (after[name] != before[name])[mask].double().mean()
            assert float(moved) > least_moved(name), f"{name}: only {moved:.0%} moved"


def least_moved(name: str) -> float:
    """Share of a weight that training moves at least: decay leaves a bias without gradient."""
    if name in ("unembed.b_U", "lm_head.bias"):  # only the labels' words have one
        return 0.01
    return 0.8 if name.endswith(("mlp.b_in", "fc1.bias")) else 0.9  # ReLUs may be off
