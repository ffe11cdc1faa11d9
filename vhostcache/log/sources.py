"""Where the blocks of an object come from, when it is destaged.

Owns the staging slots, and decides what is written beside what is dirty. Sources are clean slots in RAM, pinned
meanwhile, and reads of the log; for what lies between two dirty runs, and for whole objects, one read of the backend as
well: nobody else writes to it. What fails its checksum, or cannot be read, is left out, and the destage says so.

Invariants: staging slots are set apart at the start, so destaging never waits for what waits for destaging; a block
that is written beside the dirty ones has what the backend has, or what it is to have with this destage. It never
writes, and never decides which object is next.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import Final, Protocol

from vhostcache import operations as op
from vhostcache.backend_io import BackendIo
from vhostcache.log import format as fmt
from vhostcache.log.depth import Speed
from vhostcache.log.index import LogIndex
from vhostcache.log.probe import EBADMSG, Probe
from vhostcache.log.unreadable import WITNESSES, UnreadableBlocks
from vhostcache.log.writer import LogWriter
from vhostcache.map import CLEAN, ORPHAN, PINNED, Map
from vhostcache.readcache import ReadCache

ZERO_SLOT: Final = 1
"""A slot of zeroes that is never written."""
READ_BLOCKS_MAX: Final = 256
"""Blocks of one log read."""
READS_AT_ONCE: Final = 64
"""Blocks of an object that are read from the log before the next ones are, where they are scattered ..."""
LONG_READ: Final = 8 * READS_AT_ONCE
"""... and where they lie in a row, but for the headers of records."""
REMOTE_NS: Final = 500_000
"""A backend that takes so long for a small write is far away: see `_gap_blocks`."""
GAP_BLOCKS_MAX: Final = 128

_block: Final = itemgetter(0)
_address: Final = itemgetter(1)


class Destager(Protocol):
    """Who is told that writes have ended."""

    def written(self, destage: "LogDestage", result: int) -> None:
        """Of this object, perhaps not the last ones."""


class LogDestage:
    """One object on its way."""

    __slots__ = (
        "_destager",
        "address",
        "again",
        "began_ns",
        "blocks",
        "bridged",
        "considered",
        "count",
        "device_reads",
        "errno",
        "held",
        "kept",
        "later",
        "missing",
        "need_seq",
        "number",
        "pieces",
        "pinned",
        "reading",
        "resting_ns",
        "rotten",
        "scratch",
        "slots",
        "small",
        "span",
        "staged",
        "unreadable",
        "zeroes",
    )

    def __init__(self, destager: Destager, number: int, address: int) -> None:
        self._destager = destager
        self.number = number
        self.address = address
        """Everything below it is on the backend when this has ended well."""
        self.need_seq = 0
        """This record has to be durable before: it has the newer version of a block that was left behind."""
        self.considered = 0
        """Blocks that were looked at to find their sources."""
        self.blocks: list[int] = []
        self.slots: list[int] = []
        self.zeroes: list[int] = []
        """Blocks that are zero, in ascending order; and those of them that are to stay allocated."""
        self.kept: set[int] = set()
        self.pinned: list[int] = []
        self.staged: list[int] = []
        self.reading: list[int] = []
        """Log addresses that its reads keep from being reused."""
        self.later: list[tuple[list[int], list[int], list[int]]] = []
        """Parts of a read that has failed, to be read again: addresses, blocks, slots."""
        self.span = range(0)
        """Blocks that are read from the backend before, into the staged slots, to be written as a whole."""
        self.missing: list[int] = []
        """Those of them that are not dirty, and are written too."""
        self.bridged = 0
        """Blocks that are clean, and written for the sake of their neighbours."""
        self.pieces: list[tuple[int, int, list[int], bool]] = []
        """Writes to come, the last first: block, blocks, slots; without slots zeroes, and whether they may be unmapped.
        """
        self.count = 0
        """Writes made."""
        self.small = 0
        """Of these, in flight and small enough to say something about latency."""
        self.began_ns = 0
        """When the writes in flight were given to the engine."""
        self.resting_ns = 0
        """Before this it writes nothing more."""
        self.rotten: list[tuple[int, int]] = []
        """Blocks that were left out, and where they have rotted: the log has to say so."""
        self.unreadable: list[tuple[int, int]] = []
        """Blocks that were left out because the cache device did not read them, and where they are in the log."""
        self.errno = 0
        """What it answered; 0: it has read everything."""
        self.device_reads = True
        """It could read other places of the log since."""
        self.scratch = 0
        """A slot of one that has not been read, into which they are."""
        self.held = False
        """Some of them are to be tried again: the object does not become clean."""
        self.again = False
        """Something has failed meanwhile: all of it has to be done again."""

    def io_done(self, result: int) -> None:
        self._destager.written(self, result)


class StagingRead:
    """Log blocks on their way to staging slots, for a destage."""

    __slots__ = ("_sources", "addresses", "blocks", "destage", "slots")

    def __init__(
        self,
        sources: "Sources",
        destage: LogDestage,
        addresses: list[int],
        blocks: list[int],
        slots: list[int],
    ) -> None:
        self._sources = sources
        self.destage = destage
        self.addresses = addresses
        self.blocks = blocks
        self.slots = slots

    def io_done(self, result: int) -> None:
        self._sources.staged(self, result)


class SpanRead:
    """What the backend has of an object on its way to staging slots; the dirty blocks come over it."""

    __slots__ = ("_destage", "_fetch", "_sources")

    def __init__(self, sources: "Sources", destage: LogDestage, fetch: list[tuple[int, int]]) -> None:
        self._sources = sources
        self._destage = destage
        self._fetch = fetch

    def io_done(self, result: int) -> None:
        self._sources.span_read(self._destage, self._fetch, result)


class Sources:
    """`choose`, and then `fetch`: `ready(destage)` or `failed(destage, result)` is called when that has ended, perhaps
    at once. `release` at last."""

    def __init__(
        self,
        block_map: Map,
        cache: ReadCache,
        io: BackendIo,
        index: LogIndex,
        writer: LogWriter,
        unreadable: UnreadableBlocks,
        speed: Speed,
        notices: list[tuple[str, dict[str, object]]],
        *,
        staging_blocks: int,
        size_bytes: int,
        unit_blocks: int,
        preferred_blocks: int,
        ready: Callable[["LogDestage"], None],
        failed: Callable[["LogDestage", int], None],
    ) -> None:
        self._map = block_map
        self._cache = cache
        self._io = io
        self._index = index
        self._writer = writer
        self._unreadable = unreadable
        self._speed = speed
        self.notices = notices
        self.size_bytes = size_bytes
        """Of the disk: the last block may be a part of one."""
        self.unit_blocks = unit_blocks
        """What the backend has to be given as a whole; 0: anything will do."""
        self._preferred_blocks = preferred_blocks
        self._ready = ready
        self._failed = failed
        self._staging = block_map.take(staging_blocks)
        for slot in self._staging:
            block_map.state[slot] = ORPHAN
        self._wanted = 0
        """Of the staging slots, for the next destage."""
        self.blocks_read_back = 0
        self._probes = 0

    @property
    def short(self) -> bool:
        """Whether slots are still missing for what was to be chosen last."""
        return len(self._staging) < self._wanted

    def choose(
        self, destage: "LogDestage", values: Sequence[tuple[int, int]], exact: bool
    ) -> list[tuple[int, int]] | None:
        """Find sources for blocks, each with its value: that version (`exact`), or none if it is overwritten already.
        Returns what has to be read from the log (block, address); None: there are too few slots now."""
        fetch: list[tuple[int, int]] = []
        if exact:
            for block, value in values:
                self._choose_version(destage, block, value, fetch)
        else:
            in_ram, any_lost = self._map.where, bool(self._index.lost)
            for block, value in values:
                if block in in_ram or value & 1 or any_lost:
                    self._choose_source(destage, block, value, fetch)
                else:
                    fetch.append((block, value >> 1))
        self._choose_neighbours(destage, fetch)
        self._wanted = count = len(destage.span) or len(fetch)
        if self.short:
            self._unpin(destage)
            return None
        self._wanted = 0
        if count:
            destage.staged = self._staging[-count:]
            del self._staging[-count:]
        if fetch:
            self._keep_readable(destage, fetch)
        return fetch

    def release(self, destage: "LogDestage") -> None:
        """All that it holds: it has been written, or given up."""
        self._unpin(destage)
        self._staging += destage.staged
        destage.staged = []

    def _choose_source(self, destage: LogDestage, block: int, value: int, fetch: list[tuple[int, int]]) -> None:
        slot = self._map.where.get(block)
        if slot is not None and self._map.state[slot] not in (CLEAN, PINNED):
            destage.need_seq = self._writer.accepted_seq  # a newer version is on its way into the log
        elif value & 1:
            destage.zeroes.append(block)
            if value >> 1 in self._index.kept:
                destage.kept.add(block)
        elif slot is not None and self._map.state[slot] == CLEAN:
            self._pin(destage, block, slot)
        elif not (self._index.lost and self._index.is_lost(block)):
            fetch.append((block, value >> 1))

    def _choose_version(self, destage: LogDestage, block: int, value: int, fetch: list[tuple[int, int]]) -> None:
        """Exactly this one, which need not be the newest."""
        if value & 1:
            if block * op.BLOCK_BYTES < self.size_bytes:
                destage.zeroes.append(block)
                if value >> 1 in self._index.kept:
                    destage.kept.add(block)
            return
        newest = self._index.lookup(block)
        slot = self._map.where.get(block)
        if slot is not None and newest == value and self._map.state[slot] == CLEAN:
            self._pin(destage, block, slot)
        elif self._index.lost.get(block, 0) <= value >> 1:
            fetch.append((block, value >> 1))

    def _pin(self, destage: LogDestage, block: int, slot: int) -> None:
        self._map.state[slot] = PINNED
        destage.pinned.append(slot)
        destage.blocks.append(block)
        destage.slots.append(slot)

    def _unpin(self, destage: LogDestage) -> None:
        self._cache.unpin(destage.pinned)
        destage.pinned = []

    # --- clean blocks that are written too ---

    def _gap_blocks(self) -> int:
        """How many clean blocks may be written to save one write: half of what is transferred in the time that a write
        costs besides its blocks, or what fills up the backend's own unit. 0: the backend is near."""
        if self._speed.latency_ns < REMOTE_NS:
            return 0
        blocks = self._speed.write_ns * self._speed.blocks_per_s // 2_000_000_000
        return min(GAP_BLOCKS_MAX, max(blocks, self._preferred_blocks - 1))

    def _choose_neighbours(self, destage: LogDestage, fetch: list[tuple[int, int]]) -> None:
        """Fill small gaps between dirty runs with what the cache has; or read the backend, for a whole object or where
        that takes less than half as long as so many writes."""
        if self.unit_blocks:
            if destage.blocks or fetch:
                self._choose_units(destage, sorted([*destage.blocks, *map(_block, fetch)]))
            return
        gap_blocks = self._gap_blocks()
        if not gap_blocks:
            return
        blocks = sorted([*destage.blocks, *map(_block, fetch)])
        if not blocks or blocks[-1] - blocks[0] == len(blocks) - 1:
            return
        zeroes = set(destage.zeroes)
        runs = 1
        filled: set[int] = set()
        previous = blocks[0]
        for block in blocks:
            if block - previous > 1:
                gap = range(previous + 1, block)
                if len(gap) <= gap_blocks and self._bridge(destage, gap, zeroes, fetch):
                    filled.update(gap)
                else:
                    runs += 1
            previous = block
        if filled:
            destage.zeroes = [block for block in destage.zeroes if block not in filled]
        latency_ns, span = self._speed.latency_ns, range(blocks[0], blocks[-1] + 1)
        more = 2 * len(span) - len(blocks) - len(filled)
        transfer_ns = more * 1_000_000_000 // self._speed.blocks_per_s
        if (runs - 1) * self._speed.write_ns > 2 * (2 * latency_ns + transfer_ns):
            self._choose_span(destage, [*blocks, *filled], span)

    def _bridge(self, destage: LogDestage, gap: range, zeroes: set[int], fetch: list[tuple[int, int]]) -> bool:
        """Whether the cache has all of these blocks, as the backend has them or as it is to have them."""
        where, state, lookup = self._map.where, self._map.state, self._index.lookup
        low = destage.address << 1
        found: list[tuple[int, int]] = []
        values: list[tuple[int, int]] = []
        for block in gap:
            slot, value = where.get(block), lookup(block)
            if block in zeroes:
                found.append((block, ZERO_SLOT))
            elif value >= low or block in self._index.lost:
                return False
            elif slot is not None:
                if state[slot] != CLEAN:
                    return False
                found.append((block, slot))
            else:
                if not value:
                    return False
                if value & 1:
                    found.append((block, ZERO_SLOT))
                else:
                    values.append((block, value >> 1))
        if len(fetch) + len(values) > len(self._staging):
            return False
        for block, slot in found:
            if slot == ZERO_SLOT:
                destage.blocks.append(block)
                destage.slots.append(slot)
            else:
                self._pin(destage, block, slot)
        fetch += values
        destage.bridged += len(gap)
        return True

    def _choose_units(self, destage: LogDestage, blocks: list[int]) -> None:
        """Complete each unit of which something is dirty; one that is wholly zero stays that."""
        unit, end = self.unit_blocks, -(-self.size_bytes // op.BLOCK_BYTES)
        touched = sorted({block // unit for block in blocks})
        wanted = [block for first in touched for block in range(first * unit, min((first + 1) * unit, end))]
        present = {*blocks, *destage.zeroes}
        units = set(touched)
        zeroes = [block for block in destage.zeroes if block // unit in units]
        destage.blocks += zeroes
        destage.slots += [ZERO_SLOT] * len(zeroes)
        destage.zeroes = [block for block in destage.zeroes if block // unit not in units]
        missing = [block for block in wanted if block not in present]
        if missing:
            destage.span = range(touched[0] * unit, wanted[-1] + 1)
            destage.missing = missing
            destage.bridged += len(missing)

    def _choose_span(self, destage: LogDestage, blocks: Sequence[int], span: range) -> None:
        """Write all of these blocks: what there is of them are `blocks`, and zeroes."""
        end = min(span.stop, -(-self.size_bytes // op.BLOCK_BYTES))
        zeroes = [block for block in destage.zeroes if span.start <= block < end]
        destage.blocks += zeroes
        destage.slots += [ZERO_SLOT] * len(zeroes)
        destage.zeroes = [block for block in destage.zeroes if not span.start <= block < end]
        present = {*blocks, *zeroes}
        missing = [block for block in range(span.start, end) if block not in present]
        if missing:
            destage.span = range(span.start, end)
            destage.missing = missing
            destage.bridged += len(missing)

    # --- from the backend ---

    def fetch(self, destage: LogDestage, fetch: list[tuple[int, int]]) -> None:
        """Read what has to be read."""
        if destage.span:
            self._read_span(destage, fetch)
        else:
            self._fetch(destage, fetch)

    def _read_span(self, destage: LogDestage, fetch: list[tuple[int, int]]) -> None:
        span = destage.span
        self.blocks_read_back += len(span)
        offset = span.start * op.BLOCK_BYTES
        size = min(len(span) * op.BLOCK_BYTES, self.size_bytes - offset)
        if size % op.BLOCK_BYTES:
            # A disk may grow before this is written: what is behind its end is zeroes then.
            self._io.zero_slot(destage.staged[-1], size % op.BLOCK_BYTES, -size % op.BLOCK_BYTES)
        self._io.read(self._io.begin(SpanRead(self, destage, fetch)), offset, size, destage.staged)
        self._io.reads -= 1  # not for the guest

    def span_read(self, destage: LogDestage, fetch: list[tuple[int, int]], result: int) -> None:
        """The backend has been read."""
        if result < 0 and self.unit_blocks:
            self._release_reading(destage)
            self._failed(destage, result)
            return
        if result < 0:
            # It was only to save writes. A sector that stays bad is none of those that have to be written.
            destage.bridged -= len(destage.missing)
            destage.missing = []
        self._fetch(destage, fetch)

    # --- from the log ---

    def _keep_readable(self, destage: LogDestage, fetch: list[tuple[int, int]]) -> None:
        oldest = min(map(_address, fetch))
        reading = self._writer.reading
        destage.reading.append(oldest)
        reading[oldest] = reading.get(oldest, 0) + 1

    def _fetch(self, destage: LogDestage, fetch: list[tuple[int, int]]) -> None:
        """Read from the log, neighbours at once."""
        if not fetch:
            self._end(destage)
            return
        fetch.sort(key=_address)
        count = whole = len(fetch)
        if self._unreadable and (bad := self._unreadable.addresses((destage.number,))):
            # What could not be read before comes last, block by block: all the rest is read in long pieces.
            fetch.sort(key=lambda pair: pair[1] in bad)
            whole = sum(address not in bad for _, address in fetch)
        if destage.span:
            first = destage.span.start
            slots = [destage.staged[block - first] for block, _ in fetch]
        else:
            slots = destage.staged
        blocks, addresses = map(list, zip(*fetch, strict=True))
        # Not all of them in one turn: each costs the kernel a microsecond or two.
        start = 0
        while start < count:
            end = start + 1
            if start < whole:
                end = min(whole, start + LONG_READ)
                if addresses[end - 1] - addresses[start] > (end - start) * (READS_AT_ONCE + 1) // READS_AT_ONCE:
                    end = min(whole, start + READS_AT_ONCE)
            destage.later.append((addresses[start:end], blocks[start:end], slots[start:end]))
            start = end
        destage.later.reverse()
        self._read(destage, *destage.later.pop())

    def _read(self, destage: LogDestage, addresses: list[int], blocks: list[int], slots: list[int]) -> None:
        """Read from the log, neighbours at once. `addresses` ascend."""
        group = self._io.begin(StagingRead(self, destage, addresses, blocks, slots))
        ring_blocks, log_read = self._writer.ring_blocks, self._io.log_read
        count = len(addresses)
        start = 0
        while start < count:
            first = addresses[start]
            most = min(count, start + READ_BLOCKS_MAX, start + ring_blocks - first % ring_blocks)
            end = most if addresses[most - 1] - first == most - 1 - start else start + 1
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
            self._go_on(destage)
            return
        destage.span = range(0)  # what the backend had there may have been overwritten in the slots
        destage.bridged = 0
        if result != -EBADMSG:
            self._writer.counters["log_failures"] += 1
            if not destage.errno:
                # A device that reads nothing at all is not asked for each block: all of this once more, if it does.
                destage.errno = -result
                destage.scratch = read.slots[0]
                destage.later.append((read.addresses, read.blocks, read.slots))
                self._probe(destage, [*read.addresses], self._go_on)
                return
        if len(read.blocks) > 1:
            # In halves, to leave out only what is rotten or unreadable; one after the other, for it may be everywhere.
            half = len(read.blocks) // 2
            destage.later.append((read.addresses[half:], read.blocks[half:], read.slots[half:]))
            destage.later.append((read.addresses[:half], read.blocks[:half], read.slots[:half]))
        else:
            destage.scratch = read.slots[0]
            self._leave_out(destage, read.blocks[0], read.addresses[0], result)
        self._go_on(destage)

    def _leave_out(self, destage: LogDestage, block: int, address: int, result: int) -> None:
        if not self._index.is_clean(block, address):
            (destage.rotten if result == -EBADMSG else destage.unreadable).append((block, address))
        if result == -EBADMSG:
            self.notices.append(("log-corrupt", {"offset": block * op.BLOCK_BYTES}))

    def _probe(self, destage: LogDestage, but: list[int], then: Callable[[LogDestage], None]) -> None:
        """Find out whether the device reads other places of the log than these."""
        self._probes += 1
        but += [*self._unreadable.addresses(), *self._unreadable.elsewhere]
        addresses = self._index.some_addresses(WITNESSES, self._probes, frozenset(but))
        # Headers have no checksum in the engine's table and count there as wrong, so they are asked last.
        headers = [address for address, _ in islice(self._writer.records_made, WITNESSES)]
        done = partial(self._probed, destage, then)
        Probe(self._io, self._writer.ring_blocks, addresses, headers, destage.scratch, done)

    def _probed(self, destage: LogDestage, then: Callable[[LogDestage], None], good: list[int], bad: list[int]) -> None:
        destage.device_reads = self._unreadable.device_reads(good, bad)
        if not destage.device_reads:
            for addresses, blocks, _ in destage.later:
                destage.unreadable += zip(blocks, addresses, strict=True)
            destage.later = []
        then(destage)

    def _go_on(self, destage: LogDestage) -> None:
        """A read has ended: the next one, or the end of them."""
        if destage.later:
            self._read(destage, *destage.later.pop())
        elif destage.unreadable and destage.device_reads:
            self._probe(destage, [address for _, address in destage.unreadable], self._read_all)
        else:
            self._read_all(destage)

    def _read_all(self, destage: LogDestage) -> None:
        """Nothing more is read from the log."""
        self._release_reading(destage)
        self._end(destage)

    def _end(self, destage: LogDestage) -> None:
        """All sources are there."""
        if destage.span:
            first = destage.span.start
            destage.blocks += destage.missing
            destage.slots += [destage.staged[block - first] for block in destage.missing]
        self._ready(destage)

    def _release_reading(self, destage: LogDestage) -> None:
        reading = self._writer.reading
        for address in destage.reading:
            reading[address] -= 1
            if not reading[address]:
                del reading[address]
        destage.reading = []
