"""`task_from_prompts`: a task of prompts that a researcher writes by hand.

1. Every prompt has its answer words, and the words that compete with them. By default these are the
   answers of the other prompts.
2. A word has the tokens that follow its prompt; a word of several tokens is scored by its
   log-probability (`models/words.py`).
3. The task direction of a prompt is the mean score of its answers minus that of its competitors.
"""

from __future__ import annotations

from collections.abc import Sequence

from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.choices import FromZeroCount
from cdt_lens.core.errors import InputError
from cdt_lens.tasks.prompts import Tokenizer, check_boundary, encode, with_bos, word_ids
from cdt_lens.tasks.task import Example, Examples, Task, WordIds

Words = str | Sequence[str]


@checked_arguments
def task_from_prompts(
    prompts: Sequence[str],
    answers: Sequence[Words],
    others: Sequence[Words] | None = None,
    *,
    tokenizer: Tokenizer,
    labels: Sequence[str] | None = None,
    valid: FromZeroCount = 0,
    name: str = "prompts",
    prepend_bos: bool | None = None,
) -> Task:
    """Make a task of prompts written by hand, each with its own answers.

    Args:
        prompts: The prompts, without their answers. A prompt usually ends without a space.
        answers: The right word or words of each prompt, usually with a leading space.
        others: The competing word or words of each prompt. None takes the answers of the other
            prompts that are not right for this one.
        tokenizer: The model's tokenizer.
        labels: The label of each prompt, over which means are balanced, such as the order of two
            names. None gives all prompts the label "prompt".
        valid: Number of prompts at the end that are kept for the validation split.
        name: Name of the task.
        prepend_bos: Whether to prepend BOS. None prepends it if the tokenizer has one.

    Returns:
        The task. The prompts are its train split, but for those of `valid`.

    Raises:
        InputError: The sequences differ in length, the tokenizer does not know a word or merges it
            with its prompt, or a prompt has no competitor or one that is also right.
    """
    given = {"answers": answers, "others": others, "labels": labels}
    for argument, values in given.items():
        if values is not None and len(values) != len(prompts):
            raise InputError(
                f"{argument}: {len(values)} for {len(prompts)} prompts; give one for each prompt"
            )
    if not prompts or valid >= len(prompts):
        raise InputError(f"prompts: {len(prompts)}, of which {valid} for valid; give more prompts")
    right = [_listed(words) for words in answers]
    wrong = _competitors(right) if others is None else [_listed(words) for words in others]
    named = ["prompt"] * len(prompts) if labels is None else list(labels)
    tokens = [with_bos(tokenizer, ids, prepend_bos) for ids in encode(tokenizer, prompts)]
    places = [f"{name}, prompt {number}" for number in range(1, len(prompts) + 1)]
    items: list[Example] = []
    every: list[tuple[Example, str, WordIds, str]] = []
    for text, ids, label, own, rest, at in zip(
        prompts, tokens, named, right, wrong, places, strict=True
    ):
        answer, other = (_ids(tokenizer, text, words, at) for words in (own, rest))
        items.append(Example(text, ids, label, answer, other))
        pairs = zip((*own, *rest), (*answer, *other), strict=True)
        every += [(items[-1], word, word_tokens, at) for word, word_tokens in pairs]
    examples, words, expected, where = zip(*every, strict=True)
    check_boundary(tokenizer, examples, words, expected, where, prepend_bos=prepend_bos)
    return _task(items, tuple(sorted(set(named))), valid, name)


def _task(items: Sequence[Example], labels: tuple[str, ...], valid: int, name: str) -> Task:
    def split(part: str, own: Sequence[Example]) -> Examples:
        return Examples(tuple(own), labels, f"{name}/{part}")

    cut = len(items) - valid
    return Task(
        name=name, labels=labels, verbalizer={}, verbalizer_ids={}, template="",
        train=split("train", items[:cut]), valid=split("valid", items[cut:]),
        test=split("test", ()), content_free=split("content-free", ()),
    )  # fmt: skip


def _listed(words: Words) -> list[str]:
    return [words] if isinstance(words, str) else list(words)


def _competitors(right: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return for each prompt the answers of the others that are not its own."""
    every = list(dict.fromkeys(word for own in right for word in own))
    return [[word for word in every if word not in own] for own in right]


def _ids(
    tokenizer: Tokenizer, prompt: str, words: Sequence[str], place: str
) -> tuple[WordIds, ...]:
    """Return the tokens of each word behind its prompt."""
    found: list[WordIds] = []
    for word, ids in zip(words, word_ids(tokenizer, words, prompt), strict=True):
        if not ids or tokenizer.unk_token_id in ids:
            raise InputError(
                f"{place}: the tokenizer does not know the word {word!r}, got "
                f"{tokenizer.convert_ids_to_tokens(ids)}; choose another word (most need a leading "
                "space)"
            )
        found.append(ids[0] if len(ids) == 1 else tuple(ids))
    return tuple(found)
