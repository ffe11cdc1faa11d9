"""What the tools do with a cache that no daemon has open."""

from __future__ import annotations

import json
import random

import pytest

from tests.log.harness import BLOCK, BOOT, IMAGE, fill, open_cache
from vhostcache.errors import CacheCorruptError
from vhostcache.log import offline
from vhostcache.log.format import DISCARD, LOST, ZERO, extent, offset_bytes
from vhostcache.log.recovery import Decision, close, examine, recover


class MemoryImage:
    def __init__(self, size_bytes: int) -> None:
        self.data = bytearray(b"?" * size_bytes)
        self.calls: list[tuple[str, int, int]] = []
        self.synced = False

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def write(self, offset: int, data: bytes) -> None:
        assert offset + len(data) <= len(self.data)
        self.calls.append(("write", offset, len(data)))
        self.data[offset : offset + len(data)] = data

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:
        assert offset + size <= len(self.data)
        self.calls.append(("discard" if unmap else "zero", offset, size))
        self.data[offset : offset + size] = bytes(size)

    def sync(self) -> None:
        self.synced = True


def test_draining_writes_the_newest_of_each_block_merged_per_object() -> None:
    disk, writer = open_cache()
    writer.write(3, b"old 3", b"old 4")
    writer.write(1, b"1", b"2")
    writer.record([extent(4, 2, ZERO), extent(3, 1)], [fill(b"new 3")])
    writer.record([extent(7, 1, DISCARD)])
    writer.write(9, b"9")
    writer.flush()
    recovered = recover(disk, None, b"after power loss", IMAGE)
    image = MemoryImage(10 * BLOCK)
    written = offline.drain(disk, recovered.superblock, recovered.records, image, object_bytes=8 * BLOCK)
    assert image.calls == [
        ("write", BLOCK, 3 * BLOCK),
        ("zero", 4 * BLOCK, 2 * BLOCK),
        ("discard", 7 * BLOCK, BLOCK),
        ("write", 9 * BLOCK, BLOCK),
    ]
    assert written == 7
    assert image.synced
    unknown = b"?" * BLOCK
    assert bytes(image.data) == b"".join(
        [unknown, fill(b"1"), fill(b"2"), fill(b"new 3"), bytes(2 * BLOCK), unknown, bytes(BLOCK), unknown, fill(b"9")]
    )
    closed = close(disk, recovered.superblock, IMAGE, destaged=True)
    assert disk.superblocks == (closed, closed)
    finding = examine(disk, None, BOOT, IMAGE)
    assert finding.decision is Decision.WARM
    assert not finding.is_dirty
    assert offline.DirtyMap(recovered.records, closed.clean_address).objects == []


def test_what_is_clean_is_not_drained_again() -> None:
    disk, writer = open_cache()
    writer.write(1, b"on the image")
    writer.flush()
    writer.checkpoint(destaged=True)
    writer.write(2, b"not yet")
    writer.flush()
    recovered = recover(disk, None, b"after power loss", IMAGE)
    image = MemoryImage(10 * BLOCK)
    assert offline.drain(disk, recovered.superblock, recovered.records, image) == 1
    assert image.calls == [("write", 2 * BLOCK, BLOCK)]


def test_draining_does_what_replaying_every_record_would() -> None:
    for seed in range(100):
        rng = random.Random(seed)
        disk, writer = open_cache(200)
        expected = bytearray(b"?" * 40 * BLOCK)
        for n in range(rng.randrange(1, 25)):
            extents = []
            for _ in range(rng.randrange(3)):
                first = rng.randrange(40)
                extents.append(extent(first, rng.randrange(1, 41 - first), rng.choice((ZERO, DISCARD))))
            for word in extents:
                first, count = word & 0xFF, word >> 40 & 0xFF
                expected[first * BLOCK : (first + count) * BLOCK] = bytes(count * BLOCK)
            block = rng.randrange(37)
            payload = [fill(b"%d:%d" % (n, at)) for at in range(rng.randrange(1, 4))]
            expected[block * BLOCK : (block + len(payload)) * BLOCK] = b"".join(payload)
            writer.record([*extents, extent(block, len(payload))], payload)
        writer.flush()
        recovered = recover(disk, None, b"after power loss", IMAGE)
        image = MemoryImage(40 * BLOCK)
        offline.drain(disk, recovered.superblock, recovered.records, image, object_bytes=16 * BLOCK)
        assert image.data == expected, f"seed {seed}"


def test_an_image_that_ends_within_a_block_is_written_up_to_its_end() -> None:
    disk, writer = open_cache()
    writer.write(1, b"x")
    writer.record([extent(2, 1, ZERO)])
    writer.flush()
    recovered = recover(disk, None, b"after power loss", IMAGE)
    for size in (2 * BLOCK - 512, 2 * BLOCK + 512):
        image = MemoryImage(size)
        offline.drain(disk, recovered.superblock, recovered.records, image)
        assert bytes(image.data[BLOCK : 2 * BLOCK]) == fill(b"x")[: size - BLOCK]


def test_a_discard_of_a_terabyte_is_a_whole_state_of_each_object() -> None:
    disk, writer = open_cache()
    writer.write(1000, b"x")
    writer.record([extent(block, 1 << 19, DISCARD) for block in range(0, 1 << 24, 1 << 19)])
    writer.flush()
    recovered = recover(disk, None, b"after power loss", IMAGE)
    dirty = offline.DirtyMap(recovered.records, recovered.clean_address)
    assert len(dirty.objects) == 1 << 14
    assert [(run.block, run.count, run.kind) for run in dirty.runs(0)] == [(0, 1024, DISCARD)]


