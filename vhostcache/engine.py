"""The C engine, as the loop uses it. The only importer of vhostcache._native.

Owns the engine's lifetime and the conversion of a turn: a list of operation words goes in, a result with lists comes
out. Nothing here decides anything. Bytes of the guest never come this way.
"""

from __future__ import annotations

import errno
import os
from array import array
from types import TracebackType
from typing import Any, Final, Self

from vhostcache._native import ffi, lib
from vhostcache.backend.base import Facts
from vhostcache.errors import EngineError
from vhostcache.operations import BLOCK_BYTES

_ERROR_BYTES: Final = 256
_VOLUME_COUNTERS: Final = (
    "get_id",
    "bad_requests",
    "errors",
    "backend_errors",
    "log_errors",
    "log_crc_errors",
    "notifications",
    "kicks",
    "inflight",
    "inflight_max",
    "depth_sum",
    "depth_samples",
    "resubmitted",
)
_VOLUME_ARRAYS: Final = ("requests", "bytes", "backend_ops", "backend_bytes", "log_ops", "log_bytes")
_ENGINE_COUNTERS: Final = ("turns", "sleeps", "polls", "poll_hits", "io_uring", "registered_buffers")
_FACTS_NUMBERS: Final = ("size_bytes", "align_mem_bytes", "align_io_bytes", "preferred_bytes", "max_bytes")
_FACTS_FLAGS: Final = (
    "read_only",
    "can_flush",
    "can_zero",
    "can_trim",
    "can_fua",
    "can_multi_conn",
    "wants_whole_objects",
    "can_resize",
    "can_abandon",
    "rotational",
)
_FACTS: Final = _FACTS_NUMBERS + _FACTS_FLAGS
_BACKEND_ARRAYS: Final = ("commands", "bytes")
_BACKEND_COUNTERS: Final = (
    "errors",
    "losses",
    "connects",
    "repeated",
    "abandoned",
    "staged_bytes",
    "hole_bytes",
    "in_flight",
    "waiting",
    "connections",
)
_READ, _WRITE, _FLUSH, _ZERO = range(4)  # kinds of I/O
_NOTHING: Final[list[int]] = []


class TurnResult:
    """What a turn has brought, in columns of equal length.

    Requests, grouped by volume (those of `group_volume[g]` end before index `group_end[g]`): what, tag, sector, sectors
    (512 bytes). I/O completions: done_volume, done_group, done_result (0 or a negative errno). Events: event_kind,
    event_volume, event_arg. `requests`, `groups`, `completions` and `events` count them; `now_ns` is CLOCK_MONOTONIC.
    There is one of these for all turns: the next turn changes it. Its lists are not changed.
    """

    __slots__ = (
        "completions",
        "done_group",
        "done_result",
        "done_volume",
        "event_arg",
        "event_kind",
        "event_volume",
        "events",
        "group_end",
        "group_volume",
        "groups",
        "now_ns",
        "requests",
        "sector",
        "sectors",
        "tag",
        "what",
    )

    def __init__(self) -> None:
        self.requests = self.groups = self.completions = self.events = self.now_ns = 0
        self.what = self.tag = self.sector = self.sectors = _NOTHING
        self.group_volume = self.group_end = _NOTHING
        self.done_volume = self.done_group = self.done_result = _NOTHING
        self.event_kind = self.event_volume = self.event_arg = _NOTHING


