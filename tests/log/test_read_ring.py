"""What the read cache leaves on disk for the next opening."""

from __future__ import annotations

import dataclasses

from tests.log.harness import BOOT, IMAGE, NEXT_TIER, TIER, UUID, MemoryDisk
from vhostcache.eviction import Eviction
from vhostcache.log import read_ring
from vhostcache.log.recovery import close, create, recover

READ_BLOCKS = 64


def test_it_is_written_after_an_end_in_good_order_and_not_when_the_image_goes_away() -> None:
    disk = MemoryDisk(256 + READ_BLOCKS)
    create(disk, UUID, IMAGE, READ_BLOCKS)
    opened = recover(disk, None, BOOT, IMAGE, tier_uuid=TIER)
    positions = read_ring.positions_of(READ_BLOCKS)
    eviction = Eviction(positions)
    eviction.admit(77, eviction.take())
    closed = close(disk, opened.superblock, IMAGE, destaged=True)
    operations = len(disk.log)
    read_ring.save(disk, dataclasses.replace(closed, cold=True), eviction, bytes(4 * positions))
    assert len(disk.log) == operations, "nobody would believe it"
    read_ring.save(disk, closed, eviction, bytes(4 * positions))
    found = read_ring.load(disk, recover(disk, None, BOOT, IMAGE, tier_uuid=NEXT_TIER))
    assert found is not None
    assert found[0].find(77) == eviction.find(77)
