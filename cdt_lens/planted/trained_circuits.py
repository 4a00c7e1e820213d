"""Train circuits that are known because no other head could write during training.

1. A tiny model of two layers learns to recall, while only the heads L0H1 and L1H2 may write. A
   prompt lists pairs "a b c d e f" and asks for the partner of one of the words. This needs a head
   that attends one position back and, in a later layer, a head that attends to what the first one
   wrote.
2. The other heads then get random output weights. Their size relative to the planted heads' is so
   small that the model still solves the task.

"two-circuits" combines two such models with separate vocabularies in one of three layers. Each uses
one half of the residual stream. Llama has no biases, so that the half whose words do not occur
stays 0.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn

from cdt_lens.core.choices import SEEDS
from cdt_lens.core.errors import InputError
from cdt_lens.core.process_wide import one_thread, seeded
from cdt_lens.models.heads import Head
from cdt_lens.planted.planting import SPECIAL, Planting, spelt
from cdt_lens.tasks.task import Examples

PAIR = (Head(0, 1), Head(1, 2))
N_HEADS, D_HEAD, N_PAIRS = 4, 8, 3
ASKED = 2 * N_PAIRS  # position of the first question; an answer follows each question
N_WORDS = 9
N_TRAIN, N_VALID = 60, 30
BATCH, STEPS, ATTEMPTS, LEARNT = 64, 300, 20, 0.995

TRAINED = {
    "gpt2": "LayerNorm, learned positions, MLP",
    "attention-only": "GPT-2 without its MLPs",
    "llama": "RMSNorm, rotary positions, grouped keys and values, gated MLP",
    "two-circuits": "three layers of Llama with a pair for each of two sets of words",
}
_WHY = (
    "Recall of a word's partner: the first head of a pair looks one position back, the second "
    "looks for what the first one left. Only planted heads could write while the model learnt; "
    "the others' output weights are random."
)
_TWICE = " There is a pair for each of two sets of words, each in its own half of the stream."


def plant_by_training(name: str, *, seed: int = 0, noise: float = 0.5) -> Planting:
    """Train a circuit of `TRAINED`. This takes seconds, once for each process.

    Args:
        name: name of the circuit.
        seed: seed of the weights and prompts.
        noise: Frobenius norm of the other heads' output weights, relative to the planted heads'.

    Returns:
        The model with its circuit and examples.

    Raises:
        InputError: no attempt with this seed learnt the task.
    """
    double = name == "two-circuits"
    with seeded(seed):
        if double:
            model, heads = _both(_trained("llama", seed), _trained("llama", (seed + 1) % SEEDS))
        else:
            model, heads = _new_model(name), PAIR
            model.load_state_dict(_trained(name, seed))
    model.eval().requires_grad_(False)
    _let_others_write(model, heads, noise, torch.Generator().manual_seed(seed))
    words = _words(2 if double else 1)
    train, valid = (
        _examples(words, n, name, torch.Generator().manual_seed((2 * seed + k) % SEEDS))
        for n, name, k in ((N_TRAIN, "train", 1), (N_VALID, "valid", 2))
    )
    return Planting(model, words, heads, train, valid, _WHY + _TWICE * double)


# The task -----------------------------------------------------------------------------------------


def prompts(batch: int, generator: torch.Generator) -> Int[Tensor, "batch pos"]:
    """Draw prompts: pairs of different words, then the same pairs in another order.

    Args:
        batch: number of prompts.
        generator: source of the draws.

    Returns:
        Token ids.
    """
    order = torch.rand(batch, N_WORDS, generator=generator).argsort(-1)
    pairs = (order[:, :ASKED] + len(SPECIAL)).reshape(batch, N_PAIRS, 2)
    again = torch.rand(batch, N_PAIRS, generator=generator).argsort(-1)
    asked = pairs.gather(1, again[:, :, None].expand(-1, -1, 2))
    return torch.cat([pairs.flatten(1), asked.flatten(1)], 1)


def _examples(words: tuple[str, ...], n: int, name: str, generator: torch.Generator) -> Examples:
    """Draw prompts that end with a question, of three lengths; the other pairs' answers compete.

    A label is a set of words. With a single set, the labels alternate.
    """
    items = []
    double = len(words) > len(_words(1))
    for number, row in enumerate(prompts(n, generator).tolist()):
        if double and number % 2:
            row = [token + N_WORDS for token in row]
        end = ASKED + 1 + 2 * (number % N_PAIRS)
        others = [token for token in row[1:ASKED:2] if token != row[end]]
        items.append(spelt(words, row[:end], "ab"[number % 2], row[end], others))
    return Examples(tuple(items), ("a", "b"), name)


def _words(sets: int) -> tuple[str, ...]:
    return SPECIAL + tuple(f"{letter}{i}" for letter in "ab"[:sets] for i in range(N_WORDS))


def accuracy(model: Any) -> float:
    """Compute the share of questions of 300 prompts that a model answers correctly.

    Args:
        model: a Hugging Face model.

    Returns:
        The accuracy, from 0 to 1.
    """
    tokens = prompts(300, torch.Generator().manual_seed(9))
    with torch.no_grad():
        guesses = model(tokens).logits[:, ASKED::2].argmax(-1)
    return float((guesses == tokens[:, ASKED + 1 :: 2]).float().mean())


# Learning it --------------------------------------------------------------------------------------


@functools.cache
def _trained(family: str, seed: int) -> dict[str, Tensor]:
    """Return weights with which the pair solves the task; attempts that fail are stopped early."""
    with one_thread():
        for attempt in range(ATTEMPTS):
            own = (seed + 1000 * attempt) % SEEDS
            with seeded(own):
                model = _new_model(family)
            with _only(model, PAIR), torch.enable_grad():
                learnt = _learn(model, torch.Generator().manual_seed(own))
            if learnt:
                return model.state_dict()
    raise InputError(f"seed={seed}: {family} did not learn the task; use another seed.")


def _learn(model: Any, generator: torch.Generator) -> bool:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(1, STEPS + 1):
        tokens = prompts(BATCH, generator)
        logits = model(tokens).logits[:, ASKED::2]
        answers = tokens[:, ASKED + 1 :: 2]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 and accuracy(model) > LEARNT:
            return True
    return False


@contextmanager
def _only(model: Any, heads: tuple[Head, ...]) -> Iterator[None]:
    """Let no other head write or receive a gradient within the `with` block."""
    with ExitStack() as stack:
        for layer, output in enumerate(_outputs(model)):
            allowed = torch.zeros(N_HEADS, D_HEAD)
            allowed[[head.head for head in heads if head.layer == layer]] = 1.0
            kept = allowed.flatten()
            hook = functools.partial(lambda kept, _module, args: (args[0] * kept,), kept)
            stack.callback(output.register_forward_pre_hook(hook).remove)
        yield


# The models ---------------------------------------------------------------------------------------


def _new_model(family: str) -> Any:
    return _llama() if family == "llama" else _gpt2(mlp=family == "gpt2")


def _gpt2(*, mlp: bool) -> Any:
    config = transformers.GPT2Config(
        vocab_size=len(SPECIAL) + N_WORDS, n_positions=4 * N_PAIRS, n_embd=N_HEADS * D_HEAD,
        n_layer=2, n_head=N_HEADS, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    if not mlp:
        for block in model.transformer.h:
            block.mlp.requires_grad_(False)
            block.mlp.c_proj.weight.zero_()
    return model


def _llama(n_layers: int = 2, size: int = 1) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=len(SPECIAL) + N_WORDS * size, hidden_size=N_HEADS * D_HEAD * size,
        num_hidden_layers=n_layers, num_attention_heads=N_HEADS * size,
        num_key_value_heads=2 * size, intermediate_size=48 * size, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
        rms_norm_eps=1e-6 / size,  # a stream that is half empty has half the mean square
        attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _both(*parts: dict[str, Tensor]) -> tuple[Any, tuple[Head, ...]]:
    """Combine trained Llamas side by side in one, the second a layer later."""
    whole = _llama(n_layers=3, size=2)
    whole.requires_grad_(False)
    for name, weight in whole.named_parameters():
        if not name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "norm.weight")):
            weight.zero_()
    weights = dict(whole.named_parameters())
    heads: list[Head] = []
    for number, part in enumerate(parts):
        for name, small in part.items():
            _place(weights[_later(name, number)], small, number)
        heads += [Head(head.layer + number, head.head + N_HEADS * number) for head in PAIR]
    return whole, tuple(sorted(heads))


def _later(name: str, by: int) -> str:
    """Return the name of the same weight `by` layers later."""
    before, dot, rest = name.partition("layers.")
    return f"{before}{dot}{int(rest[0]) + by}{rest[1:]}" if dot else name


def _place(whole: Tensor, part: Tensor, number: int) -> None:
    """Copy one model's weight into its block of the whole."""
    if part.ndim == 1:
        # Half of the stream is 0, so that the divisor of an RMSNorm is smaller by the root of 2.
        whole.chunk(2)[number].copy_(part / 2**0.5)
        return
    if part.shape[0] == len(SPECIAL) + N_WORDS:
        start = len(SPECIAL) + N_WORDS * number
        rows, part = whole[start : start + N_WORDS], part[len(SPECIAL) :]
    else:
        rows = whole.chunk(2)[number]
    rows.zero_()
    rows.chunk(2, dim=1)[number].copy_(part)


def _let_others_write(
    model: Any, planted: tuple[Head, ...], noise: float, generator: torch.Generator
) -> None:
    for layer, output in enumerate(_outputs(model)):
        heads = _by_head(output)
        inside = [head.head for head in planted if head.layer == layer]
        size = noise * heads[inside].flatten(1).norm(dim=1).mean()
        for head in set(range(len(heads))) - set(inside):
            random = torch.randn(heads[head].shape, generator=generator)
            heads[head].copy_(random / random.norm() * size)


def _outputs(model: Any) -> list[nn.Module]:
    """Return the output projection of each layer's attention."""
    if hasattr(model, "transformer"):
        return [block.attn.c_proj for block in model.transformer.h]
    return [layer.self_attn.o_proj for layer in model.model.layers]


def _by_head(output: nn.Module) -> Float[Tensor, "head d_head d_model"]:
    """Return an output weight as a view by head."""
    weight = output.get_parameter("weight")
    rows = weight.T if isinstance(output, nn.Linear) else weight  # Conv1D is stored as [in, out]
    return rows.unflatten(0, (-1, D_HEAD))
