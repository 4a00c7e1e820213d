"""One self-contained HTML report of any results; it opens without a network.

1. Each result becomes a section: figures as inline SVG, tables, interactive views, provenance.
2. The circuitsvis bundle is inlined once and draws every view; the views' data is inert JSON.
3. Prompts are untrusted text: everything is escaped, and a Content-Security-Policy names the two
   scripts by their hashes, so that nothing else can run and nothing can be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from cdt_lens import figures
from cdt_lens.artifacts import atomic_write
from cdt_lens.errors import InputError
from cdt_lens.heads import all_heads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cdt_lens.circuit import Circuit
    from cdt_lens.faithfulness import FaithfulnessCurve
    from cdt_lens.heads import Head
    from cdt_lens.scores import HeadScores, MethodAgreement
    from cdt_lens.views import AttentionView, TokenRelevance
