"""Fills: blocks read from the backend into slots, for reads that miss and for partial writes.

Owns the blocks being filled. Invariant: a block in `by_block` is not in the map. Whatever gives such a block newer
content, or zeroes it on the backend, calls `poison`: the fill then neither installs that block nor lets anyone join it,
even if the newer content has come and gone again by the time the fill ends. Those who waited already are served: their
reads were concurrent with the write. It never evicts and never decides what to fill.
"""

from collections.abc import Callable
from typing import Final

from vhostcache import operations as op
from vhostcache.backend_io import BackendIo
from vhostcache.map import CLEAN, FILLING, Map
from vhostcache.readcache import ReadCache

NOBODY: Final = -1
GONE: Final = -4096
"""In place of an errno: it was to be read from the cache file, and has to be read otherwise."""


def _as_it_is(address: int, first: int, count: int, result: int) -> int:
    return result


class ReadJob:
    """A guest's read that is put together from several parts."""

    __slots__ = ("deadline_ns", "direct", "error", "over", "parts", "sector", "sectors", "tag", "waits")

    def __init__(self, tag: int, sector: int, sectors: int, deadline_ns: int) -> None:
        self.tag = tag
        self.sector = sector
        self.sectors = sectors
        self.deadline_ns = deadline_ns
        """When it stops waiting for a backend that does not answer."""
        self.parts = 0
        self.direct = 0
        """Parts that are being read into guest memory: meanwhile the request can't be answered, nor always dropped."""
        self.error = 0
        """The worst that has happened to a part, a negative errno."""
        self.waits = True
        """Every part that failed may succeed when it is tried again."""
        self.over = False
        """Answered, dropped, or begun anew: what still comes back for it is of no account."""

    def failed(self, result: int, passing: bool) -> None:
        """A part of it has failed; `passing`: it may succeed later."""
        if not self.error or not passing:
            self.error = result
        self.waits = self.waits and passing


class Fill:
    """One read of neighbouring blocks into slots, and who waits for it."""

    __slots__ = ("_fills", "address", "ahead", "first", "read", "readers", "ready", "retries", "slots", "tag")

    def __init__(self, fills: "Fills", first: int, slots: list[int]) -> None:
        self._fills = fills
        self.first = first
        self.slots = slots
        self.address = 0
        """Where in the log it is read from; 0: from the backend."""
        self.ahead = False
        """Nobody has asked for it yet (readahead.py): when it has ended well it waits, `ready`, until it is given back.
        A slot of it that has gone into the map is 0."""
        self.ready = False
        self.read: set[int] = set()
        """Of such a fill, the blocks that have been asked for since."""
        self.tag = NOBODY
        """A read of exactly the fill's one block: the usual miss, answered in one word."""
        self.readers: list[tuple[ReadJob, int, int, int]] = []
        """(job, offset in its payload, offset in the fill, bytes)"""
        self.retries: list[tuple[int, int, int, int, int]] = []
        """Parked requests to be executed again, as Volume understands them."""

    def io_done(self, result: int) -> None:
        self._fills.ended(self, result)


