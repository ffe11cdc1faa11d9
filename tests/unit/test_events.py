import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vhostcache.events import LINE_BYTES, EventLog

SECOND_NS = 10**9


class Pipe:
    """A pipe whose reader can be slow."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.reader, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(self.reader, False)

    def lines(self) -> list[str]:
        data = b""
        while True:
            try:
                piece = os.read(self.reader, 65536)
            except BlockingIOError:
                break
            if not piece:
                break
            data += piece
        return data.decode().splitlines()

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.close()


def events(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines]


def test_an_event_is_one_line_of_json(pipe: Pipe) -> None:
    log = EventLog("json", pipe.writer)
    log.info("ready", volume="vda", size_bytes=512, nested={"a": [1, None]})
    log.error("broken", error="two\nlines")
    log.close()
    first, second = events(pipe.lines())
    assert (first["event"], first["level"], first["volume"], first["nested"]) == (
        "ready",
        "info",
        "vda",
        {"a": [1, None]},
    )
    assert first["timestamp"].endswith("Z")
    assert (second["event"], second["level"], second["error"]) == ("broken", "error", "two\nlines")


def test_a_console_line_is_one_line_that_no_value_can_break_or_colour(pipe: Pipe) -> None:
    log = EventLog("console", pipe.writer)
    log.warning("odd", path="a\nb\x1b[31m", error="x y")
    log.close()
    (line,) = pipe.lines()
    assert "odd" in line
    assert "\x1b" not in line
    assert "warning" in line


def test_a_full_pipe_blocks_nobody_and_the_next_line_says_how_many_were_dropped(pipe: Pipe) -> None:
    log = EventLog("json", pipe.writer)
    for number in range(200):
        log.info("filler", number=number, text="x" * 100)
    through = events(pipe.lines())
    assert 0 < len(through) < 200
    assert log.dropped == 200 - len(through)
    dropped = log.dropped
    log.info("after")
    log.info("later")
    log.close()
    after, later = events(pipe.lines())
    assert after["dropped_lines"] == dropped
    assert "dropped_lines" not in later


def test_the_descriptor_of_others_is_not_made_non_blocking(pipe: Pipe) -> None:
    log = EventLog("json", pipe.writer)
    assert os.get_blocking(pipe.writer)
    log.close()


def test_a_reader_that_has_gone_costs_lines_and_nothing_else() -> None:
    reader, writer = os.pipe()
    log = EventLog("json", writer)
    os.close(reader)
    log.info("nobody-listens")
    assert log.dropped == 1
    log.close()
    os.close(writer)


def test_a_socket_that_is_full_blocks_nobody() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        log = EventLog("json", ours.fileno())
        for _ in range(5000):
            log.info("filler", text="x" * 1000)
        assert log.dropped > 0
        log.close()
        received = theirs.recv(4096)
        assert received.startswith(b'{"')


def test_a_line_that_is_too_long_leaves_its_name_and_that_it_was_too_long(tmp_path: Path) -> None:
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    log = EventLog("json", descriptor)
    log.info("huge", volume="vda", text="x" * 10_000)
    log.info("next")
    log.close()
    os.close(descriptor)
    huge, following = events(path.read_text().splitlines())
    assert (huge["event"], huge["volume"], huge["too_long"]) == ("huge", "vda", True)
    assert following["event"] == "next"
    assert all(len(line) <= LINE_BYTES for line in path.read_text().splitlines())


def test_a_full_disk_behind_the_log_stops_nothing() -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    assert stat.S_ISCHR(os.fstat(descriptor).st_mode)
    log = EventLog("json", descriptor)
    log.info("lost")
    assert log.dropped == 1
    log.close()
    os.close(descriptor)


def test_what_a_front_end_can_repeat_at_will_is_limited_and_counted(pipe: Pipe) -> None:
    log = EventLog("json", pipe.writer)
    seen = []
    for number in range(1000):
        log.limited(number, "info", "connected", "vda")
        seen += events(pipe.lines())
    assert 1 < len(seen) < 100
    log.limited(10, "info", "connected", "vdb")
    assert events(pipe.lines())[0]["volume"] == "vdb", "another volume has a limit of its own"
    log.limited(10 * SECOND_NS, "info", "connected", "vda")
    log.close()
    (line,) = events(pipe.lines())
    assert line["left_out"] == 1000 - len(seen)
