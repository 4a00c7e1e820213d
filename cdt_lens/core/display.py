"""How results show themselves: a line in a terminal, a table or a figure in a notebook.

1. `__repr__` is one line of facts, never a tensor. 2. `_repr_html_` needs no network, escapes what
comes from data, and names no colour, so that it reads on a light and on a dark page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from markupsafe import Markup

if TYPE_CHECKING:
    pass

POSITIVE, NEGATIVE, INK, MUTED = "#2166ac", "#b2182b", "#1a1a1a", "#666666"

_ROWS = 40  # of a table; a longer one is cut in its middle
_WIDTH = 160  # characters of a cell


def line(result: object, *facts: object) -> str:
    """Such as "Circuit(27 of 270 heads; L9H6, L9H9, ...)": the type and what to know of it."""
    return f"{type(result).__name__}({'; '.join(str(fact) for fact in facts if fact != '')})"


def few(items: Iterable[object], most: int = 6) -> str:
    """The first of the items, and how many there are where they are more."""
    listed = [str(item) for item in items]
    shown = ", ".join(listed[:most])
    return shown if len(listed) <= most else f"{shown}, ... ({len(listed)})"


def short(text: str, most: int = 60) -> str:
    """The beginning of a text, on one line and in quotation marks."""
    return repr(text if len(text) <= most else f"{text[:most]}...")


def html(title: str, *parts: str | pd.DataFrame) -> str:
    """A paragraph, escaped, and under it tables and ready HTML."""
    shown = [Markup(frame_html(p) if isinstance(p, pd.DataFrame) else p) for p in parts]
    return str(Markup("<p>{}</p>{}").format(title, Markup("").join(shown)))


def frame_html(frame: pd.DataFrame, form: str = "{:.4g}") -> str:
    """A table of `frame`, escaped; missing values stay empty."""
    with pd.option_context("display.max_colwidth", _WIDTH):
        return str(
            frame.to_html(
                index=False, border=0, max_rows=_ROWS, na_rep="", float_format=form.format
            )
        )


def flat_frame(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> pd.DataFrame:
    """Rows as a table with these columns, also where there are none."""
    return pd.DataFrame(list(rows), columns=list(columns))
