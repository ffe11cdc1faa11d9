"""The read cache: clean blocks in a part of the cache file of their own, behind the log's ring.

Owns what is written there and what is being read. A block gets in when it has been read from the backend (or from the
part of the log that will go next) and the policy wants it (eviction.py); it is found there when neither RAM nor the log
has it. Invariants:
- what is found is the block's newest content: whoever writes or discards it drops it here, before the log can forget
  that; a write to the cache device that is overtaken by this is not admitted when it ends;
- a position that is being read or written is not written again;
- each block has a crc32c in the engine's table. What fails it is a miss;
- the index is on disk after an end in good order only, and only the very next opening believes it, if the log is taken
  as it was and the image has not changed. After anything else the read cache is empty.
Nothing waits for it: an error of the cache device here is a miss. It never does I/O, but for `save` and `load`, which
are called before the first request and after the last.
"""

from collections.abc import Sequence
from struct import Struct
from typing import Final

from crc32c import crc32c

from vhostcache import operations as op
from vhostcache.backend_io import BackendIo
from vhostcache.eviction import Eviction
from vhostcache.log.decision import Decision
from vhostcache.log.format import RING_OFFSET_BYTES
from vhostcache.log.recovery import Recovered
from vhostcache.log.superblock import Superblock
from vhostcache.log.walk import Disk
from vhostcache.map import CLEAN, PINNED, Map
from vhostcache.readcache import ReadCache

STORED: Final = 1 << 56
"""Position p of the read cache, where a log address is asked for, is STORED + p. No log grows so long."""
WRITES_MAX: Final = 32
"""Writes in flight; what comes while there are as many is not admitted."""
MAGIC: Final = b"vhcread\xe9"
VERSION: Final = 1
_HEADER: Final = Struct("<8sII16sQ8QI")
"""Magic, version, crc of this block, uuid, epoch, positions, then Eviction.numbers(), crc of the index."""
_CRC_BYTES: Final = 12


def positions_of(read_blocks: int) -> int:
    """How many blocks of data fit, with their index behind them."""
    if read_blocks < 16:
        return 0
    positions = read_blocks - 1
    while positions + index_blocks(positions) > read_blocks:
        positions -= max(1, positions + index_blocks(positions) - read_blocks)
    return positions


