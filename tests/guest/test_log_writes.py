"""Record and replay of an ext4's life by a real kernel: cache and image lie on one dm-log-writes device, whose log is
replayed to every flush and to entries between them. What recovery makes of each of these moments is the disk after some
prefix of the writes, in order, which reaches to the last answered flush; and e2fsck has nothing to complain about.
"""

import os
import random
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crc32c import crc32c

from tests.guest import host, uml
from tests.guest.log_writes import DISCARD, MARK, Entry, read_log, steps
from vhostcache.errors import CacheError
from vhostcache.log import offline, recovery

MIB = 1 << 20
BLOCK = 4096
CACHE_BYTES, IMAGE_BYTES = 64 * MIB, 32 * MIB
SECTOR = 512
SOAK = int(os.environ.get("SOAK_SECONDS", "0"))
FILES = 150 if SOAK else 15
BETWEEN = 300 if SOAK else 30
CHECKED_BY_E2FSCK = 200 if SOAK else 25
CANARIES = 3

_SCRIPT = """
modprobe() {{ insmod {modules}/kernel/drivers/md/$1.ko; }}
modprobe dm-mod; modprobe dm-log-writes
dmsetup create --noudevsync ext4 --table "0 {image_sectors} log-writes /dev/ubdc /dev/ubdd"
mkfs.ext4 -q -b 4096 -J size=4 -E nodiscard,lazy_itable_init=0 /dev/dm-0
sync
dmsetup message --noudevsync ext4 0 mark made
mount -o nodiscard /dev/dm-0 {disk}
for i in $(seq {files}); do
    dd if=/dev/urandom of={disk}/new bs=5000 count=$((i % 9 + 1)) conv=fsync status=none
    mv {disk}/new {disk}/file$((i % 7))
    [ $((i % 5)) != 0 ] || rm {disk}/file$((i % 3 + 2)) || true
done
umount {disk}
dmsetup remove --noudevsync ext4
dmsetup create --noudevsync log --table "0 {all_sectors} log-writes /dev/ubda /dev/ubdb"
dmsetup create --noudevsync cache --table "0 {cache_sectors} linear /dev/dm-0 0"
dmsetup create --noudevsync image --table "0 {image_sectors} linear /dev/dm-0 {cache_sectors}"
{python} -m tests.guest.replay /dev/dm-1 /dev/dm-2 /dev/ubdd log
dmsetup remove --noudevsync cache
dmsetup remove --noudevsync image
dmsetup remove --noudevsync log
"""


class Part:
    """Some of a device's bytes, copied when they are written: a disk for recovery, an image for draining."""

    def __init__(self, device: bytearray, start: int, size_bytes: int) -> None:
        self._data = memoryview(device)[start : start + size_bytes]
        self.size_bytes = size_bytes
        self._written: dict[int, bytes] = {}

    def read(self, offset: int, size: int) -> bytes:
        if not self._written:
            return bytes(self._data[offset : offset + size])
        return b"".join(self.block(at) for at in range(offset, offset + size, BLOCK))

    def block(self, offset: int) -> bytes:
        found = self._written.get(offset)
        return bytes(self._data[offset : offset + BLOCK]) if found is None else found

    def write(self, offset: int, data: bytes) -> None:
        assert offset % BLOCK == len(data) % BLOCK == 0
        for at in range(0, len(data), BLOCK):
            self._written[offset + at] = bytes(data[at : at + BLOCK])

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:
        self.write(offset, bytes(size))

    def sync(self) -> None:
        pass

    def release(self) -> None:
        self._data.release()


class Writes:
    """All writes, and of which moments between them a disk can be."""

    def __init__(self, log: Path) -> None:
        self.count = 0
        self.made = 0
        """The file system is there after so many writes."""
        # Of each block: after how many writes it began to be what has this checksum.
        self._versions: dict[int, list[tuple[int, int]]] = {}
        disk = bytearray(IMAGE_BYTES)
        for step in steps(log):
            if step == "made":
                self.made = self.count
            if not isinstance(step, tuple):
                continue
            offset, data = step
            self.count += 1
            disk[offset : offset + len(data)] = data
            for block in range(offset // BLOCK, -(-(offset + len(data)) // BLOCK)):
                crc = crc32c(bytes(disk[block * BLOCK : (block + 1) * BLOCK]))
                self._versions.setdefault(block, [(0, crc32c(bytes(BLOCK)))]).append((self.count, crc))

    def prefixes(self, disk: Part) -> set[int]:
        """After how many of the writes, in order, the disk is what it is here."""
        zero = crc32c(bytes(BLOCK))
        changes = [0] * (self.count + 2)
        for block in range(IMAGE_BYTES // BLOCK):
            crc = crc32c(disk.block(block * BLOCK))
            versions = self._versions.get(block, [(0, zero)])
            ends = [first for first, _ in versions[1:]] + [self.count + 1]
            for (first, version), end in zip(versions, ends, strict=True):
                if version == crc:
                    changes[first] += 1
                    changes[end] -= 1
        blocks = 0
        found = set()
        for number in range(self.count + 1):
            blocks += changes[number]
            if blocks == IMAGE_BYTES // BLOCK:
                found.add(number)
        return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Entry], Writes]:
    folder = tmp_path_factory.mktemp("log-writes")
    sizes = {"device": CACHE_BYTES + IMAGE_BYTES, "log": 2048 * MIB, "ext4": IMAGE_BYTES, "ext4-log": 1024 * MIB}
    drives = []
    for name, size in sizes.items():
        drives.append(folder / name)
        with drives[-1].open("wb") as file:
            file.truncate(size)
    script = _SCRIPT.format(
        modules=sorted(uml.MODULES.iterdir())[-1],
        disk=uml.DISK,
        files=FILES,
        python=sys.executable,
        all_sectors=(CACHE_BYTES + IMAGE_BYTES) // SECTOR,
        cache_sectors=CACHE_BYTES // SECTOR,
        image_sectors=IMAGE_BYTES // SECTOR,
    )
    uml.run(script, [], folder / "uml", drives=drives, timeout_s=120 + SOAK)
    return list(read_log(folder / "log")), Writes(folder / "ext4-log")


