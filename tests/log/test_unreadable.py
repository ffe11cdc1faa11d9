"""Bad sectors of the cache device under data that only the log has: what is tried again, what is given up, and when."""

from __future__ import annotations

from typing import Any

import pytest

from tests.log.test_destage import EIO, OBJECT, Backend, _length
from tests.log.test_log_volume import SECOND
from vhostcache import operations as op
from vhostcache.backoff import HELD_NS, READ_HINT, READS_MOST
from vhostcache.log import format as fmt
from vhostcache.log.probe import Probe
from vhostcache.log.unreadable import ATTEMPTS, RETRY_NS, WITNESSES, Attempt, UnreadableBlocks, tried_again
from vhostcache.map import CLEAN

EBADMSG = 74


def test_an_attempt_counts_when_enough_time_has_passed() -> None:
    first = tried_again(None, 77, 5)
    assert first == Attempt(77, 1, 5)
    assert tried_again(first, 77, 4 + RETRY_NS) == first
    assert tried_again(first, 77, 5 + RETRY_NS) == Attempt(77, 2, 5 + RETRY_NS)
    assert tried_again(first, 78, 5 + RETRY_NS) == Attempt(78, 1, 5 + RETRY_NS), "a newer version"


def test_a_block_is_given_up_after_so_many_attempts_in_a_row() -> None:
    unreadable = UnreadableBlocks()
    for attempt in range(1, ATTEMPTS):
        assert unreadable.judge(0, [(3, 70), (4, 71)], True, attempt * RETRY_NS) == ([], {3: attempt, 4: attempt})
    assert unreadable.addresses() == unreadable.addresses([0, 1]) == {70, 71}
    assert unreadable.addresses([1]) == set()
    assert unreadable.judge(0, [(3, 70)], True, ATTEMPTS * RETRY_NS) == ([(3, 70)], {})
    assert unreadable.count == 0
    assert unreadable.addresses() == {70}, "the other one could be read"
    assert unreadable.judge(0, [(3, 70), (5, 72)], True, ATTEMPTS * RETRY_NS) == ([(3, 70)], {5: 1})
    unreadable.forget(0)
    assert not unreadable


def test_while_the_device_does_not_work_nothing_counts_and_all_begins_anew() -> None:
    unreadable = UnreadableBlocks()
    for attempt in range(1, ATTEMPTS):
        unreadable.judge(0, [(3, 70)], True, attempt * RETRY_NS)
    for attempt in range(ATTEMPTS, 100):
        assert unreadable.judge(0, [(3, 70)], False, attempt * RETRY_NS) == ([], {3: 0})
    assert unreadable.judge(0, [(3, 70)], True, 100 * RETRY_NS) == ([], {3: 1})


