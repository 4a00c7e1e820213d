"""Generate a sentiment task in English and in invented languages at a chosen distance from it.

The task serves experiments on transfer between languages without data. A meaning is drawn once and
expressed in any language, so that row i of a split means the same at every distance (the rows are
parallel, as in NusaX).

1. A clause states a fact or an opinion. A negation reverses the opinion. Intensifiers and negated
   facts change nothing. "and" joins any two clauses: an opinion and a fact make that opinion, and
   two opposite opinions are neutral. "but" joins opposite opinions, and the last one counts.
   "although" joins them, and the first one counts. So the label depends on the structure and not on
   the words alone.
2. Distance 0 is English. A word of `LEXICON` is replaced by an invented one where the distance is
   above the word's threshold. The thresholds are drawn once for a language. So a word replaced at
   0.3 is also replaced at 0.6, that share of each class is replaced, and at 1 every word is
   replaced.
3. Word order: from 0.2 an adjective follows its noun, from 0.4 an intensifier follows its word,
   from 0.6 a negation follows what it negates, from 0.8 the verb ends its clause.
4. Suffixes, on invented words only: from 0.3 on the noun of an object, from 0.5 on an adjective
   next to a noun.
5. The checksum of the English sentence assigns it to training, validation, test or pre-training
   ("unlabelled"). So no meaning is in two of them, whatever the seeds and sizes.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice, product
from types import MappingProxyType
from typing import Any, NamedTuple

from cdt_lens.core.errors import InputError

PSEUDO_TASK = "pseudo-sentiment"
TEMPLATE = "{text}\nSentiment:"
VERBALIZER = MappingProxyType(
    {"negative": " negative", "neutral": " neutral", "positive": " positive"}
)
SIZES = (500, 100, 400)
PARTS = ("train", "valid", "test", "unlabelled")

LEXICON: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        name: tuple(words.split())
        for name, words in {
            "who": "we they people guests friends visitors",
            "definite": "the this that our",
            "indefinite": "a",
            "noun": "meal room film book hotel phone concert game shop soup coffee camera garden "
            "museum lesson jacket",
            "good": "good great lovely superb perfect pleasant brilliant wonderful",
            "bad": "bad terrible poor dull nasty dreadful horrible lousy",
            "plain": "small local large new modern foreign round red",
            "like": "liked loved enjoyed admired",
            "hate": "hated disliked regretted resented",
            "have": "had found got saw",
            "be": "was seemed looked felt",
            "very": "really truly clearly",
            "not": "never hardly rarely",
            "join": "and but although",
        }.items()
    }
)
# The slots of a clause in English order. A rule of REVERSED_FROM exchanges the two parts after its
# name. The part after the slash is a use in SUFFIX_FROM.
_NOUN = ("adjective", "plain/linked", "noun")
_OBJECT = ("adjective", "plain/linked", "noun/object")
_RATED = ("adjective", ("intensity", "very", "quality/linked"), "noun/object")
_QUALITY = ("negation", "not", ("intensity", "very", "quality"))
_ACTION = ("negation", "not", ("intensity", "very", "action"))
CLAUSES: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "our red hotel was never really good": ("definite", _NOUN, ("verb", "be", _QUALITY)),
        "we never found a really good hotel": (
            "who",
            ("verb", ("negation", "not", "have"), ("indefinite", _RATED)),
        ),
        "we never really enjoyed our red hotel": ("who", ("verb", _ACTION, ("definite", _OBJECT))),
    }
)
REVERSED_FROM = {"adjective": 0.2, "intensity": 0.4, "negation": 0.6, "verb": 0.8}
SUFFIX_FROM = {"object": 0.3, "linked": 0.5}
# The word classes that fill a slot where the clause is a fact [0], good [1] or bad [-1].
_BY_SIGN = {"quality": ("plain", "good", "bad"), "action": ("have", "like", "hate")}
# The probability that a slot is filled, where it is below 1.
_CHANCE = {"not": 0.25, "very": 0.3, "plain/linked": 0.3}
_SIGN = {"negative": -1, "neutral": 0, "positive": 1}


class _Clause(NamedTuple):
    """The kind of clause in `CLAUSES`, and an English word for each filled slot."""

    kind: str
    words: Mapping[str, str]


@dataclass(frozen=True)
class _Language:
    """The invented words by English word, the suffixes by use, and the slots of each clause."""

    invented: Mapping[str, str]
    suffixes: Mapping[str, str]
    order: Mapping[str, tuple[str, ...]]

    def form(self, word: str, slot: str) -> str:
        if word not in self.invented:
            return word
        return self.invented[word] + self.suffixes.get(slot.partition("/")[2], "")

    def say(self, clauses: Sequence[_Clause], conjunction: str) -> str:
        said = [
            " ".join(self.form(words[slot], slot) for slot in self.order[kind] if slot in words)
            for kind, words in clauses
        ]
        return f" {self.form(conjunction, 'join')} ".join(said)


def parse_distance(config: object) -> float:
    """Return the distance that a configuration names.

    Args:
        config: "source" for 0, or a number from 0 to 1.

    Returns:
        The distance.

    Raises:
        InputError: the value is neither.
    """
    if config == "source":
        return 0.0
    try:
        distance = float(str(config))
    except ValueError:
        distance = -1.0
    if not 0 <= distance <= 1:
        raise InputError(
            f"task {PSEUDO_TASK!r}: config={config!r}: expected 'source' or the distance of the "
            "language from it, a number from 0 to 1 such as '0.6'"
        )
    return distance


def pseudo_sentences(
    n: int,
    distance: float | int | str,
    seed: int = 0,
    *,
    part: str = "train",
    plain: bool = False,
    language_seed: int = 0,
) -> list[dict[str, str]]:
    """Generate different sentences, with the labels in turn.

    Row i means the same in every language. A smaller `n` gives the first rows of a larger one.

    Args:
        n: number of rows.
        distance: "source" or a number from 0 to 1.
        seed: seed of the meanings.
        part: "train", "valid", "test" or "unlabelled".
        plain: whether each row is one clause without negation. There are thousands of these, and
            millions of others.
        language_seed: seed of the language.

    Returns:
        Rows with the columns "text" and "label".

    Raises:
        InputError: the distance is outside 0 to 1, the part is unknown, or there are not enough
            sentences.
    """
    language = _language(parse_distance(distance), language_seed)
    if n < 0 or part not in PARTS:
        raise InputError(
            f"{PSEUDO_TASK}: n={n}, part={part!r}: expected n of at least 0 and a part among "
            f"{', '.join(PARTS)}"
        )
    draw = random.Random(f"{PSEUDO_TASK} {part} {seed}")
    seen: set[str] = set()
    rows = []
    for label in islice(cycle(VERBALIZER), n):
        clauses, conjunction = _fresh(draw, label, part, plain, seen)
        rows.append({"text": language.say(clauses, conjunction), "label": label})
    return rows


def pseudo_splits(
    config: str | None, n: Sequence[int], seed: int = 0
) -> dict[str, list[dict[str, str]]]:
    """Generate the rows of train, valid and test.

    Args:
        config: "source" or a number from 0 to 1.
        n: sizes of train, valid and test.
        seed: seed of the meanings.

    Returns:
        The rows of each split. A split of size 0 is left out.

    Raises:
        InputError: `config` is not a distance, or `n` is not three sizes of 0 or at least 3.
    """
    distance = parse_distance(config)
    if len(n) != 3 or any(size != 0 and size < len(VERBALIZER) for size in n):
        raise InputError(
            f"{PSEUDO_TASK}: n={tuple(n)}: expected the sizes of train, valid and test, each 0 or "
            f"at least {len(VERBALIZER)} (one sentence a label)"
        )
    sizes = zip(PARTS, n, strict=False)
    return {part: pseudo_sentences(k, distance, seed, part=part) for part, k in sizes if k}


def pseudo_vocabulary(
    distances: Iterable[float | int | str], language_seed: int = 0
) -> tuple[str, ...]:
    """Return every word that can occur in English or at one of the distances.

    Args:
        distances: "source" or numbers from 0 to 1.
        language_seed: seed of the language.

    Returns:
        The words, suffixed forms included.

    Raises:
        InputError: a distance is outside 0 to 1.
    """
    words: dict[str, None] = {}
    for distance in ("source", *distances):
        language = _language(parse_distance(distance), language_seed)
        for slot in ("join", *(slot for slots in language.order.values() for slot in slots)):
            for name in _classes(slot):
                words |= dict.fromkeys(language.form(word, slot) for word in LEXICON[name])
    return tuple(words)


@cache
def _language(distance: float, seed: int) -> _Language:
    """Create the language of `seed` at `distance`: draw everything, then select by the distance."""
    draw = random.Random(f"{PSEUDO_TASK} language {seed}")
    suffixes = dict(zip(SUFFIX_FROM, draw.sample(("ke", "le", "me", "se"), 2), strict=True))
    taken = {word for words in LEXICON.values() for word in words}
    invented: dict[str, str] = {}
    for words in LEXICON.values():
        # The threshold of the i-th word of a class lies between i/n and (i+1)/n. The order of the
        # words is drawn for each language.
        for i, word in enumerate(draw.sample(words, len(words))):
            threshold = (i + draw.random()) / len(words)
            new = _invent(draw, taken)
            if threshold < distance:
                invented[word] = new
    on = {use: suffix for use, suffix in suffixes.items() if distance >= SUFFIX_FROM[use]}
    order = {kind: tuple(_slots(pattern, distance)) for kind, pattern in CLAUSES.items()}
    return _Language(invented, on, order)


def _slots(pattern: tuple[Any, ...] | str, distance: float) -> list[str]:
    """Return the slots of a clause from left to right."""
    if isinstance(pattern, str):
        return [pattern]
    ruled = pattern[0] in REVERSED_FROM
    parts = pattern[1:] if ruled else pattern
    if ruled and distance >= REVERSED_FROM[pattern[0]]:
        parts = parts[::-1]
    return [slot for part in parts for slot in _slots(part, distance)]


def _invent(draw: random.Random, taken: set[str]) -> str:
    """Invent a pronounceable word that is not in `taken`, and add it there.

    It has no "e" and every suffix ends in one, so that no suffixed form equals another word.
    """
    while True:
        syllables = range(draw.choice((2, 2, 3)))
        word = "".join(draw.choice("bdfgjklmnprstz") + draw.choice("aiou") for _ in syllables)
        if word not in taken:
            taken.add(word)
            return word


def _shapes() -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Return the kinds of sentence of each label: a conjunction and the signs of the clauses."""
    shapes: dict[str, list[tuple[str, tuple[int, ...]]]]
    shapes = {label: [("", (sign,))] for label, sign in _SIGN.items()}
    by_sign = {sign: label for label, sign in _SIGN.items()}
    for first, second in product((-1, 0, 1), repeat=2):
        total = max(-1, min(1, first + second))
        shapes[by_sign[total]].append(("and", (first, second)))
    for last in (-1, 1):
        shapes[by_sign[last]] += [("but", (-last, last)), ("although", (last, -last))]
    return shapes


