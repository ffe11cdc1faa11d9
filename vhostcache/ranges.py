"""Changes that go to the backend a range at a time, past RAM: discards, zeroes, and large writes when RAM is filling.

Zeroes need no merging (`fallocate`: holes stay holes), and a large write is what merging aims at: it is read by the
backend from guest memory, without a copy. Order is kept by three rules: no destage of an object in the range begins or
is in flight while the range is being changed; requests that overlap it wait; and what RAM holds of the range is dropped
only after the backend has succeeded, so a flush in between still finds the older data. Owns the ranges being changed.
"""

from collections.abc import Callable
from typing import Final

from vhostcache import operations as op
from vhostcache.backend_io import BackendIo
from vhostcache.destage import Destager
from vhostcache.fill import Fills
from vhostcache.map import CLEAN, DIRTY, Map

AGAIN: Final = -1
"""In place of a tag: zeroes that the daemon itself repeats."""
DROPPED: Final = -2
"""In place of a tag: zeroes under way that nobody waits for any more."""


class Range:
    """Blocks `first` .. `end - 1` that are being changed. A write if `request` is given, else zeroes."""

    __slots__ = ("_ranges", "end", "first", "flush_failures", "issued", "may_unmap", "objects", "request", "tag")

    def __init__(self, ranges: "Ranges", tag: int, first: int, end: int, objects: range) -> None:
        self._ranges = ranges
        self.tag = tag
        self.first = first
        self.end = end
        self.objects = objects
        self.may_unmap = False
        self.request: tuple[int, int, int, int, int] | None = None
        self.issued = False
        self.flush_failures = 0

    def io_done(self, result: int) -> None:
        self._ranges.ended(self, result)


class Ranges:
    """All ranges of a volume. `done(range, result)` is told when a guest's has ended."""

    __slots__ = ("_destager", "_done", "_fills", "_io", "_map", "active", "size_bytes")

    def __init__(
        self,
        block_map: Map,
        fills: Fills,
        destager: Destager,
        io: BackendIo,
        size_bytes: int,
        done: Callable[[Range, int], None],
    ) -> None:
        self._map = block_map
        self._fills = fills
        self._destager = destager
        self._io = io
        self.size_bytes = size_bytes
        """Of the disk."""
        self._done = done
        self.active: list[Range] = []

    def overlaps(self, first: int, end: int) -> bool:
        """Whether a range being changed shares a block with this one."""
        return any(first < active.end and active.first < end for active in self.active)

    def zero(self, tag: int, first: int, end: int, may_unmap: bool) -> None:
        """Zero a range of blocks that overlaps no active one."""
        self._begin(tag, first, end).may_unmap = may_unmap

    def write(self, request: tuple[int, int, int, int, int], first: int, end: int) -> None:
        """Write a whole request, which covers whole blocks and overlaps no active range."""
        self._begin(request[1], first, end).request = request

    def _begin(self, tag: int, first: int, end: int) -> Range:
        shift = self._map.object_shift
        begun = Range(self, tag, first, end, range(first >> shift, ((end - 1) >> shift) + 1))
        self.active.append(begun)
        self._destager.lock(begun.objects)
        self._fills.poison_range(first, end)
        return begun

    def advance(self) -> None:
        """Issue what no destage stands in the way of any more."""
        for active in self.active:
            if not active.issued and not self._destager.busy(active.objects) and self._io.available():
                active.issued = True
                active.flush_failures = self._destager.flush_failures
                offset = active.first * op.BLOCK_BYTES
                group = self._io.begin(active)
                if active.request is None:
                    size = min(active.end * op.BLOCK_BYTES, self.size_bytes) - offset
                    self._io.zero(group, offset, size, active.may_unmap)
                else:
                    self._io.write_direct(group, active.tag, offset, active.request[3] * op.SECTOR_BYTES)

    def drop(self) -> list[int]:
        """The front-end wants its requests back: the tags of those that need not be waited for. Zeroes that the backend
        is working at stay active, so that what is asked for again comes after them; a write is in guest memory."""
        dropped = []
        for active in self.active.copy():
            if active.tag < 0 or (active.issued and active.request is not None):
                continue
            dropped.append(active.tag)
            active.tag = DROPPED
            if not active.issued:
                self.active.remove(active)
                self._destager.unlock(active.objects)
        return dropped

    def ended(self, active: Range, result: int) -> None:
        """The backend has answered."""
        destager = self._destager
        self.active.remove(active)
        lost = active.flush_failures != destager.flush_failures
        if result == 0 and lost and active.request is not None:
            result = AGAIN  # a flush has failed meanwhile: what was written may be lost, but the guest still has it
        if result == 0:
            self._drop(active)
            if active.request is None:
                destager.zeroed(active.first, active.end, active.may_unmap, lost)
            else:
                destager.written_directly(active.first, active.end)
        else:
            self._distrust(active)
        destager.unlock(active.objects)
        if active.tag == DROPPED:
            return
        if active.tag != AGAIN:
            self._done(active, result)
            return
        destager.rezeroing -= 1
        if result < 0:
            destager.lost_zeroes.append((active.first, active.end, active.may_unmap))
            destager.zeroing_failed(result)

    def _cached(self, active: Range) -> list[int]:
        where = self._map.where
        if len(where) < active.end - active.first:
            return [block for block in where if active.first <= block < active.end]
        return [block for block in range(active.first, active.end) if block in where]

    def _drop(self, active: Range) -> None:
        for block in self._cached(active):
            self._map.forget(block)

    def _distrust(self, active: Range) -> None:
        """Part of the range may have been changed: what is clean is read again, what was written is written again."""
        block_map = self._map
        for block in self._cached(active):
            slot = block_map.where[block]
            if block_map.state[slot] == CLEAN:
                block_map.forget(block)
            elif block_map.state[slot] != DIRTY:
                block_map.mark_dirty(block, slot, self._destager.now_ns)

    def repeat_lost(self) -> None:
        """Zero again what a failed flush may have lost, around the blocks that have newer content since."""
        lost, self._destager.lost_zeroes = self._destager.lost_zeroes, []
        block_map = self._map
        for first, end, may_unmap in lost:
            if self.overlaps(first, end):
                self._destager.lost_zeroes.append((first, end, may_unmap))
                continue
            newer = sorted(b for b, s in block_map.where.items() if first <= b < end and block_map.state[s] != CLEAN)
            start = first
            for stop in [*newer, end]:
                if start < stop:
                    self._destager.rezeroing += 1
                    self.zero(AGAIN, start, stop, may_unmap)
                start = stop + 1
        self._destager.widen_commit()
