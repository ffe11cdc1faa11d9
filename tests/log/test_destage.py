"""What is destaged when, and in which writes: one situation a test."""

from __future__ import annotations

import heapq
from typing import Any

import pytest

from tests.log.test_log_volume import SECOND, Bench
from vhostcache import operations as op
from vhostcache.backoff import HELD_NS, Backoff, Trouble
from vhostcache.log import format as fmt
from vhostcache.log.depth import ASSUMED_BLOCKS_PER_S, QUIET_NS, SAMPLES, Modulator, ObjectsInFlight, Speed
from vhostcache.log.ordered import GATHERED_BLOCKS, STEP_BLOCKS, OrderedQueue
from vhostcache.log.sources import REMOTE_NS

EIO = 5
ENOSPC = 28
OBJECT = 64
"""Blocks of an object on the bench."""


class Backend(Bench):
    """A bench that writes down what is written to the backend."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"destage": True, "destage_after_ns": SECOND, **settings})
        self.writes: list[tuple[int, int]] = []
        """(block, blocks)"""

    def run(self) -> None:
        words = list(self.operations)
        at = 0
        while at < len(words):
            code, argument = words[at] & 255, words[at] >> 32
            if code == op.WRITE:
                self.writes.append((words[at + 2] // op.BLOCK_BYTES, argument))
            at += _length(words, at)
        super().run()

    def destage(self, blocks: list[int]) -> list[tuple[int, int]]:
        """Write these, make them durable, wait until they are on the backend."""
        for block in blocks:
            self.write(block)
        self.flush()
        self.writes.clear()
        self.wait(2 * SECOND)
        return sorted(self.writes)

    def wait(self, time_ns: int) -> None:
        """Time goes on, in steps of a fifth of a second."""
        for _ in range(max(1, time_ns * 5 // SECOND)):
            self.now_ns += SECOND // 5
            self.turn()
            self.settle()

    def remote(self, latency_ns: int) -> None:
        self.volume._destager._speed._before_ns = self.volume._destager._speed._now_ns = latency_ns


def _length(words: list[int], at: int) -> int:
    from tests.log.test_log_volume import _SLOTS_FOLLOW, _WORDS

    code, argument = words[at] & 255, words[at] >> 32
    length = 1 + _WORDS.get(code, 0)
    if code == op.LOG_WRITE:
        length += words[at + 4]
    if code in _SLOTS_FOLLOW:
        length += argument
    elif code == op.PUBLISH:
        length += 2 * argument
    return length


def test_neighbours_are_one_write() -> None:
    assert Backend().destage([3, 4, 5, 9, 11]) == [(3, 3), (9, 1), (11, 1)]


def test_small_gaps_are_filled_from_ram_when_the_backend_is_far_away() -> None:
    bench = Backend()
    bench.destage([10, 11, 12, 13, 14])
    bench.remote(2_000_000)
    assert bench.destage([10, 12, 14]) == [(10, 5)]
    assert bench.volume.statistics()["blocks_bridged"] == 2
    bench.evict()
    bench.remote(2_000_000)
    assert bench.destage([10, 14]) == [(10, 5)], "from the log"
    assert op.READ not in bench.seen


def test_gaps_are_left_alone_when_the_backend_is_near() -> None:
    bench = Backend()
    bench.destage([10, 11, 12])
    bench.remote(REMOTE_NS - 1)
    assert bench.destage([10, 12]) == [(10, 1), (12, 1)]


def test_a_gap_that_nothing_but_the_backend_has_is_left_alone() -> None:
    bench = Backend()
    bench.remote(2_000_000)
    assert bench.destage([10, 12]) == [(10, 1), (12, 1)]
    assert op.READ not in bench.seen


def test_a_gap_with_zeroes_that_are_not_durable_is_left_alone() -> None:
    bench = Backend(sync_interval_ns=100 * SECOND, destage_after_ns=SECOND)
    bench.destage([10, 11, 12])
    bench.evict()
    bench.remote(2_000_000)
    bench.write(10)
    bench.write(12)
    bench.flush()
    bench.ask(op.REQUEST_DISCARD, 11, 1)
    bench.writes.clear()
    bench.now_ns += 13 * SECOND
    bench.turn()
    while not bench.writes:
        bench.end(bench.io[0][0])
    assert sorted(bench.writes) == [(10, 1), (12, 1)]


def test_where_whole_objects_are_wanted_the_rest_is_read_first() -> None:
    bench = Backend(wants_whole_objects=True)
    for block in (64, 70):
        bench.write(block)
    bench.flush()
    bench.wait(11 * SECOND)
    assert bench.writes == [], "it may yet become full"
    bench.wait(3 * SECOND)
    assert bench.writes == [(64, OBJECT)]
    assert bench.seen.count(op.READ) == 1


def test_only_the_units_that_are_touched_are_completed() -> None:
    bench = Backend(wants_whole_objects=True, preferred_bytes=64 << 10)
    for block in (64, 70, 112):
        bench.write(block)
    bench.flush()
    bench.wait(14 * SECOND)
    assert bench.writes == [(64, 16), (112, 16)]
    assert bench.seen.count(op.READ) == 1


def test_a_wholly_dirty_object_is_written_at_once_and_nothing_is_read() -> None:
    bench = Backend(wants_whole_objects=True)
    assert bench.destage(list(range(64, 128))) == [(64, OBJECT)]
    assert op.READ not in bench.seen


def test_the_last_object_of_a_disk_that_ends_in_it_is_written_to_the_end() -> None:
    bench = Backend(wants_whole_objects=True, size_bytes=(OBJECT + 10) * 4096 + 512)
    bench.write(OBJECT + 2)
    bench.flush()
    bench.wait(14 * SECOND)
    assert bench.writes == [(OBJECT, 11)]


def test_behind_the_end_of_a_disk_that_grows_meanwhile_zeroes_are_written() -> None:
    bench = Backend(wants_whole_objects=True, size_bytes=(OBJECT + 10) * 4096 + 512)
    bench.write(OBJECT + 2)
    bench.flush()
    bench.now_ns += 14 * SECOND
    bench.seen.clear()
    bench.turn()
    assert bench.seen[bench.seen.index(op.READ) - 1] == op.SLOT_ZERO, "the rest of the last block"


def test_a_gap_that_the_backend_cannot_read_keeps_nothing_from_being_written() -> None:
    bench = Backend()
    blocks = list(range(0, OBJECT, 2))
    for block in blocks:
        bench.write(block)
    bench.flush()
    bench.evict()
    bench.remote(2_000_000)
    bench.volume._destager._speed._write_ns = 2_000_000
    bench.now_ns += 2 * SECOND
    bench.turn()
    assert not bench.writes, "it is worth its while to read the gaps first"
    bench.end(op.READ, -EIO)
    bench.settle()
    assert sorted(bench.writes) == [(block, 1) for block in blocks]
    assert bench.volume.statistics()["blocks_bridged"] == 0
    assert bench.volume._destager.settled


def test_a_hot_object_is_neither_rewritten_for_ever_nor_starved() -> None:
    bench = Backend()
    for second in range(30):
        bench.write(5)
        bench.flush()
        bench.wait(SECOND // 2)
        if second == 20:
            assert len(bench.writes) == 0
    assert 1 <= len(bench.writes) <= 2


def test_an_object_that_is_left_alone_is_destaged_after_a_while() -> None:
    bench = Backend()
    bench.write(5)
    bench.flush()
    bench.wait(2 * SECOND)
    assert bench.writes == [(5, 1)]


def test_large_writes_are_cut_to_what_the_backend_takes() -> None:
    assert Backend(max_bytes=16 << 12).destage(list(range(40))) == [(0, 16), (16, 16), (32, 8)]


def test_with_room_wholly_dirty_objects_go_before_the_oldest() -> None:
    bench = Backend(ring_blocks=8192, destage_threshold_percent=5, destage_after_ns=100 * SECOND)
    for number in range(100):
        bench.write(OBJECT * (200 + number))
    for first in range(0, 10 * OBJECT, OBJECT):
        bench.write(first, OBJECT)
    bench.flush()
    first = [block for block, _ in bench.writes][:6]
    assert sum(block < 10 * OBJECT for block in first) >= 2


def test_no_space_holds_the_backend_and_says_so_once() -> None:
    bench = Backend()
    bench.write(1)
    bench.flush()
    bench.now_ns += 2 * SECOND
    bench.turn()
    for _ in range(3):
        bench.end(op.WRITE, -ENOSPC)
        bench.now_ns += HELD_NS - SECOND
        bench.turn()
        assert not bench.io
        bench.now_ns += 2 * SECOND
        bench.turn()
    names = [name for name, _ in bench.volume.notices]
    assert names == ["backend-held"]
    assert bench.volume.statistics()["backend_held"] == ENOSPC
    bench.settle()
    assert bench.volume.statistics()["backend_held"] == 0
    assert bench.volume.notices[-1][0] == "backend-recovered"


def test_who_has_mended_it_need_not_wait() -> None:
    bench = Backend()
    bench.write(1)
    bench.flush()
    bench.now_ns += 2 * SECOND
    bench.turn()
    bench.end(op.WRITE, -ENOSPC)
    bench.now_ns += SECOND
    bench.turn()
    assert not bench.io
    bench.volume.retry()
    bench.turn()
    assert [code for code, _ in bench.io] == [op.WRITE]


def test_an_object_that_always_fails_does_not_hold_up_the_others() -> None:
    bench = Backend()
    for number in range(20):
        bench.write(OBJECT * number)
    bench.flush()
    for _ in range(200):
        bench.now_ns += SECOND // 5
        bench.turn()
        while bench.io:
            first = bench.writes[-1][0] if bench.writes else -1
            code = bench.io[0][0]
            bench.end(code, -5 if code == op.WRITE and first == 0 else 0)
            bench.writes.clear() if code == op.WRITE and first == 0 else None
    assert bench.volume.statistics()["dirty_objects"] <= 2


@pytest.mark.parametrize("failing", [2, 12])
def test_objects_that_always_fail_do_not_hold_up_the_others_when_all_is_to_be_destaged(failing: int) -> None:
    bench = Backend()
    for number in range(60):
        bench.write(OBJECT * number)
    bench.flush()
    bench.volume.drain()
    for _ in range(300):
        bench.now_ns += SECOND // 5
        bench.turn()
        while bench.io:
            code, group = bench.io[0]
            destage = bench.volume._io._owners[group]
            bench.end(code, -EIO if code == op.WRITE and destage.number < failing else 0)
    assert bench.volume.statistics()["dirty_objects"] == failing


def test_an_interval_is_on_the_backend_before_the_next_begins() -> None:
    bench = Backend(ordered=True)
    bench.write(1)
    bench.write(100)
    bench.flush()
    bench.write(1)
    bench.write(2)
    bench.flush()
    bench.evict()
    bench.seen.clear()
    bench.wait(2 * SECOND)
    assert bench.writes == [(1, 1), (100, 1), (1, 2)]
    what = [code for code in bench.seen if code in (op.WRITE, op.FLUSH, op.SUPERBLOCK)]
    end_of_step = [op.FLUSH, op.SUPERBLOCK, op.SUPERBLOCK]
    assert what == [op.WRITE, op.WRITE, *end_of_step, op.WRITE, *end_of_step]


def test_a_step_of_discards_is_no_larger_than_one_of_writes() -> None:
    shift, count = 10, 1000
    queue = OrderedQueue(shift, 0)
    for number in range(200):
        queue.add(number, number + 1, number + 1, [fmt.extent(number << shift, count, fmt.DISCARD)], [], 0)
    queue.begin()
    turns = 1
    while not queue.gather(200):
        turns += 1
    assert sum(len(queue.values(number)) for number in queue.pending) <= STEP_BLOCKS + count
    assert turns >= STEP_BLOCKS // GATHERED_BLOCKS // 2
    queue.finish()
    assert not queue.empty


def test_an_interval_longer_than_the_log_is_cut_and_does_not_stop_the_guest() -> None:
    bench = Backend(ordered=True, ring_blocks=2048, sync_interval_ns=SECOND // 100)
    tags = []
    for block in range(6000):
        tags.append(bench.write(block % 3000))
        if block % 100 == 99:
            bench.wait(SECOND // 5)
    bench.wait(2 * SECOND)
    assert all(bench.answers.get(tag) == op.STATUS_OK for tag in tags)


def test_an_ordered_step_that_fails_is_done_again_from_where_it_failed() -> None:
    bench = Backend(ordered=True)
    bench.write(1)
    bench.write(100)
    bench.flush()
    bench.now_ns += 2 * SECOND
    bench.turn()
    bench.end(op.WRITE, -ENOSPC)
    bench.settle()
    bench.wait(HELD_NS + SECOND)
    assert sorted(bench.writes) == [(1, 1), (1, 1), (100, 1)]
    assert bench.volume.statistics()["log_clean"] == bench.volume.statistics()["log_head"]


def test_pauses_grow_and_end() -> None:
    backoff = Backoff()
    pauses = []
    for _ in range(8):
        backoff.failed(0)
        pauses.append(backoff.at_ns // 1_000_000)
    assert pauses == [100, 200, 400, 800, 1600, 3200, 5000, 5000]
    backoff.succeeded()
    backoff.failed(0)
    assert backoff.at_ns == 100_000_000


def test_trouble_of_one_is_not_the_trouble_of_all() -> None:
    trouble = Trouble([])
    trouble.failed(1, "write", -5, 0)
    assert trouble.at_ns == 0
    assert trouble.waits(1, 1)
    assert not trouble.waits(2, 1)
    trouble.failed(2, "write", -5, 0)
    assert trouble.at_ns > 0
    assert trouble.probing
    trouble.succeeded(3)
    assert trouble.at_ns == 0
    assert not trouble.probing
    assert trouble


@pytest.mark.parametrize(
    ("servers", "least", "most"),
    [(1, 1, 3), (4, 3, 6), (16, 8, 16)],
    ids=["one at a time", "four at once", "as many as one likes"],
)
def test_objects_in_flight_adapt_to_what_the_backend_does_side_by_side(servers: int, least: int, most: int) -> None:
    depth = ObjectsInFlight(16, Speed())
    now_ns = 1
    free = [0] * servers
    running: list[int] = []
    limits = []
    for _ in range(2000):
        while len(running) < depth.limit:
            start = max(heapq.heappop(free), now_ns)
            heapq.heappush(free, start + 10_000_000)
            heapq.heappush(running, start + 10_000_000)
        now_ns = heapq.heappop(running)
        depth.ended(1024, 1, now_ns, saturated=True)
        limits.append(depth.limit)
    mean = sum(limits[500:]) / len(limits[500:])
    assert least <= mean <= most


def test_latency_is_the_least_of_late_and_queues_are_none_of_it() -> None:
    speed = Speed()
    for latency_ns in (30_000_000, 2_000_000, 40_000_000):
        speed.answered(latency_ns)
    assert speed.latency_ns == 2_000_000
    for _ in range(2 * SAMPLES):
        speed.answered(5_000_000)
    assert speed.latency_ns == 5_000_000


def test_large_writes_say_what_the_backend_transfers_and_small_ones_that_it_is_no_less() -> None:
    speed = Speed()
    for _ in range(12):
        speed.transferred(16_384, 16, SECOND)  # 64 MiB/s
    assert 16_000 < speed.blocks_per_s < 17_000
    speed.transferred(8_000, 8_000, SECOND)
    assert 16_000 < speed.blocks_per_s < 17_000
    speed.transferred(30_000, 10_000, SECOND)
    assert speed.blocks_per_s == 30_000
    for _ in range(200):
        speed.transferred(1000, 1000, SECOND)
    assert speed.blocks_per_s == ASSUMED_BLOCKS_PER_S, "it may have become faster"


def test_what_a_write_costs_is_measured_too() -> None:
    speed = Speed()
    speed.answered(2_000_000)
    assert speed.write_ns == 125_000
    for _ in range(12):
        speed.transferred(16_384, 16, SECOND)
    for _ in range(12):
        speed.transferred(1_400, 700, SECOND)  # a server whose processor is busy
    assert 1_200_000 < speed.write_ns < 1_400_000


def test_gaps_are_smaller_where_bytes_are_dear() -> None:
    bench = Backend()
    bench.destage(list(range(10, 20)))
    bench.remote(2_000_000)
    assert bench.destage([10, 14]) == [(10, 5)]
    bench.remote(2_000_000)
    bench.volume._destager._speed.blocks_per_s = 16_384
    assert bench.destage([10, 14]) == [(10, 1), (14, 1)]


def test_a_failure_halves_what_is_in_flight() -> None:
    depth = ObjectsInFlight(16, Speed())
    depth.limit = 12
    depth.failed()
    assert depth.limit == 6


def test_destaging_yields_to_reads_and_not_to_a_full_log() -> None:
    modulator = Modulator()
    modulator.update(0, 0.0, SECOND)
    assert modulator.objects(8) == 8
    modulator.update(1, 0.0, SECOND)
    assert modulator.objects(8) == 1
    assert modulator.gentle
    modulator.update(2, 0.75, SECOND)
    assert modulator.objects(8) == 6
    assert not modulator.gentle
    modulator.update(3, 1.0, SECOND)
    assert modulator.objects(8) == 8
    modulator.update(3, 0.0, SECOND + QUIET_NS)
    assert modulator.objects(8) == 8


def test_while_the_guest_reads_the_backend_a_few_small_writes_go_at_a_time() -> None:
    bench = Backend(object_bytes=4 << 20, slots=8192)
    bench.write(0, 1000)
    bench.flush()
    bench.now_ns += 2 * SECOND
    bench.ask(op.REQUEST_READ, 5000, 1)
    bench.turn()
    writes = [code for code, _ in bench.io].count(op.WRITE)
    assert writes == 2
    assert all(count <= 128 for _, count in bench.writes)
    bench.wait(SECOND)
    assert sum(count for _, count in bench.writes) == 1000


def test_settings_change_while_the_volume_is_in_use() -> None:
    bench = Backend(destage=False)
    bench.write(1)
    bench.flush()
    bench.wait(4 * SECOND)
    assert not bench.writes
    bench.volume.tune({"destage": True, "destage_after": SECOND // 2, "max_batched_objects": 1})
    bench.wait(SECOND)
    assert bench.writes == [(1, 1)]
    bench.volume.tune({"destage_threshold": 0, "destage_after": 3600 * SECOND})
    bench.write(2)
    bench.flush()
    bench.wait(SECOND)
    assert bench.writes == [(1, 1), (2, 1)]
    bench.volume.tune({"sync_interval": SECOND // 10, "checkpoint_interval": SECOND})
    bench.write(3)
    bench.wait(SECOND)
    assert bench.volume.statistics()["volatile_blocks"] == 0
