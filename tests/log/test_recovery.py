"""Recovery: what was durable is there again, what was acknowledged in this boot too, and nothing else ever is."""

from __future__ import annotations

import dataclasses
import random

import pytest

from tests.log.harness import (
    BLOCK,
    BOOT,
    IMAGE,
    NEXT_TIER,
    OTHER_BOOT,
    TIER,
    UUID,
    CrashError,
    MemoryDisk,
    TierFile,
    Writer,
    contents,
    fill,
    new_cache,
    open_cache,
)
from vhostcache.errors import CacheCorruptError, CacheError
from vhostcache.log import superblock as superblocks
from vhostcache.log.format import DISCARD, PAD, ZERO, extent, offset_bytes
from vhostcache.log.recovery import Decision, Recovered, create, examine, named_tier, recover

NEW_BOOT = b"after power loss"


def after_power_loss(disk: MemoryDisk) -> Recovered:
    return recover(disk, None, NEW_BOOT, IMAGE, tier_uuid=NEXT_TIER)


def blocks_of(recovered: Recovered, disk: MemoryDisk) -> dict[int, bytes | None]:
    return contents(disk, recovered.records, recovered.ring_blocks)


def offset(disk: MemoryDisk, address: int) -> int:
    return offset_bytes(address, disk.superblock.ring_blocks)


def refused(disk: MemoryDisk, **more: object) -> CacheError:
    """The error of a start, after making sure that it has changed nothing."""
    before = bytes(disk.data)
    with pytest.raises(CacheError) as caught:
        recover(disk, more.pop("tier", None), more.pop("boot", NEW_BOOT), more.pop("image", IMAGE))  # type: ignore[arg-type]
    assert bytes(disk.data) == before
    assert "\n" not in str(caught.value)
    return caught.value


# A log of its own.


def test_a_new_cache_is_empty_and_opens() -> None:
    disk = new_cache()
    finding = examine(disk, None, BOOT, IMAGE)
    assert finding.decision is Decision.WARM
    assert not finding.is_dirty
    recovered = recover(disk, None, BOOT, IMAGE, tier_uuid=TIER)
    assert recovered.superblock.epoch == 1
    assert (recovered.next_seq, recovered.head_address, recovered.records) == (1, 64, [])
    assert disk.superblocks == (recovered.superblock, recovered.superblock)
    assert named_tier(disk) == (UUID, TIER)


def test_creation_that_is_interrupted_leaves_no_cache_or_a_good_one() -> None:
    for operations in range(20):
        disk, writer = open_cache()
        writer.write(1, b"old")
        writer.flush()
        for _ in range(5):
            writer.checkpoint()
        disk.operations_left = operations
        try:
            create(disk, b"another cache!!!", IMAGE)
        except CrashError:
            disk.lose_power(random.Random(operations))
            finding = examine(disk, None, NEW_BOOT, IMAGE)
            old_one = finding.superblock is not None and finding.superblock.uuid == UUID
            assert finding.error is not None or old_one or not finding.is_dirty
            assert not old_one or operations <= 1
            continue
        assert examine(disk, None, NEW_BOOT, IMAGE).is_dirty is False
        return
    pytest.fail("it never ends")


def test_what_was_flushed_is_there_after_power_loss() -> None:
    disk, writer = open_cache()
    writer.write(1, b"one", b"two")
    writer.record([extent(50, 10, DISCARD), extent(2, 1)], [fill(b"new two")])
    writer.flush()
    recovered = after_power_loss(disk)
    assert recovered.next_seq == 3
    assert recovered.durable_seq == 2
    found = blocks_of(recovered, disk)
    assert found[1] == fill(b"one")
    assert found[2] == fill(b"new two")
    assert found[55] is None
    assert recovered.superblock.boot_id == NEW_BOOT
    assert recovered.superblock.epoch == 2
    assert recovered.superblock.open_seq == 3
    assert recovered.superblock.durable_address == recovered.head_address


