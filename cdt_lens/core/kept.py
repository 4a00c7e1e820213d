"""Results that are made once and kept on disk under the key of what they were made from.

A key is a mapping of names to JSON values: the hashes of the model, the data and the baseline, and
every option that changes a number. This module adds the version of `cdt_lens` to every key. Four
rules hold for every kept result:

1. A kept result is used again only under an equal key. Otherwise it is made again, and `say`
   receives the reason: the names that differ, or the version that made it.
2. A checkpoint of work in progress is refused under another key, with the reason. It may be hours
   of work, so only its owner removes it; `Kept.drop_stale` does so in a run directory.
3. A damaged result is made again, with the reason. Files that another library wrote beside a
   result, such as the weights of a checkpoint, are recorded in it by their checksums.
4. The whole version of the package counts. Nobody can tell which change of a release changes no
   number, and a result that is made again needlessly is only late. The versions of torch,
   transformers and TransformerLens do not count: they move the last bits of a number and not its
   meaning, and the provenance of a result records them.

A result that a person loads, such as `Circuit.load`, is no kept result; any version reads it.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import sub
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

import cdt_lens
from cdt_lens.core.artifacts import file_hash, load_artifact, remove_artifact, save_artifact
from cdt_lens.core.axes import adapter_of, check_value
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.core.processes import is_main, wait_for_all

Say = Callable[[str], None]
Result = TypeVar("Result")
# What transformers and peft may read from the folder of a model.
_LOADED = (".json", ".safetensors", ".bin", ".pt", ".model", ".jinja", ".py")
_LONGEST_NAME = 120  # bytes of a name that becomes part of a file name
# What the cells of a table hold in a file.
Cell = str | int | float | bool | None


def key_of(made_from: Mapping[str, Any]) -> dict[str, Any]:
    """Return a key: what a result is made from, and the version of `cdt_lens` that makes it.

    Args:
        made_from: Everything that changes a number of the result, by name.

    Returns:
        The key as JSON values, as it is read back from a file.
    """
    key: dict[str, Any] = as_json({**made_from, "version": cdt_lens.__version__})
    return key


def difference(kept: object, key: Mapping[str, Any]) -> str | None:
    """Compare the key of a kept result with the key of the result that is wanted.

    Args:
        kept: The key in the file. Files of earlier versions may hold something else than a mapping,
            or a key without a version.
        key: The wanted key, made by `key_of`.

    Returns:
        The reason why the kept result cannot be used, in words, or None if it can.
    """
    old = kept if isinstance(kept, Mapping) else {}
    if old.get("version") != key["version"]:
        # Another version may spell the rest of a key in another way.
        by = f"cdt_lens {old['version']}" if "version" in old else "an earlier cdt_lens"
        return f"{by} (this is {key['version']})"
    names = sorted(name for name in {*old, *key} if old.get(name) != key.get(name))
    return f"other settings or data ({', '.join(names)})" if names else None


def reuse(
    path: Path,
    load: Callable[[Path], Result],
    kept_key: Callable[[Result], object],
    made_from: Mapping[str, Any],
    say: Say,
) -> Result | None:
    """Load a kept result if it was made from the same key.

    Under a launcher every process looks before any process may write.

    Args:
        path: The file of the kept result.
        load: Reads the file.
        kept_key: Returns the key of a loaded result.
        made_from: What the wanted result is made from.
        say: Receives the reason why a result has to be made again.

    Returns:
        The result, or None if there is no file, or if it has to be made again.
    """
    result = _usable(path, load, kept_key, key_of(made_from), say) if path.exists() else None
    wait_for_all()
    return result


def _usable(
    path: Path,
    load: Callable[[Path], Result],
    kept_key: Callable[[Result], object],
    key: Mapping[str, Any],
    say: Say,
) -> Result | None:
    try:
        result = load(path)
    except ArtifactError as error:
        say(f"{error}; making it again")
        return None
    reason = difference(kept_key(result), key)
    if reason is not None:
        say(f"{path} was made with {reason}; making it again")
        return None
    return result


@dataclass(frozen=True)
class Behaviour:
    """Numbers that a model computes, by which a checkpoint knows it.

    Args:
        values: The numbers.
        rounding: The difference, relative to the largest value, that another machine may make.
    """

    values: tuple[float, ...]
    rounding: float

    def difference(self, kept: object) -> str | None:
        """Compare the numbers with those in a file.

        Args:
            kept: The numbers in the file, or None.

        Returns:
            The reason why the file belongs to a model that computes something else, or None.
        """
        if not isinstance(kept, list) or len(kept) != len(self.values):
            return "a model whose logits it does not hold"
        allowed = self.rounding * max(map(abs, self.values), default=0.0)
        off = max(map(abs, map(sub, kept, self.values)), default=0.0)
        # A comparison with NaN is false.
        return None if off <= allowed else "a model that gives other logits (its settings differ)"


class Kept:
    """A file that holds values, and tensors if there are any, beside the key they were made from.

    Args:
        path: The JSON file.
        format: The kind of file, such as "cdt_lens.transfer_cell".
        made_from: What the values are made from.
        holds: A `TypedDict` of the values; None does not check them.
        beside: A folder that is made with the values and recorded by the checksums of its files.
        behaviour: What the model computes; None where its weights say enough.
    """

    def __init__(
        self, path: str | Path, format: str, made_from: Mapping[str, Any], *,
        holds: Any = None, beside: Path | None = None, behaviour: Behaviour | None = None,
    ) -> None:  # fmt: skip
        self.path = Path(path)
        self.format = format
        self.key = key_of(made_from)
        self.holds = holds
        self.beside = beside
        self.behaviour = behaviour

    def reuse(self, say: Say) -> dict[str, Any] | None:
        """Return the kept values, or None where they have to be made again.

        Args:
            say: Receives the reason why values have to be made again.

        Returns:
            The body of the file, or None.
        """
        found = self.reuse_with_tensors(say)
        return None if found is None else found[0]

    def reuse_with_tensors(self, say: Say) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return the kept values and tensors, or None where they have to be made again.

        Args:
            say: Receives the reason why values have to be made again.

        Returns:
            The body of the file and its tensors by name, or None.
        """
        return reuse(self.path, lambda _: self._whole(), lambda kept: kept[0]["key"], self.key, say)

    def read(
        self, finished: Callable[[Mapping[str, Any]], bool] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return the body and tensors of a checkpoint, or None if there is no file.

        Args:
            finished: Says whether the work in a body is finished. A finished checkpoint whose
                behaviour differs counts as none, because no work in progress is lost.

        Returns:
            The body of the file and its tensors by name.

        Raises:
            InputError: The checkpoint is of another run, or of another version of `cdt_lens`.
            ArtifactError: The file is damaged or of another kind.
        """
        if not self.path.exists():
            return None
        try:
            body, tensors = self._read()
        except ArtifactError as error:
            raise ArtifactError(f"{error}, or remove {self.path} to begin anew") from error
        reason = self._difference(body)
        if reason is not None:
            same_key = difference(body["key"], self.key) is None
            if same_key and finished is not None and finished(body):
                return None
            raise InputError(
                f"{self.path}: a checkpoint of another run, made with {reason}; remove it, or name "
                "another file"
            )
        return body, tensors

    def write(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Replace the file, whole or not at all, from this process.

        Args:
            values: The values as JSON, without the key.
            tensors: Tensors by name.

        Raises:
            InputError: The file cannot be written.
        """
        body = {"key": self.key, **values}
        if self.beside is not None:
            body["files"] = folder_hashes(self.beside)
        if self.behaviour is not None:
            body["behaviour"] = list(self.behaviour.values)
        save_artifact(self.path, body, format=self.format, version=1, tensors=tensors)

    def keep(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Replace the file from the main process; every process returns when it is written.

        Args:
            values: The values as JSON, without the key.
            tensors: Tensors by name.

        Raises:
            InputError: The file cannot be written.
        """
        if is_main():
            self.write(values, tensors)
        wait_for_all()

    def drop_stale(self, say: Say) -> None:
        """Remove a checkpoint that `read` would refuse.

        Args:
            say: Receives the reason.
        """
        drop_checkpoints({self.path: self._why_stale()} if self.path.exists() else {}, say)

    def _why_stale(self) -> str | None:
        try:
            reason = self._difference(self._read()[0])
        except ArtifactError as error:
            return str(error)
        return None if reason is None else f"{self.path} was made with {reason}"

    def why_not_of_this_version(self) -> str | None:
        """Return why this version of `cdt_lens` cannot read the file, or None if it can."""
        try:
            key = self._read()[0]["key"]
        except ArtifactError as error:
            return str(error)
        if isinstance(key, dict) and key.get("version") == self.key["version"]:
            return None
        return f"{self.path} was made with another version of cdt_lens"

    def remove(self) -> None:
        """Remove the file and its tensors; every process returns when they are gone."""
        wait_for_all()
        if is_main():
            remove_artifact(self.path)
        wait_for_all()

    def _difference(self, body: Mapping[str, Any]) -> str | None:
        reason = difference(body["key"], self.key)
        if reason is None and self.behaviour is not None:
            return self.behaviour.difference(body.get("behaviour"))
        return reason

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        body, tensors = load_artifact(self.path, format=self.format, version=1)
        # Files that an early version wrote may hold no key.
        body = {"key": None, **body}
        # Those of other versions hold other values.
        if self.holds is not None and difference(body["key"], self.key) is None:
            try:
                check_value("", body, adapter_of(self.holds))
            except ValueError as error:
                raise ArtifactError(f"{self.path}: damaged: {error}; make it again") from error
        return body, tensors

    def _whole(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Read the file; the folder beside it must be as it was when the values were kept."""
        body, tensors = self._read()
        if self.beside is not None and difference(body["key"], self.key) is None:
            self._check_folder(self.beside, body.get("files"))
        return body, tensors

    def check_beside(self) -> None:
        """Check the folder beside the values, whatever they were made from.

        Raises:
            ArtifactError: It is not as it was when the values were kept.
        """
        if self.beside is not None:
            self._check_folder(self.beside, self._read()[0].get("files"))

    def _check_folder(self, folder: Path, recorded: object) -> None:
        if not isinstance(recorded, Mapping):
            raise ArtifactError(f"{self.path} records no checksums of {folder}")
        found = folder_hashes(folder)
        added = {name for name in found if name.endswith(_LOADED)}  # other notes are a person's
        for name in sorted({*recorded, *added}):
            if recorded.get(name) != found.get(name):
                what = "is missing" if name not in found else "is damaged or was changed"
                raise ArtifactError(f"{folder / name} {what}")


def drop_other_versions(checkpoints: Iterable[Path], format: str, say: Say) -> None:
    """Remove the checkpoints in a run directory that this version of `cdt_lens` cannot read.

    Args:
        checkpoints: The JSON files.
        format: Their kind.
        say: Receives a line for every removed file.
    """
    versionless = {path: Kept(path, format, {}) for path in checkpoints}
    reasons = {path: kept.why_not_of_this_version() for path, kept in versionless.items()}
    drop_checkpoints(reasons, say)


def drop_checkpoints(reasons: Mapping[Path, str | None], say: Say) -> None:
    """Remove checkpoints that cannot be used.

    Args:
        reasons: By JSON file the reason to remove it, or None to leave it.
        say: Receives the reasons.
    """
    wait_for_all()  # No process removes a file before every process has read it.
    for path, reason in reasons.items():
        if reason is not None:
            say(f"{reason}; removed")
            if is_main():
                remove_artifact(path)
    wait_for_all()


def folder_hashes(folder: Path) -> dict[str, str]:
    """Return the checksums of the files below a folder, by their paths in it.

    Args:
        folder: The folder; one that is missing has no files. Hidden files do not count: they are
            notes of a file manager or of an editor.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: file_hash(path) for name, path in names.items() if path.name[0] != "."}


def as_json(value: Any) -> Any:
    """Return a value as it is read back from JSON: tuples become lists, keys become strings.

    Args:
        value: A value that JSON can hold.

    Returns:
        The value after a round trip through JSON.
    """
    return json.loads(json.dumps(value))


def file_name(text: str) -> str:
    """Return a name that is safe as part of a file name, another one for every text.

    Args:
        text: Any name, such as "my language".

    Returns:
        `text` itself if it consists of letters, digits and `_.-`. Otherwise these characters of it
        and a few digits of its checksum.
    """
    plain = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", text))
    if plain == text and text.strip(".") and len(text.encode()) <= _LONGEST_NAME:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{plain.strip('.')[: _LONGEST_NAME // 4]}-{digest[:8]}"
