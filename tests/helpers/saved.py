"""A tiny model with a tokenizer in a Hugging Face folder, and a task in CSV files, for runs."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from helpers.tiny_models import D_VOCAB, build

TEMPLATE = "{text} w3"
VERBALIZER = {"bad": " w10", "fine": " w11", "good": " w12"}


def save_model(folder: Path, family: str = "llama") -> Path:
    """Save a tiny model of `family` and a tokenizer that knows the words w3 to w127."""
    model = build(family, torch.float32)
    model.save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, D_VOCAB)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<unk>", bos_token="<s>",
        eos_token="</s>",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_csv(path: Path, size: int, seed: int) -> Path:
    """`size` rows of random words, the labels in turn."""
    draw = random.Random(seed)
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for i in range(size):
            words = [f"w{draw.randrange(20, 120)}" for _ in range(draw.randrange(2, 9))]
            rows.writerow([" ".join(words), list(VERBALIZER)[i % 3]])
    return path


def write_task(folder: Path) -> dict[str, Path]:
    """Train, valid and test files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"train": 24, "valid": 12, "test": 6}
    return {
        split: write_csv(folder / f"{split}.csv", size, seed)
        for seed, (split, size) in enumerate(sizes.items())
    }
