"""An export of an NBD server, which libnbd talks to in the engine.

Nothing can be marked there, and nobody says when its data was last changed: a cache file remembers it by where its URI
leads and by its size, as it does a block device. What becomes of the connection is told by `happened`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Final

from vhostcache.backend.base import Backend, Link, Notice, Opened, Opener, Stamp, identity_bytes
from vhostcache.backend.mark import Mark
from vhostcache.config_backend import NbdBackendConfig
from vhostcache.errors import EngineError, ImageError

SECTOR_BYTES: Final = 512

_CONNECTED, _LOST, _REFUSED = 1, 2, 3  # VHC_BACKEND_* of engine.cdef


class Connection:
    """What becomes of a connection, for the log and for whoever asks. Starts connected."""

    def __init__(self, label: str) -> None:
        self._label = label
        self.state = "connected"
        self.since_ns = 0  # CLOCK_MONOTONIC; of a state that is not "connected"
        self.reconnects = 0
        self.error = ""

    def happened(self, what: int, message: str, now_ns: int) -> Notice | None:
        """A VHC_EV_BACKEND. A Notice, where it is news."""
        if what == _CONNECTED:
            if self.state == "connected":
                return None
            seconds = round((now_ns - self.since_ns) / 1e9, 3)
            self.state, self.error = "connected", ""
            self.reconnects += 1
            return Notice("backend-recovered", {"backend": self._label, "seconds": seconds})
        state = "lost" if what == _LOST else "refused"
        if self.state == "connected":
            self.since_ns = now_ns
        news = self.state != state or self.error != message
        self.state, self.error = state, message
        return Notice(f"backend-{state}", {"backend": self._label, "error": message}) if news else None

    def status(self, now_ns: int) -> dict[str, Any]:
        found: dict[str, Any] = {"state": self.state, "reconnects": self.reconnects}
        if self.state != "connected":
            found |= {"seconds": round((now_ns - self.since_ns) / 1e9, 1), "error": self.error}
        return found


class NbdBackend(Backend):
    """See the module."""

    kind: ClassVar[str] = "nbd"
    can_resize: ClassVar[bool] = True

    def __init__(self, config: NbdBackendConfig, opener: Opener, read_only: bool) -> None:
        """Connect. ImageError: one line."""
        self._config = config
        self._opener = opener
        self._connection = Connection(config.label)
        self._link: Link | None = connect(self.identity, config, opener, read_only)
        self._opened: Opened | None = None
        self.facts = self._link.facts

    @property
    def identity(self) -> str:
        return f"export '{self._config.uri}'"

    def attach(self, opener: Opener) -> Opened:
        self._link, link = None, self._link
        assert link is not None
        self._opened = link.attach()
        return self._opened

    def happened(self, what: int, message: str, now_ns: int) -> Notice | None:
        return self._connection.happened(what, message, now_ns)

    @property
    def is_lost(self) -> bool:
        return self._connection.state != "connected"

    def status(self, now_ns: int) -> dict[str, Any]:
        return {"type": self.kind, **self._connection.status(now_ns)}

    def check(self) -> Notice | None:
        return None

    def stamp(self) -> Stamp:
        return Stamp(identity_bytes(self._config.resource.encode()), 0)

    def settle(self) -> Stamp:
        return self.stamp()

    def resize(self, size_bytes: int) -> None:
        """See Backend. Its server must have grown it already, and tell that to those who connect from now on."""
        link = connect(self.identity, self._config, self._opener, self.facts.read_only)
        found = link.facts
        link.close()
        if found.size_bytes < size_bytes:
            raise ImageError(
                self.identity, f"has {found.size_bytes} bytes", f"{size_bytes}", "grow it at its server first"
            )
        if found.size_bytes > size_bytes:
            hint = f"ask for these: resize to {found.size_bytes}"
            raise ImageError(self.identity, f"has {found.size_bytes} bytes already", hint=hint)
        align_bytes = self.facts.align_io_bytes
        if size_bytes % align_bytes or found.align_io_bytes > align_bytes:
            raise ImageError(
                self.identity,
                f"has {size_bytes} bytes, in blocks of {found.align_io_bytes}",
                f"a multiple of {align_bytes}, in blocks of at most that",
                "to be used as it is now it has to be opened anew: end the daemon and start it again",
            )
        self.facts = dataclasses.replace(self.facts, size_bytes=size_bytes)

    def resized(self) -> None:
        assert self._opened is not None
        self._opened.renew(self.facts.size_bytes)

    @property
    def can_be_marked(self) -> bool:
        return False

    def read_mark(self) -> Mark | None:
        return None

    def write_mark(self, new: Mark | None) -> bool:
        return False

    def close(self) -> None:
        """Connections are the engine's, once it has them."""
        if self._link is not None:
            self._link.close()
            self._link = None


def connect(
    subject: str, config: NbdBackendConfig, opener: Opener, read_only: bool, uncompressed_uri: str | None = None
) -> Link:
    """ImageError: refused, or not what is needed; nothing is left open."""
    try:
        link = opener.nbd_link(
            config.uri,
            connections=config.connections,
            read_only=read_only,
            tls_certificates=config.tls_certificates,
            tls_psk_file=config.tls_psk_file,
            tls_username=config.tls_username,
            tls_verify=config.tls_verify,
            uncompressed_uri=uncompressed_uri,
        )
    except EngineError as error:
        raise ImageError(subject, error.found, error.expected, error.hint) from error
    try:
        _refuse(subject, link.facts.size_bytes, link.facts.read_only and not read_only)
    except ImageError:
        link.close()
        raise
    return link


def _refuse(subject: str, size_bytes: int, is_read_only: bool) -> None:
    if is_read_only:
        raise ImageError(subject, "is read-only", "one that can be written", "use --read-only (read_only: on)")
    if size_bytes == 0:
        raise ImageError(subject, "is empty", "a size that is a multiple of 512 bytes, and not 0")
    if size_bytes % SECTOR_BYTES:
        raise ImageError(subject, f"has a size of {size_bytes} bytes", "a multiple of 512", "extend it at its server")
