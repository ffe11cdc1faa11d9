"""QEMU's cache modes: by name, and by the three parts that each name stands for.

The parts are QEMU's (`cache.writeback`, `cache.direct`, `cache.no-flush`), and they are independent: any combination
can be asked for. `writeback` is when a write is acknowledged, `direct` how the backend is opened, `no_flush` whether a
guest's flush means anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Mode:
    writeback: bool  # a write is acknowledged when it is in the cache; otherwise when it is durable on the backend
    direct: bool  # the backend is opened with O_DIRECT
    no_flush: bool  # a guest's flush is answered and not performed: unsafe

    @property
    def name(self) -> str:
        """The mode's name, or its parts in QEMU's spelling where no name stands for them."""
        for name, mode in MODES.items():
            if mode == self:
                return name
        parts = {"cache.writeback": self.writeback, "cache.direct": self.direct, "cache.no-flush": self.no_flush}
        return ",".join(f"{key}={'on' if value else 'off'}" for key, value in parts.items())


MODES: Final = {
    "writeback": Mode(writeback=True, direct=False, no_flush=False),
    "none": Mode(writeback=True, direct=True, no_flush=False),
    "writethrough": Mode(writeback=False, direct=False, no_flush=False),
    "directsync": Mode(writeback=False, direct=True, no_flush=False),
    "unsafe": Mode(writeback=True, direct=False, no_flush=True),
}

DEFAULT: Final = "none"


def resolve(name: str, writeback: bool | None = None, direct: bool | None = None, no_flush: bool | None = None) -> Mode:
    """The mode of that name, with the parts that are given put in place of its own. KeyError: no such name."""
    base = MODES[name]
    return Mode(
        writeback=base.writeback if writeback is None else writeback,
        direct=base.direct if direct is None else direct,
        no_flush=base.no_flush if no_flush is None else no_flush,
    )
