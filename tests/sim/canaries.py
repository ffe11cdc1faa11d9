"""Planted bugs, each of which the simulator must find: otherwise it is not working.

A canary is a patch of the code under test, never a switch in it. `plant` lasts as long as the process does.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final
from unittest import mock

from tests.sim import engine
from tests.sim.world import FOCUS
from vhostcache import guest_requests, log_volume
from vhostcache import operations as op
from vhostcache.fill import Fills
from vhostcache.log import (
    checkpoint,
    decision,
    destage,
    index,
    ordered,
    read_ring,
    recovery,
    sources,
    unreadable,
    walk,
    writer,
)
from vhostcache.log.superblock import A_OFFSET_BYTES, B_OFFSET_BYTES
from vhostcache.map import DIRTY, FREE, ORPHAN, WRITING

CANARIES: Final[dict[str, Callable[[], None]]] = {}
SIZES: Final[dict[str, dict[str, Any]]] = {}
"""For those that take many seeds otherwise: what kind of run finds them soon."""
SIZES["destage-what-nothing-vouches-for"] = {**FOCUS[0], "flips": 1.0, "openings": 2, "steps": 40, "ordered": False}
SIZES["destage-what-is-not-durable"] = {
    **FOCUS[0],
    "power": 1.0,
    "ordered": False,
    "blocks": 12,
    "steps": 60,
}
SIZES["no-epoch"] = SIZES["no-open-seq"] = {**FOCUS[1], "recovery_crashes": 0.0, "cache_faults": 0.0, "flips": 0.0}
SIZES["write-cache-forgotten"] = {**FOCUS[4], "ignore_flush": False}
for _name in (
    "ordered-without-intervals",
    "ordered-with-the-newest-version",
    "ordered-without-backend-flushes",
    "ordered-without-checkpoints",
):
    SIZES[_name] = FOCUS[3]
for _name in (
    "given-up-at-the-first-failure",
    "neighbours-of-a-bad-sector-are-given-up",
    "a-device-that-reads-nothing-is-given-up",
    "a-bad-sector-is-never-given-up",
    "what-has-been-read-is-overwritten-by-a-probe",
):
    SIZES[_name] = {"bad_sectors": 0.1, "steps": 200, "destage": True, "flips": 0.0, "cache_faults": 0.0}
SIZES["what-has-been-read-is-overwritten-by-a-probe"] |= {
    "bad_sectors": 0.4,
    "depth": 12,
    "burst": 4,
    "object_blocks": 8,
    "slots": 31,
    "blocks": 48,
    "hot_blocks": 48,
    "whole": 1.0,
    "writes": 0.9,
    "openings": 1,
    "ordered": False,
    "wants_whole_objects": False,
}
SIZES["what-only-the-log-has-is-passed-over-too"] = {
    "flips": 1.0,
    "openings": 2,
    "writes": 0.5,
    "recovery_crashes": 0.0,
}
for _name in (
    "a-loss-does-not-hold-the-tail",
    "a-loss-does-not-outlive-the-process",
    "no-room-for-losses-in-a-full-log",
):
    SIZES[_name] = FOCUS[5]
SIZES["epoch-in-one-superblock"] = {"openings": 2, "steps": 30, "flips": 1.0, "recovery_crashes": 0.0}

_READS: Final = {"read_blocks": 60, "writes": 0.5, "ring_blocks": 40, "destage_after_ms": 0, "flips": 0.0}
SIZES["read-cache-not-dropped-on-write"] = SIZES["read-cache-not-dropped-on-discard"] = _READS
SIZES["read-cache-overtaken-by-a-write"] = _READS
SIZES["read-cache-trusted-after-a-crash"] = {**_READS, "openings": 4, "shutdowns": 0.6}


def plant(name: str) -> None:
    """Switch a bug on."""
    CANARIES[name]()


def canary(function: Callable[[], None]) -> Callable[[], None]:
    """By its name, with hyphens."""
    CANARIES[function.__name__.replace("_", "-")] = function
    return function


def _patch(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """`wrapper` is called with the original function before its own arguments."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **named: wrapper(original, *arguments, **named))


