"""One structured line an event, to standard error, by structlog.

Invariant: writing an event never blocks. A line is at most 4096 bytes (PIPE_BUF, so a pipe takes it whole or not at
all); it is written only if the descriptor has room for it now, and dropped and counted otherwise. The next line that
gets through says how many were dropped. An event that a front-end can cause at will is limited in rate, and says how
many were left out.

Never: log from the path of a request.
"""

from __future__ import annotations

import os
import select
import socket
import stat
from collections.abc import Callable, MutableMapping
from typing import Any, Final, Literal

import structlog

from vhostcache.errors import one_line, why_number

LINE_BYTES: Final = 4096
LogFormat = Literal["console", "json"]
Level = Literal["info", "warning", "error"]

_BURST: Final = 20  # lines of one event of one volume that may come at once ...
_REFILL_PER_S: Final = 2  # ... and how many a second after that


_LEVELS: Final[dict[str, Level]] = {
    "backend-recovered": "info",
    "cache-recovered": "info",
    "no-direct-io": "warning",
    "backend-lost": "warning",
    "qsd-message": "warning",
    "qsd-restarted": "info",
}  # of what cores and backends have to say; the rest are errors


class LineWriter:
    """A descriptor that takes a line at once or not at all."""

    def __init__(self, descriptor: int) -> None:
        self.dropped = 0
        self._socket: socket.socket | None = None
        self._owned = -1
        self._descriptor = descriptor
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISSOCK(kind):
            self._socket = socket.socket(fileno=os.dup(descriptor))
        elif stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
            # Others may write into the same pipe between poll and write. A file description of our own can be
            # non-blocking without making theirs so.
            try:
                self._owned = os.open(
                    f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
                )
                self._descriptor = self._owned
            except OSError:
                self._owned = -1
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)

    def write(self, line: str) -> bool:
        """True if the line is out."""
        data = line.encode("utf-8", "backslashreplace")
        if len(data) > LINE_BYTES:
            self.dropped += 1
            return False
        try:
            if self._owned < 0 and self._socket is None and not self._has_room():
                self.dropped += 1
                return False
            if self._socket is not None:
                sent = self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            else:
                sent = os.write(self._descriptor, data)
        except OSError:
            self.dropped += 1
            return False
        return sent == len(data)

    def _has_room(self) -> bool:
        """Of a descriptor that would wait: a pipe that cannot be opened again, because it is another user's."""
        ready = self._poll.poll(0)
        return bool(ready and ready[0][1] & select.POLLOUT and not ready[0][1] & select.POLLERR)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._owned >= 0:
            os.close(self._owned)


class EventLog:
    """The log of one daemon: `log.info("ready", volume="vda", ...)`.

    `limited(now_ns, ...)` is for what a front-end can cause as often as it likes.
    """

    def __init__(self, log_format: LogFormat, descriptor: int = 2) -> None:
        self._writer = LineWriter(descriptor)
        self._json = log_format == "json"
        self._render: Callable[[Any, str, MutableMapping[str, Any]], Any]
        if self._json:
            self._render = structlog.processors.JSONRenderer(default=str)
        else:
            self._render = structlog.dev.ConsoleRenderer(colors=_is_terminal(descriptor), pad_event_to=24)
        self._logger = structlog.wrap_logger(
            None,
            processors=[
                structlog.stdlib.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                self._emit,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(20),
            cache_logger_on_first_use=True,
        )
        self._buckets: dict[tuple[str, str], list[float]] = {}

    @property
    def dropped(self) -> int:
        return self._writer.dropped

    def info(self, event: str, **fields: Any) -> None:
        self._logger.info(event, **fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._logger.warning(event, **fields)

    def error(self, event: str, **fields: Any) -> None:
        self._logger.error(event, **fields)

    def exception(self, event: str, **fields: Any) -> None:
        """The exception that is being handled, with its traceback in the same line."""
        self._logger.error(event, exc_info=True, **fields)

    def notice(self, volume: str, event: str, fields: dict[str, Any], now_ns: int | None = None) -> None:
        """What a core or a backend has to say; limited, if it is said when."""
        if "errno" in fields:
            fields = {**fields, "error": why_number(-fields["errno"])}
        level = _LEVELS.get(event, "error")
        if now_ns is None:
            getattr(self, level)(event, volume=volume, **fields)
        else:
            self.limited(now_ns, level, event, volume, **fields)

    def limited(self, now_ns: int, level: Level, event: str, volume: str, **fields: Any) -> None:
        """Log, unless this event of this volume has come too often of late; then count it into the next that is
        logged.
        """
        # [tokens, time of the last refill, left out since the last line]
        bucket = self._buckets.setdefault((event, volume), [_BURST, now_ns, 0])
        bucket[0] = min(_BURST, bucket[0] + (now_ns - bucket[1]) * 1e-9 * _REFILL_PER_S)
        bucket[1] = now_ns
        if bucket[0] < 1:
            bucket[2] += 1
            return
        bucket[0] -= 1
        if bucket[2]:
            fields["left_out"] = int(bucket[2])
            bucket[2] = 0
        getattr(self, level)(event, volume=volume, **fields)

    def close(self) -> None:
        self._writer.close()

    def _emit(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> Any:
        dropped = self._writer.dropped
        if dropped:
            event["dropped_lines"] = dropped
        if not self._json:
            for key, value in event.items():
                if isinstance(value, str):
                    event[key] = one_line(value)
        essentials = {key: event[key] for key in ("event", "level", "timestamp", "volume") if key in event}
        line = str(self._render(logger, method, event)).rstrip("\n")
        if "\n" in line:  # a traceback on a console
            line = line.replace("\n", " | ")
        if len(line.encode("utf-8", "backslashreplace")) >= LINE_BYTES:
            line = str(self._render(logger, method, {**essentials, "too_long": True}))
        if self._writer.write(line + "\n"):
            self._writer.dropped = 0
        raise structlog.DropEvent


def _is_terminal(descriptor: int) -> bool:
    return os.isatty(descriptor) and "NO_COLOR" not in os.environ
