"""What a run directory holds, apart from times: for runs that must end alike."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

# Times, what is made of them, and checksums of files that hold them.
_TIMES = {"created", "seconds", "sha256", "files", "command"}
_DRAWN = {".png", ".html"}  # their numbers are in the other files


def contents(folder: Path) -> dict[str, Any]:
    """The contents of every file below `folder` without times, by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _content(path) for path in files}


def _content(path: Path) -> Any:
    if path.suffix in _DRAWN:
        return "drawn"
    if path.suffix == ".json":
        return repr(_without_times(json.loads(path.read_text("utf-8"))))  # NaN equals NaN
    if path.suffix == ".jsonl":
        return repr(
            [_without_times(json.loads(row)) for row in path.read_text("utf-8").splitlines()]
        )
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(path.read_text("utf-8")))
        return repr([_without_times(row) for row in rows])
    return path.read_bytes()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict) and {"columns", "rows"} <= value.keys():
        return [
            _without_times(dict(zip(value["columns"], row, strict=True))) for row in value["rows"]
        ]
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in _TIMES}
    return [_without_times(v) for v in value] if isinstance(value, list) else value
