"""Reads of a volume with a log: from RAM, from the log, from the read cache, or from the backend, in this order.

Owns where each block of a read is, and how it gets to the guest: by a copy, through slots in which it stays, or
directly. Invariant: what the index names is not reused in the ring while it is being read. What a change means is
log_changes.py's.
"""

from typing import Final

from vhostcache import operations as op
from vhostcache.fill import GONE, Fill, ReadJob
from vhostcache.guest_requests import STREAM_REQUEST_SECTORS, DirectRead, GuestRequests, VolumeSettings
from vhostcache.log import format as fmt
from vhostcache.log.index import LogIndex
from vhostcache.log.read_ring import STORED, ReadRing
from vhostcache.log.writer import LogWriter
from vhostcache.map import Map

LAST_SHARE: Final = 4
"""What is read in the last quarter of the log is offered to the read cache, for the log will soon be without it."""
PART_BLOCKS: Final = 32
"""Of a run that only the backend has: looked up at once."""
TELL_NS: Final = 1_000_000_000
ZERO_SLOT: Final = 1
"""A slot of zeroes that is never written."""


class LogReads(GuestRequests):
    """See the module. The heir makes the index and the writer."""

    _index: LogIndex
    _writer: LogWriter

    def __init__(self, settings: VolumeSettings, operations: list[int], block_map: Map, groups: int) -> None:
        super().__init__(settings, operations, block_map, groups)
        self.read_ring: ReadRing | None = None
        self.log_hits = 0
        self.passed_over = 0
        """Clean blocks of the log that could not be read from it, and then came from the backend."""
        self._told_ns = 0
        self.read_cache_hits = 0
        self._closing = False

    def _locate(self, block: int) -> int:
        """Where the newest content is that RAM does not have, as LogIndex.lookup says it, or in the read cache."""
        value = self._index.lookup(block)
        return value if value or self.read_ring is None else self.read_ring.value(block)

    def _offset(self, address: int) -> int:
        """Where in the cache file."""
        if address >= STORED:
            assert self.read_ring is not None
            return self.read_ring.offset(address)
        return fmt.offset_bytes(address, self._writer.ring_blocks)

    def _log_read_begins(self, address: int, count: int) -> None:
        if address >= STORED:
            assert self.read_ring is not None
            self.read_ring.read_begins(address, count)
            return
        reading = self._writer.reading
        reading[address] = reading.get(address, 0) + 1

    def _log_read_done(self, address: int, first: int, count: int, result: int) -> int:
        """Returns what the readers are to be told."""
        if address >= STORED:
            assert self.read_ring is not None
            self.read_ring.read_done(address, first, count, result)
            return GONE if result < 0 else 0
        reading = self._writer.reading
        reading[address] -= 1
        if not reading[address]:
            del reading[address]
        return GONE if result < 0 and self._pass_over(address, first, count, result) else result

    def _pass_over(self, address: int, first: int, count: int, result: int) -> bool:
        """The log cannot give these blocks. A bad cache device is no reason to fail a read that the backend can answer.
        False: it has nothing to do with any of them."""
        passed_over = self._index.forget_clean(first, count, address)
        if not passed_over:
            return False
        self.passed_over += passed_over
        if self.now_ns >= self._told_ns:
            self._told_ns = self.now_ns + TELL_NS
            fields = {"errno": -result, "offset": first * op.BLOCK_BYTES, "bytes": passed_over * op.BLOCK_BYTES}
            self.notices.append(("log-passed-over", {**fields}))
        return True

    def _offer(self, fill: Fill) -> None:
        """A fill has brought blocks that the read cache may want: from the backend, or from the part of the log that is
        the next to go."""
        assert self.read_ring is not None
        writer = self._writer
        old = writer.head - writer.ring_blocks + writer.ring_blocks // LAST_SHARE
        if fill.address < old and not self._closing:
            self.read_ring.offer(fill.first, fill.slots)

    def _begin_fill(self, first: int, count: int, address: int) -> Fill:
        """Blocks from the log (0: from the backend) to slots, for which there is room."""
        slots = self._map.take(count)
        if not address:
            return self._fills.begin(first, slots)
        self._log_read_begins(address, count)
        return self._fills.begin_log(first, slots, address, self._offset(address))

    def _read_stored(self, tag: int, block: int) -> bool:
        """A read of one block which RAM does not have, but the log or the read cache: the usual case. False: it takes
        the long way."""
        if block in self._fills.by_block or block >= self._whole_blocks or not self._io.spare():
            return False
        value = self._locate(block)
        if not value or value & 1 or not self._room_for(1):
            return False
        address = value >> 1
        if address >= STORED:
            self.read_cache_hits += 1
        else:
            self.log_hits += 1
        self._begin_fill(block, 1, address).tag = tag
        if self._ahead is not None:
            self._ahead.read(block, block + 1, self.now_ns, deep=False)
        return True

    def _read(self, tag: int, sector: int, sectors: int, deadline_ns: int) -> None:
        """Each run of blocks from where it is: RAM, a fill in flight, the log, or the backend."""
        first, end = sector >> 3, (sector + sectors + 7) >> 3
        if self._io.spare() < end - first:
            self._parked.append((op.REQUEST_READ, tag, sector, sectors, deadline_ns))
            return
        ragged = bool((sector | sectors) & 7)
        if ragged and not self._room_for(2):
            # The log is read in whole blocks, which have to go somewhere.
            self._parked.append((op.REQUEST_READ, tag, sector, sectors, deadline_ns))
            self._writer.commit_soon()
            return
        stream = sectors >= STREAM_REQUEST_SECTORS and self._is_stream(sector, sectors)
        bypass = stream or (sectors >= self._direct_sectors and self.read_ring is None)
        where, by_block, lookup = self._map.where, self._fills.by_block, self._locate
        job = self._new_job(tag, sector, sectors, deadline_ns)
        block = first
        while block < end:
            start = block
            fill = by_block.get(block)
            if fill is not None:
                while block < end and by_block.get(block) is fill:
                    block += 1
                self._join(job, fill, sector, sectors, start, block)
                self.misses += block - start
                continue
            if block in where:
                while block < end and block in where:
                    block += 1
                self._copy_out(tag, sector, sectors, start, block)
                self.hits += block - start
                continue
            value = lookup(block)
            block = self._run_end(start, end, value)
            if ragged and value and not value & 1 and block - start > 1:
                # The blocks at the ends alone.
                block = start + 1 if start == first else min(block, max(start + 1, end - 1))
            if value & 1:
                payload, size, skip = self._part_bytes(sector, sectors, start, block)
                self._operations += (op.OUT | tag << 8 | (block - start) << 32, payload | size << 32, skip)
                self._operations += [ZERO_SLOT] * (block - start)
                self.hits += block - start
                continue
            if value >= STORED << 1:
                self.read_cache_hits += block - start
            elif value:
                self.log_hits += block - start
            else:
                self.misses += block - start
            if bypass and not value and start == first and block == end and not self._timeout_ns:
                self._alone[tag] = sector << 16 | sectors
                self._io.read_request(tag, sector * op.SECTOR_BYTES, sectors * op.SECTOR_BYTES)
                return
            self._fetch(job, sector, sectors, start, block, value >> 1, bypass)
        if job.parts == 0:
            self._complete(tag, op.STATUS_OK)
        else:
            self._limit(job)

    def _run_end(self, start: int, end: int, value: int) -> int:
        """How far blocks are where `start` is: all zero, in a row in the log, or on the backend."""
        where, by_block, lookup = self._map.where, self._fills.by_block, self._locate
        ring_blocks = self._writer.ring_blocks
        block = start + 1
        if not value and not by_block and self.read_ring is None:
            # Never more than one part in vain: a guest chooses how its blocks alternate.
            while end - block >= PART_BLOCKS:
                part = range(block, block + PART_BLOCKS)
                if self._index.has_any(block, part.stop) or not where.keys().isdisjoint(part):
                    break
                block = part.stop
        while block < end and block not in where and block not in by_block:
            other = lookup(block)
            if value & 1 or not value:
                if other & 1 != value & 1 or (not value and other):
                    break
            elif other != value + 2 * (block - start) or (other >> 1) % ring_blocks == 0:
                break
            block += 1
        return block

    def _is_absent(self, block: int) -> bool:
        return super()._is_absent(block) and not self._locate(block)

    def _fetch(self, job: ReadJob, sector: int, sectors: int, first: int, end: int, address: int, bypass: bool) -> None:
        """A run of blocks that only the log (0: the backend) has: through slots, so that they stay, or, if RAM has no
        room or nothing to gain, directly."""
        payload, size, skip = self._part_bytes(sector, sectors, first, end)
        whole = size == (end - first) * op.BLOCK_BYTES
        last = (sector + sectors + 7) >> 3
        wanted = end - first + (1 if (sector | sectors) & 7 and end < last else 0)  # leaves one for a ragged end
        if not address and (self._timeout_ns or not bypass):  # what is read into guest memory cannot be abandoned
            fill_first, fill_end = (first, end) if bypass else self._fill_range(first, end)
            more = fill_end - fill_first - (end - first)
            if more and not self._room_for(wanted + more):
                fill_first, fill_end, more = first, end, 0
            if more or self._room_for(wanted):
                fill = self._begin_fill(fill_first, fill_end - fill_first, 0)
                self._join(job, fill, sector, sectors, first, end)
                return
        elif address and not (bypass and whole) and self._room_for(wanted):
            self._join(job, self._begin_fill(first, end - first, address), sector, sectors, first, end)
            return
        assert whole or not address
        read = DirectRead(self, job)
        job.parts += 1
        job.direct += 1
        self._direct[read] = None
        if address:
            self._log_read_begins(address, end - first)
            read.address, read.first, read.count = address, first, end - first
            offset = self._offset(address)
            self._io.log_read_direct(self._io.begin(read), job.tag, payload, offset, size)
        else:
            self._io.read_direct(self._io.begin(read), job.tag, payload, first * op.BLOCK_BYTES + skip, size)

    def direct_done(self, read: DirectRead, result: int) -> None:
        """See GuestRequests."""
        if read.address:
            result = self._log_read_done(read.address, read.first, read.count, result)
        super().direct_done(read, result)
