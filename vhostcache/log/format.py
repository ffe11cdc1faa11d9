"""Records: how one append to the log looks on disk.

Owns the header's layout, the extent word, and the arithmetic of log addresses; docs/log-format.md describes the same
byte by byte. Invariants: a header that `parse_header` returns is whole (its crc32c holds) and consistent in itself
(its counts fit its size, its data extents add up to its payload). Whether a record belongs where it was found (volume,
address, seq, epoch, the record before it) is for the reader to say: walk.py.
It never does I/O. Integers are little-endian, as the machines are that this runs on.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Final, NamedTuple

from crc32c import crc32c

from vhostcache.operations import BLOCK_BYTES

RING_OFFSET_BYTES: Final = 1 << 20
HEADER_BYTES: Final = 64
RECORD_BLOCKS: Final = 256
"""The most payload of a record that gathers requests."""
REQUEST_BLOCKS: Final = 1024
"""The most payload of one request, which has a record of its own when it is larger than RECORD_BLOCKS."""
RECORD_MAX_BLOCKS: Final = 2 + REQUEST_BLOCKS
RING_MIN_BLOCKS: Final = 4 * RECORD_MAX_BLOCKS
"""Below this, a pad and one large record would be most of the ring."""

# Kinds of extents. Zero and discard extents read as zeroes; a zero extent stays allocated, a discard may be unmapped.
# What is lost can't be read: the log had it, and it has rotted.
DATA: Final = 0
ZERO: Final = 1
DISCARD: Final = 2
PAD: Final = 3
LOST: Final = 4

FLAG_PAD: Final = 1

BLOCK_LIMIT: Final = 1 << 40
COUNT_LIMIT: Final = 1 << 20
_BLOCK_MASK: Final = BLOCK_LIMIT - 1
_COUNT_MASK: Final = COUNT_LIMIT - 1

RECORD_MAGIC: Final = int.from_bytes(b"vhcR\xe9log", "little")
_FIXED: Final = Struct("<QQQQIIIIQII")
_CRCS: Final = Struct("<II")
_CRCS_BYTES: Final = 56
_NO_CRC: Final = bytes(4)


class RecordHeader(NamedTuple):
    magic: int
    epoch: int
    seq: int
    address: int
    header_blocks: int
    payload_blocks: int
    extents: tuple[int, ...]
    """Extent words, in the order of the payload."""
    flags: int
    durable_seq: int
    """The last record that was durable when this one was sealed."""
    previous_crc: int
    crc: int
    crcs: array[int]
    """A crc32c for each payload block."""

    @property
    def is_pad(self) -> bool:
        return self.flags & FLAG_PAD != 0

    @property
    def blocks(self) -> int:
        """From this header to where the next record begins."""
        if self.flags & FLAG_PAD:
            return self.header_blocks + sum(word >> 40 & _COUNT_MASK for word in self.extents)
        return self.header_blocks + self.payload_blocks


def extent(block: int, count: int, kind: int = DATA) -> int:
    assert 0 <= block < BLOCK_LIMIT
    assert 0 < count < COUNT_LIMIT
    return block | count << 40 | kind << 60


def split_extent(word: int) -> tuple[int, int, int]:
    """Block, count, kind."""
    return word & _BLOCK_MASK, word >> 40 & _COUNT_MASK, word >> 60


def record_magic(uuid: bytes) -> int:
    """What the records of this volume begin with."""
    return RECORD_MAGIC ^ int.from_bytes(uuid[:8], "little")


def ring_blocks_of(size_bytes: int) -> int:
    """The blocks of the ring in a cache file of that size."""
    return max(0, size_bytes - RING_OFFSET_BYTES) // BLOCK_BYTES


def offset_bytes(address: int, ring_blocks: int) -> int:
    """Where in the cache file a log address lies."""
    return RING_OFFSET_BYTES + address % ring_blocks * BLOCK_BYTES


def blocks_to_ring_end(address: int, ring_blocks: int) -> int:
    """How many blocks a record that begins there can have."""
    return ring_blocks - address % ring_blocks


def header_blocks_for(extents: int, payload_blocks: int) -> int:
    """1 or 2; 0 when so much fits into no header."""
    used = HEADER_BYTES + 8 * extents + 4 * payload_blocks
    if used <= BLOCK_BYTES and payload_blocks <= RECORD_BLOCKS:
        return 1
    return 2 if used <= 2 * BLOCK_BYTES and payload_blocks <= REQUEST_BLOCKS else 0


def header_words(
    magic: int,
    epoch: int,
    seq: int,
    address: int,
    header_blocks: int,
    payload_blocks: int,
    extents: Sequence[int],
    durable_seq: int,
    flags: int = 0,
) -> list[int]:
    """The header up to the end of its extents as u64 words; its two crcs (word 7) are 0."""
    assert HEADER_BYTES + 8 * len(extents) + 4 * payload_blocks <= header_blocks * BLOCK_BYTES
    return [
        magic,
        epoch,
        seq,
        address,
        header_blocks | payload_blocks << 32,
        len(extents) | flags << 32,
        durable_seq,
        0,
        *extents,
    ]


def pad_words(magic: int, epoch: int, seq: int, address: int, ring_blocks: int, durable_seq: int) -> list[int]:
    """The header of the record that fills the ring from `address` to its end."""
    further = blocks_to_ring_end(address, ring_blocks) - 1
    extents = [extent(0, further, PAD)] if further else []
    return header_words(magic, epoch, seq, address, 1, 0, extents, durable_seq, FLAG_PAD)


def compose(words: Sequence[int], previous_crc: int, payload: Iterable[bytes]) -> tuple[bytes, int]:
    """The header's bytes, its crcs computed, and its own crc: what the engine does with LOG_WRITE."""
    header = bytearray((words[4] & 0xFFFFFFFF) * BLOCK_BYTES)
    position = 8 * len(words)
    header[:position] = array("Q", words).tobytes()
    crcs = array("I", (crc32c(block) for block in payload))
    assert len(crcs) == words[4] >> 32
    header[position : position + 4 * len(crcs)] = crcs.tobytes()
    _CRCS.pack_into(header, _CRCS_BYTES, previous_crc, 0)
    crc = crc32c(header)
    _CRCS.pack_into(header, _CRCS_BYTES, previous_crc, crc)
    return bytes(header), crc


