"""A cache file: making, opening, locking, and reading and writing it outside the loop.

Owns the file or block device that holds a volume's log, as long as it is open. Invariant: who has it open for writing
holds an OFD lock on the very descriptor that does the I/O, so that a killed daemon's last writes have landed before
the next one reads. All of a new file is allocated at once: a log that runs out of space in mid-life would lose what it
has promised to keep, and each fdatasync would write the file system's journal. It would also do so for blocks that are
allocated and have never been written, so `prewrite` writes zeroes there: a flush takes half the time then.

It is a `Disk` for recovery and the tools: `read`, `write` and `sync` take any length, through an aligned buffer.
Never decides what the contents mean; never overwrites a file that is not empty.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
import time
from collections.abc import Callable
from typing import Any, Final, Self

from vhostcache.backend.base import Notice
from vhostcache.backend.file import direct_alignment
from vhostcache.errors import CacheError, CacheUnreadableError, why

BLOCK_BYTES: Final = 4096
SIZE_MIN_BYTES: Final = 64 << 20
HEAD_BYTES: Final = 1 << 20  # superblocks and room for later; the ring begins behind it

# A killed daemon's I/O may take as long as its device does, and its lock lives until then.
LOCK_WAIT_S: Final = 5.0
_LOCK_RETRY_S: Final = 0.05
_BUFFER_BYTES: Final = 1 << 20
_PREWRITE_BYTES: Final = 4 << 20
_PREWRITES_AT_ONCE: Final = 2

# linux/fiemap.h: struct fiemap, struct fiemap_extent, and the ioctl.
_FS_IOC_FIEMAP: Final = 0xC020660B
_FIEMAP: Final = struct.Struct("QQIIII")  # start, length, flags, mapped extents, room for extents
_FIEMAP_EXTENT: Final = struct.Struct("QQQQQIIII")  # logical, physical, length, two reserved, flags, three reserved
_FIEMAP_LAST: Final = 0x1
_FIEMAP_UNWRITTEN: Final = 0x800
_FIEMAP_EXTENTS: Final = 64

_FLOCK: Final = struct.Struct("hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid
_EXPECTED: Final = "a vhostcache cache file, an empty block device, or a new name"


def subject(path: str) -> str:
    return f"cache '{path}'"


class CacheFile:
    """One opened cache file. `CacheFile.create` makes a new one, `CacheFile(path)` opens what is there."""

    def __init__(self, path: str, read_only: bool = False, lock_wait_s: float = LOCK_WAIT_S) -> None:
        """CacheError: one line, nothing touched, nothing left open."""
        kind = _kind(path)
        flags = os.O_RDONLY if read_only else os.O_RDWR
        if not read_only and stat.S_ISBLK(kind):
            flags |= os.O_EXCL  # of a block device: refused while it is mounted
        self._take(path, _open(path, flags), read_only, lock_wait_s)

    @classmethod
    def create(cls, path: str, size_bytes: int) -> Self:
        """A new file, locked and allocated. CacheError: and no file is left."""
        descriptor = _open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self = cls.__new__(cls)
        try:
            self._take(path, descriptor, read_only=False, lock_wait_s=0.0)
            self.allocate(size_bytes)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise
        return self

    def _take(self, path: str, descriptor: int, read_only: bool, lock_wait_s: float) -> None:
        self.path = path
        self.descriptor = descriptor
        self.warnings: tuple[Notice, ...] = ()
        self.align_mem_bytes = self.align_io_bytes = 1
        self._buffer: mmap.mmap | None = None
        try:
            kind = os.fstat(descriptor).st_mode
            self.is_device = stat.S_ISBLK(kind)
            _lock(path, descriptor, read_only, lock_wait_s)
            self.size_bytes = os.lseek(descriptor, 0, os.SEEK_END)
            self._bypass_page_cache()
            self._buffer = mmap.mmap(-1, _BUFFER_BYTES)
        except BaseException:
            os.close(descriptor)
            raise

    def _bypass_page_cache(self) -> None:
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        alignment = None
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
            alignment = direct_alignment(self.descriptor)
        if alignment is None or alignment[1] > BLOCK_BYTES:
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags)
            fields = {"cache": self.path, "reason": "the file system refuses it", "instead": "the page cache is used"}
            self.warnings = (Notice("no-direct-io", fields),)
        else:
            self.align_mem_bytes, self.align_io_bytes = alignment

    def allocate(self, size_bytes: int) -> None:
        """Make it that large, with every block of it allocated."""
        try:
            os.posix_fallocate(self.descriptor, 0, size_bytes)
            os.fsync(self.descriptor)
            _sync_folder(self.path)
        except OSError as error:
            raise CacheError(
                subject(self.path),
                f"{size_bytes} bytes cannot be allocated: {why(error)}",
                hint="choose a smaller size, or another file system",
            ) from error
        self.size_bytes = os.lseek(self.descriptor, 0, os.SEEK_END)

    def cut(self, size_bytes: int) -> None:
        """Give back what lies behind that, if there is anything; a file system that will not keeps it."""
        if size_bytes < self.size_bytes and not self.is_device:
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, size_bytes)
                self.size_bytes = size_bytes

    def prewrite(self, budget_s: float, progress: Callable[[int, int], None]) -> int:
        """Write zeroes over what is allocated and has never been written, which reads as zeroes anyway, for at most so
        long. `progress(done, of)` is told in bytes. Returns how many bytes are left. CacheError: it cannot be written.
        """
        pieces = [
            (at, min(_PREWRITE_BYTES, start + length - at))
            for start, length in self._unwritten()
            for at in range(start, start + length, _PREWRITE_BYTES)
        ]
        total = sum(size for _, size in pieces)
        if not total:
            return 0
        from concurrent.futures import ThreadPoolExecutor

        deadline = time.monotonic() + budget_s
        done = 0
        with mmap.mmap(-1, _PREWRITE_BYTES) as zeroes, ThreadPoolExecutor(_PREWRITES_AT_ONCE) as pool:

            def write(piece: tuple[int, int]) -> int:
                at, size = piece
                if time.monotonic() >= deadline:
                    return 0
                with memoryview(zeroes) as whole, whole[:size] as part:
                    if os.pwritev(self.descriptor, [part], at) < size:
                        raise OSError(errno.EIO, "a short write")
                return size

            try:
                for size in pool.map(write, pieces):
                    done += size
                    progress(done, total)
                os.fsync(self.descriptor)
            except OSError as error:
                raise CacheError(subject(self.path), f"cannot be written: {why(error)}") from error
        return total - done

    def _unwritten(self) -> list[tuple[int, int]]:
        """(start, length) in bytes, whole blocks; none where the file system does not tell, or knows no such state."""
        found: list[tuple[int, int]] = []
        at, last = 0, self.is_device
        while not last:
            buffer = bytearray(_FIEMAP.size + _FIEMAP_EXTENTS * _FIEMAP_EXTENT.size)
            _FIEMAP.pack_into(buffer, 0, at, self.size_bytes - at, 0, 0, _FIEMAP_EXTENTS, 0)
            try:
                fcntl.ioctl(self.descriptor, _FS_IOC_FIEMAP, buffer)
            except OSError:
                return []
            count = _FIEMAP.unpack_from(buffer)[3]
            last = count == 0
            for i in range(count):
                extent = _FIEMAP_EXTENT.unpack_from(buffer, _FIEMAP.size + i * _FIEMAP_EXTENT.size)
                start, length, flags = extent[0], extent[2], extent[5]
                at = start + length
                end = min(at, self.size_bytes) // BLOCK_BYTES * BLOCK_BYTES
                if flags & _FIEMAP_UNWRITTEN and start % BLOCK_BYTES == 0 and start < end:
                    found.append((start, end - start))
                last = last or bool(flags & _FIEMAP_LAST) or at >= self.size_bytes
        return found

    @property
    def is_sparse(self) -> bool:
        """Copied with holes, perhaps."""
        status = os.fstat(self.descriptor)
        return not self.is_device and status.st_blocks * 512 < status.st_size

    @property
    def is_blank(self) -> bool:
        """Nothing has ever been written where the superblocks stand, nor behind them up to the ring."""
        return not any(self.read(0, min(HEAD_BYTES, self.size_bytes)))

    def close(self) -> None:
        """All I/O on it has ended. Unlocks it now: an io_uring keeps its files for a while after its process."""
        if self.descriptor >= 0:
            with contextlib.suppress(OSError):
                _set_lock(self.descriptor, fcntl.F_UNLCK)
            os.close(self.descriptor)
            self.descriptor = -1
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # As a disk.

    def read(self, offset: int, size: int) -> bytes:
        """CacheUnreadableError: its device does not read that. CacheError: it ends before that."""
        result = bytearray()
        end = offset + size
        first = offset - offset % BLOCK_BYTES
        try:
            while first < end:
                wanted = min(_BUFFER_BYTES, -(-(end - first) // BLOCK_BYTES) * BLOCK_BYTES)
                got = self._transfer(os.preadv, first, wanted)
                if first + got < end and got < wanted:
                    raise CacheError(
                        subject(self.path),
                        f"ends at byte {first + got}",
                        f"{size} bytes at {offset}",
                        "it has been truncated",
                    )
                assert self._buffer is not None
                result += self._buffer[max(0, offset - first) : min(got, end - first)]
                first += wanted
        except OSError as error:
            found = f"cannot be read at byte {first}: {why(error)}"
            raise CacheUnreadableError(subject(self.path), found) from error
        return bytes(result)

    def write(self, offset: int, data: bytes) -> None:
        """Whole blocks. It is durable after the next `sync`."""
        assert offset % BLOCK_BYTES == 0
        assert len(data) % BLOCK_BYTES == 0
        assert self._buffer is not None
        try:
            for at in range(0, len(data), _BUFFER_BYTES):
                piece = data[at : at + _BUFFER_BYTES]
                self._buffer[: len(piece)] = piece
                if self._transfer(os.pwritev, offset + at, len(piece)) < len(piece):
                    raise OSError(errno.ENOSPC, "")
        except OSError as error:
            raise CacheError(subject(self.path), f"cannot be written at byte {offset}: {why(error)}") from error

    def sync(self) -> None:
        try:
            os.fdatasync(self.descriptor)
        except OSError as error:
            raise CacheError(subject(self.path), f"cannot be synced: {why(error)}") from error

    def _transfer(self, call: Callable[[int, list[Any], int], int], offset: int, size: int) -> int:
        """Between the buffer's first `size` bytes and the file; fewer at its end."""
        assert self._buffer is not None
        done = 0
        with memoryview(self._buffer) as whole:
            while done < size:
                with whole[done:size] as rest:
                    count = call(self.descriptor, [rest], offset + done)
                done += count
                if count == 0 or count % BLOCK_BYTES:
                    break
        return done


