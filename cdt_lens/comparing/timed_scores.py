"""Scores of one method after another, with the time that each took, kept on disk.

1. A plain forward pass of the same examples is timed three times before the method and three times
   after it, so that a machine whose speed drifts slows both equally. Their median is the unit.
2. A method that takes fewer than twenty passes and ten seconds runs five times, with a pass after
   each run. Its time is the median. A longer method runs once. Hashing the weights is not counted.
3. Scores and time are kept. The time of an interrupted sweep is not known, and reported as NaN.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from cdt_lens.circuits.head_scores import HeadScores
from cdt_lens.core.artifacts import remove_artifact
from cdt_lens.core.equality import EqualByContent
from cdt_lens.core.errors import (
    InputError,
    NonFiniteError,
    SplitWordError,
    UnsupportedModelError,
)
from cdt_lens.core.kept import Kept, Say, drop_other_versions, reuse
from cdt_lens.core.processes import gather_items, is_main, shard, wait_for_all
from cdt_lens.decomposition.baseline import Baseline
from cdt_lens.models.provenance import hashed_once, model_key
from cdt_lens.models.view import ModelView
from cdt_lens.scoring.methods import score_by
from cdt_lens.scoring.sweep import SWEEP_FORMAT
from cdt_lens.tasks.task import Examples

_FORMAT = "cdt_lens.timed_scores"
_PASSES = 3
_SHORT, _SECONDS, _REPEATS = 20, 10, 5
Run = Callable[[Path | None], HeadScores]


class _Time(TypedDict):
    refused: str | None
    clock: dict[str, Any]
    seconds: float | None
    passes: float | None


@dataclass(frozen=True, eq=False)
class TimedScores(EqualByContent):
    """The scores of one method and their cost.

    Attributes:
        method: The name of the method.
        scores: Its scores, or None if it was refused.
        seconds: The time to score all heads; NaN if it is not known.
        passes: The same time in plain forward passes; NaN if it is not known.
        refused: The reason why the method has no scores on this model.
    """

    method: str
    scores: HeadScores | None
    seconds: float = math.nan
    passes: float = math.nan
    refused: str | None = None


@dataclass
class TimedScorer:
    """Scores examples by any method, against the clock.

    The files of a method are `scores-NAME.json` and `time-NAME.json`.

    Attributes:
        view: The model.
        examples: The examples to score the heads on.
        baseline: The reference values of the heads.
        folder: The folder in which scores and times are kept, or None to keep none.
        say: Receives the progress, and the reason why kept scores are made again.
        seed: Seed of the methods that draw random numbers.
        batch_size: Examples in a batch.
        rows: (source x example) rows in a forward pass; chosen from `batch_size` if None.
        progress: Whether to show progress bars.
        exact: Number of examples that methods sweep which correct first-order scores by a sample;
            None leaves it to the method.
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
    exact: int | None = None

    def __post_init__(self) -> None:
        self._hash = model_key(self.view)

    def score(self, method: str) -> TimedScores:
        """Return the scores of a method: kept ones of the same model, data and seed, or new ones.

        Args:
            method: A name from `METHODS`.

        Returns:
            The scores and their cost. `refused` holds the reason where the method has no meaning
            on this model or leaves the finite range.
        """
        known = self._known(method)
        if known is not None:
            return known
        self.say(f"scores: {method}")
        scored = self._scored(method)
        if self.folder is not None:
            if scored.scores is not None and is_main():
                scored.scores.save(self._path("scores", method))
            time_taken = {
                "refused": scored.refused, "clock": self._clock(),
                "seconds": _or_none(scored.seconds), "passes": _or_none(scored.passes),
            }  # fmt: skip
            self._kept_time(method).keep(time_taken)
            self._remove_partial(method)
        return scored

    # ------------------------------------------------------------------ kept scores

    def _path(self, kind: str, method: str) -> Path:
        if self.folder is None:
            raise InputError("TimedScorer: no folder was given, so nothing is kept in files")
        # Should two methods have one file name, the key tells them apart.
        name = re.sub(r"[^\w.-]+", "_", method)
        return self.folder / f"{kind}-{name}.json"

    def _made_from(self) -> dict[str, Any]:
        return {
            "model": self._hash, "data": self.examples.hash, "baseline": self.baseline.hash,
            "seed": self.seed, "exact": self.exact,
        }  # fmt: skip

    def _kept_time(self, method: str) -> Kept:
        made_from = {"method": method, **self._made_from()}
        return Kept(self._path("time", method), _FORMAT, made_from, holds=_Time)

    def _clock(self) -> dict[str, Any]:
        """Return the settings that change the time and not the scores."""
        return {
            "batch_size": self.batch_size, "rows": self.rows, "device": str(self.view.device),
            "threads": torch.get_num_threads(), "processes": shard()[1],
        }  # fmt: skip

    def _known(self, method: str) -> TimedScores | None:
        """Return what an earlier call kept, or None."""
        if self.folder is None:
            return None
        kept = self._kept_time(method).reuse(self.say)
        if kept is None:
            return None
        if kept["refused"] is not None:
            self.say(f"{method} was refused before: {kept['refused']}")
            return TimedScores(method, None, refused=kept["refused"])
        return self._timed(method, kept)

    def _timed(self, method: str, kept: dict[str, Any]) -> TimedScores | None:
        """Return the kept scores with their time."""
        path = self._path("scores", method)
        if not path.exists():
            self.say(f"{path} is missing; making it again")
        # A kill between the two files of a method may leave scores that its key does not describe.
        scores = reuse(path, HeadScores.load, self._key_of, self._made_from(), self.say)
        if scores is None:
            return None
        self.say(f"{path}: using the kept result")
        if kept.get("clock") != self._clock():
            self.say(f"{method} was timed under other settings; its time here is not known")
            return TimedScores(method, scores)
        return TimedScores(method, scores, _or_nan(kept["seconds"]), _or_nan(kept["passes"]))

    def _key_of(self, scores: HeadScores) -> dict[str, Any]:
        # Only methods that draw random numbers record a seed.
        made = scores.provenance
        own = self.seed if made.seed is None else made.seed
        key = {**made.key, "seed": made.options.get("seed", own), "exact": self.exact}
        if self.exact is not None:
            # A sweep of all examples is no estimate, and records no number.
            key["exact"] = made.options.get("exact", len(self.examples))
        return key

    def _partial(self, method: str) -> list[Path]:
        """Return the checkpoints of an interrupted sweep, of all processes."""
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
        drop_other_versions(self._partial(method), SWEEP_FORMAT, self.say)
        resumed = bool(self._partial(method))
        wait_for_all()  # No process writes a checkpoint before every process has looked for one.
        path = None
        if self.folder is not None:
            path = self._path("scores", method).with_suffix(".partial.json")

        def run(checkpoint: Path | None) -> HeadScores:
            scores: HeadScores = score_by(
                method, self.view, self.examples, self.baseline, batch_size=self.batch_size,
                rows=self.rows, checkpoint=checkpoint, exact=self.exact, seed=self.seed,
                progress=self.progress,
            )  # fmt: skip
            return self._whole(method, scores)

        try:
            if resumed:
                self.say(f"{method} resumes where it was interrupted; its time will not be known")
                return TimedScores(method, run(path))
            with hashed_once():
                model_key(self.view)  # before the clock starts
                return TimedScores(method, *self._clocked(run, path))
        except (NonFiniteError, UnsupportedModelError, SplitWordError) as error:
            self.say(f"{method} is refused: {error}")
            return TimedScores(method, None, refused=str(error))

    def _whole(self, method: str, scores: HeadScores) -> HeadScores:
        scored, wanted = len(scores.ranking()), self.view.n_layers * self.view.n_heads
        if scored < wanted:
            raise NonFiniteError(f"{method}: only {scored} of {wanted} heads have a score")
        return scores

    def _clocked(self, run: Run, checkpoint: Path | None) -> tuple[HeadScores, float, float]:
        """Return scores, their seconds, and these over the median of the passes around them."""
        self._pass()  # The first pass of a model costs more than the others.
        passes = [self._pass() for _ in range(_PASSES)]
        start = time.perf_counter()
        scores = run(checkpoint)
        taken = [time.perf_counter() - start]
        passes += [self._pass() for _ in range(_PASSES)]
        # Decided once, from the first run; processes that share the work must decide alike.
        limit = min(_SECONDS, _SHORT * statistics.median(passes))
        short = any(gather_items([taken[0] < limit]))
        while short and len(taken) < _REPEATS:
            start = time.perf_counter()
            run(None)
            taken.append(time.perf_counter() - start)
            passes.append(self._pass())
        seconds = statistics.median(taken)
        return scores, seconds, seconds / statistics.median(passes)

    def _pass(self) -> float:
        """Return the seconds of one forward pass of the examples, without the unembedding."""
        start = time.perf_counter()
        apart = self.view.longrope_limit
        for batch in self.examples.batches(self.batch_size, shard=shard(), apart=apart):
            resid = self.view.run(batch.tokens).resid[-1]
            float(resid[0, 0, 0])  # wait for the device
        return time.perf_counter() - start


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
