"""The RAM-tier file: what has been acknowledged and is not yet durable in the log.

Owns the layout of that file on tmpfs: a header page, a ring of entries, and the slots. The engine writes payload, then
entries, then the count of entries ("head"), and only then is a request complete; so whoever maps the file after a
crash finds every acknowledged write between tail and head. This module writes only the header, once, into a new file;
it never changes one that holds data, and it never opens a file itself: it is handed the mapped bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from mmap import mmap
from struct import Struct
from typing import Final, NamedTuple

from crc32c import crc32c

from vhostcache.log.format import BLOCK_LIMIT, DATA, LOST, PAD, split_extent
from vhostcache.operations import BLOCK_BYTES

MAGIC: Final = b"vhctier\xe9"
VERSION: Final = 1
ENTRY_BYTES: Final = 24
HEAD_OFFSET_BYTES: Final = 1024
TAIL_OFFSET_BYTES: Final = 1088

# magic, version, crc, volume uuid, boot id, tier uuid, epoch, slots, entry capacity, entries offset, slab offset
_FIXED: Final = Struct("<8sII16s16s16sQQQQQ")
_FIXED_BYTES: Final = 512
_CRC_BYTES: Final = 12
_ENTRY: Final = Struct("<QQQ")
_U64: Final = Struct("<Q")


@dataclass(frozen=True)
class TierLayout:
    """Where things lie in the file. `slots` counts the special ones too; `entries` is what the ring of them holds."""

    slots: int
    entries: int

    @property
    def entries_offset_bytes(self) -> int:
        return BLOCK_BYTES

    @property
    def slab_offset_bytes(self) -> int:
        pages = (self.entries * ENTRY_BYTES + BLOCK_BYTES - 1) // BLOCK_BYTES
        return self.entries_offset_bytes + pages * BLOCK_BYTES

    @property
    def size_bytes(self) -> int:
        return self.slab_offset_bytes + self.slots * BLOCK_BYTES


class TierEntry(NamedTuple):
    seq: int
    extent: int
    slot: int


@dataclass(frozen=True)
class Tier:
    """What a RAM-tier file says, and the mapped file itself for its slots."""

    uuid: bytes
    """The volume's, as in the superblock."""
    boot_id: bytes
    tier_uuid: bytes
    epoch: int
    layout: TierLayout
    head: int
    tail: int
    entries: tuple[TierEntry, ...]
    """Those between tail and head, in the order of their publication."""
    fault: str = ""
    """Why the entries cannot be believed; empty: they can. An intact file is never faulty, whenever its writer dies."""
    data: memoryview = field(default=memoryview(b""), repr=False, compare=False)

    def read_slot(self, slot: int) -> bytes:
        assert 0 <= slot < self.layout.slots
        offset = self.layout.slab_offset_bytes + slot * BLOCK_BYTES
        return bytes(self.data[offset : offset + BLOCK_BYTES])


def pack_header(layout: TierLayout, uuid: bytes, boot_id: bytes, tier_uuid: bytes, epoch: int) -> bytes:
    """The header page of a new file, which is otherwise all zeroes."""
    assert len(uuid) == len(boot_id) == len(tier_uuid) == 16
    page = bytearray(BLOCK_BYTES)
    _FIXED.pack_into(
        page,
        0,
        MAGIC,
        VERSION,
        0,
        uuid,
        boot_id,
        tier_uuid,
        epoch,
        layout.slots,
        layout.entries,
        layout.entries_offset_bytes,
        layout.slab_offset_bytes,
    )
    page[_CRC_BYTES : _CRC_BYTES + 4] = crc32c(page[:_FIXED_BYTES]).to_bytes(4, "little")
    return bytes(page)


def parse(data: bytes | bytearray | memoryview | mmap) -> Tier | None:
    """The RAM tier in a mapped file, or None: not one, or not whole (the file was being made when its maker died).

    The bytes stay mapped: `read_slot` copies out of them later.
    """
    view = memoryview(data)
    if len(view) < BLOCK_BYTES or bytes(view[:8]) != MAGIC:
        return None
    fixed = bytearray(view[:_FIXED_BYTES])
    fixed[_CRC_BYTES : _CRC_BYTES + 4] = bytes(4)
    _, version, crc, uuid, boot_id, tier_uuid, epoch, slots, capacity, entries_offset, slab_offset = _FIXED.unpack_from(
        view
    )
    layout = TierLayout(slots, capacity)
    if version != VERSION or crc32c(fixed) != crc or len(view) < layout.size_bytes:
        return None
    if (entries_offset, slab_offset) != (layout.entries_offset_bytes, layout.slab_offset_bytes):
        return None
    (head,) = _U64.unpack_from(view, HEAD_OFFSET_BYTES)
    (tail,) = _U64.unpack_from(view, TAIL_OFFSET_BYTES)
    entries, fault = _read_entries(view, layout, head, tail)
    return Tier(uuid, boot_id, tier_uuid, epoch, layout, head, tail, entries, fault, view)


def pack_entry(seq: int, extent: int, slot: int) -> bytes:
    """What the engine writes for one entry; for tests and the simulator."""
    return _ENTRY.pack(seq, extent, slot)


def entry_offset_bytes(layout: TierLayout, index: int) -> int:
    """Where the entry with this absolute index lies."""
    return layout.entries_offset_bytes + index % layout.entries * ENTRY_BYTES


def _read_entries(view: memoryview, layout: TierLayout, head: int, tail: int) -> tuple[tuple[TierEntry, ...], str]:
    if not 0 <= head - tail <= layout.entries:
        return (), f"its entries go from {tail} to {head}, and it holds {layout.entries}"
    entries = []
    for index in range(tail, head):
        entry = TierEntry(*_ENTRY.unpack_from(view, entry_offset_bytes(layout, index)))
        block, count, kind = split_extent(entry.extent)
        misplaced = kind == DATA and (count != 1 or entry.slot >= layout.slots)
        unknown = kind == PAD or kind > LOST
        if misplaced or unknown or count == 0 or block + count > BLOCK_LIMIT or entry.seq == 0:
            return (), f"entry {index} names record {entry.seq}, extent {entry.extent:#x}, slot {entry.slot}"
        entries.append(entry)
    return tuple(entries), ""
