"""Every documented name: those of the top level, and those that are imported from a module."""

from __future__ import annotations

import importlib
from typing import Any

import cdt_lens

HOMES = {**cdt_lens._HOMES, **cdt_lens._FORMER_HOMES}
NAMES: dict[str, Any] = {
    name: getattr(importlib.import_module(f"cdt_lens.{home}"), name) for name, home in HOMES.items()
}
