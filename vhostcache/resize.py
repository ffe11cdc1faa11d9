"""Growing a disk while it is served.

Owns the first step, which may wait for the storage and therefore has a thread of its own, and what is refused before
it. The order is kept by commands.py: the backend, durably; then, with a log, both superblocks; then the core and the
guest. So at each moment the image is at least as large as its cache says, and its cache says at least as much as the
guest has been told: a start after a crash finds an image of its own that has grown, and takes it as it is.

Never makes anything smaller.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from vhostcache.backend.base import Backend
from vhostcache.config import IMAGE
from vhostcache.errors import Error, ResizeError


def refuse(subject: str, backend: Backend, size_bytes: int, wanted_bytes: int) -> None:
    """ResizeError: what cannot be, whatever the backend says."""
    if not backend.can_resize:
        raise ResizeError(subject, f"its backend, of type {backend.kind}, cannot be resized")
    if backend.facts.read_only:
        raise ResizeError(subject, "is read-only")
    if wanted_bytes < size_bytes:
        raise ResizeError(
            subject, f"has {size_bytes} bytes, and cannot be made smaller", f"at least as many, and not {wanted_bytes}"
        )
    try:
        IMAGE.check(wanted_bytes)
    except ValueError as error:
        raise ResizeError(subject, f"cannot have {wanted_bytes} bytes", IMAGE.allowed) from error


class Growth:
    """One backend on its way to another size. `wake` is called in another thread when `ended` has become true."""

    def __init__(self, backend: Backend, size_bytes: int, wake: Callable[[], None]) -> None:
        self.size_bytes = size_bytes
        self.error = "its backend has not grown, for a reason that this program does not know"
        """Why it has not grown, when it has ended; "": it has."""
        self.ended = False
        self._backend = backend
        self._wake = wake
        self._thread = threading.Thread(target=self._run, name="resize", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._backend.resize(self.size_bytes)
            self.error = ""
        except Error as error:
            self.error = str(error)
        finally:
            self.ended = True
            self._wake()

    def join(self) -> None:
        """Until it has ended."""
        self._thread.join()
