"""The files that hold the RAM tier: on a tmpfs, so that they survive the daemon and not the machine.

Owns the folder and the names in it: VOLUME_UUID.TIER_UUID. Invariant: the folder is this user's and closed to everybody
else (0700), and so is each file (0600, made with O_EXCL | O_NOFOLLOW): nobody can put a file, or a link, where the
daemon will look for what it has acknowledged. All of a file is allocated when it is made, so that a full tmpfs is one
line at the start and no SIGBUS later.

Never reads or writes what is in a file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from typing import Final

from vhostcache.errors import CacheError, why

_FOLDER: Final = "/dev/shm/vhostcache-{}"


def default_folder() -> str:
    """Not $XDG_RUNTIME_DIR: that goes when the user logs out, and the guest may stay."""
    return _FOLDER.format(os.geteuid())


class TierFolder:
    """`path` is made if it is missing."""

    def __init__(self, path: str | None = None) -> None:
        self.path = path or default_folder()
        self._subject = f"RAM tier '{self.path}'"
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.path, 0o700)
            self._check(os.lstat(self.path))
        except OSError as error:
            raise CacheError(
                self._subject, f"cannot be used: {why(error)}", "a folder on a tmpfs", "see --ram-dir"
            ) from error

    def _check(self, status: os.stat_result) -> None:
        expected = "a folder of this user's own that is closed to others (mode 0700)"
        if not stat.S_ISDIR(status.st_mode):
            raise CacheError(self._subject, "is not a folder", expected, "see --ram-dir")
        if status.st_uid != os.geteuid():
            raise CacheError(self._subject, f"belongs to user {status.st_uid}", expected, "see --ram-dir")
        if status.st_mode & 0o077:
            raise CacheError(self._subject, f"has the mode {status.st_mode & 0o777:04o}", expected, "see --ram-dir")

    @property
    def is_memory(self) -> bool:
        """On a tmpfs. What else is there survives power loss, and is slow."""
        device = os.stat(self.path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        try:
            with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
                # ... 0:25 / /dev/shm rw - tmpfs shm rw: what stands behind the dash is the type
                kinds = {line.partition(" - ")[2].split(" ")[0] for line in mounts if line.split(" ")[2:3] == [wanted]}
        except OSError:
            return True
        return not kinds or bool(kinds & {"tmpfs", "ramfs", "hugetlbfs", "devtmpfs"})

    def file_path(self, volume: bytes, tier: bytes) -> str:
        return os.path.join(self.path, f"{volume.hex()}.{tier.hex()}")

    def open(self, volume: bytes, tier: bytes) -> int | None:
        """The descriptor of that file; None: there is none."""
        path = self.file_path(volume, tier)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CacheError(f"RAM tier '{path}'", why(error)) from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            os.close(descriptor)
            raise CacheError(f"RAM tier '{path}'", "is not a file of this user's own")
        return descriptor

    def create(self, volume: bytes, tier: bytes, size_bytes: int) -> int:
        """A new file, allocated. CacheError: and none is left."""
        path = self.file_path(volume, tier)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CacheError(f"RAM tier '{path}'", f"cannot be made: {why(error)}") from error
        try:
            os.posix_fallocate(descriptor, 0, size_bytes)
        except OSError as error:
            os.close(descriptor)
            os.unlink(path)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG):
                room = os.statvfs(self.path)
                raise CacheError(
                    self._subject,
                    f"has {room.f_bavail * room.f_frsize} bytes free",
                    f"{size_bytes} for the RAM tier",
                    "use less --ram, a larger tmpfs (in a container: --shm-size), or another --ram-dir",
                ) from error
            raise CacheError(f"RAM tier '{path}'", f"cannot be allocated: {why(error)}") from error
        return descriptor

    def remove(self, volume: bytes, keep: Iterable[bytes] = ()) -> None:
        """This volume's files, but for those to keep."""
        kept = {os.path.basename(self.file_path(volume, tier)) for tier in keep}
        for name in os.listdir(self.path):
            if name.startswith(f"{volume.hex()}.") and name not in kept:
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(self.path, name))
