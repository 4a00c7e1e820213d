"""The code on the pages of the documentation, and a small model on which it runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import cdt_lens as cdt
from cdt_lens.experiments import demo_model

_FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """Return the language and the code of each block of a page, in order."""
    return _FENCE.findall(page.read_text("utf-8"))


def commands(block: str) -> list[list[str]]:
    """Return the words of each `cdt-lens` command of a block of bash, without `cdt-lens`."""
    found = []
    for line in re.split(r"&&|\n", block.replace("\\\n", " ")):
        words = shlex.split(line, comments=True)
        if words[:1] == ["cdt-lens"]:
            found.append(words[1:])
        elif "cdt_lens.cli" in words:  # of `accelerate launch --module`
            found.append(words[words.index("cdt_lens.cli") + 1 :])
    return found


def save_demo(folder: Path) -> Path:
    """Save what `cdt-lens demo` saves: `model`, and `proxy`, which has learnt the task a little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_model, "REVIEWS", 30)
        demo_model.make_demo_model(folder / "model", distances=(0.3, 0.8), steps=40)
    model = cdt.load_model(folder / "model")
    task = cdt.load_task("pseudo-sentiment", "source", tokenizer=model.tokenizer, n=(240, 30, 0))
    tuned = cdt.finetune(
        model, task, scope="full", epochs=4, batch_size=32, learning_rate=2e-3, progress=False
    )
    cdt.export(tuned.adapter, folder / "model", folder / "proxy")
    return folder
