"""Save and load of every result that is one file: JSON, with its tensors beside it.

A class names its format and converts itself: `_to_file` gives the JSON body and the tensors, and
`_from_file` makes the result of them. Formats are strings, so that files outlive the modules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from cdt_lens.core.artifacts import load_artifact, save_artifact
from cdt_lens.core.axes import check_result
from cdt_lens.core.checked import checked_arguments
from cdt_lens.core.equality import EqualByContent
from cdt_lens.core.errors import ArtifactError

Result = TypeVar("Result", bound="Saved")
_LONGEST = 300  # characters of the reason why a file is not whole


class Saved(EqualByContent, ABC):
    """Base of results with `save` and `load`; a saved and loaded result equals itself."""

    _format: ClassVar[str]
    _kind: ClassVar[str]
    _version: ClassVar[int] = 1
    _name: ClassVar[str | None] = None  # of the file in a run directory

    @checked_arguments
    def save(self, path: str | Path) -> Path:
        """Save as JSON, with the tensors beside it as safetensors; whole or not at all.

        Args:
            path: The JSON file. An existing one is replaced. An adapter may also be given a
                folder, in which it writes `adapter.json`.

        Returns:
            The JSON file.

        Raises:
            InputError: The file cannot be written, or the result cannot be a file.
        """
        body, tensors = self._to_file()
        return save_artifact(
            self._path(path), body, format=self._format, version=self._version, tensors=tensors
        )

    @classmethod
    @checked_arguments
    def load(cls: type[Result], path: str | Path) -> Result:
        """Read a file that `save` wrote, of this version of `cdt_lens` or an earlier one.

        Args:
            path: The JSON file, or a run directory that holds one.

        Returns:
            The result.

        Raises:
            InputError: There is no such file.
            ArtifactError: The file is damaged, of another kind, or of a newer format.
        """
        path = cls._inside(cls._path(path))
        body, tensors = load_artifact(path, format=cls._format, version=cls._version)
        try:
            result: Result = cls._from_file(body, tensors)
            check_result(result)
        except Exception as error:  # a wrong body may fail anywhere; the reader is not to blame
            reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
            one_line = " ".join(str(reason).split())[:_LONGEST]
            raise ArtifactError(f"{path}: not a whole {cls._kind} ({one_line})") from error
        return result

    @abstractmethod
    def _to_file(self) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
        """Return the JSON body of the file and the tensors by name."""

    @classmethod
    @abstractmethod
    def _from_file(cls, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        """Return the result of a file; any error of a wrong body means that it is not whole."""

    @classmethod
    def _path(cls, path: str | Path) -> Path:
        return Path(path)

    @classmethod
    def _inside(cls, path: Path) -> Path:
        """Return the file of a run directory, or of the discovery of a transfer's directory."""
        if cls._name is None or not path.is_dir():
            return path
        own, discovered = path / cls._name, path / "discovery" / cls._name
        return discovered if discovered.is_file() and not own.is_file() else own
