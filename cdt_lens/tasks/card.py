"""Define `TaskCard`: everything that is needed to ask a model about new rows of a task.

An adapter keeps the card of its task, and `export` writes it beside the weights. The card holds no
rows of the data, apart from the few-shot examples that stand before every prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cdt_lens.core.errors import InputError
from cdt_lens.core.saved import Saved
from cdt_lens.tasks.prompts import PromptFormat, template_columns
from cdt_lens.tasks.task import Task, WordIds

_FILLING = "N/A"


@dataclass(frozen=True, eq=False)
class TaskCard(Saved):
    """How the prompts of a task are made of text, and which token answers for which label.

    Attributes:
        name: name of the task.
        labels: the labels.
        template: text with column names in braces. It ends where the answer begins.
        prefix: the few-shot examples before every prompt.
        verbalizer: the answer word of each label. Empty for generated tasks whose answers differ
            from prompt to prompt.
        verbalizer_ids: token id of each label's word, or the ids of a word of several tokens.
        prior: logit of each label that is subtracted before the labels are compared, or None.
        bos_ids: token ids before the text of every prompt: BOS, or nothing.
        max_length: maximum number of tokens of a prompt. None means the tokenizer's limit.
        truncate: whether prompts that are too long were shortened.
        longest: number of tokens of the longest prompt of the training and validation data.
    """

    name: str
    labels: tuple[str, ...]
    template: str
    prefix: str
    verbalizer: Mapping[str, str]
    verbalizer_ids: Mapping[str, WordIds]
    prior: Mapping[str, float] | None
    bos_ids: tuple[int, ...]
    max_length: int | None
    truncate: bool
    longest: int
    _format, _kind = "cdt_lens.task", "task"

    @classmethod
    def of(cls, task: Task, tokenizer: PreTrainedTokenizerBase | None) -> TaskCard | None:
        """Return the card of a task.

        Args:
            task: the task.
            tokenizer: the model's tokenizer.

        Returns:
            The card, or None if there is no tokenizer or it does not make the prompts' tokens of
            their text, as for examples that were made by hand.
        """
        bos = None if tokenizer is None else _bos_of(task, tokenizer)
        if bos is None:
            return None
        return cls(
            name=task.name, labels=task.labels, template=task.template, prefix=task.prefix,
            verbalizer=dict(task.verbalizer), verbalizer_ids=dict(task.verbalizer_ids),
            prior=None if task.prior is None else dict(task.prior), bos_ids=bos,
            max_length=task.max_length, truncate=task.truncate,
            longest=max(len(e.tokens) for split in (task.train, task.valid) for e in split),
        )  # fmt: skip

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template names; none for prompts that were generated."""
        try:
            return template_columns(self.template)
        except InputError:
            return ()

    def format(self, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
        """Return the format that makes the prompts of new rows.

        Args:
            tokenizer: the model's tokenizer.

        Returns:
            The format.

        Raises:
            InputError: the task has no words for its labels, or the tokenizer has other tokens for
                them than those that were trained.
        """
        if not self.verbalizer or not self.columns:
            raise InputError(
                f"task {self.name}: it has no template with a word for each label, so there is "
                "nothing to predict"
            )
        if self.bos_ids and tokenizer.bos_token_id != self.bos_ids[0]:
            # TransformerLens began the prompts with EOS, which this tokenizer does not call BOS.
            tokenizer = deepcopy(tokenizer)
            tokenizer.bos_token = tokenizer.convert_ids_to_tokens(self.bos_ids[0])
        made = PromptFormat(
            tokenizer, self.template, self.verbalizer, prefix=self.prefix,
            prepend_bos=bool(self.bos_ids), max_length=self.max_length, truncate=self.truncate,
            # No row has a label here, and a column of the template may have that name.
            label_column="",
        )  # fmt: skip
        if made.verbalizer_ids != dict(self.verbalizer_ids):
            raise InputError(
                f"task {self.name}: the label words have the tokens {made.verbalizer_ids}, "
                f"expected {dict(self.verbalizer_ids)}; use the tokenizer of the exported folder"
            )
        return made

    def sample_prompts(self) -> tuple[str, ...]:
        """Return prompts without data, by which a tokenizer can be compared with the training."""
        if not self.columns:
            return (_FILLING,)
        cells = dict.fromkeys(self.columns, _FILLING)
        return (self.prefix + self.template.format_map(cells), _FILLING)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskCard:
        """Create a card from the values that `to_dict` returned.

        Args:
            values: the fields by name. Others are ignored.

        Returns:
            The card.
        """
        known: dict[str, Any] = {field.name: values[field.name] for field in fields(cls)}
        known |= {name: tuple(known[name]) for name in ("labels", "bos_ids")}
        known["verbalizer_ids"] = {
            label: tuple(word) if isinstance(word, list) else word
            for label, word in known["verbalizer_ids"].items()
        }
        return cls(**known)

    def _to_file(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        return self.to_dict(), {}

    @classmethod
    def _from_file(cls, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TaskCard:
        return cls.from_dict(body)


def _bos_of(task: Task, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...] | None:
    """Return the ids before the text in the first training prompt whose text gives the rest."""
    for example in task.train[:8]:
        ids = tuple(tokenizer(example.prompt, add_special_tokens=False, verbose=False).input_ids)
        before = len(example.tokens) - len(ids)
        if before >= 0 and example.tokens[before:] == ids:
            return example.tokens[:before]
    return None
