"""Destaging from the log: an object's dirty blocks to the backend, backend flushes, and what is clean after them.

Owns the staging slots, the objects being written and those written but not flushed. Invariants:
- only what is durable in the log, and known to be so by whoever reads it after a crash, is destaged: if it rots, its
  end is not taken for the log's, with a part of it on the backend already;
- when an older version than the newest stays behind, the object counts as clean only when the newer one is durable;
- one destage an object at a time, so that an older write can never land on a newer one;
- an object is clean below the log address at which its destage began only after a backend flush that was issued when
  all its writes had ended;
- staging slots are set apart at the start, so destaging never waits for what waits for destaging.
Sources are clean slots in RAM, pinned meanwhile, and reads of the log; for what lies between two dirty runs, and for
whole objects, one read of the backend as well: nobody else writes to it. What fails its checksum is not destaged, and
the log says that it is lost (losses.py) before the object counts as clean. Which object is next is choose.py's
business.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from vhostcache import operations as op
from vhostcache.backend_io import BackendIo
from vhostcache.backoff import Trouble
from vhostcache.log import format as fmt
from vhostcache.log.choose import NOBODY, Chooser
from vhostcache.log.depth import GENTLE_BLOCKS, GENTLE_WRITES, Modulator, ObjectsInFlight, Speed
from vhostcache.log.index import LogIndex
from vhostcache.log.losses import Losses
from vhostcache.log.ordered import OrderedQueue
from vhostcache.log.pace import RAMP_BEGIN, RAMP_END
from vhostcache.log.writer import INTERNAL, LogWriter
from vhostcache.map import CLEAN, ORPHAN, PINNED, Map
from vhostcache.readcache import ReadCache

RETRY_FIRST_NS: Final = 100_000_000
EBADMSG: Final = 74
FLUSH: Final = -1
"""In place of an object: the backend flush."""
ZERO_SLOT: Final = 1
"""A slot of zeroes that is never written."""
READ_BLOCKS_MAX: Final = 256
"""Blocks of one log read."""
READS_AT_ONCE: Final = 128
"""Blocks of an object that are read from the log before the next ones are."""
AGED_OBJECTS_MAX: Final = 2
"""Objects in flight only because they are old: nobody waits for them, and the guest may be busy."""
HELD_RETRY_NS: Final = 10_000_000_000
"""An object with blocks that can't be read is looked at again so much later."""
WRITING_NS: Final = 1_000_000_000
"""A log whose head has not moved for so long has nobody who waits for its room."""
REMOTE_NS: Final = 500_000
"""A backend that takes so long for a small write is far away: see `_gap_blocks`."""
SMALL_WRITE_BLOCKS: Final = 16
"""Latency is measured on writes of at most 64 KiB."""
WRITES_AT_ONCE: Final = 16
"""What a backend is taken to do side by side."""
GAP_BLOCKS_MAX: Final = 128


@dataclass(frozen=True, slots=True)
class LogDestageSettings:
    """When and how much to destage."""

    destage_after_ns: int
    """Objects that have not been written for so long are destaged."""
    threshold_blocks: int
    """More log than this between the clean address and the head is destaged without waiting for its age."""
    staging_blocks: int
    """Slots set apart."""
    enabled: bool = True
    """False: nothing is destaged but for want of room, and to drain."""
    objects_max: int = 8
    flush_objects: int = 32
    """Written objects that are worth a backend flush of their own."""
    max_blocks: int = 0
    """Of one write to the backend; 0: any number."""
    preferred_blocks: int = 1
    """What the backend writes best."""
    whole_objects: bool = False
    """The backend wants an object as a whole, once: what is not dirty of it is read from the backend first."""


