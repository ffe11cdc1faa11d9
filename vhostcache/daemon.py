"""The daemon: opens everything, runs the loop, drains and leaves.

Owns the composition (configuration -> backends, sockets, engine, volumes) and the one loop that is the hot path: one
call into the engine a turn, then the core. All or nothing at the start: what can be refused is refused before the
first socket accepts.

In the loop nothing blocks and nothing is logged for a request; what takes longer (statistics, a status answer) goes in
slices, one a turn. Python's garbage collector is off, and runs when the daemon has been idle for a second.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Set
from functools import partial
from typing import Any, Final, Literal

from vhostcache import metrics, tunables
from vhostcache.assembly import CacheClaim, claim_without_cache, prepare_cache
from vhostcache.backend.base import Backend, Notice, Opened
from vhostcache.backend.file import LOCK_WAIT_S as IMAGE_LOCK_WAIT_S
from vhostcache.backend.opening import open_backend, stack_backend
from vhostcache.cachefile import LOCK_WAIT_S as CACHE_LOCK_WAIT_S
from vhostcache.config import Config, VolumeConfig
from vhostcache.control import ControlChannel, Question
from vhostcache.engine import Engine
from vhostcache.errors import (
    EXIT_OK,
    EXIT_RUNTIME,
    ControlError,
    Error,
    ImageError,
    ResizeError,
    UsageError,
    why,
    why_number,
)
from vhostcache.events import EventLog
from vhostcache.handover import Away, HandOver
from vhostcache.host import notify_supervisor, qemu_arguments, raise_descriptor_limit
from vhostcache.log.format import REQUEST_BLOCKS
from vhostcache.log.superblock import WRITE_CACHE_OFF, WRITE_CACHE_UNKNOWN
from vhostcache.log_volume import LogVolume
from vhostcache.map import slots_for_ram
from vhostcache.resize import Growth
from vhostcache.resize import refuse as refuse_size
from vhostcache.served import Served, State, log_volume_settings, volume_settings
from vhostcache.sockets import Listener
from vhostcache.volume import NEVER, Volume

EVENT_CONNECTED: Final = 1
EVENT_DISCONNECTED: Final = 2
EVENT_FEATURES: Final = 3
EVENT_WCE: Final = 4
EVENT_QUIESCE: Final = 5
EVENT_QUEUE: Final = 6
EVENT_READABLE: Final = 7
EVENT_RESUMED: Final = 8
EVENT_BAD_REQUEST: Final = 9
EVENT_BACKEND: Final = 10
EVENT_HAND_OVER: Final = 11

FEATURE_FLUSH: Final = 1 << 9  # VIRTIO_BLK_F_FLUSH
FEATURE_LOG_ALL: Final = 1 << 26  # VHOST_F_LOG_ALL: the front-end migrates

SECOND_NS: Final = 1_000_000_000
DISCARD_MAX_BYTES: Final = 64 << 20  # what one DISCARD or WRITE_ZEROES may name: a bound for what one request starts
REQUEST_MAX_BYTES: Final = (REQUEST_BLOCKS - 1) * 4096  # with a log; unaligned it touches one block more
STATUS_SLICE: Final = 16  # volumes described in one turn
DONE: Final = -1
_JOBS: Final = 4
_ENDED: Final = object()
_ABANDONED: Final = (
    "nothing is lost as long as the host runs and that file stays: mend the device and start again, which takes up both"
)
CACHE_FAILS_NS: Final = 5 * SECOND_NS  # so long an end waits for a cache device that answers with errors,
CACHE_SILENT_NS: Final = 60 * SECOND_NS  # and so long for one that does not answer
TAKE_REST: Final = 4  # times as long as an attempt to take a storage has taken, before the next one
_ENGINE_END_S: Final = 15.0  # then I/O of an abandoned device is not waited for any more
_WAKE_UP: Final = 0  # in place of a signal's number: another thread has something for the loop
_WATCH_SIGNALS: Final = 0  # the control server's numbers count up from 1, one for each start
_WATCH_BACKENDS: Final = 1 << 24  # and the volume's number, for all that its backend has to say

_LEVELS: Final[dict[str, Literal["info", "warning", "error"]]] = {
    "backend-recovered": "info",
    "cache-recovered": "info",
    "no-direct-io": "warning",
    "backend-lost": "warning",
    "qsd-message": "warning",
    "qsd-restarted": "info",
}  # of notices; the others are errors


class Daemon:
    """`Daemon(config, ...).run()` returns the exit status. Everything it opens is closed again, whatever happens."""

    def __init__(
        self,
        config: Config,
        log: EventLog,
        version: str,
        shutdown_on_disconnect: bool = False,
        output: Callable[[str], None] | None = None,
        engine_class: Callable[..., Engine] = Engine,
        discard_dirty_data: Set[str] = frozenset(),
    ) -> None:
        self._config = config
        self._log = log
        self._version = version
        self._shutdown_on_disconnect = shutdown_on_disconnect
        self._output = output or (lambda text: None)
        self._engine_class = engine_class
        self._discard_dirty_data = discard_dirty_data
        self._operations: list[int] = []
        self._served: list[Served] = []
        self._jobs: deque[Iterator[None]] = deque()
        self._control: ControlChannel | None = None
        self._control_number = _WATCH_SIGNALS
        self._signals: socket.socket | None = None
        self._waker: socket.socket | None = None
        self._abandons = False  # a cache device that is dead
        self._shutting_down = False
        self._progress_at_ns = NEVER
        self._rare = False  # something below the hot path wants a word in the next turn
        self._started_at_s = 0.0
        self._deadlines: list[int] = []  # of the volumes' ticks, in ns; 0: at once
        # What the loop calls of each volume's core, which may be exchanged.
        self._take: list[Callable[..., Any]] = []
        self._io_done: list[Callable[[int, int], Any]] = []
        self._tick: list[Callable[[int], int]] = []
        self._notices: list[list[tuple[str, dict[str, Any]]]] = []
        self._has_exchanged = False  # the old one is garbage that nobody has collected

    # Start.

    def run(self) -> int:
        """Serve until told to stop. Error: something was refused, and nothing has been started."""
        with contextlib.ExitStack() as stack:
            raise_descriptor_limit(len(self._config.volumes))
            # At the end in this order: the engine, with all I/O; sockets; claims, which say how the images were left;
            # the backends. The engine is there first because some backends are opened by it.
            opened, claimed, bound = (stack.enter_context(contextlib.ExitStack()) for _ in range(3))
            claimed.callback(self._close_storages)
            self._engine = self._engine_class(
                poll_max_us=self._config.poll_max_us, force_threads=self._config.io_engine == "threads"
            )
            stack.callback(self._engine.close)
            backends = [self._open_backend(volume, opened) for volume in self._config.volumes]
            claims = [
                self._claim(volume, backend, claimed)
                for volume, backend in zip(self._config.volumes, backends, strict=True)
            ]
            listeners = [self._bind(volume.socket, volume.socket_mode, bound) for volume in self._config.volumes]
            control = self._bind(self._config.control, 0o600, bound) if self._config.control is not None else None
            for volume, backend, listener, claim in zip(self._config.volumes, backends, listeners, claims, strict=True):
                self._served.append(self._add(volume, backend, listener, claim))
                self._use(len(self._served) - 1)
            for index, served in enumerate(self._served):
                served.backend.watch(partial(self._watch_backend, index))
            self._catch_signals(stack)
            stack.callback(self._join_growths)
            if control is not None:
                control.listen()
                self._control = ControlChannel(control, self._version, self._watch_control)
                stack.callback(self._control.close)
                self._control.start(time.monotonic_ns())
            self._started_at_s = time.monotonic()
            for index, served in enumerate(self._served):
                if served.claim is not None:
                    served.claim.served = True
                served.listener.listen()
                self._engine.start_volume(index)
            self._announce()
            gc.collect()
            gc.freeze()
            gc.disable()
            stack.callback(gc.enable)
            self._loop()
            self._report_all()
            if self._abandons:
                # I/O that never ends would hold the end of the engine.
                watchdog = threading.Timer(_ENGINE_END_S, os._exit, [EXIT_RUNTIME])
                watchdog.daemon = True
                watchdog.start()
        return EXIT_RUNTIME if any(served.failed for served in self._served) else EXIT_OK

    def _close_storages(self) -> None:
        """Of volumes whose storage has come later; all I/O has ended."""
        for served in self._served:
            if served.claim is not None:
                served.claim.close()
            served.backend.close()

    def _open_backend(self, volume: VolumeConfig, stack: contextlib.ExitStack, waits: bool = True) -> Backend:
        """Not `waits`: whoever has it is not waited for."""
        wait_s = IMAGE_LOCK_WAIT_S if waits else 0.0
        backend = open_backend(volume, self._engine, wait_s, locked=not (waits and volume.incoming))
        stack.callback(backend.close)
        if waits:
            for warning in backend.warnings:
                self._notice(volume.name, warning.event, warning.fields)
        return backend

    def _bind(self, path: str, permissions: int, stack: contextlib.ExitStack) -> Listener:
        listener = Listener(path, permissions, listening=False)
        stack.callback(listener.close)
        return listener

    def _claim(
        self, volume: VolumeConfig, backend: Backend, stack: contextlib.ExitStack, waits: bool = True
    ) -> CacheClaim | None:
        discard = volume.name in self._discard_dirty_data and waits

        def tell(level: str, event: str, fields: dict[str, Any]) -> None:
            getattr(self._log, level)(event, volume=volume.name, **fields)
            if event in ("recovering", "making-cache"):
                notify_supervisor(f"EXTEND_TIMEOUT_USEC={30 * 10**6}")

        if volume.incoming and waits:
            prepare_cache(volume, tell)
            return None

        if volume.cache.path is None:
            claim_without_cache(backend, discard, tell)
            return None
        wait_s = CACHE_LOCK_WAIT_S if waits else 0.0
        claim = CacheClaim(volume, backend, discard, tell, wait_s, handed_over=not waits)
        stack.callback(claim.close)
        return claim

    def _add(
        self,
        config: VolumeConfig,
        backend: Backend,
        listener: Listener,
        claim: CacheClaim | None,
        attach_to: int | None = None,
        top: Opened | None = None,
    ) -> Served:
        """A volume and its storage; or its storage alone, which comes to the volume `attach_to`."""
        facts, mode = backend.facts, config.cache_mode
        top = top or stack_backend(config, backend, self._engine)
        common: dict[str, Any] = {
            "listen_fd": listener.detach() if attach_to is None else -1,
            "backend": top,
            "size_bytes": facts.size_bytes,
            "slots": slots_for_ram(config.ram),
            "object_bytes": config.object_size,
            "num_queues": config.num_queues,
            "read_only": config.read_only,
            "write_cache": mode.writeback,
            "write_depth": config.write_depth,
            "discard_max_bytes": DISCARD_MAX_BYTES,
            "serial": config.serial_text,
            "attach_to": attach_to,
            "request_max_bytes": REQUEST_MAX_BYTES if config.cache.path is not None else 0,
        }
        if config.incoming and attach_to is None:
            return self._add_away(config, backend, listener, common)
        if claim is not None:
            return self._add_logged(config, backend, listener, claim, common)
        index = self._engine.add_volume(**common)
        assert index in (len(self._served), common["attach_to"])
        volume = Volume(volume_settings(index, config, facts), self._operations)
        hand_over = self._hand_over(index, config)
        served = Served(config, backend, top, listener, volume, hand_over, write_cache=mode.writeback)
        served.write_cache_unknown = attach_to is not None  # who had it before us has told the guest something
        return served

    def _hand_over(self, index: int, config: VolumeConfig, away: bool = False) -> HandOver:
        return HandOver(_Storage(self, index), config.hand_over_timeout, away)

    def _add_away(self, config: VolumeConfig, backend: Backend, listener: Listener, common: dict[str, Any]) -> Served:
        """A volume whose storage another daemon may have."""
        common["backend"].close()  # what it is is known
        backend.close()
        index = self._engine.add_volume(**{**common, "backend": None}, detached=True)
        hand_over = self._hand_over(index, config, away=True)
        away = Away(backend.facts.size_bytes)
        return Served(config, backend, None, listener, away, hand_over, write_cache=config.cache_mode.writeback)

    def _use(self, index: int) -> None:
        """The core that the volume has now."""
        volume = self._served[index].volume
        here = slice(index, index + 1)
        self._take[here] = [volume.requests]
        self._io_done[here] = [volume.io_done]
        self._tick[here] = [volume.tick]
        self._notices[here] = [volume.notices]

    def _add_logged(
        self, config: VolumeConfig, backend: Backend, listener: Listener, claim: CacheClaim, common: dict[str, Any]
    ) -> Served:
        """A volume with a log, which is recovered here."""
        mode = config.cache_mode
        recovered = claim.open()
        assert claim.file is not None
        # No front-end says again what its guest has been told.
        write_cache = mode.writeback and recovered.superblock.write_cache != WRITE_CACHE_OFF
        index = self._engine.add_volume(
            **{**common, "write_cache": write_cache},
            align_mem_bytes=claim.file.align_mem_bytes,
            align_io_bytes=claim.file.align_io_bytes,
            cache_fd=claim.file.descriptor,
            ring_bytes=recovered.ring_blocks * 4096,
            store_bytes=claim.read_cache[0].positions * 4096 if claim.read_cache else 0,
            tier_fd=claim.tier_fd,
            tier_entries_offset=claim.layout.entries_offset_bytes,
            tier_entries=claim.layout.entries,
            tier_slab_offset=claim.layout.slab_offset_bytes,
        )
        assert index in (len(self._served), common["attach_to"])
        self._engine.log_start(index, recovered.previous_crc)
        with self._engine.log_crcs(index) as crcs:
            for record in recovered.records:
                if record.payload_blocks:
                    first = (record.address + record.header_blocks) % recovered.ring_blocks
                    crcs[first : first + record.payload_blocks] = memoryview(record.crcs)
            if claim.read_cache and claim.read_cache[1]:
                crcs[recovered.ring_blocks :] = memoryview(claim.read_cache[1]).cast("I")
        settings = log_volume_settings(index, config, backend.facts, claim.layout)
        eviction = claim.read_cache[0] if claim.read_cache else None
        volume = LogVolume(settings, self._operations, recovered, eviction=eviction)
        claim.read_cache = None
        recovered.records.clear()
        return Served(
            config,
            backend,
            common["backend"],
            listener,
            volume,
            self._hand_over(index, config),
            claim,
            write_cache=write_cache,
            write_cache_unknown=recovered.superblock.write_cache == WRITE_CACHE_UNKNOWN
            or (claim.is_new and common["attach_to"] is not None),
        )

    def _catch_signals(self, stack: contextlib.ExitStack) -> None:
        """Signals become input of the loop: the C-level handler writes their numbers to a socket that the engine
        watches.
        """
        receiver, sender = socket.socketpair()
        stack.enter_context(receiver)
        stack.enter_context(sender)
        receiver.setblocking(False)
        sender.setblocking(False)
        stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, _ignore)
            # Who asks for the end while it is coming must not turn it into a death by signal.
            stack.callback(signal.signal, number, signal.SIG_IGN)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        self._signals, self._waker = receiver, sender
        self._engine.watch(receiver.fileno(), _WATCH_SIGNALS)

    def _watch_backend(self, index: int, descriptor: int) -> None:
        self._engine.watch(descriptor, _WATCH_BACKENDS + index)

    def _watch_control(self, descriptor: int) -> None:
        self._control_number += 1
        self._engine.watch(descriptor, self._control_number)

    def _announce(self) -> None:
        for served in self._served:
            self._output(qemu_arguments(served.config))
            facts = served.backend.facts
            self._log.info(
                "volume",
                volume=served.name,
                socket=served.config.socket,
                backend=served.config.backend.label,
                backend_type=served.backend.kind,
                size_bytes=facts.size_bytes,
                mode=served.config.cache_mode.name,
                direct=facts.direct,
                read_only=facts.read_only,
                ram_bytes=served.config.ram,
                object_bytes=served.config.object_size,
                **served.cache_fields(),
            )
        names = [served.name for served in self._served]
        engine = self._engine.engine_statistics()
        if not engine["io_uring"] and self._config.io_engine == "auto":
            self._log.warning(
                "no-io-uring",
                reason="the kernel or a container forbids it",
                instead="a pool of threads is used: slower",
            )
        self._log.info(
            "ready",
            pid=os.getpid(),
            version=self._version,
            volumes=names if len(names) <= 32 else len(names),
            control=self._config.control,
            io_uring=bool(engine["io_uring"]),
            registered_buffers=bool(engine["registered_buffers"]),
        )
        notify_supervisor("READY=1")

    # The loop.

    def _loop(self) -> None:
        """Turn after turn, until every volume has stopped."""
        turn = self._engine.turn
        operations = self._operations
        count = len(self._served)
        take, io_done, tick, notices = self._take, self._io_done, self._tick, self._notices
        deadlines = self._deadlines = [0] * count
        everything = range(count)
        touched: set[int] = set()
        busy = False
        housekeeping_ns = NEVER
        timeout_ns = 0
        while True:
            result = turn(operations, timeout_ns)
            operations.clear()
            now_ns = result.now_ns
            touched.clear()

            # First of all: a request that comes in one turn with the news that the write cache is off, or that
            # the front-end has connected, may have been made after that.
            if result.events:
                for kind, index, argument in zip(result.event_kind, result.event_volume, result.event_arg, strict=True):
                    self._event(kind, index, argument, now_ns)
                touched.update(everything)  # a signal or a command may concern any of them
            if result.groups:
                what, tag, sector, sectors = result.what, result.tag, result.sector, result.sectors
                if result.groups == 1:
                    index = result.group_volume[0]
                    take[index](what, tag, sector, sectors, now_ns)
                    touched.add(index)
                else:
                    start = 0
                    for index, end in zip(result.group_volume, result.group_end, strict=True):
                        take[index](what[start:end], tag[start:end], sector[start:end], sectors[start:end], now_ns)
                        touched.add(index)
                        start = end
                busy = True
                if housekeeping_ns == NEVER:
                    housekeeping_ns = now_ns + SECOND_NS
            if result.completions:
                for index, group, status in zip(result.done_volume, result.done_group, result.done_result, strict=True):
                    io_done[index](group, status)
                    touched.add(index)
            wake_ns = NEVER
            for index in everything:
                deadline_ns = deadlines[index]
                if deadline_ns <= now_ns or index in touched:
                    deadline_ns = deadlines[index] = tick[index](now_ns)
                    if notices[index]:
                        self._drain_notices(index)
                if deadline_ns < wake_ns:
                    wake_ns = deadline_ns

            if now_ns >= housekeeping_ns:
                self._check_images(now_ns)
                if busy:
                    housekeeping_ns = now_ns + SECOND_NS
                    busy = False
                else:
                    housekeeping_ns = NEVER
                    if self._has_exchanged:
                        self._has_exchanged = False
                        gc.unfreeze()
                    gc.collect()
                    gc.freeze()
            if housekeeping_ns < wake_ns:
                wake_ns = housekeeping_ns
            if self._rare:
                rare_ns = self._rarely(now_ns)
                if rare_ns == DONE:
                    return
                if rare_ns < wake_ns:
                    wake_ns = rare_ns
            timeout_ns = -1 if wake_ns >= NEVER else max(0, wake_ns - now_ns)

    def _rarely(self, now_ns: int) -> int:
        """What only some turns have to do. Returns when it wants the next turn; DONE: every volume has stopped."""
        wake_ns = NEVER
        if self._jobs:
            wake_ns = 0
            if next(self._jobs[0], _ENDED) is _ENDED:
                self._jobs.popleft()
        control = self._control
        if control is not None and now_ns >= control.restart_at_ns:
            try:
                control.restart(now_ns)
                self._log.info("control-server-started", restarts=control.restarts)
            except ControlError as error:
                self._log.error("control-server-failed", error=str(error))
        if control is not None:
            wake_ns = min(wake_ns, control.restart_at_ns)
        for index, served in enumerate(self._served):
            if served.growth is not None and served.growth.ended:
                self._backend_has_grown(index, served, served.growth)
        for served in self._served:
            if now_ns >= served.backend.wake_at_ns:
                self._look_at_backend(served, now_ns)
            wake_ns = min(wake_ns, served.backend.wake_at_ns)
            if served.hand_over.busy and served.state is State.SERVING:
                wake_ns = min(wake_ns, 0 if self._operations else served.hand_over.step(now_ns))
        draining = [served for served in self._served if served.state is State.DRAINING]
        if draining:
            if self._operations:
                return 0  # not yet seen by the engine
            for index, served in enumerate(self._served):
                if served.state is not State.DRAINING:
                    continue
                if (not served.connected and self._has_ended(index, served)) or self._gives_up(served, now_ns):
                    served.state = State.STOPPED
                    served.listener.close()
            if all(served.state is State.STOPPED for served in self._served):
                return DONE
            wake_ns = min(wake_ns, self._progress(now_ns))
        self._rare = wake_ns < NEVER
        return wake_ns

    def _has_ended(self, index: int, served: Served) -> bool:
        """Drained, and the log, if there is one, closed."""
        volume = served.volume
        if served.growth is not None or served.growing:
            return False
        if served.drains and not served.closing:
            if not volume.drained:
                return False
            self._log.info("drained", volume=served.name)
        if isinstance(volume, Volume | Away):
            return True
        if not served.closing:
            self._close_log(index)
        if volume.closed:
            dirty = volume.statistics()["dirty_blocks"]
            self._log.info("closed", volume=served.name, dirty_bytes=dirty * 4096)
            if volume.read_ring is not None and served.claim is not None and served.claim.recovered is not None:
                with self._engine.log_crcs(index) as crcs:
                    kept = crcs[served.claim.recovered.ring_blocks :].tobytes()
                served.claim.keep_read_cache(volume.read_ring.eviction, kept)
        return volume.closed

    def _gives_up(self, served: Served, now_ns: int) -> bool:
        """Whether its cache device is dead: nothing of what waits for it can be answered any more. What was flushed is
        on that device, what was acknowledged in the RAM tier's file; both stay as they are, for the next start."""
        volume = served.volume
        if not isinstance(volume, LogVolume) or served.claim is None:
            return False
        progress = volume.log_progress
        if progress is None or progress != served.log_progress:
            served.log_progress = progress
            patience_ns = CACHE_FAILS_NS if volume.cache_fails else CACHE_SILENT_NS
            served.give_up_at_ns = NEVER if progress is None else now_ns + patience_ns
            return False
        if volume.cache_fails:
            served.give_up_at_ns = min(served.give_up_at_ns, now_ns + CACHE_FAILS_NS)
        if now_ns < served.give_up_at_ns:
            return False
        fields = {"cache": served.claim.path, "ram_tier": served.claim.abandon(), "hint": _ABANDONED}
        self._log.error("cache-abandoned", volume=served.name, **fields)
        served.failed = True
        self._abandons = True
        return True

    def _close_log(self, index: int, cold: bool = False) -> None:
        served = self._served[index]
        served.closing = True
        if isinstance(served.volume, LogVolume):
            served.volume.close(lambda: served.backend.settle().mtime_ns, cold)
        self._deadlines[index] = 0

    def _progress(self, now_ns: int) -> int:
        """Say once a second how far the end has come, and when to say it next."""
        if now_ns >= self._progress_at_ns:
            self._progress_at_ns = now_ns + SECOND_NS
            for served in self._served:
                if served.state is State.DRAINING:
                    dirty = served.volume.statistics()["dirty_blocks"]
                    event = "draining" if served.drains and not served.closing else "closing"
                    self._log.info(event, volume=served.name, dirty_bytes=dirty * 4096, connected=served.connected)
        return self._progress_at_ns

    # Events, each rare.

    def _event(self, kind: int, index: int, argument: int, now_ns: int) -> None:
        if kind == EVENT_READABLE:
            if index == _WATCH_SIGNALS:
                self._read_signals(now_ns)
            elif index == self._control_number:
                self._read_control(now_ns)
            elif index >= _WATCH_BACKENDS:
                self._look_at_backend(self._served[index - _WATCH_BACKENDS], now_ns)
            return
        served = self._served[index]
        volume, log, name = served.volume, self._log, served.name
        if kind == EVENT_QUIESCE:
            volume.quiesce(bool(argument))
            served.hand_over.quiesced(now_ns)
            self._rare = self._rare or served.hand_over.busy
        elif kind == EVENT_CONNECTED:
            served.connected = True
            volume.connected()
            log.limited(now_ns, "info", "connected", name)
        elif kind == EVENT_DISCONNECTED:
            self._disconnected(served, argument, index, now_ns)
        elif kind == EVENT_FEATURES:
            served.flush_negotiated = bool(argument & FEATURE_FLUSH)
            self._tell_write_cache(served)
            served.hand_over.migrating(bool(argument & FEATURE_LOG_ALL))
            self._deadlines[index] = 0
            log.limited(now_ns, "info", "features", name, features=f"{argument:#x}", flush=served.flush_negotiated)
        elif kind == EVENT_WCE:
            served.write_cache = bool(argument)
            served.write_cache_unknown = False
            served.told = None
            self._tell_write_cache(served)
            log.limited(now_ns, "info", "write-cache", name, enabled=served.write_cache)
        elif kind == EVENT_RESUMED:
            # What it has been told stands in the superblock, if that is not new itself.
            served.write_cache_unknown = served.write_cache_unknown or served.claim is None or served.claim.is_new
            served.told = None
            self._tell_write_cache(served)
            log.limited(now_ns, "info", "resumed", name)
        elif kind == EVENT_QUEUE:
            if argument >> 16 & 1:
                served.hand_over.queue_started(argument & 0xFFFF, now_ns)
            else:
                served.hand_over.queue_stopped(argument & 0xFFFF)
            self._rare = self._rare or served.hand_over.busy
            log.limited(
                now_ns,
                "info",
                "queue",
                name,
                queue=argument & 0xFFFF,
                started=bool(argument >> 16 & 1),
                resubmitted=argument >> 32,
            )
        elif kind == EVENT_HAND_OVER:
            served.hand_over.asked(now_ns)
            self._rare = True
        elif kind == EVENT_BAD_REQUEST:
            log.limited(now_ns, "warning", "bad-request", name, count=argument)
        elif kind == EVENT_BACKEND:
            message = served.top.message if served.top is not None else ""
            notice = served.backend.happened(argument, message, now_ns)
            self._give_up_if_lost(index)
            if notice is not None:
                log.limited(now_ns, _LEVELS.get(notice.event, "error"), notice.event, name, **notice.fields)

    def _look_at_backend(self, served: Served, now_ns: int) -> None:
        for notice in served.backend.look(now_ns):
            level = _LEVELS.get(notice.event, "error")
            self._log.limited(now_ns, level, notice.event, served.name, **notice.fields)
        self._rare = self._rare or served.backend.wake_at_ns < NEVER

    def _disconnected(self, served: Served, reason: int, index: int, now_ns: int) -> None:
        served.connected = False
        served.hand_over.disconnected()
        served.volume.disconnected()
        if served.write_cache_unknown and served.claim is None and not served.came_over:
            # The next front-end brings its own history.
            served.write_cache_unknown = False
            served.told = None
        if reason:
            message = self._engine.volume_message(index)
            self._log.limited(now_ns, "warning", "protocol-error", served.name, error=message)
        self._log.limited(now_ns, "info", "disconnected", served.name)
        if served.state is State.DRAINING and served.drains:
            served.volume.drain()  # what was accepted since the first time
        elif self._shutdown_on_disconnect:
            self._shut_down("the front-end has disconnected")

    def _tell_write_cache(self, served: Served) -> None:
        """Tell the core what the guest believes, when that has changed. Without FLUSH a guest has no way to ask."""
        enabled = served.write_cache and served.flush_negotiated
        if served.claim is not None and served.write_cache and not enabled:
            # Now. What it will be told by a driver that can is not for this one to decide, nor for the superblock.
            served.volume.write_cache_unknown()
            served.told = None
            return
        if enabled == served.told or served.is_away:
            return
        served.told = enabled
        served.volume.set_write_cache(enabled)
        if enabled and served.write_cache_unknown:
            served.volume.write_cache_unknown()

    def _read_signals(self, now_ns: int) -> None:
        assert self._signals is not None
        try:
            numbers = self._signals.recv(64)
        except BlockingIOError:
            return
        for number in numbers:
            if number == _WAKE_UP:
                self._rare = True
            elif number == signal.SIGUSR1:
                self._start_job(self._report_slowly())
            elif number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                name = signal.Signals(number).name
                if self._shutting_down:
                    for index, served in enumerate(self._served):
                        if served.state is State.DRAINING:
                            self._give_up(index)
                    rest = [served for served in self._served if served.state is not State.STOPPED]
                    loses = any(served.claim is None for served in rest)
                    what = "loses what is dirty" if loses else "leaves the rest to the next start"
                    self._log.warning("still-draining", signal=name, hint=f"only SIGKILL ends it now, and {what}")
                else:
                    self._shut_down(name)

    def _read_control(self, now_ns: int) -> None:
        assert self._control is not None
        question = self._control.readable(now_ns)
        if question is None:
            self._log.warning("control-server-died", restarts=self._control.restarts)
            self._rare = True
        elif question.command == "status":
            self._start_job(self._answer_status())
        elif question.command == "resize":
            self._answer_resize(question)
        elif question.command in ("set", "retry"):
            self._answer_change(question)

    def _answer_change(self, question: Question) -> None:
        """Settings, or an attempt, at once: nothing is in the way of them."""
        assert self._control is not None
        try:
            index, served = self._find_served(question.arguments["name"])
            volume = served.volume
            if isinstance(volume, Away):
                raise UsageError(f"volume '{served.name}'", "is with another daemon")
            if question.command == "retry":
                volume.retry()
                self._log.info("retry", volume=served.name)
            else:
                config, values = tunables.changed(served.config, question.arguments["values"])
                volume.tune(values)
                served.config = config
                self._log.info("settings", volume=served.name, **tunables.current(config))
            self._deadlines[index] = 0
            self._control.reply(tunables.current(served.config))
        except UsageError as error:
            self._control.refuse(str(error))

    def _find_served(self, name: str) -> tuple[int, Served]:
        for index, served in enumerate(self._served):
            if served.name == name:
                return index, served
        names = ", ".join(f"'{served.name}'" for served in self._served[:8])
        raise UsageError(f"volume '{name[:64]}'", "is not served here", names)

    # Resizing.

    def _answer_resize(self, question: Question) -> None:
        assert self._control is not None
        name, size_bytes = question.arguments["name"], question.arguments["size_bytes"]
        try:
            self._control.reply(self._begin_resize(name, size_bytes))
        except ResizeError as error:
            self._control.refuse(str(error))

    def _begin_resize(self, name: str, size_bytes: int) -> dict[str, Any]:
        """The answer, which comes before the end: that is in the status."""
        served = next((served for served in self._served if served.name == name), None)
        if served is None:
            names = ", ".join(f"'{served.name}'" for served in self._served[:8])
            raise ResizeError(f"volume '{name}'", "is not served here", names)
        subject = f"volume '{name}'"
        if served.state is not State.SERVING:
            raise ResizeError(subject, f"is {served.state.value}")
        if served.growth is not None or served.growing:
            raise ResizeError(subject, "is being resized already")
        if not served.hand_over.is_held:
            raise ResizeError(subject, "is with another daemon, or on its way")
        refuse_size(subject, served.backend, served.volume.size_bytes, size_bytes)
        served.resize_error = ""
        if size_bytes > served.volume.size_bytes:
            served.growth = Growth(served.backend, size_bytes, self._wake)
        return {"name": name, "size_bytes": served.volume.size_bytes, "wanted_bytes": size_bytes}

    def _wake(self) -> None:
        """From another thread."""
        assert self._waker is not None
        with contextlib.suppress(OSError):
            self._waker.send(bytes([_WAKE_UP]))

    def _backend_has_grown(self, index: int, served: Served, growth: Growth) -> None:
        """Or not. The superblocks are next, if there are any, and the guest is last."""
        served.growth = None
        if growth.error:
            served.resize_error = growth.error
            self._log.error("resize-failed", volume=served.name, error=growth.error)
            return
        was_bytes = served.volume.size_bytes

        def grown() -> None:
            served.growing = False
            told = self._engine.grow_volume(index, growth.size_bytes)
            fields = {"size_bytes": growth.size_bytes, "was_bytes": was_bytes, "guest_told": told}
            self._log.info("resized", volume=served.name, **fields)
            self._rare = True

        served.growing = True
        assert not isinstance(served.volume, Away)
        served.backend.resized()
        served.volume.grow(growth.size_bytes, grown)
        self._deadlines[index] = 0

    def _join_growths(self) -> None:
        for served in self._served:
            if served.growth is not None:
                served.growth.join()

    # Hand-over.

    def _let_go(self, index: int) -> None:
        """Another daemon may have the image."""
        served = self._served[index]
        self._engine.detach_volume(index)
        self._engine.hold_volume(index, False)
        assert served.top is not None
        served.top.close()
        served.top = None
        if served.config.cache_mode.no_flush and served.claim is None:
            served.backend.settle()  # no flush has said that it is there
        try:
            if served.claim is not None:
                served.claim.close()
        except (Error, OSError) as error:
            # The image's mark keeps the other daemon from it.
            self._log.error("hand-over-failed", volume=served.name, error=str(error), hint="vhostcache drain")
        finally:
            served.backend.close()
        served.claim = None
        served.closing = False
        served.volume = Away(served.volume.size_bytes)
        self._use(index)
        self._has_exchanged = True

    def _take_storage(self, index: int) -> None:
        """Error: it cannot be had now, and nothing has been changed."""
        served = self._served[index]
        with contextlib.ExitStack() as stack:
            backend = self._open_backend(served.config, stack, waits=False)
            size_bytes, told_bytes = backend.facts.size_bytes, served.volume.size_bytes
            top = stack_backend(served.config, backend, self._engine)
            stack.callback(top.close)
            if size_bytes < told_bytes:
                raise ImageError(
                    backend.identity, f"is {size_bytes} bytes large", f"{told_bytes}, as the front-end has been told"
                )
            claim = self._claim(served.config, backend, stack, waits=False)
            new = self._add(served.config, backend, served.listener, claim, index, top)
            stack.pop_all()
        if claim is not None:
            claim.served = True
        served.backend, served.top, served.claim, served.volume = backend, top, claim, new.volume
        backend.watch(partial(self._watch_backend, index))
        served.write_cache = served.write_cache and new.write_cache
        served.write_cache_unknown, served.told = new.write_cache_unknown, None
        served.came_over = True
        self._engine.set_write_cache(index, served.write_cache)
        self._use(index)
        self._has_exchanged = True
        if size_bytes > told_bytes:
            self._engine.grow_volume(index, size_bytes)
        if served.connected:
            served.volume.connected()
        self._tell_write_cache(served)
        self._deadlines[index] = 0

    # Stopping.

    def _shut_down(self, reason: str) -> None:
        self._shutting_down = True
        self._log.info("stopping", reason=reason)
        notify_supervisor("STOPPING=1")
        for index in range(len(self._served)):
            self._stop_volume(index)

    def _stop_volume(self, index: int) -> None:
        served = self._served[index]
        if served.state is State.SERVING:
            served.state = State.DRAINING
            self._engine.stop_volume(index)
            if served.drains:
                served.volume.drain()
            self._deadlines[index] = 0
            self._progress_at_ns = 0
            self._rare = True
            self._give_up_if_lost(index)

    def _give_up_if_lost(self, index: int) -> None:
        """A volume that stops does not wait for a server that is not there, if its log may keep what is dirty."""
        served = self._served[index]
        if served.state is State.DRAINING and served.backend.is_lost and not served.drains:
            self._give_up(index)

    def _give_up(self, index: int) -> None:
        """End without the backend. The front-end submits to the next daemon what has not been answered."""
        served = self._served[index]
        volume, top = served.volume, served.top
        if not isinstance(volume, LogVolume) or served.gave_up or top is None:
            return
        served.failed = served.failed or served.drains
        served.gave_up = True
        self._log.warning(
            "backend-given-up", volume=served.name, hint="the log keeps what is dirty, for the next start"
        )
        volume.drain(False)
        if served.backend.kind != "file":  # whose I/O ends by itself
            top.give_up()
        self._engine.disconnect_volume(index)
        self._deadlines[index] = 0

    def _fail(self, index: int) -> None:
        """This volume cannot go on; the others can. The exit status will say so."""
        self._served[index].failed = True
        self._stop_volume(index)

    # Notices, statistics, status.

    def _drain_notices(self, index: int) -> None:
        served = self._served[index]
        notices = served.volume.notices
        for event, fields in notices:
            if event == "image-shrank":
                self._check_image(index)
            else:
                self._notice(served.name, event, fields)
        notices.clear()

    def _notice(self, volume: str, event: str, fields: dict[str, Any]) -> None:
        if "errno" in fields:
            fields = {**fields, "error": why_number(-fields["errno"])}
        getattr(self._log, _LEVELS.get(event, "error"))(event, volume=volume, **fields)

    def _check_images(self, now_ns: int) -> None:
        for index in range(len(self._served)):
            self._check_image(index)

    def _check_image(self, index: int) -> None:
        served = self._served[index]
        if served.failed or served.is_away:
            return
        notice = served.backend.check()
        if notice is not None:
            self._notice(served.name, notice.event, notice.fields)
            served.failure = _failure(notice)
            self._fail(index)

    def _start_job(self, job: Iterator[None]) -> None:
        """At most a few: the control server asks one thing at a time, and a second signal waits for the first one's
        report.
        """
        if len(self._jobs) < _JOBS:
            self._jobs.append(job)
            self._rare = True

    def _report_slowly(self) -> Iterator[None]:
        for index in range(len(self._served)):
            self._report(index)
            yield

    def _report_all(self) -> None:
        for index in range(len(self._served)):
            self._report(index)

    def _report(self, index: int) -> None:
        served = self._served[index]
        fields = metrics.statistics(self._engine.volume_statistics(index), served.volume.statistics())
        if served.backend.kind != "file" and served.top is not None:
            fields["connection"] = served.top.statistics()
        self._log.info("statistics", volume=served.name, **fields, engine=self._engine.engine_statistics())

    def _answer_status(self) -> Iterator[None]:
        assert self._control is not None
        volumes = []
        for index, served in enumerate(self._served):
            volumes.append(served.status(time.monotonic_ns()))
            if index % STATUS_SLICE == STATUS_SLICE - 1:
                yield
        self._control.reply(
            {
                "version": self._version,
                "pid": os.getpid(),
                "uptime_s": round(time.monotonic() - self._started_at_s, 1),
                "state": "draining" if self._shutting_down else "serving",
                "volumes": volumes,
            }
        )


