"""NBD exports behind the engine, driven as the core drives it: servers that go, come back, lie and fall silent."""

import contextlib
import errno
import fcntl
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.backend.device import BLOCK, Device, volume
from tests.native import nbd_server
from tests.native.nbd_server import (
    CAN_FLUSH,
    CAN_MULTI_CONN,
    FLAG_READ_ONLY,
    HAS_FLAGS,
    Answer,
    NbdServer,
    fail,
    send,
)
from vhostcache.backend.base import Facts
from vhostcache.engine import Engine
from vhostcache.errors import EngineError

MIB = 1 << 20
SIZE = 16 * MIB
BACKEND = 10
CONNECTED, LOST, REFUSED = 1, 2, 3


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NbdServer]:
    with NbdServer(tmp_path / "nbd.sock", SIZE) as server:
        yield server


@contextlib.contextmanager
def opened(server: NbdServer, **options: Any) -> Iterator[Device]:
    with Device(lambda engine: engine.nbd_backend(server.uri, **options)) as device:
        yield device


def noise(length: int, seed: object) -> bytes:
    return random.Random(repr(seed)).randbytes(length)


def happened(device: Device, what: int) -> bool:
    return (BACKEND, what) in device.events


# -- the server goes and comes back --


def test_what_was_under_way_when_the_server_went_is_done_when_it_is_back(server: NbdServer) -> None:
    with opened(server) as device:
        device.put(0, noise(8 * BLOCK, 1))
        device.sync()
        server.go.clear()
        writes = [device.write((16 + 2 * n) * BLOCK, noise(BLOCK, n)) for n in range(10)]
        read = device.read(0, 8 * BLOCK)
        device.until(lambda: device.backend.statistics()["in_flight"] >= 1)
        server.stop()
        server.go.set()
        device.until(lambda: happened(device, LOST))
        assert not any(number in device.results for number in [*writes, read])
        server.start()
        assert set(device.wait(*writes, read)) == {0}
        assert happened(device, CONNECTED)
        assert device.data(read) == noise(8 * BLOCK, 1)
        for n in range(10):
            assert device.get((16 + 2 * n) * BLOCK, BLOCK) == noise(BLOCK, n)
        assert device.backend.statistics()["repeated"] >= 1


def test_a_flush_fails_once_when_acknowledged_writes_may_have_been_lost_with_the_server(server: NbdServer) -> None:
    with opened(server) as device:
        device.put(0, b"1" * BLOCK)
        device.sync()
        device.put(0, b"2" * BLOCK)
        server.stop()
        server.lose_power()
        server.start()
        assert device.wait(device.flush()) == [-errno.ECONNRESET]
        assert device.get(0, BLOCK) == b"1" * BLOCK
        device.put(0, b"2" * BLOCK)
        device.sync()
        assert server.durable[:BLOCK] == b"2" * BLOCK


def test_a_flush_is_repeated_when_nothing_can_have_been_lost(server: NbdServer) -> None:
    with opened(server) as device:
        device.put(0, b"1" * BLOCK)
        device.sync()
        server.go.clear()
        flush = device.flush()
        device.until(lambda: device.backend.statistics()["in_flight"])
        server.stop()
        server.go.set()
        device.until(lambda: happened(device, LOST))
        server.start()
        assert device.wait(flush) == [0]


def test_of_two_flushes_under_way_both_fail(server: NbdServer) -> None:
    with opened(server) as device:
        device.put(0, b"1" * BLOCK)
        server.go.clear()
        flushes = [device.flush(), device.flush()]
        device.until(lambda: device.backend.statistics()["in_flight"] == 2)
        server.stop()
        server.go.set()
        device.until(lambda: happened(device, LOST))
        server.start()
        assert device.wait(*flushes) == [-errno.ECONNRESET] * 2
        device.sync()


def test_a_server_may_come_and_go_again_and_again(server: NbdServer) -> None:
    with opened(server, connections=3) as device:
        rng = random.Random(7)
        model = bytearray(SIZE)
        for number in range(6):
            groups = []
            for block in rng.sample(range(512), 12):
                data = noise(BLOCK, (number, block))
                model[block * BLOCK : (block + 1) * BLOCK] = data
                groups.append(device.write(block * BLOCK, data))
            device.turn(0)
            if number % 2:
                server.drop_connections()
            else:
                server.stop()
                device.turn()
                server.start()
            assert set(device.wait(*groups)) == {0}
        for start in range(0, 4 * MIB, MIB):
            assert device.get(start, MIB) == model[start : start + MIB]


