"""A raw image or a block device.

Opened as the mode asks (O_DIRECT or the page cache), locked as QEMU locks images, on the descriptor that does the I/O.
Never writes or truncates: what cannot be used as it is, is refused in one line. Extends a file when it is told to.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
import struct
import time
from dataclasses import replace
from typing import ClassVar, Final

from vhostcache.backend import locks, mark
from vhostcache.backend.base import Backend, Facts, Notice, Opened, Opener, Stamp, identity_bytes
from vhostcache.backend.mark import Mark
from vhostcache.errors import ImageError, why

SECTOR_BYTES: Final = 512

# A killed daemon's last writes may still be on their way, and hold its locks until they have landed.
LOCK_WAIT_S: Final = 1.0
_LOCK_RETRY_S: Final = 0.05

_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_SIZE: Final = 0x200
_STATX_DIOALIGN: Final = 0x2000
_STATX_BYTES: Final = 256
_STATX_SIZE_OFFSET: Final = 40
_STATX_DIO: Final = struct.Struct("II")  # stx_dio_mem_align, stx_dio_offset_align
_STATX_DIO_OFFSET: Final = 152
_StatxBuffer = ctypes.c_char * _STATX_BYTES  # made once: a type a call would be garbage that only the collector frees
_LIBRARY_STATX: Final = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)

_EXPECTED: Final = "a raw image or a block device"


class FileBackend(Backend):
    """See the module."""

    kind: ClassVar[str] = "file"
    can_resize: ClassVar[bool] = True

    def __init__(
        self, path: str, read_only: bool, direct: bool, lock_wait_s: float = LOCK_WAIT_S, locked: bool = True
    ) -> None:
        """Open it. ImageError: one line, nothing touched, nothing left open. Not `locked`: to look at, and to be closed
        again before anybody does I/O."""
        self._path = path
        _refuse_other_kinds(path)
        descriptor, direct, self.warnings = _open(path, read_only, direct)
        self._descriptor = descriptor
        try:
            kind = os.fstat(descriptor).st_mode
            self._is_device = stat.S_ISBLK(kind)
            size_bytes = self._size_bytes()
            _refuse_odd_sizes(path, size_bytes)
            if locked:
                _lock(path, descriptor, read_only, lock_wait_s)
            align_mem_bytes, align_io_bytes = 1, 1
            if direct:
                alignment = direct_alignment(descriptor)
                if alignment is None or size_bytes % alignment[1]:
                    direct = False
                    _stop_direct(descriptor)
                    reason = (
                        "the file system refuses it"
                        if alignment is None
                        else f"the size {size_bytes} is not a multiple of the {alignment[1]} bytes that it asks for"
                    )
                    self.warnings = (_no_direct(path, reason),)
                else:
                    align_mem_bytes, align_io_bytes = alignment
        except BaseException:
            os.close(descriptor)
            raise
        self.facts = Facts(
            descriptor=descriptor,
            size_bytes=size_bytes,
            read_only=read_only,
            direct=direct,
            align_mem_bytes=align_mem_bytes,
            align_io_bytes=align_io_bytes,
        )

    @property
    def identity(self) -> str:
        return f"image '{self._path}'"

    def attach(self, opener: Opener) -> Opened:
        return opener.file_backend(self.facts)

    def check(self) -> Notice | None:
        try:
            size_bytes = self._size_bytes()
        except OSError as error:
            return Notice("backend-error", {"backend": self._path, "error": why(error)})
        if size_bytes >= self.facts.size_bytes:
            return None
        return Notice(
            "image-shrank",
            {
                "backend": self._path,
                "size_bytes": size_bytes,
                "expected_bytes": self.facts.size_bytes,
                "hint": "give the image its size back, check it, and start again",
            },
        )

    def resize(self, size_bytes: int) -> None:
        """See Backend. A file is extended, with a hole; a device must have grown already."""
        facts = self.facts
        if facts.direct and size_bytes % facts.align_io_bytes:
            raise ImageError(
                self.identity,
                f"cannot have {size_bytes} bytes: it is used with direct I/O",
                f"a multiple of {facts.align_io_bytes}",
            )
        try:
            # Of its own: what a fsync has to say of a failed write it says once, and the engine is to hear it.
            descriptor = os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDWR | os.O_CLOEXEC)
            try:
                actual_bytes = os.lseek(descriptor, 0, os.SEEK_END)
                self._refuse_size(actual_bytes, size_bytes)
                if actual_bytes < size_bytes:
                    os.ftruncate(descriptor, size_bytes)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ImageError(self.identity, f"cannot be given {size_bytes} bytes: {why(error)}") from error
        self.facts = replace(facts, size_bytes=size_bytes)

    def _refuse_size(self, actual_bytes: int, size_bytes: int) -> None:
        if actual_bytes > size_bytes:
            raise ImageError(
                self.identity, f"has {actual_bytes} bytes already", hint=f"ask for these: resize to {actual_bytes}"
            )
        if self._is_device and actual_bytes < size_bytes:
            raise ImageError(
                self.identity, f"has {actual_bytes} bytes", f"{size_bytes}", "a device has to be grown by hand first"
            )

    def stamp(self) -> Stamp:
        """A file is its real path, whatever link leads there; a device the name that was given, which may be the one
        link that stays the same from boot to boot.
        """
        path = os.path.abspath(self._path) if self._is_device else os.path.realpath(self._path)
        mtime_ns = 0 if self._is_device else os.fstat(self._descriptor).st_mtime_ns
        return Stamp(identity_bytes(os.fsencode(path)), mtime_ns)

    def settle(self) -> Stamp:
        # fdatasync leaves a file's time to the next journal commit.
        with contextlib.suppress(OSError):
            os.fsync(self._descriptor)
        return self.stamp()

    @property
    def can_be_locked(self) -> bool:
        return True

    @property
    def can_be_marked(self) -> bool:
        return not self._is_device and mark.is_supported(self._descriptor)

    def read_mark(self) -> Mark | None:
        return mark.read(self._descriptor, self.identity)

    def write_mark(self, new: Mark | None) -> bool:
        if new is not None:
            return mark.write(self._descriptor, new, self.identity)
        mark.remove(self._descriptor, self.identity)
        return True

    def close(self) -> None:
        """All I/O on it has ended. Unlocks it now: an io_uring keeps its files for a while after its process."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                locks.unlock(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _size_bytes(self) -> int:
        """As the kernel knows it: a server that does not answer (NFS) must not hold up the loop."""
        if self._is_device:
            return os.lseek(self._descriptor, 0, os.SEEK_END)
        found = _statx(self._descriptor, _AT_STATX_DONT_SYNC, _STATX_SIZE)
        if found is None:
            return os.fstat(self._descriptor).st_size
        (size_bytes,) = struct.unpack_from("Q", found, _STATX_SIZE_OFFSET)
        return int(size_bytes)


