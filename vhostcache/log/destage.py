"""Destaging from the log: an object's dirty blocks to the backend, backend flushes, and what is clean after them.

Owns the objects being written and those written but not flushed. Invariants:
- only what is durable in the log, and known to be so by whoever reads it after a crash, is destaged: if it rots, its
  end is not taken for the log's, with a part of it on the backend already;
- when an older version than the newest stays behind, the object counts as clean only when the newer one is durable;
- one destage an object at a time, so that an older write can never land on a newer one;
- an object is clean below the log address at which its destage began only after a backend flush that was issued when
  all its writes had ended.
Which object is next is the business of choose.py, or of ordered.py; where its blocks come from that of sources.py. What
has rotted, or has been given up because it cannot be read (unreadable.py), the log says to be lost (losses.py) before
the object counts as clean.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vhostcache import operations as op
from vhostcache.backend_io import BackendIo
from vhostcache.backoff import Trouble
from vhostcache.log.choose import NOBODY, Chooser
from vhostcache.log.depth import GENTLE_BLOCKS, GENTLE_WRITES, WRITES_AT_ONCE, Modulator, ObjectsInFlight, Speed
from vhostcache.log.index import LogIndex
from vhostcache.log.losses import Losses
from vhostcache.log.ordered import OrderedQueue
from vhostcache.log.pace import RAMP_BEGIN, RAMP_END
from vhostcache.log.sources import LogDestage, Sources
from vhostcache.log.unreadable import ATTEMPTS, RETRY_NS, UnreadableBlocks
from vhostcache.log.writer import INTERNAL, LogWriter
from vhostcache.map import Map
from vhostcache.readcache import ReadCache

RETRY_FIRST_NS: Final = 100_000_000
FLUSH: Final = -1
"""In place of an object: the backend flush."""
RAMP_FLUSHES: Final = 4
"""So many times as many backend flushes while writes are slowed down."""
AGED_OBJECTS_MAX: Final = 2
"""Objects in flight only because they are old: nobody waits for them, and the guest may be busy."""
WRITING_NS: Final = 1_000_000_000
"""A log whose head has not moved for so long has nobody who waits for its room."""
STEP_BLOCKS: Final = 16
"""What a step of a destage costs besides its blocks, in blocks."""
TURN_BLOCKS: Final = 256
"""After steps of so many blocks (some 0.3 ms) guests are looked at again."""
SMALL_WRITE_BLOCKS: Final = 16
"""Latency is measured on writes of at most 64 KiB."""


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
    turn_blocks: int = TURN_BLOCKS
    """Steps of destages in one turn."""
    whole_objects: bool = False
    """The backend wants an object as a whole, once: what is not dirty of it is read from the backend first."""


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
        self.in_flight: dict[int, LogDestage] = {}
        self._written: list[LogDestage] = []
        self._flushing: BackendFlush | None = None
        self._flushed: list[LogDestage] = []
        """Flushed, but a newer version of something is not durable yet."""
        self._held: dict[int, int] = {}
        """Objects with blocks that can't be read -> when to look again."""
        self._device_told_ns = 0
        """Before this it is not said again that the cache device reads nothing."""
        self.draining = False
        self.stopped = False
        """Nothing new is started."""
        self.trouble = Trouble(notices)
        self._others_first = False
        """Of the objects, only those that have not failed are looked at."""
        self._chosen: deque[tuple[LogDestage, list[tuple[int, int]]]] = deque()
        """Their sources are known: what is to be read from the log."""
        self._ready: deque[LogDestage] = deque()
        """All their sources are there."""
        self._chooser = Chooser(index, self._is_waiting, writer.durable_address)
        self._speed = Speed()
        self._unreadable = UnreadableBlocks()
        preferred = settings.preferred_blocks
        unit = preferred if 1 < preferred < block_map.object_blocks else block_map.object_blocks
        self._sources = Sources(
            block_map,
            cache,
            io,
            index,
            writer,
            self._unreadable,
            self._speed,
            notices,
            staging_blocks=settings.staging_blocks,
            size_bytes=size_bytes,
            unit_blocks=unit if settings.whole_objects else 0,
            preferred_blocks=preferred,
            ready=self._ready.append,
            failed=self._read_failed,
        )
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
        self.blocks_turned = 0
        """Log blocks that destaging has done with, each object's share of what was in use."""
        self.counters = {
            "destages": 0,
            "blocks_destaged": 0,
            "blocks_bridged": 0,
            "backend_writes": 0,
            "flushes_performed": 0,
        }

    @property
    def _dirty(self) -> bool:
        return bool(self._index.dirty) or (self.ordered is not None and not self.ordered.empty)

    def grow(self, size_bytes: int) -> None:
        """The disk has become larger."""
        self._sources.size_bytes = size_bytes

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
            "blocks_read_back": self._sources.blocks_read_back,
            "unreadable_blocks": self._unreadable.count,
            "backend_failures": self.trouble.failures,
            "backend_error": self.trouble.error,
            "backend_held": self.trouble.held,
            "objects_in_flight": len(self.in_flight),
            "objects_limit": self._depth.limit,
            "backend_latency_us": self._speed.latency_ns // 1000,
            "backend_write_us": self._speed.write_ns // 1000,
            "backend_blocks_per_s": self._speed.blocks_per_s,
        }

    def retry(self) -> None:
        """Somebody says that it has been mended: whatever waits for its next attempt is tried at once."""
        self.trouble.retry()
        self._held.clear()

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
        left = self._take_steps(self.settings.turn_blocks)
        if left <= 0:
            return now_ns
        if now_ns < self.trouble.at_ns:
            return min(deadline_ns, self.trouble.at_ns)
        if self._dirty and not self.stopped and not self._sources.short:
            deadline_ns = min(deadline_ns, self._start_due() if self.ordered is None else self._start_ordered())
            if self._chosen:
                left -= STEP_BLOCKS + self._chosen[-1][0].considered
                self._take_steps(left)
                if self._ready or self._chosen:
                    return now_ns
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

    def _take_steps(self, left: int) -> int:
        """Objects in flight go on, as far as so many blocks. Returns how many are left for others."""
        while left > 0 and (self._ready or self._chosen):
            if self._ready:
                destage = self._ready.popleft()
                left -= STEP_BLOCKS + len(destage.blocks)
                self._write(destage)
            else:
                destage, fetch = self._chosen.popleft()
                left -= STEP_BLOCKS + len(fetch)
                self._sources.fetch(destage, fetch)
        return left

    def _start_due(self) -> int:
        settings, now_ns = self.settings, self.now_ns
        self._unvouched = False
        self._chooser.look(now_ns, self._writer.durable_address, settings.destage_after_ns)
        most = 1 if self.trouble.probing else self._modulator.objects(self._depth.limit)
        waiting = len(self.in_flight) + len(self._held) + len(self._written) + len(self._flushed)
        waiting += len(self._flushing.destages) if self._flushing else 0
        waiting += self.trouble.failing
        if self._is_pressed():
            if len(self.in_flight) >= most:
                return self._modulator.deadline_ns() if most < self._depth.limit and self._modulator.busy else op.NEVER
            room = not (self.draining or self._writer.space_wanted) and (
                self._used < self._writer.ring_blocks * RAMP_BEGIN
            )
            # After a failure it is the turn of those that have not failed: one success, and all may go on.
            self._others_first = self.trouble.probing
            number = self._chooser.pressed(settings.destage_after_ns, settings.whole_objects, waiting, room)
            if self._others_first:
                self._others_first = False
                if number == NOBODY:
                    number = self._chooser.pressed(settings.destage_after_ns, settings.whole_objects, waiting, room)
            if number == NOBODY:
                self._ask_for_vouching()
                return op.NEVER if self.in_flight else now_ns + RETRY_FIRST_NS
            # One a turn: to find its blocks takes half a millisecond.
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
        if self._writer.space_wanted or self.draining or self.stopped or not self.in_flight:
            return True
        # On the ramp, writes are let in as the log becomes clean: little by little, not in bursts.
        ramp = self._used > self._writer.ring_blocks * RAMP_BEGIN
        return len(self._written) >= (
            self.settings.flush_objects // RAMP_FLUSHES if ramp else self.settings.flush_objects
        )

    # --- one destage ---

    def _is_waiting(self, number: int) -> bool:
        """Whether the object can't be destaged now: it is on its way, or something of it has just failed."""
        if number in self.in_flight or self._held.get(number, 0) > self.now_ns:
            return True
        if self.ordered is None and self._index.dirty.get(number, 0) >= self._writer.vouched_address:
            self._unvouched = True
            return True
        if self.trouble and self.trouble.waits(number, self.now_ns, self._others_first):
            return True
        ending = self._written + self._flushed + (self._flushing.destages if self._flushing else [])
        return any(number == destage.number for destage in ending)

    def _start(self, number: int) -> bool:
        """False: there are no resources now."""
        if self._io.available() <= 64 or self._writer.blocked:
            return False
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
        else:
            values = self.ordered.values(number)
            destage = LogDestage(self, number, self.ordered.done)
        destage.considered = len(values)
        fetch = self._sources.choose(destage, values, exact=self.ordered is not None)
        if fetch is None:
            return False
        if destage.need_seq:
            self._writer.commit(INTERNAL)
        if self.ordered is None:
            self._index.begin_destage(number, left, self.now_ns)
        else:
            del self.ordered.pending[number]
        self.in_flight[number] = destage
        self._chosen.append((destage, fetch))
        return True

    def _restore(self, number: int) -> None:
        """It has to be destaged again."""
        if self.ordered is None:
            self._index.restore(number, self.now_ns)
        else:
            self.ordered.pending[number] = None

    # --- to the backend ---

    def _write(self, destage: LogDestage) -> None:
        """All sources are there: to the backend."""
        if not (destage.blocks or destage.zeroes):
            self._end_write(destage)
            self._written.append(destage)
            return
        order = sorted(zip(destage.blocks, destage.slots, strict=True))
        blocks, slots = destage.blocks, destage.slots = [block for block, _ in order], [slot for _, slot in order]
        most = self.settings.max_blocks or len(blocks) + len(destage.zeroes)
        if self._modulator.gentle:
            most = min(most, GENTLE_BLOCKS)
        unit = self._sources.unit_blocks
        if unit:
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
            size = min(count * op.BLOCK_BYTES, self._sources.size_bytes - offset)
            if slots:
                self._io.write(group, offset, size, slots)
                largest = max(largest, count)
            else:
                self._io.zero(group, offset, size, may_unmap)
        destage.small = len(pieces) if 0 < largest <= SMALL_WRITE_BLOCKS else 0
        self.counters["backend_writes"] += len(pieces)

    def _end_write(self, destage: LogDestage) -> None:
        self._sources.release(destage)
        del self.in_flight[destage.number]

    def _give_up(self, destage: LogDestage, operation: str, result: int) -> None:
        """It has failed, and is begun anew later."""
        self._end_write(destage)
        self._restore(destage.number)
        self._depth.failed()
        self.trouble.failed(destage.number, operation, result, self.now_ns)

    def _read_failed(self, destage: LogDestage, result: int) -> None:
        self._give_up(destage, "read", result)

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
        share = self._used // max(1, len(self._index.dirty) + len(destages))
        for destage in destages:
            if destage.unreadable and not destage.again:
                self._judge(destage)
            if destage.rotten and not destage.again:
                self._record_losses(destage)
            if destage.again:
                self._restore(destage.number)
            elif destage.need_seq > self._writer.durable_seq or destage.rotten:
                waiting.append(destage)
            elif destage.held:
                self._restore(destage.number)
                self._held[destage.number] = self.now_ns + RETRY_NS
            else:
                self._held.pop(destage.number, None)
                self._unreadable.forget(destage.number)
                self.blocks_turned += share
                if self.ordered is None:
                    self._index.destaged(destage.number, destage.address)
        self._flushed = waiting

    def _judge(self, destage: LogDestage) -> None:
        """Of what could not be read: what is given up is lost, as if it had rotted, and all else is tried again."""
        works = destage.device_reads and not self._writer.blocked
        given_up, left = self._unreadable.judge(destage.number, destage.unreadable, works, self.now_ns)
        destage.unreadable = []
        destage.rotten += given_up
        destage.held = bool(left)
        for place in _places([block for block, address in given_up if self._index.lookup(block) == address << 1]):
            self.notices.append(("log-lost", {"errno": destage.errno, **place, "attempts": ATTEMPTS}))
        if not works:
            if self.now_ns < self._device_told_ns:
                return  # of one of the objects that cannot be read
            self._device_told_ns = self.now_ns + RETRY_NS
        for counted in sorted(set(left.values())):
            for place in _places([block for block, attempts in left.items() if attempts == counted]):
                fields = {"errno": destage.errno, **place, "attempts": counted, "of_attempts": ATTEMPTS}
                self.notices.append(("log-unreadable", {"operation": "destage", **fields}))

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


def _places(blocks: list[int]) -> list[dict[str, object]]:
    """Where on the disk they are, for people: neighbours together."""
    blocks = sorted(blocks)
    return [
        {"offset": blocks[start] * op.BLOCK_BYTES, "bytes": (end - start) * op.BLOCK_BYTES}
        for start, end in _runs(blocks, len(blocks))
    ]


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
