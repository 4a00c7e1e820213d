"""Scores of one method after another, each with the time it took, kept on disk as they come.

1. A plain forward pass of the same examples is timed three times before the method and three times
   after it, so that a machine whose speed drifts slows both alike; their median is the unit.
2. A method of fewer than twenty passes runs five times, with a pass after each; its time is the
   median. A longer one runs once. The check that the weights are the right ones is not counted.
3. Scores and time are kept. The time of a sweep that was cut off is not known, and said to be so.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core.artifacts import remove_artifact
from cdt_lens.core.errors import ArtifactError, InputError, NonFiniteError, UnsupportedModelError
from cdt_lens.core.kept import Say, file_name, keep, kept
from cdt_lens.core.processes import gather_items, is_main, shard, wait_for_all
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.models.provenance import hashed_once, versions, weight_hash
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.methods import score_by
from cdt_lens.tasks.task import Examples

_FORMAT = "cdt_lens.timed_scores"
_PASSES = 3
_SHORT, _REPEATS = 20, 5
Run = Callable[[Path | None], HeadScores]


@dataclass(frozen=True)
class TimedScores:
    """A method's scores with their cost, in seconds and in plain forward passes (NaN: not known).

    refused: why the method has no scores on this model.
    """

    method: str
    scores: HeadScores | None
    seconds: float = math.nan
    passes: float = math.nan
    refused: str | None = None


@dataclass
class TimedScorer:
    """Scores `examples` by any method; what it kept in `folder` (None: nowhere) is not made again.

    The files of a method are `scores-NAME.json` and `time-NAME.json`.
    """

    view: ModelView
    examples: Examples
    baseline: Baseline
    folder: Path | None
    say: Say
    seed: int = 0
    batch_size: int = 16
    rows: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        self._hash = weight_hash(self.view)

    def score(self, method: str) -> TimedScores:
        """The scores that an earlier call kept for the same model, data, baseline and seed, or new.

        A model on which the method has no meaning, or leaves the finite range, is a refusal.
        """
        found = self._found(method)
        if found is not None:
            return found
        self.say(f"scores: {method}")
        scored = self._scored(method)
        if self.folder is not None:
            if scored.scores is not None and is_main():
                scored.scores.save(self._path("scores", method))
            body = {
                "key": self._key(method), "refused": scored.refused, "clock": self._clock(),
                "seconds": _or_none(scored.seconds), "passes": _or_none(scored.passes),
            }  # fmt: skip
            keep(self._path("time", method), _FORMAT, body)
            self._remove_partial(method)
        return scored

    # ------------------------------------------------------------------ what is there

    def _path(self, kind: str, method: str) -> Path:
        if self.folder is None:
            raise InputError("TimedScorer: no folder was given, so nothing is kept in files")
        return self.folder / f"{kind}-{file_name(method)}.json"

    def _key(self, method: str) -> dict[str, Any]:
        return {
            "method": method, "model": self._hash, "data": self.examples.hash,
            "baseline": self.baseline.hash, "seed": self.seed, "version": versions()["cdt_lens"],
        }  # fmt: skip

    def _clock(self) -> dict[str, Any]:
        """What a time depends on, and the scores do not."""
        return {
            "batch_size": self.batch_size, "rows": self.rows, "device": str(self.view.device),
            "threads": torch.get_num_threads(), "processes": shard()[1],
        }  # fmt: skip

    def _found(self, method: str) -> TimedScores | None:
        """What an earlier call kept."""
        if self.folder is None:
            return None
        found = kept(self._path("time", method), _FORMAT, self._key(method), self.say)
        again = None if found is None else self._read(method, found)
        wait_for_all()  # no process writes before every one has looked
        return again

    def _read(self, method: str, found: dict[str, Any]) -> TimedScores | None:
        if found["refused"] is not None:
            self.say(f"{method} was refused before: {found['refused']}")
            return TimedScores(method, None, refused=found["refused"])
        path = self._path("scores", method)
        try:
            scores = HeadScores.load(path)
        except (InputError, ArtifactError) as error:
            self.say(f"{error}; making it again")
            return None
        # A kill between the two files of a method may leave scores that its key does not speak of.
        told = scores.provenance
        made = (told.model_hash, told.task_hash, told.options.get("baseline_hash"))
        if made != (self._hash, self.examples.hash, self.baseline.hash):
            self.say(f"{path} was made from other data; making it again")
            return None
        if told.options.get("seed", self.seed) != self.seed:
            self.say(f"{path} was made with another seed; making it again")
            return None
        self.say(f"{path} is there already")
        if found.get("clock") != self._clock():
            self.say(f"{method} was timed under other settings; its time here is not known")
            return TimedScores(method, scores)
        return TimedScores(method, scores, _or_nan(found["seconds"]), _or_nan(found["passes"]))

    def _partial(self, method: str) -> list[Path]:
        """What a sweep that was cut off has left, of any process."""
        if self.folder is None:
            return []
        return sorted(self.folder.glob(f"{self._path('scores', method).stem}.partial*.json"))

    def _remove_partial(self, method: str) -> None:
        if is_main():
            for path in self._partial(method):
                remove_artifact(path)
        wait_for_all()

    # ------------------------------------------------------------------ new scores

    def _scored(self, method: str) -> TimedScores:
        resumed = bool(self._partial(method))
        wait_for_all()
        path = None
        if self.folder is not None:
            path = self._path("scores", method).with_suffix(".partial.json")

        def run(checkpoint: Path | None) -> HeadScores:
            scores: HeadScores = score_by(
                method, self.view, self.examples, self.baseline, batch_size=self.batch_size,
                rows=self.rows, checkpoint=checkpoint, seed=self.seed, progress=self.progress,
            )  # fmt: skip
            return self._whole(method, scores)

        try:
            if resumed:
                self.say(f"{method} goes on where it was cut off; its time will not be known")
                return TimedScores(method, run(path))
            with hashed_once():
                weight_hash(self.view)  # before the clock starts
                return TimedScores(method, *self._clocked(run, path))
        except (NonFiniteError, UnsupportedModelError) as error:
            self.say(f"{method} is refused: {error}")
            return TimedScores(method, None, refused=str(error))

    def _whole(self, method: str, scores: HeadScores) -> HeadScores:
        found, wanted = len(scores.ranking()), self.view.n_layers * self.view.n_heads
        if found < wanted:
            raise NonFiniteError(f"{method}: only {found} of {wanted} heads have a score")
        return scores

    def _clocked(self, run: Run, checkpoint: Path | None) -> tuple[HeadScores, float, float]:
        """Scores, the seconds they took, and these over the median of the passes around them."""
        self._pass()  # what only a first pass costs
        passes = [self._pass() for _ in range(_PASSES)]
        start = time.perf_counter()
        scores = run(checkpoint)
        taken = [time.perf_counter() - start]
        passes += [self._pass() for _ in range(_PASSES)]
        # Decided once, from the first run; processes that share the work must decide alike.
        short = any(gather_items([taken[0] < _SHORT * statistics.median(passes)]))
        while short and len(taken) < _REPEATS:
            start = time.perf_counter()
            run(None)
            taken.append(time.perf_counter() - start)
            passes.append(self._pass())
        seconds = statistics.median(taken)
        return scores, seconds, seconds / statistics.median(passes)

    def _pass(self) -> float:
        """Seconds of one plain forward pass of the examples, without the unembedding."""
        start = time.perf_counter()
        for batch in self.examples.batches(self.batch_size, shard=shard()):
            resid = self.view.run(batch.tokens).resid[-1]
            float(resid[0, 0, 0])  # wait for the device
        return time.perf_counter() - start


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
