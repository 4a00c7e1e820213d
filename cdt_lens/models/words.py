"""Candidates of several tokens: where a batch is read for them, and the score of a word.

A word that the tokenizer splits is asked for token by token. Each token is one more question: the
prompt, followed by the tokens of the word before it.

1. A row of a batch is a prompt followed by a word without its last token. An example has one row
   for each word that is not asked for within the row of another one.
2. Every different question of an example is read at one position of one row.
3. The score of a word is the sum over its tokens of log p(token | tokens before), in nats. This is
   the teacher-forced log-probability of the word. Longer words tend to have lower scores.

Differences of scores have the unit of differences of logits: for two candidates of one token,
log p - log p' = logit - logit'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import takewhile

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cdt_lens.core.errors import InputError

# Elements of a tensor of logits of the whole vocabulary.
_MOST = 2**24


@dataclass(frozen=True, eq=False)
class Words:
    """The candidates of a batch of which some have several tokens.

    Attributes:
        tokens: token ids of each candidate, then -1.
        reads: number of the read that gives each token, then 0.
        rows: row of the batch at which each read is made.
        positions: position in the row at which each read is made.
        example: position in the batch of each row's example.
        added: number of tokens of a word behind the prompt of each row.
        seen: number of tokens with which each row begins like an earlier row of its example.
    """

    tokens: Int[Tensor, "batch k token"]
    reads: Int[Tensor, "batch k token"]
    rows: Int[Tensor, " read"]
    positions: Int[Tensor, " read"]
    example: Int[Tensor, " row"]
    added: Int[Tensor, " row"]
    seen: Int[Tensor, " row"]

    def to(self, device: torch.device | str) -> Words:
        """Move the words to a device.

        Args:
            device: the device.

        Returns:
            The same words with their tensors on `device`.
        """
        return Words(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def scores(
        self, logits: Float[Tensor, "*source read d_vocab"]
    ) -> Float[Tensor, "*source batch k"]:
        """Compute the log-probability of each candidate.

        Args:
            logits: logits of the whole vocabulary at each read.

        Returns:
            The sum of the tokens' log-probabilities, in nats.

        Raises:
            InputError: the logits are not those of the reads.
        """
        if logits.shape[-2] != len(self.rows):
            raise InputError(
                f"words: expected logits at {len(self.rows)} reads, got {logits.shape[-2]}; select "
                "the positions with at_answer(resid, lengths, candidates)"
            )
        own = self.to(logits.device)
        picked = logits[..., own.reads, own.tokens.clamp(min=0)]
        logs = picked - logits.logsumexp(-1)[..., own.reads]
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
    words = [[(c,) if isinstance(c, int) else c for c in group] for group in candidates]
    rows: list[tuple[int, ...]] = []
    per_row: list[tuple[int, int, int]] = []
    places: list[tuple[int, int]] = []
    reads: list[Tensor] = []
    for number, (prompt, group) in enumerate(zip(prompts, words, strict=True)):
        endings = _endings(group)
        questions = dict.fromkeys(word[:i] for word in group for i in range(len(word)))
        asked = {question: len(places) + n for n, question in enumerate(questions)}
        reads += [torch.tensor([asked[word[:i]] for i in range(len(word))]) for word in group]
        for question in questions:
            row = next(j for j, end in enumerate(endings) if end[: len(question)] == question)
            places.append((len(rows) + row, len(prompt) - 1 + len(question)))
        for j, ending in enumerate(endings):
            alike = [len(prompt) + _alike(ending, other) for other in endings[:j]]
            per_row.append((number, len(ending), max(alike, default=0)))
        rows += [(*prompt, *ending) for ending in endings]
    tokens = [torch.tensor(word) for group in words for word in group]
    shape = len(words), len(words[0]), -1
    return rows, Words(
        pad_sequence(tokens, True, -1).reshape(shape), pad_sequence(reads, True, 0).reshape(shape),
        *torch.tensor(places).T, *torch.tensor(per_row).T,
    )  # fmt: skip


def _endings(words: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return what stands behind the prompt in each row: words without their last tokens."""
    starts = dict.fromkeys(word[:-1] for word in words)
    return [s for s in starts if not any(o != s and o[: len(s)] == s for o in starts)]


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens with which both begin."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def scores_of(logits: Float[Tensor, "*source _read _k"], candidates: Candidates) -> Tensor:
    """Return what the candidates are compared by.

    Args:
        logits: logits of the candidates, or of the whole vocabulary for words.
        candidates: the candidates.

    Returns:
        `[source, batch, k]`: the logits of candidates of one token, the scores of words.
    """
    return candidates.scores(logits) if isinstance(candidates, Words) else logits


def among(logits: Float[Tensor, "_read d_vocab"], candidates: Candidates) -> Tensor:
    """Return what the candidates are compared by, from the logits of the whole vocabulary.

    Args:
        logits: logits at the answer of each prompt, or at each read of the words.
        candidates: the candidates.

    Returns:
        `[batch, k]`: the logits of candidates of one token, the scores of words.
    """
    if isinstance(candidates, Words):
        return candidates.scores(logits)
    return logits.gather(1, candidates)


def in_parts(
    read: Callable[[Tensor], Tensor],
    resid: Float[Tensor, "source _read d_model"],
    candidates: Candidates,
    d_vocab: int,
) -> Float[Tensor, "source batch k"]:
    """Read residual vectors so that logits of the whole vocabulary exist for few sources at once.

    Args:
        read: computes what the candidates are compared by, from some of the sources.
        resid: residual vectors at the answer of each prompt, or at each read of the words.
        candidates: the candidates.
        d_vocab: size of the vocabulary.

    Returns:
        What `read` returns for all sources.
    """
    if not isinstance(candidates, Words):
        return read(resid)
    size = max(1, _MOST // (resid.shape[1] * d_vocab))
    return torch.cat([read(part) for part in resid.split(size)])
