"""The pace of writes while the log fills: a ramp, never a cliff.

Owns an estimate of how fast the log becomes clean, and the blocks that may be accepted now. Below `RAMP_BEGIN` of the
ring dirty, writes are free. Above, they are accepted at a multiple of the rate at which destaging makes room, which
falls from FAST at the beginning of the ramp to SLOW at its end, so that the log settles between the two and the guest
sees writes that are each a little slower instead of none for a while. Where nothing becomes clean, because destaging
has only begun or the backend is gone, the pace falls with the room that is left. Reads and flushes are never held. It
imports no clock: time is handed in.
"""

from collections import deque
from typing import Final

from vhostcache import operations as op

RAMP_BEGIN: Final = 0.6
RAMP_END: Final = 0.95
FAST: Final = 4.0
SLOW: Final = 0.5
LEAST_RATE: Final = 256.0
"""Blocks a second (1 MiB/s) that are accepted whatever the backend does, as long as there is room."""
MEASURE_BEGIN: Final = 0.3
"""The rate is measured from here on, so that it is known when it is wanted."""
ROOM_S: Final = 10.0
"""What room there is may be used within so long, though nothing becomes clean: the less there is, the slower."""
WINDOW_NS: Final = 4_000_000_000
"""It is that of the last few seconds: objects become clean many at a time, when the backend has been flushed."""
SAMPLE_NS: Final = 100_000_000
LOOK_NS: Final = 1_000_000
LEAST_WINDOW_NS: Final = 500_000_000
"""Nothing is known before."""
BURST_NS: Final = 5_000_000
"""So much of the rate may be accepted at once."""


class Pacer:
    """`update` once a turn, `take` for each write. `active`: writes have to ask."""

    __slots__ = ("_credit", "_now_ns", "_rate", "_ring_blocks", "_samples", "active", "look_ns", "rate")

    def __init__(self, ring_blocks: int) -> None:
        self._ring_blocks = ring_blocks
        self._samples: deque[tuple[int, int]] = deque()
        """(time, clean address), oldest first."""
        self._rate = 0.0
        """Log blocks a second that become clean; 0: not known."""
        self._now_ns = 0
        self._credit = 0.0
        self.active = False
        self.look_ns = 0
        """While inactive: when to look again."""
        self.rate = 0.0
        """Blocks a second that are accepted, while active."""

    def update(self, head: int, clean: int, now_ns: int) -> None:
        """The log's state now."""
        full = (head - clean) / self._ring_blocks
        self.look_ns = now_ns + LOOK_NS
        if full <= MEASURE_BEGIN:
            self.active = False
            self._samples.clear()
            self._rate = 0.0
            return
        if not self._samples or now_ns - self._samples[-1][0] >= SAMPLE_NS:
            self._measure(clean, now_ns)
        at = min((full - RAMP_BEGIN) / (RAMP_END - RAMP_BEGIN), 1.0)
        if at <= 0.0 or (self._rate == 0.0 and at < 0.5):
            self.active = False  # there is room, or nothing is known yet
            return
        room = (RAMP_END - full) * self._ring_blocks
        self.rate = max(LEAST_RATE, self._rate * (FAST + (SLOW - FAST) * at), room / ROOM_S)
        most = max(1.0, self.rate * BURST_NS / 1e9)
        if self.active:
            self._credit = min(self._credit + self.rate * (now_ns - self._now_ns) / 1e9, most)
        else:
            self._credit = most
        self.active = True
        self._now_ns = now_ns

    def _measure(self, clean: int, now_ns: int) -> None:
        samples = self._samples
        samples.append((now_ns, clean))
        while len(samples) > 2 and now_ns - samples[1][0] >= WINDOW_NS:
            samples.popleft()
        since_ns, before = samples[0]
        if now_ns - since_ns >= LEAST_WINDOW_NS:
            self._rate = (clean - before) * 1e9 / (now_ns - since_ns)

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
