"""Destaging from the log: an object's dirty blocks to the backend, backend flushes, and what is clean after them.

Owns the staging slots, the objects being written and those written but not flushed. Invariants:
- only what is durable in the log is destaged: an older version than the newest stays behind, and then the object counts
  as clean only when the newer one is durable;
- one destage an object at a time, so that an older write can never land on a newer one;
- an object is clean below the log address at which its destage began only after a backend flush that was issued when
  all its writes had ended;
- staging slots are set apart at the start, so destaging never waits for what waits for destaging.
Sources are clean slots in RAM, pinned meanwhile, and reads of the log. What fails its checksum is not destaged, and
holds the tail until the guest overwrites it.
"""

from dataclasses import dataclass
from itertools import islice
from typing import Final

from vhostcache import operations as op
from vhostcache.backend_io import BackendIo
from vhostcache.log import format as fmt
from vhostcache.log.index import LogIndex
from vhostcache.log.writer import INTERNAL, LogWriter
from vhostcache.map import CLEAN, ORPHAN, PINNED, Map
from vhostcache.readcache import ReadCache

RETRY_FIRST_NS: Final = 100_000_000
RETRY_MAX_NS: Final = 5_000_000_000
EBADMSG: Final = 74
FLUSH: Final = -1
"""In place of an object: the backend flush."""
READ_BLOCKS_MAX: Final = 256
"""Blocks of one log read."""
READS_AT_ONCE: Final = 128
"""Blocks of an object that are read from the log before the next ones are."""
AGED_OBJECTS_MAX: Final = 2
"""Objects in flight only because they are old: nobody waits for them, and the guest may be busy."""
HELD_RETRY_NS: Final = 10_000_000_000
"""An object with rotten blocks is looked at again so much later."""


@dataclass(frozen=True, slots=True)
class LogDestageSettings:
    """When and how much to destage."""

    destage_after_ns: int
    """Objects that have been dirty for so long are destaged."""
    threshold_blocks: int
    """More log than this between the clean address and the head is destaged without waiting for its age."""
    staging_blocks: int
    """Slots set apart."""
    enabled: bool = True
    """False: nothing is destaged but for want of room, and to drain."""
    objects_max: int = 8
    flush_objects: int = 32
    """Written objects that are worth a backend flush of their own."""


class LogDestage:
    """One object on its way."""

    __slots__ = (
        "_destager",
        "address",
        "again",
        "blocks",
        "later",
        "need_seq",
        "number",
        "pinned",
        "reading",
        "rotten",
        "slots",
        "staged",
        "zeroes",
    )

    def __init__(self, destager: "LogDestager", number: int, address: int) -> None:
        self._destager = destager
        self.number = number
        self.address = address
        """Everything below it is on the backend when this has ended well."""
        self.need_seq = 0
        """This record has to be durable before: it has the newer version of a block that was left behind."""
        self.blocks: list[int] = []
        self.slots: list[int] = []
        self.zeroes: list[tuple[int, int]] = []
        """Runs of blocks (first, end)."""
        self.pinned: list[int] = []
        self.staged: list[int] = []
        self.reading: list[int] = []
        """Log addresses that its reads keep from being reused."""
        self.later: list[tuple[list[int], list[int], list[int]]] = []
        """Parts of a read that found rot, to be read again: addresses, blocks, slots."""
        self.rotten = False
        """Blocks that are rotten or can't be read were left out: the object does not become clean."""
        self.again = False
        """Something has failed meanwhile: all of it has to be done again."""

    def io_done(self, result: int) -> None:
        self._destager.written(self, result)


class StagingRead:
    """Log blocks on their way to staging slots, for a destage."""

    __slots__ = ("_destager", "addresses", "blocks", "destage", "slots")

    def __init__(
        self,
        destager: "LogDestager",
        destage: LogDestage,
        addresses: list[int],
        blocks: list[int],
        slots: list[int],
    ) -> None:
        self._destager = destager
        self.destage = destage
        self.addresses = addresses
        self.blocks = blocks
        self.slots = slots

    def io_done(self, result: int) -> None:
        self._destager.staged(self, result)


class BackendFlush:
    """A backend flush, and the destages that it covers."""

    __slots__ = ("_destager", "destages")

    def __init__(self, destager: "LogDestager", destages: list[LogDestage]) -> None:
        self._destager = destager
        self.destages = destages

    def io_done(self, result: int) -> None:
        self._destager.flushed(self, result)