class Sectors(Backend):
    """A bench whose cache device cannot read some places of the log."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.bad: set[int] = set()
        """Positions in the ring."""
        self.dead = False
        self.failures: list[int] = []
        """Reads of so many blocks fail once each."""
        self.rotten: set[int] = set()
        self._reads: dict[int, set[int]] = {}
        """Group -> the positions that it reads."""
        self.reads: list[int] = []
        """How many blocks each log read had."""

    def run(self) -> None:
        words = list(self.operations)
        at = 0
        while at < len(words):
            if words[at] & 255 == op.LOG_READ:
                first, count = (words[at + 2] - fmt.RING_OFFSET_BYTES) // op.BLOCK_BYTES, words[at] >> 32
                self._reads.setdefault(words[at + 1] & 0xFFFFFFFF, set()).update(range(first, first + count))
                self.reads.append(count)
            at += _length(words, at)
        super().run()

    def end(self, code: int, result: int = 0) -> None:
        if code == op.LOG_READ:
            group = next(group for kind, group in self.io if kind == code)
            owner = self.volume._io._owners[group]
            if isinstance(owner, Probe):
                for destage in self.volume._destager.in_flight.values():
                    assert owner._slot not in destage.slots, "what was read to be written is overwritten"
            positions = self._reads.pop(group)
            if self.failures and len(positions) in self.failures:
                self.failures.remove(len(positions))
                result = -EIO
            if self.dead or positions & self.bad:
                result = -EIO
            elif positions & self.rotten:
                result = -EBADMSG
        super().end(code, result)

    def position(self, block: int) -> int:
        return (self.volume._index.lookup(block) >> 1) % self.volume._writer.ring_blocks

    def fill(self, blocks: int = OBJECT) -> None:
        """An object, durable in the log alone, and something in others."""
        for block in range(blocks):
            self.write(block)
        for number in range(1, 6):
            self.write(1000 * number)
        self.flush()
        self.evict()

    def events(self, name: str) -> list[dict[str, object]]:
        return [fields for event, fields in self.volume.notices if event == name]

    def statistic(self, name: str) -> int:
        return self.volume.statistics()[name]

    def is_clean(self) -> bool:
        return self.statistic("log_clean") == self.statistic("log_head")


def test_all_but_the_bad_sector_is_destaged_at_once_and_it_is_lost_after_five_attempts() -> None:
    bench = Sectors()
    bench.fill()
    bench.bad = {bench.position(20)}
    bench.wait(2 * SECOND)
    assert (0, 20) in bench.writes
    assert (21, OBJECT - 21) in bench.writes
    assert bench.events("log-unreadable") == [
        {"operation": "destage", "errno": EIO, "offset": 20 * 4096, "bytes": 4096, "attempts": 1, "of_attempts": 5}
    ]
    assert bench.statistic("unreadable_blocks") == 1
    assert not bench.is_clean()
    bench.wait(3 * RETRY_NS + SECOND)
    assert [event["attempts"] for event in bench.events("log-unreadable")] == [1, 2, 3, 4]
    assert bench.statistic("lost_blocks") == 0
    bench.wait(RETRY_NS)
    assert bench.events("log-lost") == [{"errno": EIO, "offset": 20 * 4096, "bytes": 4096, "attempts": 5}]
    assert bench.statistic("lost_blocks") == 1
    assert bench.statistic("unreadable_blocks") == 0
    assert bench.volume.statistics()["dirty_objects"] == 0
    tag = bench.ask(op.REQUEST_READ, 20, 1)
    bench.rotten = {bench.position(20)}  # a header
    bench.settle()
    assert bench.answers[tag] == op.STATUS_IOERR
    before = len(bench.reads)
    bench.wait(2 * RETRY_NS)
    assert len(bench.reads) == before, "it is not tried for ever"
    bench.write(20)
    bench.flush()
    bench.wait(2 * SECOND)
    assert bench.statistic("lost_blocks") == 0
    assert bench.is_clean()


def test_what_could_not_be_read_before_is_tried_block_by_block() -> None:
    bench = Sectors()
    bench.fill()
    bench.bad = {bench.position(20), bench.position(40)}
    bench.wait(2 * SECOND)
    bench.reads.clear()
    bench.wait(RETRY_NS)
    assert [count for count in bench.reads if count > 1] == [20, 19, 23], "all the rest in long pieces"
    assert bench.reads.count(1) <= 2 + 2 + 2 * WITNESSES


def test_a_read_that_fails_once_more_costs_nothing_of_what_has_been_read() -> None:
    bench = Sectors()
    bench.fill()
    bench.bad = {bench.position(2)}
    bench.failures = [16, 16]  # with the bad block in it, and behind it
    bench.wait(2 * SECOND)
    assert not bench.failures
    assert sorted(bench.writes)[:2] == [(0, 2), (3, OBJECT - 3)]


def test_a_fault_that_passes_loses_nothing() -> None:
    bench = Sectors()
    bench.fill()
    bench.bad = {bench.position(20)}
    bench.wait(3 * RETRY_NS)
    bench.bad.clear()
    bench.wait(RETRY_NS + SECOND)
    assert bench.is_clean()
    assert not bench.events("log-lost")
    assert not bench.volume._destager._unreadable


def test_overwriting_makes_it_moot() -> None:
    bench = Sectors()
    bench.fill()
    bench.bad = {bench.position(20)}
    bench.wait(3 * RETRY_NS)
    bench.write(20)
    bench.flush()
    bench.wait(RETRY_NS + 2 * SECOND)
    assert bench.is_clean()
    assert not bench.events("log-lost")
    assert bench.statistic("unreadable_blocks") == 0


def test_a_device_that_reads_nothing_loses_nothing_however_long_and_is_not_asked_for_each_block() -> None:
    bench = Sectors()
    bench.fill()
    bench.dead = True
    bench.wait(2 * SECOND)
    assert len(bench.reads) <= 6 * (1 + 2 * WITNESSES), "each object once, and a few witnesses for each of them"
    told = len(bench.events("log-unreadable"))
    bench.wait(10 * RETRY_NS)
    assert not bench.events("log-lost")
    assert len(bench.events("log-unreadable")) - told <= 10
    bench.dead = False
    bench.wait(RETRY_NS + SECOND)
    assert bench.is_clean()
    assert bench.statistic("lost_blocks") == 0


def test_when_the_device_has_been_away_in_between_counting_begins_anew() -> None:
    bench = Sectors()
    bench.fill()
    bench.bad = {bench.position(20)}
    bench.wait(3 * RETRY_NS)
    bench.dead = True
    bench.wait(3 * RETRY_NS)
    bench.dead = False
    bench.wait(3 * RETRY_NS)
    assert not bench.events("log-lost")
    bench.wait(3 * RETRY_NS)
    assert bench.events("log-lost")


def test_a_log_with_nothing_but_the_bad_block_is_asked_for_its_headers() -> None:
    bench = Sectors()
    bench.write(7)
    bench.flush()
    bench.evict()
    bench.bad = {bench.position(7)}
    bench.wait(ATTEMPTS * RETRY_NS)
    assert bench.events("log-lost")


def test_rot_and_bad_sectors_in_one_object_are_told_apart() -> None:
    bench = Sectors()
    bench.fill()
    bench.bad = {bench.position(20)}
    bench.rotten = {bench.position(21), bench.position(50)}
    bench.wait(2 * SECOND)
    assert sorted(fields["offset"] for fields in bench.events("log-corrupt")) == [21 * 4096, 50 * 4096]  # type: ignore[type-var]
    assert bench.statistic("lost_blocks") == 2
    assert [fields["offset"] for fields in bench.events("log-unreadable")] == [20 * 4096]
    bench.wait(ATTEMPTS * RETRY_NS)
    assert bench.statistic("lost_blocks") == 3


def test_in_the_policy_ordered_a_bad_sector_holds_its_step_no_longer() -> None:
    bench = Sectors(ordered=True)
    bench.fill()
    bench.bad = {bench.position(20)}
    bench.wait(2 * SECOND)
    bench.write(20)  # a later interval must not overtake it
    bench.flush()
    bench.writes.clear()
    bench.wait(3 * RETRY_NS)
    assert (20, 1) not in bench.writes
    bench.wait(3 * RETRY_NS)
    assert (20, 1) in bench.writes
    assert bench.is_clean()


def test_in_the_policy_ordered_two_versions_that_were_overwritten_are_not_waited_for_in_turn() -> None:
    bench = Sectors(ordered=True)
    bench.fill()
    bench.bad = {bench.position(20)}
    positions = {bench.position(20), bench.position(40)}
    bench.wait(2 * SECOND)
    for block in (20, 40):
        bench.write(block)
    bench.flush()
    bench.bad = positions
    bench.wait((ATTEMPTS + 1) * RETRY_NS)
    assert bench.is_clean()
    assert not bench.events("log-lost"), "there are newer versions"


def test_who_has_mended_the_device_need_not_wait_and_asking_in_a_hurry_counts_for_nothing() -> None:
    bench = Sectors()
    bench.fill()
    bench.bad = {bench.position(20)}
    bench.wait(2 * SECOND)
    for _ in range(2 * ATTEMPTS):
        bench.volume.retry()
        bench.wait(SECOND // 5)
    assert not bench.events("log-lost")
    bench.bad.clear()
    bench.volume.retry()
    bench.wait(SECOND // 5)
    assert bench.is_clean()


def test_a_full_log_goes_on_when_the_bad_sector_in_it_has_been_given_up() -> None:
    bench = Sectors(slots=512, ring_blocks=1200, record_blocks=16)
    bench.write(0)
    bench.flush()
    bench.bad = {bench.position(0)}
    bench.evict()
    tags = []
    for block in range(2000, 4000, 8):
        tags.append(bench.write(block, 8))
        bench.settle()
    bench.volume._cache.evict(bench.volume._map.state.count(CLEAN))
    assert any(tag not in bench.answers for tag in tags), "they wait for room"
    bench.wait((ATTEMPTS + 1) * RETRY_NS)
    assert all(bench.answers.get(tag) == op.STATUS_OK for tag in tags)


@pytest.mark.parametrize("number", [5, 121])
def test_a_unit_that_the_backend_cannot_read_is_held_and_nothing_of_it_is_lost(number: int) -> None:
    bench = Backend(wants_whole_objects=True)
    for block in (64, 1000):
        bench.write(block)
    bench.flush()
    bench.now_ns += 13 * SECOND
    reads = []
    while len(reads) < 2 * READS_MOST:
        bench.turn()
        while bench.io:
            code, group = bench.io[0]
            fails = code == op.READ and bench.volume._io._owners[group]._destage.number == 1  # type: ignore[union-attr]
            if fails:
                reads.append(bench.now_ns)
            bench.end(code, -number if fails else 0)
        bench.now_ns += SECOND // 10
    held = [fields for event, fields in bench.volume.notices if event == "backend-held"]
    assert held == [{"operation": "read", "errno": number, "hint": READ_HINT}]
    assert bench.volume.statistics()["backend_held"] == number
    assert bench.volume.statistics()["dirty_objects"] == 1, "the other one is written"
    assert reads[-1] - reads[-2] >= HELD_NS
    bench.volume.retry()
    bench.wait(13 * SECOND)
    assert bench.volume.notices[-1][0] == "backend-recovered"
    assert bench.volume.statistics()["blocks_destaged"] == 2
