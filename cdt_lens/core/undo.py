"""Take back what a call changes, whether it ends in a result, an error or an interrupt.

1. A `Scope` surrounds a call that changes something which outlives it, such as the hooks of a
   model. Each change is announced before it is made, with a function that takes it back. Such a
   function may be called twice, and also where the change was not made.
2. When the scope closes, every change that is still there is taken back.
3. A signal handler may raise an exception between any two steps of the main thread, as Ctrl-C does,
   and again while the first interrupt is cleaned up after. While a scope is open, signals that
   arrive within an `unbroken` function wait until it ends. Everything that takes a change back is
   unbroken. Blocking signals in the main thread alone would not do: the handler runs there even if
   another thread of the process receives the signal.
"""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from itertools import repeat
from operator import methodcaller
from types import FrameType
from typing import Any, ParamSpec, TypeVar, no_type_check

P = ParamSpec("P")
R = TypeVar("R")
Undo = Callable[[], object]

_POLL = 0.05  # seconds after which a call that waits for its turn lets a signal through

# The caller's handlers, in whose place `_arrived` stands while a scope is open.
_THEIRS: dict[int, Callable[[int, FrameType | None], Any]] = {}
_WAITING: list[int] = []
_MAIN_SCOPES: list[Scope] = []


class _OfThread(threading.local):
    """The open scopes of a thread, the innermost last."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []


_LOCAL = _OfThread()


def unbroken(function: Callable[P, R]) -> Callable[P, R]:
    """Let signals wait while a function runs, if a scope is open.

    Args:
        function: a function that ends soon.

    Returns:
        The function. Signals that have arrived meanwhile are handled when it ends.
    """

    # A type checker would run a function of its own around this one, which a signal may end.
    @no_type_check
    @functools.wraps(function)
    def whole(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        finally:
            if _WAITING:
                _handle_waiting(sys._getframe().f_back)

    return whole


_WHOLE = unbroken(lambda: None).__code__


class Scope:
    """A call, or a `with` block, whose changes are taken back when it closes."""

    def __init__(self) -> None:
        self._undo: list[Undo] = []
        self._if_failed: list[Undo] = []
        self._locks: list[Any] = []
        # Each step releases one lock, so that none is released twice.
        self._releases = map(methodcaller("release"), self._locks)
        self._beside: list[Scope] = []

    @unbroken
    def open(self) -> None:
        """Open the scope. `close` must follow, also if this method raises."""
        if _is_main_thread():
            _stand_in()
            _MAIN_SCOPES.append(self)
        self._beside = _LOCAL.scopes
        self._beside.append(self)

    def take(self, lock: Any) -> None:
        """Wait for a lock, and hold it until the scope closes.

        Args:
            lock: a lock that its owner may take again.
        """
        while not self._try(lock):
            pass

    @unbroken
    def _try(self, lock: Any) -> bool:
        taken = lock.acquire(timeout=_POLL)
        if taken:
            self._locks.append(lock)
        return bool(taken)

    @unbroken
    def release(self) -> None:
        """Release the locks. The scope takes no others afterwards."""
        deque(self._releases, maxlen=0)

    def at_end(self, undo: Undo) -> None:
        """Announce a change that is taken back when the scope closes.

        Args:
            undo: takes the change back. It may run more than once.
        """
        self._undo.append(undo)

    def if_failed(self, undo: Undo) -> None:
        """Announce a change that is taken back unless the scope closes with a result.

        Args:
            undo: takes the change back.
        """
        self._if_failed.append(undo)

    @unbroken
    def close(self, failed: bool) -> None:
        """Take the changes back, the last one first. A second call does nothing.

        Args:
            failed: whether the scope ends without a result.
        """
        try:
            _run(self._undo)
            if failed:
                _run(self._if_failed)
            self._leave()
            # A handler that raises makes the call fail as well.
            _handle_waiting(_outside(sys._getframe()))
        except BaseException:
            _run(self._if_failed)
            raise
        finally:
            # The caller's handlers are back. They may raise after the first of these lines.
            try:
                deque(self._releases, maxlen=0)
            finally:
                deque(self._releases, maxlen=0)

    def _leave(self) -> None:
        if self in self._beside:
            self._beside.remove(self)
        if self in _MAIN_SCOPES:
            _MAIN_SCOPES.remove(self)
        # Another thread may close a scope, but only the main thread may set handlers.
        if not _MAIN_SCOPES and _is_main_thread():
            _step_aside()


class undoing:
    """Take a change back at the end of a `with` block in which it is made.

    Args:
        undo: takes the change back. It may run more than once, and before the change.
    """

    def __init__(self, undo: Undo) -> None:
        self._undo = undo
        self._announced: list[Undo] = []

    def __enter__(self) -> None:
        scope = current_scope()
        if scope is not None:
            self._announced = scope._undo
            self._announced.append(self._undo)

    @unbroken
    def __exit__(self, *error: object) -> None:
        try:
            self._undo()
        finally:
            if self._undo in self._announced:
                self._announced.remove(self._undo)


def current_scope() -> Scope | None:
    """Return the innermost open scope of this thread, or None."""
    return _LOCAL.scopes[-1] if _LOCAL.scopes else None


def take_back_at_end(undo: Undo) -> None:
    """Announce a change that is taken back when the innermost scope closes, if one is open.

    Args:
        undo: takes the change back. It may run more than once, and before the change.
    """
    scope = current_scope()
    if scope is not None:
        scope.at_end(undo)


def take_back_if_failed(undo: Undo) -> None:
    """Announce a change that is taken back unless the innermost scope closes with a result.

    Args:
        undo: takes the change back. It may run before the change.
    """
    scope = current_scope()
    if scope is not None:
        scope.if_failed(undo)


def _run(undos: list[Undo]) -> None:
    """Call all, the last one first, also if one raises an error."""
    if not undos:
        return
    try:
        undos[-1]()
    finally:
        undos.pop()
        _run(undos)


# Signals ------------------------------------------------------------------------------------------


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _stand_in() -> None:
    found = {number: signal.getsignal(number) for number in signal.valid_signals()}
    theirs = {int(n): h for n, h in found.items() if callable(h) and h is not _arrived}
    _THEIRS.update(theirs)
    # One call of C, between whose steps hardly any time passes.
    deque(map(signal.signal, theirs, repeat(_arrived)), maxlen=0)


def _step_aside() -> None:
    ours = [number for number in _THEIRS if signal.getsignal(number) is _arrived]
    theirs = [_THEIRS[number] for number in ours]
    # A handler that is back in its place may raise at once, before the others are back.
    try:
        deque(map(signal.signal, ours, theirs), maxlen=0)
    finally:
        deque(map(signal.signal, ours, theirs), maxlen=0)


def _arrived(number: int, frame: FrameType | None) -> None:
    if _is_unbroken(frame):
        _WAITING.append(number)
    else:
        _THEIRS[number](number, frame)


def _is_unbroken(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code is _WHOLE:
            return True
        frame = frame.f_back
    return False


def _outside(frame: FrameType) -> FrameType | None:
    """Return the frame that called the unbroken function in which `frame` runs."""
    here: FrameType | None = frame
    while here is not None and here.f_code is not _WHOLE:
        here = here.f_back
    return None if here is None else here.f_back


def _handle_waiting(frame: FrameType | None) -> None:
    """Call the caller's handlers, unless another unbroken function has called this one."""
    if not _WAITING or not _is_main_thread() or _is_unbroken(frame):
        return
    numbers = list(dict.fromkeys(_WAITING))
    _WAITING.clear()
    _handle(numbers, frame)


def _handle(numbers: list[int], frame: FrameType | None) -> None:
    if not numbers:
        return
    try:
        _THEIRS[numbers[0]](numbers[0], frame)
    finally:
        _handle(numbers[1:], frame)