class Fills:
    """All fills of a volume. What waited is told: `part_done(job, result, on_backend)`, `retry(request, result,
    on_backend)`."""

    __slots__ = (
        "_cache",
        "_io",
        "_map",
        "_part_done",
        "_retry",
        "by_block",
        "counters",
        "filled",
        "log_done",
        "running",
        "size_bytes",
    )

    def __init__(
        self,
        block_map: Map,
        cache: ReadCache,
        io: BackendIo,
        size_bytes: int,
        part_done: Callable[[ReadJob, int, bool], None],
        retry: Callable[[tuple[int, int, int, int, int], int, bool], None],
    ) -> None:
        self._map = block_map
        self._cache = cache
        self._io = io
        self.size_bytes = size_bytes
        """Of the disk."""
        self._part_done = part_done
        self._retry = retry
        self.by_block: dict[int, Fill] = {}
        self.running: dict[Fill, None] = {}
        self.log_done: Callable[[int, int, int, int], int] = _as_it_is
        self.filled: Callable[[Fill], None] | None = None
        """Told of fills that have ended well."""
        self.counters = {"fills": 0, "blocks_filled": 0, "fills_poisoned": 0}

    def begin(self, first: int, slots: list[int]) -> Fill:
        """Read blocks from `first` on, absent from the map and from `by_block`, into slots just taken."""
        fill = self._begin(first, slots)
        offset = first * op.BLOCK_BYTES
        size = min(len(slots) * op.BLOCK_BYTES, self.size_bytes - offset)
        if size % op.BLOCK_BYTES:
            # A disk may grow: what is behind its end reads as zeroes then, and not as what the slot held before.
            self._io.zero_slot(slots[-1], size % op.BLOCK_BYTES, -size % op.BLOCK_BYTES)
        self._io.read(self._io.begin(fill), offset, size, slots)
        return fill

    def begin_log(self, first: int, slots: list[int], address: int, offset_bytes: int) -> Fill:
        """The same from the log, where the blocks lie in a row from `address` on, `offset_bytes` into the cache file.
        `log_done(address, first block, blocks, result)` is told when they have been read, and returns the result."""
        fill = self._begin(first, slots)
        fill.address = address
        self._io.log_read(self._io.begin(fill), offset_bytes, slots)
        return fill

    def _begin(self, first: int, slots: list[int]) -> Fill:
        fill = Fill(self, first, slots)
        self.running[fill] = None
        state, by_block = self._map.state, self.by_block
        for block, slot in enumerate(slots, first):
            state[slot] = FILLING
            by_block[block] = fill
        return fill

    def take_ready(self, block: int) -> bool:
        """If the block has been read ahead: it goes into the map."""
        fill = self.by_block.get(block)
        if fill is None or not fill.ready:
            return False
        del self.by_block[block]
        slot = fill.slots[block - fill.first]
        fill.slots[block - fill.first] = 0
        fill.read.add(block)
        self._map.where[block] = slot
        self._map.block_of[slot] = block
        self._map.state[slot] = CLEAN
        self._cache.admit(slot)
        return True

    def give_back(self, fill: Fill) -> None:
        """What was read ahead is not wanted any more."""
        fill.ahead = False
        if not fill.ready:
            return  # it ends like any other, or has failed
        fill.ready = False
        for block, slot in enumerate(fill.slots, fill.first):
            if self.by_block.get(block) is fill:
                del self.by_block[block]
            if slot:
                self._map.release(slot)

    def poison(self, block: int) -> None:
        """The block has newer content than a fill in flight will bring."""
        if self.by_block.pop(block, None) is not None:
            self.counters["fills_poisoned"] += 1

    def poison_range(self, first: int, end: int) -> None:
        """The same for a range of blocks."""
        by_block = self.by_block
        if end - first < len(by_block):
            found = [block for block in range(first, end) if block in by_block]
        else:
            found = [block for block in by_block if first <= block < end]
        for block in found:
            self.poison(block)

    def ended(self, fill: Fill, result: int) -> None:
        """The read has ended: install what is still wanted, serve the readers, then execute parked requests again."""
        del self.running[fill]
        if fill.address:
            result = self.log_done(fill.address, fill.first, len(fill.slots), result)
        self.counters["fills"] += 1
        block_map, by_block = self._map, self.by_block
        fill.ready = fill.ahead and result == 0
        for block, slot in enumerate(fill.slots, fill.first) if not fill.ready else ():
            installable = by_block.get(block) is fill
            if installable:
                del by_block[block]
            if installable and result == 0:
                block_map.where[block] = slot
                block_map.block_of[slot] = block
                block_map.state[slot] = CLEAN
                self._cache.admit(slot)
                self.counters["blocks_filled"] += 1
            else:
                # Freed before the readers' copies below are listed, but the engine executes the list in order, and
                # nothing has been listed in between that writes to the slot.
                block_map.release(slot)
        if self.filled is not None and result == 0 and not fill.ready:
            self.filled(fill)
        on_backend = not fill.address
        if fill.tag != NOBODY:
            if result == 0:
                self._io.operations.append(op.OUT1 | fill.tag << 8 | fill.slots[0] << 32)
            else:
                job = ReadJob(fill.tag, fill.first * op.BLOCK_SECTORS, op.BLOCK_SECTORS, op.NEVER)
                job.parts = 1
                self._part_done(job, result, on_backend)
        # What has rotted in the log may be a block that only others have asked for: those with less ask again.
        less = GONE if result < 0 and fill.address and len(fill.slots) > 1 else result
        for job, payload, offset, size in fill.readers:
            first, skip = divmod(offset, op.BLOCK_BYTES)
            slots = fill.slots[first : (offset + size + op.BLOCK_BYTES - 1) // op.BLOCK_BYTES]
            if result == 0 and not job.over:
                self._io.operations += (op.OUT | job.tag << 8 | len(slots) << 32, payload | size << 32, skip)
                self._io.operations += slots
            self._part_done(job, less if len(slots) < len(fill.slots) else result, on_backend)
        for request in fill.retries:
            self._retry(request, less, on_backend)