def test_after_power_loss_the_log_is_a_prefix_that_reaches_to_the_last_flush() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        disk, writer = open_cache(40)
        flushed = 0
        for n in range(rng.randrange(1, 12)):
            writer.write(rng.randrange(4), b"%d" % n, *[b"%d+" % n] * rng.randrange(3))
            if rng.random() < 0.3:
                writer.flush()
                flushed = writer.durable_seq
                if rng.random() < 0.5:
                    writer.checkpoint(tail_seq=max(1, flushed - 2), destaged=True)
        kept = [seq for seq in writer.addresses if seq >= writer.block.tail_seq]
        disk.lose_power(rng)
        recovered = after_power_loss(disk)
        assert [record.seq for record in recovered.records] == kept[: len(recovered.records)], f"seed {seed}"
        assert recovered.durable_seq >= flushed, f"seed {seed}"


def test_a_log_that_is_cut_at_any_block_is_a_prefix_or_refused() -> None:
    whole, writer = open_cache()
    for n in range(1, 5):
        writer.write(n, *[b"%d" % n] * n)
    writer.record([extent(9, 3, ZERO)])
    writer.flush()
    durable = writer.block.durable_address
    writer.checkpoint()
    writer.write(20, b"x", b"y")
    writer.record([extent(30, 40, DISCARD), extent(3, 1)], [fill(b"z")])
    durable = writer.durable_address
    ends = {**{address: seq - 1 for seq, address in writer.addresses.items()}, writer.address: writer.seq - 1}
    for address in range(64, writer.address + 1):
        disk = whole.copy()
        at = offset(disk, address)
        disk.data[at:] = bytes(len(disk.data) - at)
        if address < durable:
            error = refused(disk)
            assert isinstance(error, CacheCorruptError)
            assert "damaged at address" in str(error)
            continue
        expected = max(seq for end, seq in ends.items() if end <= address)
        recovered = after_power_loss(disk)
        assert recovered.durable_seq == expected
        assert recovered.head_address == max(end for end in ends if end <= address)


def test_a_cache_file_that_is_cut_short_is_refused() -> None:
    whole, writer = open_cache()
    writer.write(1, b"one")
    writer.flush()
    for blocks in (0, 1, 2, 255, 256, 257, 300, 319):
        disk = whole.copy()
        del disk.data[blocks * BLOCK :]
        assert "truncated" in str(refused(disk)) or blocks < 256


def test_a_cache_file_may_have_grown() -> None:
    disk, writer = open_cache()
    writer.write(1, b"one")
    writer.flush()
    disk.data += bytes(10 * BLOCK)
    assert after_power_loss(disk).ring_blocks == 64


def test_the_log_goes_over_the_end_of_its_ring_again_and_again() -> None:
    disk, writer = open_cache(16)
    for n in range(50):
        writer.write(n, b"%d" % n, b"more")
        writer.flush()
        writer.checkpoint(tail_seq=max(writer.block.tail_seq, writer.seq - 2), destaged=True)
        recovered = after_power_loss(disk.copy())
        assert recovered.next_seq == writer.seq
        assert recovered.head_address == writer.address
    assert writer.address > 16 * 10


def test_a_pad_is_part_of_the_log() -> None:
    disk, writer = open_cache(16)
    writer.write(1, *[b"a"] * 9)
    writer.flush()
    writer.checkpoint(tail_seq=2, destaged=True)
    writer.write(2, *[b"b"] * 9)
    writer.flush()
    recovered = after_power_loss(disk)
    pad, record = recovered.records
    assert (pad.seq, pad.extents, pad.payload_blocks) == (2, (extent(0, 5, PAD),), 0)
    assert (record.seq, record.address) == (3, 32)


def test_a_request_of_four_mebibytes_is_one_record() -> None:
    disk, writer = open_cache(1100)
    writer.record([extent(0, 1024)], [fill(b"large")] * 1024)
    writer.flush()
    disk.flip(offset(disk, 1100 + 1025))
    assert after_power_loss(disk.copy()).next_seq == 1
    disk.flip(offset(disk, 1100 + 1025))
    recovered = after_power_loss(disk)
    assert recovered.next_seq == 2
    assert recovered.records[0].header_blocks == 2
    assert len(recovered.records[0].crcs) == 1024


