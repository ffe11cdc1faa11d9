"""The pace of writes while the log fills: a ramp, never a cliff.

Owns an estimate of how fast the log becomes clean, and the blocks that may be accepted now. Below `RAMP_BEGIN` of the
ring dirty, writes are free. Above, they are accepted at a multiple of the rate at which destaging makes room, which
falls from FAST at the beginning of the ramp to SLOW at its end, so that the log settles between the two and the guest
sees writes that are each a little slower instead of none for a while. Reads and flushes are never held. It imports no
clock: time is handed in.
"""

from typing import Final

from vhostcache import operations as op

RAMP_BEGIN: Final = 0.6
RAMP_END: Final = 0.95
FAST: Final = 4.0
SLOW: Final = 0.5
LEAST_RATE: Final = 256.0
"""Blocks a second (1 MiB/s) that are accepted whatever the backend does, as long as there is room."""
WINDOW_NS: Final = 500_000_000
"""The rate is measured over at least so long; half of the estimate is the last window."""
BURST_NS: Final = 5_000_000
"""So much of the rate may be accepted at once."""


class Pacer:
    """`update` once a turn, `take` for each write. `active`: writes have to ask."""

    __slots__ = ("_clean", "_credit", "_measured_ns", "_now_ns", "_rate", "_ring_blocks", "active", "rate")

    def __init__(self, ring_blocks: int, clean: int) -> None:
        self._ring_blocks = ring_blocks
        self._clean = clean
        self._measured_ns = 0
        self._rate = 0.0
        """Log blocks a second that become clean."""
        self._now_ns = 0
        self._credit = 0.0
        self.active = False
        self.rate = 0.0
        """Blocks a second that are accepted, while active."""

    def update(self, head: int, clean: int, now_ns: int) -> None:
        """The log's state now."""
        full = (head - clean) / self._ring_blocks
        if full <= RAMP_BEGIN:
            self.active = False
            self._measured_ns = 0
            return
        if not self._measured_ns:
            self._measured_ns, self._clean = now_ns, clean
        elif now_ns - self._measured_ns >= WINDOW_NS:
            seen = (clean - self._clean) * 1e9 / (now_ns - self._measured_ns)
            self._rate = (self._rate + seen) / 2 if self._rate else seen
            self._measured_ns, self._clean = now_ns, clean
        at = min((full - RAMP_BEGIN) / (RAMP_END - RAMP_BEGIN), 1.0)
        if self._rate == 0.0 and at < 0.5:
            self.active = False  # nothing is known yet, and there is room
            return
        self.rate = max(LEAST_RATE, self._rate * (FAST + (SLOW - FAST) * at))
        most = max(1.0, self.rate * BURST_NS / 1e9)
        if self.active:
            self._credit = min(self._credit + self.rate * (now_ns - self._now_ns) / 1e9, most)
        else:
            self._credit = most
        self.active = True
        self._now_ns = now_ns

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
