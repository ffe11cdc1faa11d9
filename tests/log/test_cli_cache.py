"""`vhostcache info`, `check`, `drain` and `dump` on the files that a killed daemon has left."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.log.harness import BLOCK, Writer, fill
from vhostcache import identity
from vhostcache.assembly import boot_id, image_of
from vhostcache.backend.file import FileBackend
from vhostcache.backend.mark import Mark
from vhostcache.cachefile import CacheFile
from vhostcache.cli import main
from vhostcache.log import recovery, tier
from vhostcache.log.format import DISCARD, extent
from vhostcache.log.tier import TierLayout
from vhostcache.tierfile import TierFolder

UUID = bytes(range(50, 66))
TIER_UUID = bytes(range(16))


@dataclass
class Left:
    """What a killed daemon leaves."""

    cache: Path
    image: Path
    ram_dir: Path

    def run(self, command: str, *more: str) -> int:
        options = [] if command == "dump" else ["--ram-dir", str(self.ram_dir)]
        with pytest.raises(SystemExit) as ended:
            main([command, str(self.cache), *options, *more])
        assert isinstance(ended.value.code, int)
        return ended.value.code

    def content(self, block: int) -> bytes:
        return self.image.read_bytes()[block * BLOCK : (block + 1) * BLOCK]


@pytest.fixture
def left(tmp_path: Path) -> Left:
    """Record 1 is durable (blocks 1, 2; 4 to 7 discarded), record 2 (block 2 again) only in the RAM tier."""
    left = Left(tmp_path / "cache", tmp_path / "image", tmp_path / "ram")
    left.image.write_bytes(b"?" * (16 * BLOCK))
    backend = FileBackend(str(left.image), read_only=False, direct=False)
    file = CacheFile.create(str(left.cache), (1 << 20) + 64 * BLOCK)
    recovery.create(file, UUID, identity.backend_facts(image_of(backend), None))
    layout = TierLayout(16, 64)
    descriptor = TierFolder(str(left.ram_dir)).create(UUID, TIER_UUID, layout.size_bytes)
    os.pwrite(descriptor, tier.pack_header(layout, UUID, boot_id(), TIER_UUID, 1), 0)
    recovered = recovery.recover(
        file, None, boot_id(), identity.backend_facts(image_of(backend), None), tier_uuid=TIER_UUID
    )
    backend.write_mark(Mark(UUID, 1, dirty=True))
    writer = Writer(file, recovered)  # type: ignore[arg-type]
    writer.record([extent(4, 4, DISCARD), extent(1, 2)], [fill(b"one"), fill(b"two")])
    writer.flush()
    os.pwrite(descriptor, fill(b"newer two"), layout.slab_offset_bytes + 5 * BLOCK)
    os.pwrite(descriptor, tier.pack_entry(2, extent(2, 1), 5), tier.entry_offset_bytes(layout, 0))
    os.pwrite(descriptor, (1).to_bytes(8, "little"), tier.HEAD_OFFSET_BYTES)
    os.close(descriptor)
    file.close()
    backend.close()
    return left


def damage(left: Left, offset: int) -> None:
    with left.cache.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_info_says_what_there_is_and_what_a_start_would_do(left: Left, capsys: pytest.CaptureFixture[str]) -> None:
    before = left.cache.read_bytes()
    assert left.run("info") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert UUID.hex() in printed
    assert "1 record," in printed
    assert "RAM tier: 1 more record, 4 KiB of data" in printed
    assert "dirty: 8 KiB of data and 16 KiB of zeroes, in 1 object of 4 MiB" in printed
    assert "A start would append to the log what only the RAM tier has" in printed
    assert left.cache.read_bytes() == before


def test_info_says_why_a_start_would_be_refused(left: Left, capsys: pytest.CaptureFixture[str]) -> None:
    for path in left.ram_dir.iterdir():
        path.unlink()
    assert left.run("info") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "A start would refuse: was not closed, and its RAM-tier file is gone" in printed
    assert "power the guest off" in printed


def test_draining_brings_log_and_ram_tier_to_the_image(left: Left, capsys: pytest.CaptureFixture[str]) -> None:
    assert left.run("check", "--backend", str(left.image)) == 1
    assert "dirty" in capsys.readouterr().out
    assert left.run("drain", "--backend", str(left.image)) == 0
    assert "24 KiB written" in capsys.readouterr().out
    assert left.content(1) == fill(b"one")
    assert left.content(2) == fill(b"newer two")
    assert left.content(3) == b"?" * BLOCK
    assert [left.content(block) for block in (4, 7)] == [bytes(BLOCK)] * 2
    assert left.content(8) == b"?" * BLOCK
    assert left.image.stat().st_size == 16 * BLOCK
    assert list(left.ram_dir.iterdir()) == []
    backend = FileBackend(str(left.image), read_only=True, direct=False)
    assert backend.read_mark() in (Mark(UUID, 2, dirty=False), None)
    backend.close()
    assert left.run("check", "--backend", str(left.image)) == 0
    assert "clean, 2 records, no damage" in capsys.readouterr().out
    assert left.run("drain", "--backend", str(left.image)) == 0
    assert "0 B written" in capsys.readouterr().out


def test_draining_without_the_ram_tier_must_be_asked_for(left: Left, capsys: pytest.CaptureFixture[str]) -> None:
    for path in left.ram_dir.iterdir():
        path.unlink()
    assert left.run("drain", "--backend", str(left.image)) == 1
    assert "--accept-lost-ram" in capsys.readouterr().err
    assert left.content(1) == b"?" * BLOCK
    assert left.run("drain", "--backend", str(left.image), "--accept-lost-ram") == 0
    assert left.content(2) == fill(b"two")


def test_check_lists_what_is_damaged_as_ranges_of_the_disk(left: Left, capsys: pytest.CaptureFixture[str]) -> None:
    assert left.run("drain", "--backend", str(left.image)) == 0
    damage(left, (1 << 20) + 2 * BLOCK + 7)  # record 1's second block
    assert left.run("check") == 2
    assert "corrupt: 4096 bytes at 8192 of the disk, record 1" in capsys.readouterr().out


def test_check_says_where_the_log_is_damaged(left: Left, capsys: pytest.CaptureFixture[str]) -> None:
    with CacheFile(str(left.cache)) as file:
        block = recovery.read_superblock(file)
        assert block is not None
        named = tier.parse((left.ram_dir / f"{UUID.hex()}.{TIER_UUID.hex()}").read_bytes())
        recovery.recover(file, named, boot_id())
    damage(left, (1 << 20) + 100)
    assert left.run("check") == 2
    assert "the log is damaged at address 64 (byte 1048576)" in capsys.readouterr().err
    assert left.run("drain", "--backend", str(left.image)) == 1
    assert left.content(1) == b"?" * BLOCK


def test_damaged_data_is_given_up_only_when_asked_for(left: Left, capsys: pytest.CaptureFixture[str]) -> None:
    with CacheFile(str(left.cache)) as file:
        named = tier.parse((left.ram_dir / f"{UUID.hex()}.{TIER_UUID.hex()}").read_bytes())
        recovery.recover(file, named, boot_id())
    damage(left, (1 << 20) + BLOCK + 7)  # record 1's first block, which nothing is newer than
    assert left.run("drain", "--backend", str(left.image), "--accept-lost-ram") == 1
    assert "--give-up-damaged" in capsys.readouterr().err
    assert left.content(2) == fill(b"newer two")
    assert left.run("check") == 2
    assert left.run("drain", "--backend", str(left.image), "--accept-lost-ram", "--give-up-damaged") == 0
    assert "given up: 4096 bytes at 4096 of the disk" in capsys.readouterr().err
    assert left.content(1) == b"?" * BLOCK
    assert left.run("drain", "--backend", str(left.image)) == 0


def test_a_foreign_image_is_refused(left: Left, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"!" * (16 * BLOCK))
    for command in ("check", "drain"):
        assert left.run(command, "--backend", str(other)) == 1
        assert "belongs to another image" in capsys.readouterr().err
    assert other.read_bytes() == b"!" * (16 * BLOCK)


def test_a_cache_in_use_is_refused(left: Left, capsys: pytest.CaptureFixture[str]) -> None:
    with CacheFile(str(left.cache)):
        for command in ("info", "check", "dump"):
            assert left.run(command) == 1
            assert "in use by another process" in capsys.readouterr().err


def test_dump_prints_a_line_a_record(left: Left, capsys: pytest.CaptureFixture[str]) -> None:
    assert left.run("dump") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("superblock") for line in lines] == ["A", "B", None, None]
    assert lines[0]["uuid"] == UUID.hex()
    assert lines[2]["seq"] == 1
    assert lines[2]["extents"][0] == {"block": 4, "count": 4, "kind": "discard"}
    assert lines[3] == {"end": 67, "next_seq": 2, "why": "there is no whole record header"}


def test_what_is_no_cache_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2 << 20))
    left = Left(path, path, tmp_path / "ram")
    for command, status in (("info", 0), ("check", 1), ("dump", 1)):
        assert left.run(command) == status
    error = capsys.readouterr().err
    assert "not a cache of vhostcache" in error
    assert "Traceback" not in error
