"""`vhostcache info`, `check` and `drain` on what a real daemon has left, killed or ended in good order."""

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest import VHOSTCACHE
from tests.native.conftest import FREE, noise
from tests.native.test_cache import TIMEOUT_S, CachedDisk, has_pieces, write_pieces
from vhostcache.backend import mark


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[CachedDisk]:
    ram_dir = Path(f"/dev/shm/vhostcache-test-{uuid.uuid4().hex}")
    try:
        os.setxattr(tmp_path, mark.NAME, b"x")
    except OSError:
        pytest.skip("no extended attributes here")
    disk = CachedDisk(tmp_path, ram_dir)
    yield disk
    disk.daemon.reap()
    shutil.rmtree(ram_dir, ignore_errors=True)


def tool(disk: CachedDisk, command: str, *options: str | Path) -> "subprocess.CompletedProcess[str]":
    line = [VHOSTCACHE, command, disk.cache, "--ram-dir", disk.ram_dir, *options]
    return subprocess.run(
        list(map(str, line)), capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL
    )


def image_has_pieces(disk: CachedDisk, seed: str, count: int = 40) -> bool:
    data = disk.image.read_bytes()
    pieces = [(FREE + i * 12288, noise(4096 + 512 * (i % 9), (seed, i))) for i in range(count)]
    return all(data[at : at + len(piece)] == piece for at, piece in pieces)


@pytest.mark.parametrize("killed", [True, False])
def test_a_drained_image_stands_on_its_own(disk: CachedDisk, killed: bool) -> None:
    disk.daemon.start()
    write_pieces(disk, "flushed", flush=True)
    write_pieces(disk, "acknowledged", count=20)
    if killed:
        disk.daemon.kill()
    else:
        disk.daemon.stop()
    assert not image_has_pieces(disk, "acknowledged", 20)
    assert tool(disk, "check", "--backend", disk.image).returncode == 1
    done = tool(disk, "drain", "--backend", disk.image)
    assert done.returncode == 0, done.stderr
    assert image_has_pieces(disk, "acknowledged", 20)
    checked = tool(disk, "check", "--backend", disk.image)
    assert checked.returncode == 0, checked.stderr
    assert "clean" in checked.stdout
    assert disk.tier_files() == []
    found = disk.mark()
    assert found is not None
    assert not found.dirty
    # The cache goes on, too: warm, and in agreement with the image.
    disk.daemon.start()
    assert has_pieces(disk, "acknowledged", 20)
    disk.daemon.stop()


def test_a_cache_that_is_served_is_left_alone(disk: CachedDisk) -> None:
    disk.daemon.start()
    for command, options in (("info", ()), ("check", ()), ("drain", ("--backend", disk.image))):
        done = tool(disk, command, *options)
        assert done.returncode == 1
        assert "in use by another process" in done.stderr
    disk.daemon.stop()


def test_damage_is_found_by_check(disk: CachedDisk) -> None:
    disk.daemon.start()
    write_pieces(disk, "flushed", flush=True)
    disk.daemon.stop()
    piece = noise(4096, ("flushed", 0))
    data = bytearray(disk.cache.read_bytes())
    at = data.find(piece)
    assert at > 0
    data[at + 100] ^= 4
    with disk.cache.open("r+b") as file:
        file.write(data)
    done = tool(disk, "check")
    assert done.returncode == 2
    assert f"corrupt: 4096 bytes at {FREE} of the disk" in done.stdout
    assert "checksum" not in done.stderr
    drained = tool(disk, "drain", "--backend", disk.image)
    assert drained.returncode == 1
    assert "are damaged" in drained.stderr
    assert disk.image.read_bytes()[FREE : FREE + 4096] != piece
