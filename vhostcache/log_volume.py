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

`requests` is the hot path; what it does not answer itself goes to log_changes.py and log_reads.py, which this inherits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from vhostcache import operations as op
from vhostcache.eviction import Eviction
from vhostcache.guest_requests import Parked, VolumeSettings
from vhostcache.log import format as fmt
from vhostcache.log.checkpoint import Checkpointer
from vhostcache.log.destage import TURN_BLOCKS, LogDestager, LogDestageSettings
from vhostcache.log.index import LogIndex
from vhostcache.log.losses import Losses
from vhostcache.log.ordered import OrderedQueue
from vhostcache.log.pace import Pacer
from vhostcache.log.read_ring import ReadRing
from vhostcache.log.recovery import Recovered
from vhostcache.log.superblock import WRITE_CACHE_OFF, WRITE_CACHE_ON, WRITE_CACHE_UNKNOWN
from vhostcache.log.writer import LogWriter
from vhostcache.log_changes import LogChanges
from vhostcache.map import CLEAN, DIRTY, FREE, ORPHAN, Map
from vhostcache.readcache import HITS_MAX

VOLATILE_BLOCKS: Final = 1024
"""With so much accepted and not durable (4 MiB) a fdatasync is worth its while: its slots can be given up then."""
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
    turn_blocks: int = TURN_BLOCKS
    """See destage.py."""


class LogVolume(LogChanges):
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
                turn_blocks=settings.turn_blocks,
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
        if eviction is not None:
            self.read_ring = ReadRing(eviction, ring_blocks, block_map, self._cache, self._io)
            self._writer.dropped = self.read_ring
            self._fills.filled = self._offer
        self._served = False
        """A guest's requests have been taken, or its flushes answered, since the last tick."""
        self._chores_ns = 0
        """When the chores are due, however busy the guest is."""
        self._latest_ns = op.NEVER
        """When they are due, however many commits begin."""
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
        simple = not (self._timeout_ns or self._reads_failing)
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
                    if simple and self._read_stored(name, block):
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
            clean = self._index.clean_below(writer.durable_address)
            pacer.update(writer.head, clean, self._destager.blocks_turned, now_ns)
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
        if writer.began and now_ns < self._latest_ns:
            # While the device is at it there is time, unless it has ended again before the next turn, again and again.
            writer.began = False
            deadline_ns = self._chores_ns = now_ns
            self._latest_ns = min(self._latest_ns, now_ns + CHORES_NS)
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
        # Records are not made faster than they enter the index.
        self._latest_ns = now_ns if writer.durable_seq < writer.synced_seq else op.NEVER
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
            "dirty_blocks": writer.head - clean + (len(writer.open.slots) if writer.open else 0),
            "dirty_objects": len(index.dirty) + len(self._destager.in_flight),
            "cached_blocks": len(block_map.where),
            "ram_blocks": block_map.slots - op.FIRST_SLOT,
            "free_blocks": len(block_map.free),
            "evictions": self._cache.evictions,
            "room_waits": self.room_waits,
            "waiting_for_room": len(self._room),
            "log_hits": self.log_hits,
            "log_passed_over_blocks": self.passed_over,
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


def _paced_blocks(request: Parked) -> int:
    """What a request counts for the pace: zeroes take no room worth mentioning."""
    return (request[3] + 7) >> 3 if request[0] & op.REQUEST_KIND_MASK == op.REQUEST_WRITE else 1
