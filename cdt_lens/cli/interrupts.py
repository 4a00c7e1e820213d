"""End an interrupted command with one line and the exit code of its signal.

The module imports nothing heavy, so that an interrupt during the other imports is reported too.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal to stop. It is no KeyboardInterrupt, because typer exits without a word on those."""


@contextmanager
def reported_interrupts() -> Iterator[None]:
    """Exit with 128 + the number of the signal if Ctrl-C or SIGTERM arrives within the block.

    Raises:
        SystemExit: a signal arrived.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise Interrupted

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    except BaseException:
        # A library may have made another error of the interrupt.
        if not received:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if received else handler)
    if received:
        if os.environ.get("RANK", "0") == "0":
            print("cdt-lens: Interrupted. Run the same command again to continue.", file=sys.stderr)
        sys.exit(128 + received[0])
