"""What every volume does with a guest's requests, whether it has a log or not.

Owns the requests that wait (for room, for a range, for a read), the guest's write-cache state and the reads that are
put together from parts. What becomes of a change is the heirs' business: `volume` keeps it in RAM until it is destaged,
`log_volume` logs it first. It never does I/O of its own: it appends words to the operation list.

Invariant: a tag is answered (completed or dropped) exactly once.
"""

import heapq
from collections import deque
from dataclasses import dataclass
from typing import Final

from vhostcache import operations as op
from vhostcache.backend_io import BackendIo
from vhostcache.fill import GONE, NOBODY, Fill, Fills, ReadJob
from vhostcache.map import Map
from vhostcache.readahead import Readahead
from vhostcache.readcache import HITS_MAX, ReadCache

STREAM_SECTORS: Final = 2048
"""A stream that has read 1 MiB in sequence is sequential: it bypasses the read cache."""
STREAM_REQUEST_SECTORS: Final = 32
"""Requests below 16 KiB are not watched for streams: S3-FIFO alone keeps a slow scan from sweeping the cache."""
STREAMS_MAX: Final = 16
ENODATA: Final = 61
ETIMEDOUT: Final = 110
AHEAD_SHARE: Final = 8
"""One part in eight of RAM may hold what has been read ahead."""
AHEAD_GROUPS: Final = 16
"""Nothing is read ahead when fewer groups of I/O are left for those who wait."""
DEFINITE: Final = frozenset((-14, -22, -ENODATA, -74, -95))
"""A read that fails so does not succeed later: bad address, invalid, no data (the image has shrunk), a wrong checksum,
not supported."""
READ_PAUSE_FIRST_NS: Final = 100_000_000
READ_PAUSE_MAX_NS: Final = 5_000_000_000
INTERNAL: Final = -1
"""In place of a tag: the daemon's own commits."""

# what, tag, sector, sectors, payload offset in bytes of what is left
Parked = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class VolumeSettings:
    """What the core has to know of a volume."""

    index: int
    """The engine's number for it."""
    size_bytes: int
    """At the start: it may grow."""
    object_bytes: int
    slots: int
    """Slots of the slab, the special ones included; `map.slots_for_ram` says how many a RAM limit pays for."""
    acknowledge_durable: bool = False
    """Write-through: a write is acknowledged when it is durable on the backend."""
    ignore_flush: bool = False
    """Cache mode unsafe: flushes are answered at once."""
    destage_after_ns: int = 5_000_000_000
    fill_bytes: int = op.BLOCK_BYTES
    """Misses are read in aligned units of this size."""
    direct_bytes: int = 128 << 10
    """Reads that miss and are as large as this go straight to guest memory: they gain little from RAM and would sweep
    it. Writes as large may go past RAM while it fills."""
    backend_timeout_ns: int = 0
    """A read that only the backend can answer fails after this; 0: it waits as long as it takes."""
    can_abandon: bool = False
    """The backend's: a read into guest memory may be dropped while it is under way."""
    readahead_bytes: int = 0
    """The most that is fetched ahead of a sequential stream; 0: nothing."""
    threshold_percent: int = 60
    """More dirty blocks than this part of RAM are destaged without waiting for their age."""


