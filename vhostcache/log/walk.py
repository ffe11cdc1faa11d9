"""Reading the log from its tail to its end.

Owns the rules by which a record belongs where it is found, and so where the log ends. A record belongs when magic and
volume, address, seq, epoch, the crc of the header before it and its own crc hold, and the crc of every payload block.
The payload is read only where it may not have arrived: from the durable address on, and behind the last record that a
later one says was durable. Damage elsewhere does not end the log; it is found when the block is read. What cannot be
read ends the log only where it is needed: read-ahead does without, and goes on behind it.

It says where the log ends and why, and never decides whether it may end there: that is decision.py. It only reads.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from crc32c import crc32c

from vhostcache.errors import CacheUnreadableError
from vhostcache.log.format import (
    RECORD_MAX_BLOCKS,
    RecordHeader,
    blocks_to_ring_end,
    header_blocks_in,
    offset_bytes,
    parse_header,
    record_magic,
)
from vhostcache.log.superblock import Superblock
from vhostcache.operations import BLOCK_BYTES

READ_AHEAD_BLOCKS: Final = 256
SMALL_RECORD_BLOCKS: Final = 32
"""Behind a record smaller than this, the next header comes with one long read: a disk reads 128 KiB while it seeks."""
LOOK_AHEAD_BLOCKS: Final = 4 * RECORD_MAX_BLOCKS
"""How far behind a record that fails others are looked for; each that is found moves the limit."""
PROGRESS_RECORDS: Final = 1024
NEVER: Final = 1 << 64

Progress = Callable[[int, int], None]
"""Called with the blocks done and the blocks known to be there."""


class Disk(Protocol):
    """The cache file. Offsets and sizes are whole blocks."""

    @property
    def size_bytes(self) -> int: ...
    def read(self, offset: int, size: int) -> bytes:
        """CacheUnreadableError: a part of it cannot be read."""

    def write(self, offset: int, data: bytes) -> None: ...
    def sync(self) -> None: ...


class RecordFacts(NamedTuple):
    """A record that is in the log. Pads are too: without payload, the only extent, if there is one, of kind PAD."""

    address: int
    seq: int
    header_blocks: int
    payload_blocks: int
    extents: tuple[int, ...]
    """Extent words; those of data list the payload in order."""
    crcs: array[int]
    """A crc32c for each payload block."""


Visit = Callable[[RecordFacts], None]


@dataclass(frozen=True)
class Walk:
    """Where the log ends, and what is in it."""

    head_address: int
    next_seq: int
    previous_crc: int
    """Of the last record's header; 0 when there is none."""
    last_epoch: int
    """Of the last record; 0 when there is none."""
    dirty_address: int
    """The first record that the clean address does not cover; the head when there is none."""
    dirty_seq: int
    end: str
    """Why the next record is none, half a sentence; empty: the walk was told to stop there."""
    records: list[RecordFacts] = field(repr=False)
    """Empty when they were visited."""
    is_unreadable: bool = False
    """The next record is none because something of it could not be read."""


def walk(
    disk: Disk,
    superblock: Superblock,
    *,
    stop_address: int = NEVER,
    progress: Progress | None = None,
    visit: Visit | None = None,
) -> Walk:
    """Follow the log from the tail until a record fails or `stop_address` is reached.

    With `visit`, each record is handed to it and not kept."""
    records: list[RecordFacts] = []
    keep = visit or records.append
    reader = BlockReader(disk, superblock.ring_blocks)
    judge = _Judge(superblock)
    tail, durable = superblock.tail_address, superblock.durable_address
    address, seq = tail, superblock.tail_seq
    unsure: deque[RecordHeader] = deque()
    """Whole headers whose payload may not have arrived: nothing has said yet that they were durable."""
    last: RecordHeader | None = None
    dirty: tuple[int, int] | None = None
    ahead = 1
    end = ""
    is_unreadable = False

    def accept(header: RecordHeader) -> None:
        nonlocal last, dirty
        last = header
        after = header.address + header.blocks
        if dirty is None and after > superblock.clean_address:
            dirty = header.address, header.seq
        keep(
            RecordFacts(
                header.address, header.seq, header.header_blocks, header.payload_blocks, header.extents, header.crcs
            )
        )
        if progress and header.seq % PROGRESS_RECORDS == 0:
            progress(after - tail, max(after, durable) - tail)

    while address < stop_address:
        try:
            header = reader.header(address, ahead)
        except CacheUnreadableError as error:
            end, is_unreadable = error.found, True
            break
        end = judge.refuses(header, address, seq) if header else "there is no whole record header"
        if header is None or end:
            break
        judge.accept(header)
        while unsure and unsure[0].seq <= header.durable_seq:
            accept(unsure.popleft())
        if address < durable:
            accept(header)
        else:
            unsure.append(header)
        address += header.blocks
        seq += 1
        ahead = READ_AHEAD_BLOCKS if header.blocks < SMALL_RECORD_BLOCKS else 1
    for header in unsure:
        try:
            fault, lacks = _payload_fault(reader, header), False
        except CacheUnreadableError as error:
            fault, lacks = error.found, True
        if fault:
            end, address, seq, is_unreadable = fault, header.address, header.seq, lacks
            break
        accept(header)
    if progress:
        progress(address - tail, address - tail)
    crc, epoch = (last.crc, last.epoch) if last else (0, 0)
    return Walk(address, seq, crc, epoch, *(dirty or (address, seq)), end, records, is_unreadable)