def test_the_others_go_on_when_one_connection_breaks(server: NbdServer) -> None:
    with opened(server, connections=4) as device:
        device.until(lambda: device.backend.statistics()["connections"] == 4)
        with server._lock:
            one = server._open[1]
        one.shutdown(socket.SHUT_RDWR)
        device.until(lambda: device.backend.statistics()["losses"] == 1)
        device.put(0, bytes(BLOCK))
        assert not happened(device, LOST)
        device.until(lambda: device.backend.statistics()["connections"] == 4)


def test_a_server_that_does_not_allow_several_connections_gets_one(server: NbdServer) -> None:
    server.flags &= ~CAN_MULTI_CONN
    with opened(server, connections=4) as device:
        for number in range(8):
            device.put(number * BLOCK, bytes(BLOCK))
        assert server.connections == 1


# -- it lies --


GARBAGE = {
    "no_magic": send(lambda cookie, length: bytes(16)),
    "a_foreign_cookie": send(lambda cookie, length: nbd_server.REPLY.pack(nbd_server.REPLY_MAGIC, 0, cookie + 77)),
    "a_structured_reply": send(lambda cookie, length: struct.pack(">IHHQI", 0x668E33EF, 1, 1, cookie, 1 << 31)),
    "noise": send(lambda cookie, length: noise(100_000, "garbage")),
    "half_an_answer": lambda server, connection, kind, cookie, offset, length: _half(server, connection, cookie),
}


def _half(server: NbdServer, connection: socket.socket, cookie: int) -> bool:
    server.answer = None
    connection.sendall(nbd_server.REPLY.pack(nbd_server.REPLY_MAGIC, 0, cookie)[:9])
    connection.shutdown(socket.SHUT_RDWR)
    return True


@pytest.mark.parametrize("answer", GARBAGE.values(), ids=GARBAGE.keys())
def test_after_an_answer_that_is_garbage_it_is_asked_again_on_a_new_connection(server: NbdServer, answer: Any) -> None:
    with opened(server) as device:
        device.put(0, noise(4 * BLOCK, "good"))
        server.answer = answer
        assert device.get(0, 4 * BLOCK) == noise(4 * BLOCK, "good")
        assert device.backend.statistics()["losses"] == 1


@pytest.mark.parametrize(
    "greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"NBDMAGIC" + bytes(200), noise(500, "greeting")]
)
def test_who_does_not_speak_nbd_is_refused_with_one_line(server: NbdServer, greeting: bytes) -> None:
    if not greeting:
        server.stop()
    server.greeting = greeting
    with Engine() as engine, pytest.raises(EngineError) as caught:
        engine.nbd_backend(server.uri)
    assert "\n" not in str(caught.value)


def test_a_server_that_lies_for_ever_is_asked_with_pauses_and_holds_nobody_up(server: NbdServer) -> None:
    with opened(server) as device:
        server.stop()
        server.greeting = noise(300, "lies")
        server.start()
        write = device.write(0, b"x" * BLOCK)
        device.until(lambda: happened(device, LOST) and server.connections >= 4)
        assert write not in device.results
        server.stop()
        server.greeting = None
        server.start()
        assert device.wait(write) == [0]


@pytest.mark.parametrize(
    ("wire", "found"), [(1, errno.EPERM), (5, errno.EIO), (12, errno.ENOMEM), (28, errno.ENOSPC), (9999, errno.EINVAL)]
)
def test_an_error_of_the_servers_comes_up(server: NbdServer, wire: int, found: int) -> None:
    with opened(server) as device:
        server.answer = fail(wire)
        assert device.wait(device.write(0, bytes(BLOCK)), device.read(0, BLOCK), device.flush()) == [-found] * 3
        server.answer = None
        device.put(0, bytes(BLOCK))


def test_a_server_that_is_shutting_down_is_waited_for(server: NbdServer) -> None:
    with opened(server) as device:
        server.answer = fail(108)
        write = device.write(0, b"y" * BLOCK)
        device.until(lambda: happened(device, LOST))
        server.answer = None
        assert device.wait(write) == [0]


