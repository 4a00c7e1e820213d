"""Read files that were changed at random: 10,000 by default, in some ten minutes on one core.

Each is read right or refused by an error of the package in one line, within 20 CPU seconds and 2
GB, and nothing is written outside its folder. Prints what went wrong, and how the file was
changed.

    python benchmarks/fuzz.py [--inputs 10000] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.fuzzing import RESULTS, WRITERS, one_input, seeds

SECONDS, BYTES = 20, 2 * 1024**3


class TooLong(BaseException):
    """A file took more than its time."""


def too_long(*_: Any) -> None:
    raise TooLong


def bounded() -> None:
    """Give this process 2 GB beyond what its imports take."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGPROF, too_long)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    kinds, wrong, draw = [*RESULTS, *WRITERS], Counter[str](), random.Random(given.seed)
    with tempfile.TemporaryDirectory() as work:
        made = seeds(Path(work) / "seeds")
        bounded()
        for number in range(given.inputs):
            kind, seed = draw.choice(kinds), draw.randrange(2**32)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                found = one_input(kind, made[kind], Path(work) / "changed", random.Random(seed))
            except TooLong:
                found = f"{kind}: more than {SECONDS} seconds"
            signal.setitimer(signal.ITIMER_PROF, 0)
            if found is not None:
                wrong[kind] += 1
                print(f"input {number}, seed {seed}: {found}", flush=True)
            if number % 1000 == 999:
                print(f"{number + 1} inputs, {sum(wrong.values())} wrong", flush=True)
    print(f"{given.inputs} inputs, {sum(wrong.values())} wrong {dict(wrong) or ''}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
