"""Interactive views of prompts by circuitsvis, without a network, for a page or a notebook.

A view is a circuitsvis component and its data, which `scripts.py` puts into a page. Prompts are
untrusted text, and everything is escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from cdt_lens.core.display import POSITIVE, Widget
from cdt_lens.core.errors import InputError, NonFiniteError
from cdt_lens.scoring.prompt_views import AttentionView, TokenRelevance
from cdt_lens.viz import scripts

# Lighter than in the figures, so that black text on them can be read.
_COLOURS = {"positiveColor": "#67a9cf", "negativeColor": "#ef8a62"}


@dataclass(frozen=True)
class View:
    """A circuitsvis component and its data.

    Args:
        id: The id of the element that the view fills.
        component: The name of the component.
        props: The data of the component.
    """

    id: str
    component: str
    props: Mapping[str, Any] = field(repr=False)

    @property
    def placeholder(self) -> Markup:
        """The HTML element that the view fills."""
        words = "This view is drawn by JavaScript, which is switched off here."
        return Markup('<div class="view {}" id="{}"><p>{}</p></div>').format(
            self.component, self.id, words
        )


def attention(view: AttentionView, prompt: int = 0, *, id: str = "view") -> View:
    """Return the attention patterns on one prompt: queries down, keys across, rows sum to 1.

    Args:
        view: The patterns of all prompts.
        prompt: The index of the prompt.
        id: The id of the element that the view fills.

    Raises:
        InputError: There is no such prompt, or its pattern does not fit its tokens and heads.
        NonFiniteError: A pattern holds a value that is not finite.
    """
    tokens = _prompt(view.prompts, prompt, "AttentionView")
    pattern = view.patterns[prompt]
    expected = (len(view.heads), len(tokens), len(tokens))
    if tuple(pattern.shape) != expected:
        raise InputError(
            f"AttentionView, prompt {prompt}: expected a pattern [head query key] of {expected}, "
            f"got {tuple(pattern.shape)}"
        )
    _check_finite(pattern, f"AttentionView, prompt {prompt}")
    props = {
        "tokens": list(tokens),
        "attention": _rounded(pattern.tolist(), 4),
        "attentionHeadNames": [str(head) for head in view.heads],
        "maskUpperTri": True,
        "positiveColor": POSITIVE,
    }
    return View(id, "AttentionHeads", props)


def colored_tokens(relevance: TokenRelevance, prompt: int = 0, *, id: str = "view") -> View:
    """Return the tokens of one prompt, coloured by relevance in logits.

    Blue pushes towards the gold label, red away from it. The colours end at plus and minus the
    largest magnitude over all prompts, so that a colour means the same in every prompt.

    Args:
        relevance: The relevance of all prompts.
        prompt: The index of the prompt.
        id: The id of the element that the view fills.

    Raises:
        InputError: There is no such prompt, or its numbers of tokens and of values differ.
        NonFiniteError: A relevance is not finite.
    """
    tokens = _prompt(relevance.prompts, prompt, "TokenRelevance")
    values = relevance.relevance[prompt]
    if tuple(values.shape) != (len(tokens),):
        raise InputError(
            f"TokenRelevance, prompt {prompt}: expected {len(tokens)} values, one a token, "
            f"got {tuple(values.shape)}"
        )
    _check_finite(values, f"TokenRelevance, prompt {prompt}")
    end = relevance.largest or 1.0
    props = {
        "tokens": [_inert(token) for token in tokens],
        **_COLOURS,
        "values": [float(f"{value:.4g}") for value in values.tolist()],
        "minValue": -end,
        "maxValue": end,
    }
    return View(id, "ColoredTokens", props)


def attention_widget(view: AttentionView, prompt: int = 0) -> Widget:
    """Return the attention patterns of one prompt as a widget for a notebook.

    Args:
        view: The patterns of all prompts.
        prompt: The index of the prompt.
    """
    part = attention(view, prompt)
    rows = math.ceil(len(view.heads) / 6)
    return _widget("Attention patterns", part, height=min(140 + 130 * rows + 780, 1400))


def tokens_widget(relevance: TokenRelevance, prompt: int = 0) -> Widget:
    """Return the coloured tokens of one prompt as a widget for a notebook.

    Args:
        relevance: The relevance of all prompts.
        prompt: The index of the prompt.
    """
    part = colored_tokens(relevance, prompt)
    lines = math.ceil(sum(len(token) for token in relevance.prompts[prompt]) / 80)
    return _widget("Token relevance", part, height=min(110 + 30 * lines, 600))


def data(views: Sequence[View]) -> list[dict[str, Any]]:
    """Return the views as the data of a page."""
    return [{"id": v.id, "component": v.component, "props": v.props} for v in views]


def _prompt(prompts: Sequence[tuple[str, ...]], index: int, where: str) -> tuple[str, ...]:
    if not 0 <= index < len(prompts):
        raise InputError(f"{where}: there is no prompt {index}; it has {len(prompts)}, from 0")
    return prompts[index]


def _check_finite(values: Any, where: str) -> None:
    if not bool(values.isfinite().all()):
        raise NonFiniteError(f"{where}: a value is not finite, so it cannot be drawn")


def _rounded(values: Any, digits: int) -> Any:
    if isinstance(values, list):
        return [_rounded(value, digits) for value in values]
    return round(values, digits)


def _inert(token: str) -> str:
    """Return `token` for ColoredTokens, which writes it into the page as HTML.

    An invisible word joiner after `<` and `&` makes them plain characters for an HTML parser. An
    entity would do the same, but the tooltip has the same text and would show the entity.
    """
    return re.sub("([<&])", "\\1\u2060", token).replace("\n", "\u21b5\n")


def _widget(title: str, view: View, *, height: int) -> Widget:
    document = Markup(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="{}"><title>{}</title>'
        "<style>body{{font-family:system-ui,sans-serif;margin:8px;color:#1a1a1a}}"
        ".AttentionHeads{{max-width:760px}}.AttentionHeads h4{{font-size:10px}}"
        ".ColoredTokens span{{color:#1a1a1a!important}}</style>"
        "</head><body>{}{}</body></html>"
    ).format(
        scripts.policy(["circuitsvis"]), title, view.placeholder,
        scripts.scripts({"views": data([view])}, ["circuitsvis"]),
    )  # fmt: skip
    return Widget(title, str(document), height)
