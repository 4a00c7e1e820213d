"""A tiny language model of the pseudo-languages, trained in half a minute, for demos and tests.

1. Tokenizer: one token per word, split at white space. " positive" after "Sentiment:" is one
   token, and the new line before "Sentiment:" is white space like any other.
2. Model: Llama architecture, 4 layers of 8 heads with grouped keys and values, tied embeddings.
3. Pre-training predicts the next word of unlabelled "reviews", in equal shares of English and of
   the language at each distance. A review is a few sentences of one language and one mood; the
   shared mood is all that distinguishes good words from bad ones. The first reviews are plain
   (one clause per sentence, no negation), the later ones hold sentences of every kind. A model as
   small as this one does not learn the moods without the plain reviews.
4. The model never sees "Sentiment:", a label word, a translation beside its original (every
   language has its own draws), or a sentence of a train, valid or test split:
   `tasks.pseudo_languages` reserves a part for pre-training.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from cdt_lens.core.artifacts import new_folder
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import Count, Seed
from cdt_lens.core.errors import InputError
from cdt_lens.core.process_wide import seeded
from cdt_lens.models.hugging_face import third_party_noise_off
from cdt_lens.tasks.pseudo_languages import (
    TEMPLATE,
    VERBALIZER,
    pseudo_sentences,
    pseudo_vocabulary,
)

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
CONTEXT = 256
STEPS = 240  # per language
BATCH_SIZE = 32
LEARNING_RATE = 4e-3
WARM_UP = 0.1  # share of the steps
REVIEWS = 2000  # of each language and kind
PLAIN_SENTENCES, SENTENCES = 5, 3  # in a review of each kind


@checked_arguments
def make_demo_model(
    folder: str | Path,
    *,
    distances: Sequence[float | int | str],
    seed: Seed = 0,
    steps: Count | None = None,
    say: Callable[[str], None] = lambda _text: None,
) -> Path:
    """Pre-train a tiny model on English and on the languages at some distances from it.

    The same seed on the same machine gives the same weights. No global random state changes.

    Args:
        folder: Hugging Face folder to write, as a whole or not at all.
        distances: Distances of the languages from English, 0 to 1.
        seed: Seed of every random draw.
        steps: Number of training steps; None takes 240 per language, about half a minute on two
            cores for two distances.
        say: Takes one line of progress.

    Returns:
        The folder.

    Raises:
        InputError: A folder that is not empty, fewer than one step, or a distance outside 0 to 1.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not an empty folder; name another or empty it")
    languages = ("source", *distances)
    steps = STEPS * len(languages) if steps is None else steps
    tokenizer = demo_tokenizer(distances)
    say(f"writing reviews in {len(languages)} languages")
    plain = _encoded(tokenizer, languages, seed, plain=True)
    full = _encoded(tokenizer, languages, seed, plain=False)
    model = _new_model(len(tokenizer), seed)
    for step, loss in _pretrain(model, _batches(plain, full, steps, seed), steps):
        if step % 100 == 0 or step == steps:
            say(f"pre-training step {step} of {steps}: {loss:.3f} nats a word")
    with new_folder(folder) as made, third_party_noise_off():
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return folder


def demo_tokenizer(distances: Sequence[float | int | str]) -> PreTrainedTokenizerBase:
    """Make the tokenizer: one token per word of each language, of the cue and of the labels.

    Args:
        distances: Distances of the languages from English, 0 to 1.
    """
    cue = TEMPLATE.format(text="").split()
    answers = [word.strip() for word in VERBALIZER.values()]
    words = (*SPECIAL, ".", *cue, *answers, *pseudo_vocabulary(distances))
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    pad, unknown, begin, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, unk_token=unknown, bos_token=begin, eos_token=end,
        model_max_length=CONTEXT,
    )  # fmt: skip


def _new_model(d_vocab: int, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=d_vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        # A model as small as this learns slowly from the usual 0.02.
        initializer_range=0.08,
    )  # fmt: skip
    with seeded(seed):
        return LlamaForCausalLM(config)


def _encoded(
    tokenizer: PreTrainedTokenizerBase,
    languages: Sequence[float | int | str],
    seed: int,
    *,
    plain: bool,
) -> list[Int[Tensor, " pos"]]:
    """Return the token ids of the reviews of one kind, in all languages."""
    texts: list[str] = []
    for number, distance in enumerate(languages):
        size = PLAIN_SENTENCES if plain else SENTENCES
        # Each language has its own seed, so that no sentence has a translation.
        own = (seed * len(languages) + number) * 2 + plain
        rows = pseudo_sentences(REVIEWS * size, distance, own, part="unlabelled", plain=plain)
        for label in VERBALIZER:
            mood = [row["text"] for row in rows if row["label"] == label]
            groups = (mood[i : i + size] for i in range(0, len(mood) - size + 1, size))
            texts += [" . ".join(group) + " ." for group in groups]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [torch.tensor([tokenizer.bos_token_id, *ids]) for ids in encoded]


def _batches(
    plain: Sequence[Tensor], full: Sequence[Tensor], steps: int, seed: int
) -> Iterator[Int[Tensor, "batch pos"]]:
    """Yield right-padded batches: plain reviews in the first third, hardly any at the end."""
    draw = random.Random(seed)
    for step in range(steps):
        kind = full if draw.random() < (step / steps - 0.35) / 0.55 else plain
        yield pad_sequence(draw.choices(kind, k=BATCH_SIZE), batch_first=True, padding_value=0)


def _pretrain(
    model: LlamaForCausalLM, batches: Iterator[Int[Tensor, "batch pos"]], steps: int
) -> Iterator[tuple[int, float]]:
    """Train with AdamW, a linear warm-up and decay; yield each step and its loss in nats a word."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    model.train()
    for step, tokens in enumerate(batches, start=1):
        progress = step / steps
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(progress / WARM_UP, (1 - progress) / (1 - WARM_UP))
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step, loss.item()
    model.eval()
