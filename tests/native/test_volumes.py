"""Several volumes in one daemon: what happens on one is no concern of the others."""

import contextlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.frontend import (
    GET_FEATURES,
    SET_FEATURES,
    SET_MEM_TABLE,
    SET_VRING_CALL,
    T_FLUSH,
    T_OUT,
    VERSION,
    Descriptor,
    Frontend,
    GoneError,
    LateError,
    RefusedError,
)
from tests.native.conftest import FREE, MIB, QUEUES, Disk, NativeDaemon, bench, noise

LOAD = ["--rw", "randrw", "--bs", "4k", "--iodepth", "16", "--numjobs", "2", "--verify", "crc32c", "--fsync", "16"]


class Pair:
    """A daemon that serves a good volume and one whose front-ends misbehave."""

    def __init__(self, folder: Path) -> None:
        config = folder / "volumes.yaml"
        names = ("good", "bad")
        volumes = [
            {
                "name": name,
                "socket": str(folder / f"{name}.sock"),
                "backend": {"type": "file", "path": str(folder / f"{name}.img")},
                "ram": "32MiB",
                "num_queues": QUEUES,
            }
            for name in names
        ]
        config.write_text(yaml.safe_dump({"volumes": volumes}))
        self.daemon = NativeDaemon.serve(config)
        self.good, self.bad = (Disk(folder / f"{n}.img", folder / f"{n}.sock", self.daemon) for n in names)
        for disk in (self.good, self.bad):
            disk.make_image()

    @contextlib.contextmanager
    def load_on_the_good_one(self) -> Iterator[None]:
        """Verified load, which must go through without an error while the body misbehaves, and must not stall."""
        program = Path(sys.executable).with_name("vhostcache")
        load = subprocess.Popen(
            [
                program,
                "bench",
                self.good.socket,
                *LOAD,
                "--offset",
                "8m",
                "--runtime",
                "1.5",
                "--timeout",
                "30",
                "--json",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            time.sleep(0.2)
            yield
            out, err = load.communicate(timeout=60)
        finally:
            load.kill()
            load.wait()
        assert load.returncode == 0, err
        report = json.loads(out)
        job = report["jobs"][0]
        assert report["error"] == ""
        assert job["verified_bytes"] > 0
        assert job["write"]["total_ios"] > 0


@pytest.fixture(scope="module")
def module_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"))
    try:
        pair.daemon.start()
        yield pair
        pair.daemon.stop()
    finally:
        pair.daemon.reap()


@pytest.fixture
def pair(module_pair: Pair) -> Iterator[Pair]:
    yield module_pair
    module_pair.good.assert_good()
    module_pair.bad.assert_good()


def test_two_volumes_keep_their_data_apart(pair: Pair) -> None:
    with pair.good.frontend() as good, pair.bad.frontend() as bad:
        for i in range(50):
            good.write(FREE + i * 4096, noise(4096, ("good", i)))
            bad.write(FREE + i * 4096, noise(4096, ("bad", i)))
        for i in range(50):
            assert good.read(FREE + i * 4096, 4096) == noise(4096, ("good", i))
            assert bad.read(FREE + i * 4096, 4096) == noise(4096, ("bad", i))
        assert (good.get_id(), bad.get_id()) == ("good", "bad")


def keep_at_it(pair: Pair, body: Callable[[Disk, random.Random], None], seconds: float = 1.2) -> None:
    """Misbehave on the bad volume again and again, while the good one is under verified load."""
    rng = random.Random(body.__name__)
    with pair.load_on_the_good_one():
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(GoneError, LateError, RefusedError):
                body(pair.bad, rng)


def broken_rings(disk: Disk, rng: random.Random) -> None:
    with disk.frontend() as f:
        f.queues[0].submit(rng.choice([128, 4096, 65535]))
        f.expect_gone(5)


def loops(disk: Disk, rng: random.Random) -> None:
    with disk.frontend() as f:
        header = f.header(T_OUT)
        f.queues[0].put(0, Descriptor(header.address, 16, 1, 0))
        f.queues[0].submit(0)
        f.expect_gone(5)


def noise_on_the_socket(disk: Disk, rng: random.Random) -> None:
    with disk.frontend(start=False) as f:
        f.send_raw(rng.randbytes(rng.randrange(1, 2000)))


def half_messages(disk: Disk, rng: random.Random) -> None:
    with disk.frontend(start=False) as f:
        f.send_raw(struct.pack("<III", SET_FEATURES, VERSION, 8)[: rng.randrange(1, 12)])
        time.sleep(0.1)


def truncated_memory(disk: Disk, rng: random.Random) -> None:
    with disk.frontend() as f:
        for i in range(30):
            f.start_write(FREE + i * 65536, bytes(65536))
        os.ftruncate(f.memory.fd, 0)
        os.eventfd_write(f.queues[0].kick_fd, 1)
        f.expect_gone(5)


def sudden_leave(disk: Disk, rng: random.Random) -> None:
    with disk.frontend(queues=QUEUES) as f:
        for i in range(80):
            f.start_write(FREE + i * 65536, bytes(65536), queue=i % QUEUES)


def questions_without_listening(disk: Disk, rng: random.Random) -> None:
    with disk.frontend(start=False) as f:
        f.sock.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while True:
                f.send_raw(struct.pack("<III", GET_FEATURES, VERSION, 0) * 500)


def a_call_that_blocks(disk: Disk, rng: random.Random) -> None:
    fd = os.eventfd(0)
    try:
        os.eventfd_write(fd, 2**64 - 2)
        with disk.frontend() as f:
            f.send(SET_VRING_CALL, bytes(8), [fd])
            for _ in range(4):
                f.finish(f.start_write(FREE, bytes(4096)), timeout_s=0.05)
    finally:
        os.close(fd)


def no_memory(disk: Disk, rng: random.Random) -> None:
    with disk.frontend() as f:
        for i in range(30):
            f.start_write(FREE + i * 4096, bytes(4096))
        f.send(SET_MEM_TABLE, struct.pack("<II", rng.choice([0, 9, 2**32 - 1]), 0))
        f.expect_gone(2)


def a_storm_of_connections(disk: Disk, rng: random.Random) -> None:
    for _ in range(20):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(disk.socket))
        sock.close()


def bad_requests(disk: Disk, rng: random.Random) -> None:
    with disk.frontend() as f:
        for _ in range(100):
            f.request(rng.randrange(2**32), rng.randrange(2**64), f.room(512))


def flushes_and_kicks_without_end(disk: Disk, rng: random.Random) -> None:
    with disk.frontend() as f:
        for _ in range(100):
            requests = [f.submit([f.header(T_FLUSH), f.room(1)]) for _ in range(20)]
            f.queues[0].kick()
            for request in requests:
                f.finish(request)


@pytest.mark.parametrize(
    "body",
    [
        broken_rings,
        loops,
        noise_on_the_socket,
        half_messages,
        truncated_memory,
        sudden_leave,
        questions_without_listening,
        a_call_that_blocks,
        no_memory,
        a_storm_of_connections,
        bad_requests,
        flushes_and_kicks_without_end,
    ],
)
def test_a_front_end_that_misbehaves_does_not_disturb_the_other_volume(
    pair: Pair, body: Callable[[Disk, random.Random], None]
) -> None:
    keep_at_it(pair, body)


def test_a_front_end_that_falls_silent_in_the_middle_of_a_message_holds_up_nobody_else(pair: Pair) -> None:
    with pair.bad.frontend(start=False) as f:
        f.send_raw(struct.pack("<III", SET_FEATURES, VERSION, 8) + b"\0\0\0")
        with pair.load_on_the_good_one():
            pass


def test_load_on_every_volume_at_once_verifies(pair: Pair) -> None:
    with pair.load_on_the_good_one():
        result = bench(pair.bad.socket, *LOAD, "--offset", "8m", "--runtime", "1.2", "--json")
        assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["jobs"][0]["verified_bytes"] > 0
    with Frontend(pair.bad.socket) as f:
        assert f.read(0, MIB) == pair.bad.guard
