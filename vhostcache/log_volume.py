"""A volume with a log: what a guest's requests mean when a cache file keeps them.

A change goes to slots of its own, is published in the RAM-tier file, and is acknowledged; the writer appends it to the
log, the destager takes it from there to the backend, the checkpointer moves the log's tail. A flush waits for the log
only. Reads find the newest content in RAM, in the log, or on the backend, in this order. It imports neither os, socket,
threading nor time: engine and clock are handed in.

Invariants:
- a change is acknowledged when its bytes are in slots that the RAM-tier file names, all of it at once, or, in
  write-through, when the record it is in is durable;
- a published slot never changes;
- a request is never split over two records;
- what the index names is not reused in the ring while it is being read.

`requests` is the hot path.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Final

from vhostcache import operations as op
from vhostcache.eviction import Eviction
from vhostcache.fill import GONE, NOBODY, Fill, ReadJob
from vhostcache.guest_requests import (
    STREAM_REQUEST_SECTORS,
    DirectRead,
    GuestRequests,
    Parked,
    VolumeSettings,
)
from vhostcache.log import format as fmt
from vhostcache.log.checkpoint import Checkpointer
from vhostcache.log.destage import LogDestager, LogDestageSettings
from vhostcache.log.index import LogIndex
from vhostcache.log.losses import Losses
from vhostcache.log.ordered import OrderedQueue
from vhostcache.log.pace import Pacer
from vhostcache.log.read_ring import STORED, ReadRing
from vhostcache.log.recovery import Recovered
from vhostcache.log.superblock import WRITE_CACHE_OFF, WRITE_CACHE_ON, WRITE_CACHE_UNKNOWN
from vhostcache.log.writer import LogWriter
from vhostcache.map import CLEAN, DIRTY, FREE, ORPHAN, PINNED, WRITING, Map
from vhostcache.readcache import HITS_MAX

VOLATILE_BLOCKS: Final = 1024
"""With so much accepted and not durable (4 MiB) a fdatasync is worth its while: its slots can be given up then."""
LAST_SHARE: Final = 4
"""What is read in the last quarter of the log is offered to the read cache, for the log will soon be without it."""
ZERO_SLOT: Final = 1
"""A slot of zeroes that is never written."""
CHORES_NS: Final = 500_000
"""While guests keep it busy a volume looks after what they do not wait for at intervals of this."""


@dataclass(frozen=True, slots=True)
class LogVolumeSettings(VolumeSettings):
    """What the core has to know of a volume with a log, besides."""

    tier_entries: int = 1 << 16
    """Capacity of the RAM-tier file's ring of entries."""
    sync_interval_ns: int = 1_000_000_000
    """Acknowledged data is durable at the latest after this."""
    flush_window_ns: int = 0
    """Flushes are gathered for so long."""
    checkpoint_interval_ns: int = 60_000_000_000
    destage: bool = True
    """False: nothing is destaged but for want of room in the log, and to drain."""
    destage_threshold_percent: int = 50
    """More dirty log than this part of the ring is destaged without waiting for its age."""
    max_batched_objects: int = 8
    """The most objects on their way to the backend at once; it is fewer where the backend gains nothing by it."""
    preferred_bytes: int = 0
    """Of the backend: what it writes best, in size and alignment; 0: nobody knows."""
    max_bytes: int = 0
    """Of the backend: the most in one write; 0: any number."""
    ordered: bool = False
    """Policy `ordered`: one flush interval after the other reaches the backend."""
    wants_whole_objects: bool = False
    """Of the backend: what it prefers (nobody knows: an object) is better written as a whole, and once (clusters that
    are compressed)."""
    record_blocks: int = fmt.RECORD_BLOCKS


