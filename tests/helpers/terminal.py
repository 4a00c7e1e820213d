"""Standard error of a terminal, where progress bars are drawn."""

from __future__ import annotations

import io


class Terminal(io.StringIO):
    """Holds what is written, and says that it is a terminal."""

    def isatty(self) -> bool:
        return True