def test_records_can_be_visited_instead_of_kept() -> None:
    disk, writer = open_cache()
    tier = TierFile()
    writer.write(1, b"one")
    writer.flush()
    tier.publish(2, 5, fill(b"five"))
    seen: list[int] = []
    recovered = recover(
        disk, tier.parse(), BOOT, IMAGE, tier_uuid=NEXT_TIER, visit=lambda record: seen.append(record.seq)
    )
    assert seen == [1, 2]
    assert recovered.records == []


def test_a_start_reads_no_payload_below_the_durable_address() -> None:
    disk, writer = open_cache(3000)
    for n in range(10):
        writer.write(n * 256, *[b"x"] * 256)
    writer.flush()
    writer.checkpoint()
    disk.flip(offset(disk, 3000 + 20))
    disk.read_bytes = 0
    assert after_power_loss(disk).next_seq == 11
    # Ten headers, the superblocks, and a few megabytes behind the end in search of later records.
    assert disk.read_bytes < 5 << 20
    assert disk.read_bytes >= 12 * BLOCK


# Epochs.


def test_records_of_an_older_epoch_behind_the_end_do_not_come_back() -> None:
    """Records 2 and 3 are not durable, 2 is lost; in the next epoch a new record 2 of the same size ends before 3."""
    disk, writer = open_cache()
    writer.write(1, b"one")
    writer.flush()
    before = bytes(disk.data)
    writer.write(2, b"lost")
    at = writer.address
    writer.write(3, b"ghost")
    disk.sync()
    lost = offset(disk, at - 2)
    disk.data[lost : lost + 2 * BLOCK] = before[lost : lost + 2 * BLOCK]
    recovered = after_power_loss(disk)
    assert recovered.next_seq == 2
    second = Writer(disk, recovered)
    second.write(2, b"new")
    second.flush()
    again = recover(disk, None, OTHER_BOOT, IMAGE)
    assert again.next_seq == 3
    assert blocks_of(again, disk) == {1: fill(b"one"), 2: fill(b"new")}


def test_records_of_the_lap_before_are_no_records() -> None:
    disk, writer = open_cache(8)
    for n in range(8):
        writer.write(n, b"%d" % n)
        writer.flush()
        writer.checkpoint(tail_seq=writer.seq - 1, destaged=True)
    recovered = after_power_loss(disk)
    assert recovered.head_address == 8 + 16
    assert [record.seq for record in recovered.records] == [8]


@pytest.mark.parametrize("copy", [0, 1])
def test_a_rotten_superblock_costs_nothing_at_any_moment(copy: int) -> None:
    """Hazard 4: the other copy knows the epoch too."""
    for epochs in range(1, 4):
        disk, writer = open_cache()
        for epoch in range(epochs):
            writer.write(epoch, b"epoch %d" % epoch)
            writer.flush()
            writer = Writer(disk, recover(disk, None, b"boot number %4d" % epoch, IMAGE))
        writer.write(9, b"last")
        writer.flush()
        disk.flip(copy * BLOCK + 100)
        recovered = after_power_loss(disk)
        assert recovered.durable_seq == epochs + 1
        assert disk.superblocks == (recovered.superblock, recovered.superblock)


def test_two_rotten_superblocks_are_refused() -> None:
    disk, _ = open_cache()
    disk.flip(100)
    disk.flip(BLOCK + 200)
    error = refused(disk)
    assert isinstance(error, CacheCorruptError)
    assert "both superblocks are damaged" in str(error)


def test_what_is_no_cache_or_of_another_version_is_refused() -> None:
    disk = MemoryDisk(64)
    assert "not a cache of vhostcache" in str(refused(disk))
    disk = new_cache()
    for copy in (0, BLOCK):
        disk.data[copy + 8] = 2
    assert "format version 2" in str(refused(disk))


def test_a_superblock_that_contradicts_itself_is_refused() -> None:
    disk = new_cache()
    for change in ({"tail_address": 100}, {"durable_address": 64 + 65, "clean_address": 64}, {"tail_seq": 5}):
        block = dataclasses.replace(disk.superblock, **change)  # type: ignore[arg-type]
        damaged = disk.copy()
        damaged.data[:BLOCK] = damaged.data[BLOCK : 2 * BLOCK] = block.pack()
        assert "contradict" in str(refused(damaged))


