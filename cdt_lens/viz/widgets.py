"""Interactive views of prompts by circuitsvis, without a network, for a page or a notebook.

1. A view is a circuitsvis component and its data. A page holds the bundle that draws views once.
   The data is inert JSON, and one small script mounts a view when it scrolls into sight.
2. Prompts are untrusted text. Everything is escaped, and a Content-Security-Policy names the two
   scripts by their hashes, so that no other script can run and nothing can be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cdt_lens.core.display import NEGATIVE, POSITIVE, Widget
from cdt_lens.core.errors import InputError, NonFiniteError
from cdt_lens.scoring.prompt_views import AttentionView, TokenRelevance

_COLOURS = {"positiveColor": POSITIVE, "negativeColor": NEGATIVE}
_MOUNT = """
(function () {
  var views = JSON.parse(document.getElementById("cdt-views").textContent);
  function mount(view) {
    if (view.mounted) return;
    view.mounted = true;
    CircuitsVis.render(view.id, CircuitsVis[view.component], view.props);
  }
  function mountAll() { views.forEach(mount); }
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (box) { box.open = true; });
    mountAll();
  });
  if (!("IntersectionObserver" in window)) return mountAll();
  var seen = new IntersectionObserver(function (entries) {
    entries.forEach(function (entry) {
      if (!entry.isIntersecting) return;
      seen.unobserve(entry.target);
      mount(views.find(function (view) { return view.id === entry.target.id; }));
    });
  }, { rootMargin: "400px" });
  views.forEach(function (view) { seen.observe(document.getElementById(view.id)); });
})();
"""


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
        "positiveColor": _COLOURS["positiveColor"],
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


def scripts(views: Sequence[View]) -> Markup:
    """Return the scripts that draw `views`, for the end of the page; empty without views."""
    if not views:
        return Markup("")
    data = [{"id": v.id, "component": v.component, "props": v.props} for v in views]
    return Markup(
        '<script type="application/json" id="cdt-views">{}</script>'
        "<script>{}</script><script>{}</script>"
    ).format(_json(data), Markup(_bundle()), Markup(_MOUNT))


def policy(views: Sequence[View]) -> str:
    """Return a Content-Security-Policy that allows the scripts of `views` and no network."""
    hashes = " ".join(_csp_hash(script) for script in (_bundle(), _MOUNT)) if views else "'none'"
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


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


def _json(value: Any) -> Markup:
    """Return ASCII JSON without a character that could end its script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@cache
def _bundle() -> str:
    # Imported here because only pages with views need it.
    import circuitsvis

    path = Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js"
    text = path.read_text("utf-8").replace("\r\n", "\n")
    return re.sub("</(script)", r"<\\/\1", text, flags=re.IGNORECASE)


@cache
def _csp_hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _widget(title: str, view: View, *, height: int) -> Widget:
    document = Markup(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="{}"><title>{}</title>'
        "<style>body{{font-family:system-ui,sans-serif;margin:8px;color:#1a1a1a}}"
        ".AttentionHeads{{max-width:760px}}.AttentionHeads h4{{font-size:10px}}</style>"
        "</head><body>{}{}</body></html>"
    ).format(policy([view]), title, view.placeholder, scripts([view]))
    return Widget(title, str(document), height)
