"""Write the model card of an exported checkpoint, a LoRA or an adapter: its `README.md`.

1. The metadata are those of `huggingface_hub.ModelCardData`, which the Hugging Face hub reads: base
   model, tags and results. Licence, languages and data sets are what the user gives, or left out.
2. The text says from the adapter's provenance what was trained on what, and shows the accuracies
   before and after with their intervals.
3. It ends with the task and with code that asks the model, in plain transformers and in `cdt_lens`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import cdt_lens
from cdt_lens.core.display import few
from cdt_lens.finetuning.adapter import Adapter
from cdt_lens.finetuning.score import Estimate
from cdt_lens.tasks.card import TaskCard
from cdt_lens.tasks.task import WordIds

Kind = Literal["checkpoint", "lora", "adapter"]

CARD_FILE, TASK_FILE = "README.md", "cdt_task.json"
TAG = "cdt-lens"  # by which a folder of this package is recognised
_LIBRARIES = {"checkpoint": "transformers", "lora": "peft", "adapter": "cdt_lens"}


def model_card(adapter: Adapter, base: str, kind: Kind) -> ModelCard:
    """Return the model card of a folder that holds an adapter in some form.

    Args:
        adapter: the adapter.
        base: hub name, folder or file of the base model.
        kind: whether the folder holds the whole model, a LoRA of peft, or the adapter's own files.

    Returns:
        The card. Its code reads the present folder.
    """
    title = f"{Path(base).name}, adapted to {_task_name(adapter)}"
    parts = [f"# {title}\n\n", _about(adapter, base, kind), _training(adapter, base)]
    parts += [*_results(adapter), _prompts(adapter), *_asking(adapter, kind), _loading(base, kind)]
    metadata = _metadata(adapter, base, kind, title)
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "".join(parts))


def published(
    card: ModelCard, repo: str, *, base_model: str | None = None, license: str | None = None,
    language: Sequence[str] = (), datasets: Sequence[str] = (),
) -> ModelCard:  # fmt: skip
    """Return a card for a repository: with what the user gives, and code that reads the repository.

    Args:
        card: the card of the folder, which the user may have edited.
        repo: full name of the repository.
        base_model: hub name of the base model. None keeps what the card says.
        license: licence. None keeps what the card says.
        language: codes of the languages. Nothing keeps what the card says.
        datasets: hub names of the data sets. Nothing keeps what the card says.

    Returns:
        A new card.
    """
    new = ModelCard(str(card))
    new.text = new.text.replace(_HERE, _download(repo))
    given = {"license": license, "language": list(language), "datasets": list(datasets)}
    if base_model is not None:
        new.text = new.text.replace(_base_line(_shown_base(new)), _base_line(base_model))
        given["base_model"] = base_model
    for name, value in given.items():
        if value:
            new.data[name] = value
    return new


# ---------------------------------------------------------------------- metadata


def _metadata(adapter: Adapter, base: str, kind: Kind, title: str) -> ModelCardData:
    results = [
        EvalResult(
            task_type="text-classification", dataset_type=score.task,
            dataset_name=f"{score.task} ({score.role})", dataset_config=score.role,
            dataset_split=score.split, metric_type="accuracy", metric_value=score.after[0],
        )
        for score in adapter.scores
    ]  # fmt: skip
    return ModelCardData(
        base_model=base if is_hub_name(base) else None,
        library_name=_LIBRARIES[kind], tags=[TAG, "mechanistic-interpretability"],
        pipeline_tag=None if kind == "adapter" else "text-generation",
        metrics=["accuracy"] if results else None,
        model_name=title if results else None, eval_results=results or None,
    )  # fmt: skip


def is_hub_name(base: str) -> bool:
    """Return whether a base model is named by its hub name, such as "openai-community/gpt2".

    Args:
        base: hub name, folder or file.
    """
    name = base.replace("\\", "/")
    return name.count("/") == 1 and all(name.split("/")) and not Path(base).exists()


def _task_name(adapter: Adapter) -> str:
    parts = adapter.provenance.task.split(" + ")  # of a combined adapter
    return " + ".join(part.removesuffix("/train") for part in parts)


# ---------------------------------------------------------------------- text


def _about(adapter: Adapter, base: str, kind: Kind) -> str:
    changes = f"{adapter.parameters:,} elements (scope `{adapter.scope}`)"
    name = _base_name(base)
    holds = {
        "checkpoint": f"the model `{name}` with {changes} trained",
        "lora": f"a LoRA for the model `{name}`, in the files of peft, that changes {changes}",
        "adapter": f"an adapter of cdt_lens for the model `{name}`, that changes {changes}",
    }[kind]
    return (
        f"cdt_lens {cdt_lens.__version__} wrote this page. The folder holds {holds}. Every other "
        "weight is bit-identical to those it was trained from, whose sha256 stands below.\n"
    )


def _training(adapter: Adapter, base: str) -> str:
    origin = adapter.provenance
    counts = ", ".join(f"{n} {label}" for label, n in origin.examples.items())
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    rows = {
        "base model": f"`{_base_name(base)}`, sha256 of the weights `{origin.model_hash[:12]}`",
        "task": _task_name(adapter),
        "training examples": f"{sum(origin.examples.values())} ({counts})",
        "scope": f"`{adapter.scope}`",
        "heads": few(adapter.heads, 40) if adapter.heads else "no single heads",
        "changed parameters": _share(adapter),
        "seed": "" if origin.seed is None else str(origin.seed),
        "versions": versions,
    }
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value]
    return "\n## Training\n\n| | |\n|---|---|\n" + "\n".join(lines) + "\n"


def _share(adapter: Adapter) -> str:
    total = adapter.total_parameters
    if not total:
        return f"{adapter.parameters:,}"
    return f"{adapter.parameters:,} of {total:,} ({adapter.parameters / total:.3%})"


def _results(adapter: Adapter) -> Iterator[str]:
    if not adapter.scores:
        return
    lines = [
        f"| {s.role} | {_cell(s.task)} | {s.split} | {s.examples} | {_interval(s.before)} | "
        f"{_interval(s.after)} |"
        for s in adapter.scores
    ]
    yield _SCORES + "\n".join(lines) + "\n"
    if any(score.split == "validation" for score in adapter.scores):
        yield _CHOSEN


def _interval(value: Estimate) -> str:
    return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _prompts(adapter: Adapter) -> str:
    card = adapter.task
    if card is None:
        return _SEVERAL_TASKS if adapter.scope == "combined" else _NO_TASK
    return _TASK.format(
        name=card.name, labels=_label_lines(card), template=json.dumps(card.template),
        answer="the model's next tokens are" if _splits(card) else "the model's next token is",
        prefix=f" Few-shot examples of {len(card.prefix)} characters stand before it."
        if card.prefix else "",
        bos=f"The token ids {list(card.bos_ids)} (BOS) stand before the text" if card.bos_ids
        else "No token stands before the text",
        longest=card.longest,
    )  # fmt: skip


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


def _asking(adapter: Adapter, kind: Kind) -> Iterator[str]:
    """Yield the section on how to ask the model, for folders that transformers can load."""
    card = adapter.task
    if card is None or kind == "adapter":
        return
    if not card.verbalizer or not card.columns:
        yield _NO_WORDS
        return
    row = ", ".join(f'{json.dumps(column)}: "Put your text here."' for column in card.columns)
    code = _CODE.replace("SCORES", _OF_WORDS if _splits(card) else _OF_TOKENS)
    yield code.replace("ROW", f"{{{row}}}").replace("FILE", TASK_FILE).replace("HERE\n", _HERE)
    yield _PEFT if kind == "lora" else _PREDICT


def _loading(base: str, kind: Kind) -> str:
    code = _IN_CDT_LENS[kind]
    return code.replace("HERE\n", _HERE).replace("BASE\n", _base_line(_base_name(base)))


def _base_name(base: str) -> str:
    """Return the name of the base model, without the folders of the machine."""
    return base if is_hub_name(base) else Path(base).name


def _base_line(name: str) -> str:
    return f"base = {json.dumps(name)}\n"


def _shown_base(card: ModelCard) -> str:
    """Return the base model that the code of a card names, or ""."""
    lines = [line for line in card.text.splitlines() if line.startswith('base = "')]
    return json.loads(lines[0].removeprefix("base = ")) if lines else ""


def _download(repo: str) -> str:
    return (
        "from huggingface_hub import snapshot_download\n\n"
        f"folder = Path(snapshot_download({json.dumps(repo)}))\n"
    )


_HERE = 'folder = Path(".")\n'
_SCORES = """
## Results