def look_ahead(disk: Disk, superblock: Superblock, end_address: int, missing_seq: int) -> RecordHeader | None:
    """A record behind the end of the log that says that record `missing_seq` was durable when it was sealed.

    Records that were written but not yet durable say nothing of the kind. After power loss they may be there while one
    before them is not. What cannot be read says nothing.
    """
    reader = BlockReader(disk, superblock.ring_blocks)
    magic = record_magic(superblock.uuid)
    magic_bytes = magic.to_bytes(8, "little")
    last = superblock.tail_address + superblock.ring_blocks
    address = end_address + 1
    limit = min(last, address + LOOK_AHEAD_BLOCKS)
    while address < limit:
        try:
            if bytes(reader.blocks(address, 1, READ_AHEAD_BLOCKS)[:8]) != magic_bytes:
                address += 1
                continue
            header = reader.header(address, READ_AHEAD_BLOCKS)
        except CacheUnreadableError:
            address += 1
            continue
        ours = (
            header is not None
            and header.address == address
            and header.epoch == superblock.epoch
            and header.seq > missing_seq
        )
        if header is None or not ours:
            address += 1
            continue
        if header.durable_seq >= missing_seq:
            return header
        address += header.blocks
        limit = min(last, address + LOOK_AHEAD_BLOCKS)
    return None


class BlockReader:
    """Reads ring blocks by log address, several at once where the next ones will be asked for too."""

    def __init__(self, disk: Disk, ring_blocks: int) -> None:
        self._disk = disk
        self._ring_blocks = ring_blocks
        self._first = 0
        self._count = 0
        self._data = memoryview(b"")
        self._alone_below = 0
        """Up to there something cannot be read: nothing is read ahead."""

    def blocks(self, address: int, count: int, ahead: int = 1) -> memoryview:
        """`count` blocks, which the ring's end must not split. CacheUnreadableError: they cannot be read."""
        skip = address - self._first
        if not 0 <= skip <= self._count - count:
            to_end = blocks_to_ring_end(address, self._ring_blocks)
            assert count <= to_end
            most = max(count, min(ahead, to_end) if address >= self._alone_below else 0)
            self._data = memoryview(self._read(address, count, most))
            self._count = len(self._data) // BLOCK_BYTES
            self._first = address
            skip = 0
        return self._data[skip * BLOCK_BYTES : (skip + count) * BLOCK_BYTES]

    def _read(self, address: int, count: int, most: int) -> bytes:
        offset = offset_bytes(address, self._ring_blocks)
        try:
            data = self._disk.read(offset, most * BLOCK_BYTES)
        except CacheUnreadableError:
            if most == count:
                raise
            self._alone_below = address + most
            data = self._disk.read(offset, count * BLOCK_BYTES)
        assert len(data) in (count * BLOCK_BYTES, most * BLOCK_BYTES)
        return data

    def header(self, address: int, ahead: int) -> RecordHeader | None:
        """The header at this address, if a whole one is there."""
        data = self.blocks(address, 1, ahead)
        if header_blocks_in(data) == 2:
            if blocks_to_ring_end(address, self._ring_blocks) < 2:
                return None
            data = self.blocks(address, 2, ahead)
        return parse_header(data)


class _Judge:
    """Whether a header belongs behind those accepted so far."""

    def __init__(self, superblock: Superblock) -> None:
        self._superblock = superblock
        self._magic = record_magic(superblock.uuid)
        self._previous_crc = 0
        self._last_epoch = 0
        self._first = True

    def refuses(self, header: RecordHeader, address: int, seq: int) -> str:
        """Why it does not, half a sentence; empty: it does."""
        superblock = self._superblock
        if header.magic != self._magic:
            return "there is a record of another cache"
        if header.address != address or header.seq != seq:
            return f"there is record {header.seq} of address {header.address}"
        if seq >= superblock.open_seq:
            if header.epoch != superblock.epoch:
                return f"there is a record of epoch {header.epoch} and not {superblock.epoch}"
        elif not self._last_epoch <= header.epoch < superblock.epoch:
            return f"there is a record of epoch {header.epoch}"
        if not self._first and header.previous_crc != self._previous_crc:
            return "there is a record that follows another one"
        end = address + header.blocks
        if header.blocks > blocks_to_ring_end(address, superblock.ring_blocks):
            return "there is a record that runs over the end of the ring"
        if header.is_pad and end % superblock.ring_blocks:
            return "there is a pad that does not end where the ring does"
        if end > superblock.tail_address + superblock.ring_blocks:
            return "there is a record that runs into the tail"
        if address < superblock.durable_address < end:
            return "there is a record that crosses the durable address"
        return ""

    def accept(self, header: RecordHeader) -> None:
        self._previous_crc = header.crc
        self._last_epoch = header.epoch
        self._first = False


def _payload_fault(reader: BlockReader, header: RecordHeader) -> str:
    total = header.header_blocks + header.payload_blocks
    data = reader.blocks(header.address, total, max(total, READ_AHEAD_BLOCKS))[header.header_blocks * BLOCK_BYTES :]
    for index, crc in enumerate(header.crcs):
        if crc32c(data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]) != crc:
            return f"payload block {index} of record {header.seq} has a wrong checksum"
    return ""
