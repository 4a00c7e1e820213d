"""Generate tasks with known behaviour: indirect object, greater-than and gendered pronoun.

1. Draw words with a seed from the lists below. Only words that are one token of the tokenizer with
   a leading space are used, so that every filled-in template has one length.
2. Alternate the labels, so that each split is balanced. No prompt occurs twice in a task.
3. `ioi` asks "When A and B met ..., B gave a book to" and expects A (arXiv 2211.00593, section 2).
   `greater_than` asks "... from the year 1732 to the year 17" and expects 33 to 99 (arXiv
   2305.00586, section 2). `gendered_pronoun` asks "Yes, Mary is a very good doctor, isn't" and
   expects "she".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from transformers import PreTrainedTokenizerBase

from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import FromZeroCount, Seed
from cdt_lens.core.errors import InputError
from cdt_lens.tasks.prompts import (
    check_boundary,
    encode,
    verbalizer_token_ids,
    with_bos,
    word_ids,
)
from cdt_lens.tasks.task import Example, Examples, Task, WordIds

DEFAULT_SIZES = (128, 128, 128)
# The text before a word while its tokens are read: every prompt ends in a word.
_CONTEXT = "The"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


MEN = _words(
    "Adam Alan Andrew Anthony Ben Brian Charles Daniel David Edward Eric Frank George Henry Jack "
    "James John Joseph Kevin Mark Martin Michael Paul Peter Richard Robert Simon Steven Thomas Tom"
)
WOMEN = _words(
    "Alice Amanda Amy Anna Anne Barbara Carol Catherine Christine Claire Diana Elizabeth Emily "
    "Emma "
    "Helen Jane Jennifer Jessica Julia Karen Kate Laura Linda Lisa Maria Mary Michelle Nancy "
    "Rachel Sarah Susan"
)
PLACES = _words(
    "bank beach bridge church farm garden hospital hotel house library market museum office park "
    "school station theater village"
)
THINGS = _words(
    "bag ball book bottle box camera card coat cup gift hat key letter map phone ring ticket watch"
)
ROLES = _words(
    "coach cook dancer doctor driver friend guide judge lawyer neighbor painter runner singer "
    "student teacher worker writer"
)
EVENTS = _words(
    "alliance battle campaign conflict crisis drought famine festival fight journey mission plague "
    "project siege strike trial voyage war"
)
CENTURIES = range(11, 18)

IOI_TEMPLATES = (
    "When {first} and {second} met at the {place}, {subject} handed a {thing} to",
    "After {first} and {second} came home from the {place}, {subject} gave a {thing} to",
    "While {first} and {second} were working at the {place}, {subject} passed a {thing} to",
    "Once {first} and {second} had left the {place}, {subject} decided to give a {thing} to",
)
GREATER_THAN_TEMPLATE = "The {event} lasted from the year {stem}{start} to the year {stem}"
PRONOUN_TEMPLATES = (
    "Yes, {name} is a very good {role}, isn't",
    "I heard that {name} became a {role} because",
    "My friend {name} works as a {role}, and last week",
    "Everyone knows that {name} was a {role} when",
)


@dataclass(frozen=True)
class _Draft:
    prompt: str
    answers: tuple[WordIds, ...]
    others: tuple[WordIds, ...]
    word: str
    fields: Mapping[str, str]


@dataclass(frozen=True)
class _Recipe:
    """The parts of a generated task; `draw` creates one prompt of a label."""

    name: str
    labels: tuple[str, ...]
    template: str
    draw: Callable[[str, random.Random], _Draft]
    verbalizer: Mapping[str, str] = field(default_factory=dict)


@checked_arguments
def ioi(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: Sequence[FromZeroCount] = DEFAULT_SIZES,
    seed: Seed = 0,
    prepend_bos: bool | None = None,
) -> Task:
    """Generate indirect object identification (arXiv 2211.00593).

    The label is the order of the names, "ABBA" or "BABA". The answer is the name of the indirect
    object (A). The competing token is the name of the subject (B), which occurs twice.

    Args:
        tokenizer: the model's tokenizer.
        n: sizes of train, valid and test.
        seed: seed of every draw.
        prepend_bos: whether to prepend BOS. None prepends it if the tokenizer has one.

    Returns:
        The task.

    Raises:
        InputError: too few of the words are single tokens, or too many prompts are requested.
    """
    names = _single_tokens(tokenizer, "ioi", "names", MEN + WOMEN, minimum=6)
    places = list(_single_tokens(tokenizer, "ioi", "places", PLACES, minimum=3))
    things = list(_single_tokens(tokenizer, "ioi", "things", THINGS, minimum=3))

    def draw(label: str, generator: random.Random) -> _Draft:
        answer, subject = generator.sample(list(names), 2)
        first, second = (answer, subject) if label == "ABBA" else (subject, answer)
        words = {"first": first, "second": second, "subject": subject}
        words |= {"place": generator.choice(places), "thing": generator.choice(things)}
        prompt = generator.choice(IOI_TEMPLATES).format_map(words)
        fields = {**words, "indirect_object": answer}
        return _Draft(prompt, (names[answer],), (names[subject],), f" {answer}", fields)

    recipe = _Recipe("ioi", ("ABBA", "BABA"), "\n".join(IOI_TEMPLATES), draw)
    return _build(recipe, tokenizer, n=n, seed=seed, prepend_bos=prepend_bos)


@checked_arguments
def greater_than(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: Sequence[FromZeroCount] = DEFAULT_SIZES,
    seed: Seed = 0,
    prepend_bos: bool | None = None,
) -> Task:
    """Generate years of which the end must be later than the start (arXiv 2305.00586).

    The label says in which half of the range the start lies. Where the tokenizer has two-digit
    tokens, the prompt ends after the century ("17"). For a start in 1732 the answers are the tokens
    33 to 99 and the others are 00 to 32. The label is "early" for a start in 00-49 and "late" for
    one in 50-99. Where the tokenizer splits years into digits, the prompt ends after the decade
    ("173"), the answers are 3 to 9, the others 0 to 2, and "early" is 0-4. Only endings that the
    tokenizer itself would produce after the stem are used.

    Args:
        tokenizer: the model's tokenizer.
        n: sizes of train, valid and test.
        seed: seed of every draw.
        prepend_bos: whether to prepend BOS. None prepends it if the tokenizer has one.

    Returns:
        The task.

    Raises:
        InputError: the tokenizer writes years in another way, or too many prompts are requested.
    """
    events = list(_single_tokens(tokenizer, "greater-than", "events", EVENTS, minimum=3))
    endings, stems = _year_stems(tokenizer)
    half = len(endings) // 2

    def draw(label: str, generator: random.Random) -> _Draft:
        stem = generator.choice(list(stems))
        ids = stems[stem]
        last = max(ids)
        starts = [e for e in ids if e != last and (endings.index(e) < half) == (label == "early")]
        start = generator.choice(starts)
        words = {"event": generator.choice(events), "stem": stem, "start": start}
        answers = tuple(ids[e] for e in ids if e > start)
        others = tuple(ids[e] for e in ids if e <= start)
        word = next(e for e in ids if e > start)
        return _Draft(GREATER_THAN_TEMPLATE.format_map(words), answers, others, word, words)

    recipe = _Recipe("greater-than", ("early", "late"), GREATER_THAN_TEMPLATE, draw)
    return _build(recipe, tokenizer, n=n, seed=seed, prepend_bos=prepend_bos)


@checked_arguments
def gendered_pronoun(
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: Sequence[FromZeroCount] = DEFAULT_SIZES,
    seed: Seed = 0,
    prepend_bos: bool | None = None,
) -> Task:
    """Generate prompts for the pronoun that follows a name.

    The labels are "he" and "she", and the answers are " he" and " she".

    Args:
        tokenizer: the model's tokenizer.
        n: sizes of train, valid and test.
        seed: seed of every draw.
        prepend_bos: whether to prepend BOS. None prepends it if the tokenizer has one.

    Returns:
        The task.

    Raises:
        InputError: too few of the words are single tokens, or too many prompts are requested.
    """
    name = "gendered-pronoun"
    people = {
        "he": list(_single_tokens(tokenizer, name, "men's names", MEN, minimum=3)),
        "she": list(_single_tokens(tokenizer, name, "women's names", WOMEN, minimum=3)),
    }
    roles = list(_single_tokens(tokenizer, name, "roles", ROLES, minimum=3))
    verbalizer = {"he": " he", "she": " she"}
    ids = verbalizer_token_ids(tokenizer, verbalizer, _CONTEXT)

    def draw(label: str, generator: random.Random) -> _Draft:
        words = {"name": generator.choice(people[label]), "role": generator.choice(roles)}
        prompt = generator.choice(PRONOUN_TEMPLATES).format_map(words)
        others = tuple(ids[other] for other in ids if other != label)
        return _Draft(prompt, (ids[label],), others, verbalizer[label], words)

    recipe = _Recipe(name, tuple(ids), "\n".join(PRONOUN_TEMPLATES), draw, verbalizer)
    return _build(recipe, tokenizer, n=n, seed=seed, prepend_bos=prepend_bos)


GENERATORS: Mapping[str, Callable[..., Task]] = MappingProxyType(
    {"ioi": ioi, "greater-than": greater_than, "gendered-pronoun": gendered_pronoun}
)


def _build(
    recipe: _Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: Sequence[int],
    seed: int,
    prepend_bos: bool | None,
) -> Task:
    if len(n) != 3 or any(size != 0 and size < len(recipe.labels) for size in n):
        raise InputError(
            f"{recipe.name}: n={tuple(n)}: expected the sizes of train, valid and test, each 0 or "
            f"at least {len(recipe.labels)} (one prompt a label)"
        )
    generator = random.Random(seed)
    words = recipe.verbalizer
    ids = verbalizer_token_ids(tokenizer, words, _CONTEXT) if words else {}
    prompts: set[str] = set()

    def split(part: str, size: int) -> Examples:
        labels = [recipe.labels[i % len(recipe.labels)] for i in range(size)]
        drafts = [_fresh(recipe, label, generator, prompts) for label in labels]
        encoded = encode(tokenizer, [draft.prompt for draft in drafts])
        tokens = [with_bos(tokenizer, own, prepend_bos) for own in encoded]
        items = tuple(
            Example(draft.prompt, own, label, draft.answers, draft.others, draft.fields)
            for draft, own, label in zip(drafts, tokens, labels, strict=True)
        )
        places = [f"{recipe.name}, prompt {item.prompt!r}" for item in items]
        words = [draft.word for draft in drafts]
        answers = [draft.answers[0] for draft in drafts]
        check_boundary(tokenizer, items, words, answers, places, prepend_bos=prepend_bos)
        return Examples(items, recipe.labels, f"{recipe.name}/{part}")

    train, valid, test = (
        split(part, size) for part, size in zip(("train", "valid", "test"), n, strict=True)
    )
    return Task(
        name=recipe.name,
        labels=recipe.labels,
        verbalizer=recipe.verbalizer,
        verbalizer_ids=ids,
        template=recipe.template,
        train=train,
        valid=valid,
        test=test,
        content_free=Examples((), recipe.labels, f"{recipe.name}/content-free"),
    )


def _fresh(recipe: _Recipe, label: str, generator: random.Random, seen: set[str]) -> _Draft:
    """Draw a prompt that is not in `seen`, and add it there."""
    for _ in range(1000):
        draft = recipe.draw(label, generator)
        if draft.prompt not in seen:
            seen.add(draft.prompt)
            return draft
    raise InputError(
        f"{recipe.name}: only about {len(seen)} different prompts can be made with the words that "
        "are single tokens here. Request fewer with n=(train, valid, test)."
    )


def _single_tokens(
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    kind: str,
    words: Sequence[str],
    *,
    minimum: int,
) -> dict[str, int]:
    """Return the words that are one token with a leading space, with their ids."""
    pieces = word_ids(tokenizer, [f" {word}" for word in words], _CONTEXT)
    single: dict[str, int] = {}
    for word, ids in zip(words, pieces, strict=True):
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id and ids[0] not in single.values():
            single[word] = ids[0]
    if len(single) < minimum:
        raise InputError(
            f"{task}: only {len(single)} of {len(words)} {kind} are single tokens here; "
            f"at least {minimum} are needed. Use a tokenizer with a larger vocabulary, or another "
            "task."
        )
    return single


def _year_stems(
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[str], dict[str, dict[str, int]]]:
    """Return the endings of a year in order, and for each stem those that follow as one token."""
    two_digits = [f"{ending:02}" for ending in range(100)]
    one_digit = [str(ending) for ending in range(10)]
    decades = [f"{century}{decade}" for century in CENTURIES for decade in range(10)]
    for stems, endings in (([*map(str, CENTURIES)], two_digits), (decades, one_digit)):
        followers = {stem: _continuations(tokenizer, stem, endings) for stem in stems}
        half = endings[len(endings) // 2]
        # Three starts in each half leave later and earlier years to choose from.
        usable = {
            stem: ids
            for stem, ids in followers.items()
            if sum(e < half for e in ids) > 3 and sum(e >= half for e in ids) > 3
        }
        if usable:
            return endings, usable
    raise InputError(
        "greater-than: this tokenizer writes years neither with two-digit tokens nor digit by "
        "digit. Use another task."
    )


def _continuations(
    tokenizer: PreTrainedTokenizerBase, stem: str, endings: Sequence[str]
) -> dict[str, int]:
    """Return the endings that the tokenizer writes as one token after the stem, with their ids."""
    before = encode(tokenizer, [f" {stem}"])[0]
    years = encode(tokenizer, [f" {stem}{ending}" for ending in endings])
    unknown = tokenizer.unk_token_id
    return {
        ending: ids[-1]
        for ending, ids in zip(endings, years, strict=True)
        if ids[:-1] == before and ids[-1] != unknown
    }
