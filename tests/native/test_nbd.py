"""A daemon whose disk is an NBD export: with a cache file and without, whose server dies and returns."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.backend.servers import Server, nbdkit, qemu_img, qemu_storage_daemon
from tests.frontend import OK, T_FLUSH, Frontend
from tests.native.conftest import MIB, NativeDaemon, noise

SIZE = 32 * MIB


def program(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("vhostcache"), *words], capture_output=True, text=True, timeout=60, check=False
    )


def served_file(folder: Path) -> Server:
    (folder / "served.img").touch()
    os.truncate(folder / "served.img", SIZE)
    return nbdkit(folder, "file", folder / "served.img")


def served_by_qemu(folder: Path) -> Server:
    qemu_img("create", "-f", "raw", folder / "served.img", str(SIZE))
    nodes = ["--blockdev", f"driver=file,node-name=disk,filename={folder}/served.img"]
    return qemu_storage_daemon(folder, *nodes)


@pytest.fixture(params=[served_file, served_by_qemu], ids=["nbdkit", "qsd"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    with request.param(tmp_path) as server:
        yield server


@pytest.fixture(params=[True, False], ids=["cache", "no_cache"])
def make(request: pytest.FixtureRequest, server: Server, tmp_path: Path) -> Iterator[Callable[[], NativeDaemon]]:
    made: list[NativeDaemon] = []

    def make() -> NativeDaemon:
        cache = (f"--cache={tmp_path}/cache", "--cache-size=64MiB") if request.param else ()
        daemon = NativeDaemon.export(server.uri, tmp_path / "disk.sock", "--ram", "32MiB", *cache)  # type: ignore[arg-type]
        made.append(daemon)
        return daemon.start()

    make.cached = request.param  # type: ignore[attr-defined]
    yield make
    for daemon in made:
        daemon.reap()


def image(tmp_path: Path) -> bytes:
    return (tmp_path / "served.img").read_bytes()


def test_a_disk_on_an_export_does_all_that_a_disk_does(make: Callable[[], NativeDaemon], tmp_path: Path) -> None:
    daemon = make()
    with Frontend(tmp_path / "disk.sock") as f:
        assert f.capacity == SIZE
        for at in range(5):
            f.write(at * MIB, noise(5 * MIB, 1)[at * MIB : (at + 1) * MIB])
        f.write(SIZE - 4096, noise(4096, 2))
        f.flush()
        f.write_zeroes(MIB, MIB)
        f.discard(2 * MIB, MIB)
        f.write(6 * MIB + 512, noise(1024, 3))
        f.flush()
        expected = bytearray(noise(5 * MIB, 1))
        expected[MIB : 3 * MIB] = bytes(2 * MIB)
        assert f.read(0, 2 * MIB) + f.read(2 * MIB, 2 * MIB) == expected[: 4 * MIB]
        assert f.read(6 * MIB, 4096) == bytes(512) + noise(1024, 3) + bytes(4096 - 1536)
    daemon.stop()
    make()
    with Frontend(tmp_path / "disk.sock") as f:
        assert f.read(0, 2 * MIB) + f.read(2 * MIB, 2 * MIB) == expected[: 4 * MIB]
        assert f.read(SIZE - 4096, 4096) == noise(4096, 2)


def test_a_guest_works_on_while_the_server_is_away_and_all_is_there_when_it_is_back(
    make: Callable[[], NativeDaemon], server: Server, tmp_path: Path
) -> None:
    daemon = make()
    with Frontend(tmp_path / "disk.sock") as f:
        f.write(0, noise(MIB, 1))
        f.flush()
        f.write(MIB, noise(MIB, 2))
        server.kill()
        f.write(2 * MIB, noise(MIB, 3))
        flush = f.submit([f.header(T_FLUSH), f.room(1)])
        if make.cached:  # type: ignore[attr-defined]
            assert f.finish(flush).status == OK
        daemon.wait_for("backend-lost")
        assert f.read(MIB, 2 * MIB) == noise(MIB, 2) + noise(MIB, 3)
        server.start()
        daemon.wait_for("backend-recovered")
        if not make.cached:  # type: ignore[attr-defined]
            assert f.finish(flush).status == OK
        assert f.read(0, MIB) == noise(MIB, 1)
    daemon.stop()
    assert program("drain", tmp_path / "cache", "--backend", server.uri).returncode == 0 or not make.cached  # type: ignore[attr-defined]
    assert image(tmp_path)[: 3 * MIB] == noise(MIB, 1) + noise(MIB, 2) + noise(MIB, 3)


def test_a_server_killed_again_and_again_under_writes_loses_nothing(
    make: Callable[[], NativeDaemon], server: Server, tmp_path: Path
) -> None:
    daemon = make()
    model = bytearray(SIZE)
    with Frontend(tmp_path / "disk.sock") as f:
        for number in range(12):
            for at in range(number % 5, 64, 5):
                data = noise(65536, (number, at))
                model[at * 65536 : (at + 1) * 65536] = data
                f.write(at * 65536, data)
            if number % 3 == 1:
                server.kill()
                server.start()
            else:
                f.flush()
        f.flush()
        assert f.read(0, 2 * MIB) + f.read(2 * MIB, 2 * MIB) == model[: 4 * MIB]
    daemon.stop()
    assert program("drain", tmp_path / "cache", "--backend", server.uri).returncode == 0 or not make.cached  # type: ignore[attr-defined]
    assert image(tmp_path)[: 4 * MIB] == model[: 4 * MIB]


def test_a_queue_stops_at_once_although_its_reads_wait_for_a_server_that_is_away(
    make: Callable[[], NativeDaemon], server: Server, tmp_path: Path
) -> None:
    daemon = make()
    with Frontend(tmp_path / "disk.sock") as f:
        f.write(0, noise(MIB, 1))
        f.flush()
        server.kill()
        reads = [f.start_read(at * MIB, size) for at, size in ((8, 4096), (9, 512 * 1024), (20, MIB), (30, 512))]
        daemon.wait_for("backend-lost")
        base = f.stop(0)
        server.start()
        f.start(0, base)
        for read in reads:
            assert f.finish(read).status == OK
        assert f.read(0, MIB) == noise(MIB, 1)


def test_a_daemon_ends_although_its_server_is_away(
    make: Callable[[], NativeDaemon], server: Server, tmp_path: Path
) -> None:
    daemon = make()
    with Frontend(tmp_path / "disk.sock") as f:
        f.write(0, noise(MIB, 1))
        f.flush()
        server.kill()
        f.write(MIB, noise(MIB, 2))
        if make.cached:  # type: ignore[attr-defined]
            f.flush()
        read = f.start_read(9 * MIB, 65536)
        daemon.wait_for("backend-lost")
        os.kill(daemon.pid, signal.SIGTERM)
        if make.cached:  # type: ignore[attr-defined]
            daemon.wait()  # without the server: what is dirty stays in the log, and what was not answered is dropped
            assert not f.queues[0].is_done(read.head)
            server.start()
        else:
            daemon.wait_for("draining")
            assert daemon.is_alive()
            server.start()
            daemon.wait()
    make()
    with Frontend(tmp_path / "disk.sock") as f:
        assert f.read(0, 2 * MIB) == noise(MIB, 1) + noise(MIB, 2)


def test_sequential_reads_are_few_on_the_server_and_read_ahead(
    make: Callable[[], NativeDaemon], tmp_path: Path
) -> None:
    image = noise(SIZE, "image")
    (tmp_path / "served.img").write_bytes(image)
    daemon = make()
    with Frontend(tmp_path / "disk.sock") as f:
        assert b"".join(f.read(at, 4096) for at in range(0, 4 * MIB, 4096)) == image[: 4 * MIB]
        assert b"".join(f.read(at, MIB) for at in range(8 * MIB, 16 * MIB, MIB)) == image[8 * MIB : 16 * MIB]
        f.write(16 * MIB, noise(MIB, "new"))  # perhaps into what was read ahead
        assert f.read(16 * MIB, MIB) == noise(MIB, "new")
    (statistics,) = daemon.stop().values()
    assert statistics["readahead_blocks"] >= 2 * MIB // 4096
    assert statistics["backend_operations"]["read"] <= 200
    assert statistics["errors"] == 0


def test_the_read_cache_of_an_export_is_warm_after_a_restart(server: Server, tmp_path: Path) -> None:
    image = noise(SIZE, "image")
    (tmp_path / "served.img").write_bytes(image)
    cache = (f"--cache={tmp_path}/cache", "--cache-size=64MiB", "--read-cache=32MiB")
    found = []
    for _ in range(2):
        daemon = NativeDaemon.export(server.uri, tmp_path / "disk.sock", "--ram", "32MiB", *cache)  # type: ignore[arg-type]
        daemon.start()
        with Frontend(tmp_path / "disk.sock") as f:
            for at in sorted(range(0, 4 * MIB, 65536), key=lambda at: at * 7919 % 10007):
                assert f.read(at, 65536) == image[at : at + 65536]
        (statistics,) = daemon.stop().values()
        found.append(statistics["backend_operations"]["read"])
    assert found == [64, 0]
