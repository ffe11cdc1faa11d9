"""A storage device with a volatile write cache, in blocks of 4096 bytes.

Owns what a read returns now (`live`) and, for each block written since it was last known durable, every version that a
power loss may leave of it. A sync covers only writes whose completion had been reported when it was issued. Power loss
picks for each block, or each of its sectors, any of the versions, so writes are lost, torn and reordered. A bad block
cannot be read until it is written, as sectors that a disk replaces then. It never decides when anything happens: engine
and world do.
"""

import random
from collections.abc import Callable, Sequence
from typing import Final

from vhostcache.errors import CacheUnreadableError

BLOCK: Final = 4096
SECTOR: Final = 512
ZEROES: Final = bytes(BLOCK)


class Crash(BaseException):
    """The process ends here. (Not an Exception: nothing under test may catch it.)"""


class Medium:
    """`blocks` blocks of zeroes."""

    def __init__(self, blocks: int, rng: random.Random) -> None:
        self.live: list[bytes] = [ZEROES] * blocks
        self.versions: dict[int, list[bytes]] = {}
        """Block -> what it may hold after a power loss; the first is durable, the last is live."""
        self.reported: dict[int, bytes] = {}
        """What a sync issued now covers."""
        self.bad: dict[int, int] = {}
        """Block that cannot be read -> since when."""
        self.rng = rng
        self.stamp = 1
        """Moves with each write, as a file's mtime does."""

    def grow(self, blocks: int) -> None:
        """By zeroes at its end, durably."""
        self.live += [ZEROES] * (blocks - len(self.live))
        self.stamp += 1

    def land(self, block: int, data: bytes) -> None:
        """A write arrives in the device's cache."""
        versions = self.versions.get(block)
        if versions is None:
            self.versions[block] = [self.live[block], data]
        else:
            versions.append(data)
        self.live[block] = data
        self.stamp += 1
        if self.bad:
            self.bad.pop(block, None)

    def tear(self, block: int, data: bytes) -> bytes:
        """What a write that was cut short leaves: some sectors new, the others as they were."""
        bits = int(self.rng.random() * 256)
        old = self.live[block]
        return b"".join((data if bits >> i & 1 else old)[i * SECTOR : (i + 1) * SECTOR] for i in range(BLOCK // SECTOR))

    def synced(self, covers: dict[int, bytes]) -> None:
        """A sync that covers these versions has succeeded."""
        for block, data in covers.items():
            versions = self.versions.get(block)
            if versions is None:
                continue
            for i in range(len(versions) - 1, 0, -1):
                if versions[i] is data:
                    del versions[:i]
                    break
            if len(versions) == 1:
                del self.versions[block]

    def sync_failed(self, covers: dict[int, bytes]) -> None:
        """Of each write: it is durable, or it is lost now, or at the next power loss, whatever syncs succeed."""
        for block, data in covers.items():
            choice = self.rng.random()
            if choice < 0.3:
                self.synced({block: data})
            elif choice < 0.6 and self.live[block] is data:
                versions = self.versions.pop(block, None)
                if versions:
                    self.live[block] = versions[0]

    def power_loss(self, mode: int) -> None:
        """What is not durable is kept (0), lost (1), either by block (2), torn by sector (3), or lost up to some block
        and kept behind it (4)."""
        random_number = self.rng.random
        if mode == 4 and self.versions:
            blocks = sorted(self.versions)
            for block in blocks[: int(random_number() * len(blocks))]:
                self.live[block] = self.versions[block][0]
        for block, versions in self.versions.items():
            if mode == 1 or (2 <= mode <= 3 and random_number() < 0.3):
                self.live[block] = versions[0]
            elif mode == 2:
                self.live[block] = versions[int(random_number() * len(versions))]
            elif mode == 3:
                picked = [versions[int(random_number() * len(versions))] for _ in range(BLOCK // SECTOR)]
                self.live[block] = b"".join(v[i * SECTOR : (i + 1) * SECTOR] for i, v in enumerate(picked))
        self.versions.clear()
        self.reported.clear()

    def flip(self, block: int, bit: int) -> None:
        """One bit of what is there rots, and that is durable."""
        byte, mask = bit >> 3, 1 << (bit & 7)
        data = self.live[block]
        self.live[block] = data[:byte] + bytes((data[byte] ^ mask,)) + data[byte + 1 :]
        self.versions.pop(block, None)
        self.reported.pop(block, None)


class SyncDisk:
    """A medium as recovery sees it: every call waits. `countdown` operations that change something, then a Crash."""

    def __init__(self, medium: Medium, countdown: int = -1, fail: Callable[[], bool] | None = None) -> None:
        self.medium = medium
        self.size_bytes = len(medium.live) * BLOCK
        self.countdown = countdown
        self.operations = 0
        self.fail = fail

    def _count(self) -> bool:
        self.operations += 1
        if self.operations == self.countdown:
            return True
        if self.fail is not None and self.fail():
            raise OSError(5, "simulated")
        return False

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of whole or partial blocks."""
        assert offset >= 0
        assert offset + size <= self.size_bytes, "a read beyond the device's end"
        first, end = offset // BLOCK, -(-(offset + size) // BLOCK)
        for block in self.medium.bad:
            if first <= block < end:
                raise CacheUnreadableError("cache", f"cannot be read at byte {block * BLOCK}: simulated")
        if end - first == 1 and size == BLOCK:
            return self.medium.live[first]
        data = b"".join(self.medium.live[first:end])
        start = offset - first * BLOCK
        return data if start == 0 and len(data) == size else data[start : start + size]

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Whole blocks."""
        crash = self._count()
        assert offset % BLOCK == 0
        assert len(data) % BLOCK == 0, "not direct I/O"
        assert offset + len(data) <= self.size_bytes, "a write beyond the device's end"
        medium = self.medium
        data = bytes(data)
        for i in range(0, len(data), BLOCK):
            block, part = (offset + i) // BLOCK, data[i : i + BLOCK]
            if crash:
                medium.land(block, medium.tear(block, part))
            else:
                medium.land(block, part)
                medium.reported[block] = part
        if crash:
            raise Crash

    def sync(self) -> None:
        """Also of what an earlier process has written."""
        if self._count():
            raise Crash
        self.medium.versions.clear()
        self.medium.reported.clear()


def blocks_of(data: bytes) -> Sequence[bytes]:
    """Cut whole blocks."""
    return [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)]
