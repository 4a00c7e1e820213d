"""Scripts of a page: inert data, the libraries that draw, and one small script that mounts them.

1. A page holds each library once: circuitsvis for views of prompts, Vega for figures.
2. The data is JSON that cannot end its script element. `report.js` reads it, and writes text into
   the page only as text.
3. A Content-Security-Policy names the scripts by their hashes, so that no other script can run and
   nothing can be fetched. Vega therefore interprets its expressions and never evaluates text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup

Library = Literal["circuitsvis", "vega", "report"]


def scripts(data: Mapping[str, Any], libraries: Iterable[Library]) -> Markup:
    """Return the scripts for the end of a page; empty without libraries.

    Args:
        data: What `report.js` reads: `views`, `figures` and more.
        libraries: The libraries that draw it.
    """
    parts = _with_mount(libraries)
    if not parts:
        return Markup("")
    inert = Markup('<script type="application/json" id="cdt-data">{}</script>').format(_json(data))
    each = (Markup("<script>{}</script>").format(Markup(_text(part))) for part in parts)
    return inert + Markup("").join(each)


def policy(libraries: Iterable[Library]) -> str:
    """Return a Content-Security-Policy that allows the scripts of `libraries` and no network."""
    hashes = " ".join(map(_csp_hash, _with_mount(libraries))) or "'none'"
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _with_mount(libraries: Iterable[Library]) -> list[Library]:
    every = list(libraries)
    return [*every, "report"] if every else []


def _json(value: Any) -> Markup:
    """Return ASCII JSON without a character that could end its script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@cache
def _text(library: Library) -> str:
    # Imported here because only pages with views or with figures need them.
    if library == "vega":
        import vl_convert

        text = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    elif library == "circuitsvis":
        import circuitsvis

        text = _read(Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js")
    else:
        text = _read(Path(__file__).parent / "report" / "report.js")
    return re.sub("</(script)", r"<\\/\1", text, flags=re.IGNORECASE).replace("<!--", r"<\!--")


def _read(path: Path) -> str:
    return path.read_text("utf-8").replace("\r\n", "\n")


@cache
def _csp_hash(library: Library) -> str:
    digest = hashlib.sha256(_text(library).encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