def header_blocks_in(data: bytes | memoryview) -> int:
    """What the header that begins here says of its own size; anything but 1 and 2 is no header."""
    return int.from_bytes(data[32:36], "little")


def parse_header(data: bytes | bytearray | memoryview) -> RecordHeader | None:
    """The header that `data` begins with, or None when that is none, or not whole, or contradicts itself.

    `data` must hold all of it: 2 blocks when `header_blocks_in` says 2.
    """
    if len(data) < BLOCK_BYTES:
        return None
    (
        magic,
        epoch,
        seq,
        address,
        header_blocks,
        payload_blocks,
        extents_count,
        flags,
        durable_seq,
        previous_crc,
        crc,
    ) = _FIXED.unpack_from(data)
    if not 1 <= header_blocks <= 2 or header_blocks * BLOCK_BYTES > len(data):
        return None
    crcs_at = HEADER_BYTES + 8 * extents_count
    crcs_end = crcs_at + 4 * payload_blocks
    size = header_blocks * BLOCK_BYTES
    if crcs_end > size:
        return None
    view = memoryview(data)
    if crc32c(view[HEADER_BYTES:size], crc32c(_NO_CRC, crc32c(view[: HEADER_BYTES - 4]))) != crc:
        return None
    extents = Struct(f"<{extents_count}Q").unpack_from(data, HEADER_BYTES)
    crcs = array("I")
    crcs.frombytes(view[crcs_at:crcs_end])
    header = RecordHeader(
        magic,
        epoch,
        seq,
        address,
        header_blocks,
        payload_blocks,
        extents,
        flags,
        durable_seq,
        previous_crc,
        crc,
        crcs,
    )
    return header if _consistent(header) else None


def _consistent(header: RecordHeader) -> bool:
    """Whether the extents fit the rest. The crc held, so this finds a writer's mistake, and future versions."""
    data_blocks = 0
    for word in header.extents:
        count = word >> 40 & _COUNT_MASK
        kind = word >> 60
        if count == 0 or kind > LOST or (kind == PAD) != header.is_pad:
            return False
        if kind == DATA:
            data_blocks += count
    if header.is_pad and (header.header_blocks != 1 or len(header.extents) > 1):
        return False
    return data_blocks == header.payload_blocks and header.flags & ~FLAG_PAD == 0