def moments(entries: list[Entry], stops: Callable[[int, Entry], bool]) -> Iterator[tuple[int, int, bytearray]]:
    """After each entry that `stops`: its number, how many writes a flush had been answered for, and the device."""
    device = bytearray(CACHE_BYTES + IMAGE_BYTES)
    flushed = 0
    for number, entry in enumerate(entries):
        if entry.flags & MARK:
            flushed = int(entry.mark)
        elif entry.flags & DISCARD:
            device[entry.offset_bytes : entry.offset_bytes + entry.size_bytes] = bytes(entry.size_bytes)
        else:
            device[entry.offset_bytes : entry.offset_bytes + len(entry.data)] = entry.data
        if stops(number, entry):
            yield number, flushed, device


def drained(device: bytearray) -> Part:
    """The image that another boot makes of this: recovery, without the RAM tier, and everything written back."""
    cache, image = Part(device, 0, CACHE_BYTES), Part(device, CACHE_BYTES, IMAGE_BYTES)
    found = recovery.recover(cache, None, uuid.uuid4().bytes)
    offline.drain(cache, found.superblock, found.records, image)
    cache.release()
    return image


def test_each_moment_of_the_device_is_a_prefix_that_reaches_to_the_last_flush(
    recorded: tuple[list[Entry], Writes], tmp_path: Path
) -> None:
    entries, writes = recorded
    marks = [number for number, entry in enumerate(entries) if entry.flags & MARK]
    assert len(marks) >= FILES
    assert any(entry.data and entry.offset_bytes >= CACHE_BYTES for entry in entries), "nothing was destaged"
    chance = random.Random(1)
    between = set(chance.sample(range(marks[0], len(entries)), min(BETWEEN, len(entries) - marks[0])))
    checked = 0
    judged = set(chance.sample([*marks, *between], min(CHECKED_BY_E2FSCK, len(marks))))
    for number, flushed, device in moments(
        entries, lambda number, entry: bool(entry.flags & MARK) or number in between
    ):
        image = drained(device)
        prefixes = writes.prefixes(image)
        assert prefixes, f"entry {number} of {len(entries)}: no prefix of the writes makes the disk what it is"
        assert max(prefixes) >= flushed, f"entry {number}: {flushed} writes were flushed, {max(prefixes)} are there"
        if number in judged and min(prefixes) >= writes.made:
            check_ext4(image, tmp_path / "image")
            checked += 1
        image.release()
    assert flushed > writes.made
    assert checked > 0


def check_ext4(image: Part, path: Path) -> None:
    """A power failure leaves a journal to be replayed, and nothing else."""
    path.write_bytes(image.read(0, IMAGE_BYTES))
    replayed = subprocess.run(["e2fsck", "-p", path], env=host.ENVIRONMENT, capture_output=True, text=True, check=False)
    assert replayed.returncode in (0, 1), replayed.stdout + replayed.stderr
    host.check_ext4(path)


def test_a_canary_that_loses_one_write_to_the_log_is_noticed(recorded: tuple[list[Entry], Writes]) -> None:
    """The last write into the ring before a flush was answered never reached the device."""
    entries, writes = recorded
    noticed = 0
    marks = [number for number, entry in enumerate(entries) if entry.flags & MARK]
    for mark in marks[len(marks) // 2 :]:
        lost = max(n for n in range(mark) if entries[n].data and MIB <= entries[n].offset_bytes < CACHE_BYTES)
        if any(entry.data and entry.offset_bytes >= CACHE_BYTES for entry in entries[lost:mark]):
            continue  # the mark came late: what was lost is in the image by now
        if noticed == CANARIES:
            break
        changed = [*entries[:lost], *entries[lost + 1 : mark + 1]]
        *_, (_, flushed, device) = moments(changed, lambda number, _: number == mark - 1)  # noqa: B023
        try:
            image = drained(device)
        except CacheError:
            noticed += 1
            continue
        assert max(writes.prefixes(image), default=-1) < flushed
        noticed += 1
    assert noticed == CANARIES
