"""Compute logits at the answer position with gradients, for training.

1. Stop the model's own forward pass before the unembedding. Only the answer position is normed and
   unembedded, so that no tensor of size (positions x vocabulary) exists.
2. Where nothing below a layer is trained, keep the residual stream that enters it for each example
   (`first_layer`). Every later epoch starts there.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cdt_lens.models.trace import BlockCall
from cdt_lens.models.view import ModelView, at_answer
from cdt_lens.tasks.task import Batch, Examples


class AnswerPass:
    """The forward pass of training. A call returns the logits `[read, d_vocab]` at the answers.

    The logits are in at least float32.

    Args:
        view: the model.
        first_layer: keep the residual stream that enters this layer for each prompt, and start
            there. The layers below and the embedding must not change while this object is used. 0
            keeps nothing.
    """

    def __init__(self, view: ModelView, *, first_layer: int = 0) -> None:
        self.view = view
        self.first_layer = first_layer
        self._kept: dict[tuple[int, ...], Float[Tensor, "pos d_model"]] = {}
        self._calls: dict[int, tuple[BlockCall, ...]] = {}

    def __call__(self, batch: Batch) -> Float[Tensor, "read d_vocab"]:
        return self.view.read_out(self._answers(batch))

    def candidates(self, batch: Batch) -> Float[Tensor, "batch k"]:
        """Compute the logits of the candidate tokens, or the scores of words, for evaluation.

        No gradient reaches the unembedding, so train on the whole logits.

        Args:
            batch: the prompts.

        Returns:
            Logits, unembedded in at least float32. In half precision whole logits lie on a coarse
            grid and tie.
        """
        return self.view.candidate_logits(self._answers(batch), batch.candidates)

    def _answers(self, batch: Batch) -> Float[Tensor, "read d_model"]:
        """Compute the residual stream at the answer position, after the last block."""
        view = self.view
        if self.first_layer:
            resid = view.through(
                self._entering(batch), self._calls_of(batch.tokens.shape[1]), self.first_layer
            )
        else:
            resid = view.stream(batch.tokens)[0][-1]
        return at_answer(resid, batch.lengths, batch.candidates)

    def prepare(self, examples: Examples, batch_size: int) -> None:
        """Run the layers below `first_layer` once for all examples.

        The batches do not depend on random draws. Rounding depends on a batch's width, so that
        storing the streams in the order of training would make a resumed run differ from an
        uninterrupted one.

        Args:
            examples: the examples.
            batch_size: number of examples in one forward pass.
        """
        if self.first_layer:
            for batch in examples.batches(batch_size, apart=self.view.longrope_limit):
                self._entering(batch)

    def _entering(self, batch: Batch) -> Float[Tensor, "row pos d_model"]:
        keys = [
            tuple(row[:length].tolist())
            for row, length in zip(batch.tokens, batch.lengths.tolist(), strict=True)
        ]
        if any(key not in self._kept for key in keys):
            with torch.no_grad():
                stream = self.view.stream(batch.tokens, self.first_layer)[0][self.first_layer]
            for key, row in zip(keys, stream, strict=True):
                self._kept[key] = row[: len(key)].clone()
        return pad_sequence([self._kept[key] for key in keys], batch_first=True)

    def _calls_of(self, width: int) -> tuple[BlockCall, ...]:
        """Return how the model calls its blocks for prompts of this width."""
        if width not in self._calls:
            tokens = torch.zeros(1, width, dtype=torch.long)
            with torch.no_grad():
                _, calls = self.view.stream(tokens)
            self._calls[width] = calls[self.first_layer :]
        return self._calls[width]
