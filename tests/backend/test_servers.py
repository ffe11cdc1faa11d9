"""NBD servers that die, refuse and lie: nothing is lost, nothing crashes, nobody hears of an error that passes."""

import errno
import os
import random
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.backend import liar
from tests.backend.cases import ALL_WRAPPERS, DISK_BYTES, MIB, nbd
from tests.backend.device import BLOCK, Device
from tests.backend.liar import Command, Connection, Liar, Lies
from tests.backend.servers import Server, nbdkit, nbdkit_tcp
from vhostcache.engine import Engine, EngineBackend
from vhostcache.errors import EngineError


def noise(length: int, seed: object) -> bytes:
    return random.Random(repr(seed)).randbytes(length)


# -- a server that goes away --


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "served.img"
    path.touch()
    os.truncate(path, DISK_BYTES)
    return path


def test_a_server_killed_in_mid_write_and_started_again_has_everything(tmp_path: Path, image: Path) -> None:
    blocks = [noise(32 * BLOCK, number) for number in range(100)]
    server = nbdkit(tmp_path, "--filter=delay", "file", image, "wdelay=20ms")
    with server, Device(nbd(server.uri)) as device:
        writes = [device.write(number * 32 * BLOCK, block) for number, block in enumerate(blocks)]
        device.until(lambda: len(device.results) >= 10)
        server.kill()
        for _ in range(3):
            device.turn()
        assert len(device.results) < len(writes)
        server.start()
        assert set(device.wait(*writes)) == {0}
        assert device.wait(device.flush())[0] < 0, "what the first server had acknowledged may be lost"
        writes = [device.write(number * 32 * BLOCK, block) for number, block in enumerate(blocks)]
        assert set(device.wait(*writes, device.flush())) == {0}
        assert [device.get(number * 32 * BLOCK, len(block)) for number, block in enumerate(blocks)] == blocks
    assert image.read_bytes()[: 3200 * BLOCK] == b"".join(blocks)