@canary
def warm_after_a_hand_over() -> None:
    """Hazard 11: the log of an image that was in other hands is believed when it comes back."""
    _patch(log_volume.LogVolume, "close", lambda original, self, stamp, cold=False: original(self, stamp, False))


# What the writer and the destager do.


@canary
def destage_what_is_not_durable() -> None:
    """Hazard 1: the newest version goes to the backend, not the durable one."""

    def choose(original: Any, self: Any, chosen: Any, block: int, value: int, fetch: Any) -> None:
        slot = self._map.where.get(block)
        if slot is not None and self._map.state[slot] in (DIRTY, WRITING) and self._map.free:
            copy = self._map.free.pop()
            self._map.state[copy] = ORPHAN
            self._io.copy_slot(slot, copy)
            chosen.pinned.append(copy)
            chosen.blocks.append(block)
            chosen.slots.append(copy)
        else:
            original(self, chosen, block, value, fetch)

    _patch(sources.Sources, "_choose_source", choose)


@canary
def destage_what_nothing_vouches_for() -> None:
    """The newest durable record is destaged in part; it rots, and passes for the end of the log."""

    def absorb(original: Any, self: Any) -> Any:
        more = original(self)
        self.vouched_address = self.durable_address
        return more

    _patch(writer.LogWriter, "absorb", absorb)


@canary
def ring_space_before_the_superblock_is_durable() -> None:
    """Hazard 5."""

    def begin(original: Any, self: Any) -> None:
        original(self)
        self._writer.free_below = self._running.tail_address + self._writer.ring_blocks

    _patch(checkpoint.Checkpointer, "_begin", begin)


@canary
def zeroes_behind_newer_data_of_their_record() -> None:
    """Hazard 8: no new record is begun for an extent of zeroes that follows data of the same blocks."""

    behind: set[int] = set()

    def zero(original: Any, self: Any, request: Any) -> Any:
        first, end = (request[2] + 7) >> 3, (request[2] + request[3]) >> 3
        record, block_map = self._writer.open, self._map
        data = [slot for block, slot in record.slots.items() if first <= block < end] if record else []
        if not data:
            return original(self, request)
        seal = self._writer.seal
        self._writer.seal = lambda: setattr(self._writer, "seal", seal)
        try:
            return original(self, request)
        finally:
            self._writer.seal = seal
            for slot in data:
                if block_map.state[slot] == FREE:
                    block_map.free.remove(slot)
                    block_map.state[slot] = DIRTY
                    behind.add(slot)

    def sealed(original: Any, self: Any) -> None:
        original(self)
        for slot in [slot for slot in behind if self._map.state[slot] == WRITING]:
            behind.remove(slot)
            self._map.state[slot] = ORPHAN

    _patch(writer.LogWriter, "seal", sealed)
    _patch(log_volume.LogVolume, "_zero", zero)


@canary
def flush_without_the_records_in_flight() -> None:
    """Hazard 14: a fdatasync is issued, and believed, before all records it should cover have been written."""

    def schedule(original: Any, self: Any, now_ns: int) -> Any:
        deadline_ns = original(self, now_ns)
        if self._flush is None and self._committing and not self.blocked:
            self._start_flush()
        return deadline_ns

    def flushed(original: Any, self: Any, flush: Any, result: int) -> None:
        original(self, flush, result)
        if self._committing and result == 0:
            self._end_commit()

    _patch(writer.LogWriter, "schedule", schedule)
    _patch(writer.LogWriter, "flushed", flushed)


@canary
def chosen_from_ram_and_not_kept_until_it_is_written() -> None:
    """A slot is evicted while a destage of several turns has yet to write it."""

    def pin(original: Any, self: Any, chosen: Any, block: int, slot: int) -> None:
        chosen.blocks.append(block)
        chosen.slots.append(slot)

    _patch(sources.Sources, "_pin", pin)


@canary
def durable_write_that_is_none() -> None:
    """The engine forgets that a record's write is to be durable."""

    def begin(original: Any, self: Any, io: Any) -> None:
        io.durable = False
        original(self, io)

    _patch(engine.Engine, "_begin", begin)


