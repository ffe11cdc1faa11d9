"""What the program is called, and how its commands say a size, a duration and a number of things to a person."""

from __future__ import annotations

from typing import Final

PROGRAM: Final = "vhostcache"


def version() -> str:
    """Of the package that is installed."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed(PROGRAM)
    except PackageNotFoundError:
        return "(not installed)"


def size(size_bytes: int) -> str:
    """Such as 4 GiB or 1.5 MiB: for reading, not exact."""
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def count(number: int, what: str) -> str:
    """Such as "1 record", "2,000 records"."""
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def share(part: int, whole: int) -> str:
    """A percentage; nothing has none."""
    return f"{100 * part / whole:.0f} %" if whole else "-"
