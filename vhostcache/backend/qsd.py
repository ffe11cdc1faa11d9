"""Whatever QEMU can open, through a qemu-storage-daemon of one's own and NBD.

The volume's backend is the export; the process is supervised by qsd_server.py, and its death is a lost connection until
the next one serves. Where all of it lies in one file of this host, that file is marked as an image is (mark.py), and
its time of change is watched; anything else is known by its description and its size, as a block device is. Such a file
is locked here too, from before the process opens it until it has ended: QEMU's own locks let others write to a raw
image, and are gone while the process is replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
import time
from collections.abc import Callable
from typing import Any, ClassVar, Final

from vhostcache.backend import locks, mark
from vhostcache.backend.base import Backend, Link, Notice, Opened, Opener, Stamp, identity_bytes
from vhostcache.backend.mark import Mark
from vhostcache.backend.nbd import Connection, connect
from vhostcache.backend.qsd_server import LOCK_WAIT_S, QsdServer
from vhostcache.config_backend import NbdBackendConfig, QsdBackendConfig
from vhostcache.errors import ImageError, why

CONNECTIONS: Final = 4  # QEMU's server takes 16 requests of each at once
_LOCK_RETRY_S: Final = 0.05
SETTLE_S: Final = 5.0  # it has flushed: a kill loses nothing, and the loop waits


class QsdBackend(Backend):
    """See the module."""

    kind: ClassVar[str] = "qsd"
    can_resize: ClassVar[bool] = True

    def __init__(
        self,
        config: QsdBackendConfig,
        opener: Opener,
        read_only: bool,
        direct: bool,
        object_bytes: int,
        lock_wait_s: float = LOCK_WAIT_S,
        locked: bool = True,
    ) -> None:
        """Start it and connect. ImageError: one line, and nothing is left running. Not `locked`: to look at what
        another has open, and to be closed again before anybody does I/O."""
        self._config = config
        self._connection = Connection(config.label)
        self._is_claimed = False
        self._link: Link | None = None
        self._server: QsdServer | None = None
        self._descriptor = self._open_image(for_writing=locked and not read_only)
        try:
            if locked and self._descriptor >= 0:
                self._claim(read_only, lock_wait_s)
            before_ns = self._changed_ns()
            self._server = server = QsdServer(config, self.identity, read_only, direct, shared=not locked)
            server.start(lock_wait_s=lock_wait_s)
            assert server.node is not None
            self.warnings = server.warnings
            if config.compresses and not read_only:
                self._refuse_reference_counts(server.node.refcount_bits)
                self._refuse_small_objects(server.node.cluster_bytes, object_bytes)
            uri = NbdBackendConfig.model_validate({"type": "nbd", "uri": server.uri, "connections": CONNECTIONS})
            self._link = link = connect(self.identity, uri, opener, read_only or not locked, server.uncompressed_uri)
        except BaseException:
            self.close()
            raise
        # Opening it for writing may change what is in the file. That is not somebody else's doing.
        self._opening_ns = (before_ns, self._changed_ns())
        self.facts = dataclasses.replace(
            link.facts,
            read_only=link.facts.read_only and (read_only or locked),
            direct=server.node.direct,
            wants_whole_objects=config.compresses,
            preferred_bytes=server.node.cluster_bytes if config.compresses else link.facts.preferred_bytes,
        )

    def _open_image(self, for_writing: bool) -> int:
        """The file that is marked, or -1. What is wrong with it is for QEMU to say."""
        path = self._config.image
        if path is None:
            return -1
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.stat(path).st_mode):
                return os.open(path, os.O_CLOEXEC | (os.O_RDWR if for_writing else os.O_RDONLY))
        return -1

    def _claim(self, read_only: bool, wait_s: float) -> None:
        deadline_s = time.monotonic() + wait_s
        while True:
            try:
                locks.claim(self._descriptor, read_only)
                self._is_claimed = True
                return
            except locks.LockedError as error:
                if time.monotonic() >= deadline_s:
                    expected = "an image that nobody else has open"
                    raise ImageError(
                        self.identity, f"is in use: {error}", expected, "stop the other one first"
                    ) from error
                time.sleep(_LOCK_RETRY_S)
            except OSError:
                return  # no locks here; QEMU does without them too

    def _refuse_reference_counts(self, bits: int) -> None:
        """QEMU packs compressed clusters into one of the file's until that is full, even when all that was in it was
        overwritten, and it is another's now. Where a count can only be 0 or 1 it does not pack."""
        if bits > 1:
            raise ImageError(
                self.identity,
                f"has reference counts of {bits} bits: QEMU can damage compressed clusters that are rewritten",
                "refcount_bits=1",
                "make it anew: qemu-img convert -c -O qcow2 -o refcount_bits=1 OLD NEW",
            )

    def _refuse_small_objects(self, cluster_bytes: int, object_bytes: int) -> None:
        if cluster_bytes and object_bytes % cluster_bytes:
            raise ImageError(
                self.identity,
                f"compresses clusters of {cluster_bytes} bytes",
                "an object_size that is a multiple of that",
                f"object_size: {cluster_bytes}",
            )

    @property
    def identity(self) -> str:
        return f"block device '{self._config.label}'"

    def attach(self, opener: Opener) -> Opened:
        self._link, link = None, self._link
        assert link is not None
        return link.attach()

    # Supervision.

    def watch(self, watch: Callable[[int], None]) -> None:
        if self._server is not None:
            self._server.watch(watch)

    def look(self, now_ns: int) -> list[Notice]:
        return self._server.look(now_ns) if self._server is not None else []

    @property
    def wake_at_ns(self) -> int:
        return self._server.wake_at_ns if self._server is not None else super().wake_at_ns

    def resize(self, size_bytes: int) -> None:
        """See Backend."""
        server = self._server
        if server is None or not server.ready:
            raise ImageError(self.identity, "is away", hint="try it again when it is back")
        # QEMU would resize it, and then not export it any more.
        align_bytes = max(self.facts.align_io_bytes, self.facts.preferred_bytes if self._config.compresses else 1)
        if size_bytes % align_bytes:
            raise ImageError(self.identity, f"cannot have {size_bytes} bytes", f"a multiple of {align_bytes}")
        server.resize(size_bytes)
        if self._descriptor >= 0:
            try:
                os.fsync(self._descriptor)  # QEMU does not
            except OSError as error:
                raise ImageError(self.identity, f"has a new size that cannot be made durable: {why(error)}") from error
        self.facts = dataclasses.replace(self.facts, size_bytes=size_bytes)

    def happened(self, what: int, message: str, now_ns: int) -> Notice | None:
        if self._server is None or self._server.is_stopping:
            return None
        return self._connection.happened(what, message, now_ns)

    @property
    def is_lost(self) -> bool:
        return self._connection.state != "connected"

    def status(self, now_ns: int) -> dict[str, Any]:
        server = self._server
        process = {"pid": server.pid, "restarts": server.restarts} if server is not None else {}
        return {"type": self.kind, **self._connection.status(now_ns), **process}

    def check(self) -> Notice | None:
        return None

    # Identity.

    def stamp(self) -> Stamp:
        now_ns = self._changed_ns()
        before_ns, after_ns = self._opening_ns
        return Stamp(identity_bytes(self._config.canonical.encode()), before_ns if now_ns == after_ns else now_ns)

    def retire(self) -> None:
        if self._server is not None:
            self._server.begin_to_stop(time.monotonic_ns(), SETTLE_S)

    @property
    def is_retired(self) -> bool:
        return self._server is None or not self._server.is_alive

    def settle(self) -> Stamp:
        """Ends the process: what closing the image writes belongs to how it is left."""
        if self._server is not None:
            self._server.stop(SETTLE_S)
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.fsync(self._descriptor)
        self._opening_ns = (0, -1)
        return self.stamp()

    def _changed_ns(self) -> int:
        return os.fstat(self._descriptor).st_mtime_ns if self._descriptor >= 0 else 0

    @property
    def can_be_locked(self) -> bool:
        # And marked, for its process ends before the hand-over does, and its own locks with it.
        return self._is_claimed and self.can_be_marked

    @property
    def can_be_marked(self) -> bool:
        return self._descriptor >= 0 and mark.is_supported(self._descriptor)

    def read_mark(self) -> Mark | None:
        return mark.read(self._descriptor, self.identity) if self._descriptor >= 0 else None

    def write_mark(self, new: Mark | None) -> bool:
        if self._descriptor < 0:
            return False
        if new is not None:
            return mark.write(self._descriptor, new, self.identity)
        mark.remove(self._descriptor, self.identity)
        return True

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
