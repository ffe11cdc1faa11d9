"""The mark on an image that has a cache: the extended attribute `user.vhostcache`.

It says which cache file the image belongs to, under which epoch that was last opened, and whether only that cache
holds the newest data. So an image is never opened without the cache that knows better, nor with an old copy of it.
It is text, for `getfattr -n user.vhostcache IMAGE`: `1 UUID EPOCH dirty|clean`.

Not every file system has extended attributes, and no block device: there the cache file alone remembers the image, by
its path and size.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass
from typing import Final, Self

from vhostcache.errors import ImageError, why

NAME: Final = "user.vhostcache"
_VERSION: Final = "1"
_NONE: Final = frozenset({errno.ENODATA, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM})


@dataclass(frozen=True)
class Mark:
    """What the image says of its cache."""

    uuid: bytes
    epoch: int
    dirty: bool

    def text(self) -> str:
        return f"{_VERSION} {self.uuid.hex()} {self.epoch} {'dirty' if self.dirty else 'clean'}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        words = text.split(" ")
        if len(words) != 4 or words[0] != _VERSION or words[3] not in ("dirty", "clean") or not words[2].isdecimal():
            return None
        with contextlib.suppress(ValueError):
            uuid = bytes.fromhex(words[1])
            if len(uuid) == 16:
                return cls(uuid, int(words[2]), words[3] == "dirty")
        return None


def is_supported(descriptor: int) -> bool:
    try:
        os.getxattr(descriptor, NAME)
    except OSError as error:
        return error.errno == errno.ENODATA
    return True


def read(descriptor: int, subject: str) -> Mark | None:
    """None: it has none, or cannot have one. ImageError: it has one that cannot be understood."""
    try:
        text = os.getxattr(descriptor, NAME).decode("ascii", "replace")
    except OSError as error:
        if error.errno in _NONE:
            return None
        raise ImageError(subject, f"its attribute {NAME} cannot be read: {why(error)}") from error
    mark = Mark.parse(text)
    if mark is None:
        raise ImageError(
            subject,
            f"its attribute {NAME} is '{text[:80]}'",
            f"'{_VERSION} UUID EPOCH dirty' or 'clean'",
            "a newer vhostcache may have written it: use that one",
        )
    return mark


def write(descriptor: int, mark: Mark, subject: str) -> bool:
    """Durable when it returns. False: nothing of that kind can be kept on this image."""
    if stat.S_ISBLK(os.fstat(descriptor).st_mode):
        return False
    try:
        os.setxattr(descriptor, NAME, mark.text().encode())
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in _NONE:
            return False
        raise ImageError(subject, f"its attribute {NAME} cannot be written: {why(error)}") from error
    return True


def remove(descriptor: int, subject: str) -> None:
    try:
        os.removexattr(descriptor, NAME)
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NONE:
            raise ImageError(subject, f"its attribute {NAME} cannot be removed: {why(error)}") from error
