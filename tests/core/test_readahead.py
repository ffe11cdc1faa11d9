"""Readahead: a stream finds what it asks for, and nobody else pays for it."""

from collections.abc import Iterable

import pytest

from tests.core.harness import BLOCK, Harness
from vhostcache import operations as op

SECOND_NS = 1_000_000_000


def make(window: int = 64, blocks: int = 1000, slots: int = 3 + 1024) -> Harness:
    return Harness(size_sectors=8 * blocks, slots=slots, object_blocks=256, readahead_blocks=window)


def read(harness: Harness, block: int, count: int = 1) -> int:
    """Returns how many reads of the backend it has begun, which then end."""
    harness.submit(op.REQUEST_READ, 8 * block, 8 * count)
    harness.turn()
    begun = len(harness.io)
    while harness.io:
        harness.end_io(0)
    harness.turn()
    assert not harness.live
    return begun


def waiting_reads(harness: Harness, blocks: Iterable[int], count: int = 1) -> int:
    """Reads of `count` blocks, one after the other, each once the backend has brought what was fetched for those
    before. Returns how many had to wait for it."""
    waited = 0
    for block in blocks:
        harness.submit(op.REQUEST_READ, 8 * block, 8 * count)
        harness.turn()
        waited += bool(harness.live)
        while harness.io:
            harness.end_io(0)
        harness.turn()
    return waited


@pytest.mark.parametrize("count", [1, 8, 40])
def test_a_stream_does_not_wait_for_the_backend(count: int) -> None:
    harness = make(256, slots=3 + 4096)
    assert waiting_reads(harness, range(0, 960, count), count) <= 5
    counters = harness.volume.statistics()
    assert counters["readahead_blocks"] >= 960 - 5 * count
    assert counters["readahead_wasted_blocks"] <= 40
    assert len(harness.map.where) <= 5 * count, "what is read once in a row does not fill the cache"
    harness.settle()


@pytest.mark.parametrize(("count", "ahead"), [(8, True), (40, False)])
def test_a_guest_that_has_large_reads_under_way_reads_ahead_by_itself(count: int, ahead: bool) -> None:
    harness = make(256, slots=3 + 4096)
    for block in range(0, 10 * count, count):
        harness.submit(op.REQUEST_READ, 8 * block, 8 * count, op.REQUEST_DEEP)
        harness.turn()
    assert bool(harness.volume.statistics()["readahead_blocks"]) == ahead
    while harness.io:
        harness.end_io(0)


def test_several_streams_go_on_side_by_side() -> None:
    harness = make()
    reads = [read(harness, base + at) for at in range(100) for base in (0, 300, 600)]
    assert sum(reads[30:]) <= 30


@pytest.mark.parametrize("step", [2, 5, 8, 9])
def test_reads_that_leave_out_a_little_are_a_stream(step: int) -> None:
    harness = make(slots=3 + 4096)
    assert waiting_reads(harness, range(0, 900, step)) <= 5
    assert harness.volume.statistics()["readahead_blocks"] > 600
    harness.settle()


def orders() -> dict[str, list[int]]:
    in_order = list(range(900))
    swapped = [at ^ 1 for at in in_order]
    far = [at + (0, 3, 6, 1, 4, 7, 2, 5)[at % 8] - at % 8 for at in in_order[:896]]
    two = [at + shift for at in range(880) for shift in (0, 6)]
    ahead = [block for at in range(880) for block in ((at, at + 10) if at % 50 == 0 else (at,))]
    behind = [block for at in range(900) for block in ((at, at - 5) if at % 50 == 10 else (at,))]
    return {"swapped": swapped, "far": far, "two_readers": two, "one_ahead": ahead, "one_behind": behind}


@pytest.mark.parametrize("order", orders())
def test_reads_that_are_nearly_in_order_are_a_stream(order: str) -> None:
    harness = make(slots=3 + 4096)
    assert waiting_reads(harness, orders()[order]) <= 10
    counters = harness.volume.statistics()
    assert counters["readahead_blocks"] <= 1100
    assert counters["readahead_wasted_blocks"] <= 150
    harness.settle()


def test_the_same_read_again_and_again_is_no_stream() -> None:
    harness = make()
    for _ in range(6):
        harness.submit(op.REQUEST_READ, 8 * 500, 8)
        harness.turn()
    assert harness.volume.statistics()["readahead_blocks"] == 0
    while harness.io:
        harness.end_io(0)
    harness.settle()


def test_scattered_reads_fetch_nothing_ahead() -> None:
    harness = make()
    for at in range(200):
        read(harness, at * 379 % 1000)
    assert harness.volume.statistics()["readahead_blocks"] == 0


def test_a_write_into_what_was_read_ahead_is_what_is_read() -> None:
    harness = make()
    for block in range(8):
        read(harness, block)
    harness.submit(op.REQUEST_WRITE, 8 * 10, 8)
    harness.submit(op.REQUEST_WRITE, 8 * 12 + 3, 2)  # a part of a block, completed from what was read ahead
    harness.submit(op.REQUEST_DISCARD, 8 * 14, 8)
    harness.turn()
    for block in range(8, 30):
        read(harness, block)
    harness.settle()


def test_a_stream_that_stops_gives_its_slots_back() -> None:
    harness = make()
    for block in range(8):
        read(harness, block)
    free = len(harness.map.free)
    held = harness.volume._ahead.held  # type: ignore[union-attr]
    assert held > 0
    harness.advance(3 * SECOND_NS)
    harness.turn()
    assert len(harness.map.free) == free + held
    assert harness.volume.statistics()["readahead_wasted_blocks"] > 0


def test_writes_that_need_the_slots_get_them() -> None:
    harness = make(slots=3 + 256)
    for block in range(8):
        read(harness, block)
    for block in range(400, 656):
        harness.submit(op.REQUEST_WRITE, 8 * block, 8)
    harness.turn()
    assert harness.volume.statistics()["dirty_blocks"] >= 224
    harness.settle()


def test_it_ends_with_the_disk() -> None:
    harness = make(blocks=50)
    for block in range(50):
        read(harness, block)
    assert max((io.offset + io.size for io in harness.io), default=0) <= 50 * BLOCK
    harness.settle()
