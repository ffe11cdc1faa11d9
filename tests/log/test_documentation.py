"""docs/log-format.md shows what the code writes."""

from __future__ import annotations

from pathlib import Path

from tests.log.harness import BLOCK, MemoryDisk, Writer
from vhostcache.log.format import DISCARD, extent
from vhostcache.log.recovery import BackendFacts, create, recover

PAGE = Path(__file__).resolve().parents[2] / "docs" / "log-format.md"


def the_example() -> MemoryDisk:
    disk = MemoryDisk(64)
    image = BackendFacts(b"disk", 1 << 30, 1_000_000_000)
    create(disk, bytes(range(16)), image)
    recovered = recover(disk, None, bytes(range(0x20, 0x30)), image, tier_uuid=bytes(range(0x30, 0x40)))
    Writer(disk, recovered).record([extent(100, 10, DISCARD), extent(5, 2)], [b"a" * BLOCK, b"b" * BLOCK])
    return disk


def hexdump(data: bytes, offset: int) -> list[str]:
    """As `hexdump -C`, without the lines of zeroes."""
    lines = []
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        if any(row):
            text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
            lines.append(f"{offset + at:08x}  {row[:8].hex(' ')}  {row[8:].hex(' ')}  |{text}|")
    return lines


def test_the_worked_example_is_what_the_code_writes() -> None:
    disk = the_example()
    page = PAGE.read_text(encoding="utf-8")
    for lines in (hexdump(disk.data[:BLOCK], 0), hexdump(disk.data[1 << 20 : (1 << 20) + BLOCK], 1 << 20)):
        assert "\n".join(lines) in page