def index_blocks(positions: int) -> int:
    """The index: a header, and for each position its crc and what Eviction keeps."""
    return 1 + -(-(4 * positions + Eviction.size_bytes(positions)) // op.BLOCK_BYTES)


def offset_bytes(ring_blocks: int) -> int:
    """Where in the cache file it begins."""
    return RING_OFFSET_BYTES + ring_blocks * op.BLOCK_BYTES


class StoreWrite:
    """Blocks on their way to the read cache."""

    __slots__ = ("_ring", "blocks", "positions", "slots")

    def __init__(self, ring: "ReadRing", blocks: list[int], positions: list[int], slots: list[int]) -> None:
        self._ring = ring
        self.blocks = blocks
        self.positions = positions
        self.slots = slots

    def io_done(self, result: int) -> None:
        self._ring.stored(self, result)


class ReadRing:
    """See the module."""

    def __init__(self, eviction: Eviction, ring_blocks: int, block_map: Map, cache: ReadCache, io: BackendIo) -> None:
        self.eviction = eviction
        self._offset_bytes = offset_bytes(ring_blocks)
        self._map = block_map
        self._cache = cache
        self._io = io
        self._writing: dict[int, int] = {}
        """Block -> the position that it is being written to; gone when it has newer content."""
        self._writes = 0
        self._reading: dict[int, int] = {}
        """Position -> reads of it in flight."""
        self._dropped: set[int] = set()
        """Positions that are free as soon as they have been read."""
        self.counters = {
            "read_cache_written_blocks": 0,
            "read_cache_dropped_blocks": 0,
            "read_cache_refused_blocks": 0,
            "read_cache_errors": 0,
        }

    @property
    def busy(self) -> bool:
        """Anything is being read or written."""
        return bool(self._writes or self._reading)

    def statistics(self) -> dict[str, int]:
        """Blocks of 4 KiB, in it and gone from it."""
        eviction = self.eviction
        return {
            "read_cache_blocks": eviction.positions,
            "read_cache_used_blocks": eviction.small_count + eviction.main_count,
            "read_cache_evictions": eviction.evictions,
            **self.counters,
        }

    # --- reading ---

    def value(self, block: int) -> int:
        """As LogIndex.lookup says it: 0, or where the block is."""
        position = self.eviction.find(block)
        return (STORED + position) << 1 if position else 0

    def offset(self, address: int) -> int:
        """Where in the cache file that is."""
        return self._offset_bytes + (address - STORED - 1) * op.BLOCK_BYTES

    def read_begins(self, address: int, count: int) -> None:
        """Blocks in a row are being read."""
        reading, hit = self._reading, self.eviction.hit
        for position in range(address - STORED, address - STORED + count):
            reading[position] = reading.get(position, 0) + 1
            hit(position)

    def read_done(self, address: int, first: int, count: int, result: int) -> None:
        """They have been read, or could not be: then they are not there any more."""
        reading = self._reading
        for position in range(address - STORED, address - STORED + count):
            reading[position] -= 1
            if not reading[position]:
                del reading[position]
                if position in self._dropped:
                    self._dropped.remove(position)
                    self.eviction.give_back(position)
        if result < 0:
            self.counters["read_cache_errors"] += 1
            self.drop_range(first, first + count)

    # --- admission ---

    def offer(self, first: int, slots: Sequence[int]) -> None:
        """Blocks that have been read into slots; those that are still clean there may be kept."""
        if self._writes >= WRITES_MAX or not self._io.spare():
            self.counters["read_cache_refused_blocks"] += len(slots)
            return
        block_map, eviction = self._map, self.eviction
        chosen: list[tuple[int, int, int]] = []
        for block, slot in enumerate(slots, first):
            if block_map.where.get(block) != slot or block_map.state[slot] != CLEAN:
                continue
            if block in self._writing or not eviction.wants(block):
                continue
            position = self._take()
            if not position:
                break
            chosen.append((position, block, slot))
        if chosen:
            self._write(sorted(chosen))

    def _take(self) -> int:
        for _ in range(8):
            position = self.eviction.take()
            if position not in self._reading:
                return position
            self._dropped.add(position)
        return 0

    def _write(self, chosen: list[tuple[int, int, int]]) -> None:
        state = self._map.state
        write = StoreWrite(self, [c[1] for c in chosen], [c[0] for c in chosen], [c[2] for c in chosen])
        group = self._io.begin(write)
        self._writes += 1
        start = 0
        for at, (position, block, slot) in enumerate(chosen):
            state[slot] = PINNED
            self._writing[block] = position
            if at + 1 == len(chosen) or chosen[at + 1][0] != position + 1:
                self._io.store(group, self.offset(STORED + chosen[start][0]), write.slots[start : at + 1])
                start = at + 1

    def stored(self, write: StoreWrite, result: int) -> None:
        """A write has ended: what has not been overtaken is there."""
        self._writes -= 1
        self._cache.unpin(write.slots)
        if result < 0:
            self.counters["read_cache_errors"] += 1
        for block, position in zip(write.blocks, write.positions, strict=True):
            wanted = self._writing.get(block) == position
            if wanted:
                del self._writing[block]
            if wanted and result == 0:
                self.eviction.admit(block, position)
                self.counters["read_cache_written_blocks"] += 1
            else:
                self.eviction.give_back(position)

    # --- newer content elsewhere ---

    def drop(self, blocks: Sequence[int]) -> None:
        """These have newer content."""
        find, writing = self.eviction.find, self._writing
        for block in blocks:
            if writing:
                writing.pop(block, None)
            position = find(block)
            if position:
                self._drop(position)

    def drop_range(self, first: int, end: int) -> None:
        """The same for a range."""
        for block in [block for block in self._writing if first <= block < end]:
            del self._writing[block]
        for position in self.eviction.found_in(first, end):
            self._drop(position)

    def _drop(self, position: int) -> None:
        self.counters["read_cache_dropped_blocks"] += 1
        read = position in self._reading
        if read:
            self._dropped.add(position)
        self.eviction.drop(position, keep=read)


# On disk.


def save(disk: Disk, closed: Superblock, eviction: Eviction, crcs: bytes) -> None:
    """After an end in good order, which `closed` says. `crcs`: u32 of each position, from the first on. A crash leaves
    an index that nobody believes, or this one. After a hand-over nobody would: QEMU need not wait for it."""
    if not closed.clean or closed.cold or positions_of(closed.read_blocks) != eviction.positions:
        return
    positions = eviction.positions
    assert len(crcs) == 4 * positions
    index = crcs + eviction.packed()
    header = bytearray(op.BLOCK_BYTES)
    _HEADER.pack_into(
        header, 0, MAGIC, VERSION, 0, closed.uuid, closed.epoch, positions, *eviction.numbers(), crc32c(index)
    )
    header[_CRC_BYTES : _CRC_BYTES + 4] = crc32c(bytes(header)).to_bytes(4, "little")
    at = offset_bytes(closed.ring_blocks) + positions * op.BLOCK_BYTES
    disk.write(at + op.BLOCK_BYTES, index + bytes(-len(index) % op.BLOCK_BYTES))
    disk.sync()
    disk.write(at, bytes(header))
    disk.sync()


def load(disk: Disk, recovered: Recovered) -> tuple[Eviction, bytes] | None:
    """What the opening before has left, and its crcs; None: nothing that may be believed."""
    before, finding = recovered.finding.superblock, recovered.finding
    if before is None or not before.clean or before.read_blocks != recovered.superblock.read_blocks:
        return None
    if finding.decision is not Decision.WARM or finding.evicts:
        return None
    positions = positions_of(before.read_blocks)
    at = offset_bytes(before.ring_blocks) + positions * op.BLOCK_BYTES
    if not positions or at + index_blocks(positions) * op.BLOCK_BYTES > disk.size_bytes:
        return None
    header = bytearray(disk.read(at, op.BLOCK_BYTES))
    magic, version, crc, uuid, epoch, held, *numbers, index_crc = _HEADER.unpack_from(header)
    header[_CRC_BYTES : _CRC_BYTES + 4] = bytes(4)
    if (magic, version, uuid, epoch, held) != (MAGIC, VERSION, before.uuid, before.epoch, positions):
        return None
    if crc32c(bytes(header)) != crc:
        return None
    size = 4 * positions + Eviction.size_bytes(positions)
    index = disk.read(at + op.BLOCK_BYTES, size + -size % op.BLOCK_BYTES)[:size]
    if crc32c(index) != index_crc:
        return None
    eviction = Eviction(positions)
    eviction.unpack(numbers, memoryview(index)[4 * positions :])
    return eviction, bytes(index[: 4 * positions])
