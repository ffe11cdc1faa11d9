"""Checkpoints: the superblocks, which say where the log begins, what of it is clean, and what the guest believes.

Owns the superblock as both copies have it, and the one checkpoint that may run: copy A, fdatasync, copy B, fdatasync.
Invariants: one copy is whole at any moment; ring space is given to the writer only when both copies have the new tail;
the clean address only says what the backend has flushed. The tail moves to the beginning of a record. Clean data stays
in the log, for reads, until its room is wanted.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from vhostcache import operations as op
from vhostcache.backend_io import BackendIo
from vhostcache.log.index import LogIndex
from vhostcache.log.superblock import A_OFFSET_BYTES, B_OFFSET_BYTES, Superblock
from vhostcache.log.writer import LogWriter

FREE_SHARE: Final = 4
"""One part in four of the ring is kept free, if what is there is clean."""


class Checkpointer:
    """`schedule` once a turn. `superblock` is what both copies say now."""

    def __init__(
        self, io: BackendIo, writer: LogWriter, index: LogIndex, superblock: Superblock, interval_ns: int
    ) -> None:
        self._io = io
        self._writer = writer
        self._index = index
        self.superblock = superblock
        self._interval_ns = interval_ns
        self._next_ns = 0
        self._running: Superblock | None = None
        self._offset = A_OFFSET_BYTES
        self._flush_failures = 0
        """Of the writer, when the copy was given to the engine."""
        self._wanted = False
        self._when_done: list[Callable[[], None]] = []
        self._waiting: list[Callable[[], None]] = []
        self.write_cache = superblock.write_cache
        self.backend_size_bytes = superblock.backend_size_bytes
        self.closing = False
        """The next one says that the log was closed in good order."""
        self.cold = False
        """... and that nothing in it is to be believed again."""
        self.backend_mtime_ns: Callable[[], int] = lambda: superblock.backend_mtime_ns
        self.count = 0

    def set_interval(self, interval_ns: int) -> None:
        """From now on."""
        self._interval_ns = interval_ns
        self._next_ns = 0

    def request(self, when_done: Callable[[], None] | None = None) -> None:
        """Begin one soon, whatever has changed; `when_done` is called when one that began after this has ended."""
        self._wanted = True
        if when_done is not None:
            self._waiting.append(when_done)

    @property
    def running(self) -> bool:
        """Whether one is under way or wanted."""
        return self._running is not None or self._wanted

    def _clean(self) -> int:
        return max(self.superblock.clean_address, self._index.clean_below(self._writer.durable_address))

    def _tail_wanted(self) -> int:
        """Where the tail should be at least, if what is below is clean: only as far as room is wanted."""
        writer = self._writer
        room = max(writer.ring_blocks // FREE_SHARE + 2 * writer.record_blocks, writer.space_wanted)
        return writer.head + room - writer.ring_blocks

    def _gives_way(self, clean: int) -> bool:
        """Whether the record at the tail may and should go."""
        made = self._writer.records_made
        if not made or made[0][0] >= self._tail_wanted():
            return False
        return (made[1][0] if len(made) > 1 else self._writer.head) <= clean

    def schedule(self, now_ns: int) -> int:
        """Start one if it is due; returns the time at which to look again, in ns."""
        if self._running is not None or self._writer.blocked:
            return op.NEVER
        writer = self._writer
        used = writer.head - self.superblock.tail_address
        crowded = writer.space_wanted or used * FREE_SHARE > writer.ring_blocks * (FREE_SHARE - 1)
        if crowded and not self._wanted:
            clean = self._clean()
            # Not for every record: the tail moves in steps of a sixteenth, unless somebody waits for room.
            step = writer.ring_blocks // 16 if not writer.space_wanted else 0
            self._wanted = self._tail_wanted() > self.superblock.tail_address + step and self._gives_way(clean)
        if not self._wanted and now_ns >= self._next_ns:
            self._next_ns = now_ns + self._interval_ns
            changed = (self._clean(), writer.durable_seq) != (
                self.superblock.clean_address,
                self.superblock.durable_seq,
            )
            self._wanted = changed
        if self._wanted:
            self._next_ns = now_ns + self._interval_ns
            self._begin()
            return op.NEVER
        return self._next_ns

    def _begin(self) -> None:
        writer = self._writer
        self._wanted = False
        self._when_done, self._waiting = self._waiting, []
        clean = self._clean()
        made = writer.records_made
        while self._gives_way(clean):
            made.popleft()
        tail, seq = made[0] if made else (writer.head, writer.next_seq)
        self._index.tail = tail
        self._running = replace(
            self.superblock,
            generation=self.superblock.generation + 1,
            tail_address=tail,
            tail_seq=seq,
            clean_address=clean,
            durable_address=writer.durable_address,
            durable_seq=writer.durable_seq,
            write_cache=self.write_cache,
            backend_size_bytes=self.backend_size_bytes,
            clean=self.closing,
            cold=self.closing and self.cold,
            backend_mtime_ns=self.backend_mtime_ns() if self.closing else self.superblock.backend_mtime_ns,
        )
        self._write(A_OFFSET_BYTES)

    def _write(self, offset_bytes: int) -> None:
        assert self._running is not None
        self._offset = offset_bytes
        self._flush_failures = self._writer.flush_failures
        self._io.superblock(self._io.begin(self), offset_bytes, self._running.words())

    def io_done(self, result: int) -> None:
        """A copy has been written."""
        if result < 0:
            self._writer.device_failed("write", result)
            self._again()
        elif self._flush_failures != self._writer.flush_failures:
            self._again()  # a fdatasync that has failed meanwhile may have lost it
        else:
            self._writer.sync(self._synced)

    def _synced(self, result: int) -> None:
        if result < 0:
            self._again()
        elif self._offset == A_OFFSET_BYTES:
            self._write(B_OFFSET_BYTES)
        else:
            assert self._running is not None
            self.superblock = self._running
            self._running = None
            self.count += 1
            self._writer.free_below = self.superblock.tail_address + self._writer.ring_blocks
            self._writer.vouched_address = max(self._writer.vouched_address, self.superblock.durable_address)
            self._writer.space_wanted = 0
            for done in self._when_done:
                done()
            self._when_done = []

    def _again(self) -> None:
        """From the beginning, when the device is well again. What was told to both copies stays true."""
        self._running = None
        self._wanted = True
        self._waiting = self._when_done + self._waiting
        self._when_done = []
