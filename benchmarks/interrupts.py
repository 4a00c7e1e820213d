"""Interrupt every public call at random moments, and count what is left behind.

A timer raises KeyboardInterrupt in the call after a random delay, and with `--pairs` a second time
up to 10 ms later, in the cleaning up. After each try the state of the model and of the process is
compared with the state before. Usage: python benchmarks/interrupts.py [--tries 300] [--pairs]
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.left_behind import CALLS, Left, subject


class Twice:
    """A handler that raises, and rings once more where a second delay is given."""

    def __init__(self) -> None:
        self.second = 0.0
        self.rung = 0
        self.armed = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        if not self.armed:
            return
        self.rung += 1
        if self.second:
            signal.setitimer(signal.ITIMER_REAL, self.second)
            self.second = 0.0
        raise KeyboardInterrupt


def attempt(call: Callable[[], object], handler: Twice, first: float, second: float) -> int:
    """Run a call that is interrupted; return how often it was."""
    handler.second, handler.rung, handler.armed = second, 0, True
    with contextlib.suppress(KeyboardInterrupt):  # the second alarm
        with contextlib.suppress(KeyboardInterrupt):  # the first
            signal.setitimer(signal.ITIMER_REAL, first)
            call()
        handler.armed = False
    handler.armed = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    return handler.rung


def main() -> None:
    """Print one line for each class of model and call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=300)
    parser.add_argument("--pairs", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backends", nargs="+", default=["hooked", "bridge"])
    parser.add_argument("--only", nargs="+", default=None)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    handler = Twice()
    signal.signal(signal.SIGALRM, handler)
    total = Counter()
    for backend in options.backends:
        given = subject(backend)
        for name, call in CALLS.items():
            if (options.only and name not in options.only) or not given.can(name):
                continue
            call(given)
            started = time.perf_counter()
            call(given)
            length = time.perf_counter() - started
            counts = Counter()
            for _ in range(options.tries):
                before = Left(given)
                second = 10 ** draw.uniform(-5, -2) if options.pairs else 0.0
                first = draw.uniform(1e-6, length)
                rung = attempt(partial(call, given), handler, first, second)
                counts["once"] += rung == 1
                counts["twice"] += rung == 2
                left = before.changed(given)
                if left:
                    counts["left something"] += 1
                    print(f"  {backend} {name}: {left}", flush=True)
                    given = subject(backend)
            total += counts
            print(f"{backend:7} {name:24} {length:6.3f} s {dict(counts)}", flush=True)
    print(f"all: {dict(total)}")


if __name__ == "__main__":
    main()
