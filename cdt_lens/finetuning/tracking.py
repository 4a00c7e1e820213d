"""Send the metrics of a training run to experiment trackers, through those of accelerate.

1. `log_with` names trackers of accelerate (TensorBoard, W&B and others), or is a `GeneralTracker`.
2. Each step and each evaluation is one row with the number of its step. Trackers are started at the
   first row and finished at the end of the run, on the main process only.
3. A file beside the checkpoint counts the rows that were sent. A resumed run makes the steps after
   its checkpoint again and sends those that were not sent before. TensorBoard writes into the same
   folder, and W&B continues the same run.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdt_lens.core.artifacts import atomic_write
from cdt_lens.core.errors import InputError
from cdt_lens.core.processes import accelerate_state, is_main
from cdt_lens.finetuning.checkpoints import Log

LOGS = "logs"  # the folder of trackers in a run directory
_PROJECT = "cdt_lens"
_LABELS = ("kind", "step")


def check_trackers(log_with: Any = None, logging_dir: str | Path | None = None) -> tuple[Any, ...]:
    """Return the trackers that are asked for.

    Args:
        log_with: the name of a tracker of accelerate, "all", a `GeneralTracker`, or a list of
            these.
        logging_dir: the folder for the files of trackers.

    Returns:
        Names and trackers, each once.

    Raises:
        InputError: a name that accelerate does not know, a tracker whose package is missing, or one
            that needs a folder where none is given.
    """
    if log_with is None:
        if logging_dir is not None:
            raise InputError(f'logging_dir={str(logging_dir)!r}: expected log_with="tensorboard"')
        return ()
    from accelerate.tracking import GeneralTracker, filter_trackers
    from accelerate.utils import LoggerType

    asked = list(log_with) if isinstance(log_with, list | tuple) else [log_with]
    asked = [str(one) if isinstance(one, LoggerType) else one for one in asked]
    for one in asked:
        if not isinstance(one, str | GeneralTracker):
            raise InputError(
                f"log_with: expected names of trackers or GeneralTracker of accelerate, got "
                f"{type(one).__name__}"
            )
    accelerate_state()
    try:
        found = filter_trackers(asked, logging_dir)
    except ValueError as error:
        raise InputError(f"log_with: {error}") from error
    found = [one if isinstance(one, GeneralTracker) else str(one) for one in found]
    _check_found(asked, found, logging_dir)
    return tuple(found)


def tracked(log_with: Any, folder: Path, part: str) -> dict[str, Any]:
    """Return the arguments of `finetune` for one training of a run directory.

    Args:
        log_with: as in `finetune`.
        folder: the run directory. The files of trackers lie in its folder `logs`.
        part: the part of it that is trained, such as "proxy".
    """
    if log_with is None:
        return {}
    return {"log_with": log_with, "logging_dir": folder / LOGS / part}


def _check_found(asked: list[Any], found: list[Any], logging_dir: object) -> None:
    """Refuse trackers that accelerate leaves out, and those that lack a folder."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    for name in asked:
        if isinstance(name, str) and name not in ("all", *found):
            raise InputError(
                f"log_with={name!r}: its package is not installed; run pip install {name}"
            )
    if not found:
        raise InputError("log_with='all': no tracker is installed; run pip install tensorboard")
    for name in found if logging_dir is None else ():
        if isinstance(name, str) and LOGGER_TYPE_TO_CLASS[name].requires_logging_directory:
            raise InputError(f"log_with: {name} writes files; give their folder as logging_dir=")


class Tracking:
    """The trackers of one training run; a context that finishes them.

    Args:
        trackers: what `check_trackers` returned.
        folder: the folder for the files of trackers, or None.
        name: name of the run.
        config: what was trained and how, as plain values.
        record: file that counts the rows that were sent; None for a run that cannot resume.
    """

    def __init__(
        self, trackers: tuple[Any, ...], folder: Path | None, name: str,
        config: Mapping[str, Any], record: Path | None,
    ) -> None:  # fmt: skip
        self._asked = trackers if is_main() else ()
        self._folder, self._name, self._config = folder, name, config
        self._record = record
        self._id = secrets.token_hex(8)
        self._from = self._rows = self._sent = 0
        self._configured = False
        self._started: list[Any] | None = None

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *error: object) -> None:
        started, self._started = self._started or [], None
        with contextlib.ExitStack() as stack:
            if error[0] is not None:  # it is the cause, and is told alone
                stack.enter_context(contextlib.suppress(Exception))
            for tracker in reversed(started):
                stack.callback(tracker.finish)

    def begin(self, rows: int) -> None:
        """Begin a new run, or resume one.

        Args:
            rows: number of rows up to the checkpoint; 0 begins a new run.

        Raises:
            InputError: the record cannot be written.
        """
        if not self._asked:
            return
        self._from = self._rows = self._sent = rows
        if self._record is None:
            return
        if rows and self._record.exists():
            self._id, *sent = self._record.read_text("utf-8").splitlines()
            self._sent, self._configured = max(rows, len(sent)), True
        else:
            atomic_write(self._record, f"{self._id}\n")

    def log(self, row: Mapping[str, Any]) -> None:
        """Send a row, unless an earlier call of this run sent it.

        Args:
            row: the values of a step or, with the kind "validation", of an evaluation.

        Raises:
            InputError: the record cannot be written.
        """
        if not self._asked:
            return
        self._rows += 1
        if self._rows <= self._sent:
            return
        if self._started is None:
            self._start()
        kind = row.get("kind", "train")
        values = {f"{kind}/{k}": v for k, v in row.items() if k not in _LABELS and v is not None}
        for tracker in self._started or ():
            tracker.log(values, step=row["step"])
        if self._record is not None:
            Log(self._record).write({"step": row["step"], "kind": kind})

    def _start(self) -> None:
        self._started = []
        for one in self._asked:
            tracker = self._made(one) if isinstance(one, str) else one
            tracker.start()
            self._started.append(tracker)  # also if a later one cannot start
            if not self._configured:
                tracker.store_init_configuration(dict(self._config))

    def _made(self, name: str) -> Any:
        """Return a tracker of accelerate."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        folder = self._folder
        if name == "tensorboard" and folder is not None:
            _wait_for_a_later_name(folder)
            # A new run replaces what an earlier one wrote into the folder.
            return kind(folder.name, folder.parent, purge_step=None if self._from else 0)
        if name == "wandb":
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            return kind(_PROJECT, name=self._name, id=self._id, resume="allow", dir=folder)
        return kind(_PROJECT, folder) if kind.requires_logging_directory else kind(_PROJECT)


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait until the second in the names of TensorBoard's files has passed.

    TensorBoard reads the files in the order of their names: the second, the host, the process.
    """
    names = [path.name.split(".") for path in folder.glob("events.out.tfevents.*")]
    newest = max((int(parts[3]) for parts in names if parts[3].isdigit()), default=0)
    while 0 <= newest - int(time.time()) <= 1:
        time.sleep(0.05)
