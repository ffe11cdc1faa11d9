"""The volumes of a daemon, and what its loop calls of each one's core.

Owns the list, the operations that all of them have for the engine, and when each wants to be looked at. A core may be
exchanged while its volume is served (`use`): the loop has no other way to it. It decides nothing and does no I/O.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vhostcache.errors import UsageError
from vhostcache.served import Served


class Volumes:
    """`take`, `io_done`, `tick`, `notices`, `deadlines`: one entry a volume, in the order of the engine's numbers."""

    def __init__(self) -> None:
        self.served: list[Served] = []
        self.operations: list[int] = []
        self.deadlines: list[int] = []
        """Of the ticks, in ns; 0: at once."""
        self.take: list[Callable[..., Any]] = []
        self.io_done: list[Callable[[int, int], Any]] = []
        self.tick: list[Callable[[int], int]] = []
        self.notices: list[list[tuple[str, dict[str, Any]]]] = []
        self.rare = False
        """Something below the hot path wants a word in the next turn."""
        self.has_exchanged = False
        """A core that is not used any more is garbage that nobody has collected."""

    def add(self, served: Served) -> None:
        self.served.append(served)
        self.deadlines.append(0)
        self._use(len(self.served) - 1)

    def exchanged(self, index: int) -> None:
        """The volume has another core now."""
        self._use(index)
        self.has_exchanged = True

    def _use(self, index: int) -> None:
        volume = self.served[index].volume
        here = slice(index, index + 1)
        self.take[here] = [volume.requests]
        self.io_done[here] = [volume.io_done]
        self.tick[here] = [volume.tick]
        self.notices[here] = [volume.notices]

    def wake(self, index: int) -> None:
        """It has something to do in this turn."""
        self.deadlines[index] = 0

    def named(self, name: str) -> tuple[int, Served]:
        """UsageError: there is none."""
        for index, served in enumerate(self.served):
            if served.name == name:
                return index, served
        names = ", ".join(f"'{served.name}'" for served in self.served[:8])
        raise UsageError(f"volume '{name[:64]}'", "is not served here", names)

    def close_storages(self) -> None:
        """Of those whose storage has come later; all I/O has ended."""
        for served in self.served:
            if served.claim is not None:
                served.claim.close()
            served.backend.close()