# Damage.


def test_damage_below_the_durable_address_is_reported_and_never_cut_off() -> None:
    whole, writer = open_cache()
    for n in range(1, 6):
        writer.write(n, b"%d" % n)
    writer.flush()
    writer.checkpoint()
    for seq, address in writer.addresses.items():
        disk = whole.copy()
        disk.flip(offset(disk, address) + 200)
        error = refused(disk)
        assert isinstance(error, CacheCorruptError)
        assert f"damaged at address {address} " in str(error)
        assert f"expected record {seq};" in str(error)


def test_damage_between_the_durable_address_and_the_last_flush_is_found_by_looking_ahead() -> None:
    """Hazard 6: a record written after the flush says how far that reached."""
    whole, writer = open_cache()
    for n in range(1, 4):
        writer.write(n, b"%d" % n)
    writer.flush()
    writer.write(4, b"four")
    writer.write(5, b"five")
    for seq in (1, 2, 3):
        for byte in (10, 200):  # magic, the rest of the header
            disk = whole.copy()
            disk.flip(offset(disk, writer.addresses[seq]) + byte)
            error = refused(disk)
            assert isinstance(error, CacheCorruptError)
            assert f"record {seq}, which record" in str(error)
        # Damaged payload does not end the log: it is found when it is read, like damage below the durable address.
        disk = whole.copy()
        disk.flip(offset(disk, writer.addresses[seq]) + BLOCK)
        assert after_power_loss(disk).durable_seq == 5
    # 4 was never flushed: without it the log simply ends.
    disk = whole.copy()
    disk.flip(offset(disk, writer.addresses[4]))
    assert after_power_loss(disk).durable_seq == 3


def test_damage_to_the_last_flushed_record_is_ambiguous_and_ends_the_log() -> None:
    """As docs/log-format.md says: it looks like power loss before the flush."""
    disk, writer = open_cache()
    writer.write(1, b"one")
    writer.flush()
    writer.write(2, b"two")
    writer.flush()
    disk.flip(offset(disk, writer.addresses[2]) + BLOCK)
    assert after_power_loss(disk).durable_seq == 1


def test_bad_sectors_under_data_known_to_be_durable_and_in_free_space_keep_no_log_from_being_opened() -> None:
    disk, writer = open_cache()
    for n in range(1, 6):
        writer.write(n, b"%d" % n)
    writer.flush()
    writer.write(6, b"six")  # says that the others were durable
    for seq in range(1, 6):
        disk.bad.add(offset(disk, writer.addresses[seq] + 1))
    disk.bad |= {offset(disk, writer.address + 1), offset(disk, writer.address + 7)}
    assert after_power_loss(disk).durable_seq == 6


def test_bad_sectors_under_headers_are_damage_or_not_known_to_be_none() -> None:
    whole, writer = open_cache()
    for n in range(1, 4):
        writer.write(n, b"%d" % n)
    writer.flush()
    writer.checkpoint()
    writer.write(4, b"four")
    writer.flush()
    for seq, what in ((1, "damaged at address 64 "), (3, "expected record 3;"), (4, "where record 4 may be")):
        disk = whole.copy()
        disk.bad = {offset(disk, writer.addresses[seq])}
        error = refused(disk)
        assert isinstance(error, CacheCorruptError)
        assert what in str(error)
        assert "cannot be read at byte" in str(error)
    for address in (writer.addresses[4] + 1, writer.address):
        disk = whole.copy()
        disk.bad = {offset(disk, address)}
        assert "try again" in str(refused(disk)), "nothing is cut off because a device fails for a moment"
        disk.bad.clear()
        assert after_power_loss(disk).durable_seq == 4


def test_a_later_record_that_survived_power_loss_alone_is_no_damage() -> None:
    disk, writer = open_cache()
    writer.write(1, b"one")
    writer.flush()
    writer.write(2, b"two")
    writer.write(3, b"three")
    at = offset(disk, writer.addresses[2])
    disk.data[at : at + BLOCK] = bytes(BLOCK)
    assert after_power_loss(disk).durable_seq == 1


