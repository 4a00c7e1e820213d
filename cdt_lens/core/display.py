"""How results show themselves: one line in a terminal, a table or a drawing in a notebook.

1. `__repr__` is one line of facts, never a tensor.
2. `_repr_html_` needs no network, escapes what comes from data, and sets no text colour, so that it
   reads on a light and on a dark page.
3. Results do not import drawing. `figure`, `table` and `page` dispatch on the type of the result;
   `cdt_lens.viz` registers the functions and is imported at the first call.
4. A figure is one Vega-Lite specification for notebook, page and paper. vl-convert was chosen over
   Plotly because its SVG, PNG and PDF need no browser, and its JavaScript for a page has 0.9 MB
   in place of 4.6 MB.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup, escape

from cdt_lens.core.artifacts import atomic_write
from cdt_lens.core.errors import InputError
from cdt_lens.core.table import Table

# Positive scores, negative scores, text, and what stands behind them, in every drawing.
POSITIVE, NEGATIVE, INK, MUTED = "#2166ac", "#b2182b", "#1a1a1a", "#666666"


@singledispatch
def figure(result: object, **options: Any) -> Any:
    """Draw a result.

    Args:
        result: A result of `cdt_lens`.
        **options: Options of the drawing, which depend on the type of `result`.

    Returns:
        A `Figure`; for views of prompts a `Widget`.

    Raises:
        InputError: Nothing draws a result of this type.
    """
    return _registered(figure, result)(result, **options)


@singledispatch
def table(result: object, **options: Any) -> Table:
    """Return the numbers of a result as a table of text; arguments and errors as in `figure`."""
    return _registered(table, result)(result, **options)


@singledispatch
def page(result: object) -> str:
    """Return the HTML that a notebook shows for a result; arguments and errors as in `figure`."""
    return _registered(page, result)(result)


def _registered(dispatcher: Any, result: object) -> Callable[..., Any]:
    # By name, because this folder stands before the one that draws.
    importlib.import_module("cdt_lens.viz")
    function = dispatcher.dispatch(type(result))
    if function is dispatcher.dispatch(object):
        names = ", ".join(kind.__name__ for kind in dispatcher.registry if kind is not object)
        raise InputError(
            f"{dispatcher.__name__}: cannot show a {type(result).__name__}; expected any of {names}"
        )
    return function


@dataclass(frozen=True)
class Figure:
    """A figure as a Vega-Lite specification, which a notebook shows without a network.

    `altair.Chart.from_dict(figure.spec)` makes a chart of it that can be changed.

    Args:
        title: The title.
        spec: The specification with its data, as plain JSON values.
    """

    title: str
    spec: Mapping[str, Any] = field(repr=False)

    @property
    def description(self) -> str:
        """What the figure shows, for readers who cannot see it."""
        return str(self.spec["description"])

    def svg(self) -> Markup:
        """Return the figure as an `<svg>` element, the same text each time.

        Its ids start with a hash of the drawing, so that figures on one page keep apart.
        """
        drawn = str(_vl_convert().vegalite_to_svg(self._json))
        prefix = f"figure-{hashlib.sha256(self._json.encode()).hexdigest()[:10]}"
        ids = {id: n for n, id in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]*)"', drawn)))}
        drawn = re.sub(r'\bid="([^"]*)"', lambda m: f'id="{prefix}-{ids[m[1]]}"', drawn)
        drawn = re.sub(r"url\(#([^)]*)\)", lambda m: f"url(#{prefix}-{ids[m[1]]})", drawn)
        named = Markup('<svg role="img" aria-label="{}" style="{}" ').format(
            f"{self.title}. {self.description}", "max-width:100%;height:auto"
        )
        return named + Markup(drawn.removeprefix("<svg "))

    def save(self, path: str | Path, *, scale: float = 2.0) -> Path:
        """Write the figure as .svg, .png or .pdf, or its specification as .json.

        Args:
            path: The file. Its ending says the format.
            scale: Pixels of a .png for each of its points.

        Returns:
            The path of the file.

        Raises:
            InputError: The ending is another one, or `path` cannot be written.
        """
        made: dict[str, Callable[[], bytes]] = {
            ".svg": lambda: self.svg().encode(),
            ".png": lambda: _vl_convert().vegalite_to_png(self._json, scale=scale),
            ".pdf": lambda: _vl_convert().vegalite_to_pdf(self._json),
            ".json": self._json.encode,
        }
        ending = Path(path).suffix.lower()
        if ending not in made:
            raise InputError(f"{path}: expected a file that ends in {', '.join(made)}")
        return atomic_write(path, made[ending]())

    @property
    def _json(self) -> str:
        return json.dumps(self.spec, allow_nan=False, separators=(",", ":"))

    def _repr_svg_(self) -> str:
        return self.svg()


def _vl_convert() -> Any:
    # Imported here because only figures need it.
    import vl_convert

    return vl_convert


@dataclass(frozen=True)
class Widget:
    """An HTML document that a notebook shows in a frame of its own, without a network.

    Args:
        title: The title of the frame.
        document: The whole HTML document.
        height: The height of the frame in pixels.
    """

    title: str
    document: str = field(repr=False)
    height: int

    def _repr_html_(self) -> str:
        frame = Markup(
            '<iframe title="{}" srcdoc="{}" sandbox="allow-scripts" '
            'style="width:100%;height:{}px;border:0;background:#fff"></iframe>'
        )
        return str(frame.format(self.title, self.document, self.height))


def line(result: object, *facts: object) -> str:
    """Return one line about a result, such as "Circuit(27 of 270 heads; L9H6, L9H9, ...)".

    Args:
        result: The result, whose type starts the line.
        *facts: The facts in the brackets; empty ones are left out.
    """
    return f"{type(result).__name__}({'; '.join(str(fact) for fact in facts if fact != '')})"


def few(items: Iterable[object], most: int = 6) -> str:
    """Return the first items, and the number of items if there are more.

    Args:
        items: The items to list.
        most: The number of items to show.
    """
    listed = [str(item) for item in items]
    shown = ", ".join(listed[:most])
    return shown if len(listed) <= most else f"{shown}, ... ({len(listed)})"


def short(text: str, most: int = 60) -> str:
    """Return the beginning of a text on one line, in quotation marks.

    Args:
        text: The text.
        most: The number of characters to keep.
    """
    return repr(text if len(text) <= most else f"{text[:most]}...")


def html(title: str, *parts: str | pd.DataFrame | Table) -> str:
    """Return a paragraph with tables and other HTML below it.

    Args:
        title: The text of the paragraph, which is escaped.
        *parts: Data frames and tables, whose cells are escaped, and HTML, which is not.
    """
    shown = (Table.of_frame(part) if isinstance(part, pd.DataFrame) else part for part in parts)
    body = (Markup(part) if isinstance(part, str) else escape(part) for part in shown)
    return str(Markup("<p>{}</p>{}").format(title, Markup("").join(body)))


def flat_frame(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> pd.DataFrame:
    """Return a data frame that has its columns even without rows.

    Args:
        columns: The names of the columns.
        rows: The rows, with one value for each column.
    """
    return pd.DataFrame(list(rows), columns=list(columns))