class EngineBackend:
    """The top of a stack of backends, made by an Engine, and closed with it."""

    def __init__(self, handle: Any, descriptor: int = -1) -> None:
        self.handle = handle
        self._descriptor = descriptor

    @property
    def facts(self) -> Facts:
        """As they are now."""
        found = ffi.new("vhc_backend_facts *")
        lib.vhc_backend_read_facts(self.handle, found)
        return _facts(found, self._descriptor)

    @property
    def message(self) -> str:
        """What the last VHC_EV_BACKEND was about, or ""."""
        return str(ffi.string(lib.vhc_backend_message(self.handle)).decode(errors="replace"))

    def statistics(self) -> dict[str, Any]:
        """The fields of vhc_backend_stats, arrays as lists."""
        stats = ffi.new("vhc_backend_stats *")
        lib.vhc_read_backend_stats(self.handle, stats)
        result: dict[str, Any] = {name: int(getattr(stats, name)) for name in _BACKEND_COUNTERS}
        result.update((name, list(getattr(stats, name))) for name in _BACKEND_ARRAYS)
        return result

    def renew(self, size_bytes: int) -> None:
        """An NBD export has grown to that: the connections are made anew, and only those to one that large are used."""
        lib.vhc_backend_nbd_renew(self.handle, size_bytes)

    def give_up(self) -> None:
        """Wait for nothing any more: all I/O ends in error, now and later."""
        lib.vhc_backend_give_up(self.handle)

    # For tools, and before a volume has it: each call waits. OSError: the backend's answer.

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Data."""
        buffer = ffi.new("char[]", size_bytes)
        self._wait(_READ, offset_bytes, buffer, size_bytes)
        return bytes(ffi.buffer(buffer, size_bytes))

    def write(self, offset_bytes: int, data: bytes | bytearray | memoryview) -> None:
        """Not durable before the next flush."""
        self._wait(_WRITE, offset_bytes, ffi.from_buffer(data), len(data))

    def flush(self) -> None:
        """Make durable what has been written."""
        self._wait(_FLUSH, 0, ffi.NULL, 0)

    def zero(self, offset_bytes: int, size_bytes: int) -> None:
        """Write zeroes."""
        self._wait(_ZERO, offset_bytes, ffi.NULL, size_bytes)

    def close(self) -> None:
        """Earlier than the engine. No volume has it."""
        if self.handle != ffi.NULL:
            lib.vhc_backend_close(self.handle)
            self.handle = ffi.NULL

    def _wait(self, kind: int, offset_bytes: int, buffer: Any, size_bytes: int) -> None:
        result = int(lib.vhc_backend_sync_io(self.handle, kind, offset_bytes, buffer, size_bytes))
        while result == -errno.EINTR:  # whatever a signal's handler raises gets us out of here
            result = int(lib.vhc_backend_sync_wait(self.handle))
        if result:
            raise OSError(-result, os.strerror(-result))


class NbdLink:
    """A connection to an NBD server's export that no backend has yet, made by an Engine. It is attached, or closed."""

    def __init__(self, engine: Any, config: Any, texts: list[Any]) -> None:
        """Connects."""
        error = ffi.new("char[]", _ERROR_BYTES)
        found = ffi.new("vhc_backend_facts *")
        self._engine, self._config, self._texts = engine, config, texts  # the texts are the config's
        self._link = _checked_handle(lib.vhc_nbd_connect(config, found, error, _ERROR_BYTES), error)
        self.facts = _facts(found)

    def attach(self) -> EngineBackend:
        """The export, as the engine reads and writes it. In the thread of the engine; waits for nothing."""
        error = ffi.new("char[]", _ERROR_BYTES)
        link, self._link = self._link, ffi.NULL
        handle = lib.vhc_backend_nbd(self._engine, self._config, link, error, _ERROR_BYTES)
        return EngineBackend(_checked_handle(handle, error))

    def close(self) -> None:
        """Of one that was not attached."""
        link, self._link = self._link, ffi.NULL
        lib.vhc_nbd_disconnect(link)


def _facts(found: Any, descriptor: int = -1) -> Facts:
    numbers = {name: int(getattr(found, name)) for name in _FACTS_NUMBERS}
    flags = {name: bool(getattr(found, name)) for name in _FACTS_FLAGS}
    return Facts(descriptor=descriptor, direct=found.align_io_bytes > 1, **numbers, **flags)  # type: ignore[arg-type]


def _checked_handle(handle: Any, error: Any) -> Any:
    if handle == ffi.NULL:
        raise EngineError("backend", ffi.string(error).decode(errors="replace"))
    return handle


