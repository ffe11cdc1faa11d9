"""Where io_uring is forbidden, as in many containers, threads do its work: the same disk, the same data."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native.conftest import FREE, MIB, Disk, NativeDaemon, bench, noise


@pytest.fixture(scope="module")
def module_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    folder = tmp_path_factory.mktemp("threads")
    image, socket = folder / "disk.img", folder / "disk.sock"
    daemon = NativeDaemon.export(image, socket, "--ram", "32MiB", "--num-queues", "4")
    disk = Disk(image, socket, daemon)
    disk.make_image()
    # The daemon inherits the filter from a process that has nothing else to do.
    daemon.program = [sys.executable, str(Path(__file__).with_name("forbid_io_uring.py")), *daemon.program]
    try:
        daemon.start()
        yield disk
    finally:
        disk.end()


def test_the_daemon_says_once_that_threads_stand_in(disk: Disk) -> None:
    (ready,) = disk.daemon.events("ready")
    assert ready["io_uring"] is False
    assert len(disk.daemon.events("no-io-uring")) == 1


def test_what_is_written_is_read_back_from_ram_and_from_the_image(disk: Disk) -> None:
    with disk.frontend(memory=32 * MIB) as f:
        for i in range(24):
            f.write(FREE + i * 2 * MIB, noise(MIB, i))
        f.flush()
        for i in range(24):
            assert f.read(FREE + i * 2 * MIB, MIB) == noise(MIB, i)
    assert disk.in_image(FREE, MIB) == noise(MIB, 0)


def test_discards_and_zeroes_reach_the_image(disk: Disk) -> None:
    with disk.frontend() as f:
        f.write(FREE, noise(MIB, "gone"))
        f.flush()
        f.discard(FREE, 65536)
        f.write_zeroes(FREE + 65536, 65536)
        f.flush()
        assert f.read(FREE, 131072 + 4096) == bytes(131072) + noise(MIB, "gone")[131072:][:4096]
    assert disk.in_image(FREE, 131072) == bytes(131072)


def test_verified_load_verifies(disk: Disk) -> None:
    options = ("--rw", "randrw", "--bs", "4k", "--iodepth", "32", "--runtime", "2", "--size", "48m", "--fsync", "64")
    result = bench(disk.socket, *options, "--verify", "crc32c", "--offset", "4m")
    assert result.returncode == 0, result.stderr
