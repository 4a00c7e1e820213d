"""The plain tools that `benchmarks/training.py` compares with: transformers, and peft's LoRA.

They train with torch's fused AdamW, the default of transformers, on the same batch. The loss is
cross-entropy over the label tokens at the last position. `logits_to_keep=1` computes no other
logits, so that the comparison of memory is one of training and not of logits. Attention is the
default of transformers (sdpa).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cdt_lens.tasks.task import Task

PLAIN = ("plain-full", "plain-lora")
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def load(model: str) -> nn.Module:
    """Load a model in float32, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


class PlainStepper:
    """A loop over one batch, as a user of transformers would write it.

    Args:
        model: The model. LoRA adds its layers to it.
        kind: "plain-full", or "plain-lora" for rank 8 on q, k, v and o.
        task: The task. All prompts have the same length.
    """

    def __init__(self, model: Any, kind: str, task: Task) -> None:
        if kind == "plain-lora":
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=_PROJECTIONS)
            model = get_peft_model(model, config).eval()
        self.model = model
        self.batch = next(task.train.batches(len(task.train)))
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.01, fused=True)

    def ready(self, *, checkpointed: bool = False) -> AbstractContextManager[None]:
        """The context of the steps."""
        if checkpointed:
            self.model.gradient_checkpointing_enable()
            self.model.train()  # transformers checkpoints in training mode only
        return nullcontext()

    def step(self) -> None:
        """Make one step."""
        self.optimizer.zero_grad(set_to_none=True)
        self._loss().backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()

    def _loss(self) -> Tensor:
        out = self.model(input_ids=self.batch.tokens, use_cache=False, logits_to_keep=1)
        labels = out.logits[:, -1].gather(1, self.batch.candidates)
        first = torch.zeros(len(labels), dtype=torch.long)  # the answer is the first candidate
        return nn.functional.cross_entropy(labels, first)

    def elements(self) -> tuple[int, int]:
        """Return the number of trained elements, and of elements of the optimiser's state."""
        state = self.optimizer.state.values()
        kept = sum(v.numel() for moments in state for v in moments.values() if v.numel() > 1)
        return sum(p.numel() for p in self.trained), kept
