"""What a training run keeps on disk: a checkpoint to go on from, and a log of its steps.

The checkpoint is one artefact (JSON + safetensors, replaced whole); the log is JSON lines, cut back
to the checkpoint when a run goes on, so that it reads like the log of an uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cdt_lens.core.artifacts import atomic_write, load_artifact, remove_artifact, save_artifact
from cdt_lens.core.errors import ArtifactError, InputError
from cdt_lens.core.processes import is_main, wait_for_all

_FORMAT, _VERSION = "cdt_lens.checkpoint", 1


@dataclass
class State:
    """Where a run stands.

    masters, best: values by weight name, now and at the best look; moments: AdamW's state, as
    "<weight>|<moment>"; loss_sum, loss_count: of the steps since the last look.
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


class Checkpoint:
    """A place for the state of one run; `key` names what is trained, and on what.

    Raises (on load):
        InputError: the checkpoint is of another run (model, data or options).
    """

    def __init__(self, path: str | Path, key: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.key = json.loads(json.dumps(dict(key)))

    def save(self, state: State) -> None:
        """Replace the checkpoint, whole or not at all."""
        if is_main():
            tensors = {f"masters/{name}": value for name, value in state.masters.items()}
            tensors |= {f"best/{name}": value for name, value in state.best.items()}
            tensors |= {f"moments/{name}": value for name, value in state.moments.items()}
            body = {
                "key": self.key, "epoch": state.epoch, "step": state.step,
                "best_epoch": state.best_epoch, "loss_sum": state.loss_sum,
                "loss_count": state.loss_count, "seconds": state.seconds,
                "stopped": state.stopped, "history": state.history,
            }  # fmt: skip
            save_artifact(self.path, body, format=_FORMAT, version=_VERSION, tensors=tensors)
        wait_for_all()

    def load(self) -> State | None:
        """The state of an earlier call, or None."""
        if not self.path.exists():
            return None
        body, tensors = load_artifact(self.path, format=_FORMAT, version=_VERSION)
        if body["key"] != self.key:
            different = sorted(
                name for name in {*body["key"], *self.key}
                if body["key"].get(name) != self.key.get(name)
            )  # fmt: skip
            raise InputError(
                f"{self.path}: a checkpoint of another run ({', '.join(different)} differ); "
                "remove it, or name another place"
            )
        try:
            return State(
                masters=_under("masters/", tensors), best=_under("best/", tensors),
                moments=_under("moments/", tensors), epoch=body["epoch"], step=body["step"],
                best_epoch=body["best_epoch"], loss_sum=body["loss_sum"],
                loss_count=body["loss_count"], seconds=body["seconds"],
                stopped=body["stopped"], history=body["history"],
            )  # fmt: skip
        except KeyError as error:
            raise ArtifactError(f"{self.path}: not a whole checkpoint ({error})") from error

    def remove(self) -> None:
        """Delete it; a run that has its result needs it no more."""
        wait_for_all()
        if is_main():
            remove_artifact(self.path)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}


class Log:
    """Metrics of a run as JSON lines, one a step and one a look at validation data."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line."""
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
        """Drop what an interrupted run wrote after `step`, and a last line that was cut short.

        A step below 0 begins a new log, in place of that of an earlier run.

        Raises:
            InputError: the file holds something else than such a log.
        """
        if not is_main() or not self.path.exists():
            return
        kept = []
        lines = self.path.read_text("utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = {} if number == len(lines) else None
            ours = isinstance(row, dict) and (not row or isinstance(row.get("step"), int))
            if not ours:
                raise InputError(
                    f"{self.path}, line {number}: not a line of a training log, which would be "
                    "written here; name another file"
                )
            if row and row["step"] <= step:
                kept.append(line)
        atomic_write(self.path, "".join(f"{line}\n" for line in kept))
