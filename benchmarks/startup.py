"""CPU seconds until the command line answers and the package is imported.

    python benchmarks/startup.py

Each figure is the median over several processes; the ratio is to Python doing nothing.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

RUNS = 5
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import cdt_lens": ["-c", "import cdt_lens"],
    "cdt-lens --help": ["-m", "cdt_lens.cli", "--help"],
    "cdt-lens discover --help": ["-m", "cdt_lens.cli", "discover", "--help"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """Return the CPU time, user and system, of one Python process with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    medians = {
        name: statistics.median(cpu_seconds(arguments) for _ in range(RUNS))
        for name, arguments in COMMANDS.items()
    }
    bare = medians["python -c pass"]
    print("| process | CPU seconds | ratio to python -c pass |")
    print("|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {seconds:.3f} | {seconds / bare:.1f} |")


if __name__ == "__main__":
    main()
