"""The errors that people meet, and what each becomes: a line, an exit status, an answer to the guest.

    Error                      one line: what was found, what was expected, what to do
    ├── UsageError             exit 2: the question was wrong (an option, a configuration key)
    └── OperationError         exit 1: the world says no
        ├── ImageError         the image: missing, locked, of an odd size, shrunk
        ├── CacheError         a cache file or RAM-tier file: foreign, older, truncated, locked
        │   ├── CacheCorruptError  what is in it is not what was written there
        │   └── CacheUnreadableError  its device does not read a part of it
        ├── SocketError        a socket path: taken, too long, not permitted
        ├── EngineError        the C engine could not start or take a volume
        ├── ResizeError        a disk cannot be given that size
        └── ControlError       a running daemon could not be asked

A message never holds a line break or a control character, whatever name a file has.
"""

from __future__ import annotations

import errno
import os
from typing import ClassVar, Final

EXIT_OK: Final = 0
EXIT_RUNTIME: Final = 1
EXIT_USAGE: Final = 2

# virtio_blk status bytes, virtio 1.2, 5.2.6.
STATUS_OK: Final = 0
STATUS_IOERR: Final = 1
STATUS_UNSUPP: Final = 2

_UNSUPPORTED: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})

_WHY: Final = {
    errno.ENOENT: "does not exist",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "no space is left on the file system",
    errno.EDQUOT: "the disk quota is used up",
    errno.EISDIR: "is a directory",
    errno.ENOTDIR: "a part of the path is not a directory",
    errno.ENXIO: "is a socket, or a device that does not exist",
    errno.EBUSY: "is in use",
    errno.ENAMETOOLONG: "the path is too long",
    errno.ELOOP: "too many symbolic links",
    errno.EMFILE: "too many files are open in this process",
    errno.ENFILE: "too many files are open in the system",
    errno.ENODATA: "ends before the data that was asked for",
}


class Error(Exception):
    """Something that a person has to read. `subject` is what it is about; the rest is one sentence each."""

    exit_status: ClassVar[int] = EXIT_RUNTIME

    def __init__(self, subject: str, found: str, expected: str = "", hint: str = "") -> None:
        self.subject = subject
        self.found = found
        self.expected = expected
        self.hint = hint
        parts = [f"{subject}: {found}" if subject else found]
        if expected:
            parts.append(f"expected {expected}")
        if hint:
            parts.append(hint)
        super().__init__(one_line("; ".join(parts)))


class UsageError(Error):
    """An option or a configuration key asks for what cannot be."""

    exit_status = EXIT_USAGE


class OperationError(Error):
    """The question was right, and the world says no."""


class ImageError(OperationError):
    """The image cannot be used as it is."""


class CacheError(OperationError):
    """The cache file, or the file of the RAM tier, cannot be used as it is."""


class CacheCorruptError(CacheError):
    """What is in the cache file, or in its RAM-tier file, is not what was written there."""


class CacheUnreadableError(CacheError):
    """A part of the cache file cannot be read: a bad sector, or a device that fails."""


class SocketError(OperationError):
    """A socket path cannot be listened on."""


class EngineError(OperationError):
    """The C engine could not start, or could not take a volume."""


class ResizeError(OperationError):
    """A disk cannot be given the size that is asked for."""


class ControlError(OperationError):
    """A running daemon could not be asked."""


def why(error: OSError) -> str:
    """What an operating system error means, as the second half of a sentence."""
    number = error.errno or 0
    return _WHY.get(number) or (os.strerror(number).lower() if number else str(error))


def why_number(result: int) -> str:
    """The same for the negative errno of an I/O completion."""
    return why(OSError(-result, ""))


def virtio_status(result: int) -> int:
    """The answer to the guest for a result: 0 or a negative errno."""
    if result >= 0:
        return STATUS_OK
    return STATUS_UNSUPP if -result in _UNSUPPORTED else STATUS_IOERR


def one_line(text: str) -> str:
    """The text without line breaks and control characters, which become what Python would write for them.

    File names are bytes that others choose: an escape sequence in one must not reach a terminal or fake a log line.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in text
    )
