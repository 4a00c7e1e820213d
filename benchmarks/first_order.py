"""How well one-pass scores agree in rank with the sweeps that they approximate.

    bash benchmarks/compare.sh ioi && python benchmarks/first_order.py runs/compare-ioi

Reads the scores that the comparison left; the figures of docs/results/methods.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cdt_lens as cdt
from cdt_lens.core.kept import file_name

PAIRS = (
    ("one-pass", "cdt:stable"),
    ("one-pass:shared", "cdt:shared"),
    ("one-pass:two-ended", "cdt:two-ended"),
    ("integrated-gradients", "cdt:two-ended"),
    ("attribution-patching", "cdt:two-ended"),
    ("attribution-patching", "exact"),
)


def main(folder: Path) -> None:
    def scores(method: str) -> cdt.HeadScores:
        return cdt.HeadScores.load(folder / f"scores-{file_name(method)}.json")

    for fast, full in PAIRS:
        found = cdt.compare_scores(scores(fast), scores(full))
        print(f"{fast:22s} {full:15s} Spearman {found.spearman:.3f} Pearson {found.pearson:.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/first_order.py COMPARISON_FOLDER")
    main(Path(sys.argv[1]))
