"""Which block of a read cache gives way to which: ghosts, a small queue and a main one.

Once the cache is full, a block gets in when it is asked for a second time while its ghost is remembered: two ghosts for
each position, each in one place of a table, where the next one replaces it. It enters a small queue, a tenth of the
cache; what is hit there moves on to the main queue, what is not goes. The main queue gives further chances to what has
been hit. That is S3-FIFO (Yang et al., SOSP 2023), but that the first miss only leaves the ghost: so a scan writes
nothing to the cache device, and a loop larger than the cache does not sweep it. docs/read-cache.md compares it with
others.

Owns which block is at which position, in which queue, and how often it has been hit, all in arrays: 22 to 26 bytes a
position, and 8 to 16 for the ghosts. Positions count from 1. Invariant: a position is free, held, or has exactly one
block; each block has at most one. It does no I/O and knows neither slots nor files. docs/log-format.md says how it is
kept on disk.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final

NO_BLOCK: Final = 0xFFFFFFFF
"""In place of a block. (The last block of a volume of 16 TiB is therefore never cached.)"""
SMALL_SHARE: Final = 10
"""The small queue gets one part in ten."""
HITS: Final = 3
"""In a position's flags: hits since it was admitted or last spared, at most so many."""
MAIN: Final = 4
"""It is in the main queue."""
HELD: Final = 8
"""Taken, and in no queue: it is being written, or was dropped while it was being read."""
LOOKS_MAX: Final = 256
"""Positions spared or moved on by one eviction, about 0.2 ms: where everything has been hit, the oldest goes anyway."""
GHOST_SHARE: Final = 2
"""Ghosts for each position."""
REGION_SHIFT: Final = 10
"""A region is 1024 blocks."""
_FIRST: Final = 0x9E3779B97F4A7C15
_WORD: Final = (1 << 64) - 1


def _table_bits(positions: int) -> int:
    return max(1, (positions - 1).bit_length())