def test_zeroes_are_written_where_the_server_cannot_zero(server: NbdServer) -> None:
    with opened(server) as device:
        device.put(0, b"z" * (3 * MIB))
        server.answer = lambda server, connection, kind, cookie, offset, length: (
            kind == nbd_server.WRITE_ZEROES and fail(95)(server, connection, kind, cookie, offset, length)
        )
        assert device.wait(device.zero(BLOCK, 3 * MIB - 2 * BLOCK)) == [0]
        assert device.get(0, 3 * MIB) == b"z" * BLOCK + bytes(3 * MIB - 2 * BLOCK) + b"z" * BLOCK


# -- what it is --


def test_requests_are_cut_at_what_the_server_takes(server: NbdServer) -> None:
    server.blocks = (512, 4096, 64 * 1024)
    with opened(server) as device:
        assert (device.facts.align_io_bytes, device.facts.preferred_bytes, device.facts.max_bytes) == (512, 4096, 65536)
        device.put(0, noise(MIB, "cut"))
        assert device.get(0, MIB) == noise(MIB, "cut")
        assert device.backend.statistics()["commands"][:2] == [16, 16]


def test_a_server_that_cannot_flush_is_not_asked_to(server: NbdServer) -> None:
    server.flags &= ~CAN_FLUSH
    with opened(server) as device:
        assert not device.facts.can_flush
        device.put(0, bytes(BLOCK))
        device.sync()
        assert nbd_server.FLUSH not in server.kinds


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"flags": HAS_FLAGS | FLAG_READ_ONLY}, "read-only"),
        ({"size": 0}, "512"),
        ({"size": 1000}, "512"),
        ({"blocks": (65536, 65536, 1 << 20), "answer": fail(22)}, "4096"),
        ({"blocks": (4096, 4096, 1 << 20), "size": 4096 + 512}, "smallest block"),
    ],
)
def test_an_export_that_cannot_be_used_is_refused_with_one_line(
    server: NbdServer, changes: dict[str, Any], says: str
) -> None:
    for name, value in changes.items():
        setattr(server, name, value)
    with Engine() as engine, pytest.raises(EngineError, match=says) as caught:
        engine.nbd_backend(server.uri)
    assert "\n" not in str(caught.value)


def test_a_read_only_export_is_read(server: NbdServer) -> None:
    server.flags = HAS_FLAGS | FLAG_READ_ONLY
    server.volatile[:BLOCK] = b"r" * BLOCK
    with opened(server, read_only=True) as device:
        assert device.facts.read_only
        assert device.get(0, BLOCK) == b"r" * BLOCK


@pytest.mark.parametrize(
    "changes", [{"size": SIZE - BLOCK}, {"flags": HAS_FLAGS | FLAG_READ_ONLY}, {"flags": HAS_FLAGS}]
)
def test_an_export_that_has_changed_is_not_used(server: NbdServer, changes: dict[str, Any]) -> None:
    before = {name: getattr(server, name) for name in changes}
    with opened(server) as device:
        server.stop()
        for name, value in changes.items():
            setattr(server, name, value)
        server.start()
        write = device.write(0, b"w" * BLOCK)
        device.until(lambda: happened(device, REFUSED))
        assert "\n" not in device.backend.message
        assert write not in device.results
        for name, value in before.items():
            setattr(server, name, value)
        assert device.wait(write) == [0]
        assert happened(device, CONNECTED)


@pytest.mark.parametrize(
    ("uri", "options", "says"),
    [
        ("nbd://localhost", {"tls_psk_file": "/x"}, "nbds"),
        ("nbd+unix:///?socket=/x", {"tls_certificates": "/x"}, "nbds"),
        ("nbds+unix:///?socket=/x", {"tls_certificates": "/x"}, "unix socket"),
        ("nbds+unix:///?socket=/x", {}, "unix socket"),
        ("nbds://localhost", {"tls_certificates": "/x", "tls_psk_file": "/x"}, "one of them"),
        ("http://localhost", {}, "URI"),
        ("", {}, "URI"),
    ],
)
def test_what_libnbd_would_overlook_is_refused(uri: str, options: dict[str, Any], says: str) -> None:
    with Engine() as engine, pytest.raises(EngineError, match=says):
        engine.nbd_backend(uri, **options)


# -- holes --


def test_what_the_server_calls_a_hole_is_read_once(server: NbdServer) -> None:
    def answer(server: NbdServer, connection: socket.socket, kind: int, cookie: int, offset: int, length: int) -> bool:
        if kind == nbd_server.BLOCK_STATUS:
            connection.sendall(nbd_server.block_status(cookie, (4 * MIB, 3), (MIB, 0), (length - 5 * MIB, 2)))
        return kind == nbd_server.BLOCK_STATUS

    server.structured, server.answer = True, answer
    server.volatile[4 * MIB : 5 * MIB] = noise(MIB, "data")
    with opened(server) as device:
        assert device.get(0, BLOCK) == bytes(BLOCK)
        device.until(lambda: device.backend.statistics()["in_flight"] == 0)
        reads = server.kinds.count(nbd_server.READ)
        assert device.get(BLOCK, 4 * MIB - BLOCK) == bytes(4 * MIB - BLOCK)
        assert device.get(5 * MIB, 8 * MIB) == bytes(8 * MIB)
        assert server.kinds.count(nbd_server.READ) == reads
        assert device.get(4 * MIB - BLOCK, MIB + BLOCK) == bytes(BLOCK) + noise(MIB, "data")
        device.put(6 * MIB, noise(BLOCK, "new"))
        assert device.get(6 * MIB - BLOCK, 3 * BLOCK) == bytes(BLOCK) + noise(BLOCK, "new") + bytes(BLOCK)
        assert server.kinds.count(nbd_server.BLOCK_STATUS) == 1
        assert device.backend.statistics()["hole_bytes"] == 12 * MIB - BLOCK


def test_what_the_server_says_beyond_the_question_is_taken_but_where_it_is_written(tmp_path: Path) -> None:
    held: list[bytes] = []

    def answer(server: NbdServer, connection: socket.socket, kind: int, cookie: int, offset: int, length: int) -> bool:
        if kind == nbd_server.BLOCK_STATUS:
            held.append(nbd_server.block_status(cookie, (512 * MIB, 3)))
        return kind == nbd_server.BLOCK_STATUS

    with NbdServer(tmp_path / "nbd.sock", 512 * MIB) as server:
        server.structured, server.answer = True, answer
        with opened(server) as device:
            device.get(0, BLOCK)
            device.until(lambda: held)
            device.put(200 * MIB, noise(BLOCK, "new"))
            with server._lock:
                server._open[0].sendall(held.pop())
            device.until(lambda: device.backend.statistics()["in_flight"] == 0)
            reads = server.kinds.count(nbd_server.READ)
            for at in (MIB, 100 * MIB, 400 * MIB, 512 * MIB - MIB):
                assert device.get(at, MIB) == bytes(MIB)
            assert server.kinds.count(nbd_server.READ) == reads
            assert device.get(200 * MIB, BLOCK) == noise(BLOCK, "new")
            assert server.kinds.count(nbd_server.BLOCK_STATUS) == 1


def test_a_disk_without_holes_is_asked_about_a_few_times_only(tmp_path: Path) -> None:
    asked: list[int] = []

    def answer(server: NbdServer, connection: socket.socket, kind: int, cookie: int, offset: int, length: int) -> bool:
        if kind == nbd_server.BLOCK_STATUS:
            asked.append(length)
            connection.sendall(nbd_server.block_status(cookie, (length, 0)))
        return kind == nbd_server.BLOCK_STATUS

    with NbdServer(tmp_path / "nbd.sock", 1024 * MIB) as server:
        server.structured, server.answer = True, answer
        with opened(server) as device:
            for at in range(0, 1024 * MIB, 16 * MIB):
                device.get(at, BLOCK)
                device.until(lambda: device.backend.statistics()["in_flight"] == 0)
    assert asked == [64 * MIB, 128 * MIB, 256 * MIB, 512 * MIB, 64 * MIB]


def test_a_read_answered_in_pieces_that_leave_some_out_holds_nothing_of_before(server: NbdServer) -> None:
    """libnbd takes the same piece twice, and then the right number of bytes has come."""
    pieces: list[tuple[int, int]] = []

    def answer(server: NbdServer, connection: socket.socket, kind: int, cookie: int, offset: int, length: int) -> bool:
        if kind != nbd_server.READ or not pieces:
            return False
        for number, (at, count) in enumerate(pieces):
            payload = struct.pack(">Q", offset + at) + b"." * count
            last = number + 1 == len(pieces)
            connection.sendall(nbd_server.chunk(nbd_server.CHUNK_DATA, cookie, payload, last=last))
        return True

    server.structured, server.answer = True, answer
    quarter = 16 * BLOCK
    with opened(server) as device:
        device.put(0, b"!" * 4 * quarter)
        for order in ((0, 0, 1, 2), (1, 1, 1, 1), (3, 3, 0, 0), (0, 1, 2, 2), (3, 2, 1, 0), (0, 1, 3, 2)):
            pieces.clear()
            assert device.get(0, 4 * quarter) == b"!" * 4 * quarter
            pieces += [(part * quarter, quarter) for part in order]
            found = device.get(0, 4 * quarter)
            for part in range(4):
                expected = b"." if part in order else bytes(1)
                assert found[part * quarter : (part + 1) * quarter] == expected * quarter, order


@pytest.mark.parametrize("done", [True, False], ids=["written_meanwhile", "being_written"])
def test_an_answer_about_holes_that_a_write_has_overtaken_is_not_believed(server: NbdServer, done: bool) -> None:
    held: list[bytes] = []

    def answer(server: NbdServer, connection: socket.socket, kind: int, cookie: int, offset: int, length: int) -> bool:
        if kind == nbd_server.BLOCK_STATUS:
            held.append(nbd_server.block_status(cookie, (length, 3)))
        elif kind == nbd_server.WRITE and not done:
            connection.sendall(held.pop())  # before the write is done
        return kind == nbd_server.BLOCK_STATUS

    server.structured, server.answer = True, answer
    with opened(server) as device:
        assert device.get(0, BLOCK) == bytes(BLOCK)
        device.until(lambda: held)
        device.put(MIB, noise(BLOCK, "new"))
        if done:
            with server._lock:
                server._open[0].sendall(held.pop())
        device.until(lambda: device.backend.statistics()["in_flight"] == 0)
        assert device.get(MIB, BLOCK) == noise(BLOCK, "new")
        assert device.get(8 * MIB, BLOCK) == bytes(BLOCK)


@pytest.mark.parametrize(
    "entries", [(), ((0, 3),), ((0xFFFFFFFF, 3), (0xFFFFFFFF, 3)), ((1, 3), (1, 0)) * 5000, ((512, 2), (1 << 31, 0))]
)
def test_nonsense_about_holes_does_no_harm(server: NbdServer, entries: tuple[tuple[int, int], ...]) -> None:
    def answer(server: NbdServer, connection: socket.socket, kind: int, cookie: int, offset: int, length: int) -> bool:
        if kind == nbd_server.BLOCK_STATUS:
            connection.sendall(nbd_server.block_status(cookie, *entries))
        return kind == nbd_server.BLOCK_STATUS

    server.structured, server.answer = True, answer
    with opened(server) as device:
        for number in range(8):
            device.put(number * MIB, noise(BLOCK, number))
            assert device.get(number * MIB, BLOCK) == noise(BLOCK, number)
            assert len(device.get(number * MIB + BLOCK, BLOCK)) == BLOCK


def test_what_was_known_of_holes_is_forgotten_with_the_connection(server: NbdServer) -> None:
    def answer(server: NbdServer, connection: socket.socket, kind: int, cookie: int, offset: int, length: int) -> bool:
        if kind == nbd_server.BLOCK_STATUS:
            connection.sendall(nbd_server.block_status(cookie, (length, 3)))
        return kind == nbd_server.BLOCK_STATUS

    server.structured, server.answer = True, answer
    with opened(server) as device:
        device.get(0, BLOCK)
        device.until(lambda: device.backend.statistics()["in_flight"] == 0)
        server.answer = fail(95)  # asked again, it refuses
        server.drop_connections()
        device.until(lambda: device.backend.statistics()["losses"])
        server.answer = lambda server, connection, kind, cookie, offset, length: (
            kind == nbd_server.BLOCK_STATUS and fail(95)(server, connection, kind, cookie, offset, length)
        )
        server.volatile[MIB : MIB + BLOCK] = b"!" * BLOCK
        assert device.get(MIB, BLOCK) == b"!" * BLOCK
        asked = server.kinds.count(nbd_server.BLOCK_STATUS)
        for number in range(5):
            device.get(number * BLOCK, BLOCK)
        assert server.kinds.count(nbd_server.BLOCK_STATUS) <= asked + 1


# -- it grows --


def test_what_is_under_way_when_an_export_has_grown_is_answered_before_its_connection_is_left(
    server: NbdServer,
) -> None:
    with opened(server, connections=3) as device:
        device.until(lambda: device.backend.statistics()["connections"] == 3)
        server.go.clear()
        writes = [device.write(n * BLOCK, noise(BLOCK, n)) for n in range(30)]
        device.until(lambda: device.backend.statistics()["in_flight"] == 30)
        server.grow(2 * SIZE)
        device.backend.renew(2 * SIZE)
        late = device.write(40 * BLOCK, noise(BLOCK, "late"))
        device.turn(0)
        server.go.set()
        assert set(device.wait(*writes, late)) == {0}
        device.until(lambda: device.backend.statistics()["connections"] == 3)
        assert server.connections == 6
        statistics = device.backend.statistics()
        assert (statistics["repeated"], statistics["losses"]) == (0, 0)
        assert not happened(device, LOST)
        device.engine.grow_volume(0, 2 * SIZE)
        device.put(2 * SIZE - BLOCK, noise(BLOCK, "end"))
        assert device.get(2 * SIZE - BLOCK, BLOCK) == noise(BLOCK, "end")
        for n in range(30):
            assert device.get(n * BLOCK, BLOCK) == noise(BLOCK, n)


def test_what_is_never_answered_on_the_old_connection_is_sent_again_on_the_new_one(server: NbdServer) -> None:
    with opened(server) as device:
        device.put(MIB, b"1" * BLOCK)
        server.answer = lambda server, connection, kind, cookie, offset, length: True
        write = device.write(0, b"2" * BLOCK)
        device.until(lambda: server.kinds.count(nbd_server.WRITE) == 2)
        server.answer = None
        server.grow(2 * SIZE)
        device.backend.renew(2 * SIZE)
        assert device.wait(write) == [0]
        assert device.backend.statistics()["repeated"] == 1
        assert device.wait(device.flush()) == [-errno.ECONNRESET], "it may cover nothing of the old connection's"
        device.put(MIB, b"1" * BLOCK)
        device.sync()


def test_a_connection_to_an_export_that_is_smaller_again_is_not_used(server: NbdServer) -> None:
    with opened(server) as device:
        device.backend.renew(2 * SIZE)
        write = device.write(0, b"3" * BLOCK)
        device.until(lambda: happened(device, REFUSED))
        assert "is smaller than it was" in device.backend.message
        assert write not in device.results
        server.grow(2 * SIZE)
        assert device.wait(write) == [0]


def test_what_an_export_is_now_can_be_asked_beside_its_connections(server: NbdServer) -> None:
    with opened(server) as device:
        server.grow(2 * SIZE)
        link = device.engine.nbd_link(server.uri)
        assert link.facts.size_bytes == 2 * SIZE
        link.close()
        server.stop()
        with pytest.raises(EngineError) as caught:
            device.engine.nbd_link(server.uri)
        assert "\n" not in str(caught.value)


# -- it never stops --


def for_ever(kind: int, piece: Callable[[int, int], bytes], rounds: list[int]) -> Answer:
    """This, of cookie and length, a thousand times a round, in answer to requests of a kind."""

    def answer(server: NbdServer, connection: socket.socket, asked: int, cookie: int, offset: int, length: int) -> bool:
        while asked == kind:
            connection.sendall(piece(cookie, length) * 1000)
            rounds.append(1)
        return False

    return answer


