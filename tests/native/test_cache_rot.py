"""A cache file with one bit flipped, or cut off, under the real daemon and the tools: never wrong data, never a crash.

tests/sim/test_corruption.py flips a thousand bits in each state that a run can leave; here the engine in C reads.
"""

import json
import os
import random
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.frontend import OK, Frontend
from tests.guest import VHOSTCACHE, GuestError
from tests.native.conftest import FREE, MIB, noise
from tests.native.test_cache import TIMEOUT_S, CachedDisk, disk, ram_dir
from vhostcache.backend import mark

__all__ = ["disk", "ram_dir"]

FLIPS = 4  # at each kind of place
IOERR = 1
AREA = range(FREE, FREE + MIB, 4096)
CUTS = 3


class Left:
    """What an orderly end has left: all of it is known to be durable, so no damage to it can pass for power loss."""

    def __init__(self, disk: CachedDisk, folder: Path) -> None:
        self.disk = disk
        self.content = bytearray(AREA.stop - AREA.start)
        chance = random.Random(1)
        disk.daemon.start()
        with disk.frontend() as frontend:
            for number in range(120):
                size = chance.choice([512, 4096, 4096, 12288, 70000 // 512 * 512])
                at = chance.randrange(len(self.content) - size) // 512 * 512
                if chance.random() < 0.15:
                    frontend.discard(FREE + at // 4096 * 4096, 8192)
                    self.content[at // 4096 * 4096 : at // 4096 * 4096 + 8192] = bytes(8192)
                else:
                    data = noise(size, number)
                    frontend.write(FREE + at, data)
                    self.content[at : at + size] = data
                if chance.random() < 0.2:
                    frontend.flush()
        disk.daemon.stop()
        self.snapshot = folder / "snapshot"
        self._copy(disk.cache, self.snapshot)
        self._mark = os.getxattr(disk.image, mark.NAME)
        done = subprocess.run([VHOSTCACHE, "dump", disk.cache], capture_output=True, check=True, timeout=TIMEOUT_S)
        self.records = [line for line in map(json.loads, done.stdout.splitlines()) if "address" in line]

    def restore(self) -> None:
        self._copy(self.snapshot, self.disk.cache)
        os.setxattr(self.disk.image, mark.NAME, self._mark)

    def places(self, chance: random.Random) -> dict[str, int]:
        """A random byte of each kind of place."""
        record = chance.choice([one for one in self.records if one["payload_blocks"]])
        header, payload = record["header_blocks"] * 4096, record["payload_blocks"] * 4096
        last = self.records[-1]
        end = last["offset_bytes"] + (last["header_blocks"] + last["payload_blocks"]) * 4096
        return {
            "superblock": chance.choice([0, 4096]) + chance.randrange(256),
            "header": record["offset_bytes"] + chance.randrange(64 + 8 * len(record["extents"])),
            "block of a header": record["offset_bytes"] + chance.randrange(header),
            "payload": record["offset_bytes"] + header + chance.randrange(payload),
            "free": chance.randrange(end, 64 * MIB),
        }

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        subprocess.run(["cp", "--sparse=always", source, target], check=True)


@pytest.fixture
def left(disk: CachedDisk, tmp_path: Path) -> Left:
    return Left(disk, tmp_path)


def flip(cache: Path, at: int, bit: int) -> None:
    with cache.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def read_all(frontend: Frontend, content: bytes) -> int:
    """Each block is what was written there, or an error; how many are one."""
    errors = 0
    for at in AREA:
        room = frontend.room(4096)
        result = frontend.request(0, at // 512, room)
        if result.status == OK:
            assert frontend.content(room) == content[at - FREE :][:4096], f"wrong data at {at}"
        else:
            assert result.status == IOERR
            errors += 1
    return errors


def test_a_flipped_bit_is_found_or_harmless(left: Left) -> None:
    disk = left.disk
    chance = random.Random(2)
    found: Counter[str] = Counter()
    for _ in range(FLIPS):
        for kind, at in left.places(chance).items():
            left.restore()
            flip(disk.cache, at, chance.randrange(8))
            try:
                disk.daemon.start()
            except GuestError:
                (event,) = disk.daemon.events("refused")
                assert "\n" not in event["error"]
                disk.daemon.reap()
                found[f"{kind}: refused"] += 1
                continue
            with disk.frontend() as frontend:
                errors = read_all(frontend, left.content)
            disk.daemon.stop()
            checked = subprocess.run([VHOSTCACHE, "check", disk.cache], capture_output=True, timeout=TIMEOUT_S)
            assert checked.returncode == 2 if errors else checked.returncode in (0, 1, 2)
            found[f"{kind}: {'read error' if errors else 'harmless'}"] += 1
    assert found["payload: read error"] > 0, found
    assert found["header: refused"] > 0, found
    assert found["free: harmless"] == FLIPS, found
    left.restore()


def test_a_cut_off_cache_is_refused_by_the_tools_and_the_image_stays_as_it_is(left: Left) -> None:
    disk = left.disk
    before = disk.image.read_bytes()
    last = left.records[-1]
    end = last["offset_bytes"] + (last["header_blocks"] + last["payload_blocks"]) * 4096
    chance = random.Random(3)
    for size in [0, 4096, 8192, MIB, end, *(chance.randrange(MIB, end, 4096) for _ in range(CUTS))]:
        left.restore()
        os.truncate(disk.cache, size)
        for command in (["check", disk.cache], ["drain", disk.cache, "--backend", disk.image]):
            done = subprocess.run(
                [VHOSTCACHE, *command, "--ram-dir", disk.ram_dir], capture_output=True, text=True, timeout=TIMEOUT_S
            )
            assert done.returncode in (1, 2), done.stdout
            lines = [line for line in done.stderr.splitlines() if line.startswith("vhostcache: ")]
            assert len(lines) == 1, done.stderr
            assert "Traceback" not in done.stderr
        assert disk.image.read_bytes() == before
    left.restore()
    shutil.rmtree(disk.ram_dir, ignore_errors=True)
    subprocess.run(
        [VHOSTCACHE, "drain", disk.cache, "--backend", disk.image], check=True, capture_output=True, timeout=TIMEOUT_S
    )
    assert disk.image.read_bytes()[AREA.start : AREA.stop] == left.content


def test_what_rots_before_it_is_in_the_image_is_lost_and_nothing_else_waits_for_it(
    disk: CachedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    rotten, good = FREE + 8192, FREE + 64 * 4096
    disk.daemon.start()
    with disk.frontend() as frontend:
        frontend.write(FREE, noise(MIB, "all"))
        frontend.flush()
    disk.daemon.stop()
    done = subprocess.run([VHOSTCACHE, "dump", disk.cache], capture_output=True, check=True, timeout=TIMEOUT_S)
    (record,) = (line for line in map(json.loads, done.stdout.splitlines()) if line.get("payload_blocks"))
    flip(disk.cache, record["offset_bytes"] + (record["header_blocks"] + 2) * 4096 + 99, 3)
    disk.use("--destage", "on", "--destage-after", "10ms")

    disk.daemon.start()
    assert [event["offset"] for event in disk.daemon.wait_for("log-corrupt")] == [rotten]
    with disk.frontend() as frontend:
        room = frontend.room(4096)
        assert frontend.request(0, rotten // 512, room).status == IOERR
        assert frontend.read(good, 65536) == noise(MIB, "all")[good - FREE :][:65536]
    disk.daemon.stop()
    assert disk.in_image(FREE, 8192) == noise(MIB, "all")[:8192], "its neighbours are in the image"
    assert disk.in_image(rotten + 4096, MIB - 12288) == noise(MIB, "all")[12288:]
    (event,) = disk.daemon.events("statistics")
    assert event["lost_blocks"] == 1

    check = subprocess.run([VHOSTCACHE, "check", disk.cache], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert check.returncode == 2
    assert f"lost: 4096 bytes at {rotten} of the disk" in check.stdout
    drain = [VHOSTCACHE, "drain", disk.cache, "--backend", disk.image, "--ram-dir", disk.ram_dir]
    refused = subprocess.run(drain, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert refused.returncode == 1
    assert "--give-up-damaged" in refused.stderr

    disk.daemon.start()
    with disk.frontend() as frontend:
        room = frontend.room(4096)
        assert frontend.request(0, rotten // 512, room).status == IOERR, "it is not forgotten"
        assert frontend.request(1, rotten // 512, frontend.out(b"x" * 512)).status == IOERR, "nor made up"
        frontend.write(rotten, noise(4096, "again"))
        assert frontend.read(rotten, 4096) == noise(4096, "again")
        frontend.flush()
    disk.use("--drain-on-exit")
    disk.daemon.stop()
    disk.daemon.start()
    disk.daemon.stop()
    assert disk.in_image(rotten, 4096) == noise(4096, "again")
    check = subprocess.run([VHOSTCACHE, "check", disk.cache], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert "lost" not in check.stdout
