"""Blueprints against what they say: features are read as they were written, through real models."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers.checks import assert_close
from torch import Tensor

from cdt_lens.models.heads import Head
from cdt_lens.planted.hand_built import (
    BALANCE,
    LARGE,
    N_CTX,
    SHARP,
    TURN,
    Blueprint,
    HandHead,
    Neuron,
    build,
)

WORDS = ("<pad>", "<s>", "</s>", "three", "five", "look")
EMBED = {"three": {"size": 3.0, "a number": 1.0}, "five": {"size": 5.0, "a number": 1.0}}
PAD, START, _, THREE, FIVE, LOOK = range(6)
BOTH = pytest.mark.parametrize("gated", [False, True], ids=["gpt2", "llama"])
# A norm's scale is off by about (size of the features / LARGE)^2.
OFF = 5e-4


def logits(blueprint: Blueprint, *tokens: int) -> Tensor:
    """`[pos, word]` of one prompt."""
    with torch.no_grad():
        return build(blueprint)(torch.tensor([tokens])).logits[0]


def finds_numbers(**writes: float) -> HandHead:
    return HandHead(({"one": SHARP},), ({"a number": 1.0},), ({"size": 1.0},), (writes,))


def blueprint(heads: dict, neurons: dict | None = None, *, gated: bool = False) -> Blueprint:
    """ "look"'s logit is the feature "seen"."""
    return Blueprint(WORDS, EMBED, {"look": {"seen": 1.0}}, heads, neurons or {}, gated=gated)


def attention(model: Any, *tokens: int) -> Tensor:
    """`[layer, head, query, key]`."""
    with torch.no_grad():
        found = model(torch.tensor([tokens]), output_attentions=True).attentions
    return torch.stack(found)[:, 0]


@BOTH
@pytest.mark.parametrize("head", [Head(0, 0), Head(0, 7), Head(1, 3)])
def test_a_head_moves_the_feature_that_it_reads(head, gated):
    made = blueprint({head: finds_numbers(seen=2.0)}, gated=gated)
    for number, size in ((THREE, 3), (FIVE, 5)):
        found = logits(made, START, number, PAD, LOOK)
        assert_close(found[1:, LOOK], torch.full((3,), 2.0 * size), atol=OFF * 10)
        assert_close(found[0, LOOK], torch.tensor(0.0), atol=OFF)  # before the number
        assert not found[:, :LOOK].any()  # the other words read nothing


@BOTH
def test_a_later_layer_reads_what_an_earlier_one_wrote(gated):
    first = finds_numbers(copied=0.5)
    second = HandHead(({"one": SHARP},), ({"copied": 1.0},), ({"copied": 1.0},), ({"seen": 4.0},))
    made = blueprint({Head(0, 2): first, Head(1, 5): second}, gated=gated)
    assert_close(logits(made, START, FIVE, LOOK)[-1, LOOK], torch.tensor(10.0), atol=OFF * 10)


@BOTH
def test_channels_do_not_mix(gated):
    """Two channels of a head, and two heads beside it."""
    both = HandHead(
        ({"one": SHARP},), ({"a number": 1.0},), ({"size": 1.0}, {"a number": 1.0}),
        ({"seen": 1.0}, {"seen": -10.0}),
    )  # fmt: skip
    heads = {Head(0, 1): both, Head(0, 2): finds_numbers(unread=3.0), Head(0, 3): both}
    found = logits(blueprint(heads, gated=gated), START, FIVE, LOOK)
    assert_close(found[-1, LOOK], torch.tensor(2 * (5.0 - 10.0)), atol=OFF * 10)


def test_relu_neurons_are_those_of_the_blueprint():
    neurons = (
        Neuron({"size": 1.0, "one": -4.0}, {"seen": 1.0}),  # what a size has beyond 4
        Neuron({"size": -1.0, "one": 4.0}, {"seen": 10.0}),  # what it lacks
    )
    found = logits(blueprint({}, {0: neurons}), START, THREE, FIVE)[:, LOOK]
    assert_close(found, torch.tensor([40.0, 10.0, 1.0]), atol=0.05)


def test_gated_neurons_are_those_of_the_blueprint():
    gate, times = {"size": 0.5, "one": -2.0}, {"size": 1.0, "one": 2.0}
    made = blueprint({}, {1: (Neuron(gate, {"seen": 3.0}, times=times),)}, gated=True)
    for number, size in ((THREE, 3.0), (FIVE, 5.0)):
        gated = torch.nn.functional.silu(torch.tensor(size / 2 - 2))
        assert_close(logits(made, START, number)[-1, LOOK], 3 * gated * (size + 2), atol=OFF * 10)


def test_positions_lie_on_a_circle():
    """A query turned back by one position finds the one before, at every place of the context."""
    cos, sin = math.cos(TURN), math.sin(TURN)
    sharp = SHARP / (1 - cos)
    query = ({"cos": sharp * cos, "sin": sharp * sin}, {"sin": sharp * cos, "cos": -sharp * sin})
    head = HandHead(query, ({"cos": 1.0}, {"sin": 1.0}), (), ())
    tokens = list(itertools.islice(itertools.cycle([START, THREE, PAD]), N_CTX))
    pattern = attention(build(blueprint({Head(1, 4): head})), *tokens)[1, 4]
    assert_close(pattern[1:, :-1].diagonal(), torch.ones(N_CTX - 1), atol=1e-6)


@BOTH
def test_sharp_is_sharp(gated):
    model = build(blueprint({Head(0, 0): finds_numbers()}, gated=gated))
    pattern = attention(model, *[PAD] * (N_CTX - 2), FIVE, LOOK)[0]
    assert pattern[0, -1, -2] > 1 - 1e-6
    assert_close(pattern[1, -1], torch.full((N_CTX,), 1 / N_CTX), atol=1e-6)  # an empty head


@BOTH
def test_norms_give_features_back_as_they_are(gated):
    made = blueprint({Head(0, 0): finds_numbers(seen=1.0, unread=-7.0)}, gated=gated)
    model = build(made)
    body = model.model if gated else model.transformer
    seen: list[Tensor] = []
    norm = body.norm if gated else body.ln_f
    handle = norm.register_forward_hook(lambda _m, args, out: seen.extend([args[0], out]))
    logits_again = model(torch.tensor([[START, FIVE, LOOK]])).logits
    handle.remove()
    stream, normed = seen
    assert_close(stream.sum(-1), torch.zeros(1, 3), atol=1e-3)  # nothing for LayerNorm to centre
    assert stream.abs().amax() == pytest.approx(LARGE, abs=0.1)
    features = stream[..., 3:]
    assert features.abs().amax() == pytest.approx(35.0, abs=0.1)
    # 35^2 / 1000^2, and the balance dimension has as much
    assert_close(normed[..., 3:] / features.abs().amax(), features / 35, atol=3e-3)
    assert_close(normed[..., 1], torch.ones(1, 3), atol=3e-3)  # the feature "one"
    assert not normed[..., [BALANCE, 2]].any()
    assert logits_again.isfinite().all()


@BOTH
def test_nothing_is_left_to_chance(gated):
    state = torch.get_rng_state()
    made = blueprint({Head(0, 0): finds_numbers(seen=1.0)}, gated=gated)
    one, two = build(made), build(made)
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
    assert not one.training
