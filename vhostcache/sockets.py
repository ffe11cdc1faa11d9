"""Listening on a unix socket path that nobody else listens on.

Invariant: a path has at most one living listener. A lock file beside it (PATH.lock, flock) keeps two starters apart
for as long as the daemon lives, and tells a dead one's socket from a living one's; a socket of another program is
probed by connecting to it. A dead socket is replaced, anything else at the path is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from typing import Final

from vhostcache.errors import SocketError, why

PATH_BYTES: Final = 107  # sun_path holds 108, the last is the terminating zero
_BACKLOG: Final = 128


class Listener:
    """A listening unix socket, non-blocking and close-on-exec. `close()` removes the path.

    With `listening` false the path is taken, but who connects is refused until `listen()`. A front-end that gets into
    the backlog of a daemon that is still recovering waits with its guest stopped; and QEMU 7.2 never connects again
    when that daemon dies before it has answered the first message.
    """

    def __init__(self, path: str, permissions: int = 0o600, listening: bool = True) -> None:
        """SocketError: one line, and whatever stood at the path still stands there."""
        self.path = path
        size = len(os.fsencode(path))
        if size > PATH_BYTES:
            raise SocketError(
                f"socket '{path}'",
                f"is {size} bytes long",
                f"at most {PATH_BYTES}",
                "use a shorter folder, such as /run",
            )
        self._lock = _take_lock(path)
        try:
            _clear(path)
            self._socket = _bind(path, permissions)
            if listening:
                self._socket.listen(_BACKLOG)
            self._deaf: socket.socket | None = None if listening else self._socket.dup()
            self._identity = _identity(path)
        except BaseException:
            self._drop_lock()
            raise

    def detach(self) -> int:
        """The listening descriptor, which now is the caller's. The path stays ours."""
        return self._socket.detach()

    def listen(self) -> None:
        """Connections are taken from now on."""
        if self._deaf is not None:
            self._deaf.listen(_BACKLOG)
            self._deaf.close()
            self._deaf = None

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Remove the path, if it still is the socket that was bound here. More than once is allowed."""
        if self._lock < 0:
            return
        self._socket.close()
        if self._deaf is not None:
            self._deaf.close()
        with contextlib.suppress(OSError):
            if _identity(self.path) == self._identity:
                os.unlink(self.path)
        self._drop_lock()

    def _drop_lock(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(
                self.path + ".lock"
            )  # while it is still held: who waits for it finds another file, and tries again
        os.close(self._lock)
        self._lock = -1


def _subject(path: str) -> str:
    return f"socket '{path}'"


def _take_lock(path: str) -> int:
    lock_path = path + ".lock"
    while True:
        try:
            descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            folder = os.path.dirname(path) or "."
            if error.errno == errno.ENOENT:
                raise SocketError(
                    _subject(path), f"the folder '{folder}' does not exist", hint="make it first"
                ) from error
            raise SocketError(
                _subject(path), why(error), f"a folder that this user may write, and '{folder}'"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = os.stat(lock_path, follow_symlinks=False)
        except BlockingIOError as error:
            os.close(descriptor)
            raise SocketError(
                _subject(path),
                "is in use by a running vhostcache",
                "a path of its own",
                "stop that one first, or choose another path",
            ) from error
        except FileNotFoundError:
            os.close(descriptor)
            continue
        here = os.fstat(descriptor)
        if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
            return descriptor
        os.close(descriptor)


def _clear(path: str) -> None:
    """Remove a dead socket; refuse a living one and anything that is not a socket."""
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise SocketError(_subject(path), why(error)) from error
    if not stat.S_ISSOCK(kind):
        raise SocketError(_subject(path), "something that is not a socket is there", "nothing, or an old socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        result = probe.connect_ex(path)
    if result == errno.ECONNREFUSED:
        with contextlib.suppress(FileNotFoundError):
            try:
                os.unlink(path)
            except PermissionError as error:
                raise SocketError(_subject(path), f"an old socket cannot be removed: {why(error)}") from error
        return
    if result == errno.ENOENT:
        return
    if result == errno.EACCES:
        raise SocketError(_subject(path), "is another user's: permission denied", "a path of its own")
    raise SocketError(
        _subject(path),
        "is in use by another process",
        "a path of its own",
        "stop that one first, or choose another path",
    )


def _bind(path: str, permissions: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    before = os.umask(0o177)  # nobody else may connect between bind and chmod
    try:
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise SocketError(_subject(path), why(error), "a folder that this user may write") from error
    finally:
        os.umask(before)
    os.chmod(path, permissions)
    return listener


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino
