"""What the tools do with a cache that no daemon has open: measure it, check all of it, list it, write it back.

Owns the way from records to the newest blocks of each object without an index of all blocks: the extents of each
object in log order, painted over one another when that object's turn comes. Memory follows the records, not the blocks.

It works on a `Disk` and on an `Image`, and opens nothing. Only `drain` writes, and only to the image.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from crc32c import crc32c

from vhostcache.errors import CacheCorruptError, CacheUnreadableError
from vhostcache.log.format import DATA, DISCARD, LOST, PAD, ZERO, offset_bytes, split_extent
from vhostcache.log.superblock import Superblock
from vhostcache.log.walk import BlockReader, Disk, Progress, RecordFacts
from vhostcache.operations import BLOCK_BYTES

OBJECT_BYTES: Final = 4 << 20
_KINDS: Final = {DATA: "data", ZERO: "zero", DISCARD: "discard", PAD: "pad", LOST: "lost"}


class Image(Protocol):
    """Where the data ends up. Offsets and sizes in bytes."""

    @property
    def size_bytes(self) -> int: ...
    def write(self, offset: int, data: bytes) -> None: ...
    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None: ...
    def sync(self) -> None: ...


@dataclass(frozen=True)
class Run:
    """Neighbouring blocks of one kind."""

    block: int
    count: int
    kind: int
    addresses: tuple[int, ...]
    """Of data: where in the log each block lies."""


class DirtyObject(NamedTuple):
    number: int
    data_blocks: int
    zero_blocks: int
    lost_blocks: int


@dataclass(frozen=True)
class CorruptRange:
    """What the guest would not get to see."""

    offset_bytes: int
    size_bytes: int
    seq: int


class DirtyMap:
    """What the log has and the image does not, object by object."""

    def __init__(self, records: Iterable[RecordFacts], clean_address: int, object_bytes: int = OBJECT_BYTES) -> None:
        self._object_blocks = object_bytes // BLOCK_BYTES
        self._extents: dict[int, list[tuple[int, int, int, int]]] = {}
        """Object -> (first block in it, count, kind, address of the first) in log order."""
        for record in records:
            if record.address + record.header_blocks + record.payload_blocks > clean_address:
                self._add(record)

    @property
    def objects(self) -> list[int]:
        return sorted(self._extents)

    def _add(self, record: RecordFacts) -> None:
        # Zeroes have the header's address: they lie below the data of the same record.
        for wanted_data in (False, True):
            address = record.address + record.header_blocks
            for word in record.extents:
                block, count, kind = split_extent(word)
                if kind == PAD:
                    continue
                if (kind == DATA) == wanted_data:
                    self._add_extent(block, count, kind, address)
                if kind == DATA:
                    address += count

    def _add_extent(self, block: int, count: int, kind: int, address: int) -> None:
        end = block + count
        while block < end:
            number, first = divmod(block, self._object_blocks)
            here = min(end - block, self._object_blocks - first)
            extents = self._extents.setdefault(number, [])
            if here == self._object_blocks:
                extents.clear()  # nothing of what lies beneath can be seen any more
            extents.append((first, here, kind, address))
            block += here
            address += here if kind == DATA else 0

    def runs(self, number: int) -> list[Run]:
        """The newest blocks of this object, neighbours merged."""
        painted: list[tuple[int, int] | None] = [None] * self._object_blocks
        for first, count, kind, address in self._extents[number]:
            for index in range(count):
                painted[first + index] = (kind, address + index if kind == DATA else 0)
        runs: list[Run] = []
        base = number * self._object_blocks
        first = 0
        while first < self._object_blocks:
            here = painted[first]
            if here is None:
                first += 1
                continue
            end = first + 1
            while end < self._object_blocks and (there := painted[end]) is not None and there[0] == here[0]:
                end += 1
            addresses = tuple(one[1] for one in painted[first:end] if one is not None) if here[0] == DATA else ()
            runs.append(Run(base + first, end - first, here[0], addresses))
            first = end
        return runs

    def summary(self) -> list[DirtyObject]:
        """Each object's dirty blocks, the most first."""
        found = []
        for number in self._extents:
            runs = self.runs(number)
            data = sum(run.count for run in runs if run.kind == DATA)
            lost = sum(run.count for run in runs if run.kind == LOST)
            found.append(DirtyObject(number, data, sum(run.count for run in runs) - data - lost, lost))
        return sorted(found, key=lambda one: (-one.data_blocks, -one.zero_blocks, one.number))

    def lost(self) -> list[CorruptRange]:
        """What a daemon has found rotten or unreadable, and nobody has overwritten since."""
        found: list[CorruptRange] = []
        for number in self.objects:
            for run in self.runs(number):
                if run.kind == LOST:
                    for block in range(run.block, run.block + run.count):
                        _add_corrupt(found, block, 0)
        return found


class PayloadReader:
    """Payload blocks by log address, each with its checksum held against what was read, if that can be read."""

    def __init__(self, disk: Disk, superblock: Superblock, records: Sequence[RecordFacts]) -> None:
        self._reader = BlockReader(disk, superblock.ring_blocks)
        self._superblock = superblock
        self._records = [record for record in records if record.payload_blocks]
        self._starts = [record.address for record in self._records]

    def read(self, addresses: Sequence[int]) -> Iterator[bytes | None]:
        """Each block, or None where its checksum is wrong or it cannot be read."""
        for address in addresses:
            record = self._records[bisect_right(self._starts, address) - 1]
            index = address - record.address - record.header_blocks
            data = _payload_block(self._reader, record, index)
            yield bytes(data) if data is not None else None


def _payload_block(reader: BlockReader, record: RecordFacts, index: int) -> memoryview | None:
    """None: nobody can have it any more, or not now."""
    try:
        data = reader.blocks(record.address + record.header_blocks + index, 1, record.payload_blocks - index)
    except CacheUnreadableError:
        return None
    return data if crc32c(data) == record.crcs[index] else None


def check_payload(
    disk: Disk, superblock: Superblock, records: Sequence[RecordFacts], progress: Progress | None = None
) -> list[CorruptRange]:
    """Read the payload of every record; the ranges of the volume whose data there is damaged, or cannot be read."""
    reader = BlockReader(disk, superblock.ring_blocks)
    corrupt: list[CorruptRange] = []
    total = sum(record.payload_blocks for record in records)
    done = 0
    for record in records:
        index = 0
        for word in record.extents:
            block, count, kind = split_extent(word)
            if kind != DATA:
                continue
            for at in range(block, block + count):
                if _payload_block(reader, record, index) is None:
                    _add_corrupt(corrupt, at, record.seq)
                index += 1
        done += record.payload_blocks
        if progress:
            progress(done, total)
    return corrupt


def _add_corrupt(corrupt: list[CorruptRange], block: int, seq: int) -> None:
    last = corrupt[-1] if corrupt else None
    if last and last.seq == seq and last.offset_bytes + last.size_bytes == block * BLOCK_BYTES:
        corrupt[-1] = CorruptRange(last.offset_bytes, last.size_bytes + BLOCK_BYTES, seq)
    else:
        corrupt.append(CorruptRange(block * BLOCK_BYTES, BLOCK_BYTES, seq))


def drain(
    disk: Disk,
    superblock: Superblock,
    records: Sequence[RecordFacts],
    image: Image,
    *,
    subject: str = "cache",
    progress: Callable[[int, int], None] | None = None,
    object_bytes: int = OBJECT_BYTES,
    give_up: Callable[[list[CorruptRange]], None] | None = None,
) -> int:
    """Write all that the image does not have into it, an object after the other, and sync it; the blocks written.

    CacheCorruptError: a block is damaged. Everything else of its object and of all others has been written by then,
    and the log still has all of it. With `give_up` no error: it is handed what is lost, which the image has in an older
    version.
    """
    dirty = DirtyMap(records, superblock.clean_address, object_bytes)
    reader = PayloadReader(disk, superblock, records)
    corrupt: list[CorruptRange] = []
    written = 0
    objects = dirty.objects
    for done, number in enumerate(objects):
        for run in dirty.runs(number):
            if run.kind == LOST:
                for block in range(run.block, run.block + run.count):
                    _add_corrupt(corrupt, block, 0)
                continue
            written += run.count
            if run.kind == DATA:
                _drain_data(reader, run, image, corrupt)
            else:
                size = min(run.count * BLOCK_BYTES, image.size_bytes - run.block * BLOCK_BYTES)
                if size > 0:
                    image.write_zeroes(run.block * BLOCK_BYTES, size, run.kind == DISCARD)
        if progress:
            progress(done + 1, len(objects))
    image.sync()
    if corrupt and give_up is not None:
        give_up(corrupt)
    elif corrupt:
        raise CacheCorruptError(
            subject,
            f"{len(corrupt)} ranges are damaged, the first {corrupt[0].size_bytes} bytes at {corrupt[0].offset_bytes}",
            "data that can be read, with a right checksum",
            "all the rest has been written to the image, and `vhostcache check` lists them; with --give-up-damaged the"
            " image keeps its older version there, and the cache can be used again",
        )
    return written


def _drain_data(reader: PayloadReader, run: Run, image: Image, corrupt: list[CorruptRange]) -> None:
    """One write for the run, or one for each part of it between damaged blocks."""
    piece: list[bytes] = []
    first = run.block
    for block, data in enumerate([*reader.read(run.addresses), None], run.block):
        if data is not None:
            piece.append(data)
            continue
        if piece:
            content = b"".join(piece)
            offset = first * BLOCK_BYTES
            image.write(offset, content[: image.size_bytes - offset])  # the last block may be half beyond the end
        if block < run.block + run.count:
            _add_corrupt(corrupt, block, 0)
        piece = []
        first = block + 1


def dump(disk: Disk, superblock: Superblock, records: Sequence[RecordFacts]) -> Iterator[dict[str, Any]]:
    """Each record as something for JSON."""
    reader = BlockReader(disk, superblock.ring_blocks)
    for record in records:
        header = reader.header(record.address, 1)
        extents = []
        for word in record.extents:
            block, count, kind = split_extent(word)
            extents.append({"block": block, "count": count, "kind": _KINDS[kind]})
        yield {
            "seq": record.seq,
            "address": record.address,
            "offset_bytes": offset_bytes(record.address, superblock.ring_blocks),
            "epoch": header.epoch if header else None,
            "header_blocks": record.header_blocks,
            "payload_blocks": record.payload_blocks,
            "durable_seq": header.durable_seq if header else None,
            "extents": extents,
        }
