"""How much destaging at once: adapted to what the backend gains from it, and to the guest's reads.

`ObjectsInFlight` owns the number of objects that may be on their way to the backend, between 1 and a maximum.
`Speed` owns what is known of the backend's latency and of its bytes a second.
`Modulator` takes from that while the guest keeps the backend busy with reads, and gives back as the log fills. Both are
told what has happened and when; neither has a clock, nor touches anything.
"""

from typing import Final

ROUND: Final = 4
"""A round is so many times `limit` destages: fewer say more about when they happened to end."""
GAIN: Final = 0.5
"""One object more has to raise throughput by this share of what it would if objects did not disturb each other."""
PROBE_ROUNDS: Final = 8
"""After so many rounds without a change one more object is tried again: backends change."""
ASSUMED_BLOCKS_PER_S: Final = 1 << 16
"""What a backend is taken to transfer until it has been measured, and drifts back to: 256 MiB/s."""
LARGE_BLOCKS: Final = 64
"""Writes of 256 KiB and more on average say what the backend transfers; small ones only that it is at least so much."""
WRITES_AT_ONCE: Final = 16
"""What a backend is taken to do side by side until that has been measured."""
SAMPLES: Final = 64
"""The least latency of this many writes, and of as many before, is taken for the backend's own."""
QUIET_NS: Final = 50_000_000
"""A guest that has not read the backend for so long does not keep it busy."""
GENTLE_WRITES: Final = 2
"""So many writes at once while the guest reads the backend ..."""
GENTLE_BLOCKS: Final = 128
"""... each of at most 512 KiB, so that a read waits for little."""


class Speed:
    """The least latency of late (what is more is queues, of our own making too), and what throughput is made of: time
    for each write, and for each block."""

    __slots__ = ("_before_ns", "_count", "_now_ns", "_write_ns", "blocks_per_s")

    def __init__(self) -> None:
        self._before_ns = 0
        self._now_ns = 0
        self._count = 0
        self._write_ns = 0
        self.blocks_per_s = ASSUMED_BLOCKS_PER_S

    @property
    def latency_ns(self) -> int:
        """Of a small write; 0: not known."""
        if not self._before_ns or not self._now_ns:
            return self._before_ns or self._now_ns
        return min(self._before_ns, self._now_ns)

    @property
    def write_ns(self) -> int:
        """What one write costs besides its blocks, with as many at once as there are; until that is measured, a
        share of the latency."""
        return self._write_ns or self.latency_ns // WRITES_AT_ONCE

    def answered(self, latency_ns: int) -> None:
        """A small write has taken so long."""
        self._now_ns = min(self._now_ns, latency_ns) if self._count else latency_ns
        self._count += 1
        if self._count == SAMPLES:
            self._before_ns, self._count = self._now_ns, 0

    def transferred(self, blocks: int, writes: int, time_ns: int) -> None:
        """So much in that time, in which there was always something to do. There was a write."""
        seen = max(1, blocks * 1_000_000_000 // time_ns)
        if blocks >= LARGE_BLOCKS * writes:
            self.blocks_per_s = (self.blocks_per_s + seen) // 2
        else:
            drifted = self.blocks_per_s + self.blocks_per_s // 64
            self.blocks_per_s = max(seen, min(drifted, ASSUMED_BLOCKS_PER_S))
            cost_ns = max(1, (time_ns - blocks * 1_000_000_000 // self.blocks_per_s) // writes)
            self._write_ns = (self._write_ns + cost_ns) // 2 if self._write_ns else cost_ns


class ObjectsInFlight:
    """Additive increase while throughput follows, back by one when it does not, half at a failure.

    A round is some destages that ended while the limit was in use. Work is counted in blocks, and a write for 16:
    scattered blocks cost the backend a request each."""

    __slots__ = (
        "_before",
        "_blocks",
        "_ended",
        "_idle",
        "_rate",
        "_round_ns",
        "_saturated",
        "_slow_start",
        "_speed",
        "_writes",
        "limit",
        "most",
    )

    def __init__(self, most: int, speed: Speed) -> None:
        self.most = most
        self._speed = speed
        self.limit = min(2, most)
        self._before = 0
        """The limit before it was raised on trial; 0: there is no trial."""
        self._rate = 0.0
        """Work a second with that one."""
        self._round_ns = 0
        self._ended = 0
        self._blocks = self._writes = 0
        self._saturated = True
        self._idle = PROBE_ROUNDS
        self._slow_start = True

    def set_most(self, most: int) -> None:
        """The user has changed the maximum."""
        self.most = most
        self.limit = max(1, min(self.limit, most))
        self._slow_start = True
        self._begin_again()

    def _begin_again(self) -> None:
        self._before = 0
        self._idle = PROBE_ROUNDS
        self._new_round(0)

    def ended(self, blocks: int, writes: int, now_ns: int, saturated: bool) -> None:
        """A destage has ended well; `saturated`: the limit was reached while it ran."""
        if not self._round_ns:
            self._round_ns = now_ns
            return
        self._ended += 1
        self._blocks += blocks
        self._writes += writes
        self._saturated = self._saturated and saturated
        if self._ended < ROUND * self.limit or now_ns <= self._round_ns:
            return
        took_ns = now_ns - self._round_ns
        if self._writes:
            self._speed.transferred(self._blocks, self._writes, took_ns)
        if self._saturated:
            self._judge((self._blocks + 16 * self._writes) * 1e9 / took_ns)
        self._new_round(now_ns)

    def _judge(self, rate: float) -> None:
        limit, before = self.limit, self._before
        if before:
            if rate < self._rate * (1 + GAIN * (limit - before) / before):
                self.limit = before
                self._before = self._idle = 0
                self._slow_start = False
                return
        elif self._idle < PROBE_ROUNDS:
            self._idle += 1
            return
        self._before = self._idle = 0
        if limit < self.most:
            self._before = limit
            self._rate = rate
            self.limit = min(self.most, limit + (max(1, limit // 2) if self._slow_start else 1))

    def failed(self) -> None:
        """The backend is in trouble: half as much."""
        self.limit = max(1, self.limit // 2)
        self._begin_again()

    def pause(self) -> None:
        """There was nothing to do: what is measured over the gap means nothing."""
        self._new_round(0)

    def _new_round(self, now_ns: int) -> None:
        self._round_ns = now_ns
        self._ended = self._blocks = self._writes = 0
        self._saturated = True


class Modulator:
    """`update` once a turn. A share of 0 is the gentlest: one object, a few small writes of it at a time, and a pause
    as long as the writes have taken after each; 1 is full speed."""

    __slots__ = ("_last_ns", "_reads", "busy", "share")

    def __init__(self) -> None:
        self._reads = 0
        self._last_ns = -QUIET_NS
        self.busy = False
        """The guest reads the backend."""
        self.share = 1.0

    def update(self, reads: int, pressure: float, now_ns: int) -> None:
        """`reads`: of the backend, for the guest, ever. `pressure`: from 0, the log has room, to 1, it is full and
        somebody writes."""
        if reads != self._reads:
            self._reads = reads
            self._last_ns = now_ns
        self.busy = now_ns - self._last_ns < QUIET_NS
        self.share = min(1.0, max(0.0, pressure)) if self.busy else 1.0

    @property
    def gentle(self) -> bool:
        """Writes go a few at a time."""
        return self.share < 0.5

    def objects(self, limit: int) -> int:
        """Of `limit` objects, how many."""
        return limit if self.share >= 1.0 else max(1, int(limit * self.share))

    def deadline_ns(self) -> int:
        """When the guest's reads will be forgotten, unless there are more."""
        return self._last_ns + QUIET_NS
