"""Results that are made once and kept on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cdt_lens.core.artifacts import load_artifact, save_artifact
from cdt_lens.core.errors import ArtifactError
from cdt_lens.core.processes import is_main, wait_for_all

Say = Callable[[str], None]


def kept(path: Path, format: str, key: Mapping[str, Any], say: Say) -> dict[str, Any] | None:
    """What an earlier call has kept for the same key; None where it has to be made again."""
    if not path.exists():
        return None
    try:
        body, _ = load_artifact(path, format=format, version=1)
    except ArtifactError as error:
        say(f"{error}; making it again")
        return None
    if body["key"] != as_json(dict(key)):
        say(f"{path} was made with other settings or data; making it again")
        return None
    return body


def keep(path: Path, format: str, body: Mapping[str, Any]) -> None:
    """Save `body`, which holds the "key" that it was made from, from one process."""
    if is_main():
        save_artifact(path, body, format=format, version=1)
    wait_for_all()


def as_json(value: Any) -> Any:
    """As it is read back from JSON: tuples become lists."""
    return json.loads(json.dumps(value))


def file_name(text: str) -> str:
    """`text` as part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", text)
