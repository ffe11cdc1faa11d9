"""Image locks, byte for byte as QEMU takes them, so that each keeps the other out.

QEMU describes what a user of an image does, and what it lets others do, by permission bits. Byte 100 + bit is read-
locked by who holds a permission, byte 200 + bit by who does not share it. Who wants a permission must find nobody who
does not share it, and who does not share must find nobody who holds it: take the own bytes first, then test those of
the others with F_OFD_GETLK.

A qemu-storage-daemon lets others write to a raw image that it exports. So an image that one opens for us is also locked
here, at a byte of its own.

Open-file-description locks: they belong to the very description that does the I/O, and live as long as anything still
does I/O through it, io_uring requests of a killed process included.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

from vhostcache.errors import OperationError

CONSISTENT_READ: Final = 1 << 0
WRITE: Final = 1 << 1
WRITE_UNCHANGED: Final = 1 << 2
RESIZE: Final = 1 << 3
_BITS: Final = {0: "reads", 1: "writes", 2: "rewrites", 3: "resizes"}

_HELD_BASE: Final = 100
_UNSHARED_BASE: Final = 200
_CLAIMED: Final = 300  # QEMU has no lock there

_FLOCK: Final = struct.Struct("hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid


class LockedError(OperationError):
    """Somebody else uses the image in a way that excludes ours."""


def lock(descriptor: int, read_only: bool) -> None:
    """Take the locks that QEMU takes for a guest's disk, or nothing at all.

    LockedError: somebody else has the image. OSError: this file system has no locks.
    """
    holds = CONSISTENT_READ if read_only else CONSISTENT_READ | WRITE
    shares = CONSISTENT_READ | WRITE_UNCHANGED
    try:
        _take(descriptor, holds, shares)
        _test(descriptor, holds, shares)
    except OSError as error:
        unlock(descriptor)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise LockedError("", "another process has locked it for itself") from error
        raise
    except LockedError:
        unlock(descriptor)
        raise


def claim(descriptor: int, read_only: bool) -> None:
    """Keep out whoever else does this, before a qemu-storage-daemon of ours opens the image with locks of its own. It
    must be open for writing, unless `read_only`.

    LockedError: somebody else has the image, or writes to it. OSError: this file system has no locks.
    """
    kind = fcntl.F_RDLCK if read_only else fcntl.F_WRLCK
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, _CLAIMED, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise LockedError("", "another vhostcache has it") from error
        raise
    if _is_locked(descriptor, _HELD_BASE + WRITE.bit_length() - 1):
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, _CLAIMED, 1, 0))
        raise LockedError("", "another process writes it")


def unlock(descriptor: int) -> None:
    for bit in _BITS:
        for base in (_HELD_BASE, _UNSHARED_BASE):
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, base + bit, 1, 0))


def _take(descriptor: int, holds: int, shares: int) -> None:
    for bit in _BITS:
        for base, wanted in ((_HELD_BASE, holds), (_UNSHARED_BASE, ~shares)):
            if wanted & 1 << bit:
                request = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, base + bit, 1, 0)
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)


def _test(descriptor: int, holds: int, shares: int) -> None:
    for bit, does in _BITS.items():
        if holds & 1 << bit and _is_locked(descriptor, _UNSHARED_BASE + bit):
            raise LockedError("", f"another process uses it and lets nobody else {does.removesuffix('s')} it")
        if not shares & 1 << bit and _is_locked(descriptor, _HELD_BASE + bit):
            raise LockedError("", f"another process {does} it")


def _is_locked(descriptor: int, offset: int) -> bool:
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0)
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, request)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
