"""QEMU's cache modes on the real daemon: when a write is acknowledged, what a flush does, and what a kill leaves."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.frontend import Frontend
from tests.native.conftest import FREE, MIB, Disk, NativeDaemon, bench, noise

WCE_OFFSET = 32  # struct virtio_blk_config

WRITE_BACK = ["writeback", "none", "unsafe"]
WRITE_THROUGH = ["writethrough", "directsync"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Disk]]:
    """A daemon of the test's own, which it may kill."""
    disks: list[Disk] = []

    def starter(*options: str) -> Disk:
        image, socket = tmp_path / f"{len(disks)}.img", tmp_path / f"{len(disks)}.sock"
        # Nothing is written to the image just because time goes by.
        arguments = ("--ram", "32MiB", "--destage-after", "1h", *options)
        disk = Disk(image, socket, NativeDaemon.export(image, socket, *arguments))
        disk.make_image()
        disk.daemon.start()
        disks.append(disk)
        return disk

    yield starter
    for disk in disks:
        if disk.daemon.running:
            disk.daemon.stop()


def is_in_image(disk: Disk, at: int, data: bytes) -> bool:
    return disk.in_image(at, len(data)) == data


@pytest.mark.parametrize("mode", WRITE_BACK)
def test_in_write_back_a_write_is_acknowledged_before_it_is_in_the_image(start: Callable[..., Disk], mode: str) -> None:
    disk = start("--mode", mode)
    data = noise(65536, mode)
    with disk.frontend() as f:
        assert f.config()[WCE_OFFSET] == 1
        f.write(FREE, data)
        assert not is_in_image(disk, FREE, data)
        assert f.read(FREE, len(data)) == data
    statistics = disk.daemon.stop()["vda"]
    assert is_in_image(disk, FREE, data), "draining has written it"
    assert statistics["backend_operations"]["write"] >= 1


@pytest.mark.parametrize("mode", WRITE_THROUGH)
def test_in_write_through_every_acknowledged_write_is_in_the_image_flushed_and_survives_a_kill(
    start: Callable[..., Disk], mode: str
) -> None:
    disk = start("--mode", mode)
    with disk.frontend() as f:
        assert f.config()[WCE_OFFSET] == 0
        for i in range(20):
            data = noise(8192, (mode, i))
            f.write(FREE + i * 16384, data)
            assert is_in_image(disk, FREE + i * 16384, data)
        disk.daemon.kill()
    disk.daemon.start()
    with disk.frontend() as f:
        for i in range(20):
            assert f.read(FREE + i * 16384, 8192) == noise(8192, (mode, i))
        f.write(FREE, b"x" * 4096)
    statistics = disk.daemon.stop()["vda"]
    assert statistics["backend_operations"]["flush"] >= 1, "the write was not only written, but flushed too"


@pytest.mark.parametrize("mode", ["writeback", "none"])
def test_what_was_flushed_survives_a_kill(start: Callable[..., Disk], mode: str) -> None:
    disk = start("--mode", mode)
    with disk.frontend() as f:
        for i in range(50):
            f.write(FREE + i * 12288, noise(4096 + 512 * (i % 9), (mode, i)))
        f.flush()
        f.write(FREE + 8 * MIB, noise(4096, "after the flush"))
        disk.daemon.kill()
    for i in range(50):
        assert is_in_image(disk, FREE + i * 12288, noise(4096 + 512 * (i % 9), (mode, i)))
    disk.daemon.start()
    disk.assert_good()


def test_in_unsafe_a_flush_is_answered_and_not_performed(start: Callable[..., Disk]) -> None:
    disk = start("--mode", "unsafe")
    data = noise(65536, "unsafe")
    with disk.frontend() as f:
        f.write(FREE, data)
        for _ in range(10):
            f.flush()
        assert not is_in_image(disk, FREE, data)
    statistics = disk.daemon.stop()["vda"]
    assert statistics["requests"]["flush"] == 10
    assert is_in_image(disk, FREE, data)


@pytest.mark.parametrize(("mode", "direct"), [("writeback", False), ("none", True), ("directsync", True)])
def test_the_image_is_opened_as_the_mode_says(start: Callable[..., Disk], mode: str, direct: bool) -> None:
    disk = start("--mode", mode)
    (volume,) = disk.daemon.events("volume")
    assert (volume["mode"], volume["direct"]) == (mode, direct)


def test_the_parts_of_a_mode_can_be_asked_for_one_by_one(start: Callable[..., Disk]) -> None:
    disk = start("--mode", "none", "--cache-writeback", "off", "--cache-direct", "off")
    (volume,) = disk.daemon.events("volume")
    assert (volume["mode"], volume["direct"]) == ("writethrough", False)
    with disk.frontend() as f:
        data = noise(4096, "parts")
        f.write(FREE, data)
        assert is_in_image(disk, FREE, data)


def test_a_guest_that_had_its_write_cache_off_is_not_betrayed_by_a_new_process(start: Callable[..., Disk]) -> None:
    """No front-end sends that state again: until the guest flushes, it is taken to believe in write-through."""
    disk = start("--mode", "none")
    first: Frontend = disk.frontend()
    first.set_config(WCE_OFFSET, b"\0")
    first.write(FREE, noise(4096, "before"))
    disk.daemon.kill()
    first.disconnect()
    assert is_in_image(disk, FREE, noise(4096, "before"))
    disk.daemon.start()
    with disk.frontend(resume=first) as f:
        disk.daemon.wait_for("resumed")
        f.write(FREE + MIB, noise(4096, "after"))
        assert is_in_image(disk, FREE + MIB, noise(4096, "after"))
        f.flush()
        f.write(FREE + 2 * MIB, noise(4096, "it does flush"))
        assert not is_in_image(disk, FREE + 2 * MIB, noise(4096, "it does flush"))


def test_a_pool_of_threads_does_what_io_uring_does(start: Callable[..., Disk]) -> None:
    disk = start("--io-engine", "threads")
    assert disk.daemon.events("ready")[0]["io_uring"] is False
    options = ("--rw", "randrw", "--bs", "4k", "--iodepth", "16", "--numjobs", "4", "--offset", "4m", "--fsync", "64")
    result = bench(disk.socket, *options, "--number_ios", "3000", "--verify", "crc32c")
    assert result.returncode == 0, result.stderr
    with disk.frontend() as f:
        f.write(FREE, noise(65536, "threads"))
        f.discard(FREE, 32768)
        f.flush()
    assert is_in_image(disk, FREE, bytes(32768) + noise(65536, "threads")[32768:])
    disk.assert_good()


def test_a_daemon_that_is_told_to_ends_when_its_guest_has_gone(start: Callable[..., Disk]) -> None:
    disk = start("--shutdown-on-disconnect")
    data = noise(65536, "gone")
    with disk.frontend() as f:
        f.write(FREE, data)
    disk.daemon.wait_for("statistics")
    assert is_in_image(disk, FREE, data)
    assert disk.daemon.stop()["vda"]["requests"]["write"] == 1
