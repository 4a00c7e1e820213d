"""Artefacts on disk: JSON and safetensors, written whole or not at all, never pickle.

1. The bytes go to a temporary file in the same folder, are flushed to the disk, and take the final
   name by one atomic rename: a full disk or a kill leaves the previous file as it was.
2. A JSON artefact carries `format` (what it is), `version` (of the format) and `sha256` (of the
   rest), so that a damaged or foreign file is refused with its path.
3. Tensors travel beside it in one safetensors file, whose name and checksum the JSON holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from cdt_lens.core.errors import ArtifactError, InputError


def atomic_write(path: str | Path, content: str | bytes) -> Path:
    """Write `content` to `path` whole or not at all; parent folders are made.

    Raises:
        InputError: the folder cannot be written, or the disk is full; `path` is then as before.
    """
    path = Path(path)
    payload = content.encode("utf-8") if isinstance(content, str) else content
    with _temporary(path) as temporary:
        temporary.write_bytes(payload)
        _settle(temporary, path)
    return path


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, gone afterwards; a full disk becomes one clear error."""
    name: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        yield Path(name)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); "
            "choose another place or free the disk. Nothing was changed"
        ) from error
    finally:
        # After a successful replace the temporary name no longer exists.
        if name is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


def _settle(temporary: Path, path: Path) -> None:
    """Flush to the disk, then take the final name."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def content_hash(value: Any) -> str:
    """sha256 of a JSON-able value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_artifact(
    path: str | Path,
    body: Mapping[str, Any],
    *,
    format: str,
    version: int,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save `body` as JSON at `path`, and `tensors` beside it as `<name>.<hash>.safetensors`.

    The JSON names its tensor file, so that replacing the JSON replaces both at once: a full disk
    or a kill at any moment leaves the previous artefact whole.

    Raises:
        InputError: the place cannot be written.
    """
    path = Path(path)
    # As it will be read: JSON turns keys into strings and tuples into lists.
    document: dict[str, Any] = json.loads(
        json.dumps({"format": format, "version": version, **body})
    )
    old = _tensor_file(path)
    new = None
    if tensors:
        # Straight to the disk: a checkpoint of a whole model should not be in memory twice.
        with _temporary(path) as temporary:
            safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
            digest = file_hash(temporary)
            new = path.with_name(f"{path.name}.{digest[:12]}.safetensors")
            _settle(temporary, new)
        document["tensors"] = {"file": new.name, "sha256": digest}
    document["sha256"] = content_hash(document)
    try:
        atomic_write(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    except InputError:
        _remove(new, but=old)
        raise
    _remove(old, but=new)
    return path


def remove_artifact(path: str | Path) -> None:
    """Delete an artefact and its tensors, if they are there."""
    path = Path(path)
    tensors = _tensor_file(path)
    path.unlink(missing_ok=True)
    _remove(tensors, but=None)


def _tensor_file(path: Path) -> Path | None:
    """The tensor file that the artefact at `path` names, as far as it can be read."""
    try:
        entry = json.loads(path.read_text("utf-8"))["tensors"]["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    name = Path(str(entry)).name
    return path.with_name(name) if name.startswith(f"{path.name}.") else None


def _remove(path: Path | None, *, but: Path | None) -> None:
    if path is not None and path != but:
        path.unlink(missing_ok=True)


def load_artifact(
    path: str | Path, *, format: str, version: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `save_artifact` wrote: the body, and the tensors by name.

    Raises:
        InputError: there is no file at `path`.
        ArtifactError: damaged, of another kind, or of a format version from the future.
    """
    path = Path(path)
    document = _read_json(path)
    found = document.get("format")
    if found != format:
        raise ArtifactError(f"{path}: expected a {format} file, got {found!r}")
    if not isinstance(document.get("version"), int) or document["version"] > version:
        raise ArtifactError(
            f"{path}: format version {document.get('version')!r}, this cdt_lens reads up to "
            f"{version}; update cdt_lens"
        )
    checksum = document.pop("sha256", None)
    if checksum != content_hash(document):
        raise ArtifactError(
            f"{path}: damaged: its contents do not match its checksum; make it again"
        )
    return document, _read_tensors(path, document.pop("tensors", None))


def artifact_format(path: str | Path) -> str:
    """What kind of artefact a file is, such as "cdt_lens.circuit".

    Raises:
        InputError: no such file. ArtifactError: not an artefact.
    """
    return str(_read_json(Path(path)).get("format"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: damaged: not whole JSON ({error}); make it again") from error
    if not isinstance(document, dict):
        raise ArtifactError(f"{path}: expected a JSON object, got {type(document).__name__}")
    return document


def _read_tensors(path: Path, entry: Mapping[str, str] | None) -> dict[str, Tensor]:
    if entry is None:
        return {}
    # Only the bare name counts, so that a crafted file cannot point outside its folder.
    tensor_path = path.parent / Path(entry["file"]).name
    if not tensor_path.exists():
        raise ArtifactError(f"{path}: its tensors {tensor_path.name} are missing beside it")
    if file_hash(tensor_path) != entry["sha256"]:
        raise ArtifactError(
            f"{tensor_path}: damaged or from another save: its checksum is not the one in "
            f"{path.name}; make both again"
        )
    try:
        return safetensors.torch.load_file(tensor_path)
    except safetensors.SafetensorError as error:
        raise ArtifactError(f"{tensor_path}: damaged: {error}; make it again") from error