_SHAPES = _shapes()


def _fresh(
    draw: random.Random, label: str, part: str, plain: bool, seen: set[str]
) -> tuple[list[_Clause], str]:
    """Draw clauses and conjunction of `part` whose English is not in `seen`, and add it there."""
    english = _language(0.0, 0)
    for _ in range(1000):
        conjunction, signs = _SHAPES[label][0] if plain else draw.choice(_SHAPES[label])
        clauses = [_clause(draw, english, sign, plain) for sign in signs]
        text = english.say(clauses, conjunction)
        if text not in seen and PARTS[zlib.crc32(text.encode()) % len(PARTS)] == part:
            seen.add(text)
            return clauses, conjunction
    raise InputError(
        f"{PSEUDO_TASK}: there are hardly more than {len(seen)} different sentences. Request fewer."
    )


def _clause(draw: random.Random, english: _Language, sign: int, plain: bool) -> _Clause:
    """Draw a clause whose opinion has this sign after its negation; 0 is a fact."""
    kind = draw.choice(tuple(CLAUSES))
    chance = {**_CHANCE, "not": 0.0} if plain else _CHANCE
    filled = [slot for slot in english.order[kind] if draw.random() < chance.get(slot, 1.0)]
    own = -sign if "not" in filled else sign
    return _Clause(kind, {slot: draw.choice(LEXICON[_classes(slot)[own]]) for slot in filled})


def _classes(slot: str) -> tuple[str, str, str]:
    """Return the word classes of a slot, indexed by the sign of the clause."""
    name = slot.partition("/")[0]
    return _BY_SIGN.get(name, (name, name, name))