class Engine:
    """`poll_max_us` bounds adaptive polling (0: never poll); `force_threads` does without io_uring."""

    def __init__(self, poll_max_us: int = 50, force_threads: bool = False) -> None:
        error = ffi.new("char[]", _ERROR_BYTES)
        config = ffi.new("vhc_engine_config *", {"poll_max_us": poll_max_us, "force_threads": force_threads})
        self._engine = lib.vhc_engine_new(config, error, _ERROR_BYTES)
        if self._engine == ffi.NULL:
            raise EngineError("engine", ffi.string(error).decode(errors="replace"))
        self._raw = ffi.new("vhc_turn_result *")
        self._result = TurnResult()
        self._turn = lib.vhc_turn
        self._unpack = ffi.unpack
        self._from_buffer = ffi.from_buffer
        self._words = ffi.typeof("uint64_t[]")
        self._no_words = ffi.new("uint64_t[1]")
        self._volumes = 0
        self._ring_bytes: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the I/O in flight, cut off front-ends, free everything."""
        if self._engine != ffi.NULL:
            lib.vhc_engine_free(self._engine)
            self._engine = ffi.NULL

    # Backends.

    def file_backend(self, facts: Facts) -> EngineBackend:
        """A file or a device. `facts.descriptor` stays the caller's, who keeps it open until the engine is closed."""
        error = ffi.new("char[]", _ERROR_BYTES)
        given = ffi.new("vhc_backend_facts *", {name: getattr(facts, name) for name in _FACTS})
        handle = lib.vhc_backend_file(self._engine, facts.descriptor, given, error, _ERROR_BYTES)
        return EngineBackend(_checked_handle(handle, error), facts.descriptor)

    def wrap_backend(self, below: EngineBackend, kind: str, parameters: str = "") -> EngineBackend:
        """A wrapper (delay, fault, retry, trace) on `below`, which only it uses from now on; see engine.cdef."""
        error = ffi.new("char[]", _ERROR_BYTES)
        words = os.fsencode(parameters)
        handle = lib.vhc_backend_wrap(self._engine, below.handle, kind.encode(), words, error, _ERROR_BYTES)
        return EngineBackend(_checked_handle(handle, error), below.facts.descriptor)

    def nbd_link(
        self,
        uri: str,
        *,
        connections: int = 1,
        read_only: bool = False,
        tls_certificates: str | None = None,
        tls_psk_file: str | None = None,
        tls_username: str | None = None,
        tls_verify: bool = True,
        uncompressed_uri: str | None = None,
    ) -> NbdLink:
        """A first connection to an NBD server's export; waits for that. Any thread may ask. EngineError: one line says
        why not.

        `uncompressed_uri`: the same image without QEMU's compress filter, which has to take what that one refuses.
        """
        texts = [
            ffi.NULL if text is None else ffi.new("char[]", os.fsencode(text))
            for text in (uri, tls_certificates, tls_psk_file, tls_username, uncompressed_uri)
        ]
        config = ffi.new("vhc_nbd_config *", [*texts[:4], connections, tls_verify, read_only, texts[4]])
        return NbdLink(self._engine, config, texts)

    def nbd_backend(self, uri: str, **options: Any) -> EngineBackend:
        """The export itself, with the options of `nbd_link`."""
        return self.nbd_link(uri, **options).attach()

    # Volumes.

    def add_volume(
        self,
        *,
        listen_fd: int,
        backend: EngineBackend | None,
        size_bytes: int,
        slots: int,
        object_bytes: int,
        num_queues: int,
        read_only: bool,
        write_cache: bool,
        write_depth: int,
        discard_max_bytes: int,
        serial: str,
        align_mem_bytes: int = 1,
        align_io_bytes: int = 1,
        cache_fd: int = -1,
        ring_bytes: int = 0,
        store_bytes: int = 0,
        tier_fd: int = -1,
        tier_entries_offset: int = 0,
        tier_entries: int = 0,
        tier_slab_offset: int = 0,
        request_max_bytes: int = 0,
        attach_to: int | None = None,
        detached: bool = False,
    ) -> int:
        """The volume's number: 0, 1, ... The engine takes `listen_fd` over, if it takes the volume.

        The other descriptors stay the caller's and open. With `cache_fd` there is a log, with a ring of `ring_bytes`;
        with `tier_fd` the slots lie in the RAM-tier file. The alignments are the cache file's; without one they are 1.
        `detached`: it has no storage until it is added once more, with `attach_to` its number; then `listen_fd`,
        `num_queues` and `serial` do not count, and it has no storage any more after `detach_volume`.
        """
        error = ffi.new("char[]", _ERROR_BYTES)
        config = ffi.new(
            "vhc_volume_config *",
            {
                "listen_fd": listen_fd,
                "backend": ffi.NULL if backend is None else backend.handle,
                "size_bytes": size_bytes,
                "slots": slots,
                "object_bytes": object_bytes,
                "num_queues": num_queues,
                "read_only": read_only,
                "write_cache": write_cache,
                "align_mem_bytes": align_mem_bytes,
                "align_io_bytes": align_io_bytes,
                "write_depth": write_depth,
                "discard_max_bytes": discard_max_bytes,
                "serial": serial.encode()[:20],
                "cache_fd": cache_fd,
                "ring_bytes": ring_bytes,
                "store_bytes": store_bytes,
                "tier_fd": tier_fd,
                "tier_entries_offset": tier_entries_offset,
                "tier_entries": tier_entries,
                "tier_slab_offset": tier_slab_offset,
                "request_max_bytes": request_max_bytes,
                "detached": detached,
            },
        )
        if attach_to is not None:
            if lib.vhc_volume_attach(self._engine, self._checked(attach_to), config, error, _ERROR_BYTES) < 0:
                raise EngineError("engine", ffi.string(error).decode(errors="replace"))
            self._ring_bytes[attach_to] = ring_bytes + store_bytes
            return attach_to
        index = int(lib.vhc_volume_add(self._engine, config, error, _ERROR_BYTES))
        if index < 0:
            raise EngineError("engine", ffi.string(error).decode(errors="replace"))
        self._volumes = index + 1
        self._ring_bytes.append(ring_bytes + store_bytes)
        return index

    def start_volume(self, index: int) -> None:
        """Accept a front-end."""
        lib.vhc_volume_start(self._engine, self._checked(index))

    def stop_volume(self, index: int) -> None:
        """Accept none any more, answer what has been begun, then disconnect."""
        lib.vhc_volume_stop(self._engine, self._checked(index))

    def detach_volume(self, index: int) -> None:
        """All its I/O has ended and its requests are settled: its backend and files may be closed then."""
        lib.vhc_volume_detach(self._engine, self._checked(index))

    def hold_volume(self, index: int, hold: bool) -> None:
        """Take no requests meanwhile."""
        lib.vhc_volume_hold(self._engine, self._checked(index), hold)

    def volume_stopped(self, index: int) -> None:
        """Let the front-end's last queue stop, as VHC_EV_HAND_OVER asked, though the storage stays."""
        lib.vhc_volume_stopped(self._engine, self._checked(index))

    def give_up_volume(self, index: int) -> bool:
        """Let a queue stop that waits, in a migration, for requests that nothing answers: its front-end can go on
        nowhere but here. False: none does."""
        return bool(lib.vhc_volume_give_up(self._engine, self._checked(index)))

    def disconnect_volume(self, index: int) -> None:
        """Cut off its front-end, if there is one; it may come again."""
        lib.vhc_volume_disconnect(self._engine, self._checked(index))

    def log_start(self, index: int, previous_header_crc: int) -> None:
        """The crc of the header that the next record follows, before the first LOG_WRITE; 0: none is known."""
        lib.vhc_log_start(self._engine, self._checked(index), previous_header_crc)

    def log_crcs(self, index: int) -> memoryview:
        """The crc32c of each block of the ring, then of the read cache, as writable u32. It must not be used once the
        engine is closed."""
        crcs = lib.vhc_log_crcs(self._engine, self._checked(index))
        if crcs == ffi.NULL:
            raise EngineError("engine", f"volume {index} has no log")
        return memoryview(ffi.buffer(crcs, self._ring_bytes[index] // BLOCK_BYTES * 4)).cast("I")

    def grow_volume(self, index: int, size_bytes: int) -> bool:
        """The disk has grown, on the backend first. False: the front-end could not be told, or there is none."""
        return bool(lib.vhc_volume_grow(self._engine, self._checked(index), size_bytes))

    def set_write_cache(self, index: int, enabled: bool) -> None:
        """What the configuration space says of the write cache."""
        lib.vhc_set_write_cache(self._engine, self._checked(index), enabled)

    def volume_message(self, index: int) -> str:
        """Why the last front-end was disconnected, or ""."""
        return str(ffi.string(lib.vhc_volume_message(self._engine, self._checked(index))).decode(errors="replace"))

    def volume_statistics(self, index: int) -> dict[str, Any]:
        """The fields of vhc_volume_stats, arrays as lists."""
        stats = ffi.new("vhc_volume_stats *")
        lib.vhc_read_volume_stats(self._engine, self._checked(index), stats)
        result: dict[str, Any] = {name: int(getattr(stats, name)) for name in _VOLUME_COUNTERS}
        result.update((name, list(getattr(stats, name))) for name in _VOLUME_ARRAYS)
        result["latency"] = [list(histogram) for histogram in stats.latency]
        return result

    def engine_statistics(self) -> dict[str, int]:
        """The fields of vhc_engine_stats."""
        stats = ffi.new("vhc_engine_stats *")
        lib.vhc_read_engine_stats(self._engine, stats)
        return {name: int(getattr(stats, name)) for name in _ENGINE_COUNTERS}

    def watch(self, descriptor: int, number: int) -> None:
        """Report VHC_EV_READABLE with `number` while the descriptor is readable."""
        if lib.vhc_watch(self._engine, descriptor, number) < 0:
            raise EngineError("engine", f"descriptor {descriptor} cannot be watched")

    def slab(self, index: int) -> Any:
        """The slots of a volume as a writable buffer, for tests."""
        return lib.vhc_slab(self._engine, self._checked(index))

    def _checked(self, index: int) -> int:
        if not 0 <= index < self._volumes:
            raise IndexError(f"no volume {index}")
        return index

    # The hot path.

    def turn(self, operations: list[int], timeout_ns: int) -> TurnResult:
        """Execute the operations, wait at most `timeout_ns` (-1: for ever) for something to happen, and report it."""
        raw, result, unpack = self._raw, self._result, self._unpack
        if operations:
            words = array("Q", operations)
            self._turn(self._engine, self._from_buffer(self._words, words), len(words), timeout_ns, raw)
        else:
            self._turn(self._engine, self._no_words, 0, timeout_ns, raw)
        result.now_ns = raw.now_ns
        result.requests = count = raw.requests
        if count:
            result.what = unpack(raw.what, count)
            result.tag = unpack(raw.tag, count)
            result.sector = unpack(raw.sector, count)
            result.sectors = unpack(raw.sectors, count)
            result.groups = count = raw.groups
            result.group_volume = unpack(raw.group_volume, count)
            result.group_end = unpack(raw.group_end, count)
        else:
            result.groups = 0
        result.completions = count = raw.completions
        if count:
            result.done_volume = unpack(raw.done_volume, count)
            result.done_group = unpack(raw.done_group, count)
            result.done_result = unpack(raw.done_result, count)
        result.events = count = raw.events
        if count:
            result.event_kind = unpack(raw.event_kind, count)
            result.event_volume = unpack(raw.event_volume, count)
            result.event_arg = unpack(raw.event_arg, count)
        return result
