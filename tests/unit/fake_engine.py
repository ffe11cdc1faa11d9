"""An engine without bytes: what the loop needs of one, driven by a script.

A test gives a list of steps, one a turn; each may add requests, completions and events to the turn's result. I/O
operations end in the next turn with the result that the test has set. Descriptors that the loop watches are real, and
polled for real.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vhostcache import operations as op
from vhostcache.backend.base import Facts

EVENT_CONNECTED = 1
EVENT_DISCONNECTED = 2
EVENT_FEATURES = 3
EVENT_WCE = 4
EVENT_QUIESCE = 5
EVENT_QUEUE = 6
EVENT_READABLE = 7
EVENT_RESUMED = 8
EVENT_BAD_REQUEST = 9

WAIT_S = 20.0  # a turn that nothing ends within this time is a loop that hangs ...
LIFE_S = 60.0  # ... and so is one that never ends


@dataclass
class Result:
    """As vhc_turn_result, in lists."""

    what: list[int] = field(default_factory=list)
    tag: list[int] = field(default_factory=list)
    sector: list[int] = field(default_factory=list)
    sectors: list[int] = field(default_factory=list)
    group_volume: list[int] = field(default_factory=list)
    group_end: list[int] = field(default_factory=list)
    done_volume: list[int] = field(default_factory=list)
    done_group: list[int] = field(default_factory=list)
    done_result: list[int] = field(default_factory=list)
    event_kind: list[int] = field(default_factory=list)
    event_volume: list[int] = field(default_factory=list)
    event_arg: list[int] = field(default_factory=list)
    now_ns: int = 0

    @property
    def requests(self) -> int:
        return len(self.what)

    @property
    def groups(self) -> int:
        return len(self.group_volume)

    @property
    def completions(self) -> int:
        return len(self.done_group)

    @property
    def events(self) -> int:
        return len(self.event_kind)

    def event(self, kind: int, volume: int = 0, argument: int = 0) -> None:
        self.event_kind.append(kind)
        self.event_volume.append(volume)
        self.event_arg.append(argument)

    def request(self, what: int, tag: int, sector: int = 0, sectors: int = 8, volume: int = 0) -> None:
        self.what.append(what)
        self.tag.append(tag)
        self.sector.append(sector)
        self.sectors.append(sectors)
        if self.group_volume and self.group_volume[-1] == volume:
            self.group_end[-1] += 1
        else:
            self.group_volume.append(volume)
            self.group_end.append(len(self.what))


Step = Callable[["FakeEngine", Result], None]


class FakeEngine:
    """See the module. `steps` is consumed from the front; when it is empty only descriptors and I/O end a turn."""

    def __init__(self, poll_max_us: int = 0, force_threads: bool = False) -> None:
        self.poll_max_us = poll_max_us
        self.force_threads = force_threads
        self.has_io_uring = True
        self.volumes: list[dict[str, Any]] = []
        self.started: list[int] = []
        self.stopped: list[int] = []
        self.connected: set[int] = set()
        self.steps: list[Step] = []
        self.answers: dict[int, int | None] = {}  # tag -> status, None: dropped
        self.log: list[tuple[str, int]] = []  # I/O operations in order: (kind, volume)
        self.io_result: Callable[[str], int] = lambda kind: 0
        self.waited_ns: list[int] = []
        self.closed = False
        self._born_s = time.monotonic()
        self._finished: list[tuple[int, int, int]] = []
        self._volume_of: dict[int, int] = {}
        self._watched: dict[int, int] = {}
        self._poll = select.poll()

    # The interface of vhostcache.engine.Engine.

    def file_backend(self, facts: Facts) -> Facts:
        return facts

    def add_volume(self, **config: Any) -> int:
        attach_to = config.get("attach_to")
        if attach_to is not None:
            assert self.volumes[attach_to]["detached"]
            self.volumes[attach_to] = {**config, "detached": False}
            return int(attach_to)
        self.volumes.append(config)
        return len(self.volumes) - 1

    def start_volume(self, index: int) -> None:
        self.started.append(index)

    def stop_volume(self, index: int) -> None:
        self.stopped.append(index)
        if index in self.connected:
            self.steps.insert(0, lambda engine, result: result.event(EVENT_QUIESCE, index, 0))
            self.steps.insert(1, lambda engine, result: engine.disconnect(result, index))

    def detach_volume(self, index: int) -> None:
        assert not self.volumes[index].get("detached")
        self.volumes[index]["detached"] = True

    def hold_volume(self, index: int, hold: bool) -> None:
        pass

    def volume_stopped(self, index: int) -> None:
        pass

    def set_write_cache(self, index: int, enabled: bool) -> None:
        pass

    def watch(self, descriptor: int, number: int) -> None:
        self._watched[descriptor] = number
        self._poll.register(descriptor, select.POLLIN)

    def volume_message(self, index: int) -> str:
        return "the ring is bent"

    def volume_statistics(self, index: int) -> dict[str, Any]:
        names = "get_id bad_requests errors backend_errors notifications kicks inflight inflight_max depth_sum"
        return {
            "requests": [0] * 6,
            "bytes": [0] * 6,
            "backend_ops": [0] * 4,
            "backend_bytes": [0] * 4,
            "latency": [[0] * 512 for _ in range(3)],
            **dict.fromkeys((*names.split(), "depth_samples", "resubmitted"), 0),
        }

    def engine_statistics(self) -> dict[str, int]:
        return {
            "turns": 1,
            "sleeps": 0,
            "polls": 0,
            "poll_hits": 0,
            "io_uring": int(self.has_io_uring and not self.force_threads),
            "registered_buffers": 0,
        }

    def close(self) -> None:
        self.closed = True

    def turn(self, operations: list[int], timeout_ns: int) -> Result:
        assert time.monotonic() < self._born_s + LIFE_S, "the loop does not end"
        self.waited_ns.append(timeout_ns)
        result = Result()
        self._execute(operations)
        if self.steps:
            self.steps.pop(0)(self, result)
            self._look(result, 0)
        else:
            wait_s = WAIT_S if timeout_ns < 0 else timeout_ns * 1e-9
            self._look(result, 0 if self._finished else wait_s)
            assert timeout_ns >= 0 or result.events or self._finished, "the loop waits for what never comes"
        for volume, group, status in self._finished:
            result.done_volume.append(volume)
            result.done_group.append(group)
            result.done_result.append(status)
        self._finished.clear()
        for tag, volume in zip(result.tag, _spread(result), strict=True):
            assert tag not in self._volume_of, "the test names a tag twice"
            self._volume_of[tag] = volume
        result.now_ns = time.monotonic_ns()
        return result

    # For steps.

    def connect(self, result: Result, index: int = 0) -> None:
        self.connected.add(index)
        result.event(EVENT_CONNECTED, index, 1)

    def disconnect(self, result: Result, index: int = 0, reason: int = 0) -> None:
        assert not [tag for tag, volume in self._volume_of.items() if volume == index], "requests are unsettled"
        self.connected.discard(index)
        result.event(EVENT_DISCONNECTED, index, reason)

    # Inside.

    def _look(self, result: Result, wait_s: float) -> None:
        for descriptor, events in self._poll.poll(wait_s * 1000):
            if events & select.POLLNVAL:  # closed by the loop, which ends the watch
                self._poll.unregister(descriptor)
            else:
                result.event(EVENT_READABLE, self._watched[descriptor])

    def _execute(self, words: list[int]) -> None:
        at = 0
        while at < len(words):
            code, name, argument = words[at] & 255, words[at] >> 8 & 0xFFFFFF, words[at] >> 32
            at += 1
            if code in (op.IN1, op.OUT1):
                self._answer(name, op.STATUS_OK)
            elif code in (op.IN, op.OUT):
                at += 2 + argument
            elif code == op.COMPLETE:
                self._answer(name, argument)
            elif code == op.DROP:
                self._answer(name, None)
            elif code in (op.SLOT_COPY, op.SLOT_ZERO):
                at += 1
            elif code in (op.READ, op.WRITE):
                self._io("read" if code == op.READ else "write", name, words[at] & 0xFFFFFFFF)
                at += 3 + argument
            elif code == op.READ_DIRECT:
                volume = self._volume_of[name]
                self._io("read", volume, words[at] & 0xFFFFFFFF)
                at += 3
            elif code == op.FLUSH:
                self._io("flush", name, words[at] & 0xFFFFFFFF)
                at += 1
            elif code == op.ZERO:
                self._io("zero", name, words[at] & 0xFFFFFFFF)
                at += 3
            else:
                raise AssertionError(f"no such operation: {code}")

    def _io(self, kind: str, volume: int, group: int) -> None:
        self.log.append((kind, volume))
        status = self.io_result(kind)
        # One completion a group, when its last operation has ended: the first error, or 0.
        for at, (other_volume, other_group, other_status) in enumerate(self._finished):
            if (other_volume, other_group) == (volume, group):
                self._finished[at] = (volume, group, other_status or status)
                return
        self._finished.append((volume, group, status))

    def _answer(self, tag: int, status: int | None) -> None:
        del self._volume_of[tag]
        assert tag not in self.answers
        self.answers[tag] = status


def _spread(result: Result) -> list[int]:
    volumes: list[int] = []
    for volume, end in zip(result.group_volume, result.group_end, strict=True):
        volumes += [volume] * (end - len(volumes))
    return volumes