@canary
def no_fdatasync() -> None:
    """The engine says that it has synchronized the cache file, and has not."""

    def execute(original: Any, self: Any, code: int, name: int, argument: int, words: Any) -> None:
        if code == op.LOG_FLUSH:
            self.cache.reported = {}
        original(self, code, name, argument, words)

    _patch(engine.Engine, "_operation", execute)


@canary
def only_the_failed_fdatasync_again() -> None:
    """Hazard 14: after a failed fdatasync nothing is written again."""
    _patch(writer.LogWriter, "_lose", lambda original, self: None)


@canary
def entries_retired_when_written() -> None:
    """The RAM tier gives up what is written and not yet durable."""

    def written(original: Any, self: Any, record: Any, result: int) -> None:
        original(self, record, result)
        if record.written and record is self._records[0] and record.entries_end > self._retired:
            self._retired = record.entries_end
            self._io.retire(record.entries_end)

    _patch(writer.LogWriter, "record_written", written)


@canary
def tail_moved_before_the_backend_flush() -> None:
    """Written to the backend counts as durable there."""

    def start(_: Any, self: Any) -> None:
        written, self._written = self._written, []
        self._finish(self._flushed + written)

    _patch(destage.LogDestager, "_start_flush", start)


@canary
def superblock_in_place() -> None:
    """Copy A alone is written, over and over."""

    def write(original: Any, self: Any, offset: int) -> None:
        original(self, A_OFFSET_BYTES)
        self._offset = B_OFFSET_BYTES

    _patch(checkpoint.Checkpointer, "_write", write)

    def write_both(original: Any, disk: Any, block: Any, first: int) -> None:
        disk.write(A_OFFSET_BYTES, block.pack())
        disk.sync()

    _patch(recovery, "_write_superblocks", write_both)


@canary
def write_cache_forgotten() -> None:
    """Hazard 7: what the guest believes is not kept over a restart."""
    _patch(log_volume.LogVolume, "_recall_write_cache", lambda original, self, state: None)


# What cannot be read.


@canary
def given_up_at_the_first_failure() -> None:
    """A fault that would have passed costs data."""
    unreadable.ATTEMPTS = 1  # type: ignore[misc]


@canary
def a_bad_sector_is_never_given_up() -> None:
    """The log stands still because of it."""
    unreadable.ATTEMPTS = 1 << 62  # type: ignore[misc]


@canary
def neighbours_of_a_bad_sector_are_given_up() -> None:
    """All that one read was to bring, each time."""

    def staged(original: Any, self: Any, read: Any, result: int) -> None:
        if result != -engine.EIO or not read.destage.errno:
            original(self, read, result)
            return
        for block, address in zip(read.blocks, read.addresses, strict=True):
            self._leave_out(read.destage, block, address, result)
        self._go_on(read.destage)

    def addresses(original: Any, self: Any, numbers: Any = None) -> Any:
        return original(self, ()) if numbers else original(self)

    _patch(sources.Sources, "staged", staged)
    _patch(unreadable.UnreadableBlocks, "addresses", addresses)


@canary
def what_has_been_read_is_overwritten_by_a_probe() -> None:
    """The slot into which the device's other blocks are read is one of a read that has succeeded since."""

    def probe(original: Any, self: Any, chosen: Any, *arguments: Any) -> None:
        read = [slot for slot in chosen.slots if slot in chosen.staged]
        if read:
            chosen.scratch = read[0]
        original(self, chosen, *arguments)

    _patch(sources.Sources, "_probe", probe)


@canary
def a_device_that_reads_nothing_is_given_up() -> None:
    """A bad sector and a bad device are not told apart."""

    def judge(original: Any, self: Any, number: int, blocks: Any, device_works: bool, now_ns: int) -> Any:
        return original(self, number, blocks, True, now_ns)

    _patch(unreadable.UnreadableBlocks, "judge", judge)


# The policy `ordered`.


@canary
def ordered_without_intervals() -> None:
    """A guest's flush is no reason to end a step."""
    _patch(ordered.OrderedQueue, "cut", lambda original, self, address: None)


@canary
def ordered_with_the_newest_version() -> None:
    """What belongs to a later interval goes to the backend with an earlier one."""

    def choose(original: Any, self: Any, chosen: Any, block: int, value: int, fetch: Any) -> None:
        newest = self._index.lookup(block)
        durable = newest >> 1 < self._writer.durable_address
        original(self, chosen, block, newest if durable and newest > value else value, fetch)

    _patch(sources.Sources, "_choose_version", choose)


