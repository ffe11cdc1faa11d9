"""The whole daemon, with a log, on backends that fail: the guest sees nothing of it, and everything arrives."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.backend.cases import DISK_BYTES
from tests.backend.servers import nbdkit
from tests.frontend import Frontend
from tests.guest.daemon import Daemon

BLOCK = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "served.img"
    path.touch()
    os.truncate(path, DISK_BYTES)
    return path


def daemon(folder: Path, backend: dict[str, Any], **volume: Any) -> Daemon:
    described = {
        "name": "disk",
        "socket": str(folder / "disk.sock"),
        "backend": backend,
        "ram": "16MiB",
        "object_size": "1MiB",
        "destage_after": "50ms",
        "cache": {"path": str(folder / "disk.cache"), "size": "64MiB", "drain_on_exit": True},
        **volume,
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"volumes": [described]}))
    return Daemon.serve(config)


def work(socket: Path, model: bytearray, seed: int, meanwhile: Callable[[int], None] = lambda number: None) -> None:
    """Writes, reads, zeroes and flushes at random; the frontend insists on success."""
    rng = random.Random(seed)
    with Frontend(socket) as frontend:
        for number in range(150):
            meanwhile(number)
            length = 512 * rng.randint(1, 128)
            offset = rng.randrange(0, DISK_BYTES - length, 512)
            kind = rng.choices(["write", "read", "discard", "flush"], [6, 3, 1, 1])[0]
            if kind == "write":
                model[offset : offset + length] = data = rng.randbytes(length)
                frontend.write(offset, data)
            elif kind == "read":
                assert frontend.read(offset, length) == model[offset : offset + length]
            elif kind == "discard":
                start, end = offset // BLOCK * BLOCK, (offset + length) // BLOCK * BLOCK
                if start < end:
                    model[start:end] = bytes(end - start)
                    frontend.discard(start, end - start)
            else:
                frontend.flush()
        frontend.flush()


RETRY = {"retry": {"first": "1ms", "max": "10ms", "attempts": 100}}


def test_a_server_that_fails_at_random_goes_unnoticed_by_the_guest(tmp_path: Path, image: Path) -> None:
    server = nbdkit(tmp_path, "--filter=error", "file", image, "error-rate=30%", "error-extents-rate=0")
    model = bytearray(DISK_BYTES)
    with server:
        backend = {"type": "nbd", "uri": server.uri, "wrap": [RETRY]}
        with daemon(tmp_path, backend):
            work(tmp_path / "disk.sock", model, 1)
    assert image.read_bytes() == model


def test_a_server_that_dies_again_and_again_goes_unnoticed_by_the_guest(tmp_path: Path, image: Path) -> None:
    server = nbdkit(tmp_path, "--filter=delay", "file", image, "wdelay=2ms")
    model = bytearray(DISK_BYTES)

    def restart(number: int) -> None:
        if number % 10 == 5:
            server.kill()
            server.start()

    with server, daemon(tmp_path, {"type": "nbd", "uri": server.uri}):
        work(tmp_path / "disk.sock", model, 2, restart)
    assert image.read_bytes() == model


def test_while_the_server_is_away_the_guest_writes_and_flushes_as_usual(tmp_path: Path, image: Path) -> None:
    server = nbdkit(tmp_path, "file", image)
    model = bytearray(DISK_BYTES)
    with server, daemon(tmp_path, {"type": "nbd", "uri": server.uri}) as served, Frontend(tmp_path / "disk.sock") as f:
        model[:BLOCK] = b"\x01" * BLOCK
        f.write(0, b"\x01" * BLOCK)
        f.flush()
        server.kill()
        for number in range(1, 200):
            at = number * 17 % 3000 * BLOCK
            model[at : at + BLOCK] = data = random.Random(number).randbytes(BLOCK)
            f.write(at, data)
            if number % 10 == 0:
                f.flush()
                assert f.read(at, BLOCK) == data
        served.wait_for("backend-lost")
        server.start()
        served.wait_for("backend-recovered")
    assert image.read_bytes() == model


def test_a_file_behind_all_wrappers_holds_what_the_guest_has_written(tmp_path: Path, image: Path) -> None:
    model = bytearray(DISK_BYTES)
    wrap = [
        {"fault": {"kind": ["read", "write", "zero"], "probability": 0.1}},
        {"fault": {"kind": "write", "probability": 0.1, "torn": True, "errno": "ETIMEDOUT"}},
        {"delay": {"write": "500us", "jitter": "200us"}},
        {"trace": {"file": str(tmp_path / "the trace")}},
        RETRY,
    ]
    with daemon(tmp_path, {"type": "file", "path": str(image), "wrap": wrap}):
        work(tmp_path / "disk.sock", model, 3)
    assert image.read_bytes() == model
    assert "EIO" in (tmp_path / "the trace").read_text()


def end_by_two_signals(served: Daemon) -> int:
    assert served._process is not None
    process = served._process
    process.send_signal(signal.SIGTERM)
    served.wait_for("draining")
    process.send_signal(signal.SIGTERM)
    served.wait_for("backend-given-up")
    served._process = None
    return process.wait(60)


def test_a_second_signal_leaves_in_the_log_what_an_image_refuses(tmp_path: Path, image: Path) -> None:
    refusing = tmp_path / "refusing"
    refusing.touch()
    fault = {"fault": {"kind": "write", "errno": "ENOSPC", "while_exists": str(refusing)}}
    served = daemon(tmp_path, {"type": "file", "path": str(image), "wrap": [fault]})
    model = bytearray(DISK_BYTES)
    served.start()
    work(tmp_path / "disk.sock", model, 4)
    assert end_by_two_signals(served) == 1
    assert served.events("closed")[0]["dirty_bytes"] > 0
    refusing.unlink()
    with served:
        pass
    assert image.read_bytes() == model


def test_a_second_signal_leaves_in_the_log_what_a_server_that_is_away_has_not(tmp_path: Path, image: Path) -> None:
    server = nbdkit(tmp_path, "file", image)
    model = bytearray(DISK_BYTES)
    with server:
        served = daemon(tmp_path, {"type": "nbd", "uri": server.uri}, destage_after="1h")
        served.start()
        work(tmp_path / "disk.sock", model, 5)
        server.kill()
        served.wait_for("backend-lost")
        assert end_by_two_signals(served) == 1
        server.start()
        with served:
            pass
    assert image.read_bytes() == model
