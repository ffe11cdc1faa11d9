"""Changes of a volume with a log: writes, discards and write-zeroes, whole blocks and parts of them.

Owns the way of a change into the open record. Invariants: it takes slots of its own, for a published slot never
changes; it is not split over two records; a part of a block is merged into the newest content at the moment at which it
gets its slot. What has no room, or needs a block to be read first, waits.
"""

from array import array
from collections.abc import Sequence
from itertools import chain

from vhostcache import operations as op
from vhostcache.fill import NOBODY
from vhostcache.guest_requests import Parked, VolumeSettings
from vhostcache.log import format as fmt
from vhostcache.log_reads import LogReads
from vhostcache.map import CLEAN, DIRTY, ORPHAN, PINNED, WRITING, Map


class LogChanges(LogReads):
    """See the module."""

    def __init__(self, settings: VolumeSettings, operations: list[int], block_map: Map, groups: int) -> None:
        super().__init__(settings, operations, block_map, groups)
        self._favourite = NOBODY
        """The tag of the request that may read into RAM while slots are scarce, and the slots it keeps."""
        self._kept: list[int] = []

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