def test_any_bit_that_flips_is_harmless_or_reported() -> None:
    whole, writer = open_cache(32)
    for n in range(8):
        writer.write(n, b"%d" % n)
        if n % 3 == 0:
            writer.flush()
    writer.flush()
    writer.checkpoint()
    true = contents(whole, recover(whole.copy(), None, NEW_BOOT, IMAGE).records, 32)
    rng = random.Random(6)
    for _ in range(300):
        disk = whole.copy()
        disk.flip(rng.randrange(len(disk.data)), rng.randrange(8))
        try:
            recovered = after_power_loss(disk)
        except CacheCorruptError:
            continue
        # A wrong payload is found when it is read, by its crc.
        assert {block: len(content or b"") for block, content in blocks_of(recovered, disk).items()} == dict.fromkeys(
            true, BLOCK
        )


# The RAM tier.


def crashed(ring_blocks: int = 64) -> tuple[MemoryDisk, Writer, TierFile]:
    """The process died: records 1 and 2 are durable, 3 is written, 4 and 5 are only in the RAM tier."""
    disk, writer = open_cache(ring_blocks)
    tier = TierFile(slots=128)
    for seq in (1, 2, 3):
        tier.publish(seq, seq, fill(b"%d" % seq))
        writer.write(seq, b"%d" % seq)
        if seq == 2:
            writer.flush()
            tier.retire(2)
    for block in (9, 8, 40, 8):
        tier.publish(4, block, fill(b"4: %d, %d" % (block, tier.head)))
    tier.publish_entry(5, extent(1, 3, DISCARD))
    tier.publish(5, 2, fill(b"newer than its discard"))
    return disk, writer, tier


CRASHED = {
    1: None,
    2: fill(b"newer than its discard"),
    3: None,
    8: fill(b"4: 8, 6"),
    9: fill(b"4: 9, 3"),
    40: fill(b"4: 40, 5"),
}


def restart(disk: MemoryDisk, tier: TierFile, boot: bytes = BOOT) -> Recovered:
    return recover(disk, tier.parse(), boot, IMAGE, tier_uuid=NEXT_TIER)


def test_what_was_acknowledged_survives_the_process() -> None:
    disk, _, tier = crashed()
    recovered = restart(disk, tier)
    assert recovered.finding.decision is Decision.REPLAY
    assert recovered.durable_seq == 5
    assert blocks_of(recovered, disk) == CRASHED
    assert disk.unsynced == []
    assert recovered.superblock.tier_uuid == NEXT_TIER
    # The next one finds it all in the log, the new tier being empty.
    again = recover(disk, TierFile(NEXT_TIER, 2).parse(), BOOT, IMAGE, tier_uuid=b"x" * 16)
    assert blocks_of(again, disk) == CRASHED
    assert again.records == recovered.records
    assert again.superblock.epoch == 3


def test_a_crash_during_recovery_changes_nothing_of_its_result() -> None:
    """Hazards 5 and 13: after every write and sync, as often as it likes, over the end of the ring too."""
    for ring_blocks in (24, 25, 26, 64):
        reference, _, tier = crashed(ring_blocks)
        expected = restart(reference, tier)
        for operations in range(20):
            disk, _, tier = crashed(ring_blocks)
            for attempt in range(3):
                disk.operations_left = operations
                try:
                    restart_with_what_is_named(disk, tier)
                except CrashError:
                    disk.operations_left = -1
                    # And a superblock rots as well.
                    rotten = disk.copy()
                    if all(rotten.superblocks):
                        rotten.flip(attempt % 2 * BLOCK + 50)
                    assert blocks_of(restart_with_what_is_named(rotten, tier), rotten) == CRASHED
            disk.operations_left = -1
            recovered = restart_with_what_is_named(disk, tier)
            assert blocks_of(recovered, disk) == CRASHED
            assert recovered.head_address == expected.head_address
            assert recovered.next_seq == expected.next_seq


def restart_with_what_is_named(disk: MemoryDisk, tier: TierFile) -> Recovered:
    """As the daemon: it opens the file that the superblock names, which is the first or one that is still empty."""
    named = named_tier(disk)
    assert named is not None
    there = tier if named[1] == TIER else TierFile(named[1], disk.superblock.epoch)
    return recover(disk, there.parse(), BOOT, IMAGE, tier_uuid=b"tier of epoch %2d" % (disk.superblock.epoch + 1))