class _Storage:
    """What hand-over does with one volume's storage."""

    def __init__(self, daemon: Daemon, index: int) -> None:
        self._daemon = daemon
        self._index = index
        self._reason = ""
        self._again_at_ns = 0

    @property
    def can_be_locked(self) -> bool:
        return self._served.backend.can_be_locked

    @property
    def _served(self) -> Served:
        return self._daemon._served[self._index]

    def tell(self, level: str, event: str, **fields: Any) -> None:
        getattr(self._daemon._log, level)(event, volume=self._served.name, **fields)

    def hurry(self, on: bool) -> None:
        if not isinstance(self._served.volume, Away):
            self._served.volume.hurry(on)
            self._daemon._deadlines[self._index] = 0

    def drain(self, on: bool) -> None:
        volume = self._served.volume
        assert not isinstance(volume, Away)
        volume.drain(on, then_cold=on)
        self._daemon._deadlines[self._index] = 0

    def drained(self) -> bool:
        served = self._served
        # What is lost in the log would seem to be there, and old, on the other side.
        return served.volume.drained and served.growth is None and not served.growing and not self.lost_bytes()

    def lost_bytes(self) -> int:
        return self._served.volume.statistics().get("lost_blocks", 0) * 4096

    def close(self) -> None:
        self._daemon._engine.hold_volume(self._index, True)
        self._daemon._close_log(self._index, cold=True)

    def closed(self) -> bool:
        volume = self._served.volume
        return volume.idle and (not isinstance(volume, LogVolume) or volume.closed)

    def let_go(self) -> None:
        self._daemon._let_go(self._index)

    def take(self) -> str:
        began_ns = time.monotonic_ns()
        if began_ns < self._again_at_ns:
            return self._reason
        try:
            self._daemon._take_storage(self._index)
        except Error as error:
            self._reason = str(error)
        except OSError as error:  # no more descriptors, for one; the other volumes are not to hear of it
            self._reason = f"the storage cannot be opened: {why(error)}"
        else:
            return ""
        # The other volumes wait for each attempt: a server that does not answer is not to have them wait all the time.
        now_ns = time.monotonic_ns()
        self._again_at_ns = now_ns + TAKE_REST * (now_ns - began_ns)
        return self._reason

    def stopped(self) -> None:
        self._daemon._engine.volume_stopped(self._index)

    def give_up(self) -> bool:
        return self._daemon._engine.give_up_volume(self._index)

    def cut_off(self) -> None:
        self._daemon._engine.disconnect_volume(self._index)

    def dirty_bytes(self) -> int:
        return self._served.volume.statistics()["dirty_blocks"] * 4096


def _failure(notice: Notice) -> str:
    """For `status`."""
    words = notice.event.replace("-", " ")
    return f"{words}: {hint}" if (hint := notice.fields.get("hint")) else words


def _ignore(number: int, frame: object) -> None:
    """The number has already been written to the wake-up socket."""