def _kind(path: str) -> int:
    """Before opening: a pipe would wait for its other end."""
    try:
        kind = os.stat(path).st_mode
    except OSError as error:
        raise CacheError(subject(path), why(error), _EXPECTED) from error
    if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
        raise CacheError(subject(path), "is not a file", _EXPECTED)
    return kind


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        folder = os.path.dirname(path) or "."
        if error.errno == errno.ENOENT and not os.path.isdir(folder):
            raise CacheError(subject(path), f"the folder '{folder}' does not exist", hint="make it first") from error
        raise CacheError(subject(path), why(error), _EXPECTED) from error


def _lock(path: str, descriptor: int, read_only: bool, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            _set_lock(descriptor, fcntl.F_RDLCK if read_only else fcntl.F_WRLCK)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise CacheError(
                    subject(path), f"cannot be locked: {why(error)}", "a file system with OFD locks"
                ) from error
            if time.monotonic() < deadline:
                time.sleep(_LOCK_RETRY_S)
                continue
            raise CacheError(
                subject(path),
                "is in use by another process",
                "a cache file that nobody else has open",
                "stop the other one first",
            ) from error


def _set_lock(descriptor: int, kind: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))


def _sync_folder(path: str) -> None:
    """The new name in its folder is to survive power loss too."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
