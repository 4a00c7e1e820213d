"""The errors that `cdt_lens` raises on purpose.

A message names the place, the expected value, the actual value and the fix. The command line prints
it as one line without a traceback.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

_LONGEST = 2000  # characters of a message


class CdtLensError(Exception):
    """Base of every error that this package raises on purpose."""

    def __str__(self) -> str:
        # A message may show what a file or a call holds: any text, of any length.
        text = " ".join(super().__str__().splitlines()).encode("utf-8", "backslashreplace").decode()
        if len(text) <= _LONGEST:
            return text
        return f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


class InputError(CdtLensError, ValueError):
    """A value, file or option that the caller gave cannot be used."""


class UnknownNameError(InputError, AttributeError):
    """The package has no such name at its top level."""


class SplitWordError(InputError):
    """A method needs answers of one token each, and the tokenizer splits one."""


class ArtifactError(CdtLensError):
    """A saved file is damaged, of a newer format, of another kind, or of another model."""


class UnsupportedModelError(CdtLensError):
    """The model has a component without a propagation rule."""


class NonFiniteError(CdtLensError):
    """A number is not finite; the message names the place and the rule to change."""


class CdtLensWarning(UserWarning):
    """The call gives a result, but a mistake in its input is likely."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Suggest the option that is closest to a misspelt word, and name its look-alike letters.

    Args:
        word: The unknown word.
        options: The known words.

    Returns:
        "; did you mean 'x'?", or "" where no option is close. Letters by which only one of the two
        leaves ASCII follow with their code points, because they may look the same.
    """
    if len(word) > 100:
        return ""
    names = {option.strip().lower(): option for option in options}
    close = difflib.get_close_matches(word.strip().lower(), list(names), n=1)
    if not close:
        return _code_points(word, names.values())
    suggested = names[close[0]]
    return f"; did you mean {suggested!r}?{_code_points(word, [suggested], [suggested])}"


def _code_points(word: str, known: Iterable[str], also: Iterable[str] = ()) -> str:
    """Name the letters outside ASCII that `word` has and `known` has not, or the reverse."""
    own, others = set(word), set("".join(known))
    odd = (own - others) | (set("".join(also)) - own)
    letters = sorted(letter for letter in odd if not letter.isascii())
    if not letters or len(letters) > 2:
        return ""
    shown = (f"{x!r} is U+{ord(x):04X} {unicodedata.name(x, '')}".rstrip() for x in letters)
    return f" ({', '.join(shown)})"
