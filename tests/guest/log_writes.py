"""The log of the kernel's dm-log-writes: all that a device was asked to write, in an order in which it was completed.

Its format is in the kernel's Documentation/admin-guide/device-mapper/log-writes.rst and drivers/md/dm-log-writes.c: a
superblock, then entries; each begins with a sector for its header, in which a mark has its text, and then comes what
was written. A write is logged by the flush that made it durable, so before a mark stands what was flushed before it.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
_MAGIC = 0x6A736677736872
_END = b"dm-log-writes-end"  # the kernel's own mark, when the device goes
_SUPERBLOCK = struct.Struct("<QQQI")
_ENTRY = struct.Struct("<QQQQ")


@dataclass(frozen=True)
class Entry:
    flags: int
    offset_bytes: int
    size_bytes: int
    data: bytes
    """Of a discard: none. Of a mark: its text."""

    @property
    def mark(self) -> str:
        return self.data.decode() if self.flags & MARK else ""


def read_log(path: Path) -> Iterator[Entry]:
    with path.open("rb") as file:
        magic, version, count, sector = _SUPERBLOCK.unpack(file.read(_SUPERBLOCK.size))
        assert (magic, version) == (_MAGIC, 1), "no log of dm-log-writes"
        at = sector
        for _ in range(count):
            file.seek(at)
            first, sectors, flags, mark_bytes = _ENTRY.unpack(file.read(_ENTRY.size))
            at += sector
            size = sectors * sector
            data = file.read(mark_bytes)
            if flags & MARK == 0 and flags & DISCARD == 0:
                file.seek(at)
                data = file.read(size)
                assert len(data) == size
                at += size
            if data != _END:
                yield Entry(flags, first * sector, size, data)


def steps(log: Path) -> Iterator[tuple[int, bytes] | str | None]:
    """A log as what a disk is asked for: writes (offset and data), None for a flush, and marks."""
    for entry in read_log(log):
        if entry.flags & MARK:
            yield entry.mark
            continue
        assert not entry.flags & DISCARD
        if entry.flags & FLUSH:
            yield None
        if entry.size_bytes:
            yield entry.offset_bytes, entry.data
            if entry.flags & FUA:
                yield None