class LogDestage:
    """One object on its way."""

    __slots__ = (
        "_destager",
        "address",
        "again",
        "began_ns",
        "blocks",
        "bridged",
        "count",
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
        "slots",
        "small",
        "span",
        "span_slots",
        "staged",
        "unreadable",
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
        self.zeroes: list[int] = []
        """Blocks that are zero, in ascending order; and those of them that are to stay allocated."""
        self.kept: set[int] = set()
        self.pinned: list[int] = []
        self.staged: list[int] = []
        self.reading: list[int] = []
        """Log addresses that its reads keep from being reused."""
        self.later: list[tuple[list[int], list[int], list[int]]] = []
        """Parts of a read that found rot, to be read again: addresses, blocks, slots."""
        self.span = range(0)
        """Blocks that are read from the backend before, to be written as a whole; and the slots they go to."""
        self.span_slots: list[int] = []
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
        self.unreadable = False
        """Blocks that can't be read were left out: the object does not become clean."""
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


class SpanRead:
    """What the backend has of an object on its way to staging slots; the dirty blocks come over it."""

    __slots__ = ("_destage", "_destager", "_fetch")

    def __init__(self, destager: "LogDestager", destage: LogDestage, fetch: list[tuple[int, int]]) -> None:
        self._destager = destager
        self._destage = destage
        self._fetch = fetch

    def io_done(self, result: int) -> None:
        self._destager.span_read(self._destage, self._fetch, result)


class BackendFlush:
    """A backend flush, and the destages that it covers."""

    __slots__ = ("_destager", "destages")

    def __init__(self, destager: "LogDestager", destages: list[LogDestage]) -> None:
        self._destager = destager
        self.destages = destages

    def io_done(self, result: int) -> None:
        self._destager.flushed(self, result)


class LogDestager:
    """See the module. `schedule` once a turn. `settings` may be replaced at any time."""

    def __init__(
        self,
        block_map: Map,
        cache: ReadCache,
        io: BackendIo,
        index: LogIndex,
        writer: LogWriter,
        losses: Losses,
        settings: LogDestageSettings,
        size_bytes: int,
        notices: list[tuple[str, dict[str, object]]],
        ordered: OrderedQueue | None = None,
    ) -> None:
        self._map = block_map
        self._cache = cache
        self._io = io
        self._index = index
        self._writer = writer
        self._losses = losses
        self.settings = settings
        self.size_bytes = size_bytes
        """Of the disk: the last block may be a part of one."""
        self.notices = notices
        self.ordered = ordered
        """The policy `ordered`; None: `merged`."""
        if ordered is not None:
            index.ordered_below = ordered.done
        self._checkpointing = False
        self._unvouched = False
        """Something waits for that."""
        self._vouching = False
        """A checkpoint has been asked for."""
        """Both superblocks have to know the last step before the next one begins."""
        self.checkpoint: Callable[[Callable[[], None]], None] = _no_checkpoint
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
        """Objects with blocks that can't be read -> when to look again."""
        self.draining = False
        self.stopped = False
        """Nothing new is started."""
        self.trouble = Trouble(notices)
        self._chooser = Chooser(index, self._is_waiting, writer.durable_address)
        self._speed = Speed()
        self._depth = ObjectsInFlight(settings.objects_max, self._speed)
        self._modulator = Modulator()
        self._begun: list[LogDestage] = []
        """Their writes were given to the engine since the time was known last."""
        self._ended: list[LogDestage] = []
        """Their writes have ended since then."""
        self._resting: dict[int, LogDestage] = {}
        """Objects in flight that have more to write."""
        self._head = writer.head
        self._head_ns = 0
        """When it was seen to move last."""
        self._used = 0
        """Blocks between the clean address and the head."""
        self.now_ns = 0
        self._in_turn = False
        """`now_ns` is the time; if not, it is that of an earlier turn."""
        self.counters = {
            "destages": 0,
            "blocks_destaged": 0,
            "blocks_bridged": 0,
            "blocks_read_back": 0,
            "backend_writes": 0,
            "flushes_performed": 0,
        }

    @property
    def _dirty(self) -> bool:
        return bool(self._index.dirty) or (self.ordered is not None and not self.ordered.empty)

    @property
    def settled(self) -> bool:
        """Nothing is dirty or on its way."""
        return not (self._dirty or self.busy)

    @property
    def busy(self) -> bool:
        """Anything is on its way."""
        return bool(self.in_flight or self._written or self._flushing or self._flushed)

    def statistics(self) -> dict[str, int]:
        """Counters, and levels now."""
        return {
            **self.counters,
            "backend_failures": self.trouble.failures,
            "backend_held": self.trouble.held,
            "objects_in_flight": len(self.in_flight),
            "objects_limit": self._depth.limit,
            "backend_latency_us": self._speed.latency_ns // 1000,
            "backend_blocks_per_s": self._speed.blocks_per_s,
        }

    def set_objects_max(self, objects_max: int) -> None:
        """The most objects in flight."""
        self._depth.set_most(objects_max)

    # --- what, when ---

    def schedule(self, now_ns: int) -> int:
        """Start what is to be started; returns the time at which to look again, in ns."""
        self.now_ns = now_ns
        self._in_turn = True
        deadline_ns = self._schedule(now_ns)
        self._in_turn = False
        if any(destage.rotten for destage in self._flushed):
            deadline_ns = min(deadline_ns, now_ns + RETRY_FIRST_NS)  # there was no room to say so
        return deadline_ns

    def _schedule(self, now_ns: int) -> int:
        if self._begun or self._ended:
            self._measure()
        if self._flushed:
            self._finish(self._flushed)
        if not (self._dirty or self.busy):
            return op.NEVER
        self._modulate()
        deadline_ns = self._go_on() if self._resting else op.NEVER
        if now_ns < self.trouble.at_ns:
            return min(deadline_ns, self.trouble.at_ns)
        if self._dirty and not self.stopped and len(self._staging) >= self._staging_wanted:
            deadline_ns = min(deadline_ns, self._start_due() if self.ordered is None else self._start_ordered())
        if self._written and self._flushing is None and self._flush_is_due():
            again_ns = self.trouble.own_ns(FLUSH)
            if now_ns >= again_ns:
                self._start_flush()
            else:
                deadline_ns = min(deadline_ns, again_ns)
        return deadline_ns

    def _measure(self) -> None:
        """What has begun and ended since the last turn did so now: nobody has looked at a clock before."""
        now_ns = self.now_ns
        for destage in self._ended:
            took_ns = now_ns - destage.began_ns if destage.began_ns else 0
            if destage.small and took_ns:
                self._speed.answered(took_ns * WRITES_AT_ONCE // max(WRITES_AT_ONCE, destage.small))
            if destage.pieces:
                destage.resting_ns = now_ns + int(took_ns * (1.0 - self._modulator.share))
            else:
                full = len(self.in_flight) + 1 >= self._depth.limit and self._modulator.share >= 1.0
                self._depth.ended(len(destage.blocks), destage.count, now_ns, full)
        self._ended = []
        for destage in self._begun:
            destage.began_ns = now_ns
        self._begun = []
        if (not self.in_flight and self._depth.limit > 1) or self._modulator.share < 1.0:
            self._depth.pause()

    def _modulate(self) -> None:
        writer, now_ns = self._writer, self.now_ns
        if writer.head != self._head:
            self._head = writer.head
            self._head_ns = now_ns
        self._used = writer.head - self._index.clean_below(writer.durable_address)
        if self.draining or self.stopped or writer.space_wanted:
            pressure = 1.0
        elif now_ns - self._head_ns >= WRITING_NS:
            pressure = 0.0
        else:
            pressure = (self._used / writer.ring_blocks - RAMP_BEGIN) / (RAMP_END - RAMP_BEGIN)
        self._modulator.update(self._io.reads, pressure, now_ns)

    def _go_on(self) -> int:
        """Objects in flight that have more to write, and have rested."""
        deadline_ns = op.NEVER
        for destage in list(self._resting.values()):
            if self.now_ns < destage.resting_ns and self._modulator.share < 1.0:
                deadline_ns = min(deadline_ns, destage.resting_ns)
            else:
                del self._resting[destage.number]
                self._write_some(destage)
        return deadline_ns

    def _start_due(self) -> int:
        settings, now_ns = self.settings, self.now_ns
        self._unvouched = False
        self._chooser.look(now_ns, self._writer.durable_address, settings.destage_after_ns)
        most = 1 if self.trouble.probing else self._modulator.objects(self._depth.limit)
        waiting = len(self.in_flight) + len(self._held) + len(self._written) + len(self._flushed)
        waiting += len(self._flushing.destages) if self._flushing else 0
        if self._is_pressed():
            if len(self.in_flight) >= most:
                return self._modulator.deadline_ns() if most < self._depth.limit and self._modulator.busy else op.NEVER
            room = not (self.draining or self._writer.space_wanted) and (
                self._used < self._writer.ring_blocks * RAMP_BEGIN
            )
            number = self._chooser.pressed(settings.destage_after_ns, settings.whole_objects, waiting, room)
            if number == NOBODY:
                self._ask_for_vouching()
                return op.NEVER if self.in_flight else now_ns + RETRY_FIRST_NS
            # One a turn: to find its blocks and read them takes a millisecond or two.
            return now_ns if self._start(number) else op.NEVER
        if not settings.enabled:
            return op.NEVER
        if len(self.in_flight) >= min(most, AGED_OBJECTS_MAX):
            return op.NEVER
        number, again_ns = self._chooser.aged(settings.destage_after_ns, settings.whole_objects, waiting)
        if number == NOBODY:
            self._ask_for_vouching()
            return again_ns
        return now_ns if self._start(number) else op.NEVER

    def _ask_for_vouching(self) -> None:
        """There is nothing to destage but what only we know to be durable: the superblocks are to say so. While the
        guest writes on, its next records do."""
        if self._unvouched and not self._vouching and self._writer.vouched_address < self._writer.durable_address:
            self._vouching = True
            self.checkpoint(self._vouched)

    def _vouched(self) -> None:
        self._vouching = False

    def _is_pressed(self) -> bool:
        return self.draining or bool(self._writer.space_wanted) or self._is_crowded()

    def _is_crowded(self) -> bool:
        return self.settings.enabled and self._used > self.settings.threshold_blocks

    def _start_ordered(self) -> int:
        """Go on with the step under way, or begin the next one if it is due."""
        queue, now_ns = self.ordered, self.now_ns
        assert queue is not None
        if self._checkpointing:
            return op.NEVER
        pressed = self._is_pressed()
        if not queue.running:
            if queue.empty or not (pressed or self.settings.enabled):
                return op.NEVER
            due_ns = queue.since_ns + self.settings.destage_after_ns
            if not pressed and now_ns < due_ns:
                return due_ns
            self._unvouched = queue.first_end > self._writer.vouched_address
            if self._unvouched:
                self._ask_for_vouching()
                return op.NEVER
            queue.begin()
        if not queue.gather(self._writer.vouched_address):
            return now_ns
        if not queue.pending:
            if not self.busy:
                self._end_step()
                return now_ns
            return op.NEVER
        most = 1 if self.trouble.probing else self._modulator.objects(self._depth.limit)
        if len(self.in_flight) >= (most if pressed else min(most, AGED_OBJECTS_MAX)):
            return op.NEVER
        number = next((number for number in queue.pending if not self._is_waiting(number)), NOBODY)
        if number == NOBODY:
            return op.NEVER if self.in_flight else now_ns + RETRY_FIRST_NS
        return now_ns if self._start(number) else op.NEVER

    def _end_step(self) -> None:
        """All of it has been flushed on the backend: the superblocks are told, then the next one may begin."""
        queue = self.ordered
        assert queue is not None
        self._checkpointing = not queue.is_empty_step
        self._index.ordered(queue.finish(), queue.done)
        if self._checkpointing:
            self.checkpoint(self._checkpointed)

    def _checkpointed(self) -> None:
        self._checkpointing = False

    def _flush_is_due(self) -> bool:
        if self.ordered is not None:
            return not self.in_flight and (self.stopped or not self.ordered.pending)
        if (
            self._writer.space_wanted
            or self.draining
            or self.stopped
            or len(self._written) >= self.settings.flush_objects
        ):
            return True
        return not self.in_flight

    # --- one destage ---

    def _is_waiting(self, number: int) -> bool:
        """Whether the object can't be destaged now: it is on its way, or something of it has just failed."""
        if number in self.in_flight or self._held.get(number, 0) > self.now_ns:
            return True
        if self.ordered is None and self._index.dirty.get(number, 0) >= self._writer.vouched_address:
            self._unvouched = True
            return True
        if self.trouble and self.trouble.waits(number, self.now_ns):
            return True
        ending = self._written + self._flushed + (self._flushing.destages if self._flushing else [])
        return any(number == destage.number for destage in ending)

    def _start(self, number: int) -> bool:
        """False: there are no resources now."""
        if self._io.available() <= 64 or self._writer.blocked:
            return False
        fetch: list[tuple[int, int]] = []
        left = 0
        """From here on it stays dirty."""
        if self.ordered is None:
            vouched = self._writer.vouched_address
            values, unvouched, volatile = self._index.dirty_blocks(number, vouched, self._writer.durable_address)
            destage = LogDestage(self, number, vouched)
            if unvouched:
                left = vouched
            if volatile:
                destage.need_seq = self._writer.accepted_seq
            for block, value in values:
                self._choose_source(destage, block, value, fetch)
        else:
            destage = LogDestage(self, number, self.ordered.done)
            for block, value in self.ordered.values(number):
                self._choose_version(destage, block, value, fetch)
        self._choose_neighbours(destage, fetch)
        slots = len(destage.span) or len(fetch)
        if slots > len(self._staging):
            self._unpin(destage)
            self._staging_wanted = slots
            return False
        self._staging_wanted = 0
        if destage.need_seq:
            self._writer.commit(INTERNAL)
        if self.ordered is None:
            self._index.begin_destage(number, left, self.now_ns)
        else:
            del self.ordered.pending[number]
        self.in_flight[number] = destage
        if destage.span:
            self._read_span(destage, fetch)
        else:
            self._fetch(destage, fetch)
        return True

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

    def _restore(self, number: int) -> None:
        """It has to be destaged again."""
        if self.ordered is None:
            self._index.restore(number, self.now_ns)
        else:
            self.ordered.pending[number] = None

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
        """How many clean blocks may be written to save one write: half of what is transferred in the share of time that
        a small write takes of the backend, or what fills up the backend's own unit. 0: the backend is near."""
        latency_ns = self._speed.latency_ns
        if latency_ns < REMOTE_NS:
            return 0
        blocks = latency_ns * self._speed.blocks_per_s // (2 * WRITES_AT_ONCE * 1_000_000_000)
        return min(GAP_BLOCKS_MAX, max(blocks, self.settings.preferred_blocks - 1))

    def _choose_neighbours(self, destage: LogDestage, fetch: list[tuple[int, int]]) -> None:
        """Fill small gaps between dirty runs with what the cache has; or read the backend, for a whole object or where
        that takes less than half as long as so many writes."""
        blocks = sorted([*destage.blocks, *(block for block, _ in fetch)])
        if not blocks:
            return
        if self.settings.whole_objects:
            self._choose_units(destage, blocks)
            return
        gap_blocks = self._gap_blocks()
        if not gap_blocks or blocks[-1] - blocks[0] == len(blocks) - 1:
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
        if (runs - 1) * latency_ns // WRITES_AT_ONCE > 2 * (2 * latency_ns + transfer_ns):
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

    def _unit_blocks(self) -> int:
        """What a backend that wants whole objects has to be given as a whole: its own unit, if that is smaller."""
        preferred = self.settings.preferred_blocks
        return preferred if 1 < preferred < self._map.object_blocks else self._map.object_blocks

    def _choose_units(self, destage: LogDestage, blocks: list[int]) -> None:
        """Complete each unit of which something is dirty; one that is wholly zero stays that."""
        unit, end = self._unit_blocks(), -(-self.size_bytes // op.BLOCK_BYTES)
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

    def _read_span(self, destage: LogDestage, fetch: list[tuple[int, int]]) -> None:
        span = destage.span
        destage.span_slots = destage.staged = self._staging[-len(span) :]
        del self._staging[-len(span) :]
        self.counters["blocks_read_back"] += len(span)
        offset = span.start * op.BLOCK_BYTES
        size = min(len(span) * op.BLOCK_BYTES, self.size_bytes - offset)
        self._keep_readable(destage, fetch)
        self._io.read(self._io.begin(SpanRead(self, destage, fetch)), offset, size, destage.span_slots)
        self._io.reads -= 1  # not for the guest

    def span_read(self, destage: LogDestage, fetch: list[tuple[int, int]], result: int) -> None:
        """The backend has been read."""
        if result < 0:
            self._release_reading(destage)
            self._give_up(destage, "read", result)
            return
        self.trouble.succeeded(destage.number)
        self._fetch(destage, fetch)

    # --- from the log ---

    def _keep_readable(self, destage: LogDestage, fetch: list[tuple[int, int]]) -> None:
        if fetch and not destage.reading:
            oldest = min(address for _, address in fetch)
            reading = self._writer.reading
            destage.reading.append(oldest)
            reading[oldest] = reading.get(oldest, 0) + 1

    def _fetch(self, destage: LogDestage, fetch: list[tuple[int, int]]) -> None:
        """Read from the log, neighbours at once; then write."""
        if not fetch:
            self._write(destage)
            return
        self._keep_readable(destage, fetch)
        fetch.sort(key=lambda pair: pair[1])
        count = len(fetch)
        if destage.span:
            first = destage.span.start
            slots = [destage.span_slots[block - first] for block, _ in fetch]
        else:
            slots = destage.staged = self._staging[-count:]
            del self._staging[-count:]
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
            if not self._index.is_clean(read.blocks[0], read.addresses[0]):
                destage.rotten.append((read.blocks[0], read.addresses[0]))
            self.notices.append(("log-corrupt", {"offset": read.blocks[0] * op.BLOCK_BYTES}))
        else:
            # Not a reason to keep writes waiting: a bad sector stays bad.
            destage.unreadable = True
            self._writer.counters["log_failures"] += 1
            self.notices.append(("log-unreadable", {"operation": "destage", "errno": -result}))
        if result:
            destage.span = range(0)  # what the backend had there may have been overwritten in the slots
            destage.bridged = 0
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

    # --- to the backend ---

    def _write(self, destage: LogDestage) -> None:
        """All sources are there: to the backend."""
        if destage.span:
            first = destage.span.start
            destage.blocks += destage.missing
            destage.slots += [destage.span_slots[block - first] for block in destage.missing]
        if not (destage.blocks or destage.zeroes):
            self._end_write(destage)
            self._written.append(destage)
            return
        order = sorted(range(len(destage.blocks)), key=destage.blocks.__getitem__)
        blocks = destage.blocks = [destage.blocks[i] for i in order]
        slots = destage.slots = [destage.slots[i] for i in order]
        most = self.settings.max_blocks or len(blocks) + len(destage.zeroes)
        if self._modulator.gentle:
            most = min(most, GENTLE_BLOCKS)
        if self.settings.whole_objects:
            unit = self._unit_blocks()
            most = max(unit, most // unit * unit)
        pieces = [(blocks[start], end - start, slots[start:end], False) for start, end in _runs(blocks, most)]
        kept = destage.kept
        for may_unmap in (True, False) if kept else (True,):
            zeroes = [block for block in destage.zeroes if (block in kept) != may_unmap] if kept else destage.zeroes
            pieces += [(zeroes[start], end - start, [], may_unmap) for start, end in _runs(zeroes, len(zeroes))]
        pieces.reverse()
        destage.pieces = pieces
        self._write_some(destage)

    def _write_some(self, destage: LogDestage) -> None:
        """All that there is to write, or a few pieces of it while the guest reads the backend."""
        pieces = destage.pieces
        if self._modulator.gentle:
            pieces, destage.pieces = pieces[-GENTLE_WRITES:], pieces[:-GENTLE_WRITES]
        else:
            destage.pieces = []
        group = self._io.begin(destage)
        destage.count += len(pieces)
        if self._in_turn:
            destage.began_ns = self.now_ns
        else:
            self._begun.append(destage)
        largest = 0
        for first, count, slots, may_unmap in reversed(pieces):
            offset = first * op.BLOCK_BYTES
            size = min(count * op.BLOCK_BYTES, self.size_bytes - offset)
            if slots:
                self._io.write(group, offset, size, slots)
                largest = max(largest, count)
            else:
                self._io.zero(group, offset, size, may_unmap)
        destage.small = len(pieces) if 0 < largest <= SMALL_WRITE_BLOCKS else 0
        self.counters["backend_writes"] += len(pieces)

    def _end_write(self, destage: LogDestage) -> None:
        self._unpin(destage)
        self._staging += destage.staged
        destage.staged = []
        del self.in_flight[destage.number]

    def _give_up(self, destage: LogDestage, operation: str, result: int) -> None:
        """It has failed, and is begun anew later."""
        self._end_write(destage)
        self._restore(destage.number)
        self._depth.failed()
        self.trouble.failed(destage.number, operation, result, self.now_ns)

    def written(self, destage: LogDestage, result: int) -> None:
        """Writes of a destage have ended, perhaps not the last ones."""
        if result < 0:
            self.counters["destages"] += 1
            self._give_up(destage, "write", result)
            return
        self._ended.append(destage)
        if destage.pieces:
            self._resting[destage.number] = destage
            return
        self._end_write(destage)
        self.trouble.succeeded(destage.number)
        self.counters["destages"] += 1
        self.counters["blocks_destaged"] += len(destage.blocks) - destage.bridged
        self.counters["blocks_bridged"] += destage.bridged
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
                self._restore(destage.number)
            self._written = []
            for destage in self.in_flight.values():
                destage.again = True
            self.trouble.failed(FLUSH, "flush", result, self.now_ns, everybody=True)
            return
        self.trouble.succeeded(FLUSH)
        self._finish(self._flushed + flush.destages)

    def _finish(self, destages: list[LogDestage]) -> None:
        waiting = []
        for destage in destages:
            if destage.rotten and not destage.again:
                self._record_losses(destage)
            if destage.again:
                self._restore(destage.number)
            elif destage.need_seq > self._writer.durable_seq or destage.rotten:
                waiting.append(destage)
            elif destage.unreadable:
                self._restore(destage.number)
                self._held[destage.number] = self.now_ns + HELD_RETRY_NS
            else:
                self._held.pop(destage.number, None)
                if self.ordered is None:
                    self._index.destaged(destage.number, destage.address)
        self._flushed = waiting

    def _record_losses(self, destage: LogDestage) -> None:
        """As many as there is room for."""
        while destage.rotten:
            seq = self._losses.record(*destage.rotten[-1])
            if seq is None:
                return
            if seq == 0:
                destage.again = True
            destage.need_seq = max(destage.need_seq, seq)
            destage.rotten.pop()


def _no_checkpoint(when_done: Callable[[], None]) -> None:
    when_done()


def _runs(blocks: list[int], most: int) -> list[tuple[int, int]]:
    """Runs of neighbours among blocks in ascending order, of at most so many: (first index, end)."""
    runs = []
    count = len(blocks)
    start = 0
    while start < count:
        first = blocks[start]
        stop = min(count, start + most)
        if blocks[stop - 1] - first == stop - 1 - start:
            end = stop
        else:
            end = start + 1
            while end < stop and blocks[end] - first == end - start:
                end += 1
        runs.append((start, end))
        start = end
    return runs
