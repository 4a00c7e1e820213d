"""Ask an exported model about new rows, with transformers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cdt_lens.core.errors import InputError
from cdt_lens.finetuning.model_card import TASK_FILE
from cdt_lens.models.hugging_face import load_hugging_face, load_tokenizer, third_party_noise_off
from cdt_lens.models.loading import default_device
from cdt_lens.tasks.card import TaskCard


def load_card(folder: str | Path) -> TaskCard:
    """Read the task of an exported folder.

    Args:
        folder: a folder that `export` wrote.

    Returns:
        The task.

    Raises:
        InputError: the folder holds no task.
        ArtifactError: its file is damaged.
    """
    path = Path(folder) / TASK_FILE
    if not path.is_file():
        raise InputError(
            f"{folder}: holds no {TASK_FILE}. Name a folder that cdt-lens export wrote; folders of "
            "cdt_lens 0.3, and of tasks whose prompts were made by hand, have none."
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
        labels, from 0 to 1.

    Raises:
        InputError: the folder holds no task or no model, a column is missing, or a prompt is longer
            than the model's context.
        ArtifactError: the file of the task is damaged.
    """
    card = load_card(folder)
    where = places or [f"row {number}" for number in range(1, len(rows) + 1)]
    with third_party_noise_off():
        prompts = card.format(load_tokenizer(folder)).unlabelled(rows, where)
        model, _ = load_hugging_face(folder, dtype=_dtype_of(Path(folder)))
    _check_lengths(prompts, where, model.config)
    model = model.to(default_device()).eval()
    ids = torch.tensor(list(card.verbalizer_ids.values()))
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    logits = torch.cat([_logits(model, batch, ids) for batch in batches])
    prior = torch.tensor([(card.prior or {}).get(label, 0.0) for label in card.verbalizer_ids])
    return _table(logits - prior, tuple(card.verbalizer_ids))


def _dtype_of(folder: Path) -> torch.dtype:
    """Return the floating point type in which the folder was exported."""
    path = folder / "config.json"
    name = json.loads(path.read_text("utf-8")).get("dtype") if path.is_file() else None
    return getattr(torch, name or "float32")


def _check_lengths(prompts: Sequence[Sequence[int]], places: Sequence[str], config: Any) -> None:
    limit = getattr(config, "max_position_embeddings", None)
    for tokens, place in zip(prompts, places, strict=True):
        if limit is not None and len(tokens) > limit:
            raise InputError(
                f"{place}: the prompt has {len(tokens)} tokens, the model reads at most {limit}. "
                "Shorten the text or remove the row."
            )


@torch.no_grad()
def _logits(model: Any, prompts: Sequence[tuple[int, ...]], ids: Tensor) -> Tensor:
    """Return the logits `[prompt, label]` at the last token of each prompt, on the CPU."""
    lengths = torch.tensor([len(tokens) for tokens in prompts])
    tokens = pad_sequence([torch.tensor(tokens) for tokens in prompts], batch_first=True)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    logits = model(tokens.to(model.device), attention_mask=mask.long().to(model.device)).logits
    last = logits[torch.arange(len(prompts)), lengths - 1]
    return last[:, ids].float().cpu()


def _table(logits: Tensor, labels: tuple[str, ...]) -> pd.DataFrame:
    best = [labels[index] for index in logits.argmax(-1).tolist()]
    probabilities = dict(zip(labels, logits.softmax(-1).T.tolist(), strict=True))
    columns = {f"p({label})": values for label, values in probabilities.items()}
    return pd.DataFrame({"prediction": best, **columns})
