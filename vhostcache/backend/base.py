"""The contract of a backend.

A backend is opened before the engine takes its volume and closed after the engine has let go of it. Opening does
everything that can be refused (existence, permission, size, locks) and all that may wait, and touches no byte of the
data and nothing of the engine, so that it may have a thread of its own. The engine then
reads and writes through what `attach` gives it; the backend itself is asked for facts only, for its mark, and for what
has become of it.

    Refused  ImageError, one line.
    Warned   opened, but not as asked (no O_DIRECT on this file system): one Notice in `warnings`, to be logged once.

Nothing here knows the engine: it is handed in as an `Opener`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol

from vhostcache.backend.mark import Mark
from vhostcache.errors import ImageError

IDENTITY_BYTES: Final = 64
NEVER: Final = 1 << 62


@dataclass(frozen=True)
class Facts:
    """What the engine and the core need to know, true from opening to closing, but for the size, which may grow.

    As vhc_backend_facts in engine.cdef.
    """

    descriptor: int  # stays the backend's; the engine uses it until it has let go of the volume. -1: it is no file
    size_bytes: int  # a multiple of 512, more than 0
    read_only: bool
    direct: bool  # page cache bypassed
    align_mem_bytes: int  # what direct I/O asks of memory addresses; 1: nothing
    align_io_bytes: int  # and of offsets and lengths; 1: nothing
    preferred_bytes: int = 0  # I/O of this size and alignment suits it; 0: nobody knows
    max_bytes: int = 0  # larger I/O is cut into pieces of this size; 0: no limit
    can_flush: bool = True  # otherwise a flush does nothing, and makes nothing durable
    can_zero: bool = True
    can_trim: bool = True
    can_fua: bool = False
    can_multi_conn: bool = False
    wants_whole_objects: bool = False  # a part of an object costs it more than the whole
    can_resize: bool = False
    can_abandon: bool = False  # a read is dropped at once, whether it answers or not
    rotational: bool = False


@dataclass(frozen=True)
class Notice:
    """Something for the log: an event name and its fields."""

    event: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stamp:
    """By what a cache knows it again, and notices that others have changed it."""

    identity: bytes  # at most 64 bytes, for people too
    mtime_ns: int  # of its data; 0: nobody can tell


def identity_bytes(text: bytes) -> bytes:
    """At most 64 bytes of it: what is longer keeps its end, for people, behind a hash of it all."""
    if len(text) <= IDENTITY_BYTES:
        return text
    digest = hashlib.sha256(text).hexdigest()[:32].encode()
    return digest + b"..." + text[len(digest) + 3 - IDENTITY_BYTES :]


class Opened(Protocol):
    """The engine's side of a backend, or of a stack of them: vhostcache.engine.EngineBackend."""

    @property
    def facts(self) -> Facts: ...
    @property
    def message(self) -> str: ...
    def statistics(self) -> dict[str, Any]: ...
    def write(self, offset_bytes: int, data: bytes) -> None: ...
    def zero(self, offset_bytes: int, size_bytes: int) -> None: ...
    def flush(self) -> None: ...
    def renew(self, size_bytes: int) -> None: ...
    def give_up(self) -> None: ...
    def close(self) -> None: ...


class Link(Protocol):
    """A connection to an export, on its way to the engine: vhostcache.engine.NbdLink."""

    facts: Facts

    def attach(self) -> Opened: ...
    def close(self) -> None: ...


class Opener(Protocol):
    """What makes them: vhostcache.engine.Engine. EngineError: one line. `nbd_link` may be called in any thread."""

    def file_backend(self, facts: Facts) -> Opened: ...
    def nbd_link(
        self,
        uri: str,
        *,
        connections: int,
        read_only: bool,
        tls_certificates: str | None,
        tls_psk_file: str | None,
        tls_username: str | None,
        tls_verify: bool,
        uncompressed_uri: str | None,
    ) -> Link: ...
    def wrap_backend(self, below: Any, kind: str, parameters: str) -> Opened: ...


class Backend(ABC):
    """One opened backend."""

    kind: ClassVar[str]
    facts: Facts
    warnings: tuple[Notice, ...] = ()

    @property
    @abstractmethod
    def identity(self) -> str:
        """What people call it, in messages."""

    @abstractmethod
    def attach(self, opener: Opener) -> Opened:
        """What the engine reads and writes through. Once, in the engine's thread; waits for nothing."""

    @abstractmethod
    def check(self) -> Notice | None:
        """Look whether it is still what was opened; a Notice says how it is not. Cheap, never waits for the data."""

    @abstractmethod
    def stamp(self) -> Stamp:
        """As it is now."""

    def retire(self) -> None:  # noqa: B027 - most have nothing that takes long
        """Nobody reads or writes it any more, and what has been written is flushed: begin what takes long of `settle`
        and `close`. Never waits."""

    @property
    def is_retired(self) -> bool:
        """Whether that has ended."""
        return True

    @abstractmethod
    def settle(self) -> Stamp:
        """The same, durable itself: nobody writes now, and what has been written is flushed. May wait."""

    @property
    def can_be_locked(self) -> bool:
        """Whether other daemons find that it is in use, as long as it is open here."""
        return False

    can_resize: ClassVar[bool] = False
    """Whether `resize` can do anything."""

    def resize(self, size_bytes: int) -> None:
        """Make it that large, durably, or find that somebody else has; `facts` say so from then on. It never becomes
        smaller. ImageError: it is as it was. May wait as long as the storage does: called in a thread of its own, one
        at a time, while the engine goes on."""
        raise ImageError(self.identity, f"is of type {self.kind}, which cannot be resized")

    def resized(self) -> None:  # noqa: B027 - most have no need
        """`resize` has succeeded, and the engine is about to use what there is more. Never waits."""

    @property
    @abstractmethod
    def can_be_marked(self) -> bool:
        """Whether a mark would be kept."""

    @abstractmethod
    def read_mark(self) -> Mark | None:
        """What it says of its cache; None: nothing."""

    @abstractmethod
    def write_mark(self, new: Mark | None) -> bool:
        """Durably; None takes it away. False: it cannot keep one."""

    @abstractmethod
    def close(self) -> None:
        """Let go of it and of its locks. More than once is allowed."""

    # What becomes of it while it is served. A backend of which there is nothing to say leaves these as they are.

    def watch(self, watch: Callable[[int], None]) -> None:  # noqa: B027 - most have none
        """Give every descriptor that it wants watched, now and later, to `watch`; each is closed when that is over."""

    def look(self, now_ns: int) -> list[Notice]:
        """One of them is readable, or `wake_at_ns` has come; what is to be logged. Never waits."""
        return []

    @property
    def wake_at_ns(self) -> int:
        """When to look anyway, on CLOCK_MONOTONIC."""
        return NEVER

    def happened(self, what: int, message: str, now_ns: int) -> Notice | None:
        """The engine has told something of it (VHC_EV_BACKEND); a Notice, if it is news."""
        return None

    @property
    def is_lost(self) -> bool:
        """Its server is not there, or has become something else: everything that needs it waits."""
        return False

    def status(self, now_ns: int) -> dict[str, Any]:
        """Its type, and the state of what can be lost."""
        return {"type": self.kind}