def test_what_is_damaged_is_listed_and_never_written() -> None:
    disk, writer = open_cache()
    writer.write(0, b"0", b"1", b"2", b"3", b"4")
    writer.write(8, b"8")
    writer.flush()
    writer.checkpoint()
    for index in (1, 2, 4):
        disk.flip(offset_bytes(writer.addresses[1] + 1 + index, 64) + 5)
    finding = examine(disk, None, b"after power loss", IMAGE)
    assert finding.error is None
    assert finding.walk is not None
    assert finding.superblock is not None
    assert offline.check_payload(disk, finding.superblock, finding.walk.records) == [
        offline.CorruptRange(BLOCK, 2 * BLOCK, 1),
        offline.CorruptRange(4 * BLOCK, BLOCK, 1),
    ]
    image = MemoryImage(10 * BLOCK)
    with pytest.raises(CacheCorruptError, match="2 ranges are damaged, the first 8192 bytes at 4096"):
        offline.drain(disk, finding.superblock, finding.walk.records, image)
    assert image.calls == [("write", 0, BLOCK), ("write", 3 * BLOCK, BLOCK), ("write", 8 * BLOCK, BLOCK)]
    assert image.synced


def test_the_summary_names_the_dirtiest_objects_first() -> None:
    disk, writer = open_cache()
    writer.write(1024, b"a", b"b")
    writer.write(5, b"c")
    writer.record([extent(2048, 10, ZERO)])
    writer.flush()
    recovered = recover(disk, None, b"after power loss", IMAGE)
    assert offline.DirtyMap(recovered.records, recovered.clean_address).summary() == [
        (1, 2, 0, 0),
        (0, 1, 0, 0),
        (2, 0, 10, 0),
    ]


def test_what_a_daemon_has_noted_as_lost_is_not_drained_unless_it_was_overwritten() -> None:
    disk, writer = open_cache()
    writer.write(0, b"0", b"1", b"2", b"3", b"4", b"5", b"6")
    writer.record([extent(1, 4, LOST), extent(5, 1, LOST), extent(6, 1, LOST)])
    writer.record([extent(6, 1, DISCARD), extent(2, 1)], [fill(b"two")])
    writer.flush()
    recovered = recover(disk, None, b"after power loss", IMAGE)
    lost = [offline.CorruptRange(at * BLOCK, count * BLOCK, 0) for at, count in ((1, 1), (3, 3))]
    dirty = offline.DirtyMap(recovered.records, recovered.clean_address)
    assert dirty.lost() == lost
    assert dirty.summary() == [(0, 2, 1, 4)]
    image = MemoryImage(10 * BLOCK)
    with pytest.raises(CacheCorruptError, match="2 ranges are damaged, the first 4096 bytes at 4096"):
        offline.drain(disk, recovered.superblock, recovered.records, image)
    assert image.calls == [("write", 0, BLOCK), ("write", 2 * BLOCK, BLOCK), ("discard", 6 * BLOCK, BLOCK)]
    given_up: list[offline.CorruptRange] = []
    offline.drain(disk, recovered.superblock, recovered.records, image, give_up=given_up.extend)
    assert given_up == lost


def test_records_are_listed_for_json() -> None:
    disk, writer = open_cache()
    writer.record([extent(4, 2, ZERO), extent(3, 1)], [fill(b"new 3")])
    writer.flush()
    recovered = recover(disk, None, b"after power loss", IMAGE)
    (line,) = offline.dump(disk, recovered.superblock, recovered.records)
    assert json.loads(json.dumps(line)) == {
        "seq": 1,
        "address": 64,
        "offset_bytes": 1 << 20,
        "epoch": 1,
        "header_blocks": 1,
        "payload_blocks": 1,
        "durable_seq": 0,
        "extents": [{"block": 4, "count": 2, "kind": "zero"}, {"block": 3, "count": 1, "kind": "data"}],
    }


def test_what_cannot_be_read_is_listed_and_everything_else_is_drained() -> None:
    disk, writer = open_cache()
    writer.write(0, b"0", b"1", b"2", b"3")
    writer.write(8, b"8")
    writer.flush()
    writer.checkpoint()
    disk.bad = {offset_bytes(writer.addresses[1] + 1 + 2, 64)}
    recovered = recover(disk, None, b"after power loss", IMAGE)
    damaged = [offline.CorruptRange(2 * BLOCK, BLOCK, 1)]
    assert offline.check_payload(disk, recovered.superblock, recovered.records) == damaged
    image = MemoryImage(10 * BLOCK)
    with pytest.raises(CacheCorruptError, match="1 ranges are damaged, the first 4096 bytes at 8192"):
        offline.drain(disk, recovered.superblock, recovered.records, image)
    assert image.calls == [("write", 0, 2 * BLOCK), ("write", 3 * BLOCK, BLOCK), ("write", 8 * BLOCK, BLOCK)]
    assert image.synced
    given_up: list[offline.CorruptRange] = []
    offline.drain(disk, recovered.superblock, recovered.records, image, give_up=given_up.extend)
    assert given_up == [offline.CorruptRange(2 * BLOCK, BLOCK, 0)]
    disk.bad.clear()
    offline.drain(disk, recovered.superblock, recovered.records, image)
    assert image.data[2 * BLOCK : 3 * BLOCK] == fill(b"2"), "the fault has passed"
