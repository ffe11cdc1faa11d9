"""The volume with a log, one situation a test. The simulator (tests/sim) finds what nobody has thought of."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.log.harness import BOOT, IMAGE, TIER, new_cache
from vhostcache import operations as op
from vhostcache.log.format import RING_OFFSET_BYTES
from vhostcache.log.recovery import recover
from vhostcache.log.superblock import A_OFFSET_BYTES, B_OFFSET_BYTES, WRITE_CACHE_OFF, WRITE_CACHE_ON
from vhostcache.log_volume import CHORES_NS, LogVolume, LogVolumeSettings
from vhostcache.map import CLEAN

EIO = 5
EBADMSG = 74
SECOND = 1_000_000_000

_WORDS = {
    op.IN: 2,
    op.OUT: 2,
    op.READ: 3,
    op.WRITE: 3,
    op.READ_DIRECT: 3,
    op.LOG_READ_DIRECT: 3,
    op.FLUSH: 1,
    op.LOG_FLUSH: 1,
    op.ZERO: 3,
    op.SLOT_COPY: 1,
    op.SLOT_ZERO: 1,
    op.LOG_SEQ: 1,
    op.RETIRE: 1,
    op.PUBLISH: 1,
    op.LOG_READ: 2,
    op.SUPERBLOCK: 2,
    op.LOG_WRITE: 4,
}
_SLOTS_FOLLOW = (op.IN, op.OUT, op.READ, op.WRITE, op.LOG_READ, op.SUPERBLOCK, op.LOG_WRITE)
_BEGIN_IO = (op.READ, op.WRITE, op.FLUSH, op.ZERO, op.LOG_READ, op.LOG_WRITE, op.LOG_FLUSH, op.SUPERBLOCK)


class Bench:
    """A volume and what it has asked the engine to do: no data, only the order of things. I/O ends when told."""

    def __init__(
        self, slots: int = 4096, ring_blocks: int = 8192, groups: int = op.GROUPS, head: int = 0, **settings: Any
    ) -> None:
        recovered = recover(new_cache(ring_blocks), None, BOOT, IMAGE, tier_uuid=TIER)
        block = dataclasses.replace(recovered.superblock, write_cache=WRITE_CACHE_ON)
        if head:
            block = dataclasses.replace(block, tail_address=head, clean_address=head, durable_address=head)
            recovered = dataclasses.replace(recovered, head_address=head)
        recovered = dataclasses.replace(recovered, superblock=block)
        self.operations: list[int] = []
        chosen = {
            "index": 0,
            "size_bytes": IMAGE.size_bytes,
            "object_bytes": 256 << 10,
            "slots": op.FIRST_SLOT + slots,
            "tier_entries": 4096,
            "destage": False,
            **settings,
        }
        self.volume = LogVolume(LogVolumeSettings(**chosen), self.operations, recovered, groups=groups)
        self.now_ns = SECOND
        self.deadline_ns = 0
        self.io: list[tuple[int, int]] = []
        """Code and group of what is in flight."""
        self.answers: dict[int, int] = {}
        """Tag -> status."""
        self.seen: list[int] = []
        """Codes of operations."""
        self.zeroes: list[tuple[int, int, bool]] = []
        """On the backend: offset, bytes, whether they may be unmapped."""
        self.superblocks: list[int] = []
        """Offsets at which they were written."""
        self.log_reads: list[tuple[int, int]] = []
        """Offset in the cache file, blocks."""
        self.tag = 0

    def ask(self, kind: int, block: int = 0, blocks: int = 0, *, sector: int = 0, sectors: int = 0) -> int:
        self.tag += 1
        self.volume.requests([kind], [self.tag], [block * 8 + sector], [blocks * 8 + sectors], self.now_ns)
        self.turn()
        return self.tag

    def turn(self) -> None:
        self.deadline_ns = self.volume.tick(self.now_ns)
        self.run()

    def run(self) -> None:
        stream = iter(list(self.operations))
        self.operations.clear()
        for word in stream:
            code, name, argument = word & 255, word >> 8 & 0xFFFFFF, word >> 32
            words = [next(stream) for _ in range(_WORDS.get(code, 0))]
            if code == op.LOG_WRITE:
                header = [next(stream) for _ in range(words[3])]
                blocks = 2 if words[2] >> 32 else 1
                assert 8 * len(header) + 4 * argument <= blocks * op.BLOCK_BYTES, "the header does not fit"
            if code in _SLOTS_FOLLOW:
                words += [next(stream) for _ in range(argument)]
            elif code == op.PUBLISH:
                words += [next(stream) for _ in range(2 * argument)]
            self.seen.append(code)
            if code == op.ZERO:
                self.zeroes.append((words[1], words[2], bool(argument)))
            if code == op.LOG_READ:
                self.log_reads.append((words[1], argument))
            if code == op.SUPERBLOCK:
                self.superblocks.append(words[1])
            if code in _BEGIN_IO or (code in (op.READ_DIRECT, op.LOG_READ_DIRECT) and not argument):
                self.io.append((code, words[0] & 0xFFFFFFFF))
            elif code in (op.OUT1, op.LOG1):
                self.answers[name] = op.STATUS_OK
            elif code == op.COMPLETE:
                self.answers[name] = argument

    def end(self, code: int, result: int = 0) -> None:
        """The oldest I/O of this kind ends, all parts of its group at once; a turn follows."""
        group = next(group for kind, group in self.io if kind == code)
        self.io = [(kind, other) for kind, other in self.io if other != group]
        self.volume.io_done(group, result)
        self.turn()

    def settle(self) -> None:
        """Everything in flight ends well; turns that are due at once, or when the guest lets the chores be done, are
        taken."""
        while self.io or self.deadline_ns <= self.now_ns + CHORES_NS:
            if self.io:
                self.end(self.io[0][0])
            else:
                self.now_ns = max(self.now_ns, self.deadline_ns)
                self.turn()

    def write(self, block: int, blocks: int = 1) -> int:
        return self.ask(op.REQUEST_WRITE, block, blocks)

    def flush(self, vouched: bool = True) -> None:
        """A flush of the guest, and all that it needs. `vouched`: and something says that it was durable, as the next
        record or checkpoint does."""
        tag = self.ask(op.REQUEST_FLUSH)
        self.settle()
        assert self.answers[tag] == op.STATUS_OK
        if vouched:
            self.volume._writer.vouched_address = self.volume._writer.durable_address

    def evict(self) -> None:
        """Nothing clean stays in RAM."""
        self.volume._cache.evict(self.volume._map.state.count(CLEAN))


def test_small_writes_do_not_fill_the_record_that_a_large_one_has_asked_for() -> None:
    bench = Bench()
    large = bench.ask(op.REQUEST_WRITE, 100, 800, sector=1)  # waits for what its first block has
    for block in range(2000, 4000, 2):
        bench.write(block)
    bench.settle()
    assert bench.answers[large] == op.STATUS_OK
    bench.flush()


def test_zeroes_do_not_overfill_the_header_of_a_large_record() -> None:
    bench = Bench()
    bench.write(0, 1000)
    for block in range(2000, 2200, 2):
        bench.ask(op.REQUEST_ZERO, block, 1)
    bench.flush()


def test_zeroes_that_are_to_stay_allocated_are_destaged_as_such() -> None:
    bench = Bench(destage=True)
    bench.ask(op.REQUEST_DISCARD, 8, 4)
    bench.ask(op.REQUEST_ZERO, 12, 4)
    bench.ask(op.REQUEST_ZERO_UNMAP, 16, 4)
    bench.ask(op.REQUEST_ZERO, 18, 8)
    bench.ask(op.REQUEST_DISCARD, 20, 1)
    bench.flush()
    bench.volume.drain()
    bench.turn()
    bench.settle()
    wanted = [(8, 4, True), (12, 4, False), (16, 2, True), (18, 2, False), (20, 1, True), (21, 5, False)]
    assert sorted(bench.zeroes) == [(4096 * at, 4096 * count, unmap) for at, count, unmap in wanted]


def test_what_only_we_know_to_be_durable_is_destaged_when_the_superblocks_or_the_next_record_say_so() -> None:
    bench = Bench(destage=True, destage_after_ns=SECOND)
    bench.write(1)
    bench.flush(vouched=False)
    bench.now_ns += 2 * SECOND
    bench.turn()
    assert [code for code, _ in bench.io] == [op.SUPERBLOCK], "first of all a checkpoint"
    bench.settle()
    assert bench.volume.statistics()["blocks_destaged"] == 1
    assert bench.superblocks == [A_OFFSET_BYTES, B_OFFSET_BYTES]
    bench.write(2)
    bench.flush(vouched=False)
    bench.write(70)
    bench.flush(vouched=False)
    bench.now_ns += 2 * SECOND
    bench.turn()
    assert op.WRITE in [code for code, _ in bench.io], "the second record speaks for the first"
    bench.settle()
    assert bench.volume.statistics()["blocks_destaged"] == 3


def test_a_read_that_the_log_and_a_dead_backend_share_waits_no_longer_than_it_may() -> None:
    bench = Bench(backend_timeout_ns=SECOND)
    bench.write(0, 32)
    bench.flush()
    bench.evict()
    tag = bench.ask(op.REQUEST_READ, 0, 64)
    assert [code for code, _ in bench.io] == [op.LOG_READ_DIRECT, op.READ]
    bench.now_ns += 2 * SECOND
    bench.turn()
    assert tag not in bench.answers, "the log's part may still come"
    bench.end(op.LOG_READ_DIRECT)
    assert bench.deadline_ns <= bench.now_ns + SECOND // 10
    bench.now_ns = bench.deadline_ns
    bench.turn()
    assert bench.answers[tag] == op.STATUS_IOERR


def test_what_has_rotted_fails_only_those_who_have_asked_for_it() -> None:
    bench = Bench()
    bench.write(0, 8)
    bench.flush()
    bench.evict()
    both = bench.ask(op.REQUEST_READ, 0, 8)
    whole = bench.ask(op.REQUEST_READ, 7, 1)
    part = bench.ask(op.REQUEST_WRITE, 6, sectors=1)
    assert [code for code, _ in bench.io] == [op.LOG_READ]
    bench.end(op.LOG_READ, -EBADMSG)
    assert bench.answers == {1: op.STATUS_OK, 2: op.STATUS_OK, both: op.STATUS_IOERR}
    bench.end(op.LOG_READ)
    bench.end(op.LOG_READ, -EBADMSG)
    assert (bench.answers[whole], bench.answers[part]) == (op.STATUS_OK, op.STATUS_IOERR)


def test_nothing_is_appended_to_a_log_that_is_being_closed() -> None:
    bench = Bench(slots=2048, ring_blocks=4096)
    bench.write(0)
    bench.flush()
    early = bench.volume._writer.durable_address - 1
    for block in range(0, 1500, 50):
        bench.write(block, 50)
    bench.flush()
    bench.volume._index.lose(3000, 3100, early)  # so long ago that it is to be said again
    bench.seen.clear()
    bench.volume.close(lambda: 0)
    bench.turn()
    bench.settle()
    assert bench.volume.closed
    assert op.LOG_WRITE not in bench.seen
    assert bench.volume._checkpointer.superblock.clean_address <= early


def test_what_is_overwritten_again_and_again_takes_no_more_memory() -> None:
    bench = Bench(slots=1024)
    for _ in range(40):
        for block in range(200):
            bench.write(block)
        bench.flush()
    cache = bench.volume._cache
    assert sum(map(len, cache._runs)) <= 1024 + 256


def test_a_rotten_block_is_lost_once_and_found_again_when_it_has_been_overwritten() -> None:
    bench = Bench(destage=True)
    bench.write(7)
    bench.flush()
    bench.evict()
    bench.volume.drain()
    bench.turn()
    bench.end(op.LOG_READ, -EBADMSG)
    for _ in range(5):
        bench.turn()
        bench.settle()
    assert bench.volume.drained, "there is nothing more to be had"
    statistics = bench.volume.statistics()
    assert statistics["lost_blocks"] == 1
    assert statistics["log_clean"] == statistics["log_head"] - 1, "the extent that says so stays"
    bench.now_ns += 11 * SECOND
    bench.settle()
    assert bench.volume.statistics()["destages"] == statistics["destages"], "it is not tried again and again"
    bench.write(7)
    bench.flush()
    bench.evict()
    for _ in range(5):
        bench.turn()
        bench.settle()
    assert bench.volume.drained
    assert bench.volume.statistics()["lost_blocks"] == 0
    assert bench.volume.statistics()["log_clean"] == bench.volume.statistics()["log_head"]


def destaged(bench: Bench, *blocks: int) -> None:
    """They are written, flushed, on the backend, and in the log alone besides."""
    for block in blocks:
        bench.write(block)
    bench.flush()
    bench.evict()
    bench.volume.drain()
    bench.turn()
    bench.settle()
    bench.volume.drain(False)
    assert bench.volume._destager.settled


@pytest.mark.parametrize("rotten", [False, True])
def test_what_was_written_in_a_row_is_read_in_long_pieces_from_the_log(rotten: bool) -> None:
    ring_blocks = 8192
    bench = Bench(ring_blocks=ring_blocks, head=ring_blocks - 500, object_bytes=4 << 20)
    for first in range(0, 1024, 128):
        bench.write(first, 128)
    bench.flush()
    bench.evict()
    bench.volume.drain()
    while not bench.log_reads:
        bench.now_ns = max(bench.now_ns, bench.deadline_ns)
        bench.turn()
    assert len(bench.log_reads) < 8, "so many blocks are read, then the next ones"
    if rotten:
        while op.LOG_READ in [code for code, _ in bench.io] and bench.log_reads[-1][1] > 1:
            bench.end(op.LOG_READ, -EBADMSG)
        assert bench.log_reads[-1][1] == 1
        bench.end(op.LOG_READ, -EBADMSG)
    bench.settle()
    statistics = bench.volume.statistics()
    assert statistics["blocks_destaged"] == 1024 - rotten
    assert statistics["lost_blocks"] == rotten
    end = RING_OFFSET_BYTES + ring_blocks * op.BLOCK_BYTES
    assert all(RING_OFFSET_BYTES < at <= end - count * op.BLOCK_BYTES for at, count in bench.log_reads)
    if not rotten:
        assert sum(count for _, count in bench.log_reads) == 1024
        assert len(bench.log_reads) <= 1024 // 128 + 4


@pytest.mark.parametrize("together", [True, False], ids=["in_one_turn", "one_after_the_other"])
def test_a_write_overtakes_a_read_of_a_stored_block(together: bool) -> None:
    bench = Bench()
    bench.write(3)
    bench.flush()
    bench.evict()
    if together:
        kinds = [op.REQUEST_READ, op.REQUEST_WRITE]
        bench.volume.requests(kinds, [50, 51], [24, 24], [8, 8], bench.now_ns)
        bench.turn()
    else:
        bench.ask(op.REQUEST_READ, 3, 1)
        bench.write(3)
    block_map = bench.volume._map
    slot = block_map.where[3]
    free = len(block_map.free)
    bench.end(op.LOG_READ)
    assert list(bench.answers.values()) == [op.STATUS_OK] * len(bench.answers)
    assert block_map.where[3] == slot, "what was read is old"
    assert len(block_map.free) == free + 1


def test_reads_of_stored_blocks_join_and_can_be_dropped() -> None:
    bench = Bench()
    bench.write(3)
    bench.flush()
    bench.evict()
    first, second = bench.ask(op.REQUEST_READ, 3, 1), bench.ask(op.REQUEST_READ, 3, 1)
    assert [code for code, _ in bench.io] == [op.LOG_READ]
    bench.volume.quiesce(may_drop=True)
    bench.turn()
    assert bench.seen.count(op.DROP) == 2
    bench.end(op.LOG_READ)
    assert not {first, second} & bench.answers.keys()
    assert bench.volume.idle
    assert bench.ask(op.REQUEST_READ, 3, 1) in bench.answers, "it is in RAM all the same"


def test_reads_of_stored_blocks_leave_what_the_log_needs_to_go_on() -> None:
    bench = Bench(ring_blocks=16384, groups=512)
    for first in range(0, 1024, 128):
        bench.write(first, 128)
    bench.flush()
    bench.evict()
    tags = [bench.ask(op.REQUEST_READ, block, 1) for block in range(1024)]
    assert bench.volume._io.available() > 0
    assert bench.volume._parked
    bench.settle()
    assert all(bench.answers[tag] == op.STATUS_OK for tag in tags)


@pytest.mark.parametrize("errno", [EBADMSG, EIO])
@pytest.mark.parametrize("count", [1, 8])
def test_what_the_log_cannot_give_of_clean_blocks_comes_from_the_backend(errno: int, count: int) -> None:
    bench = Bench(destage=True)
    destaged(bench, *range(8))
    bench.write(4)
    bench.flush()
    bench.evict()
    tag = bench.ask(op.REQUEST_READ, 0, count)
    bench.end(op.LOG_READ, -errno)
    if count > 4:
        bench.end(op.LOG_READ)  # only the log has it
    while op.READ not in [code for code, _ in bench.io]:
        bench.end(op.LOG_READ, -errno)
    bench.settle()
    assert bench.answers[tag] == op.STATUS_OK
    assert bench.volume.statistics()["log_passed_over_blocks"] in (1, 4, 7)
    bench.evict()
    tag = bench.ask(op.REQUEST_READ, 0)
    assert op.LOG_READ not in [code for code, _ in bench.io], "it is not asked again"


def test_what_the_log_cannot_give_of_other_blocks_is_an_error() -> None:
    bench = Bench(destage=True)
    bench.ask(op.REQUEST_ZERO, 0, 64)  # a whole object
    bench.flush()
    destaged(bench, 1)
    tag = bench.ask(op.REQUEST_READ, 1, 1)
    bench.end(op.LOG_READ, -EIO)
    assert bench.answers[tag] == op.STATUS_IOERR, "the index would take it for zero"
    bench.write(100)
    bench.flush()
    bench.evict()
    tag = bench.ask(op.REQUEST_READ, 100, 1)
    bench.end(op.LOG_READ, -EIO)
    assert bench.answers[tag] == op.STATUS_IOERR, "nobody else has it"
    bench.volume.drain()
    bench.turn()
    bench.end(op.LOG_READ, -EBADMSG)
    bench.settle()
    assert bench.volume.statistics()["lost_blocks"] == 1
    bench.write(101)
    bench.flush()
    bench.settle()  # the object is clean now, above what says that the block is lost
    tag = bench.ask(op.REQUEST_READ, 100, 1)
    bench.end(op.LOG_READ, -EBADMSG)
    assert bench.answers[tag] == op.STATUS_IOERR, "what the backend has is older"
    assert bench.volume.statistics()["log_passed_over_blocks"] == 0


def test_what_the_last_durable_records_give_back_is_offered_at_once() -> None:
    bench = Bench(slots=4096, record_blocks=16)
    for block in range(16 * 7):
        bench.write(block)
    bench.ask(op.REQUEST_FLUSH)
    while not any(code == op.LOG_FLUSH for code, _ in bench.io):
        bench.end(op.LOG_WRITE)
    bench.end(op.LOG_FLUSH)
    while bench.volume._writer._records:
        assert bench.deadline_ns <= bench.now_ns + CHORES_NS
        bench.now_ns = max(bench.now_ns, bench.deadline_ns)
        bench.turn()
    assert bench.deadline_ns <= bench.now_ns  # whoever waits for slots, entries or durable records has not seen it


def test_a_record_behind_padding_enters_the_index_at_once_too() -> None:
    bench = Bench(head=8192 - 4)  # the first record of this process needs padding before it
    bench.write(1)
    bench.ask(op.REQUEST_FLUSH)
    bench.end(op.LOG_WRITE)
    bench.end(op.LOG_WRITE)
    bench.end(op.LOG_FLUSH)
    for _ in range(4):
        assert bench.deadline_ns <= bench.now_ns + CHORES_NS
        bench.now_ns = max(bench.now_ns, bench.deadline_ns)
        bench.turn()
        if not bench.volume._writer._records:
            return
    pytest.fail("it is durable, and not in the index")


def test_commits_that_follow_one_another_do_not_keep_the_index_waiting() -> None:
    bench = Bench()
    bench.write(0)
    bench.ask(op.REQUEST_FLUSH)
    for block in range(1, 50):  # in each turn one has ended, and the next one begins
        (_, group), bench.io = bench.io[0], bench.io[1:]
        bench.now_ns += CHORES_NS // 5
        bench.volume.io_done(group, 0)
        kinds, tags = [op.REQUEST_WRITE, op.REQUEST_FLUSH], [1000 + 2 * block, 1001 + 2 * block]
        bench.volume.requests(kinds, tags, [8 * block, 0], [8, 0], bench.now_ns)
        bench.turn()
        assert len(bench.volume._writer._records) <= 10


def test_what_waits_for_the_index_is_not_committed_again() -> None:
    bench = Bench(slots=4096, record_blocks=16, sync_interval_ns=SECOND)
    for block in range(16 * 7):
        bench.write(block)
    bench.now_ns += SECOND
    bench.turn()
    while bench.io:
        bench.end(bench.io[0][0])
    assert len(bench.volume._writer._records) > 2
    bench.write(1000)
    assert not bench.io  # it is younger than that
    assert bench.volume._writer._records


@pytest.mark.parametrize("failing", [op.LOG_FLUSH, op.LOG_WRITE])
def test_a_superblock_that_was_written_before_a_sync_failed_is_written_again(failing: int) -> None:
    bench = Bench()
    bench.volume.set_write_cache(False)  # a checkpoint
    bench.turn()
    if failing == op.LOG_FLUSH:
        bench.volume._writer.sync(lambda result: None)  # it waits for a fdatasync only
        bench.turn()
    else:
        bench.write(1)  # durable by itself
    assert {failing, op.SUPERBLOCK} == {code for code, _ in bench.io}
    bench.end(op.SUPERBLOCK)  # it is in the device's cache, and waits for the next fdatasync
    bench.end(failing, -EIO)
    if failing == op.LOG_WRITE:
        bench.end(op.LOG_FLUSH)  # it has begun before the failure, which may have taken the superblock along
    bench.superblocks.clear()
    bench.now_ns += SECOND
    bench.turn()
    while op.LOG_FLUSH not in [code for code, _ in bench.io]:
        if bench.io:
            bench.end(bench.io[0][0])
        else:
            assert bench.deadline_ns <= bench.now_ns
            bench.turn()
    bench.end(op.LOG_FLUSH)
    bench.settle()
    assert bench.superblocks == [A_OFFSET_BYTES, B_OFFSET_BYTES]
    checkpointer = bench.volume._checkpointer
    assert checkpointer.superblock.write_cache == WRITE_CACHE_OFF


def test_a_superblock_whose_end_is_told_together_with_a_failed_sync_is_written_again() -> None:
    bench = Bench()
    bench.volume.set_write_cache(False)  # a checkpoint
    bench.turn()
    bench.write(1)  # durable by itself
    groups = dict(bench.io)
    assert groups.keys() == {op.SUPERBLOCK, op.LOG_WRITE}
    bench.io.clear()
    bench.volume.io_done(groups[op.SUPERBLOCK], 0)
    bench.volume.io_done(groups[op.LOG_WRITE], -EIO)
    bench.superblocks.clear()
    bench.turn()
    bench.now_ns += SECOND
    bench.turn()
    bench.settle()
    assert bench.superblocks == [A_OFFSET_BYTES, B_OFFSET_BYTES]


def test_a_flush_of_all_that_is_volatile_takes_one_operation() -> None:
    bench = Bench()
    bench.write(1)
    bench.write(2)
    flush = bench.ask(op.REQUEST_FLUSH)
    assert [code for code, _ in bench.io] == [op.LOG_WRITE]
    later = bench.write(3)
    assert bench.answers[later] == op.STATUS_OK
    assert flush not in bench.answers
    bench.end(op.LOG_WRITE)
    assert bench.answers[flush] == op.STATUS_OK
    assert not bench.io
    counters = bench.volume._writer.counters
    assert (counters["log_durable_writes"], counters["log_fdatasyncs"]) == (1, 1)


def test_a_flush_waits_for_what_was_written_before_its_own_record() -> None:
    bench = Bench(slots=4096, record_blocks=16)
    for block in range(20):
        bench.write(block)
    flush = bench.ask(op.REQUEST_FLUSH)
    assert [code for code, _ in bench.io] == [op.LOG_WRITE] * 2
    bench.end(op.LOG_WRITE)
    bench.end(op.LOG_WRITE)
    assert flush not in bench.answers
    bench.end(op.LOG_FLUSH)
    assert bench.answers[flush] == op.STATUS_OK


def test_a_log_block_that_cannot_be_read_does_not_hold_up_writes() -> None:
    bench = Bench(destage=True)
    bench.write(7)
    bench.flush()
    bench.evict()
    bench.volume.drain()
    bench.turn()
    bench.end(op.LOG_READ, -EIO)
    tag = bench.write(9)
    assert bench.answers[tag] == op.STATUS_OK


def test_rot_all_over_an_object_takes_no_more_groups_than_there_are() -> None:
    bench = Bench(destage=True, groups=128, object_bytes=4 << 20)
    for first in range(0, 1024, 8):
        bench.write(first, 8)
    bench.flush()
    bench.evict()
    bench.volume.drain()
    bench.turn()
    for _ in range(3000):
        if not any(code == op.LOG_READ for code, _ in bench.io):
            break
        bench.end(op.LOG_READ, -EBADMSG)
    bench.write(5000)
    bench.flush()


def test_a_device_that_answers_nothing_takes_no_more_groups_than_there_are() -> None:
    bench = Bench(groups=128)
    tags = []
    for block in range(300):
        tags.append(bench.write(block))
        tags.append(bench.ask(op.REQUEST_DISCARD, block, 1))
    bench.settle()
    assert all(bench.answers[tag] == op.STATUS_OK for tag in tags)


def test_a_write_that_waits_for_room_does_not_use_up_the_pace_again_and_again() -> None:
    bench = Bench()
    pacer = bench.volume._pacer
    pacer.update(8000, 0, 0, 1)
    assert pacer.active
    bench.volume._writer.blocked = True
    before = pacer._credit
    bench.volume.requests([op.REQUEST_WRITE], [1], [0], [8000], SECOND)
    for _ in range(3):
        bench.volume._admit_waiting()
    assert abs(pacer._credit - before) < 0.01
    bench.volume._writer.blocked = False
    bench.volume._admit_waiting()
    assert not bench.volume._room
    assert abs(pacer._credit - (before - 1000)) < 0.01


def test_what_a_destage_has_chosen_stays_in_the_log_until_it_has_been_read() -> None:
    bench = Bench(turn_blocks=1)
    writer, destager = bench.volume._writer, bench.volume._destager
    bench.write(0, 3)
    bench.flush()
    bench.volume.drain()
    bench.turn()
    bench.settle()
    bench.volume.drain(False)
    assert bench.volume.drained
    clean = bench.volume._index.lookup(1) >> 1
    for block in (0, 2):
        bench.write(block)
        bench.flush()
    bench.evict()
    destager._speed.answered(2_000_000)  # so far away that the clean block between them is written too
    bench.volume.drain()
    bench.turn()
    assert destager._chosen
    assert op.LOG_READ not in [code for code, _ in bench.io]
    assert min(writer.reading) <= clean
    assert bench.deadline_ns <= bench.now_ns
    bench.turn()
    assert op.LOG_READ in [code for code, _ in bench.io]
    assert min(writer.reading) <= clean
    bench.settle()
    assert not writer.reading
    assert destager.counters["blocks_bridged"] == 1


def test_objects_that_cannot_be_destaged_do_not_hide_those_that_can() -> None:
    bench = Bench(destage=True, destage_after_ns=SECOND)
    for number in range(12):
        bench.write(64 * number)
    bench.flush()
    bench.evict()
    bench.now_ns += 2 * SECOND
    bench.turn()
    for _ in range(100):
        codes = [code for code, _ in bench.io]
        if op.LOG_READ in codes:
            bench.end(op.LOG_READ, -EBADMSG)
        elif codes:
            bench.end(codes[0])
        else:
            bench.turn()
    assert bench.volume.statistics()["lost_blocks"] == 12
    bench.write(64 * 50)
    bench.flush()
    bench.now_ns += 2 * SECOND
    bench.turn()
    bench.settle()
    assert bench.volume.statistics()["blocks_destaged"] == 1


def test_a_close_ends_in_the_turn_in_which_the_last_destage_does() -> None:
    bench = Bench(destage=True, destage_after_ns=SECOND)
    bench.write(1)
    bench.flush()
    bench.write(1)  # a newer version, which is not durable
    bench.now_ns += SECOND
    bench.turn()
    bench.volume.close(lambda: 1)
    for _ in range(60):
        if bench.volume.closed:
            break
        if bench.io:
            codes = [code for code, _ in bench.io]
            # The cache is slower than the backend: the destage waits for the newer version.
            slow = (op.LOG_FLUSH, op.LOG_WRITE)
            bench.end(next((code for code in codes if code not in slow), codes[0]))
        else:
            assert bench.deadline_ns <= bench.now_ns + SECOND, "nobody will wake it"
            bench.now_ns = max(bench.now_ns, bench.deadline_ns)
            bench.turn()
    assert bench.volume.closed


def test_nothing_is_answered_as_durable_before_the_superblocks_know_that_the_guest_does_not_flush() -> None:
    bench = Bench()
    bench.volume.set_write_cache(False)
    bench.turn()
    tag = bench.write(3)
    while any(code != op.SUPERBLOCK for code, _ in bench.io):
        bench.end(next(code for code, _ in bench.io if code != op.SUPERBLOCK))
    assert tag not in bench.answers
    while tag not in bench.answers:
        bench.end(bench.io[0][0])
    assert bench.volume._checkpointer.superblock.write_cache == WRITE_CACHE_OFF