class GuestRequests:
    """The common part. Heirs say how to execute a request, when a change is durable, and where blocks come from."""

    def __init__(self, settings: VolumeSettings, operations: list[int], block_map: Map, groups: int) -> None:
        self._operations = operations
        self.size_bytes = settings.size_bytes
        """Of the disk."""
        self._size_sectors = settings.size_bytes // op.SECTOR_BYTES
        self._whole_blocks = settings.size_bytes // op.BLOCK_BYTES
        self._map = block_map
        self._cache = ReadCache(block_map)
        self._io = BackendIo(settings.index, operations, groups)
        self._fills = Fills(self._map, self._cache, self._io, settings.size_bytes, self._part_done, self._retry_filled)
        self._direct_sectors = settings.direct_bytes // op.SECTOR_BYTES
        self._fill_blocks = settings.fill_bytes // op.BLOCK_BYTES
        self._room: deque[Parked] = deque()
        """Writes that wait for room, in order."""
        self._parked: list[Parked] = []
        """Requests that wait for a range that is being changed, or for a group; tried again once a turn."""
        self._direct: dict[DirectRead, None] = {}
        self._alone: dict[int, int] = {}
        """Tag -> sector << 16 | sectors, of reads that the engine completes by itself; it stays until the tag comes
        again, of which there are as many as requests at once."""
        self._retries: list[tuple[int, Parked]] = []
        """What the backend has failed to read, and when it is tried again. A read's fifth word is its deadline."""
        self._deadlines: list[tuple[int, int, ReadJob]] = []
        """A heap of reads under way that may not wait for ever: deadline, a number, read."""
        self._jobs_limited = 0
        self._timeout_ns = settings.backend_timeout_ns
        self._can_abandon = settings.can_abandon
        self._reads_failing = 0
        """The errno with which the backend has failed to read, and has not read well since; 0: it has not."""
        self._read_pause_ns = 0
        self._streams: dict[int, int] = {}
        """Next sector of a sequential stream -> sectors it has read."""
        self._acknowledge_durable = settings.acknowledge_durable
        self._ignore_flush = settings.ignore_flush
        self._guest_write_cache = not settings.acknowledge_durable
        self._write_cache_known = True
        self._write_through = settings.acknowledge_durable and not settings.ignore_flush
        self._ahead: Readahead | None = None
        if settings.readahead_bytes:
            usable = settings.slots - op.FIRST_SLOT
            self._ahead = Readahead(
                self._fills,
                settings.readahead_bytes // op.BLOCK_BYTES,
                usable // AHEAD_SHARE,
                self._fill_blocks,
                lambda: (self._size_sectors + op.BLOCK_SECTORS - 1) // op.BLOCK_SECTORS,
                self._fetch_ahead,
            )
        self.notices: list[tuple[str, dict[str, object]]] = []
        self._draining = False
        self._quiescing = False
        self._notice_at_ns = 0
        self.now_ns = 0
        self.hits = 0
        self.misses = 0
        self.flushes_received = 0
        self.room_waits = 0
        self.read_retries = 0
        self.read_timeouts = 0

    # --- what the heirs decide ---

    def _execute(self, request: Parked) -> None:
        raise NotImplementedError

    def _change(self, what: int, tag: int, sector: int, sectors: int, payload: int) -> bool:
        """A write, discard or write-zeroes; False if it now stands at the end of `_room`."""
        raise NotImplementedError

    def _commit(self, tag: int) -> None:
        """Complete `tag` once everything accepted is durable."""
        raise NotImplementedError

    def _drop_commits(self) -> list[int]:
        """The tags that wait for commits, which forget them."""
        raise NotImplementedError

    def _filled(self, request: Parked) -> None:
        """A fill that a parked change waited for has ended well."""
        raise NotImplementedError

    def _read(self, tag: int, sector: int, sectors: int, deadline_ns: int) -> None:
        """A read; `deadline_ns` as it was when it began, 0: it begins now."""
        raise NotImplementedError

    # --- the engine ---

    def io_done(self, group: int, result: int) -> None:
        """The engine has reported that a group of I/O operations has ended, or that a request which it was to complete
        has failed."""
        if group & op.FAILED_TAG:
            tag = group & ~op.FAILED_TAG
            place = self._alone.pop(tag)
            job = ReadJob(tag, place >> 16, place & 0xFFFF, op.NEVER)
            job.failed(result, result not in DEFINITE)
            self._read_over(job)
        else:
            self._io.done(group, result)

    @property
    def idle(self) -> bool:
        """No I/O is in flight."""
        return not self._io.in_flight

    # --- the connection ---

    def connected(self) -> None:
        """A front-end has come."""
        self._streams.clear()
        if self._ahead is not None:
            self._ahead.drop_all()

    def disconnected(self) -> None:
        """It has gone; the engine has seen every request of it answered or dropped."""
        assert not self._room
        assert not self._parked
        assert all(read.job.over for read in self._direct)
        assert not self._retries

    def _resize(self, size_bytes: int) -> None:
        """The disk is that large from now on, and was smaller. Requests that wait lie within what it was."""
        assert size_bytes >= self.size_bytes
        self.size_bytes = size_bytes
        self._size_sectors = size_bytes // op.SECTOR_BYTES
        self._whole_blocks = size_bytes // op.BLOCK_BYTES
        self._fills.size_bytes = size_bytes

    def quiesce(self, may_drop: bool) -> None:
        """Every request has to be answered soon; those that may wait long are dropped if they may be, now and as they
        come to wait, until there are new requests: the engine takes none before all are settled."""
        if may_drop:
            self._quiescing = True
            self._drop_waiting()

    def _drop_waiting(self) -> None:
        append = self._operations.append
        dropped = [tag for tag in self._drop_commits() if tag >= 0]
        dropped += [request[1] for request in (*self._room, *self._parked)]
        dropped += [request[1] for _, request in self._retries]
        self._room.clear()
        self._parked.clear()
        self._retries.clear()
        jobs: dict[int, ReadJob] = {}
        for fill in self._fills.running:
            dropped += [request[1] for request in fill.retries]
            fill.retries.clear()
            if fill.tag != NOBODY:
                dropped.append(fill.tag)
                fill.tag = NOBODY
            stay = [reader for reader in fill.readers if reader[0].direct and not self._can_abandon]
            jobs.update((id(reader[0]), reader[0]) for reader in fill.readers if reader not in stay)
            fill.readers = stay
        if self._can_abandon:
            # Those of the log end by themselves; their request is dropped all the same.
            jobs.update((id(read.job), read.job) for read in self._direct)
        for job in jobs.values():
            if not job.over:
                job.over = True
                dropped.append(job.tag)
        for tag in dropped:
            append(op.DROP | tag << 8)

    def set_write_cache(self, enabled: bool) -> None:
        """The guest has switched its write cache, or has not negotiated FLUSH (then: False)."""
        self._guest_write_cache = enabled and not self._acknowledge_durable
        self._write_cache_known = True
        self._choose_write_through()
        if self._write_through:
            self._commit(INTERNAL)

    def write_cache_unknown(self) -> None:
        """The front-end comes from another back-end: the guest may believe in write-through, until it sends a flush."""
        self._write_cache_known = False
        self._choose_write_through()

    def _complete(self, tag: int, status: int) -> None:
        if tag >= 0:
            self._operations.append(op.COMPLETE | tag << 8 | status << 32)

    def _acknowledge(self, tag: int) -> None:
        """A change is in RAM."""
        if self._write_through:
            self._commit(tag)
        else:
            self._operations.append(op.COMPLETE | tag << 8)

    def _flush(self, tag: int) -> None:
        self.flushes_received += 1
        if not self._write_cache_known:
            self._write_cache_known = True
            self._choose_write_through()
        if self._ignore_flush:
            self._complete(tag, op.STATUS_OK)
        else:
            self._commit(tag)

    def _choose_write_through(self) -> None:
        trusted = self._guest_write_cache and self._write_cache_known
        self._write_through = not trusted and not self._ignore_flush

    def _room_for(self, blocks: int) -> bool:
        missing = blocks - len(self._map.free)
        if missing <= 0 or self._cache.evict(missing) >= missing:
            return True
        if self._ahead is None or not self._ahead.held:
            return False
        self._ahead.drop_all()
        return len(self._map.free) >= blocks

    def _is_partial(self, sector: int, sectors: int) -> bool:
        """Whether a piece is a part of a block; the volume's last block ends where the volume ends."""
        last_sector = sector + sectors
        return bool(sector % op.BLOCK_SECTORS or (last_sector % op.BLOCK_SECTORS and last_sector != self._size_sectors))

    def _clear_behind_end(self, slot: int) -> None:
        """The slot is to have the disk's last block, which is a part of one. Should the disk grow, what comes behind
        reads as zeroes."""
        end = self._size_sectors % op.BLOCK_SECTORS * op.SECTOR_BYTES
        self._io.zero_slot(slot, end, op.BLOCK_BYTES - end)

    def _is_stream(self, sector: int, sectors: int) -> bool:
        streams = self._streams
        length = streams.pop(sector, 0) + sectors
        streams[sector + sectors] = length
        if len(streams) > STREAMS_MAX:
            del streams[next(iter(streams))]
        return length >= STREAM_SECTORS

    def _part_bytes(self, sector: int, sectors: int, first: int, end: int) -> tuple[int, int, int]:
        """What blocks `first` .. `end - 1` are of a request: (payload offset, bytes, offset in the first block)."""
        start = max(first * op.BLOCK_SECTORS, sector)
        stop = min(end * op.BLOCK_SECTORS, sector + sectors)
        return (
            (start - sector) * op.SECTOR_BYTES,
            (stop - start) * op.SECTOR_BYTES,
            (start - first * op.BLOCK_SECTORS) * op.SECTOR_BYTES,
        )

    def _fetch_ahead(self, first: int, count: int) -> Fill | None:
        """Begin to read what only the backend has of these blocks, at their beginning; None: nothing, or no room."""
        end = first + count
        while first < end and not self._is_absent(first):
            first += 1
        stop = first
        while stop < end and self._is_absent(stop):
            stop += 1
        if first == stop or self._reads_failing or self._io.spare() < AHEAD_GROUPS:
            return None
        missing = stop - first - len(self._map.free)
        if missing > 0 and self._cache.evict(missing) < missing:
            return None
        return self._fills.begin(first, self._map.take(stop - first))

    def _is_absent(self, block: int) -> bool:
        """Whether only the backend has it, and nobody reads it yet."""
        return block not in self._map.where and block not in self._fills.by_block

    def _fill_range(self, first: int, end: int) -> tuple[int, int]:
        """Grow a run of absent blocks to whole fill units, as far as its neighbours are absent too."""
        unit = self._fill_blocks
        if unit > 1:
            absent = self._is_absent
            lowest = first - first % unit
            highest = min(end + -end % unit, (self._size_sectors + op.BLOCK_SECTORS - 1) // op.BLOCK_SECTORS)
            while first > lowest and absent(first - 1):
                first -= 1
            while end < highest and absent(end):
                end += 1
        return first, end

    def _copy_out(self, tag: int, sector: int, sectors: int, first: int, end: int) -> None:
        payload, size, skip = self._part_bytes(sector, sectors, first, end)
        where, hits = self._map.where, self._cache.hits
        slots = [where[block] for block in range(first, end)]
        for slot in slots:
            if hits[slot] < HITS_MAX:
                hits[slot] += 1
        self._operations += (op.OUT | tag << 8 | len(slots) << 32, payload | size << 32, skip)
        self._operations += slots

    def _join(self, job: ReadJob, fill: Fill, sector: int, sectors: int, first: int, end: int) -> None:
        payload, size, skip = self._part_bytes(sector, sectors, first, end)
        if fill.ahead:
            fill.read.update(range(first, end))
            if fill.ready:
                slots = fill.slots[first - fill.first : end - fill.first]
                self._operations += (op.OUT | job.tag << 8 | len(slots) << 32, payload | size << 32, skip)
                self._operations += slots
                return
        job.parts += 1
        fill.readers.append((job, payload, (first - fill.first) * op.BLOCK_BYTES + skip, size))

    def _part_done(self, job: ReadJob, result: int, on_backend: bool) -> None:
        job.parts -= 1
        if result < 0:
            job.failed(result, result == GONE or (on_backend and result not in DEFINITE))
        if job.parts == 0 and not job.over:
            self._read_over(job)

    def direct_done(self, read: "DirectRead", result: int) -> None:
        """A read into guest memory has ended."""
        del self._direct[read]
        read.job.direct -= 1
        self._part_done(read.job, result, not read.address)

    def _retry_filled(self, request: Parked, result: int, on_backend: bool) -> None:
        """A fill that a parked change waited for has ended. A change waits for the backend as long as it takes."""
        if result in (0, GONE):
            self._filled(request)
        elif on_backend and result not in DEFINITE:
            self._retry_later(request, result)
        else:
            self._notice_error("read", result)
            self._complete(request[1], op.STATUS_IOERR)

    # --- reads that the backend does not answer ---

    def _new_job(self, tag: int, sector: int, sectors: int, deadline_ns: int) -> ReadJob:
        if not deadline_ns:
            deadline_ns = self.now_ns + self._timeout_ns if self._timeout_ns else op.NEVER
        return ReadJob(tag, sector, sectors, deadline_ns)

    def _limit(self, job: ReadJob) -> None:
        """Parts of the read are under way: it is not to wait for them longer than its deadline."""
        if job.deadline_ns < op.NEVER:
            self._jobs_limited += 1
            heapq.heappush(self._deadlines, (job.deadline_ns, self._jobs_limited, job))

    def _read_over(self, job: ReadJob) -> None:
        """All parts of a read have ended, or there are none."""
        job.over = True
        if not job.error:
            if self._reads_failing:
                self._reads_recovered()
            self._complete(job.tag, op.STATUS_OK)
        elif not job.waits or self.now_ns >= job.deadline_ns:
            self._notice_error("read", job.error)
            self._complete(job.tag, op.STATUS_IOERR)
        elif job.error == GONE:
            self._read(job.tag, job.sector, job.sectors, job.deadline_ns)
        else:
            self._retry_later((op.REQUEST_READ, job.tag, job.sector, job.sectors, job.deadline_ns), job.error)

    def _retry_later(self, request: Parked, result: int) -> None:
        """The backend has failed to read for it."""
        if not self._reads_failing:
            self._reads_failing = -result
            self._read_pause_ns = READ_PAUSE_FIRST_NS
            self.notices.append(("backend-error", {"operation": "read", "errno": -result}))
        at_ns = self.now_ns + self._read_pause_ns
        if request[0] & op.REQUEST_KIND_MASK == op.REQUEST_READ:
            at_ns = min(at_ns, max(request[4], self.now_ns))
        self._retries.append((at_ns, request))

    def _reads_recovered(self) -> None:
        self._reads_failing = 0
        self._retries = [(0, request) for _, request in self._retries]
        self.notices.append(("backend-recovered", {}))

    def _retry_reads(self, now_ns: int) -> int:
        """Try again what is due, fail what has waited for too long. Returns when to look again, in ns."""
        deadlines = self._deadlines
        while deadlines and (deadlines[0][2].over or deadlines[0][0] <= now_ns):
            _, number, job = heapq.heappop(deadlines)
            if job.direct and not job.over:
                # What is being read into guest memory may still come.
                heapq.heappush(deadlines, (now_ns + READ_PAUSE_FIRST_NS, number, job))
            elif not job.over:
                job.over = True
                self.read_timeouts += 1
                self._notice_error("read", -ETIMEDOUT)
                self._complete(job.tag, op.STATUS_IOERR)
        due = [request for at_ns, request in self._retries if at_ns <= now_ns]
        if due:
            self._retries = [retry for retry in self._retries if retry[0] > now_ns]
            self._read_pause_ns = min(2 * self._read_pause_ns, READ_PAUSE_MAX_NS)
            self.read_retries += len(due)
            for request in due:
                self._execute(request)
        at_ns = min((retry[0] for retry in self._retries), default=op.NEVER)
        return min(at_ns, deadlines[0][0]) if deadlines else at_ns

    def _notice_error(self, operation: str, result: int) -> None:
        """Tell the operator, at most once a second."""
        if self.now_ns >= self._notice_at_ns:
            self._notice_at_ns = self.now_ns + 1_000_000_000
            name = "image-shrank" if result == -ENODATA else "request-failed"
            self.notices.append((name, {"operation": operation, "errno": -result}))


class DirectRead:
    """A part of a request that the backend reads into guest memory."""

    __slots__ = ("_owner", "address", "count", "first", "job")

    def __init__(self, owner: "GuestRequests", job: ReadJob) -> None:
        self._owner = owner
        self.address = 0
        """Where in the log or the read cache; 0: on the backend."""
        self.first = self.count = 0
        """Blocks, of such a read."""
        self.job = job

    def io_done(self, result: int) -> None:
        self._owner.direct_done(self, result)