def test_other_volumes_go_on_beside_a_server_that_floods(server: NbdServer, tmp_path: Path) -> None:
    rounds: list[int] = []
    error = struct.pack(">IH", errno.EIO, 0)
    server.structured = True
    server.answer = for_ever(
        nbd_server.READ, lambda cookie, _: nbd_server.chunk(nbd_server.CHUNK_ERROR, cookie, error, last=False), rounds
    )
    (tmp_path / "other.img").write_bytes(noise(MIB, "other"))
    descriptor = os.open(tmp_path / "other.img", os.O_RDWR | os.O_CLOEXEC)
    try:
        with opened(server) as device:
            other = device.engine.file_backend(Facts(descriptor, MIB, False, False, 1, 1))
            assert device.engine.add_volume(**volume(other, read_only=False)) == 1
            flooded = device.read(0, BLOCK)
            device.until(lambda: len(rounds) > 10)
            for number in range(100):
                before = len(rounds)
                assert device.wait(device.read_other(1, number * BLOCK)) == [0]
                if not number % 10:
                    device.until(lambda before=before: len(rounds) > before)
            assert flooded not in device.results
    finally:
        os.close(descriptor)


def test_extents_without_end_are_garbage(server: NbdServer) -> None:
    rounds: list[int] = []
    piece = struct.pack(">III", nbd_server.CONTEXT, 4096, 0)
    server.structured = True
    server.answer = for_ever(
        nbd_server.BLOCK_STATUS,
        lambda cookie, _: nbd_server.chunk(nbd_server.CHUNK_BLOCK_STATUS, cookie, piece, last=False),
        rounds,
    )
    with opened(server) as device:
        device.get(0, BLOCK)
        device.until(lambda: device.backend.statistics()["losses"] >= 1)


def test_one_turn_hands_a_server_only_so_much(server: NbdServer) -> None:
    with opened(server) as device:
        for number in range(8):
            device.write(number * MIB, noise(MIB, number))
        device.turn(0)
        assert device.backend.statistics()["commands"][1] < 6
        assert set(device.wait()) == {0}
        for number in range(8):
            assert device.get(number * MIB, MIB) == noise(MIB, number)


def test_nobody_listens_for_ever_to_a_server_that_only_negotiates(server: NbdServer) -> None:
    with opened(server) as device:
        server.talks = True
        server.drop_connections()
        device.until(server.talking.is_set)
    assert server.interrupted.wait(20)


# -- the end --


def test_all_ends_when_a_server_that_is_away_is_given_up(server: NbdServer) -> None:
    with opened(server) as device:
        server.stop()
        groups = [device.write(n * BLOCK, bytes(BLOCK)) for n in range(40)]
        device.until(lambda: happened(device, LOST))
        groups.append(device.flush())
        device.backend.give_up()
        assert set(device.wait(*groups)) == {-errno.ESHUTDOWN}
        assert device.wait(device.read(0, BLOCK)) == [-errno.ESHUTDOWN]


def test_all_ends_when_a_server_that_is_silent_is_given_up(server: NbdServer) -> None:
    with opened(server) as device:
        server.go.clear()
        groups = [device.write(n * BLOCK, bytes(BLOCK)) for n in range(40)]
        device.until(lambda: device.backend.statistics()["in_flight"])
        device.backend.give_up()
        assert set(device.wait(*groups)) == {-errno.ESHUTDOWN}


def test_its_sockets_are_not_inherited(server: NbdServer) -> None:
    with opened(server, connections=2) as device:
        device.until(lambda: device.backend.statistics()["connections"] == 2)
        sockets = 0
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{name}").startswith(("socket:", "anon_inode:[eventfd]")):
                    fd = int(name)
                    peer = socket.socket(fileno=os.dup(fd)) if os.readlink(f"/proc/self/fd/{name}")[0] == "s" else None
                    if peer is not None:
                        with peer:
                            if peer.getpeername() != str(server.path):
                                continue
                    sockets += peer is not None
                    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert sockets >= 2


def test_an_engine_ends_while_the_server_is_silent(server: NbdServer) -> None:
    with opened(server) as device:
        server.go.clear()
        for n in range(40):
            device.write(n * BLOCK, bytes(BLOCK))
        device.until(lambda: device.backend.statistics()["in_flight"])


def test_an_engine_ends_while_it_connects(server: NbdServer) -> None:
    with opened(server) as device:
        server.stop()
        server.greeting = b"NBDMAGIC"
        server.start()
        device.until(lambda: happened(device, LOST) and server.connections >= 2)
