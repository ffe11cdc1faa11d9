"""The map: which block of the volume lives in which slot of the RAM tier, and in what state.

Owns every slot's state, the free slots and the sets of dirty blocks per object. Invariants, checked by `check()`:
a block has at most one slot; a slot is free, or holds exactly one block, or is an orphan that its destage will free;
`dirty[object]` is exactly the set of that object's blocks whose slot is DIRTY.
It never does I/O, never decides what to evict (readcache) or what to destage (destage).

Memory follows the blocks cached, not the volume: about 250 bytes a cached block at worst, which `slots_for_ram` charges
to the RAM limit, so that the limit holds for any access pattern.
"""

from array import array
from collections import OrderedDict
from typing import Final

from vhostcache.operations import BLOCK_BYTES, FIRST_SLOT

FREE: Final = 0
FILLING: Final = 1
"""Being read from the backend; not in the map yet."""
CLEAN: Final = 2
"""As on the backend, and durable there: may be evicted at any time."""
DIRTY: Final = 3
"""Newer than the backend."""
WRITING: Final = 4
"""A destage is writing it: its bytes must not change."""
ORPHAN: Final = 5
"""A destage is writing it, but the map already has something newer: freed when the destage ends."""
WRITTEN: Final = 6
"""Written to the backend but not yet flushed there: may be overwritten, not evicted. 6 and 7, by the parity of the
backend flush that will cover it: with one flush running and one to come, a parity tells them apart."""
PINNED: Final = 8
"""With a log: clean, and a destage is writing it to the backend. Without one this is WRITING."""

BOOKKEEPING_BYTES: Final = 256


def slots_for_ram(ram_bytes: int) -> int:
    """The slots, special ones included, that a RAM limit pays for, each with the map's own memory for it."""
    return FIRST_SLOT + ram_bytes // (BLOCK_BYTES + BOOKKEEPING_BYTES)


def run_end(slots: list[int]) -> int:
    """Of slots that ascend without a gap, which what is written in order takes: the end of that run. Else 0."""
    end = slots[0] + len(slots)
    return end if slots[-1] == end - 1 and slots == list(range(slots[0], end)) else 0


