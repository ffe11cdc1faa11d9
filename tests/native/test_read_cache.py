"""The read cache, with the real engine: what it has answered once it answers again, also after a restart, and it is
never believed when it may be wrong."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.guest import VHOSTCACHE
from tests.native.conftest import FREE, MIB, noise
from tests.native.test_cache import CachedDisk, disk, ram_dir  # noqa: F401 - fixtures
from vhostcache.control import query

BLOCK = 4096
READ_CACHE = 16 * MIB
READ = 8 * MIB


def fill_image(disk: CachedDisk) -> bytes:  # noqa: F811
    data = noise(READ, "image")
    with disk.image.open("r+b") as file:
        file.seek(FREE)
        file.write(data)
    return data


def read_all(disk: CachedDisk, piece: int = 16 * BLOCK) -> bytes:  # noqa: F811
    """In an order that nobody takes for a stream."""
    found = bytearray(READ)
    with disk.frontend() as f:
        for at in sorted(range(0, READ, piece), key=lambda at: at * 7919 % 10007):
            found[at : at + piece] = f.read(FREE + at, piece)
    return bytes(found)


def started(disk: CachedDisk) -> dict[str, Any]:  # noqa: F811
    (event,) = disk.daemon.events("read-cache")
    return event


@pytest.fixture
def warm(disk: CachedDisk) -> bytes:  # noqa: F811
    """A disk that has been read once and closed."""
    data = fill_image(disk)
    disk.use("--read-cache", str(READ_CACHE))
    disk.daemon.start()
    assert started(disk)["warm"] is False
    assert read_all(disk) == data
    statistics = disk.daemon.stop()["vda"]
    assert statistics["read_cache_written_blocks"] == READ // BLOCK
    return data


def test_what_has_been_read_is_found_again_after_a_restart(disk: CachedDisk, warm: bytes) -> None:  # noqa: F811
    disk.daemon.start()
    assert (started(disk)["warm"], started(disk)["used_bytes"]) == (True, READ)
    assert read_all(disk) == warm
    statistics = disk.daemon.stop()["vda"]
    assert statistics["backend_operations"]["read"] == 0
    assert statistics["read_cache_hits"] == READ // BLOCK


def test_status_shows_its_size_its_use_and_its_hits(disk: CachedDisk, warm: bytes) -> None:  # noqa: F811
    disk.daemon.start()
    assert read_all(disk) == warm
    (volume,) = query(f"{disk.socket}.control", "status")["volumes"]
    found = volume["cache"]["read_cache"]
    assert (found["used_bytes"], found["hits"]) == (READ, READ // BLOCK)
    assert READ_CACHE * 0.9 < found["bytes"] <= READ_CACHE
    line = subprocess.run(
        [VHOSTCACHE, "status", f"{disk.socket}.control"], capture_output=True, text=True, timeout=60, check=True
    ).stdout.splitlines()[2]
    assert "50 % of 15.9 MiB" in line, "its use"
    assert re.search(r" 100 % +100 % +\d", line), "its hits, and all"


def test_what_is_written_and_discarded_is_not_found_there_any_more(disk: CachedDisk, warm: bytes) -> None:  # noqa: F811
    for data in (warm, warm[:MIB] + bytes(MIB) + noise(MIB, "new") + warm[3 * MIB :]):
        disk.daemon.start()
        assert started(disk)["warm"]
        assert read_all(disk) == data
        with disk.frontend() as f:
            f.discard(FREE + MIB, MIB)
            f.write(FREE + 2 * MIB, noise(MIB, "new"))
            f.flush()
        statistics = disk.daemon.stop()["vda"]
        assert statistics["backend_operations"]["read"] == 0
    assert statistics["read_cache_used_blocks"] == (READ - 2 * MIB) // BLOCK


def test_after_a_kill_it_is_empty(disk: CachedDisk, warm: bytes) -> None:  # noqa: F811
    disk.daemon.start()
    disk.daemon.kill()
    disk.daemon.start()
    assert (started(disk)["warm"], started(disk)["used_bytes"]) == (False, 0)
    assert read_all(disk) == warm


def test_after_a_change_of_the_image_it_is_empty(disk: CachedDisk, warm: bytes) -> None:  # noqa: F811
    with disk.image.open("r+b") as file:
        file.seek(FREE)
        file.write(noise(MIB, "others"))
    disk.daemon.start()
    assert not started(disk)["warm"]
    assert read_all(disk) == noise(MIB, "others") + warm[MIB:]


def test_rot_in_it_is_a_miss(disk: CachedDisk, warm: bytes) -> None:  # noqa: F811
    with disk.cache.open("r+b") as file:
        for at in range(64 * MIB + 5 * BLOCK, 64 * MIB + READ, MIB):
            file.seek(at)
            file.write(noise(100, at))
    disk.daemon.start()
    assert read_all(disk) == warm
    statistics = disk.daemon.stop()["vda"]
    assert statistics["read_cache_errors"] == READ // MIB
    assert statistics["errors"] == 0


def test_its_index_is_believed_as_a_whole_or_not_at_all(disk: CachedDisk, warm: bytes) -> None:  # noqa: F811
    with disk.cache.open("r+b") as file:
        file.seek(-20 * BLOCK, os.SEEK_END)
        file.write(b"x")
    disk.daemon.start()
    assert not started(disk)["warm"]
    assert read_all(disk) == warm


@pytest.mark.parametrize("size", [24 * MIB, 0])
def test_its_size_may_be_changed_and_the_log_stays(disk: CachedDisk, warm: bytes, size: int) -> None:  # noqa: F811
    disk.daemon.start()
    with disk.frontend() as f:
        f.write(FREE, noise(MIB, "kept"))
    disk.daemon.stop()
    at = disk.daemon.arguments.index("--read-cache")
    disk.daemon.arguments = disk.daemon.arguments[:at] + disk.daemon.arguments[at + 2 :]
    if size:
        disk.use("--read-cache", str(size))
    for _ in range(2):
        disk.daemon.start()
        assert read_all(disk) == noise(MIB, "kept") + warm[MIB:]
        assert Path(disk.cache).stat().st_size == 64 * MIB + size
        disk.daemon.stop()
