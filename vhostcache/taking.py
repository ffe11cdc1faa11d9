"""Opening a volume's storage while the loop goes on: image, cache and locks, for a guest that comes from elsewhere.

Owns the thread in which that happens, and what it has opened until somebody keeps it. Invariant: what has been opened
is kept by one, or closed here, whatever becomes of either side; closing it may wait, and has a thread, too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from vhostcache.errors import Error

T = TypeVar("T")


class Taking(Generic[T]):
    """`take` opens it all, and gives each thing's closing to the stack; it is called in another thread, and so is
    `wake`, when `ended` has become true."""

    def __init__(self, take: Callable[[contextlib.ExitStack], T], wake: Callable[[], None]) -> None:
        self.ended = False
        self._take = take
        self._wake = wake
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._is_abandoned = False
        self._found: list[T] = []
        self._error: Exception | None = None
        self._thread = self._start(self._run)

    def result(self) -> T:
        """It has ended: what was opened, which is closed here unless it is kept. Raises what `take` has raised."""
        assert self.ended
        if self._error is not None:
            raise self._error
        return self._found[0]

    def keep(self) -> None:
        """Whoever has the result closes it."""
        self._stack.pop_all()

    def abandon(self) -> None:
        """Nobody wants it, or not any more."""
        with self._lock:
            self._is_abandoned = True
            if self.ended and self._error is None:
                self._thread = self._start(self._close)

    def join(self) -> None:
        """Until nothing is under way here."""
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether something is."""
        return self._thread.is_alive()

    def _start(self, target: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=target, name="taking", daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        try:
            self._found.append(self._take(self._stack))
        except Exception as error:  # noqa: BLE001 - `result` raises it, where it is heard
            self._error = error
            self._close()
        with self._lock:
            self.ended = True
            is_abandoned = self._is_abandoned
        if is_abandoned:
            self._close()
        self._wake()

    def _close(self) -> None:
        with contextlib.suppress(Error, OSError):
            self._stack.close()


class Takings:
    """All that are under way, so that nothing ends before they have."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._all: list[Taking[Any]] = []

    def begin(self, take: Callable[[contextlib.ExitStack], T]) -> Taking[T]:
        self._all = [taking for taking in self._all if taking.is_alive]
        taking = Taking(take, self._wake)
        self._all.append(taking)
        return taking

    def join(self) -> None:
        """Nobody wants them any more."""
        for taking in self._all:
            taking.abandon()
            taking.join()