class LogDestager:
    """See the module. `schedule` once a turn."""

    def __init__(
        self,
        block_map: Map,
        cache: ReadCache,
        io: BackendIo,
        index: LogIndex,
        writer: LogWriter,
        settings: LogDestageSettings,
        size_bytes: int,
        notices: list[tuple[str, dict[str, object]]],
    ) -> None:
        self._map = block_map
        self._cache = cache
        self._io = io
        self._index = index
        self._writer = writer
        self._settings = settings
        self.size_bytes = size_bytes
        """Of the disk: the last block may be a part of one."""
        self.notices = notices
        self._staging = block_map.take(settings.staging_blocks)
        for slot in self._staging:
            block_map.state[slot] = ORPHAN
        self._staging_wanted = 0
        """What the next destage needs of them."""
        self.in_flight: dict[int, LogDestage] = {}
        self._reads: dict[int, int] = {}
        """Object -> its staging reads in flight."""
        self._written: list[LogDestage] = []
        self._flushing: BackendFlush | None = None
        self._flushed: list[LogDestage] = []
        """Flushed, but a newer version of something is not durable yet."""
        self._held: dict[int, int] = {}
        """Objects with rotten blocks -> when to look again."""
        self.rotten: dict[int, int] = {}
        """Block -> the log address at which it fails its checksum."""
        self.draining = False
        self.stopped = False
        """Nothing new is started."""
        self._failing: set[int] = set()
        self._retry_ns = 0
        self._retry_at_ns = 0
        self.now_ns = 0
        self.counters = {"destages": 0, "blocks_destaged": 0, "flushes_performed": 0, "backend_failures": 0}

    @property
    def settled(self) -> bool:
        """Nothing is dirty or on its way."""
        return not (self._index.dirty or self.busy)

    @property
    def busy(self) -> bool:
        """Anything is on its way."""
        return bool(self.in_flight or self._written or self._flushing or self._flushed)

    # --- what, when ---

    def schedule(self, now_ns: int) -> int:
        """Start what is to be started; returns the time at which to look again, in ns."""
        self.now_ns = now_ns
        if self._flushed:
            self._finish(self._flushed)
        if now_ns < self._retry_at_ns:
            return self._retry_at_ns
        deadline_ns = op.NEVER
        if self._index.dirty and not self.stopped and len(self._staging) >= self._staging_wanted:
            deadline_ns = self._start_due()
        if self._written and self._flushing is None and self._flush_is_due():
            self._start_flush()
        return deadline_ns

    def _crowded(self) -> bool:
        return (
            self._writer.head - self._index.clean_below(self._writer.durable_address) > self._settings.threshold_blocks
        )

    def _start_due(self) -> int:
        settings = self._settings
        pressed = self.draining or self._writer.space_wanted or (settings.enabled and self._crowded())
        if pressed:
            if len(self.in_flight) >= settings.objects_max:
                return op.NEVER
            for number in list(islice(self._index.dirty, 4 * settings.objects_max + len(self._held))):
                if self._is_waiting(number):
                    continue
                # One a turn: to find its blocks and read them takes a millisecond or two.
                return self.now_ns if self._start(number) else op.NEVER
            return op.NEVER if self.busy else self.now_ns + RETRY_FIRST_NS
        if not settings.enabled:
            return op.NEVER
        since = self._index.since_ns
        for number in list(islice(self._index.dirty, settings.objects_max + len(self._held))):
            due_ns = since[number] + settings.destage_after_ns
            if self.now_ns < due_ns:
                return due_ns
            if not self._is_waiting(number):
                started = len(self.in_flight) < AGED_OBJECTS_MAX and self._start(number)
                return self.now_ns if started else op.NEVER
        return op.NEVER if self.busy else self.now_ns + RETRY_FIRST_NS

    def _flush_is_due(self) -> bool:
        if (
            self._writer.space_wanted
            or self.draining
            or self.stopped
            or len(self._written) >= self._settings.flush_objects
        ):
            return True
        return not self.in_flight

    # --- one destage ---

    def _is_waiting(self, number: int) -> bool:
        """Whether the object can't be destaged now: it is on its way, or has rotten blocks."""
        if number in self.in_flight or self._held.get(number, 0) > self.now_ns:
            return True
        ending = self._written + self._flushed + (self._flushing.destages if self._flushing else [])
        return any(number == destage.number for destage in ending)

    def _start(self, number: int) -> bool:
        """False: there are no resources now."""
        if self._io.available() <= 64 or self._writer.blocked:
            return False
        durable = self._writer.durable_address
        values, others = self._index.dirty_blocks(number, durable)
        destage = LogDestage(self, number, durable)
        if others:
            destage.need_seq = self._writer.accepted_seq
        fetch: list[tuple[int, int]] = []
        for block, value in values:
            self._choose_source(destage, block, value, fetch)
        if len(fetch) > len(self._staging):
            self._unpin(destage)
            self._staging_wanted = len(fetch)
            return False
        self._staging_wanted = 0
        if destage.need_seq:
            self._writer.commit(INTERNAL)
        self._index.begin_destage(number)
        self.in_flight[number] = destage
        self._fetch(destage, fetch)
        if number not in self._reads:
            self._write(destage)
        return True

    def _choose_source(self, destage: LogDestage, block: int, value: int, fetch: list[tuple[int, int]]) -> None:
        slot = self._map.where.get(block)
        if self.rotten and self.rotten.get(block, value >> 1) != value >> 1:
            del self.rotten[block]  # it has been overwritten since
        if slot is not None and self._map.state[slot] not in (CLEAN, PINNED):
            destage.need_seq = self._writer.accepted_seq  # a newer version is on its way into the log
        elif value & 1:
            if destage.zeroes and destage.zeroes[-1][1] == block:
                destage.zeroes[-1] = (destage.zeroes[-1][0], block + 1)
            else:
                destage.zeroes.append((block, block + 1))
        elif slot is not None and self._map.state[slot] == CLEAN:
            self._map.state[slot] = PINNED
            destage.pinned.append(slot)
            destage.blocks.append(block)
            destage.slots.append(slot)
        elif block in self.rotten:
            destage.rotten = True
        else:
            fetch.append((block, value >> 1))

    def _unpin(self, destage: LogDestage) -> None:
        self._cache.unpin(destage.pinned)
        destage.pinned = []

    def _fetch(self, destage: LogDestage, fetch: list[tuple[int, int]]) -> None:
        """Read from the log, neighbours at once."""
        if not fetch:
            return
        writer = self._writer
        oldest = min(address for _, address in fetch)
        destage.reading.append(oldest)
        writer.reading[oldest] = writer.reading.get(oldest, 0) + 1
        fetch.sort(key=lambda pair: pair[1])
        count = len(fetch)
        slots = self._staging[-count:]
        del self._staging[-count:]
        destage.staged = slots
        addresses = [address for _, address in fetch]
        blocks = [block for block, _ in fetch]
        self._reads[destage.number] = 0
        # Not all of them in one turn: each costs the kernel a microsecond or two.
        for start in range(0, count, READS_AT_ONCE):
            end = start + READS_AT_ONCE
            destage.later.append((addresses[start:end], blocks[start:end], slots[start:end]))
        destage.later.reverse()
        self._read(destage, *destage.later.pop())

    def _read(self, destage: LogDestage, addresses: list[int], blocks: list[int], slots: list[int]) -> None:
        """Read from the log, neighbours at once. `addresses` ascend."""
        self._reads[destage.number] += 1
        group = self._io.begin(StagingRead(self, destage, addresses, blocks, slots))
        ring_blocks, log_read = self._writer.ring_blocks, self._io.log_read
        count = len(addresses)
        start = 0
        while start < count:
            first = addresses[start]
            most = min(count, start + READ_BLOCKS_MAX, start + ring_blocks - first % ring_blocks)
            end = start + 1
            while end < most and addresses[end] - first == end - start:
                end += 1
            log_read(group, fmt.offset_bytes(first, ring_blocks), slots[start:end])
            start = end

    def staged(self, read: StagingRead, result: int) -> None:
        """Log blocks have been read for a destage, or some of them could not be."""
        destage = read.destage
        if result == 0:
            destage.blocks += read.blocks
            destage.slots += read.slots
        elif result == -EBADMSG and len(read.blocks) > 1:
            # In halves, to leave out only what is rotten; one after the other, for rot may be everywhere.
            half = len(read.blocks) // 2
            destage.later.append((read.addresses[half:], read.blocks[half:], read.slots[half:]))
            destage.later.append((read.addresses[:half], read.blocks[:half], read.slots[:half]))
        elif result == -EBADMSG:
            destage.rotten = True
            self.rotten[read.blocks[0]] = read.addresses[0]
            self.notices.append(("log-corrupt", {"offset": read.blocks[0] * op.BLOCK_BYTES}))
        else:
            # Not a reason to keep writes waiting: a bad sector stays bad.
            destage.rotten = True
            self._writer.counters["log_failures"] += 1
            self.notices.append(("log-unreadable", {"operation": "destage", "errno": -result}))
        if destage.later:
            self._read(destage, *destage.later.pop())
        self._reads[destage.number] -= 1
        if not self._reads[destage.number]:
            del self._reads[destage.number]
            self._release_reading(destage)
            self._write(destage)

    def _release_reading(self, destage: LogDestage) -> None:
        reading = self._writer.reading
        for address in destage.reading:
            reading[address] -= 1
            if not reading[address]:
                del reading[address]
        destage.reading = []

    def _write(self, destage: LogDestage) -> None:
        """All sources are there: to the backend."""
        if not (destage.blocks or destage.zeroes):
            self._end_write(destage)
            self._written.append(destage)
            return
        group = self._io.begin(destage)
        size_bytes = self.size_bytes
        order = sorted(range(len(destage.blocks)), key=destage.blocks.__getitem__)
        blocks = [destage.blocks[i] for i in order]
        slots = [destage.slots[i] for i in order]
        start = 0
        while start < len(blocks):
            end = start + 1
            while end < len(blocks) and blocks[end] - blocks[start] == end - start:
                end += 1
            offset = blocks[start] * op.BLOCK_BYTES
            self._io.write(group, offset, min((end - start) * op.BLOCK_BYTES, size_bytes - offset), slots[start:end])
            start = end
        for first, stop in destage.zeroes:
            offset = first * op.BLOCK_BYTES
            self._io.zero(group, offset, min(stop * op.BLOCK_BYTES, size_bytes) - offset, True)

    def _end_write(self, destage: LogDestage) -> None:
        self._unpin(destage)
        self._staging += destage.staged
        destage.staged = []
        del self.in_flight[destage.number]

    def written(self, destage: LogDestage, result: int) -> None:
        """All writes of a destage have ended."""
        self._end_write(destage)
        self.counters["destages"] += 1
        if result < 0:
            self._index.restore(destage.number, self.now_ns)
            self._failed(destage.number, "write", result)
            return
        self._succeeded(destage.number)
        self.counters["blocks_destaged"] += len(destage.blocks)
        self._written.append(destage)

    # --- backend flushes ---

    def _start_flush(self) -> None:
        self._flushing = BackendFlush(self, self._written)
        self._written = []
        self.counters["flushes_performed"] += 1
        self._io.flush(self._io.begin(self._flushing))

    def flushed(self, flush: BackendFlush, result: int) -> None:
        """A backend flush has ended. After a failure nothing is assumed, of what was written meanwhile neither."""
        self._flushing = None
        if result < 0:
            for destage in flush.destages + self._written:
                self._index.restore(destage.number, self.now_ns)
            self._written = []
            for destage in self.in_flight.values():
                destage.again = True
            self._failed(FLUSH, "flush", result)
            return
        self._succeeded(FLUSH)
        self._finish(self._flushed + flush.destages)

    def _finish(self, destages: list[LogDestage]) -> None:
        waiting = []
        for destage in destages:
            if destage.need_seq > self._writer.durable_seq:
                waiting.append(destage)
            elif destage.rotten or destage.again:
                self._index.restore(destage.number, self.now_ns)
                if destage.rotten:
                    self._held[destage.number] = self.now_ns + HELD_RETRY_NS
            else:
                self._held.pop(destage.number, None)
                self._index.destaged(destage.number, destage.address)
        self._flushed = waiting

    # --- trouble ---

    def _failed(self, what: int, operation: str, result: int) -> None:
        self.counters["backend_failures"] += 1
        if not self._failing:
            self.notices.append(("backend-error", {"operation": operation, "errno": -result}))
        self._failing.add(what)
        self._retry_ns = min(max(2 * self._retry_ns, RETRY_FIRST_NS), RETRY_MAX_NS)
        self._retry_at_ns = self.now_ns + self._retry_ns

    def _succeeded(self, what: int) -> None:
        if self._failing:
            self._failing.discard(what)
            if not self._failing:
                self._retry_ns = 0
                self._retry_at_ns = 0
                self.notices.append(("backend-recovered", {}))
