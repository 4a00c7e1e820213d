"""Ask an exported model about new rows, with transformers alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cdt_lens.core.errors import InputError
from cdt_lens.finetuning.model_card import TASK_FILE
from cdt_lens.models.hugging_face import load_hugging_face, load_tokenizer, third_party_noise_off
from cdt_lens.models.loading import default_device
from cdt_lens.models.positions import longrope_limit
from cdt_lens.tasks.card import TaskCard
from cdt_lens.tasks.task import WordIds


def load_card(folder: str | Path) -> TaskCard:
    """Read the task of an exported folder.

    Args:
        folder: a folder that `export` wrote.

    Returns:
        The task.

    Raises:
        InputError: there is no such folder, or it holds no task.
        ArtifactError: its file is damaged.
    """
    path = Path(folder) / TASK_FILE
    if not Path(folder).is_dir():
        raise InputError(
            f"{folder}: no such folder. Name one that cdt-lens export or adapt wrote; adapt writes "
            "no model where nothing was learnt."
        )
    if not path.is_file():
        raise InputError(
            f"{folder}: holds no {TASK_FILE}. Name a folder that cdt-lens export wrote; folders of "
            "cdt_lens 0.3, of tasks whose prompts were made by hand, and of combined adapters with "
            "different prompts, have none."
        )
    return TaskCard.load(path)


def predict(
    folder: str | Path,
    rows: Sequence[Mapping[str, object]],
    *,
    places: Sequence[str] | None = None,
    batch_size: int = 16,
) -> pd.DataFrame:
    """Predict the labels of rows with an exported model.

    Args:
        folder: a folder that `export` wrote.
        rows: cells by column, with every column of the template.
        places: name of each row in error messages. None counts the rows from 1.
        batch_size: number of rows per forward pass.

    Returns:
        One row for each given row: `prediction`, and by label `p(label)`, its probability among the
        labels, from 0 to 1. Words of several tokens are compared by their log-probabilities.

    Raises:
        InputError: there is no such folder, it holds no task or no model, a column is missing, or a
            prompt is longer than the model's context.
        ArtifactError: the file of the task is damaged.
    """
    card = load_card(folder)
    where = places or [f"row {number}" for number in range(1, len(rows) + 1)]
    with third_party_noise_off():
        prompts = card.format(load_tokenizer(folder)).unlabelled(rows, where)
        model, _ = load_hugging_face(folder, dtype=_dtype_of(Path(folder)))
    words = list(card.verbalizer_ids.values())
    behind = max(len(word) - 1 if isinstance(word, tuple) else 0 for word in words)
    _check_lengths(prompts, where, model.config, behind)
    model = model.to(default_device()).eval()
    scores = _word_scores if behind else _logits
    # Prompts of similar length share a batch: less padding, and fewer positions to unembed.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    limit = longrope_limit(model.config)
    alike = groupby(order, lambda row: limit is not None and len(prompts[row]) + behind > limit)
    logits = torch.empty(len(prompts), len(words))
    with _unembedding_in_float32(model):
        for group in (list(rows) for _, rows in alike):
            for start in range(0, len(group), batch_size):
                batch = group[start : start + batch_size]
                logits[batch] = scores(model, [prompts[row] for row in batch], words)
    prior = torch.tensor([(card.prior or {}).get(label, 0.0) for label in card.verbalizer_ids])
    return _table(logits - prior, tuple(card.verbalizer_ids))


@contextmanager
def _unembedding_in_float32(model: Any) -> Iterator[None]:
    """Compute logits in float32 within the block; in half precision near logits would be equal."""
    head = model.get_output_embeddings()
    if head.weight.dtype.itemsize >= 4:
        yield
        return
    weight = head.weight.float()
    bias = None if head.bias is None else head.bias.float()
    handle = head.register_forward_hook(
        lambda _module, inputs, _out: torch.nn.functional.linear(inputs[0].float(), weight, bias)
    )
    try:
        yield
    finally:
        handle.remove()


def _dtype_of(folder: Path) -> torch.dtype:
    """Return the floating point type in which the folder was exported."""
    path = folder / "config.json"
    name = json.loads(path.read_text("utf-8")).get("dtype") if path.is_file() else None
    return getattr(torch, name or "float32")


def _check_lengths(
    prompts: Sequence[Sequence[int]], places: Sequence[str], config: Any, behind: int
) -> None:
    limit = getattr(config, "max_position_embeddings", None)
    for tokens, place in zip(prompts, places, strict=True):
        if limit is not None and len(tokens) + behind > limit:
            more = f" with {behind} more for the label words" if behind else ""
            raise InputError(
                f"{place}: the prompt has {len(tokens)} tokens{more}, the model reads at most "
                f"{limit}. Shorten the text or remove the row."
            )


def _logits(
    model: Any, prompts: Sequence[tuple[int, ...]], words: Sequence[WordIds]
) -> Float[Tensor, "prompt label"]:
    """Return the logits of words of one token at the last token of each prompt, on the CPU."""
    last = torch.tensor([[len(prompt) - 1] for prompt in prompts])
    return _logits_at(model, prompts, last)[:, 0, torch.tensor(words)].float().cpu()


def _word_scores(
    model: Any, prompts: Sequence[tuple[int, ...]], words: Sequence[WordIds]
) -> Float[Tensor, "prompt label"]:
    """Return the log-probability of each word behind each prompt, on the CPU."""
    columns = []
    for word in words:
        ids = word if isinstance(word, tuple) else (word,)
        rows = [(*prompt, *ids[:-1]) for prompt in prompts]
        at = torch.tensor([len(prompt) - 1 for prompt in prompts])[:, None] + torch.arange(len(ids))
        read = _logits_at(model, rows, at).float().log_softmax(-1)
        columns.append(read[:, torch.arange(len(ids)), torch.tensor(ids)].sum(-1).cpu())
    return torch.stack(columns, -1)


@torch.no_grad()
def _logits_at(
    model: Any, rows: Sequence[tuple[int, ...]], at: Int[Tensor, "row read"]
) -> Float[Tensor, "row read d_vocab"]:
    """Return the logits at some positions of each row; those at other positions are not made."""
    lengths = torch.tensor([len(tokens) for tokens in rows])
    tokens = pad_sequence([torch.tensor(tokens) for tokens in rows], batch_first=True)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    positions, place = at.unique(return_inverse=True)
    logits = model(
        tokens.to(model.device), attention_mask=mask.long().to(model.device),
        logits_to_keep=positions.to(model.device),
    ).logits  # fmt: skip
    return logits[torch.arange(len(rows))[:, None], place]


def _table(logits: Tensor, labels: tuple[str, ...]) -> pd.DataFrame:
    best = [labels[index] for index in logits.argmax(-1).tolist()]
    probabilities = dict(zip(labels, logits.softmax(-1).T.tolist(), strict=True))
    columns = {f"p({label})": values for label, values in probabilities.items()}
    return pd.DataFrame({"prediction": best, **columns})
