"""Destaging: dirty objects to the backend, backend flushes, and the commits that guests wait for.

Owns which objects are being written (`in_flight`), what has been written but not flushed, and the commit that is under
way. Invariants:
- one destage an object at a time, so an older write can never land on a newer one;
- a block is CLEAN only after a backend flush that was issued after its write had completed;
- after a failed flush nothing is assumed: everything it should have covered is written again from RAM first;
- a commit covers every block that was dirty, and every write that was in flight, when it began. Whoever comes later
  waits for the next one: at most one commit runs and one waits, whatever the number of flushes. It never touches the
  map's free slots except to release orphans, and never decides what a guest request means.

A commit begins with `commit_need`: for each object the serial number of the first destage that satisfies it.
"""

from collections import deque
from dataclasses import dataclass, replace
from typing import Final

from vhostcache import operations as op
from vhostcache.backend_io import BackendIo
from vhostcache.backoff import HINTS, Backoff
from vhostcache.map import CLEAN, ORPHAN, WRITING, WRITTEN, Map
from vhostcache.readcache import ReadCache

FLUSH: Final = -1


@dataclass(frozen=True, slots=True)
class DestageSettings:
    """When and how much to destage."""

    destage_after_ns: int
    """Dirty data older than this is destaged without a flush."""
    threshold_blocks: int
    """More dirty blocks than this are destaged without waiting for their age."""
    objects_max: int = 8
    """Objects in flight: enough to keep a device busy with scattered blocks."""
    blocks_max: int = 8192
    """Blocks in flight (32 MiB): enough for whole objects, and bounds what an overwrite may have to copy."""
    flush_blocks: int = 4096
    """Written blocks (16 MiB) that are worth a backend flush of their own, so that they become evictable."""
    durable: bool = True
    """False: written counts as durable (cache mode unsafe)."""


class Destage:
    """One object on its way to the backend."""

    __slots__ = ("_destager", "blocks", "flush_failures", "number", "serial", "slots")

    def __init__(self, destager: "Destager", number: int, serial: int, blocks: list[int], slots: list[int]) -> None:
        self._destager = destager
        self.flush_failures = destager.flush_failures
        self.number = number
        self.serial = serial
        self.blocks = blocks
        self.slots = slots

    def io_done(self, result: int) -> None:
        self._destager.destaged(self, result)


class BackendFlush:
    """A backend flush, and what it will have made durable."""

    __slots__ = ("_destager", "commits", "direct", "parity", "slots", "zeroes")

    def __init__(
        self, destager: "Destager", parity: int, slots: list[int], zeroes: list[tuple[int, int, bool]], commits: bool
    ) -> None:
        self._destager = destager
        self.parity = parity
        self.slots = slots
        self.zeroes = zeroes
        self.commits = commits
        self.direct = False

    def io_done(self, result: int) -> None:
        self._destager.flushed(self, result)


