"""A volume: what a guest's requests mean.

Owns the requests that wait and the order among them. Bytes never come here: a request is a tag, a sector and a count,
an answer is words in the operation list. It imports neither os, socket, threading nor time: engine and clock are handed
in.

Invariants:
- a tag is answered (completed or dropped) exactly once;
- a write is acknowledged when its bytes are in slots that the map calls DIRTY, or, in write-through, when a commit that
  began after that has ended;
- a block that a destage is writing never changes: an overwrite goes to a slot of its own;
- a partial block is completed from the newest content at the moment it is written, never from what was newest when it
  arrived;
- writes that wait for room keep their order, and no write of a later turn overtakes them.

`requests` is the hot path: one aligned block, in RAM, costs a few dictionary and array look-ups and one word.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from vhostcache import operations as op
from vhostcache.destage import Destager, DestageSettings
from vhostcache.fill import ReadJob
from vhostcache.guest_requests import (
    INTERNAL,
    STREAM_REQUEST_SECTORS,
    DirectRead,
    GuestRequests,
    Parked,
    VolumeSettings,
)
from vhostcache.map import DIRTY, WRITING, Map
from vhostcache.ranges import AGAIN, Range, Ranges
from vhostcache.readcache import HITS_MAX

NEVER = op.NEVER


class Volume(GuestRequests):
    """See the module. `operations` is the engine's list, which all volumes share."""

    def __init__(self, settings: VolumeSettings, operations: list[int], groups: int = op.GROUPS) -> None:
        super().__init__(settings, operations, Map(settings.slots, settings.object_bytes // op.BLOCK_BYTES), groups)
        self.settings = settings
        usable = settings.slots - op.FIRST_SLOT
        self._destager = Destager(
            self._map,
            self._cache,
            self._io,
            DestageSettings(
                destage_after_ns=settings.destage_after_ns,
                threshold_blocks=usable * settings.threshold_percent // 100,
                flush_blocks=min(4096, max(1, usable // 8)),
                durable=not settings.ignore_flush,
            ),
            settings.size_bytes,
        )
        self._ranges = Ranges(self._map, self._fills, self._destager, self._io, settings.size_bytes, self._range_done)
        self._piece_blocks = max(1, usable // 4)
        self._simple_misses = self._fill_blocks == 1 and not self._timeout_ns and self._ahead is None
        self._direct_blocks = usable * settings.threshold_percent // 133
        self.notices = self._destager.notices

    # --- the daemon's calls ---

    def requests(
        self, what: Sequence[int], tag: Sequence[int], sector: Sequence[int], sectors: Sequence[int], now_ns: int
    ) -> None:
        """One turn's requests: four parallel sequences. Answers go to the operation list, now or later."""
        now = self.now_ns = self._destager.now_ns = now_ns
        self._quiescing = False
        if self._ranges.active or self._room or self._write_through:
            for request in zip(what, tag, sector, sectors, strict=True):
                self._execute((*request, 0))
            return
        append = self._operations.append
        where = self._map.where.get
        state = self._map.state
        hits = self._cache.hits
        hit_count = 0
        for kind, name, start, count in zip(what, tag, sector, sectors, strict=True):
            if count == 8 and not start & 7:
                block = start >> 3
                slot = where(block)
                if slot is None:
                    if kind & 255 == 1 and self._write_new_block(name, block):
                        continue
                    if kind & 255 == 0 and self._miss_block(name, block):
                        continue
                else:
                    if kind & 255 == 0:  # REQUEST_READ
                        hit_count += 1
                        if hits[slot] < HITS_MAX:
                            hits[slot] += 1
                        append(2 | name << 8 | slot << 32)  # OUT1
                        continue
                    if kind & 255 == 1:  # REQUEST_WRITE
                        old = state[slot]
                        if old == DIRTY:
                            append(1 | name << 8 | slot << 32)  # IN1
                            continue
                        if old != WRITING:
                            self._map.mark_dirty(block, slot, now)
                            append(1 | name << 8 | slot << 32)
                            continue
            self._execute((kind, name, start, count, 0))
        self.hits += hit_count

    def tick(self, now_ns: int) -> int:
        """Once a turn, after everything else: start what can be started. Returns the next deadline in ns."""
        self.now_ns = now_ns
        destager = self._destager
        if (
            self._parked
            or self._room
            or destager.room_wanted
            or self._ranges.active
            or self._quiescing
            or self._draining
            or destager.lost_zeroes
            or self._retries
            or self._deadlines
            or (self._ahead is not None and self._ahead.held)
        ):
            return self._tick_slowly(now_ns)
        deadline = destager.schedule(now_ns)
        if destager.completed or destager.failed:
            self._complete_committed()
        return deadline

    def _tick_slowly(self, now_ns: int) -> int:
        destager = self._destager
        if self._parked and self._io.available() >= op.BLOCK_SECTORS:
            parked, self._parked = self._parked, []
            for request in parked:
                self._execute(request)
        if self._room:
            self._admit_waiting()
        destager.room_wanted = bool(self._room)
        if self._draining and not destager.committing and not destager.settled:
            destager.commit(INTERNAL)
        deadline = destager.schedule(now_ns)
        if self._retries or self._deadlines:
            deadline = min(deadline, self._retry_reads(now_ns))
        if self._ahead is not None:
            deadline = min(deadline, self._ahead.expire(now_ns))
        self._complete_committed()
        if destager.lost_zeroes and now_ns >= destager.retry_at_ns:
            self._ranges.repeat_lost()
        if self._ranges.active:
            self._ranges.advance()
        if self._quiescing:
            self._drop_waiting()
        return deadline

    def _complete_committed(self) -> None:
        for tag in self._destager.completed:
            self._complete(tag, op.STATUS_OK)
        self._destager.completed.clear()
        for tag in self._destager.failed:
            self._complete(tag, op.STATUS_IOERR)
        self._destager.failed.clear()

    def grow(self, size_bytes: int, when_done: Callable[[], None]) -> None:
        """The backend is that large now, and stays so whatever happens: the disk is, too."""
        self._resize(size_bytes)
        self._destager.size_bytes = size_bytes
        self._ranges.size_bytes = size_bytes
        when_done()

    def drain(self, on: bool = True, then_cold: bool = False) -> None:
        """Begin to destage everything and flush the backend; `drained` says when that has ended. Off: go on as
        usual. `then_cold` is for volumes with a log."""
        self._draining = on

    def hurry(self, on: bool) -> None:
        """Destage whatever is dirty, so that little is left to drain."""
        self._destager.hurry(on)

    @property
    def drained(self) -> bool:
        """Everything accepted is durable on the backend, and nothing waits."""
        return self._destager.settled and not (self._room or self._parked or self._ranges.active or self._io.in_flight)

    def tune(self, values: Mapping[str, int]) -> None:
        """Change settings, which have been validated, by their names in the configuration; durations in ns."""
        for name, value in values.items():
            assert name == "destage_after"
            self._destager.set_destage_after(value)

    def retry(self) -> None:
        """Somebody says that the backend has been mended: what is held is tried again at once."""
        self._destager.retry()

    def statistics(self) -> dict[str, int]:
        """Counters since the start and levels now; blocks are of 4 KiB."""
        block_map, destager = self._map, self._destager
        return {
            "hits": self.hits,
            "misses": self.misses,
            "flushes_received": self.flushes_received,
            "write_through": int(self._write_through),
            "dirty_blocks": block_map.dirty_blocks + destager.blocks_in_flight,
            "dirty_objects": len(block_map.dirty) + sum(1 for n in destager.in_flight if n not in block_map.dirty),
            "cached_blocks": len(block_map.where),
            "ram_blocks": block_map.slots - op.FIRST_SLOT,
            "free_blocks": len(block_map.free),
            "evictions": self._cache.evictions,
            "room_waits": self.room_waits,
            "waiting_for_room": len(self._room),
            "waiting_for_backend": len(self._retries),
            "read_retries": self.read_retries,
            "read_timeouts": self.read_timeouts,
            **(self._ahead.counters if self._ahead is not None else {}),
            **self._fills.counters,
            "backend_error": destager.error,
            "backend_held": destager.held,
            "read_error": self._reads_failing,
            **destager.counters,
        }

    def _commit(self, tag: int) -> None:
        self._destager.commit(tag)

    def _drop_commits(self) -> list[int]:
        return self._destager.drop_waiters() + self._ranges.drop()

    # --- one request ---

    def _execute(self, request: Parked) -> None:
        what, tag, sector, sectors, payload = request
        kind = what & op.REQUEST_KIND_MASK
        if kind == op.REQUEST_FLUSH:
            self._flush(tag)
            return
        if self._ranges.active and self._overlaps_range(request):
            self._parked.append(request)
        elif kind == op.REQUEST_READ:
            self._read(tag, sector, sectors, payload)
            if self._ahead is not None:
                deep = bool(what & op.REQUEST_DEEP)
                self._ahead.read(sector >> 3, (sector + sectors + 7) >> 3, self.now_ns, deep)
        elif self._room:
            self._room.append(request)
        elif not self._change(what, tag, sector, sectors, payload):
            self.room_waits += 1

    def _overlaps_range(self, request: Parked) -> bool:
        _, _, sector, sectors, _ = request
        return self._ranges.overlaps(sector >> 3, (sector + sectors + 7) >> 3)

    def _change(self, what: int, tag: int, sector: int, sectors: int, payload: int) -> bool:
        """A write, discard or write-zeroes; False if it now stands at the end of `_room`."""
        if what & op.REQUEST_KIND_MASK == op.REQUEST_WRITE:
            return self._write(what, tag, sector, sectors, payload)
        return self._zero(what, tag, sector, sectors)

    def _admit_waiting(self) -> None:
        """Let in those that waited for room, in order, while there is some."""
        waiting, self._room = self._room, deque()
        while waiting:
            request = waiting.popleft()
            if self._ranges.active and self._overlaps_range(request):
                self._parked.append(request)
            elif not self._change(*request):
                break
        self._room += waiting

    # --- the usual requests, of one whole block ---

    def _write_new_block(self, tag: int, block: int) -> bool:
        """A write of a block that the map does not have; False: it takes the long way."""
        if self._room or self._ranges.active:
            return False
        slot = self._cache.take_one()
        if not slot:
            return False
        if self._fills.by_block:
            self._fills.poison(block)
        block_map = self._map
        block_map.where[block] = slot
        block_map.block_of[slot] = block
        block_map.mark_dirty(block, slot, self._destager.now_ns)
        self._operations.append(op.IN1 | tag << 8 | slot << 32)
        return True

    def _miss_block(self, tag: int, block: int) -> bool:
        """A read of a block that the map does not have; False: it takes the long way."""
        fills = self._fills
        if (
            not self._simple_misses
            or block in fills.by_block
            or block >= self._whole_blocks
            or self._ranges.active
            or self._io.available() < op.BLOCK_SECTORS
        ):
            return False
        self.misses += 1
        # Read once in a while, or with no clean slot to be had: it goes past RAM, and is not even reported when read.
        slot = self._cache.take_one() if self._map.free or self._cache.is_wanted(block) else 0
        if slot:
            fills.begin(block, [slot]).tag = tag
        else:
            self._alone[tag] = block << 19 | op.BLOCK_SECTORS
            self._io.read_request(tag, block * op.BLOCK_BYTES, op.BLOCK_BYTES)
        return True

    # --- writes ---

    def _write(self, what: int, tag: int, sector: int, sectors: int, payload: int) -> bool:
        """Write to RAM piece by piece; False if (the rest of) the request now waits for room."""
        if sectors >= self._direct_sectors and what & op.REQUEST_ALIGNED:
            request = (what, tag, sector, sectors, payload)
            if self._goes_past_ram(request):
                self._ranges.write(request, sector >> 3, (sector + sectors) >> 3)
                return True
        while sectors:
            piece = self._next_piece(sector, sectors)
            outcome = self._write_piece((what, tag, sector, sectors, payload), piece)
            if outcome is not None:
                return outcome
            sector += piece
            sectors -= piece
            payload += piece * op.SECTOR_BYTES
        self._acknowledge(tag)
        return True

    def _goes_past_ram(self, request: Parked) -> bool:
        """A large write of whole blocks goes to the backend directly while RAM is half full of dirty data: a burst is
        absorbed, a stream is not copied. A remote backend gets a copy anyway, and could keep a queue from stopping."""
        _, _, sector, sectors, payload = request
        dirty = self._map.dirty_blocks + self._destager.blocks_in_flight
        past = dirty >= self._direct_blocks and not self._can_abandon
        return past and not payload and not (sector | sectors) % op.BLOCK_SECTORS

    def _next_piece(self, sector: int, sectors: int) -> int:
        """Sectors to write at once: the part of a block at either end alone, so that it needs one block read at most;
        whole blocks up to a quarter of RAM, so that a request larger than RAM gets through."""
        head = sector % op.BLOCK_SECTORS
        if head:
            return min(op.BLOCK_SECTORS - head, sectors)
        tail = 0 if sector + sectors == self._size_sectors else sectors % op.BLOCK_SECTORS
        return min(sectors - tail, self._piece_blocks * op.BLOCK_SECTORS) or tail

    def _write_piece(self, request: Parked, sectors: int) -> bool | None:
        """The first `sectors` of a request. None: written. True: parked until a fill ends. False: waits for room."""
        _, tag, sector, _, payload = request
        first, end = sector >> 3, (sector + sectors + 7) >> 3
        partial = self._is_partial(sector, sectors)
        if partial and first not in self._map.where and not self._fills.take_ready(first):
            return self._park_on_fill(first, request)
        needed = self._pin(first, end)
        if needed and not self._room_for(needed):
            self._room.append(request)
            return False
        if needed == end - first and not partial:
            slots = self._place_run(first, end)
        else:
            slots = [self._writable_slot(block, partial) for block in range(first, end)]
        if (sector + sectors) & 7 and not partial:
            self._clear_behind_end(slots[-1])
        self._operations += (
            op.IN | tag << 8 | len(slots) << 32,
            payload | (sectors * op.SECTOR_BYTES) << 32,
            sector % op.BLOCK_SECTORS * op.SECTOR_BYTES,
        )
        self._operations += slots
        return None

    def _park_on_fill(self, block: int, request: Parked) -> bool:
        fill = self._fills.by_block.get(block)
        if fill is None:
            if not self._io.available() or not self._room_for(1):
                self._room.append(request)
                return False
            fill = self._fills.begin(block, self._map.take(1))
        fill.retries.append(request)
        return True

    def _pin(self, first: int, end: int) -> int:
        """Make dirty what the map has of these blocks, so that making room can't evict it; returns the slots that are
        missing."""
        block_map = self._map
        where, state = block_map.where.get, block_map.state
        missing = 0
        for block in range(first, end):
            slot = where(block)
            if slot is None or state[slot] == WRITING:
                missing += 1
            elif state[slot] != DIRTY:
                block_map.mark_dirty(block, slot, self._destager.now_ns)
        return missing

    def _place_run(self, first: int, end: int) -> list[int]:
        """New slots for whole blocks of which none can be written in place."""
        slots = self._map.take(end - first)
        if self._fills.by_block:
            self._fills.poison_range(first, end)
        self._map.place_run(first, slots, self._destager.now_ns)
        return slots

    def _writable_slot(self, block: int, partial: bool) -> int:
        """The slot to write the block to, DIRTY; `partial`: with the block's newest content in it."""
        block_map = self._map
        slot = block_map.where.get(block)
        if slot is not None and block_map.state[slot] == DIRTY:
            return slot
        new = block_map.take(1)[0]
        if slot is None:
            self._fills.poison(block)
        elif partial:
            self._io.copy_slot(slot, new)
        block_map.place(block, new, self._destager.now_ns)
        return new

    # --- discards and zeroes ---

    def _zero(self, what: int, tag: int, sector: int, sectors: int) -> bool:
        """Discard or write zeroes, which differ in nothing but whether the range may stay allocated: what has been
        discarded reads as zeroes, parts of blocks too. False if (the rest of) the request now waits for room.
        """
        kind = what & op.REQUEST_KIND_MASK
        while sectors:
            head = -sector % op.BLOCK_SECTORS
            tail = 0 if sector + sectors == self._size_sectors else (sector + sectors) % op.BLOCK_SECTORS
            if not (head or tail):
                break
            piece = min(head or tail, sectors)
            start = sector if head else sector + sectors - piece
            outcome = self._zero_part((what, tag, sector, sectors, 0), start, piece)
            if outcome is not None:
                return outcome
            sector += piece if head else 0
            sectors -= piece
        if sectors:
            end = (sector + sectors + op.BLOCK_SECTORS - 1) // op.BLOCK_SECTORS
            self._ranges.zero(tag, sector // op.BLOCK_SECTORS, end, kind != op.REQUEST_ZERO)
        else:
            self._acknowledge(tag)
        return True

    def _zero_part(self, request: Parked, sector: int, sectors: int) -> bool | None:
        """Zero a part of a block in RAM; the result is as `_write_piece`'s."""
        block = sector // op.BLOCK_SECTORS
        if block not in self._map.where and not self._fills.take_ready(block):
            return self._park_on_fill(block, request)
        needed = self._pin(block, block + 1)
        if needed and not self._room_for(needed):
            self._room.append(request)
            return False
        slot = self._writable_slot(block, partial=True)
        self._io.zero_slot(slot, sector % op.BLOCK_SECTORS * op.SECTOR_BYTES, sectors * op.SECTOR_BYTES)
        return None

    def _range_done(self, done: Range, result: int) -> None:
        if result == 0:
            self._acknowledge(done.tag)
        elif done.request is not None:
            # From RAM it can be tried again, for as long as it takes.
            if result != AGAIN:
                self._notice_error("write", result)
            what, tag, sector, sectors, _ = done.request
            self._room.append((what & ~op.REQUEST_ALIGNED, tag, sector, sectors, 0))
        else:
            self._notice_error("zero", result)
            self._complete(done.tag, op.STATUS_IOERR)

    # --- reads ---

    def _read(self, tag: int, sector: int, sectors: int, deadline_ns: int) -> None:
        """Each run of blocks from where it is: RAM, a fill in flight, or the backend."""
        if self._io.available() < op.BLOCK_SECTORS:
            self._parked.append((op.REQUEST_READ, tag, sector, sectors, deadline_ns))
            return
        stream = sectors >= STREAM_REQUEST_SECTORS and self._is_stream(sector, sectors)
        bypass = stream or sectors >= self._direct_sectors
        first, end = sector >> 3, (sector + sectors + 7) >> 3
        where, by_block = self._map.where, self._fills.by_block
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
            elif block in where:
                while block < end and block in where:
                    block += 1
                self._copy_out(tag, sector, sectors, start, block)
                self.hits += block - start
            else:
                while block < end and block not in where and block not in by_block:
                    block += 1
                if bypass and start == first and block == end and not self._timeout_ns:
                    self.misses += end - first
                    self._alone[tag] = sector << 16 | sectors
                    self._io.read_request(tag, sector * op.SECTOR_BYTES, sectors * op.SECTOR_BYTES)
                    return
                self._fetch(job, sector, sectors, start, block, bypass)
                self.misses += block - start
        if job.parts == 0:
            self._operations.append(op.COMPLETE | tag << 8)
        else:
            self._limit(job)

    def _fetch(self, job: ReadJob, sector: int, sectors: int, first: int, end: int, bypass: bool) -> None:
        """Blocks that only the backend has: through slots, so that they stay, or, if RAM has no room or nothing to
        gain, directly."""
        if not bypass or self._timeout_ns:  # what is read into guest memory cannot be abandoned
            fill_first, fill_end = self._fill_range(first, end)
            if self._room_for(fill_end - fill_first):
                fill = self._fills.begin(fill_first, self._map.take(fill_end - fill_first))
                self._join(job, fill, sector, sectors, first, end)
                return
        payload, size, skip = self._part_bytes(sector, sectors, first, end)
        read = DirectRead(self, job)
        job.parts += 1
        job.direct += 1
        self._direct[read] = None
        self._io.read_direct(self._io.begin(read), job.tag, payload, first * op.BLOCK_BYTES + skip, size)

    def _is_absent(self, block: int) -> bool:
        # What is being changed past RAM is neither as it was nor as it will be.
        if self._ranges.active and self._ranges.overlaps(block, block + 1):
            return False
        return super()._is_absent(block)

    def _filled(self, request: Parked) -> None:
        if self._ranges.active and self._overlaps_range(request):
            self._parked.append(request)
        else:
            # Ahead of those that wait for room: it came before them, and the block might be evicted again while it
            # waits.
            self._change(*request)
