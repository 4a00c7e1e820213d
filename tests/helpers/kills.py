"""Kills of a small transfer at random moments, and what its resumed run must be.

The commands run as a person's do, in a process of their own; SIGKILL ends them. The temporary
folders of the system are in a folder of the test, so that what a killed command leaves there shows.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from helpers.places import ROOT
from helpers.run_trees import contents
from helpers.saved import TEMPLATE, VERBALIZER, save_model, write_csv

CONFIG = """model = "tiny"
[task]
name = "files"
source = "source"
targets = ["near"]
template = "{template}"
verbalizer = {{{verbalizer}}}
{files}
[proxy]
epochs = 1
learning_rate = 3e-3
[discovery]
examples = 6
k = 2
faithfulness_examples = 6
draws = 1
[transfer]
scopes = ["norms", "decision"]
epochs = 1
learning_rate = 1e-2
"""


class Place:
    """A folder with a tiny model, data and settings, in which transfers run and are killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary, self.run = folder / "tmp", folder / "run"
        self.temporary.mkdir(parents=True)
        save_model(folder / "tiny")
        files = []
        for number, language in enumerate(("source", "near")):
            files.append(f"[task.files.{language}]")
            (folder / language).mkdir()
            for part, (split, size) in enumerate({"train": 24, "valid": 12, "test": 9}.items()):
                write_csv(folder / language / f"{split}.csv", size, 10 * number + part)
                files.append(f'{split} = "{language}/{split}.csv"')
        words = ", ".join(f'{label} = "{word}"' for label, word in VERBALIZER.items())
        text = CONFIG.format(template=TEMPLATE, verbalizer=words, files="\n".join(files))
        (folder / "transfer.toml").write_text(text)

    def start(self) -> subprocess.Popen[bytes]:
        """A transfer that runs or resumes in the run directory."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary)}
        command = [
            sys.executable,
            "-m",
            "cdt_lens.cli",
            "transfer",
            "transfer.toml",
            "--out",
            "run",
        ]
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    def finish(self) -> tuple[dict[str, Any], float]:
        """The contents of a run directory after a run to the end, and the seconds that it took."""
        begin = time.monotonic()
        process = self.start()
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()[-2000:]
        return contents(self.run), time.monotonic() - begin

    def kill(self, after: float) -> bool:
        """Kill a run after some seconds; whether it was still running."""
        process = self.start()
        try:
            process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return True
        return False

    def litter(self) -> list[str]:
        """What no finished run leaves: temporary and hidden files, checkpoints."""
        found = [*self.temporary.iterdir(), *(self.run).rglob(".*")]
        return [str(p) for p in [*found, *(self.run).rglob("*checkpoint*")]]


def complaint(place: Place, expected: dict[str, Any], moments: list[float]) -> str:
    """Kill a new run at each moment and resume it; what is then wrong, or ""."""
    shutil.rmtree(place.run)
    for moment in moments:
        place.kill(moment)
    found, _ = place.finish()
    different = [path for path in {*found, *expected} if found.get(path) != expected.get(path)]
    litter = place.litter()
    wrong = [f"other contents: {sorted(different)}"] if different else []
    return "; ".join(wrong + ([f"litter: {litter}"] if litter else []))


def moments(draw: random.Random, seconds: float, count: int) -> list[float]:
    """Random moments of a run that takes `seconds`, its imports included."""
    return [draw.uniform(0, seconds) for _ in range(count)]
