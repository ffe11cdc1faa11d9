"""What the core promises, one scenario a test. The simulated engine checks bytes; here we look at what is done when."""

from tests.core.harness import SECTOR, Harness, sector_bytes
from vhostcache import operations as op
from vhostcache.map import CLEAN, DIRTY

SECOND_NS = 1_000_000_000
MINUTE_NS = 60_000_000_000


def write(harness: Harness, block: int, blocks: int = 1) -> int:
    """A write, acknowledged or waiting; returns its tag."""
    tag = harness.submit(op.REQUEST_WRITE, 8 * block, 8 * blocks)
    harness.turn()
    return tag


def finish_io(harness: Harness) -> None:
    while harness.io:
        harness.end_io(0)
        harness.turn()


def flush(harness: Harness) -> None:
    tag = harness.submit(op.REQUEST_FLUSH)
    harness.turn()
    finish_io(harness)
    assert tag not in harness.live


def kinds(harness: Harness) -> list[int]:
    return [io.kind for io in harness.io]


def test_neighbouring_blocks_reach_the_backend_in_one_write() -> None:
    harness = Harness(size_sectors=8 * 64, slots=3 + 60, object_blocks=16)
    for block in (3, 1, 2, 0, 7, 9, 8):
        write(harness, block)
    harness.submit(op.REQUEST_FLUSH)
    harness.turn()
    assert sorted((io.offset // 4096, io.size // 4096) for io in harness.io) == [(0, 4), (7, 3)]


def test_rewriting_a_block_costs_the_backend_one_write() -> None:
    harness = Harness()
    for _ in range(20):
        write(harness, 5)
    flush(harness)
    assert harness.volume.statistics()["blocks_destaged"] == 1


def test_a_flush_with_nothing_written_since_the_last_one_does_no_io() -> None:
    harness = Harness()
    write(harness, 1)
    flush(harness)
    performed = harness.volume.statistics()["flushes_performed"]
    flush(harness)
    assert harness.volume.statistics()["flushes_performed"] == performed
    assert harness.volume.statistics()["flushes_received"] == 2


def test_sixteen_flushes_at_once_cause_one_backend_flush() -> None:
    harness = Harness()
    write(harness, 1)
    for _ in range(16):
        harness.submit(op.REQUEST_FLUSH)
    harness.turn()
    finish_io(harness)
    assert not harness.live
    assert harness.volume.statistics()["flushes_performed"] == 1


def test_flushes_that_arrive_during_a_commit_share_the_next_one() -> None:
    harness = Harness()
    write(harness, 1)
    harness.submit(op.REQUEST_FLUSH)
    harness.turn()
    write(harness, 2)
    for _ in range(10):
        harness.submit(op.REQUEST_FLUSH)
        harness.turn()
    finish_io(harness)
    assert not harness.live
    assert harness.volume.statistics()["flushes_performed"] == 2


def test_a_flush_covers_a_block_overwritten_while_its_older_content_was_being_written() -> None:
    """The older content becomes an orphan, and its write alone must not satisfy the flush."""
    harness = Harness()
    write(harness, 1)
    harness.advance(2000)
    harness.turn()
    assert kinds(harness) == [op.WRITE]
    write(harness, 1)
    tag = harness.submit(op.REQUEST_FLUSH)
    harness.turn()
    harness.end_io(0)
    harness.turn()
    assert tag in harness.live
    finish_io(harness)
    assert tag not in harness.live
    harness.settle()


def test_a_flush_waits_for_a_backend_flush_when_its_only_block_was_superseded() -> None:
    harness = Harness()
    write(harness, 1)
    tag = harness.submit(op.REQUEST_FLUSH)
    harness.turn()
    write(harness, 1)
    harness.end_io(0)
    harness.turn()
    assert op.FLUSH in kinds(harness)
    assert tag in harness.live


def test_a_flush_never_fails_for_a_backend_that_comes_back() -> None:
    harness = Harness()
    write(harness, 1)
    tag = harness.submit(op.REQUEST_FLUSH)
    for _ in range(5):
        harness.advance(MINUTE_NS)
        harness.turn()
        harness.end_io(0, fail=True)
        harness.turn()
        assert tag in harness.live
    harness.advance(MINUTE_NS)
    harness.turn()
    finish_io(harness)
    assert tag not in harness.live
    assert harness.errors == 0
    names = [name for name, _ in harness.volume.notices]
    assert names == ["backend-error", "backend-recovered"]


def test_retries_pause_longer_each_time_and_not_for_ever() -> None:
    harness = Harness()
    write(harness, 1)
    harness.submit(op.REQUEST_FLUSH)
    pauses = []
    for _ in range(9):
        harness.turn()
        harness.end_io(0, fail=True)
        deadline = harness.volume.tick(harness.now_ns)
        harness.execute()
        assert not harness.io
        pauses.append(deadline - harness.now_ns)
        harness.now_ns = deadline
    assert pauses[0] == 100_000_000
    assert pauses == sorted(pauses)
    assert pauses[-1] == 5_000_000_000


def test_after_a_failed_flush_everything_it_should_have_covered_is_written_again() -> None:
    harness = Harness()
    write(harness, 1)
    harness.submit(op.REQUEST_FLUSH)
    harness.turn()
    harness.end_io(0)
    harness.turn()
    assert kinds(harness) == [op.FLUSH]
    harness.end_io(0, fail=True)
    harness.advance(MINUTE_NS)
    harness.turn()
    assert kinds(harness) == [op.WRITE]
    harness.settle()


def test_clean_means_flushed() -> None:
    """A block that is written but not flushed is not given up, however short RAM is."""
    harness = Harness(slots=3 + 4)
    for block in range(4):
        write(harness, block)
    waiting = write(harness, 9)
    while op.FLUSH not in kinds(harness):
        harness.end_io(0)
        harness.turn()
    assert waiting in harness.live
    finish_io(harness)
    assert waiting not in harness.live
    harness.settle()


def test_writes_wait_for_room_in_order_and_without_an_error() -> None:
    harness = Harness(slots=3 + 4)
    tags = [write(harness, block) for block in range(12)]
    assert len(harness.live) == 8
    done: list[int] = []
    while harness.live:
        before = set(harness.live)
        harness.end_io(0)
        harness.turn()
        done += sorted(before - set(harness.live))
    assert done == tags[4:]
    assert harness.errors == 0
    harness.settle()


def test_reads_do_not_wait_when_all_of_ram_is_dirty() -> None:
    harness = Harness(slots=3 + 4)
    for block in range(4):
        write(harness, block)
    write(harness, 20)
    read = harness.submit(op.REQUEST_READ, 8 * 30, 8)
    harness.turn()
    direct = [i for i, io in enumerate(harness.io) if io.kind == op.READ_DIRECT]
    assert len(direct) == 1
    harness.end_io(direct[0])
    harness.turn()
    assert read not in harness.live


def test_a_write_larger_than_ram_gets_through() -> None:
    harness = Harness(size_sectors=8 * 64, slots=3 + 8)
    write(harness, 0, 60)
    finish_io(harness)
    assert not harness.live
    harness.settle()


def test_a_fill_that_lost_a_race_with_a_write_is_not_installed_even_when_the_write_has_come_and_gone() -> None:
    """The fill starts, the block is written, destaged and evicted; only then the fill ends, with the old content
    (hazard 9)."""
    harness = Harness(slots=3 + 4)
    slow = harness.submit(op.REQUEST_READ, 8 * 7, 8)
    harness.turn()
    assert kinds(harness) == [op.READ]
    write(harness, 7)
    flush_tag = harness.submit(op.REQUEST_FLUSH)
    harness.turn()
    while flush_tag in harness.live:
        harness.end_io(1)
        harness.turn()
    for block in range(20, 24):
        write(harness, block)
    while len(harness.io) > 1 or 7 in harness.map.where:
        harness.end_io(1)
        harness.turn()
    assert 7 not in harness.map.where
    old = bytes(sector_bytes(0))
    for slot in harness.io[0].slots:
        harness.slab[slot * 4096 : slot * 4096 + SECTOR] = old
    harness.end_io(0)
    harness.turn()
    assert slow not in harness.live
    assert 7 not in harness.map.where
    harness.submit(op.REQUEST_READ, 8 * 7, 8)
    harness.turn()
    finish_io(harness)
    harness.settle()


def test_reads_that_miss_the_same_block_share_one_backend_read() -> None:
    harness = Harness()
    for _ in range(6):
        harness.submit(op.REQUEST_READ, 8 * 3, 8)
    harness.turn()
    assert kinds(harness) == [op.READ]
    finish_io(harness)
    assert not harness.live


def test_a_block_that_was_read_is_read_from_ram_the_next_time() -> None:
    harness = Harness()
    for _ in range(3):
        harness.submit(op.REQUEST_READ, 8 * 3, 8)
        harness.turn()
        finish_io(harness)
    assert harness.volume.statistics()["fills"] == 1
    assert harness.volume.hits == 2


def test_whole_blocks_are_written_without_a_read() -> None:
    harness = Harness()
    write(harness, 2, 5)
    assert not harness.io
    assert not harness.live


def test_a_part_of_a_block_is_merged_onto_the_newest_content_not_onto_what_was_read_for_it() -> None:
    """Hazard 26: while the part waits for its block to be read, the whole block is written."""
    harness = Harness()
    part = harness.submit(op.REQUEST_WRITE, 8 * 4 + 2, 3)
    harness.turn()
    assert kinds(harness) == [op.READ]
    write(harness, 4)
    harness.end_io(0)
    harness.turn()
    assert part not in harness.live
    harness.submit(op.REQUEST_READ, 8 * 4, 8)
    harness.turn()
    harness.settle()
    values = harness.backend.durable[32:40]
    assert values[2:5] == [1, 2, 3]
    assert values[0] != 0


def test_the_last_block_may_be_a_part_of_one() -> None:
    harness = Harness(size_sectors=8 * 4 + 3)
    tag = harness.submit(op.REQUEST_WRITE, 32, 3)
    harness.turn()
    assert tag not in harness.live
    assert not harness.io
    flush(harness)
    assert harness.backend.durable[32:35] == [1, 2, 3]


def test_a_discard_waits_for_the_destage_in_its_way_and_wins() -> None:
    harness = Harness()
    write(harness, 1)
    harness.advance(2000)
    harness.turn()
    assert kinds(harness) == [op.WRITE]
    harness.submit(op.REQUEST_DISCARD, 8, 8)
    harness.turn()
    assert kinds(harness) == [op.WRITE]
    harness.end_io(0)
    harness.turn()
    assert op.ZERO in kinds(harness)
    finish_io(harness)
    assert 1 not in harness.map.where
    harness.settle()
    assert harness.backend.durable[8:16] == [0] * 8


def test_a_failed_discard_loses_no_write_it_was_to_replace() -> None:
    harness = Harness()
    write(harness, 1)
    tag = harness.submit(op.REQUEST_ZERO, 8, 8)
    harness.turn()
    harness.end_io(0, fail=True)
    harness.turn()
    assert tag not in harness.live
    assert harness.errors == 1
    assert harness.map.state[harness.map.where[1]] == DIRTY


def test_requests_wait_for_a_range_that_is_being_zeroed() -> None:
    harness = Harness()
    harness.submit(op.REQUEST_ZERO_UNMAP, 0, 64)
    harness.turn()
    read = harness.submit(op.REQUEST_READ, 16, 8)
    change = harness.submit(op.REQUEST_WRITE, 24, 8)
    elsewhere = harness.submit(op.REQUEST_WRITE, 80, 8)
    harness.turn()
    assert elsewhere not in harness.live
    assert {read, change} <= harness.live.keys()
    finish_io(harness)
    assert not harness.live
    harness.settle()


def test_in_write_through_a_write_is_acknowledged_when_it_is_durable() -> None:
    harness = Harness(acknowledge_durable=True)
    tag = write(harness, 3)
    assert tag in harness.live
    finish_io(harness)
    assert tag not in harness.live
    assert harness.backend.durable[24] == 1


def test_write_through_writes_share_backend_flushes() -> None:
    harness = Harness(slots=3 + 200, acknowledge_durable=True)
    for block in range(10):
        harness.submit(op.REQUEST_WRITE, 8 * block, 8)
    harness.turn()
    finish_io(harness)
    assert not harness.live
    assert harness.volume.statistics()["flushes_performed"] == 1


def test_a_guest_that_switches_its_write_cache_off_and_on_is_followed() -> None:
    harness = Harness()
    harness.volume.set_write_cache(False)
    tag = write(harness, 3)
    assert tag in harness.live
    finish_io(harness)
    harness.volume.set_write_cache(True)
    assert write(harness, 4) not in harness.live


def test_an_unknown_write_cache_is_write_through_until_the_first_flush() -> None:
    harness = Harness()
    harness.volume.write_cache_unknown()
    tag = write(harness, 3)
    assert tag in harness.live
    finish_io(harness)
    flush(harness)
    assert write(harness, 4) not in harness.live


def test_dirty_data_is_destaged_without_a_flush_when_it_is_old() -> None:
    harness = Harness()
    write(harness, 3)
    deadline = harness.volume.tick(harness.now_ns)
    assert deadline == harness.now_ns + 1000
    harness.execute()
    assert not harness.io
    harness.now_ns = deadline
    harness.turn()
    assert kinds(harness) == [op.WRITE]


def test_an_idle_volume_has_no_deadline() -> None:
    harness = Harness()
    write(harness, 3)
    flush(harness)
    assert harness.volume.tick(harness.now_ns) == op.NEVER


def test_a_quiescing_volume_drops_what_waits_and_applies_it_when_it_comes_again() -> None:
    """Hazard 2: nothing of the old connection is applied after the new one has begun."""
    harness = Harness(slots=3 + 4)
    for block in range(10):
        write(harness, block)
    harness.submit(op.REQUEST_FLUSH)
    harness.submit(op.REQUEST_WRITE, 8 * 20 + 1, 3)
    harness.turn()
    assert len(harness.live) == 8
    assert harness.reconnect() == 8
    harness.turn()
    finish_io(harness)
    harness.settle()


def test_large_and_sequential_reads_leave_the_cache_alone() -> None:
    harness = Harness(size_sectors=8 * 4096, slots=3 + 64)
    harness.submit(op.REQUEST_READ, 0, 256)
    harness.turn()
    assert kinds(harness) == [op.READ_DIRECT]
    finish_io(harness)
    assert not harness.map.where
    for start in range(256, 256 + 64 * 64, 64):
        harness.submit(op.REQUEST_READ, start, 64)
        harness.turn()
        finish_io(harness)
    assert harness.volume.statistics()["fills"] < 40
    harness.submit(op.REQUEST_READ, 256 + 64 * 64, 64)
    harness.turn()
    assert kinds(harness) == [op.READ_DIRECT]
    finish_io(harness)


def test_a_read_takes_each_part_from_where_it_is() -> None:
    harness = Harness()
    write(harness, 2)
    write(harness, 5, 2)
    tag = harness.submit(op.REQUEST_READ, 8 + 3, 8 * 7)
    harness.turn()
    assert len(harness.io) == 3
    finish_io(harness)
    assert tag not in harness.live


def test_fill_units_are_read_whole_where_nothing_is_cached() -> None:
    harness = Harness(fill_blocks=4)
    write(harness, 6)
    flush(harness)
    harness.submit(op.REQUEST_READ, 8 * 5, 8)
    harness.turn()
    assert [(io.offset // 4096, io.size // 4096) for io in harness.io] == [(4, 2)]
    finish_io(harness)
    assert harness.map.state[harness.map.where[4]] == CLEAN


def wait_for_io(harness: Harness) -> None:
    """Let time pass until the core asks something of the backend, or has answered everything."""
    for _ in range(100):
        deadline_ns = harness.turn_until()
        if harness.io or not harness.live:
            return
        assert deadline_ns < op.NEVER
        harness.now_ns = deadline_ns
    raise AssertionError("nothing happens")


def test_a_read_that_the_backend_fails_is_tried_again_until_it_succeeds() -> None:
    harness = Harness()
    harness.submit(op.REQUEST_READ, 0, 8)
    harness.turn()
    pauses = []
    for _ in range(9):
        harness.end_io(0, fail=True)
        began_ns = harness.now_ns
        wait_for_io(harness)
        pauses.append(harness.now_ns - began_ns)
    assert pauses[:3] == [100_000_000, 200_000_000, 400_000_000]
    assert pauses[-1] == 5_000_000_000
    assert harness.errors == 0
    finish_io(harness)
    assert not harness.live
    assert [notice[0] for notice in harness.volume.notices] == ["backend-error", "backend-recovered"]


def test_a_part_of_a_block_waits_for_the_backend_that_has_the_rest() -> None:
    harness = Harness(timeout_ns=SECOND_NS)
    harness.submit(op.REQUEST_WRITE, 3, 2)
    harness.turn()
    for _ in range(5):
        harness.end_io(0, fail=True)
        wait_for_io(harness)
    finish_io(harness)
    assert harness.errors == 0
    assert not harness.live
    harness.settle()


def test_a_read_fails_after_the_time_that_it_may_wait_and_no_other_does() -> None:
    harness = Harness(timeout_ns=SECOND_NS)
    harness.submit(op.REQUEST_READ, 0, 8)
    harness.turn()
    harness.advance(SECOND_NS // 2)
    harness.submit(op.REQUEST_READ, 80, 120)
    harness.turn()
    harness.advance(SECOND_NS // 2)
    harness.turn()
    assert (harness.errors, len(harness.live)) == (1, 1)  # although the backend still has both
    finish_io(harness)
    assert (harness.errors, len(harness.live)) == (1, 0)
    assert harness.volume.statistics()["read_timeouts"] == 1


def test_a_read_that_fails_again_and_again_fails_for_good_at_its_time() -> None:
    harness = Harness(timeout_ns=SECOND_NS)
    harness.submit(op.REQUEST_READ, 0, 8)
    harness.turn()
    while harness.live:
        assert harness.now_ns <= 2 * SECOND_NS
        if harness.io:
            harness.end_io(0, fail=True)
        else:
            wait_for_io(harness)
    assert harness.errors == 1
    assert harness.now_ns > SECOND_NS


def test_what_waits_for_the_backend_is_given_back_when_the_queue_stops() -> None:
    harness = Harness()
    harness.submit(op.REQUEST_READ, 0, 8)
    harness.submit(op.REQUEST_WRITE, 83, 2)
    harness.turn()
    harness.end_io(0, fail=True)
    harness.end_io(0, fail=True)
    harness.turn()
    assert harness.volume.statistics()["waiting_for_backend"] == 2
    assert harness.reconnect() == 2


def test_draining_leaves_nothing_dirty() -> None:
    harness = Harness()
    for block in range(9):
        write(harness, block)
    assert not harness.volume.drained
    harness.settle()
    assert harness.volume.drained
    assert harness.volume.statistics()["dirty_blocks"] == 0


def fill_half(harness: Harness) -> None:
    """Dirty enough that large writes go past RAM."""
    for block in range(40, 40 + (harness.map.slots - 3) // 2):
        write(harness, block)


def test_a_large_write_goes_past_ram_only_while_ram_is_filling() -> None:
    harness = Harness(size_sectors=8 * 96, slots=3 + 60, direct_blocks=4)
    write(harness, 0, 8)
    assert not harness.io
    fill_half(harness)
    tag = harness.submit(op.REQUEST_WRITE, 0, 64)
    harness.turn()
    assert tag in harness.live
    while op.WRITE_DIRECT not in kinds(harness):  # first the destage of the same object has to end
        harness.end_io(0)
        harness.turn()
    finish_io(harness)
    assert tag not in harness.live
    assert not any(block in harness.map.where for block in range(8))
    harness.settle()


def test_a_large_write_to_a_backend_that_may_be_away_for_long_never_goes_past_ram() -> None:
    harness = Harness(size_sectors=8 * 96, slots=3 + 60, direct_blocks=4, can_abandon=True)
    fill_half(harness)
    tag = write(harness, 0, 8)
    assert tag not in harness.live
    assert op.WRITE_DIRECT not in kinds(harness)


def test_a_queue_stops_although_the_backend_does_not_end_a_discard() -> None:
    harness = Harness()
    discard = harness.submit(op.REQUEST_DISCARD, 0, 64)
    harness.turn()
    assert kinds(harness) == [op.ZERO]
    harness.volume.quiesce(may_drop=True)
    harness.turn()
    assert [request.kind for request in harness.dropped] == [op.REQUEST_DISCARD]
    assert discard not in harness.live
    assert harness.reconnect() == 1
    later = write(harness, 3)
    assert kinds(harness) == [op.ZERO], "what was asked for again comes after what is under way"
    assert later in harness.live
    harness.settle()


def test_a_queue_stops_although_a_destage_keeps_changes_of_its_object_from_beginning() -> None:
    harness = Harness(size_sectors=8 * 96, slots=3 + 60, direct_blocks=4)
    write(harness, 0)
    harness.submit(op.REQUEST_FLUSH)
    harness.turn()
    fill_half(harness)
    harness.submit(op.REQUEST_WRITE, 0, 32)
    harness.submit(op.REQUEST_ZERO, 32, 32)
    harness.turn()
    harness.volume.quiesce(may_drop=True)
    harness.turn()
    assert not harness.live
    while harness.io:
        assert not {op.ZERO, op.WRITE_DIRECT} & set(kinds(harness)), "what was dropped does not begin later"
        harness.end_io(0)
        harness.turn()
    assert harness.reconnect() == 3
    harness.settle()


def test_a_large_write_that_the_backend_refuses_is_taken_into_ram_and_tried_again_from_there() -> None:
    harness = Harness(size_sectors=8 * 96, slots=3 + 60, direct_blocks=4)
    fill_half(harness)
    tag = harness.submit(op.REQUEST_WRITE, 0, 64)
    harness.turn()
    harness.end_io(kinds(harness).index(op.WRITE_DIRECT), fail=True)
    harness.turn()
    assert tag not in harness.live
    assert harness.errors == 0
    assert all(block in harness.map.where for block in range(8))
    harness.settle()


def test_a_flush_that_fails_after_a_write_past_ram_says_so() -> None:
    """RAM has no copy to write again, so this flush, alone of all, can't wait for better times."""
    harness = Harness(size_sectors=8 * 96, slots=3 + 60, direct_blocks=4)
    fill_half(harness)
    harness.submit(op.REQUEST_WRITE, 0, 64)
    harness.turn()
    finish_io(harness)
    tag = harness.submit(op.REQUEST_FLUSH)
    harness.turn()
    while op.FLUSH not in kinds(harness):
        harness.end_io(0)
        harness.turn()
    harness.end_io(kinds(harness).index(op.FLUSH), fail=True)
    harness.turn()
    assert tag not in harness.live
    assert harness.errors == 1
    harness.advance(MINUTE_NS)
    flush(harness)
    harness.settle()


def test_a_block_read_once_leaves_a_full_cache_alone_and_one_read_twice_gets_in() -> None:
    harness = Harness(size_sectors=8 * 96, slots=3 + 8)
    for block in range(8):
        harness.submit(op.REQUEST_READ, 8 * block, 8)
        harness.turn()
        finish_io(harness)
    for expected in (op.READ_DIRECT, op.READ):
        harness.submit(op.REQUEST_READ, 8 * 50, 8)
        harness.turn()
        assert kinds(harness) == [expected]
        finish_io(harness)
    assert 50 in harness.map.where
    harness.settle()


def test_a_read_past_ram_that_fails_is_tried_again() -> None:
    harness = Harness(size_sectors=8 * 96, slots=3 + 8)
    harness.submit(op.REQUEST_READ, 0, 320)
    harness.turn()
    assert kinds(harness) == [op.READ_DIRECT]
    harness.end_io(0, fail=True)
    harness.turn()
    harness.advance(MINUTE_NS)
    harness.turn()
    assert kinds(harness) == [op.READ_DIRECT]
    finish_io(harness)
    assert harness.errors == 0
    assert not harness.live


def test_a_read_that_cannot_succeed_is_answered_with_an_error_at_once() -> None:
    harness = Harness(size_sectors=8 * 96, slots=3 + 8)
    for sectors in (8, 320):
        harness.submit(op.REQUEST_READ, 0, sectors)
        harness.turn()
        harness.end_io(0, fail=True, errno=61)
        harness.turn()
    assert harness.errors == 2
    assert not harness.live
