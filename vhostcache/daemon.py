"""The daemon: opens everything, runs the loop, drains and leaves.

Owns the order of a start and of an end, the signals, and the one loop that is the hot path: one call into the engine a
turn, then the core. All or nothing at the start: what can be refused is refused before the first socket accepts. What a
volume is made of is composition.py's, how it ends ending.py's, what its front-end does guest_events.py's, what people
ask for commands.py's, its migration storage.py's.

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
from typing import Final

from vhostcache import metrics
from vhostcache.backend.base import Backend
from vhostcache.commands import Commands
from vhostcache.composition import Composition
from vhostcache.config import Config
from vhostcache.ending import DONE, SECOND_NS, Ending
from vhostcache.engine import Engine
from vhostcache.errors import EXIT_OK, EXIT_RUNTIME
from vhostcache.events import EventLog
from vhostcache.guest_events import GuestEvents
from vhostcache.host import notify_supervisor, qemu_arguments, raise_descriptor_limit
from vhostcache.served import Served, State
from vhostcache.sockets import Listener
from vhostcache.storage import VolumeStorage
from vhostcache.taking import Takings
from vhostcache.volume import NEVER
from vhostcache.volumes import Volumes

EVENT_READABLE: Final = 7
EVENT_BACKEND: Final = 10  # the other events are of front-ends: guest_events.py

_JOBS: Final = 4
_ENDED: Final = object()
_ENGINE_END_S: Final = 15.0  # then I/O of an abandoned device is not waited for any more
_WAKE_UP: Final = 0  # in place of a signal's number: another thread has something for the loop
_WATCH_SIGNALS: Final = 0  # the control server's numbers count up from 1, one for each start
_WATCH_BACKENDS: Final = 1 << 24  # and the volume's number, for all that its backend has to say


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
        self._volumes = Volumes()
        self._jobs: deque[Iterator[None]] = deque()
        self._commands: Commands | None = None
        self._control_number = _WATCH_SIGNALS
        self._signals: socket.socket | None = None
        self._waker: socket.socket | None = None
        self._takings = Takings(self._wake)

    # Start.

    def run(self) -> int:
        """Serve until told to stop. Error: something was refused, and nothing has been started."""
        config, volumes = self._config, self._volumes
        with contextlib.ExitStack() as stack:
            raise_descriptor_limit(len(config.volumes))
            # At the end in this order: the engine, with all I/O; sockets; claims, which say how the images were left;
            # the backends. The engine is there first because some backends are opened by it.
            opened, claimed, bound = (stack.enter_context(contextlib.ExitStack()) for _ in range(3))
            claimed.callback(volumes.close_storages)
            self._engine = self._engine_class(
                poll_max_us=config.poll_max_us, force_threads=config.io_engine == "threads"
            )
            stack.callback(self._engine.close)
            self._ending = Ending(volumes, self._engine, self._log)
            self._guest_events = GuestEvents(
                volumes, self._engine, self._log, self._ending, self._shutdown_on_disconnect
            )
            compose = self._composition = Composition(
                self._engine, self._log, volumes, self._discard_dirty_data, self._storage
            )
            backends = [compose.open_backend(volume, opened) for volume in config.volumes]
            claims = [
                compose.claim(volume, backend, claimed)
                for volume, backend in zip(config.volumes, backends, strict=True)
            ]
            listeners = [self._bind(volume.socket, volume.socket_mode, bound) for volume in config.volumes]
            control = self._bind(config.control, 0o600, bound) if config.control is not None else None
            for volume, backend, listener, claim in zip(config.volumes, backends, listeners, claims, strict=True):
                volumes.add(compose.serve(volume, backend, listener, claim))
            for index, served in enumerate(volumes.served):
                self._watch_backend(index, served.backend)
            self._catch_signals(stack)
            stack.callback(self._takings.join)
            if control is not None:
                self._commands = self._start_commands(control, stack)
            for index, served in enumerate(volumes.served):
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
            for index in range(len(volumes.served)):
                self._report(index)
            if self._ending.abandons:
                # I/O that never ends would hold the end of the engine.
                watchdog = threading.Timer(_ENGINE_END_S, os._exit, [EXIT_RUNTIME])
                watchdog.daemon = True
                watchdog.start()
        return EXIT_RUNTIME if any(served.failed for served in volumes.served) else EXIT_OK

    def _bind(self, path: str, permissions: int, stack: contextlib.ExitStack) -> Listener:
        listener = Listener(path, permissions, listening=False)
        stack.callback(listener.close)
        return listener

    def _storage(self, index: int) -> VolumeStorage:
        return VolumeStorage(
            index,
            self._volumes,
            self._engine,
            self._log,
            lambda: self._composition,
            self._ending,
            self._watch_backend,
            self._takings,
        )

    def _start_commands(self, control: Listener, stack: contextlib.ExitStack) -> Commands:
        control.listen()
        commands = Commands(
            control,
            self._volumes,
            self._engine,
            self._log,
            self._version,
            watch=self._watch_control,
            start_job=self._start_job,
            wake=self._wake,
            is_ending=lambda: self._ending.has_begun,
        )
        stack.callback(commands.join)
        stack.callback(commands.close)
        commands.start(time.monotonic_ns())
        return commands

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

    def _watch_backend(self, index: int, backend: Backend) -> None:
        backend.watch(partial(self._engine.watch, number=_WATCH_BACKENDS + index))

    def _watch_control(self, descriptor: int) -> None:
        self._control_number += 1
        self._engine.watch(descriptor, self._control_number)

    def _wake(self) -> None:
        """From another thread."""
        assert self._waker is not None
        with contextlib.suppress(OSError):
            self._waker.send(bytes([_WAKE_UP]))

    def _announce(self) -> None:
        for served in self._volumes.served:
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
        names = [served.name for served in self._volumes.served]
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
        volumes = self._volumes
        operations, deadlines = volumes.operations, volumes.deadlines
        take, io_done, tick, notices = volumes.take, volumes.io_done, volumes.tick, volumes.notices
        everything = range(len(volumes.served))
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
                self._check_images()
                if busy:
                    housekeeping_ns = now_ns + SECOND_NS
                    busy = False
                else:
                    housekeeping_ns = NEVER
                    if volumes.has_exchanged:
                        volumes.has_exchanged = False
                        gc.unfreeze()
                    gc.collect()
                    gc.freeze()
            if housekeeping_ns < wake_ns:
                wake_ns = housekeeping_ns
            if volumes.rare:
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
        if self._commands is not None:
            wake_ns = min(wake_ns, self._commands.step(now_ns))
        for served in self._volumes.served:
            if now_ns >= served.backend.wake_at_ns:
                self._look_at_backend(served, now_ns)
            wake_ns = min(wake_ns, served.backend.wake_at_ns)
            if served.hand_over.busy and served.state is State.SERVING:
                wake_ns = min(wake_ns, 0 if self._volumes.operations else served.hand_over.step(now_ns))
        end_ns = self._ending.step(now_ns)
        if end_ns == DONE:
            return DONE
        wake_ns = min(wake_ns, end_ns)
        self._volumes.rare = wake_ns < NEVER
        return wake_ns

    # Events, each rare.

    def _event(self, kind: int, index: int, argument: int, now_ns: int) -> None:
        if kind == EVENT_READABLE:
            if index == _WATCH_SIGNALS:
                self._read_signals(now_ns)
            elif index == self._control_number:
                assert self._commands is not None
                self._commands.readable(now_ns)
            elif index >= _WATCH_BACKENDS:
                self._look_at_backend(self._volumes.served[index - _WATCH_BACKENDS], now_ns)
        elif kind == EVENT_BACKEND:
            self._backend_event(index, argument, now_ns)
        else:
            self._guest_events.happened(kind, index, argument, now_ns)

    def _backend_event(self, index: int, argument: int, now_ns: int) -> None:
        served = self._volumes.served[index]
        message = served.top.message if served.top is not None else ""
        notice = served.backend.happened(argument, message, now_ns)
        self._ending.give_up_if_lost(index)
        if notice is not None:
            self._log.notice(served.name, notice.event, notice.fields, now_ns)

    def _look_at_backend(self, served: Served, now_ns: int) -> None:
        for notice in served.backend.look(now_ns):
            self._log.notice(served.name, notice.event, notice.fields, now_ns)
        self._volumes.rare = self._volumes.rare or served.backend.wake_at_ns < NEVER

    def _read_signals(self, now_ns: int) -> None:
        assert self._signals is not None
        try:
            numbers = self._signals.recv(64)
        except BlockingIOError:
            return
        for number in numbers:
            if number == _WAKE_UP:
                self._volumes.rare = True
            elif number == signal.SIGUSR1:
                self._start_job(self._report_slowly())
            elif number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                name = signal.Signals(number).name
                if self._ending.has_begun:
                    self._ending.hasten(name)
                else:
                    self._ending.begin(name)

    # Notices, images, statistics.

    def _drain_notices(self, index: int) -> None:
        served = self._volumes.served[index]
        notices = served.volume.notices
        for event, fields in notices:
            if event == "image-shrank":
                self._check_image(index)
            else:
                self._log.notice(served.name, event, fields)
        notices.clear()

    def _check_images(self) -> None:
        for index in range(len(self._volumes.served)):
            self._check_image(index)

    def _check_image(self, index: int) -> None:
        served = self._volumes.served[index]
        if served.failed or served.is_away:
            return
        notice = served.backend.check()
        if notice is not None:
            self._log.notice(served.name, notice.event, notice.fields)
            self._ending.fail(index, notice)

    def _start_job(self, job: Iterator[None]) -> None:
        """At most a few: the control server asks one thing at a time, and a second signal waits for the first one's
        report.
        """
        if len(self._jobs) < _JOBS:
            self._jobs.append(job)
            self._volumes.rare = True

    def _report_slowly(self) -> Iterator[None]:
        for index in range(len(self._volumes.served)):
            self._report(index)
            yield

    def _report(self, index: int) -> None:
        served = self._volumes.served[index]
        fields = metrics.statistics(self._engine.volume_statistics(index), served.volume.statistics())
        if served.backend.kind != "file" and served.top is not None:
            fields["connection"] = served.top.statistics()
        self._log.info("statistics", volume=served.name, **fields, engine=self._engine.engine_statistics())


def _ignore(number: int, frame: object) -> None:
    """The number has already been written to the wake-up socket."""