def _subject(path: str) -> str:
    return f"image '{path}'"


def _refuse_other_kinds(path: str) -> None:
    """Before opening: a pipe would wait for its other end, a tape would rewind."""
    try:
        kind = os.stat(path).st_mode
    except OSError as error:
        hint = f"make one: vhostcache create '{path}' --size 4GiB" if error.errno == errno.ENOENT else ""
        raise ImageError(_subject(path), why(error), _EXPECTED, hint) from error
    if stat.S_ISREG(kind) or stat.S_ISBLK(kind):
        return
    found = {
        stat.S_IFDIR: "is a directory",
        stat.S_IFSOCK: "is a socket",
        stat.S_IFIFO: "is a pipe",
        stat.S_IFCHR: "is a character device",
    }.get(stat.S_IFMT(kind), "is not a file")
    raise ImageError(_subject(path), found, _EXPECTED)


def _open(path: str, read_only: bool, direct: bool) -> tuple[int, bool, tuple[Notice, ...]]:
    flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
    if not read_only and stat.S_ISBLK(os.stat(path).st_mode):
        flags |= os.O_EXCL  # of a block device: refused while it is mounted
    try:
        return os.open(path, flags | (os.O_DIRECT if direct else 0)), direct, ()
    except OSError as error:
        if not direct or error.errno != errno.EINVAL:
            hint = ""
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not read_only:
                hint = "use --read-only (read_only: on), or give this user permission to write"
            raise ImageError(_subject(path), why(error), _EXPECTED, hint) from error
    try:
        return os.open(path, flags), False, (_no_direct(path, "the file system refuses it"),)
    except OSError as error:
        raise ImageError(_subject(path), why(error), _EXPECTED) from error


def _refuse_odd_sizes(path: str, size_bytes: int) -> None:
    if size_bytes == 0:
        raise ImageError(_subject(path), "is empty", "a size that is a multiple of 512 bytes, and not 0")
    if size_bytes % SECTOR_BYTES:
        whole = size_bytes // SECTOR_BYTES * SECTOR_BYTES
        raise ImageError(
            _subject(path),
            f"has a size of {size_bytes} bytes",
            "a multiple of 512",
            f"if it is a raw image, extend it: truncate -s {whole + SECTOR_BYTES} '{path}'",
        )


def _lock(path: str, descriptor: int, read_only: bool, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            locks.lock(descriptor, read_only)
            return
        except locks.LockedError as error:
            if time.monotonic() < deadline:
                time.sleep(_LOCK_RETRY_S)
                continue
            raise ImageError(
                _subject(path), f"is in use: {error}", "an image that nobody else has open", "stop the other one first"
            ) from error
        except OSError as error:
            raise ImageError(
                _subject(path), f"cannot be locked: {why(error)}", "a file system with OFD locks"
            ) from error


def _no_direct(path: str, reason: str) -> Notice:
    return Notice("no-direct-io", {"backend": path, "reason": reason, "instead": "the page cache is used"})


def _stop_direct(descriptor: int) -> None:
    import fcntl

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)


def direct_alignment(descriptor: int) -> tuple[int, int] | None:
    """(memory, offset and length) in bytes, or None where direct I/O does not work after all."""
    told = _statx_alignment(descriptor)
    if told is not None:
        return told if told[1] else None
    # An older kernel: ask by trying. Memory is page-aligned, so that the offset and length alone decide.
    with mmap.mmap(-1, 8192) as page:
        for step in (512, 4096):
            try:
                with memoryview(page)[step : 2 * step] as window:
                    os.preadv(descriptor, [window], step)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    return None
            else:
                return step, step
    return None


def _statx_alignment(descriptor: int) -> tuple[int, int] | None:
    """What statx tells: (0, 0) means no direct I/O; None means that the kernel does not tell."""
    found = _statx(descriptor, 0, _STATX_DIOALIGN)
    if found is None:
        return None
    memory, offset = _STATX_DIO.unpack_from(found, _STATX_DIO_OFFSET)
    return memory, offset


def _statx(descriptor: int, flags: int, mask: int) -> bytes | None:
    """struct statx, or None if the C library or the kernel does not have what the mask asks for."""
    if _LIBRARY_STATX is None:
        return None
    buffer = _StatxBuffer()
    if _LIBRARY_STATX(descriptor, b"", _AT_EMPTY_PATH | flags, ctypes.c_uint(mask), buffer) != 0:
        return None
    (filled,) = struct.unpack_from("I", buffer)
    return buffer.raw if filled & mask else None
