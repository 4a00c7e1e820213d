"""Interrupt every public call at random moments, and count what is left behind.

KeyboardInterrupt is raised at a random step of the call, and with `--pairs` a second time 10
microseconds to 10 ms later, in the cleaning up. After each try the state of the model and of the
process is compared with the state before. Usage: `python benchmarks/interrupts.py --pairs`.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.left_behind import CALLS, Interrupts, Left, subject


def main() -> None:
    """Print one line for each class of model and call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=300)
    parser.add_argument("--pairs", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backends", nargs="+", default=["hooked", "bridge"])
    parser.add_argument("--only", nargs="+", default=list(CALLS))
    options = parser.parse_args()
    draw = random.Random(options.seed)
    total: Counter[str] = Counter()
    for backend in options.backends:
        given = subject(backend)
        for name in options.only:
            if not given.can(name):
                continue
            counts = Counter(tries=options.tries)
            with Interrupts() as interrupts:
                call = CALLS[name]
                call(given)
                steps = interrupts.steps(partial(call, given))
                for _ in range(options.tries):
                    before = Left(given)
                    second = 10 ** draw.uniform(-5, -2) if options.pairs else 0.0
                    at = draw.randint(1, steps)
                    counts[f"{interrupts.run(partial(call, given), at, second)} interrupts"] += 1
                    given.take_off()
                    left = before.changed(given)
                    if left:
                        counts["left something"] += 1
                        print(f"  {backend} {name} at {at} of {steps}: {left}", flush=True)
                        given = subject(backend)
            total += counts
            print(f"{backend:7} {name:24} {steps:8} steps {dict(counts)}", flush=True)
    print(f"all: {dict(total)}")


if __name__ == "__main__":
    main()
