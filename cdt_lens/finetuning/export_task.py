"""Write the task into an exported folder: the tokenizer that makes its prompts, a file, a README.

1. `tokenizer(text)` of transformers adds what the class of the tokenizer adds, which need not be
   what the prompts of the training began with. The saved tokenizer adds BOS if the prompts had it
   and nothing otherwise, and it is read back and compared.
2. `cdt_task.json` holds the `TaskCard`, which `cdt-lens predict` reads.
3. `README.md` says the same in words, with code that needs transformers alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import cdt_lens
from cdt_lens.core.errors import InputError
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.tasks.card import TaskCard
from cdt_lens.tasks.task import WordIds

TASK_FILE = "cdt_task.json"


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
    (folder / "README.md").write_text(_readme(adapter, base, lora), encoding="utf-8")


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


def _readme(adapter: Adapter, base: str, lora: bool) -> str:
    name = adapter.provenance.task.removesuffix("/train")
    holds = (
        f"a LoRA for the model `{base}`, in the files of peft, that changes" if lora
        else f"the model `{Path(base).name}` with"
    )  # fmt: skip
    about = (
        f"# {Path(base).name}, adapted to {name}\n\n"
        f"`cdt-lens export` (cdt_lens {cdt_lens.__version__}) wrote this folder. It holds {holds} "
        f"{adapter.elements:,} elements{'' if lora else ' trained'} (scope `{adapter.scope}`). "
        f"Every other weight is bit-identical.\n"
    )
    if adapter.task is None:
        return about + _NO_TASK
    card = adapter.task
    return about + _TASK.format(
        name=card.name, labels=_label_lines(card), template=json.dumps(card.template),
        prefix=f" Few-shot examples of {len(card.prefix)} characters stand before it "
        f"(`prefix` in `{TASK_FILE}`)." if card.prefix else "",
        bos=f"The token ids {list(card.bos_ids)} (BOS) stand before the text" if card.bos_ids
        else "No token stands before the text",
        answer="the model's next tokens are" if _splits(card) else "the model's next token is",
        longest=card.longest, file=TASK_FILE,
    ) + _usage(card, lora)  # fmt: skip


def _label_lines(card: TaskCard) -> str:
    lines = [
        f"| {label} | {json.dumps(card.verbalizer[label], ensure_ascii=False)} | {_shown(word)} |"
        for label, word in card.verbalizer_ids.items()
    ]
    return "\n".join(lines)


def _splits(card: TaskCard) -> bool:
    return any(isinstance(word, tuple) for word in card.verbalizer_ids.values())


def _shown(word: WordIds) -> str:
    return ", ".join(map(str, word)) if isinstance(word, tuple) else str(word)


def _usage(card: TaskCard, lora: bool) -> str:
    if not card.verbalizer or not card.columns:
        return _NO_WORDS
    row = ", ".join(f'{json.dumps(column)}: "Put your text here."' for column in card.columns)
    code = _CODE.replace("SCORES", _OF_WORDS if _splits(card) else _OF_TOKENS)
    code = code.replace("ROW", f"{{{row}}}").replace("FILE", TASK_FILE)
    return code + (_PEFT if lora else _PREDICT)


_NO_TASK = """
The prompts of its training were given as token ids, so this folder does not say how to make them of
text.
"""
_NO_WORDS = """
The answers differ from prompt to prompt, so there are no label words to compare.
"""
_TASK = """
## The task

Task `{name}`. The prompt is this template (as a JSON string), with the columns in braces filled in,
and {answer} the answer: {template}{prefix}

| label | word | token id |
|---|---|---|
{labels}

{bos}. The tokenizer in this folder does this by itself. The longest prompt of the training had
{longest} tokens. `{file}` holds all of this.
"""
_CODE = """
## How to ask it

Run this in the folder:

```python
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = Path(".")
task = json.loads((folder / "FILE").read_text("utf-8"))
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder).eval()

row = ROW
prompt = task["prefix"] + task["template"].format_map(row)
SCORES
print(max(scores, key=scores.get), scores)
```
"""
_OF_TOKENS = """with torch.no_grad():
    logits = model(tokenizer(prompt, return_tensors="pt").input_ids).logits[0, -1]
prior = task["prior"] or {}
scores = {
    label: float(logits[token]) - prior.get(label, 0.0)
    for label, token in task["verbalizer_ids"].items()
}"""
_OF_WORDS = """prompt_ids = tokenizer(prompt).input_ids
prior = task["prior"] or {}
scores = {}
for label, word in task["verbalizer_ids"].items():
    # The score of a word is the sum of the log-probabilities of its tokens.
    word = word if isinstance(word, list) else [word]
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + word[:-1]])).logits[0, len(prompt_ids) - 1 :]
    logs = logits.float().log_softmax(-1)
    scores[label] = float(sum(logs[i, token] for i, token in enumerate(word)))
    scores[label] -= prior.get(label, 0.0)"""
_PEFT = """
transformers reads the LoRA with the base model if peft is installed.
"""
_PREDICT = """
`cdt-lens predict FOLDER --text "..."` and `cdt-lens predict FOLDER --file rows.csv` do the same and
print CSV.
"""
