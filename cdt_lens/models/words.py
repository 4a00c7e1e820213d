"""Candidates of several tokens: which rows of a batch are read, and the score of a word.

A word that the tokenizer splits is asked for token by token. Each token is one more question: the
prompt, followed by the tokens of the word before it.

1. A batch has one row for each different question of an example. The prompt itself is the first.
2. Every row is read at its last token, as a prompt with candidates of one token is.
3. The score of a word is the sum over its tokens of log p(token | row), in nats. This is the
   teacher-forced log-probability of the word. A longer word has a lower score.

Differences of scores have the unit of differences of logits: for two candidates of one token,
log p - log p' = logit - logit'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Elements of a tensor of logits of the whole vocabulary.
_MOST = 2**24


@dataclass(frozen=True, eq=False)
class Words:
    """The candidates of a batch of which some have several tokens.

    Attributes:
        tokens: token ids of each candidate, then -1.
        rows: the row of the batch at whose end each token is read, then 0.
        example: position in the batch of each row's example.
        added: number of tokens of a word behind the prompt of each row.
    """

    tokens: Int[Tensor, "batch k token"]
    rows: Int[Tensor, "batch k token"]
    example: Int[Tensor, " row"]
    added: Int[Tensor, " row"]

    def to(self, device: torch.device | str) -> Words:
        """Move the words to a device.

        Args:
            device: the device.

        Returns:
            The same words with their tensors on `device`.
        """
        return Words(*(v.to(device) for v in (self.tokens, self.rows, self.example, self.added)))

    def scores(
        self, logits: Float[Tensor, "*source row d_vocab"]
    ) -> Float[Tensor, "*source batch k"]:
        """Compute the log-probability of each candidate.

        Args:
            logits: logits of the whole vocabulary at the end of each row.

        Returns:
            The sum of the tokens' log-probabilities, in nats.
        """
        own = self.to(logits.device)
        read = logits[..., own.rows, own.tokens.clamp(min=0)]
        logs = read - logits.logsumexp(-1)[..., own.rows]
        return torch.where(own.tokens < 0, 0.0, logs).sum(-1)

    def are(self, word: int | Sequence[int]) -> Bool[Tensor, "batch k"]:
        """Return which candidates are a word.

        Args:
            word: the token ids of the word.
        """
        ids = torch.tensor([word] if isinstance(word, int) else list(word))
        wanted = torch.full(self.tokens.shape[-1:], -1)
        if len(ids) > len(wanted):
            return torch.zeros_like(self.tokens[..., 0], dtype=torch.bool)
        wanted[: len(ids)] = ids
        return (self.tokens == wanted.to(self.tokens.device)).all(-1)


# The candidates of a batch: one token each, or words.
Candidates = Int[Tensor, "batch k"] | Words


def ask(
    prompts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int | tuple[int, ...]]]
) -> tuple[list[tuple[int, ...]], Words]:
    """Return the rows of a batch of which some candidates have several tokens.

    Args:
        prompts: token ids of each example's prompt.
        candidates: the candidates of each example, equally many for all.

    Returns:
        The token ids of each row, and where each candidate is read.
    """
    rows: list[tuple[int, ...]] = []
    example: list[int] = []
    words = [[(c,) if isinstance(c, int) else c for c in group] for group in candidates]
    longest = max(len(word) for group in words for word in group)
    read = torch.zeros(len(words), len(words[0]), longest, dtype=torch.long)
    for number, (prompt, group) in enumerate(zip(prompts, words, strict=True)):
        asked: dict[tuple[int, ...], int] = {}
        for k, word in enumerate(group):
            for i in range(len(word)):
                if word[:i] not in asked:
                    asked[word[:i]] = len(rows)
                    rows.append((*prompt, *word[:i]))
                    example.append(number)
                read[number, k, i] = asked[word[:i]]
    tokens = pad_sequence([torch.tensor(word) for group in words for word in group], True, -1)
    added = [len(row) - len(prompts[i]) for row, i in zip(rows, example, strict=True)]
    return rows, Words(tokens.reshape(read.shape), read, torch.tensor(example), torch.tensor(added))


def scores_of(logits: Float[Tensor, "*source _row _k"], candidates: Candidates) -> Tensor:
    """Return what the candidates are compared by.

    Args:
        logits: logits of the candidates, or of the whole vocabulary for words.
        candidates: the candidates.

    Returns:
        `[source, batch, k]`: the logits of candidates of one token, the scores of words.
    """
    return candidates.scores(logits) if isinstance(candidates, Words) else logits


def among(logits: Float[Tensor, "row d_vocab"], candidates: Candidates) -> Tensor:
    """Return what the candidates are compared by, from the logits of the whole vocabulary.

    Args:
        logits: logits at the end of each row.
        candidates: the candidates.

    Returns:
        `[batch, k]`: the logits of candidates of one token, the scores of words.
    """
    if isinstance(candidates, Words):
        return candidates.scores(logits)
    return logits.gather(1, candidates)


def in_parts(
    read: Callable[[Tensor], Tensor],
    resid: Float[Tensor, "source row d_model"],
    candidates: Candidates,
    d_vocab: int,
) -> Float[Tensor, "source batch k"]:
    """Read residual vectors so that logits of the whole vocabulary exist for few sources at once.

    Args:
        read: computes what the candidates are compared by, from some of the sources.
        resid: residual vectors at the end of each row.
        candidates: the candidates.
        d_vocab: size of the vocabulary.

    Returns:
        What `read` returns for all sources.
    """
    if not isinstance(candidates, Words):
        return read(resid)
    size = max(1, _MOST // (resid.shape[1] * d_vocab))
    return torch.cat([read(part) for part in resid.split(size)])
