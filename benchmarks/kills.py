"""Kill a small transfer at random moments and resume it: 50 by default, in some 20 minutes.

Moments are counted from the start of the command, so that they fall into its imports as well. Each
resumed run ends byte-equal to an uninterrupted one apart from times, and leaves no litter.

    python benchmarks/kills.py [--kills 50] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.kills import Place, complaint, moments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw, wrong, done = random.Random(given.seed), 0, 0
    with tempfile.TemporaryDirectory() as work:
        place = Place(Path(work) / "place")
        expected, seconds = place.finish("whole")
        print(f"a whole run takes {seconds:.0f} s", flush=True)
        while done < given.kills:
            at = moments(draw, seconds, min(draw.randrange(1, 5), given.kills - done))
            done += len(at)
            found = complaint(place, expected, f"run{done}", at)
            wrong += bool(found)
            print(
                f"{done}: killed after {[round(s, 2) for s in at]} s: {found or 'as it was'}",
                flush=True,
            )
    print(f"{done} kills, {wrong} resumed runs that are wrong")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
