"""Build one circuit by hand for each way in which heads can share the work.

The task: a prompt contains a cue, "plus" or "minus", and a switch, "up" or "down". "so" fills the
gaps, and "?" asks for "yes" or "no". The feature "answer" is 1 for yes and -1 for no. The task
direction d of an unablated model is one logit, up to what distractors write.

Every prompt occurs with both cues and both switches in the same places, so that each planted head's
mean z at the answer is 0, a reference without information on the answer. At any other position it
is 0 too, except for the head of "composition" that writes the note: behind the word mark its z is 1
on every prompt, which says nothing about the answer either. The other heads are distractors of four
kinds:

- dead: W_O is 0, although z differs between the labels;
- unread: writes the cue or the switch to a feature that nothing reads;
- constant: writes the same into the answer on every prompt;
- beside: writes the switch into the answer, which is unrelated to the label.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from cdt_lens.models.heads import Head, all_heads
from cdt_lens.planted.hand_built import (
    N_HEADS,
    N_LAYERS,
    SHARP,
    TURN,
    Blueprint,
    HandHead,
    Neuron,
    build,
)
from cdt_lens.planted.planting import SPECIAL, Planting, spelt
from cdt_lens.tasks.task import Example, Examples

LABELS = ("yes", "no")
CUES = {1: "plus", -1: "minus"}
SWITCHES = {1: "up", -1: "down"}
WORDS = (*SPECIAL, "so", "?", *CUES.values(), *SWITCHES.values(), "mark", *LABELS)
EMBED = {
    **{word: {"is cue": 1.0, "cue": float(sign)} for sign, word in CUES.items()},
    **{word: {"is switch": 1.0, "switch": float(sign)} for sign, word in SWITCHES.items()},
    "mark": {"mark": 1.0},
}
UNEMBED = {"yes": {"answer": 0.5}, "no": {"answer": -0.5}}
LARGEST_GAP = 2  # fillers
N_TRAIN, N_VALID = 8, 6  # arrangements of four prompts each

# The correct answer, and the pieces of the prompt, for one cue and one switch.
Pieces = tuple[int, list[list[str]]]


def _copies(what: str, writes: Mapping[str, float]) -> HandHead:
    """Return a head that attends to the cue or the switch and writes its sign."""
    return HandHead(({"one": SHARP},), ({f"is {what}": 1.0},), ({what: 1.0},), (writes,))


def _previous(what: str, writes: Mapping[str, float]) -> HandHead:
    """Return a head that attends one position back: its query is rotated by one position."""
    cos, sin = math.cos(TURN), math.sin(TURN)
    sharp = SHARP / (1 - cos)  # the next best key is as similar as cos
    query = ({"cos": sharp * cos, "sin": sharp * sin}, {"sin": sharp * cos, "cos": -sharp * sin})
    return HandHead(query, ({"cos": 1.0}, {"sin": 1.0}), ({what: 1.0},), (writes,))


DEAD = _copies("cue", {})
CONSTANT = HandHead((), (), ({"one": 1.0},), ({"answer": 0.1},))
DISTRACTORS = (
    DEAD,
    _copies("cue", {"unread": 1.0}),
    CONSTANT,
    _copies("switch", {"answer": 0.1}),
    _copies("switch", {"unread": 1.0}),
)


def _one_cue(cue: int, switch: int) -> Pieces:
    return cue, [[CUES[cue]], [SWITCHES[switch]]]


def _exclusive_or(cue: int, switch: int) -> Pieces:
    return cue * switch, [[CUES[cue]], [SWITCHES[switch]]]


def _marked_cue(cue: int, switch: int) -> Pieces:
    return cue, [["mark", CUES[cue]], [CUES[-cue]], [SWITCHES[switch]]]


@dataclass(frozen=True)
class HandBuilt:
    """A circuit that is built by hand. All other heads are distractors.

    Attributes:
        what: the circuit in a few words.
        why: how the circuit works, in a sentence or two.
        heads: the planted heads of each layer.
        neurons: the neurons of each layer.
        distractors: the kinds of the other heads, in turn.
        pieces: returns the correct answer and the parts of the prompt for a cue and a switch.
        gated: whether the model is a Llama with a gated MLP instead of a GPT-2.
    """

    what: str
    why: str
    heads: Mapping[int, tuple[HandHead, ...]]
    neurons: Mapping[int, tuple[Neuron, ...]] = field(default_factory=dict)
    distractors: tuple[HandHead, ...] = DISTRACTORS
    pieces: Callable[[int, int], Pieces] = _one_cue
    gated: bool = False


def _clipped(name: str) -> tuple[Neuron, ...]:
    """Return neurons that write `name`, clipped to -1 and 1, into the answer."""
    return (
        Neuron({name: 1.0, "one": 1.0}, {"answer": 1.0}),
        Neuron({name: 1.0, "one": -1.0}, {"answer": -1.0}),
        Neuron({"one": 1.0}, {"answer": -1.0}),
    )


def _excess(name: str) -> tuple[Neuron, ...]:
    """Return neurons that write the excess of `name` beyond -1 and 1 into the answer."""
    return (
        Neuron({name: 1.0, "one": -1.0}, {"answer": 1.0}),
        Neuron({name: -1.0, "one": -1.0}, {"answer": -1.0}),
    )


def _magnitude(name: str, to: str) -> tuple[Neuron, ...]:
    return Neuron({name: 1.0}, {to: 1.0}), Neuron({name: -1.0}, {to: 1.0})


def _product(a: str, b: str) -> tuple[Neuron, ...]:
    """Return neurons that write a * b into the answer, because silu(a) - silu(-a) is a."""
    return (
        Neuron({a: 1.0}, {"answer": 1.0}, times={b: 1.0}),
        Neuron({a: -1.0}, {"answer": -1.0}, times={b: 1.0}),
    )


_SOLVER = _copies("cue", {"answer": 1.0})
_THIRD = _copies("cue", {"answer": 1 / 3})
_VOTE = _copies("cue", {"votes": 1.0})
_MARKED_READER = replace(_SOLVER, key=({"is cue": 1.0, "note": 1.0},))
_STAND_IN = replace(_SOLVER, query=({"one": SHARP, "done": -2 * SHARP},))

HAND_BUILT: dict[str, HandBuilt] = {
    "cancellation": HandBuilt(
        "two heads undo each other, a third does the task",
        "Two heads of layer 0 write 2 and -2 times the answer, and a head of layer 1 writes it "
        "once. The pair's net effect is exactly 0; without its partner one head turns the answer "
        "over, the other triples it.",
        {0: (_copies("cue", {"answer": 2.0}), _copies("cue", {"answer": -2.0})), 1: (_SOLVER,)},
    ),
    "duplication": HandBuilt(
        "three heads do a third of the task each",
        "Three identical heads, two in layer 0 and one in layer 1, each write a third of the "
        "answer.",
        {0: (_THIRD, _THIRD), 1: (_THIRD,)},
    ),
    "or": HandBuilt(
        "either of two heads suffices",
        "A head of each layer votes, and the last MLP writes the sum of the votes, cut off at -1 "
        "and 1: either head suffices, and without both there is no answer.",
        {0: (_VOTE,), 1: (_VOTE,)},
        {1: _clipped("votes")},
    ),
    "and": HandBuilt(
        "two heads are needed together",
        "A head of each layer votes, and the last MLP writes what the sum of the votes has beyond "
        "-1 and 1: both are needed.",
        {0: (_VOTE,), 1: (_VOTE,)},
        {1: _excess("votes")},
    ),
    "gated-and": HandBuilt(
        "a gated MLP multiplies two heads (Llama)",
        "One head reads the cue, one the switch, and a gated MLP multiplies the two; the answer "
        "is their exclusive or, so that neither tells anything by itself.",
        {0: (_copies("cue", {"left": 1.0}),), 1: (_copies("switch", {"right": 1.0}),)},
        {1: _product("left", "right")},
        pieces=_exclusive_or,
        gated=True,
    ),
    "composition": HandBuilt(
        "a head acts through the attention pattern of another",
        "Of two opposite cues the one after the word mark counts. A head of layer 0 looks one "
        "position back and leaves a note behind the mark; a head of layer 1 reads the answer from "
        "the cue with the note. The first acts through the pattern of the second alone.",
        {0: (_previous("mark", {"note": 1.0}),), 1: (_MARKED_READER,)},
        pieces=_marked_cue,
    ),
    "backup": HandBuilt(
        "a head answers only where another does not",
        "A head of layer 0 writes the answer, and the MLP behind it notes that it has. A head of "
        "layer 1 would read the cue itself, but the note turns its query away: it answers only "
        "where the first does not, and is silent in an ordinary run.",
        {0: (_copies("cue", {"answer": 1.0, "said": 1.0}),), 1: (_STAND_IN,)},
        {0: _magnitude("said", "done")},
    ),
    "dead": HandBuilt(
        "one head among dead and constant ones",
        "One head of layer 1 writes the answer; of the others some read the cue and have W_O = 0, "
        "some write a constant.",
        {1: (_SOLVER,)},
        distractors=(DEAD, CONSTANT),
    ),
}


def plant_by_hand(name: str, *, seed: int = 0) -> Planting:
    """Build a circuit of `HAND_BUILT`.

    Args:
        name: name of the circuit.
        seed: seed of the heads' places and of the prompts.

    Returns:
        The model with its circuit and examples.
    """
    spec, draw = HAND_BUILT[name], random.Random(f"{name} {seed}")
    planted: dict[Head, HandHead] = {}
    for layer, own in spec.heads.items():
        places = draw.sample(range(N_HEADS), len(own))
        planted |= {Head(layer, place): head for place, head in zip(places, own, strict=True)}
    others = [head for head in all_heads(N_LAYERS, N_HEADS) if head not in planted]
    heads = planted | dict(zip(others, itertools.cycle(spec.distractors), strict=False))
    blueprint = Blueprint(WORDS, EMBED, UNEMBED, heads, spec.neurons, gated=spec.gated)
    train, valid = _examples(spec, draw)
    return Planting(build(blueprint), WORDS, tuple(sorted(planted)), train, valid, spec.why)


def _examples(spec: HandBuilt, draw: random.Random) -> tuple[Examples, Examples]:
    """Draw arrangements of the pieces, with all cues and switches; none is in both splits."""
    n_pieces = len(spec.pieces(1, 1)[1])
    places = list(itertools.product(
        itertools.permutations(range(n_pieces)),
        itertools.product(range(LARGEST_GAP + 1), repeat=n_pieces + 1),
    ))  # fmt: skip
    chosen = draw.sample(places, N_TRAIN + N_VALID)
    splits = {"train": chosen[:N_TRAIN], "valid": chosen[N_TRAIN:]}
    train, valid = (
        Examples(tuple(e for place in part for e in _four(spec, *place)), LABELS, split)
        for split, part in splits.items()
    )
    return train, valid


def _four(spec: HandBuilt, order: tuple[int, ...], gaps: tuple[int, ...]) -> list[Example]:
    """Return the prompts of one arrangement: every cue with every switch."""
    examples = []
    for cue, switch in itertools.product(CUES, SWITCHES):
        answer, pieces = spec.pieces(cue, switch)
        parts = [["so"] * gap + pieces[i] for i, gap in zip(order, gaps, strict=False)]
        text = ["<s>", *itertools.chain(*parts), *["so"] * gaps[-1], "?"]
        label, other = LABELS if answer == 1 else LABELS[::-1]
        ids = [WORDS.index(word) for word in text]
        examples.append(spelt(WORDS, ids, label, WORDS.index(label), [WORDS.index(other)]))
    return examples