def test_power_loss_during_recovery_leaves_a_prefix() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        disk, _, tier = crashed(24)
        for _ in range(rng.randrange(1, 4)):
            disk.operations_left = rng.randrange(25)
            try:
                restart_with_what_is_named(disk, tier)
                break
            except CrashError:
                continue
        disk.operations_left = -1
        disk.lose_power(rng)
        recovered = after_power_loss(disk)
        assert recovered.durable_seq >= 2, f"seed {seed}"
        found = blocks_of(recovered, disk)
        two = {1: fill(b"1"), 2: fill(b"2")}
        three = two | {3: fill(b"3")}
        four = three | {block: content for block, content in CRASHED.items() if block > 3}
        assert found in (two, three, four, CRASHED), f"seed {seed}"


def test_a_record_in_the_log_beats_its_twin_in_the_tier() -> None:
    disk, _, tier = crashed()
    at = tier.layout.slab_offset_bytes + 5 * BLOCK  # record 3's slot, free for others since it was written
    tier.data[at : at + BLOCK] = fill(b"something else")
    recovered = restart(disk, tier)
    assert recovered.records[2].seq == 3
    offset_3 = offset(disk, recovered.records[2].address + 1)
    assert bytes(disk.data[offset_3 : offset_3 + BLOCK]) == fill(b"3")


def test_a_tier_without_its_log_record_is_appended_in_place_of_it() -> None:
    """Record 3 was on its way to the disk, and did not arrive."""
    disk, writer, tier = crashed()
    at = offset(disk, writer.addresses[3])
    disk.data[at : at + 2 * BLOCK] = bytes(2 * BLOCK)
    recovered = restart(disk, tier)
    assert blocks_of(recovered, disk) == CRASHED
    assert [record.seq for record in recovered.records] == [1, 2, 3, 4, 5]


def test_an_unclean_start_in_the_same_boot_without_the_tier_is_refused() -> None:
    """Hazard 12: somebody has removed the file, and the guest lives."""
    disk, _, _ = crashed()
    error = refused(disk, boot=BOOT)
    assert "its RAM-tier file is gone" in str(error)
    assert not isinstance(error, CacheCorruptError)
    recovered = recover(disk, None, BOOT, IMAGE, accept_lost_tier=True)
    assert recovered.durable_seq == 3


def test_an_unclean_start_in_another_boot_needs_no_tier_and_takes_none() -> None:
    disk, _, tier = crashed()
    assert restart(disk.copy(), tier, NEW_BOOT).durable_seq == 3
    assert after_power_loss(disk).durable_seq == 3


def test_the_tier_of_something_else_is_refused() -> None:
    for strange in (
        TierFile(NEXT_TIER),  # of another opening
        TierFile(uuid=b"another cache..."),
        TierFile(epoch=2),  # younger than the cache file, which is an old copy
    ):
        disk, _, _ = crashed()
        assert "another opening" in str(refused(disk, boot=BOOT, tier=strange.parse()))
    disk, _, tier = crashed()
    assert "another opening" in str(
        refused(disk, boot=BOOT, tier=dataclasses.replace(tier.parse(), boot_id=OTHER_BOOT))
    )


def test_the_tier_of_an_older_opening_is_refused() -> None:
    disk, _, tier = crashed()
    restart(disk, tier)
    assert "another opening" in str(refused(disk, boot=BOOT, tier=tier.parse()))


def test_a_damaged_tier_is_refused() -> None:
    disk, _, tier = crashed()
    tier.publish_entry(5, extent(1, 2), 3)
    error = refused(disk, boot=BOOT, tier=tier.parse())
    assert isinstance(error, CacheCorruptError)
    assert "RAM-tier file is damaged" in str(error)


def test_a_clean_start_needs_no_tier_and_ignores_one() -> None:
    disk, writer, tier = crashed()
    writer.write(4, b"four")
    writer.flush()
    writer.checkpoint(clean=True)
    assert named_tier(disk) is None
    for given in (None, tier.parse()):
        recovered = recover(disk.copy(), given, BOOT, IMAGE, tier_uuid=NEXT_TIER)
        assert recovered.finding.decision is Decision.WARM
        assert recovered.durable_seq == 4