def test_reads_and_zeroing_wait_for_the_server_too(tmp_path: Path, image: Path) -> None:
    image.write_bytes(noise(DISK_BYTES, "image"))
    server = nbdkit(tmp_path, "file", image)
    with server, Device(nbd(server.uri)) as device:
        server.kill()
        reads = [device.read(number * MIB, 100_000 // 512 * 512) for number in range(8)]
        zero = device.zero(9 * MIB, MIB)
        for _ in range(3):
            device.turn()
        server.start()
        assert set(device.wait(*reads, zero)) == {0}
        for number, read in enumerate(reads):
            assert device.data(read) == noise(DISK_BYTES, "image")[number * MIB :][: 100_000 // 512 * 512]
    assert image.read_bytes()[9 * MIB : 10 * MIB] == bytes(MIB)


def test_a_flush_that_the_server_took_with_it_is_said_to_have_failed(tmp_path: Path, image: Path) -> None:
    """What was written before may never become durable: the core has to write it once more."""
    server = nbdkit(tmp_path, "file", image)
    with server, Device(nbd(server.uri)) as device:
        device.put(0, noise(MIB, "unflushed"))
        server.kill()
        lost = device.flush()
        for _ in range(3):
            device.turn()
        server.start()
        assert device.wait(lost)[0] < 0
        device.put(0, noise(MIB, "unflushed"))
        device.sync()
    assert image.read_bytes()[:MIB] == noise(MIB, "unflushed")


def test_a_write_lost_with_an_earlier_server_makes_the_next_flush_fail(tmp_path: Path, image: Path) -> None:
    server = nbdkit(tmp_path, "file", image)
    with server, Device(nbd(server.uri)) as device:
        device.put(0, bytes(BLOCK))
        server.kill()
        server.start()
        device.put(MIB, bytes(BLOCK))  # on the new connection
        assert device.wait(device.flush())[0] < 0, "the first write may be lost"
        device.put(0, bytes(BLOCK))
        device.sync()


def test_wrappers_on_several_connections_go_through_a_servers_deaths_as_well(tmp_path: Path, image: Path) -> None:
    server = nbdkit(tmp_path, "--filter=error", "file", image, "error-rate=10%", "error-extents-rate=0")

    def make(engine: Engine) -> EngineBackend:
        backend = nbd(server.uri, connections=3)(engine)
        for kind, parameters in ALL_WRAPPERS:
            backend = engine.wrap_backend(backend, kind, parameters.replace("TRACE", str(tmp_path / "trace")))
        return backend

    with server, Device(make) as device:
        for round_ in range(6):
            blocks = [noise(BLOCK, (round_, number)) for number in range(60)]
            writes = [device.write(number * 3 * BLOCK, block) for number, block in enumerate(blocks)]
            device.until(lambda writes=writes, round_=round_: sum(w in device.results for w in writes) >= 8 * round_)
            server.kill()
            server.start()
            assert set(device.wait(*writes)) == {0}
            reads = [device.read(number * 3 * BLOCK, BLOCK) for number in range(len(blocks))]
            assert set(device.wait(*reads)) == {0}
            assert [device.data(read) for read in reads] == blocks
            device.wait(device.flush())  # it may fail, because the server has died


def test_closing_does_not_wait_for_a_server_that_has_gone(tmp_path: Path, image: Path) -> None:
    server = nbdkit(tmp_path, "file", image)
    with server:
        device = Device(nbd(server.uri))
        server.kill()
        for number in range(20):
            device.write(number * BLOCK, bytes(BLOCK))
        device.turn()
        device.close()


def test_a_smaller_export_after_a_restart_is_not_used(tmp_path: Path, image: Path) -> None:
    server = nbdkit(tmp_path, "file", image)
    with server, Device(nbd(server.uri)) as device:
        device.put(0, bytes(BLOCK))
        server.kill()
        os.truncate(image, MIB)
        write = device.write(2 * MIB, b"\x11" * BLOCK)
        server.start()
        device.until(lambda: any(kind == BACKEND and what == REFUSED for kind, what in device.events))
        assert write not in device.results
        server.kill()
        os.truncate(image, DISK_BYTES)
        server.start()
        assert device.wait(write) == [0]


BACKEND, CONNECTED, LOST, REFUSED = 10, 1, 2, 3


# -- a server that cannot be used --


@pytest.mark.parametrize(
    ("lies", "message"),
    [
        (Lies(greeting=b"HTTP/1.1 400 Bad Request\r\n\r\n"), ""),
        (Lies(greeting=b""), ""),
        (Lies(greeting=struct.pack(">QQH", liar.NBD_MAGIC, 12345, 3)), ""),
        (Lies(size_bytes=0), "the export of 0 bytes"),
        (Lies(size_bytes=1000), "the export of 1000 bytes"),
        (Lies(size_bytes=2**64 - 512), ""),
        (Lies(size_bytes=2**63), ""),
        (Lies(size_bytes=5 * 512, block_sizes=(4096, 4096, 1 << 20)), "the export of 2560 bytes"),
        (Lies(flags=liar.HAS_FLAGS | liar.READ_ONLY), "read-only"),
    ],
    ids=lambda value: None,
)
def test_an_export_that_makes_no_sense_is_refused_with_one_line(tmp_path: Path, lies: Lies, message: str) -> None:
    with Liar(tmp_path / "liar.sock", DISK_BYTES, lies) as server, Engine(poll_max_us=0) as engine:
        with pytest.raises(EngineError) as caught:
            nbd(server.uri)(engine)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_nobody_there_is_said_in_one_line(tmp_path: Path) -> None:
    with Engine(poll_max_us=0) as engine, pytest.raises(EngineError) as caught:
        nbd(f"nbd+unix:///?socket={tmp_path}/none.sock")(engine)
    assert "\n" not in str(caught.value)


# -- a server that lies once, and is honest on the next connection --


def wrong_magic(connection: Connection, command: Command) -> None:
    connection.send(struct.pack(">IIQ", 0x12345678, 0, command.cookie))


def unknown_cookie(connection: Connection, command: Command) -> None:
    connection.simple(command.cookie ^ 0xDEADBEEF)


def truncated_reply(connection: Connection, command: Command) -> None:
    connection.send(struct.pack(">II", liar.SIMPLE_REPLY_MAGIC, 0))
    raise liar.Closed


def half_of_the_data(connection: Connection, command: Command) -> None:
    if command.kind == liar.READ:
        connection.simple(command.cookie, 0, bytes(command.length // 2))
    raise liar.Closed


def hangs_up(connection: Connection, command: Command) -> None:
    raise liar.Closed


def noise_instead(connection: Connection, command: Command) -> None:
    connection.send(noise(100_000, "liar"))


def huge_chunk(connection: Connection, command: Command) -> None:
    connection.chunk(command.cookie, 1, bytes(64), length=0xFFFFFFFF)


def chunk_elsewhere(connection: Connection, command: Command) -> None:
    connection.chunk(command.cookie, 1, struct.pack(">Q", command.offset + (1 << 40)) + bytes(command.length))


def chunk_before(connection: Connection, command: Command) -> None:
    connection.chunk(command.cookie, 1, struct.pack(">Q", (command.offset - BLOCK) % 2**64) + bytes(command.length))


def chunk_too_long(connection: Connection, command: Command) -> None:
    connection.chunk(command.cookie, 1, struct.pack(">Q", command.offset) + bytes(command.length + BLOCK))


def hole_too_long(connection: Connection, command: Command) -> None:
    connection.chunk(command.cookie, 2, struct.pack(">QI", command.offset, 0xFFFFFFFF))


def the_same_chunk_for_ever(connection: Connection, command: Command) -> None:
    piece = struct.pack(">Q", command.offset) + bytes(BLOCK)
    while True:
        connection.chunk(command.cookie, 1, piece, done=False)


def nothing_for_ever(connection: Connection, command: Command) -> None:
    while True:
        connection.chunk(command.cookie, 1, struct.pack(">Q", command.offset), done=False)


def half_of_the_chunks(connection: Connection, command: Command) -> None:
    connection.chunk(command.cookie, 1, struct.pack(">Q", command.offset) + bytes(command.length // 2))


def unknown_chunk(connection: Connection, command: Command) -> None:
    connection.chunk(command.cookie, 0x4242, bytes(100))


def answered_twice(connection: Connection, command: Command) -> None:
    connection.answer(command)
    connection.answer(command)


SIMPLE_LIES: list[Callable[[Connection, Command], None]] = [
    *(wrong_magic, unknown_cookie, truncated_reply, half_of_the_data, hangs_up, noise_instead, answered_twice),
]
CHUNK_LIES: list[Callable[[Connection, Command], None]] = [
    *(huge_chunk, chunk_elsewhere, chunk_before, chunk_too_long, hole_too_long, unknown_chunk),
    *(the_same_chunk_for_ever, nothing_for_ever, half_of_the_chunks),
]


@pytest.mark.parametrize("lie", [*SIMPLE_LIES, *CHUNK_LIES], ids=lambda lie: lie.__name__)
@pytest.mark.parametrize("position", [0, 3])
def test_who_lies_is_hung_up_on_and_asked_again(
    tmp_path: Path, lie: Callable[[Connection, Command], None], position: int
) -> None:
    lies = Lies(structured=lie in CHUNK_LIES)
    with Liar(tmp_path / "liar.sock", DISK_BYTES, lies) as server:
        server.content[:MIB] = expected = noise(MIB, "content")
        with Device(nbd(server.uri)) as device:
            lies.commands[server.commands + position] = lie
            reads = [device.read(number * 16 * BLOCK, 16 * BLOCK) for number in range(8)]
            assert set(device.wait(*reads)) == {0}
            assert b"".join(device.data(read) for read in reads) == expected[: 128 * BLOCK]
            lies.commands[server.commands + position] = lie
            writes = [device.write(4 * MIB + number * BLOCK, noise(BLOCK, number)) for number in range(8)]
            assert set(device.wait(*writes)) == {0}
            assert device.get(4 * MIB, 8 * BLOCK) == b"".join(noise(BLOCK, number) for number in range(8))


@pytest.mark.parametrize(
    ("code", "expected"),
    [(5, errno.EIO), (28, errno.ENOSPC), (1, errno.EPERM), (22, errno.EINVAL), (12345, None), (0xFFFFFFFF, None)],
)
def test_an_error_of_the_server_is_an_errno(tmp_path: Path, code: int, expected: int | None) -> None:
    def refuse(connection: Connection, command: Command) -> None:
        connection.simple(command.cookie, code)

    lies = Lies()
    with Liar(tmp_path / "liar.sock", DISK_BYTES, lies) as server, Device(nbd(server.uri)) as device:
        lies.commands[server.commands] = refuse
        (result,) = device.wait(device.write(0, bytes(BLOCK)))
        assert -4096 < result < 0
        assert expected is None or result == -expected
        device.put(0, noise(BLOCK, "after"))
        assert device.get(0, BLOCK) == noise(BLOCK, "after")
        assert server.connections <= 2, "an error is an answer: no reason to hang up"


def test_a_server_that_never_answers_does_not_keep_an_engine_from_closing(tmp_path: Path) -> None:
    lies = Lies()
    with Liar(tmp_path / "liar.sock", DISK_BYTES, lies) as server:
        device = Device(nbd(server.uri))
        for number in range(100):
            lies.commands[server.commands + number] = lambda connection, command: None
        device.read(0, MIB)
        device.write(MIB, bytes(MIB))
        device.flush()
        device.turn()
        device.close()


def test_a_server_that_always_lies_is_asked_with_growing_pauses(tmp_path: Path) -> None:
    lies = Lies()
    with Liar(tmp_path / "liar.sock", DISK_BYTES, lies) as server, Device(nbd(server.uri)) as device:
        for number in range(100_000):
            lies.commands[server.commands + number] = wrong_magic
        device.read(0, BLOCK)
        begun = time.monotonic()
        while time.monotonic() - begun < 1:
            device.turn()
        assert server.connections < 100


# -- TLS --


def certify(folder: Path, name: str, host: str = "localhost", address: str = "127.0.0.1") -> Path:
    """A folder with an authority of its own, and a server's certificate."""
    pki = folder / name
    pki.mkdir()
    run = lambda *words: subprocess.run(["openssl", *words], cwd=pki, check=True, capture_output=True, timeout=60)  # noqa: E731
    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    run("req", "-x509", *new, "-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-subj", f"/CN={name}")
    run("req", *new[:-2], "-keyout", "server-key.pem", "-out", "server.csr", "-subj", f"/CN={host}")
    (pki / "names").write_text(f"subjectAltName=DNS:{host},IP:{address}\n")
    sign = ("-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial", "-days", "2", "-extfile", "names")
    run("x509", "-req", "-in", "server.csr", "-out", "server-cert.pem", *sign)
    return pki


@pytest.fixture
def secured(tmp_path: Path, image: Path) -> Iterator[Server]:
    pki = certify(tmp_path, "ours")
    server = nbdkit_tcp(tmp_path, "--tls=require", f"--tls-certificates={pki}", "file", image)
    with server:
        yield server


def tls_uri(server: Server) -> str:
    return f"nbds://{server.address}/"


def test_a_server_with_the_right_certificate_is_used(tmp_path: Path, secured: Server) -> None:
    with Device(nbd(tls_uri(secured), tls_certificates=str(tmp_path / "ours"))) as device:
        device.put(BLOCK, noise(MIB, "secret"))
        device.sync()
        assert device.get(BLOCK, MIB) == noise(MIB, "secret")


def test_a_server_with_a_wrong_certificate_is_refused_with_one_line(tmp_path: Path, secured: Server) -> None:
    theirs = certify(tmp_path, "theirs")
    with Engine(poll_max_us=0) as engine, pytest.raises(EngineError) as caught:
        nbd(tls_uri(secured), tls_certificates=str(theirs))(engine)
    assert "certificate" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_whose_certificate_has_become_wrong_is_not_talked_to(tmp_path: Path, image: Path) -> None:
    ours, theirs = certify(tmp_path, "ours"), certify(tmp_path, "theirs")
    used = tmp_path / "used"
    used.symlink_to(ours)
    server = nbdkit_tcp(tmp_path, "--tls=require", f"--tls-certificates={used}", "file", image)
    with server, Device(nbd(tls_uri(server), tls_certificates=str(ours))) as device:
        device.put(0, noise(BLOCK, "before"))
        server.kill()
        used.unlink()
        used.symlink_to(theirs)
        server.start()
        write = device.write(0, noise(BLOCK, "after"))
        device.until(lambda: "certificate" in device.backend.message)
        for _ in range(5):
            device.turn()
        assert write not in device.results
        server.kill()
        used.unlink()
        used.symlink_to(ours)
        server.start()
        assert device.wait(write) == [0]


def test_a_certificate_for_another_host_is_refused_with_one_line(tmp_path: Path, image: Path) -> None:
    pki = certify(tmp_path, "ours", "elsewhere.example", "192.0.2.1")
    server = nbdkit_tcp(tmp_path, "--tls=require", f"--tls-certificates={pki}", "file", image)
    with server, Engine(poll_max_us=0) as engine:
        with pytest.raises(EngineError) as caught:
            nbd(tls_uri(server), tls_certificates=str(pki))(engine)
        assert "\n" not in str(caught.value)
        assert nbd(tls_uri(server), tls_certificates=str(pki), tls_verify=False)(engine).facts.size_bytes == DISK_BYTES


def test_a_server_without_tls_is_refused_where_tls_is_asked_for(tmp_path: Path, image: Path) -> None:
    pki = certify(tmp_path, "ours")
    server = nbdkit_tcp(tmp_path, "file", image)
    with server, Engine(poll_max_us=0) as engine, pytest.raises(EngineError) as caught:
        nbd(tls_uri(server), tls_certificates=str(pki))(engine)
    assert "\n" not in str(caught.value)


def test_pre_shared_keys_open_a_connection_and_wrong_ones_do_not(tmp_path: Path, image: Path) -> None:
    right, wrong = tmp_path / "right.psk", tmp_path / "wrong.psk"
    right.write_text("alice:" + "5a" * 32 + "\n")
    wrong.write_text("alice:" + "a5" * 32 + "\n")
    server = nbdkit(tmp_path, "--tls=require", f"--tls-psk={right}", "file", image)
    uri = f"nbds+unix:///?socket={server.socket}"
    with server:
        with Device(nbd(uri, tls_psk_file=str(right), tls_username="alice")) as device:
            device.put(0, noise(BLOCK, "psk"))
            assert device.get(0, BLOCK) == noise(BLOCK, "psk")
        with Engine(poll_max_us=0) as engine, pytest.raises(EngineError) as caught:
            nbd(uri, tls_psk_file=str(wrong), tls_username="alice")(engine)
        assert "\n" not in str(caught.value)
