"""Hand-over: a volume's storage goes from one daemon to another while its guest migrates.

Owns where one volume's storage is: with us, on its way, or elsewhere. Decides when it is drained, closed, let go of and
taken; what that means is done by `Storage`, which the daemon implements. Imports neither os, socket nor time.

        held ──── the last queue stops while the front-end migrates ───▶ draining ── drained ──▶ closing
         ▲ ▲                                                                │                       │ closed
         │ └──────────── a queue starts, or the front-end leaves ───────────┘                       ▼
         └────────────── taken: locks, cache, image ──── taking ◀──── a queue starts ──────────── away

Invariants:
- without storage no request is taken; the storage is taken whole, locks and all, or not at all;
- the front-end hears that its queue has stopped when the storage has been let go of, or when `timeout_ns` has passed:
  then the locks stay here, the other daemon waits for them, and the hand-over is finished when the image allows;
- a guest whose requests nothing answers does not migrate: they exist here only, so the storage stays here;
- an image that cannot be locked is only answered for when it has been let go of, however long that takes: nothing else
  would keep the other daemon from it;
- what the log knew of the image is not believed when it comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Final, NoReturn, Protocol

from vhostcache.operations import NEVER

RETRY_NS: Final = 100_000_000
"""Between two attempts to take what another daemon still has."""
REMIND_NS: Final = 10_000_000_000
"""Between two events that say how a wait goes on."""


class Where(Enum):
    """Of the storage."""

    HELD = "held"
    DRAINING = "handing-over"
    CLOSING = "closing"
    AWAY = "away"
    TAKING = "waiting"


class Storage(Protocol):
    """What is done with it."""

    @property
    def can_be_locked(self) -> bool:
        """Whether others find that it is in use."""
        ...

    def tell(self, level: str, event: str, **fields: Any) -> None:
        """Something for the log."""

    def hurry(self, on: bool) -> None:
        """Destage ahead, so that little is left."""

    def drain(self, on: bool) -> None:
        """Destage everything, or go on as usual."""

    def drained(self) -> bool:
        """Whether everything is durable in the image."""

    def close(self) -> None:
        """Take no requests, and close the log: nothing in it is to be believed again."""

    def closed(self) -> bool:
        """Whether that has ended, and no I/O is left."""

    def let_go(self) -> None:
        """Of image, cache and locks. The queue that waits for it may stop."""

    def take(self) -> str | None:
        """Image, cache and locks, and requests again. A text: not now, and why. None: they are being opened."""

    def stop_taking(self) -> None:
        """Let go of what is being opened."""

    def stopped(self) -> None:
        """The queue that waits may stop."""

    def give_up(self) -> bool:
        """A queue waits for requests that nothing answers: it may stop with them unanswered. False: none does."""
        ...

    def cut_off(self) -> None:
        """The front-end, which may come again."""

    def dirty_bytes(self) -> int:
        """What the image does not have yet."""
        ...

    def lost_bytes(self) -> int:
        """What it will not have, before the guest overwrites it: reads of that fail here."""


class HandOver:
    """See the module. Every call says what time it is; `step` is to be called when it has asked for that."""

    def __init__(self, storage: Storage, timeout_ns: int, away: bool = False) -> None:
        self._storage = storage
        self._timeout_ns = timeout_ns
        self.where = Where.AWAY if away else Where.HELD
        self._queues: set[int] = set()
        self._began_ns = 0
        self._remind_ns = 0
        self._reason = ""
        self._migrating = False
        self._answered = False
        """The front-end knows that its queue has stopped."""
        self._unsettled_ns = NEVER
        """Since when the front-end waits for the end of requests, perhaps to stop a queue."""

    @property
    def is_held(self) -> bool:
        return self.where is Where.HELD

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        if self.where is Where.HELD:
            return self._unsettled_ns != NEVER
        return self.where is not Where.AWAY or bool(self._queues)

    @property
    def waits_for(self) -> str:
        """Why the storage cannot be had yet, while a guest needs it."""
        return self._reason if self.where is Where.TAKING else ""

    # What happens.

    def migrating(self, on: bool) -> None:
        """The front-end begins to note dirty pages, or no longer does."""
        if on != self._migrating:
            self._migrating = on
            self._unsettled_ns = NEVER
            if self.where is Where.HELD:
                self._storage.hurry(on)
                fields = {"dirty_bytes": self._storage.dirty_bytes()} if on else {}
                self._storage.tell("info", "migrating" if on else "not-migrating", **fields)

    def quiesced(self, now_ns: int) -> None:
        """The front-end waits until all requests have been answered."""
        if self.where is Where.HELD and self._migrating:
            self._unsettled_ns = now_ns

    def asked(self, now_ns: int) -> None:
        """The last queue is to stop, in a migration, and all requests have been answered."""
        self._unsettled_ns = NEVER
        if self.where is not Where.HELD:
            self._storage.stopped()
            return
        self._storage.tell("info", "handing-over", dirty_bytes=self._storage.dirty_bytes())
        self.where = Where.DRAINING
        self._answered = False
        self._queues.clear()  # the last one stops as soon as it is allowed to
        self._begin(now_ns)
        self._storage.drain(True)

    def queue_started(self, queue: int, now_ns: int) -> None:
        self._queues.add(queue)
        if self.where is Where.DRAINING:
            self._keep("the guest goes on here")

    def queue_stopped(self, queue: int) -> None:
        self._queues.discard(queue)
        self._give_up_taking()

    def disconnected(self) -> None:
        """The front-end has gone. If it has not been told that its queue has stopped, no other side can go on."""
        self._queues.clear()
        self._migrating = False
        self._unsettled_ns = NEVER
        if self.where is Where.DRAINING and not self._answered:
            self._keep("the front-end has gone")
        elif self.where is Where.HELD:
            self._storage.hurry(False)
        self._give_up_taking()

    def step(self, now_ns: int) -> int:
        """What can be done now. Returns when it wants to be called again."""
        if self.where is Where.HELD:
            return self._wait_for_requests(now_ns)
        if self.where is Where.DRAINING and self._storage.drained():
            self.where = Where.CLOSING
            self._storage.close()
        if self.where is Where.CLOSING and self._storage.closed():
            self._storage.let_go()
            self.where = Where.AWAY
            self._storage.tell("info", "handed-over", seconds=self._seconds(now_ns))
        if self.where in (Where.DRAINING, Where.CLOSING):
            return self._wait_to_let_go(now_ns)
        if self.where is Where.AWAY and self._queues:
            self.where = Where.TAKING
            self._begin(now_ns)
        return self._take(now_ns) if self.where is Where.TAKING else NEVER

    # How it goes on.

    def _begin(self, now_ns: int) -> None:
        self._began_ns = self._remind_ns = now_ns
        self._reason = ""

    def _seconds(self, now_ns: int) -> float:
        return round((now_ns - self._began_ns) * 1e-9, 3)

    def _keep(self, reason: str) -> None:
        """The storage stays: nothing has been let go of."""
        self.where = Where.HELD
        self._storage.drain(False)
        self._storage.hurry(self._migrating)
        self._storage.tell("info", "hand-over-cancelled", reason=reason)

    def _give_up_taking(self) -> None:
        if self.where is Where.TAKING and not self._queues:
            self.where = Where.AWAY
            self._storage.stop_taking()

    def _is_overdue(self, now_ns: int) -> bool:
        return now_ns - self._began_ns >= self._timeout_ns

    def _wait_for_requests(self, now_ns: int) -> int:
        """They wait for the image, and the front-end for them."""
        if self._unsettled_ns == NEVER:
            return NEVER
        due_ns = self._unsettled_ns + self._timeout_ns
        if now_ns < due_ns:
            return due_ns
        self._unsettled_ns = NEVER
        if self._storage.give_up():
            hint = "they exist here only: let the guest go on here, and migrate it when the image answers"
            self._storage.tell("error", "hand-over-refused", reason="requests wait for the image", hint=hint)
        return NEVER

    def _wait_to_let_go(self, now_ns: int) -> int:
        overdue = self._is_overdue(now_ns)
        if overdue and not self._answered and self._storage.can_be_locked:
            self._answered = True
            self._storage.stopped()
        if overdue and now_ns >= self._remind_ns:
            self._remind_ns = now_ns + REMIND_NS
            self._storage.tell(
                "error",
                "hand-over-late",
                dirty_bytes=self._storage.dirty_bytes(),
                lost_bytes=self._storage.lost_bytes(),
                seconds=self._seconds(now_ns),
                hint="the image is kept until it has everything; the guest waits there, or can go on here",
            )
        return self._remind_ns if overdue else self._began_ns + self._timeout_ns

    def _take(self, now_ns: int) -> int:
        reason = self._storage.take()
        if reason == "":
            self.where = Where.HELD
            self._storage.tell("info", "taken-over", seconds=self._seconds(now_ns))
            if self._migrating:
                self._storage.hurry(True)
            return NEVER
        if self._is_overdue(now_ns):
            self._storage.stop_taking()
            reason = reason or self._reason or "it is still being opened"
            self._storage.tell("error", "take-over-failed", reason=reason, seconds=self._seconds(now_ns))
            self._storage.cut_off()
            self.where = Where.AWAY
            self._queues.clear()
            return NEVER
        if reason is None:
            return min(now_ns + RETRY_NS, self._began_ns + self._timeout_ns)
        if now_ns >= self._remind_ns or reason != self._reason:
            self._remind_ns, self._reason = now_ns + REMIND_NS, reason
            self._storage.tell("warning", "take-over-waits", reason=reason)
        return min(now_ns + RETRY_NS, self._began_ns + self._timeout_ns)


class Away:
    """In a core's place while the storage is elsewhere: there are no requests, and there is nothing to do."""

    drained = closed = idle = True

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.notices: list[tuple[str, dict[str, object]]] = []

    def requests(
        self, what: Sequence[int], tag: Sequence[int], sector: Sequence[int], sectors: Sequence[int], now_ns: int
    ) -> NoReturn:
        raise AssertionError("a request for a volume without storage")

    def io_done(self, group: int, result: int) -> NoReturn:
        raise AssertionError("I/O of a volume without storage")

    def tick(self, now_ns: int) -> int:
        return NEVER

    def statistics(self) -> dict[str, int]:
        names = ("hits", "misses", "flushes_received", "flushes_performed", "dirty_blocks", "cached_blocks")
        return dict.fromkeys(names, 0)

    def connected(self) -> None:
        """Nobody to tell."""

    disconnected = drain = connected

    def quiesce(self, may_drop: bool) -> None:
        """There is nothing to settle."""

    def set_write_cache(self, enabled: bool) -> None:
        """It is told again to the core that comes."""

    write_cache_unknown = connected
