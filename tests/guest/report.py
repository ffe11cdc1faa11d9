"""What a guest asked for beside what reached the backend, from the daemon's statistics and from the guest's own
counters.
"""

from dataclasses import dataclass
from typing import Any, Self

from rich.table import Table

from tests.guest import GuestError

SECTOR = 512


@dataclass(frozen=True)
class GuestCounters:
    """/sys/block/*/stat: what the guest's kernel counted from the driver's start on."""

    reads: int
    read_bytes: int
    writes: int
    write_bytes: int
    flushes: int

    @classmethod
    def parse(cls, stat: str) -> Self:
        # The kernel's Documentation/admin-guide/iostats.rst, fields 1 to 17.
        fields = [int(word) for word in stat.split()]
        return cls(
            reads=fields[0],
            read_bytes=fields[2] * SECTOR,
            writes=fields[4],
            write_bytes=fields[6] * SECTOR,
            flushes=fields[15],
        )


def compare_counters(guest: GuestCounters, statistics: dict[str, Any]) -> None:
    """Each byte that the guest wrote has to have arrived, once, and each of its flushes.

    The firmware reads before the kernel counts, and the kernel counts a write that flushes as two.
    """
    arrived = GuestCounters(
        reads=statistics["requests"]["read"],
        read_bytes=statistics["bytes"]["read"],
        # To the kernel, writing zeroes is writing.
        writes=sum(statistics["requests"][kind] for kind in ("write", "zero", "zero_unmap")),
        write_bytes=sum(statistics["bytes"][kind] for kind in ("write", "zero", "zero_unmap")),
        flushes=statistics["requests"]["flush"],
    )
    same = guest.write_bytes == arrived.write_bytes and guest.flushes == arrived.flushes
    if not same or arrived.read_bytes < guest.read_bytes or arrived.writes > guest.writes:
        raise GuestError(f"the guest counted {guest}, the daemon {arrived}")


def traffic(statistics: dict[str, Any]) -> Table:
    """A row a kind; a flush moves no bytes, and neither do discards: theirs are ranges."""
    requests, sizes = statistics["requests"], statistics["bytes"]
    operations, out = statistics["backend_operations"], statistics["backend_bytes"]
    rows = [
        ("write", requests["write"], sizes["write"], operations["write"], out["write"]),
        ("read", requests["read"], sizes["read"], operations["read"], out["read"]),
        ("flush", requests["flush"], 0, operations["flush"], 0),
        (
            "discard, zeroes",
            sum(requests[kind] for kind in ("discard", "zero", "zero_unmap")),
            sum(sizes[kind] for kind in ("discard", "zero", "zero_unmap")),
            operations["zero"],
            out["zero"],
        ),
    ]
    table = Table(title="what the guest asked for, and what reached the backend", title_justify="left")
    table.add_column("")
    for side in ("guest", "backend"):
        for column in ("requests" if side == "guest" else "operations", "MiB", "mean KiB"):
            table.add_column(f"{side}\n{column}", justify="right")
    table.add_column("requests an\noperation", justify="right")
    for name, count, size, backend_count, backend_size in rows:
        ratio = f"{count / backend_count:,.1f}" if backend_count else "-"
        table.add_row(name, *_columns(count, size), *_columns(backend_count, backend_size), ratio)
    return table


def _columns(count: int, size: int) -> tuple[str, str, str]:
    return (
        f"{count:,}",
        f"{size / 2**20:,.1f}" if size else "-",
        f"{size / count / 1024:,.1f}" if size and count else "-",
    )