@canary
def ordered_without_backend_flushes() -> None:
    """Written to the backend counts as durable there: the next step begins at once."""

    def start(_: Any, self: Any) -> None:
        written, self._written = self._written, []
        self._finish(written)

    _patch(destage.LogDestager, "_start_flush", start)


@canary
def ordered_without_checkpoints() -> None:
    """The next step begins although a crash would repeat the one before over it."""

    def end(original: Any, self: Any) -> None:
        self.checkpoint = lambda when_done: when_done()
        original(self)

    _patch(destage.LogDestager, "_end_step", end)


# What the guest's requests meet.


@canary
def completion_before_publishing() -> None:
    """A change is acknowledged before the RAM tier names it."""

    def publish(_: Any, self: Any, entries: Any) -> None:
        self.late = entries

    def acknowledge(original: Any, self: Any, tag: int) -> None:
        original(self, tag)
        publish_now(self, self.late)

    publish_now = log_volume.LogVolume._publish
    _patch(log_volume.LogVolume, "_publish", publish)
    _patch(log_volume.LogVolume, "_acknowledge", acknowledge)


@canary
def fill_without_the_race_check() -> None:
    """Hazard 9: a write does not poison the fill in flight that it overtakes."""
    _patch(Fills, "poison", lambda original, self, block: None)
    _patch(Fills, "poison_range", lambda original, self, first, end: None)


@canary
def parked_requests_survive_their_connection() -> None:
    """Hazard 2: what waits for a fill is executed although its front-end has gone."""

    def drop(original: Any, self: Any) -> None:
        retries = [(fill, list(fill.retries)) for fill in self._fills.running]
        original(self)
        for fill, requests in retries:
            fill.retries += requests

    _patch(guest_requests.GuestRequests, "_drop_waiting", drop)


@canary
def what_is_behind_the_end_is_left_as_it_is() -> None:
    """A disk whose last block is a part of one grows, and shows what the slot held before."""

    def no_zeroes(original: Any, self: Any, *arguments: Any) -> None:
        pass

    _patch(guest_requests.GuestRequests, "_clear_behind_end", no_zeroes)


@canary
def partial_block_without_its_newest_content() -> None:
    """Hazard 26: the rest of a partial block is taken from nowhere."""

    def copy(_: Any, self: Any, block: int, slot: int) -> None:
        self._io.zero_slot(slot, 0, 4096)

    _patch(log_volume.LogVolume, "_copy_base", copy)


# What recovery does.


@canary
def a_loss_does_not_hold_the_tail() -> None:
    """What the backend has of a block that was lost is shown, when the log has gone on."""

    def clean_below(original: Any, self: Any, durable: int) -> Any:
        lost, self.lost = self.lost, {}
        try:
            return original(self, durable)
        finally:
            self.lost = lost

    _patch(index.LogIndex, "clean_below", clean_below)


@canary
def a_loss_does_not_outlive_the_process() -> None:
    """The same after a restart."""

    def recover_loss(original: Any, self: Any, *arguments: Any) -> None:
        pass

    _patch(index.LogIndex, "recover_loss", recover_loss)


@canary
def no_room_for_losses_in_a_full_log() -> None:
    """A log that is full because of what has rotted in it stays full."""

    def take_room(original: Any, self: Any, *arguments: Any, urgent: bool = False) -> Any:
        return original(self, *arguments)

    _patch(writer.LogWriter, "take_room", take_room)


@canary
def epoch_in_one_superblock() -> None:
    """Hazard 4: the new epoch stands in one copy until the next checkpoint."""

    def write(original: Any, disk: Any, block: Any, first: int) -> None:
        disk.write(first, block.pack())
        disk.sync()

    _patch(recovery, "_write_superblocks", write)


@canary
def tier_of_this_epoch_only() -> None:
    """Hazard 13: after a crash in recovery the RAM tier is of the epoch before."""
    original = decision.Situation.tier_is_named.fget
    assert original is not None

    def named(self: Any) -> bool:
        return original(self) and self.offered_tier.epoch == self.superblock.epoch

    decision.Situation.tier_is_named = property(named)  # type: ignore[method-assign, assignment]


