"""A block of the cache file that cannot be read, under the real daemon: the file ends before it, for a while or for
good, which is an error of the engine's read (ENODATA) as a bad sector is (EIO)."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.guest import VHOSTCACHE
from tests.native.conftest import FREE, MIB, noise
from tests.native.test_cache import TIMEOUT_S, CachedDisk, disk, ram_dir

__all__ = ["disk", "ram_dir"]

RETRY_AFTER = Path(__file__).with_name("retry_after.py")
IOERR = 1
CACHE_BYTES = 64 * MIB
BAD = FREE + 8192
DATA = noise(MIB, "all")
LATER = noise(4096, "later")


def run(*command: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([VHOSTCACHE, *command], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def break_the_last_block(disk: CachedDisk, retry_after_s: float) -> int:
    """The log alone has DATA, and LATER of one of its blocks at the end, which cannot be read any more. Returns where
    that lies in the cache file. The daemon runs, and begins to destage."""
    disk.daemon.start()
    with disk.frontend() as frontend:
        for data, offset in ((DATA, FREE), (LATER, BAD)):
            frontend.write(offset, data)
            frontend.flush()
    disk.daemon.stop()
    lines = map(json.loads, run("dump", disk.cache).stdout.splitlines())
    last = [line for line in lines if line.get("payload_blocks")][-1]
    at = int(last["offset_bytes"]) + 4096 * int(last["header_blocks"])
    assert disk.cache.read_bytes()[at : at + 4096] == LATER
    disk.daemon.program = [sys.executable, str(RETRY_AFTER), str(retry_after_s)]
    disk.daemon.start()  # with nothing in RAM
    os.truncate(disk.cache, at)
    answer = run("set", disk.socket, "destage=on", "destage_after=10ms")
    assert answer.returncode == 0, answer.stderr
    return at


def assert_all_else_is_in_the_image(disk: CachedDisk) -> None:
    before, behind = BAD - FREE, BAD - FREE + 4096
    assert disk.in_image(FREE, before) == DATA[:before]
    assert disk.in_image(BAD, 4096) not in (DATA[before:behind], LATER)
    assert disk.in_image(BAD + 4096, MIB - behind) == DATA[behind:]


def test_a_bad_sector_costs_its_block_and_nothing_else_waits_for_it(disk: CachedDisk) -> None:
    break_the_last_block(disk, retry_after_s=0.05)
    disk.daemon.wait_for("log-unreadable")
    assert_all_else_is_in_the_image(disk)
    (lost,) = disk.daemon.wait_for("log-lost")
    assert (lost["offset"], lost["bytes"], lost["attempts"], lost["errno"]) == (BAD, 4096, 5, errno.ENODATA)
    assert [event["attempts"] for event in disk.daemon.events("log-unreadable")] == [1, 2, 3, 4]
    with disk.frontend() as frontend:
        assert frontend.request(0, BAD // 512, frontend.room(4096)).status == IOERR
        assert frontend.request(1, BAD // 512, frontend.out(b"x" * 512)).status == IOERR, "nor is it made up"
        assert frontend.read(FREE, 8192) == DATA[:8192]
    disk.daemon.stop()
    os.truncate(disk.cache, CACHE_BYTES)

    check = run("check", disk.cache)
    assert check.returncode == 2
    assert f"lost: 4096 bytes at {BAD} of the disk" in check.stdout
    refused = run("drain", disk.cache, "--backend", disk.image, "--ram-dir", disk.ram_dir)
    assert refused.returncode == 1
    assert "--give-up-damaged" in refused.stderr

    disk.daemon.start()
    with disk.frontend() as frontend:
        assert frontend.request(0, BAD // 512, frontend.room(4096)).status == IOERR, "it is not forgotten"
        frontend.write(BAD, noise(4096, "again"))
        frontend.flush()
        assert frontend.read(BAD, 4096) == noise(4096, "again")
    disk.use("--drain-on-exit")
    disk.daemon.stop()
    disk.daemon.start()
    disk.daemon.stop()
    assert disk.in_image(BAD, 4096) == noise(4096, "again")
    assert "lost" not in run("check", disk.cache).stdout


def test_a_fault_that_passes_costs_nothing(disk: CachedDisk) -> None:
    at = break_the_last_block(disk, retry_after_s=1000)
    disk.daemon.wait_for("log-unreadable")
    assert_all_else_is_in_the_image(disk)
    (volume,) = json.loads(run("status", "--json", disk.socket).stdout)["volumes"]
    assert volume["cache"]["unreadable_bytes"] == 4096
    with disk.cache.open("r+b") as file:
        file.truncate(CACHE_BYTES)
        file.seek(at)
        file.write(LATER)
    assert run("retry", disk.socket).returncode == 0
    deadline = time.monotonic() + TIMEOUT_S
    while disk.in_image(BAD, 4096) != LATER:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    disk.daemon.stop()
    assert not disk.daemon.events("log-lost")
    (event,) = disk.daemon.events("statistics")
    assert (event["lost_blocks"], event["unreadable_blocks"]) == (0, 0)