def test_what_cannot_be_read_is_not_needed_when_the_tier_has_it() -> None:
    whole, writer, tier = crashed(5000)
    for address in (writer.addresses[3], writer.addresses[3] + 1):
        disk = whole.copy()
        disk.bad = {offset(disk, address)}
        assert blocks_of(restart(disk, tier), disk) == CRASHED
    disk = whole.copy()
    disk.bad = {offset(disk, writer.addresses[2])}
    assert "where record 2 may be" in str(refused(disk, boot=BOOT, tier=tier.parse()))


def test_durable_records_that_are_missing_before_the_tier_are_damage() -> None:
    disk, writer, tier = crashed(5000)
    at = offset(disk, writer.addresses[2])
    disk.data[at : at + BLOCK] = bytes(BLOCK)
    error = refused(disk, boot=BOOT, tier=tier.parse())
    assert isinstance(error, CacheCorruptError)
    assert "record 3" in str(error)


def test_what_the_tier_has_for_a_pad_lets_the_log_go_on() -> None:
    """The pad was not written; the record behind it gets a number less, or its own pad."""
    disk, writer = open_cache(16)
    tier = TierFile()
    writer.write(1, *[b"a"] * 9)
    writer.flush()
    writer.checkpoint(tail_seq=2, destaged=True)
    for block in range(9):
        tier.publish(3, block, fill(b"b%d" % block))
    recovered = restart(disk, tier)
    assert [record.seq for record in recovered.records] == [2, 3]
    assert recovered.records[1].address == 32


def test_a_log_without_room_for_the_tier_is_refused() -> None:
    disk, writer = open_cache(8)
    tier = TierFile()
    writer.write(1, *[b"a"] * 6)
    writer.flush()
    tier.publish(2, 1, fill(b"no room"))
    with pytest.raises(CacheError, match="no room"):
        restart(disk, tier)


# The image.


def test_the_cache_of_another_image_is_refused() -> None:
    disk, _, _ = crashed()
    error = refused(disk, image=dataclasses.replace(IMAGE, identity=b"8:1:99"))
    assert "another image (8:1:1234)" in str(error)


def closed(*, dirty: bool) -> MemoryDisk:
    disk, writer = open_cache()
    writer.write(1, b"one")
    writer.write(2, b"two")
    writer.flush()
    writer.checkpoint(clean=True, destaged=not dirty)
    return disk


@pytest.mark.parametrize("change", [{"size_bytes": 1 << 29}, {"mtime_ns": 5}])
def test_an_image_that_was_changed_since_an_orderly_end_makes_the_cache_cold_if_that_is_safe(
    change: dict[str, int],
) -> None:
    """Hazard 11."""
    image = dataclasses.replace(IMAGE, **change)
    assert "data here that it does not have" in str(refused(closed(dirty=True), image=image))
    disk = closed(dirty=False)
    recovered = recover(disk, None, BOOT, image)
    assert recovered.finding.decision is Decision.COLD
    assert recovered.records == []
    assert recovered.tail_address == recovered.head_address == 64 + 4
    assert recovered.next_seq == recovered.tail_seq == 3
    assert disk.superblock.backend_size_bytes == image.size_bytes
    assert recover(disk, None, BOOT, image).next_seq == 3


def test_an_image_that_has_only_grown_is_used_as_it_is() -> None:
    """As a resize leaves it that was cut short between the image and the superblocks."""
    grown = dataclasses.replace(IMAGE, size_bytes=1 << 31, mtime_ns=7)
    for image, boot in ((dataclasses.replace(grown, is_marked=True), NEW_BOOT), (grown, BOOT)):
        disk, _, tier = crashed()
        recovered = recover(disk, tier.parse() if boot == BOOT else None, boot, image)
        assert recovered.finding.decision in (Decision.WARM, Decision.REPLAY)
        assert disk.superblock.backend_size_bytes == 1 << 31
        # And not back again.
        assert "the image has 1073741824 bytes, and had 2147483648" in str(
            refused(disk, tier=None, boot=NEW_BOOT, image=dataclasses.replace(image, size_bytes=1 << 30))
        )


