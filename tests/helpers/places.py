"""Folders that tests read."""

import os
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
# Data and reference numbers that are not part of the repository; tests skip where they are absent.
DATA = Path(os.environ.get("CDT_DATA", ROOT.parent / "shared" / "data"))
FIXTURES = Path(os.environ.get("CDT_FIXTURES", ROOT.parent / "shared" / "fixtures"))