class LogVolume(GuestRequests):
    """See the module. `recovered` is what recovery has made of the cache file; the engine has its log ready, and the
    crcs of what `eviction`, if there is a read cache, has."""

    def __init__(
        self,
        settings: LogVolumeSettings,
        operations: list[int],
        recovered: Recovered,
        groups: int = op.GROUPS,
        eviction: Eviction | None = None,
    ) -> None:
        block_map = Map(settings.slots, settings.object_bytes // op.BLOCK_BYTES)
        super().__init__(settings, operations, block_map, groups)
        self.settings = settings
        superblock = recovered.superblock
        ring_blocks = recovered.ring_blocks
        usable = settings.slots - op.FIRST_SLOT
        object_blocks = settings.object_bytes // op.BLOCK_BYTES
        assert object_blocks <= usable // 2, "an object has to fit the slots set apart for destaging"
        self._index = LogIndex(block_map.object_shift, recovered.tail_address, recovered.clean_address)
        self._writer = LogWriter(
            block_map,
            self._cache,
            self._io,
            self._index,
            self.notices,
            magic=fmt.record_magic(superblock.uuid),
            epoch=superblock.epoch,
            ring_blocks=ring_blocks,
            head=recovered.head_address,
            tail=recovered.tail_address,
            next_seq=recovered.next_seq,
            record_blocks=settings.record_blocks,
            entries_max=settings.tier_entries,
            volatile_max=max(1, min(VOLATILE_BLOCKS, usable // 4)),
            sync_interval_ns=settings.sync_interval_ns,
            flush_window_ns=settings.flush_window_ns,
        )
        self._losses = Losses(block_map, self._io, self._index, self._writer)
        self._destager = LogDestager(
            block_map,
            self._cache,
            self._io,
            self._index,
            self._writer,
            self._losses,
            LogDestageSettings(
                destage_after_ns=settings.destage_after_ns,
                threshold_blocks=ring_blocks * settings.destage_threshold_percent // 100,
                staging_blocks=max(object_blocks, usable // 8),
                enabled=settings.destage,
                objects_max=settings.max_batched_objects,
                max_blocks=settings.max_bytes // op.BLOCK_BYTES,
                preferred_blocks=settings.preferred_bytes // op.BLOCK_BYTES,
                whole_objects=settings.wants_whole_objects,
            ),
            settings.size_bytes,
            self.notices,
            OrderedQueue(block_map.object_shift, recovered.clean_address) if settings.ordered else None,
        )
        self._checkpointer = Checkpointer(
            self._io, self._writer, self._index, superblock, settings.checkpoint_interval_ns
        )
        self._destager.checkpoint = self._checkpointer.request
        self._pacer = Pacer(ring_blocks)
        self._fills.log_done = self._log_read_done
        self.read_ring: ReadRing | None = None
        if eviction is not None:
            self.read_ring = ReadRing(eviction, ring_blocks, block_map, self._cache, self._io)
            self._writer.dropped = self.read_ring
            self._fills.filled = self._offer
        self.log_hits = 0
        self.read_cache_hits = 0
        self._favourite = NOBODY
        """The tag of the request that may read into RAM while slots are scarce, and the slots it keeps."""
        self._kept: list[int] = []
        self._served = False
        """A guest's requests have been taken, or its flushes answered, since the last tick."""
        self._chores_ns = 0
        """When the chores are due, however busy the guest is."""
        self._closing = False
        self._ends_cold = False
        self.closed = False
        self._swept = 0
        if settings.ordered:
            self._writer.ordered = self._destager.ordered
        self._load(recovered)
        self._recall_write_cache(superblock.write_cache)

    def _load(self, recovered: Recovered) -> None:
        """The index of what the log holds."""
        index, ordered = self._index, self._destager.ordered
        mark = self._writer.mark
        one = fmt.extent(0, 1, fmt.DATA)
        ends = [*(record.address for record in recovered.records[1:]), recovered.head_address]
        for record, end in zip(recovered.records, ends, strict=False):
            mark(record.address, record.seq)
            blocks: list[int] = []
            for word in record.extents:
                if word >> 40 == 1:  # one block of data, which is the usual
                    blocks.append(word ^ one)
                    continue
                block, count, kind = fmt.split_extent(word)
                if kind == fmt.DATA:
                    blocks += range(block, block + count)
                elif kind == fmt.LOST:
                    index.recover_loss(block, block + count, record.address)
                elif kind != fmt.PAD:
                    index.recover_zero(block, block + count, record.address, kind == fmt.ZERO)
            first = record.address + record.header_blocks
            index.recover(blocks, first)
            if ordered is not None:
                zeroes = [word for word in record.extents if fmt.split_extent(word)[2] != fmt.DATA]
                ordered.recover(record.address, first, end, zeroes, blocks)

    def _recall_write_cache(self, state: int) -> None:
        if state == WRITE_CACHE_OFF:
            self._guest_write_cache = False
        elif state == WRITE_CACHE_UNKNOWN:
            self._write_cache_known = False
        self._choose_write_through()

    # --- the daemon's calls ---

    def requests(
        self, what: Sequence[int], tag: Sequence[int], sector: Sequence[int], sectors: Sequence[int], now_ns: int
    ) -> None:
        """One turn's requests: four parallel sequences. Answers go to the operation list, now or later."""
        writer = self._writer
        self.now_ns = writer.now_ns = now_ns
        self._quiescing = False
        self._served = True
        if self._room or self._write_through or writer.blocked or self._pacer.active:
            for request in zip(what, tag, sector, sectors, strict=True):
                self._execute((*request, 0))
            return
        append = self._operations.append
        block_map = self._map
        where, state, free, block_of = block_map.where, block_map.state, block_map.free, block_map.block_of
        find = where.get
        hits = self._cache.hits
        poisonable = self._fills.by_block
        whole = self._whole_blocks
        waiting = self._room
        hit_count = 0
        # How many blocks the open record took when it was asked last, and how many it still surely takes.
        asked = room = 0
        slots: dict[int, int] = {}
        for kind, name, start, count in zip(what, tag, sector, sectors, strict=True):
            if count == 8 and not start & 7:
                block = start >> 3
                code = kind & 255
                if code == 1 and block < whole and not waiting:  # REQUEST_WRITE
                    if not room:
                        writer.published += asked
                        asked = room = writer.room_for_blocks()
                        if room:
                            assert writer.open is not None
                            slots = writer.open.slots
                    slot = (free.pop() if free else self._cache.take_one()) if room else 0
                    if slot:
                        old = find(block)  # after room has been made: perhaps at its cost
                        if old is None:
                            if poisonable:
                                self._fills.poison(block)
                        elif state[old] == DIRTY or state[old] == CLEAN:
                            state[old] = hits[old] = FREE
                            free.append(old)
                        else:
                            state[old] = ORPHAN
                        where[block] = slots[block] = slot
                        block_of[slot] = block
                        state[slot] = DIRTY
                        room -= 1
                        append(21 | name << 8 | slot << 32)  # LOG1
                        continue
                elif code == 0:  # REQUEST_READ
                    old = find(block)
                    if old is not None:
                        hit_count += 1
                        if hits[old] < HITS_MAX:
                            hits[old] += 1
                        append(2 | name << 8 | old << 32)  # OUT1
                        continue
            writer.published += asked - room
            asked = room = 0
            self._execute((kind, name, start, count, 0))
        writer.published += asked - room
        self.hits += hit_count

    def tick(self, now_ns: int) -> int:
        """Once a turn, after everything else: start what can be started. Returns the next deadline in ns."""
        self.now_ns = now_ns
        deadline_ns = op.NEVER
        writer = self._writer
        blocked = writer.blocked
        writer.now_ns = now_ns
        if self._parked and self._io.spare():
            parked, self._parked = self._parked, []
            for request in parked:
                self._execute(request)
        pacer = self._pacer
        if pacer.active or now_ns >= pacer.look_ns:
            pacer.update(writer.head, self._index.clean_below(writer.durable_address), now_ns)
        if self._room:
            self._admit_waiting()
            deadline_ns = min(deadline_ns, pacer.deadline_ns())
        if self._retries or self._deadlines:
            deadline_ns = min(deadline_ns, self._retry_reads(now_ns))
        if self._ahead is not None and self._ahead.held:
            deadline_ns = min(deadline_ns, self._ahead.expire(now_ns))
        if self._draining or self._closing:
            self._advance_end()
        deadline_ns = min(deadline_ns, writer.schedule(now_ns))
        if writer.completed and not self._write_cache_unkept():
            self._complete_flushes()
            self._served = True
            deadline_ns = min(deadline_ns, writer.schedule(now_ns))
        if writer.began:
            # While the device is at it there is time.
            writer.began = False
            deadline_ns = self._chores_ns = now_ns
        elif self._served and now_ns < self._chores_ns and not self._is_pressed():
            deadline_ns = min(deadline_ns, self._chores_ns)
        else:
            deadline_ns = min(deadline_ns, self._do_chores(now_ns))
        self._served = False
        if blocked and not writer.blocked:
            deadline_ns = now_ns  # the device is well again: everything that waited for it is looked at once more
        if self._quiescing:
            self._drop_waiting()
        return deadline_ns

    def _is_pressed(self) -> bool:
        """Whether anybody may be waiting for what the chores bring about."""
        writer = self._writer
        return bool(self._room or self._draining or self._closing or writer.blocked or writer.space_wanted)

    def _do_chores(self, now_ns: int) -> int:
        """What no guest waits for: what is durable enters the index, destaging, checkpoints. Not between a guest's
        request and its answer, nor before its next request, but at the latest after CHORES_NS."""
        writer = self._writer
        deadline_ns = now_ns if writer.absorb() else op.NEVER
        if self._index.lost and not self._checkpointer.closing:
            self._losses.schedule()
        if self._swept != self._checkpointer.count:
            if self._index.sweep():
                deadline_ns = now_ns
            else:
                self._swept = self._checkpointer.count
        deadline_ns = min(deadline_ns, self._destager.schedule(now_ns))
        if self._draining or self._closing:
            self._advance_end()  # what was under way there may have ended
        deadline_ns = min(deadline_ns, self._checkpointer.schedule(now_ns), writer.schedule(now_ns))
        if writer.completed and not self._write_cache_unkept():
            self._complete_flushes()
            deadline_ns = min(deadline_ns, writer.schedule(now_ns))
        writer.began = False
        self._chores_ns = min(deadline_ns, now_ns + CHORES_NS)
        return deadline_ns

    def _complete_flushes(self) -> None:
        completed = self._writer.completed
        for tag in completed:
            self._complete(tag, op.STATUS_OK)
        completed.clear()

    def _advance_end(self) -> None:
        writer, destager, checkpointer = self._writer, self._destager, self._checkpointer
        if not writer.settled:
            writer.commit_soon()
            return
        if self._draining:
            destager.draining = True
            if destager.settled and not self._is_recorded() and not (self._ends_cold or checkpointer.running):
                checkpointer.request()
        if self._closing and not (
            (self._draining and not destager.settled)
            or destager.busy
            or checkpointer.closing
            or checkpointer.running
            or (self.read_ring is not None and self.read_ring.busy)
        ):
            checkpointer.closing = True
            checkpointer.request(self._closed)

    def _closed(self) -> None:
        self.closed = True

    def _is_recorded(self) -> bool:
        """Whether the superblocks say how much of the log is clean."""
        return self._checkpointer.superblock.clean_address >= self._index.clean_below(self._writer.head)

    def drain(self, on: bool = True, then_cold: bool = False) -> None:
        """Begin to destage everything; `drained` says when that has ended. Off: go on as usual. `then_cold`: it is
        closed after that, and one checkpoint says both."""
        self._draining = on
        self._ends_cold = then_cold
        if not on:
            self._destager.draining = False

    def hurry(self, on: bool) -> None:
        """Destage whatever is durable, so that little is left to drain."""
        self._destager.draining = on or self._draining

    @property
    def drained(self) -> bool:
        """Everything accepted and not lost is durable on the backend, the superblocks say so, and nothing waits."""
        return (
            self._destager.settled
            and self._writer.settled
            and (self._ends_cold or self._is_recorded())
            and not (self._room or self._parked or self._io.in_flight)
        )

    @property
    def cache_fails(self) -> bool:
        """The cache device answers with errors, and nothing has gone well since."""
        return self._writer.blocked

    @property
    def log_progress(self) -> tuple[int, ...] | None:
        """How far the log has come; None: it has nothing to do. As long as it stays the same the device is stuck."""
        writer, checkpointer = self._writer, self._checkpointer
        if writer.settled and not checkpointer.running and not writer.blocked:
            return None
        return writer.synced_seq, checkpointer.count

    def close(self, backend_mtime_ns: Callable[[], int], cold: bool = False) -> None:
        """Begin to end: commit, wait for what is on its way, mark the log as closed in good order. Then `closed`. There
        must be no front-end. Dirty data stays in the log. `backend_mtime_ns` is asked when nothing writes to the
        backend any more: by that the next start sees that nobody has. `cold`: after a drain, the image goes into other
        hands, and nothing in the log is to be believed again."""
        self._closing = True
        self._checkpointer.cold = cold
        self._checkpointer.backend_mtime_ns = backend_mtime_ns
        self._destager.stopped = not self._draining

    def grow(self, size_bytes: int, when_done: Callable[[], None]) -> None:
        """The backend is that large now, and stays so whatever happens. `when_done` is called when the superblocks say
        it too, and the disk is."""

        def grown() -> None:
            self._resize(size_bytes)
            self._destager.grow(size_bytes)
            when_done()

        self._checkpointer.backend_size_bytes = size_bytes
        self._checkpointer.request(grown)

    def tune(self, values: Mapping[str, int]) -> None:
        """Change settings, which have been validated, by their names in the configuration; durations in ns."""
        destager = self._destager
        destage = destager.settings
        for name, value in values.items():
            if name == "destage":
                destage = replace(destage, enabled=bool(value))
            elif name == "destage_after":
                destage = replace(destage, destage_after_ns=value)
            elif name == "destage_threshold":
                destage = replace(destage, threshold_blocks=self._writer.ring_blocks * value // 100)
            elif name == "max_batched_objects":
                destager.set_objects_max(value)
            elif name == "sync_interval":
                self._writer.sync_interval_ns = value
            else:
                assert name == "checkpoint_interval"
                self._checkpointer.set_interval(value)
        destager.settings = destage

    def retry(self) -> None:
        """Somebody says that the backend has been mended: what is held is tried again at once."""
        self._destager.retry()

    def set_write_cache(self, enabled: bool) -> None:
        """See GuestRequests. The state outlives the process: no front-end sends it again."""
        super().set_write_cache(enabled)
        self._keep_write_cache(WRITE_CACHE_ON if self._guest_write_cache else WRITE_CACHE_OFF)

    def write_cache_unknown(self) -> None:
        """See GuestRequests."""
        super().write_cache_unknown()
        self._keep_write_cache(WRITE_CACHE_UNKNOWN)

    def _flush(self, tag: int) -> None:
        known = self._write_cache_known
        super()._flush(tag)
        if not known and self._guest_write_cache:
            self._keep_write_cache(WRITE_CACHE_ON)

    def _keep_write_cache(self, state: int) -> None:
        if self._checkpointer.write_cache != state:
            self._checkpointer.write_cache = state
            self._checkpointer.request()

    def _write_cache_unkept(self) -> bool:
        """Whether the superblocks still say that the guest flushes, and it does not any more: who came back after a
        crash would take its writes for volatile. Until they do not, nothing is said to be durable."""
        checkpointer = self._checkpointer
        return checkpointer.superblock.write_cache == WRITE_CACHE_ON and checkpointer.write_cache != WRITE_CACHE_ON

    def statistics(self) -> dict[str, int]:
        """Counters since the start and levels now; blocks are of 4 KiB."""
        block_map, writer, index = self._map, self._writer, self._index
        superblock = self._checkpointer.superblock
        clean = max(superblock.clean_address, index.clean_below(writer.durable_address))
        return {
            "hits": self.hits,
            "misses": self.misses,
            "flushes_received": self.flushes_received,
            "write_through": int(self._write_through),
            "dirty_blocks": writer.head - clean + writer.volatile_blocks,
            "dirty_objects": len(index.dirty) + len(self._destager.in_flight),
            "cached_blocks": len(block_map.where),
            "ram_blocks": block_map.slots - op.FIRST_SLOT,
            "free_blocks": len(block_map.free),
            "evictions": self._cache.evictions,
            "room_waits": self.room_waits,
            "waiting_for_room": len(self._room),
            "log_hits": self.log_hits,
            "read_cache_hits": self.read_cache_hits,
            **(self.read_ring.statistics() if self.read_ring is not None else {}),
            "waiting_for_backend": len(self._retries),
            "read_error": self._reads_failing,
            "read_retries": self.read_retries,
            "read_timeouts": self.read_timeouts,
            **(self._ahead.counters if self._ahead is not None else {}),
            "volatile_blocks": writer.volatile_blocks,
            "log_blocks": writer.ring_blocks,
            "log_used_blocks": writer.head - superblock.tail_address,
            "log_wanted_blocks": writer.space_wanted,
            "log_pace_blocks_per_s": int(self._pacer.rate) if self._pacer.active else 0,
            "log_blocked": int(writer.blocked),
            "log_head": writer.head,
            "log_tail": superblock.tail_address,
            "log_clean": clean,
            "log_durable": writer.durable_address,
            "log_durable_seq": writer.durable_seq,
            "checkpoints": self._checkpointer.count,
            "lost_blocks": sum(map(index.is_lost, index.lost)),
            **self._fills.counters,
            **self._destager.statistics(),
            **writer.counters,
        }

    # --- one request ---

    def _execute(self, request: Parked) -> None:
        what, tag, sector, sectors, payload = request
        kind = what & op.REQUEST_KIND_MASK
        if kind == op.REQUEST_FLUSH:
            self._flush(tag)
        elif kind == op.REQUEST_READ:
            self._read(tag, sector, sectors, payload)
            if self._ahead is not None:
                deep = bool(what & op.REQUEST_DEEP)
                self._ahead.read(sector >> 3, (sector + sectors + 7) >> 3, self.now_ns, deep)
        elif self._room or not self._may_pass(request):
            self._room.append(request)
        elif not self._change(what, tag, sector, sectors, payload):
            self._pacer.give_back(_paced_blocks(request))
            self.room_waits += 1

    def _change(self, what: int, tag: int, sector: int, sectors: int, payload: int) -> bool:
        """A write, discard or write-zeroes; False if it now stands at the end of `_room`."""
        if what & op.REQUEST_KIND_MASK == op.REQUEST_WRITE:
            return self._write((what, tag, sector, sectors, payload))
        return self._zero((what, tag, sector, sectors, payload))

    def _admit_waiting(self) -> None:
        """Let in those that waited for room, in order, while there is some."""
        waiting = self._room
        self._room = type(waiting)()
        while waiting and self._may_pass(waiting[0]):
            request = waiting.popleft()
            if not self._change(*request):
                self._pacer.give_back(_paced_blocks(request))
                break
        self._room += waiting

    def _may_pass(self, request: Parked) -> bool:
        """Whether the log is not so full that this one has to wait a little."""
        return self._pacer.take(_paced_blocks(request))

    def _commit(self, tag: int) -> None:
        self._writer.commit(tag)

    def _drop_waiting(self) -> None:
        super()._drop_waiting()
        self._let_go()

    def _drop_commits(self) -> list[int]:
        writer = self._writer
        completed = writer.completed.copy()
        writer.completed.clear()
        return writer.drop_waiters() + completed

    def _filled(self, request: Parked) -> None:
        # Ahead of those that wait for room: it came before them, and the block might be evicted again while it waits.
        self._change(*request)

    def _retry_filled(self, request: Parked, result: int, on_backend: bool) -> None:
        if result < 0 and self._favourite == request[1]:
            self._let_go()
        super()._retry_filled(request, result, on_backend)

    # --- changes ---

    def _may_fill(self, request: Parked) -> bool:
        """Whether a request may read what it needs into RAM. While slots are scarce only one may at a time, and keeps
        what it has got, so that requests do not evict each other's blocks for ever."""
        if len(self._map.free) > op.BLOCK_SECTORS:
            return True
        if self._favourite == NOBODY:
            self._favourite = request[1]
        return self._favourite == request[1]

    def _keep(self, block: int) -> None:
        slot = self._map.where[block]
        if self._map.state[slot] == CLEAN:
            self._map.state[slot] = PINNED
            self._kept.append(slot)

    def _let_go(self) -> None:
        """The favourite goes on, or has gone."""
        self._cache.unpin(self._kept)
        self._kept = []
        self._favourite = NOBODY

    def _missing_base(self, request: Parked, blocks: Sequence[int]) -> bool | None:
        """Blocks of which only a part is changed need their newest content in RAM, or to be zero. None: they have it.
        Else the request is parked (True) or waits for room (False)."""
        for block in blocks:
            if block in self._map.where or self._fills.take_ready(block):
                if self._favourite == request[1]:
                    self._keep(block)
                continue
            value = self._locate(block)
            if value & 1:
                continue
            fill = self._fills.by_block.get(block)
            if fill is None:
                if not self._io.spare() or not self._may_fill(request) or not self._room_for(1):
                    self._wait(request)
                    return False
                fill = self._begin_fill(block, 1, value >> 1)
            fill.retries.append(request)
            return True
        return None

    def _wait(self, request: Parked) -> None:
        if request[1] == self._favourite:
            self._room.appendleft(request)
        else:
            self._room.append(request)
        self._writer.commit_soon()

    def _take_slots(self, count: int, kept: Sequence[int]) -> list[int]:
        """Slots for a change, or none; the blocks `kept` are not evicted for them."""
        block_map = self._map
        state = block_map.state
        pinned = [slot for slot in map(block_map.where.get, kept) if slot is not None and state[slot] == CLEAN]
        for slot in pinned:
            state[slot] = PINNED
        enough = self._room_for(count)
        for slot in pinned:
            state[slot] = CLEAN
            self._cache.admit(slot)
        return block_map.take(count) if enough else []

    def _write(self, request: Parked) -> bool:
        """False if the request now waits for room."""
        _, tag, sector, sectors, _ = request
        end_sector = sector + sectors
        first, end = sector >> 3, (end_sector + 7) >> 3
        partial = []
        if sector & 7:
            partial.append(first)
        if end_sector & 7 and end_sector != self._size_sectors and (end - 1 not in partial):
            partial.append(end - 1)
        count = end - first
        if not self._writer.take_room(count, 0, count):
            self._wait(request)
            return False
        if partial:
            outcome = self._missing_base(request, partial)
            if outcome is not None:
                return outcome
        slots = self._take_slots(count, partial)
        if not slots:
            self._wait(request)
            return False
        for block in partial:
            self._copy_base(block, slots[block - first])
        if self._favourite == tag:
            self._let_go()
        if end_sector & 7 and end - 1 not in partial:
            self._clear_behind_end(slots[-1])
        self._place_run(first, slots)
        one = fmt.extent(0, 1, fmt.DATA)
        entries = list(chain.from_iterable(zip(range(first | one, end | one), slots, strict=True)))
        self._operations += (
            op.IN | tag << 8 | count << 32,
            (sectors * op.SECTOR_BYTES) << 32,
            sector % op.BLOCK_SECTORS * op.SECTOR_BYTES,
        )
        self._operations += slots
        self._publish(entries)
        self._acknowledge(tag)
        return True

    def _copy_base(self, block: int, slot: int) -> None:
        """What the block has now, before a part of it is changed."""
        old = self._map.where.get(block)
        if old is None:
            assert self._index.lookup(block) & 1
            self._io.zero_slot(slot, 0, op.BLOCK_BYTES)
        else:
            self._io.copy_slot(old, slot)

    def _place(self, block: int, slot: int) -> None:
        """New content in a slot just taken, in the open record."""
        record = self._writer.open
        assert record is not None
        self._replace(block)
        block_map = self._map
        block_map.where[block] = slot
        block_map.block_of[slot] = block
        block_map.state[slot] = DIRTY
        record.slots[block] = slot

    def _place_run(self, first: int, slots: list[int]) -> None:
        """The same for neighbours, many at a time where RAM has nothing of them."""
        block_map, record = self._map, self._writer.open
        where, blocks = block_map.where, range(first, first + len(slots))
        assert record is not None
        start = slots[0]
        if (
            self._fills.by_block
            or slots != list(range(start, start + len(slots)))
            or not where.keys().isdisjoint(blocks)
        ):
            for block, slot in zip(blocks, slots, strict=True):
                self._place(block, slot)
            return
        where.update(zip(blocks, slots, strict=True))
        record.slots.update(zip(blocks, slots, strict=True))
        block_map.block_of[start : start + len(slots)] = array("Q", blocks)
        block_map.state[start : start + len(slots)] = bytes((DIRTY,)) * len(slots)

    def _replace(self, block: int) -> None:
        """What RAM has of the block is old."""
        block_map = self._map
        old = block_map.where.pop(block, None)
        if old is None:
            if self._fills.by_block:
                self._fills.poison(block)
        elif block_map.state[old] in (DIRTY, CLEAN):
            self._cache.hits[old] = 0
            block_map.release(old)
        else:
            assert block_map.state[old] in (WRITING, PINNED)
            block_map.state[old] = ORPHAN

    def _publish(self, entries: list[int]) -> None:
        writer = self._writer
        assert writer.open is not None
        writer.published += len(entries) // 2
        self._io.publish(writer.open.seq, entries)

    def _zero(self, request: Parked) -> bool:
        """Discard or write zeroes, parts of blocks too; False if the request now waits for room."""
        what, tag, sector, sectors, _ = request
        end_sector = sector + sectors
        first, end = (sector + 7) >> 3, end_sector >> 3
        if end_sector == self._size_sectors:
            end = (end_sector + 7) >> 3
        parts: list[tuple[int, int, int]] = []
        """Block, first sector in it, sectors."""
        if sector & 7:
            parts.append((sector >> 3, sector & 7, min(sectors, -sector % 8)))
        if end_sector > end << 3 and end_sector >> 3 >= first:
            parts.append((end_sector >> 3, 0, end_sector & 7))
        changed = [part[0] for part in parts]
        writer = self._writer
        record = writer.open
        kind = fmt.ZERO if what & op.REQUEST_KIND_MASK == op.REQUEST_ZERO else fmt.DISCARD
        other = fmt.ZERO + fmt.DISCARD - kind
        if (
            first < end
            and record is not None
            and (
                # The extent has its header's address, which is older than that of any payload in the record ...
                any(first <= block < end for block in record.slots)
                # ... and says of which kind it is.
                or any(word >> 60 == other for word in record.zeroes)
            )
        ):
            writer.seal()
        if not writer.take_room(len(parts), 1, len(parts) + 1):
            self._wait(request)
            return False
        if changed:
            outcome = self._missing_base(request, changed)
            if outcome is not None:
                return outcome
        slots = self._take_slots(len(parts), changed) if parts else []
        if parts and not slots:
            self._wait(request)
            return False
        if self._favourite == tag:
            self._let_go()
        entries: list[int] = []
        if first < end:
            entries += (self._zero_run(first, end, kind), 0)
        for (block, at, count), slot in zip(parts, slots, strict=True):
            self._copy_base(block, slot)
            self._io.zero_slot(slot, at * op.SECTOR_BYTES, count * op.SECTOR_BYTES)
            self._place(block, slot)
            entries += (block | 1 << 40, slot)
        self._publish(entries)
        self._acknowledge(tag)
        return True

    def _zero_run(self, first: int, end: int, kind: int) -> int:
        """Whole blocks, in the open record. Returns the extent."""
        record = self._writer.open
        assert record is not None
        where = self._map.where
        if len(where) < end - first:
            cached = [block for block in where if first <= block < end]
        else:
            cached = [block for block in range(first, end) if block in where]
        for block in cached:
            self._replace(block)
        self._fills.poison_range(first, end)
        self._index.zero(first, end, record.address, kind == fmt.ZERO)
        word = fmt.extent(first, end - first, kind)
        record.zeroes.append(word)
        return word

    # --- reads ---

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
        return result

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


def _paced_blocks(request: Parked) -> int:
    """What a request counts for the pace: zeroes take no room worth mentioning."""
    return (request[3] + 7) >> 3 if request[0] & op.REQUEST_KIND_MASK == op.REQUEST_WRITE else 1
