"""Artefacts on disk: JSON and safetensors, written whole or not at all, never pickle.

1. The bytes go to a temporary file in the same folder, are flushed to the disk, and take the final
   name by one atomic rename. A full disk or a kill leaves the previous file unchanged.
2. A JSON artefact has the fields `format` (the kind of file), `version` (of the format) and
   `sha256` (of the rest), so that a damaged or foreign file is refused with its path.
3. Its tensors are in one safetensors file beside it, whose name and checksum the JSON holds.
4. Files get their modes from the umask of the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from cdt_lens.core.errors import ArtifactError, CdtLensError, InputError
from cdt_lens.core.scratch import scratch_folder


def atomic_write(path: str | Path, content: str | bytes) -> Path:
    """Write a file whole or not at all.

    Parent folders are made. The file's mode follows the umask of the process.

    Args:
        path: The file to write. An existing file is replaced.
        content: Text, which is written as UTF-8, or bytes.

    Returns:
        `path` as a `Path`.

    Raises:
        InputError: The folder cannot be written, or the disk is full. `path` is then unchanged.
    """
    path = Path(path)
    payload = content.encode("utf-8") if isinstance(content, str) else content
    with _temporary(path) as (temporary, mode):
        temporary.write_bytes(payload)
        _settle(temporary, path, mode)
    return path


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes this name at the end of the `with`.

    The folder appears whole or not at all. Its files get their modes from the umask of the process,
    whatever the library that wrote them chose.

    Args:
        path: The name of the folder. It may exist as an empty folder.

    Yields:
        The temporary folder, in which the block writes its files.

    Raises:
        InputError: The folder cannot be written, or the disk is full. Nothing is then changed.
    """
    path = Path(path).resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(path.parent, f".{path.name}.") as temporary:
            yield temporary
            _modes_from_umask(temporary)
            if path.exists():
                path.rmdir()
            os.replace(temporary, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(_cannot_write(path, error)) from error


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, int]]:
    """Yield a new file beside `path` and the mode that the umask gave it; remove it at the end."""
    temporary = _name_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary, _create(temporary)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(_cannot_write(path, error)) from error
    finally:
        # After a successful replace the temporary name no longer exists.
        with contextlib.suppress(OSError):
            temporary.unlink()


def _name_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def _create(path: Path) -> int:
    """Create an empty file and return its permission bits.

    The kernel applies the umask (and the folder's default ACL). Python can only read the umask by
    changing it, for all threads of the process.
    """
    path.touch(exist_ok=False)
    return stat.S_IMODE(path.stat().st_mode)


def _modes_from_umask(folder: Path) -> None:
    """Give every file below `folder` the mode of a new file: safetensors writes 0600."""
    probe = _name_beside(folder / "mode")
    mode = _create(probe)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _cannot_write(path: Path, error: Exception) -> str:
    return (
        f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); choose another "
        "place or free the disk. Nothing was changed"
    )


def _settle(temporary: Path, path: Path, mode: int) -> None:
    """Flush a temporary file to the disk and give it its mode and its final name."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.chmod(temporary, mode)
    os.replace(temporary, path)


def content_hash(value: Any) -> str:
    """Compute the sha256 of a JSON value in canonical form (sorted keys, no spaces).

    Args:
        value: Any nesting of mappings, sequences, strings, numbers, booleans and None.

    Returns:
        64 hexadecimal digits.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def file_hash(path: str | Path) -> str:
    """Compute the sha256 of a file.

    Args:
        path: The file to read.

    Returns:
        64 hexadecimal digits.
    """
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
    """Save a JSON file, and its tensors beside it as `<name>.<hash>.safetensors`.

    The JSON names its tensor file, so that replacing the JSON replaces both at once. A full disk
    or a kill at any moment leaves the previous artefact whole.

    Args:
        path: The JSON file. An existing artefact is replaced.
        body: The content, as JSON values.
        format: The kind of file, such as "cdt_lens.circuit".
        version: Version of the format.
        tensors: Tensors by name, in any dtype.

    Returns:
        `path` as a `Path`.

    Raises:
        InputError: The file cannot be written.
    """
    path = Path(path)
    # As it will be read: JSON turns keys into strings and tuples into lists.
    document: dict[str, Any] = json.loads(
        json.dumps({"format": format, "version": version, **body})
    )
    old = _own_tensors(path)
    new = None
    if tensors:
        # Straight to the disk: a checkpoint of a whole model should not be in memory twice.
        with _temporary(path) as (temporary, mode):
            safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, temporary)
            digest = file_hash(temporary)
            new = path.with_name(f"{path.name}.{digest[:12]}.safetensors")
            _settle(temporary, new, mode)
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
    """Delete an artefact and its tensors, if they exist.

    Args:
        path: The JSON file.
    """
    path = Path(path)
    tensors = _own_tensors(path)
    path.unlink(missing_ok=True)
    _remove(tensors, but=None)


