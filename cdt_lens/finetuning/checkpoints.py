"""The files of a training run: a checkpoint to resume from, and a log of its steps.

The checkpoint is one artefact (JSON and safetensors, replaced whole). The log is JSON lines. It is
cut back to the checkpoint when a run resumes, so that it equals the log of an uninterrupted run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import TypedDict

from cdt_lens.core.artifacts import atomic_write, remove_artifact
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.core.kept import Behaviour, Cell, Kept, Say
from cdt_lens.core.processes import is_main


@dataclass(eq=False)
class State:
    """The state of a training run between two steps.

    Attributes:
        masters: The present values, by weight name.
        best: The values at the best evaluation, by weight name.
        moments: The state of AdamW, as "<weight>|<moment>".
        epoch: Number of finished epochs.
        step: Number of finished steps.
        best_epoch: The epoch of the best evaluation.
        loss_sum: Sum of the losses since the last evaluation, in nats.
        loss_count: Number of steps since the last evaluation.
        seconds: Time spent in training.
        stopped: The reason why the run ended, or None while it runs.
        history: One row for each evaluation.
    """

    masters: dict[str, Tensor] = field(repr=False)
    best: dict[str, Tensor] = field(repr=False)
    moments: dict[str, Tensor] = field(default_factory=dict, repr=False)
    epoch: int = 0
    step: int = 0
    best_epoch: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    seconds: float = 0.0
    stopped: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


class _Progress(TypedDict):
    """The JSON of a checkpoint: the fields of `State` without the tensors."""

    epoch: int
    step: int
    best_epoch: int
    loss_sum: float
    loss_count: int
    seconds: float
    stopped: str | None
    history: list[dict[str, Cell]]


class Checkpoint:
    """The checkpoint of one training run.

    Args:
        path: The JSON file; the tensors are beside it.
        made_from: What is trained, and on which data; `finetune` gives its key.
        behaviour: What the model computes before training.
    """

    def __init__(
        self, path: str | Path, made_from: Mapping[str, Any], behaviour: Behaviour | None = None
    ) -> None:
        self.path = Path(path)
        self._kept = Kept(
            path, "cdt_lens.checkpoint", made_from, holds=_Progress, behaviour=behaviour
        )

    def save(self, state: State) -> None:
        """Replace the checkpoint, whole or not at all.

        Args:
            state: The state to save.

        Raises:
            InputError: The file cannot be written.
        """
        tensors = {f"masters/{name}": value for name, value in state.masters.items()}
        tensors |= {f"best/{name}": value for name, value in state.best.items()}
        tensors |= {f"moments/{name}": value for name, value in state.moments.items()}
        values = {name: getattr(state, name) for name in _Progress.__annotations__}
        self._kept.keep(values, tensors)

    def load(self) -> State | None:
        """Return the state that an earlier call saved, or None if there is no checkpoint.

        Raises:
            InputError: The checkpoint is of another run (model, data or options), or of another
                version of `cdt_lens`, which may not continue it bit for bit.
            ArtifactError: The file is damaged or of another kind.
        """
        kept = self._kept.read()
        if kept is None:
            return None
        body, tensors = kept
        return State(
            masters=_under("masters/", tensors), best=_under("best/", tensors),
            moments=_under("moments/", tensors),
            **{name: body[name] for name in _Progress.__annotations__},
        )  # fmt: skip

    def check_tensors(self, state: State, values: Mapping[str, Tensor]) -> None:
        """Refuse a state whose tensors do not fit what is trained.

        Args:
            state: The loaded state.
            values: The values to train, by weight name.

        Raises:
            ArtifactError: A tensor is missing or has another shape.
        """
        wanted = _shapes(values)
        fits = [_shapes(held) == wanted for held in (state.masters, state.best)]
        for name, shape in _shapes(state.moments).items():
            weight = name.rpartition("|")[0]
            fits.append(weight in wanted and shape in (wanted[weight], ()))  # a step is a number
        if not all(fits):
            raise ArtifactError(
                f"{self.path}: damaged: its tensors do not fit what is trained; remove it to "
                "begin anew"
            )

    def drop_stale(self, say: Say) -> None:
        """Remove the checkpoint if `load` would refuse it as another run's.

        Args:
            say: Receives the reason.
        """
        self._kept.drop_stale(say)

    def remove(self) -> None:
        """Remove the checkpoint of a run that has its result."""
        self._kept.remove()
        record_of(self.path).unlink(missing_ok=True)


def record_of(checkpoint: Path) -> Path:
    """Return the hidden file beside a checkpoint that counts what trackers were sent.

    Args:
        checkpoint: The JSON file of the checkpoint.
    """
    return checkpoint.with_name(f".{checkpoint.stem}.tracked")


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove the checkpoint of a run whose result is kept elsewhere.

    Args:
        checkpoint: The JSON file of the checkpoint. It may be missing.
    """
    remove_artifact(checkpoint)
    record_of(checkpoint).unlink(missing_ok=True)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}


class Log:
    """The metrics of a run as JSON lines: one for each step and one for each evaluation.

    Args:
        path: The file, to which lines are appended.

    Raises:
        InputError: `path` is a folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            file = self.path / "log.jsonl"
            raise InputError(f"log: {path} is a folder; name a file, such as {file}")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line, from the main process.

        Args:
            row: The values of the line, as JSON.

        Raises:
            InputError: The file cannot be written.
        """
        if not is_main():
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror or error}); free the disk or "
                "name another place. The last checkpoint is whole"
            ) from error

    def cut(self, step: int) -> None:
        """Remove the lines of an interrupted run after `step`, and an incomplete last line.

        Args:
            step: The last step to keep. A step below 0 begins a new log in place of an earlier one.

        Raises:
            InputError: The file is no training log.
        """
        if not is_main() or not self.path.exists():
            return
        kept = []
        lines = self.path.read_text("utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                cut = number == len(lines) and line.startswith("{")
                row = {} if cut else None
            ours = isinstance(row, dict) and (not row or isinstance(row.get("step"), int))
            if not ours:
                raise InputError(
                    f"{self.path}, line {number}: not a line of a training log, which would be "
                    "written here; name another file"
                )
            if row and row["step"] <= step:
                kept.append(line)
        atomic_write(self.path, "".join(f"{line}\n" for line in kept))
