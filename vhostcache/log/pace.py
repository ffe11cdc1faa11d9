"""The pace of writes while the log fills: a ramp, never a cliff.

Owns an estimate of how fast destaging turns the log over, and the blocks that may be accepted now. Below `RAMP_BEGIN`
of the ring dirty, writes are free. Above, they are accepted at a multiple of the rate at which the log is turned over,
which falls from FAST at the beginning of the ramp by SLOW at its end, so that the log settles between the two and the
guest sees writes that are each a little slower instead of none for a while. That rate is of the objects destaged, each
with its share of the log, and not of how the clean address moves: with writes all over the disk that stands still until
every object has had its turn, and then leaps, and a pace that follows it lets writes in by gusts for ever. It is only
not left far behind. Where nothing becomes clean, because destaging has only begun or the backend is gone, the pace
falls with the room that is left. Reads and flushes are never held. It imports no clock: time is handed in.
"""

from collections import deque
from typing import Final

from vhostcache import operations as op

RAMP_BEGIN: Final = 0.6
RAMP_END: Final = 0.95
FAST: Final = 2.0
SLOW: Final = 0.75
LEAST_SHARE: Final = 0.1
"""Of the rate, behind the end of the ramp."""
LEAST_RATE: Final = 256.0
"""Blocks a second (1 MiB/s) that are accepted whatever the backend does, as long as there is room."""
MEASURE_BEGIN: Final = 0.3
"""The rate is measured from here on, so that it is known when it is wanted."""
ROOM_S: Final = 10.0
"""What room there is may be used within so long, though nothing becomes clean: the less there is, the slower."""
WINDOW_NS: Final = 4_000_000_000
"""It is that of the last few seconds: objects become clean several at a time, when the backend has been flushed."""
SAMPLE_NS: Final = 100_000_000
LOOK_NS: Final = 1_000_000
LEAST_WINDOW_NS: Final = 500_000_000
"""Nothing is known before."""
BURST_NS: Final = 5_000_000
"""So much of the rate may be accepted at once."""


class Pacer:
    """`update` once a turn, `take` for each write. `active`: writes have to ask."""

    __slots__ = (
        "_clean_rate",
        "_credit",
        "_now_ns",
        "_ring_blocks",
        "_samples",
        "_turned_rate",
        "active",
        "look_ns",
        "rate",
    )

    def __init__(self, ring_blocks: int) -> None:
        self._ring_blocks = ring_blocks
        self._samples: deque[tuple[int, int, int]] = deque()
        """(time, clean address, log blocks turned over until then), oldest first."""
        self._turned_rate = 0.0
        """Log blocks a second that are turned over; 0: not known."""
        self._clean_rate = 0.0
        """By which the clean address moves."""
        self._now_ns = 0
        self._credit = 0.0
        self.active = False
        self.look_ns = 0
        """While inactive: when to look again."""
        self.rate = 0.0
        """Blocks a second that are accepted, while active."""

    def update(self, head: int, clean: int, turned: int, now_ns: int) -> None:
        """The log's state now: its addresses, and how many blocks have been turned over so far."""
        full = (head - clean) / self._ring_blocks
        self.look_ns = now_ns + LOOK_NS
        if full <= MEASURE_BEGIN:
            self.active = False
            self._samples.clear()
            self._turned_rate = self._clean_rate = 0.0
            return
        if not self._samples or now_ns - self._samples[-1][0] >= SAMPLE_NS:
            self._measure(clean, turned, now_ns)
        at = (full - RAMP_BEGIN) / (RAMP_END - RAMP_BEGIN)
        if at <= 0.0 or (self._turned_rate == 0.0 and at < 0.5):
            self.active = False  # there is room, or nothing is known yet
            return
        room = max(0.0, RAMP_END - full) * self._ring_blocks / ROOM_S
        paced = self._turned_rate * max(LEAST_SHARE, FAST + (SLOW - FAST) * at)
        self.rate = max(LEAST_RATE, room, min(paced, room + FAST * self._clean_rate))
        most = max(1.0, self.rate * BURST_NS / 1e9)
        if self.active:
            self._credit = min(self._credit + self.rate * (now_ns - self._now_ns) / 1e9, most)
        else:
            self._credit = most
        self.active = True
        self._now_ns = now_ns

    def _measure(self, clean: int, turned: int, now_ns: int) -> None:
        samples = self._samples
        samples.append((now_ns, clean, turned))
        while len(samples) > 2 and now_ns - samples[1][0] >= WINDOW_NS:
            samples.popleft()
        since_ns, clean_before, turned_before = samples[0]
        if now_ns - since_ns >= LEAST_WINDOW_NS:
            self._clean_rate = (clean - clean_before) * 1e9 / (now_ns - since_ns)
            self._turned_rate = (turned - turned_before) * 1e9 / (now_ns - since_ns)

    def take(self, blocks: int) -> bool:
        """Whether a write of so many blocks may be accepted now. A large one goes into debt."""
        if not self.active:
            return True
        if self._credit < 1.0:
            return False
        self._credit -= blocks
        return True

    def give_back(self, blocks: int) -> None:
        """What `take` has granted was not accepted: it lacks room, and will ask again."""
        if self.active:
            self._credit += blocks

    def deadline_ns(self) -> int:
        """When the next write may be accepted."""
        if not self.active or self._credit >= 1.0:
            return op.NEVER
        return self._now_ns + int((1.0 - self._credit) / self.rate * 1e9) + 1