def test_an_image_that_has_grown_is_refused_where_its_growth_is_not_all_that_may_have_happened() -> None:
    grown = dataclasses.replace(IMAGE, size_bytes=1 << 31)
    disk, _, _ = crashed()
    assert "had 1073741824" in str(refused(disk, boot=NEW_BOOT, image=grown)), "it may be another device"
    younger = dataclasses.replace(grown, mtime_ns=7, is_marked=True)
    assert "had 1073741824" in str(refused(closed(dirty=True), image=younger)), "it was written to after the end"
    same = dataclasses.replace(grown, is_marked=True)
    assert recover(closed(dirty=True), None, NEW_BOOT, same).finding.decision is Decision.WARM


@pytest.mark.parametrize("change", [{"size_bytes": 1 << 31}, {"mtime_ns": 5}, {"size_bytes": 1 << 31, "mtime_ns": 5}])
def test_a_changed_image_that_a_person_accepts_gets_what_it_lacks_and_nothing_else_is_believed(
    change: dict[str, int],
) -> None:
    disk, writer = open_cache()
    writer.write(1, b"written back")
    writer.flush()
    writer.checkpoint(destaged=True)
    writer.write(2, b"dirty")
    writer.flush()
    writer.checkpoint(clean=True)
    image = dataclasses.replace(IMAGE, **change)
    refused(disk, image=image, boot=NEW_BOOT)
    recovered = recover(disk, None, NEW_BOOT, dataclasses.replace(image, is_accepted=True))
    assert recovered.finding.decision is Decision.EVICT
    assert blocks_of(recovered, disk) == {2: fill(b"dirty")}


def test_an_image_that_has_shrunk_is_never_accepted() -> None:
    image = dataclasses.replace(IMAGE, size_bytes=1 << 29, is_accepted=True)
    assert "had 1073741824" in str(refused(closed(dirty=True), image=image))


def test_a_cold_cache_is_emptied() -> None:
    disk = closed(dirty=False)
    block = dataclasses.replace(disk.superblock, cold=True)
    disk.data[:BLOCK] = disk.data[BLOCK : 2 * BLOCK] = block.pack()
    recovered = recover(disk, None, BOOT, IMAGE)
    assert recovered.finding.decision is Decision.COLD
    assert not disk.superblock.cold
    writer = Writer(disk, recovered)
    writer.write(7, b"seven")
    writer.flush()
    assert blocks_of(after_power_loss(disk), disk) == {7: fill(b"seven")}


def test_a_damaged_log_of_which_the_image_has_everything_is_given_up() -> None:
    for dirty in (False, True):
        disk = closed(dirty=dirty)
        disk.flip(offset(disk, 64) + 20)
        if dirty:
            assert isinstance(refused(disk), CacheCorruptError)
        else:
            recovered = recover(disk, None, BOOT, IMAGE)
            assert recovered.finding.decision is Decision.COLD
            assert recovered.next_seq == 3


def test_after_a_crash_a_younger_image_costs_only_what_it_has() -> None:
    disk, writer = open_cache()
    for n in range(1, 4):
        writer.write(n, b"%d" % n)
    writer.flush()
    writer.checkpoint(destaged=True)
    writer.write(4, b"four")
    writer.flush()
    image = dataclasses.replace(IMAGE, mtime_ns=7)
    recovered = recover(disk, None, NEW_BOOT, image)
    assert recovered.finding.decision is Decision.EVICT
    assert [record.seq for record in recovered.records] == [4]
    assert (recovered.tail_seq, recovered.tail_address) == (4, writer.addresses[4])
    assert blocks_of(recover(disk, None, OTHER_BOOT, image), disk) == {4: fill(b"four")}


def test_the_state_of_the_guests_write_cache_is_kept() -> None:
    disk, _ = open_cache()
    block = dataclasses.replace(disk.superblock, write_cache=superblocks.WRITE_CACHE_OFF)
    disk.data[:BLOCK] = disk.data[BLOCK : 2 * BLOCK] = block.pack()
    assert after_power_loss(disk).superblock.write_cache == superblocks.WRITE_CACHE_OFF