Accuracy with 95 % intervals.

| language | task | split | examples | before | after |
|---|---|---|---|---|---|
"""
_CHOSEN = """
The epoch was chosen on the target's validation examples, so its accuracy there is too high.
"""
_NO_TASK = """
The prompts of its training were given as token ids, so this folder does not say how to make them of
text.
"""
_SEVERAL_TASKS = """
The adapters that were added make their prompts in different ways, or got them as token ids, so this
folder does not say how to make them of text.
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

{bos}. The longest prompt of the training had {longest} tokens.
"""
_CODE = """
The tokenizer in this folder gives these tokens by itself. `FILE` holds all of this.

## How to ask it

```python
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE
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
_IN_CDT_LENS: dict[Kind, str] = {
    "checkpoint": """
## In cdt_lens

```python
from pathlib import Path

import cdt_lens as cdt

HERE
model = cdt.load_model(folder)
```
""",
    "lora": """
## In cdt_lens

```python
from pathlib import Path

import cdt_lens as cdt

HERE
BASE
adapter = cdt.from_peft(folder, base)
model = cdt.load_model(base)
with adapter.applied(model):
    ...
```
""",
    "adapter": """
## How to load it

Install `cdt_lens`. After `export`, transformers alone loads the folder `exported`.

```python
from pathlib import Path

import cdt_lens as cdt

HERE
BASE
adapter = cdt.Adapter.load(folder)
model = cdt.load_model(base)
with adapter.applied(model):
    ...
cdt.export(adapter, base, "exported")
```
""",
}
