"""Growing a disk on the real daemon: what the guest sees, what a crash between two steps leaves, what is refused."""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontend import IOERR, P_CONFIG, P_INFLIGHT, P_MQ, P_REPLY_ACK, P_SLAVE_REQ, T_OUT, Frontend
from tests.guest import VHOSTCACHE, GuestError
from tests.native.conftest import DISK_BYTES, MIB, Disk, NativeDaemon, noise
from tests.native.test_cache import TIMEOUT_S, CachedDisk, disk, ram_dir
from vhostcache.control import query, resize_and_wait
from vhostcache.errors import ControlError

__all__ = ["disk", "ram_dir"]

PROTOCOL = (P_MQ, P_REPLY_ACK, P_CONFIG, P_INFLIGHT, P_SLAVE_REQ)
CONFIG_CHANGED = bytes([2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])  # request 2, version 1, no payload
DIE_AT = Path(__file__).with_name("die_at.py")


def resize(disk: Disk, size_bytes: int) -> None:
    assert resize_and_wait(f"{disk.socket}.control", "vda", size_bytes) == size_bytes


def refusal(disk: Disk, size_bytes: int) -> str:
    with pytest.raises(ControlError) as caught:
        resize_and_wait(f"{disk.socket}.control", "vda", size_bytes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def command(*arguments: object, status: int = 0) -> str:
    """What `vhostcache resize` says, in one line."""
    line = [VHOSTCACHE, "resize", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == status, (done.stdout, done.stderr)
    (text,) = (done.stderr if status else done.stdout).splitlines()
    return text


@pytest.fixture
def fresh(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    """A disk of its own, with the options of the parameter."""
    image, sock = tmp_path / "vda.img", tmp_path / "vda.sock"
    options = [option.replace("FOLDER", str(tmp_path)) for option in getattr(request, "param", ())]
    disk = Disk(image, sock, NativeDaemon.export(image, sock, "--ram", "32MiB", *options))
    disk.make_image()
    disk.daemon.start()
    yield disk
    disk.end()
    shutil.rmtree(RAM_DIR, ignore_errors=True)


RAM_DIR = f"/dev/shm/vhostcache-test-{uuid.uuid4().hex}"
CACHE = ("--cache", "FOLDER/vda.cache", "--cache-size", "64MiB", "--ram-dir", RAM_DIR)
KINDS = pytest.mark.parametrize(
    "fresh",
    [(), ("--io-engine", "threads", "--mode", "none"), CACHE],
    ids=["plain", "threads-direct", "cache"],
    indirect=True,
)


@KINDS
def test_a_disk_grows_several_times_under_io_and_its_front_end_is_told(fresh: Disk) -> None:
    stop = threading.Event()
    failures: list[Exception] = []

    def load() -> None:
        """On the second queue, all the time."""
        try:
            round_ = 0
            while not stop.is_set():
                round_ += 1
                data = noise(16384, round_)
                frontend.write(8 * MIB + round_ % 64 * 65536, data, queue=1)
                assert frontend.read(8 * MIB + round_ % 64 * 65536, 16384, queue=1) == data
                if not round_ % 8:
                    frontend.flush(queue=1)
        except (AssertionError, OSError) as error:
            failures.append(error)

    with Frontend(fresh.socket, queues=2, protocol=PROTOCOL) as frontend, frontend.watch_config() as changes:
        worker = threading.Thread(target=load)
        worker.start()
        try:
            size = DISK_BYTES
            for step in (MIB, 4096, 16 * MIB):
                resize(fresh, size + step)
                assert changes.recv(100) == CONFIG_CHANGED
                size += step
                assert fresh.image.stat().st_size == size
        finally:
            stop.set()
            worker.join()
        assert not failures, failures
        assert frontend.capacity == size
        last = noise(65536, "last")
        frontend.write(size - 65536, last)
        frontend.write(DISK_BYTES - 4096, last[:8192])
        assert frontend.read(size - 65536, 65536) == last
        assert frontend.read(DISK_BYTES + 4096, 8192) == bytes(8192)
        assert frontend.request(T_OUT, size // 512, frontend.out(b"x" * 512)).status == IOERR
        frontend.flush()
        frontend.discard(size - 8192, 8192)
        frontend.flush()
    assert [e["size_bytes"] for e in fresh.daemon.events("resized")][-1] == size
    assert all(e["guest_told"] for e in fresh.daemon.events("resized"))
    fresh.daemon.stop()
    if "--cache" not in fresh.daemon.arguments:
        assert fresh.in_image(size - 65536, 65536) == last[:-8192] + bytes(8192)
        assert fresh.in_image(DISK_BYTES - 4096, 8192) == last[:8192]
    fresh.daemon.start()
    with fresh.frontend() as frontend:
        assert frontend.capacity == size
        assert frontend.read(size - 65536, 65536) == last[:-8192] + bytes(8192)
        assert frontend.read(DISK_BYTES - 4096, 8192) == last[:8192]


@pytest.mark.parametrize("fresh", [(), CACHE], ids=["plain", "cache"], indirect=True)
def test_an_odd_disk_shows_zeroes_behind_its_old_end(fresh: Disk) -> None:
    fresh.daemon.stop()
    odd = DISK_BYTES + 1536
    os.truncate(fresh.image, odd)
    fresh.daemon.start()
    with fresh.frontend() as frontend:
        for i in range(64):  # so that slots have been in use
            frontend.write(4 * MIB + i * 65536, b"\xff" * 65536)
        frontend.write(DISK_BYTES, b"a" * 1536)
        resize(fresh, DISK_BYTES + 8192)
        assert frontend.read(DISK_BYTES, 8192) == b"a" * 1536 + bytes(8192 - 1536)
        frontend.write(DISK_BYTES + 1024, b"b" * 1024)
        frontend.flush()
        assert frontend.read(DISK_BYTES, 8192) == b"a" * 1024 + b"b" * 1024 + bytes(8192 - 2048)
    fresh.daemon.stop()
    fresh.daemon.start()
    with fresh.frontend() as frontend:
        assert frontend.read(DISK_BYTES, 8192) == b"a" * 1024 + b"b" * 1024 + bytes(8192 - 2048)


def test_a_front_end_that_does_not_ask_to_be_told_sees_it_when_it_looks(fresh: Disk) -> None:
    resize(fresh, DISK_BYTES + MIB)
    with fresh.frontend() as frontend:
        assert frontend.capacity == DISK_BYTES + MIB
        resize(fresh, DISK_BYTES + 2 * MIB)
        assert frontend.capacity == DISK_BYTES + 2 * MIB
    assert not any(event["guest_told"] for event in fresh.daemon.events("resized"))


def test_a_front_end_that_comes_back_is_told_once_what_it_may_have_missed(fresh: Disk) -> None:
    with Frontend(fresh.socket, protocol=PROTOCOL) as first:
        first.write(4 * MIB, b"x" * 4096)
        fresh.daemon.kill()
        first.disconnect()
        os.truncate(fresh.image, DISK_BYTES + MIB)  # as a resize does before it dies
        fresh.daemon.start()
        with Frontend(fresh.socket, protocol=PROTOCOL, resume=first, start=False) as second:
            second.negotiate()
            with second.watch_config() as changes:
                second.share()
                second.track_inflight()
                second.start(0)
                assert changes.recv(100) == CONFIG_CHANGED
                assert second.capacity == DISK_BYTES + MIB
                second.stop(0)
                second.start(0)
                changes.setblocking(False)
                with pytest.raises(BlockingIOError):
                    changes.recv(100)


def test_a_front_end_that_does_not_read_what_it_is_told_holds_up_nobody(fresh: Disk) -> None:
    with Frontend(fresh.socket, protocol=PROTOCOL) as frontend, frontend.watch_config() as changes:
        changes.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for i in range(1, 4):
            resize(fresh, DISK_BYTES + i * 4096)
            frontend.write(4 * MIB, noise(4096, i))
    assert fresh.daemon.is_alive()


@pytest.mark.parametrize("fresh", [(), CACHE], ids=["plain", "cache"], indirect=True)
def test_what_cannot_be_is_refused_in_one_line_and_changes_nothing(fresh: Disk) -> None:
    assert f"volume 'vda': has {DISK_BYTES} bytes, and cannot be made smaller" in refusal(fresh, DISK_BYTES - MIB)
    assert "a multiple of 512" in refusal(fresh, DISK_BYTES + 100)
    assert "a multiple of 512" in refusal(fresh, 1 << 63)
    resize(fresh, DISK_BYTES)
    os.truncate(fresh.image, DISK_BYTES + 2 * MIB)
    assert f"has {DISK_BYTES + 2 * MIB} bytes already" in refusal(fresh, DISK_BYTES + MIB)
    resize(fresh, DISK_BYTES + 2 * MIB)  # taken as it is
    with fresh.frontend() as frontend:
        assert frontend.capacity == DISK_BYTES + 2 * MIB
    fresh.assert_good()


def test_the_command_says_what_has_become_of_it(fresh: Disk) -> None:
    assert command(fresh.socket, "65MiB") == "vda: 65 MiB (68157440 bytes)"
    assert command("--control", f"{fresh.socket}.control", "vda", "66MiB") == "vda: 66 MiB (69206016 bytes)"
    assert "cannot be made smaller" in command(fresh.socket, "1MiB", status=1)
    assert "volume 'vdb': is not served here; expected 'vda'" in command(
        "--control", fresh.socket, "vdb", "66MiB", status=1
    )
    assert "a multiple of 512" in command(fresh.socket, "70000001", status=2)


def test_a_read_only_disk_does_not_grow(fresh: Disk) -> None:
    fresh.daemon.stop()
    fresh.daemon.arguments += ["--read-only"]
    fresh.daemon.start()
    assert "is read-only" in refusal(fresh, DISK_BYTES + MIB)


# A crash between two steps.


@pytest.mark.parametrize("power", [False, True], ids=["the daemon dies", "power is lost"])
def test_a_crash_when_only_the_image_has_grown_is_no_reason_to_refuse(
    disk: CachedDisk, monkeypatch: pytest.MonkeyPatch, power: bool
) -> None:
    disk.daemon.start()
    with disk.frontend() as frontend:
        frontend.write(4 * MIB, noise(65536, "a"))
        frontend.flush()
    disk.daemon.kill()
    os.truncate(disk.image, DISK_BYTES + MIB)
    if power:
        disk.lose_power(monkeypatch)
    disk.daemon.start()
    with disk.frontend() as frontend:
        assert frontend.capacity == DISK_BYTES + MIB
        assert frontend.read(4 * MIB, 65536) == noise(65536, "a")
        frontend.write(DISK_BYTES, noise(MIB, "new"))
        frontend.flush()
    disk.daemon.kill()
    disk.daemon.start()
    with disk.frontend() as frontend:
        assert frontend.read(DISK_BYTES, MIB) == noise(MIB, "new")


@pytest.mark.parametrize("step", range(1, 7))
def test_a_kill_at_each_step_of_a_resize_loses_nothing(disk: CachedDisk, step: int) -> None:
    """1: before the image grows; 2: when it has, and its size is not yet durable; 3: when it is; 4 and 5: before the
    first and the second superblock; 6: when they have been written, and the guest has not been told."""
    disk.daemon.program = [sys.executable, str(DIE_AT), f"resize:{step}"]
    disk.daemon.start()
    with disk.frontend() as frontend:
        frontend.write(4 * MIB, noise(65536, "flushed"))
        frontend.flush()
        frontend.write(5 * MIB, noise(65536, "acknowledged"))
        # The connection ends in the midst of it, or the next one is refused.
        assert re.search("does not speak|nobody listens|broken pipe", refusal(disk, DISK_BYTES + MIB))
    with pytest.raises(GuestError):
        disk.daemon.wait()
    disk.daemon.program = [str(VHOSTCACHE)]
    disk.daemon.start()
    with disk.frontend() as frontend:
        assert frontend.capacity == DISK_BYTES + (MIB if step > 1 else 0)
        assert frontend.read(4 * MIB, 65536) == noise(65536, "flushed")
        assert frontend.read(5 * MIB, 65536) == noise(65536, "acknowledged")
        resize(disk, DISK_BYTES + MIB)
        frontend.write(DISK_BYTES, noise(MIB, "new"))
        frontend.flush()
    disk.daemon.kill()
    disk.daemon.start()
    with disk.frontend() as frontend:
        assert frontend.read(DISK_BYTES, MIB) == noise(MIB, "new")
    disk.assert_good()


def test_a_shutdown_in_the_midst_of_a_resize_ends_it_first(disk: CachedDisk) -> None:
    disk.daemon.start()
    with disk.frontend() as frontend:
        frontend.write(4 * MIB, noise(65536, "dirty"))
    query(f"{disk.socket}.control", "resize", {"name": "vda", "size_bytes": DISK_BYTES + MIB})
    disk.daemon.stop()
    disk.daemon.start()
    with disk.frontend() as frontend:
        assert frontend.capacity == DISK_BYTES + MIB
        assert frontend.read(4 * MIB, 65536) == noise(65536, "dirty")


# An image that others have changed.


def test_an_image_grown_by_hand_after_the_end_gets_what_its_cache_has_when_its_user_says_so(disk: CachedDisk) -> None:
    disk.daemon.start()
    with disk.frontend() as frontend:
        frontend.write(4 * MIB, noise(65536, "dirty"))
        frontend.flush()
    disk.daemon.stop()
    for size in (DISK_BYTES + MIB, DISK_BYTES):  # and back again
        os.truncate(disk.image, size)
        assert "drain --accept-changed-image" in disk.refused()
    os.truncate(disk.image, DISK_BYTES + MIB)
    drain = [VHOSTCACHE, "drain", disk.cache, "--backend", disk.image, "--ram-dir", disk.ram_dir]
    assert subprocess.run(drain, capture_output=True, timeout=TIMEOUT_S).returncode == 1
    subprocess.run([*drain, "--accept-changed-image"], check=True, capture_output=True, timeout=TIMEOUT_S)
    assert disk.in_image(4 * MIB, 65536) == noise(65536, "dirty")
    disk.daemon.start()
    with disk.frontend() as frontend:
        assert frontend.capacity == DISK_BYTES + MIB
        assert frontend.read(4 * MIB, 65536) == noise(65536, "dirty")
    disk.assert_good()
