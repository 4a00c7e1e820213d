"""A process that holds a run directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers.places import ROOT

HOLD = """
import sys, time
from cdt_lens.core.run_lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def held_elsewhere(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of `folder`."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process