@canary
def no_replay_of_the_tier() -> None:
    """What only the RAM tier has is forgotten."""
    _patch(decision, "_groups", lambda original, tier, seq: ())


@canary
def no_payload_crc() -> None:
    """A record whose header is whole counts as whole."""
    _patch(walk, "_payload_fault", lambda original, reader, header: "")


def _without_the_chain(original: Any, self: Any, header: Any, address: int, seq: int) -> str:
    """The crc of the header before finds the same: it has to be off as well."""
    return str(original(self, header._replace(previous_crc=self._previous_crc), address, seq))


@canary
def no_epoch() -> None:
    """Records of any epoch count."""

    def refuses(original: Any, self: Any, header: Any, address: int, seq: int) -> str:
        epoch = self._superblock.epoch if seq >= self._superblock.open_seq else self._last_epoch
        return _without_the_chain(original, self, header._replace(epoch=epoch), address, seq)

    _patch(walk._Judge, "refuses", refuses)


@canary
def no_open_seq() -> None:
    """Records of an earlier epoch count wherever they stand."""

    def refuses(original: Any, self: Any, header: Any, address: int, seq: int) -> str:
        if seq >= self._superblock.open_seq and header.epoch < self._superblock.epoch:
            header = header._replace(epoch=self._superblock.epoch)
        return _without_the_chain(original, self, header, address, seq)

    _patch(walk._Judge, "refuses", refuses)


@canary
def lost_tier_accepted() -> None:
    """Hazard 12: a RAM-tier file that is gone is not missed."""
    original = recovery.recover

    def recover(*arguments: Any, **named: Any) -> Any:
        return original(*arguments, **named, accept_lost_tier=True)

    recovery.recover = recover  # type: ignore[assignment]


@canary
def rot_taken_for_the_end() -> None:
    """Hazard 6: nobody looks behind the end of the log, nor at the durable address."""
    decision.Situation.witness_seq = property(lambda self: 0)  # type: ignore[assignment, method-assign]
    decision.Situation.log_broken = property(lambda self: False)  # type: ignore[assignment, method-assign]


# The read cache.


@canary
def read_cache_not_dropped_on_write() -> None:
    """Hazard 10: what has been overwritten is found there when the log has gone on."""
    _patch(read_ring.ReadRing, "drop", lambda original, self, blocks: None)


@canary
def read_cache_not_dropped_on_discard() -> None:
    """The same for zeroes."""
    _patch(read_ring.ReadRing, "drop_range", lambda original, self, first, end: None)


@canary
def read_cache_overtaken_by_a_write() -> None:
    """A block is admitted although it has been overwritten while it was on its way to the cache device."""

    def drop(original: Any, self: Any, blocks: Any) -> None:
        writing = dict(self._writing)
        original(self, blocks)
        self._writing.update(writing)

    _patch(read_ring.ReadRing, "drop", drop)


@canary
def read_cache_trusted_after_a_crash() -> None:
    """The index of an earlier end in good order is believed after whatever has come since."""

    def load(original: Any, disk: Any, recovered: Any) -> Any:
        before = recovered.finding.superblock
        if before is None:
            return None
        positions = read_ring.positions_of(before.read_blocks)
        at = read_ring.offset_bytes(before.ring_blocks) + positions * 4096
        epoch = int.from_bytes(disk.read(at, 4096)[32:40], "little")
        finding = replace(
            recovered.finding,
            superblock=replace(before, clean=True, epoch=epoch),
            decision=decision.Decision.WARM,
            evicts=False,
        )
        return original(disk, replace(recovered, finding=finding))

    _patch(read_ring, "load", load)


@canary
def what_only_the_log_has_is_passed_over_too() -> None:
    """A dirty block that the log cannot give is read from the backend, which has something older."""

    def forget(original: Any, self: Any, *arguments: Any) -> Any:
        with mock.patch.object(index.LogIndex, "is_clean", return_value=True):
            return original(self, *arguments)

    _patch(index.LogIndex, "forget_clean", forget)