def tensor_file(path: Path) -> Path | None:
    """Return the tensor file that a JSON file names, or None if there is no file or no name.

    Args:
        path: The JSON file.

    Raises:
        CdtLensError: The file cannot be read, or is no JSON object.
    """
    if not path.exists():
        return None
    entry = _read_json(path).get("tensors")
    name = entry.get("file") if isinstance(entry, Mapping) else None
    # Only the bare name counts, so that a crafted file cannot point outside its folder.
    return path.parent / Path(name).name if isinstance(name, str) else None


def _own_tensors(path: Path) -> Path | None:
    """Return the tensor file of the artefact at `path`, which is removed with it."""
    try:
        named = tensor_file(path)
    except CdtLensError:
        return None
    return named if named is not None and named.name.startswith(f"{path.name}.") else None


def _remove(path: Path | None, *, but: Path | None) -> None:
    if path is not None and path != but and not _is_named(path):
        path.unlink(missing_ok=True)


def _is_named(tensors: Path) -> bool:
    """Return whether a JSON file of the same folder names a tensor file, such as a copy of its own.

    Args:
        tensors: The tensor file.
    """
    name = tensors.name.encode()
    for path in tensors.parent.glob("*.json"):
        with contextlib.suppress(OSError):
            if name in path.read_bytes():
                return True
    return False


def load_artifact(
    path: str | Path, *, format: str, version: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file that `save_artifact` wrote.

    Args:
        path: The JSON file.
        format: The expected kind of file.
        version: The newest version of the format that the caller can read.

    Returns:
        The body with `format` and `version`, and the tensors by name.

    Raises:
        InputError: There is no file at `path`.
        ArtifactError: The file is damaged, of another kind, or of a newer version of the format.
    """
    path = Path(path)
    document = _read_json(path)
    kind = document.get("format")
    if kind != format:
        raise ArtifactError(f"{path}: expected a {format} file, got {kind!r}")
    if not isinstance(document.get("version"), int) or document["version"] > version:
        raise ArtifactError(
            f"{path}: format version {document.get('version')!r}, this cdt_lens reads up to "
            f"{version}; update cdt_lens"
        )
    checksum = document.pop("sha256", None)
    if checksum != _hash_of(document):
        raise ArtifactError(
            f"{path}: damaged: its contents do not match its checksum; make it again"
        )
    return document, _read_tensors(path, document.pop("tensors", None))


def artifact_format(path: str | Path) -> str:
    """Return the kind of an artefact, such as "cdt_lens.circuit".

    Args:
        path: The JSON file.

    Returns:
        Its `format` field; "None" if it has none.

    Raises:
        InputError: There is no file at `path`.
        ArtifactError: The file is no JSON object.
    """
    return str(_read_json(Path(path)).get("format"))


def _hash_of(document: Mapping[str, Any]) -> str | None:
    """Return the checksum of a document; None if it holds what no artefact of ours holds."""
    try:
        return content_hash(document)
    except (ValueError, RecursionError):  # half a character, or too many levels
        return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        inside = ", ".join(sorted(item.name for item in path.glob("*.json"))) or "no JSON file"
        raise InputError(
            f"{path}: is a folder. Name the JSON file of a result; it holds {inside}."
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        if path.suffix != ".json":
            raise InputError(
                f"{path}: is not a JSON file. Name the .json file of a result of cdt-lens."
            ) from error
        raise ArtifactError(f"{path}: damaged: not whole JSON ({error}); make it again") from error
    if not isinstance(document, dict):
        raise ArtifactError(f"{path}: expected a JSON object, got {type(document).__name__}")
    return document


def _read_tensors(path: Path, entry: object) -> dict[str, Tensor]:
    if entry is None:
        return {}
    tensor_path = tensor_file(path)
    if tensor_path is None or not isinstance(entry, Mapping):
        raise ArtifactError(
            f"{path}: tensors: expected the name of a file and its checksum, got {entry!r:.80}; "
            "make it again"
        )
    try:
        digest = file_hash(tensor_path)
    except (OSError, ValueError) as error:  # a name may hold characters that no file name has
        raise ArtifactError(
            f"{path}: its tensors {tensor_path.name!r:.90} are missing beside it"
        ) from error
    if digest != entry.get("sha256"):
        raise ArtifactError(
            f"{tensor_path}: damaged or from another save: its checksum is not the one in "
            f"{path.name}; make both again"
        )
    try:
        return safetensors.torch.load_file(tensor_path)
    except Exception as error:  # damage shows in as many ways as a header has fields
        raise ArtifactError(f"{tensor_path}: damaged: {error}; make it again") from error
