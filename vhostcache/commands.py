"""What a daemon answers to those who ask it over the control socket, and what it does for them.

Owns the control channel, the answers (docs/control-protocol.md), and disks on their way to another size: resize.py says
in which order. What takes long is a job of slices, one a turn.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from vhostcache import tunables
from vhostcache.control import ControlChannel, Question
from vhostcache.engine import Engine
from vhostcache.errors import ControlError, ResizeError, UsageError
from vhostcache.events import EventLog
from vhostcache.handover import Away
from vhostcache.resize import Growth
from vhostcache.resize import refuse as refuse_size
from vhostcache.served import Served, State
from vhostcache.sockets import Listener
from vhostcache.volumes import Volumes

STATUS_SLICE: Final = 16  # volumes described in one turn


class Commands:
    """See the module. `watch` is given each descriptor of the control server; `wake` is called from other threads."""

    def __init__(
        self,
        listener: Listener,
        volumes: Volumes,
        engine: Engine,
        log: EventLog,
        version: str,
        watch: Callable[[int], None],
        start_job: Callable[[Iterator[None]], None],
        wake: Callable[[], None],
        is_ending: Callable[[], bool],
    ) -> None:
        self._volumes = volumes
        self._engine = engine
        self._log = log
        self._version = version
        self._start_job = start_job
        self._wake = wake
        self._is_ending = is_ending
        self._started_at_s = time.monotonic()
        self._channel = ControlChannel(listener, version, watch)

    def start(self, now_ns: int) -> None:
        """ControlError: the server cannot be started."""
        self._channel.start(now_ns)
        self._started_at_s = time.monotonic()

    def close(self) -> None:
        self._channel.close()

    def join(self) -> None:
        """Until no thread works at a backend any more."""
        for served in self._volumes.served:
            if served.growth is not None:
                served.growth.join()

    def step(self, now_ns: int) -> int:
        """Once a turn in which something rare is to be done. Returns when it wants the next one."""
        channel = self._channel
        if now_ns >= channel.restart_at_ns:
            try:
                channel.restart(now_ns)
                self._log.info("control-server-started", restarts=channel.restarts)
            except ControlError as error:
                self._log.error("control-server-failed", error=str(error))
        for index, served in enumerate(self._volumes.served):
            if served.growth is not None and served.growth.ended:
                self._backend_has_grown(index, served, served.growth)
        return channel.restart_at_ns

    def readable(self, now_ns: int) -> None:
        """The control server has said something."""
        question = self._channel.readable(now_ns)
        if question is None:
            self._log.warning("control-server-died", restarts=self._channel.restarts)
            self._volumes.rare = True
        elif question.command:
            self._answer(question)

    def _answer(self, question: Question) -> None:
        if question.command == "status":
            self._start_job(self._answer_status())
            return
        try:
            if question.command == "resize":
                answer = self._begin_resize(question.arguments["name"], question.arguments["size_bytes"])
            else:
                answer = self._change(question)
        except (ResizeError, UsageError) as error:
            self._channel.refuse(str(error))
        else:
            self._channel.reply(answer)

    def _answer_status(self) -> Iterator[None]:
        volumes = []
        for index, served in enumerate(self._volumes.served):
            volumes.append(served.status(time.monotonic_ns()))
            if index % STATUS_SLICE == STATUS_SLICE - 1:
                yield
        self._channel.reply(
            {
                "version": self._version,
                "pid": os.getpid(),
                "uptime_s": round(time.monotonic() - self._started_at_s, 1),
                "state": "draining" if self._is_ending() else "serving",
                "volumes": volumes,
            }
        )

    # Settings, or an attempt, at once: nothing is in the way of them.

    def _change(self, question: Question) -> dict[str, int | float | bool]:
        index, served = self._volumes.named(question.arguments["name"])
        volume = served.volume
        if isinstance(volume, Away):
            raise UsageError(f"volume '{served.name}'", "is with another daemon")
        if question.command == "retry":
            volume.retry()
            self._log.info("retry", volume=served.name)
        else:
            assert question.command == "set"
            config, values = tunables.changed(served.config, question.arguments["values"])
            volume.tune(values)
            served.config = config
            self._log.info("settings", volume=served.name, **tunables.current(config))
        self._volumes.wake(index)
        return tunables.current(served.config)

    # Resizing.

    def _begin_resize(self, name: str, size_bytes: int) -> dict[str, Any]:
        """The answer, which comes before the end: that is in the status."""
        _, served = self._volumes.named(name)
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
            self._volumes.rare = True

        served.growing = True
        assert not isinstance(served.volume, Away)
        served.backend.resized()
        served.volume.grow(growth.size_bytes, grown)
        self._volumes.wake(index)