class Map:
    """Blocks to slots. `slots` counts the special ones, `object_blocks` is a power of two."""

    __slots__ = (
        "block_of",
        "dirty",
        "dirty_blocks",
        "free",
        "full",
        "object_blocks",
        "object_shift",
        "since_ns",
        "slots",
        "state",
        "where",
    )

    def __init__(self, slots: int, object_blocks: int) -> None:
        assert slots > FIRST_SLOT
        assert object_blocks & (object_blocks - 1) == 0
        self.slots = slots
        self.object_blocks = object_blocks
        self.object_shift = object_blocks.bit_length() - 1
        self.where: dict[int, int] = {}
        self.state = bytearray(slots)
        self.block_of = array("Q", bytes(8 * slots))
        # Descending, so that the last ones, which are taken first, come out as ascending runs.
        self.free = list(range(slots - 1, FIRST_SLOT - 1, -1))
        self.dirty: OrderedDict[int, set[int]] = OrderedDict()
        """Object -> its dirty blocks; the object that has been dirty longest comes first. (A plain dict that is emptied
        from the front is searched from its beginning each time.)"""
        self.dirty_blocks = 0
        self.since_ns: dict[int, int] = {}
        """Object -> when it became dirty."""
        self.full: OrderedDict[int, None] = OrderedDict()
        """Objects wholly dirty, in the order in which they became so."""

    def take(self, count: int) -> list[int]:
        """Take `count` free slots, which must be there; in ascending runs where possible."""
        free = self.free
        assert 0 < count <= len(free)
        taken = free[: -count - 1 : -1]
        del free[-count:]
        return taken

    def mark_dirty(self, block: int, slot: int, now_ns: int) -> None:
        """The slot, already in the map for this block and not DIRTY, now is."""
        self.state[slot] = DIRTY
        self.dirty_blocks += 1
        number = block >> self.object_shift
        blocks = self.dirty.get(number)
        if blocks is None:
            self.dirty[number] = {block}
            self.since_ns[number] = now_ns
            if self.object_blocks == 1:
                self.full[number] = None
            return
        blocks.add(block)
        if len(blocks) == self.object_blocks:
            self.full[number] = None

    def place(self, block: int, slot: int, now_ns: int) -> None:
        """Put new dirty content, in a slot just taken, in place of whatever the map has for the block.

        A slot that is being written becomes an orphan of its destage; other old slots are the caller's to reuse in
        place."""
        old = self.where.get(block)
        if old is not None:
            assert self.state[old] == WRITING
            self.state[old] = ORPHAN
        self.where[block] = slot
        self.block_of[slot] = block
        self.mark_dirty(block, slot, now_ns)

    def place_run(self, first: int, slots: list[int], now_ns: int) -> None:
        """`place` for neighbouring blocks from `first` on, none of which is in the map but as WRITING."""
        end = first + len(slots)
        where, state, block_of = self.where, self.state, self.block_of
        for block, slot in enumerate(slots, first):
            old = where.get(block)
            if old is not None:
                assert state[old] == WRITING
                state[old] = ORPHAN
            where[block] = slot
            block_of[slot] = block
            state[slot] = DIRTY
        self.dirty_blocks += len(slots)
        shift = self.object_shift
        for number in range(first >> shift, ((end - 1) >> shift) + 1):
            blocks = self.dirty.get(number)
            if blocks is None:
                blocks = self.dirty[number] = set()
                self.since_ns[number] = now_ns
            blocks.update(range(max(first, number << shift), min(end, (number + 1) << shift)))
            if len(blocks) == self.object_blocks:
                self.full[number] = None

    def set_state(self, slots: list[int], state: int) -> None:
        """Of all of these slots, at once where they are a run."""
        if slots and (end := run_end(slots)):
            self.state[slots[0] : end] = bytes((state,)) * len(slots)
            return
        states = self.state
        for slot in slots:
            states[slot] = state

    def release(self, slot: int) -> None:
        """A slot that is in no use any more becomes free."""
        self.state[slot] = FREE
        self.free.append(slot)

    def forget(self, block: int) -> None:
        """Drop the block's cached content, which must not be in the middle of a destage."""
        slot = self.where.pop(block, None)
        if slot is None:
            return
        state = self.state[slot]
        assert state != WRITING
        if state == DIRTY:
            self._discard_dirty(block)
        self.release(slot)

    def _discard_dirty(self, block: int) -> None:
        number = block >> self.object_shift
        blocks = self.dirty[number]
        blocks.remove(block)
        self.dirty_blocks -= 1
        self.full.pop(number, None)
        if not blocks:
            del self.dirty[number]
            del self.since_ns[number]

    def take_dirty(self, number: int) -> list[int]:
        """The object's dirty blocks in ascending order, now WRITING."""
        blocks = sorted(self.dirty.pop(number))
        self.dirty_blocks -= len(blocks)
        del self.since_ns[number]
        self.full.pop(number, None)
        state, where = self.state, self.where
        for block in blocks:
            state[where[block]] = WRITING
        return blocks

    def check(self) -> None:
        """Assert every invariant; for tests, it reads everything."""
        state, where = self.state, self.where
        assert len(set(where.values())) == len(where)
        assert all(self.block_of[slot] == block for block, slot in where.items())
        assert len(set(self.free)) == len(self.free)
        assert all(state[slot] == FREE for slot in self.free)
        assert state.count(FREE) == len(self.free) + FIRST_SLOT
        mapped = set(where.values())
        for slot in range(FIRST_SLOT, self.slots):
            assert (slot in mapped) == (state[slot] not in (FREE, FILLING, ORPHAN))
        dirty = {block for block, slot in where.items() if state[slot] == DIRTY}
        assert dirty == {block for blocks in self.dirty.values() for block in blocks}
        assert all(block >> self.object_shift == number for number, blocks in self.dirty.items() for block in blocks)
        assert self.dirty_blocks == len(dirty)
        assert self.dirty.keys() == self.since_ns.keys()
        assert set(self.full) == {n for n, blocks in self.dirty.items() if len(blocks) == self.object_blocks}