class Eviction:
    """See the module. `positions`: how many there are."""

    __slots__ = (
        "_chain",
        "_free",
        "_fresh",
        "_ghosts",
        "_ghosts_shift",
        "_heads",
        "_in_region",
        "_main_end",
        "_next",
        "_previous",
        "_regions",
        "_table_shift",
        "blocks",
        "evictions",
        "flags",
        "main_count",
        "positions",
        "small_count",
    )

    def __init__(self, positions: int) -> None:
        assert 0 < positions < NO_BLOCK - 1
        self.positions = positions
        bits = _table_bits(positions)
        self._table_shift = 64 - bits
        self._heads = array("I", bytes(4 << bits))
        """Hash of a block -> the first position of its chain; 0: none."""
        self._chain = array("I", bytes(4 * (positions + 1)))
        self.blocks = array("I", b"\xff" * (4 * (positions + 1)))
        """Position -> the block there."""
        self._main_end = positions + 1
        """The queues are rings through `_next` and `_previous`: the small one begins at 0, the main one here."""
        self._next = array("I", bytes(4 * (positions + 2)))
        self._previous = array("I", bytes(4 * (positions + 2)))
        self._next[self._main_end] = self._previous[self._main_end] = self._main_end
        self.flags = bytearray(positions + 1)
        self._free = 0
        """The first of the free positions, which are linked by `_next`; 0: none but those never used."""
        self._fresh = 1
        """Positions from here on have never been used."""
        self.small_count = 0
        self.main_count = 0
        self._regions = (1 << max(6, bits - 4)) - 1
        self._in_region = array("I", bytes(4 * (self._regions + 1)))
        """How many blocks of a region of the volume are here, or of several that share a counter: a range of which
        nothing is here is soon found to be so."""
        ghost_bits = max(6, (GHOST_SHARE * positions - 1).bit_length())
        self._ghosts = array("H", bytes(2 << ghost_bits))
        """Hash of a block -> a part of another hash of the one that was asked for last, and was not here."""
        self._ghosts_shift = 64 - ghost_bits
        self.evictions = 0

    # --- looking ---

    def find(self, block: int) -> int:
        """The block's position, or 0."""
        if not self._in_region[block >> REGION_SHIFT & self._regions]:
            return 0
        blocks, chain = self.blocks, self._chain
        position = self._heads[(block * _FIRST & _WORD) >> self._table_shift]
        while position and blocks[position] != block:
            position = chain[position]
        return position

    def hit(self, position: int) -> None:
        """The block there has been asked for."""
        if self.flags[position] & HITS < HITS:
            self.flags[position] += 1

    def seen(self, block: int) -> bool:
        """The block has been asked for and is not here. Whether that was so before, not long ago."""
        name = block * _FIRST & _WORD
        index, print_ = name >> self._ghosts_shift, name & 0xFFFF | 1
        if self._ghosts[index] == print_:
            self._ghosts[index] = 0
            return True
        self._ghosts[index] = print_
        return False

    @property
    def full(self) -> bool:
        """Whether something has to give way to anything new."""
        return not self._free and self._fresh > self.positions

    def wants(self, block: int) -> bool:
        """Whether a block that has been asked for, and is not here, should be."""
        return block < NO_BLOCK and not self.find(block) and (not self.full or self.seen(block))

    # --- admitting ---

    def take(self) -> int:
        """A position to write a block to, now held; 0 if there is none. Evicts."""
        position = self._free
        if position:
            self._free = self._next[position]
        elif self._fresh <= self.positions:
            position = self._fresh
            self._fresh += 1
        else:
            position = self._evict()
        if position:
            self.flags[position] = HELD
        return position

    def admit(self, block: int, position: int) -> None:
        """The block has been written to a position that was taken for it."""
        assert self.flags[position] == HELD
        self._in_region[block >> REGION_SHIFT & self._regions] += 1
        self.blocks[position] = block
        index = (block * _FIRST & _WORD) >> self._table_shift
        self._chain[position] = self._heads[index]
        self._heads[index] = position
        self.flags[position] = 0
        self._append(position, 0)
        self.small_count += 1

    def give_back(self, position: int) -> None:
        """What was held is free again."""
        assert self.flags[position] == HELD
        self.flags[position] = 0
        self._next[position] = self._free
        self._free = position

    def drop(self, position: int, keep: bool) -> None:
        """The block there has newer content elsewhere. `keep`: the position stays held."""
        self._leave(position)
        self.flags[position] = HELD
        if not keep:
            self.give_back(position)

    def found_in(self, first: int, end: int) -> list[int]:
        """The positions of blocks `first` .. `end - 1`."""
        shift, counts, mask = REGION_SHIFT, self._in_region, self._regions
        found: list[int] = []
        for number in range(first >> shift, ((end - 1) >> shift) + 1):
            left = counts[number & mask]
            block, stop = max(first, number << shift), min(end, (number + 1) << shift)
            while left and block < stop:
                position = self.find(block)
                if position:
                    found.append(position)
                    left -= 1
                block += 1
        return found

    # --- eviction ---

    def _evict(self) -> int:
        """A position whose block has given way, or 0."""
        small_max = self.positions // SMALL_SHARE
        looks = LOOKS_MAX
        while self.small_count or self.main_count:
            if self.small_count > small_max or not self.main_count:
                position = self._next[0]
                if self.flags[position] & HITS and looks:
                    looks -= 1
                    self._promote(position)
                    continue
            else:
                position = self._oldest_of_main(looks)
            self._leave(position)
            self.evictions += 1
            return position
        return 0

    def _oldest_of_main(self, looks: int) -> int:
        """The oldest that has not been hit; those that have are spared, at most so many."""
        end, flags, following = self._main_end, self.flags, self._next
        position = following[end]
        while flags[position] & HITS and looks:
            looks -= 1
            flags[position] -= 1
            self._unlink(position)
            self._append(position, end)
            position = following[end]
        return position

    def _promote(self, position: int) -> None:
        self._unlink(position)
        self._append(position, self._main_end)
        self.flags[position] = MAIN
        self.small_count -= 1
        self.main_count += 1

    def _leave(self, position: int) -> None:
        """Out of its queue and of the table."""
        block = self.blocks[position]
        self._in_region[block >> REGION_SHIFT & self._regions] -= 1
        chain = self._chain
        index = (block * _FIRST & _WORD) >> self._table_shift
        at = self._heads[index]
        if at == position:
            self._heads[index] = chain[position]
        else:
            while chain[at] != position:
                at = chain[at]
            chain[at] = chain[position]
        self.blocks[position] = NO_BLOCK
        self._unlink(position)
        if self.flags[position] & MAIN:
            self.main_count -= 1
        else:
            self.small_count -= 1

    # --- on disk ---

    @staticmethod
    def size_bytes(positions: int) -> int:
        """Of `packed`."""
        bits = _table_bits(positions)
        return (4 << bits) + (4 << max(6, bits - 4)) + 2 * 4 * (positions + 1) + 2 * 4 * (positions + 2) + positions + 1

    def _arrays(self) -> list[array[int]]:
        return [self._heads, self._in_region, self._chain, self.blocks, self._next, self._previous]

    def packed(self) -> bytes:
        """All but the ghosts."""
        assert HELD not in self.flags
        return b"".join([*(part.tobytes() for part in self._arrays()), self.flags])

    def numbers(self) -> tuple[int, ...]:
        """What is not in arrays: 7 numbers."""
        return self._free, self._fresh, self.small_count, self.main_count, 0, 0, 0

    def unpack(self, numbers: Sequence[int], packed: memoryview) -> None:
        """What `numbers` and `packed` have given, which a checksum has found whole."""
        self._free, self._fresh, self.small_count, self.main_count = numbers[:4]
        for part in self._arrays():
            size = 4 * len(part)
            del part[:]
            part.frombytes(packed[:size])
            packed = packed[size:]
        self.flags[:] = packed

    def _append(self, position: int, end: int) -> None:
        last = self._previous[end]
        self._next[last] = self._previous[end] = position
        self._previous[position] = last
        self._next[position] = end

    def _unlink(self, position: int) -> None:
        before, after = self._previous[position], self._next[position]
        self._next[before] = after
        self._previous[after] = before