class Destager:
    """See the module. The owner calls `schedule()` once a turn; it starts what is to be started."""

    __slots__ = (
        "_backoff",
        "_cache",
        "_commit_waiters",
        "_failing",
        "_io",
        "_locked",
        "_map",
        "_next_waiters",
        "_parity",
        "_running",
        "_serial",
        "_settings",
        "_threshold_blocks",
        "_unflushed",
        "_unflushed_direct",
        "_unflushed_zeroes",
        "_urgent",
        "_written",
        "blocks_in_flight",
        "commit_need",
        "committing",
        "completed",
        "counters",
        "error",
        "failed",
        "flush_failures",
        "held",
        "in_flight",
        "lost_zeroes",
        "notices",
        "now_ns",
        "rezeroing",
        "room_wanted",
        "size_bytes",
    )

    def __init__(
        self, block_map: Map, cache: ReadCache, io: BackendIo, settings: DestageSettings, size_bytes: int
    ) -> None:
        self._map = block_map
        self._cache = cache
        self._io = io
        self._settings = settings
        self.size_bytes = size_bytes
        """Of the disk: the last block may be a part of one."""
        self._threshold_blocks = settings.threshold_blocks
        self.in_flight: dict[int, Destage] = {}
        self.blocks_in_flight = 0
        self._serial = 0
        self._urgent: deque[int] = deque()
        self.committing = False
        self.commit_need: dict[int, int] = {}
        self._commit_waiters: list[int] = []
        self._next_waiters: list[int] = []
        self.completed: list[int] = []
        """Tags whose commit has succeeded, for the owner to complete."""
        self._parity = 0
        self._written: list[int] = []
        """Slots that were written since the last backend flush was issued."""
        self._unflushed = False
        """Anything has been written or zeroed since then, also what is superseded in RAM by now."""
        self._unflushed_zeroes: list[tuple[int, int, bool]] = []
        self.lost_zeroes: list[tuple[int, int, bool]] = []
        """Ranges of blocks zeroed before a flush that failed, for the owner to zero again; until it has, commits
        wait."""
        self.flush_failures = 0
        """A write or zeroing that was in flight when a flush failed may be lost, even if it ends well."""
        self.rezeroing = 0
        """Of those, the ranges the owner is zeroing again now."""
        self._running: BackendFlush | None = None
        self._failing: set[int] = set()
        """Objects whose last destage failed; FLUSH stands for the backend flush."""
        self._locked: dict[int, int] = {}
        self._backoff = Backoff()
        self.error = 0
        """The errno of the last failure; 0: all that has failed has succeeded since."""
        self.held = 0
        """The errno that only a person can end; 0: none."""
        self.now_ns = 0
        self._unflushed_direct = False
        """Something past RAM has been written since the last backend flush was issued."""
        self.failed: list[int] = []
        """Tags whose commit has failed for good: something it covers was written past RAM, and its flush has failed."""
        self.room_wanted = False
        """The owner has writes waiting for free slots."""
        self.notices: list[tuple[str, dict[str, object]]] = []
        self.counters = {"destages": 0, "blocks_destaged": 0, "flushes_performed": 0, "backend_failures": 0}

    # --- commits ---

    def commit(self, tag: int) -> None:
        """Complete `tag` (it turns up in `completed`) once everything dirty or in flight now is durable on the
        backend."""
        self._next_waiters.append(tag)

    def drop_waiters(self) -> list[int]:
        """The tags that wait for commits, which forget them."""
        tags = self._commit_waiters + self._next_waiters
        self._commit_waiters = []
        self._next_waiters = []
        return tags

    @property
    def settled(self) -> bool:
        """Nothing is dirty, in flight, or written but not flushed."""
        return not (
            self._map.dirty or self.in_flight or self._unflushed or self._running or self.lost_zeroes or self.rezeroing
        )

    def _begin_commit(self) -> None:
        self._commit_waiters = self._next_waiters
        self._next_waiters = []
        if self.settled:
            self._end_commit()
            return
        self.committing = True
        self._need_everything()

    def _need_everything(self) -> None:
        need = {number: destage.serial for number, destage in self.in_flight.items()}
        need.update(dict.fromkeys(self._map.dirty, self._serial + 1))
        self.commit_need = need
        self._urgent = deque(self._map.dirty)

    def widen_commit(self) -> None:
        """What the commit was to make durable has been superseded by newer content: that has to be durable instead."""
        if self.committing:
            self._need_everything()

    def _end_commit(self) -> None:
        self.completed += self._commit_waiters
        self._commit_waiters = []
        self.committing = False

    def _satisfy(self, number: int, serial: int) -> None:
        """A destage of the object has ended well (or, with serial 0, its state has changed otherwise)."""
        need = self.commit_need.get(number)
        if need is None:
            return
        dirty = number in self._map.dirty
        if serial >= need or not (dirty or number in self.in_flight):
            del self.commit_need[number]
        elif dirty:
            self._urgent.append(number)

    # --- what to destage, when ---

    def hurry(self, on: bool) -> None:
        """Destage whatever is dirty without waiting for its age, or as configured."""
        self._settings = replace(self._settings, threshold_blocks=0 if on else self._threshold_blocks)

    def schedule(self, now_ns: int) -> int:
        """Start what is to be started; returns the time at which to look again, in ns."""
        self.now_ns = now_ns
        block_map = self._map
        settings = self._settings
        if (
            block_map.dirty_blocks <= settings.threshold_blocks
            and len(self._written) < settings.flush_blocks
            and not (self.in_flight or self.committing or self._next_waiters or self.room_wanted or self._failing)
        ):
            # The usual case of a busy guest: nothing to do before the oldest block is old.
            if not block_map.dirty:
                if not self._written:
                    return op.NEVER
            else:
                deadline_ns = block_map.since_ns[next(iter(block_map.dirty))] + settings.destage_after_ns
                if now_ns < deadline_ns:
                    return deadline_ns
        if self._next_waiters and not self.committing:
            self._begin_commit()
        if now_ns < self.retry_at_ns:
            return self.retry_at_ns
        if self._urgent:
            self._start_urgent()
        if block_map.dirty:
            if block_map.dirty_blocks > settings.threshold_blocks or self.room_wanted:
                self._start_background()
            elif not self.in_flight:
                self._start_aged()
        if self._running is None:
            self._flush_if_due()
            if self._next_waiters and not self.committing:
                return self.schedule(now_ns)
        if block_map.dirty and not self.in_flight:
            oldest = next(iter(block_map.dirty))
            if oldest not in self._locked:
                return block_map.since_ns[oldest] + settings.destage_after_ns
        return op.NEVER

    def _may_start(self) -> bool:
        return (
            len(self.in_flight) < self._settings.objects_max
            and self.blocks_in_flight < self._settings.blocks_max
            and self._io.available() > 64
        )

    def _start_urgent(self) -> None:
        urgent, dirty = self._urgent, self._map.dirty
        while urgent and self._may_start():
            number = urgent.popleft()
            if number in dirty and number not in self.in_flight and number not in self._locked:
                self._start(number)

    def _start_background(self) -> None:
        """Wholly dirty objects first, then the oldest."""
        block_map = self._map
        threshold = self._settings.threshold_blocks
        for candidates in (block_map.full, block_map.dirty):
            while (block_map.dirty_blocks > threshold or self.room_wanted) and self._may_start():
                number = next((n for n in candidates if n not in self.in_flight and n not in self._locked), None)
                if number is None:
                    break
                self._start(number)

    def _start_aged(self) -> None:
        dirty, since = self._map.dirty, self._map.since_ns
        limit_ns = self.now_ns - self._settings.destage_after_ns
        for number in dirty:
            if since[number] > limit_ns:
                break
            if number not in self._locked:
                self._start(number)
                break

    def _start(self, number: int) -> None:
        self._serial += 1
        blocks = self._map.take_dirty(number)
        where = self._map.where
        slots = [where[block] for block in blocks]
        destage = Destage(self, number, self._serial, blocks, slots)
        self.in_flight[number] = destage
        self.blocks_in_flight += len(blocks)
        self._write_runs(self._io.begin(destage), blocks, slots)

    def _write_runs(self, group: int, blocks: list[int], slots: list[int]) -> None:
        """One write for each run of neighbouring blocks; the volume's last block may be a part of one."""
        size_bytes = self.size_bytes
        write = self._io.write
        count = len(blocks)
        start = 0
        if blocks[-1] - blocks[0] == count - 1:
            start = count
            offset = blocks[0] * op.BLOCK_BYTES
            write(group, offset, min(count * op.BLOCK_BYTES, size_bytes - offset), slots)
        while start < count:
            first = blocks[start]
            end = start + 1
            while end < count and blocks[end] - first == end - start:
                end += 1
            offset = first * op.BLOCK_BYTES
            write(group, offset, min((end - start) * op.BLOCK_BYTES, size_bytes - offset), slots[start:end])
            start = end

    # --- what comes back ---

    def destaged(self, destage: Destage, result: int) -> None:
        """All writes of a destage have ended."""
        del self.in_flight[destage.number]
        self.blocks_in_flight -= len(destage.blocks)
        self.counters["destages"] += 1
        if result < 0 or destage.flush_failures != self.flush_failures:
            self._undo(destage)
            if result < 0:
                self._failed(destage.number, "write", result)
            self._satisfy(destage.number, 0)
            return
        self._succeeded(destage.number)
        self.counters["blocks_destaged"] += len(destage.blocks)
        state, release = self._map.state, self._map.release
        if self._settings.durable:
            self._unflushed = True
            written = WRITTEN + self._parity
            append = self._written.append
            for slot in destage.slots:
                if state[slot] == WRITING:
                    state[slot] = written
                    append(slot)
                else:
                    assert state[slot] == ORPHAN
                    release(slot)
        else:
            for slot in destage.slots:
                if state[slot] == WRITING:
                    state[slot] = CLEAN
                    self._cache.admit(slot)
                else:
                    release(slot)
        self._satisfy(destage.number, destage.serial)

    def _undo(self, destage: Destage) -> None:
        block_map = self._map
        for block, slot in zip(destage.blocks, destage.slots, strict=True):
            if block_map.state[slot] == WRITING:
                block_map.mark_dirty(block, slot, self.now_ns)
            else:
                block_map.release(slot)

    def _flush_if_due(self) -> None:
        if self.lost_zeroes or self.rezeroing:
            # Until they are zeroed again, around whatever is newer, nothing newer may become clean: it could not be
            # told apart.
            return
        commits = self.committing and not self.commit_need
        if commits and not self._unflushed:
            # A flush of written blocks that was running when the commit began has covered all of it.
            self._end_commit()
            return
        room = self.room_wanted and bool(self._written) and not self._map.free
        idle = bool(self._written) and not (self._map.dirty or self.in_flight)
        if commits or room or idle or len(self._written) >= self._settings.flush_blocks:
            self._start_flush(commits)

    def _start_flush(self, commits: bool) -> None:
        flush = BackendFlush(self, self._parity, self._written, self._unflushed_zeroes, commits)
        flush.direct = self._unflushed_direct
        self._unflushed_direct = False
        self._parity ^= 1
        self._written = []
        self._unflushed = False
        self._unflushed_zeroes = []
        self._running = flush
        self.counters["flushes_performed"] += 1
        self._io.flush(self._io.begin(flush))

    def flushed(self, flush: BackendFlush, result: int) -> None:
        """A backend flush has ended."""
        self._running = None
        state = self._map.state
        covered = WRITTEN + flush.parity
        if result < 0:
            self._lose(flush)
            self._failed(FLUSH, "flush", result)
            if self.committing:
                self._need_everything()
            return
        self._succeeded(FLUSH)
        admit = self._cache.admit
        for slot in flush.slots:
            if state[slot] == covered:
                state[slot] = CLEAN
                admit(slot)
        if flush.commits:
            self._end_commit()

    def _lose(self, flush: BackendFlush) -> None:
        """Everything written or zeroed before a flush failed may be lost, also what ended while it ran and is in flight
        now."""
        state = self._map.state
        for slot in flush.slots + self._written:
            if state[slot] in (WRITTEN, WRITTEN + 1):
                self._map.mark_dirty(self._map.block_of[slot], slot, self.now_ns)
        self._written = []
        self.lost_zeroes += flush.zeroes + self._unflushed_zeroes
        self._unflushed_zeroes = []
        self._unflushed = True
        self.flush_failures += 1
        if flush.direct or self._unflushed_direct:
            self._unflushed_direct = False
            self.failed += self.drop_waiters()

    @property
    def retry_at_ns(self) -> int:
        """Before this nothing is to be tried on the backend."""
        return self._backoff.at_ns

    def set_destage_after(self, destage_after_ns: int) -> None:
        """From now on."""
        self._settings = replace(self._settings, destage_after_ns=destage_after_ns)

    def retry(self) -> None:
        """Somebody says that the backend has been mended: try again at once."""
        self._backoff.succeeded()

    def _failed(self, what: int, operation: str, result: int) -> None:
        """The backend is in trouble: try again later, and later still while anything fails."""
        self.counters["backend_failures"] += 1
        number = self.error = -result
        held = number in HINTS
        if held and number != self.held:
            self.held = number
            self.notices.append(("backend-held", {"operation": operation, "errno": number, "hint": HINTS[number]}))
        elif not self._failing:
            self.notices.append(("backend-error", {"operation": operation, "errno": number}))
        self._failing.add(what)
        self._backoff.failed(self.now_ns, held)

    def _succeeded(self, what: int) -> None:
        if self._failing:
            self._failing.discard(what)
            self._failing -= {
                n for n in self._failing if n != FLUSH and n not in self._map.dirty and n not in self.in_flight
            }
            if not self._failing:
                self._backoff.succeeded()
                self.held = self.error = 0
                self.notices.append(("backend-recovered", {}))

    # --- ranges being zeroed ---

    def lock(self, numbers: range) -> None:
        """Begin no destage of these objects."""
        for number in numbers:
            self._locked[number] = self._locked.get(number, 0) + 1

    def unlock(self, numbers: range) -> None:
        """The reverse of `lock`."""
        for number in numbers:
            left = self._locked[number] - 1
            if left:
                self._locked[number] = left
            else:
                del self._locked[number]
                self._satisfy(number, 0)

    def busy(self, numbers: range) -> bool:
        """Whether a destage of one of these objects is in flight."""
        return any(number in numbers for number in self.in_flight)

    def zeroed(self, first: int, end: int, may_unmap: bool, lost: bool) -> None:
        """A range of blocks has been zeroed on the backend, which the next flush makes durable; `lost`: a flush has
        failed since it was begun."""
        if self._settings.durable:
            self._unflushed = True
            (self.lost_zeroes if lost else self._unflushed_zeroes).append((first, end, may_unmap))

    def written_directly(self, first: int, end: int) -> None:
        """The backend has written blocks from guest memory, which the next flush makes durable. RAM can't repeat it;
        zeroes from before must not be repeated over it."""
        if self._settings.durable:
            self._unflushed = True
            self._unflushed_direct = True
            self.lost_zeroes = _without(self.lost_zeroes, first, end)
            self._unflushed_zeroes = _without(self._unflushed_zeroes, first, end)
            if self._running is not None:
                self._running.zeroes = _without(self._running.zeroes, first, end)

    def zeroing_failed(self, result: int) -> None:
        """Zeroing again what a failed flush may have lost has failed too."""
        self._failed(FLUSH, "zero", result)


def _without(ranges: list[tuple[int, int, bool]], first: int, end: int) -> list[tuple[int, int, bool]]:
    """Ranges of blocks, less those from `first` to `end - 1`."""
    if not any(start < end and first < stop for start, stop, _ in ranges):
        return ranges
    left = []
    for start, stop, may_unmap in ranges:
        if start < min(stop, first):
            left.append((start, min(stop, first), may_unmap))
        if max(start, end) < stop:
            left.append((max(start, end), stop, may_unmap))
    return left
