"""Write the task into an exported folder: the tokenizer that makes its prompts, a file, a README.

1. `tokenizer(text)` of transformers adds what the class of the tokenizer adds, which need not be
   what the prompts of the training began with. The saved tokenizer adds BOS if the prompts had it
   and nothing otherwise, and it is read back and compared.
2. `cdt_task.json` holds the `TaskCard`, which `cdt-lens predict` reads.
3. `README.md` is the model card (`model_card`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from cdt_lens.core.errors import InputError
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.model_card import CARD_FILE, TASK_FILE, model_card
from cdt_lens.tasks.card import TaskCard


def write_task(
    adapter: Adapter, tokenizer: Any, base: str, folder: Path, *, lora: bool = False
) -> None:
    """Write the tokenizer, the task and the README of an exported checkpoint or LoRA.

    Args:
        adapter: the adapter.
        tokenizer: the tokenizer of the base model. Its post-processor may be replaced.
        base: name of the base model.
        folder: the folder of the checkpoint.
        lora: whether the folder holds a LoRA of peft in place of the whole model.

    Raises:
        InputError: the tokenizer cannot be saved so that it gives the tokens of the training.
    """
    card = adapter.task
    if card is None:
        tokenizer.save_pretrained(folder)
    else:
        _save_tokenizer(tokenizer, card, folder)
        card.save(folder / TASK_FILE)
    model_card(adapter, base, "lora" if lora else "checkpoint").save(folder / CARD_FILE)


def _save_tokenizer(tokenizer: Any, card: TaskCard, folder: Path) -> None:
    texts = card.sample_prompts()
    plain = [_ids(tokenizer, text, add_special_tokens=False) for text in texts]
    expected = [[*card.bos_ids, *ids] for ids in plain]
    for _ in _ways_to_save(tokenizer, card.bos_ids, folder):
        again = AutoTokenizer.from_pretrained(folder)
        if [_ids(again, text) for text in texts] == expected:
            return
    raise InputError(
        f"{type(tokenizer).__name__} cannot be saved so that it gives the tokens of the "
        f"training, which begin with {list(card.bos_ids)}. Nothing was written. Please report the "
        "model's family."
    )


def _ids(tokenizer: Any, text: str, **options: bool) -> list[int]:
    return list(tokenizer(text, verbose=False, **options).input_ids)


def _ways_to_save(tokenizer: Any, bos_ids: Sequence[int], folder: Path) -> Iterator[None]:
    """Save the tokenizer as it is, then with a post-processor, then as a class that keeps it."""
    tokenizer.save_pretrained(folder)
    yield
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    names = tokenizer.convert_ids_to_tokens(list(bos_ids))
    first, second = (" ".join([*(f"{n}:{i}" for n in names), f"${'AB'[i]}:{i}"]) for i in (0, 1))
    backend.post_processor = TemplateProcessing(
        single=first, pair=f"{first} {second}",
        special_tokens=list(zip(names, bos_ids, strict=True)),
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    yield
    # Some classes make a post-processor of their own when they are loaded.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    yield
